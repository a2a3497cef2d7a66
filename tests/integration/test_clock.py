"""One worker with a wrong clock among others whose clocks are right: a real process, its wall clock shifted beneath it.

tests/clock/shift.c shifts what the C library says the time is, and so for Python and librdkafka alike: the timestamps of
what the worker writes are shifted too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from schemas.messages import DecisionRecord
from streams.embedded.stack import Stack
from tests.harness import ROOT, System, WorkerProcess, system, wait_for
from tests.integration.test_guarantees import changes, identity, mailing, of_run, payment

USERS = [f"clock-{number}" for number in range(20)]
HOUR, MINUTE = 3_600, 60
# Kafka refuses what is more than an hour ahead of it
SHIFTED = [(role, shift) for role in ("router", "sender-normal") for shift in (-2 * HOUR, 50 * MINUTE)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the library that shifts the clock of a process it is preloaded into."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        message = "a C compiler is missing (cc, gcc or clang): no process can be given another clock"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    path = tmp_path_factory.mktemp("clock") / "shift.so"
    options = ["-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run([compiler, *options, "-o", path, ROOT / "tests/clock/shift.c"], check=True)
    return path


@pytest.fixture(scope="module")
def running(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with system(stack, tmp_path_factory.mktemp("clocks")) as made:
        for role in ("ingest", "router", "sender-normal", "views"):
            made.start(role)
        made.await_ready(seconds=120)
        made.load_preferences(mailing(USERS))
        yield made


def play(made: System, run: str) -> set[str]:
    """Publish a payment of each user; return the notifications it has to become."""
    made.produce("payments", made.frame_payments([payment(number, user, run=run) for number, user in enumerate(USERS)]))
    return {identity(run, number, user) for number, user in enumerate(USERS)}


def mails_of(made: System, ids: set[str]) -> Counter[str]:
    found = made.mails()
    return Counter({each: found[f"{each}-email"] for each in ids})


def replace_worker(made: System, role: str, **env: Any) -> WorkerProcess:
    made.stop(made.workers[f"{role}-a"])
    return made.start(role, **env)


def shifted(library: Path, seconds: int) -> dict[str, str]:
    return {"LD_PRELOAD": str(library), "CLOCK_SHIFT_SECONDS": str(seconds)}


def decisions(made: System, ids: set[str]) -> Counter[str]:
    return Counter(str(record.outcome) for record in of_run(made, "decisions", DecisionRecord, ids))


def shown(made: System, found: str) -> dict[str, str]:
    """Return the status of each of a notification's deliveries, as the web tells it."""
    status, document = made.web(f"/notifications/{found}/trail")
    return {each["channel"]: each["status"] for each in document["deliveries"]} if status == 200 else {}


@pytest.mark.parametrize(("role", "seconds"), SHIFTED)
def test_a_clock_that_kafka_accepts_loses_nothing_doubles_nothing_and_moves_no_status_back(
    running: System, library: Path, role: str, seconds: int
) -> None:
    run = f"{role}-{seconds}"
    worker = replace_worker(running, role, **shifted(library, seconds))
    running.await_ready(worker)
    ids = play(running, run)
    wait_for(lambda: min(mails_of(running, ids).values()), seconds=60, what="a mail for each")
    play(running, run)
    wait_for(lambda: decisions(running, ids).total() == 2 * len(USERS), seconds=60, what="each decided again")
    # it looks once a minute, and a registry that was slow to answer is asked the next time
    wait_for(lambda: f"clock.wrong ahead_seconds={seconds}" in worker.log_text(), seconds=90, what="the wrong clock told")
    assert abs(worker.metric("notify_clock_difference_seconds") - seconds) < 5
    assert worker.exits == []

    # whoever takes over finds the ledger and the dedupe rows of the wrong time, and does nothing again
    running.await_ready(replace_worker(running, role))
    play(running, run)
    wait_for(lambda: decisions(running, ids).total() == 3 * len(USERS), seconds=60, what="each decided a third time")
    assert decisions(running, ids) == {"notified": len(USERS), "duplicate_of": 2 * len(USERS)}
    assert set(mails_of(running, ids).values()) == {1}
    assert running.count("dead") == 0
    wait_for(
        lambda: all(shown(running, each) == {"email": "sent", "in_app": "delivered"} for each in ids),
        seconds=30,
        what="every trail at its end",
    )
    found = changes(running, *ids)
    assert {change.status for change in found} == {"queued", "sending", "sent", "delivered"}, "something expired, failed or was skipped"


@pytest.mark.parametrize("role", ["router", "sender-normal"])
def test_a_clock_that_kafka_refuses_stops_the_worker_with_one_sentence_and_nothing_is_lost(
    running: System, library: Path, role: str
) -> None:
    run = f"{role}-refused"
    worker = replace_worker(running, role, **shifted(library, 2 * HOUR))
    wait_for(lambda: "clock.wrong ahead_seconds=7200" in worker.log_text(), seconds=60, what="the wrong clock told")
    ids = play(running, run)
    sentence = "worker.left reason=\"Kafka refuses records of this machine's time: its clock is more than an hour ahead"
    wait_for(lambda: sentence in worker.log_text(), seconds=60, what="the sentence")
    assert "Synchronise it" in worker.log_text()
    assert mails_of(running, ids).total() == 0, "sent what could not be recorded"

    running.await_ready(replace_worker(running, role))
    wait_for(lambda: min(mails_of(running, ids).values()), seconds=60, what="a mail for each, once the clock is right")
    assert decisions(running, ids) == {"notified": len(USERS)}
    assert set(mails_of(running, ids).values()) == {1}
    assert running.count("dead") == 0
