"""What PostgreSQL holds. Both tables are partitioned by month of `created_at`; `streams.store.months` makes and drops them.

`document` is the row of the table `notifications` as `agents.inbox` writes it, and the truth of a row; all other columns
are drawn from it, for SQL. It is bytes and not JSON, since JSON in PostgreSQL refuses texts that Kafka's records may hold:
`convert_from(document, 'UTF8')::jsonb` shows it. Titles and messages in it are sealed.
"""

from __future__ import annotations

from sqlalchemy import Boolean, Column, DateTime, Index, Integer, LargeBinary, MetaData, PrimaryKeyConstraint, Table, Text

metadata = MetaData()

# ids are compared byte by byte, as the inbox's entries are
Code = Text(collation="C")
Moment = DateTime(timezone=True)

NOTIFICATION = Table(
    "notification",
    metadata,
    # the moment on its shelf: the decision's, or while that is not known the newest moment known
    Column("created_at", Moment, nullable=False),
    Column("notification_id", Code, nullable=False),
    Column("user_id", Code, nullable=False),
    Column("shelf", Code, nullable=False),
    Column("outcome", Code),
    Column("reason", Code),
    Column("rule", Code),
    Column("category", Code),
    Column("lane", Code),
    Column("type", Code),
    Column("event_id", Code),
    Column("producer", Code),
    Column("accepted_at", Moment),
    Column("is_read", Boolean, nullable=False),
    Column("read_at", Moment),
    Column("archived_at", Moment),
    Column("clicked_at", Moment),
    Column("document", LargeBinary, nullable=False),
    PrimaryKeyConstraint("created_at", "notification_id"),
    Index("notification_by_id", "notification_id"),
    Index("notification_by_user", "user_id", "created_at", "notification_id"),
    Index("notification_by_event", "event_id"),
    postgresql_partition_by="RANGE (created_at)",
)

DELIVERY = Table(
    "delivery",
    metadata,
    Column("created_at", Moment, nullable=False),
    Column("notification_id", Code, nullable=False),
    Column("delivery_id", Code, nullable=False),
    Column("user_id", Code, nullable=False),
    Column("channel", Code, nullable=False),
    Column("status", Code, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("provider", Code),
    Column("reference", Code),
    Column("reason", Code),
    Column("changed_at", Moment, nullable=False),
    Column("delivered_at", Moment),
    PrimaryKeyConstraint("created_at", "notification_id", "delivery_id"),
    Index("delivery_by_status", "status", "changed_at"),
    postgresql_partition_by="RANGE (created_at)",
)

# holds what belongs to no month that was made: it is filed when its month is
REST = "rest"


def partition_name(table: Table, part: str) -> str:
    """Return what a part of a table is called: a month as `2026_01`, or REST."""
    return f"{table.name}_{part}"


def is_part(name: str) -> bool:
    """Say whether `name` is that of a part of a table, and not of a table."""
    return name.startswith((f"{NOTIFICATION.name}_", f"{DELIVERY.name}_"))
