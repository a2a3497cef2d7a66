from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.sender import Attempt, AttemptState, Plan, backoff_seconds, plan, verdict
from channels.base import OnUnknown, Receipt
from schemas.errors import (
    NotifyError,
    ProviderRefusedError,
    ProviderRejectedError,
    ProviderThrottledError,
    ProviderUnavailableError,
    SendUnknownError,
    UnsealableError,
)
from schemas.messages import Delivery
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


def row(state: AttemptState, *, number: int = 1, generation: int = 0, failures: int = 0) -> bytes:
    return Attempt(generation=generation, number=number, state=state, failures=failures, at_ms=0).row()


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


def test_a_delivery_that_waits_goes_on_counting() -> None:
    assert plan(DELIVERY, row(AttemptState.WAITING, number=2, failures=2), OnUnknown.RESEND) == Plan(number=3, failures=2)


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
    found = verdict(end, failures=0, on_unknown=OnUnknown.RESEND)
    assert (found.status, found.reason, found.wait_seconds is None, found.holds_channel) == (status, reason, is_done, holds)


def test_throttling_waits_as_long_as_the_provider_asked() -> None:
    found = verdict(ProviderThrottledError("slow", retry_after_seconds=9), failures=0, on_unknown=OnUnknown.RESEND)
    assert found.wait_seconds == 9


def test_unknown_is_left_alone_where_the_channel_says_so() -> None:
    found = verdict(SendUnknownError("lost"), failures=0, on_unknown=OnUnknown.LEAVE)
    assert (found.status, found.wait_seconds) == (Status.UNKNOWN, None)


@given(st.integers(min_value=0, max_value=10_000))
def test_backoff_grows_and_is_bounded(failures: int) -> None:
    assert 0.5 <= backoff_seconds(failures) <= backoff_seconds(failures + 1) <= 30


@given(st.sampled_from(AttemptState), st.integers(0, 99), st.integers(0, 99), st.integers(0, 99))
def test_a_row_reads_back(state: AttemptState, generation: int, number: int, failures: int) -> None:
    attempt = Attempt(generation=generation, number=number, state=state, failures=failures, at_ms=1)
    assert Attempt.of(attempt.row()) == attempt


def test_a_delivery_is_done_only_in_a_status_that_may_last() -> None:
    assert is_terminal(Status.FAILED)
    assert not is_terminal(Status.RETRYING)
