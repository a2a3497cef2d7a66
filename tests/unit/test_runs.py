"""When an input that yields little but dead letters is halted."""

from __future__ import annotations

from datetime import UTC, datetime

from agents.ports import KnownSource
from schemas.errors import UnroutableError
from streams.runs import WINDOW_RECORDS, DeadRun
from streams.shard import dead_letter_headers


def commit(run: DeadRun, outcomes: str) -> str:
    """Handle records in one transaction, `x` for a dead letter; return those that were handled."""
    passage = run.begin()
    done = ""
    for outcome in outcomes:
        if outcome == "x" and not passage.may_set_aside():
            break
        if outcome == ".":
            passage.passed()
        done += outcome
    passage.committed()
    return done


def test_the_limit_in_a_row_is_set_aside_and_not_one_more() -> None:
    run = DeadRun(5)
    assert commit(run, "." + "x" * 9) == ".xxxxx"
    assert run.halted == "5 dead letters in a row"


def test_a_row_goes_on_over_transactions_and_a_good_record_ends_it() -> None:
    run = DeadRun(5)
    commit(run, "xxx")
    commit(run, "xx.xxxx")
    assert run.halted is None
    assert commit(run, "xx") == "x"
    assert run.halted


def test_shards_side_by_side_share_the_limit() -> None:
    run = DeadRun(5)
    passages = [run.begin(), run.begin()]
    allowed = sum(passages[number % 2].may_set_aside() for number in range(20))
    assert allowed == 5


def test_what_an_aborted_transaction_counted_is_taken_back() -> None:
    run = DeadRun(5)
    commit(run, "xx")
    for _ in range(10):
        passage = run.begin()
        assert passage.may_set_aside()
        assert passage.may_set_aside()
        passage.aborted()
    assert commit(run, "xxx") == "xxx"
    assert run.halted is None


def test_more_than_half_of_the_window_halts_though_no_row_is_long() -> None:
    run = DeadRun(50)
    commit(run, "x." * (WINDOW_RECORDS // 2))
    assert run.halted is None
    commit(run, "xxxx.")
    assert run.halted == f"{WINDOW_RECORDS // 2 + 1} of the last {WINDOW_RECORDS} records were dead letters"


def test_a_bad_beginning_of_few_records_is_not_judged_by_its_share() -> None:
    run = DeadRun(50)
    commit(run, "xxx." * 20)
    assert run.halted is None


def test_old_dead_letters_leave_the_window() -> None:
    run = DeadRun(500)
    for _ in range(20):
        commit(run, "x" * 450 + "." * 600)
    assert run.halted is None


def test_without_a_limit_nothing_is_halted() -> None:
    run = DeadRun(0)
    assert len(commit(run, "x" * 5_000)) == 5_000
    assert run.halted is None


AT = datetime(2026, 1, 1, tzinfo=UTC)


def headers_of(topic: str, *given: tuple[str, bytes]) -> dict[str, bytes]:
    source = KnownSource(topic=topic, partition=3, offset=70, at=AT, headers=given)
    return dict(dead_letter_headers(source, UnroutableError("names no user"), "ingest"))


def test_a_dead_letter_says_where_it_was_read() -> None:
    found = headers_of("payments")
    assert (found["topic"], found["partition"], found["offset"], found["generation"]) == (b"payments", b"3", b"70", b"0")
    assert found["timestamp"] == str(round(AT.timestamp() * 1000)).encode()


def test_a_parked_dead_letter_names_the_place_of_its_first_reading_and_keeps_its_generation() -> None:
    first = (("topic", b"payments"), ("partition", b"1"), ("offset", b"5"), ("timestamp", b"1767225600000"), ("generation", b"2"))
    found = headers_of("parked", *first)
    assert {name: found[name] for name, _ in first} == dict(first)


def test_a_producer_cannot_make_a_dead_letter_of_another_topic() -> None:
    found = headers_of("user-actions", ("topic", b"payments"), ("offset", b"5"))
    assert (found["topic"], found["offset"]) == (b"user-actions", b"70")
