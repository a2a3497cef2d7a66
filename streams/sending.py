"""Calls providers: the intent is durable before the call, the outcome after it (design rule 4).

A mail cannot be rolled back, so a sender's shard works in turns. One turn is one transaction: the outcomes of the calls
that ended, the intents of those that begin next, and the watermark up to which every delivery is done. Only when it is
committed are the calls made. A worker that was fenced cannot commit an intent, and so cannot call.

A delivery that waits for its next attempt goes to the role delay, in the transaction that records why; a wait shorter than
the shortest tier stays in memory here, and so does what waits for a provider that does not answer.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import islice

from agents.control import Control
from agents.ports import BY_KEY, Output
from agents.receipts import report_key
from agents.retries import tier_for
from agents.sender import Attempt, AttemptState, End, Recalled, Verdict, backoff_seconds, plan, verdict
from channels.base import Channel, Receipt
from schemas import topics
from schemas.codec import unpack
from schemas.errors import (
    AttemptsExhaustedError,
    ExpiredError,
    RegistryUnavailableError,
    SendUnknownError,
    TooLargeError,
    UnsealableError,
)
from schemas.messages import Content, Delivery, ProviderReference, StatusChange
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
_ASK_AGAIN_SECONDS = 1.0


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
    """The channels of a worker, with their slots, and how to open what is sealed for a user.

    `orders_version` grows whenever `control` may say something else. `tiers_seconds`: of the worker's lane.
    """

    channels: Mapping[str, Channel]
    slots: Mapping[str, Slots]
    key_of: Callable[[str], Awaitable[bytes | None]]
    ledger_seconds: int
    control: Control
    orders_version: Callable[[], int]
    tiers_seconds: Sequence[int]


@dataclass(slots=True)
class Job:
    """A delivery that was read and is not done. `number`: of the attempt that runs, or else of the next one."""

    delivery: Delivery
    lane: Lane
    record: Record
    number: int
    failures: int
    cut_off: int | None
    outages: int = 0  # of its provider that it met here

    @property
    def identity(self) -> tuple[str, int]:
        """What is sent at most once at a time."""
        return self.delivery.delivery_id, self.delivery.generation


@dataclass(slots=True)
class Outgoing:
    """One channel of a shard: what is ready, what waits, and whether the provider answers."""

    ready: deque[Job] = field(default_factory=deque)
    waiting: list[tuple[float, int, Job]] = field(default_factory=list)  # heap by monotonic due time
    held_until: float = 0.0
    is_failing: bool = False  # the provider did not answer: one delivery probes, the others wait
    outages: int = 0  # probes in a row that met nobody
    running: int = 0

    def wake(self, now: float) -> None:
        """Make ready what has waited long enough; what met an outage goes last, so that another delivery probes."""
        due: list[Job] = []
        while self.waiting and self.waiting[0][0] <= now:
            due.append(heapq.heappop(self.waiting)[2])
        self.ready.extendleft(job for job in reversed(due) if not job.outages)
        self.ready.extend(job for job in due if job.outages)

    def take_out(self, is_wanted: Callable[[Job], bool]) -> list[Job]:
        """Remove and return the deliveries, ready or waiting, that are wanted."""
        found = [job for job in (*self.ready, *(job for _, _, job in self.waiting)) if is_wanted(job)]
        if found:
            gone = {job.identity for job in found}
            self.ready = deque(job for job in self.ready if job.identity not in gone)
            self.waiting = [entry for entry in self.waiting if entry[2].identity not in gone]
            heapq.heapify(self.waiting)
        return found


class SendingShard(Shard):
    """Turns deliveries into calls to providers."""

    def __init__(self, tools: Tools, step: Step, partition: int, lanes: list[Lane], *, providers: Providers) -> None:
        super().__init__(tools, step, partition, lanes)
        self._providers = providers
        self._channel_of = {topic: topic.split(".")[1] for topic in self.lanes}
        self._outgoing = {channel: Outgoing() for channel in self._channel_of.values()}
        self._ended: list[tuple[Job, End]] = []
        self._active: set[tuple[str, int]] = set()  # identities of the jobs
        self._deferred: list[tuple[Output, bytes]] = []  # too early for this sender: back to the role delay
        self._orders_seen = -1
        self._ask_again_at: float | None = None  # a delivery's schema could not be asked for
        self._lost: list[tuple[Lane, Record, Exception]] = []
        # per input: offset -> done, in offset order; the watermark is the first that is not done
        self._unfinished: dict[str, dict[int, bool]] = {topic: {} for topic in self.lanes}
        self._reached: dict[str, int] = {}
        self._calls: set[asyncio.Task[None]] = set()
        self._order = itertools.count()

    async def run(self) -> None:
        """Take deliveries in, record what ended and what begins, call; until cancelled."""
        while True:
            self.wake.clear()
            await self._learn()
            if not self.is_draining:
                self._take_in()
            ended, self._ended = self._ended, []
            starts: list[Job] = []
            if not self.is_draining:
                ended += self._recall()
                settled, starts = self._choose()
                ended += settled
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
        """As Shard.drain; deliveries that wait in memory are forgotten here and known to the ledger."""
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

    async def _learn(self) -> None:
        """Make the schemas known of what is taken in next: another release may have written it."""
        for lane in self.lanes.values():
            room = WINDOW_DELIVERIES - len(self._unfinished[lane.topic])
            if lane.queue and room > 0 and lane.handles.learn is not None:
                await lane.handles.learn(islice(lane.queue, room))

    def _take_in(self) -> None:
        self._ask_again_at = None
        for lane in self.lanes.values():
            unfinished = self._unfinished[lane.topic]
            while lane.queue and not lane.run.halted and len(unfinished) < WINDOW_DELIVERIES:
                message = lane.queue.popleft()
                try:
                    self._take(lane, message)
                except RegistryUnavailableError:
                    lane.queue.appendleft(message)
                    self._ask_again_at = time.monotonic() + _ASK_AGAIN_SECONDS
                    break
            if lane.run.halted:
                lane.halt()

    def _take(self, lane: Lane, message: Record) -> None:
        """Take a delivery in. Raises RegistryUnavailableError: it has to wait, and nothing has changed."""
        offset = message.offset()
        unfinished = self._unfinished[lane.topic]
        metrics = self.tools.metrics
        if lane.watermark is not None and offset < lane.watermark:
            metrics.replayed.labels(lane.topic).inc()
            lane.reader.finished(self.partition, 1)
            return
        passage = lane.run.begin()
        try:
            delivery: Delivery = lane.handles.decode(message)
            passage.passed()
        except RegistryUnavailableError:
            raise
        except Exception as error:
            if not passage.may_set_aside():
                return
            passage.committed()
            metrics.records.labels(lane.topic).inc()
            self._reached[lane.topic] = offset + 1
            unfinished[offset] = True
            self._lost.append((lane, message, error))
            return
        passage.committed()
        metrics.records.labels(lane.topic).inc()
        self._reached[lane.topic] = offset + 1
        channel_name = self._channel_of[lane.topic]
        channel = self._providers.channels[channel_name]
        how = plan(delivery, self.tables[ATTEMPTS].get(delivery.delivery_id.encode()), channel.on_unknown)
        job = Job(delivery, lane, message, how.number or how.cut_off or 1, how.failures, how.cut_off)
        if (how.number is None and how.cut_off is None) or job.identity in self._active:
            metrics.suppressed.labels(channel_name).inc()
            unfinished[offset] = True
            return
        left = how.not_before_ms / 1000 - time.time()
        if left > 0 and (deferred := self._delayed(job, left, attempt=job.number)) is not None:
            unfinished[offset] = True
            self._deferred.append(deferred)
            return
        unfinished[offset] = False
        self._active.add(job.identity)
        if how.number is None:
            # cut off, and the channel does not repeat what may have arrived
            job.cut_off = None
            self._ended.append((job, SendUnknownError("cut off by a crash", code="cut_off")))
        elif left > 0:
            self._keep(job, left)
        else:
            self._outgoing[channel_name].ready.append(job)

    def _keep(self, job: Job, seconds: float) -> None:
        """Let a delivery wait in memory."""
        heapq.heappush(self._outgoing[job.delivery.channel].waiting, (time.monotonic() + seconds, next(self._order), job))

    def _delayed(self, job: Job, seconds: float, *, attempt: int) -> tuple[Output, bytes] | None:
        """Return the record that brings a delivery back for `attempt` in `seconds`; None: it has to wait here."""
        tier = tier_for(seconds, self._providers.tiers_seconds)
        if tier is None:
            return None
        delivery = job.delivery
        later = replace(delivery, attempt=attempt, not_before=datetime.now(UTC) + timedelta(seconds=seconds))
        output = Output(topics.retry(job.lane.topic.rpartition(".")[2], tier), delivery.user_id.encode(), later)
        try:
            return output, self.encode(output)
        except TooLargeError:
            return None  # as it came, it was as large as Kafka takes

    def _has_progress(self) -> bool:
        return bool(self._lost or self._deferred) or any(next(iter(done.values()), False) for done in self._unfinished.values())

    # ---- out

    def _recall(self) -> list[tuple[Job, End]]:
        """Return what new orders recall of all that is here and not begun, though its channel may be held."""
        version = self._providers.orders_version()
        if version == self._orders_seen:
            return []
        self._orders_seen = version
        recalls = self._providers.control.recalls
        recalled: list[tuple[Job, End]] = []
        for out in self._outgoing.values():
            for job in out.take_out(lambda job: recalls(job.delivery) is not None):
                order = recalls(job.delivery)
                if order is None:  # lifted in this moment: the follower has a thread of its own
                    out.ready.append(job)
                else:
                    recalled.append((job, Recalled(order)))
        return recalled

    def _choose(self) -> tuple[list[tuple[Job, End]], list[Job]]:
        """Return what ends without a call, and the deliveries to call for next, each with a slot taken."""
        now, moment = time.monotonic(), datetime.now(UTC)
        settled: list[tuple[Job, End]] = []
        starts: list[Job] = []
        for channel, out in self._outgoing.items():
            out.wake(now)
            slots = self._providers.slots[channel]
            while out.ready:
                end = self._settle_directly(out.ready[0].delivery, moment)
                if end is not None:
                    settled.append((out.ready.popleft(), end))
                elif out.held_until > now or (out.is_failing and out.running) or not slots.take(self.wake):
                    break
                else:
                    out.running += 1
                    starts.append(out.ready.popleft())
        return settled, starts

    def _settle_directly(self, delivery: Delivery, now: datetime) -> End | None:
        """Return how a delivery ends without a call: past its time, recalled, or on a channel that calls nobody.

        For these, intent and outcome are one record.
        """
        if delivery.expires_at is not None and delivery.expires_at < now:
            return ExpiredError("past its latest useful moment")
        order = self._providers.control.recalls(delivery)
        if order is not None:
            return Recalled(order)
        return self._providers.channels[delivery.channel].record(delivery)

    async def _transact(self, ended: list[tuple[Job, End]], starts: list[Job]) -> None:
        self.writer.begin()
        for lane, message, error in self._lost:
            self.dead_letter(RecordSource(message, lane.topic), message.value(), error)
        self._lost.clear()
        for deferred in self._deferred:
            self.publish(*deferred)
        self._deferred.clear()
        now = datetime.now(UTC)
        for job, end in ended:
            self._record_end(job, end, now)
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
        self._record_cut_off(job, now)
        self._put_attempt(job, AttemptState.OPEN, now)
        self._publish_status(job, Verdict(status=Status.SENDING), now, attempt=job.number)

    def _record_cut_off(self, job: Job, now: datetime) -> None:
        if job.cut_off is not None:
            self._publish_status(job, Verdict(status=Status.UNKNOWN, reason="cut_off"), now, attempt=job.cut_off)
            self._publish_reference(job, None, now, attempt=job.cut_off)
            job.cut_off = None

    def _record_end(self, job: Job, end: End, now: datetime) -> None:
        """Record how an attempt ended and what follows: nothing, a wait in memory, or one through the role delay."""
        delivery = job.delivery
        channel, out = self._providers.channels[delivery.channel], self._outgoing[delivery.channel]
        found = verdict(end, delivery=delivery, failures=job.failures, on_unknown=channel.on_unknown, now=now)
        if isinstance(end, BaseException) and found.reason is not None and found.reason.endswith("internal"):
            log.error("attempt.failed delivery_id=%s", delivery.delivery_id, exc_info=end)
        if isinstance(end, ExpiredError | Recalled):
            # the number is of an attempt that never began: what is known of the one before may still come to count
            self._record_cut_off(job, now)
            job.number -= 1
        self._publish_status(job, found, now, attempt=job.number)
        if found.status in {Status.SENT, Status.UNKNOWN}:
            self._publish_reference(job, end if isinstance(end, Receipt) else None, now, attempt=job.number)
        self._count(job, found, now)
        if found.wait_seconds is None:
            if found.is_exhausted:
                error = AttemptsExhaustedError(f"attempt {job.number} was the last one: {found.reason}")
                self.dead_letter(RecordSource(job.record, job.lane.topic), job.record.value(), error)
            if isinstance(end, Receipt):
                self._resume(out, channel)
            self._finish(job, AttemptState.DONE, now)
            return
        wait = found.wait_seconds
        if found.holds_channel:
            wait = self._hold(out, channel, found, job)
        else:
            job.failures += 1
        delayed = None if found.holds_channel else self._delayed(job, wait, attempt=job.number + 1)
        if delayed is not None:
            self.publish(*delayed)
            self._finish(job, AttemptState.DELAYED, now)
            return
        # after a restart only what was asked for is waited for: the provider may be back
        asked = found.wait_seconds
        self._put_attempt(job, AttemptState.WAITING, now, not_before=now + timedelta(seconds=asked))
        job.number += 1
        if not self.is_draining:
            self._keep(job, wait)

    def _finish(self, job: Job, state: AttemptState, now: datetime) -> None:
        """Let go of a delivery: its record is done."""
        self._put_attempt(job, state, now)
        self._active.discard(job.identity)
        self._unfinished[job.lane.topic][job.record.offset()] = True

    def _hold(self, out: Outgoing, channel: Channel, found: Verdict, job: Job) -> float:
        """Leave the provider alone for a while; return how long the delivery that met nobody waits."""
        if not out.is_failing:
            log.warning("channel.held channel=%s partition=%d reason=%s", channel.name, self.partition, found.reason)
            out.is_failing, out.outages = True, 0
        asked = found.wait_seconds or 0.0
        now = time.monotonic()
        if out.held_until <= now:
            # calls that ran side by side met one outage
            out.held_until = now + backoff_seconds(out.outages)
            out.outages += 1
        out.held_until = max(out.held_until, now + asked)
        job.outages += 1
        # by its own count: a delivery that alone drives the provider away must not hold the channel again and again
        return max(out.held_until - now, backoff_seconds(job.outages - 1))

    def _resume(self, out: Outgoing, channel: Channel) -> None:
        if out.is_failing:
            log.warning("channel.resumed channel=%s partition=%d", channel.name, self.partition)
            out.is_failing, out.held_until = False, 0.0

    def _count(self, job: Job, found: Verdict, now: datetime) -> None:
        delivery, metrics = job.delivery, self.tools.metrics
        provider = self._providers.channels[delivery.channel].provider
        metrics.deliveries.labels(delivery.channel, delivery.lane, provider, found.status).inc()
        if found.status in {Status.SENT, Status.DELIVERED}:
            metrics.delivery_seconds.labels(delivery.lane, delivery.channel).observe((now - delivery.accepted_at).total_seconds())

    def _put_attempt(self, job: Job, state: AttemptState, now: datetime, *, not_before: datetime | None = None) -> None:
        key = job.delivery.delivery_id.encode()
        known = self.tables[ATTEMPTS].get(key)
        if known is not None and Attempt.of(known).generation > job.delivery.generation:
            return  # redriven while an attempt of the generation before was running
        attempt = Attempt(
            generation=job.delivery.generation,
            number=job.number,
            state=state,
            failures=job.failures,
            at_ms=round(now.timestamp() * 1000),
            not_before_ms=0 if not_before is None else round(not_before.timestamp() * 1000),
        )
        self.put(ATTEMPTS, key, attempt.row())

    def _publish_status(self, job: Job, found: Verdict, now: datetime, *, attempt: int) -> None:
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
            # attempt 0: nobody was asked
            provider=self._providers.channels[delivery.channel].provider if attempt else None,
            reference=found.reference,
            generation=delivery.generation,
            attempt=attempt,
            at=now,
        )
        self.publish(Output(topics.STATUS, delivery.user_id.encode(), change), self.tools.encoder.encode(change))

    def _publish_reference(self, job: Job, receipt: Receipt | None, now: datetime, *, attempt: int) -> None:
        """Say whom the provider's later reports belong to, if any come."""
        delivery = job.delivery
        channel = self._providers.channels[delivery.channel]
        reference = channel.reference_of(delivery, receipt)
        if reference is None:
            return
        known = ProviderReference(
            provider=channel.provider,
            reference=reference,
            notification_id=delivery.notification_id,
            delivery_id=delivery.delivery_id,
            user_id=delivery.user_id,
            channel=delivery.channel,
            lane=delivery.lane,
            generation=delivery.generation,
            attempt=attempt,
            at=now,
        )
        output = Output(topics.PROVIDER_REFS, report_key(channel.provider, reference), known, BY_KEY)
        self.publish(output, self.tools.encoder.encode(known))

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
            if not attempt.is_over_here or attempt.at_ms > oldest_ms:
                break
            self.put(ATTEMPTS, key, None)

    async def _call(self, job: Job) -> None:
        delivery = job.delivery
        end: End
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
        self._active.clear()
        self._deferred.clear()
        for unfinished in self._unfinished.values():
            unfinished.clear()
        self._lost.clear()

    async def _sleep(self) -> None:
        now = time.monotonic()
        dues = list(self._dues(now))
        try:
            await asyncio.wait_for(self.wake.wait(), max(0.01, min(dues) - now) if dues else None)
        except TimeoutError:
            return

    def _dues(self, now: float) -> Iterator[float]:
        """Yield the moments at which there may be something to do without being woken."""
        if self._ask_again_at is not None:
            yield self._ask_again_at
        for out in self._outgoing.values():
            if out.waiting:
                yield out.waiting[0][0]
            if out.ready and out.held_until > now:
                yield out.held_until
