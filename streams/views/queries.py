"""Rows to answers, exactly as the contracts in `schemas/contracts` say. Nothing here knows HTTP or Faust."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import NamedTuple, Protocol, Self

from agents.inbox import INBOX, NOTIFICATIONS, Change, Decision, DeliveryState, Inbox, Notification, moment_of
from schemas.codec import unpack
from schemas.errors import DatabaseUnavailableError, UndecodableError, UnsealableError
from schemas.ids import is_notification_id, partition_of, partition_of_notification
from schemas.messages import Headline
from schemas.sealed import unseal
from schemas.status import Engagement

# what is said in place of a title or message that was erased with the user's key
ERASED = "erased"
_ERASED_HEADLINE = Headline(title=ERASED, message=ERASED)

Answer = Mapping[str, object]


class Tables(Protocol):
    """The projection's tables, as far as this worker holds them."""

    def shard(self, table: str, partition: int) -> Mapping[bytes, bytes] | None:
        """Return the rows of `table` in `partition`; None when they are not here, or not yet recovered."""


class History(Protocol):
    """What is older than the tables keep. Each raises DatabaseUnavailableError."""

    async def page(
        self, user_id: str, *, only_unread: bool, before: tuple[int, str] | None, offset: int, limit: int
    ) -> list[tuple[str, Notification]]:
        """Return (notification id, row) of a user's inbox in its order; `before`: only what comes after this place."""

    async def unread(self, user_id: str, *, upto: tuple[int, str]) -> int:
        """Return how many unread ones of a user's inbox are at this place or after it."""

    async def find(self, notification_id: str) -> Notification | None:
        """Return a notification by its id."""


class BeyondTablesError(Exception):
    """The tables do not have it, and PostgreSQL is not there to be asked. The message says which of its reasons it is."""


class ElsewhereError(Exception):
    """The rows of `partition` are not here. Ask the worker that owns it."""

    def __init__(self, partition: int) -> None:
        super().__init__(f"partition {partition} is not here")
        self.partition = partition


class Cursor(NamedTuple):
    """A place in an inbox: that of a page's last notification. It stays where it is while new ones come."""

    milliseconds: int
    notification_id: str

    @classmethod
    def decode(cls, text: str) -> Self:
        """Return the cursor in `text`, as `encode` writes it. Raises ValueError."""
        number, _, notification_id = text.partition("-")
        # a moment that PostgreSQL and Python know: up to the year 9999
        if not (number.isascii() and number.isdigit() and len(number) < 15 and is_notification_id(notification_id)):
            raise ValueError("is not a cursor")
        return cls(int(number), notification_id)

    def encode(self) -> str:
        """Return the cursor as a word that needs no quoting in a URL."""
        return f"{self.milliseconds}-{self.notification_id}"


