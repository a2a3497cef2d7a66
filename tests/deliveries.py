"""Deliveries as the router makes them, for tests of whoever sends them, holds them back or hears of their end."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from schemas import topics
from schemas.codec import Codec, pack
from schemas.ids import delivery_id, notification_id
from schemas.messages import Content, Delivery, StatusChange, UserKey
from schemas.sealed import KEY_BYTES, seal, wrap
from schemas.topics import Channel, Lane
from streams.cli.wire import Wire
from streams.topics import specs
from tests.harness import System

KEY = b"k" * KEY_BYTES


def codec_of(system: System, *names: str) -> Codec:
    """Return what encodes the messages of these topics."""
    with Wire(system.settings) as wire:
        return wire.codec([spec for spec in specs() if spec.name in names])


def give_keys(system: System, users: Iterable[str]) -> None:
    """Publish the users' keys, as the router would."""
    codec = codec_of(system, topics.KEYS)
    now = datetime.now(UTC)
    rows = [(user, UserKey(user_id=user, wrapped=wrap(system.settings.seal_key, KEY, user_id=user), created_at=now)) for user in users]
    system.produce(topics.KEYS, [(user.encode(), codec.encode(row)) for user, row in rows])


def a_delivery(
    user: str,
    event: str,
    *,
    address: str | None = None,
    lane: Lane = Lane.NORMAL,
    channel: Channel = Channel.EMAIL,
    category: str = "payments",
    rule: str = "payment_confirmed",
    attempt: int = 1,
    not_before: datetime | None = None,
    lasts_seconds: float = 3_600,
    route: str | None = None,
    text: str = "World",
) -> Delivery:
    """Return a delivery to `user`, sealed with his key. Its mail goes to `address`; None: to `{user}@example.com`."""
    now = datetime.now(UTC)
    identity = notification_id(producer="test", event_id=event, rule=rule, user_id=user)
    content = Content(address=address or f"{user}@example.com", subject="Hello", text=text, title="Hello", message="World")
    return Delivery(
        delivery_id=delivery_id(identity, channel),
        notification_id=identity,
        user_id=user,
        channel=channel,
        lane=lane,
        rule=rule,
        category=category,
        generation=0,
        attempt=attempt,
        sealed=seal(KEY, pack(content), user_id=user, purpose="content"),
        accepted_at=now,
        created_at=now,
        expires_at=now + timedelta(seconds=lasts_seconds),
        producer="test",
        event_id=event,
        not_before=not_before,
        route=route,
    )


def publish(system: System, topic: str, deliveries: Iterable[Delivery]) -> None:
    """Publish deliveries on their users' partitions."""
    codec = codec_of(system, topic)
    system.produce(topic, [(delivery.user_id.encode(), codec.encode(delivery)) for delivery in deliveries])


def changes(system: System, *deliveries: Delivery) -> list[StatusChange]:
    """Return the status changes of these deliveries, partition by partition in their order."""
    wanted = {delivery.delivery_id for delivery in deliveries}
    found: list[StatusChange] = system.messages(topics.STATUS, StatusChange)
    return [change for change in found if change.delivery_id in wanted]


def let_mail_server(system: System, **fault: object) -> None:
    """Set how the mail server misbehaves: `mode` none, unreachable, or refuse with a `code`."""
    request = urllib.request.Request(
        f"{system.stack.mail_http}/api/faults", json.dumps(fault).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status < 300
