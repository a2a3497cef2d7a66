"""Forgetting a user: with his key everything that was sealed for him is gone, from every file of every part."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # exported, but not said so
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)

from schemas import topics
from schemas.codec import pack, unpack
from schemas.errors import UnsealableError
from schemas.ids import notification_id, partition_of
from schemas.messages import NotificationRequested, RequestData, UserAction, UserKey
from schemas.sealed import seal, unseal, unwrap
from schemas.topics import Lane, Tier
from streams.cli import keys
from streams.cli.wire import Wire
from streams.embedded.stack import Stack
from streams.roles import Role
from streams.topics import physical, specs
from streams.transport.records import fetch
from tests.deliveries import let_mail_server
from tests.harness import System, system, wait_for
from tests.integration.test_inventory import an_adjustment, told

USER, PRODUCT = "to-be-forgotten", "prod_1129"
NAME, ADDRESS, PHONE = "Zebulon Quixworth", "zebulon.quixworth@planted.example", "+15550199777"
POSTED, SENT, BURIED = "the marmalade is under the third floorboard", "bring the violet umbrella tonight", "whisper of the ninth lighthouse"
PLANTED = (NAME, ADDRESS, PHONE, POSTED, SENT, BURIED)
# in a payment, which its own service publishes readable, and then in rows: what shows that the search finds what is there
READABLE = "readable-control-7f3a"
# in other services' events: readable in the topics that are theirs, and sealed in what comes of them
REFUSED, PLACE = "the heron bank wants to see a passport", "a lighthouse near Ulm"


@pytest.fixture(scope="module")
def running(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with system(stack, tmp_path_factory.mktemp("erasure"), variables={"NOTIFY_RETRY_TIERS": "1,2,4"}) as made:
        for role in Role:
            made.start(role)
        made.await_ready(seconds=150)
        yield made


def files_with(made: System, *wanted: str | bytes) -> dict[str, list[str]]:
    """Return what of `wanted` stands where: in files of Kafka, registry, PostgreSQL and every worker, logs and caches included.

    Not the mail server's: what was delivered is the recipient's.
    """
    root = made.stack.data_dir
    found: dict[str, list[str]] = {}
    for path in (path for folder in (root, made.folder) for path in files_under(folder) if root / "mail" not in path.parents):
        text = content(path)
        for each in wanted:
            if (each.encode() if isinstance(each, str) else each) in text:
                found.setdefault(str(each), []).append(str(path))
    return found


def files_under(folder: Path) -> Iterator[Path]:
    """Find files. Folders may go meanwhile, as those of another test's topics do, which Path.rglob does not bear."""
    for parent, _, names in os.walk(folder):
        yield from (path for name in names if (path := Path(parent, name)).is_file())


def content(path: Path) -> bytes:
    """Return what was ever written to a file: Kafka's index files are 10 MB of holes."""
    parts = []
    try:
        with path.open("rb") as file:
            position, size = 0, path.stat().st_size
            while position < size:
                position = os.lseek(file.fileno(), position, os.SEEK_DATA)
                hole = os.lseek(file.fileno(), position, os.SEEK_HOLE)
                parts.append(os.pread(file.fileno(), hole - position, position))
                position = hole
    except FileNotFoundError:  # a segment that was cleaned up while we looked
        return b""
    except OSError as error:
        if error.errno != errno.ENXIO:  # no data beyond this point
            raise
    return b"".join(parts)