class Show(StrEnum):
    """Which notifications of an inbox are asked for."""

    ALL = "all"
    UNREAD = "unread"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A notification and its id."""

    notification_id: str
    row: Notification


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A page of an inbox: the answer, and where the next one begins. None: there is none."""

    answer: Answer
    next: Cursor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Queries:
    """Answers from the tables, and from `history` (None: there is no database) where they end.

    `key_of` gives a user's key; None: it was destroyed, and what it sealed is erased.
    """

    tables: Tables
    partitions: int
    key_of: Callable[[str], Awaitable[bytes | None]]
    history: History | None = None

    async def inbox(self, user_id: str, *, show: Show, limit: int, offset: int = 0, before: Cursor | None = None) -> Page:
        """Return `limit` notifications of a user from the `offset`th after `before`, newest first: GetUserNotifications.

        A page comes wholly from the tables or wholly from PostgreSQL; both have one order: moment, then id, descending.
        One that begins in the tables' whole part and ends beyond it comes from PostgreSQL if that knows all of this part
        too; else it ends with it, and the next page goes on. Where the tables are not whole and PostgreSQL does not
        answer, it is what they have. Raises ElsewhereError, and BeyondTablesError when that is nothing.
        """
        partition = partition_of(user_id.encode(), self.partitions)
        inbox = Inbox.decode(self._shard(INBOX, partition).get(user_id.encode()))
        rows = self._shard(NOTIFICATIONS, partition)
        listed = [Cursor(*each) for each in inbox.listed() if before is None or each < before]
        edge = inbox.whole_after
        # beyond the edge the table misses some
        whole = [each for each in listed if edge is None or each > edge]
        page = _shown(rows, whole, show, offset, limit + 1)
        has_more = len(page) > limit or (edge is not None and self.history is not None)
        if edge is not None and len(page) < limit:
            try:
                if page:
                    older = await self._older(user_id, show=show, limit=limit + 1, offset=offset, before=before)
                    # while the store catches up it lacks what is newest, and who read what
                    if _states(older[: len(page)]) == _states(page):
                        page, has_more = older, len(older) > limit
                else:
                    passed = len(_shown(rows, whole, show, 0, len(whole)))
                    start = whole[-1] if whole else before
                    page = await self._older(user_id, show=show, limit=limit + 1, offset=offset - passed, before=start)
                    has_more = len(page) > limit
            except BeyondTablesError:
                page = _shown(rows, listed, show, offset, limit)
                if not page and (offset or before is not None):
                    raise
        page = page[:limit]
        key = await self.key_of(user_id) if page else None
        last = Cursor(page[-1].row.place[1], page[-1].notification_id) if page and has_more else None
        return Page(answer={"userId": user_id, "notifications": [_summary(each, key) for each in page]}, next=last)

    async def unread(self, user_id: str) -> Answer:
        """Return how many notifications of a user's inbox are unread. A function of the set of reads, however they came.

        `isWhole` false: there are older ones, and nobody could be asked about them. Raises ElsewhereError.
        """
        partition = partition_of(user_id.encode(), self.partitions)
        inbox = Inbox.decode(self._shard(INBOX, partition).get(user_id.encode()))
        rows = self._shard(NOTIFICATIONS, partition)
        edge = inbox.whole_after
        listed = [Cursor(*each) for each in inbox.listed() if edge is None or each > edge]
        count = len(_shown(rows, listed, Show.UNREAD, 0, len(listed)))
        is_whole = edge is None
        if edge is not None and self.history is not None:
            with suppress(DatabaseUnavailableError):
                count += await self.history.unread(user_id, upto=edge)
                is_whole = True
        return {"userId": user_id, "unread": count, "isWhole": is_whole}

    async def _older(self, user_id: str, *, show: Show, limit: int, offset: int, before: Cursor | None) -> list[Found]:
        """Return a page from PostgreSQL. Raises BeyondTablesError."""
        if self.history is None:
            raise BeyondTablesError("older notifications are kept in PostgreSQL, which these views have not been given")
        try:
            page = await self.history.page(user_id, only_unread=show is Show.UNREAD, before=before, offset=offset, limit=limit)
        except DatabaseUnavailableError as error:
            raise BeyondTablesError("older notifications are kept in PostgreSQL, which does not answer") from error
        return [Found(notification_id=notification_id, row=row) for notification_id, row in page]

    async def find(self, notification_id: str) -> Found | None:
        """Return a notification by its id, None when there is none.

        What the table does not have any more, or has only the last words of, is looked up in PostgreSQL. Raises
        ElsewhereError, and BeyondTablesError when PostgreSQL would know.
        """
        if not is_notification_id(notification_id):
            return None
        partition = partition_of_notification(notification_id, self.partitions)
        raw = self._shard(NOTIFICATIONS, partition).get(notification_id.encode())
        row = None if raw is None else Notification.decode(raw)
        if (row is None or row.decision is None) and self.history is not None:
            try:
                row = await self.history.find(notification_id) or row
            except DatabaseUnavailableError as error:
                if row is None:
                    raise BeyondTablesError("an older notification is kept in PostgreSQL, which does not answer") from error
        return None if row is None else Found(notification_id=notification_id, row=row)

    async def details(self, found: Found) -> Answer | None:
        """Return one notification: GetNotificationDetails. None when nothing was decided yet, or nothing was to be said."""
        decision = found.row.decision
        if decision is None or not is_readable(found.row):
            return None
        key = await self.key_of(found.row.user_id)
        details = {**_summary(found, key), "userId": found.row.user_id, "type": decision["type"]}
        metadata = {name: decision["metadata"][name] for name in ("orderId", "shippingProvider") if name in decision["metadata"]}
        if "orderId" in metadata:
            details["metadata"] = metadata
        return details

    def _shard(self, table: str, partition: int) -> Mapping[bytes, bytes]:
        rows = self.tables.shard(table, partition)
        if rows is None:
            raise ElsewhereError(partition)
        return rows


def _states(page: list[Found]) -> list[tuple[str, bool]]:
    return [(each.notification_id, each.row.engaged.is_read) for each in page]


