"""Brings the tables to what this release expects, once, however many workers start at the same time."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Connection, inspect, text

from schemas.errors import SettingsError
from streams.store.database import Database
from streams.store.months import keep_months

# the newest step: a start that finds it loads no Alembic
HEAD = "0001"
# advisory locks: this number, and a partition of the users' topics, or ALL
LOCK_SPACE = 0x6E6F7466
ALL = -1
FOLDER = Path(__file__).parent / "migrations"


async def migrate(database: Database, *, kept_months: int) -> tuple[str | None, list[str]]:
    """Bring the tables up to HEAD, make months and drop old ones; return the revision that was there, and what was dropped.

    Raises DatabaseUnavailableError, and SettingsError when the tables are of a newer release.
    """
    async with database.begin() as connection:
        await connection.execute(text("SELECT pg_advisory_xact_lock(:space, :all)"), {"space": LOCK_SPACE, "all": ALL})
        found = await connection.run_sync(current_revision)
        if found != HEAD:
            await connection.run_sync(_upgrade, found)
        return found, await keep_months(connection, kept=kept_months, now=datetime.now(UTC))


def current_revision(connection: Connection) -> str | None:
    """Return the revision that the tables are of; None: there are none."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return None if found is None else str(found)


def _upgrade(connection: Connection, found: str | None) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(FOLDER))
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise SettingsError([f"the tables in PostgreSQL are of revision {found}, which this release does not know: start the newer one"])
    command.upgrade(config, "head")
