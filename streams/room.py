"""What less urgent inputs may take of a worker while urgent records come: as much as these do not feel.

Whatever works on a backlog shares the cores and the broker with what is urgent, whose transactions then take longer. How
much longer is measured, and answered as TCP Vegas does (Brakmo and Peterson, 1995): the shortest time of late says how fast
an urgent transaction is when nothing is in its way; one that takes far longer makes the backlog rest longer, every other one
makes it rest a little less. On a machine with cores to spare nothing rests.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

URGENT_SECONDS = 0.25  # for so long after an urgent record the others make room
MOST_RESTS = 8.0
_FIRST_RESTS = 1.0
_LONGER, _SHORTER = 0.5, 0.05  # an urgent transaction in eleven may be slow
_SLOW_TIMES, _SLOW_SECONDS = 2.0, 0.005  # beyond the shortest
_FORGET = 1.002  # how much longer the shortest time is thought to be, each time
# what a less urgent transaction may take before another shard begins one all the same; waiting for a server is nobody's load
_STRETCH_SECONDS = 0.1


class Room:
    """Shared by a step's shards in this worker. `urgent`: the places in `reads` of the inputs that those behind make room for.

    While room is made, one shard at a time works on less urgent inputs, and then all rest, `rests` times as long as that took.
    """

    def __init__(self, urgent: Iterable[int], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._offered_at = dict.fromkeys(urgent, -math.inf)
        self._free_at = -math.inf
        self._shortest = math.inf
        self.rests = _FIRST_RESTS if self._offered_at else 0.0

    def offered(self, urgency: int) -> None:
        """Note that records of an input came."""
        if urgency in self._offered_at:
            self._offered_at[urgency] = self._clock()

    def done(self, urgency: int, seconds: float) -> None:
        """Note how long it took from the arrival of an input's records until the last of them was done."""
        if urgency not in self._offered_at or self._is_pressed(urgency):
            return  # one that rests itself is slow for that
        is_slow = seconds > self._shortest * _SLOW_TIMES + _SLOW_SECONDS
        self._shortest = min(seconds, self._shortest * _FORGET)
        self.rests = min(MOST_RESTS, self.rests + _LONGER) if is_slow else max(0.0, self.rests - _SHORTER)

    def wait_seconds(self, urgency: int) -> float:
        """Return how long until an input may be worked on; 0: now. It may be more by then."""
        return max(0.0, self._free_at - self._clock()) if self.rests > 0 and self._is_pressed(urgency) else 0.0

    @contextmanager
    def taken(self, urgency: int) -> Iterator[None]:
        """Work on an input."""
        if not any(other < urgency for other in self._offered_at):
            yield
            return
        began = self._clock()
        self._free_at = began + _STRETCH_SECONDS
        try:
            yield
        finally:
            now = self._clock()
            self._free_at = now + self.rests * min(now - began, _STRETCH_SECONDS)

    def _is_pressed(self, urgency: int) -> bool:
        now = self._clock()
        return any(now - at < URGENT_SECONDS for other, at in self._offered_at.items() if other < urgency)
