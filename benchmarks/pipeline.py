"""Benchmark 2: payments in, e-mail and in-app out, through every role in a process of its own; CPU by stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.laboratory import BenchmarkError, Laboratory, in_cluster, wait_for
from benchmarks.sizes import Sizes
from benchmarks.system import System, now, system
from schemas import topics
from schemas.codec import unpack
from schemas.messages import StatusChange
from schemas.status import Status
from schemas.topics import Channel
from streams.roles import Role

TITLE = "The whole pipeline"
ROLES = (Role.INGEST, Role.ROUTER, Role.SENDER_NORMAL, Role.SIGNALS, Role.VIEWS, Role.STORE)
_ACCEPTED = {Channel.EMAIL: Status.SENT, Channel.IN_APP: Status.DELIVERED}
_RUN_SECONDS = 300.0
_WARM_UP_PAYMENTS = 200


def measure(lab: Laboratory, sizes: Sizes, say: Callable[[str], None]) -> dict[str, Any]:
    """Send all payments at once, once a repetition, and wait until every delivery was accepted and shown."""
    runs: list[dict[str, Any]] = []
    for repetition in range(sizes.repetitions):
        with system(lab) as running:
            found = _run(running, sizes)
        runs.append(found)
        say(f"{repetition + 1}/{sizes.repetitions} {found['notifications_per_second']:,.0f} notifications/s, each e-mail and in-app")
    return {"runs": runs, "payments": sizes.payments, "users": sizes.users}


def _run(running: System, sizes: Sizes) -> dict[str, Any]:
    running.start(*ROLES)
    users = running.load_users(sizes.users)
    empty = log_bytes(running.lab.folder, running.name)
    warm_up = min(_WARM_UP_PAYMENTS, sizes.payments)
    payments = running.payments(users, range(warm_up + sizes.payments), status="confirmed")
    _publish(running, payments[:warm_up])
    _await(running, warm_up)
    began_at, before = now(), running.cpu_seconds()
    _publish(running, payments[warm_up:])
    _await(running, warm_up + sizes.payments)
    spent = {name: seconds - before[name] for name, seconds in running.cpu_seconds().items()}
    last_at = _last_acceptance(running, warm_up + sizes.payments)
    by_topic = {topic: count / (warm_up + sizes.payments) for topic, count in (log_bytes(running.lab.folder, running.name) - empty).items()}
    return {
        "log_bytes_per_notification": sum(by_topic.values()),
        "log_bytes_by_topic": by_topic,
        "notifications_per_second": sizes.payments / (last_at - began_at),
        "cpu_us_per_notification": {name: seconds / sizes.payments * 1e6 for name, seconds in spent.items()},
    }


def log_bytes(folder: Path, env: str) -> Counter[str]:
    """Return how large the log of each of the system's own topics is, by its name as agents know it."""
    found: Counter[str] = Counter()
    for path in folder.glob(f"**/{in_cluster('*', env)}-*/*.log"):
        topic = path.parent.name.rpartition("-")[0].removeprefix(in_cluster("", env))
        found[topic] += path.stat().st_size
    return found


def _publish(running: System, payments: list[tuple[bytes, bytes]]) -> None:
    producer = running.producer(**{"linger.ms": 5})
    topic = in_cluster(topics.PAYMENTS, running.name)
    for key, value in payments:
        producer.produce(topic, value, key)
    if producer.flush(60):
        raise BenchmarkError("Kafka did not take all payments")


