"""Benchmark 6: what a row of the ledger and of the dedupe table costs in memory, on disk and at recovery, at ten million rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from agents.router import seen_row
from agents.sender import Attempt, AttemptState
from benchmarks import figures, recovery_app
from benchmarks.laboratory import PYTHON, BenchmarkError, Laboratory, in_cluster
from benchmarks.sizes import Sizes
from benchmarks.throughput import free_port
from schemas.ids import delivery_id, notification_id
from streams.roles import Role
from streams.topics import TopicSpec

TITLE = "State"
_RUN_SECONDS = 1_200.0
_WINDOW_DAYS = 7
_PER_SECOND = 10_000
_AT_MS = 1_772_000_000_000


def ledger_rows(count: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield `count` rows of the senders' ledger, as they are when a delivery is done."""
    for number in range(count):
        attempt = Attempt(generation=0, number=1, state=AttemptState.DONE, failures=0, at_ms=_AT_MS + number)
        yield delivery_id(_notification(number), "email").encode(), attempt.row()


def dedupe_rows(count: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield `count` rows of the router's table of ids."""
    for number in range(count):
        yield _notification(number).encode(), seen_row(b"12345678", _AT_MS + number)


def _notification(number: int) -> Any:
    return notification_id(producer="payments", event_id=f"e{number}", rule="payment_confirmed", user_id=f"user-{number % 100_000}")


TABLES: dict[str, Callable[[int], Iterator[tuple[bytes, bytes]]]] = {"ledger": ledger_rows, "dedupe": dedupe_rows}


def measure(lab: Laboratory, sizes: Sizes, say: Callable[[str], None]) -> dict[str, Any]:
    """Fill each table's changelog, weigh it, and recover it with the product's own runner."""
    found: dict[str, Any] = {}
    for name, rows in TABLES.items():
        topic = f"bench.state-{name}"
        lab.make([TopicSpec(name=topic, retention_seconds=None)])
        began = time.monotonic()
        lab.fill(in_cluster(topic), rows(sizes.state_rows))
        say(f"{name}: {sizes.state_rows:,} rows written in {time.monotonic() - began:.0f} s")
        disk = sum(path.stat().st_size for path in lab.folder.glob(f"**/{in_cluster(topic)}-*/*.log"))
        recovered = _recover(lab, topic)
        if recovered["rows"] != sizes.state_rows or not disk:
            raise BenchmarkError(f"{name}: {recovered['rows']} of {sizes.state_rows} rows were recovered, {disk} bytes on disk")
        found[name] = {**recovered, "disk_bytes": disk}
        say(f"{name}: {recovered['rss_bytes'] / sizes.state_rows:.0f} bytes/row of memory, recovered in {recovered['seconds']:.1f} s")
    return {"rows": sizes.state_rows, "tables": found}


def _recover(lab: Laboratory, topic: str) -> dict[str, Any]:
    run = lab.new_run("state")
    lab.make(recovery_app.specs_of(recovery_app.step_of(run, topic, is_aged=True)))
    lab.forget_group(f"notify.bench.{recovery_app.ROLE}")
    variables = lab.worker_variables(Role.SIGNALS, NOTIFY_WEB_PORT=str(free_port()), BENCH_RUN=run, BENCH_SOURCE=topic, BENCH_AGED="1")
    command = [PYTHON, "-W", "ignore", "-m", "benchmarks.recovery_app", "worker", "-l", "info"]
    return lab.run(command, variables=variables, seconds=_RUN_SECONDS, name=run)


def describe(result: dict[str, Any]) -> str:
    """Return the section of the report."""
    count = result["rows"]
    shown = []
    for name, each in result["tables"].items():
        memory, disk = each["rss_bytes"] / count, each["disk_bytes"] / count
        window = _PER_SECOND * 86_400 * _WINDOW_DAYS
        shown.append(
            [
                name,
                f"{each['payload_bytes'] / count:.0f}",
                f"{memory:.0f}",
                f"{disk:.0f}",
                f"{each['seconds']:.1f} s",
                f"{window * memory / 2**40:.2f} TiB",
                f"{window * disk / 2**40:.2f} TiB",
            ]
        )
    header = ["table", "key and value", "memory", "disk", "recovery", "memory of the window", "disk of the window, one replica"]
    return f"""\
{count:,} rows of each table in a changelog of 4 partitions, recovered by the product's runner in one process. Bytes a row; memory is
what the process grew by. On paper: {_PER_SECOND:,} notifications a second for the window of {_WINDOW_DAYS} days are
{_PER_SECOND * 86_400 * _WINDOW_DAYS:,} rows of each table (the ledger has one for each delivery), over all workers.

{figures.table(header, shown)}
"""
