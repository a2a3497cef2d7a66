"""Since when transactions are open, from one look at the broker to the next."""

from streams.health import still_open

HERE, THERE = ("changelog", 0), ("changelog", 1)


def test_what_stays_open_at_the_same_offset_is_known_since_it_was_seen_first() -> None:
    first = still_open({}, {HERE: 7}, 100.0)
    assert first == {HERE: (7, 100.0)}
    assert still_open(first, {HERE: 7, THERE: 3}, 115.0) == {HERE: (7, 100.0), THERE: (3, 115.0)}


def test_a_later_transaction_is_another_and_what_has_ended_is_forgotten() -> None:
    before = {HERE: (7, 100.0), THERE: (3, 100.0)}
    assert still_open(before, {HERE: 9}, 115.0) == {HERE: (9, 115.0)}
