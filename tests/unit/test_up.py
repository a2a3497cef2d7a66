"""What `notify up` plays, and when it calls a trail ended."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from schemas import examples, producing
from schemas.ids import is_notification_id
from streams.cli.samples import expected, fresh
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


def test_a_trail_without_a_decision_goes_on() -> None:
    assert not is_over({"decision": None, "deliveries": []})


def test_a_skipped_notification_is_over_but_no_success() -> None:
    document = {"decision": {"outcome": "skipped", "channels": []}, "deliveries": []}
    assert (is_over(document), succeeded(document)) == (True, False)


def notification_of(payment: dict[str, Any]) -> str | None:
    record = producing.to_record(producing.choose(payment), payment)
    return expected(record, repr(record).encode())


def trail(**statuses: str | None) -> dict[str, Any]:
    return {
        "decision": {"outcome": "notified", "channels": [{"channel": name, "isChosen": True, "deliveryId": name} for name in statuses]},
        "deliveries": [{"channel": name, "deliveryId": name, "status": status} for name, status in statuses.items() if status],
    }
