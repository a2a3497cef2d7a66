from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from agents.control import Control, notification_scope
from agents.forward import MAX_AGE, Forwarder
from agents.inbox import INBOX, NOTIFICATIONS, decide_status
from agents.ports import Effects, KnownSource
from agents.retries import schedule_of
from channels.subscriptions import Subscription
from schemas.codec import unpack
from schemas.errors import ProviderUnavailableError, RetryableError
from schemas.ids import notification_id
from schemas.messages import Content, ControlEntry, Delivery, StatusChange
from schemas.sealed import unseal
from schemas.status import Axis, Status

NOW = datetime(2026, 3, 1, tzinfo=UTC)
USER = "u"
KEY = b"k" * 32
IDENTITY = notification_id(producer="p", event_id="e", rule="r", user_id=USER)
CHANGE = StatusChange(
    notification_id=IDENTITY,
    delivery_id=f"{IDENTITY}-email",
    user_id=USER,
    axis=Axis.DELIVERY,
    status=Status.BOUNCED,
    reason="5.1.1",
    channel="email",
    lane="critical",
    provider="smtp",
    reference="x",
    attempt=2,
    at=NOW,
)
ORDERS = Subscription(name="orders", url="https://orders.example/", keys=(b"s" * 32,))
SMS_ONLY = Subscription(name="sms-only", url="https://sms.example/", keys=(b"s" * 32,), channels=frozenset({"sms"}))
READS = Subscription(name="reads", url="https://reads.example/", keys=(b"s" * 32,), statuses=frozenset({"read", "delivered"}))


def key_of(user_id: str) -> bytes | None:
    if user_id == "unknown":
        raise ProviderUnavailableError("not read yet")
    return KEY if user_id == USER else None


def decide(
    change: StatusChange, *subscriptions: Subscription, at: datetime = NOW, orders: dict[str, ControlEntry] | None = None
) -> Effects:
    forwarder = Forwarder(
        subscriptions=subscriptions,
        key_of=key_of,
        control=Control((orders or {}).get, seal_key=bytes(32)),
        now=lambda: NOW,
    )
    return forwarder.decide(change, KnownSource(topic="status", partition=0, offset=0, at=at), {})


def deliveries(effects: Effects) -> list[Delivery]:
    return [output.value for output in effects.outputs if isinstance(output.value, Delivery)]


def test_each_subscriber_that_wants_a_change_is_told_it_sealed_in_the_lane_of_the_delivery() -> None:
    effects = decide(CHANGE, ORDERS, SMS_ONLY, READS)
    (output,) = effects.outputs
    assert (output.topic, output.key, effects.counts) == ("deliver.webhook.critical", b"u", ["forwarded"])
    (delivery,) = deliveries(effects)
    assert (delivery.channel, delivery.route, delivery.expires_at) == ("webhook", "orders", NOW + timedelta(days=4))
    content = unpack(unseal(KEY, delivery.sealed, user_id=USER, purpose="content"), Content)
    assert content.address == ORDERS.url
    told = json.loads(content.text or "")
    assert (told["type"], told["timestamp"]) == ("delivery.bounced", "2026-03-01T00:00:00.000Z")
    assert told["data"]["reason"] == "5.1.1"


def test_a_change_told_again_is_the_same_message_and_each_change_and_subscriber_has_its_own() -> None:
    other = replace(ORDERS, name="other")
    first, again = (deliveries(decide(CHANGE, ORDERS, other)) for _ in range(2))
    assert first == again
    changed = [replace(CHANGE, attempt=3), replace(CHANGE, generation=1), replace(CHANGE, status=Status.SENT)]
    found = [delivery.delivery_id for change in (CHANGE, *changed) for delivery in deliveries(decide(change, ORDERS, other))]
    assert len(set(found)) == len(found) == 8
    assert all(each.split("-")[1] == "webhook" for each in found)


def test_reading_twice_is_told_twice() -> None:
    read = replace(CHANGE, axis=Axis.ENGAGEMENT, status="read", delivery_id=None, channel=None, lane=None)
    first, second = (deliveries(decide(replace(read, at=at), READS))[0] for at in (NOW, NOW + timedelta(seconds=1)))
    assert first.delivery_id != second.delivery_id
    assert first.lane == "normal"


def test_of_what_subscribers_are_told_no_subscriber_is_told() -> None:
    assert decide(replace(CHANGE, channel="webhook"), ORDERS) == Effects()


def test_what_is_older_than_three_days_is_no_news() -> None:
    assert decide(CHANGE, ORDERS, at=NOW - MAX_AGE - timedelta(seconds=1)).counts == ["too_old"]
    assert decide(CHANGE, ORDERS, at=NOW - MAX_AGE).counts == ["forwarded"]


def test_of_who_was_erased_nothing_is_told_and_where_the_key_is_not_known_yet_the_change_waits() -> None:
    assert decide(replace(CHANGE, user_id="erased"), ORDERS).counts == ["erased"]
    with pytest.raises(RetryableError):
        decide(replace(CHANGE, user_id="unknown"), ORDERS)


def test_who_answered_gone_is_told_no_more() -> None:
    scope = Control(lambda _scope: None, seal_key=bytes(32)).scope_of("webhook", ORDERS.url)
    gone = ControlEntry(scope=scope, reason="gone", issued_at=NOW)
    assert decide(CHANGE, ORDERS, orders={scope: gone}).counts == ["gone"]
    moved = replace(ORDERS, url="https://orders.example/v2")
    assert decide(CHANGE, moved, orders={scope: gone}).counts == ["forwarded"]


def test_subscribers_hear_of_what_was_recalled() -> None:
    (delivery,) = deliveries(decide(replace(CHANGE, status=Status.CANCELLED), ORDERS))
    order = ControlEntry(scope=notification_scope(IDENTITY), reason="wrong", issued_at=NOW)
    control = Control({order.scope: order}.get, seal_key=bytes(32))
    assert control.recalls(delivery) is None
    assert control.recalls(replace(delivery, channel="email")) is order


def test_what_subscribers_are_told_is_no_part_of_a_notification() -> None:
    effects = decide_status(
        replace(CHANGE, channel="webhook"), KnownSource(topic="status", partition=0, offset=0, at=NOW), {NOTIFICATIONS: {}, INBOX: {}}
    )
    assert (effects.counts, effects.rows) == (["of_subscriber"], [])


def test_a_subscriber_that_fails_is_tried_for_almost_three_days() -> None:
    waits = schedule_of("webhooks", "critical").waits_seconds
    assert timedelta(days=2.5) < timedelta(seconds=sum(waits)) < MAX_AGE
