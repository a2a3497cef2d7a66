"""What a user was told and how it ended: the projection behind the queries, built from decisions and status changes.

The two topics have no mutual order, so a row is a function of the *set* of records seen, not of their sequence: merging
is commutative and idempotent, and replaying records leaves the bytes as they are. Two tables:

`notifications`, key: notification id. Compact JSON with sorted keys; moments are milliseconds since 1970 UTC, 0: never.
    user         user id
    decision     the first decision that was no repetition, see `Decision`; null until it is read
    deliveries   delivery id -> [channel, first delivered at, *the current change]
    changes      the newest `CHANGES_KEPT` changes of all deliveries, oldest first, each
                 [at, delivery id, status, generation, attempt, provider, reference, reason], "" where there is none
    engagement   [first read, last read, last unread, first archived, first clicked]
    again        the newest `REPEATS_KEPT` further decisions on the same id, oldest first, each
                 [at, decision id, outcome, reason, topic, partition, offset of the request]

`inbox`, key: user id. Three shelves of notification ids, newest first; each row of `notifications` stands on exactly one,
and a row that falls off its shelf is deleted, so a user's state is bounded.
    3 x uint16 big endian   how many entries stand on the shelves inbox, others, pending
    24 bytes an entry       uint64 big endian milliseconds, 16 bytes of the notification id; the first one is the edge
    edge     the newest that fell off and belongs, or may come to belong, to the inbox: up to there, going back in time, the
             shelf inbox is whole; zeros: it is whole altogether
    inbox    delivered in the app at least once; the moment is the decision's
    others   decided, but not (yet) delivered in the app: skipped, or by e-mail only
    pending  the decision is not known (yet: or no longer, when a late change meets a deleted row); the newest moment known
"""

from __future__ import annotations

import struct
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from typing import NamedTuple, Self, TypedDict

import orjson

from agents.ports import Effects, Row, Source, State
from schemas.errors import InvalidEventError
from schemas.ids import is_notification_id, murmur2
from schemas.messages import DecisionRecord, Origin, StatusChange
from schemas.status import Axis, Engagement, Order, Status, order
from schemas.topics import Channel

NOTIFICATIONS = "notifications"
INBOX = "inbox"

CHANGES_KEPT = 64
REPEATS_KEPT = 16
# outcomes that say something about an earlier decision and are none of their own
REPEATS = frozenset({"duplicate_of", "conflict"})

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_COUNTS = struct.Struct(">HHH")
_ENTRY = struct.Struct(">Q16s")
_NO_EDGE = bytes(_ENTRY.size)


class Shelf(IntEnum):
    """Where a notification stands in its user's row."""

    INBOX = 0
    OTHERS = 1
    PENDING = 2


# pending holds as many as both others: while the decisions of a rebuild lag behind, none of their statuses is lost
SHELF_SIZES: Mapping[Shelf, int] = {Shelf.INBOX: 100, Shelf.OTHERS: 100, Shelf.PENDING: 200}


class Decision(TypedDict):
    """A `DecisionRecord` as the row keeps it. Origins are [topic, partition, offset]; `sealed` is base64."""

    decisionId: str
    outcome: str
    reason: str | None
    rule: str
    ruleVersion: str
    category: str
    lane: str
    type: str
    eventId: str
    producer: str
    origin: list[str | int] | None
    request: list[str | int]
    occurredAt: int
    acceptedAt: int
    decidedAt: int
    preferenceVersion: int
    templateVersion: str | None
    channels: list[list[str | bool | None]]  # channel, is_chosen, reason, delivery id
    limiter: dict[str, str]
    metadata: dict[str, str]
    sealed: str | None


class Change(NamedTuple):
    """A step of a delivery, in the order in which the trail sorts. Empty text: none."""

    at: int
    delivery_id: str
    status: str
    generation: int
    attempt: int
    provider: str
    reference: str
    reason: str

    @property
    def order(self) -> Order:
        """What the change is compared by."""
        return order(generation=self.generation, attempt=self.attempt, status=Status(self.status))

    def beats(self, other: Change) -> bool:
        """Say whether this one is the current one of the two. Of two with equal order the earlier one stays."""
        return self < other if self.order == other.order else self.order > other.order


class DeliveryState(NamedTuple):
    """Where a delivery stands. `delivered_at` stays when a redrive moves the delivery on: the user has it."""

    channel: str
    delivered_at: int
    current: Change


class Engaged(NamedTuple):
    """What the recipient did, in milliseconds since 1970 UTC; 0: never."""

    first_read_at: int = 0
    last_read_at: int = 0
    last_unread_at: int = 0
    archived_at: int = 0
    clicked_at: int = 0

    @property
    def is_read(self) -> bool:
        """Say whether the newest of read and unread is read; at the same moment read wins."""
        return bool(self.last_read_at) and self.last_read_at >= self.last_unread_at