def records_with(made: System, *wanted: str | bytes) -> dict[str, list[str]]:
    """Return what of `wanted` stands in records of which topics: in key, value or headers, however batches are compressed."""
    consumer = Consumer(
        {
            "bootstrap.servers": made.stack.kafka,
            "group.id": f"search-{made.name}",
            "enable.auto.commit": False,
            "isolation.level": "read_uncommitted",  # what was aborted can be read as well
            "enable.partition.eof": True,
        }
    )
    mine = {physical(made.name, spec.name) for spec in made.specs}
    listed = made.admin.list_topics().topics
    places = {(name, number) for name in mine for number in listed[name].partitions}
    consumer.assign([TopicPartition(name, number, OFFSET_BEGINNING) for name, number in places])
    found: dict[str, list[str]] = {}
    try:
        while places:
            fetched = fetch(consumer, wait_seconds=0.5, most=5_000)
            for record in fetched.records:
                parts = (record.key(), record.value(), *(value for _, value in record.headers() or ()))
                for each in wanted:
                    sought = each.encode() if isinstance(each, str) else each
                    if any(sought in part for part in parts if part):
                        found.setdefault(str(each), []).append(record.topic())
            places -= fetched.ends.keys()
    finally:
        consumer.close()
    return found


def searched(made: System, *wanted: str | bytes) -> set[str]:
    """Return what of `wanted` stands in any file, having seen that the search finds READABLE in Kafka's files and in tables' files."""
    made.query("CHECKPOINT")  # or else its rows are in memory and in its log alone
    found = files_with(made, READABLE, *wanted)
    for folder in ("kafka", "postgres/cluster/base"):
        assert [path for path in found.get(READABLE, ()) if made.stack.data_dir / folder in Path(path).parents], folder
    return found.keys() - {READABLE}


def is_stored(made: System, notification: str, status: str) -> bool:
    """Say whether PostgreSQL has the mail of a notification with this status."""
    return made.query("SELECT status FROM delivery WHERE delivery_id = $1", f"{notification}-email") == [(status,)]


def stored_key(made: System) -> bytes:
    """Return the user's wrapped key."""
    with Wire(made.settings) as wire:
        return wire.decode(made.rows("keys")[USER.encode()], UserKey).wrapped


def bury(made: System, key: bytes) -> None:
    """Publish a request that no rule is known for, sealed as ours are: it becomes a dead letter."""
    sealed = seal(key, pack(RequestData(data={"title": BURIED, "message": BURIED})), user_id=USER, purpose="request")
    with Wire(made.settings) as wire:
        codec = wire.codec([spec for spec in specs() if spec.name == "requests.normal"])
    found = made.decode(next(iter(made.follow("requests.normal"))), NotificationRequested)
    lost = NotificationRequested(
        event_id="e-buried", producer="test", rule="unheard-of", user_id=USER, occurred_at=found.occurred_at, sealed=sealed
    )
    made.produce("requests.normal", [(USER.encode(), codec.encode(lost))])
    wait_for(
        lambda: [m for m in made.read("dead") if m.key() == USER.encode() and dict(m.headers() or ())["error"] == b"unknown_rule"],
        seconds=20,
        what="the dead letter",
    )


def hasten_compaction(made: System) -> None:
    """Make the broker clean the compacted topics of this environment as soon as a segment is full, and that at once."""
    quick = {
        "segment.ms": "200",
        "min.cleanable.dirty.ratio": "0.0001",
        "max.compaction.lag.ms": "200",
        "delete.retention.ms": "0",
        "file.delete.delay.ms": "500",
    }
    compacted = [physical(made.name, spec.name) for spec in made.specs if spec.is_compacted]
    alter(made, {ConfigResource(ResourceType.TOPIC, name): quick for name in compacted})
    broker = next(iter(made.admin.list_topics().brokers))
    alter(made, {ConfigResource(ResourceType.BROKER, str(broker)): {"log.cleaner.backoff.ms": "300"}})


def alter(made: System, wanted: Mapping[ConfigResource, Mapping[str, str]]) -> None:
    resources = []
    for resource, settings in wanted.items():
        for name, value in settings.items():
            resource.add_incremental_config(ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET))
        resources.append(resource)
    for done in made.admin.incremental_alter_configs(resources).values():
        done.result()


