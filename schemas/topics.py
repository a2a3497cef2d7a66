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
    SMS = "sms"
    PUSH = "push"
    IN_APP = "in_app"
    WEBHOOK = "webhook"  # to subscribers of status changes, never to recipients


class Tier(StrEnum):
    """How long a retry waits at least; how long that is, the settings say by lane. Shortest first."""

    SHORT = "short"
    MIDDLE = "middle"
    LONG = "long"


PAYMENTS = "payments"
INVENTORY = "inventory"
USER_ACTIONS = "user-actions"
PARKED = "parked"
STOCK = "stock"
PRODUCTS = "products"
OUT_OF_STOCK = "out-of-stock"
BROADCAST = "broadcast"
WATCHES = "watches"
COMMANDS = "commands"
PREFERENCES = "preferences"
CONTROL = "control"
KEYS = "keys"
PROVIDER_REFS = "provider-refs"
RECEIPTS = "receipts"
REDRIVEN = "redriven"
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


def settled(lane: Lane | str) -> str:
    """Topic of what providers report on attempts of unknown end in `lane`: what waits to be sent again need not be."""
    return f"settled.{lane}"


def retry(lane: Lane | str, tier: Tier | str) -> str:
    """Topic of the deliveries of `lane` that wait at least as long as `tier` says."""
    return f"retry.{lane}.{tier}"