class Repeat(NamedTuple):
    """A further decision on an id that was decided already. Empty text: none."""

    at: int
    decision_id: str
    outcome: str
    reason: str
    topic: str
    partition: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Notification:
    """A row of the table `notifications`."""

    user_id: str
    decision: Decision | None = None
    deliveries: Mapping[str, DeliveryState] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()
    engaged: Engaged = field(default_factory=Engaged)
    repeats: tuple[Repeat, ...] = ()

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Return the row in `raw`, as `encode` writes it."""
        row = orjson.loads(raw)
        return cls(
            user_id=row["user"],
            decision=row["decision"],
            deliveries={key: DeliveryState(channel, at, Change(*c)) for key, (channel, at, *c) in row["deliveries"].items()},
            changes=tuple(Change(*change) for change in row["changes"]),
            engaged=Engaged(*row["engagement"]),
            repeats=tuple(Repeat(*repeat) for repeat in row["again"]),
        )

    def encode(self) -> bytes:
        """Return the row's bytes; equal rows have equal bytes."""
        row = {
            "user": self.user_id,
            "decision": self.decision,
            "deliveries": {key: (state.channel, state.delivered_at, *state.current) for key, state in self.deliveries.items()},
            "changes": [tuple(change) for change in self.changes],
            "engagement": tuple(self.engaged),
            "again": [tuple(repeat) for repeat in self.repeats],
        }
        return orjson.dumps(row, option=orjson.OPT_SORT_KEYS)

    @property
    def sealed_headline(self) -> bytes | None:
        """The sealed `Headline`; None when nothing was decided yet, or nothing was to be sent."""
        sealed = self.decision["sealed"] if self.decision else None
        return b64decode(sealed) if sealed is not None else None

    @property
    def place(self) -> tuple[Shelf, int]:
        """The shelf on which the row stands, and its moment there in milliseconds; what is before 1970 counts as 1970."""
        if self.decision is None:
            moments = (*(change.at for change in self.changes), *self.engaged, *(repeat.at for repeat in self.repeats))
            return Shelf.PENDING, max(0, *moments)
        is_listed = any(state.channel == Channel.IN_APP and state.delivered_at for state in self.deliveries.values())
        return Shelf.INBOX if is_listed else Shelf.OTHERS, max(0, self.decision["decidedAt"])

    @property
    def may_be_listed(self) -> bool:
        """Whether the row is, or may come to be, one of the inbox: it was or is to be delivered in the app, or nobody knows yet."""
        if self.decision is None:
            return True
        return self.place[0] is Shelf.INBOX or any(
            channel == Channel.IN_APP and is_chosen for channel, is_chosen, *_ in self.decision["channels"]
        )

    def with_decision(self, decision: Decision) -> Self:
        """Return the row after `decision`. The earliest that is no repetition counts; others are noted beside it."""
        known = self.decision
        if known is None or decision["decisionId"] == known["decisionId"]:
            return replace(self, decision=known or decision)
        first, later = sorted((known, decision), key=lambda each: (each["decidedAt"], each["decisionId"]))
        return replace(self, decision=first).with_repeat(later)

    def with_repeat(self, decision: Decision) -> Self:
        """Return the row with `decision` noted as made again."""
        topic, partition, offset = decision["request"]
        repeat = Repeat(
            at=decision["decidedAt"],
            decision_id=decision["decisionId"],
            outcome=decision["outcome"],
            reason=decision["reason"] or "",
            topic=str(topic),
            partition=int(partition),
            offset=int(offset),
        )
        return replace(self, repeats=tuple(sorted({*self.repeats, repeat}))[-REPEATS_KEPT:])

    def with_change(self, change: Change, *, channel: str) -> Self:
        """Return the row after a step of a delivery. A late or repeated one never moves the delivery back."""
        known = self.deliveries.get(change.delivery_id)
        delivered_at = change.at if change.status == Status.DELIVERED else 0
        if known is None:
            state = DeliveryState(channel, delivered_at, change)
        else:
            state = DeliveryState(
                channel=known.channel or channel,
                delivered_at=_earliest(known.delivered_at, delivered_at),
                current=change if change.beats(known.current) else known.current,
            )
        return replace(
            self,
            deliveries={**self.deliveries, change.delivery_id: state},
            changes=tuple(sorted({*self.changes, change}))[-CHANGES_KEPT:],
        )

    def with_engagement(self, engagement: Engagement, at: int) -> Self:
        """Return the row after the recipient did something at `at`, in milliseconds."""
        known = self.engaged
        match engagement:
            case Engagement.READ:
                engaged = known._replace(first_read_at=_earliest(known.first_read_at, at), last_read_at=max(known.last_read_at, at))
            case Engagement.UNREAD:
                engaged = known._replace(last_unread_at=max(known.last_unread_at, at))
            case Engagement.ARCHIVED:
                engaged = known._replace(archived_at=_earliest(known.archived_at, at))
            case Engagement.CLICKED:
                engaged = known._replace(clicked_at=_earliest(known.clicked_at, at))
        return replace(self, engaged=engaged)


