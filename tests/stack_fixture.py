"""The embedded stack for tests: started once per session on free ports, usable from sync tests and from any event loop.

Register it with `pytest_plugins = ["tests.stack_fixture"]`. A test that kills or restarts a server leaves it running.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from streams.embedded.stack import Ports, Stack, start_stack

STOP_DEADLINE_SECONDS = 30
BROKER_DEADLINE_SECONDS = 180


@pytest.fixture(scope="session")
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Return a running stack, on an event loop and thread of its own: servers die with the thread they began in."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="embedded-stack", daemon=True)
    thread.start()
    try:
        is_long = any(item.get_closest_marker("soak") for item in request.session.items)
        starting = start_stack(tmp_path_factory.mktemp("stack"), ports=Ports.free(), has_short_life=not is_long)
        running = asyncio.run_coroutine_threadsafe(starting, loop).result()
        # a killed broker that is slow to come back on a busy machine must not take every later test with it
        running.broker.ready_deadline_seconds = BROKER_DEADLINE_SECONDS
        try:
            yield running
        finally:
            asyncio.run_coroutine_threadsafe(running.stop(), loop).result(STOP_DEADLINE_SECONDS)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
