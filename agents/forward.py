"""Which subscribers hear of a status change: a delivery of the channel `webhook` for each.

What a subscriber is told is sealed with the user's key like everything else that is said of a user, so nothing is told of
one who was erased. Its id is computed of the change, so that telling it again is the same message. Deliveries of webhooks
have status changes too; of those nobody is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import orjson

from agents.control import Control
from agents.ports import Effects, Output, Source, State
from channels.subscriptions import Subscription
from schemas import topics
from schemas.codec import pack
from schemas.ids import NotificationId, delivery_id
from schemas.messages import Content, Delivery, StatusChange
from schemas.sealed import seal
from schemas.status import Axis
from schemas.topics import Channel, Lane

RULE = CATEGORY = "webhooks"
# a subscriber that is new, or was left out for long, is told of no older changes
MAX_AGE = timedelta(days=3)
# the schedule of `agents.retries` ends before
LASTS = timedelta(days=4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forwarder:
    """The decisions of the step `forward`.

    `key_of`: a user's key, None when it was destroyed; it raises RetryableError when nobody knows yet. `now`: the wall
    clock; how old a change is, is a matter of when it is told.
    """

    subscriptions: Sequence[Subscription]
    key_of: Callable[[str], bytes | None]
    control: Control
    now: Callable[[], datetime]

    def decide(self, change: StatusChange, source: Source, state: State) -> Effects:
        """Decide who is told of `change`. Counts `forwarded` for each; `gone` for whoever wants to hear no more.

        Counts `erased` for a user without a key, and `too_old`.
        """
        del state
        if change.channel == Channel.WEBHOOK:
            return Effects()
        wanted = [each for each in self.subscriptions if each.wants(change)]
        if not wanted:
            return Effects()
        if self.now() - source.at > MAX_AGE:
            return Effects(counts=["too_old"])
        key = self.key_of(change.user_id)
        if key is None:
            return Effects(counts=["erased"])
        effects = Effects()
        text = told(change)
        for each in wanted:
            if self.control.suppressed(Channel.WEBHOOK, each.url) is not None:
                effects.counts.append("gone")
                continue
            delivery = _delivery(change, each, text, key, at=source.at)
            effects.outputs.append(Output(topics.deliver(Channel.WEBHOOK, delivery.lane), change.user_id.encode(), delivery))
            effects.counts.append("forwarded")
        return effects


def told(change: StatusChange) -> str:
    """Return what subscribers are told of a change: JSON, always the same for the same change."""
    kind = "notification" if change.axis == Axis.ENGAGEMENT else "delivery"
    message = {
        "type": f"{kind}.{change.status}",
        "timestamp": _rfc3339(change.at),
        "data": {
            "notificationId": change.notification_id,
            "deliveryId": change.delivery_id,
            "userId": change.user_id,
            "status": change.status,
            "reason": change.reason,
            "channel": change.channel,
            "lane": change.lane,
            "provider": change.provider,
            "reference": change.reference,
            "generation": change.generation,
            "attempt": change.attempt,
            "category": change.category,
        },
    }
    return orjson.dumps(message).decode()


def _delivery(change: StatusChange, subscription: Subscription, text: str, key: bytes, *, at: datetime) -> Delivery:
    identity = "\0".join([subscription.name, change.delivery_id or "", str(change.generation), str(change.attempt), change.status])
    if change.axis == Axis.ENGAGEMENT:
        identity += f"\0{_rfc3339(change.at)}"  # read, unread and read again are three
    content = Content(address=subscription.url, text=text)
    return Delivery(
        delivery_id=delivery_id(NotificationId(change.notification_id), Channel.WEBHOOK, identity),
        notification_id=change.notification_id,
        user_id=change.user_id,
        channel=Channel.WEBHOOK,
        lane=change.lane if change.lane in set(Lane) else Lane.NORMAL,
        rule=RULE,
        category=CATEGORY,
        generation=0,
        attempt=1,
        sealed=seal(key, pack(content), user_id=change.user_id, purpose="content"),
        accepted_at=change.at,
        created_at=at,
        expires_at=at + LASTS,
        route=subscription.name,
    )


def _rfc3339(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
