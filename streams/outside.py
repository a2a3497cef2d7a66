"""Who writes and reads topics without being a step of the topology: pages and rights follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from schemas import topics
from schemas.topics import Lane
from streams.roles import Role, sender_of
from streams.topology import REQUESTS

_SENDERS = tuple(sender_of(lane) for lane in Lane)
PAYMENTS_SERVICE, INVENTORY_SERVICE, OTHER_SERVICES = "payments service", "inventory service", "other services"
CLI, WEB = "notify (CLI)", "web of role views"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """Who writes or reads a topic without being a step of the topology."""

    writers: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()


OUTSIDE: Mapping[str, Outside] = {
    topics.PAYMENTS: Outside(writers=(PAYMENTS_SERVICE, CLI)),
    topics.INVENTORY: Outside(writers=(INVENTORY_SERVICE, CLI)),
    topics.OUT_OF_STOCK: Outside(readers=(OTHER_SERVICES,)),
    topics.PRODUCTS: Outside(writers=(OTHER_SERVICES, CLI)),
    topics.USER_ACTIONS: Outside(writers=(OTHER_SERVICES, CLI)),
    **dict.fromkeys(REQUESTS, Outside(writers=(OTHER_SERVICES, WEB, CLI))),
    topics.COMMANDS: Outside(writers=(WEB, CLI)),
    topics.CONTROL: Outside(writers=(WEB, CLI)),
    topics.RECEIPTS: Outside(writers=(WEB, CLI)),
    topics.REDRIVEN: Outside(writers=(CLI,), readers=(CLI,)),
    topics.SIGNALS: Outside(writers=(WEB, CLI)),
    topics.PREFERENCES: Outside(readers=(CLI,)),
    topics.KEYS: Outside(readers=(CLI,)),
    topics.DECISIONS: Outside(readers=(CLI,)),
    topics.DEAD: Outside(writers=("every role",), readers=(CLI,)),
}
WRITTEN_BY_WEB = frozenset(topic for topic, outside in OUTSIDE.items() if WEB in outside.writers)
# roles that follow a topic beside the inputs of their steps: whoever seals, or opens what is sealed, needs the users' keys
FOLLOWERS: Mapping[str, tuple[Role, ...]] = {
    topics.KEYS: (Role.INGEST, *_SENDERS, Role.SIGNALS, Role.VIEWS),
    topics.CONTROL: (Role.ROUTER, *_SENDERS, Role.SIGNALS),
}