def neighbours(made: System) -> Iterator[str]:
    """Yield users on the same partition as the one to be forgotten."""
    number = 0
    while True:
        number += 1
        if partition_of(f"n-{number}".encode(), made.partitions) == partition_of(USER.encode(), made.partitions):
            yield f"n-{number}"


def publish_events(made: System) -> Iterator[str]:
    """Let other services publish a payment and an action of the user; yield the ids of the notifications that come of them."""
    payment = {"paymentId": "p-refused", "userId": USER, "status": "failed", "amount": 12.5, "currency": "USD", "failureReason": REFUSED}
    made.produce(topics.PAYMENTS, made.frame_payments([payment]))
    yield notification_id(producer="payments", event_id="payment:p-refused:failed", rule="payment_failed", user_id=USER)
    said = {"code": "73 19 44", "expiresInMinutes": "15", "requestedFrom": PLACE}
    action = UserAction(action_id="a-reset", user_id=USER, action="password_reset_requested", data=said, occurred_at=datetime.now(UTC))
    with Wire(made.settings) as wire:
        codec = wire.codec([spec for spec in specs() if spec.name == topics.USER_ACTIONS])
    made.produce(topics.USER_ACTIONS, [(USER.encode(), codec.encode(action))])
    yield notification_id(producer="user-actions", event_id="a-reset", rule="password_reset", user_id=USER)


def report_bounce(made: System, notification: str) -> None:
    """Let a provider report that a mail came back."""
    reference, now = f"{notification}-email.0@flowmart.example", datetime.now(UTC).isoformat()
    line = {"provider": "email", "reference": reference, "status": "bounced", "code": f"550 <{ADDRESS}>", "at": now}
    done = made.notify("receipts", "load", "-", stdin=json.dumps(line))
    assert done.returncode == 0, done.stderr


def was_mailed(made: System, notification: str) -> bool:
    return made.mails()[f"{notification}-email"] == 1


def inbox(made: System) -> dict[str, str]:
    page = made.web(f"/users/{USER}/notifications", user=USER)[1]
    return {each["notificationId"]: each["message"] for each in page["notifications"]}