def _await(running: System, payments: int) -> None:
    """Return when every delivery of `payments` was accepted, and the roles behind the senders have read all about it."""
    sender, signals = running.workers[Role.SENDER_NORMAL], running.workers[Role.SIGNALS]
    readers = [running.workers[Role.VIEWS], running.workers[Role.STORE]]

    def is_accepted() -> bool:
        return sum(sender.metric("notify_deliveries_total", outcome=outcome) for outcome in _ACCEPTED.values()) >= 2 * payments

    def written() -> int:
        return sum(1 for topic in (topics.DECISIONS, topics.STATUS) for _ in running.lab.read(in_cluster(topic, running.name)))

    wait_for(is_accepted, seconds=_RUN_SECONDS, what="all deliveries are accepted", every_seconds=0.3)
    shown, wanted = 0, written()
    while shown < wanted:  # the last statuses may be in transactions that are still open
        shown = wanted
        wait_for(
            lambda: all(reader.metric("notify_records_total") >= shown for reader in readers),  # noqa: B023 - called at once
            seconds=_RUN_SECONDS,
            what="views and store have read everything",
            every_seconds=0.3,
        )
        wanted = written()
    wait_for(
        lambda: signals.metric("notify_events_total", outcome="reference") >= payments,
        seconds=_RUN_SECONDS,
        what="signals knows every mail's reference",
        every_seconds=0.3,
    )


def _last_acceptance(running: System, payments: int) -> float:
    """Return when the last delivery was accepted. Raises BenchmarkError when one is missing or came twice."""
    mails = running.accepted()
    counts: Counter[str] = Counter()
    last_in_app = 0.0
    for message in running.lab.read(in_cluster(topics.STATUS, running.name)):
        change = unpack((message.value() or b"")[5:], StatusChange)
        counts[f"{change.channel} {change.status}"] += 1
        if change.channel == Channel.IN_APP and change.status == Status.DELIVERED:
            last_in_app = max(last_in_app, change.at.timestamp())
    ends = [counts[f"{channel} {status}"] for channel, status in _ACCEPTED.items()]
    if ends != [payments, payments] or len(mails) != payments:
        raise BenchmarkError(f"{payments} payments became {len(mails)} mails and {dict(counts)}")
    return max(last_in_app, *mails.values())


def measured_roles(runs: list[dict[str, Any]]) -> list[str]:
    """Return the roles that ran in all of `runs`: earlier releases measured fewer."""
    return [str(role) for role in ROLES if all(role in run["cpu_us_per_notification"] for run in runs)]


def describe(result: dict[str, Any]) -> str:
    """Return the section of the report."""
    runs = result["runs"]
    rate = figures.figure([run["notifications_per_second"] for run in runs])
    stages = measured_roles(runs)
    rows = [
        [
            name,
            figures.figure([run["cpu_us_per_notification"][name] for run in runs]).show(figures.whole),
        ]
        for name in [*stages, "Kafka broker", "PostgreSQL", "mail sink"]
    ]
    totals = [sum(run["cpu_us_per_notification"][name] for name in stages) for run in runs]
    rows.insert(len(stages), ["**the roles together**", figures.figure(totals).show(figures.whole)])
    left = figures.figure([run["log_bytes_per_notification"] for run in runs]).show(figures.whole)
    users = "not counted" if all("log_bytes_by_topic" in run for run in runs) else "counted"
    sink = figures.figure([run["cpu_us_per_notification"]["mail sink"] for run in runs]).median
    absent = "".join(f"\nThe role `{role}` did not run.\n" for role in ROLES if role not in stages)
    return f"""\
{result["payments"]:,} confirmed payments, of {result["users"]:,} users with an address, are published at once; each becomes one
notification with two deliveries, e-mail and in-app. Each role is a process of its own (so that CPU can be told apart by stage), and
all of them share this machine's cores with the broker and the mail sink. From the first payment until the last delivery was accepted,
by the mail sink for e-mail and by the recorded status for in-app:

**{rate.show(figures.whole)} notifications/s**, twice as many deliveries.

CPU until the roles behind the senders had read the last record:

{figures.table(["stage", "CPU µs/notification"], rows)}
{absent}
In the topics of the system they left {left} bytes a notification, before compaction and replication, the payments' own topic
not counted, the users' rows {users}.

Every payment's two deliveries were counted, in the sink and in the topic `status`: none missing, none twice. The mail sink alone would
take {1e6 / sink if sink else 0:,.0f} mails/s with one core.
"""
