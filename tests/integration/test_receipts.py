"""What providers report later, and orders that stop what is not sent yet, with real workers on a real broker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from confluent_kafka import Producer

from agents.receipts import report_key
from agents.sender import Attempt, AttemptState
from schemas import topics
from schemas.ids import notification_id
from schemas.messages import DecisionRecord, Delivery, DeliveryReport, NotificationRequested, ProviderReference, StatusChange
from schemas.status import Status, order
from schemas.topics import Channel, Lane
from streams.embedded.stack import Stack
from tests.deliveries import a_delivery, changes, codec_of, give_keys, let_mail_server, publish
from tests.harness import System, system, wait_for

ROLES = ("router", "sender-normal", "signals", "delay")


@pytest.fixture(scope="module")
def running(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with system(stack, tmp_path_factory.mktemp("receipts"), variables={"NOTIFY_RETRY_TIERS": "1,2,4"}) as made:
        for role in ROLES:
            made.start(role)
        made.await_ready(seconds=120)
        yield made


def reference(delivery: Delivery) -> str:
    return f"{delivery.delivery_id}.{delivery.generation}@flowmart.example"


def report(made: System, *about: Delivery | str, status: str = "delivered", code: str | None = None, suppresses: str | None = None) -> None:
    said = {"provider": "email", "status": status, "code": code, "suppresses": suppresses, "at": datetime.now(UTC).isoformat()}
    lines = [{**said, "reference": reference(each) if isinstance(each, Delivery) else each} for each in about]
    done = made.notify("receipts", "load", "-", "--json", stdin="".join(json.dumps(line) + "\n" for line in lines))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["published"] == len(lines)


def deliver(made: System, *deliveries: Delivery) -> None:
    give_keys(made, [each.user_id for each in deliveries])
    for each in deliveries:
        publish(made, topics.deliver(each.channel, each.lane), [each])


def current(made: System, delivery: Delivery) -> StatusChange:
    found = [change for change in changes(made, delivery) if change.axis == "delivery"]
    nothing = StatusChange(notification_id="", user_id="", axis="delivery", status=Status.QUEUED, at=datetime.now(UTC))
    return max(found, key=lambda c: order(generation=c.generation, attempt=c.attempt, status=Status(c.status)), default=nothing)


def await_status(made: System, delivery: Delivery, status: str) -> StatusChange:
    found: list[StatusChange] = []

    def is_there() -> bool:
        found[:] = [current(made, delivery)]
        return found[0].status == status

    wait_for(is_there, seconds=60, what=status)
    return found[0]


def obey(made: System, *arguments: str) -> None:
    done = made.notify(*arguments)
    assert done.returncode == 0, done.stderr


def test_a_report_settles_its_delivery_whether_it_comes_before_the_outcome_after_it_or_twice(running: System) -> None:
    early, late, twice = (a_delivery(f"report-{n}", f"report-{n}") for n in range(3))
    report(running, early)
    signals = running.workers["signals-a"]
    wait_for(lambda: signals.metric("notify_events_total", outcome="waiting") == 1, seconds=30, what="it waiting")
    deliver(running, early, late, twice)
    for each in (late, twice):
        await_status(running, each, "sent")
    report(running, late, twice)
    report(running, twice)
    for each in (early, late, twice):
        settled = await_status(running, each, "delivered")
        assert (settled.attempt, settled.provider, settled.reference) == (1, "email", reference(each))
    wait_for(lambda: signals.metric("notify_events_total", outcome="repeated") >= 1, seconds=30, what="the repetition counted")
    assert sum(change.status == "delivered" for change in changes(running, twice)) == 1
    assert not running.table("signals.match", "waiting")


def test_bounced_beats_delivered_in_either_order(running: System) -> None:
    first, second = a_delivery("bounce-1", "bounce-1"), a_delivery("bounce-2", "bounce-2")
    deliver(running, first, second)
    for each, order_of in ((first, ("delivered", "bounced")), (second, ("bounced", "delivered"))):
        await_status(running, each, "sent")
        for status in order_of:
            report(running, each, status=status, code="5.1.1" if status == "bounced" else None)
            wait_for(partial(has, running, each, status), seconds=30, what=status)
    assert [current(running, each).status for each in (first, second)] == ["bounced", "bounced"]
    assert current(running, first).reason == "5.1.1"


def test_a_message_in_parts_is_delivered_when_the_reports_on_all_parts_have_met(running: System) -> None:
    whole, ill = a_delivery("parts", "parts"), a_delivery("ill", "ill")
    deliver(running, whole, ill)
    for each in (whole, ill):
        await_status(running, each, "sent")
    report(running, "part-a", "ill-a")  # before anybody knows whose they are
    for each, parts in ((whole, "part-a part-b part-c"), (ill, "ill-a ill-b")):
        publish_reference(running, each, parts)
    report(running, "part-b", "part-b", "part-a", "ill-a")
    report(running, "ill-b", status="failed", code="REJECTD")
    assert await_status(running, ill, "failed").reason == "REJECTD"
    assert not has(running, whole, "delivered")
    report(running, "part-c")
    assert await_status(running, whole, "delivered").reference == "part-a part-b part-c"
    assert not has(running, ill, "delivered")


def publish_reference(made: System, delivery: Delivery, text: str) -> None:
    known = ProviderReference(
        provider="email",
        reference=text,
        notification_id=delivery.notification_id,
        delivery_id=delivery.delivery_id,
        user_id=delivery.user_id,
        channel=delivery.channel,
        lane=delivery.lane,
        generation=0,
        attempt=1,
        at=datetime.now(UTC),
    )
    encoded = codec_of(made, topics.PROVIDER_REFS).encode(known)
    made.produce(topics.PROVIDER_REFS, [(report_key(known.provider, text), encoded)])


def has(made: System, delivery: Delivery, status: str) -> bool:
    return any(change.status == status for change in changes(made, delivery))


def test_a_report_on_an_attempt_of_unknown_end_settles_it_and_it_is_not_sent_again(running: System) -> None:
    unknown = a_delivery("unknown", "unknown", address="drop-stored@example.com", category="messages")
    deliver(running, unknown)
    sender = running.workers["sender-normal-a"]
    wait_for(lambda: sender.metric("notify_unknown_deliveries", channel="email") == 1, seconds=40, what="an attempt of unknown end shown")
    assert has(running, unknown, "unknown")
    report(running, unknown)
    wait_for(lambda: sender.metric("notify_settled_total", channel="email", status="delivered") == 1, seconds=60, what="it settled")
    assert current(running, unknown).status == "delivered"
    row = running.table("sender-normal.send", "attempts")[unknown.delivery_id.encode()]
    assert Attempt.of(row).state is AttemptState.DONE
    # what comes back of it begins nothing
    begun = sum(change.status == "sending" for change in changes(running, unknown))
    suppressed = sender.metric("notify_suppressed_total", channel="email")
    publish(running, topics.deliver("email", "normal"), [replace(unknown, attempt=Attempt.of(row).number + 1)])
    wait_for(lambda: sender.metric("notify_suppressed_total", channel="email") > suppressed, seconds=30, what="it suppressed")
    assert sum(change.status == "sending" for change in changes(running, unknown)) == begun
    wait_for(lambda: sender.metric("notify_unknown_deliveries", channel="email") == 0, seconds=30, what="nothing unknown any more")


def test_a_report_that_nothing_was_sent_for_is_a_dead_letter_after_three_days(running: System) -> None:
    now = datetime.now(UTC)
    old = DeliveryReport(report_id="old", provider="email", reference="nobody@example", status="delivered", at=now)
    codec = codec_of(running, topics.RECEIPTS)
    producer = Producer({"bootstrap.servers": running.stack.kafka, "partitioner": "murmur2_random"})
    raw = codec.encode(old)
    read_ms = round((now - timedelta(hours=73)).timestamp() * 1000)
    producer.produce(running.topic(topics.RECEIPTS), raw, b"email nobody@example", timestamp=read_ms)
    assert producer.flush(30) == 0
    letter = wait_for(
        lambda: [m for m in running.read(topics.DEAD) if dict(m.headers() or ())["error"] == b"unknown_reference"],
        seconds=40,
        what="its dead letter",
    )[0]
    headers = dict(letter.headers() or ())
    assert (letter.value(), letter.key()) == (raw, b"email nobody@example")
    assert (headers["topic"], headers["timestamp"]) == (b"receipts", str(read_ms).encode())


def test_a_bad_report_is_named_by_its_line_and_the_others_are_published(running: System) -> None:
    good = {"provider": "p", "reference": "r-good", "status": "delivered", "at": "2026-03-01T00:00:00Z"}
    lines = [good, {**good, "status": "read"}, {**good, "reference": ""}]
    done = running.notify("receipts", "load", "-", "--json", stdin="".join(json.dumps(line) + "\n" for line in lines))
    assert done.returncode == 1
    summary = json.loads(done.stdout)
    assert (summary["published"], [problem["line"] for problem in summary["problems"]]) == (1, [2, 3])


def test_what_a_provider_has_not_taken_is_recalled_while_it_is_down_and_never_sent(running: System) -> None:
    let_mail_server(running, mode="unreachable")
    try:
        recalled = [a_delivery(f"recall-{n}", f"recall-{n}", rule="back_in_stock", category="watches") for n in range(30)]
        by_event, by_id, kept = (a_delivery(f"recall-{name}", f"recall:{name}") for name in ("event", "id", "kept"))
        deliver(running, *recalled, by_event, by_id, kept)
        wait_for(
            lambda: running.workers["sender-normal-a"].metric("notify_paused_partitions", channel="email") >= 1, seconds=40, what="held"
        )
        wait_for(
            lambda: running.workers["sender-normal-a"].metric("notify_waiting_deliveries", channel="email") >= 33,
            seconds=30,
            what="all there",
        )
        obey(running, "recall", "--rule", "back_in_stock", "--reason", "the import ran twice")
        obey(running, "recall", "--event", "test:recall:event", "--reason", "wrong price")
        obey(running, "recall", "--notification", by_id.notification_id, "--reason", "wrong user")
        for each, reason in ((by_event, "wrong price"), (by_id, "wrong user"), *((each, "the import ran twice") for each in recalled)):
            assert await_status(running, each, "cancelled").reason == f"recalled: {reason}"
    finally:
        let_mail_server(running, mode="none")
    await_status(running, kept, "sent")
    mails = running.mails()
    assert mails[kept.delivery_id] == 1
    assert not [each for each in (*recalled, by_event, by_id) if mails[each.delivery_id]]


def test_a_recall_stops_in_app_messages_and_is_known_to_a_sender_that_starts_later(running: System) -> None:
    delivery = a_delivery("recall-inbox", "recall-inbox", channel=Channel.IN_APP, lane=Lane.CRITICAL)
    obey(running, "recall", "--notification", delivery.notification_id, "--reason", "too early")
    deliver(running, delivery)
    running.await_ready(running.start("sender-critical"), seconds=60)
    found = await_status(running, delivery, "cancelled")
    assert (found.attempt, found.provider) == (0, None)
    assert [change.status for change in changes(running, delivery)] == ["cancelled"]


def test_what_comes_back_from_a_wait_was_recalled_meanwhile(running: System) -> None:
    delivery = a_delivery("recall-wait", "recall-wait", address="refuse-451@example.com")
    deliver(running, delivery)
    wait_for(partial(has, running, delivery, "retrying"), seconds=30, what="a refusal")
    obey(running, "recall", "--notification", delivery.notification_id, "--reason", "not needed any more")
    found = await_status(running, delivery, "cancelled")
    assert found.attempt == 1, "the attempt that began last"
    assert max(change.attempt for change in changes(running, delivery)) == 1


def test_a_recall_by_rule_spares_what_is_accepted_later_and_a_lifted_one_everything(running: System) -> None:
    obey(running, "recall", "--rule", "low_stock", "--before", "1h", "--reason", "old news")
    obey(running, "recall", "--rule", "out_of_stock", "--before", "2100-01-01T00:00:00Z", "--reason", "a drill")
    listed = [json.loads(line) for line in running.notify("recall", "list", "--json").stdout.splitlines()]
    assert {"recall:rule:low_stock", "recall:rule:out_of_stock"} <= {entry["scope"] for entry in listed}
    later = a_delivery("later", "later", rule="low_stock", category="inventory")
    drill = a_delivery("drill", "drill", rule="out_of_stock", category="inventory")
    deliver(running, later, drill)
    await_status(running, later, "sent")
    await_status(running, drill, "cancelled")
    obey(running, "recall", "lift", "recall:rule:out_of_stock")
    again = a_delivery("again", "again", rule="out_of_stock", category="inventory")
    deliver(running, again)
    await_status(running, again, "sent")
    assert running.notify("recall", "lift", "recall:rule:out_of_stock").returncode == 1


def test_a_hard_bounce_that_a_provider_reports_later_skips_the_next_notification_and_its_decision_says_why(running: System) -> None:
    running.load_preferences([{"userId": "dead-box", "email": "dead-box@example.com"}])
    codec = codec_of(running, topics.requests(Lane.NORMAL))

    def ask(event: str) -> DecisionRecord:
        asked = NotificationRequested(
            event_id=event,
            producer="test",
            rule="message",
            user_id="dead-box",
            data={"title": "Hello", "message": "World"},
            occurred_at=datetime.now(UTC),
        )
        running.produce(topics.requests(Lane.NORMAL), [(b"dead-box", codec.encode(asked))])
        identity = notification_id(producer="test", event_id=event, rule="message", user_id="dead-box")

        def decided() -> DecisionRecord | None:
            found = running.messages(topics.DECISIONS, DecisionRecord)
            return next((each for each in found if each.notification_id == identity), None)

        record = wait_for(decided, seconds=40, what=f"{event} decided")
        assert isinstance(record, DecisionRecord)
        return record

    def email(record: DecisionRecord) -> tuple[str, str | None]:
        return next((choice.reason, choice.delivery_id) for choice in record.channels if choice.channel == Channel.EMAIL)

    reason, identity = email(ask("dead-box-1"))
    assert reason == "on by default"
    sent = replace(a_delivery("dead-box", "dead-box-1"), delivery_id=identity or "")
    await_status(running, sent, "sent")
    report(running, sent, status="bounced", code="5.1.1", suppresses="hard_bounce")
    await_status(running, sent, "bounced")
    assert len([entry for entry in json_lines(running, "recall", "list", "--json") if entry["reason"] == "hard_bounce"]) == 1
    wait_for(lambda: email(ask(f"dead-box-{datetime.now(UTC)}"))[0] == "suppressed: hard_bounce", seconds=30, what="the next one skipped")
    assert b"dead-box@" not in b"".join(key + value for key, value in running.rows(topics.CONTROL).items())


def json_lines(made: System, *arguments: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in made.notify(*arguments).stdout.splitlines()]


def test_the_router_sends_nothing_to_a_suppressed_address_and_decides_nothing_that_is_recalled(running: System) -> None:
    running.load_preferences([{"userId": "blocked", "email": "Blocked@Example.com"}])
    obey(running, "suppress", "blocked@example.com", "--reason", "hard bounce")
    obey(running, "recall", "--event", "test:stopped", "--reason", "wrong price")
    codec = codec_of(running, topics.requests(Lane.NORMAL))
    asked = [
        NotificationRequested(
            event_id=event,
            producer="test",
            rule="message",
            user_id="blocked",
            data={"title": "Hello", "message": "World"},
            occurred_at=datetime.now(UTC),
        )
        for event in ("blocked", "stopped")
    ]
    running.produce(topics.requests(Lane.NORMAL), [(each.user_id.encode(), codec.encode(each)) for each in asked])
    ids = [notification_id(producer="test", event_id=each.event_id, rule="message", user_id="blocked") for each in asked]

    def decisions() -> dict[str, DecisionRecord]:
        found = running.messages(topics.DECISIONS, DecisionRecord)
        return {each.notification_id: each for each in found if each.notification_id in ids}

    wait_for(lambda: len(decisions()) == 2, seconds=40, what="both decided")
    assert {c.channel: c.reason for c in decisions()[ids[0]].channels}["email"] == "suppressed: hard bounce"
    assert (decisions()[ids[1]].outcome, decisions()[ids[1]].reason) == ("cancelled", "recalled: wrong price")
    stored = b"".join(value + key for key, value in running.rows(topics.CONTROL).items()).lower()
    assert b"blocked@" not in stored
