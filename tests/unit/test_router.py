from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sortedcontainers import SortedDict

from agents.control import Control, category_scope
from agents.ports import Effects, KnownSource, Source
from agents.router import CHUNK_USERS, KEYS, MAX_DEVICES, MAX_WATCHES, PREFERENCES, SEEN, SUBJECTS, WATCHES, WATCHING, Router
from agents.triggers import RULES
from channels.devices import to_base64url
from schemas.codec import Codec, pack, unpack
from schemas.errors import InvalidEventError, TemplateError, UnknownRuleError, VersionConflictError
from schemas.ids import partition_of
from schemas.messages import (
    Broadcast,
    Command,
    Contact,
    Content,
    ControlEntry,
    DecisionRecord,
    Delivery,
    Headline,
    NotificationRequested,
    Origin,
    RequestData,
    StatusChange,
    UserKey,
    UserPreferences,
    Watch,
)
from schemas.sealed import seal, unseal, unwrap
from templates.render import Templates

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
SEAL_KEY = bytes(range(32))
USER = "cust_1"
PARTITIONS = 4
HERE = partition_of(USER.encode(), PARTITIONS)
CODEC = Codec({kind.__name__: number for number, kind in enumerate((UserKey, UserPreferences, Watch), start=1)}, {})
CONTROL: dict[str, ControlEntry] = {}
ORDERS = Control(CONTROL.get, seal_key=SEAL_KEY)
ROUTER = Router(
    templates=Templates(),
    codec=CODEC,
    seal_key=SEAL_KEY,
    new_key=lambda: b"k" * 32,
    partitions=PARTITIONS,
    dedupe_seconds=7 * 86_400,
    control=ORDERS,
)


class Desk:
    """A router with its tables: applies what it decides, as the runner does."""

    def __init__(self) -> None:
        self.state: dict[str, dict[bytes, bytes]] = {
            PREFERENCES: {},
            KEYS: {},
            SEEN: OrderedDict(),
            SUBJECTS: OrderedDict(),
            WATCHES: SortedDict(),
            WATCHING: {},
        }
        self.offset = 0

    def _apply(self, effects: Effects) -> list[Any]:
        for row in effects.rows:
            if row.value is None:
                self.state[row.table].pop(row.key, None)
            else:
                self.state[row.table][row.key] = row.value
        return [output.value for output in effects.outputs]

    def _source(self, topic: str, at: datetime) -> Source:
        self.offset += 1
        return KnownSource(topic=topic, partition=HERE, offset=self.offset, at=at)

    def ask(self, request: NotificationRequested, *, at: datetime = NOW, topic: str = "requests.normal") -> list[Any]:
        return self._apply(ROUTER.decide_request(request, self._source(topic, at), self.state))

    def broadcast(self, broadcast: Broadcast) -> list[Any]:
        return self._apply(ROUTER.decide_broadcast(broadcast, self._source("broadcast", NOW), self.state))

    def command(self, **more: Any) -> list[Any]:
        command = Command(**{"command_id": "c", "user_id": USER, "kind": "set_preferences", "issued_at": NOW, **more})
        return self._apply(ROUTER.decide_command(command, self._source("commands", NOW), self.state))

    def key(self) -> bytes:
        return unwrap(SEAL_KEY, CODEC.decode(self.state[KEYS][USER.encode()], UserKey).wrapped, user_id=USER)

    def reach(self, **contact: Any) -> None:
        self.command(kind="ensure_key")
        self.command(sealed=seal(self.key(), pack(Contact(**contact)), user_id=USER, purpose="contact"))

    def stored(self) -> UserPreferences:
        return CODEC.decode(self.state[PREFERENCES][USER.encode()], UserPreferences)


def request(event: str = "e1", **more: Any) -> NotificationRequested:
    base = NotificationRequested(
        event_id=event, producer="test", rule="message", user_id=USER, data={"title": "Hello", "message": "World"}, occurred_at=NOW
    )
    return replace(base, **more)


def of(found: list[Any], kind: type[Any]) -> list[Any]:
    return [value for value in found if isinstance(value, kind)]


