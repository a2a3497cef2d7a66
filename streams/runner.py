"""All shards of a worker: owned, recovered, fed and drained as the group's assignments come and go."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

from faust.types import TP

from streams.deciding import DecidingShard
from streams.runs import DeadRun
from streams.shard import Input, Lane, Shard, Tools
from streams.topology import Step
from streams.transport.admin import offset_bounds
from streams.transport.cluster import leave
from streams.transport.reader import MAX_HELD_RECORDS, MAX_OUTSTANDING_RECORDS, Batch, Reader

log = logging.getLogger(__name__)


MakeShard = Callable[[Tools, Step, int, list[Lane]], Shard]


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
