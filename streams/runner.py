"""Makes decisions real: a batch in, one transaction of outputs, rows and watermark out.

A shard is a step's share of one partition number: its tables, its watermarks and the transactional producer that
whoever owned it before can no longer use. Records are decoded and decided one by one; a record that cannot be becomes a
dead letter among the outputs and its neighbours go on. What the infrastructure refuses for good ends the process
(`cluster.leave`): everything promised is in Kafka, and a supervisor starts it again.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import itertools
import logging
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeVar, cast

from faust.types import TP
from sortedcontainers import SortedDict

from agents.ports import Effects, Output, Source
from schemas import topics
from schemas.errors import NotifyError, RegistryUnavailableError, RetryableError, TooLargeError
from streams.metrics import Metrics
from streams.room import URGENT_SECONDS, Room
from streams.runs import DeadRun, Passage
from streams.topics import DEAD_MAX_BYTES, TopicSpec
from streams.topology import PROGRESS, Step
from streams.transport.admin import offset_bounds
from streams.transport.changelog import apply_record, apply_shared, read_to_end, shared_key
from streams.transport.cluster import Cluster, leave
from streams.transport.reader import MAX_BATCH_RECORDS, MAX_HELD_RECORDS, MAX_OUTSTANDING_RECORDS, Batch, Reader
from streams.transport.records import PLACE_HEADERS, Place, Record
from streams.transport.writer import RECORD_OVERHEAD_BYTES, AbortedError, FencedError, Headers, Writer, WrongClockError

log = logging.getLogger(__name__)
T = TypeVar("T")

TURN_SECONDS = 0.010  # the longest stretch of work on the event loop
DRAIN_SECONDS = 20.0  # longer than any call to a provider
_RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)
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
class Timer:
    """What a step decides without a record: at most every `seconds`, given the wall clock and the tables."""

    seconds: float
    decide: Callable[[datetime, Mapping[str, Mapping[bytes, bytes]]], Effects]


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
        """The Kafka timestamp, aware, UTC."""
        return datetime.fromtimestamp(self._record.timestamp()[1] / 1000, UTC)

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

    def __init__(self, tools: Tools, step: Step, partition: int, lanes: list[Lane]) -> None:
        self.tools = tools
        self.step = step
        self.partition = partition
        self.lanes = {lane.topic: lane for lane in lanes}
        self.tables: dict[str, dict[bytes, bytes]] = {table: _table(table, step) for table in step.changelogs()}
        self.changelogs = {table: tools.names.physical[topic] for table, topic in step.changelogs().items()}
        self._prefixes = dict.fromkeys(self.tables, b"") | {table: shared_key(table, b"") for table in step.own_tables()}
        self._routes = {topic: tools.names.route(topic, step, partition) for topic in step.writes}
        self.writer = Writer(
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
        if value is None:
            rows.pop(key, None)
        else:
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
            else:
                rows[key] = before
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


class DecidingShard(Shard):
    """Turns batches into transactions of decisions. `timer`: what it decides besides, when its time has come."""

    def __init__(self, tools: Tools, step: Step, partition: int, lanes: list[Lane], *, timer: Timer | None = None) -> None:
        super().__init__(tools, step, partition, lanes)
        self._timer = timer
        self._rang_at = time.monotonic()
        self._passage: Passage

    async def run(self) -> None:
        """Take the most urgent batch that is due, decide as much of it as a turn allows, commit, again."""
        while True:
            if not self.is_draining and self._until_timer() <= 0:
                self.idle.clear()
                await self._ring()
                continue
            now = time.time()
            lane = next((lane for lane in self.lanes.values() if lane.wait_seconds(now) <= 0), None)
            if lane is None or self.is_draining:
                for each in self.lanes.values():
                    each.settle()
                self.idle.set()
                self.wake.clear()
                await self._rest(min(each.wait_seconds(now) for each in self.lanes.values()))
            elif (seconds := self.room.wait_seconds(lane.urgency)) > 0:
                self.idle.set()
                self.wake.clear()
                # no longer than until what is more urgent may go on, or nothing urgent comes any more
                urgent = (each.wait_seconds(now) for each in self.lanes.values() if each.urgency < lane.urgency)
                await self._rest(min(seconds, URGENT_SECONDS, *urgent))
            else:
                self.idle.clear()
                with self.room.taken(lane.urgency):
                    await self._advance(lane)

    async def _rest(self, seconds: float) -> None:
        """Return when something happens, or after `seconds`, or when the timer's time has come."""
        left = math.inf if self.is_draining else min(seconds, self._until_timer())
        try:
            await asyncio.wait_for(self.wake.wait(), None if left == math.inf else left)
        except TimeoutError:
            return

    def _until_timer(self) -> float:
        return math.inf if self._timer is None else self._rang_at + self._timer.seconds - time.monotonic()

    async def _ring(self) -> None:
        """Decide what the timer decides, in a transaction of its own if there is anything."""
        assert self._timer is not None
        self._rang_at = time.monotonic()
        effects = self._timer.decide(datetime.now(UTC), self.tables)
        if not (effects.outputs or effects.rows or effects.set_aside):
            return
        self.writer.begin()
        try:
            self._add(effects, [self.encode(output) for output in effects.outputs])
            await self.commit(0)
        except AbortedError as error:
            log.warning("transaction.aborted step=%s partition=%d error=%s", self.step.name, self.partition, error)

    async def _advance(self, lane: Lane) -> None:
        queue = lane.queue
        if lane.handles.learn is not None:
            await lane.handles.learn(islice(queue, MAX_BATCH_RECORDS))
        await self.tools.turns.take(lane.urgency)
        if lane.queue is not queue or lane.run.halted:
            return  # drained or halted meanwhile
        self.writer.begin()
        passage = self._passage = lane.run.begin()
        try:
            count, is_waiting = await self._fill(lane, queue)
            self.tools.fault("decided")
            await self.commit(count)
        except AbortedError as error:
            self.undo()
            passage.aborted()
            await self._try_less(lane, queue, error)
            return
        passage.committed()
        self._done(lane, queue, count)
        lane.most = MAX_BATCH_RECORDS
        if lane.run.halted:
            lane.halt()
        elif is_waiting:
            self._let_rest(lane)
        else:
            lane.tries = 0
            if lane.queue:
                self.room.offered(lane.urgency)  # as good as one that has just come
            else:
                self.room.done(lane.urgency, self.committed_at - lane.offered_at)

    async def _fill(self, lane: Lane, queue: deque[Record]) -> tuple[int, bool]:
        """Decide into the open transaction; return how many records, and whether the next one has to wait.

        One turn, where something more urgent may come: that waits for no more than a turn and its commit. The most urgent
        input fills its transaction turn by turn, since a commit takes as long for one turn as for four.
        """
        count = 0
        while True:
            decided, is_waiting = self._decide(lane, islice(queue, count, lane.most))
            count += decided
            # nothing decided: what is next is not due yet
            if not decided or lane.urgency or is_waiting or count >= min(lane.most, len(queue)):
                return count, is_waiting
            await self.tools.turns.take(lane.urgency)
            if lane.queue is not queue:
                return count, False  # drained meanwhile: what was decided still counts

    async def _try_less(self, lane: Lane, queue: deque[Record], error: AbortedError) -> None:
        """After an aborted transaction: halve until the record that is too large stands alone, else wait a little."""
        if error.too_large:
            lane.most = min(lane.most, len(queue)) // 2
            if lane.most == 0:
                lane.most = MAX_BATCH_RECORDS
                await self._set_aside(lane, queue, TooLargeError("the broker refused what it became for its size"))
        else:
            log.warning("transaction.aborted step=%s partition=%d error=%s", self.step.name, self.partition, error)
            self._let_rest(lane)

    def _let_rest(self, lane: Lane) -> None:
        """Try an input that waits again a little later; the others of the shard go on."""
        lane.rests_until = time.monotonic() + _RETRY_SECONDS[min(lane.tries, len(_RETRY_SECONDS) - 1)]
        lane.tries += 1

    def _decide(self, lane: Lane, records: Iterable[Record]) -> tuple[int, bool]:
        """Decide records until the turn is over; return how many, and whether the next one has to wait."""
        began = time.perf_counter()
        covered = lane.watermark or 0
        due, every, now = lane.handles.due, lane.handles.clock_every, time.time()
        outcomes: list[str] = []
        count = replayed = 0
        is_waiting = False
        last = None
        for record in records:
            if record.offset() < covered:
                replayed += 1
            elif due is not None and due(record) > now:
                break
            elif not self._decide_one(lane, record, outcomes):
                is_waiting = True
                break
            last = record
            count += 1
            if count % every == 0 and time.perf_counter() - began > TURN_SECONDS:
                break
        if last is not None:
            self.put_watermark(lane.topic, last.offset() + 1)
        self._count(lane.topic, count - replayed, replayed, outcomes)
        return count, is_waiting

    def _decide_one(self, lane: Lane, message: Record, outcomes: list[str]) -> bool:
        """Add what a record becomes to the open transaction. False: it has to wait, and nothing was added."""
        handles = lane.handles
        try:
            effects = handles.decide(handles.decode(message), RecordSource(message, lane.topic), self.tables)
            encoded = [self.encode(output) for output in effects.outputs]
        except RegistryUnavailableError:
            if handles.parked_in is None:
                return False
            self._park(handles.parked_in, message, lane.topic)
        except RetryableError:
            return False
        except Exception as error:
            if not self._passage.may_set_aside():
                return False
            self.dead_letter(RecordSource(message, lane.topic), message.value(), error)
            return True
        else:
            self._add(effects, encoded)
            outcomes += effects.counts
        self._passage.passed()
        return True

    def _add(self, effects: Effects, encoded: Sequence[bytes]) -> None:
        """Add effects, with their outputs' bytes, to the open transaction."""
        for row in effects.rows:
            self.put(row.table, row.key, row.value)
        for output, value in zip(effects.outputs, encoded, strict=True):
            self.publish(output, value)
        for aside in effects.set_aside:
            self.dead_letter(aside.source, aside.value, aside.error)

    def _park(self, parked: str, message: Record, topic: str) -> None:
        """Add a record's raw bytes to `parked`, with headers that say where it was read."""
        headers: list[tuple[str, bytes]] = [
            ("topic", topic.encode()),
            ("partition", str(message.partition()).encode()),
            ("offset", str(message.offset()).encode()),
            ("timestamp", str(message.timestamp()[1]).encode()),
        ]
        partition = self.partition % self.tools.names.partitions[parked]
        self.writer.produce(self.tools.names.physical[parked], message.value(), message.key(), partition, headers)
        self.tools.metrics.parked.inc()

    def _count(self, topic: str, handled: int, replayed: int, outcomes: list[str]) -> None:
        metrics = self.tools.metrics
        metrics.records.labels(topic).inc(handled)
        if replayed:
            metrics.replayed.labels(topic).inc(replayed)
        for outcome, count in Counter(outcomes).items():
            kind, _, name = outcome.partition(":")
            (metrics.decisions if kind == "decision" else metrics.events).labels(name or kind).inc(count)

    def _done(self, lane: Lane, queue: deque[Record], count: int) -> None:
        """Move past `count` records of `queue`, which the committed transaction covers."""
        for _ in range(count - 1):
            queue.popleft()
        if count:
            lane.watermark = queue.popleft().offset() + 1
        lane.reader.finished(self.partition, count)

    async def _set_aside(self, lane: Lane, queue: deque[Record], error: NotifyError) -> None:
        """Dead-letter the one record that the broker refuses."""
        passage = lane.run.begin()
        if not passage.may_set_aside():
            lane.halt()
            return
        record = queue[0]
        self.writer.begin()
        self.dead_letter(RecordSource(record, lane.topic), record.value(), error)
        self.put_watermark(lane.topic, record.offset() + 1)
        await self.commit(1)
        passage.committed()
        self._done(lane, queue, 1)


