"""Dead letters go back, each once: `notify dlq redrive` against a real Kafka, with real roles where they matter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from typing import Any

import pytest
from confluent_kafka import Producer
from fastavro import parse_schema

from schemas import topics
from schemas.codec import frame, pack
from schemas.ids import notification_id, partition_of
from schemas.messages import Command, DecisionRecord, Delivery, NotificationRequested, StatusChange, UserAction
from schemas.topics import Channel, Lane, deliver, requests
from streams.embedded.stack import Stack
from tests.harness import PARTITIONS, ROOT, System, system, wait_for

ROLES = ("ingest", "router", "sender-normal", "views")
NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture(scope="module")
def idle(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Return an environment with its topics and no worker: what is put back stays where it was put."""
    with system(stack, tmp_path_factory.mktemp("idle")) as made:
        yield made


@pytest.fixture(scope="module")
def running(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with system(stack, tmp_path_factory.mktemp("redrive")) as made:
        for role in ROLES:
            made.start(role)
        made.await_ready(seconds=120)
        yield made


# ---- arranging


def encode(made: System, topic: str, message: Any) -> bytes:
    text = (ROOT / f"schemas/avro/{type(message).__name__}.avsc").read_text()
    return b"\0" + made.register(f"{made.topic(topic)}-value", text).to_bytes(4, "big") + pack(message)


def request(user: str, event: str, *, rule: str = "message", **more: Any) -> NotificationRequested:
    data = {"title": "Hello", "message": "World"}
    return NotificationRequested(event_id=event, producer="test", rule=rule, user_id=user, data=data, occurred_at=NOW, **more)


def bury(
    made: System,
    letters: Sequence[tuple[bytes | None, bytes | None]],
    *,
    topic: str,
    error: str = "internal",
    role: str = "router",
    read_at: datetime = NOW,
    more: Mapping[str, str] | None = None,
) -> list[str]:
    """Set (key, value) records aside as the runner does; return their ids."""
    producer = Producer({"bootstrap.servers": made.stack.kafka, "linger.ms": 5, "message.max.bytes": 1_200_000})
    ids: list[str] = []
    for number, (key, value) in enumerate(letters):
        headers = {
            "error": error,
            "message": "why it is dead",
            "topic": topic,
            "partition": str(number % PARTITIONS),
            "offset": str(number),
            "timestamp": str(round(read_at.timestamp() * 1000)),
            "role": role,
            "generation": "0",
            "at": NOW.isoformat(timespec="milliseconds"),
            **(more or {}),
        }
        producer.produce(
            made.topic(topics.DEAD),
            value,
            key,
            number % PARTITIONS,
            headers=[(name, text.encode()) for name, text in headers.items()],
            on_delivery=lambda _error, message: ids.append(f"{message.partition()}:{message.offset()}"),
        )
        producer.poll(0)
    assert producer.flush(60) == 0
    assert len(ids) == len(letters)
    return ids


def redrive(made: System, *arguments: str, expect: int = 0) -> list[dict[str, Any]]:
    done = made.notify("dlq", "redrive", "--json", *arguments)
    assert done.returncode == expect, done.stderr + done.stdout
    return [json.loads(line) for line in done.stdout.splitlines()]


def begin(made: System, role: str, *, redriven: int) -> subprocess.Popen[str]:
    """Return a redrive that has put so many back and works on. Nobody reads on, so it cannot get far ahead of it."""
    command = [sys.executable, "-c", "from streams.cli import main; main()", "dlq", "redrive", "--role", role, "--yes", "--json"]
    env = {"PATH": "/usr/bin:/bin", **made.variables}
    process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    done = (line for line in process.stdout if json.loads(line)["outcome"] == "redriven")
    assert len(list(islice(done, redriven))) == redriven, "it ended too early"
    return process


# ---- once


def test_killed_in_the_middle_again_and_again_it_puts_every_dead_letter_back_once(idle: System) -> None:
    total, role, topic = 4_000, "killed", requests(Lane.BULK)
    head = encode(idle, topic, request("u", "e"))[:5]
    bury(idle, [(b"u-%d" % (i % 500), head + pack(request(f"u-{i % 500}", f"killed-{i}"))) for i in range(total)], topic=topic, role=role)
    kills: list[int] = []
    for redriven in (250, 500, 401):
        process = begin(idle, role, redriven=redriven)
        process.kill()
        process.communicate()
        kills.append(idle.count(topic))
    assert 0 < kills[-1] < total, "killed in the middle"
    outcomes = Counter(result["outcome"] for result in redrive(idle, "--role", role))
    found = Counter(idle.decode(message, NotificationRequested).event_id for message in idle.read(topic))
    print(f"\nredrive: {len(kills)} kills at {kills} of {total}; lost {total - len(found)}; doubled {found.total() - len(found)}")
    assert outcomes == {"skipped": kills[-1], "redriven": total - kills[-1]}
    assert (len(found), found.total()) == (total, total)
    assert {result["outcome"] for result in redrive(idle, "--role", role)} == {"skipped"}


def test_a_second_redrive_stops_the_first_with_a_sentence_and_nothing_is_doubled(idle: System) -> None:
    total, role, topic = 4_000, "two", requests(Lane.CRITICAL)
    head = encode(idle, topic, request("u", "e"))[:5]
    bury(idle, [(b"u-%d" % (i % 500), head + pack(request(f"u-{i % 500}", f"two-{i}"))) for i in range(total)], topic=topic, role=role)
    first = begin(idle, role, redriven=100)
    assert len(redrive(idle, "--role", role)) == total
    _, said = first.communicate(timeout=60)
    assert first.returncode == 1
    assert "Another `notify dlq redrive`" in said
    found = Counter(idle.decode(message, NotificationRequested).event_id for message in idle.read(topic))
    assert (len(found), found.total()) == (total, total)


# ---- what goes where


def test_each_kind_goes_to_its_place_with_the_next_generation(idle: System) -> None:
    role = "places"
    lane = requests(Lane.NORMAL)
    users = [f"place-{i}" for i in range(8)]
    payment = [(b"pay-1", b"\0\0\0\0\1whatever"), (None, b"garbage")]
    bury(idle, payment, topic=topics.PAYMENTS, role=role, more={"generation": "3"})
    bury(idle, [(b"prod-1", b"stock")], topic=topics.INVENTORY, role=role)
    commands = [(user.encode(), encode(idle, topics.COMMANDS, _command(user))) for user in users]
    bury(idle, commands, topic=topics.COMMANDS, role=role)
    bury(idle, [(b"another-key", encode(idle, lane, request("place-0", "place")))], topic=lane, role=role)
    # one for each partition of the users: it goes back to the partition that it was read from
    broadcasts = [(b"same-id", b"of partition %d" % partition) for partition in range(PARTITIONS)]
    bury(idle, broadcasts, topic=topics.BROADCAST, role=role)
    # anybody may write such headers to a topic, and they become a dead letter's
    bury(idle, [(b"k", b"forged")], topic=lane, role=role, more={"timestamp": "9" * 18, "generation": "9" * 5_000})
    results = redrive(idle, "--role", role, expect=1)
    refused = [each for each in results if each["outcome"] == "refused"]
    assert [each["reason"] for each in refused] == ["its headers do not say where and when it was read"]
    assert Counter((r["outcome"], r["to"], r["generation"]) for r in results if r not in refused) == {
        ("redriven", "broadcast", 1): PARTITIONS,
        ("redriven", "parked", 4): 2,
        ("redriven", "parked", 1): 1,
        ("redriven", "commands", 1): 8,
        ("redriven", lane, 1): 1,
    }
    parked = {message.value(): dict(message.headers() or ()) for message in idle.read(topics.PARKED)}
    assert parked[b"garbage"] == {
        "topic": b"payments",
        "partition": b"1",
        "offset": b"1",
        "timestamp": str(round(NOW.timestamp() * 1000)).encode(),
        "generation": b"4",
    }
    assert sorted((m.partition(), m.key(), m.value()) for m in idle.read(topics.BROADCAST)) == [
        (partition, *each) for partition, each in enumerate(broadcasts)
    ]
    assert parked[b"stock"]["topic"] == b"inventory"
    assert idle.count(topics.PAYMENTS) == 0, "other services would see it twice"
    back = [message for message in idle.read(topics.COMMANDS) if (message.key() or b"").startswith(b"place-")]
    assert [(m.key(), m.value()) for m in sorted(back, key=lambda m: m.key() or b"")] == sorted(commands)
    assert all(message.partition() == partition_of(message.key() or b"", PARTITIONS) for message in back)
    (again,) = idle.read(lane)
    told = idle.decode(again, NotificationRequested)
    assert again.key() == b"place-0"
    assert told.accepted_at == NOW, "old news stays old"
    assert (told.origin.topic, told.origin.offset) == (lane, 0)


def _command(user: str) -> Command:
    return Command(command_id=f"c-{user}", user_id=user, kind="ensure_key", issued_at=NOW)


def test_a_delivery_begins_its_next_generation_and_may_be_given_more_time(idle: System) -> None:
    role, topic = "time", deliver(Channel.EMAIL, Lane.BULK)
    late = _delivery("time-1", expires_at=NOW - timedelta(hours=1), generation=2, attempt=5, not_before=NOW)
    bury(idle, [(b"time-1", encode(idle, topic, late))], topic="retry.bulk.long", role=role)
    (planned,) = redrive(idle, "--role", role, "--dry-run")
    assert planned["outcome"] == "would_redrive"
    assert "it will end as expired" in planned["note"]
    assert idle.count(topic) == 0
    (done,) = redrive(idle, "--role", role, "--extend", "2h")
    assert (done["to"], done["generation"], done["partition"]) == (topic, 3, partition_of(b"time-1", PARTITIONS))
    (message,) = idle.read(topic)
    again = idle.decode(message, Delivery)
    assert (again.generation, again.attempt, again.not_before, again.delivery_id) == (3, 1, None, late.delivery_id)
    assert again.expires_at > datetime.now(UTC) + timedelta(minutes=110)


def _delivery(user: str, **more: Any) -> Delivery:
    found = notification_id(producer="test", event_id="d", rule="message", user_id=user)
    facts: dict[str, Any] = {"generation": 0, "attempt": 1, "accepted_at": NOW, "created_at": NOW, **more}
    return Delivery(
        delivery_id=f"{found}-email",
        notification_id=found,
        user_id=user,
        channel="email",
        lane="bulk",
        rule="message",
        category="service",
        sealed=b"sealed",
        **facts,
    )


def test_what_cannot_go_back_is_refused_with_its_reason_and_the_rest_goes(idle: System) -> None:
    role, lane = "refusals", requests(Lane.NORMAL)
    before = idle.count(topics.USER_ACTIONS)
    ids = [
        *bury(idle, [(b"k", b"bytes")], topic=topics.PRODUCTS, role=role),
        *bury(idle, [(b"k", b"bytes")], topic=topics.PARKED, role=role),
        *bury(idle, [(b"k", b"bytes")], topic="somewhere", role=role),
        *bury(idle, [(b"k", b"bytes")], topic=lane, role=role),
        *bury(idle, [(b"k", b"bytes")], topic=topics.COMMANDS, error="version_conflict", role=role),
        *bury(idle, [(b"k", b"bytes")], topic=topics.COMMANDS, role=role, more={"offset": "x"}),
        # it fitted without the headers that it goes back with
        *bury(idle, [(b"k", b"x" * 1_048_500)], topic=topics.USER_ACTIONS, role=role),
        *bury(idle, [(b"k", b"fine")], topic=topics.USER_ACTIONS, role=role),
    ]
    assert len(ids) == 8
    results = redrive(idle, "--role", role, "--id", "0:99999999", *(f"--id={each}" for each in ids), expect=1)
    assert Counter(result["outcome"] for result in results) == {"redriven": 1, "refused": 8}
    reasons = " | ".join(result["reason"] for result in results if result["outcome"] == "refused")
    for part in ("publish the product again", "without the headers", "nothing of ours reads", "cannot be decoded", "conflict again"):
        assert part in reasons
    for part in ("do not say where", "larger than user-actions takes", "no such dead letter"):
        assert part in reasons
    assert [m.value() for m in idle.read(topics.USER_ACTIONS)][before:] == [b"fine"]


def test_filters_say_which_and_the_oldest_go_first(idle: System) -> None:
    role = "filters"
    for error in ("first", "second", "third"):
        bury(idle, [(b"k", error.encode())] * 2, topic=topics.SIGNALS, role=role, error=error)
    moment = datetime.now(UTC)
    wait_for(lambda: datetime.now(UTC) > moment + timedelta(milliseconds=5), seconds=5, what="a later moment")
    bury(idle, [(b"k", b"later")], topic=topics.RECEIPTS, role=role, error="first")
    listed = partial(idle.notify, "dlq", "list", "--role", role, "--json")
    assert len(listed("--error", "first").stdout.splitlines()) == 3
    assert len(listed("--topic", idle.topic(topics.SIGNALS)).stdout.splitlines()) == 6
    assert len(listed("--until", moment.isoformat()).stdout.splitlines()) == 6
    assert len(listed("--since", moment.isoformat()).stdout.splitlines()) == 1
    assert len(listed("--since", "1h", "--until", "30m").stdout.splitlines()) == 0
    assert [r["error"] for r in redrive(idle, "--role", role, "--limit", "2")] == ["first", "first"]
    assert [r["error"] for r in redrive(idle, "--role", role, "--limit", "2", "--topic", "signals")] == ["second", "second"]
    states = Counter(json.loads(line)["redriven"] for line in listed().stdout.splitlines())
    assert states == {1: 4, None: 3}
    shown = idle.notify("dlq", "redrive", "--role", role)
    assert "redriven to receipts" in shown.stdout
    assert "skipped: already redriven as generation 1" in shown.stdout
    assert "3 redriven, 4 skipped, 0 refused" in shown.stderr
    assert "no dead letters of this kind" in idle.notify("dlq", "redrive", "--role", "nobody").stderr


def test_in_a_terminal_it_asks_first(idle: System) -> None:
    role = "terminal"
    bury(idle, [(b"k", b"asked")] * 3, topic=topics.SIGNALS, role=role)
    command = [sys.executable, "-c", "from streams.cli import main; main()", "dlq", "redrive", "--role", role]
    env = {"PATH": "/usr/bin:/bin", **idle.variables}
    for answer, outcomes in ((b"n\n", {"would_redrive"}), (b"y\n", {"skipped"})):
        ours, theirs = os.openpty()
        os.write(ours, answer)
        done = subprocess.run(command, env=env, cwd=ROOT, stdin=theirs, capture_output=True, text=True, timeout=60, check=False)
        os.close(ours)
        os.close(theirs)
        assert "Put 3 dead letters back?" in done.stderr
        assert done.returncode == (answer == b"n\n")
        assert {r["outcome"] for r in redrive(idle, "--role", role, "--dry-run")} == outcomes


# ---- what becomes of it


def outcome_of(made: System, found: str) -> DecisionRecord | None:
    records = made.messages("decisions", DecisionRecord)
    return next((record for record in records if record.notification_id == found), None)


def test_a_payment_whose_schema_was_unknown_is_decided_as_the_event_that_it_was(running: System) -> None:
    fields = [{"name": name, "type": "string"} for name in ("paymentId", "userId", "status", "stranger")]
    schema = {"type": "record", "name": "StrangersPayment", "fields": fields}
    # ids are given one after the other: this one is the next that the registry gives
    number = running.register("stranger-before", json.dumps({**schema, "name": "Before"})) + 1
    row = {"paymentId": "stranger-1", "userId": "stranger", "status": "pending", "stranger": "yes"}
    running.produce("payments", [(b"stranger-1", frame(number, parse_schema(schema), row))])
    (letter,) = wait_for(
        lambda: [m for m in running.read("dead") if dict(m.headers() or ()).get("error") == b"unknown_schema"],
        seconds=30,
        what="it in dead",
    )
    assert running.register("stranger", json.dumps(schema)) == number
    # ingest asks the registry again for what it did not know only after a while
    running.workers["ingest-a"].kill()
    (done,) = redrive(running, "--error", "unknown_schema")
    assert (done["outcome"], done["to"], done["generation"]) == ("redriven", "parked", 1)
    found = notification_id(producer="payments", event_id="payment:stranger-1:pending", rule="payment_pending", user_id="stranger")
    record = wait_for(lambda: outcome_of(running, found), seconds=60, what="it decided")
    assert record.outcome == "notified"
    assert (record.origin.topic, record.origin.partition) == ("payments", int(dict(letter.headers() or ())["partition"]))
    wait_for(lambda: running.web("/users/stranger/notifications")[1]["notifications"], seconds=30, what="the inbox")
    assert redrive(running, "--error", "unknown_schema")[0]["outcome"] == "skipped"


def test_what_fails_again_is_a_new_dead_letter_of_the_next_generation(running: System) -> None:
    lane = requests(Lane.NORMAL)
    running.produce(lane, [(b"again", encode(running, lane, request("again", "again", rule="no-such-rule")))])

    def generations() -> list[int]:
        lines = running.notify("dlq", "list", "--error", "unknown_rule", "--json").stdout.splitlines()
        return sorted(int(json.loads(line)["headers"]["generation"]) for line in lines)

    wait_for(lambda: generations() == [0], seconds=30, what="a dead letter")
    redrive(running, "--error", "unknown_rule")
    wait_for(lambda: generations() == [0, 1], seconds=30, what="another")
    assert Counter(r["outcome"] for r in redrive(running, "--error", "unknown_rule")) == {"skipped": 1, "redriven": 1}
    wait_for(lambda: generations() == [0, 1, 2], seconds=30, what="a third")


def test_an_old_action_that_is_put_back_is_old_news(running: System) -> None:
    action = UserAction(action_id="old-reset", user_id="old", action="password_reset_requested", occurred_at=NOW)
    raw = encode(running, topics.USER_ACTIONS, action)
    bury(running, [(b"old", raw)], topic=topics.USER_ACTIONS, role="ingest", error="old", read_at=NOW - timedelta(days=2))
    redrive(running, "--error", "old")
    decided = partial(_decided_about, running, "old-reset")
    record = wait_for(decided, seconds=30, what="it decided")
    assert (record.outcome, record.reason) == ("skipped", "expired")


def _decided_about(made: System, event: str) -> DecisionRecord | None:
    records = made.messages("decisions", DecisionRecord)
    return next((record for record in records if record.event_id == event), None)


def test_a_failed_delivery_that_is_put_back_is_live_again_and_ends_sent(running: System) -> None:
    running.load_preferences([{"userId": "failed", "name": "F", "email": "failed@example.com"}])
    lane, topic = requests(Lane.NORMAL), deliver(Channel.EMAIL, Lane.NORMAL)
    found = notification_id(producer="test", event_id="failed", rule="message", user_id="failed")
    _fault(running, {"mode": "refuse", "code": 550})
    try:
        running.produce(lane, [(b"failed", encode(running, lane, request("failed", "failed")))])
        wait_for(lambda: _email(running, found) == "failed", seconds=40, what="failed in the views")
    finally:
        _fault(running, {"mode": "none"})
    (message,) = [m for m in running.read(topic) if running.decode(m, Delivery).notification_id == found]
    # twice: as if two roles had set it aside
    bury(running, [(b"failed", message.value())] * 2, topic=topic, role="sender-normal", error="failed")
    assert [r["outcome"] for r in redrive(running, "--error", "failed")] == ["redriven", "redriven"]
    wait_for(lambda: _email(running, found) == "sent", seconds=40, what="sent in the views")
    changes = [
        c for m in running.read("status") if (c := running.decode(m, StatusChange)).notification_id == found and c.channel == "email"
    ]
    assert [(c.generation, c.attempt, c.status) for c in changes if c.generation == 1] == [(1, 1, "sending"), (1, 1, "sent")]
    assert running.mails()[f"{found}-email"] == 1


def _email(made: System, found: str) -> str | None:
    status, trail = made.web(f"/notifications/{found}/trail")
    states: dict[str, str] = {d["channel"]: d["status"] for d in trail["deliveries"]} if status == 200 else {}
    return states.get("email")


def _fault(made: System, body: dict[str, object]) -> None:
    import urllib.request

    request = urllib.request.Request(
        f"{made.stack.mail_http}/api/faults", json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status < 300
