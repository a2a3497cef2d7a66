"""A step's share of one partition number: its tables, its watermarks, and its transactional producer.

Whoever owned the partition before can no longer use that producer. What is read waits in lanes, one an input; what becomes of
it is for the subclasses to say (`deciding`, `sending`, `storing`), and whatever becomes of it is one transaction: outputs, rows
and watermark. What the infrastructure refuses for good ends the process (`cluster.leave`): everything promised is in Kafka, and
a supervisor starts it again.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import math
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar, cast

from sortedcontainers import SortedDict

from agents.ports import Effects, Output, Source
from schemas import topics
from schemas.errors import NotifyError, TooLargeError
from streams.metrics import Metrics
from streams.room import Room
from streams.runs import DeadRun
from streams.topics import DEAD_MAX_BYTES, TopicSpec
from streams.topology import PROGRESS, Step
from streams.transport.changelog import apply_record, apply_shared, read_to_end, shared_key
from streams.transport.cluster import Cluster, leave
from streams.transport.reader import MAX_BATCH_RECORDS, Batch, Reader
from streams.transport.records import PLACE_HEADERS, Place, Record
from streams.transport.writer import RECORD_OVERHEAD_BYTES, AbortedError, FencedError, Headers, Writer, WrongClockError

log = logging.getLogger(__name__)
T = TypeVar("T")

TURN_SECONDS = 0.010  # the longest stretch of work on the event loop
DRAIN_SECONDS = 20.0  # longer than any call to a provider
_LATEST_MS = 253_402_300_799_999  # the end of the year 9999
_MISSING: Any = object()
PROVIDER_HEADER = "provider"


Decide = Callable[[Any, Source, Mapping[str, Mapping[bytes, bytes]]], Effects]
Decode = Callable[[Record], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """What a step does with the records of one topic. `learn` makes schemas known before records are decoded.

    `due` holds records back: the moment, in seconds since 1970, from which a record may be decided. Later records of the
    partition wait behind it, so it should rise with the offset.
    """

    decode: Decode
    decide: Decide
    learn: Callable[[Iterable[Record]], Awaitable[None]] | None = None
    due: Callable[[Record], float] | None = None
    clock_every: int = 16  # records between two looks at the clock; 1 where a single one is milliseconds' work
    # topic for records whose schema the registry could not be asked for; None: the shard waits and tries again
    parked_in: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Topics as agents know them, and as the cluster does."""

    physical: Mapping[str, str]
    logical: Mapping[str, str]
    specs: Mapping[str, TopicSpec]
    partitions: Mapping[str, int]  # by logical name
    ids: Mapping[str, str]  # topic id by logical name: a recreated topic has another

    def route(self, logical: str, step: Step, partition: int) -> Route:
        """Return how shard `partition` of `step` publishes to `logical`: on its own number, unless records are re-keyed."""
        is_rekeyed = self.specs[step.reads[0]].count is not self.specs[logical].count
        return Route(self.physical[logical], -1 if is_rekeyed else partition, self.specs[logical].max_message_bytes)


class Route(NamedTuple):
    """How a shard publishes to a topic. `partition` -1: by the key, as the Java client does."""

    topic: str
    partition: int
    max_bytes: int


class Turns:
    """Whose turn it is to work on the event loop: one at a time, the most urgent lane first."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._is_granting = False

    async def take(self, urgency: int) -> None:
        """Return when it is the caller's turn; the turn lasts until the caller awaits something. 0 is most urgent."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        heapq.heappush(self._waiting, (urgency, next(self._order), turn))
        if not self._is_granting:
            self._is_granting = True
            loop.call_soon(self._grant)
        await turn

    def _grant(self) -> None:
        while self._waiting:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                # runs after the task that this wakes, so that turns never overlap
                asyncio.get_running_loop().call_soon(self._grant)
                return
        self._is_granting = False


class Encoder(Protocol):
    """What the runner needs of the codec."""

    def encode(self, message: Any) -> bytes:
        """Return a message in the wire format."""


@dataclass(slots=True)
class Tools:
    """What the shards of a worker share."""

    cluster: Cluster
    names: Names
    encoder: Encoder
    metrics: Metrics
    role: str
    pool: ThreadPoolExecutor
    turns: Turns
    rooms: dict[str, Room] = field(default_factory=dict)  # by step
    dead_run_limit: int = 0  # so many dead letters in a row halt an input; 0: none does
    fault: Callable[[str], None] = lambda _step: None  # tests stop a worker between any two steps

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a blocking call in the pool."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *arguments)


