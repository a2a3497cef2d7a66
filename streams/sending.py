"""Calls providers: the intent is durable before the call, the outcome after it (design rule 4).

A mail cannot be rolled back, so a sender's shard works in turns. One turn is one transaction: the outcomes of the calls
that ended, the intents of those that begin next, and the watermark up to which every delivery is done. Only when it is
committed are the calls made. A worker that was fenced cannot commit an intent, and so cannot call.

A delivery that waits for its next attempt goes to the role delay, in the transaction that records why; a wait shorter than
the shortest tier stays in memory here, and so does what waits for providers that do not answer. Where some providers carry
some routes only, a route that waits makes room for the others: its deliveries go to the role delay too, and spend nothing.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import cast

from agents.failover import Wait, backoff_seconds
from agents.pacing import daily_share, day_of, seconds_to_next_day
from agents.ports import BY_KEY, Output
from agents.receipts import report_key
from agents.retries import tier_for
from agents.sender import Attempt, AttemptState, End, Recalled, Verdict, is_settled_by, plan, said_of_provider, verdict
from channels.absent import NO_PROVIDER
from channels.base import Receipt
from schemas import topics
from schemas.codec import pack, unpack
from schemas.errors import (
    AttemptsExhaustedError,
    ExpiredError,
    ProviderError,
    ProviderRejectedError,
    ProviderUnavailableError,
    RegistryUnavailableError,
    SendUnknownError,
    TooLargeError,
    UnsealableError,
)
from schemas.ids import digest
from schemas.messages import Command, Contact, Content, ControlEntry, Delivery, ProviderReference, StatusChange
from schemas.sealed import seal, unseal
from schemas.status import Axis, Status, Suppression
from streams.gateways import Call, Gateway, Line
from streams.outgoing import Job, Outgoing, Providers
from streams.shard import DRAIN_SECONDS, Lane, RecordSource, Shard, Tools
from streams.topology import Step
from streams.transport.cluster import leave
from streams.transport.records import Record
from streams.transport.writer import RepeatingWriter

log = logging.getLogger(__name__)

ATTEMPTS, USED = "attempts", "used"
# deliveries of a shard that are taken in and not done: beyond it the partition waits
WINDOW_DELIVERIES = 1_000
_PRUNE_ROWS = 2  # for each delivery that begins or ends
_ASK_AGAIN_SECONDS = 1.0
# so long after the first delivery that comes for an idle shard others are waited for: one transaction of the router wakes
# the reader of each channel, a moment apart
_GATHER_SECONDS = 0.002
# what cannot begin within so long makes room for what can (design rule 7)
_STUCK_SECONDS = 2.0
# who may have taken an attempt is asked so often, each time for so long, before it is repeated all the same
_MOST_QUESTIONS = 3
_LOOK_UP_SECONDS = 3.0
_NOT_ASKED = "look_up"


class SendingShard(Shard):
    """Turns deliveries into calls to providers."""

    writer_class = RepeatingWriter  # calls that ended cannot be decided again

    def __init__(self, tools: Tools, step: Step, partition: int, lanes: list[Lane], *, providers: Providers) -> None:
        super().__init__(tools, step, partition, lanes)
        self._providers = providers
        self._channel_of = {topic: topic.split(".")[1] for topic in self.lanes if topic.startswith("deliver.")}
        self._outgoing = {channel: Outgoing() for channel in self._channel_of.values()}
        self._ended: list[tuple[Job, End]] = []
        self._active: set[tuple[str, int]] = set()  # identities of the jobs
        self._deferred: list[tuple[Output, bytes]] = []  # too early for this sender: back to the role delay
        self._stepped_back: list[tuple[Job, tuple[Output, bytes]]] = []  # make room for other routes
        self._settlements: dict[tuple[str, int], StatusChange] = {}  # by identity: reports that end what waits to be sent again
        self._reports: dict[tuple[str, int], tuple[StatusChange, int]] = {}  # the same of what is under way, with their offsets
        self._begun: Counter[str] = Counter()  # calls by provider that are chosen and not recorded yet
        self._unknown: dict[str, str] | None = None  # delivery id -> channel: what may have arrived, and is not settled
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
            if any(lane.queue for lane in self.lanes.values()):
                await asyncio.sleep(_GATHER_SECONDS)

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
        found: dict[str, tuple[int, bool]] = {}
        for channel, out in self._outgoing.items():
            is_held = self._providers.gateways[channel].is_held(out.routes())
            found[channel] = (len(out.waiting) + (len(out.ready) if out.stuck_until > now and out.ready else 0), is_held)
        return found

    def gateways(self) -> Sequence[Gateway]:
        """Return the gateways of its channels, which the worker's shards share."""
        return [self._providers.gateways[channel] for channel in self._outgoing]

    def unknown(self) -> Counter[str]:
        """Return by channel how many deliveries may have arrived, and nothing has settled it yet."""
        if self._unknown is None:
            # recovered rows: only those that name a provider end in a text
            named = ((key, row) for key, row in self.tables[ATTEMPTS].items() if row.endswith(b'"]'))
            self._unknown = {key.decode(): _channel_in(key) for key, row in named if Attempt.of(row).is_unknown}
        return Counter(self._unknown.values())

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
            decoded = lane.handles.decode(message)
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
        if lane.topic not in self._channel_of:
            self._take_report(decoded, offset, unfinished)
            return
        delivery: Delivery = decoded
        channel_name = self._channel_of[lane.topic]
        channel = self._providers.gateways[channel_name].first
        row = self.tables[ATTEMPTS].get(delivery.delivery_id.encode())
        how = plan(delivery, row, channel.on_unknown, unknown_seconds=channel.unknown_seconds)
        job = Job(delivery, lane, message, how.number or how.cut_off or 1, how.failures, how.cut_off, how.provider, how.provider)
        if (how.number is None and how.cut_off is None) or job.identity in self._active or job.identity in self._settlements:
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
            # cut off, and the channel does not repeat what may have arrived, or not yet
            job.cut_off = None
            self._ended.append((job, SendUnknownError("cut off by a crash", code="cut_off")))
        elif left > 0:
            self._keep(job, left)
        else:
            self._outgoing[channel_name].ready.append(job)

    def _take_report(self, change: StatusChange, offset: int, unfinished: dict[int, bool]) -> None:
        """Take in what a provider reported on an attempt of unknown end: a delivery that waits to be sent again is over.

        While the next attempt is under way the report waits for its end, and the watermark for the report: a crash forgets none.
        """
        unfinished[offset] = True
        out = self._outgoing.get(change.channel or "")
        row = self.tables[ATTEMPTS].get((change.delivery_id or "").encode())
        if out is None or not is_settled_by(change, row):
            return
        identity = (change.delivery_id or "", change.generation)
        here = out.take_out(lambda job: job.identity == identity)
        if not here and identity in self._active:
            if identity not in self._reports:
                unfinished[offset] = False
                self._reports[identity] = (change, offset)
            return
        for job in here:
            self._let_go(job)
        self._settlements.setdefault(identity, change)

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
        return bool(self._lost or self._deferred or self._stepped_back or self._settlements) or any(
            next(iter(done.values()), False) for done in self._unfinished.values()
        )

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
        """Return what ends without a call, and the deliveries to call for next, each with its call granted."""
        now, moment = time.monotonic(), datetime.now(UTC)
        settled: list[tuple[Job, End]] = []
        starts: list[Job] = []
        for channel, out in self._outgoing.items():
            out.wake(now)
            gateway = self._providers.gateways[channel]
            stuck: dict[str | None, Wait] = {}
            passed: list[Job] = []
            while out.ready:
                job = out.ready[0]
                route = job.delivery.route
                if route in stuck:
                    passed.append(out.ready.popleft())
                    continue
                end = self._settle_directly(job.delivery, moment)
                if end is not None:
                    settled.append((out.ready.popleft(), end))
                    continue
                draw = f"{job.delivery.delivery_id} {job.delivery.generation} {job.number}"
                found = gateway.take(route=route, draw=draw, avoid=job.tried, spendable_at=self._spendable_at, wake=self.wake)
                if isinstance(found, Call):
                    job.call = found
                    self._begun[found.line.provider.name] += 1
                    starts.append(out.ready.popleft())
                elif found is None:
                    error = ProviderRejectedError(f"no provider carries {route}", code=NO_PROVIDER)
                    settled.append((out.ready.popleft(), error))
                else:
                    stuck[route] = found
                    if not gateway.has_routes:
                        break
            out.ready.extendleft(reversed(passed))
            out.stuck_until = min((wait.until for wait in stuck.values()), default=math.inf)
            if gateway.has_routes and stuck:
                self._step_back(channel, out, stuck, now)
        return settled, starts

    def _step_back(self, channel: str, out: Outgoing, stuck: Mapping[str | None, Wait], now: float) -> None:
        """Send deliveries whose route waits for long to the role delay, when they would soon leave no room for others."""
        lanes = [topic for topic, name in self._channel_of.items() if name == channel]
        if sum(len(self._unfinished[topic]) for topic in lanes) < WINDOW_DELIVERIES // 2:
            return
        far = {route: wait.until - now for route, wait in stuck.items() if _STUCK_SECONDS < wait.until - now < math.inf}
        for job in list(out.ready):
            seconds = far.get(job.delivery.route)
            if seconds is not None and (delayed := self._delayed(job, seconds, attempt=job.number)) is not None:
                self._stepped_back.append((job, delayed))
        gone = {job.identity for job, _ in self._stepped_back}
        out.ready = deque(job for job in out.ready if job.identity not in gone)

    def _spendable_at(self, line: Line) -> float:
        """Return when this shard may call a provider as far as its daily quota goes: now, or at the next day."""
        if line.per_day is None:
            return 0.0
        name = line.provider.name
        now = datetime.now(UTC)
        used = int(self.tables[USED].get(_day_key(name, now), b"0")) + self._begun[name]
        if used < daily_share(line.per_day, self._providers.lane_share, self.partition, self._providers.partitions):
            return 0.0
        return time.monotonic() + seconds_to_next_day(now)

    def _settle_directly(self, delivery: Delivery, now: datetime) -> End | None:
        """Return how a delivery ends without a call: past its time, recalled, or on a channel that calls nobody.

        For these, intent and outcome are one record.
        """
        if delivery.expires_at is not None and delivery.expires_at < now:
            return ExpiredError("past its latest useful moment")
        order = self._providers.control.recalls(delivery)
        if order is not None:
            return Recalled(order)
        return self._providers.gateways[delivery.channel].first.record(delivery)

    async def _transact(self, ended: list[tuple[Job, End]], starts: list[Job]) -> None:
        self.writer.begin()
        for lane, message, error in self._lost:
            self.dead_letter(RecordSource(message, lane.topic), message.value(), error)
        self._lost.clear()
        for deferred in self._deferred:
            self.publish(*deferred)
        self._deferred.clear()
        now = datetime.now(UTC)
        self._record_without_call(now)
        for job, end in ended:
            self._record_end(job, end, now)
        for job in starts:
            self._record_start(job, now)
        finished = self._move_watermarks()
        self._prune(now, most=_PRUNE_ROWS * max(1, len(ended) + len(starts)))
        await self.commit(len(ended) + len(starts))
        for job, _ in ended:
            if job.call is not None:
                self._providers.gateways[job.delivery.channel].give_back(job.call)
                job.call = None
        for topic, (watermark, count) in finished.items():
            lane = self.lanes[topic]
            lane.watermark = watermark
            lane.reader.finished(self.partition, count)
        for job in starts:
            call = asyncio.create_task(self._call(job))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    def _record_without_call(self, now: datetime) -> None:
        """Record what goes back to the role delay to make room, and what reports settled."""
        for job, delayed in self._stepped_back:
            self._record_cut_off(job, now)
            job.number -= 1  # it has not begun
            self.publish(*delayed)
            self._finish(job, AttemptState.DELAYED, now, unknown_at=job.asks)
        self._stepped_back.clear()
        for change in self._settlements.values():
            self._record_settlement(change, now)
        self._settlements.clear()

    def _record_start(self, job: Job, now: datetime) -> None:
        assert job.call is not None
        self._record_cut_off(job, now)
        line = job.call.line
        job.provider = line.provider.name
        self._put_attempt(job, AttemptState.OPEN, now, provider=job.provider)
        if line.per_day is not None:
            self._spend(job.provider, now)
        self._begun[job.provider] -= 1
        self._publish_status(job, Verdict(status=Status.SENDING, reason=job.call.reason), now, attempt=job.number)

    def _spend(self, provider: str, now: datetime) -> None:
        """Count a call of the day, and forget the provider's days before."""
        key = _day_key(provider, now)
        known = self.tables[USED].get(key)
        if known is None:
            for old in [each for each in self.tables[USED] if each.rpartition(b" ")[0] == provider.encode()]:
                self.put(USED, old, None)
        self.put(USED, key, b"%d" % (int(known or b"0") + 1))

    def _record_cut_off(self, job: Job, now: datetime) -> None:
        if job.cut_off is not None:
            self._publish_status(job, Verdict(status=Status.UNKNOWN, reason="cut_off"), now, attempt=job.cut_off)
            self._publish_reference(job, None, now, attempt=job.cut_off)
            job.cut_off = None

    def _record_settlement(self, change: StatusChange, now: datetime) -> None:
        """Note in the ledger that a report ended a delivery. Where it is on an earlier attempt, it holds for the last one too."""
        key = (change.delivery_id or "").encode()
        row = self.tables[ATTEMPTS].get(key)
        if row is None or not is_settled_by(change, row):
            return
        last = Attempt.of(row)
        settled = replace(last, state=AttemptState.DONE, provider="", at_ms=round(now.timestamp() * 1000))
        self.put(ATTEMPTS, key, settled.row())
        if change.attempt < last.number:
            # the status follows the last attempt, which ended without a word of this
            told = replace(change, attempt=last.number)
            self.publish(Output(topics.STATUS, told.user_id.encode(), told), self.tools.encoder.encode(told))
        self._note_unknown(key.decode(), change.channel or "", is_unknown=False)
        self.tools.metrics.settled.labels(change.channel or "", change.status).inc()

    def _record_end(self, job: Job, end: End, now: datetime) -> None:
        """Record how an attempt ended and what follows: nothing, a wait in memory, or one through the role delay."""
        delivery = job.delivery
        gateway = self._providers.gateways[delivery.channel]
        channel = gateway.channel(job.provider)
        found = verdict(
            end,
            delivery=delivery,
            failures=job.failures,
            on_unknown=channel.on_unknown,
            now=now,
            unknown_seconds=channel.unknown_seconds,
        )
        if isinstance(end, BaseException) and found.reason is not None and found.reason.endswith("internal"):
            log.error("attempt.failed delivery_id=%s", delivery.delivery_id, exc_info=end)
        if isinstance(end, ExpiredError | Recalled):
            # the number is of an attempt that never began: what is known of the one before may still come to count
            self._record_cut_off(job, now)
            job.number -= 1
        fails_over = (found.holds_provider or found.is_refusal) and gateway.others(delivery.route, {*job.tried, job.provider})
        if fails_over:
            # another provider may take it: neither its schedule nor its time is spent on this one
            found = replace(found, status=Status.RETRYING, wait_seconds=0.0, is_exhausted=False)
            job.tried.add(job.provider)
        elif found.wait_seconds is not None:
            job.tried.clear()
        self._publish_status(job, found, now, attempt=job.number)
        if found.status in {Status.SENT, Status.UNKNOWN}:
            self._publish_reference(job, end if isinstance(end, Receipt) else None, now, attempt=job.number)
        if found.suppresses is not None:
            self._publish_suppression(job, found.suppresses, now)
        self._count(job, found, now)
        if self._is_settled(job, found, now):
            return
        if found.wait_seconds is None:
            if found.is_exhausted:
                error = AttemptsExhaustedError(f"attempt {job.number} was the last one: {found.reason}")
                self.dead_letter(RecordSource(job.record, job.lane.topic), job.record.value(), error, provider=job.provider)
            self._finish(job, AttemptState.DONE, now, unknown_at=_unknown_at(job, found))
        else:
            self._record_wait(job, found, now, fails_over=fails_over)

    def _is_settled(self, job: Job, found: Verdict, now: datetime) -> bool:
        """Say whether a report that came while the attempt was under way ended the delivery, and if so, record that it did."""
        change, offset = self._reports.pop(job.identity, (None, 0))
        if change is None:
            return False
        self._unfinished[topics.settled(job.lane.topic.rpartition(".")[2])][offset] = True
        if found.status in {Status.SENT, Status.DELIVERED}:
            return False
        self._record_settlement(change, now)
        self._let_go(job)
        return True

    def _record_wait(self, job: Job, found: Verdict, now: datetime, *, fails_over: bool) -> None:
        """Record that another attempt follows, and let the delivery wait for it: here, or in the role delay."""
        assert found.wait_seconds is not None
        wait = asked = found.wait_seconds
        is_scheduled = not found.holds_provider and not fails_over
        if is_scheduled:
            job.failures += 1
        elif not fails_over:
            # by its own count: a delivery that alone drives providers away must not keep them from the others
            back_in = self._providers.gateways[job.delivery.channel].back_in(job.delivery.route)
            wait = max(asked, backoff_seconds(job.outages), back_in)
            job.outages += 1
        unknown_at = _unknown_at(job, found)
        delayed = self._delayed(job, wait, attempt=job.number + 1) if is_scheduled else None
        if delayed is not None:
            self.publish(*delayed)
            self._finish(job, AttemptState.DELAYED, now, unknown_at=unknown_at)
            return
        # after a restart only what was asked for is waited for: the provider may be back
        self._put_attempt(job, AttemptState.WAITING, now, not_before=now + timedelta(seconds=asked), provider=unknown_at)
        job.number += 1
        job.asks = unknown_at
        if not self.is_draining:
            self._keep(job, wait)

    def _finish(self, job: Job, state: AttemptState, now: datetime, *, unknown_at: str = "") -> None:
        """Let go of a delivery: its record is done."""
        self._put_attempt(job, state, now, provider=unknown_at)
        self._let_go(job)

    def _let_go(self, job: Job) -> None:
        self._active.discard(job.identity)
        self._unfinished[job.lane.topic][job.record.offset()] = True

    def _publish_suppression(self, job: Job, reason: Suppression, now: datetime) -> None:
        """Order that nothing more is sent to the address; a dead device leaves the user's preferences too."""
        if job.scope is not None:
            order = ControlEntry(scope=job.scope, reason=reason, issued_at=now)
            self.publish(Output(topics.CONTROL, job.scope.encode(), order, BY_KEY), self.tools.encoder.encode(order))
            self.tools.metrics.suppressions.labels(job.delivery.channel, reason).inc()
        if job.device is not None:
            command = Command(
                command_id=digest("sender", job.delivery.delivery_id, str(job.delivery.generation), str(job.number), size=16),
                user_id=job.delivery.user_id,
                kind="remove_device",
                sealed=job.device,
                issued_at=now,
            )
            self.publish(Output(topics.COMMANDS, command.user_id.encode(), command), self.tools.encoder.encode(command))

    def _count(self, job: Job, found: Verdict, now: datetime) -> None:
        delivery, metrics = job.delivery, self.tools.metrics
        provider = job.provider or self._providers.gateways[delivery.channel].first.provider
        metrics.deliveries.labels(delivery.channel, delivery.lane, provider, found.status).inc()
        if found.status in {Status.SENT, Status.DELIVERED}:
            metrics.delivery_seconds.labels(delivery.lane, delivery.channel).observe((now - delivery.accepted_at).total_seconds())

    def _put_attempt(self, job: Job, state: AttemptState, now: datetime, *, not_before: datetime | None = None, provider: str = "") -> None:
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
            provider=provider,
        )
        self.put(ATTEMPTS, key, attempt.row())
        self._note_unknown(job.delivery.delivery_id, job.delivery.channel, is_unknown=attempt.is_unknown)

    def _note_unknown(self, delivery_id: str, channel: str, *, is_unknown: bool) -> None:
        if self._unknown is None:
            return  # nobody has asked yet: it will be counted from the rows
        if is_unknown:
            self._unknown[delivery_id] = channel
        else:
            self._unknown.pop(delivery_id, None)

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
            provider=(job.provider or self._providers.gateways[delivery.channel].first.provider) if attempt else None,
            reference=found.reference,
            generation=delivery.generation,
            attempt=attempt,
            at=now,
            category=delivery.category,
        )
        self.publish(Output(topics.STATUS, delivery.user_id.encode(), change), self.tools.encoder.encode(change))

    def _publish_reference(self, job: Job, receipt: Receipt | None, now: datetime, *, attempt: int) -> None:
        """Say whom the provider's later reports belong to, if any come."""
        delivery = job.delivery
        channel = self._providers.gateways[delivery.channel].channel(job.provider)
        reference = channel.reference_of(delivery, receipt)
        if reference is None:
            return
        known = ProviderReference(
            provider=channel.reported_as,
            reference=reference,
            notification_id=delivery.notification_id,
            delivery_id=delivery.delivery_id,
            user_id=delivery.user_id,
            channel=delivery.channel,
            lane=delivery.lane,
            generation=delivery.generation,
            attempt=attempt,
            at=now,
            address_scope=job.scope,
            is_unknown=receipt is None,
            category=delivery.category,
        )
        output = Output(topics.PROVIDER_REFS, report_key(channel.reported_as, reference), known, BY_KEY)
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

    def _prune(self, now: datetime, *, most: int) -> None:
        """Drop the oldest rows that are past the window, at most `most`: more than came with this transaction, or they would pile up."""
        oldest_ms = round(now.timestamp() * 1000) - self._providers.ledger_seconds * 1000
        rows = cast("OrderedDict[bytes, bytes]", self.tables[ATTEMPTS])
        for key, row in list(islice(rows.items(), most)):
            attempt = Attempt.of(row)
            if attempt.at_ms > oldest_ms:
                break
            if attempt.is_over_here:
                self.put(ATTEMPTS, key, None)
            else:
                rows.move_to_end(key)  # one that waits for days holds up nobody

    async def _call(self, job: Job) -> None:
        call, delivery = job.call, job.delivery
        assert call is not None
        gateway = self._providers.gateways[delivery.channel]
        end: End
        said = None
        is_called = False
        try:
            key = await self._providers.key_of(delivery.user_id)
            if key is None:
                raise UnsealableError("the user has no key: erased")
            content = unpack(unseal(key, delivery.sealed, user_id=delivery.user_id, purpose="content"), Content)
            job.scope = self._providers.control.scope_of(delivery.channel, content.address)
            found = await _look_up(job, gateway, content) if job.asks and job.outages < _MOST_QUESTIONS else None
            if found is not None:
                end, job.provider = replace(found, code="found by look-up"), job.asks
            else:
                is_called = True
                end = await call.line.channel.send(delivery, content)
                said = said_of_provider(end)
        except asyncio.CancelledError:
            gateway.note(call, None)
            gateway.give_back(call)
            raise
        except Exception as error:
            end = error
            said = said_of_provider(end) if is_called else None
            if isinstance(error, ProviderRejectedError) and error.suppresses is Suppression.DEAD_TOKEN and key is not None:
                job.device = seal(key, pack(Contact(devices=[content.address])), user_id=delivery.user_id, purpose="contact")
        asked = end.retry_after_seconds or 0.0 if isinstance(end, ProviderError) else 0.0
        gateway.note(call, said, asked_seconds=asked, reason=str(getattr(end, "code", "") or ""))
        self._ended.append((job, end))
        self.wake.set()

    # ---- rest

    def _forget(self) -> None:
        for out in self._outgoing.values():
            out.ready.clear()
            out.waiting.clear()
        self._active.clear()
        self._deferred.clear()
        self._stepped_back.clear()
        self._settlements.clear()
        self._reports.clear()
        for unfinished in self._unfinished.values():
            unfinished.clear()
        self._lost.clear()

    async def _sleep(self) -> None:
        now = time.monotonic()
        dues = list(self._dues())
        try:
            await asyncio.wait_for(self.wake.wait(), max(0.01, min(dues) - now) if dues else None)
        except TimeoutError:
            return

    def _dues(self) -> Iterator[float]:
        """Yield the moments at which there may be something to do without being woken."""
        if self._ask_again_at is not None:
            yield self._ask_again_at
        for out in self._outgoing.values():
            if out.waiting:
                yield out.waiting[0][0]
            if out.ready and out.stuck_until < math.inf:
                yield out.stuck_until


def _unknown_at(job: Job, found: Verdict) -> str:
    """Return who may have taken the attempt that ended; empty: nobody has."""
    if found.reason == _NOT_ASKED:
        return job.asks
    return job.provider if found.status is Status.UNKNOWN else ""


async def _look_up(job: Job, gateway: Gateway, content: Content) -> Receipt | None:
    """Return the receipt of an attempt of unknown end from who may have taken it.

    Raises ProviderUnavailableError when he does not answer: the next attempt waits, and nobody was called.
    """
    try:
        async with asyncio.timeout(_LOOK_UP_SECONDS):
            return await gateway.channel(job.asks).look_up(job.delivery, content)
    except (ProviderError, SendUnknownError, TimeoutError) as error:
        raise ProviderUnavailableError("the provider that may have it could not be asked", code=_NOT_ASKED) from error


def _day_key(provider: str, now: datetime) -> bytes:
    return f"{provider} {day_of(now)}".encode()


def _channel_in(delivery_id: bytes) -> str:
    """Return the channel that a delivery's id names: what stands between the first two hyphens (`schemas.ids`)."""
    return delivery_id.decode().split("-")[1]
