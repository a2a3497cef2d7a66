"""Benchmark 3: a table of preferences from its changelog, by this runner and by stock Faust; memory by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from benchmarks import figures
from benchmarks.laboratory import PYTHON, BenchmarkError, Laboratory, in_cluster
from benchmarks.runner_app import PREFERENCES
from benchmarks.sizes import Sizes
from benchmarks.throughput import free_port
from schemas.codec import Codec, pack
from schemas.messages import Contact, UserPreferences
from schemas.sealed import seal
from streams.roles import Role
from streams.topics import TopicSpec

TITLE = "Recovery"
TARGET = 25.0
MANY, FEW = "bench.many-preferences", "bench.few-preferences"
_KEY = bytes(range(32))
_SCHEMA_ID = 1
_RUN_SECONDS = 600.0


def rows(count: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield key and value of `count` rows, as the router writes them."""
    codec = Codec({"UserPreferences": _SCHEMA_ID}, {})
    at = datetime(2026, 1, 1, tzinfo=UTC)
    for number in range(count):
        user = f"user-{number:08d}"
        contact = pack(Contact(name=f"Name {number}", email=f"{user}@example.com"))
        preferences = UserPreferences(
            user_id=user,
            version=1,
            sealed=seal(_KEY, contact, user_id=user, purpose="contact"),
            locale="en-GB",
            time_zone="Europe/London",
            categories={"payments": {"email": True, "in_app": True}},
            updated_at=at,
        )
        yield user.encode(), codec.encode(preferences)


def measure(lab: Laboratory, sizes: Sizes, say: Callable[[str], None]) -> dict[str, Any]:
    """Recover the same rows with both, in turns."""
    say(f"writing {sizes.rows + sizes.stock_rows:,} rows")
    found: dict[str, list[dict[str, Any]]] = {"many": [], "few": [], "stock": []}
    for topic, count in ((MANY, sizes.rows), (FEW, sizes.stock_rows)):
        lab.make([TopicSpec(name=topic, retention_seconds=None)])
        lab.fill(in_cluster(topic), rows(count))
    with lab.broker_apart():
        for repetition in range(sizes.repetitions):
            turns: list[tuple[str, Callable[[], dict[str, Any]]]] = [
                ("many", lambda: _ours(lab, MANY, sizes.rows)),
                ("few", lambda: _ours(lab, FEW, sizes.stock_rows)),
                ("stock", lambda: _stock(lab, FEW, sizes.stock_rows)),
            ]
            turn = repetition % len(turns)
            for name, run in turns[turn:] + turns[:turn]:
                found[name].append(run())
                row = found[name][-1]
                who = "stock Faust" if name == "stock" else "this runner"
                say(f"{repetition + 1}/{sizes.repetitions} {who}: {row['rows']:,} rows in {row['seconds']:.2f} s")
    return {"runs": found}


def _ours(lab: Laboratory, topic: str, count: int) -> dict[str, Any]:
    from benchmarks import recovery_app

    run = lab.new_run("recovery")
    lab.make(recovery_app.specs_of(recovery_app.step_of(run, topic)))
    lab.forget_group(f"notify.bench.{recovery_app.ROLE}")
    variables = lab.worker_variables(Role.SIGNALS, NOTIFY_WEB_PORT=str(free_port()), BENCH_RUN=run, BENCH_SOURCE=topic)
    command = [PYTHON, "-W", "ignore", "-m", "benchmarks.recovery_app", "worker", "-l", "info"]
    return _checked(lab.run(command, variables=variables, seconds=_RUN_SECONDS, name=run), count)


def _stock(lab: Laboratory, topic: str, count: int) -> dict[str, Any]:
    run = lab.new_run("stock")
    lab.make([TopicSpec(name=f"bench.in.{run}")])
    variables = {"BENCH_RUN": run, "BENCH_INPUT": in_cluster(f"bench.in.{run}"), "BENCH_SOURCE": in_cluster(topic)}
    command = [PYTHON, "-W", "ignore", "-m", "benchmarks.peers.stock_recovery"]
    return _checked(lab.run(command, variables=variables, seconds=_RUN_SECONDS, name=run), count)


def _checked(found: dict[str, Any], count: int) -> dict[str, Any]:
    if found["rows"] != count:
        raise BenchmarkError(f"{found['rows']} of {count} rows were recovered")
    return found


def describe(result: dict[str, Any]) -> str:
    """Return the section of the report."""
    runs = result["runs"]
    many, few, stock = ([run["seconds"] for run in runs[name]] for name in ("many", "few", "stock"))
    count, fewer = runs["many"][0]["rows"], runs["stock"][0]["rows"]
    scaled = [seconds * count / fewer for seconds in stock]
    compared = figures.ratio(scaled, many)
    compared_few = figures.ratio(stock, few)
    verdict = figures.verdict(is_met=compared.median >= TARGET)

    def show(label: str, rows_recovered: int, seconds: list[float]) -> list[str]:
        rate = figures.figure([rows_recovered / each for each in seconds])
        return [label, f"{rows_recovered:,}", figures.figure(seconds).show(figures.hundredth), rate.show(figures.whole)]

    rows_shown = [
        show(f"this runner, table {PREFERENCES}", count, many),
        show("this runner", fewer, few),
        show("stock Faust, the same topic, values as bytes", fewer, stock),
    ]
    memory = figures.figure([run["bytes_per_row"] for run in runs["many"]])
    payload = runs["many"][0]["payload_bytes"] / count
    growth = figures.figure([run["rss_bytes"] / count for run in runs["many"]])
    return f"""\
Rows of preferences as the router writes them (Avro, sealed contact; {payload:.0f} bytes with key) in a changelog of 4 partitions. The
clock runs from the assignment until the table is complete; ours includes fencing earlier owners.

{figures.table(["", "rows", "seconds", "rows/s"], rows_shown)}

Stock Faust takes a time proportional to the rows (it applies one event after the other), so {count:,} rows are put down as
{figures.figure(scaled).show(figures.whole)} s, {count / fewer:g} times what {fewer:,} took.

| | measured | target | |
| --- | ---: | ---: | ---: |
| stock Faust ÷ this runner, {count:,} rows | {compared.show(figures.times)} | ≥ {figures.times(TARGET)} | {verdict} |
| the same for {fewer:,} rows, both measured | {compared_few.show(figures.times)} | | |

Memory: **{memory.show(figures.whole)} bytes/row** for key, value and dict entry; the process grew by \
{growth.show(figures.whole)} bytes/row while it recovered,
fetch buffers included.
"""
