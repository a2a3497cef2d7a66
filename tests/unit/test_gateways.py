"""One provider before several services: what one of them does is held against it alone."""

from __future__ import annotations

import asyncio
import math
import time

import pytest

from agents.failover import Ended, Wait
from channels.base import Channel, service_of
from channels.recording import RecordingChannel
from streams.gateways import Call, Gateway, gateways_of
from streams.metrics import Metrics
from streams.roles import Role

GOOGLE, MOZILLA = "webpush/fcm.googleapis.com", "webpush/updates.push.services.mozilla.com"
BEFORE_SERVICES = "webpush"  # the route of what was decided by an earlier release
ROUTES = frozenset({BEFORE_SERVICES, GOOGLE, MOZILLA})


def a_gateway(*channels: Channel) -> Gateway:
    found = channels or (RecordingChannel(name="push", provider="webpush", routes=ROUTES, max_open=2),)
    return gateways_of({"push": found}, {}, max_open=32, lane_share=1.0, metrics=Metrics(Role.SENDER_NORMAL))["push"]


def taken(gateway: Gateway, route: str, shard: asyncio.Event | None = None) -> Call | Wait | None:
    return gateway.take(route=route, draw="d 0 1", avoid=set(), spendable_at=lambda _line: 0.0, wake=shard or asyncio.Event())


def all_it_may(gateway: Gateway, shard: asyncio.Event) -> list[Call]:
    """Take calls as a shard with a backlog does: until it is refused one."""
    found: list[Call] = []
    while isinstance(call := taken(gateway, GOOGLE, shard), Call):
        found.append(call)
    return found


def called(gateway: Gateway, route: str, ended: Ended, *, asked: float = 0.0) -> None:
    call = taken(gateway, route)
    assert isinstance(call, Call)
    gateway.note(call, ended, asked_seconds=asked, reason="503")
    gateway.give_back(call)


def metric(gateway: Gateway, name: str, **labels: str) -> float | None:
    return gateway.metrics.registry.get_sample_value(name, {"channel": "push", **labels})


def test_a_service_that_is_out_stops_no_delivery_to_another() -> None:
    gateway = a_gateway()
    called(gateway, MOZILLA, Ended.OUT, asked=60)
    assert isinstance(taken(gateway, MOZILLA), Wait)
    assert isinstance(taken(gateway, GOOGLE), Call)
    assert isinstance(taken(gateway, BEFORE_SERVICES), Call)
    assert 50 < gateway.back_in(MOZILLA) <= 60
    assert gateway.back_in(GOOGLE) == 0
    assert (gateway.others(MOZILLA, set()), gateway.others(GOOGLE, set())) == (False, True)


def test_what_waits_for_a_service_that_is_out_is_held_and_what_waits_for_another_is_not() -> None:
    gateway = a_gateway()
    called(gateway, MOZILLA, Ended.OUT)
    assert gateway.is_held({MOZILLA})
    assert gateway.is_held({GOOGLE, MOZILLA})
    assert not gateway.is_held({GOOGLE})
    assert not gateway.is_held(set())


def test_errors_of_a_service_cost_a_provider_no_share_at_another() -> None:
    gateway = a_gateway(*(RecordingChannel(name="push", provider=name, routes=ROUTES) for name in ("a", "b")))
    for line in gateway.lines:
        for route, ended in ((GOOGLE, Ended.WELL), (MOZILLA, Ended.FAILED if line.provider.name == "a" else Ended.WELL)):
            for _ in range(10):
                line.of(route).record(0.0, ended, route=route, seconds=0.1, was_probe=False)
    assert [line.of(MOZILLA).rates(0.0, MOZILLA)[0] for line in gateway.lines] == [1.0, 0.0]
    assert [line.of(GOOGLE).rates(0.0, GOOGLE)[0] for line in gateway.lines] == [0.0, 0.0]


def test_services_share_the_calls_that_their_provider_may_have_open() -> None:
    gateway = a_gateway()
    assert isinstance(taken(gateway, MOZILLA), Call)
    assert isinstance(taken(gateway, GOOGLE), Call)
    assert taken(gateway, GOOGLE) == Wait(math.inf, is_out=False)


def test_a_shard_whose_calls_end_leaves_those_that_lack_calls_their_share() -> None:
    gateway = a_gateway(RecordingChannel(name="push", provider="webpush", routes=ROUTES, max_open=32))
    busy, other, third = asyncio.Event(), asyncio.Event(), asyncio.Event()
    open_calls = all_it_may(gateway, busy)
    assert len(open_calls) == 32, "alone it has all"
    assert all_it_may(gateway, other) == all_it_may(gateway, third) == []
    # the busy one ends calls and asks again before anybody who is woken has a turn
    for _ in range(10):
        ended, open_calls = open_calls[:20], open_calls[20:]
        for call in ended:
            gateway.give_back(call)
        open_calls += all_it_may(gateway, busy)
    assert len(open_calls) == 11, "a third, rounded up"
    assert other.is_set()
    assert third.is_set()
    assert len(all_it_may(gateway, other)) == 11
    assert len(all_it_may(gateway, third)) == 10


def test_a_shard_that_was_woken_and_asks_no_more_limits_nobody() -> None:
    gateway = a_gateway(RecordingChannel(name="push", provider="webpush", routes=ROUTES, max_open=8))
    busy, gone = asyncio.Event(), asyncio.Event()
    open_calls = all_it_may(gateway, busy)
    assert all_it_may(gateway, gone) == []
    for call in open_calls:
        gateway.give_back(call)
    assert len(all_it_may(gateway, busy)) == 4
    (line,) = gateway.lines
    assert not line.has_call_for(busy, time.monotonic())
    assert line.has_call_for(busy, time.monotonic() + 2)


def test_metrics_name_the_service_that_is_out() -> None:
    gateway = a_gateway()
    called(gateway, MOZILLA, Ended.OUT)
    gateway.show()
    seen = {name: metric(gateway, "notify_provider_out", provider="webpush", service=name) for name in ("", *map(service_of, ROUTES))}
    assert seen == {"": 0, "fcm.googleapis.com": 0, "updates.push.services.mozilla.com": 1}
    assert metric(gateway, "notify_provider_share", provider="webpush", service=service_of(MOZILLA)) == 0


def test_a_provider_without_services_has_one_circuit_for_all_of_its_routes() -> None:
    gateway = a_gateway(RecordingChannel(name="push", provider="sms", routes=frozenset({"DE", "FR"})))
    called(gateway, "DE", Ended.OUT)
    assert isinstance(taken(gateway, "FR"), Wait)
    gateway.show()
    assert metric(gateway, "notify_provider_out", provider="sms", service="") == 1


@pytest.mark.parametrize(("route", "service"), [(None, ""), ("DE", ""), (BEFORE_SERVICES, ""), (GOOGLE, "fcm.googleapis.com")])
def test_the_service_of_a_route_is_behind_its_slash(route: str | None, service: str) -> None:
    assert service_of(route) == service
