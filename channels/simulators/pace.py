"""How a simulator counts what it takes in a second."""

from __future__ import annotations

from collections import deque


class Pace:
    """What was taken in the last second."""

    def __init__(self) -> None:
        self._taken: deque[float] = deque()

    def is_exceeded(self, per_second: float, now: float) -> bool:
        """Say whether one more at `now` (monotonic) is too many, or else count it. `per_second` 0: never."""
        if not per_second:
            return False
        while self._taken and self._taken[0] <= now - 1:
            self._taken.popleft()
        if len(self._taken) >= per_second:
            return True
        self._taken.append(now)
        return False