def test_a_request_becomes_a_delivery_a_channel_with_sealed_content_and_a_decision() -> None:
    desk = Desk()
    desk.reach(email="a@example.com", name="Ada")
    found = desk.ask(request())
    (record,) = of(found, DecisionRecord)
    assert (record.outcome, record.preference_version, record.accepted_at) == ("notified", 1, NOW)
    assert {choice.channel: choice.is_chosen for choice in record.channels} == {"in_app": True, "email": True, "push": False, "sms": False}
    deliveries = {delivery.channel: delivery for delivery in of(found, Delivery)}
    opened = unseal(desk.key(), deliveries["email"].sealed, user_id=USER, purpose="content")
    content = unpack(opened, Content)
    assert (content.address, content.name) == ("a@example.com", "Ada")
    assert "Ada" in (content.text or "")
    headline = unpack(unseal(desk.key(), record.sealed, user_id=USER, purpose="headline"), Headline)
    assert headline == Headline(title="Hello", message="World")
    assert b"a@example.com" not in CODEC.encode(desk.stored())
    assert [(change.channel, change.status, change.reason) for change in of(found, StatusChange)] == [
        ("in_app", "queued", None),
        ("email", "queued", None),
        ("push", "skipped", "no_address"),
        ("sms", "skipped", "off by default"),
    ]


def test_deciding_again_decides_the_same() -> None:
    first, second = Desk(), Desk()
    for desk in (first, second):
        desk.reach(email="a@example.com")
    assert first.ask(request()) == second.ask(request())


def test_without_an_address_the_other_channels_are_still_used() -> None:
    found = Desk().ask(request())
    assert [(change.channel, change.status, change.reason) for change in of(found, StatusChange)] == [
        ("in_app", "queued", None),
        ("email", "skipped", "no_address"),
        ("push", "skipped", "no_address"),
        ("sms", "skipped", "off by default"),
    ]


def test_a_text_message_is_sent_to_who_asks_for_it_and_with_a_code_to_who_has_a_number() -> None:
    desk = Desk()
    desk.reach(phone="+12025550143")
    code = {"code": "481 205", "expiresInMinutes": "15", "requestedFrom": "", "occurredAt": "now"}
    (reset,) = of(desk.ask(request("reset", rule="password_reset", data=code)), Delivery)
    assert "sms" not in {delivery.channel for delivery in of(desk.ask(request("before")), Delivery)}
    desk.command(categories={"messages": {"sms": True}})
    (asked_for,) = [delivery for delivery in of(desk.ask(request("after")), Delivery) if delivery.channel == "sms"]
    contents = [unpack(unseal(desk.key(), delivery.sealed, user_id=USER, purpose="content"), Content) for delivery in (reset, asked_for)]
    assert [content.address for content in contents] == ["+12025550143"] * 2
    assert [(content.text or "").split("\n")[0] for content in contents] == [
        "FlowMart: 481205 is your code to reset your password. It works for 15 minutes.",
        "FlowMart: Hello",
    ]


def test_an_opt_out_is_a_choice_with_its_reason_and_no_delivery() -> None:
    desk = Desk()
    desk.command(categories={"messages": {"in_app": False, "email": False}})
    found = desk.ask(request())
    (record,) = of(found, DecisionRecord)
    assert (record.outcome, record.reason) == ("skipped", "opted_out")
    assert not of(found, Delivery)
    assert record.sealed is None


@pytest.mark.parametrize(("days", "outcome"), [(6, "duplicate_of"), (8, "notified")])
def test_an_event_sent_again_is_a_duplicate_within_the_window(days: int, outcome: str) -> None:
    desk = Desk()
    desk.ask(request())
    later = NOW + timedelta(days=days)
    found = desk.ask(request(), at=later)
    assert [record.outcome for record in of(found, DecisionRecord)] == [outcome]
    assert bool(of(found, Delivery)) is (outcome == "notified")


def test_the_same_id_with_other_content_is_a_conflict_and_changes_nothing() -> None:
    desk = Desk()
    desk.ask(request())
    before = {table: dict(rows) for table, rows in desk.state.items()}
    found = desk.ask(request(data={"title": "Hello", "message": "Mars"}))
    assert [type(value).__name__ for value in found] == ["DecisionRecord"]
    assert found[0].outcome == "conflict"
    assert {table: dict(rows) for table, rows in desk.state.items()} == before


def test_news_that_is_not_final_after_final_news_is_superseded() -> None:
    desk = Desk()
    desk.ask(request("final", subject_key="payment:1", is_final=True))
    (record,) = of(desk.ask(request("pending", subject_key="payment:1")), DecisionRecord)
    assert (record.outcome, record.reason) == ("skipped", "superseded")
    (other,) = of(desk.ask(request("other", subject_key="payment:2")), DecisionRecord)
    assert other.outcome == "notified"


