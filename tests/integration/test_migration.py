"""From 2 to 3 partitions: everything that is keyed by user moves with him, whatever cuts the migration off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache, partial

import pytest

from schemas import topics
from schemas.ids import partition_of
from schemas.messages import DecisionRecord, EngagementSignal
from streams.cli.wire import Wire
from streams.embedded.stack import Stack
from streams.migration import PLACED, Kind, Migration
from streams.topics import Count, specs
from streams.topology import PROGRESS, TOPOLOGY
from streams.transport.changelog import shared_key
from tests.harness import ROOT, System, system, wait_for
from tests.integration.test_guarantees import identity, inbox_of, mailing, of_run, payment

OLD, NEW = 2, 3
ROLES = ("ingest", "router", "sender-normal", "signals", "views")
USERS = [f"mover-{i}" for i in range(40)]
EACH = 3  # payments of a user
RUN, LATER = "moving", "moved"


class CutOffError(Exception):
    """What a test ends a migration with."""


@pytest.fixture(scope="module")
def running(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with system(stack, tmp_path_factory.mktemp("migration"), partitions=OLD) as made:
        start(made)
        yield made


def start(made: System) -> None:
    for role in ROLES:
        made.start(role, is_static=False)
    made.await_ready(seconds=120)


def payments(run: str = RUN) -> list[dict[str, object]]:
    return [payment(i, USERS[i % len(USERS)], run=run) for i in range(EACH * len(USERS))]


@cache
def ids(run: str = RUN) -> frozenset[str]:
    return frozenset(identity(run, i, USERS[i % len(USERS)]) for i in range(EACH * len(USERS)))


def mails(made: System) -> Counter[str]:
    wanted = ids() | ids(LATER)
    return Counter({found: n for found, n in made.mails().items() if found.removesuffix("-email") in wanted})


def tables() -> list[tuple[str, str]]:
    """Return (table, changelog) of every table; several share a changelog."""
    steps = [step for step in TOPOLOGY if step.count is Count.USER]
    return [(table, topic) for step in steps for table, topic in step.changelogs().items() if table != PROGRESS]


def rows_of(topic: str, table: str, rows: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """Return a table's rows, by their own keys, of those of its changelog."""
    if not topic.endswith(".changelog"):
        return rows
    prefix = shared_key(table, b"")
    return {key.removeprefix(prefix): value for key, value in rows.items() if key.startswith(prefix)}


def read_mark(made: System, notification: str, user: str) -> tuple[bytes, bytes]:
    with Wire(made.settings) as wire:
        codec = wire.codec([spec for spec in specs() if spec.name == topics.SIGNALS])
    now = datetime.now(UTC)
    done = EngagementSignal(signal_id="late", notification_id=notification, user_id=user, engagement="read", at=now)
    return user.encode(), codec.encode(done)


def migration(made: System) -> Migration:
    return Migration(cluster=made.cluster, env=made.name, old=OLD, new=NEW)


def counts(made: System) -> dict[str, int]:
    found = made.admin.list_topics(timeout=10).topics
    return {spec.name: len(found[made.topic(spec.name)].partitions) for spec in made.specs if spec.count is Count.USER}


def test_every_table_that_is_keyed_by_user_is_known_to_the_migration() -> None:
    assert {table for table, _ in tables()} == set(PLACED)


