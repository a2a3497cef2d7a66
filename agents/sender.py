"""What follows from an attempt: the ledger's rows and the verdict on each way a call to a provider can end.

The sender records an attempt before it calls (state open) and its end after: design rule 4. What a worker finds open when
it takes a partition over was cut off: its attempt is unknown, and the channel's policy decides.

Three things make a delivery wait. What was refused for itself follows its schedule (`agents.retries`), here while the wait
is short and else through the role delay. What met an outage waits for a provider (`agents.failover`), and spends nothing of
the schedule. What may have arrived waits for a report, where the channel's providers send them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

import orjson

from agents.failover import LAST_BACKOFF_SECONDS, Ended
from agents.retries import schedule_of, wait_seconds
from channels.absent import NO_PROVIDER
from channels.base import OnUnknown, Receipt
from schemas.errors import (
    ExpiredError,
    ProviderError,
    ProviderRejectedError,
    ProviderThrottledError,
    ProviderUnavailableError,
    SendUnknownError,
    UnsealableError,
)
from schemas.messages import ControlEntry, Delivery, StatusChange
from schemas.status import SkipReason, Status, Suppression

EXHAUSTED = "attempts_exhausted"
TOO_LATE = "no_time_left"


class AttemptState(StrEnum):
    """Where an attempt in the ledger stands."""

    OPEN = "open"  # the provider may have been called
    WAITING = "waiting"  # ended; this sender begins the next one
    DELAYED = "delayed"  # ended; the next one comes back through the role delay
    DONE = "done"  # nothing more happens by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A delivery's row in the ledger: its last attempt. `number` counts from 1; 0: ended before the first one began.

    `failures`: attempts that its schedule counts. `at_ms`: the wall clock at its last step. `not_before_ms`: of the next
    one, while it waits. `provider`: who is called while it is open, and who may have taken it where its end is unknown.
    """

    generation: int
    number: int
    state: AttemptState
    failures: int
    at_ms: int
    not_before_ms: int = 0
    provider: str = ""

    def row(self) -> bytes:
        """Return the row as it is stored."""
        fields = [self.generation, self.number, self.state, self.failures, self.at_ms, self.not_before_ms]
        return orjson.dumps([*fields, self.provider] if self.provider else fields)

    @classmethod
    def of(cls, row: bytes) -> Attempt:
        """Return the attempt in a stored row."""
        # rows of before there were waits have five, those of no provider six
        generation, number, state, failures, at_ms, *rest = orjson.loads(row)
        return cls(
            generation=generation,
            number=number,
            state=AttemptState(state),
            failures=failures,
            at_ms=at_ms,
            not_before_ms=rest[0] if rest else 0,
            provider=rest[1] if len(rest) > 1 else "",
        )

    @property
    def is_over_here(self) -> bool:
        """Say whether this sender does nothing more about the delivery unless it is read again."""
        return self.state in {AttemptState.DONE, AttemptState.DELAYED}

    @property
    def is_unknown(self) -> bool:
        """Say whether the attempt may have arrived, and nothing has settled yet whether it did."""
        return bool(self.provider) and self.state is not AttemptState.OPEN


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a delivery goes on when a sender reads it: the next attempt, or None when it is done already."""

    number: int | None
    failures: int = 0
    cut_off: int | None = None  # number of the attempt that a crash left open
    not_before_ms: int = 0
    provider: str = ""  # who was called by the attempt that was cut off, or whose end is unknown


def plan(delivery: Delivery, row: bytes | None, on_unknown: OnUnknown, *, unknown_seconds: float = 0.0) -> Plan:
    """Return how `delivery` goes on, given its row in the ledger. Each attempt number of a generation begins once.

    What a crash left open goes on at once where nobody reports on it; else it ends as unknown, and its report is awaited.
    """
    begins = Plan(number=delivery.attempt, not_before_ms=0 if delivery.not_before is None else _milliseconds(delivery.not_before))
    if row is None:
        return begins
    last = Attempt.of(row)
    if delivery.generation > last.generation:
        return begins
    if delivery.generation < last.generation:
        return Plan(number=None)
    match last.state:
        case AttemptState.DONE:
            return Plan(number=None)
        case AttemptState.DELAYED:
            # what is sent on is the next attempt; whatever names an earlier one is a copy
            is_next = delivery.attempt > last.number
            number = delivery.attempt if is_next else None
            return Plan(number=number, failures=last.failures, not_before_ms=begins.not_before_ms, provider=last.provider)
        case AttemptState.OPEN:
            is_at_once = on_unknown is OnUnknown.RESEND and not awaited_seconds(delivery, unknown_seconds)
            following = last.number + 1 if is_at_once else None
            return Plan(number=following, failures=last.failures, cut_off=last.number, provider=last.provider)
        case AttemptState.WAITING:
            return Plan(number=last.number + 1, failures=last.failures, not_before_ms=last.not_before_ms, provider=last.provider)


def awaited_seconds(delivery: Delivery, unknown_seconds: float) -> float:
    """Return how long a report on an attempt of unknown end is awaited. A one-time code is repeated at once."""
    return unknown_seconds if schedule_of(delivery.category, delivery.lane).awaits_reports else 0.0


def is_settled_by(change: StatusChange, row: bytes | None) -> bool:
    """Say whether a report, as the change that it made, ends a delivery that waits to be sent again.

    `row`: the delivery's, in the ledger. A report on an earlier attempt than the last one ends it too: it arrived.
    """
    if row is None:
        return False
    last = Attempt.of(row)
    is_newest = (change.generation, change.attempt) == (last.generation, last.number)
    has_arrived = change.generation == last.generation and change.status == Status.DELIVERED
    return last.state is not AttemptState.DONE and (is_newest or has_arrived)


@dataclass(frozen=True, slots=True)
class Recalled:
    """A delivery that a standing order stopped before its next attempt began."""

    order: ControlEntry


End = Receipt | Recalled | BaseException


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What an attempt's end means.

    `wait_seconds` None: the delivery is done. `holds_provider`: others would fare alike there, so the provider is left
    alone, and the schedule is not spent. `is_refusal`: another provider may take it at once. `is_exhausted`: that was the
    last attempt, and a person may want to see to it. `suppresses`: nothing more may be sent to the address.
    """

    status: Status
    reason: str | None = None
    reference: str | None = None
    wait_seconds: float | None = None
    holds_provider: bool = False
    is_refusal: bool = False
    is_exhausted: bool = False
    suppresses: Suppression | None = None


