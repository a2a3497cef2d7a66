"""Whether a worker lives and is ready, and how far behind it is, measured against the broker's real end offsets."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Mapping

from confluent_kafka import KafkaException

from streams.gateways import Gateway
from streams.runner import Runner
from streams.sending import SendingShard
from streams.transport.admin import offset_bounds, open_ends
from streams.transport.writer import TRANSACTION_TIMEOUT_MS
from streams.views.pages import Health

log = logging.getLogger(__name__)

LOOK_EVERY_SECONDS = 2.0
HALTED_SAID_EVERY_SECONDS = 60.0
HALTED_ADVICE = (
    "look at them with `notify dlq list`, mend the cause and restart the worker; with NOTIFY_DEAD_RUN_LIMIT=0 it sets everything aside"
)
# an input with lag whose watermark has not moved for so long is stuck
STUCK_SECONDS = 60.0
# the broker aborts what is open for TRANSACTION_TIMEOUT_MS; what stays open so much longer it has forgotten (ADR 12)
FORGOTTEN_SECONDS = 3 * TRANSACTION_TIMEOUT_MS / 1000
LOOK_AT_OPEN_EVERY_SECONDS = 15.0
OPEN_ADVICE = "the broker lost the end of this transaction: docs/operations.md says what to do"

# (topic, partition) -> where its first open transaction begins, and since when it does, by a monotonic clock
Open = Mapping[tuple[str, int], tuple[int, float]]


def still_open(before: Open, found: Mapping[tuple[str, int], int], now: float) -> Open:
    """Return what is open of `found`, (topic, partition) -> offset, since when it was first seen at the same offset."""
    return {place: before[place] if place in before and before[place][0] == offset else (offset, now) for place, offset in found.items()}


class HealthWatch:
    """Looks at lag and progress every LOOK_EVERY_SECONDS. `health` answers from the last look."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._lag: dict[tuple[str, int], int] = {}
        self._moved: dict[tuple[str, int], tuple[int, float]] = {}
        self._said_at: dict[str, float] = {}
        self._open: Open = {}
        self._looked_at_open = -math.inf

    async def watch(self) -> None:
        """Look until cancelled."""
        while True:
            self._look_at_halted()
            try:
                await self.look()
                await self._look_at_open()
            except KafkaException as error:
                log.warning("lag.unknown error=%s", error.args[0])
            await asyncio.sleep(LOOK_EVERY_SECONDS)

    async def look(self) -> None:
        """Measure lag once and set the gauges."""
        runner = self._runner
        tools = runner.tools
        lanes = {
            (tools.names.physical[lane.topic], shard.partition): lane
            for shard in list(runner.shards.values())
            for lane in shard.lanes.values()
        }
        bounds = await tools.in_thread(offset_bounds, tools.cluster, list(lanes))
        now = time.monotonic()
        tools.metrics.lag.clear()
        lag: dict[tuple[str, int], int] = {}
        for place, lane in lanes.items():
            low, high = bounds[place]
            position = lane.position if lane.position is not None else low
            lag[place] = max(0, high - position)
            tools.metrics.lag.labels(lane.topic, place[1]).set(lag[place])
            before = self._moved.get(place)
            # held back until it is due: nothing is stuck
            is_early = 0 < lane.wait_seconds(time.time()) < math.inf
            if before is None or before[0] != position or not lag[place] or is_early:
                self._moved[place] = (position, now)
        self._lag = lag
        self._moved = {place: moved for place, moved in self._moved.items() if place in lanes}
        shards = list(runner.shards.values())
        if shards:
            tools.metrics.commit_age.set(now - max(shard.committed_at for shard in shards))
        rows: Counter[str] = Counter()
        for shard in shards:
            rows.update({f"{shard.step.name}.{table}": len(held) for table, held in shard.tables.items()})
        tools.metrics.table_rows.clear()
        for table, count in rows.items():
            tools.metrics.table_rows.labels(table).set(count)
        for step, room in tools.rooms.items():
            tools.metrics.rests.labels(step).set(room.rests)
        self._look_at_waiting()

    async def _look_at_open(self) -> None:
        """Show transactions of ours that stay open: what they wrote, and what others wrote behind it, nobody reads."""
        now = time.monotonic()
        if now - self._looked_at_open < LOOK_AT_OPEN_EVERY_SECONDS:
            return
        self._looked_at_open = now
        tools = self._runner.tools
        places = [(topic, shard.partition) for shard in list(self._runner.shards.values()) for topic in {*shard.changelogs.values()}]
        found = await tools.in_thread(open_ends, tools.cluster, places)
        self._open = still_open(self._open, found, now)
        forgotten = {place: offset for place, (offset, since) in self._open.items() if now - since > FORGOTTEN_SECONDS}
        tools.metrics.open_transactions.set(len(forgotten))
        for (topic, partition), offset in forgotten.items():
            log.error("transaction.open topic=%s partition=%d offset=%d advice=%r", topic, partition, offset, OPEN_ADVICE)

    def _look_at_halted(self) -> None:
        now = time.monotonic()
        for topic, reason in self._runner.halted.items():
            self._runner.tools.metrics.halted.labels(topic).set(1)
            if now - self._said_at.get(topic, -HALTED_SAID_EVERY_SECONDS) >= HALTED_SAID_EVERY_SECONDS:
                self._said_at[topic] = now
                log.error("input.halted topic=%s reason=%r advice=%r", topic, reason, HALTED_ADVICE)

    def _look_at_waiting(self) -> None:
        waiting: dict[str, int] = {}
        held: dict[str, int] = {}
        unknown: Counter[str] = Counter()
        gateways: dict[str, Gateway] = {}
        for shard in self._runner.shards.values():
            if isinstance(shard, SendingShard):
                for channel, (count, is_held) in shard.waiting().items():
                    waiting[channel] = waiting.get(channel, 0) + count
                    held[channel] = held.get(channel, 0) + is_held
                    unknown[channel] += 0
                unknown.update(shard.unknown())
                gateways |= {gateway.name: gateway for gateway in shard.gateways()}
        for gateway in gateways.values():
            gateway.show()
        metrics = self._runner.tools.metrics
        for channel, count in unknown.items():
            metrics.unknown.labels(channel).set(count)
        for channel, count in waiting.items():
            metrics.waiting.labels(channel).set(count)
            metrics.paused.labels(channel).set(held[channel])
        self._paused_by()

    def _paused_by(self) -> set[str]:
        return {server for shard in self._runner.shards.values() if (server := shard.paused_by()) is not None}

    def health(self) -> Health:
        """Return whether the worker lives and is ready, and why not."""
        runner = self._runner
        now = time.monotonic()
        halted = runner.halted
        held = {
            channel
            for shard in runner.shards.values()
            if isinstance(shard, SendingShard)
            for channel, (_, is_held) in shard.waiting().items()
            if is_held
        }
        held |= self._paused_by()
        committed = {(topic, shard.partition): shard.committed_at for shard in runner.shards.values() for topic in shard.physical_topics()}
        stuck = [
            f"{topic}-{partition}"
            for (topic, partition), (_, since) in self._moved.items()
            # a delivery that is refused for now holds its watermark, yet each try is committed
            if self._lag.get((topic, partition))
            and now - max(since, committed.get((topic, partition), since)) > STUCK_SECONDS
            and not held
            # restarting a worker whose input is halted would only set more aside
            and runner.tools.names.logical[topic] not in halted
        ]
        is_assigned = bool(runner.shards)
        return Health(
            is_live=not stuck,
            is_ready=is_assigned and runner.is_recovered and not stuck and not runner.expired_inputs and not halted,
            details={
                "role": runner.tools.role,
                "assigned": sorted({shard.partition for shard in runner.shards.values()}),
                "recovered": runner.is_recovered,
                "lag": sum(self._lag.values()),
                "stuck": stuck,
                "held": sorted(held),
                "positionsExpired": sorted(runner.expired_inputs),
                "halted": {topic: f"{reason}: {HALTED_ADVICE}" for topic, reason in sorted(halted.items())},
            },
        )
