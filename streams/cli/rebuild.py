"""`notify rebuild`: a projection made anew from the log, which is the truth."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
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

    from streams.store.database import Database

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
def postgres(
    *, yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False, as_json: console.JsonOption = False
) -> None:
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
        console.print_document(done)
        return
    console.succeed(f"{done.made} notifications were made anew from {done.records} records")
    if oldest is not None:
        console.succeed(f"{done.kept} were kept: the log begins later than they do, at {console.show_time(oldest)}")
    if done.passed_over:
        console.warn(f"{done.passed_over} records were passed over: nothing can come of them, and the store has set them aside (`notify dlq list`)")


def _ask(oldest: datetime | None) -> None:
    if not sys.stdin.isatty():
        raise CliError("This deletes rows, so it asks first, and there is no terminal to ask at: say --yes.", exit_code=EXIT_SETTINGS)
    since = "all of them: the log is complete" if oldest is None else f"those from about {console.show_time(oldest)} on; older ones are kept"
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


@dataclass(slots=True)
class Rebuild:
    """One run over all partitions."""

    settings: Settings
    beginnings: Mapping[int, datetime | None]
    done: Done = field(default_factory=Done)

    async def run(self) -> Done:
        """Make every partition anew. Raises DatabaseUnavailableError, CliError: the partitions done so far are done."""
        from streams.store.database import Database
        from streams.store.migrate import migrate

        registry = Registry(self.settings.registry_url, self.settings.data_dir / "schemas", self.settings.registry_security)
        # nothing here has a deadline: a partition takes as long as its log is
        database = Database(self.settings.postgres_url, application="notify-cli", connections=1, statement_seconds=0)
        try:
            await migrate(database, kept_months=self.settings.store_months)
            codec = Codec({}, registry.schemas)
            for partition, beginning in self.beginnings.items():
                await self._partition(database, registry, codec, partition, beginning)
            # rows of months that are not kept, or were not made, came again
            await migrate(database, kept_months=self.settings.store_months)
        finally:
            await database.close()
            await registry.close()
        return self.done

    async def _partition(
        self, database: Database, registry: Registry, codec: Codec, partition: int, beginning: datetime | None
    ) -> None:
        from streams.store.rows import count, remove, take_lock

        since = None if beginning is None else beginning + MARGIN
        async with database.begin() as connection:
            await take_lock(connection, partition)
            await remove(connection, partition, partitions=len(self.beginnings), since=since)
            kept = await count(connection, partition, partitions=len(self.beginnings))
            for topic, kind in _READ.items():
                await self._replay(connection, registry, codec, topic, kind, partition)
            self.done.kept += kept
            self.done.made += await count(connection, partition, partitions=len(self.beginnings)) - kept

    async def _replay(
        self,
        connection: AsyncConnection,
        registry: Registry,
        codec: Codec,
        topic: str,
        kind: type[DecisionRecord | StatusChange],
        partition: int,
    ) -> None:
        """Merge a topic's partition to the end that it has now: the partition's lock is held, so the store is not ahead of it."""
        from streams.store.rows import keep

        name = physical(self.settings.env, topic)
        with Reader(self.settings.cluster, name, [partition]) as reader:
            low, high = reader.sizes()[partition]
            with console.progress(f"{name}[{partition}]", high - low) as advance:
                for batch in _batches(reader.to_end(), lambda message: advance(cast("int", message.offset()) - low)):
                    records = [await self._decode(registry, codec, message, kind) for message in batch]
                    good = [record for record in records if record is not None]
                    kept = await keep(connection, partition, good)
                    self.done.records += len(batch)
                    self.done.passed_over += len(batch) - len(good) + len(kept.refused)

    async def _decode(
        self, registry: Registry, codec: Codec, message: Message, kind: type[DecisionRecord | StatusChange]
    ) -> DecisionRecord | StatusChange | None:
        try:
            try:
                return codec.decode(message.value(), kind)
            except UnknownSchemaError as error:
                await registry.learn(error.schema_id)
                return codec.decode(message.value(), kind)
        except PermanentError:
            return None


def _batches(messages: Iterator[Message], tell: Callable[[Message], None]) -> Iterator[list[Message]]:
    batch: list[Message] = []
    for message in messages:
        batch.append(message)
        if len(batch) == BATCH_RECORDS:
            yield batch
            tell(message)
            batch = []
    if batch:
        yield batch