def test_old_news_is_not_news_by_the_kafka_timestamp_of_the_event() -> None:
    (record,) = of(Desk().ask(request(accepted_at=NOW - timedelta(days=4))), DecisionRecord)
    assert (record.outcome, record.reason) == ("skipped", "expired")


def test_a_record_on_another_users_partition_goes_to_its_own_first() -> None:
    stray = replace(request(), user_id=next(f"u{i}" for i in range(99) if partition_of(b"u%d" % i, PARTITIONS) != HERE))
    effects = ROUTER.decide_request(stray, KnownSource(topic="requests.normal", partition=HERE, offset=1, at=NOW), Desk().state)
    (output,) = effects.outputs
    assert output.topic == "requests.normal"
    assert output.partition == partition_of(stray.user_id.encode(), PARTITIONS)
    assert output.value == replace(stray, accepted_at=NOW, origin=output.value.origin)  # type: ignore[union-attr]
    assert not effects.rows


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"rule": "no-such-rule"}, UnknownRuleError),
        ({"user_id": ""}, InvalidEventError),
        ({"user_id": "x" * 201}, InvalidEventError),
        ({"data": {}}, TemplateError),
    ],
)
def test_what_cannot_be_decided_says_why(change: Mapping[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        Desk().ask(request(**change))


def test_a_command_merges_only_what_it_gives() -> None:
    desk = Desk()
    desk.reach(email="a@example.com", name="Ada")
    desk.command(locale="de", categories={"payments": {"email": False}})
    desk.command(
        sealed=seal(desk.key(), pack(Contact(phone="+31201234567")), user_id=USER, purpose="contact"),
        categories={"payments": {"in_app": True}},
    )
    stored = desk.stored()
    assert stored.version == 3
    assert stored.locale == "de"
    assert stored.categories == {"payments": {"email": False, "in_app": True}}
    assert stored.sealed is not None
    contact = unpack(unseal(desk.key(), stored.sealed, user_id=USER, purpose="contact"), Contact)
    assert contact == Contact(name="Ada", email="a@example.com", phone="+31201234567")


def contact_of(desk: Desk) -> Contact:
    stored = desk.stored()
    assert stored.sealed is not None
    return unpack(unseal(desk.key(), stored.sealed, user_id=USER, purpose="contact"), Contact)


def devices(desk: Desk, *addresses: str) -> bytes:
    return seal(desk.key(), pack(Contact(devices=list(addresses))), user_id=USER, purpose="contact")


def test_a_device_comes_to_those_that_a_user_has_and_the_oldest_goes_when_there_are_too_many() -> None:
    desk = Desk()
    desk.reach(email="a@example.com", devices=["fcm:a"])
    desk.command(kind="add_device", sealed=devices(desk, "apns:00", "fcm:a"), locale="de")
    assert contact_of(desk) == Contact(email="a@example.com", devices=["fcm:a", "apns:00"])
    assert desk.stored().locale == "de"
    for number in range(MAX_DEVICES):
        desk.command(kind="add_device", sealed=devices(desk, f"fcm:{number}"))
    assert contact_of(desk).devices == [f"fcm:{number}" for number in range(MAX_DEVICES)]
    desk.command(sealed=devices(desk))
    assert contact_of(desk).devices == []


def test_a_delivery_to_a_browser_says_which_push_service_carries_it() -> None:
    keys = {"p256dh": to_base64url(b"\x04" + b"k" * 64), "auth": to_base64url(b"a" * 16)}
    subscription = json.dumps({"endpoint": "https://fcm.googleapis.com/fcm/send/x", "keys": keys})
    desk = Desk()
    desk.reach(devices=["apns:00", f"webpush:{subscription}"])
    desk.command(categories={"payments": {"push": True}})
    pushed = [delivery.route for delivery in of(desk.ask(request()), Delivery) if delivery.channel == "push"]
    assert pushed == ["apns", "webpush/fcm.googleapis.com"]


def test_a_device_that_is_gone_is_removed_once_and_nothing_else_changes() -> None:
    desk = Desk()
    desk.reach(email="a@example.com", devices=["fcm:a", "apns:00", "fcm:b"])
    desk.command(categories={"payments": {"push": True}})
    before, gone = desk.stored(), devices(desk, "apns:00")
    desk.command(kind="remove_device", sealed=gone)
    assert contact_of(desk) == Contact(email="a@example.com", devices=["fcm:a", "fcm:b"])
    assert replace(desk.stored(), sealed=None) == replace(before, version=before.version + 1, sealed=None)
    after = desk.stored()
    desk.command(kind="remove_device", sealed=gone)
    desk.command(kind="remove_device", sealed=devices(desk, "fcm:never"))
    desk.command(kind="remove_device")
    assert desk.stored() == after
    desk.command(kind="remove_device", sealed=devices(desk, "fcm:a", "fcm:b"))
    assert contact_of(desk).devices == []
    assert [choice.reason for choice in of(desk.ask(request()), DecisionRecord)[0].channels if choice.channel == "push"] == ["no_address"]


def test_a_device_of_a_user_who_was_erased_is_gone_already() -> None:
    desk = Desk()
    desk.reach(devices=["fcm:a"])
    gone = devices(desk, "fcm:a")
    desk.command(kind="forget")
    desk.command(kind="remove_device", sealed=gone)
    assert not desk.state[PREFERENCES]
    assert not desk.state[KEYS]
    other = seal(b"x" * 32, pack(Contact(devices=["fcm:a"])), user_id=USER, purpose="contact")  # by a key that was destroyed
    desk.reach(devices=["fcm:a"])
    desk.command(kind="remove_device", sealed=other)
    assert contact_of(desk).devices == ["fcm:a"]


def test_a_command_of_no_known_kind_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(InvalidEventError, match="remove_device"):
        Desk().command(kind="dance")


def test_a_change_based_on_another_version_is_refused() -> None:
    desk = Desk()
    desk.command(locale="de", expected_version=0)
    with pytest.raises(VersionConflictError):
        desk.command(locale="nl", expected_version=0)
    assert desk.stored().locale == "de"


def test_a_users_key_is_made_once() -> None:
    desk = Desk()
    desk.command(kind="ensure_key")
    before = dict(desk.state[KEYS])
    desk.command(kind="ensure_key")
    desk.ask(request())
    assert desk.state[KEYS] == before


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(min_value=0, max_value=40), min_size=1, max_size=60))
def test_the_table_of_ids_forgets_what_is_past_its_window(gaps_hours: list[int]) -> None:
    desk = Desk()
    at = NOW
    times: dict[str, datetime] = {}
    for number, gap in enumerate(gaps_hours):
        at += timedelta(hours=gap)
        times[f"e{number}"] = at
        desk.ask(request(f"e{number}"), at=at)
    fresh = sum(at - seen <= timedelta(days=7) for seen in times.values())
    assert fresh <= len(desk.state[SEEN]) <= len(times)
    # two go with each decision: as many more decisions at the same moment leave no old one
    for number in range(len(times)):
        desk.ask(request(f"later{number}"), at=at)
    assert len(desk.state[SEEN]) == fresh + len(times)


