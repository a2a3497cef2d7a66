"""What `notify up` plays, and when it calls a trail ended."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from schemas import examples, producing, topics
from schemas.ids import is_notification_id
from streams.cli.samples import NO_RULE_MATCHED, NOTIFIED, Played, expected, expected_of_action, expected_of_stock, fresh
from streams.cli.trails import is_over, succeeded

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize("sample", examples.samples("payments"))
def test_each_run_plays_other_payments_of_the_same_users(sample: dict[str, Any]) -> None:
    first, second = (fresh(sample, run=run, now=NOW) for run in ("a", "b"))
    ids = [notification_of(payment) for payment in (first, second, fresh(sample, run="a", now=NOW))]
    assert ids[0] == ids[2]
    assert ids[0] is None or ids[0] != ids[1]
    for name in ("userId", "orderId", "amount", "status"):
        assert first.get(name) == sample.get(name)


def test_a_uuid_stays_one_and_times_are_now() -> None:
    sample = examples.samples("payments")[0]
    payment = fresh(sample, run="a", now=NOW)
    assert UUID(str(payment["paymentId"])) != UUID(sample["paymentId"])
    assert payment["timestamp"] == "2026-01-02T03:04:05.000Z"
    enveloped = fresh(examples.samples("payments")[1], run="a", now=NOW)
    assert str(enveloped["eventId"]).endswith("-a")
    assert isinstance(enveloped["data"], dict)
    assert enveloped["data"]["completedAt"] == "2026-01-02T03:04:05.000Z"


def test_every_sample_but_the_one_without_a_user_becomes_a_notification() -> None:
    found = [notification_of(fresh(sample, run="a", now=NOW)) for sample in examples.samples("payments")]
    assert [each is not None and is_notification_id(each) for each in found] == [True, True, True, True, False]


def test_the_sample_stock_runs_out_comes_back_and_runs_low_and_else_matches_nothing_in_every_run() -> None:
    levels: dict[str, int] = {}
    for run in ("a", "b"):
        found = [stocked(fresh(sample, run=run, now=NOW), levels) for sample in examples.samples("inventory")]
        assert [each.outcome for each in found] == [NO_RULE_MATCHED, NOTIFIED, NOTIFIED, NO_RULE_MATCHED, NOTIFIED]
        assert len({each.notification for each in found}) == 5


def test_each_sample_action_is_told() -> None:
    found = [expected_of_action(PLAYED, fresh(sample, run="a", now=NOW)) for sample in examples.samples("actions")]
    assert [each.outcome for each in found] == [NOTIFIED, NOTIFIED]
    assert expected_of_action(PLAYED, {"actionId": "a", "userId": "u", "action": "danced"}).outcome == NO_RULE_MATCHED


@pytest.mark.parametrize(
    ("in_app", "email", "over", "good"),
    [
        ("delivered", "sent", True, True),
        ("delivered", "delivered", True, True),
        ("delivered", "sending", False, False),
        ("sent", "sent", False, False),  # an inbox has it or has it not
        ("delivered", "retrying", False, False),
        ("delivered", "bounced", True, False),
        ("delivered", "failed", True, False),
        ("delivered", None, False, False),
    ],
)
def test_a_trail_is_over_when_every_chosen_channel_waits_for_nobody(in_app: str, email: str | None, over: bool, good: bool) -> None:
    document = trail(in_app=in_app, email=email)
    assert (is_over(document), succeeded(document)) == (over, good)


def test_a_mail_alone_is_a_success_where_no_other_channel_was_chosen() -> None:
    assert (is_over(trail(email="sent")), succeeded(trail(email="sent"))) == (True, True)


def test_a_trail_without_a_decision_goes_on() -> None:
    assert not is_over({"decision": None, "deliveries": []})


def test_a_skipped_notification_is_over_but_no_success() -> None:
    document = {"decision": {"outcome": "skipped", "channels": []}, "deliveries": []}
    assert (is_over(document), succeeded(document)) == (True, False)


PLAYED = Played(number=1, topic=topics.INVENTORY, key="", raw=b"", about="", notification=None)


def stocked(adjustment: dict[str, Any], levels: dict[str, int]) -> Played:
    record = producing.to_record(producing.choose_inventory(adjustment), adjustment)
    return expected_of_stock(PLAYED, record, levels)


def notification_of(payment: dict[str, Any]) -> str | None:
    record = producing.to_record(producing.choose(payment), payment)
    return expected(record, repr(record).encode())


def trail(**statuses: str | None) -> dict[str, Any]:
    return {
        "decision": {"outcome": "notified", "channels": [{"channel": name, "isChosen": True, "deliveryId": name} for name in statuses]},
        "deliveries": [{"channel": name, "deliveryId": name, "status": status} for name, status in statuses.items() if status],
    }
