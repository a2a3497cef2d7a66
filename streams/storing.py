"""Keeps the projection in PostgreSQL: a batch is merged into its rows first, then the watermark moves in Kafka.

A crash between the two repeats the batch, and merging what was merged changes nothing. While PostgreSQL is away the
projection pauses: nothing else of the system waits for it, and it goes on by itself where it stopped.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from schemas.errors import DatabaseUnavailableError, RefusedValueError, RegistryUnavailableError, SettingsError
from streams.runs import Passage
from streams.shard import TURN_SECONDS, Lane, RecordSource, Shard, Tools
from streams.store.database import Database
from streams.store.migrate import migrate
from streams.store.rows import Kept, keep
from streams.topology import Step
from streams.transport.cluster import leave
from streams.transport.records import Record
from streams.transport.writer import AbortedError

log = logging.getLogger(__name__)

CONNECTIONS = 8
# of each input in one transaction
BATCH_RECORDS = 1_000
HOUSE_SECONDS = 3_600.0
# an answer that takes longer is told as a pause
SLOW_SECONDS = 2.0
_RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0)


class Store:
    """What the shards of a worker share: connections, whether the tables are as they should be, and who waits for them."""

    def __init__(self, database: Database, tools: Tools, *, kept_months: int) -> None:
        self._database = database
        self._tools = tools
        self._kept_months = kept_months
        self._is_ready = False
        self._preparing = asyncio.Lock()
        # partition -> monotonic time since which it waits for an answer
        self._waiting: dict[int, float] = {}
        self._failing: dict[int, str] = {}  # partition -> why its last try failed
        self._is_told = False

    async def keep(self, partition: int, records: list[Any], *, take_turn: Callable[[], Awaitable[None]]) -> Kept:
        """Merge decoded `records` into their rows, durably. Raises DatabaseUnavailableError, RefusedValueError: nothing changed."""
        began = self._waiting[partition] = time.monotonic()
        try:
            await self._prepare()
            async with self._database.begin() as connection:
                kept = await keep(connection, partition, records, take_turn=take_turn)
        except DatabaseUnavailableError as error:
            self._failing[partition] = str(error)
            self.tell()
            raise
        finally:
            self._waiting.pop(partition, None)
        self._failing.pop(partition, None)
        self.tell()
        metrics = self._tools.metrics
        metrics.store_seconds.observe(time.monotonic() - began)
        metrics.store_rows.labels("notification").inc(kept.notifications)
        metrics.store_rows.labels("delivery").inc(kept.deliveries)
        return kept

    def tell(self) -> int:
        """Return how many partitions wait for PostgreSQL: it refused, or has not answered for SLOW_SECONDS.

        Sets the gauge; the log hears of the first one and of the end of the last one.
        """
        now = time.monotonic()
        slow = {partition: "no answer" for partition, since in self._waiting.items() if now - since > SLOW_SECONDS}
        paused = slow | self._failing
        self._tools.metrics.store_paused.set(len(paused))
        if paused and not self._is_told:
            log.warning("store.paused reason=%r", next(iter(paused.values())))
        elif self._is_told and not paused:
            log.warning("store.resumed")
        self._is_told = bool(paused)
        return len(paused)

    def forget(self, partition: int) -> None:
        """Note that a partition is owned here no longer."""
        self._failing.pop(partition, None)
        self._waiting.pop(partition, None)

    async def keep_house(self) -> None:
        """Make the coming months and drop old ones from time to time, until cancelled."""
        while True:
            await asyncio.sleep(HOUSE_SECONDS)
            try:
                await self._migrate()
            except DatabaseUnavailableError as error:
                log.warning("store.months_not_kept error=%s", error)

    async def _prepare(self) -> None:
        async with self._preparing:
            if not self._is_ready:
                await self._migrate()
                self._is_ready = True

    async def _migrate(self) -> None:
        try:
            found, dropped = await migrate(self._database, kept_months=self._kept_months)
        except SettingsError as error:
            leave(str(error))
        log.info("store.ready revision=%s dropped=%s", found, dropped)


@dataclass(slots=True)
class _Taken:
    """A record of a batch: its message, or why it is none."""

    lane: Lane
    record: Record
    message: Any = None
    error: Exception | None = None


class StoringShard(Shard):
    """Turns batches into rows of PostgreSQL."""

    def __init__(self, tools: Tools, step: Step, partition: int, lanes: list[Lane], *, store: Store) -> None:
        super().__init__(tools, step, partition, lanes)
        self.store = store
        self._most = BATCH_RECORDS
        # the one input to take from, while a value is looked for that PostgreSQL refuses, and the one that was looked at last
        self._only: str | None = None
        self._last: str | None = None
        self._tries = 0

    async def run(self) -> None:
        """Take what was read, merge it, move on; until cancelled."""
        while True:
            if self.is_draining or not any(lane.queue for lane in self.lanes.values()):
                for lane in self.lanes.values():
                    lane.settle()
                self.idle.set()
                self.wake.clear()
                await self.wake.wait()
                continue
            self.idle.clear()
            try:
                await self._advance()
            except (DatabaseUnavailableError, RegistryUnavailableError, AbortedError) as error:
                if isinstance(error, AbortedError):
                    log.warning("transaction.aborted step=%s partition=%d error=%s", self.step.name, self.partition, error)
                await self._pause()

    def paused_by(self) -> str | None:
        """Return `postgres` while it does not answer, and let the store tell of it."""
        return "postgres" if self.store.tell() else None

    def give_up(self) -> None:
        """Lose the partition. What was merged stays: whoever owns it next merges the same again."""
        super().give_up()
        self.store.forget(self.partition)

    async def _advance(self) -> None:
        queues = {lane.topic: lane.queue for lane in self.lanes.values()}
        taken, replayed = await self._take(queues)
        good = [each for each in taken if each.error is None]
        outcomes: Counter[str] = Counter()
        try:
            if good:
                kept = await self.store.keep(self.partition, [each.message for each in good], take_turn=self._take_turn)
                outcomes = kept.outcomes
                for number, reason in kept.refused:
                    good[number].error = reason
        except RefusedValueError as error:
            if len(good) > 1:
                if self._most == 1:  # one of each input: look at them one by one, not always at the same first
                    self._only = self._last = next(topic for topic in self.lanes if topic != self._last)
                self._most = max(1, self._most // 2)
                return
            good[0].error = error
        await self._record(queues, taken, replayed, outcomes)
        self._most, self._tries, self._only = min(2 * self._most, BATCH_RECORDS), 0, None

    async def _take(self, queues: dict[str, deque[Record]]) -> tuple[list[_Taken], Counter[str]]:
        """Decode the next records of each input, and count those that are done already. Raises RegistryUnavailableError."""
        taken: list[_Taken] = []
        replayed: Counter[str] = Counter()
        for lane in self.lanes.values():
            records = list(islice(queues[lane.topic], self._most)) if self._only in {None, lane.topic} else []
            if records and lane.handles.learn is not None:
                await lane.handles.learn(records)
            await self._take_turn()
            began = time.perf_counter()
            for record in records:
                if time.perf_counter() - began > TURN_SECONDS:
                    await self._take_turn()
                    began = time.perf_counter()
                if record.offset() < (lane.watermark or 0):
                    replayed[lane.topic] += 1
                    continue
                try:
                    taken.append(_Taken(lane, record, lane.handles.decode(record)))
                except RegistryUnavailableError:
                    # what comes behind it waits; what was decoded before it goes on, if there is anything
                    if not taken:
                        raise
                    break
                except Exception as error:
                    taken.append(_Taken(lane, record, error=error))
        return taken, replayed

    async def _record(self, queues: dict[str, deque[Record]], taken: list[_Taken], replayed: Counter[str], outcomes: Counter[str]) -> None:
        """Commit what nothing can come of, and how far the inputs are. Raises AbortedError: then all is done again."""
        passages = {topic: lane.run.begin() for topic, lane in self.lanes.items()}
        self.writer.begin()
        try:
            done = [each for each in taken if self._settle(each, passages[each.lane.topic])]
            ends = {each.lane.topic: each.record.offset() + 1 for each in done}
            for topic, end in ends.items():
                self.put_watermark(topic, end)
            await self.commit(len(done))
        except AbortedError:
            for passage in passages.values():
                passage.aborted()
            self.undo()
            raise
        handled = Counter(each.lane.topic for each in done)
        for topic, lane in self.lanes.items():
            passages[topic].committed()
            lane.watermark = ends.get(topic, lane.watermark)
            self._move_past(lane, queues[topic], handled[topic], replayed[topic])
        for outcome, count in outcomes.items():
            self.tools.metrics.events.labels(outcome).inc(count)

    def _settle(self, taken: _Taken, passage: Passage) -> bool:
        """Say whether a record is done; one that nothing can come of is set aside. What is behind a run of those stays."""
        if taken.lane.run.halted:
            return False
        if taken.error is None:
            passage.passed()
            return True
        if not passage.may_set_aside():
            return False
        self.dead_letter(RecordSource(taken.record, taken.lane.topic), taken.record.value(), taken.error)
        return True

    def _move_past(self, lane: Lane, queue: deque[Record], handled: int, replayed: int) -> None:
        """Drop the records of `queue` that the committed transaction covers."""
        lane.reader.finished(self.partition, handled + replayed)
        self.tools.metrics.records.labels(lane.topic).inc(handled)
        self.tools.metrics.replayed.labels(lane.topic).inc(replayed)
        if lane.queue is queue:  # else drained meanwhile
            for _ in range(handled + replayed):
                queue.popleft()
        if lane.run.halted:
            lane.halt()

    async def _take_turn(self) -> None:
        await self.tools.turns.take(len(self.lanes))  # after every step that somebody waits for

    async def _pause(self) -> None:
        """Wait a little before the next try. New records do not end the wait; draining does."""
        until = time.monotonic() + _RETRY_SECONDS[min(self._tries, len(_RETRY_SECONDS) - 1)]
        self._tries += 1
        while (left := until - time.monotonic()) > 0 and not self.is_draining:
            self.wake.clear()
            try:
                await asyncio.wait_for(self.wake.wait(), left)
            except TimeoutError:
                return
