"""Merges records into the rows of PostgreSQL: a batch is read, merged and written back in one transaction.

What a record does to a row is said in one place, `agents.inbox`, for the table of the views and for PostgreSQL: merging
is commutative and idempotent, so a row is a function of the set of records that were merged, and both are equal.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Insert,
    Select,
    Table,
    TableValuedAlias,
    bindparam,
    cast,
    column,
    delete,
    func,
    select,
    text,
    tuple_,
)
from sqlalchemy.dialects.postgresql import ARRAY, BIT, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from agents.inbox import Notification, after_decision, after_status, is_of_subscriber, moment_of
from schemas.errors import NotifyError
from schemas.messages import DecisionRecord, StatusChange
from streams.store.migrate import LOCK_SPACE
from streams.store.tables import DELIVERY, NOTIFICATION

Mergeable = DecisionRecord | StatusChange

# longer texts are cut in the columns, never in the document: an index refuses entries of more than 2,704 bytes
TEXT_CHARACTERS = 500
TURN_SECONDS = 0.010


@dataclass(slots=True)
class Kept:
    """What became of a batch. `refused`: the number of each record that nothing can come of, and why."""

    outcomes: Counter[str] = field(default_factory=Counter)
    refused: list[tuple[int, NotifyError]] = field(default_factory=list)
    notifications: int = 0  # rows written
    deliveries: int = 0


@dataclass(slots=True)
class _Row:
    """A notification in the batch. `before` is what PostgreSQL holds, None: nothing."""

    before: Notification | None
    now: Notification | None


async def _no_turns() -> None:
    """Go on at once: nobody else waits for this event loop."""


async def take_lock(connection: AsyncConnection, partition: int) -> None:
    """Wait until nobody else writes rows of a partition of the users' topics, and keep it so until the transaction ends."""
    await connection.execute(_LOCK, {"space": LOCK_SPACE, "partition": partition})


async def keep(
    connection: AsyncConnection, partition: int, records: Sequence[Mergeable], *, take_turn: Callable[[], Awaitable[None]] = _no_turns
) -> Kept:
    """Merge `records`, all of one partition of the users' topics, into the rows within the open transaction.

    The partition's lock makes load and write one step: a fenced owner that wakes up, or a rebuild beside the running
    store, merges before or after and never over it. The event loop is worked on for TURN_SECONDS at a time, each time
    after `take_turn`.
    """
    kept = Kept()
    if not records:
        return kept
    await take_lock(connection, partition)
    found = await connection.execute(_LOAD, {"ids": list({clean(record.notification_id) for record in records})})
    rows: dict[str, _Row] = {}
    await take_turn()
    began = time.perf_counter()
    for notification_id, document in found:
        before = Notification.decode(document)
        rows[notification_id] = _Row(before, before)
    for number, record in enumerate(records):
        if time.perf_counter() - began > TURN_SECONDS:
            await take_turn()
            began = time.perf_counter()
        if is_of_subscriber(record):
            kept.outcomes["of_subscriber"] += 1
            continue
        row = rows.get(record.notification_id) or _Row(None, None)
        try:
            after = after_decision(row.now, record) if isinstance(record, DecisionRecord) else after_status(row.now, record)
        except NotifyError as error:
            kept.refused.append((number, error))
            continue
        if after is None:
            kept.outcomes["repeat_of_unknown"] += 1
        elif after == row.now:
            kept.outcomes["unchanged"] += 1
        else:
            kept.outcomes["stored"] += 1
            row.now = after
            rows[record.notification_id] = row
    changed = {notification_id: row for notification_id, row in rows.items() if row.now is not None and row.now != row.before}
    await _write(connection, changed, kept)
    return kept


async def remove(connection: AsyncConnection, partition: int, *, partitions: int, since: datetime | None) -> None:
    """Delete the rows of one of `partitions` partitions of the users' topics, from `since` on; None: all. The lock has to be held."""
    for table in (NOTIFICATION, DELIVERY):
        removal = delete(table).where(_is_in(table, partition, partitions))
        await connection.execute(removal if since is None else removal.where(table.c.created_at >= since))


async def count(connection: AsyncConnection, partition: int, *, partitions: int) -> int:
    """Return how many notifications of one of `partitions` partitions of the users' topics there are."""
    counted = select(func.count()).select_from(NOTIFICATION).where(_is_in(NOTIFICATION, partition, partitions))
    return (await connection.execute(counted)).scalar_one()


def _is_in(table: Table, partition: int, partitions: int) -> ColumnElement[bool]:
    # as `schemas.ids.partition_of_notification`: an id begins with the hash of its user id
    user_hash = cast(cast("x" + func.left(table.c.notification_id, 8), BIT(32)), BigInteger)
    return user_hash.op("&")(0x7FFFFFFF).op("%")(partitions) == partition