def test_preferences_inbox_dedupe_and_ledger_move_with_their_users_and_nothing_is_told_twice(running: System) -> None:
    running.load_preferences(mailing(USERS))
    running.produce("payments", running.frame_payments(payments()))
    wait_for(lambda: len(mails(running)) == len(ids()), seconds=60, what="every mail")
    read = identity(RUN, 0, USERS[0])
    assert running.web(f"/notifications/{read}/read", method="POST")[0] in {202, 204}
    wait_for(lambda: running.web(f"/notifications/{read}")[1]["status"] == "read", seconds=30, what="read")
    wait_for(lambda: all(len(inbox_of(running, user)) == EACH for user in USERS), seconds=30, what="every inbox")
    statuses = {n["notificationId"]: n["status"] for user in USERS for n in inbox_of(running, user)}

    refused = running.notify("topics", "migrate", "--partitions", str(NEW), "--yes")
    assert refused.returncode == 1
    assert "Workers are in their groups (ingest: 1" in refused.stderr
    running.stop(*running.workers.values())
    rows = {topic: running.rows(topic) for _, topic in tables()}
    sent = mails(running)

    shown = running.notify("topics", "migrate", "--partitions", str(NEW), "--dry-run", "--json")
    assert shown.returncode == 0, shown.stderr
    parts = {part["topic"]: part for part in json.loads(shown.stdout)["topics"]}
    moved = [user for user in USERS if partition_of(user.encode(), OLD) != partition_of(user.encode(), NEW)]
    preferences = parts[running.topic(topics.PREFERENCES)]
    assert (preferences["does"], preferences["records"], preferences["moving"]) == (Kind.ROWS, len(USERS), len(moved))
    assert set(counts(running).values()) == {OLD}

    cut_by_kill(running)
    cut_in_history(running)
    # a signal of somebody who was not stopped, and who looked for its partition a moment too early
    late = moved[-1]
    mark = identity(RUN, USERS.index(late), late)
    running.produce_to(topics.SIGNALS, partition_of(late.encode(), OLD), [read_mark(running, mark, late)])
    done = running.notify("topics", "migrate", "--partitions", str(NEW), "--yes")
    assert done.returncode == 0, done.stderr
    assert set(counts(running).values()) == {NEW}

    require_same_tables(running, rows)
    running.variables["NOTIFY_PARTITIONS"] = str(NEW)
    running.settings = replace(running.settings, partitions=NEW)
    start(running)
    wait_for(lambda: running.web(f"/notifications/{mark}")[1]["status"] == "read", seconds=30, what="the late signal, applied")
    statuses[mark] = "read"
    assert {n["notificationId"]: n["status"] for user in USERS for n in inbox_of(running, user)} == statuses
    running.produce("payments", running.frame_payments([*payments(), *payments(LATER)]))
    wait_for(lambda: len(mails(running)) == 2 * len(ids()), seconds=60, what="the mails about other events")
    wait_for(lambda: decisions(running)["duplicate_of"] == len(ids()), seconds=60, what="each told again, a duplicate")
    assert decisions(running) == {"notified": len(ids()), "duplicate_of": len(ids())}
    assert set(mails(running).values()) == {1}
    assert sent.items() <= mails(running).items()
    wait_for(lambda: all(len(inbox_of(running, user)) == 2 * EACH for user in USERS), seconds=60, what="both in every inbox")
    explained = running.notify("why", late, f"payment:{RUN}-pay-{USERS.index(late)}:confirmed", "--json")
    assert explained.returncode == 0, explained.stderr
    assert [json.loads(line)["outcome"] for line in explained.stdout.splitlines()] == ["notified", "duplicate_of"]
    print(f"\nmigration: {len(moved)} of {len(USERS)} users moved; mails {mails(running).total()}, doubled 0, lost 0")


def decisions(running: System) -> Counter[str]:
    """Return how many decisions there are of each outcome; a copy is the decision that it is a copy of."""
    found = {record.decision_id: record for record in of_run(running, "decisions", DecisionRecord, ids())}
    return Counter(record.outcome for record in found.values())


def cut_by_kill(running: System) -> None:
    """Kill the command as soon as the first tables have grown: then no worker starts, whatever it is told."""
    command = [sys.executable, "-c", "from streams.cli import main; main()", "topics", "migrate", "--partitions", str(NEW), "--yes"]
    env = {**{k: v for k, v in os.environ.items() if not k.startswith("NOTIFY_")}, **running.variables}
    with subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: counts(running)[topics.PREFERENCES] == NEW, seconds=60, what="the table of preferences grown")
        process.send_signal(signal.SIGKILL)
    found = counts(running)
    assert found[topics.DEAD] == OLD
    assert found[topics.STATUS] == OLD, "killed before the history"
    for count in (OLD, NEW):
        worker = running.start("router", name=f"early-{count}", is_static=False, NOTIFY_PARTITIONS=str(count))
        wait_for(partial(bool, worker.exits), seconds=60, what="its end")
        running.give_up(worker)
        assert f"this worker expects {count}" in worker.log_text()


def cut_in_history(running: System) -> None:
    """End a run in the middle of what it copies, with a transaction open."""
    work = migration(running)
    assert work.problems() == []
    assert counts(running)[topics.DECISIONS] == OLD
    seen = 0

    def cut(count: int) -> None:
        nonlocal seen
        if work._facts[topics.DECISIONS].partitions == NEW:
            seen += count
        if seen > 60:
            raise CutOffError

    with pytest.raises(CutOffError):
        work.run(cut)
    found = counts(running)
    assert (found[topics.DECISIONS], found[topics.DEAD]) == (NEW, OLD)


def require_same_tables(running: System, before: dict[str, dict[bytes, bytes]]) -> None:
    """Require every row of before, and each where its user is now and nowhere else."""
    work = migration(running)
    work._look()
    moved = 0
    for table, topic in tables():
        place = PLACED[table]
        after: dict[bytes, bytes] = {}
        places: dict[bytes, set[int]] = {}
        for partition, found in work._rows(topic):
            rows = rows_of(topic, table, found)
            after |= rows
            for key in rows:
                places.setdefault(key, set()).add(partition)
        assert after == rows_of(topic, table, before[topic]), (topic, table)
        assert places == {key: set(range(NEW)) if place is None else {place(key, NEW)} for key in after}, (topic, table)
        moved += len(after)
    assert moved > len(USERS) * EACH
