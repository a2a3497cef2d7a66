"""The cures of the transport, each on a real broker with real worker processes. The docstrings say what stock Faust did."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from confluent_kafka import Producer

from streams.embedded.stack import Stack
from streams.transport.admin import _offset_bounds, offset_bounds, open_ends
from streams.transport.records import Record
from streams.transport.writer import AbortedError, RepeatingWriter, Writer
from tests.harness import System, system, wait_for
from tests.tally_app import OUT, STEP, TOPICS

MODULE = "tests.tally_app"
ROLE = "signals"
COUNTS = STEP.changelogs()["counts"]


@pytest.fixture
def tally(stack: Stack, tmp_path: Path) -> Iterator[System]:
    with system(stack, tmp_path, TOPICS) as made:
        yield made


def text(message: Record) -> bytes:
    return message.value() or b""


def numbered(count: int, *, keys: int = 50, first: int = 0, prefix: bytes = b"") -> list[tuple[bytes, bytes]]:
    return [(b"user-%d" % (i % keys), b"%s%d" % (prefix, i)) for i in range(first, first + count)]


def audit(tally: System, sent: list[tuple[bytes, bytes]]) -> None:
    """Assert that each record came out exactly once, in order by key, and that the table is the sum."""
    expected = Counter(key for key, _ in sent)
    out = tally.read(OUT)
    values = Counter(text(message).rpartition(b":")[0] for message in out)
    lost = {value for _, value in sent} - set(values)
    doubled = {value: n for value, n in values.items() if n > 1}
    assert not lost, f"{len(lost)} lost: {sorted(lost)[:5]}"
    assert not doubled, f"{len(doubled)} doubled: {dict(list(doubled.items())[:5])}"
    sequences: dict[bytes, list[int]] = defaultdict(list)
    for message in out:
        sequences[message.key() or b""].append(int(text(message).rpartition(b":")[2].rstrip(b".")))
    assert all(found == list(range(1, expected[key] + 1)) for key, found in sequences.items())
    assert {key: int(value) for key, value in tally.table(f"{STEP.role}.{STEP.name}", "counts").items()} == dict(expected)


def await_out(tally: System, count: int, *, seconds: float = 60) -> None:
    wait_for(lambda: tally.count(OUT) >= count, seconds=seconds, what=f"{count} records in {OUT}")


def test_records_come_out_once_and_the_table_is_their_sum(tally: System) -> None:
    sent = numbered(5_000)
    tally.produce("tally.in", sent)
    worker = tally.start(ROLE, module=MODULE)
    tally.await_ready(worker)
    await_out(tally, len(sent))
    audit(tally, sent)
    # what follows the last record is a commit marker: lag by record would stay above 0 for ever
    wait_for(lambda: worker.metric("notify_records_total") and not worker.metric("notify_lag_records"), seconds=15, what="no lag")


def test_bad_records_are_set_aside_and_their_neighbours_go_on(tally: System) -> None:
    """Stock Faust lost the record whose agent raised, and stopped `take()` for ever at an undecodable one."""
    good = numbered(300)
    bad = [(b"user-1", b"bug 1"), (b"user-2", b"\xff\x00"), (b"user-3", None), (b"user-4", b"large")]
    tally.produce("tally.in", [*good[:100], *bad, *good[100:]])
    tally.await_ready(tally.start(ROLE, module=MODULE))
    await_out(tally, len(good))
    audit(tally, good)
    dead = tally.read("dead")
    reasons = {(message.value() or b"")[:5]: dict(message.headers() or ())["error"] for message in dead}
    assert reasons == {b"bug 1": b"internal", b"\xff\x00": b"undecodable", b"": b"undecodable", b"large": b"too_large"}
    assert {message.key() for message in dead} == {key for key, _ in bad}


def test_an_output_that_the_broker_refuses_for_its_size_dead_letters_its_input_alone(tally: System) -> None:
    """Stock Faust stopped the whole worker (`send_soon`) or committed the input without its output (`send`)."""
    good = numbered(200)
    tally.produce("tally.in", [*good[:77], (b"user-4", b"large"), *good[77:]])
    tally.await_ready(tally.start(ROLE, module=MODULE, TALLY_BLIND="1"))
    await_out(tally, len(good))
    audit(tally, good)
    assert [message.value() for message in tally.read("dead")] == [b"large"]


@pytest.mark.parametrize("point", ["fenced:2", "decided:3", "before commit:3", "after commit:3"])
def test_a_worker_killed_at_any_step_of_a_transaction_loses_and_doubles_nothing(tally: System, point: str) -> None:
    """Stock Faust replayed all that was acked since its last commit: 493 to 1,318 duplicates of 20,000."""
    sent = numbered(4_000)
    tally.produce("tally.in", sent)
    worker = tally.start(ROLE, module=MODULE, TALLY_FAULT=point)
    wait_for(lambda: worker.exits, seconds=60, what="the fault")
    assert worker.exits[0] == -signal.SIGKILL
    worker.env = {k: v for k, v in worker.env.items() if k != "TALLY_FAULT"}
    await_out(tally, len(sent))
    audit(tally, sent)


def test_a_second_worker_joins_and_leaves_under_load(tally: System) -> None:
    """Stock Faust doubled 147 of 10,000 records in a graceful hand-over, 2 with a commit before the revocation."""
    sent = numbered(8_000)
    first = tally.start(ROLE, name="a", module=MODULE)
    tally.await_ready(first)
    tally.produce("tally.in", sent[:2_000])
    second = tally.start(ROLE, name="b", module=MODULE, is_static=False)
    tally.produce("tally.in", sent[2_000:4_000])
    tally.await_ready(first, second)
    tally.produce("tally.in", sent[4_000:6_000])
    wait_for(lambda: second.metric("notify_records_total") > 0, seconds=30, what="the second worker works")
    tally.stop(second)
    tally.produce("tally.in", sent[6_000:])
    await_out(tally, len(sent))
    audit(tally, sent)


def test_a_frozen_owner_that_wakes_after_the_hand_over_changes_nothing(tally: System) -> None:
    """Without fencing (outputs acknowledged, then rows) a woken owner wrote stale rows over its successor's."""
    sent = numbered(6_000)
    first = tally.start(ROLE, name="a", module=MODULE, is_static=False)
    second = tally.start(ROLE, name="b", module=MODULE, is_static=False)
    tally.await_ready(first, second)
    tally.produce("tally.in", sent[:2_000])
    first.signal(signal.SIGSTOP)
    tally.produce("tally.in", sent[2_000:4_000])
    # the survivor owns everything once the session time-out has passed
    await_out(tally, 4_000, seconds=60)
    first.signal(signal.SIGCONT)
    tally.produce("tally.in", sent[4_000:])
    await_out(tally, len(sent))
    tally.await_ready(first, second)
    audit(tally, sent)