def test_a_forgotten_user_is_readable_nowhere_and_may_come_back_with_a_new_key(running: System) -> None:
    contact = {"userId": USER, "name": NAME, "email": ADDRESS, "phone": PHONE}
    running.load_preferences([contact])
    assert running.notify("watch", USER, PRODUCT).returncode == 0
    running.produce("payments", running.frame_payments([{"paymentId": READABLE, "userId": "other", "status": "confirmed", "amount": 1.0}]))
    running.produce("inventory", running.frame_adjustments([an_adjustment("back", PRODUCT, 0, 200)]))
    back = told("back", "back_in_stock", USER)
    wait_for(partial(was_mailed, running, back), seconds=40, what="the mail of the bulk lane")
    asked = {"userId": USER, "rule": "message", "data": {"title": "For you", "message": POSTED}}
    sent = running.notify("send", "--user", USER, "--title", "Tonight", "--message", SENT).stdout.strip()
    wait_for(partial(was_mailed, running, sent), seconds=40, what="the mail")
    for event in publish_events(running):
        wait_for(partial(was_mailed, running, event), seconds=40, what="the mail of an event")
    let_mail_server(running, mode="refuse", code=451)
    try:
        posted = running.ask("/notifications", asked)[2]["notificationId"]
        wait_for(partial(is_stored, running, posted, "retrying"), seconds=40, what="a refusal")
    finally:
        let_mail_server(running, mode="none")
    wait_for(partial(was_mailed, running, posted), seconds=40, what="the mail after a wait")
    assert any(running.count(topics.retry(Lane.NORMAL, tier)) for tier in Tier), "it was held by delay"
    wait_for(lambda: set(inbox(running).values()) > {POSTED, SENT}, seconds=30, what="all in the inbox")
    report_bounce(running, posted)
    wrapped = stored_key(running)
    key = unwrap(running.settings.seal_key, wrapped, user_id=USER)
    bury(running, key)

    wait_for(partial(is_stored, running, posted, "bounced"), seconds=30, what="the report, in PostgreSQL")
    paid = "SELECT event_id FROM notification WHERE event_id LIKE $1"
    wait_for(lambda: running.query(paid, f"%{READABLE}%"), seconds=30, what="the payment, in PostgreSQL")
    assert searched(running, wrapped, *PLANTED) == {str(wrapped)}, "sealed from the first moment"
    assert records_with(running, wrapped, READABLE, *PLANTED).keys() == {str(wrapped), READABLE}

    done = running.notify("user", USER, "forget", "--yes")
    assert done.returncode == 0, done.stderr
    assert "is forgotten" in done.stderr
    assert "What remains" in done.stderr
    wait_for(lambda: set(inbox(running).values()) == {"erased"}, seconds=30, what="erased in the inbox")
    assert running.web(f"/notifications/{posted}", user=USER)[1]["title"] == "erased"
    assert not [row for row in running.rows("watches") if USER.encode() in row]
    assert USER.encode() not in running.rows("preferences").keys() | running.rows("keys").keys()

    hasten_compaction(running)
    fillers = neighbours(running)

    def is_cleaned_up() -> bool:
        # a segment is closed by the next record after its time, and only closed ones are cleaned
        filler = next(fillers)
        running.load_preferences([{"userId": filler, "email": f"{filler}@example.com"}])
        return not files_with(running, wrapped)

    wait_for(is_cleaned_up, seconds=120, what="the wrapped key gone from every file")
    assert searched(running, wrapped, *PLANTED) == set()
    assert records_with(running, wrapped, READABLE, *PLANTED).keys() == {READABLE}
    theirs = {REFUSED: running.topic(topics.PAYMENTS), PLACE: running.topic(topics.USER_ACTIONS)}
    assert {text: set(found) for text, found in records_with(running, *theirs).items()} == {text: {name} for text, name in theirs.items()}
    strange = {path for text, paths in files_with(running, *theirs).items() for path in paths if theirs[text] not in path}
    assert not strange, "what events said of him is left in their own topics alone"

    returned = {**asked, "data": {"title": "Welcome back", "message": "hello again"}, "idempotencyKey": "back"}

    def is_taken() -> bool:
        return running.ask("/notifications", returned)[0] == 202

    wait_for(is_taken, seconds=30, what="a request for him taken, with a new key")
    wait_for(lambda: "hello again" in inbox(running).values(), seconds=30, what="the new notification")
    assert sorted(inbox(running).values()) == ["erased", "erased", "erased", "erased", "hello again"]
    with Wire(running.settings) as wire:
        fresh = keys.find_key(running.settings, wire, USER)
    assert fresh is not None
    assert fresh != key
    # what is left of his requests opens with the destroyed key alone
    old = next(r for r in requests_of(running) if r.event_id == "e-buried")
    assert old.sealed is not None
    assert unpack(unseal(key, old.sealed, user_id=USER, purpose="request"), RequestData).data["title"] == BURIED
    with pytest.raises(UnsealableError):
        unseal(fresh, old.sealed, user_id=USER, purpose="request")


def requests_of(made: System) -> Iterator[NotificationRequested]:
    return (made.decode(record, NotificationRequested) for record in made.follow("requests.normal") if record.key() == USER.encode())


def test_forgetting_is_asked_for_first_and_can_be_taken_back(running: System) -> None:
    before = running.count("commands")
    assert running.notify("user", "somebody", "forget", stdin="n\n").returncode == 1
    assert running.notify("user", "somebody", "forget", stdin="").returncode == 1
    assert running.count("commands") == before


def test_a_user_of_whom_nothing_is_known_can_be_forgotten_too(running: System) -> None:
    done = running.notify("user", "never-seen", "forget", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["userId"], document["isForgotten"]) == ("never-seen", True)
    assert all({"what", "where", "howLong"} == each.keys() for each in document["remains"])
