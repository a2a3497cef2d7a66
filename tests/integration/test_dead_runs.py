"""An input that yields nothing but dead letters is halted, on a real broker with a real worker process."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from schemas.codec import pack
from schemas.examples import example
from schemas.messages import Delivery
from streams.embedded.stack import Stack
from tests.harness import ROOT, System, system, wait_for
from tests.tally_app import OUT, STEP, TOPICS

MODULE = "tests.tally_app"
ROLE = "signals"
LIMIT = 200  # the default
BAD = 10_000


@pytest.fixture
def tally(stack: Stack, tmp_path: Path) -> Iterator[System]:
    with system(stack, tmp_path, TOPICS) as made:
        yield made


def test_a_run_of_dead_letters_halts_its_input_and_loses_nothing(tally: System) -> None:
    before = [(b"user-%d" % (i % 50), b"before-%d" % i) for i in range(500)]
    bad = [(b"user-%d" % (i % 50), b"\xff%d" % i) for i in range(BAD)]
    after = [(b"user-%d" % (i % 50), b"after-%d" % i) for i in range(500)]
    worker = tally.start(ROLE, module=MODULE)
    tally.await_ready(worker)
    tally.produce("tally.in", before)
    wait_for(lambda: tally.count(OUT) == len(before), seconds=30, what="the good ones before")

    tally.produce("tally.in", [*bad, *after])
    _, answer = wait_for(lambda: (found := worker.get("/health/ready"))[0] == 503 and found, seconds=30, what="not ready")
    details = json.loads(answer)["details"]
    assert f"{LIMIT} dead letters in a row" in details["halted"]["tally.in"]
    assert "NOTIFY_DEAD_RUN_LIMIT=0" in details["halted"]["tally.in"]
    assert worker.get("/health/live")[0] == 200, "restarted, it would only set more aside"
    wait_for(lambda: worker.metric("notify_inputs_halted", topic="tally.in") == 1, seconds=10, what="the gauge")
    wait_for(lambda: "input.halted topic=tally.in" in worker.log_text(), seconds=10, what="a line in the log")

    # the other input works on, and takes as long as ever
    urgent = [(b"user-%d" % i, b"urgent-%d" % i) for i in range(100)]
    tally.produce("tally.urgent", urgent)
    wait_for(lambda: tally.count(OUT) == len(before) + len(urgent), seconds=15, what="the urgent ones")
    # a rebalance does not set it going again
    other = tally.start(ROLE, name="b", module=MODULE, is_static=False)
    # it may halt its input within moments, and is not ready then
    wait_for(lambda: other.is_ready() or other.metric("notify_inputs_halted", topic="tally.in") == 1, seconds=60, what="the other at work")
    tally.stop(other)
    wait_for(
        lambda: worker.metric("notify_recovering") == 0 and len(_assigned(worker.get("/health/ready")[1])) == 4,
        seconds=60,
        what="its partitions back",
    )
    dead = tally.count("dead")
    print(f"\nrun of dead letters: {dead} of {BAD} set aside by two workers, limit {LIMIT} each")
    assert 0 < dead <= 2 * LIMIT
    assert worker.exits == []

    tally.stop(worker)
    again = tally.start(ROLE, module=MODULE, NOTIFY_DEAD_RUN_LIMIT="0")
    wait_for(lambda: tally.count("dead") >= BAD, seconds=60, what="every bad one in dead")
    wait_for(lambda: tally.count(OUT) >= len(before) + len(urgent) + len(after), seconds=30, what="the good ones after")
    assert sorted(message.value() or b"" for message in tally.read("dead")) == sorted(value for _, value in bad), "each once"
    assert tally.count(OUT) == len(before) + len(urgent) + len(after)
    tally.await_ready(again)
    expected = Counter(key for key, _ in (*before, *urgent, *after))
    assert {key: int(value) for key, value in tally.table(f"{STEP.role}.{STEP.name}", "counts").items()} == dict(expected)


def test_a_sender_halts_the_channel_that_it_cannot_read_and_serves_the_other(stack: Stack, tmp_path: Path) -> None:
    with system(stack, tmp_path) as made:
        sender = made.start("sender-normal")
        made.await_ready(sender)
        made.produce("deliver.email.normal", [(b"user-%d" % (i % 50), b"\0%d" % i) for i in range(3_000)])
        wait_for(lambda: sender.get("/health/ready")[0] == 503, seconds=30, what="not ready")
        assert list(json.loads(sender.get("/health/ready")[1])["details"]["halted"]) == ["deliver.email.normal"]
        wait_for(lambda: made.count("dead") == LIMIT, seconds=15, what="the limit in dead")
        text = (ROOT / "schemas/avro/Delivery.avsc").read_text()
        number = made.register(f"{made.topic('deliver.in_app.normal')}-value", text)
        told = cast("Delivery", example("Delivery"))
        told = replace(told, channel="in_app", lane="normal", expires_at=None, not_before=None)
        raw = b"\0" + number.to_bytes(4, "big") + pack(told)
        made.produce("deliver.in_app.normal", [(b"user", raw)])
        wait_for(lambda: made.count("status") == 1, seconds=20, what="the delivery in the app")
        assert sender.get("/health/live")[0] == 200
        made.stop(sender)
        made.start("sender-normal", NOTIFY_DEAD_RUN_LIMIT="0")
        wait_for(lambda: made.count("dead") == 3_000, seconds=40, what="all of them")


def _assigned(answer: bytes) -> list[int]:
    found: list[int] = json.loads(answer or b"{}").get("details", {}).get("assigned", [])
    return found
