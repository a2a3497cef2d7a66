"""Which of a channel's providers carries a delivery: by weight among those that do well, and never at one that does not.

Each provider has a circuit. An outage opens it; when its time is over one call probes, and an answer closes it. Among
closed circuits a provider's share is its configured weight, less its errors and its slowness of late, and what has just
come back drifts back to its share. Pure: the caller says what time it is, in seconds of a monotonic clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b

FIRST_BACKOFF_SECONDS = 0.5
LAST_BACKOFF_SECONDS = 30.0
_TRIP_FAILURES = 3  # in a row, where calls succeeded of late; where none did one is enough
_BUCKET_SECONDS = 3.0
_BUCKETS = 10
_KNOWN_CALLS = 5  # fewer say nothing about a rate
_LEAST_SHARE = 0.02  # of its weight: who is never called never shows that he is well again
_SLOW = 2.0  # times as slow as the fastest before it costs
_RAMP_SECONDS = 20.0
_FIRST_RAMP = 0.1


class Ended(StrEnum):
    """What a call says about its provider."""

    WELL = "well"  # it answered, be it that this delivery will never be taken
    FAILED = "failed"  # this delivery was refused for now, or its end is unknown
    OUT = "out"  # nobody answers, or everybody is turned away
    THROTTLED = "throttled"  # it is well, and wants to be left alone for a while


def backoff_seconds(outages: int) -> float:
    """Return how long a provider is left alone after `outages` earlier probes: 0.5 s doubled each time, at most 30 s."""
    return float(min(LAST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2 ** min(outages, 10)))


class Window:
    """Calls, failures and mean seconds of the last half minute, in steps of three seconds."""

    __slots__ = ("_buckets",)

    def __init__(self) -> None:
        self._buckets: deque[list[float]] = deque(maxlen=_BUCKETS)  # [step, calls, failures, seconds]

    def add(self, now: float, *, is_failure: bool, seconds: float) -> None:
        """Count a call that ended at `now` after `seconds`."""
        step = now // _BUCKET_SECONDS
        if not self._buckets or self._buckets[-1][0] < step:
            self._buckets.append([step, 0, 0, 0.0])
        bucket = self._buckets[-1]
        bucket[1] += 1
        bucket[2] += is_failure
        bucket[3] += seconds

    def totals(self, now: float) -> tuple[int, int, float]:
        """Return (calls, failures, mean seconds of a call)."""
        oldest = now // _BUCKET_SECONDS - _BUCKETS
        recent = [bucket for bucket in self._buckets if bucket[0] > oldest]
        calls = sum(bucket[1] for bucket in recent)
        return int(calls), int(sum(bucket[2] for bucket in recent)), sum(bucket[3] for bucket in recent) / calls if calls else 0.0


@dataclass(slots=True)
class Circuit:
    """Whether a provider may be called. `reason`: why it was opened, a short code."""

    is_open: bool = False
    until: float = 0.0  # while it is open: nobody is called before
    outages: int = 0  # probes in a row that met nobody
    failures: int = 0  # in a row
    closed_at: float = float("-inf")
    reason: str = ""
    probing: int = 0  # calls that run and began while it was open

    def opens_at(self, now: float) -> float:
        """Return when a call may begin: `now`, a later moment, or infinity while a probe runs."""
        if not self.is_open:
            return now
        return float("inf") if self.probing else max(now, self.until)

    def begin(self) -> bool:
        """Note that a call begins; return whether it is a probe."""
        self.probing += self.is_open
        return self.is_open

    def end(  # noqa: PLR0913 - what a call tells
        self, now: float, ended: Ended | None, *, was_probe: bool, is_known_well: bool, asked_seconds: float, reason: str
    ) -> None:
        """Note how a call ended; None: it was cancelled and says nothing. `is_known_well`: calls of late succeeded."""
        self.probing = max(0, self.probing - was_probe)
        match ended:
            case Ended.WELL:
                if self.is_open:
                    self.is_open, self.closed_at, self.outages = False, now, 0
                self.failures = 0
            case Ended.THROTTLED:
                self._open(now, asked_seconds, reason)
            case Ended.OUT:
                self.failures += 1
                if self.is_open or not is_known_well or self.failures >= _TRIP_FAILURES:
                    self._open(now, asked_seconds, reason)
            case Ended.FAILED if self.is_open:
                # it answers, and does not do its work: probe again later
                self._open(now, asked_seconds, reason)
            case _:
                return

    def _open(self, now: float, asked_seconds: float, reason: str) -> None:
        if not self.is_open:
            self.is_open, self.outages, self.until = True, 0, 0.0
        if self.until <= now:
            # calls that ran side by side met one outage
            self.until = now + backoff_seconds(self.outages)
            self.outages += 1
        self.until = max(self.until, now + asked_seconds)
        self.reason = reason

    def ramp(self, now: float) -> float:
        """Return the part of its share that a provider is given since its circuit was closed: from 0.1 to 1."""
        return min(1.0, _FIRST_RAMP + (1 - _FIRST_RAMP) * (now - self.closed_at) / _RAMP_SECONDS)


@dataclass(slots=True)
class Provider:
    """One provider as the choice sees it. `routes` None: it carries all."""

    name: str
    weight: float = 1.0
    routes: frozenset[str] | None = None
    circuit: Circuit = field(default_factory=Circuit)
    window: Window = field(default_factory=Window)
    by_route: dict[str, Window] = field(default_factory=dict)

    def carries(self, route: str | None) -> bool:
        """Say whether it can carry a delivery of `route`."""
        return self.routes is None or (route is not None and route in self.routes)

    def record(  # noqa: PLR0913 - what a call tells
        self,
        now: float,
        ended: Ended | None,
        *,
        route: str | None,
        seconds: float,
        was_probe: bool,
        asked_seconds: float = 0.0,
        reason: str = "",
    ) -> None:
        """Learn from a call that ended at `now`; None: it was cancelled."""
        calls, failures, _ = self.window.totals(now)
        self.circuit.end(now, ended, was_probe=was_probe, is_known_well=calls > failures, asked_seconds=asked_seconds, reason=reason)
        if ended is None or ended is Ended.THROTTLED:
            return
        windows = [self.window] if route is None else [self.window, self.by_route.setdefault(route, Window())]
        for window in windows:
            window.add(now, is_failure=ended is not Ended.WELL, seconds=seconds)

    def rates(self, now: float, route: str | None) -> tuple[float, float]:
        """Return (share of calls that failed, mean seconds) of late: of the route where enough is known of it."""
        for window in (self.by_route.get(route or ""), self.window):
            if window is not None:
                calls, failures, seconds = window.totals(now)
                if calls >= _KNOWN_CALLS:
                    return failures / calls, seconds
        return 0.0, 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """The provider that is called next, and why; None where there was nothing to choose from."""

    provider: Provider
    reason: str | None


@dataclass(frozen=True, slots=True)
class Wait:
    """Nobody can be called before `until`; infinity: before a call ends. `is_out`: since no provider is well."""

    until: float
    is_out: bool


def shares(providers: Sequence[Provider], route: str | None, now: float) -> list[float]:
    """Return the share of each provider, from 0 to 1, adding up to 1: its weight, less errors, slowness and a fresh return."""
    rates = [provider.rates(now, route) for provider in providers]
    fastest = min((seconds for _, seconds in rates if seconds), default=0.0)
    found = []
    for provider, (failed, seconds) in zip(providers, rates, strict=True):
        speed = fastest / seconds if seconds > _SLOW * fastest > 0 else 1.0
        found.append(provider.weight * max(_LEAST_SHARE, (1 - failed) ** 2 * max(speed, 0.1) * provider.circuit.ramp(now)))
    total = sum(found)
    if total <= 0:  # only those are left that carry what no other can
        return [1 / len(providers)] * len(providers)
    return [share / total for share in found]


def choose(  # noqa: PLR0913 - everything that the choice rests on
    providers: Sequence[Provider],
    *,
    route: str | None,
    draw: str,
    avoid: Iterable[str],
    now: float,
    ready_at: Callable[[Provider], float],
) -> Choice | Wait | None:
    """Choose who carries a delivery; None: none of `providers` ever can.

    `draw`: what the same choice is drawn by again, such as delivery and attempt. `avoid`: names that refused this delivery,
    taken only where nobody else is well. `ready_at`: when a provider may be called for other reasons than its circuit.
    """
    able = [provider for provider in providers if provider.carries(route)]
    if not able:
        return None
    avoided = set(avoid)
    times = [max(provider.circuit.opens_at(now), ready_at(provider)) for provider in able]
    ready = [provider for provider, at in zip(able, times, strict=True) if at <= now]
    if not ready:
        return Wait(min(times), is_out=all(provider.circuit.is_open for provider in able))
    # one that is away is probed by a delivery that could go elsewhere, lest it never comes back
    probes = [provider for provider in ready if provider.circuit.is_open]
    preferred = [provider for provider in ready if provider.name not in avoided] or ready
    closed = [provider for provider in preferred if not provider.circuit.is_open]
    if probes and probes[0] in preferred:
        return Choice(probes[0], None if len(able) == 1 else f"probe after {probes[0].circuit.reason or 'outage'}")
    candidates = closed or preferred
    if len(able) == 1:
        return Choice(candidates[0], None)
    drawn = shares(candidates, route, now)
    number = int.from_bytes(blake2b(draw.encode(), digest_size=4).digest(), "big") / 2**32
    chosen, share = candidates[-1], drawn[-1]
    for candidate, part in zip(candidates, drawn, strict=True):
        number -= part
        if number < 0:
            chosen, share = candidate, part
            break
    return Choice(chosen, "; ".join([f"share {share:.0%}", *_passed_over(able, candidates, avoided, now)]))


def _passed_over(able: Sequence[Provider], candidates: Sequence[Provider], avoided: set[str], now: float) -> list[str]:
    """Return why each of the others was not a candidate."""
    found = []
    for provider in able:
        if provider in candidates:
            continue
        if provider.circuit.is_open:
            found.append(f"{provider.name} out: {provider.circuit.reason}")
        elif provider.name in avoided:
            found.append(f"{provider.name} refused it")
        elif provider.circuit.opens_at(now) <= now:
            found.append(f"{provider.name} busy")
    return found[:5]
