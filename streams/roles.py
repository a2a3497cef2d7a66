"""The roles a worker can have: each is its own Faust app, consumer group and set of changelogs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from enum import StrEnum

from schemas.topics import Lane


class Role(StrEnum):
    """What a worker does. The app id is `notify.{env}.{role}`: a stored contract, never renamed without a migration."""

    INGEST = "ingest"
    STOCK = "stock"
    ROUTER = "router"
    SENDER_CRITICAL = "sender-critical"
    SENDER_NORMAL = "sender-normal"
    SENDER_BULK = "sender-bulk"
    DELAY = "delay"
    SIGNALS = "signals"
    VIEWS = "views"
    STORE = "store"

    @property
    def lane(self) -> Lane | None:
        """The lane of a sender; None for the other roles."""
        return Lane(self.removeprefix("sender-")) if self.startswith("sender-") else None

    @property
    def niceness(self) -> int:
        """How far the role steps back for the others where cores are short: bulk for normal, both for what is urgent."""
        return {Role.SENDER_BULK: 10, Role.STORE: 10, Role.VIEWS: 5, Role.SENDER_NORMAL: 5}.get(self, 0)


def step_back(roles: Iterable[Role]) -> None:
    """Give this process the niceness of the most urgent of `roles`. An operator's own `nice` adds to it."""
    os.nice(min(role.niceness for role in roles))


def sender_of(lane: Lane) -> Role:
    """Return the role that sends the deliveries of `lane`."""
    return Role(f"sender-{lane}")