async def _kill_and_restart(stack: Stack) -> None:
    await stack.broker.kill()
    await stack.broker.start()


def test_a_worker_stays_in_its_group_however_long_aiokafka_fetches_nothing(tally: System) -> None:
    """After `broker_max_poll_interval`, 1,000 s by default, it left, and never joined again."""
    worker = tally.start(ROLE, module=MODULE, TALLY_POLL_SECONDS="2")
    tally.await_ready(worker)
    ready = time.monotonic()
    wait_for(lambda: time.monotonic() > ready + 5, seconds=10, what="the moment after which it would have left")
    sent = numbered(200)
    tally.produce("tally.in", sent)
    await_out(tally, len(sent))
    audit(tally, sent)
    assert worker.log_text().count("Revoking previously assigned partitions") == 1  # at its start, when it had none


def test_a_worker_outlives_the_broker(tally: System, stack: Stack) -> None:
    """Every variant recovered; stock Faust's producer, which is not idempotent, doubled 22."""
    sent = numbered(6_000)
    worker = tally.start(ROLE, module=MODULE)
    tally.await_ready(worker)
    tally.produce("tally.in", sent[:3_000])
    asyncio.run(_kill_and_restart(stack))
    tally.produce("tally.in", sent[3_000:])
    await_out(tally, len(sent), seconds=90)
    audit(tally, sent)


def test_a_transaction_that_timed_out_while_the_only_broker_was_away_stays_undone(tally: System, stack: Stack) -> None:
    """Kafka 4.3 and 4.4 may leave its abort marker out, and the next commit then makes it visible (ADR 12)."""
    sent = numbered(2_000)
    tally.produce("tally.in", sent)
    # the worker dies with a transaction open, and the broker with it
    worker = tally.start(ROLE, module=MODULE, TALLY_FAULT="before commit:3", TALLY_SENT="1", TALLY_TIMEOUT_MS="3000")
    wait_for(lambda: worker.exits, seconds=60, what="the fault")
    asyncio.run(stack.broker.kill())
    worker.env = {k: v for k, v in worker.env.items() if k != "TALLY_FAULT"}
    open_until = time.monotonic() + 4
    wait_for(lambda: time.monotonic() > open_until, seconds=6, what="the transaction's time is over")
    asyncio.run(stack.broker.start())
    await_out(tally, len(sent), seconds=90)
    audit(tally, sent)


