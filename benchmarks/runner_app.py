"""The benchmarks' step on the product's own runner, with every guarantee on.

The body is that of `peers/body.py`; preferences come from a table that was recovered from its changelog and are decoded
at each look-up. Each event changes one row, the count of its user's events; with BENCH_SEEN it also adds one to a table that
only grows, as the router's table of known ids does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
from prometheus_client import CollectorRegistry

from agents.ports import Effects, Output, Row, Source, State
from benchmarks.peers.body import Meter, handle
from benchmarks.sampler import Sampler
from schemas import topics
from schemas.codec import Codec
from streams.app import Plan, Worker, build_app
from streams.roles import Role
from streams.settings import WORKER_NEEDS, Settings
from streams.shard import Input, Tools
from streams.topics import DEAD_MAX_BYTES, TopicSpec
from streams.topology import Step
from streams.transport.records import Record

ROLE = Role.SIGNALS
PREFERENCES_TOPIC = "bench.preferences"
PREFERENCES, COUNTS, SEEN = "preferences", "counts", "seen"
_STATM_PAGES_RESIDENT = 1


def step_of(run: str, source: str, *, with_seen: bool = False) -> Step:
    """Return the step of one run: its own changelogs and output, and so its own watermarks."""
    return Step(
        name=run,
        role=ROLE,
        reads=(source,),
        tables=((PREFERENCES, PREFERENCES_TOPIC), (COUNTS, None), *(((SEEN, None),) if with_seen else ())),
        aged=(SEEN,) if with_seen else (),
        writes=(output_of(run),),
    )


def output_of(run: str) -> str:
    """Return the output topic of a run."""
    return f"bench.out.{run}"


def specs_of(step: Step) -> tuple[TopicSpec, ...]:
    """Return the topics of a step."""
    return (
        *(TopicSpec(name=name) for name in (*step.reads, *step.writes)),
        TopicSpec(name=topics.DEAD, max_message_bytes=DEAD_MAX_BYTES),
        *(TopicSpec(name=name, retention_seconds=None) for name in dict.fromkeys(step.changelogs().values())),
    )


class Rows:
    """A table of preferences as the body wants it: rows stay encoded until they are looked up."""

    __slots__ = ("_rows",)

    def __init__(self, rows: Mapping[bytes, bytes]) -> None:
        self._rows = rows

    def __getitem__(self, user: str, /) -> dict[str, Any]:
        found: dict[str, Any] = orjson.loads(self._rows[user.encode()])
        return found


class Progress:
    """Counts the events of committed transactions; ends the process when they are all.

    A shard has one transaction at a time, so what was decided of its partition since its last commit is what it commits. An
    aborted transaction would be counted twice; the outputs are counted afterwards, and would be too few.
    """

    def __init__(self, meter: Meter, sampler: Sampler | None, slice_events: int) -> None:
        self._meter = meter
        self._sampler = sampler
        self._slice_events = slice_events
        self._slices: list[dict[str, float]] = []
        self._decided = [0] * int(os.environ["BENCH_PARTITIONS"])
        self._committed = 0
        self._has_begun = False
        self.registry: CollectorRegistry | None = None

    def decided(self, partition: int) -> None:
        """Count an event whose effects join the open transaction of its shard."""
        if not self._has_begun:
            self._has_begun = True
            self._meter.begin()
            if self._sampler is not None:
                self._sampler.start()
        self._decided[partition] += 1

    def passed(self, point: str) -> None:
        """Follow the transaction of the shard whose task, `<step>-<partition>`, runs."""
        if point == "after commit":
            task = asyncio.current_task()
            assert task is not None
            partition = int(task.get_name().rpartition("-")[2])
            count, self._decided[partition] = self._decided[partition], 0
            self._committed += count
            if self._slice_events and self._committed >= self._slice_events * (len(self._slices) + 1):
                wall_seconds, cpu_seconds = self._meter.spent()
                self._slices.append(
                    {"events": self._committed, "wall_seconds": wall_seconds, "cpu_seconds": cpu_seconds, "rss_bytes": resident_bytes()}
                )
            if self._meter.add(count):
                profile = self._sampler.stop() if self._sampler is not None else None
                self._meter.done(slices=self._slices, profile=profile, **self._transactions())

    def _transactions(self) -> dict[str, float]:
        assert self.registry is not None
        found = {
            name: self.registry.get_sample_value(f"notify_{name}") or 0.0
            for name in ("commit_seconds_count", "commit_seconds_sum", "batch_records_sum")
        }
        count = found["commit_seconds_count"] or 1.0
        return {"records_per_transaction": found["batch_records_sum"] / count, "commit_seconds": found["commit_seconds_sum"] / count}


def resident_bytes() -> int:
    """Return this process's memory at the moment; 0 where /proc does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[_STATM_PAGES_RESIDENT])
    except OSError:
        return 0
    return pages * resource.getpagesize()


def make() -> Worker:
    """Return the app that the environment asks for."""
    run, source = os.environ["BENCH_RUN"], os.environ["BENCH_SOURCE"]
    with_seen = bool(os.environ.get("BENCH_SEEN"))
    step = step_of(run, source, with_seen=with_seen)
    output = output_of(run)
    sampler = Sampler() if os.environ.get("BENCH_PROFILE") else None
    progress = Progress(Meter(), sampler, int(os.environ.get("BENCH_SLICE", "0")))

    def decode(record: Record) -> bytes:
        return record.value() or b""

    def decide(raw: bytes, source: Source, state: State) -> Effects:
        progress.decided(source.partition)
        key, value = handle(raw, Rows(state[PREFERENCES]))
        count = int(state[COUNTS].get(key, b"0")) + 1
        rows = [Row(COUNTS, key, b"%d" % count)]
        if with_seen:
            rows.append(Row(SEEN, value[6:42], b"%d" % source.offset))
        return Effects([Output(output, key, value)], rows)

    def inputs(_step: Step, _codec: Codec) -> Mapping[str, Input]:
        return {source: Input(decode=decode, decide=decide)}

    def tune(tools: Tools) -> None:
        tools.fault = progress.passed
        progress.registry = tools.metrics.registry

    settings = Settings.from_env({k: v for k, v in os.environ.items() if k.startswith("NOTIFY_")}, needs=WORKER_NEEDS)
    return build_app(settings, Plan(steps=(step,), topics=specs_of(step), inputs=inputs, tune=tune))


if __name__ == "__main__":
    logging.basicConfig(level="WARNING")
    make().main()
