"""Benchmark 5: what an event costs after many, with a table that grows by a row each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import figures, throughput
from benchmarks.laboratory import Laboratory
from benchmarks.sizes import Sizes

TITLE = "Cost per event as state grows"
SOURCE = "bench.growing"
TARGET = 1.3
_SLICES = 20


def measure(lab: Laboratory, sizes: Sizes, say: Callable[[str], None]) -> dict[str, Any]:
    """Run our step over few and over many events, in turns."""
    say(f"writing {sizes.many_events:,} events")
    throughput.prepare(lab, SOURCE, sizes.many_events)
    runs: dict[str, list[dict[str, Any]]] = {"few": [], "many": []}
    counts = {"few": sizes.few_events, "many": sizes.many_events}
    with lab.broker_apart():
        for repetition in range(sizes.repetitions):
            for name in ("few", "many") if repetition % 2 == 0 else ("many", "few"):
                slice_events = counts[name] // _SLICES
                found = throughput.run_ours(lab, SOURCE, counts[name], with_seen=True, BENCH_SLICE=str(slice_events))
                runs[name].append(found)
                cost = f"{found['cpu_us_per_event']:.1f} µs CPU, {found['events_per_second']:,.0f}/s"
                say(f"{repetition + 1}/{sizes.repetitions} {counts[name]:,} events: {cost}")
    return {"runs": runs}


def describe(result: dict[str, Any]) -> str:
    """Return the section of the report."""
    few, many = result["runs"]["few"], result["runs"]["many"]
    counts = [runs[0]["events"] for runs in (few, many)]
    rows = [
        [
            f"{runs[0]['events']:,}",
            figures.figure([1e6 / run["events_per_second"] for run in runs]).show(figures.tenth),
            figures.figure([run["cpu_us_per_event"] for run in runs]).show(figures.tenth),
            figures.whole(figures.figure([run["rss_bytes"] for run in runs]).median / 2**20),
        ]
        for runs in (few, many)
    ]
    wall = figures.ratio([1 / run["events_per_second"] for run in many], [1 / run["events_per_second"] for run in few])
    cpu = figures.ratio([run["cpu_us_per_event"] for run in many], [run["cpu_us_per_event"] for run in few])
    last = figures.figure([_last_slice(run) / _first_slice(run) for run in many])
    per_row = [(more["rss_bytes"] - less["rss_bytes"]) / (more["events"] - less["events"]) for less, more in zip(few, many, strict=True)]
    verdict = figures.verdict(is_met=wall.median <= TARGET)
    return f"""\
The step of benchmark 1, with a second row for each event in a table that only grows and keeps the order of insertion, as the router's
table of known ids does: {counts[1]:,} events leave {counts[1]:,} rows in memory and in the changelog.

{figures.table(["events", "µs/event", "CPU µs/event", "peak RSS MB"], rows)}

| | measured | target | |
| --- | ---: | ---: | ---: |
| cost per event, {counts[1]:,} against {counts[0]:,} | {wall.show(figures.times)} | ≤ {figures.times(TARGET)} | {verdict} |
| the same, CPU | {cpu.show(figures.times)} | | |
| CPU of the last tenth of {counts[1]:,} against the first | {last.show(figures.times)} | | |

Memory grows by {figures.figure(per_row).show(figures.whole)} bytes for each event that is remembered.
"""


def _first_slice(run: dict[str, Any]) -> float:
    tenth = run["slices"][_SLICES // 10 - 1]
    return float(tenth["cpu_seconds"] / tenth["events"])


def _last_slice(run: dict[str, Any]) -> float:
    before, after = run["slices"][-1 - _SLICES // 10], run["slices"][-1]
    return float((after["cpu_seconds"] - before["cpu_seconds"]) / (after["events"] - before["events"]))
