"""The providers of a worker: who is called next, how many calls run, and how fast.

One gateway a channel, shared by all shards of the worker: outages, errors and pace are the provider's, whoever meets them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from agents.failover import Choice, Ended, Provider, Wait, choose, shares
from agents.pacing import Pace
from channels.base import Channel, service_of
from channels.config import ProviderConfig
from streams.metrics import Metrics

log = logging.getLogger(__name__)


_ANSWER_SECONDS = 1.0  # who was woken and does not ask for a call within them needs none


@dataclass(slots=True)
class Line:
    """A provider with what limits its calls. `per_day`: of the whole quota, before it is divided; None: no limit.

    Shards, each known by its event `wake`, share its calls: `held` are theirs, `lacking` was refused one, and until when that counts.
    `services`: by route, the provider once for each service behind it that fails apart, with a circuit and rates of its own.
    """

    channel: Channel
    provider: Provider
    free: int
    pace: Pace
    per_day: int | None = None
    services: Mapping[str, Provider] = field(default_factory=dict)
    held: Counter[asyncio.Event] = field(default_factory=Counter)
    lacking: dict[asyncio.Event, float] = field(default_factory=dict)

    def has_call_for(self, shard: asyncio.Event, now: float) -> bool:
        """Say whether a call is free that `shard` may take: as long as another one lacks calls, no more than an equal share.

        A shard that has a backlog and whose calls end takes new ones at once: without this it would leave the others none.
        """
        others = {each for each, until in self.lacking.items() if each is not shard and until > now}
        if not others or not self.free:
            return self.free > 0
        sharers = len({shard, *others, *self.held})
        return self.held[shard] < math.ceil((self.free + self.held.total()) / sharers)

    def of(self, route: str | None) -> Provider:
        """Return whose circuit and rates count for a delivery of `route`."""
        return self.services.get(route or "", self.provider)


@dataclass(frozen=True, slots=True)
class Call:
    """A call that was granted, to be given back when its end is recorded. `reason`: why this provider, for the trail."""

    line: Line
    reason: str | None
    began_at: float
    route: str | None
    is_probe: bool
    shard: asyncio.Event


@dataclass(slots=True)
class Gateway:
    """A channel's providers. `lines` in the order of the configuration; never empty."""

    name: str
    lines: Sequence[Line]
    metrics: Metrics
    wakes: set[asyncio.Event] = field(default_factory=set)
    _by_name: Mapping[str, Line] = field(init=False)

    def __post_init__(self) -> None:
        self._by_name = {line.channel.provider: line for line in self.lines}

    @property
    def has_routes(self) -> bool:
        """Say whether one delivery can be stuck while the next one is not: some provider carries some routes only."""
        return any(line.provider.routes is not None for line in self.lines)

    @property
    def first(self) -> Channel:
        """The first provider: what is the same for all of a channel is asked of it."""
        return self.lines[0].channel

    def channel(self, provider: str) -> Channel:
        """Return a provider by its name; the first one for a name that is none any more."""
        line = self._by_name.get(provider)
        return self.first if line is None else line.channel

    def take(
        self, *, route: str | None, draw: str, avoid: set[str], spendable_at: Callable[[Line], float], wake: asyncio.Event
    ) -> Call | Wait | None:
        """Grant a call, or say until when nobody can be called, and set `wake` when a call ends. None: nobody carries `route`.

        `spendable_at`: when the caller's part of a provider's daily quota lets it be called, by a monotonic clock.
        """
        now = time.monotonic()
        for line in self.lines:
            line.lacking.pop(wake, None)

        def ready_at(provider: Provider) -> float:
            line = self._by_name[provider.name]
            return max(line.pace.ready_at(now), spendable_at(line)) if line.has_call_for(wake, now) else math.inf

        found = choose([line.of(route) for line in self.lines], route=route, draw=draw, avoid=avoid, now=now, ready_at=ready_at)
        if not isinstance(found, Choice):
            self.wakes.add(wake)
            for line in self.lines:
                if not line.has_call_for(wake, now):
                    line.lacking[wake] = math.inf
            return found
        line = self._by_name[found.provider.name]
        line.free -= 1
        line.held[wake] += 1
        line.pace.take(now)
        self.metrics.attempts_open.labels(found.provider.name).inc()
        return Call(line, found.reason, now, route, found.provider.circuit.begin(), wake)

    def others(self, route: str | None, tried: set[str]) -> bool:
        """Say whether a provider that is not out and none of `tried` carries `route`."""
        return any(each.carries(route) and each.name not in tried and not each.circuit.is_open for each in self._of(route))

    def back_in(self, route: str | None) -> float:
        """Return in how many seconds the first provider that carries `route` may be called again, as far as is known."""
        now = time.monotonic()
        times = [each.circuit.opens_at(now) for each in self._of(route) if each.carries(route)]
        return max(0.0, min((at for at in times if at < math.inf), default=now) - now)

    def note(self, call: Call, ended: Ended | None, *, asked_seconds: float = 0.0, reason: str = "") -> None:
        """Note how a call ended. None: it was cancelled, or says nothing about its provider."""
        now = time.monotonic()
        provider = call.line.of(call.route)
        was_open = provider.circuit.is_open
        provider.record(
            now,
            ended,
            route=call.route,
            seconds=now - call.began_at,
            was_probe=call.is_probe,
            asked_seconds=asked_seconds,
            reason=reason,
        )
        if provider.circuit.is_open != was_open:
            word = "held" if provider.circuit.is_open else "resumed"
            service, reason = service_of(call.route), provider.circuit.reason
            log.warning("provider.%s channel=%s provider=%s service=%s reason=%s", word, self.name, provider.name, service, reason)
            self._wake()

    def give_back(self, call: Call) -> None:
        """Let the next call begin, now that the end of this one is recorded: what a crash can double are recorded intents."""
        call.line.free += 1
        call.line.held[call.shard] -= 1
        if not call.line.held[call.shard]:
            del call.line.held[call.shard]
        self.metrics.attempts_open.labels(call.line.provider.name).dec()
        self._wake()

    def _wake(self) -> None:
        for wake in self.wakes:
            wake.set()
        self.wakes.clear()
        now = time.monotonic()
        for line in self.lines:
            line.lacking = {each: min(until, now + _ANSWER_SECONDS) for each, until in line.lacking.items() if until > now}

    def _of(self, route: str | None) -> list[Provider]:
        return [line.of(route) for line in self.lines]

    def is_held(self, routes: Iterable[str | None]) -> bool:
        """Say whether nobody who carries one of `routes` is well: what waits for it waits for a provider."""
        return any(all(each.circuit.is_open for each in self._of(route) if each.carries(route)) for route in routes)

    def own(self, part: float) -> None:
        """Own `part` of all partitions, from 0 to 1: the worker's part of each quota."""
        now = time.monotonic()
        for line in self.lines:
            line.pace.own(part, now)

    def show(self) -> None:
        """Bring the gauges up to date."""
        now = time.monotonic()
        for route in (None, *dict.fromkeys(route for line in self.lines for route in line.services)):
            of_route = self._of(route)
            for line, provider, share in zip(self.lines, of_route, shares(of_route, route, now), strict=True):
                labels = (self.name, provider.name, service_of(route))
                if route is None or provider is not line.provider:
                    self.metrics.provider_out.labels(*labels).set(provider.circuit.is_open)
                    self.metrics.provider_share.labels(*labels).set(0 if provider.circuit.is_open else share)


def gateways_of(
    channels: Mapping[str, Sequence[Channel]],
    configs: Mapping[str, ProviderConfig],
    *,
    max_open: int,
    lane_share: float,
    metrics: Metrics,
) -> dict[str, Gateway]:
    """Return a gateway for each channel. `configs`: by provider name, where there is one; `lane_share`: of each quota."""

    def line(channel: Channel) -> Line:
        config = configs.get(channel.provider)
        per_second = config.per_second if config is not None else None

        def provider() -> Provider:
            return Provider(channel.provider, config.weight if config is not None else 1.0, channel.routes)

        return Line(
            channel=channel,
            provider=provider(),
            services={route: provider() for route in sorted(channel.routes or ()) if service_of(route)},
            free=min(channel.max_open, (config.max_open if config is not None else None) or max_open),
            pace=Pace(None if per_second is None else per_second * lane_share),
            per_day=config.per_day if config is not None else None,
        )

    return {name: Gateway(name, [line(channel) for channel in each], metrics) for name, each in channels.items()}
