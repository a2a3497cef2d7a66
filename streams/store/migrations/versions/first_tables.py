"""The tables `notification` and `delivery`, with the part that takes what no month takes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_CODE = sa.Text(collation="C")
_MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "notification",
        sa.Column("created_at", _MOMENT, nullable=False),
        sa.Column("notification_id", _CODE, nullable=False),
        sa.Column("user_id", _CODE, nullable=False),
        sa.Column("shelf", _CODE, nullable=False),
        *(sa.Column(name, _CODE) for name in ("outcome", "reason", "rule", "category", "lane", "type", "event_id", "producer")),
        sa.Column("accepted_at", _MOMENT),
        sa.Column("is_read", sa.Boolean, nullable=False),
        *(sa.Column(name, _MOMENT) for name in ("read_at", "archived_at", "clicked_at")),
        sa.Column("document", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("created_at", "notification_id"),
        postgresql_partition_by="RANGE (created_at)",
    )
    op.create_index("notification_by_id", "notification", ["notification_id"])
    op.create_index("notification_by_user", "notification", ["user_id", "created_at", "notification_id"])
    op.create_index("notification_by_event", "notification", ["event_id"])
    op.create_table(
        "delivery",
        sa.Column("created_at", _MOMENT, nullable=False),
        *(sa.Column(name, _CODE, nullable=False) for name in ("notification_id", "delivery_id", "user_id", "channel", "status")),
        *(sa.Column(name, sa.Integer, nullable=False) for name in ("generation", "attempt")),
        *(sa.Column(name, _CODE) for name in ("provider", "reference", "reason")),
        sa.Column("changed_at", _MOMENT, nullable=False),
        sa.Column("delivered_at", _MOMENT),
        sa.PrimaryKeyConstraint("created_at", "notification_id", "delivery_id"),
        postgresql_partition_by="RANGE (created_at)",
    )
    op.create_index("delivery_by_status", "delivery", ["status", "changed_at"])
    for table in ("notification", "delivery"):
        op.execute(f"CREATE TABLE {table}_rest PARTITION OF {table} DEFAULT")


def downgrade() -> None:
    """Drop the tables. The log holds what they held, within its retention."""
    op.drop_table("delivery")
    op.drop_table("notification")