async def _write(connection: AsyncConnection, changed: Mapping[str, _Row], kept: Kept) -> None:
    """Write rows in one statement a table. A row whose moment has moved stands in another place, so its old self goes first."""
    if not changed:
        return
    moved = [
        (_created_at(row.before), notification_id)
        for notification_id, row in changed.items()
        if row.before is not None and row.now is not None and _created_at(row.before) != _created_at(row.now)
    ]
    if moved:
        places = {"created_at": [at for at, _ in moved], "notification_id": [notification_id for _, notification_id in moved]}
        for removal in _REMOVE:
            await connection.execute(removal, places)
    notifications = [_notification(notification_id, row.now) for notification_id, row in changed.items() if row.now is not None]
    deliveries = [values for notification_id, row in changed.items() for values in _deliveries(notification_id, row)]
    for table, statement, values in ((NOTIFICATION, _PUT[NOTIFICATION], notifications), (DELIVERY, _PUT[DELIVERY], deliveries)):
        if values:
            columns = zip(*values, strict=True)
            await connection.execute(statement, dict(zip(table.columns.keys(), map(list, columns), strict=True)))
    kept.notifications, kept.deliveries = len(notifications), len(deliveries)


# ---- a row's columns, in the order of the tables


def _notification(notification_id: str, row: Notification) -> tuple[object, ...]:
    decision, engaged = row.decision, row.engaged
    names = ("outcome", "reason", "rule", "category", "lane", "type", "eventId", "producer")
    return (
        _created_at(row),
        notification_id,
        clean(row.user_id),
        row.place[0].name.lower(),
        *(None if decision is None else _clean_or_none(decision[name]) for name in names),  # type: ignore[literal-required]
        None if decision is None else moment_of(decision["acceptedAt"]),
        engaged.is_read,
        _moment(engaged.first_read_at if engaged.is_read else 0),
        _moment(engaged.archived_at),
        _moment(engaged.clicked_at),
        row.encode(),
    )


def _deliveries(notification_id: str, row: _Row) -> Iterator[tuple[object, ...]]:
    """Yield the deliveries that changed; all of them when the notification has moved."""
    assert row.now is not None
    created_at = _created_at(row.now)
    known = row.before.deliveries if row.before is not None and _created_at(row.before) == created_at else {}
    shown: dict[str, tuple[object, ...]] = {}
    for delivery_id, state in row.now.deliveries.items():
        if known.get(delivery_id) == state:
            continue
        change = state.current
        # by what the key becomes: two absurd ids may be cut to the same text
        shown[clean(delivery_id)] = (
            created_at,
            notification_id,
            clean(delivery_id),
            clean(row.now.user_id),
            clean(state.channel),
            change.status,
            change.generation,
            change.attempt,
            _clean_or_none(change.provider),
            _clean_or_none(change.reference),
            _clean_or_none(change.reason),
            moment_of(change.at),
            _moment(state.delivered_at),
        )
    yield from shown.values()


def clean(given: str) -> str:
    """Return `given` as a column holds it: without NUL, which PostgreSQL refuses, and no longer than TEXT_CHARACTERS."""
    return given.replace("\0", "\N{REPLACEMENT CHARACTER}")[:TEXT_CHARACTERS]


def _clean_or_none(given: str | None) -> str | None:
    return clean(given) if given else None


def _moment(milliseconds: int) -> datetime | None:
    return moment_of(milliseconds) if milliseconds else None


def _created_at(row: Notification) -> datetime:
    return moment_of(row.place[1])


# ---- statements, made once from the tables


def _given(columns: Iterable[str], table: Table) -> TableValuedAlias:
    """Return arrays as rows: one parameter a column, however many rows there are."""
    chosen = [table.columns[name] for name in columns]
    arrays = [bindparam(each.name, type_=ARRAY(each.type)) for each in chosen]
    return func.unnest(*arrays).table_valued(*(column(each.name, each.type) for each in chosen)).render_derived(name="given")


def _upsert(table: Table) -> Insert:
    given = _given(table.columns.keys(), table)
    put = insert(table).from_select(table.columns.keys(), select(*given.columns))
    keys = table.primary_key.columns.keys()
    return put.on_conflict_do_update(
        index_elements=keys,
        set_={name: put.excluded[name] for name in table.columns.keys() if name not in keys},  # noqa: SIM118 - not a dict
    )


_LOCK = text("SELECT pg_advisory_xact_lock(:space, :partition)")
_LOAD: Select[str, bytes] = select(NOTIFICATION.c.notification_id, NOTIFICATION.c.document).where(
    NOTIFICATION.c.notification_id == func.any(bindparam("ids", type_=ARRAY(NOTIFICATION.c.notification_id.type)))
)
_PUT = {table: _upsert(table) for table in (NOTIFICATION, DELIVERY)}
_REMOVE = [
    delete(table).where(
        tuple_(table.c.created_at, table.c.notification_id).in_(select(*_given(("created_at", "notification_id"), table).columns))
    )
    for table in (NOTIFICATION, DELIVERY)
]
