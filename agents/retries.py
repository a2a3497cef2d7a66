"""How long a delivery that was refused for now waits before its next attempt, and how often it is tried.

A schedule counts what was held against the delivery itself. An outage of the provider spends none of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from schemas.topics import Lane, Tier

_MINUTE, _HOUR = 60, 3_600
# a wait is up to so much longer than its schedule says, so that what failed together does not come back together
JITTER = 0.2


@dataclass(frozen=True, slots=True)
class Schedule:
    """Seconds before the second, third, … attempt. `category` or `lane` None: any.

    `awaits_reports`: an attempt of unknown end is repeated only after the provider had time to report on it.
    """

    category: str | None
    lane: Lane | None
    waits_seconds: tuple[int, ...]
    awaits_reports: bool = True


# the first that fits; a delivery's `expires_at` ends each of them earlier
SCHEDULES: tuple[Schedule, ...] = (
    # one-time codes: the user sits and waits
    Schedule("security", Lane.CRITICAL, (1, 2, 4, 8, 15, 30, _MINUTE, 2 * _MINUTE, 4 * _MINUTE), awaits_reports=False),
    Schedule("payments", None, (5, _MINUTE, 10 * _MINUTE, _HOUR, 4 * _HOUR, 12 * _HOUR, 24 * _HOUR)),
    # subscribers of status changes: a bug that they mend within three days has cost nothing
    Schedule("webhooks", None, (5, _MINUTE, 5 * _MINUTE, 30 * _MINUTE, *(hours * _HOUR for hours in (2, 5, 10, 14, 18, 20)))),
    Schedule(None, Lane.CRITICAL, (5, 30, 2 * _MINUTE, 10 * _MINUTE, _HOUR, 4 * _HOUR, 12 * _HOUR)),
    Schedule(None, Lane.BULK, (_MINUTE, 10 * _MINUTE, _HOUR, 6 * _HOUR, 24 * _HOUR)),
    Schedule(None, None, (5, _MINUTE, 10 * _MINUTE, _HOUR, 4 * _HOUR, 12 * _HOUR)),
)


def schedule_of(category: str, lane: str) -> Schedule:
    """Return the schedule of a category in a lane."""
    return next(each for each in SCHEDULES if each.category in {None, category} and each.lane in {None, lane})


def wait_seconds(delivery_id: str, *, category: str, lane: str, generation: int, failures: int) -> float | None:
    """Return how long to wait after `failures` earlier refusals and one more; None: that was the last attempt.

    The same delivery and failure always wait as long, so that deciding again decides the same.
    """
    waits = schedule_of(category, lane).waits_seconds
    if failures >= len(waits):
        return None
    drawn = blake2b(f"{delivery_id} {generation} {failures}".encode(), digest_size=4).digest()
    return waits[failures] * (1 + JITTER * int.from_bytes(drawn, "big") / 2**32)


def tier_for(seconds: float, tiers_seconds: Sequence[int]) -> Tier | None:
    """Return the longest tier that is over before a wait of `seconds` is; None: the wait is shorter than each of them.

    `tiers_seconds` as the settings say them for a lane, in the order of `Tier`.
    """
    fitting = [tier for tier, tier_seconds in zip(Tier, tiers_seconds, strict=True) if tier_seconds <= seconds]
    return fitting[-1] if fitting else None


# lane -> seconds of its tiers, in the order of `Tier`
Tiers = Mapping[Lane, Sequence[int]]