def verdict(  # noqa: C901, PLR0913 - a case for each way to end
    end: End, *, delivery: Delivery, failures: int, on_unknown: OnUnknown, now: datetime, unknown_seconds: float = 0.0
) -> Verdict:
    """Judge how an attempt ended at `now`. `failures`: attempts of this delivery that its schedule counted before."""
    awaited = awaited_seconds(delivery, unknown_seconds)
    match end:
        case Receipt(status=status, reference=reference, code=code):
            return Verdict(status=status, reason=code, reference=reference)
        case Recalled(order=order):
            return Verdict(status=Status.CANCELLED, reason=f"{SkipReason.RECALLED}: {order.reason}")
        case ProviderRejectedError(code=code) if code == NO_PROVIDER:
            # who runs this chose so: the user's other channels tell him
            return Verdict(status=Status.SKIPPED, reason=SkipReason.NO_PROVIDER)
        case ProviderRejectedError(code=code):
            return Verdict(status=Status.FAILED, reason=code or end.reason, suppresses=end.suppresses)
        case ProviderThrottledError(code=code) | ProviderUnavailableError(code=code):
            return Verdict(status=Status.RETRYING, reason=code, wait_seconds=end.retry_after_seconds or 0.0, holds_provider=True)
        case ProviderError(code=code):
            found = _again(Status.RETRYING, code, delivery, failures, now, at_least=end.retry_after_seconds or 0.0)
            return replace(found, is_refusal=True)
        case ExpiredError():
            return Verdict(status=Status.EXPIRED)
        case UnsealableError():
            return Verdict(status=Status.SKIPPED, reason=SkipReason.ERASED)
        case SendUnknownError(code=code) if on_unknown is OnUnknown.RESEND:
            return _again(Status.UNKNOWN, code, delivery, failures, now, at_least=awaited)
        case SendUnknownError(code=code):
            return Verdict(status=Status.UNKNOWN, reason=code)
        case _ if on_unknown is OnUnknown.RESEND:
            # a bug: the bytes may have left, and trying again may meet it again
            return _again(Status.UNKNOWN, "internal", delivery, failures, now, at_least=max(awaited, LAST_BACKOFF_SECONDS))
        case _:
            return Verdict(status=Status.UNKNOWN, reason="internal")


def _again(  # noqa: PLR0913, PLR0917 - everything that the next attempt rests on
    status: Status, code: str | None, delivery: Delivery, failures: int, now: datetime, at_least: float = 0.0
) -> Verdict:
    """Return when the next attempt may begin; without one the delivery has failed, or expires, or stays unknown."""
    wait = wait_seconds(
        delivery.delivery_id, category=delivery.category, lane=delivery.lane, generation=delivery.generation, failures=failures
    )
    # what may have arrived never counts as failed
    is_unknown = status is Status.UNKNOWN
    if wait is None:
        return Verdict(status=status if is_unknown else Status.FAILED, reason=_because(EXHAUSTED, code), is_exhausted=True)
    wait = max(wait, at_least)
    if delivery.expires_at is not None and now + timedelta(seconds=wait) > delivery.expires_at:
        return Verdict(status=status if is_unknown else Status.EXPIRED, reason=_because(TOO_LATE, code))
    return Verdict(status=status, reason=code, wait_seconds=wait)


def said_of_provider(end: End) -> Ended | None:
    """Return what the end of a call says about its provider; None: nothing."""
    match end:
        case Receipt() | ProviderRejectedError():
            return Ended.WELL
        case ProviderUnavailableError():
            return Ended.OUT
        case ProviderThrottledError():
            return Ended.THROTTLED
        case ProviderError() | SendUnknownError():
            return Ended.FAILED
        case _:
            return None


def _because(reason: str, code: str | None) -> str:
    return f"{reason}: {code}" if code else reason


def _milliseconds(at: datetime) -> int:
    return round(at.timestamp() * 1000)
