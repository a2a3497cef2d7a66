from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.failover import backoff_seconds
from agents.retries import schedule_of
from agents.sender import Attempt, AttemptState, End, Plan, Recalled, Verdict, plan, verdict
from channels.base import OnUnknown, Receipt
from schemas.errors import (
    ExpiredError,
    NotifyError,
    ProviderRefusedError,
    ProviderRejectedError,
    ProviderThrottledError,
    ProviderUnavailableError,
    SendUnknownError,
    UnsealableError,
)
from schemas.messages import ControlEntry, Delivery
from schemas.status import Status, is_terminal

NOW = datetime(2026, 3, 1, tzinfo=UTC)
DELIVERY = Delivery(
    delivery_id="d",
    notification_id="n",
    user_id="u",
    channel="email",
    lane="normal",
    rule="message",
    category="messages",
    generation=0,
    attempt=1,
    sealed=b"",
    accepted_at=NOW,
    created_at=NOW,
)


def row(state: AttemptState, *, number: int = 1, generation: int = 0, failures: int = 0, not_before_ms: int = 0) -> bytes:
    return Attempt(generation=generation, number=number, state=state, failures=failures, at_ms=0, not_before_ms=not_before_ms).row()


def judge(end: End, *, failures: int = 0, delivery: Delivery = DELIVERY, on_unknown: OnUnknown = OnUnknown.RESEND) -> Verdict:
    return verdict(end, delivery=delivery, failures=failures, on_unknown=on_unknown, now=NOW)


def test_a_delivery_that_the_ledger_does_not_know_begins() -> None:
    assert plan(DELIVERY, None, OnUnknown.RESEND) == Plan(number=1)


def test_a_delivery_that_is_done_never_begins_again() -> None:
    assert plan(DELIVERY, row(AttemptState.DONE), OnUnknown.RESEND).number is None


def test_a_redrive_begins_though_the_generation_before_is_done() -> None:
    assert plan(replace(DELIVERY, generation=1), row(AttemptState.DONE), OnUnknown.RESEND) == Plan(number=1)


def test_a_late_copy_of_an_earlier_generation_does_nothing() -> None:
    assert plan(DELIVERY, row(AttemptState.WAITING, generation=1), OnUnknown.RESEND).number is None


def test_an_attempt_that_a_crash_left_open_is_unknown_and_resent_under_the_next_number() -> None:
    assert plan(DELIVERY, row(AttemptState.OPEN, number=3), OnUnknown.RESEND) == Plan(number=4, cut_off=3)
    assert plan(DELIVERY, row(AttemptState.OPEN, number=3), OnUnknown.LEAVE) == Plan(number=None, cut_off=3)


def test_a_delivery_that_waits_goes_on_counting_and_not_before_its_time() -> None:
    waiting = row(AttemptState.WAITING, number=2, failures=2, not_before_ms=9)
    assert plan(DELIVERY, waiting, OnUnknown.RESEND) == Plan(number=3, failures=2, not_before_ms=9)


def test_what_went_to_delay_begins_again_only_as_the_next_attempt() -> None:
    delayed = row(AttemptState.DELAYED, number=2, failures=2)
    back = replace(DELIVERY, attempt=3, not_before=NOW)
    assert plan(back, delayed, OnUnknown.RESEND) == Plan(number=3, failures=2, not_before_ms=round(NOW.timestamp() * 1000))
    assert plan(replace(DELIVERY, attempt=2), delayed, OnUnknown.RESEND).number is None
    assert plan(DELIVERY, delayed, OnUnknown.RESEND).number is None


def test_a_row_of_before_there_were_waits_reads_back() -> None:
    assert plan(DELIVERY, b'[0,2,"waiting",1,0]', OnUnknown.RESEND) == Plan(number=3, failures=1)


