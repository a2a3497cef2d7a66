"""Records that Kafka deleted before they were read: the one way to lose any, and never a silent one."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin._listoffsets import OffsetSpec

from streams.embedded.stack import Stack
from streams.transport.admin import learn_leaders
from tests.harness import System, WorkerProcess, system, wait_for
from tests.tally_app import OUT, STEP, TOPICS

INPUT = "tally.in"
KEPT = 5  # of each partition


@pytest.fixture
def tally(stack: Stack, tmp_path: Path) -> Iterator[System]:
    with system(stack, tmp_path, TOPICS) as made:
        yield made


def records(run: str, count: int) -> list[tuple[bytes, bytes]]:
    return [(b"user-%d" % (number % 50), f"{run}-{number}".encode()) for number in range(count)]


def delete_all_but_the_newest(made: System) -> None:
    """Delete the older records of the input, as retention does."""
    newest = {TopicPartition(made.topic(INPUT), number): OffsetSpec.latest() for number in range(made.partitions)}  # type: ignore[no-untyped-call]  # upstream has no types here
    learn_leaders(made.admin, [made.topic(INPUT)])
    ends = {place: found.result().offset for place, found in made.admin.list_offsets(newest).items()}
    wanted = [TopicPartition(place.topic, place.partition, end - KEPT) for place, end in ends.items()]
    for deleted in made.admin.delete_records(wanted).values():
        deleted.result()


def told(made: System) -> set[bytes]:
    """Return the values that were read and passed on."""
    return {record.value() or b"" for record in made.read(OUT)}


def await_the_gap(made: System, worker: WorkerProcess, *, before: int, after: int) -> None:
    """Check that a worker that was `before` and finds `after` more records, most of them deleted, counts what is missing."""
    kept = KEPT * made.partitions
    wait_for(lambda: made.count(OUT) >= before + kept, seconds=60, what="what is left was read")

    def lost() -> float:
        return worker.metric("notify_expired_positions_total", topic=INPUT)

    # a frozen worker may have been sent a few before they were deleted
    wait_for(lambda: made.count(OUT) - before + lost() == after, seconds=20, what="each was read, or counted as lost")
    assert lost() > 0
    status, answer = worker.get("/health/ready")
    assert (status, json.loads(answer)["details"]["positionsExpired"]) == (503, [INPUT])
    assert worker.get("/health/live")[0] == 200
    assert "position.expired" in worker.log_text()


def test_what_expired_while_the_worker_was_stopped_is_counted_and_makes_it_not_ready(tally: System) -> None:
    worker = tally.start(STEP.role, module="tests.tally_app")
    tally.await_ready(worker)
    tally.produce(INPUT, records("before", 200))
    wait_for(lambda: tally.count(OUT) == 200, seconds=30, what="the first ones read")
    tally.stop(worker)
    tally.produce(INPUT, records("gone", 400))
    delete_all_but_the_newest(tally)
    worker = tally.start(STEP.role, module="tests.tally_app")
    await_the_gap(tally, worker, before=200, after=400)
    # once seen to and started again it is as if nothing had been
    tally.stop(worker)
    worker = tally.start(STEP.role, module="tests.tally_app")
    tally.await_ready(worker)
    tally.produce(INPUT, records("later", 20))
    wait_for(lambda: len({value for value in told(tally) if value.startswith(b"later")}) == 20, seconds=30, what="later ones")


def test_what_expires_before_a_running_worker_reads_it_is_not_passed_over_in_silence(tally: System) -> None:
    worker = tally.start(STEP.role, module="tests.tally_app")
    tally.await_ready(worker)
    tally.produce(INPUT, records("before", 200))
    wait_for(lambda: tally.count(OUT) == 200, seconds=30, what="the first ones read")
    worker.signal(signal.SIGSTOP)
    tally.produce(INPUT, records("gone", 400))
    delete_all_but_the_newest(tally)
    worker.signal(signal.SIGCONT)
    wait_for(lambda: worker.exits, seconds=60, what="its end")
    assert worker.exits[0] == 75
    assert "what is next to be read is gone" in worker.log_text()
    await_the_gap(tally, worker, before=200, after=400)
