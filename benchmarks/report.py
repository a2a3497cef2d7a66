"""docs/performance.md, from benchmarks/results/latest.json: whatever was measured last of each benchmark."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import email, figures, growth, latency, pipeline, profiling, push, recovery, sms, state, throughput
from benchmarks.figures import TO
from benchmarks.laboratory import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "latest.json"
REPORT = ROOT / "docs" / "performance.md"

Describe = Callable[[dict[str, Any]], str]
SECTIONS: dict[str, tuple[str, Describe]] = {
    "1": (throughput.TITLE, throughput.describe),
    "2": (pipeline.TITLE, pipeline.describe),
    "3": (recovery.TITLE, recovery.describe),
    "4": (latency.TITLE, latency.describe),
    "5": (growth.TITLE, growth.describe),
    "6": (state.TITLE, state.describe),
    "7": (email.TITLE, email.describe),
    "8": (sms.TITLE, sms.describe),
    "9": (push.TITLE, push.describe),
    "profile": (profiling.TITLE, profiling.describe),
}

_HEAD = f"""\
# Performance

Measured by `make bench` (`python -m benchmarks`), which writes this page; the raw figures are in
`benchmarks/results/latest.json`. Nothing here is an estimate unless it says so, and a target that was not met says so.

- Figures are `median [least{TO}most]` over the repetitions of one run. Programs that are compared take turns in rotating order, and a
  ratio is taken within each repetition: a machine that slows down slows all of them down.
- Absolute figures are this machine's. Compare ratios.
- Every run's output is read back and counted; an incomplete one ends the benchmark instead of becoming a figure.
"""


def load(path: Path | None) -> dict[str, Any]:
    """Return what was measured so far; nothing when there is no file."""
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path is not None and path.exists() else {}
    return found


def store(path: Path | None, key: str, entry: dict[str, Any]) -> None:
    """Replace what was measured of one benchmark; None keeps nothing."""
    if path is None:
        return
    found = load(path) | {key: entry}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(name)}: {json.dumps(found[name])}" for name in SECTIONS if name in found]  # a line each: thousands of samples
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def render(results: dict[str, Any]) -> str:
    """Return the page."""
    parts = [_HEAD]
    machines: list[dict[str, str]] = []
    for key, (title, describe) in SECTIONS.items():
        if key not in results:
            continue
        entry = results[key]
        if entry["machine"] not in machines:
            machines.append(entry["machine"])
        heading = f"{key}. {title}" if key.isdigit() else title
        where = f" on machine {machines.index(entry['machine']) + 1}" if len(machines) > 1 else ""
        parts.append(f"## {heading}\n\n{describe(entry['result']).rstrip()}\n\nMeasured with `{entry['command']}`{where}.\n")
    for place, machine in enumerate(machines, 1):
        name = "The machine" if len(machines) == 1 else f"Machine {place}"
        parts.append(f"## {name}\n\n{figures.table(['', ''], [[what, value] for what, value in machine.items()])}\n")
    return "\n".join(parts)
