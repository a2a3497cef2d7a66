"""The roles a worker can have: each is its own Faust app, consumer group and set of changelogs."""

from __future__ import annotations

from enum import StrEnum

from schemas.topics import Lane


class Role(StrEnum):
    """What a worker does. The app id is `notify.{env}.{role}`: a stored contract, never renamed without a migration."""

    INGEST = "ingest"
    ROUTER = "router"
    SENDER_CRITICAL = "sender-critical"
    SENDER_NORMAL = "sender-normal"
    SENDER_BULK = "sender-bulk"
    SIGNALS = "signals"
    VIEWS = "views"

    @property
    def lane(self) -> Lane | None:
        """The lane of a sender; None for the other roles."""
        return Lane(self.removeprefix("sender-")) if self.startswith("sender-") else None


def sender_of(lane: Lane) -> Role:
    """Return the role that sends the deliveries of `lane`."""
    return Role(f"sender-{lane}")