def test_a_transaction_that_the_broker_does_not_end_is_shown(tally: System) -> None:
    tally.produce("tally.in", numbered(100))
    worker = tally.start(ROLE, module=MODULE, TALLY_TIMEOUT_MS="1000")
    await_out(tally, 100)
    place = (tally.topic(COUNTS), 0)
    assert open_ends(tally.cluster, [place]) == {}
    # of somebody else: of the worker's own producer the broker would know
    forgotten = Producer({"bootstrap.servers": tally.stack.kafka, "transactional.id": tally.name})
    forgotten.init_transactions(30)
    forgotten.begin_transaction()
    forgotten.produce(place[0], b"1", b"user-x", place[1])
    assert forgotten.flush(30) == 0
    assert open_ends(tally.cluster, [place]).keys() == {place}
    wait_for(lambda: worker.metric("notify_open_transactions") == 1, seconds=30, what="the gauge")
    assert f"transaction.open topic={place[0]} partition=0" in worker.log_text()
    forgotten.abort_transaction(30)
    wait_for(lambda: worker.metric("notify_open_transactions") == 0, seconds=30, what="the gauge at rest")
    assert open_ends(tally.cluster, [place]) == {}


def test_recovery_ends_at_a_position_though_the_changelog_ends_in_markers(tally: System) -> None:
    """Stock recovery waits for the record before the end offset; after a transaction that is a marker, and it hangs."""
    sent = numbered(500)
    tally.produce("tally.in", sent)
    worker = tally.start(ROLE, module=MODULE)
    await_out(tally, len(sent))
    worker.kill()
    wait_for(lambda: worker.exits, seconds=10, what="its end")
    tally.await_ready(worker)
    tally.produce("tally.in", numbered(500, first=500))
    await_out(tally, 1_000)
    audit(tally, numbered(1_000))


def test_no_question_for_offsets_stays_without_an_answer(tally: System) -> None:
    # of clients that did not know the leaders a quarter waited until their time was up, and one in thousands crashed the process
    places = [(tally.topic(topic), partition) for topic in (OUT, *STEP.reads) for partition in range(tally.partitions)]
    offset_bounds(tally.cluster, places)  # the leaders of topics made a moment ago are in office
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: _offset_bounds(tally.cluster, places), range(200)))  # at once: nothing is asked again
    assert all(answer == dict.fromkeys(places, (0, 0)) for answer in answers)


def test_a_repeating_writer_makes_an_aborted_transaction_again_and_nothing_twice(tally: System) -> None:
    """What a provider answered cannot be decided again: without a repetition the sender had to leave, with its calls open."""
    sent = [(key, value + b":1") for key, value in numbered(300)]
    for kind in (Writer, RepeatingWriter):
        writer = kind(tally.cluster, transactional_id=kind.__name__, max_message_bytes=1_000_000)
        writer.acquire()
        assert writer._producer is not None
        writer.begin()
        for number, (key, value) in enumerate(sent):
            writer.produce(tally.topic(OUT), value, key)
            if number == 200:
                writer._producer.purge()  # as if their time were up: the transaction can no longer be committed
        if kind is RepeatingWriter:
            writer.commit()
        else:
            with pytest.raises(AbortedError):
                writer.commit()
            assert tally.count(OUT) == 0
    assert sorted((message.key(), message.value()) for message in tally.read(OUT)) == sorted(sent)
    writer.begin()
    writer.produce(tally.topic(OUT), b"next:1", b"user-1")
    writer.commit()
    assert [text(message) for message in tally.read(OUT)].count(b"next:1") == 1
    assert tally.count(OUT) == len(sent) + 1


def test_an_urgent_record_overtakes_a_backlog(tally: System) -> None:
    """Stock Faust, with both topics in one worker, delayed the urgent one by 11 s."""
    tally.produce("tally.in", numbered(300, prefix=b"slow"))
    worker = tally.start(ROLE, module=MODULE)
    wait_for(lambda: tally.count(OUT) > 5, seconds=60, what="the backlog begins")
    tally.produce("tally.urgent", [(b"user-%d" % i, b"urgent-%d" % i) for i in range(8)])
    await_out(tally, 308)
    # all partitions share one event loop, so the order in time is that of the Kafka timestamps
    order = sorted(tally.read(OUT), key=lambda message: message.timestamp()[1])
    places = [i for i, message in enumerate(order) if text(message).startswith(b"urgent")]
    assert len(places) == 8
    assert places[-1] < 200, places
    assert worker.exits == []


def test_records_covered_by_the_watermark_are_counted_not_repeated(tally: System) -> None:
    """Stock Faust replays whatever the group's offsets say."""
    sent = numbered(400)
    tally.produce("tally.in", sent)
    worker = tally.start(ROLE, module=MODULE, is_static=False)
    await_out(tally, len(sent))
    tally.stop(worker)
    tally.delete_groups([ROLE])
    again = tally.start(ROLE, name="b", module=MODULE, is_static=False)
    tally.await_ready(again)
    tally.produce("tally.in", numbered(10, first=400))
    await_out(tally, 410)
    audit(tally, numbered(410))
