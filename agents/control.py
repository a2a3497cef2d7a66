"""Standing orders from the topic `control`: what is recalled, and which addresses nothing is sent to any more.

Routers and senders read the topic to its end before they decide anything, and follow it from then on. A scope names what
an order is about; one of an address holds its keyed hash, so that who reads the topic learns no address.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from datetime import datetime
from hashlib import sha256

from schemas.messages import ControlEntry, Delivery
from schemas.topics import Channel

RECALL, SUPPRESSION = "recall", "suppression"
_HASH_PURPOSE = b"suppression"


def notification_scope(notification_id: str) -> str:
    """Return the scope of a recall of one notification."""
    return f"{RECALL}:notification:{notification_id}"


def event_scope(producer: str, event_id: str) -> str:
    """Return the scope of a recall of everything that one event of a producer led to, whatever colons the names hold."""
    return f"{RECALL}:event:{producer.replace('%', '%25').replace(':', '%3A')}:{event_id}"


def rule_scope(rule: str) -> str:
    """Return the scope of a recall of what a rule decided."""
    return f"{RECALL}:rule:{rule}"


def category_scope(address_scope: str, category: str) -> str:
    """Return the scope of a block of an address for one category only; `address_scope` as `Control.scope_of` returns it."""
    return f"{address_scope}:{category}"


def normalised(channel: str, address: str) -> str:
    """Return the form under which an address is blocked: two spellings that reach the same mailbox in practice are one."""
    plain = address.strip()
    return plain.casefold() if channel == Channel.EMAIL else plain


class Control:
    """The orders in force. `entry` returns the newest one of a scope, None without one. `seal_key` as in the settings."""

    def __init__(self, entry: Callable[[str], ControlEntry | None], *, seal_key: bytes) -> None:
        self._entry = entry
        # keyed once: to set a key up costs more than to hash an address
        self._mac = hmac.new(hmac.digest(seal_key, _HASH_PURPOSE, sha256), digestmod=sha256)

    def recalled(self, *, notification_id: str, producer: str, event_id: str, rule: str, accepted_at: datetime) -> ControlEntry | None:
        """Return the order that recalls a notification, by its id, its event or its rule; None when nothing does."""
        for scope in (notification_scope(notification_id), event_scope(producer, event_id), rule_scope(rule)):
            entry = self._entry(scope)
            if entry is not None and (entry.before is None or accepted_at < entry.before):
                return entry
        return None

    def recalls(self, delivery: Delivery) -> ControlEntry | None:
        """Return the order that recalls a delivery; None when nothing does. Subscribers hear even of what was recalled."""
        if delivery.channel == Channel.WEBHOOK:
            return None
        return self.recalled(
            notification_id=delivery.notification_id,
            # deliveries of a form before these fields: no event of theirs can be named
            producer=delivery.producer or "",
            event_id=delivery.event_id or "",
            rule=delivery.rule,
            accepted_at=delivery.accepted_at,
        )

    def suppressed(self, channel: str, address: str, category: str = "") -> ControlEntry | None:
        """Return the order that blocks an address, for everything or for `category`; None when nothing does."""
        scope = self.scope_of(channel, address)
        return self._entry(scope) or self._entry(category_scope(scope, category))

    def scope_of(self, channel: str, address: str) -> str:
        """Return the scope of a block of `address`: HMAC-SHA-256 under a key derived from the seal key."""
        mac = self._mac.copy()
        mac.update(normalised(channel, address).encode())
        return f"{SUPPRESSION}:{channel}:{mac.hexdigest()}"
