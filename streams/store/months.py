"""The months of the tables: made ahead, dropped when they are older than what is kept. Dropping one costs nothing."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import Table, text
from sqlalchemy.ext.asyncio import AsyncConnection

from streams.store.tables import DELIVERY, NOTIFICATION, REST, partition_name

# as far back as the log goes: a store that begins reads all of it
MONTHS_BACK = 3
MONTHS_AHEAD = 2
_LOCK_SECONDS = 2


class Month(int):
    """A month of the calendar, UTC, as a number that counts on."""

    @classmethod
    def of(cls, moment: datetime) -> Month:
        """Return the month that `moment` is in."""
        utc = moment.astimezone(UTC)
        return cls(utc.year * 12 + utc.month - 1)

    @property
    def begin(self) -> datetime:
        """Its first moment."""
        year, month = divmod(self, 12)
        return datetime(year, month + 1, 1, tzinfo=UTC)

    @property
    def name(self) -> str:
        """What it is called in names of tables: 2026_01."""
        return f"{self.begin:%Y_%m}"


async def keep_months(connection: AsyncConnection, *, kept: int, now: datetime) -> list[str]:
    """Make the months around `now` and drop those before the last `kept`, the current one included; return the dropped tables.

    Rows that came for a month which was not made are filed into it. Raises the database's error when somebody holds the
    tables for longer than _LOCK_SECONDS: the caller tries again later.
    """
    current = Month.of(now)
    oldest = Month(current - kept + 1)
    await connection.execute(text(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'"))
    dropped: list[str] = []
    for table in (NOTIFICATION, DELIVERY):
        found = await _months(connection, table)
        filed = await _unfiled(connection, table, oldest, Month(current + MONTHS_AHEAD + 1))
        around = {Month(number) for number in range(max(oldest, current - MONTHS_BACK), current + MONTHS_AHEAD + 1)}
        for month in sorted((around | filed) - found.keys()):
            await _make(connection, table, month)
        for month, name in found.items():
            if month < oldest:
                await connection.execute(text(f"DROP TABLE {name}"))
                dropped.append(name)
        rest = partition_name(table, REST)
        await connection.execute(text(f"DELETE FROM {rest} WHERE created_at < :begin"), {"begin": oldest.begin})  # noqa: S608 - our own names
    return dropped


async def _months(connection: AsyncConnection, table: Table) -> dict[Month, str]:
    found = await connection.execute(
        text("SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = CAST(:name AS regclass)"), {"name": table.name}
    )
    names = [str(name) for (name,) in found]
    months = [(name.removeprefix(f"{table.name}_").split("_"), name) for name in names if name != partition_name(table, REST)]
    return {Month(int(year) * 12 + int(month) - 1): name for (year, month), name in months}


async def _unfiled(connection: AsyncConnection, table: Table, first: Month, end: Month) -> set[Month]:
    found = await connection.execute(
        text(
            f"SELECT DISTINCT date_trunc('month', created_at) FROM {partition_name(table, REST)} "  # noqa: S608 - our own names
            "WHERE created_at >= :first AND created_at < :end"
        ),
        {"first": first.begin, "end": end.begin},
    )
    return {Month.of(moment) for (moment,) in found}


async def _make(connection: AsyncConnection, table: Table, month: Month) -> None:
    name, rest = partition_name(table, month.name), partition_name(table, REST)
    begin, end = (f"'{each.begin:%Y-%m-%d}'" for each in (month, Month(month + 1)))
    removal = f"DELETE FROM {rest} WHERE created_at >= {begin} AND created_at < {end} RETURNING *"  # noqa: S608 - our own names
    for statement in (
        f"LOCK TABLE {table.name} IN ACCESS EXCLUSIVE MODE",  # nobody writes into the rest while it is moved
        # rows change a few times while they are young: room for them beside their old selves
        f"CREATE TABLE {name} (LIKE {table.name} INCLUDING DEFAULTS) WITH (fillfactor = 80)",
        f"WITH moved AS ({removal}) INSERT INTO {name} SELECT * FROM moved",  # noqa: S608 - our own names
        f"ALTER TABLE {table.name} ATTACH PARTITION {name} FOR VALUES FROM ({begin}) TO ({end})",
    ):
        await connection.execute(text(statement))
