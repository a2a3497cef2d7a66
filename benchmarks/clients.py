"""What the benchmarks of channels have in common: a simulator in a process of its own, and clients that take turns at it.

All clients of a service talk to the same simulator, which counts what it took: a rate of messages that did not arrive is no
figure. A client first sends a few for practice, which are not measured.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Protocol

from benchmarks.figures import Figure, figure, ratio, tenth, whole
from channels.base import Channel
from channels.config import Ports
from schemas.messages import Content, Delivery, DeliveryReport

OPEN: Final = 32
WARM_UP: Final = 100
_LIFETIME: Final = timedelta(hours=1)


async def _reported(_: DeliveryReport) -> None:
    """Take a report, at no cost."""


PORTS: Final = Ports(
    mail_from="a@b.example", max_open=OPEN, report=_reported, unsubscribe_url=lambda *_: None, callback_url=lambda _: None, return_key=b""
)


def a_delivery(channel: str, number: int, *, route: str | None = None) -> Delivery:
    now = datetime.now(UTC)
    return Delivery(
        delivery_id=f"{number:032x}-{channel}",
        notification_id=f"{number:032x}",
        user_id="u",
        channel=channel,
        lane="normal",
        rule="payment_confirmed",
        category="payments",
        generation=0,
        attempt=1,
        sealed=b"",
        accepted_at=now,
        created_at=now,
        expires_at=now + _LIFETIME,
        route=route,
    )


# ---- simulators


class Simulator(Protocol):
    """What the benchmarks ask of one."""

    @property
    def url(self) -> str: ...
    @property
    def messages(self) -> Collection[object]: ...


@dataclass(frozen=True, slots=True)
class Target:
    """A simulator that runs: how to configure a provider with it, and the address of a recipient."""

    kind: str
    url: str
    address: str
    process: subprocess.Popen[str]

    def taken(self) -> int:
        """Ask how many messages it has taken since it was asked last."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("count\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@contextmanager
def target(module: str, kind: str) -> Iterator[Target]:
    """Run `module` in its own process, where `--serve KIND` makes it call `serve`."""
    command = [sys.executable, "-m", module, "--serve", kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
        assert process.stdout is not None
        try:
            found = json.loads(process.stdout.readline())
            yield Target(kind, found["url"], found["address"], process)
        finally:
            process.send_signal(signal.SIGTERM)


async def serve(simulator: Simulator, address: str) -> None:
    """Say where a simulator is, and how many messages it took whenever that is asked, until stdin ends."""
    print(json.dumps({"url": simulator.url, "address": address}), flush=True)
    loop = asyncio.get_running_loop()
    counted = 0
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(len(simulator.messages) - counted, flush=True)
        counted = len(simulator.messages)


# ---- clients


Send = Callable[[Target, int], float]  # sends so many messages, and returns the seconds that it took


async def seconds_at_once(messages: int, send: Callable[[int], Awaitable[object]]) -> float:
    """Return how long `messages` calls of `send`, with a number each, take when as many run at once as our channel has open."""

    async def sender(numbers: Iterator[int]) -> None:
        for number in numbers:
            await send(number)

    async def all_of(numbers: Iterator[int]) -> None:
        await asyncio.gather(*(sender(numbers) for _ in range(OPEN)))

    await all_of(iter(range(WARM_UP)))
    began = time.perf_counter()
    await all_of(iter(range(WARM_UP, WARM_UP + messages)))
    return time.perf_counter() - began


def seconds_in_a_loop(messages: int, send: Callable[[int], object]) -> float:
    """Return how long `messages` calls of `send`, with a number each, take one after the other."""
    for number in range(WARM_UP):
        send(number)
    began = time.perf_counter()
    for number in range(WARM_UP, WARM_UP + messages):
        send(number)
    return time.perf_counter() - began


async def seconds_of_channel(channel: Channel, content: Content, messages: int, *, route: str | None = None) -> float:
    """Return how long one of our channels takes to send `content` so often."""
    await channel.open()
    try:
        return await seconds_at_once(messages, lambda number: channel.send(a_delivery(channel.name, number, route=route), content))
    finally:
        await channel.close()


# ---- figures


@dataclass(frozen=True, slots=True)
class Match:
    """A service, and who sends to it: ours first. `share`: of the messages, so that one after the other takes not for ever."""

    name: str
    peers: Mapping[str, Send]
    share: float = 1.0


def measure(module: str, matches: Mapping[str, Match], messages: int, repetitions: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Return messages a second for each service and client, a value a repetition. All clients have their turn in each one."""
    found: dict[str, dict[str, list[float]]] = {kind: {peer: [] for peer in match.peers} for kind, match in matches.items()}
    for kind, match in matches.items():
        count = max(1, round(messages * match.share))
        with target(module, kind) as where:
            for repetition in range(repetitions):
                for peer, send in match.peers.items():
                    rate = count / send(where, count)
                    if (taken := where.taken()) < count:
                        raise RuntimeError(f"{match.name}, {peer}: {taken} of {count} messages arrived")
                    found[kind][peer].append(rate)
                    say(f"{match.name}, {peer}: {rate:,.0f} messages/s ({repetition + 1}/{repetitions})")
    return {"messages": messages, "open": OPEN, "rates": found}


def describe(matches: Mapping[str, Match], rates: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Return the table of the page."""
    lines = ["| service | client | messages/s | our channel, times as many |", "|---|---|---:|---:|"]
    for kind, peers in rates.items():
        ours, *_ = peers.values()
        for peer, each in peers.items():
            times: Figure | None = None if each is ours else ratio(ours, each)
            lines.append(f"| {matches[kind].name} | {peer} | {figure(each).show(whole)} | {'' if times is None else times.show(tenth)} |")
    return "\n".join(lines) + "\n"
