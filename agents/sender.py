"""What follows from an attempt: the ledger's rows and the verdict on each way a call to a provider can end.

The sender records an attempt before it calls (state open) and its end after (waiting or done): design rule 4. What a
worker finds open when it takes a partition over was cut off: its attempt is unknown, and the channel's policy decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import orjson

from channels.base import OnUnknown, Receipt
from schemas.errors import (
    ExpiredError,
    ProviderError,
    ProviderRefusedError,
    ProviderRejectedError,
    ProviderThrottledError,
    ProviderUnavailableError,
    SendUnknownError,
    UnsealableError,
)
from schemas.messages import Delivery
from schemas.status import SkipReason, Status

_FIRST_BACKOFF_SECONDS = 0.5
_LAST_BACKOFF_SECONDS = 30.0


class AttemptState(StrEnum):
    """Where an attempt in the ledger stands."""

    OPEN = "open"  # the provider may have been called
    WAITING = "waiting"  # ended, to be tried again
    DONE = "done"  # nothing more happens by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A delivery's row in the ledger: its last attempt. `number` counts from 1; `at_ms` is the wall clock at its last step."""

    generation: int
    number: int
    state: AttemptState
    failures: int
    at_ms: int

    def row(self) -> bytes:
        """Return the row as it is stored."""
        return orjson.dumps([self.generation, self.number, self.state, self.failures, self.at_ms])

    @classmethod
    def of(cls, row: bytes) -> Attempt:
        """Return the attempt in a stored row."""
        generation, number, state, failures, at_ms = orjson.loads(row)
        return cls(generation=generation, number=number, state=AttemptState(state), failures=failures, at_ms=at_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a delivery goes on when a sender reads it: the next attempt, or None when it is done already."""

    number: int | None
    failures: int = 0
    cut_off: int | None = None  # number of the attempt that a crash left open


def plan(delivery: Delivery, row: bytes | None, on_unknown: OnUnknown) -> Plan:
    """Return how `delivery` goes on, given its row in the ledger. Each attempt number of a generation begins once."""
    if row is None:
        return Plan(number=delivery.attempt)
    last = Attempt.of(row)
    if delivery.generation > last.generation:
        return Plan(number=delivery.attempt)
    if delivery.generation < last.generation or last.state is AttemptState.DONE:
        return Plan(number=None)
    if last.state is AttemptState.OPEN:
        following = last.number + 1 if on_unknown is OnUnknown.RESEND else None
        return Plan(number=following, failures=last.failures, cut_off=last.number)
    return Plan(number=last.number + 1, failures=last.failures)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What an attempt's end means. `wait_seconds` None: the delivery is done. `holds_channel`: others would fare alike."""

    status: Status
    reason: str | None = None
    reference: str | None = None
    wait_seconds: float | None = None
    holds_channel: bool = False


def verdict(end: Receipt | BaseException, *, failures: int, on_unknown: OnUnknown) -> Verdict:
    """Judge how an attempt ended. `failures`: attempts of this delivery that ended badly before."""
    pause = backoff_seconds(failures)
    match end:
        case Receipt(status=status, reference=reference, code=code):
            return Verdict(status=status, reason=code, reference=reference)
        case ProviderRejectedError(code=code):
            return Verdict(status=Status.FAILED, reason=code or end.reason)
        case ProviderThrottledError(code=code, retry_after_seconds=seconds):
            return Verdict(status=Status.RETRYING, reason=code, wait_seconds=seconds or pause, holds_channel=True)
        case ProviderUnavailableError(code=code):
            return Verdict(status=Status.RETRYING, reason=code, wait_seconds=pause, holds_channel=True)
        case ProviderRefusedError(code=code) | ProviderError(code=code):
            return Verdict(status=Status.RETRYING, reason=code, wait_seconds=pause)
        case ExpiredError():
            return Verdict(status=Status.EXPIRED)
        case UnsealableError():
            return Verdict(status=Status.SKIPPED, reason=SkipReason.ERASED)
        case SendUnknownError(code=code):
            return Verdict(status=Status.UNKNOWN, reason=code, wait_seconds=pause if on_unknown is OnUnknown.RESEND else None)
        case _:
            # a bug: the bytes may have left, and trying again may meet it again, so it waits as long as it may
            return Verdict(
                status=Status.UNKNOWN,
                reason="internal",
                wait_seconds=_LAST_BACKOFF_SECONDS if on_unknown is OnUnknown.RESEND else None,
            )


def backoff_seconds(failures: int) -> float:
    """Return how long to wait after `failures` earlier ones: 0.5 s doubled each time, at most 30 s."""
    return float(min(_LAST_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 2 ** min(failures, 10)))
