"""A provider that fails wholly, then in part, then recovers, under steady load: what happens second by second."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from channels.simulators.script import Script
from schemas import topics
from schemas.messages import Delivery
from schemas.topics import Channel, Lane
from streams.embedded.stack import Stack
from tests.deliveries import a_delivery, codec_of, give_keys
from tests.harness import System, system, wait_for
from tests.simulated import Simulated, simulated

BOTH = FAILING, HELPING = "smtp", "smtp:b"
USERS = 50
MOST_MAILS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of time in which the failing provider behaves in one way."""

    name: str
    seconds: float
    script: Script
    until_share: float = math.inf  # it ends before its time when the failing provider is given so much again


@dataclass(slots=True)
class Outage:
    """What was seen. Times are seconds since the load began."""

    began_at: float = 0.0
    phases: list[tuple[str, float, float]] = field(default_factory=list)
    sent_at: dict[str, float] = field(default_factory=dict)  # recipient -> when it was published
    taken_at: dict[str, list[tuple[str, float]]] = field(default_factory=dict)  # recipient -> (provider, when)
    calls: dict[str, list[float]] = field(default_factory=dict)
    shares: list[tuple[float, float, float]] = field(default_factory=list)  # (when, share of the failing one, whether it is out)

    def taken(self, provider: str) -> list[float]:
        """Return when a provider took mails."""
        return sorted(at for taken in self.taken_at.values() for name, at in taken if name == provider)

    def lateness(self) -> dict[str, float]:
        """Return by recipient how many seconds after it was published its mail was first taken."""
        return {who: min(at for _, at in taken) - self.sent_at[who] for who, taken in self.taken_at.items()}

    def lost(self) -> int:
        """Return how many mails were never taken."""
        return len(self.sent_at.keys() - self.taken_at.keys())

    def doubled(self) -> int:
        """Return how many mails were taken more than once."""
        return sum(len(taken) - 1 for taken in self.taken_at.values())

    def share_taken(self, begin: float, end: float) -> float:
        """Return which part of the mails taken in a stretch of time the failing provider took."""
        counts = Counter(name for taken in self.taken_at.values() for name, at in taken if begin <= at < end)
        return counts[FAILING] / (counts.total() or 1)


@contextmanager
def two_providers(stack: Stack, folder: Path, *, max_open: int = 32) -> Iterator[tuple[System, Simulated]]:
    """Run a sender with two mail providers of equal weight, which forget no mail. `max_open`: calls to each at once."""
    with simulated(FAILING, HELPING, script=Script(latency=0.005, jitter=0.01), kept=MOST_MAILS) as found:
        urls = f"{_with(found[FAILING].url, 'name=failing')} {_with(found[HELPING].url, 'name=helping')}"
        variables = {
            "NOTIFY_PROVIDERS": urls,
            "NOTIFY_SMTP_URL": "",
            "NOTIFY_RETRY_TIERS": "1,2,4",
            "NOTIFY_MAX_OPEN_ATTEMPTS": str(max_open),
        }
        with system(stack, folder, variables=variables) as made:
            for role in ("sender-normal", "delay"):
                made.start(role)
            made.await_ready(seconds=120)
            give_keys(made, [f"user-{number}" for number in range(USERS)])
            yield made, found


def _with(url: str, option: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}{option}"


def play(made: System, providers: Simulated, phases: Sequence[Phase], *, per_second: int, settle_seconds: float) -> Outage:
    """Publish `per_second` mails a second through all phases; return what was seen when all were taken, or after the time."""
    seen = Outage(began_at=time.monotonic())
    codec = codec_of(made, topics.deliver(Channel.EMAIL, Lane.NORMAL))
    sender = made.workers["sender-normal-a"]
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.5):
            share = sender.metric("notify_provider_share", channel="email", provider="failing")
            out = sender.metric("notify_provider_out", channel="email", provider="failing")
            seen.shares.append((time.monotonic() - seen.began_at, share, out))

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    numbers = itertools.count()
    assert per_second * sum(phase.seconds for phase in phases) < MOST_MAILS
    try:
        for phase in phases:
            providers.script(FAILING, phase.script)
            begin = time.monotonic()
            _load(made, codec, seen, numbers, per_second=per_second, phase=phase)
            seen.phases.append((phase.name, begin - seen.began_at, time.monotonic() - seen.began_at))
        total = len(seen.sent_at)
        wait_for(
            # the count first: it is cheap, and too low as long as something is missing
            lambda: sum(map(providers.taken, BOTH)) >= total and len({_who(m) for name in BOTH for m in providers.messages(name)}) >= total,
            seconds=settle_seconds,
            what=f"all of {total} mails taken",
        )
    finally:
        stop.set()
        looking.join(10)
    for name in BOTH:
        seen.calls[name] = [at - seen.began_at for at in providers.calls(name)]
        for message in providers.messages(name):
            seen.taken_at.setdefault(_who(message), []).append((name, message.at - seen.began_at))  # type: ignore[attr-defined]  # of every simulator
    return seen


def _who(message: object) -> str:
    recipients: Sequence[str] | str = getattr(message, "recipients", None) or getattr(message, "recipient")  # noqa: B009
    return recipients if isinstance(recipients, str) else recipients[0]


def _load(made: System, codec: object, seen: Outage, numbers: Iterator[int], *, per_second: int, phase: Phase) -> None:
    """Publish evenly, in tenths of a second, as long as a phase lasts."""
    topic = topics.deliver(Channel.EMAIL, Lane.NORMAL)
    pause = threading.Event()
    begin = time.monotonic()
    for tick in range(round(phase.seconds * 10)):
        if seen.shares and seen.shares[-1][1] >= phase.until_share:
            return
        batch: list[Delivery] = []
        for _ in range(per_second * (tick + 1) // 10 - per_second * tick // 10):
            number = next(numbers)
            address = f"mail-{number}@example.com"
            batch.append(a_delivery(f"user-{number % USERS}", f"outage-{number}", address=address))
            seen.sent_at[address] = time.monotonic() - seen.began_at
        made.produce(topic, [(each.user_id.encode(), codec.encode(each)) for each in batch])  # type: ignore[attr-defined]  # a Codec
        left = begin + (tick + 1) / 10 - time.monotonic()
        if left > 0:
            pause.wait(left)
