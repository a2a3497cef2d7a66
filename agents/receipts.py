"""Whose delivery a provider's later report is about, in whatever order report and send's own outcome arrive.

A sender publishes what the provider knows a delivery by together with the attempt's outcome. A report that comes before it
waits. Two tables, both keyed by provider and reference, JSON with moments in milliseconds since 1970 UTC:

`references`  [notification, delivery, user, channel, lane, generation, attempt, at, {status: [code, at]}, is unknown, scope
              of its address, [why nothing more is sent there], category, [places of the parts that arrived], whole]: the newest
              attempt that is known under the reference, and what was reported on it; without the last ones that say nothing
`waiting`     [[partition, offset, at, status, code, reported at, raw record in base64, why nothing more may be sent], …] in
              order of arrival

A reference of several words is of a message in parts, each of which the provider reports on under a word of its own: the
segments of a text message. Whoever owns a word's partition knows the whole that it belongs to, and sends its reports on to the
owner of the whole, under the word as key. The whole is delivered when each of its parts is; any other status holds for all of
it as soon as one part has it.

A report may say besides that nothing more may be sent to the address: a bounce for good, a complaint. It becomes a standing
order on the topic `control`, once for each reason, so that an order that a person lifted does not come back by repetition.

Both tables forget their oldest rows. They are in the order of last writes: a row is as old as the last report in it.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from typing import NamedTuple, Self

import orjson

from agents.ports import BY_KEY, Effects, KnownSource, Output, Row, SetAside, Source, State
from schemas import topics
from schemas.errors import InvalidEventError, UnknownReferenceError
from schemas.ids import digest, partition_of
from schemas.messages import ControlEntry, DeliveryReport, ProviderReference, StatusChange
from schemas.status import Axis, Status, Suppression

REFERENCES, WAITING = "references", "waiting"
REPORTED = frozenset({Status.DELIVERED, Status.BOUNCED, Status.FAILED, Status.EXPIRED})
# a send's own outcome is seconds behind a report at most; what has none after so long is not ours
WAITING_SECONDS = 72 * 3_600
# bounces come within 5 days (RFC 5321, 4.5.4.1), receipts of a text message within 3, complaints within some weeks. A row for
# each mail and text message: nothing else that is remembered takes so much memory
REFERENCE_SECONDS = 30 * 86_400
EXPIRE_EVERY_SECONDS = 10.0
_MOST_CHARACTERS = 500
_CODE_CHARACTERS = 60
# so many rows past their time go with each reference: more than one comes, so that the table shrinks
_PRUNE_ROWS = 2
_EXPIRE_ROWS = 500


def report_key(provider: str, reference: str) -> bytes:
    """Return the key under which references and reports of a delivery meet."""
    return f"{provider} {reference}".encode()


def parts_of(reference: str) -> list[str]:
    """Return the names of the parts of a message that is reported on in parts; none for one that is reported on as a whole."""
    words = reference.split(" ")
    return words if len(words) > 1 else []


class Reported(NamedTuple):
    """A report with its record's bytes: what cannot be matched becomes a dead letter as it came."""

    report: DeliveryReport
    raw: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A row of `references`."""

    notification_id: str
    delivery_id: str
    user_id: str
    channel: str
    lane: str
    generation: int
    attempt: int
    at_ms: int
    reports: Mapping[str, tuple[str | None, int]] = field(default_factory=dict)
    is_unknown: bool = False  # its sender waits for a report
    scope: str | None = None  # of a suppression of its address
    suppressed: tuple[str, ...] = ()  # why it was suppressed by reports on this delivery
    category: str | None = None
    arrived: tuple[int, ...] = ()  # places of the parts that were delivered
    whole: str = ""  # the reference of the message that this one is a part of

    @classmethod
    def of(cls, reference: ProviderReference) -> Self:
        """Return whose `reference` is, with nothing reported on it."""
        return cls(
            notification_id=reference.notification_id,
            delivery_id=reference.delivery_id,
            user_id=reference.user_id,
            channel=reference.channel,
            lane=reference.lane,
            generation=reference.generation,
            attempt=reference.attempt,
            at_ms=_milliseconds(reference.at),
        )

    @classmethod
    def decode(cls, row: bytes) -> Self:
        """Return the row in its bytes."""
        # rows of before senders waited for reports, and of what has no scope, end earlier
        notification, delivery, user, channel, lane, generation, attempt, at_ms, reports, *rest = orjson.loads(row)
        return cls(
            notification_id=notification,
            delivery_id=delivery,
            user_id=user,
            channel=channel,
            lane=lane,
            generation=generation,
            attempt=attempt,
            at_ms=at_ms,
            reports={status: (code, at) for status, (code, at) in reports.items()},
            is_unknown=bool(rest and rest[0]),
            scope=rest[1] if len(rest) > 1 else None,
            suppressed=tuple(rest[2]) if len(rest) > 1 else (),
            category=rest[3] if len(rest) > 3 else None,
            arrived=tuple(rest[4]) if len(rest) > 4 else (),
            whole=rest[5] if len(rest) > 4 else "",
        )

    def encode(self) -> bytes:
        """Return the row's bytes."""
        place = [self.notification_id, self.delivery_id, self.user_id, self.channel, self.lane]
        rest: list[object] = [True] if self.is_unknown else []
        if self.scope is not None or self.category is not None:
            rest = [self.is_unknown, self.scope, self.suppressed, self.category]
        if self.arrived or self.whole:
            rest = [self.is_unknown, self.scope, self.suppressed, self.category, self.arrived, self.whole]
        return orjson.dumps([*place, self.generation, self.attempt, self.at_ms, self.reports, *rest])


