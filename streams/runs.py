"""Runs of dead letters: an input that yields little else is halted, rather than drained into `dead`.

One bad record is its producer's fault; hundreds in a row are a release, a schema or a key gone wrong, and every record
behind them would follow. So the input is left where it is until somebody has looked.
"""

from __future__ import annotations

from collections import deque

# of so many newest records more than half
WINDOW_RECORDS = 1_000


class DeadRun:
    """Counts the dead letters of one input of a worker, over all its partitions. `limit` in a row halt it; 0: nothing does.

    What is decided counts at once towards the row, so that shards which work side by side do not each go to the limit,
    and is taken back when its transaction is aborted. The window moves with what is committed.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_a_row = 0
        self._records = 0
        self._dead: deque[int] = deque()  # numbers of the dead ones among the newest WINDOW_RECORDS
        self.halted: str | None = None  # why

    def begin(self) -> Passage:
        """Return the count of a transaction that begins."""
        return Passage(self)

    def _may_go_on(self) -> bool:
        if self._limit and self._in_a_row >= self._limit:
            self.halted = f"{self._limit} dead letters in a row"
        if self.halted is None:
            self._in_a_row += 1
        return self.halted is None

    def _take_back(self, in_a_row: int) -> None:
        self._in_a_row = max(0, self._in_a_row - in_a_row)

    def _move(self, records: int, dead: list[int]) -> None:
        self._dead.extend(self._records + number for number in dead)
        self._records += records
        while self._dead and self._dead[0] < self._records - WINDOW_RECORDS:
            self._dead.popleft()
        if self._limit and self._records >= WINDOW_RECORDS and len(self._dead) > WINDOW_RECORDS // 2:
            self.halted = self.halted or f"{len(self._dead)} of the last {WINDOW_RECORDS} records were dead letters"


class Passage:
    """What the records of one open transaction became."""

    __slots__ = ("_dead", "_in_a_row", "_records", "_run")

    def __init__(self, run: DeadRun) -> None:
        self._run = run
        self._records = 0
        self._in_a_row = 0
        self._dead: list[int] = []

    def passed(self) -> None:
        """Count a record that was handled."""
        self._records += 1
        self._in_a_row = 0
        self._run._in_a_row = 0  # noqa: SLF001 - the two are one thing, and this is done for every record

    def may_set_aside(self) -> bool:
        """Count a dead letter and say yes, or say that the run is too long: the record stays, and the input is halted."""
        if not self._run._may_go_on():  # noqa: SLF001 - as above
            return False
        self._dead.append(self._records)
        self._records += 1
        self._in_a_row += 1
        return True

    def committed(self) -> None:
        """Note that the transaction was committed."""
        self._run._move(self._records, self._dead)  # noqa: SLF001 - as above

    def aborted(self) -> None:
        """Note that the transaction was aborted: its records are decided again."""
        self._run._take_back(self._in_a_row)  # noqa: SLF001 - as above
