"""The roles beside the payments' path through crashes, poison and replay: stock, broadcast, the other senders, signals, store."""

from __future__ import annotations

import json
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache

import pytest
from fastavro import parse_schema

from agents.inbox import Notification, after_decision, after_status
from agents.receipts import report_key
from agents.stock import product_audience, warehouse_audience
from schemas import topics
from schemas.codec import frame
from schemas.ids import delivery_id, digest, notification_id
from schemas.messages import (
    Command,
    DecisionRecord,
    Delivery,
    DeliveryReport,
    EngagementSignal,
    Message,
    NotificationRequested,
    OutOfStock,
    ProviderReference,
    StatusChange,
    UserAction,
)
from schemas.topics import Channel, Lane, deliver, requests
from streams.cli.wire import Wire
from streams.embedded.stack import Stack
from streams.topics import specs
from tests.harness import System, WorkerProcess, system, wait_for
from tests.integration.test_store import stored

ROLES = ("ingest", "stock", "router", "sender-critical", "sender-normal", "sender-bulk", "signals", "views", "store")
PRODUCTS, STAFF, WATCHERS, ROUNDS = 40, 5, 5, 6
BOUND = 32  # calls that a sender has open at once, and so what its kill may double
START = datetime(2026, 3, 1, 12, tzinfo=UTC)
SCHEMA = {
    "type": "record",
    "name": "InventoryAdjusted",
    "fields": [
        {"name": name, "type": kind}
        for name, kind in (
            ("eventId", "string"),
            ("productId", "string"),
            ("warehouseId", "string"),
            ("previousQuantity", "int"),
            ("newQuantity", "int"),
            ("timestamp", "string"),
        )
    ],
}