class _Waiting(NamedTuple):
    """A report that no reference is known for yet."""

    partition: int
    offset: int
    at_ms: int
    status: str
    code: str | None
    reported_at_ms: int
    raw: str
    suppresses: str | None = None  # rows of before reports could say it have no such field

    def report(self, provider: str, reference: str) -> DeliveryReport:
        """Return the report that waited under `reference`."""
        return DeliveryReport(
            report_id=digest(provider, reference, self.status, self.code or "", size=16),
            provider=provider,
            reference=reference,
            status=self.status,
            code=self.code,
            at=datetime.fromtimestamp(self.reported_at_ms / 1000, UTC),
            suppresses=self.suppresses,
        )


@dataclass(frozen=True, slots=True)
class Matcher:
    """The decisions of the step `match`. `partitions`: of the topics keyed by user, which these share.

    `reference_seconds`: how long a reference is known.
    """

    partitions: int
    reference_seconds: int = REFERENCE_SECONDS

    def decide_reference(self, reference: ProviderReference, source: Source, state: State) -> Effects:
        """Decide what becomes known under `reference`, and the status changes by the reports that waited for it.

        A later attempt under the same reference takes over what was reported on the earlier one: to whoever reports, the
        two are one message. Counts `reference`, or `stale_reference` for an earlier attempt than the known one.
        """
        key = report_key(reference.provider, reference.reference)
        parts = {report_key(reference.provider, part): part for part in parts_of(reference.reference)}
        part = parts.get(source.key or b"")
        place = key if part is None else report_key(reference.provider, part)
        partition = partition_of(place, self.partitions)
        if partition != source.partition:
            return Effects([Output(topics.PROVIDER_REFS, place, reference, partition)], counts=["rekeyed"])
        if part is not None:
            return self._know_part(reference, part, source, state)
        row = state[REFERENCES].get(key)
        before = None if row is None else Known.decode(row)
        is_same = before is not None and before.delivery_id == reference.delivery_id
        if is_same and before is not None and (before.generation, before.attempt) > (reference.generation, reference.attempt):
            return Effects(counts=["stale_reference"])
        waiting = [_Waiting(*entry) for entry in orjson.loads(state[WAITING].get(key, b"[]"))]
        reports = dict(before.reports) if is_same and before is not None else {}
        suppressed = before.suppressed if is_same and before is not None else ()
        for entry in waiting:
            reports.setdefault(entry.status, (entry.code, entry.reported_at_ms))
        known = replace(
            Known.of(reference),
            reports=reports,
            is_unknown=reference.is_unknown,
            scope=reference.address_scope,
            suppressed=suppressed if reference.address_scope is not None else (),
            category=reference.category,
            arrived=before.arrived if is_same and before is not None else (),
        )
        is_repeated = known == before
        known, orders = _suppressed(known, ((entry.suppresses, entry.reported_at_ms) for entry in waiting))
        rows = [Row(REFERENCES, key, known.encode())]
        if waiting:
            rows.append(Row(WAITING, key, None))
        rows += self._forgotten(state, key, _milliseconds(source.at))
        changes = [] if is_repeated else [self._change(known, reference.provider, reference.reference, status) for status in reports]
        to_parts = [Output(topics.PROVIDER_REFS, each, reference, partition_of(each, self.partitions)) for each in parts]
        outputs = [*to_parts, *changes, *self._settled(known, changes), *orders]
        return Effects(outputs, rows, ["reference", *(["matched"] * len(waiting)), *_counted(orders)])

    def _know_part(self, reference: ProviderReference, part: str, source: Source, state: State) -> Effects:
        """Decide that `part` belongs to the whole that `reference` names, and send on what was reported on it before."""
        key = report_key(reference.provider, part)
        waiting = [_Waiting(*entry) for entry in orjson.loads(state[WAITING].get(key, b"[]"))]
        known = replace(Known.of(reference), whole=reference.reference)
        rows = [Row(REFERENCES, key, known.encode()), *([Row(WAITING, key, None)] if waiting else [])]
        rows += self._forgotten(state, key, _milliseconds(source.at))
        reports = (entry.report(reference.provider, part) for entry in waiting)
        return Effects([self._to_whole(report, known.whole) for report in reports], rows, ["reference"])

    def _to_whole(self, report: DeliveryReport, whole: str) -> Output:
        """Return the report on a part for the owner of the whole; its key still says which part."""
        part, partition = report_key(report.provider, report.reference), partition_of(report_key(report.provider, whole), self.partitions)
        return Output(topics.RECEIPTS, part, replace(report, reference=whole), partition)

    def decide_report(self, found: Reported, source: Source, state: State) -> Effects:
        """Decide the status change that a report makes and whether it blocks the address, or where it waits for its reference.

        A complaint often repeats the status of an earlier report: then the order is all that follows of it.
        Counts `matched`, `waiting` or `repeated`. Raises InvalidEventError for a report that says nothing of use.
        """
        report = found.report
        _check(report)
        key = report_key(report.provider, report.reference)
        parts = [report_key(report.provider, part) for part in parts_of(report.reference)]
        part = parts.index(source.key) if source.key in parts else None
        partition = partition_of(key, self.partitions)
        if partition != source.partition:
            return Effects([Output(topics.RECEIPTS, key if part is None else parts[part], report, partition)], counts=["rekeyed"])
        row = state[REFERENCES].get(key)
        if row is None:
            return self._wait(found, key, source, state)
        known = before = Known.decode(row)
        if known.whole:
            return Effects([self._to_whole(report, known.whole)], counts=["rekeyed"])
        known, orders = _suppressed(known, [(report.suppresses, _milliseconds(report.at))])
        if part is not None and report.status == Status.DELIVERED:
            known = replace(known, arrived=tuple(sorted({*known.arrived, part})))
            if len(known.arrived) < len(parts):
                is_news = known != before
                return Effects(orders, [Row(REFERENCES, key, known.encode())] if is_news else [], ["matched" if is_news else "repeated"])
        changes = []
        if report.status not in known.reports:
            known = replace(known, reports={**known.reports, report.status: (plain_code(report.code), _milliseconds(report.at))})
            changes = [self._change(known, report.provider, report.reference, report.status)]
        if not changes and not orders:
            return Effects(counts=["repeated"])
        return Effects(
            [*changes, *self._settled(known, changes), *orders],
            [Row(REFERENCES, key, known.encode())],
            ["matched", *_counted(orders)],
        )

    def expire(self, now: datetime, state: State) -> Effects:
        """Decide which reports have waited too long: dead letters, as they were read. To be asked again until there are none.

        Those under one reference go together, when the last of them has waited. References have to be known up to now:
        after a standstill the one that a report waits for may be about to be read.
        """
        oldest_ms = _milliseconds(now) - WAITING_SECONDS * 1000
        effects = Effects()
        for key, row in islice(state[WAITING].items(), _EXPIRE_ROWS):
            entries = [_Waiting(*entry) for entry in orjson.loads(row)]
            if entries[-1].at_ms > oldest_ms:
                break
            effects.rows.append(Row(WAITING, key, None))
            effects.set_aside += [
                SetAside(
                    KnownSource(
                        topic=topics.RECEIPTS,
                        partition=entry.partition,
                        offset=entry.offset,
                        at=datetime.fromtimestamp(entry.at_ms / 1000, UTC),
                        key=key,
                    ),
                    b64decode(entry.raw),
                    UnknownReferenceError(f"nothing that was sent within {WAITING_SECONDS // 3600} hours has this reference"),
                )
                for entry in entries
            ]
        return effects

    def _wait(self, found: Reported, key: bytes, source: Source, state: State) -> Effects:
        report = found.report
        entries = [_Waiting(*entry) for entry in orjson.loads(state[WAITING].get(key, b"[]"))]
        if any((entry.status, entry.suppresses) == (report.status, report.suppresses) for entry in entries):
            return Effects(counts=["repeated"])
        entry = _Waiting(
            partition=source.partition,
            offset=source.offset,
            at_ms=_milliseconds(source.at),
            status=report.status,
            code=plain_code(report.code),
            reported_at_ms=_milliseconds(report.at),
            raw=b64encode(found.raw).decode(),
            suppresses=report.suppresses,
        )
        return Effects(rows=[Row(WAITING, key, orjson.dumps([list(each) for each in (*entries, entry)]))], counts=["waiting"])

    def _forgotten(self, state: State, key: bytes, now_ms: int) -> Iterator[Row]:
        """Yield the deletions of the oldest references past their time."""
        for old, row in islice(state[REFERENCES].items(), _PRUNE_ROWS):
            if old == key:
                continue  # it goes behind all others
            if now_ms - Known.decode(row).at_ms <= self.reference_seconds * 1000:
                return
            yield Row(REFERENCES, old, None)

    def _settled(self, known: Known, changes: Sequence[Output]) -> Iterator[Output]:
        """Yield the changes for the sender that waits for them."""
        if known.is_unknown:
            yield from (change._replace(topic=topics.settled(known.lane)) for change in changes)

    def _change(self, known: Known, provider: str, reference: str, status: str) -> Output:
        """Return the change by a report: ordered by the attempt that it is about, so that nothing late moves it back."""
        code, at_ms = known.reports[status]
        user = known.user_id.encode()
        change = StatusChange(
            notification_id=known.notification_id,
            delivery_id=known.delivery_id,
            user_id=known.user_id,
            axis=Axis.DELIVERY,
            status=status,
            reason=code,
            channel=known.channel,
            lane=known.lane,
            provider=provider,
            reference=reference,
            generation=known.generation,
            attempt=known.attempt,
            at=datetime.fromtimestamp(at_ms / 1000, UTC),
            category=known.category,
        )
        return Output(topics.STATUS, user, change, partition_of(user, self.partitions))


