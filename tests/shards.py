"""Shards without Kafka, for tests of what becomes of what they are offered: what they write is kept, commit by commit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, TypeVar, cast

from schemas.codec import pack, unpack
from schemas.messages import Message
from streams.metrics import Metrics
from streams.roles import Role
from streams.runs import DeadRun
from streams.shard import Encoder, Input, Lane, Names, Shard, Tools, Turns
from streams.topology import TOPOLOGY, Step, all_topics
from streams.transport.cluster import Cluster
from streams.transport.reader import Batch, Reader
from streams.transport.records import Record
from streams.transport.writer import Headers, Writer

NOWHERE = Cluster(bootstrap="127.0.0.1:1")
M = TypeVar("M", bound=Message)


def step_of(role: Role, name: str) -> Step:
    """Return a step of the topology."""
    return next(step for step in TOPOLOGY if (step.role, step.name) == (role, name))


class _Packing:
    def encode(self, message: Message) -> bytes:
        return pack(message)


def tools() -> Tools:
    """Return tools that know every topic, each with four partitions, and no Kafka."""
    specs = {spec.name: spec for spec in all_topics()}
    physical = {name: f"notify.x.{name}" for name in specs}
    names = Names(
        physical=physical,
        logical={found: name for name, found in physical.items()},
        specs=specs,
        partitions=dict.fromkeys(specs, 4),
        ids=dict.fromkeys(specs, "id"),
    )
    return Tools(
        cluster=NOWHERE,
        names=names,
        encoder=cast("Encoder", _Packing()),
        metrics=Metrics(Role.ROUTER),
        role=Role.ROUTER,
        pool=ThreadPoolExecutor(1),
        turns=Turns(),
    )


class Counting:
    """A reader that counts what is finished."""

    def __init__(self) -> None:
        self.finished_records = 0

    def finished(self, _partition: int, records: int) -> None:
        """Count records that are done."""
        self.finished_records += records


def lane(topic: str, handles: Input, *, urgency: int = 0, reader: Counting | None = None) -> Lane:
    """Return an input that is read from its beginning."""
    found = Lane(topic=topic, urgency=urgency, handles=handles, reader=cast("Reader", reader or Counting()), run=DeadRun(0))
    found.begin(0)
    return found


@dataclass(frozen=True)
class Told:
    """A record of a message."""

    message: Any
    key_bytes: bytes
    place: int
    at: datetime

    def offset(self) -> int:
        return self.place

    def partition(self) -> int:
        return 0

    def timestamp(self) -> tuple[int, int]:
        return 1, round(self.at.timestamp() * 1000)

    def key(self) -> bytes:
        return self.key_bytes

    def value(self) -> bytes:
        return pack(self.message)

    def headers(self) -> None:
        return None


def batch(topic: str, number: int, *records: Told, end: int | None = None, partition: int = 0) -> Batch:
    """Return the batch of this number of a topic."""
    return Batch(f"notify.x.{topic}", partition, 1, number, cast("list[Record]", list(records)), end)


class Written(NamedTuple):
    """A record that was written. `topic` as agents know it."""

    topic: str
    key: bytes | None
    value: bytes | None


class KeptWriter(Writer):
    """Keeps each committed transaction."""

    def __init__(self) -> None:
        super().__init__(NOWHERE, transactional_id="kept", max_message_bytes=1_000_000)
        self.commits: list[list[Written]] = []
        self._open: list[Written] = []

    def begin(self) -> None:
        """Begin a transaction."""
        self._open = []

    def produce(
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None,
        partition: int = -1,  # noqa: ARG002 - the writer's
        headers: Headers | None = None,  # noqa: ARG002 - the writer's
        *,
        timestamp_ms: int = 0,  # noqa: ARG002 - the writer's
    ) -> None:
        """Add a record to the open transaction."""
        self._open.append(Written(topic.removeprefix("notify.x."), key, value))

    def commit(self) -> None:
        """Keep the open transaction."""
        self.commits.append(self._open)

    def written(self, topic: str) -> list[Written]:
        """Return what was committed to a topic."""
        return [each for commit in self.commits for each in commit if each.topic == topic]

    def messages(self, topic: str, kind: type[M]) -> list[M]:
        """Return what was committed to a topic, as messages."""
        return [unpack(each.value or b"", kind) for each in self.written(topic)]


def keep(shard: Shard) -> KeptWriter:
    """Let a shard write to a kept writer; return it."""
    writer = KeptWriter()
    shard.writer = writer
    return writer


def of_messages(decide: Callable[..., Any], wrap: Callable[[Told], object] = lambda record: record.message) -> Input:
    """Return the input of a topic whose records are `Told`."""
    return Input(decode=cast("Callable[[Record], object]", wrap), decide=decide)


def rows_of(shard: Shard) -> Mapping[str, list[bytes]]:
    """Return the keys of each table of a shard, in their order."""
    return {name: list(rows) for name, rows in shard.tables.items()}