@pytest.fixture(scope="module")
def running(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with system(stack, tmp_path_factory.mktemp("roles")) as made:
        for role in ROLES:
            made.start(role)
        made.await_ready(seconds=120)
        people = [*(f"staff-{i}" for i in range(STAFF)), *(f"watcher-{i}" for i in range(WATCHERS))]
        made.load_preferences({"userId": user, "email": f"{user}@example.com"} for user in people)
        audiences = [(f"staff-{i}", warehouse_audience("w1")) for i in range(STAFF)]
        audiences += [(f"watcher-{i}", product_audience(f"p{n}")) for i in range(WATCHERS) for n in range(PRODUCTS)]
        publish(made, topics.COMMANDS, [command(user, audience) for user, audience in audiences])
        wait_for(lambda: len(made.rows(topics.WATCHES)) == len(audiences), seconds=60, what="every watch")
        yield made


def command(user: str, audience: str) -> tuple[bytes, Command]:
    number = digest(user, audience, size=8)
    return user.encode(), Command(command_id=number, user_id=user, kind="watch", audience=audience, issued_at=START)


def publish(made: System, topic: str, records: Sequence[tuple[bytes, Message]]) -> None:
    """Publish messages to one of our own topics."""
    with Wire(made.settings) as wire:
        codec = wire.codec([spec for spec in specs() if spec.name == topic])
    made.produce(topic, [(key, codec.encode(message)) for key, message in records])


@cache
def parsed() -> object:
    return parse_schema(SCHEMA)


def adjust(made: System, run: str, rounds: range) -> list[tuple[bytes | None, bytes]]:
    """Return adjustments: in even rounds every product runs out, in odd ones it is back."""
    number = made.register(f"{made.topic('inventory')}-value", json.dumps(SCHEMA))
    found: list[tuple[bytes | None, bytes]] = []
    for round_ in rounds:
        for product in range(PRODUCTS):
            is_out = round_ % 2 == 0
            row = {
                "eventId": event_id(run, round_, product),
                "productId": f"p{product}",
                "warehouseId": "w1",
                "previousQuantity": 50 if is_out else 0,
                "newQuantity": 0 if is_out else 50,
                "timestamp": (datetime.now(UTC).replace(microsecond=0) + timedelta(milliseconds=round_)).isoformat(),
            }
            found.append((f"p{product}".encode(), frame(number, parsed(), row)))
    return found


def event_id(run: str, round_: int, product: int) -> str:
    return f"{run}-{round_}-{product}"


def expected(run: str, rounds: range) -> dict[str, set[str]]:
    """Return the notifications that adjustments become, by lane."""
    found: dict[str, set[str]] = {Lane.CRITICAL: set(), Lane.BULK: set()}
    for round_ in rounds:
        lane, rule, who, count = (
            (Lane.CRITICAL, "out_of_stock", "staff", STAFF) if round_ % 2 == 0 else (Lane.BULK, "back_in_stock", "watcher", WATCHERS)
        )
        for product in range(PRODUCTS):
            for person in range(count):
                found[lane].add(
                    notification_id(producer="inventory", event_id=event_id(run, round_, product), rule=rule, user_id=f"{who}-{person}")
                )
    return found


def kill_when_moved(made: System, role: str, records: int) -> Callable[[], WorkerProcess]:
    """Return what kills the worker of `role` once it has moved so many more records."""
    worker = made.workers[f"{role}-a"]
    base = worker.metric("notify_records_total")

    def kill() -> WorkerProcess:
        wait_for(lambda: worker.metric("notify_records_total") - base >= records, seconds=60, what=f"{role} moved {records}")
        lives = worker.starts
        worker.kill()
        wait_for(lambda: worker.starts > lives, seconds=10, what="its restart")
        return worker

    return kill


def counted(made: System, topic: str, ids: set[str]) -> Counter[str]:
    """Return how often each delivery of these notifications is in a topic."""
    found = made.messages(topic, Delivery)
    return Counter(delivery.delivery_id for delivery in found if delivery.notification_id in ids)


def test_stock_broadcasts_and_both_other_senders_survive_kills(running: System) -> None:
    rounds = range(ROUNDS)
    wanted = expected("crash", rounds)
    victims = ["stock", "sender-critical", "sender-bulk", "ingest", "router"]
    killers = [kill_when_moved(running, role, count) for role, count in zip(victims, (40, 60, 60, 80, 300), strict=True)]
    adjustments = adjust(running, "crash", rounds)
    step = len(adjustments) // len(victims)
    for n, kill in enumerate(killers):
        running.produce(topics.INVENTORY, adjustments[n * step : (n + 1) * step if n < len(victims) - 1 else None])
        assert kill().exits[-1] == -signal.SIGKILL
    mailed = {delivery_id(found, Channel.EMAIL) for lane in wanted.values() for found in lane}  # type: ignore[arg-type]  # ids as text
    wait_for(lambda: mailed <= running.mails().keys(), seconds=150, what="every mail")
    out = running.messages(topics.OUT_OF_STOCK, OutOfStock)
    ran_out = Counter(event.metadata["triggeredBy"] for event in out if event.metadata["triggeredBy"].startswith("crash-"))
    assert ran_out == {event_id("crash", round_, product): 1 for round_ in rounds if round_ % 2 == 0 for product in range(PRODUCTS)}
    asked = Counter(
        (request.event_id, request.user_id)
        for lane in (Lane.CRITICAL, Lane.BULK)
        for record in running.read(requests(lane))
        if (request := running.decode(record, NotificationRequested)).event_id.startswith("crash-")
    )
    assert (len(asked), set(asked.values())) == (sum(map(len, wanted.values())), {1})
    mails = Counter({found: n for found, n in running.mails().items() if found in mailed})
    doubled = mails.total() - len(mailed)
    print(f"\nroles: {len(adjustments)} adjustments, {len(out)} OutOfStock, {len(mailed)} mails, doubled {doubled}, killed {len(victims)}")
    for lane, ids in wanted.items():
        for channel in (Channel.EMAIL, Channel.IN_APP):
            found = counted(running, deliver(channel, lane), ids)
            assert (len(found), set(found.values())) == (len(ids), {1})
    assert doubled <= 2 * BOUND, "for each of the two killed senders"


def test_reads_are_told_once_although_signals_is_killed(running: System) -> None:
    found = notification_id(producer="t", event_id="e", rule="message", user_id="reader")
    signals = [
        (
            b"reader",
            EngagementSignal(
                signal_id=f"s{n}", notification_id=found, user_id="reader", engagement="read", at=START + timedelta(seconds=n)
            ),
        )
        for n in range(2_000)
    ]
    worker = running.workers["signals-a"]
    base = worker.metric("notify_records_total")
    publish(running, topics.SIGNALS, signals[:1_000])
    wait_for(lambda: worker.metric("notify_records_total") > base, seconds=30, what="signals works")
    worker.kill()
    publish(running, topics.SIGNALS, signals[1_000:])

    def told() -> Counter[datetime]:
        changes = running.messages(topics.STATUS, StatusChange)
        return Counter(change.at for change in changes if change.notification_id == found)

    wait_for(lambda: len(told()) == len(signals), seconds=60, what="every read told")
    assert set(told().values()) == {1}


def settled(number: int) -> tuple[tuple[bytes, ProviderReference], tuple[bytes, DeliveryReport]]:
    """Return the reference of an attempt of unknown end, and the report that it arrived."""
    name, user = f"settled-{number}@example.com", f"settled-{number % 50}"
    identity = notification_id(producer="t", event_id=name, rule="message", user_id=user)
    known = ProviderReference(
        provider="email",
        reference=name,
        notification_id=identity,
        delivery_id=delivery_id(identity, Channel.EMAIL),
        user_id=user,
        channel=Channel.EMAIL,
        lane=Lane.NORMAL,
        generation=0,
        attempt=1,
        at=START,
        is_unknown=True,
    )
    report = DeliveryReport(report_id=name, provider="email", reference=name, status="delivered", at=START)
    key = report_key("email", name)
    return (key, known), (key, report)


def test_reports_settle_their_deliveries_once_although_signals_is_killed(running: System) -> None:
    references, reports = zip(*map(settled, range(2_000)), strict=True)
    worker = running.workers["signals-a"]
    base = worker.metric("notify_records_total", topic=topics.RECEIPTS)
    # most of the reports come before their reference
    publish(running, topics.PROVIDER_REFS, references[:500])
    publish(running, topics.RECEIPTS, reports[:1_000])
    wait_for(lambda: worker.metric("notify_records_total", topic=topics.RECEIPTS) > base, seconds=30, what="reports flow")
    worker.kill()
    publish(running, topics.RECEIPTS, reports[1_000:])
    publish(running, topics.PROVIDER_REFS, references[500:])
    wanted = Counter(known.delivery_id for _, known in references)

    def told(topic: str) -> Counter[str | None]:
        return Counter(each.delivery_id for each in running.messages(topic, StatusChange) if each.delivery_id in wanted)

    wait_for(lambda: told(topics.STATUS).keys() == wanted.keys(), seconds=60, what="every delivery settled")
    assert told(topics.STATUS) == wanted
    assert told(topics.settled(Lane.NORMAL)) == wanted
    assert not running.table("signals.match", "waiting")


def test_a_password_reset_and_a_strange_action_are_decided_each_in_its_way(running: System) -> None:
    running.load_preferences([{"userId": "forgetful", "email": "forgetful@example.com"}])
    actions = [
        UserAction(
            action_id="reset-1", user_id="forgetful", action="password_reset_requested", data={"code": "123 456"}, occurred_at=START
        ),
        UserAction(action_id="dance-1", user_id="forgetful", action="danced", occurred_at=START),
    ]
    publish(running, topics.USER_ACTIONS, [(b"forgetful", action) for action in actions])
    reset = notification_id(producer="user-actions", event_id="reset-1", rule="password_reset", user_id="forgetful")
    wait_for(lambda: running.mails()[delivery_id(reset, Channel.EMAIL)] == 1, seconds=30, what="the mail")
    shown = wait_for(
        lambda: found.stdout if "no_rule_matched" in (found := running.notify("why", "forgetful", "dance-1")).stdout else None,
        seconds=30,
        what="the decision about the dance",
    )
    assert "danced" in shown


def test_poison_in_public_topics_in_reports_and_in_deliveries_harms_nobody(running: System) -> None:
    dice = random.Random(11)
    public = (topics.INVENTORY, topics.USER_ACTIONS, topics.PRODUCTS, topics.COMMANDS, *(requests(lane) for lane in Lane))
    ours = (topics.SIGNALS, topics.RECEIPTS, topics.PROVIDER_REFS, *(deliver(Channel.EMAIL, lane) for lane in Lane))
    noise = {topic: [dice.randbytes(dice.randrange(1, 100)) for _ in range(50)] for topic in (*public, *ours)}
    adjustments = adjust(running, "poison", range(2))
    for topic, values in noise.items():
        records: list[tuple[bytes | None, bytes]] = [(dice.randbytes(8), value) for value in values]
        if topic == topics.INVENTORY:
            records += adjustments
            # a stable order for each product; noise between
            records = sorted(records, key=lambda record: dice.random() if record[1] in noise[topics.INVENTORY] else 0.5)
        running.produce(topic, records)
    wanted = expected("poison", range(2))
    mailed = {delivery_id(found, Channel.EMAIL) for lane in wanted.values() for found in lane}  # type: ignore[arg-type]  # ids as text
    wait_for(lambda: mailed <= running.mails().keys(), seconds=90, what="every mail among the poison")

    def dead() -> bool:
        values = Counter(record.value() for record in running.read(topics.DEAD))
        return all(values[value] >= 1 for each in noise.values() for value in each)

    wait_for(dead, seconds=30, what="every random record in dead, as it came")


def rows_of_the_log(made: System) -> dict[str, bytes]:
    """Return the rows that the store has to have: what follows from all decisions and statuses."""
    rows: dict[str, Notification | None] = {}
    for decision in made.messages(topics.DECISIONS, DecisionRecord):
        rows[decision.notification_id] = after_decision(rows.get(decision.notification_id), decision)
    for change in made.messages(topics.STATUS, StatusChange):
        rows[change.notification_id] = after_status(rows.get(change.notification_id), change)
    return {notification: row.encode() for notification, row in rows.items() if row is not None}


def test_groups_reset_to_the_beginning_repeat_nothing_in_any_role(running: System) -> None:
    watched = (topics.OUT_OF_STOCK, topics.BROADCAST, topics.DECISIONS, *(requests(lane) for lane in Lane))
    counts = {topic: running.count(topic) for topic in watched}
    shown = (("stock.level", "levels"), ("router.decide", "watching"))
    tables = {place: running.table(*place) for place in shown}
    watches = running.rows(topics.WATCHES)
    mails = running.mails()
    wait_for(lambda: stored(running) == rows_of_the_log(running), seconds=60, what="the store has everything")
    running.stop(*(running.workers[f"{role}-a"] for role in ROLES))
    running.delete_groups(ROLES)
    for role in ROLES:
        running.start(role)
    running.await_ready(seconds=120)
    running.produce(topics.INVENTORY, adjust(running, "after", range(1)))
    wanted = expected("after", range(1))[Lane.CRITICAL]
    mailed = {delivery_id(found, Channel.EMAIL) for found in wanted}  # type: ignore[arg-type]  # ids as text
    wait_for(lambda: mailed <= running.mails().keys(), seconds=60, what="new mails after the reset")
    assert {found: n for found, n in running.mails().items() if found not in mailed} == mails
    new = {topics.OUT_OF_STOCK: PRODUCTS, topics.BROADCAST: PRODUCTS * running.partitions, requests(Lane.CRITICAL): len(wanted)}
    new[topics.DECISIONS] = PRODUCTS + len(wanted)
    assert {topic: running.count(topic) - counts[topic] for topic in watched} == {topic: new.get(topic, 0) for topic in watched}
    assert watches.keys() <= running.rows(topics.WATCHES).keys()
    for place, before in tables.items():
        assert before.keys() <= running.table(*place).keys()
    wait_for(
        lambda: stored(running) == rows_of_the_log(running), seconds=60, what="the store has the new ones, and the others as they were"
    )
