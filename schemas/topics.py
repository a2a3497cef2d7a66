"""Names of the topics as agents know them. `streams.topics` adds the environment's prefix and says how each is kept."""

from __future__ import annotations

from enum import StrEnum


class Lane(StrEnum):
    """A priority class with its own topics and workers, most urgent first."""

    CRITICAL = "critical"
    NORMAL = "normal"
    BULK = "bulk"


class Channel(StrEnum):
    """A way out."""

    EMAIL = "email"
    IN_APP = "in_app"


PAYMENTS = "payments"
PARKED = "parked"
COMMANDS = "commands"
PREFERENCES = "preferences"
KEYS = "keys"
DECISIONS = "decisions"
STATUS = "status"
SIGNALS = "signals"
DEAD = "dead"


def requests(lane: Lane | str) -> str:
    """Topic of the requests of `lane`."""
    return f"requests.{lane}"


def deliver(channel: Channel | str, lane: Lane | str) -> str:
    """Topic of the deliveries of `channel` in `lane`."""
    return f"deliver.{channel}.{lane}"