MakeShard = Callable[[Tools, Step, int, list[Lane]], Shard]


def _table(name: str, step: Step) -> dict[bytes, bytes]:
    if name in step.sorted:
        return cast("dict[bytes, bytes]", SortedDict())
    # ordered by time of insertion, cheaply popped at the front: decisions prune the oldest rows
    return OrderedDict() if name in step.aged else {}


class Runner:
    """All shards of a worker: what Faust's transport calls `Owner`."""

    def __init__(self, tools: Tools, *, group: str, steps: Mapping[Step, Mapping[str, Input]], make_shard: Mapping[str, MakeShard]) -> None:
        self.tools = tools
        self._group = group
        self._steps = steps
        self._make_shard = make_shard
        self._epoch = 0
        self._batches: asyncio.Queue[Batch] = asyncio.Queue()
        self._is_open = asyncio.Event()  # Faust keeps what it is given
        self._acquiring: asyncio.Task[None] | None = None
        self.shards: dict[tuple[str, int], Shard] = {}
        self.is_recovered = False
        self.expired_inputs: set[str] = set()
        self.committed: Callable[[set[TP]], Awaitable[Mapping[TP, int | None]]] | None = None
        self.on_assigned: list[Callable[[set[int]], Awaitable[None]]] = []
        self.on_acquired: list[Callable[[Runner], None]] = []
        loop = asyncio.get_event_loop()

        def deliver(batches: list[Batch]) -> None:
            loop.call_soon_threadsafe(self._arrived, batches)

        self._readers = {
            topic: Reader(
                tools.cluster,
                group=group,
                topic=tools.names.physical[topic],
                deliver=deliver,
                most=MAX_OUTSTANDING_RECORDS if handles.due is None else MAX_HELD_RECORDS,
            )
            for inputs in steps.values()
            for topic, handles in inputs.items()
        }
        self._step_of = {topic: step for step, inputs in steps.items() for topic in inputs}
        self._runs = {topic: DeadRun(tools.dead_run_limit) for topic in self._step_of}

    @property
    def halted(self) -> Mapping[str, str]:
        """The inputs that a run of dead letters halted until the worker is started again, and why."""
        return {topic: run.halted for topic, run in self._runs.items() if run.halted}

    # ---- Owner

    async def acquire(self, assigned: set[TP]) -> None:
        """Own the assigned partitions: keep shards that stay, fence and recover new ones, give up the others."""
        if self._acquiring is not None and not self._acquiring.done():
            # an interrupted acquisition would fence its own successor later
            await asyncio.wait([self._acquiring])
        self._acquiring = asyncio.create_task(self._acquire(assigned))
        await asyncio.shield(self._acquiring)

    async def _acquire(self, assigned: set[TP]) -> None:
        self.is_recovered = False
        self.tools.metrics.recovering.set(1)
        wanted = self._wanted(assigned)
        for place in [place for place in self.shards if place not in wanted]:
            self.shards.pop(place).give_up()
        new = [self._build(step, partition) for place, (step, partition) in wanted.items() if place not in self.shards]
        began = time.monotonic()
        await asyncio.gather(
            *(self.tools.in_thread(shard.recover) for shard in new),
            *(listener({partition for _, partition in wanted.values()}) for listener in self.on_assigned),
        )
        for shard in new:
            self.shards[(shard.step.name, shard.partition)] = shard
        for told in self.on_acquired:
            told(self)
        self.tools.metrics.recovering.set(0)
        log.info("shards.acquired new=%d kept=%d seconds=%.2f", len(new), len(wanted) - len(new), time.monotonic() - began)

    def _wanted(self, assigned: set[TP]) -> dict[tuple[str, int], tuple[Step, int]]:
        wanted: dict[tuple[str, int], tuple[Step, int]] = {}
        for step in self._steps:
            owned = [
                {tp.partition for tp in assigned if tp.topic == self.tools.names.physical[topic]}
                for topic in (*step.reads, *step.changelogs().values())
            ]
            for partition in set.intersection(*owned):
                wanted[(step.name, partition)] = (step, partition)
            if set.union(*owned) != set.intersection(*owned):
                leave(f"the partitions of {step.name} were not assigned together: {owned}")
        return wanted

    def _build(self, step: Step, partition: int) -> Shard:
        lanes = [
            Lane(topic=topic, urgency=urgency, handles=self._steps[step][topic], reader=self._readers[topic], run=self._runs[topic])
            for urgency, topic in enumerate(step.reads)
        ]
        return self._make_shard.get(step.name, DecidingShard)(self.tools, step, partition, lanes)

    async def start_reading(self) -> None:
        """Read every owned input from its watermark on; without one, from what the group committed, else the beginning."""
        self._epoch += 1
        epoch = self._epoch
        wanted = {
            TP(self.tools.names.physical[topic], shard.partition): lane
            for shard in self.shards.values()
            for topic, lane in shard.lanes.items()
        }
        committed = await self.committed(set(wanted)) if self.committed else {}
        places = [(tp.topic, tp.partition) for tp in wanted]
        bounds = await self.tools.in_thread(offset_bounds, self.tools.cluster, places)
        if epoch != self._epoch:
            return  # drained meanwhile: the next assignment reads
        positions: dict[str, dict[int, int]] = {}
        for tp, lane in wanted.items():
            low, high = bounds[(tp.topic, tp.partition)]
            hint = committed.get(tp)
            start = lane.watermark if lane.watermark is not None else hint if hint is not None else low
            if start > high:
                leave(f"{tp.topic} partition {tp.partition} ends at {high}, below the watermark {start}: was the topic truncated?")
            if lane.watermark is not None and hint is not None and hint < lane.watermark:
                self.tools.metrics.replayed.labels(lane.topic).inc(lane.watermark - max(hint, low))
            if start < low:
                self.expired_inputs.add(lane.topic)
                self.tools.metrics.expired_positions.labels(lane.topic).inc(low - start)
                log.error("position.expired topic=%s partition=%d position=%d low=%d", tp.topic, tp.partition, start, low)
            positions.setdefault(lane.topic, {})[tp.partition] = max(start, low)
            lane.begin(max(start, low))
        for shard in self.shards.values():
            shard.start()
        for topic, by_partition in positions.items():
            if topic not in self.halted:
                self._readers[topic].start(by_partition, epoch=self._epoch)
        # recovered rows are no garbage: full collections need not look at them again
        gc.collect()
        gc.freeze()
        self.is_recovered = True

    async def drain(self) -> None:
        """Stop reading and let every shard come to rest."""
        self._epoch += 1
        self._is_open.clear()
        self.is_recovered = False
        for reader in self._readers.values():
            reader.stop()
        await asyncio.gather(*(shard.drain() for shard in self.shards.values()))

    def resume(self) -> None:
        """Let batches pass, if they are read: nothing forgets them from now on."""
        if self.is_recovered:
            self._is_open.set()

    async def next_batch(self) -> Batch:
        """Return the next batch read for the current assignment."""
        while True:
            batch = await self._batches.get()
            await self._is_open.wait()
            if batch.epoch == self._epoch:
                return batch

    def committable(self) -> Mapping[TP, int]:
        """Return the position of every input."""
        return {
            TP(self.tools.names.physical[lane.topic], shard.partition): lane.position
            for shard in self.shards.values()
            for lane in shard.lanes.values()
            if lane.position is not None
        }

    # ---- batches

    def _arrived(self, batches: list[Batch]) -> None:
        for batch in batches:
            if batch.epoch == self._epoch:
                self._batches.put_nowait(batch)

    def accept(self, batch: Batch) -> None:
        """Give a batch to its shard. Called by the Faust agents."""
        step = self._step_of[self.tools.names.logical[batch.topic]]
        shard = self.shards.get((step.name, batch.partition))
        if shard is not None and batch.epoch == self._epoch and not shard.is_draining:
            shard.offer(batch)

    def rows(self, table: str, partition: int) -> Mapping[bytes, bytes] | None:
        """Return the rows of a table's partition; None when it is not owned here, or not yet recovered."""
        if not self.is_recovered:
            return None
        for (_, owned), shard in self.shards.items():
            if owned == partition and table in shard.tables:
                return shard.tables[table]
        return None
