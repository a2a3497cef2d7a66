"""`notify store`: the tables in PostgreSQL."""

from __future__ import annotations

import asyncio
import os

import typer

from streams.cli import console
from streams.cli.context import load_settings
from streams.settings import Settings

NEEDS = frozenset({"NOTIFY_POSTGRES_URL"})
MINUTES_SECONDS = 600.0  # a step may have to rewrite a table

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Look after the tables in PostgreSQL.")


@app.callback()
def store_() -> None:
    """Look after the tables in PostgreSQL."""


@app.command("migrate", epilog=console.examples("notify store migrate"))
def migrate(*, as_json: console.JsonOption = False) -> None:
    """Bring the tables to what this release expects, make the coming months and drop old ones (NOTIFY_STORE_MONTHS).

    A store worker does the same when it starts; running both at once is safe.
    """
    from streams.store.migrate import HEAD

    settings, _ = load_settings(os.environ, needs=NEEDS)
    found, dropped = asyncio.run(_migrate(settings))
    if as_json:
        console.print_document({"before": found, "now": HEAD, "dropped": dropped})
        return
    console.succeed(f"the tables are of revision {HEAD}" + (", as they were" if found == HEAD else f"; they were of {found or 'none'}"))
    if dropped:
        console.succeed(f"dropped what is older than {settings.store_months} months: {', '.join(dropped)}")


async def _migrate(settings: Settings) -> tuple[str | None, list[str]]:
    from streams.store.database import Database
    from streams.store.migrate import migrate as bring_up

    database = Database(settings.postgres_url, application="notify-cli", connections=1, statement_seconds=MINUTES_SECONDS)
    try:
        return await bring_up(database, kept_months=settings.store_months)
    finally:
        await database.close()