def _suppressed(known: Known, told: Iterable[tuple[str | None, int]]) -> tuple[Known, list[Output]]:
    """Return what is known after reports, each (why nothing more may be sent, when), and the orders that follow."""
    orders: list[Output] = []
    for reason, at_ms in told:
        if known.scope is None or reason is None or reason in known.suppressed:
            continue
        order = ControlEntry(scope=known.scope, reason=reason, issued_at=datetime.fromtimestamp(at_ms / 1000, UTC))
        orders.append(Output(topics.CONTROL, known.scope.encode(), order, BY_KEY))
        known = replace(known, suppressed=(*known.suppressed, reason))
    return known, orders


def _counted(orders: Sequence[Output]) -> Iterator[str]:
    return (f"suppression:{order.value.reason}" for order in orders if isinstance(order.value, ControlEntry))


def _check(report: DeliveryReport) -> None:
    if report.status not in REPORTED:
        raise InvalidEventError("status", f"is none of {', '.join(sorted(REPORTED))}")
    if report.suppresses is not None and report.suppresses not in set(Suppression):
        raise InvalidEventError("suppresses", f"is none of {', '.join(sorted(Suppression))}")
    for name, value in (("provider", report.provider), *(("reference", part) for part in report.reference.split(" "))):
        if not value or len(value) > _MOST_CHARACTERS:
            raise InvalidEventError(name, f"is empty or longer than {_MOST_CHARACTERS} characters")


def plain_code(text: str | None) -> str | None:
    """Return a provider's code fit for Kafka and the trail: without whatever looks like an address, at most 60 characters."""
    return " ".join(word for word in (text or "").split() if "@" not in word and word.isprintable())[:_CODE_CHARACTERS] or None


def _milliseconds(at: datetime) -> int:
    return round(at.timestamp() * 1000)
