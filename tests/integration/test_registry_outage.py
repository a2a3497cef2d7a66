"""The schema registry is away: at the start, in the middle, and with one schema that nobody knows among known ones."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest

from schemas import topics
from schemas.codec import pack
from schemas.ids import notification_id
from schemas.messages import Command, DecisionRecord, Delivery, NotificationRequested, StatusChange
from schemas.topics import Channel, Lane, deliver, requests
from streams.embedded.stack import Stack
from tests.harness import ROOT, System, system, wait_for

ROLES = ("router", "sender-normal")
NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def running(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with system(stack, tmp_path_factory.mktemp("registry")) as made:
        for role in ROLES:
            made.start(role)
        made.await_ready(seconds=120)
        yield made


@contextmanager
def away(stack: Stack) -> Iterator[None]:
    assert stack.registry_process is not None
    asyncio.run(stack.registry_process.kill())
    try:
        yield
    finally:
        asyncio.run(stack.registry_process.start())


def writers(made: System, topic: str, name: str) -> tuple[Callable[[Any], bytes], Callable[[Any], bytes]]:
    """Return how this release writes a message, and how one does that has a field more."""
    schema = json.loads((ROOT / f"schemas/avro/{name}.avsc").read_text())
    subject = f"{made.topic(topic)}-value"
    known = made.register(subject, json.dumps(schema))
    schema["fields"].append({"name": "ofTheNextRelease", "type": ["null", "string"], "default": None})
    unknown = made.register(subject, json.dumps(schema))
    assert unknown != known

    def now(message: Any) -> bytes:
        return b"\0" + known.to_bytes(4, "big") + pack(message)

    def next_release(message: Any) -> bytes:
        return b"\0" + unknown.to_bytes(4, "big") + pack(message) + b"\0"  # the last field is null

    return now, next_release


def request(user: str, event: str) -> NotificationRequested:
    data = {"title": "Hello", "message": "World"}
    return NotificationRequested(event_id=event, producer="test", rule="message", user_id=user, data=data, occurred_at=NOW)


def delivery(user: str, event: str) -> Delivery:
    found = notification_id(producer="test", event_id=event, rule="message", user_id=user)
    return Delivery(
        delivery_id=f"{found}-in_app",
        notification_id=found,
        user_id=user,
        channel="in_app",
        lane="normal",
        rule="message",
        category="service",
        generation=0,
        attempt=1,
        sealed=b"",
        accepted_at=NOW,
        created_at=NOW,
    )


def decided(made: System, run: str) -> list[str]:
    found = (made.decode(message, DecisionRecord).event_id for message in made.read("decisions"))
    return sorted(event for event in found if event.startswith(run))


def delivered(made: System, run: str) -> list[str]:
    ids = {delivery(user, event).delivery_id: event for user, event in (("one", f"{run}-{n}") for n in range(10))}
    changes = made.messages("status", StatusChange)
    return sorted(ids[c.delivery_id] for c in changes if c.delivery_id in ids and c.status == "delivered")


def test_workers_start_without_it_from_what_they_learned_before(running: System, stack: Stack) -> None:
    now, _ = writers(running, requests(Lane.NORMAL), "NotificationRequested")
    with away(stack):
        for role in ROLES:
            worker = running.workers[f"{role}-a"]
            exits = len(worker.exits)
            worker.kill()
            wait_for(lambda w=worker, n=exits: len(w.exits) > n, seconds=10, what="its end")  # type: ignore[misc]
        running.await_ready(seconds=60)
        running.produce(requests(Lane.NORMAL), [(b"start", now(request("start", "start-0")))])
        wait_for(lambda: decided(running, "start") == ["start-0"], seconds=30, what="a decision with the registry away")


def test_a_worker_that_never_met_it_waits_and_says_so_and_begins_when_it_is_back(running: System, stack: Stack) -> None:
    with away(stack):
        fresh = running.start("signals", name="fresh")
        wait_for(lambda: "registry.unavailable" in fresh.log_text(), seconds=40, what="its line in the log")
        assert not fresh.is_ready()
        assert fresh.exits == []
    running.await_ready(fresh, seconds=60)
    running.stop(fresh)


def test_a_request_of_an_unknown_schema_waits_with_those_behind_it_and_others_go_on(running: System, stack: Stack) -> None:
    lane = requests(Lane.NORMAL)
    now, next_release = writers(running, lane, "NotificationRequested")
    dead = running.count("dead")
    with away(stack):
        running.produce(lane, [(b"one", now(request("one", "wait-0"))), (b"one", next_release(request("one", "wait-1")))])
        running.produce(lane, [(b"one", now(request("one", "wait-2")))])
        others = [f"other-{n}" for n in range(20)]
        running.produce(lane, [(user.encode(), now(request(user, user))) for user in others])
        wait_for(lambda: decided(running, "wait") == ["wait-0"], seconds=30, what="the one before it")
        wait_for(lambda: len(decided(running, "other")) >= 10, seconds=30, what="those of other partitions")
        assert decided(running, "wait") == ["wait-0"]
    wait_for(lambda: decided(running, "wait") == ["wait-0", "wait-1", "wait-2"], seconds=40, what="all of them, by themselves")
    wait_for(lambda: len(decided(running, "other")) == len(others), seconds=30, what="the others")
    assert running.count("dead") == dead


def test_a_command_of_an_unknown_schema_does_not_hold_up_the_requests_of_its_partition(running: System, stack: Stack) -> None:
    lane = requests(Lane.CRITICAL)
    now, _ = writers(running, lane, "NotificationRequested")
    _, next_release = writers(running, topics.COMMANDS, "Command")
    command = Command(command_id="c-1", user_id="one", kind="ensure_key", issued_at=NOW)
    with away(stack):
        running.produce(topics.COMMANDS, [(b"one", next_release(command))])
        router = running.workers["router-a"]
        wait_for(lambda: router.metric("notify_lag_records", topic=topics.COMMANDS) == 1, seconds=20, what="the command waits")
        running.produce(lane, [(b"one", now(request("one", "urgent-0")))])
        wait_for(lambda: decided(running, "urgent") == ["urgent-0"], seconds=20, what="the request")
        assert router.metric("notify_lag_records", topic=topics.COMMANDS) == 1
    wait_for(lambda: router.metric("notify_lag_records", topic=topics.COMMANDS) == 0, seconds=30, what="the command")


def test_a_delivery_that_the_next_release_wrote_is_sent_and_with_the_registry_away_it_waits(running: System, stack: Stack) -> None:
    topic = deliver(Channel.IN_APP, Lane.NORMAL)
    now, next_release = writers(running, topic, "Delivery")
    dead = running.count("dead")
    with away(stack):
        records = [(b"one", write(delivery("one", f"sent-{n}"))) for n, write in enumerate((now, next_release, now))]
        running.produce(topic, records)
        wait_for(lambda: delivered(running, "sent") == ["sent-0"], seconds=30, what="the one before it")
    wait_for(lambda: delivered(running, "sent") == ["sent-0", "sent-1", "sent-2"], seconds=40, what="all of them, by themselves")
    assert running.count("dead") == dead