class RecordSource:
    """The source of a record, each fact looked up when it is asked for: few decisions ask for all."""

    __slots__ = ("_record", "topic")

    def __init__(self, record: Record, topic: str) -> None:
        self._record = record
        self.topic = topic

    @property
    def partition(self) -> int:
        """The partition."""
        return self._record.partition()

    @property
    def offset(self) -> int:
        """The offset."""
        return self._record.offset()

    @property
    def at(self) -> datetime:
        """The Kafka timestamp, aware, UTC; what a producer made of it that no clock can show ends at 1970 or 9999."""
        return datetime.fromtimestamp(min(max(self._record.timestamp()[1], 0), _LATEST_MS) / 1000, UTC)

    @property
    def key(self) -> bytes | None:
        """The key's bytes."""
        return self._record.key()

    @property
    def headers(self) -> Sequence[tuple[str, bytes]]:
        """The headers."""
        return self._record.headers() or ()


def dead_letter_headers(source: Source, error: BaseException, role: str) -> Headers:
    """Return what a dead letter says about itself. Only our own errors speak: others may quote a payload.

    A record that was parked or redriven names the place where it was read first, and keeps its generation.
    """
    is_ours = isinstance(error, NotifyError)
    given = dict(source.headers)
    here = (source.topic, source.partition, source.offset, round(source.at.timestamp() * 1000))
    place = [(name, str(value).encode()) for name, value in zip(PLACE_HEADERS, here, strict=True)]
    # anybody may write to some topics: another topic's name in a header is believed only where we alone write
    if source.topic in {topics.PARKED, (given.get("topic") or b"").decode(errors="replace")}:
        place = [(name, given.get(name) or value) for name, value in place]
    return [
        ("error", (error.reason if isinstance(error, NotifyError) else "internal").encode()),
        ("message", (str(error) if is_ours else type(error).__name__).encode()[:1000]),
        *place,
        ("role", role.encode()),
        ("generation", given.get("generation") or b"0"),
        ("at", datetime.now(UTC).isoformat(timespec="milliseconds").encode()),
    ]


@dataclass(slots=True)
class Lane:
    """One input of a shard: its queue, and how far it is."""

    topic: str  # logical
    urgency: int
    handles: Input
    reader: Reader
    run: DeadRun
    queue: deque[Record] = field(default_factory=deque)  # a new one at each drain
    offered_at: float = -math.inf  # monotonic, of the first queued record
    watermark: int | None = None  # next offset, as the last committed transaction says
    end: int | None = None  # done to here by position: control records count
    end_read: int | None = None  # read to here; it becomes `end` when everything before it is done
    batches: int = 0  # offered since reading began
    read_to: int = 0  # behind the last record that was offered since then
    most: int = MAX_BATCH_RECORDS  # records of the next transaction
    tries: int = 0  # in a row that came to nothing
    rests_until: float = -math.inf  # monotonic: what came to nothing is not tried again before

    def wait_seconds(self, now: float) -> float:
        """Return how long, from `now` (seconds since 1970), until the first queued record may be decided; inf: none may be."""
        if not self.queue or self.run.halted:
            return math.inf
        due = 0.0 if self.handles.due is None else self.handles.due(self.queue[0])
        return max(0.0, due - now, self.rests_until - time.monotonic())

    def begin(self, start: int) -> None:
        """Note from where on it is read."""
        self.batches, self.read_to = 0, start

    def settle(self) -> None:
        """Note that everything read is done, if it is."""
        if self.end_read is not None and not self.queue:
            self.end, self.end_read = self.end_read, None

    def forget(self) -> None:
        """Drop what was read and is not done: it is read again, from the watermark on."""
        self.queue = deque()
        self.end = self.end_read = None

    def halt(self) -> None:
        """Read no more, until the worker is started again."""
        self.reader.stop()
        self.forget()

    @property
    def position(self) -> int | None:
        """The next offset to read, as the group is told."""
        if self.watermark is None or self.end is None:
            return self.watermark if self.end is None else self.end
        return max(self.watermark, self.end)