@dataclass(frozen=True, slots=True)
class Inbox:
    """A row of the table `inbox`: entries as in the row, so that sorting bytes sorts by moment."""

    shelves: tuple[tuple[bytes, ...], ...] = ((), (), ())
    edge: bytes = _NO_EDGE

    @classmethod
    def decode(cls, raw: bytes | None) -> Self:
        """Return the row in `raw`; None: an empty one."""
        if raw is None:
            return cls()
        edge, *entries = [raw[i : i + _ENTRY.size] for i in range(_COUNTS.size, len(raw), _ENTRY.size)]
        shelves, start = [], 0
        for count in _COUNTS.unpack_from(raw):
            shelves.append(tuple(entries[start : start + count]))
            start += count
        return cls(tuple(shelves), edge)

    def encode(self) -> bytes:
        """Return the row's bytes."""
        return _COUNTS.pack(*map(len, self.shelves)) + self.edge + b"".join(entry for shelf in self.shelves for entry in shelf)

    def listed(self, shelf: Shelf = Shelf.INBOX) -> list[tuple[int, str]]:
        """Return the (milliseconds, notification id) on `shelf`, newest first."""
        return [_place(entry) for entry in self.shelves[shelf]]

    @property
    def whole_after(self) -> tuple[int, str] | None:
        """The place behind which (in time: after which) nothing of the inbox is missing; None: nothing is missing at all."""
        return None if self.edge == _NO_EDGE else _place(self.edge)

    def moved(self, notification_id: str, *, old: tuple[Shelf, int] | None, new: tuple[Shelf, int]) -> tuple[Self, list[bytes]]:
        """Return the row with a notification at `new` instead of `old`, and the entries that fell off."""
        shelves = list(self.shelves)
        raw_id = bytes.fromhex(notification_id)
        if old is not None:
            gone = _ENTRY.pack(old[1], raw_id)
            shelves[old[0]] = tuple(entry for entry in shelves[old[0]] if entry != gone)
        shelf, at = new
        entries = sorted({*shelves[shelf], _ENTRY.pack(at, raw_id)}, reverse=True)
        shelves[shelf] = tuple(entries[: SHELF_SIZES[shelf]])
        return type(self)(tuple(shelves), self.edge), entries[SHELF_SIZES[shelf] :]

    def without(self, fallen: bytes) -> Self:
        """Return the row that misses the entry `fallen` of the inbox."""
        return replace(self, edge=max(self.edge, fallen))


def after_decision(before: Notification | None, record: DecisionRecord) -> Notification | None:
    """Return the row `before` (None: there is none) after `record`; None: a repetition of what is not kept any more.

    Raises InvalidEventError when the notification id is not one of this user's.
    """
    require_recipient(record.notification_id, record.user_id)
    decision = _decision(record)
    if record.outcome not in REPEATS:
        return (before or Notification(user_id=record.user_id)).with_decision(decision)
    return None if before is None else before.with_repeat(decision)


def after_status(before: Notification | None, change: StatusChange) -> Notification:
    """Return the row `before` (None: there is none) after `change`.

    Raises InvalidEventError when the notification id is not one of this user's, or the axis or status does not exist.
    """
    require_recipient(change.notification_id, change.user_id)
    known = before or Notification(user_id=change.user_id)
    match _axis(change.axis):
        case Axis.DELIVERY:
            channel = change.channel or (change.delivery_id or "").removeprefix(f"{change.notification_id}-")
            step = Change(
                at=millis(change.at),
                # a step of the whole notification has neither delivery nor channel
                delivery_id=change.delivery_id or (f"{change.notification_id}-{channel}" if channel else ""),
                status=_status(change.status),
                generation=change.generation,
                attempt=change.attempt,
                provider=change.provider or "",
                reference=change.reference or "",
                reason=change.reason or "",
            )
            return known.with_change(step, channel=channel)
        case Axis.ENGAGEMENT:
            return known.with_engagement(engagement_of(change.status), millis(change.at))


