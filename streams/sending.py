"""Calls providers: the intent is durable before the call, the outcome after it (design rule 4).

A mail cannot be rolled back, so a sender's shard works in turns. One turn is one transaction: the outcomes of the calls
that ended, the intents of those that begin next, and the watermark up to which every delivery is done. Only when it is
committed are the calls made. A worker that was fenced cannot commit an intent, and so cannot call.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice

from agents.ports import Output
from agents.sender import Attempt, AttemptState, Verdict, plan, verdict
from channels.base import Channel, Receipt
from schemas import topics
from schemas.codec import unpack
from schemas.errors import ExpiredError, UndecodableError, UnsealableError
from schemas.messages import Content, Delivery, StatusChange
from schemas.sealed import unseal
from schemas.status import Axis, Status
from streams.runner import DRAIN_SECONDS, Lane, RecordSource, Shard, Tools
from streams.topology import Step
from streams.transport.cluster import leave
from streams.transport.records import Record

log = logging.getLogger(__name__)

ATTEMPTS = "attempts"
# deliveries of a shard that are taken in and not done: beyond it the partition waits
WINDOW_DELIVERIES = 1_000
_PRUNE_ROWS = 2


class Slots:
    """How many calls to one provider run at once in this worker: the bound on duplicates of a crash."""

    def __init__(self, channel: Channel, limit: int, tools: Tools) -> None:
        self.channel = channel
        self._free = min(limit, channel.max_open)
        self._wakes: set[asyncio.Event] = set()
        self._gauge = tools.metrics.attempts_open.labels(channel.provider)

    def take(self, wake: asyncio.Event) -> bool:
        """Take a slot; without a free one, say no and set `wake` when there is one."""
        if self._free == 0:
            self._wakes.add(wake)
            return False
        self._free -= 1
        self._gauge.inc()
        return True

    def give_back(self) -> None:
        """Free a slot."""
        self._free += 1
        self._gauge.dec()
        for wake in self._wakes:
            wake.set()
        self._wakes.clear()


@dataclass(slots=True)
class Providers:
    """The channels of a worker, with their slots, and how to open what is sealed for a user."""

    channels: Mapping[str, Channel]
    slots: Mapping[str, Slots]
    key_of: Callable[[str], Awaitable[bytes | None]]
    ledger_seconds: int


@dataclass(slots=True)
class Job:
    """A delivery that was read and is not done."""

    delivery: Delivery
    lane: Lane
    offset: int
    number: int
    failures: int
    cut_off: int | None


@dataclass(slots=True)
class Outgoing:
    """One channel of a shard: what is ready, what waits, and whether the provider answers."""

    ready: deque[Job] = field(default_factory=deque)
    waiting: list[tuple[float, int, Job]] = field(default_factory=list)  # heap by monotonic due time
    held_until: float = 0.0
    is_failing: bool = False  # the provider did not answer: one delivery probes, the others wait
    running: int = 0


class SendingShard(Shard):
    """Turns deliveries into calls to providers."""

    def __init__(self, tools: Tools, step: Step, partition: int, lanes: list[Lane], *, providers: Providers) -> None:
        super().__init__(tools, step, partition, lanes)
        self._providers = providers
        self._channel_of = {topic: topic.split(".")[1] for topic in self.lanes}
        self._outgoing = {channel: Outgoing() for channel in self._channel_of.values()}
        self._ended: list[tuple[Job, Receipt | BaseException]] = []
        self._lost: list[tuple[Lane, Record, UndecodableError]] = []
        # per input: offset -> done, in offset order; the watermark is the first that is not done
        self._unfinished: dict[str, dict[int, bool]] = {topic: {} for topic in self.lanes}
        self._reached: dict[str, int] = {}
        self._calls: set[asyncio.Task[None]] = set()
        self._order = itertools.count()

    async def run(self) -> None:
        """Take deliveries in, record what ended and what begins, call; until cancelled."""
        while True:
            self.wake.clear()
            if not self.is_draining:
                self._take_in()
            ended, self._ended = self._ended, []
            starts: list[Job] = []
            if not self.is_draining:
                self._wake_waiting()
                ended += self._settle_directly()
                starts = self._choose()
            if ended or starts or self._has_progress():
                self.idle.clear()
                await self._transact(ended, starts)
                continue
            if self.is_draining and not self._calls:
                self._forget()
            for topic, unfinished in self._unfinished.items():
                if not unfinished and not self.lanes[topic].queue:
                    self.lanes[topic].settle()
            if not self._calls:
                self.idle.set()
            await self._sleep()

    async def drain(self) -> None:
        """As Shard.drain; deliveries that wait to be tried again are forgotten here and known to the ledger."""
        await super().drain()
        if not self.idle.is_set():
            # what was begun before and what is read again could not be told apart
            leave(f"a call outlived {DRAIN_SECONDS} s of {self.step.name}-{self.partition}")
        self._forget()

    def waiting(self) -> dict[str, tuple[int, bool]]:
        """Return by channel how many deliveries wait to be tried again, and whether the channel is held."""
        now = time.monotonic()
        return {
            channel: (len(out.waiting) + (len(out.ready) if out.is_failing else 0), out.is_failing or out.held_until > now)
            for channel, out in self._outgoing.items()
        }

    # ---- in

    def _take_in(self) -> None:
        for lane in self.lanes.values():
            unfinished = self._unfinished[lane.topic]
            while lane.queue and len(unfinished) < WINDOW_DELIVERIES:
                self._take(lane, lane.queue.popleft())

    def _take(self, lane: Lane, message: Record) -> None:
        offset = message.offset()
        unfinished = self._unfinished[lane.topic]
        metrics = self.tools.metrics
        if lane.watermark is not None and offset < lane.watermark:
            metrics.replayed.labels(lane.topic).inc()
            lane.reader.finished(self.partition, 1)
            return
        metrics.records.labels(lane.topic).inc()
        self._reached[lane.topic] = offset + 1
        channel_name = self._channel_of[lane.topic]
        try:
            delivery: Delivery = lane.handles.decode(message)
        except Exception as error:
            unfinished[offset] = True
            self._lost.append((lane, message, error if isinstance(error, UndecodableError) else UndecodableError(str(error))))
            return
        channel = self._providers.channels[channel_name]
        how = plan(delivery, self.tables[ATTEMPTS].get(delivery.delivery_id.encode()), channel.on_unknown)
        if how.number is None and how.cut_off is None:
            metrics.suppressed.labels(channel_name).inc()
            unfinished[offset] = True
            return
        unfinished[offset] = False
        job = Job(delivery, lane, offset, how.number or how.cut_off or 1, how.failures, how.cut_off)
        if how.number is None:
            # cut off, and the channel does not repeat what may have arrived
            self._ended.append((job, _CutOffError()))
        else:
            self._outgoing[channel_name].ready.append(job)

    def _has_progress(self) -> bool:
        return bool(self._lost) or any(next(iter(done.values()), False) for done in self._unfinished.values())

    # ---- out

    def _wake_waiting(self) -> None:
        now = time.monotonic()
        for out in self._outgoing.values():
            while out.waiting and out.waiting[0][0] <= now:
                out.ready.appendleft(heapq.heappop(out.waiting)[2])

    def _settle_directly(self) -> list[tuple[Job, Receipt | BaseException]]:
        """Return what ends without a call: deliveries past their time, and those of a channel that calls nobody.

        For these, intent and outcome are one record.
        """
        now = datetime.now(UTC)
        found: list[tuple[Job, Receipt | BaseException]] = []
        for channel, out in self._outgoing.items():
            record = self._providers.channels[channel].record
            while out.ready:
                delivery = out.ready[0].delivery
                if delivery.expires_at is not None and delivery.expires_at < now:
                    end: Receipt | BaseException | None = ExpiredError("past its latest useful moment")
                else:
                    end = record(delivery)
                if end is None:
                    break
                found.append((out.ready.popleft(), end))
        return found

    def _choose(self) -> list[Job]:
        """Return the deliveries to call for next, each with a slot taken."""
        now = time.monotonic()
        starts: list[Job] = []
        for channel, out in self._outgoing.items():
            if out.held_until > now:
                continue
            slots = self._providers.slots[channel]
            while out.ready and not (out.is_failing and out.running) and slots.take(self.wake):
                out.running += 1
                starts.append(out.ready.popleft())
        return starts

    async def _transact(self, ended: list[tuple[Job, Receipt | BaseException]], starts: list[Job]) -> None:
        self.writer.begin()
        for lane, message, error in self._lost:
            self.dead_letter(RecordSource(message, lane.topic), message.value(), error)
        self._lost.clear()
        for job, end in ended:
            self._record_end(job, end)
        now = datetime.now(UTC)
        for job in starts:
            self._record_start(job, now)
        finished = self._move_watermarks()
        self._prune(now)
        await self.commit(len(ended) + len(starts))
        for topic, (watermark, count) in finished.items():
            lane = self.lanes[topic]
            lane.watermark = watermark
            lane.reader.finished(self.partition, count)
        for job in starts:
            call = asyncio.create_task(self._call(job))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    def _record_start(self, job: Job, now: datetime) -> None:
        if job.cut_off is not None:
            self._publish_status(job, Verdict(status=Status.UNKNOWN, reason="cut_off"), now, attempt=job.cut_off)
            job.cut_off = None
        self._put_attempt(job, AttemptState.OPEN, now)
        self._publish_status(job, Verdict(status=Status.SENDING), now)

    def _record_end(self, job: Job, end: Receipt | BaseException) -> None:
        channel = self._providers.channels[job.delivery.channel]
        found = verdict(end, failures=job.failures, on_unknown=channel.on_unknown)
        if found.reason == "internal":
            log.error("attempt.failed delivery_id=%s", job.delivery.delivery_id, exc_info=None if isinstance(end, Receipt) else end)
        out = self._outgoing[job.delivery.channel]
        now = time.monotonic()
        if found.holds_channel:
            if not out.is_failing:
                log.warning("channel.held channel=%s partition=%d reason=%s", channel.name, self.partition, found.reason)
            out.is_failing = True
            out.held_until = now + (found.wait_seconds or 0.0)
        elif out.is_failing and isinstance(end, Receipt):
            log.warning("channel.resumed channel=%s partition=%d", channel.name, self.partition)
            out.is_failing = False
            # what waited for the provider alone need not wait on
            out.ready.extendleft(waiting for _, _, waiting in sorted(out.waiting, reverse=True))
            out.waiting.clear()
        if found.wait_seconds is not None and not self.is_draining:
            job.failures += 1
            heapq.heappush(out.waiting, (now + found.wait_seconds, next(self._order), job))
        self._record(job, found, datetime.now(UTC))
        if found.wait_seconds is not None:
            job.number += 1

    def _record(self, job: Job, found: Verdict, now: datetime) -> None:
        """Record how an attempt ended; when nothing follows, the delivery is done."""
        is_done = found.wait_seconds is None
        self._put_attempt(job, AttemptState.DONE if is_done else AttemptState.WAITING, now)
        self._publish_status(job, found, now)
        if is_done:
            self._unfinished[job.lane.topic][job.offset] = True
        delivery, metrics = job.delivery, self.tools.metrics
        provider = self._providers.channels[delivery.channel].provider
        metrics.deliveries.labels(delivery.channel, delivery.lane, provider, found.status).inc()
        if found.status in {Status.SENT, Status.DELIVERED}:
            metrics.delivery_seconds.labels(delivery.lane, delivery.channel).observe((now - delivery.accepted_at).total_seconds())

    def _put_attempt(self, job: Job, state: AttemptState, now: datetime) -> None:
        attempt = Attempt(
            generation=job.delivery.generation,
            number=job.number,
            state=state,
            failures=job.failures,
            at_ms=round(now.timestamp() * 1000),
        )
        self.put(ATTEMPTS, job.delivery.delivery_id.encode(), attempt.row())

    def _publish_status(self, job: Job, found: Verdict, now: datetime, *, attempt: int | None = None) -> None:
        delivery = job.delivery
        change = StatusChange(
            notification_id=delivery.notification_id,
            delivery_id=delivery.delivery_id,
            user_id=delivery.user_id,
            axis=Axis.DELIVERY,
            status=found.status,
            reason=found.reason,
            channel=delivery.channel,
            lane=delivery.lane,
            provider=self._providers.channels[delivery.channel].provider,
            reference=found.reference,
            generation=delivery.generation,
            attempt=job.number if attempt is None else attempt,
            at=now,
        )
        self.publish(Output(topics.STATUS, delivery.user_id.encode(), change), self.tools.encoder.encode(change))

    def _move_watermarks(self) -> dict[str, tuple[int, int]]:
        """Put each input's watermark past its finished head; return topic -> (watermark, records finished)."""
        moved: dict[str, tuple[int, int]] = {}
        for topic, unfinished in self._unfinished.items():
            head = list(itertools.takewhile(unfinished.__getitem__, unfinished))
            if not head:
                continue
            for offset in head:
                del unfinished[offset]
            watermark = next(iter(unfinished), self._reached[topic])
            self.put_watermark(topic, watermark)
            moved[topic] = (watermark, len(head))
        return moved

    def _prune(self, now: datetime) -> None:
        oldest_ms = round(now.timestamp() * 1000) - self._providers.ledger_seconds * 1000
        for key, row in list(islice(self.tables[ATTEMPTS].items(), _PRUNE_ROWS)):
            attempt = Attempt.of(row)
            if attempt.state is not AttemptState.DONE or attempt.at_ms > oldest_ms:
                break
            self.put(ATTEMPTS, key, None)

    async def _call(self, job: Job) -> None:
        delivery = job.delivery
        end: Receipt | BaseException
        try:
            key = await self._providers.key_of(delivery.user_id)
            if key is None:
                raise UnsealableError("the user has no key: erased")
            opened = unseal(key, delivery.sealed, user_id=delivery.user_id, purpose="content")
            end = await self._providers.channels[delivery.channel].send(delivery, unpack(opened, Content))
        except asyncio.CancelledError:
            self._end_slot(job)
            raise
        except Exception as error:
            end = error
        self._end_slot(job)
        self._ended.append((job, end))
        self.wake.set()

    def _end_slot(self, job: Job) -> None:
        self._outgoing[job.delivery.channel].running -= 1
        self._providers.slots[job.delivery.channel].give_back()

    # ---- rest

    def _forget(self) -> None:
        for out in self._outgoing.values():
            out.ready.clear()
            out.waiting.clear()
        for unfinished in self._unfinished.values():
            unfinished.clear()
        self._lost.clear()

    async def _sleep(self) -> None:
        now = time.monotonic()
        dues = [
            max(out.held_until, out.waiting[0][0] if out.waiting and not out.ready else 0.0)
            for out in self._outgoing.values()
            if out.waiting or (out.ready and out.held_until > now)
        ]
        try:
            await asyncio.wait_for(self.wake.wait(), max(0.01, min(dues) - now) if dues else None)
        except TimeoutError:
            return


class _CutOffError(Exception):
    """An attempt that a crash left open, on a channel that does not repeat it."""