class Shard:
    """A step's share of one partition number. Subclasses say what becomes of a batch."""

    writer_class: type[Writer] = Writer

    def __init__(self, tools: Tools, step: Step, partition: int, lanes: list[Lane]) -> None:
        self.tools = tools
        self.step = step
        self.partition = partition
        self.lanes = {lane.topic: lane for lane in lanes}
        self.tables: dict[str, dict[bytes, bytes]] = {table: _table(table, step) for table in step.changelogs()}
        self.changelogs = {table: tools.names.physical[topic] for table, topic in step.changelogs().items()}
        self._prefixes = dict.fromkeys(self.tables, b"") | {table: shared_key(table, b"") for table in step.own_tables()}
        self._routes = {topic: tools.names.route(topic, step, partition) for topic in step.writes}
        self.writer = self.writer_class(
            tools.cluster,
            transactional_id=f"notify-{tools.names.physical[step.changelog]}-{partition}",
            max_message_bytes=DEAD_MAX_BYTES,
        )
        # shared by the step's shards
        self.room = tools.rooms.setdefault(step.name, Room(step.reads.index(topic) for topic in step.urgent))
        self.wake = asyncio.Event()
        self.is_draining = False
        self.idle = asyncio.Event()
        self.idle.set()
        self.committed_at = time.monotonic()
        self._task: asyncio.Task[None] | None = None
        self._undo: list[tuple[dict[bytes, bytes], bytes, Any]] = []

    # ---- owning

    def recover(self) -> None:
        """Fence earlier owners, then read the changelogs to their end. Blocks; raises FencedError, ChangelogError."""
        self.writer.acquire()
        self.tools.fault("fenced")
        apply: dict[Place, Callable[[Record], None]] = {
            (self.changelogs[table], self.partition): partial(apply_record, rows) for table, rows in self.tables.items()
        }
        # joins nothing; below the app's own name, where the role has its rights
        own = self.changelogs[PROGRESS]
        apply[(own, self.partition)] = partial(apply_shared, {table.encode(): self.tables[table] for table in self.step.own_tables()})
        read_to_end(self.tools.cluster, group=own, apply=apply, progress=self.tools.metrics.recovery_rows.inc)
        for lane in self.lanes.values():
            stored = self.tables[PROGRESS].get(self._watermark_key(lane.topic))
            lane.watermark = None if stored is None else int(stored)

    def start(self) -> None:
        """Begin to work on what is offered."""
        self.is_draining = False
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work(), name=f"{self.step.name}-{self.partition}")

    def offer(self, batch: Batch) -> None:
        """Queue a batch."""
        lane = self.lanes[self.tools.names.logical[batch.topic]]
        if lane.run.halted:
            lane.forget()  # another shard halted it
            return
        if batch.number != lane.batches:
            # Faust forgets what it is given in the moments between two assignments. What comes next would hide what did not
            leave(f"{batch.topic} partition {self.partition}: batch {batch.number} came, and batch {lane.batches} was lost on its way")
        lane.batches += 1
        records = batch.records
        if records and records[0].offset() < lane.read_to:
            # librdkafka may go back when a broker does. A delivery that is under way must not be taken for one that is done
            records = [record for record in records if record.offset() >= lane.read_to]
            lane.reader.finished(self.partition, len(batch.records) - len(records))
            self.tools.metrics.replayed.labels(lane.topic).inc(len(batch.records) - len(records))
        if records:
            if not lane.queue:
                lane.offered_at = time.monotonic()
            lane.queue.extend(records)
            lane.read_to = records[-1].offset() + 1
            self.room.offered(lane.urgency)
        lane.end_read = batch.end_offset
        self.wake.set()

    async def drain(self) -> None:
        """Forget what is queued and wait until what runs is done, at most DRAIN_SECONDS."""
        self.is_draining = True
        for lane in self.lanes.values():
            lane.forget()
        self.wake.set()
        try:
            await asyncio.wait_for(self.idle.wait(), DRAIN_SECONDS)
        except TimeoutError:
            log.warning("shard.abandoned step=%s partition=%d", self.step.name, self.partition)

    def give_up(self) -> None:
        """Lose the partition. A transaction that still runs is the next owner's to fence."""
        if self._task is not None:
            self._task.cancel()
        self.writer.discard()

    def paused_by(self) -> str | None:
        """Return the server, no provider, that everything here waits for; None: nothing does. Asked every few seconds."""
        return None

    def physical_topics(self) -> list[str]:
        """Return the inputs, as the cluster names them."""
        return [self.tools.names.physical[topic] for topic in self.lanes]

    async def _work(self) -> None:
        try:
            await self.run()
        except asyncio.CancelledError:
            raise
        except WrongClockError as error:
            leave(str(error))
        except FencedError as error:
            leave(f"another worker owns {self.step.name}-{self.partition}: {error}")
        except Exception as error:
            log.exception("shard.failed step=%s partition=%d", self.step.name, self.partition)
            leave(f"{self.step.name}-{self.partition} failed: {type(error).__name__}")

    async def run(self) -> None:
        """Work until cancelled."""
        raise NotImplementedError

    # ---- one transaction

    def put(self, table: str, key: bytes, value: bytes | None) -> None:
        """Change a row in memory and in the open transaction, remembering how to undo it."""
        rows = self.tables[table]
        self._undo.append((rows, key, rows.get(key, _MISSING)))
        if value is None or table in self.step.aged:
            rows.pop(key, None)  # an aged table's row goes behind all others
        if value is not None:
            # a copy: bytes that orjson made keep their buffer's room, and a row of 30 bytes would cost 4 KB
            rows[key] = bytes(memoryview(value))
        self.writer.produce(self.changelogs[table], value, self._prefixes[table] + key, self.partition)

    def publish(self, output: Output, encoded: bytes) -> None:
        """Add an output to the open transaction."""
        route = self._routes[output.topic]
        partition = route.partition if output.partition is None else output.partition
        self.writer.produce(route.topic, encoded, output.key, partition)

    def put_watermark(self, topic: str, offset: int) -> None:
        """Add the watermark of an input to the open transaction."""
        self.put(PROGRESS, self._watermark_key(topic), b"%d" % offset)

    async def commit(self, records: int) -> None:
        """Commit the open transaction. Raises AbortedError, with everything undone in memory, or FencedError."""
        began = time.monotonic()
        self.tools.fault("before commit")
        try:
            await self.tools.in_thread(self.writer.commit)
        except AbortedError:
            self.undo()
            raise
        self.tools.fault("after commit")
        self._undo.clear()
        self.committed_at = time.monotonic()
        self.tools.metrics.commit_seconds.observe(self.committed_at - began)
        self.tools.metrics.batch_records.observe(records)

    def undo(self) -> None:
        """Put every row that the open transaction changed back as it was."""
        for rows, key, before in reversed(self._undo):
            if before is _MISSING:
                rows.pop(key, None)
                continue
            was_deleted = key not in rows
            rows[key] = before
            if was_deleted and isinstance(rows, OrderedDict):
                rows.move_to_end(key, last=False)  # deleted for its age: it was the first
        self._undo.clear()

    def _watermark_key(self, topic: str) -> bytes:
        return f"{self.tools.names.ids[topic]} {topic}".encode()

    def encode(self, output: Output) -> bytes:
        """Return an output's bytes. Raises TooLargeError."""
        value = output.value if isinstance(output.value, bytes) else self.tools.encoder.encode(output.value)
        limit = self._routes[output.topic].max_bytes
        if len(value) + len(output.key) + RECORD_OVERHEAD_BYTES > limit:
            raise TooLargeError(f"{len(value)} bytes for {output.topic}, which takes {limit}")
        return value

    def dead_letter(self, source: Source, value: bytes | None, error: BaseException, *, provider: str = "") -> None:
        """Add a record's raw bytes to `dead` in the open transaction. `provider`: at whom it ended, where it was one."""
        if not isinstance(error, NotifyError):
            log.error("decision.failed topic=%s offset=%d", source.topic, source.offset, exc_info=error)
        headers = [*dead_letter_headers(source, error, self.tools.role)]
        if provider:
            headers.append((PROVIDER_HEADER, provider.encode()))
        partition = self.partition % self.tools.names.partitions[topics.DEAD]
        self.writer.produce(self.tools.names.physical[topics.DEAD], value, source.key, partition, headers)
        self.tools.metrics.dead_letters.labels(source.topic, dict(headers)["error"].decode()).inc()


def _table(name: str, step: Step) -> dict[bytes, bytes]:
    if name in step.sorted:
        return cast("dict[bytes, bytes]", SortedDict())
    # in the order of their last writes, after a recovery too; cheaply popped at the front: decisions prune the oldest rows
    return OrderedDict() if name in step.aged else {}
