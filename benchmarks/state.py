"""Benchmark 6: what a row of the largest tables costs in memory, on disk and at recovery, at ten million rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from agents.control import Control
from agents.receipts import Known, report_key
from agents.router import seen_row
from agents.sender import Attempt, AttemptState
from benchmarks import figures, recovery_app
from benchmarks.laboratory import PYTHON, BenchmarkError, Laboratory, in_cluster
from benchmarks.sizes import Sizes
from benchmarks.throughput import free_port
from channels.bounces import REPORTED_AS
from schemas.ids import delivery_id, notification_id
from schemas.topics import Channel, Lane
from streams.roles import Role
from streams.settings import Settings
from streams.topics import DAY_SECONDS, TopicSpec

TITLE = "State"
_RUN_SECONDS = 1_200.0
_PER_SECOND = 10_000
_AT_MS = 1_772_000_000_000


class Kept(NamedTuple):
    """What a notification with two deliveries, by e-mail and in the app, leaves in a table, and for how long by default."""

    rows: int
    seconds: int

    @property
    def rows_for_each_per_second(self) -> int:
        """Rows in the table for each notification a second."""
        return self.rows * self.seconds


_DEFAULTS = Settings.from_env({})
KEPT: Mapping[str, Kept] = {
    "ledger": Kept(2, _DEFAULTS.dedupe_seconds),  # each delivery
    "dedupe": Kept(2, _DEFAULTS.dedupe_seconds),  # the id, and in a table of such rows that the payment is over
    "references": Kept(1, _DEFAULTS.reference_seconds),  # the mail
}


def ledger_rows(count: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield `count` rows of the senders' ledger, as they are when a delivery is done."""
    for number in range(count):
        attempt = Attempt(generation=0, number=1, state=AttemptState.DONE, failures=0, at_ms=_AT_MS + number)
        yield delivery_id(_notification(number), "email").encode(), attempt.row()


def dedupe_rows(count: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield `count` rows of the router's table of ids."""
    for number in range(count):
        yield _notification(number).encode(), seen_row(b"12345678", _AT_MS + number)


def reference_rows(count: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield `count` rows of mails in the table `references` of signals."""
    control = Control(lambda _scope: None, seal_key=bytes(32))
    for number in range(count):
        notification, user = _notification(number), _user(number)
        delivery = delivery_id(notification, Channel.EMAIL)
        known = Known(
            notification_id=notification,
            delivery_id=delivery,
            user_id=user,
            channel=Channel.EMAIL,
            lane=Lane.NORMAL,
            generation=0,
            attempt=1,
            at_ms=_AT_MS + number,
            scope=control.scope_of(Channel.EMAIL, f"{user}@example.com"),
            category="payments",
        )
        yield report_key(REPORTED_AS, f"{delivery}.0@flowmart.example"), known.encode()


def _notification(number: int) -> Any:
    return notification_id(producer="payments", event_id=f"e{number}", rule="payment_confirmed", user_id=_user(number))


def _user(number: int) -> str:
    return f"user-{number % 100_000}"


TABLES: Mapping[str, Callable[[int], Iterator[tuple[bytes, bytes]]]] = {
    "ledger": ledger_rows,
    "dedupe": dedupe_rows,
    "references": reference_rows,
}


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
    totals = [0.0, 0.0]
    for name, each in result["tables"].items():
        kept = KEPT[name]
        memory, disk = each["rss_bytes"] / count, each["disk_bytes"] / count
        together = [_PER_SECOND * kept.rows_for_each_per_second * size / 2**40 for size in (memory, disk)]
        totals = [total + size for total, size in zip(totals, together, strict=True)]
        shown.append(
            [
                name,
                f"{each['payload_bytes'] / count:.0f}",
                f"{memory:.0f}",
                f"{disk:.0f}",
                f"{each['seconds']:.1f} s",
                f"{kept.rows} for {kept.seconds / DAY_SECONDS:g} days",
                *(f"{size:.2f} TiB" for size in together),
            ]
        )
    shown.append(["**together**", "", "", "", "", "", *(f"{total:.2f} TiB" for total in totals)])
    at_rate = f"at {_PER_SECOND:,}/s"
    header = [
        "table",
        "key and value",
        "memory",
        "disk",
        "recovery",
        "rows a notification",
        f"memory {at_rate}",
        f"disk {at_rate}, one replica",
    ]
    absent = "".join(
        f"\nThe table `{name}` was not measured; [scaling.md](scaling.md) has an estimate.\n"
        for name in TABLES
        if name not in result["tables"]
    )
    return f"""\
{count:,} rows of each table in a changelog of 4 partitions, recovered by the product's runner in one process. Bytes a row; memory is
what the process grew by. On paper: what {_PER_SECOND:,} notifications a second, each by e-mail and in the app, keep over all workers by
the default settings. Ledger: a row for each delivery; dedupe: one for the notification's id and a like one that says that the payment is
over; references: one for the mail.

{figures.table(header, shown)}
{absent}"""
