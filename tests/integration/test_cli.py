"""The command line against a real Kafka and a real registry."""

from __future__ import annotations

import base64
import json
import os
import pty
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
from confluent_kafka import KafkaError, Message, Producer, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # exported, but not said so
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    ResourceType,
)
from typer.testing import CliRunner, Result

from schemas import examples, topics
from schemas.codec import Codec, unpack
from schemas.errors import SettingsError
from schemas.ids import notification_id, partition_of
from schemas.messages import Command, DecisionRecord, NotificationRequested, RequestData, UserKey, UserPreferences
from schemas.sealed import KEY_BYTES, unseal, wrap
from streams import provisioning
from streams.cli import build, keys, provision
from streams.cli.errors import CliError
from streams.cli.kafka import Publisher, Reader, admin
from streams.cli.preferences import find_preferences
from streams.cli.wire import Wire
from streams.embedded.stack import Stack
from streams.settings import Settings
from streams.topics import Count, TopicSpec, physical, specs
from streams.transport.cluster import Cluster

SEAL_KEY = b"s" * KEY_BYTES
KEY_TEXT = base64.b64encode(SEAL_KEY).decode()
PAYMENT = {"paymentId": "pay_1", "userId": "u-1", "orderId": "o-1", "amount": 12.5, "currency": "EUR", "status": "confirmed"}


def environment(stack: Stack, tmp_path: Path) -> dict[str, str]:
    return {
        "NOTIFY_KAFKA_BOOTSTRAP": stack.kafka,
        "NOTIFY_REGISTRY_URL": stack.registry,
        "NOTIFY_SMTP_URL": stack.mail_smtp,
        "NOTIFY_SEAL_KEY": KEY_TEXT,
        "NOTIFY_TOKEN_KEY": KEY_TEXT,
        "NOTIFY_ENV": f"t{uuid.uuid4().hex[:10]}",
        "NOTIFY_PARTITIONS": "2",
        "NOTIFY_INBOUND_PARTITIONS": "3",
        "NOTIFY_DATA_DIR": str(tmp_path / "data"),
        "NOTIFY_WEB_PORT": "1",  # where nothing listens
    }


def run(env: Mapping[str, str], *args: str, stdin: str | bytes | None = None, expect: int = 0) -> Result:
    hidden = {name: None for name in os.environ if name.startswith("NOTIFY_")}
    result = CliRunner().invoke(build(), list(args), env={**hidden, **env}, input=stdin)
    assert result.exit_code == expect, f"exit code {result.exit_code}\n{result.output}\n{result.exception!r}"
    return result


@pytest.fixture
def bare(stack: Stack, tmp_path: Path) -> dict[str, str]:
    """Return the variables of an environment without topics."""
    return environment(stack, tmp_path)