# watches and broadcasts


def watchers(desk: Desk, count: int, audience: str = "product:p1") -> list[str]:
    """Let `count` users of this partition watch; return their ids in order."""
    users: list[str] = []
    number = 0
    while len(users) < count:
        user = f"w{number}"
        number += 1
        if partition_of(user.encode(), PARTITIONS) == HERE:
            desk.command(kind="watch", user_id=user, audience=audience)
            users.append(user)
    return sorted(users)


def broadcast(**more: Any) -> Broadcast:
    base = Broadcast(
        broadcast_id="b1",
        audience="product:p1",
        rule="back_in_stock",
        producer="inventory",
        event_id="e1",
        occurred_at=NOW,
        accepted_at=NOW,
        origin=Origin(topic="stock", partition=0, offset=1),
    )
    return replace(base, **more)


def test_a_broadcast_tells_its_audience_in_chunks_nobody_twice_and_nobody_missed() -> None:
    desk = Desk()
    users = watchers(desk, 2 * CHUNK_USERS + 3)
    watchers(desk, 5, "product:p10")
    watchers(desk, 5, "product:p")
    told: list[str] = []
    waiting = [broadcast()]
    chunks = 0
    while waiting:
        found = desk.broadcast(waiting.pop())
        told += [each.user_id for each in of(found, NotificationRequested)]
        waiting += of(found, Broadcast)
        chunks += 1
    assert told == users
    assert chunks == 3


def test_who_stops_watching_before_his_chunk_is_not_told() -> None:
    desk = Desk()
    users = watchers(desk, CHUNK_USERS + 2)
    (rest,) = of(desk.broadcast(broadcast()), Broadcast)
    desk.command(kind="unwatch", user_id=users[-1], audience="product:p1")
    assert [each.user_id for each in of(desk.broadcast(rest), NotificationRequested)] == [users[-2]]


