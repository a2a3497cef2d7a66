"""The room that less urgent inputs take: as much as urgent ones do not feel."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from streams.room import MOST_RESTS, URGENT_SECONDS, Room

URGENT, BULK = 1, 4


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def made(*urgent: int) -> tuple[Room, Clock]:
    clock = Clock()
    return Room(urgent, clock=clock), clock


def work(room: Room, clock: Clock, seconds: float, urgency: int = BULK) -> None:
    with room.taken(urgency):
        clock.now += seconds


def settle(room: Room, *, seconds: float = 0.010, times: int = 100) -> None:
    for _ in range(times):
        room.done(URGENT, seconds)


def test_nobody_rests_while_nothing_urgent_comes() -> None:
    room, clock = made(URGENT)
    work(room, clock, 0.02)
    assert room.wait_seconds(BULK) == 0


def test_after_work_all_shards_rest_a_multiple_of_it_and_what_is_urgent_does_not() -> None:
    room, clock = made(URGENT)
    room.offered(URGENT)
    work(room, clock, 0.02)
    assert room.wait_seconds(BULK) == pytest.approx(room.rests * 0.02)
    assert room.rests > 0
    assert room.wait_seconds(URGENT) == room.wait_seconds(0) == 0
    clock.now += URGENT_SECONDS
    assert room.wait_seconds(BULK) == 0


def test_one_shard_at_a_time_works_on_a_backlog() -> None:
    room, clock = made(URGENT)
    room.offered(URGENT)
    with room.taken(BULK):
        clock.now += 0.01
        assert room.wait_seconds(BULK) > 0
    with room.taken(URGENT):
        pass
    assert room.wait_seconds(BULK) > 0, "urgent work changes nothing"


def test_what_took_long_for_other_reasons_than_load_makes_no_long_rest() -> None:
    """A registry or a broker that was away for seconds."""
    room, clock = made(URGENT)
    room.offered(URGENT)
    work(room, clock, 15.0)
    room.offered(URGENT)
    assert 0 < room.wait_seconds(BULK) < 1


def test_what_urgent_transactions_do_not_feel_needs_no_rest() -> None:
    room, clock = made(URGENT)
    settle(room)
    room.offered(URGENT)
    assert room.rests == 0
    work(room, clock, 0.02)
    assert room.wait_seconds(BULK) == 0
    with room.taken(BULK):
        assert room.wait_seconds(BULK) == 0, "nor one at a time"


def test_slow_urgent_transactions_make_the_rests_longer_up_to_a_limit_and_fast_ones_shorter_again() -> None:
    room, _ = made(URGENT)
    settle(room)
    room.done(URGENT, 0.100)
    first = room.rests
    assert first > 0
    for _ in range(100):
        room.done(URGENT, 0.100)
    assert room.rests == MOST_RESTS
    settle(room, times=300)
    assert room.rests == 0


def test_what_became_slow_for_good_is_taken_for_normal_after_a_while() -> None:
    """A cluster that moved farther away, say: the backlog must not rest for ever."""
    room, _ = made(URGENT)
    settle(room, seconds=0.010)
    settle(room, seconds=0.060, times=100)
    assert room.rests == MOST_RESTS
    settle(room, seconds=0.060, times=2_000)
    assert room.rests == 0


def test_an_input_that_rests_itself_does_not_say_that_the_others_are_in_its_way() -> None:
    room, _ = made(URGENT, 3)
    settle(room)
    room.offered(URGENT)
    for _ in range(10):
        room.done(3, 1.0)
    assert room.rests == 0


def test_a_step_whose_inputs_are_alike_never_rests() -> None:
    room, clock = made()
    room.offered(0)
    room.done(0, 5.0)
    work(room, clock, 0.5)
    assert room.wait_seconds(BULK) == room.rests == 0


def test_each_urgent_input_is_protected_from_those_behind_it_only() -> None:
    room, clock = made(URGENT, 3)
    room.offered(3)
    work(room, clock, 0.02)
    assert room.wait_seconds(BULK) > 0
    assert room.wait_seconds(2) == 0
