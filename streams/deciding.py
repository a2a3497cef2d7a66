"""The shard of the steps that decide: a batch in, one transaction of outputs, rows and watermark out.

Records are decoded and decided one by one; a record that cannot be becomes a dead letter among the outputs and its
neighbours go on.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice

from agents.ports import Effects
from schemas.errors import NotifyError, RegistryUnavailableError, RetryableError, TooLargeError
from streams.room import URGENT_SECONDS
from streams.runs import Passage
from streams.shard import TURN_SECONDS, Lane, RecordSource, Shard, Tools
from streams.topology import Step
from streams.transport.reader import MAX_BATCH_RECORDS
from streams.transport.records import Record
from streams.transport.writer import AbortedError

log = logging.getLogger(__name__)

_RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timer:
    """What a step decides without a record, given the wall clock and the tables: every `seconds`, and on as long as anything comes.

    Only of tables that are up to date: once every input was read to its end since the partition came here.
    """

    seconds: float
    decide: Callable[[datetime, Mapping[str, Mapping[bytes, bytes]]], Effects]


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
        if self._timer is None or any(lane.end is None for lane in self.lanes.values()):
            return math.inf
        return self._rang_at + self._timer.seconds - time.monotonic()

    async def _ring(self) -> None:
        """Decide what the timer decides, in a transaction of its own if there is anything."""
        assert self._timer is not None
        effects = self._timer.decide(datetime.now(UTC), self.tables)
        if not (effects.outputs or effects.rows or effects.set_aside):
            self._rang_at = time.monotonic()
            return
        self.writer.begin()
        try:
            self._add(effects, [self.encode(output) for output in effects.outputs])
            await self.commit(0)
        except AbortedError as error:
            self._rang_at = time.monotonic()
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
