"""Which news becomes which request, and where it is published."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.ports import BY_KEY, Effects, KnownSource, Source
from agents.triggers import NO_RULE, RULES, ingest_action, ingest_payment
from schemas import codec, topics
from schemas.errors import InvalidEventError, NotifyError, UnroutableError
from schemas.examples import example, samples
from schemas.messages import NotificationRequested, Origin, UserAction
from schemas.topics import Channel, Lane

SOURCE = KnownSource(topic=topics.PAYMENTS, partition=2, offset=40117, at=datetime(2024, 3, 15, 11, 4, 33, 402000, tzinfo=UTC))
FLAT, ENVELOPED, FAILED, PENDING, SMALL = samples("payments")


def ingest(record: dict[str, Any], source: Source = SOURCE) -> Effects:
    return ingest_payment(record, source, b"raw")


def request_of(record: dict[str, Any], source: Source = SOURCE) -> NotificationRequested:
    (output,) = ingest(record, source).outputs
    assert isinstance(output.value, NotificationRequested)
    return output.value


# rules


def test_a_rule_is_found_by_its_name() -> None:
    assert {name: rule.name for name, rule in RULES.items()} == {name: name for name in RULES}


def test_what_each_rule_says() -> None:
    assert {name: (rule.category, rule.type, rule.lane, rule.channels) for name, rule in RULES.items()} == {
        "payment_confirmed": ("payments", "payment", Lane.NORMAL, (Channel.IN_APP, Channel.EMAIL)),
        "payment_failed": ("payments", "payment", Lane.CRITICAL, (Channel.IN_APP, Channel.EMAIL, Channel.PUSH, Channel.SMS)),
        "payment_pending": ("payments", "payment", Lane.NORMAL, (Channel.IN_APP,)),
        "out_of_stock": ("inventory", "inventory", Lane.CRITICAL, (Channel.IN_APP, Channel.EMAIL, Channel.PUSH, Channel.SMS)),
        "low_stock": ("inventory", "inventory", Lane.NORMAL, (Channel.IN_APP, Channel.EMAIL)),
        "back_in_stock": ("watches", "product", Lane.BULK, (Channel.IN_APP, Channel.EMAIL, Channel.PUSH)),
        "password_reset": ("security", "account", Lane.CRITICAL, (Channel.EMAIL, Channel.SMS)),
        "new_sign_in": ("security", "account", Lane.NORMAL, (Channel.IN_APP, Channel.EMAIL, Channel.PUSH)),
        "message": ("messages", "message", Lane.NORMAL, (Channel.IN_APP, Channel.EMAIL, Channel.PUSH, Channel.SMS)),
    }


def test_rules_of_one_category_have_the_same_defaults() -> None:
    for rule in RULES.values():
        assert {other.defaults for other in RULES.values() if other.category == rule.category} == {rule.defaults}


def test_text_messages_are_for_who_asks_for_them_and_for_getting_back_into_an_account() -> None:
    assert {rule.category for rule in RULES.values() if Channel.SMS in rule.defaults} == {"security"}
    assert {name for name, rule in RULES.items() if set(rule.channels) & rule.defaults >= {Channel.SMS}} == {"password_reset"}


def test_every_rule_reaches_somebody_who_chose_nothing_and_knows_old_news() -> None:
    assert all(set(rule.channels) & rule.defaults and rule.max_age_seconds > 0 for rule in RULES.values())


# actions of users


def test_a_password_reset_is_critical_and_says_what_its_templates_name() -> None:
    action = example("UserAction")
    assert isinstance(action, UserAction)
    (output,) = ingest_action(action, SOURCE, {}).outputs
    assert (output.topic, output.partition) == ("requests.critical", BY_KEY)
    assert isinstance(output.value, NotificationRequested)
    assert (output.value.rule, output.value.event_id, output.value.data["requestedFrom"]) == ("password_reset", action.action_id, "")


def test_an_action_without_a_rule_becomes_a_request_that_is_decided_as_such() -> None:
    (output,) = ingest_action(UserAction(action_id="a", user_id="u", action="danced", occurred_at=SOURCE.at), SOURCE, {}).outputs
    assert isinstance(output.value, NotificationRequested)
    assert (output.value.rule, output.value.data) == (NO_RULE, {"event": "user-actions: danced"})


def test_an_action_of_nobody_cannot_be_told() -> None:
    with pytest.raises(UnroutableError):
        ingest_action(UserAction(action_id="a", user_id="", action="signed_in", occurred_at=SOURCE.at), SOURCE, {})


def test_an_action_without_an_id_would_be_taken_for_another_one() -> None:
    with pytest.raises(InvalidEventError, match="actionId"):
        ingest_action(UserAction(action_id="", user_id="u", action="signed_in", occurred_at=SOURCE.at), SOURCE, {})


# requests


def test_the_contracts_payment_becomes_the_example_request() -> None:
    assert request_of(ENVELOPED) == example("NotificationRequested")


@pytest.mark.parametrize(
    ("record", "rule", "topic", "is_final"),
    [
        (FLAT, "payment_confirmed", "requests.normal", True),
        (FAILED, "payment_failed", "requests.critical", True),
        (PENDING, "payment_pending", "requests.normal", False),
    ],
)
def test_each_status_has_its_rule_and_lane(record: dict[str, Any], rule: str, topic: str, *, is_final: bool) -> None:
    effects = ingest(record)
    (output,) = effects.outputs
    request = request_of(record)
    assert (request.rule, request.is_final, output.topic, output.key) == (rule, is_final, topic, record["userId"].encode())
    assert request.subject_key == f"payment:{record['paymentId']}"
    assert (request.producer, request.accepted_at) == ("payments", SOURCE.at)
    assert request.origin == Origin(topic="payments", partition=2, offset=40117)
    assert (effects.counts, effects.rows) == ([rule], [])


def test_metadata_is_what_the_contract_allows() -> None:
    assert request_of(FLAT).metadata == {"orderId": FLAT["orderId"]}
    assert request_of(FLAT | {"orderId": None}).metadata == {}


def test_data_have_every_key_whatever_is_missing() -> None:
    small = request_of({"status": "processed", "userId": "u1"})
    assert small.data.keys() == request_of(ENVELOPED).data.keys()
    assert {name for name, value in small.data.items() if value} == {"currency"}
    assert small.subject_key is None


def test_an_event_told_again_later_is_the_same_request_though_it_has_no_date() -> None:
    record = {"id": "pay_1", "userId": "u1", "status": "processed"}
    later = replace(SOURCE, offset=90000, at=SOURCE.at + timedelta(days=2))
    once, again = request_of(record), request_of(record, later)
    assert (once.event_id, once.rule, once.data, once.metadata) == (again.event_id, again.rule, again.data, again.metadata)


def test_a_payment_without_a_user_is_unroutable() -> None:
    with pytest.raises(UnroutableError):
        ingest(SMALL)


_words = st.sampled_from(["failed", "pending", "EUR", "2025-11-18T09:12:44Z"])
_values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | _words
_names = st.sampled_from([*FLAT, *ENVELOPED, *ENVELOPED["data"]])


@given(st.sampled_from([FLAT, ENVELOPED, SMALL, {}]), st.dictionaries(_names, _values | st.dictionaries(_names, _values)))
def test_whatever_is_taken_can_be_encoded_and_all_else_is_one_of_our_errors(record: dict[str, Any], changes: dict[str, Any]) -> None:
    try:
        request = request_of(record | changes)
    except NotifyError:
        return
    assert codec.unpack(codec.pack(request), NotificationRequested).data == request.data
    assert all(isinstance(value, str) for value in request.data.values())
