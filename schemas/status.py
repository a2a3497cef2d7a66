"""Where a delivery stands, and which change wins: the one table that orders changes (design rule 6).

A change is ordered by (redrive generation, attempt, rank). Late and repeated changes never move a delivery back.
"""

from __future__ import annotations

from enum import StrEnum


class Axis(StrEnum):
    """What a status change is about."""

    DELIVERY = "delivery"
    ENGAGEMENT = "engagement"


class Status(StrEnum):
    """Where a delivery stands."""

    ACCEPTED = "accepted"
    SCHEDULED = "scheduled"
    MERGED = "merged"
    QUEUED = "queued"
    SENDING = "sending"
    RETRYING = "retrying"
    SENT = "sent"
    UNKNOWN = "unknown"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"
    FAILED = "failed"
    DELIVERED = "delivered"
    BOUNCED = "bounced"


class Engagement(StrEnum):
    """What the recipient did. Never mixed with `Status`."""

    UNREAD = "unread"
    READ = "read"
    ARCHIVED = "archived"
    CLICKED = "clicked"


class SkipReason(StrEnum):
    """Why we decided not to send. Not a failure."""

    NO_ADDRESS = "no_address"
    INVALID_ADDRESS = "invalid_address"
    COUNTRY_NOT_ALLOWED = "country_not_allowed"
    NO_PROVIDER = "no_provider"
    OPTED_OUT = "opted_out"
    SUPERSEDED = "superseded"
    EXPIRED = "expired"
    ERASED = "erased"
    SUPPRESSED = "suppressed"
    RECALLED = "recalled"


class Suppression(StrEnum):
    """Why nothing more is sent to an address: the reason of the standing order on the control topic."""

    HARD_BOUNCE = "hard_bounce"
    COMPLAINT = "complaint"
    UNSUBSCRIBED = "unsubscribed"
    GONE = "gone"  # a subscriber of status changes wants to hear no more
    DEAD_TOKEN = "dead_token"  # noqa: S105 - of a device that is gone, no secret


# status: (rank within an attempt, terminal: nothing more happens automatically)
_TABLE: dict[Status, tuple[int, bool]] = {
    Status.ACCEPTED: (0, False),
    Status.SCHEDULED: (1, False),
    Status.QUEUED: (2, False),
    Status.SENDING: (3, False),
    Status.RETRYING: (4, False),
    Status.SENT: (5, False),
    Status.UNKNOWN: (6, False),
    Status.MERGED: (7, True),
    Status.SKIPPED: (7, True),
    Status.CANCELLED: (7, True),
    Status.EXPIRED: (7, True),
    Status.FAILED: (8, True),
    Status.DELIVERED: (9, True),
    Status.BOUNCED: (10, True),
}

Order = tuple[int, int, int]


def order(*, generation: int, attempt: int, status: Status) -> Order:
    """Return what a change is compared by: higher wins, equal changes nothing."""
    return (generation, attempt, _TABLE[status][0])


def is_terminal(status: Status) -> bool:
    """Say whether nothing more happens automatically after `status`."""
    return _TABLE[status][1]