def _shown(rows: Mapping[bytes, bytes], places: Iterable[Cursor], show: Show, offset: int, limit: int) -> list[Found]:
    found = (Found(notification_id=each, row=Notification.decode(rows[each.encode()])) for _, each in places)
    shown = (each for each in found if show is Show.ALL or not each.row.engaged.is_read)
    return list(islice(shown, offset, offset + limit))


def is_readable(row: Notification) -> bool:
    """Say whether the user was to be told something: what was skipped has a trail, but no title or message."""
    return row.sealed_headline is not None


def trail(found: Found) -> Answer:
    """Return why a notification was or was not sent, through whom, at which attempt, and how it ended. No personal data."""
    row, decision = found.row, found.row.decision
    return {
        "notificationId": found.notification_id,
        "userId": row.user_id,
        "event": None if decision is None else _event(decision),
        "decision": None if decision is None else _decision(decision),
        "again": [
            {
                "at": rfc3339(repeat.at),
                "outcome": repeat.outcome,
                "reason": repeat.reason or None,
                "request": _origin([repeat.topic, repeat.partition, repeat.offset]),
            }
            for repeat in row.repeats
        ],
        "deliveries": [_delivery(key, state, row.changes) for key, state in sorted(row.deliveries.items())],
        "engagement": {
            "status": Engagement.READ if row.engaged.is_read else Engagement.UNREAD,
            "readAt": _moment(row.engaged.first_read_at) if row.engaged.is_read else None,
            "archivedAt": _moment(row.engaged.archived_at),
            "clickedAt": _moment(row.engaged.clicked_at),
        },
    }


def rfc3339(milliseconds: int) -> str:
    """Return a moment, in milliseconds since 1970 UTC, as RFC 3339 text in UTC, such as 2026-01-15T09:30:00.125Z."""
    return moment_of(milliseconds).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _moment(milliseconds: int) -> str | None:
    return rfc3339(milliseconds) if milliseconds else None


def _summary(found: Found, key: bytes | None) -> dict[str, object]:
    headline = _headline(found.row, key)
    return {
        "notificationId": found.notification_id,
        "title": headline.title,
        "message": headline.message,
        "status": Engagement.READ if found.row.engaged.is_read else Engagement.UNREAD,
        "createdAt": rfc3339(found.row.decision["decidedAt"] if found.row.decision else 0),
    }


def _headline(row: Notification, key: bytes | None) -> Headline:
    sealed = row.sealed_headline
    if key is None or sealed is None:
        return _ERASED_HEADLINE
    try:
        return unpack(unseal(key, sealed, user_id=row.user_id, purpose="headline"), Headline)
    except (UnsealableError, UndecodableError):
        # sealed with a key that was destroyed since: the user came back and has another one
        return _ERASED_HEADLINE


def _origin(origin: list[str | int] | None) -> Answer:
    topic, partition, offset = origin or (None, None, None)
    return {"topic": topic, "partition": partition, "offset": offset}


def _event(decision: Decision) -> Answer:
    return {
        "id": decision["eventId"],
        "producer": decision["producer"],
        **_origin(decision["origin"]),
        "occurredAt": rfc3339(decision["occurredAt"]),
    }


def _decision(decision: Decision) -> Answer:
    return {
        "outcome": decision["outcome"],
        "reason": decision["reason"],
        "rule": decision["rule"],
        "type": decision["type"],
        "category": decision["category"],
        "lane": decision["lane"],
        "versions": {
            "rule": decision["ruleVersion"],
            "template": decision["templateVersion"],
            "preferences": decision["preferenceVersion"],
        },
        "limiter": decision["limiter"],
        "acceptedAt": rfc3339(decision["acceptedAt"]),
        "decidedAt": rfc3339(decision["decidedAt"]),
        "request": _origin(decision["request"]),
        "channels": [
            {"channel": channel, "isChosen": is_chosen, "reason": reason, "deliveryId": delivery_id}
            for channel, is_chosen, reason, delivery_id in decision["channels"]
        ],
    }


def _delivery(delivery_id: str, state: DeliveryState, changes: tuple[Change, ...]) -> Answer:
    return {
        "deliveryId": delivery_id or None,
        "channel": state.channel or None,
        "status": state.current.status,
        "changes": [
            {
                "at": rfc3339(change.at),
                "status": change.status,
                "generation": change.generation,
                "attempt": change.attempt,
                "provider": change.provider or None,
                "reference": change.reference or None,
                "reason": change.reason or None,
            }
            for change in changes
            if change.delivery_id == delivery_id
        ],
    }
