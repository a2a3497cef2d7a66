"""How fast a provider may be called: its quota, divided so that all workers together never exceed it.

A provider's quota is split by lane, in configured shares, and within a lane by partitions: a worker may use as much as the
partitions that it owns are of all. Who owns fewer partitions than before slows down before another may speed up, since
partitions are given up before they are taken over; so the sum never exceeds the quota, during rebalances either.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta


@dataclass(slots=True)
class Pace:
    """Calls a second of one worker to one provider, evenly spaced. `per_second`: the lane's part of the quota; None: no limit."""

    per_second: float | None
    owned: float = 0.0  # of all partitions, from 0 to 1
    _next_at: float = 0.0

    @property
    def spacing_seconds(self) -> float:
        """Seconds between two calls. A second holds one more call than spaces, hence the one less."""
        if self.per_second is None:
            return 0.0
        rate = self.per_second * self.owned
        return 1 / max(rate - 1, rate / 2) if rate > 0 else float("inf")

    def own(self, part: float, now: float) -> None:
        """Own `part` of the partitions from `now` on. The first call comes a space later: who owned them may just have called."""
        self.owned = part
        self._next_at = max(self._next_at, now + self.spacing_seconds)

    def ready_at(self, now: float) -> float:
        """Return when the next call may begin."""
        return max(now, self._next_at)

    def take(self, now: float) -> None:
        """Note that a call begins."""
        # what was not used is lost: a pause is not made up for by a burst
        self._next_at = max(now, self._next_at) + self.spacing_seconds


def daily_share(per_day: int, lane_share: float, partition: int, partitions: int) -> int:
    """Return how many calls of a day's quota are a partition's of a lane: the parts add up to the lane's, to the last one."""
    whole = int(per_day * lane_share)
    return whole // partitions + (partition < whole % partitions)


def day_of(moment: datetime) -> str:
    """Return the UTC day that an aware `moment` counts for, such as 2026-03-01."""
    return moment.astimezone(UTC).date().isoformat()


def seconds_to_next_day(moment: datetime) -> float:
    """Return how long the day of an aware `moment` lasts still."""
    here = moment.astimezone(UTC)
    midnight = here.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
    return (midnight - here).total_seconds()
