"""Waiting for what happens elsewhere: on a condition, with a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_POLL_SECONDS = 0.005


async def eventually(is_so: Callable[[], object], *, seconds: float = 10.0) -> None:
    """Return as soon as `is_so()` is true. Raises TimeoutError after `seconds`."""
    async with asyncio.timeout(seconds):
        while not is_so():  # noqa: ASYNC110 - of things that tell nobody
            await asyncio.sleep(_POLL_SECONDS)
