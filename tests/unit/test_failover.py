from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.failover import Choice, Ended, Provider, Wait, backoff_seconds, choose, shares
from agents.pacing import Pace, daily_share, day_of, seconds_to_next_day

NOW = 1_000.0


def pick(
    providers: list[Provider], *, now: float = NOW, route: str | None = None, draw: str = "d 0 1", avoid: tuple[str, ...] = ()
) -> Choice | Wait | None:
    return choose(providers, route=route, draw=draw, avoid=avoid, now=now, ready_at=lambda _provider: now)


def name_of(found: Choice | Wait | None) -> str:
    assert isinstance(found, Choice)
    return found.provider.name


def counted(providers: list[Provider], *, now: float = NOW, many: int = 2_000) -> Counter[str]:
    return Counter(name_of(pick(providers, now=now, draw=f"{number} 0 1")) for number in range(many))


def ended(provider: Provider, how: Ended | None, *, now: float = NOW, times: int = 1, seconds: float = 0.1, asked: float = 0.0) -> None:
    for _ in range(times):
        was_probe = provider.circuit.begin()
        provider.record(now, how, route=None, seconds=seconds, was_probe=was_probe, asked_seconds=asked, reason="421")


def test_one_provider_needs_no_reason() -> None:
    found = pick([Provider("only")])
    assert isinstance(found, Choice)
    assert (found.provider.name, found.reason) == ("only", None)


def test_shares_follow_the_weights_and_a_draw_is_repeatable() -> None:
    pair = [Provider("a", 3), Provider("b", 1)]
    assert 0.70 < counted(pair)["a"] / 2_000 < 0.80
    assert name_of(pick(pair, draw="x")) == name_of(pick(pair, draw="x"))


def test_the_first_outage_opens_a_circuit_that_never_worked_and_the_others_take_over() -> None:
    down, up = Provider("down"), Provider("up")
    ended(down, Ended.OUT)
    assert counted([down, up], many=200) == {"up": 200}
    found = pick([down, up])
    assert isinstance(found, Choice)
    assert found.reason is not None
    assert "down out: 421" in found.reason


def test_one_failed_call_among_good_ones_does_not_open_a_circuit_but_three_in_a_row_do() -> None:
    provider = Provider("a")
    ended(provider, Ended.WELL, times=5)
    ended(provider, Ended.OUT, times=2)
    ended(provider, Ended.WELL)
    ended(provider, Ended.OUT, times=2)
    assert not provider.circuit.is_open
    ended(provider, Ended.OUT)
    assert provider.circuit.is_open


def test_one_call_probes_and_an_answer_closes_the_circuit() -> None:
    provider = Provider("a")
    ended(provider, Ended.OUT)
    waiting = pick([provider])
    assert waiting == Wait(NOW + backoff_seconds(0), is_out=True)
    later = NOW + backoff_seconds(0)
    assert isinstance(pick([provider], now=later), Choice)
    was_probe = provider.circuit.begin()
    assert was_probe
    assert pick([provider], now=later) == Wait(math.inf, is_out=True)  # one at a time
    provider.record(later, Ended.WELL, route=None, seconds=0.1, was_probe=was_probe)
    assert isinstance(pick([provider], now=later), Choice)


def test_probes_that_meet_nobody_come_less_and_less_often() -> None:
    provider, now, waits = Provider("a"), NOW, []
    for _ in range(10):
        ended(provider, Ended.OUT, now=now)
        waits.append(provider.circuit.until - now)
        now = provider.circuit.until
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30]


def test_calls_that_ran_side_by_side_meet_one_outage() -> None:
    provider = Provider("a")
    ended(provider, Ended.OUT, times=32)
    assert provider.circuit.outages == 1


def test_a_throttling_provider_is_left_alone_as_long_as_it_asked() -> None:
    provider = Provider("a")
    ended(provider, Ended.WELL, times=50)
    ended(provider, Ended.THROTTLED, asked=7)
    assert pick([provider]) == Wait(NOW + 7, is_out=True)


def test_a_cancelled_probe_lets_the_next_one_begin() -> None:
    provider = Provider("a")
    ended(provider, Ended.OUT)
    later = provider.circuit.until
    was_probe = provider.circuit.begin()
    provider.record(later, None, route=None, seconds=0, was_probe=was_probe)
    assert isinstance(pick([provider], now=later), Choice)


def test_a_provider_that_is_away_is_probed_though_another_is_well() -> None:
    down, up = Provider("down"), Provider("up")
    ended(down, Ended.OUT)
    assert name_of(pick([down, up], now=down.circuit.until)) == "down"


def test_errors_and_slowness_cost_share_and_it_comes_back_with_time() -> None:
    bad, good = Provider("bad"), Provider("good")
    ended(good, Ended.WELL, times=20)
    ended(bad, Ended.WELL, times=10)
    ended(bad, Ended.FAILED, times=10)
    assert shares([bad, good], None, NOW)[0] == pytest.approx(0.25 / 1.25)
    assert shares([bad, good], None, NOW + 60) == [0.5, 0.5]
    slow, fast = Provider("slow"), Provider("fast")
    ended(slow, Ended.WELL, times=10, seconds=1.0)
    ended(fast, Ended.WELL, times=10, seconds=0.2)
    assert shares([slow, fast], None, NOW) == pytest.approx([1 / 6, 5 / 6])


