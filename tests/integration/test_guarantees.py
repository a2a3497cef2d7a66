"""What the whole system promises, with every role in a process of its own on a real broker and a real mail server."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import signal
import threading
from collections import Counter
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fastavro import parse_schema

from schemas.codec import frame, pack, unpack
from schemas.ids import notification_id, partition_of
from schemas.messages import DecisionRecord, Delivery, NotificationRequested, StatusChange, UserPreferences
from schemas.topics import Channel, Lane, deliver, requests
from streams.embedded.stack import Stack
from tests.harness import PARTITIONS, System, WorkerProcess, system, wait_for

ROLES = ("ingest", "router", "sender-critical", "sender-normal", "delay", "signals", "views")
GOOD = 2_000
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def running(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with system(stack, tmp_path_factory.mktemp("guarantees")) as made:
        for role in ROLES:
            made.start(role)
        made.await_ready(seconds=120)
        yield made


def payment(number: int, user: str, *, run: str, status: str = "confirmed", **more: object) -> dict[str, object]:
    return {
        "transactionId": f"{run}-txn-{number}",
        "paymentId": f"{run}-pay-{number}",
        "userId": user,
        "orderId": f"ord-{number}",
        "amount": 10.0 + number % 90,
        "currency": "USD",
        "paymentMethod": "CreditCard",
        "status": status,
        "confirmationDetails": {"gatewayResponse": "approved", "transactionId": f"gw-{number}"},
        "timestamp": "2026-03-15T11:04:33.218Z",
        **more,
    }


def mailing(users: list[str]) -> list[dict[str, object]]:
    return [{"userId": user, "name": f"Name of {user}", "email": f"{user}@example.com"} for user in users]


def of_run(system: System, topic: str, kind: type[Any], ids: Collection[str]) -> list[Any]:
    """Return the messages of a topic that are about these notifications."""
    return [message for message in system.messages(topic, kind) if message.notification_id in ids]


def decided(system: System, ids: set[str]) -> set[str]:
    return {record.notification_id for record in of_run(system, "decisions", DecisionRecord, ids)}


def changes(system: System, *ids: str) -> list[StatusChange]:
    return of_run(system, "status", StatusChange, set(ids))


def outcomes(system: System, found: str) -> Counter[str]:
    return Counter(record.outcome for record in of_run(system, "decisions", DecisionRecord, {found}))


def inbox_of(system: System, user: str) -> list[Any]:
    found: list[Any] = system.web(f"/users/{user}/notifications")[1]["notifications"]
    return found


def identity(run: str, number: int, user: str, status: str = "confirmed") -> str:
    return notification_id(producer="payments", event_id=f"payment:{run}-pay-{number}:{status}", rule=f"payment_{status}", user_id=user)


def test_the_contracts_payments_reach_mailbox_and_inbox_and_can_be_explained(running: System) -> None:
    samples = [json.loads(line) for line in (ROOT / "schemas/samples/payments.ndjson").read_text().splitlines()]
    people = [json.loads(line) for line in (ROOT / "schemas/samples/preferences.ndjson").read_text().splitlines()]
    running.load_preferences(people)
    running.produce("payments", running.frame_payments(samples))
    wait_for(
        lambda: [m for m in running.read("dead") if dict(m.headers() or ())["error"] == b"unroutable"],
        seconds=30,
        what="the payment without a user in dead",
    )
    customer = "cust_10482"
    path = f"/users/{customer}/notifications"
    status, page = wait_for(lambda: (found := running.web(path, user=customer))[1]["notifications"] and found, seconds=30, what="an inbox")
    assert status == 200
    found = page["notifications"][0]["notificationId"]

    def trail() -> Any:
        answer = running.web(f"/notifications/{found}/trail", user=customer)[1]
        return answer if {d["status"] for d in answer["deliveries"]} == {"sent", "delivered"} else None

    explained = wait_for(trail, seconds=30, what="both channels done")
    assert explained["decision"]["outcome"] == "notified"
    assert running.mails()[f"{found}-email"] == 1
    assert running.web(f"/notifications/{found}", user=customer)[1]["status"] == "unread"
    assert running.web(f"/notifications/{found}/read", user=customer, method="POST")[0] in {202, 204}
    wait_for(lambda: running.web(f"/notifications/{found}", user=customer)[1]["status"] == "read", seconds=20, what="read")
    assert running.web(f"/notifications/{found}", user="somebody-else")[0] == 404


def test_a_foreign_producer_with_its_own_record_name_partitioner_and_fields_is_understood(running: System) -> None:
    users = [f"foreign-{i}" for i in range(20)]
    running.load_preferences(mailing(users))
    schema = {
        "type": "record",
        "name": "Zahlung",
        "namespace": "de.example",
        "fields": [
            {"name": "paymentId", "type": "string"},
            {"name": "userId", "type": "string"},
            {"name": "orderId", "type": ["null", "string"]},
            {"name": "amount", "type": "double"},
            {"name": "status", "type": {"type": "enum", "name": "Stand", "symbols": ["PROCESSED", "OFFEN"]}},
            {"name": "at", "type": "long"},
            {"name": "extra", "type": {"type": "map", "values": "string"}},
        ],
    }
    number = running.register("zahlungen-value", json.dumps(schema))
    rows = [
        {"paymentId": f"z-{i}", "userId": user, "orderId": None, "amount": 1.5, "status": "PROCESSED", "at": 1, "extra": {"a": "b"}}
        for i, user in enumerate(users)
    ]
    # no keys, and librdkafka's default partitioner: records of a user land anywhere
    running.produce("payments", [(None, frame(number, parse_schema(schema), row)) for row in rows], partitioner="consistent_random")
    wanted = {
        f"{notification_id(producer='payments', event_id=f'payment:z-{i}:confirmed', rule='payment_confirmed', user_id=u)}-email"
        for i, u in enumerate(users)
    }
    wait_for(lambda: wanted <= set(running.mails()), seconds=40, what="a mail for each")
    for user in users:
        page = wait_for(partial(inbox_of, running, user), seconds=20, what=f"the inbox of {user}")
        assert len(page) == 1


def test_an_event_sent_again_at_a_new_offset_is_a_duplicate_and_changes_nothing(running: System) -> None:
    running.load_preferences(mailing(["again"]))
    event = payment(1, "again", run="again")
    running.produce("payments", running.frame_payments([event, event]))
    other = {**event, "amount": 99_999.0}
    running.produce("payments", running.frame_payments([other]))
    found = identity("again", 1, "again")
    wait_for(lambda: outcomes(running, found).total() == 3, seconds=30, what="three decisions")
    assert outcomes(running, found) == {"notified": 1, "duplicate_of": 1, "conflict": 1}
    wait_for(lambda: running.mails()[f"{found}-email"], seconds=30, what="the mail")
    assert len(of_run(running, deliver(Channel.EMAIL, Lane.NORMAL), Delivery, {found})) == 1


def test_a_pending_payment_after_its_final_status_is_superseded(running: System) -> None:
    running.produce("payments", running.frame_payments([payment(1, "late", run="late")]))
    first = identity("late", 1, "late")
    wait_for(lambda: of_run(running, "decisions", DecisionRecord, {first}), seconds=30, what="the confirmed one")
    running.produce("payments", running.frame_payments([payment(1, "late", run="late", status="pending")]))
    second = identity("late", 1, "late", "pending")
    record = wait_for(lambda: of_run(running, "decisions", DecisionRecord, {second}), seconds=30, what="the pending one")[0]
    assert (record.outcome, record.reason) == ("skipped", "superseded")
    # of one transaction, yet each partition becomes visible by a marker of its own
    shown = wait_for(lambda: of_run(running, "status", StatusChange, {second}), seconds=10, what="its status")
    assert {c.status for c in shown} == {"skipped"}


def test_without_an_address_mail_is_skipped_and_the_inbox_still_used(running: System) -> None:
    running.produce("payments", running.frame_payments([payment(1, "nowhere", run="nowhere")]))
    found = identity("nowhere", 1, "nowhere")
    wait_for(lambda: running.web("/users/nowhere/notifications")[1]["notifications"], seconds=30, what="the inbox")
    reasons = {c.channel: (c.status, c.reason) for c in of_run(running, "status", StatusChange, {found}) if c.attempt == 0}
    assert reasons == {"email": ("skipped", "no_address"), "in_app": ("queued", None)}


def test_a_permanent_refusal_is_failed_with_the_servers_code_and_a_refusing_server_loses_nothing(running: System) -> None:
    running.load_preferences([{"userId": "refused", "email": "refuse-550@example.com"}, *mailing(["patient"])])
    _fault(running, {"mode": "refuse", "code": 451})
    try:
        running.produce("payments", running.frame_payments([payment(1, "patient", run="patient")]))
        patient = identity("patient", 1, "patient")
        wait_for(lambda: [c for c in changes(running, patient) if c.status == "retrying"], seconds=30, what="a retry")
    finally:
        _fault(running, {"mode": "none"})
    wait_for(lambda: running.mails()[f"{patient}-email"], seconds=40, what="the mail after the outage")
    running.produce("payments", running.frame_payments([payment(1, "refused", run="refused")]))
    refused = identity("refused", 1, "refused")
    failed = wait_for(lambda: [c for c in changes(running, refused) if c.status == "failed"], seconds=30, what="failed")[0]
    assert failed.reason.startswith("550")


def _fault(system: System, body: dict[str, object]) -> None:
    import urllib.request

    request = urllib.request.Request(
        f"{system.stack.mail_http}/api/faults", json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status < 300


def test_with_the_registry_away_unknown_schemas_park_and_return_and_others_go_on(running: System, stack: Stack) -> None:
    fields = [{"name": name, "type": "string"} for name in ("paymentId", "userId", "status")]
    schema = {"type": "record", "name": "NewcomersPayment", "fields": fields}
    number = running.register("newcomer-value", json.dumps(schema))
    newcomers = [
        (None, frame(number, parse_schema(schema), {"paymentId": f"park-pay-{i}", "userId": f"park-{i}", "status": "pending"}))
        for i in range(8)
    ]
    assert stack.registry_process is not None
    asyncio.run(stack.registry_process.kill())
    try:
        known = running.frame_payments([payment(i, f"known-{i}", run="known", status="pending") for i in range(8)])
        running.produce("payments", [record for pair in zip(newcomers, known, strict=True) for record in pair])
        others = {identity("known", i, f"known-{i}", "pending") for i in range(8)}
        wait_for(lambda: decided(running, others) == others, seconds=30, what="the known ones decided")
        assert len({m.value() for m in running.read("parked")} & {value for _, value in newcomers}) == 8
    finally:
        asyncio.run(stack.registry_process.start())
    parked = {identity("park", i, f"park-{i}", "pending") for i in range(8)}
    wait_for(lambda: decided(running, parked) == parked, seconds=30, what="the parked ones decided, by themselves")
    assert not [m for m in running.read("dead") if m.value() in {value for _, value in newcomers}]


def test_a_schema_that_the_registry_does_not_know_is_a_dead_letter(running: System) -> None:
    raw = b"\0" + (999_999).to_bytes(4, "big") + b"whatever"
    running.produce("payments", [(b"k", raw)])
    wait_for(
        lambda: [m for m in running.read("dead") if m.value() == raw and dict(m.headers() or ())["error"] == b"unknown_schema"],
        seconds=30,
        what="it in dead",
    )


def test_poison_among_good_events_harms_nobody(running: System) -> None:
    dice = random.Random(7)
    users = [f"poison-{i}" for i in range(50)]
    good = [payment(i, users[i % 50], run="poison", status="pending") for i in range(GOOD)]
    framed = running.frame_payments(good)
    noise: list[tuple[bytes | None, bytes]] = [(None, dice.randbytes(dice.randrange(1, 200))) for _ in range(1_000)]
    absurd: list[dict[str, object]] = []
    for i in range(100):
        whole = payment(i, f"absurd-{i}", run="absurd", status="pending")
        absurd.append(
            [
                {**whole, "userId": ""},
                {**whole, "amount": -5.0},
                {**whole, "orderId": "x" * 900_000},
                {**whole, "orderId": "{{ 7 * 7 }}{% for x in range(10**9) %}"},
                {**whole, "orderId": "ord\u202egnp.exe"},
            ][i % 5]
        )
    records = [*framed, *noise, *running.frame_payments(absurd)]
    dice.shuffle(records)
    before = Counter(bytes(m.value() or b"") for m in running.read("dead"))
    decisions = running.count("decisions")
    # what has no key is not to gather in one partition, where it would be most of what comes and halt the input
    running.produce("payments", records, sticky_partitioning_linger_ms=0)
    wanted = {identity("poison", i, users[i % 50], "pending") for i in range(GOOD)}
    wait_for(lambda: running.count("decisions") >= decisions + GOOD, seconds=90, what="a decision for each good one")
    wait_for(lambda: decided(running, wanted) == wanted, seconds=30, what="the good ones decided")
    after = Counter(bytes(m.value() or b"") for m in running.read("dead")) - before
    assert all(after[value] == n for value, n in Counter(value for _, value in noise).items()), "random bytes, raw, in dead"
    views = running.workers["views-a"]
    wait_for(lambda: views.metric("notify_lag_records") == 0, seconds=90, what="everything projected")
    wait_for(
        lambda: {c.notification_id for c in changes(running, *wanted) if c.status == "delivered"} == wanted,
        seconds=60,
        what="the good ones delivered",
    )
    absurd_ids = [identity("absurd", i, f"absurd-{i}", "pending") for i in range(100)]
    told = decided(running, set(absurd_ids))
    in_dead = sum(after.values()) - len(noise)
    assert in_dead == sum(found not in told for found in absurd_ids), "each absurd event is in dead or decided"
    assert in_dead >= 60, "empty ids, negative amounts and 900 KiB fields are in dead"
    injected = identity("absurd", 3, "absurd-3", "pending")
    if injected in told:
        page = wait_for(lambda: running.web(f"/notifications/{injected}")[1], seconds=20, what="the injected one")
        assert "49" not in page["message"]


async def _restart_broker(stack: Stack) -> None:
    await stack.broker.kill()
    await stack.broker.start()


@pytest.mark.parametrize("total", [2_000, pytest.param(5_000, marks=pytest.mark.soak)])
def test_requests_survive_a_kill_of_every_role_and_of_the_broker(running: System, stack: Stack, total: int) -> None:
    users = [f"crash-{i}" for i in range(total // 20)]
    running.load_preferences(mailing(users))
    victims = ["ingest", "router", "sender-normal", "views"]
    part = total // 5
    moved = part // 2
    framed = running.frame_payments(payment(i, users[i % len(users)], run="crash") for i in range(total))

    def kill_when_moved(worker: WorkerProcess, base: float) -> None:
        wait_for(lambda: worker.metric("notify_records_total") - base >= moved, seconds=60, what=f"{worker.name} moved {moved}")
        worker.kill()
        wait_for(lambda: worker.process is not None and worker.process.poll() is None, seconds=10, what="its restart")

    for n, role in enumerate(victims):
        worker = running.workers[f"{role}-a"]
        base = worker.metric("notify_records_total")
        running.produce("payments", framed[n * part : (n + 1) * part])
        kill_when_moved(worker, base)
    running.produce("payments", framed[len(victims) * part :])
    asyncio.run(_restart_broker(stack))

    wanted = {identity("crash", i, users[i % len(users)]) for i in range(total)}
    wait_for(lambda: len({m for m in running.mails() if m.removesuffix("-email") in wanted}) == total, seconds=240, what="every mail")
    mails = Counter({m: n for m, n in running.mails().items() if m.removesuffix("-email") in wanted})
    doubled = mails.total() - total
    wait_for(
        lambda: len({c.delivery_id for c in changes(running, *wanted) if c.status in {"sent", "delivered"}}) == 2 * total,
        seconds=120,
        what="every delivery done",
    )
    once = {
        "requests": Counter(
            r.event_id
            for m in running.read(requests(Lane.NORMAL))
            if (r := running.decode(m, NotificationRequested)).event_id.startswith("payment:crash-pay")
        ),
        "decisions": Counter(d.notification_id for d in of_run(running, "decisions", DecisionRecord, wanted)),
        "deliver.email": Counter(d.delivery_id for d in of_run(running, deliver(Channel.EMAIL, Lane.NORMAL), Delivery, wanted)),
        "deliver.in_app": Counter(d.delivery_id for d in of_run(running, deliver(Channel.IN_APP, Lane.NORMAL), Delivery, wanted)),
        "status queued": Counter(c.delivery_id for c in of_run(running, "status", StatusChange, wanted) if c.status == "queued"),
    }
    print(f"\ncrash: lost 0 of {total}; mails doubled {doubled}; workers killed {len(victims)}, broker 1")
    for what, ids in once.items():
        expected = 2 * total if what == "status queued" else total
        print(f"crash: {what}: {len(ids)} ids, {ids.total() - len(ids)} doubled")
        assert (len(ids), ids.total()) == (expected, expected), what
    assert doubled <= 2 * 32, "32 for the killed sender, 32 for the broker"
    assert running.workers["sender-normal-a"].exits[0] == -signal.SIGKILL

    def inboxes() -> bool:
        pages = (running.web(f"/users/{user}/notifications?limit=200")[1] for user in users[:10])
        return all(page is not None and len(page.get("notifications", ())) == total // len(users) for page in pages)

    wait_for(inboxes, seconds=60, what="every inbox complete")


def test_a_router_frozen_for_15_s_that_wakes_after_its_hand_over_regresses_nothing(running: System) -> None:
    other = running.start("router", name="b")
    running.await_ready(other)
    frozen = running.workers["router-a"]
    running.await_ready(frozen)
    users = [f"frozen-{i}" for i in range(100)]
    records = running.frame_payments(payment(i, users[i % 100], run="frozen", status="pending") for i in range(2_000))
    wanted = {identity("frozen", i, users[i % 100], "pending") for i in range(2_000)}
    frozen.signal(signal.SIGSTOP)
    woken = threading.Timer(15, frozen.signal, [signal.SIGCONT])
    woken.start()
    running.produce("payments", records[:1_000])
    running.load_preferences({"userId": user, "locale": "nl"} for user in users)
    first = {identity("frozen", i, users[i % 100], "pending") for i in range(1_000)}
    wait_for(lambda: decided(running, first) == first, seconds=40, what="its partitions decided by the other")
    woken.join()
    running.produce("payments", records[1_000:])
    wait_for(lambda: decided(running, wanted) == wanted, seconds=60, what="everything decided")
    once = Counter(record.notification_id for record in of_run(running, "decisions", DecisionRecord, wanted))
    assert set(once.values()) == {1}
    stored = running.rows("preferences")
    assert {unpack(stored[user.encode()][5:], UserPreferences).version for user in users} == {1}
    seen = running.table("router.decide", "seen")
    assert all(found.encode() in seen for found in wanted)
    running.stop(other)


def test_a_worker_with_another_seal_key_leaves_before_it_sends_anything(running: System) -> None:
    other = base64.b64encode(bytes(32)).decode()
    worker = running.start("sender-bulk", NOTIFY_SEAL_KEY=other)
    wait_for(lambda: worker.exits, seconds=60, what="its end")
    running.give_up(worker)
    assert worker.exits[0] == 75
    assert "NOTIFY_SEAL_KEY is not the key that wrapped the users' keys" in worker.log_text()


def test_groups_reset_to_the_beginning_repeat_nothing(running: System) -> None:
    mails = running.mails()
    counts = {topic: running.count(topic) for topic in ("decisions", "status", requests(Lane.NORMAL))}
    shown = (("views.project", "inbox"), ("views.project", "notifications"), ("router.decide", "seen"))
    tables = {place: running.table(*place) for place in shown}
    running.stop(*(running.workers[f"{role}-a"] for role in ROLES))
    running.delete_groups(ROLES)
    for role in ROLES:
        running.start(role)
    running.await_ready(seconds=120)
    running.produce("payments", running.frame_payments([payment(1, "after-reset", run="after-reset")]))
    found = identity("after-reset", 1, "after-reset")
    wait_for(lambda: running.web(f"/notifications/{found}")[0] == 200, seconds=60, what="a new event after the reset")
    assert running.mails() == mails
    assert running.count("decisions") == counts["decisions"] + 1
    assert running.count(requests(Lane.NORMAL)) == counts[requests(Lane.NORMAL)] + 1
    for place, before in tables.items():
        after = running.table(*place)
        assert {key: after.get(key) for key in before} == before, place


def test_a_fresh_router_sends_nothing_to_100000_stored_opt_outs(stack: Stack, tmp_path: Path) -> None:
    with system(stack, tmp_path) as fresh:
        out = {"payments": {"email": False, "in_app": False}}
        users = [f"opted-out-{i}" for i in range(100_000)]
        number = fresh.register(f"{fresh.topic('preferences')}-value", (ROOT / "schemas/avro/UserPreferences.avsc").read_text())
        head = b"\0" + number.to_bytes(4, "big")
        now = datetime.now(UTC)
        fresh.produce(
            "preferences",
            ((u.encode(), head + pack(UserPreferences(user_id=u, version=1, categories=out, updated_at=now))) for u in users),
        )
        request = fresh.register(f"{fresh.topic('requests.normal')}-value", (ROOT / "schemas/avro/NotificationRequested.avsc").read_text())
        head = b"\0" + request.to_bytes(4, "big")
        data = {
            "orderId": "o",
            "paymentId": "p",
            "amount": "1.00",
            "currency": "USD",
            "method": "card",
            "occurredOn": "today",
            "occurredAt": "now",
            "subscriptionId": "",
            "failureReason": "",
        }
        asked = [
            NotificationRequested(event_id=f"e-{u}", producer="test", rule="payment_confirmed", user_id=u, data=data, occurred_at=now)
            for u in users[::100]
        ]
        fresh.produce("requests.normal", ((r.user_id.encode(), head + pack(r)) for r in asked))
        fresh.await_ready(fresh.start("router"))
        wait_for(lambda: fresh.count("decisions") == 1_000, seconds=60, what="1,000 decisions")
        assert {fresh.decode(m, DecisionRecord).reason for m in fresh.read("decisions")} == {"opted_out"}
        assert sum(fresh.count(deliver(channel, lane)) for channel in Channel for lane in Lane) == 0
        assert all(partition_of(m.key() or b"", PARTITIONS) == m.partition() for m in fresh.read("decisions"))
