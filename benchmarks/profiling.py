"""Where the time of benchmark 1 goes, on this runner."""

from __future__ import annotations

import linecache
from collections import Counter
from collections.abc import Callable
from typing import Any

from benchmarks import figures, throughput
from benchmarks.laboratory import ROOT, Laboratory
from benchmarks.sizes import Sizes

TITLE = "Where the time goes"
SOURCE = "bench.profiled"
_FUNCTIONS, _LINES = 14, 14
_LINE_CHARACTERS = 90
_LINES_KEPT = 100
_GENERATED = "<string>"


def measure(lab: Laboratory, sizes: Sizes, say: Callable[[str], None]) -> dict[str, Any]:
    """Run our step under the sampler."""
    throughput.prepare(lab, SOURCE, sizes.events)
    with lab.broker_apart():
        found = throughput.run_ours(lab, SOURCE, sizes.events, BENCH_PROFILE="1")
    lines = found["profile"]["lines"]
    found["profile"]["lines"] = [*lines[:_LINES_KEPT], ["", "everything else", 0, sum(seconds for *_, seconds in lines[_LINES_KEPT:])]]
    # kept with the figures: the page is written again when the code has moved on
    found["profile"]["texts"] = {f"{file}:{line}": _source(file, line) for file, _function, line, _seconds in found["profile"]["lines"]}
    say(f"{found['cpu_us_per_event']:.1f} CPU µs/event while sampled")
    return found


def describe(result: dict[str, Any]) -> str:
    """Return the section of the report."""
    events = result["events"]
    profile = result["profile"]
    functions: Counter[tuple[str, str]] = Counter()
    for file, function, _line, seconds in profile["lines"]:
        functions[(file, "" if file == _GENERATED else function)] += seconds
    total = sum(functions.values()) or 1.0
    scale = profile["main_seconds"] / total / events * 1e6

    def share(seconds: float) -> list[str]:
        return [figures.hundredth(seconds * scale), f"{seconds / total:.1%}"]

    threads = [
        [name, figures.hundredth(seconds / events * 1e6), f"{seconds / sum(profile['threads'].values()):.1%}"]
        for name, seconds in sorted(profile["threads"].items(), key=lambda item: -item[1])
    ]
    by_function = [[_name(*place), *share(seconds)] for place, seconds in functions.most_common(_FUNCTIONS)]
    by_line = [
        [f"`{profile['texts'].get(f'{file}:{line}', '?')}`", f"{file}:{line}", *share(seconds)]
        for file, _function, line, seconds in sorted(profile["lines"], key=lambda row: -row[3])
        if file and file != _GENERATED
    ][:_LINES]
    return f"""\
The runner of benchmark 1, once more, under a sampler (`benchmarks/sampler.py`): {result["cpu_us_per_event"]:.1f} CPU µs an event,
{result["records_per_transaction"]:.0f} records a transaction, {result["commit_seconds"] * 1000:.1f} ms a commit, most of it
waiting for the broker while other shards decide.

{figures.table(["threads", "CPU µs/event", "share"], threads)}

The event loop's thread, by function; what C code does for a line is the line's:

{figures.table(["function", "CPU µs/event", "share"], by_function)}

And by line:

{figures.table(["line", "where", "CPU µs/event", "share"], by_line)}
"""


def _name(file: str, function: str) -> str:
    if file == _GENERATED:
        return "constructors of dataclasses (Source, Output, Row, Effects)"
    if not file:
        return function
    return f"`{function.replace('<locals>.', '')}` in {file}"


def _source(file: str, line: int) -> str:
    text = linecache.getline(str(ROOT / file), line).strip() or "?"
    shown = text if len(text) <= _LINE_CHARACTERS else text[: _LINE_CHARACTERS - 1] + "…"
    return shown.replace("|", "\\|").replace("`", "'")