@pytest.mark.parametrize(
    ("end", "status", "reason", "is_done", "holds"),
    [
        (Receipt(provider="smtp", status=Status.SENT, reference="q1"), Status.SENT, None, True, False),
        (ProviderRejectedError("no", code="550 5.1.1"), Status.FAILED, "550 5.1.1", True, False),
        (ProviderRefusedError("later", code="451 4.7.1"), Status.RETRYING, "451 4.7.1", False, False),
        (ProviderUnavailableError("down", code="connect"), Status.RETRYING, "connect", False, True),
        (ProviderThrottledError("slow", code="429", retry_after_seconds=9), Status.RETRYING, "429", False, True),
        (SendUnknownError("lost", code="timeout"), Status.UNKNOWN, "timeout", False, False),
        (UnsealableError("no key"), Status.SKIPPED, "erased", True, False),
        (ZeroDivisionError(), Status.UNKNOWN, "internal", False, False),
    ],
)
def test_each_end_of_a_call_has_its_verdict(
    end: Receipt | NotifyError, status: Status, reason: str | None, *, is_done: bool, holds: bool
) -> None:
    found = judge(end)
    assert (found.status, found.reason, found.wait_seconds is None, found.holds_provider) == (status, reason, is_done, holds)


def test_throttling_waits_as_long_as_the_provider_asked() -> None:
    assert judge(ProviderThrottledError("slow", retry_after_seconds=9)).wait_seconds == 9


def test_unknown_is_left_alone_where_the_channel_says_so() -> None:
    found = judge(SendUnknownError("lost"), on_unknown=OnUnknown.LEAVE)
    assert (found.status, found.wait_seconds) == (Status.UNKNOWN, None)


@given(st.integers(min_value=0, max_value=10_000))
def test_backoff_grows_and_is_bounded(failures: int) -> None:
    assert 0.5 <= backoff_seconds(failures) <= backoff_seconds(failures + 1) <= 30


@given(st.sampled_from(AttemptState), st.integers(0, 99), st.integers(0, 99), st.integers(0, 99), st.integers(0, 99))
def test_a_row_reads_back(state: AttemptState, generation: int, number: int, failures: int, not_before_ms: int) -> None:
    attempt = Attempt(generation=generation, number=number, state=state, failures=failures, at_ms=1, not_before_ms=not_before_ms)
    assert Attempt.of(attempt.row()) == attempt


def test_a_delivery_is_done_only_in_a_status_that_may_last() -> None:
    assert is_terminal(Status.FAILED)
    assert not is_terminal(Status.RETRYING)


def test_a_refusal_follows_the_schedule_and_the_last_one_fails_with_the_providers_code() -> None:
    refused = ProviderRefusedError("later", code="451 4.7.1")
    most = len(schedule_of(DELIVERY.category, DELIVERY.lane).waits_seconds)
    found = [judge(refused, failures=failures) for failures in range(most + 1)]
    assert [each.status for each in found] == [Status.RETRYING] * most + [Status.FAILED]
    assert (found[-1].reason, found[-1].wait_seconds, found[-1].is_exhausted) == ("attempts_exhausted: 451 4.7.1", None, True)
    assert found[0] == judge(refused)


def test_a_provider_that_asks_for_more_time_is_given_it() -> None:
    found = judge(ProviderRefusedError("later", retry_after_seconds=500))
    assert found.wait_seconds == 500


def test_a_retry_that_would_begin_too_late_expires_at_once_with_the_providers_code() -> None:
    found = judge(ProviderRefusedError("later", code="451"), delivery=replace(DELIVERY, expires_at=NOW + timedelta(seconds=4)))
    assert (found.status, found.reason, found.wait_seconds) == (Status.EXPIRED, "no_time_left: 451", None)


def test_what_may_have_arrived_is_never_called_failed_or_expired() -> None:
    lost = SendUnknownError("lost", code="timeout")
    last = judge(lost, failures=99)
    assert (last.status, last.reason, last.is_exhausted) == (Status.UNKNOWN, "attempts_exhausted: timeout", True)
    late = judge(lost, delivery=replace(DELIVERY, expires_at=NOW))
    assert (late.status, late.reason) == (Status.UNKNOWN, "no_time_left: timeout")


def test_an_outage_never_exhausts_a_schedule() -> None:
    found = judge(ProviderUnavailableError("down", code="connect"), failures=99)
    assert (found.status, found.holds_provider, found.is_exhausted) == (Status.RETRYING, True, False)


def test_a_recalled_delivery_is_cancelled_with_the_orders_reason() -> None:
    found = judge(Recalled(ControlEntry(scope="recall:notification:n", reason="wrong price", issued_at=NOW)))
    assert (found.status, found.reason, found.wait_seconds) == (Status.CANCELLED, "recalled: wrong price", None)


def test_an_expired_delivery_is_done() -> None:
    assert judge(ExpiredError("late")).wait_seconds is None