def test_who_fails_always_is_still_tried_now_and_then() -> None:
    bad, good = Provider("bad"), Provider("good")
    ended(bad, Ended.FAILED, times=20)
    assert 0 < counted([bad, good])["bad"] < 100


def test_a_route_has_rates_of_its_own() -> None:
    a, b = Provider("a"), Provider("b")
    for _ in range(10):
        a.record(NOW, Ended.FAILED, route="DE", seconds=0.1, was_probe=False)
        a.record(NOW, Ended.WELL, route="FR", seconds=0.1, was_probe=False)
        b.record(NOW, Ended.WELL, route="DE", seconds=0.1, was_probe=False)
        b.record(NOW, Ended.WELL, route="FR", seconds=0.1, was_probe=False)
    assert shares([a, b], "DE", NOW)[0] < 0.05
    assert shares([a, b], "FR", NOW) == [0.5, 0.5]


def test_what_comes_back_drifts_to_its_share() -> None:
    back, other = Provider("back"), Provider("other")
    ended(back, Ended.OUT)
    ended(back, Ended.WELL, now=back.circuit.until)
    closed_at = back.circuit.closed_at
    of_back = [shares([back, other], None, closed_at + seconds)[0] for seconds in (0, 5, 10, 40)]
    assert of_back == sorted(of_back)
    assert of_back[0] < 0.1
    assert of_back[-1] == 0.5


def test_who_refused_a_delivery_is_avoided_while_another_is_well() -> None:
    a, b = Provider("a", 100), Provider("b", 1)
    assert name_of(pick([a, b], avoid=("a",))) == "b"
    ended(b, Ended.OUT)
    assert name_of(pick([a, b], avoid=("a",))) == "a"


def test_a_weight_of_nothing_is_used_only_when_no_other_is_left() -> None:
    last, first = Provider("last", 0), Provider("first")
    assert counted([last, first], many=300) == {"first": 300}
    ended(first, Ended.OUT)
    assert counted([last, first], many=300) == {"last": 300}


def test_nobody_carries_a_route_that_none_has() -> None:
    assert pick([Provider("a", routes=frozenset({"DE"}))], route="FR") is None
    assert pick([Provider("a", routes=frozenset({"DE"}))], route=None) is None
    assert name_of(pick([Provider("a", routes=frozenset({"DE"})), Provider("b")], route="FR")) == "b"


@given(
    st.lists(
        st.tuples(st.sampled_from([*Ended, None]), st.floats(0, 5), st.floats(0, 40)),
        max_size=60,
    )
)
def test_a_circuit_never_locks_for_good(calls: list[tuple[Ended | None, float, float]]) -> None:
    provider, now = Provider("a"), NOW
    for how, passes, asked in calls:
        now += passes
        if provider.circuit.opens_at(now) <= now:
            ended(provider, how, now=now, asked=asked)
    assert provider.circuit.opens_at(now) < math.inf
    assert provider.circuit.opens_at(now + 100) == now + 100


# pace


@settings(deadline=None)  # what it counts takes longer on a busy machine
@given(
    st.floats(2, 500),
    st.lists(st.floats(0.05, 1), min_size=1, max_size=4),
    st.lists(st.floats(0, 0.3), max_size=100),
)
def test_workers_together_never_call_more_often_than_the_quota_says(quota: float, parts: list[float], pauses: list[float]) -> None:
    paces = [Pace(quota) for _ in parts]
    for pace, part in zip(paces, parts, strict=True):
        pace.own(part / sum(parts), 0.0)
    calls: list[float] = []
    for pace in paces:
        now = 0.0
        for pause in [*pauses, *[0.0] * 100]:
            now = pace.ready_at(now + pause)
            if now == math.inf:
                break
            pace.take(now)
            calls.append(now)
    calls.sort()
    most = max((bisect_left(calls, at + 1) - first for first, at in enumerate(calls)), default=0)
    # a worker whose part is less than one call a second has one in some seconds
    assert most <= max(quota, sum(max(1.0, quota * part / sum(parts)) for part in parts))


def test_a_worker_that_takes_partitions_over_waits_a_space_first() -> None:
    pace = Pace(11)
    pace.own(1.0, NOW)
    assert pace.ready_at(NOW) == pytest.approx(NOW + 0.1)
    pace.own(0.0, NOW)
    assert pace.ready_at(NOW) == math.inf


def test_without_a_quota_nothing_waits() -> None:
    pace = Pace(None)
    pace.own(0.5, NOW)
    pace.take(NOW)
    assert pace.ready_at(NOW) == NOW


@given(st.integers(1, 1_000_000), st.integers(1, 64))
def test_daily_shares_add_up_to_the_quota(per_day: int, partitions: int) -> None:
    shared = [sum(daily_share(per_day, lane, partition, partitions) for partition in range(partitions)) for lane in (0.5, 0.3, 0.2)]
    assert per_day - 3 <= sum(shared) <= per_day


def test_a_day_is_one_in_utc() -> None:
    evening = datetime(2026, 3, 1, 23, 59, tzinfo=UTC)
    assert day_of(evening) == "2026-03-01"
    assert seconds_to_next_day(evening) == 60
    assert day_of(evening + timedelta(minutes=1)) == "2026-03-02"
