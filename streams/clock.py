"""Whether this machine's clock is right: compared with the registry's, which every worker can ask.

Nothing is corrected by it, since the other clock may be the wrong one: an operator is told. docs/reliability.md says what a
wrong clock does.
"""

from __future__ import annotations

import asyncio
import logging
import time
from email.utils import parsedate_to_datetime

from schemas.errors import RegistryUnavailableError
from streams.metrics import Metrics
from streams.registry import Registry

log = logging.getLogger(__name__)

LOOK_EVERY_SECONDS = 60.0
# HTTP dates have whole seconds, and an answer may be slow
TOLERATED_SECONDS = 5.0
ADVICE = "synchronise this machine's clock and the registry's (chrony, systemd-timesyncd)"


def difference_seconds(date: str | None, *, asked_at: float, answered_at: float) -> float | None:
    """Return by how much our clock is ahead of the one that wrote an HTTP `date`, behind: negative; None: no such date.

    `asked_at` and `answered_at`: seconds since 1970 by our clock.
    """
    try:
        theirs = parsedate_to_datetime(date or "").timestamp() + 0.5
    except ValueError:
        return None
    return (asked_at + answered_at) / 2 - theirs


class ClockWatch:
    """Compares every LOOK_EVERY_SECONDS; a difference is logged and is the gauge `clock_difference_seconds`."""

    def __init__(self, registry: Registry, metrics: Metrics) -> None:
        self._registry = registry
        self._metrics = metrics

    async def watch(self) -> None:
        """Look until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_EVERY_SECONDS)

    async def look(self) -> None:
        """Compare once. Says nothing when the registry does not answer, or not with a date."""
        asked_at = time.time()
        try:
            date = await self._registry.date()
        except RegistryUnavailableError:
            return
        found = difference_seconds(date, asked_at=asked_at, answered_at=time.time())
        if found is None:
            return
        self._metrics.clock_difference.set(found)
        if abs(found) > TOLERATED_SECONDS:
            log.error("clock.wrong ahead_seconds=%.0f advice=%r", found, ADVICE)
