"""Simulated providers for tests whose workers are other processes: they run on an event loop of their own, in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import TypeVar

from channels.simulators.registry import Simulator, build_simulator
from channels.simulators.script import Script
from tests.harness import wait_for

T = TypeVar("T")


class Simulated:
    """Running simulators by name. What they took may be looked at from the test's thread: copies are made on theirs."""

    def __init__(self, simulators: dict[str, Simulator], loop: asyncio.AbstractEventLoop) -> None:
        self._simulators = simulators
        self._loop = loop

    def __getitem__(self, name: str) -> Simulator:
        return self._simulators[name]

    @property
    def urls(self) -> str:
        """An entry of NOTIFY_PROVIDERS for each."""
        return " ".join(simulator.url for simulator in self._simulators.values())

    def on_loop(self, function: Callable[[], T]) -> T:
        """Return what `function` returns on the simulators' thread."""

        async def call() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(timeout=30)

    def script(self, name: str, script: Script) -> None:
        """Let a simulator behave differently from now on."""
        self.on_loop(lambda: setattr(self._simulators[name], "script", script))

    def calls(self, name: str) -> list[float]:
        """Return when a simulator was called, by a monotonic clock."""
        return self.on_loop(lambda: list(self._simulators[name].calls))

    def messages(self, name: str) -> list[object]:
        """Return what a simulator took."""
        return self.on_loop(lambda: list(self._simulators[name].messages))

    def taken(self, name: str) -> int:
        """Return how many messages a simulator took, of those that it remembers."""
        return self.on_loop(lambda: len(self._simulators[name].messages))

    def await_messages(self, name: str, count: int, *, seconds: float) -> None:
        """Wait until a simulator took so many."""
        wait_for(lambda: self.taken(name) >= count, seconds=seconds, what=f"{count} messages at {name}")


@contextmanager
def simulated(*names: str, script: Script | None = None, kept: int | None = None) -> Iterator[Simulated]:
    """Run simulators on any free ports until the end. `smtp:b` is a second one of the kind `smtp`.

    `kept`: so many messages are remembered, where what a simulator keeps by itself is not enough.
    """
    ready: threading.Event = threading.Event()
    made: list[Simulated | BaseException] = []
    stop: list[asyncio.Event] = []

    async def host() -> None:
        loop = asyncio.get_running_loop()
        stop.append(asyncio.Event())
        try:
            async with AsyncExitStack() as running:
                simulators = {
                    name: await running.enter_async_context(build_simulator(name.partition(":")[0], script=script or Script(), port=0))
                    for name in names
                }
                if kept is not None:
                    for simulator in simulators.values():
                        simulator.messages = deque(maxlen=kept)  # type: ignore[misc]  # of every simulator that anybody asks this of
                made.append(Simulated(simulators, loop))
                ready.set()
                await stop[0].wait()
        except BaseException as error:
            made.append(error)
            raise
        finally:
            ready.set()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(host()), name="simulators", daemon=True)
    thread.start()
    ready.wait(60)
    found = made[0]
    if isinstance(found, BaseException):
        raise found
    try:
        yield found
    finally:
        loop.call_soon_threadsafe(stop[0].set)
        thread.join(30)
        loop.close()