def decide_decision(record: DecisionRecord, source: Source, state: State) -> Effects:
    """Decide how `record` changes the rows of its notification and its user, as `after_decision` says; raises as it does.

    Counts: `unchanged`, `stored`, `evicted`, and `repeat_of_unknown` for a repetition of what is no longer kept.
    """
    del source
    before = _load(state, record.notification_id)
    after = after_decision(before, record)
    return Effects(counts=["repeat_of_unknown"]) if after is None else _effects(state, record.notification_id, before, after)


def decide_status(change: StatusChange, source: Source, state: State) -> Effects:
    """Decide how `change` changes the rows of its notification and its user, as `after_status` says; raises and counts alike."""
    del source
    if is_of_subscriber(change):
        return Effects(counts=["of_subscriber"])
    before = _load(state, change.notification_id)
    return _effects(state, change.notification_id, before, after_status(before, change))


def is_of_subscriber(record: DecisionRecord | StatusChange) -> bool:
    """Say whether a record is about what a subscriber of status changes is told: no part of the notification."""
    return isinstance(record, StatusChange) and record.channel == Channel.WEBHOOK


def require_recipient(notification_id: str, user_id: str) -> None:
    """Raise InvalidEventError unless the id embeds this user's hash: its row would stand where no query looks for it."""
    if not is_notification_id(notification_id):
        raise InvalidEventError("notificationId", "is not a notification id")
    if int(notification_id[:8], 16) != murmur2(user_id.encode()):
        raise InvalidEventError("userId", "is not the recipient of the notification")


def engagement_of(text: str) -> Engagement:
    """Return the engagement called `text`. Raises InvalidEventError."""
    try:
        return Engagement(text)
    except ValueError:
        raise InvalidEventError("engagement", "does not exist") from None


def millis(moment: datetime) -> int:
    """Return an aware `moment` as whole milliseconds since 1970 UTC."""
    return (moment - _EPOCH) // _MILLISECOND


def moment_of(milliseconds: int) -> datetime:
    """Return the UTC moment of `milliseconds` since 1970 UTC."""
    return _EPOCH + _MILLISECOND * milliseconds


def _axis(text: str) -> Axis:
    try:
        return Axis(text)
    except ValueError:
        raise InvalidEventError("axis", "does not exist") from None


def _status(text: str) -> Status:
    try:
        return Status(text)
    except ValueError:
        raise InvalidEventError("status", "does not exist") from None


def _earliest(known: int, at: int) -> int:
    return min(known, at) if known and at else known or at


def _place(entry: bytes) -> tuple[int, str]:
    at, raw_id = _ENTRY.unpack(entry)
    return at, raw_id.hex()


def _load(state: State, notification_id: str) -> Notification | None:
    raw = state[NOTIFICATIONS].get(notification_id.encode())
    return None if raw is None else Notification.decode(raw)


def _effects(state: State, notification_id: str, before: Notification | None, after: Notification) -> Effects:
    if after == before:
        return Effects(counts=["unchanged"])
    key, user = notification_id.encode(), after.user_id.encode()
    old, new = before.place if before else None, after.place
    if old == new:
        return Effects(rows=[Row(NOTIFICATIONS, key, after.encode())], counts=["stored"])
    inbox, fallen = Inbox.decode(state[INBOX].get(user)).moved(notification_id, old=old, new=new)
    effects = Effects(rows=[Row(NOTIFICATIONS, key, after.encode())], counts=["stored"])
    for entry in fallen:
        other = _place(entry)[1]
        row = after if other == notification_id else _load(state, other)
        if row is None or row.may_be_listed:
            inbox = inbox.without(entry)
        effects.rows.append(Row(NOTIFICATIONS, other.encode(), None))
        effects.counts.append("evicted")
    effects.rows.append(Row(INBOX, user, inbox.encode()))
    return effects


def _origin(origin: Origin) -> list[str | int]:
    return [origin.topic, origin.partition, origin.offset]


def _decision(record: DecisionRecord) -> Decision:
    return Decision(
        decisionId=record.decision_id,
        outcome=record.outcome,
        reason=record.reason,
        rule=record.rule,
        ruleVersion=record.rule_version,
        category=record.category,
        lane=record.lane,
        type=record.type,
        eventId=record.event_id,
        producer=record.producer,
        origin=_origin(record.origin) if record.origin else None,
        request=_origin(record.request),
        occurredAt=millis(record.occurred_at),
        acceptedAt=millis(record.accepted_at),
        decidedAt=millis(record.decided_at),
        preferenceVersion=record.preference_version,
        templateVersion=record.template_version,
        channels=[[choice.channel, choice.is_chosen, choice.reason, choice.delivery_id] for choice in record.channels],
        limiter=dict(record.limiter),
        metadata=dict(record.metadata),
        sealed=None if record.sealed is None else b64encode(record.sealed).decode(),
    )