def test_watching_twice_or_unwatching_what_is_not_watched_changes_nothing() -> None:
    desk = Desk()
    desk.command(kind="watch", audience="product:p1")
    before = {table: dict(rows) for table, rows in desk.state.items()}
    desk.command(kind="watch", audience="product:p1")
    desk.command(kind="unwatch", audience="product:p2")
    assert {table: dict(rows) for table, rows in desk.state.items()} == before


@pytest.mark.parametrize("audience", [None, "", "p1", "product:", "product:a\0b", "everyone:x", "product:" + "x" * 201])
def test_an_audience_that_cannot_be_is_refused(audience: str | None) -> None:
    with pytest.raises(InvalidEventError):
        Desk().command(kind="watch", audience=audience)


def test_the_watches_of_a_user_are_bounded() -> None:
    desk = Desk()
    for number in range(MAX_WATCHES):
        desk.command(kind="watch", audience=f"product:{number}")
    with pytest.raises(InvalidEventError, match="one too many"):
        desk.command(kind="watch", audience="product:more")


# sealed requests, erasure, orders


def sealed(desk: Desk, **data: str) -> bytes:
    return seal(desk.key(), pack(RequestData(data=data)), user_id=USER, purpose="request")


def test_what_was_sealed_in_a_request_is_told_and_its_repetition_is_known_although_it_is_sealed_otherwise() -> None:
    desk = Desk()
    desk.reach(email="a@example.com")
    first = desk.ask(request(data={}, sealed=sealed(desk, title="Secret", message="World")))
    headline = unpack(unseal(desk.key(), of(first, DecisionRecord)[0].sealed, user_id=USER, purpose="headline"), Headline)
    assert headline.title == "Secret"
    again = desk.ask(request(data={}, sealed=sealed(desk, title="Secret", message="World")))
    other = desk.ask(request(data={}, sealed=sealed(desk, title="Other", message="World")))
    assert [of(found, DecisionRecord)[0].outcome for found in (again, other)] == ["duplicate_of", "conflict"]


def test_forgetting_a_user_leaves_no_row_of_his_and_what_was_sealed_before_is_skipped_as_erased() -> None:
    desk = Desk()
    desk.reach(email="a@example.com")
    desk.command(kind="watch", audience="product:p1")
    left = request("later", data={}, sealed=sealed(desk, title="t", message="m"))
    desk.command(kind="forget")
    assert not any(desk.state[table] for table in (KEYS, PREFERENCES, WATCHES, WATCHING))
    (record,) = of(desk.ask(left), DecisionRecord)
    assert (record.outcome, record.reason) == ("skipped", "erased")
    assert not desk.state[KEYS]


def test_a_request_that_no_rule_is_known_for_is_decided_visibly_and_once() -> None:
    desk = Desk()
    asked = request(rule="", data={"event": "user-actions: danced"})
    (record,) = desk.ask(asked)
    assert (record.outcome, record.reason, record.rule) == ("no_rule_matched", "user-actions: danced", "")
    assert desk.ask(asked)[0].outcome == "duplicate_of"


def test_what_is_recalled_is_cancelled_and_a_suppressed_address_is_skipped_with_its_cause() -> None:
    desk = Desk()
    desk.reach(email="a@example.com")
    suppression = ControlEntry(scope=ORDERS.scope_of("email", "A@example.com"), reason="hard bounce", issued_at=NOW)
    recall = ControlEntry(scope="recall:event:test:e2", reason="wrong price", issued_at=NOW)
    CONTROL.update({entry.scope: entry for entry in (suppression, recall)})
    try:
        (record,) = of(desk.ask(request()), DecisionRecord)
        (recalled,) = desk.ask(request("e2"))
    finally:
        CONTROL.clear()
    assert {choice.channel: choice.reason for choice in record.channels}["email"] == "suppressed: hard bounce"
    assert (recalled.outcome, recalled.reason) == ("cancelled", "recalled: wrong price")


def test_an_address_that_left_a_category_hears_nothing_more_of_it_and_of_others_still() -> None:
    desk = Desk()
    desk.reach(email="a@example.com")
    category = RULES[request().rule].category
    reasons: list[str] = []
    for left in (category, "another"):
        order = ControlEntry(scope=category_scope(ORDERS.scope_of("email", "a@example.com"), left), reason="unsubscribed", issued_at=NOW)
        CONTROL[order.scope] = order
        try:
            (record,) = of(desk.ask(request(f"left-{left}")), DecisionRecord)
        finally:
            CONTROL.clear()
        reasons += [choice.reason for choice in record.channels if choice.channel == "email"]
    assert reasons == ["suppressed: unsubscribed", "on by default"]
