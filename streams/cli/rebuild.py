"""`notify rebuild`: a projection made anew from the log, which is the truth."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, cast

import typer
from confluent_kafka import Message

from schemas import topics
from schemas.codec import Codec
from schemas.errors import PermanentError, UnknownSchemaError
from schemas.messages import DecisionRecord, StatusChange
from streams.cli import console
from streams.cli.context import load_settings
from streams.cli.errors import EXIT_SETTINGS, CliError
from streams.cli.kafka import Reader, partition_count
from streams.registry import Registry
from streams.settings import Settings
from streams.topics import physical

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

NEEDS = frozenset({"NOTIFY_KAFKA_BOOTSTRAP", "NOTIFY_REGISTRY_URL", "NOTIFY_POSTGRES_URL"})
BATCH_RECORDS = 2_000
# clocks of those who wrote the log differ; what is so close to its beginning is kept, and merged with what the log says
MARGIN = timedelta(hours=1)
_READ: Mapping[str, type[DecisionRecord | StatusChange]] = {topics.DECISIONS: DecisionRecord, topics.STATUS: StatusChange}

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Make a projection anew from the log.")


@app.callback()
def rebuild_() -> None:
    """Make a projection anew from the log."""


@app.command("postgres", epilog=console.examples("notify rebuild postgres", "notify rebuild postgres --yes --json"))
def postgres(*, yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False, as_json: console.JsonOption = False) -> None:
    """Delete the notifications in PostgreSQL that the log still holds, and make them anew from it.

    Older ones are kept. The store may run meanwhile: each partition is one transaction, during which the store waits with
    it and queries see the rows as they were. Interrupted, a partition stays as it was.
    """
    settings, _ = load_settings(os.environ, needs=NEEDS)
    beginnings = log_beginnings(settings)
    oldest = max((moment for moment in beginnings.values() if moment is not None), default=None)
    if not yes:
        _ask(oldest)
    done = asyncio.run(Rebuild(settings, beginnings).run())
    if as_json:
        console.print_document(console.to_json(done))
        return
    console.succeed(f"{done.made} notifications were made anew from {done.records} records")
    if oldest is not None:
        console.succeed(f"{done.kept} were kept: the log begins later than they do, at {console.show_time(oldest)}")
    if done.passed_over:
        console.warn(
            f"{done.passed_over} records were passed over: nothing can come of them, and the store has set them aside (`notify dlq list`)"
        )


def _ask(oldest: datetime | None) -> None:
    if not sys.stdin.isatty():
        raise CliError("This deletes rows, so it asks first, and there is no terminal to ask at: say --yes.", exit_code=EXIT_SETTINGS)
    since = (
        "all of them: the log is complete" if oldest is None else f"those from about {console.show_time(oldest)} on; older ones are kept"
    )
    typer.confirm(f"Notifications in PostgreSQL will be deleted and made anew from the log, {since}. Go on?", abort=True, err=True)


@dataclass(slots=True)
class Done:
    """What was done. `kept`: notifications that are older than the log."""

    records: int = 0
    made: int = 0
    kept: int = 0
    passed_over: int = 0


def log_beginnings(settings: Settings) -> dict[int, datetime | None]:
    """Return from when on the log is complete, by partition of the users' topics; None: from the very beginning.

    Both topics count: a notification whose decision is there but whose statuses have gone could not be made anew.
    """
    counts = {topic: partition_count(settings.cluster, physical(settings.env, topic)) for topic in _READ}
    if len(set(counts.values())) != 1:
        raise CliError(f"The topics have different partition counts: {counts}. Run `notify doctor`.")
    found: dict[int, datetime | None] = dict.fromkeys(range(counts[topics.DECISIONS]))
    for topic in _READ:
        name = physical(settings.env, topic)
        with Reader(settings.cluster, name, list(found)) as reader:
            sizes = reader.sizes()
        for partition, (low, high) in sizes.items():
            if low:
                moment = _first_moment(settings, name, partition, low) if high > low else datetime.now(UTC)
                found[partition] = max(moment, found[partition] or moment)
    return found


def _first_moment(settings: Settings, topic: str, partition: int, low: int) -> datetime:
    with Reader(settings.cluster, topic, {partition: low}) as reader:
        first = next(reader.to_end(), None)
    return datetime.now(UTC) if first is None else datetime.fromtimestamp(first.timestamp()[1] / 1000, UTC)


class Rebuild:
    """One run over all partitions; `beginnings` as `log_beginnings` gives them."""

    def __init__(self, settings: Settings, beginnings: Mapping[int, datetime | None]) -> None:
        self._settings = settings
        self._beginnings = beginnings
        self._registry = Registry(settings.registry_url, settings.data_dir / "schemas", settings.registry_security)
        self._codec = Codec({}, self._registry.schemas)
        self._done = Done()

    async def run(self) -> Done:
        """Make every partition anew. Raises DatabaseUnavailableError, CliError: the partitions done so far are done."""
        from streams.store.database import Database
        from streams.store.migrate import migrate

        settings = self._settings
        # nothing here has a deadline: a partition takes as long as its log is
        database = Database(settings.postgres_url, application="notify-cli", connections=1, statement_seconds=0)
        try:
            await migrate(database, kept_months=settings.store_months)
            for partition, beginning in self._beginnings.items():
                async with database.begin() as connection:
                    await self._partition(connection, partition, None if beginning is None else beginning + MARGIN)
            # rows of months that are not kept, or were not made, came again
            await migrate(database, kept_months=settings.store_months)
        finally:
            await database.close()
            await self._registry.close()
        return self._done

    async def _partition(self, connection: AsyncConnection, partition: int, since: datetime | None) -> None:
        from streams.store.rows import count, remove, take_lock

        partitions = len(self._beginnings)
        await take_lock(connection, partition)
        await remove(connection, partition, partitions=partitions, since=since)
        kept = await count(connection, partition, partitions=partitions)
        for topic in _READ:
            await self._replay(connection, topic, partition)
        self._done.kept += kept
        self._done.made += await count(connection, partition, partitions=partitions) - kept

    async def _replay(self, connection: AsyncConnection, topic: str, partition: int) -> None:
        """Merge a topic's partition to the end that it has now: the partition's lock is held, so the store is not ahead of it."""
        from streams.store.rows import keep

        name = physical(self._settings.env, topic)
        with Reader(self._settings.cluster, name, [partition]) as reader:
            low, high = reader.sizes()[partition]
            with console.progress(f"{name}[{partition}]", high - low) as advance:
                for batch in _batches(reader.to_end()):
                    records = [await self._decode(message, _READ[topic]) for message in batch]
                    good = [record for record in records if record is not None]
                    kept = await keep(connection, partition, good)
                    self._done.records += len(batch)
                    self._done.passed_over += len(batch) - len(good) + len(kept.refused)
                    advance(cast("int", batch[-1].offset()) - low)

    async def _decode(self, message: Message, kind: type[DecisionRecord | StatusChange]) -> DecisionRecord | StatusChange | None:
        try:
            try:
                return self._codec.decode(message.value(), kind)
            except UnknownSchemaError as error:
                await self._registry.learn(error.schema_id)
                return self._codec.decode(message.value(), kind)
        except PermanentError:
            return None


def _batches(messages: Iterator[Message]) -> Iterator[list[Message]]:
    batch: list[Message] = []
    for message in messages:
        batch.append(message)
        if len(batch) == BATCH_RECORDS:
            yield batch
            batch = []
    if batch:
        yield batch
