"""From the reader to the shard: no batch is lost in silence, whatever an assignment interrupts, and no record counts twice."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import pytest
from faust.types import TP

from schemas.topics import Lane as LaneName
from schemas.topics import requests
from streams.deciding import DecidingShard
from streams.roles import Role
from streams.runner import Runner
from streams.runs import DeadRun
from streams.shard import Input, Lane, RecordSource, dead_letter_headers
from streams.topology import TOPOLOGY
from streams.transport.cluster import LEFT_EXIT_CODE
from streams.transport.reader import Batch, Reader
from streams.transport.records import Record
from tests.shards import Counting, tools

(STEP,) = (step for step in TOPOLOGY if step.role is Role.ROUTER)
TOPIC = requests(LaneName.NORMAL)
PARTITION = 1


@dataclass
class At:
    """A record of which only the offset is looked at."""

    place: int

    def offset(self) -> int:
        return self.place


@dataclass
class Stamped(At):
    """A record whose producer set its timestamp."""

    milliseconds: int

    def partition(self) -> int:
        return PARTITION

    def timestamp(self) -> tuple[int, int]:
        return 1, self.milliseconds

    def headers(self) -> None:
        return None


def runner() -> Runner:
    return Runner(tools(), group="g", steps={}, make_shard={})


def shard(reader: Counting) -> tuple[DecidingShard, Lane]:
    handles = Input(decode=lambda record: record, decide=lambda *_: cast("Any", None))
    lane = Lane(topic=TOPIC, urgency=1, handles=handles, reader=cast("Reader", reader), run=DeadRun(0))
    lane.begin(100)
    return DecidingShard(tools(), STEP, PARTITION, [lane]), lane


def batch(number: int, *offsets: int, end: int | None = None, epoch: int = 1) -> Batch:
    records = cast("list[Record]", [At(offset) for offset in offsets])
    return Batch(f"notify.x.{TOPIC}", PARTITION, epoch, number, records, end)


async def given_to_faust(found: Runner) -> list[Batch]:
    """Return what is handed on without anybody's doing anything more."""
    handed: list[Batch] = []

    async def pump() -> None:
        while True:
            handed.append(await found.next_batch())

    pumping = asyncio.create_task(pump())
    for _ in range(10):
        await asyncio.sleep(0)
    pumping.cancel()
    return handed


async def test_batches_wait_until_faust_has_resumed_since_it_then_clears_its_queues() -> None:
    found = runner()
    await found.start_reading()
    found._arrived([batch(0, 100)])
    pumping = asyncio.create_task(found.next_batch())
    for _ in range(10):
        await asyncio.sleep(0)
    assert not pumping.done()
    found.resume()
    assert (await pumping).number == 0


async def test_a_start_that_a_new_assignment_overtakes_reads_nothing_and_lets_nothing_pass() -> None:
    found = runner()

    async def overtaken(_wanted: set[TP]) -> Mapping[TP, int | None]:
        await found.drain()
        return {}

    found.committed = overtaken
    await found.start_reading()
    assert not found.is_recovered
    found.resume()
    found._arrived([batch(0, 100, epoch=found._epoch)])
    assert await given_to_faust(found) == []
    found.committed = None
    await found.start_reading()
    found.resume()
    found._arrived([batch(0, 100, epoch=found._epoch), batch(0, 100)])
    assert [each.epoch for each in await given_to_faust(found)] == [found._epoch], "the one of the assignment that is over is dropped"


async def test_records_that_librdkafka_hands_over_again_are_dropped_and_counted_as_finished() -> None:
    reader = Counting()
    made, lane = shard(reader)
    made.offer(batch(0, 100, 101, 102))
    made.offer(batch(1, 101, 102, 103, end=105))
    assert [record.offset() for record in lane.queue] == [100, 101, 102, 103]
    assert (reader.finished_records, lane.end_read) == (2, 105)
    assert made.tools.metrics.replayed.labels(TOPIC)._value.get() == 2


async def test_what_was_drained_is_read_again_from_the_watermark() -> None:
    made, lane = shard(Counting())
    made.offer(batch(0, 100, 101))
    lane.forget()
    lane.begin(100)
    made.offer(batch(0, 100, 101))
    assert [record.offset() for record in lane.queue] == [100, 101]


def test_a_leader_whose_metadata_lacks_a_topic_leaves_instead_of_assigning_nothing_to_anybody() -> None:
    code = (
        "from types import SimpleNamespace\n"
        "from streams.transport.faust_parts import KnowingAssignor\n"
        "cluster = SimpleNamespace(partitions_for_topic=lambda topic: {0, 1} if topic == 'known' else None)\n"
        "members = {'a': SimpleNamespace(subscription=['known', 'unknown'])}\n"
        "KnowingAssignor.assign(object.__new__(KnowingAssignor), cluster, members)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == LEFT_EXIT_CODE
    assert "2 topics while the metadata lacks 1, such as unknown" in done.stderr


def test_a_batch_that_is_lost_on_its_way_ends_the_worker_before_the_next_one_hides_it() -> None:
    code = (
        "from tests.unit.test_batches import *\n"
        "made, lane = shard(Counting())\n"
        "made.offer(batch(0, 100))\n"
        "made.offer(batch(2, end=140))\n"
        "print('went on')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (LEFT_EXIT_CODE, "")
    assert "batch 2 came, and batch 1 was lost on its way" in done.stderr


@pytest.mark.parametrize(
    ("milliseconds", "year"), [(-1, 1970), (-(10**18), 1970), (1_767_225_600_000, 2026), (10**15, 9999), (10**18, 9999)]
)
def test_a_timestamp_that_no_clock_shows_ends_nothing(milliseconds: int, year: int) -> None:
    source = RecordSource(cast("Record", Stamped(7, milliseconds)), TOPIC)
    assert source.at.year == year
    assert dict(dead_letter_headers(source, ValueError(), "router"))["topic"] == TOPIC.encode()