@pytest.fixture(scope="module")
def env(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the variables of an environment with its topics. Tests of it tell their users apart by unique ids."""
    variables = environment(stack, tmp_path_factory.mktemp("cli"))
    run(variables, "topics", "ensure")
    return variables


@pytest.fixture
def settings(env: dict[str, str]) -> Settings:
    return Settings.from_env(env)


@pytest.fixture
def user() -> str:
    return f"u-{uuid.uuid4().hex[:12]}"


def read_all(settings: Settings, name: str) -> list[Message]:
    topic = physical(settings.env, name)
    count = len(admin(settings.cluster).list_topics(topic, timeout=10).topics[topic].partitions)
    with Reader(settings.cluster, topic, list(range(count))) as reader:
        return list(reader.to_end())


def codec_for(wire: Wire, *names: str) -> Codec:
    return wire.codec([spec for spec in specs() if spec.name in names])


# ---- topics


def test_missing_topics_are_shown_and_then_made_and_then_left_alone(bare: dict[str, str], stack: Stack) -> None:
    inbound = f"payments.{bare['NOTIFY_ENV']}.events"
    shown = run(bare, "topics", "ensure", "--dry-run")
    assert inbound in shown.stdout
    assert inbound not in admin(Cluster(bootstrap=stack.kafka)).list_topics(timeout=10).topics

    run(bare, "topics", "ensure")
    found = admin(Cluster(bootstrap=stack.kafka)).list_topics(timeout=10).topics
    assert len(found[inbound].partitions) == 3
    assert len(found[f"notify.{bare['NOTIFY_ENV']}.keys"].partitions) == 2
    provisioning.check_partitions(admin(Cluster(bootstrap=stack.kafka)), provision.wanted(Settings.from_env(bare)))

    again = json.loads(run(bare, "topics", "ensure", "--json").stdout)
    assert {topic["action"] for topic in again["topics"]} == {"keep"}


def test_a_setting_that_drifted_is_mended_and_others_stay(bare: dict[str, str], stack: Stack) -> None:
    run(bare, "topics", "ensure")
    name = f"notify.{bare['NOTIFY_ENV']}.dead"
    alter(stack, name, {"retention.ms": "1000", "segment.jitter.ms": "7"})

    document = json.loads(run(bare, "topics", "ensure", "--json").stdout)
    (change,) = [topic for topic in document["topics"] if topic["action"] != "keep"]
    assert (change["topic"], change["differences"]) == (
        name,
        [{"setting": "retention.ms", "found": "1000", "wanted": str(30 * 86_400_000)}],
    )
    config = provisioning.describe(admin(Cluster(bootstrap=stack.kafka)), [name])[name]
    assert (config["retention.ms"].value, config["segment.jitter.ms"].value) == (str(30 * 86_400_000), "7")


def test_in_a_terminal_altering_is_asked_for_first(bare: dict[str, str], stack: Stack) -> None:
    run(bare, "topics", "ensure")
    name = f"notify.{bare['NOTIFY_ENV']}.dead"
    alter(stack, name, {"retention.ms": "1000"})

    def retention() -> str | None:
        return provisioning.describe(admin(Cluster(bootstrap=stack.kafka)), [name])[name]["retention.ms"].value

    def ensure(answer: str) -> subprocess.CompletedProcess[bytes]:
        terminal, ours = pty.openpty()
        try:
            os.write(terminal, f"{answer}\n".encode())
            command = [sys.executable, "-c", "from streams.cli import main; main()", "topics", "ensure"]
            known = {key: value for key, value in os.environ.items() if not key.startswith("NOTIFY_")}
            return subprocess.run(command, env={**known, **bare}, stdin=ours, capture_output=True, timeout=60, check=False)
        finally:
            os.close(terminal)
            os.close(ours)

    refused = ensure("n")
    assert (refused.returncode, retention()) == (1, "1000")
    assert b"retention.ms" in refused.stdout, "the difference is shown before the question"
    assert b"Alter the settings of 1 topic?" in refused.stderr
    assert (ensure("y").returncode, retention()) == (0, str(30 * 86_400_000))


def test_the_topics_of_other_services_are_never_altered(bare: dict[str, str], stack: Stack) -> None:
    run(bare, "topics", "ensure")
    name = f"payments.{bare['NOTIFY_ENV']}.events"
    alter(stack, name, {"retention.ms": "999999"})
    assert {topic["action"] for topic in json.loads(run(bare, "topics", "ensure", "--json").stdout)["topics"]} == {"keep"}


def test_another_partition_count_is_one_sentence_and_nothing_is_changed(bare: dict[str, str], stack: Stack) -> None:
    name = f"notify.{bare['NOTIFY_ENV']}.status"
    create(stack, name, 5)
    result = run(bare, "topics", "ensure", expect=1)
    assert f"{name} has 5 partitions, not 2 as NOTIFY_PARTITIONS says" in result.stderr
    assert f"notify.{bare['NOTIFY_ENV']}.dead" not in admin(Cluster(bootstrap=stack.kafka)).list_topics(timeout=10).topics


def test_a_worker_is_told_which_topics_are_missing_or_of_another_count(bare: dict[str, str], stack: Stack) -> None:
    create(stack, physical(bare["NOTIFY_ENV"], "status"), 1)
    wanted = provisioning.targets(
        [TopicSpec(name="status"), TopicSpec(name="dead", count=Count.USER)],
        env=bare["NOTIFY_ENV"],
        counts={Count.USER: 2},
        replication=1,
    )
    with pytest.raises(SettingsError) as caught:
        provisioning.check_partitions(admin(Cluster(bootstrap=stack.kafka)), wanted)
    assert len(caught.value.problems) == 2
    assert "has 1 partition, not 2" in str(caught.value)
    assert "dead does not exist" in str(caught.value)


def test_more_replicas_than_brokers_is_a_sentence(bare: dict[str, str]) -> None:
    result = run({**bare, "NOTIFY_REPLICATION": "3"}, "topics", "ensure", expect=1)
    assert "asks for 3 replicas, but Kafka has 1 broker" in result.stderr


def test_ingest_begins_where_it_was_told_unless_it_has_a_position(bare: dict[str, str], stack: Stack) -> None:
    run(bare, "topics", "ensure")
    run(bare, "produce", "payments", "-", stdin="\n".join(json.dumps({**PAYMENT, "paymentId": f"p{n}"}) for n in range(20)))
    topic, group = f"payments.{bare['NOTIFY_ENV']}.events", f"notify.{bare['NOTIFY_ENV']}.ingest"
    places = [TopicPartition(topic, number) for number in range(3)]

    started = json.loads(run(bare, "topics", "ensure", "--start-at", "latest", "--json").stdout)["started"]
    assert sum(item["offset"] for item in started) == 20
    assert {item["topic"] for item in started} == {topic, f"inventory.{bare['NOTIFY_ENV']}.events"}
    committed = provisioning.committed_offsets(admin(Cluster(bootstrap=stack.kafka)), group, places)
    assert committed == {(item["topic"], item["partition"]): item["offset"] for item in started if item["topic"] == topic}

    assert json.loads(run(bare, "topics", "ensure", "--start-at", "earliest", "--json").stdout)["started"] == []
    assert provisioning.committed_offsets(admin(Cluster(bootstrap=stack.kafka)), group, places) == committed


def create(stack: Stack, name: str, partitions: int) -> None:
    client = admin(Cluster(bootstrap=stack.kafka))
    for future in client.create_topics([NewTopic(name, num_partitions=partitions, replication_factor=1)]).values():
        future.result()
    until(lambda: name in client.list_topics(timeout=10).topics)


def alter(stack: Stack, name: str, config: Mapping[str, str]) -> None:
    entries = [ConfigEntry(key, value, incremental_operation=AlterConfigOpType.SET) for key, value in config.items()]
    resource = ConfigResource(ResourceType.TOPIC, name, incremental_configs=entries)
    client = admin(Cluster(bootstrap=stack.kafka))
    for future in client.incremental_alter_configs([resource]).values():
        future.result()
    until(lambda: all(provisioning.describe(client, [name])[name][key].value == value for key, value in config.items()))


def until(is_so: Callable[[], bool]) -> None:
    """Return when brokers have learnt what the controller agreed to."""
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline, "the broker did not learn of it"


# ---- publishing


def test_both_shapes_of_payment_arrive_and_a_bad_line_stops_nothing(env: dict[str, str], settings: Settings) -> None:
    unique = uuid.uuid4().hex
    lines = [
        json.dumps({**PAYMENT, "paymentId": f"flat-{unique}"}),
        json.dumps({**PAYMENT, "amount": "a lot"}),
        "{",
        json.dumps({"eventId": "e", "type": "PaymentProcessed", "data": {**PAYMENT, "paymentId": f"enveloped-{unique}"}}),
    ]
    result = run(env, "produce", "payments", "-", "--json", stdin="\n".join(lines), expect=1)
    summary = json.loads(result.stdout)
    assert (summary["published"], [item["line"] for item in summary["problems"]]) == (2, [2, 3])
    assert "line 2: amount" in result.stderr

    found = {message.key(): message for message in read_all(settings, topics.PAYMENTS) if unique.encode() in (message.key() or b"")}
    with Wire(settings) as wire:
        flat = wire.decode_any(found[f"flat-{unique}".encode()].value())
        enveloped = wire.decode_any(found[f"enveloped-{unique}".encode()].value())
    assert flat["amount"] == 12.5
    assert cast("Mapping[str, object]", enveloped["data"])["orderId"] == "o-1"
    for key, message in found.items():
        assert message.partition() == partition_of(cast("bytes", key), 3)


def test_a_message_of_ours_is_written_as_json(env: dict[str, str], settings: Settings, user: str) -> None:
    request = {
        "eventId": "e-1",
        "producer": "shop",
        "rule": "message",
        "userId": user,
        "data": {"title": "t"},
        "occurredAt": "2026-01-01T00:00:00Z",
    }
    result = run(env, "produce", "requests.bulk", "-", stdin=json.dumps(request) + "\n" + json.dumps({**request, "ruel": "x"}), expect=1)
    assert "line 2: ruel: is not a field; is rule meant?" in result.stderr
    (message,) = [message for message in read_all(settings, "requests.bulk") if message.key() == user.encode()]
    with Wire(settings) as wire:
        assert wire.decode(message.value(), NotificationRequested).data == {"title": "t"}


def test_a_topic_that_is_not_there_is_a_sentence(bare: dict[str, str]) -> None:
    assert "notify topics ensure" in run(bare, "produce", "payments", "-", stdin=json.dumps(PAYMENT), expect=1).stderr


def test_send_prints_the_id_under_which_the_notification_will_be_found(env: dict[str, str], settings: Settings, user: str) -> None:
    args = ("send", "--user", user, "--title", "Hello", "--message", "World", "--data", "a=b=c", "--idempotency-key", "k-1")
    with router(settings):
        printed = run(env, *args).stdout.strip()
    assert printed == notification_id(producer="cli", event_id="k-1", rule="message", user_id=user)
    (message,) = [message for message in read_all(settings, "requests.normal") if message.key() == user.encode()]
    assert b"Hello" not in (message.value() or b"")
    with Wire(settings) as wire:
        request = wire.decode(message.value(), NotificationRequested)
        key = keys.find_key(settings, wire, user)
    assert (request.event_id, request.data) == ("k-1", {})
    assert key is not None
    assert request.sealed is not None
    said = unpack(unseal(key, request.sealed, user_id=user, purpose="request"), RequestData)
    assert said.data == {"title": "Hello", "message": "World", "a": "b=c"}


# ---- why


def test_why_shows_each_decision_about_the_event_and_no_others(env: dict[str, str], settings: Settings, user: str) -> None:
    example = cast("DecisionRecord", examples.example("DecisionRecord"))
    with Wire(settings) as wire:
        codec = codec_for(wire, topics.DECISIONS)
    publisher = Publisher(settings.cluster)
    for event, outcome in (("e-1", "notified"), ("e-2", "skipped"), ("e-1", "duplicate_of")):
        fields = {name: getattr(example, name) for name in example.__slots__}
        record = DecisionRecord(**{**fields, "user_id": user, "event_id": event, "outcome": outcome})
        publisher.publish(physical(settings.env, topics.DECISIONS), user, codec.encode(record))
    publisher.require_all()

    found = [json.loads(line) for line in run(env, "why", user, "e-1", "--json").stdout.splitlines()]
    assert [(decision["eventId"], decision["outcome"]) for decision in found] == [("e-1", "notified"), ("e-1", "duplicate_of")]
    shown = run(env, "why", user, "e-2").stdout
    assert "skipped" in shown
    assert all(choice.reason in shown for choice in example.channels)


def test_why_without_a_decision_says_where_to_look(env: dict[str, str], user: str) -> None:
    result = run(env, "why", user, "e-404", expect=1)
    assert result.stdout == ""
    assert "notify dlq list" in result.stderr


# ---- dead letters


def test_dead_letters_are_listed_newest_first_and_shown_with_their_bytes(env: dict[str, str], settings: Settings) -> None:
    role = f"role-{uuid.uuid4().hex[:8]}"
    raw = b"\x07not avro\xff"
    places = [bury(settings, raw, error=error, role=role) for error in ("undecodable", "unroutable", "undecodable")]

    listed = [json.loads(line) for line in run(env, "dlq", "list", "--role", role, "--json").stdout.splitlines()]
    assert [letter["id"] for letter in listed] == [f"{partition}:{offset}" for partition, offset in reversed(places)]
    only = run(env, "dlq", "list", "--role", role, "--error", "unroutable", "--since", "1h").stdout
    assert f"{places[1][0]}:{places[1][1]}" in only
    assert "undecodable" not in only
    assert len(run(env, "dlq", "list", "--role", role, "--limit", "1", "--json").stdout.splitlines()) == 1
    assert "no dead letters" in run(env, "dlq", "list", "--role", "nobody").stderr

    place = f"{places[0][0]}:{places[0][1]}"
    shown = run(env, "dlq", "show", place).stdout
    assert "07 6e 6f 74 20 61 76 72" in shown
    assert "cannot be decoded" in shown
    document = json.loads(run(env, "dlq", "show", place, "--json").stdout)
    assert base64.b64decode(document["value"]) == raw
    assert document["headers"]["error"] == "undecodable"


def test_a_dead_letter_that_can_be_decoded_is(env: dict[str, str], settings: Settings, user: str) -> None:
    with Wire(settings) as wire:
        codec = codec_for(wire, topics.COMMANDS)
    command = Command(command_id="c-1", user_id=user, kind="nonsense", issued_at=datetime(2026, 1, 1, tzinfo=UTC))
    partition, offset = bury(settings, codec.encode(command), error="invalid_event", role="router")
    assert json.loads(run(env, "dlq", "show", f"{partition}:{offset}", "--json").stdout)["decoded"]["kind"] == "nonsense"


@pytest.mark.parametrize("place", ["0:999999999", "99:0"])
def test_a_place_without_a_dead_letter_is_a_sentence(env: dict[str, str], place: str) -> None:
    assert "notify dlq list" in run(env, "dlq", "show", place, expect=1).stderr


def bury(
    settings: Settings, raw: bytes, *, error: str, role: str, topic: str = "payments", place: tuple[int, int] = (0, 7)
) -> tuple[int, int]:
    """Publish a dead letter as the runner does; return partition and offset of its own."""
    headers = {
        "error": error,
        "message": "why it is dead",
        "topic": topic,
        "partition": str(place[0]),
        "offset": str(place[1]),
        "timestamp": "1767225600000",
        "role": role,
        "generation": "0",
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    return publish(settings, topics.DEAD, raw, headers)


def publish(
    settings: Settings, name: str, value: bytes | None, headers: Mapping[str, str] | None = None, *, key: str = "key"
) -> tuple[int, int]:
    placed: list[tuple[int, int]] = []

    def on_delivery(error: KafkaError | None, message: Message) -> None:
        assert error is None
        placed.append((cast("int", message.partition()), cast("int", message.offset())))

    producer = Producer({"bootstrap.servers": settings.kafka, "acks": "all", "partitioner": "murmur2_random"})
    encoded: list[tuple[str, str | bytes | None]] = [(header, text.encode()) for header, text in (headers or {}).items()]
    producer.produce(physical(settings.env, name), value, key.encode(), headers=encoded, on_delivery=on_delivery)
    producer.flush(20)
    (place,) = placed
    return place


# ---- preferences


class SmallRouter(threading.Thread):
    """Answers commands as the router does: makes keys, and takes preferences over or refuses them by a dead letter."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(daemon=True)
        self.settings = settings
        self.stopping = threading.Event()
        self.asked: list[str] = []
        with Wire(settings) as wire:
            self.codec = codec_for(wire, topics.COMMANDS, topics.KEYS, topics.PREFERENCES)
        with Reader(settings.cluster, physical(settings.env, topics.COMMANDS), [0, 1]) as reader:
            self.starts = {number: end for number, (_, end) in reader.sizes().items()}
        self.versions: dict[str, int] = {}

    def run(self) -> None:
        with Reader(self.settings.cluster, physical(self.settings.env, topics.COMMANDS), self.starts) as reader:
            while not self.stopping.is_set():
                records = reader.more(0.05)
                publisher = Publisher(self.settings.cluster)
                for message in records:
                    self.answer(message, self.codec.decode(message.value(), Command), publisher)
                publisher.require_all()

    def answer(self, message: Message, command: Command, publisher: Publisher) -> None:
        user = command.user_id
        at = datetime.fromtimestamp(message.timestamp()[1] / 1000, UTC)
        if command.kind == "ensure_key":
            self.asked.append(user)
            wrapped = wrap(SEAL_KEY, os.urandom(KEY_BYTES), user_id=user)
            publisher.publish(
                physical(self.settings.env, topics.KEYS), user, self.codec.encode(UserKey(user_id=user, wrapped=wrapped, created_at=at))
            )
            return
        version = self.versions.get(user, 0)
        if command.expected_version not in {None, version}:
            place = (cast("int", message.partition()), cast("int", message.offset()))
            bury(self.settings, message.value() or b"", error="version_conflict", role="router", topic=topics.COMMANDS, place=place)
            return
        self.versions[user] = version + 1
        stored = UserPreferences(
            user_id=user,
            version=version + 1,
            sealed=command.sealed,
            locale=command.locale,
            time_zone=command.time_zone,
            categories=command.categories or {},
            updated_at=at,
        )
        publisher.publish(physical(self.settings.env, topics.PREFERENCES), user, self.codec.encode(stored))


@contextmanager
def router(settings: Settings) -> Iterator[SmallRouter]:
    small = SmallRouter(settings)
    small.start()
    try:
        yield small
    finally:
        small.stopping.set()
        small.join()


def test_loaded_contacts_are_sealed_and_each_user_is_asked_a_key_once(env: dict[str, str], settings: Settings) -> None:
    prefix = uuid.uuid4().hex[:8]
    lines: list[dict[str, Any]] = [
        {
            "userId": f"{prefix}-{number}",
            "email": f"secret{number}@example.com",
            "name": "Ada",
            "categories": {"payments": {"email": False}},
        }
        for number in range(300)
    ]
    text = "\n".join(
        [*map(json.dumps, lines), '{"userId": "x", "email": "nothing"}', json.dumps({"userId": f"{prefix}-quiet", "locale": "en-GB"})]
    )
    with router(settings) as small:
        result = run(env, "prefs", "load", "-", "--json", stdin=text, expect=1)
        assert json.loads(result.stdout)["published"] == 301
        assert [item["line"] for item in json.loads(result.stdout)["problems"]] == [301]
        assert sorted(small.asked) == sorted(line["userId"] for line in lines)
        run(env, "prefs", "load", "-", stdin=text, expect=1)
        assert len(small.asked) == 300, "who has a key is not asked another"

    for name in (topics.COMMANDS, topics.PREFERENCES, topics.KEYS):
        assert not any(b"secret" in (message.value() or b"") for message in read_all(settings, name))
    with Wire(settings) as wire:
        for number in (0, 299):
            stored = find_preferences(settings, wire, f"{prefix}-{number}")
            assert stored is not None
            assert stored.version == 2
    document = json.loads(run(env, "prefs", "get", f"{prefix}-7", "--show-contact", "--json").stdout)
    assert document["contact"] == {"name": "Ada", "email": "secret7@example.com", "phone": None, "devices": None}
    assert document["categories"] == {"payments": {"email": False}}
    masked = run(env, "prefs", "get", f"{prefix}-7")
    assert "secret7" not in masked.output
    assert "s•••@e•••" in masked.stdout


def test_preferences_of_an_erased_user_show_no_contact(env: dict[str, str], settings: Settings, user: str) -> None:
    with router(settings):
        run(env, "prefs", "set", user, "--email", "ada@example.com")
    publish(settings, topics.KEYS, None, key=user)
    document = json.loads(run(env, "prefs", "get", user, "--show-contact", "--json").stdout)
    assert (document["contact"], document["isErased"]) == (None, True)


def test_set_waits_until_it_is_stored_and_needs_no_key_for_choices(env: dict[str, str], settings: Settings, user: str) -> None:
    with router(settings) as small:
        result = run(env, "prefs", "set", user, "--category", "payments.email=off", "--time-zone", "Europe/Berlin", "--json")
        assert json.loads(result.stdout)["version"] == 1
        assert small.asked == []
        with Wire(settings) as wire:
            stored = find_preferences(settings, wire, user)
    assert stored is not None
    assert (stored.categories, stored.time_zone, stored.sealed) == ({"payments": {"email": False}}, "Europe/Berlin", None)


def test_a_refused_change_is_told_with_its_reason(env: dict[str, str], settings: Settings, user: str) -> None:
    with router(settings):
        result = run(env, "prefs", "set", user, "--locale", "en", "--expected-version", "5", expect=1)
    assert "version_conflict" in result.stderr


def test_without_a_router_there_is_no_key_and_no_contact_is_published(settings: Settings, user: str) -> None:
    with Wire(settings) as wire, pytest.raises(CliError, match="Is the router running"):
        keys.ensure_keys(settings, wire, codec_for(wire, topics.COMMANDS), [user], silence_seconds=0.3)
    sent = [message.value() for message in read_all(settings, topics.COMMANDS) if message.key() == user.encode()]
    with Wire(settings) as wire:
        assert [wire.decode(value, Command).kind for value in sent] == ["ensure_key"]


def test_a_user_without_preferences_is_a_sentence(env: dict[str, str], user: str) -> None:
    assert "Nothing is stored" in run(env, "prefs", "get", user, expect=1).stderr


# ---- doctor


def test_doctor_says_what_is_wrong_and_what_to_do(bare: dict[str, str]) -> None:
    before = doctor(bare)
    assert (before["topics"]["state"], before["mail"]["state"], before["registry"]["state"]) == ("failed", "passed", "passed")
    assert "notify topics ensure" in before["topics"]["advice"]
    run(bare, "topics", "ensure")
    after = doctor(bare)
    assert (after["topics"]["state"], after["web"]["state"]) == ("passed", "failed")
    assert after["worker router"]["state"] == "skipped"
    shown = run(bare, "doctor", expect=1).stdout
    assert "✓" in shown
    assert "✗" in shown


def test_doctor_without_kafka_still_looks_at_the_rest(bare: dict[str, str]) -> None:
    checks = doctor({**bare, "NOTIFY_KAFKA_BOOTSTRAP": "127.0.0.1:1", "NOTIFY_REGISTRY_URL": "http://127.0.0.1:1"})
    assert {part for part, check in checks.items() if check["state"] == "failed"} == {"kafka", "registry", "web"}
    assert checks["mail"]["state"] == "passed"


def doctor(env: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    document = json.loads(run(env, "doctor", "--json", expect=1).stdout)
    assert document["healthy"] is False
    return {check["part"]: check for check in document["checks"]}


def test_an_absent_kafka_is_a_sentence(bare: dict[str, str]) -> None:
    result = run({**bare, "NOTIFY_KAFKA_BOOTSTRAP": "127.0.0.1:1"}, "dlq", "list", expect=1)
    assert "Kafka does not answer" in result.stderr
    assert result.stdout == ""
