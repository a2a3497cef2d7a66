"""The command line without a cluster: how it finds the system, what it makes of its input, and how a trail looks."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fastavro
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner, Result

from schemas import codec, examples
from schemas.errors import InvalidEventError, SettingsError
from schemas.ids import is_notification_id
from schemas.messages import Contact
from schemas.sealed import unseal
from streams import provisioning
from streams.cli import build, console, receipts, records
from streams.cli.context import find_running, load_settings, remove_running, write_running
from streams.cli.dead import hexdump
from streams.cli.errors import CliError
from streams.cli.lines import Lines
from streams.cli.preferences import Wish, choices_table, mask, parse_choices, parse_wish
from streams.cli.produce import event_key, find_public
from streams.cli.send import build_request
from streams.cli.trail import render_trail
from streams.settings import CLIENT_NEEDS
from streams.tokens import verify
from streams.topics import Count
from streams.topology import all_topics

KEY = base64.b64encode(b"k" * 32).decode()
OTHER_KEY = base64.b64encode(b"o" * 32).decode()
SYSTEM = {
    "NOTIFY_KAFKA_BOOTSTRAP": "127.0.0.1:19092",
    "NOTIFY_REGISTRY_URL": "http://127.0.0.1:18081",
    "NOTIFY_SEAL_KEY": KEY,
    "NOTIFY_TOKEN_KEY": KEY,
    "NOTIFY_ENV": "dev",
}
WEB = "http://127.0.0.1:6067"


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which nothing runs but what the test starts."""
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    return {"XDG_RUNTIME_DIR": str(runtime), "TMPDIR": str(tmp_path)}


@pytest.fixture
def ended_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def run(*args: str, env: Mapping[str, str], stdin: str | bytes | None = None) -> Result:
    """Run `notify` with no NOTIFY_* variables but those of `env`."""
    hidden = {name: None for name in os.environ if name.startswith("NOTIFY_")}
    return CliRunner().invoke(build(), list(args), env={**hidden, **env}, input=stdin)


def as_text(renderable: object, width: int = 160) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(renderable)
    return out.getvalue()


# ---- finding the system


def test_a_running_system_is_found_without_any_settings(home: dict[str, str]) -> None:
    write_running(SYSTEM, WEB, environ=home)
    settings, web_url = load_settings(home)
    assert (settings.kafka, settings.seal_key, web_url) == (SYSTEM["NOTIFY_KAFKA_BOOTSTRAP"], b"k" * 32, WEB)


def test_a_running_system_is_found_without_a_runtime_folder(home: dict[str, str]) -> None:
    without = {"TMPDIR": home["TMPDIR"]}
    path = write_running(SYSTEM, WEB, environ=without)
    assert path.parent.name == f"flowmart-notify-{os.getuid()}"
    assert load_settings(without)[1] == WEB
    # a command in a session that has a runtime folder finds it just as well
    assert load_settings(home)[1] == WEB


def test_the_file_is_readable_by_its_user_only(home: dict[str, str]) -> None:
    path = write_running(SYSTEM, WEB, environ=home)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_variables_of_the_environment_win_over_the_running_system(home: dict[str, str]) -> None:
    write_running(SYSTEM, WEB, environ=home)
    settings, web_url = load_settings({**home, "NOTIFY_ENV": "other", "NOTIFY_WEB_PORT": "7000"})
    assert settings.env == "other"
    assert web_url == "http://127.0.0.1:7000"


def test_a_running_system_is_not_mixed_with_another_that_the_environment_names(home: dict[str, str]) -> None:
    write_running(SYSTEM, WEB, environ=home)
    with pytest.raises(SettingsError) as caught:
        load_settings({**home, "NOTIFY_KAFKA_BOOTSTRAP": "kafka-1:9092"})
    assert [problem.split(" ", 1)[0] for problem in caught.value.problems] == sorted(
        CLIENT_NEEDS - {"NOTIFY_KAFKA_BOOTSTRAP"}, key=list(SYSTEM).index
    )


def test_the_environment_alone_is_enough(home: dict[str, str]) -> None:
    settings, web_url = load_settings({**home, **SYSTEM, "NOTIFY_WEB_HOST": "0.0.0.0"})
    assert settings.registry_url == SYSTEM["NOTIFY_REGISTRY_URL"]
    assert web_url == "http://127.0.0.1:6066"


def test_nothing_to_be_found_names_every_missing_variable(home: dict[str, str]) -> None:
    result = run("prefs", "get", "u-1", env=home)
    assert result.exit_code == 2
    assert "notify up" in result.stderr
    assert all(name in result.stderr for name in CLIENT_NEEDS)
    assert "Traceback" not in result.output


def test_malformed_settings_are_named_together_and_secrets_not_shown(home: dict[str, str]) -> None:
    result = run("doctor", env={**home, **SYSTEM, "NOTIFY_SEAL_KEY": "c2hvcnQ=", "NOTIFY_PARTITIONS": "many", "NOTIFY_TYPO": "1"})
    assert result.exit_code == 2
    assert all(name in result.stderr for name in ("NOTIFY_SEAL_KEY", "NOTIFY_PARTITIONS", "NOTIFY_TYPO"))
    assert "c2hvcnQ=" not in result.output


def test_a_file_of_a_process_that_ended_is_named_with_what_to_do(home: dict[str, str], ended_pid: int) -> None:
    path = write_running(SYSTEM, WEB, environ=home)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "pid": ended_pid}))
    result = run("topics", "ensure", env=home)
    assert result.exit_code == 2
    assert str(path) in result.stderr
    assert "start `notify up` again" in result.stderr


def test_a_later_process_with_the_same_number_is_not_mistaken_for_it(home: dict[str, str]) -> None:
    path = write_running(SYSTEM, WEB, environ=home)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "processBirth": "1"}))
    running = find_running(home)
    assert running is not None
    assert running.is_stale


@pytest.mark.parametrize(("part", "mode"), [("file", 0o644), ("file", 0o620), ("folder", 0o755), ("folder", 0o770)])
def test_what_another_user_could_have_written_is_not_trusted(home: dict[str, str], part: str, mode: int) -> None:
    path = write_running(SYSTEM, WEB, environ=home)
    (path if part == "file" else path.parent).chmod(mode)
    with pytest.raises(CliError, match="is not trusted"):
        load_settings(home)


def test_a_link_in_place_of_the_folder_is_not_trusted(home: dict[str, str], tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (Path(home["XDG_RUNTIME_DIR"]) / "flowmart-notify").symlink_to(elsewhere)
    with pytest.raises(CliError, match="is not trusted"):
        load_settings(home)
    with pytest.raises(CliError, match="is not trusted"):
        write_running(SYSTEM, WEB, environ=home)


def test_a_damaged_file_is_named(home: dict[str, str]) -> None:
    path = write_running(SYSTEM, WEB, environ=home)
    path.write_text("{")
    with pytest.raises(CliError, match="damaged"):
        load_settings(home)


def test_only_the_own_file_is_removed(home: dict[str, str], ended_pid: int) -> None:
    path = write_running(SYSTEM, WEB, environ=home)
    content = path.read_text()
    path.write_text(json.dumps({**json.loads(content), "pid": ended_pid}))
    remove_running(environ=home)
    assert path.exists()
    path.write_text(content)
    remove_running(environ=home)
    assert not path.exists()


# ---- the commands themselves


COMMANDS = (
    *("produce", "send", "preview", "segments", "trail", "why", "user", "token", "doctor"),
    *("prefs get", "prefs set", "prefs load", "topics ensure", "dlq list", "dlq show", "dlq redrive"),
)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_the_help_of_each_command_has_an_example(command: str, home: dict[str, str]) -> None:
    result = run(*command.split(), "--help", env={**home, "COLUMNS": "200"})
    assert result.exit_code == 0
    assert f"notify {command}".strip() in result.stdout.partition("Examples")[2]


def test_the_version_is_printed(home: dict[str, str]) -> None:
    result = run("-V", env=home)
    assert (result.exit_code, result.stdout.split()[0]) == (0, "notify")


def test_a_token_is_all_that_is_printed(home: dict[str, str]) -> None:
    result = run("token", "--user", "u-1", "--lifetime", "12h", env={**home, **SYSTEM})
    assert result.stderr == ""
    assert verify(b"k" * 32, f"Bearer {result.stdout.strip()}").user_id == "u-1"
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize("span", ["", "12", "0h", "-1h", "1w", "1.5h"])
def test_a_span_that_is_none_is_refused(span: str, home: dict[str, str]) -> None:
    assert run("token", "--lifetime", span, env={**home, **SYSTEM}).exit_code == 2


def test_an_error_nobody_foresaw_shows_where_it_comes_from_only_when_asked(home: dict[str, str]) -> None:
    missing = run("produce", "payments", "/no/such/file", env={**home, **SYSTEM})
    assert (missing.exit_code, "cannot be read" in missing.stderr) == (1, True)
    traced = run("--traceback", "produce", "payments", "/no/such/file", env={**home, **SYSTEM})
    assert isinstance(traced.exception, CliError)


def test_a_notification_id_is_checked_before_anything_is_asked(home: dict[str, str]) -> None:
    result = run("trail", "abc", env={**home, **SYSTEM})
    assert (result.exit_code, "32 hexadecimal digits" in result.stderr) == (1, True)


# ---- input


def read_lines(path: Path) -> tuple[list[tuple[int, dict[str, object]]], Lines]:
    with Lines(str(path)) as lines:
        return list(lines.objects(lambda _: None)), lines


def test_a_bad_line_is_reported_by_its_number_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "in.ndjson"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\nnonsense\n[1]\n\xff\n{"a": 2}')
    found, lines = read_lines(file)
    assert found == [(1, {"a": 1}), (6, {"a": 2})]
    assert [number for number, _ in lines.problems] == [3, 4, 5]
    assert "line 3:" in capsys.readouterr().err


def test_a_file_of_nothing_but_bad_lines_does_not_scroll_everything_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "in.ndjson"
    file.write_text("x\n" * 10_000)
    _, lines = read_lines(file)
    assert lines.bad_lines == 10_000
    assert len(capsys.readouterr().err.splitlines()) < 100


@pytest.mark.parametrize("name", sorted(path.name.removesuffix(".avsc") for path in codec.AVRO_FOLDER.glob("*.avsc")))
def test_the_example_of_each_message_can_be_produced(name: str) -> None:
    record = records.to_record(name, json.loads((codec.AVRO_FOLDER / f"{name}.example.json").read_text()))
    out = io.BytesIO()
    fastavro.schemaless_writer(out, codec.own_schema(name), record)
    assert out.getvalue() == codec.pack(examples.example(name))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"userID": "u"}, "userID: is not a field; is userId meant?"),
        ({"userId": 1}, "userId: is not a text"),
        ({"occurredAt": "yesterday"}, "occurredAt: is not a time"),
        ({"occurredAt": "2025-01-01T00:00:00"}, "occurredAt: is neither a time"),
        ({"data": {"a": 1}}, "data.a: is not a text"),
        ({"data": []}, "data: is not an object"),
        ({"isFinal": 1}, "isFinal: is not true or false"),
        ({"origin": {"topic": "t", "partition": 2**31, "offset": 1}}, "origin.partition: is not a whole number"),
    ],
)
def test_a_field_that_does_not_fit_is_named(change: dict[str, object], problem: str) -> None:
    request = {"eventId": "e", "producer": "p", "rule": "message", "userId": "u", "occurredAt": "2025-01-01T00:00:00Z"}
    with pytest.raises(InvalidEventError) as caught:
        records.to_record("NotificationRequested", {**request, **change})
    assert str(caught.value).startswith(problem)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(InvalidEventError, match="eventId: is missing"):
        records.to_record("NotificationRequested", {})


def test_an_address_in_the_code_of_a_report_is_not_published() -> None:
    report = {"provider": "smtp", "reference": "d.0@example.com", "status": "bounced", "at": "2026-03-01T00:00:00Z"}
    said = receipts.to_record({**report, "code": "550 <zebulon@planted.example> is unknown"})
    assert said == receipts.to_record({**report, "code": "550 is unknown"}), "and its id is of what is published"
    assert said["code"] == "550 is unknown"


def test_a_topic_goes_by_its_full_and_its_short_name() -> None:
    assert find_public("dev", "payments") == find_public("dev", "payments.dev.events")
    assert find_public("dev", "actions") == find_public("dev", "notify.dev.user-actions")
    assert find_public("dev", "requests.bulk") == find_public("dev", "notify.dev.requests.bulk")


@pytest.mark.parametrize("topic", ["keys", "preferences", "decisions", "dead", "notify.dev.status", "payments.prod.events", "nope"])
def test_nobody_but_its_writer_publishes_to_a_topic_of_the_service(topic: str) -> None:
    with pytest.raises(CliError, match="One may publish to"):
        find_public("dev", topic)


def test_a_payment_is_keyed_by_its_id_wherever_that_stands() -> None:
    assert event_key("payments", {"eventId": "e", "data": {"paymentId": "p"}}) == "p"
    assert event_key("payments", {"paymentId": "p", "transactionId": "t"}) == "p"
    assert event_key("payments", {"id": "p"}) == "p"
    with pytest.raises(InvalidEventError):
        event_key("payments", {"amount": 1})


def test_an_adjustment_is_keyed_by_its_product_else_its_sku() -> None:
    assert event_key("inventory", {"eventId": "e", "data": {"productId": "p", "sku": "s"}}) == "p"
    assert event_key("inventory", {"event_id": "e", "product_id": "p"}) == "p"
    assert event_key("inventory", {"eventId": "e", "sku": "s"}) == "s"


def test_the_same_key_is_the_same_notification_and_no_key_is_another_each_time() -> None:
    first, later = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)

    def sent(key: str | None, now: datetime) -> str:
        request, identity = build_request(user_id="u", rule="message", data={"title": "t", "message": "m"}, key=key, now=now)
        assert request.producer == "cli"
        assert is_notification_id(identity)
        return identity

    assert sent("k", first) == sent("k", later)
    assert sent(None, first) != sent(None, later)


def test_a_rule_that_does_not_exist_is_answered_with_those_that_do(home: dict[str, str]) -> None:
    result = run("send", "--user", "u", "--title", "t", "--message", "m", "--rule", "nope", env={**home, **SYSTEM})
    assert (result.exit_code, "payment_confirmed" in result.stderr) == (1, True)


def test_what_the_templates_lack_is_asked_for_before_anything_is_published(home: dict[str, str]) -> None:
    options = ("send", "--title", "t", "--message", "m", "--rule", "new_sign_in", "--data", "device=Firefox")
    result = run(*options, "--user", "u", env={**home, **SYSTEM})
    assert result.exit_code == 1
    assert "--data location=… --data occurredAt=…" in " ".join(result.stderr.split())
    result = run(*options, "--user", "u" * 201, env={**home, **SYSTEM})
    assert (result.exit_code, "longer than 200" in result.stderr) == (1, True)


# ---- preferences


def test_a_wish_says_only_what_is_given() -> None:
    assert parse_wish({"userId": "u", "name": None}) == Wish(user_id="u")
    wish = parse_wish(
        {"userId": "u", "email": "ada@example.com", "timeZone": "Europe/London", "categories": {"payments": {"in_app": False}}}
    )
    assert wish.contact == Contact(email="ada@example.com")
    assert (wish.time_zone, wish.categories) == ("Europe/London", {"payments": {"in_app": False}})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("userId", ""),
        ("userId", 7),
        ("email", "not a mailbox"),
        ("email", "two words@example.com"),
        ("name", "bell\a"),
        ("name", "x" * 1_001),
        ("phone", 441_234),
        ("devices", "abc123"),
        ("devices", [1]),
        ("devices", ["fcm:good", "device-7f3a91"]),
        ("devices", ["webpush:{}"]),
        ("timeZone", "Mars/Olympus"),
        ("timeZone", "../../etc/passwd"),
        ("categories", []),
        ("categories", {"payments": True}),
        ("categories", {"payments": {"pigeon": True}}),
        ("categories", {"payments": {"email": "yes"}}),
        ("adress", "typo"),
    ],
)
def test_a_preference_that_makes_no_sense_is_named_but_never_repeated(field: str, value: object) -> None:
    with pytest.raises(InvalidEventError) as caught:
        parse_wish({"userId": "u", field: value})
    assert str(caught.value).startswith(field)
    assert not isinstance(value, str) or not value or value not in str(caught.value)


def test_a_device_that_is_none_is_refused_and_not_repeated(home: dict[str, str]) -> None:
    result = run("prefs", "set", "u", "--device", "fcm:good", "--device", "planted device", env={**home, **SYSTEM})
    assert result.exit_code == 1
    assert "devices" in result.stderr
    assert "number 2" in result.stderr
    assert "planted" not in result.stderr


def test_devices_replace_those_stored_unless_they_are_added() -> None:
    wish = parse_wish({"userId": "u", "devices": ["fcm:t"]})
    now = datetime.now(UTC)
    commands = [each.command(b"k" * 32, now) for each in (wish, replace(wish, adds_devices=True))]
    assert [command.kind for command in commands] == ["set_preferences", "add_device"]
    assert parse_wish({"userId": "u", "devices": []}).contact == Contact(devices=[])


def test_the_sample_preferences_are_all_accepted() -> None:
    assert [parse_wish(line).contact is not None for line in examples.samples("preferences")] == [True] * len(
        examples.samples("preferences")
    )


def test_choices_are_collected_by_category() -> None:
    assert parse_choices(["payments.email=off", "payments.in_app=on", "a.b.email=on"]) == {
        "payments": {"email": False, "in_app": True},
        "a.b": {"email": True},
    }
    for text in ("payments.email", "email=off", "payments.email=maybe", ""):
        with pytest.raises(CliError):
            parse_choices([text])


def test_personal_fields_leave_sealed_for_their_user() -> None:
    key = b"u" * 32
    command = parse_wish({"userId": "u", "email": "ada@example.com"}).command(key, datetime(2026, 1, 1, tzinfo=UTC))
    assert command.sealed is not None
    assert b"ada" not in command.sealed
    assert codec.unpack(unseal(key, command.sealed, user_id="u", purpose="contact"), Contact) == Contact(email="ada@example.com")


@given(
    st.builds(
        Contact, name=st.text(min_size=4), email=st.emails(), phone=st.text("0123456789", min_size=6), devices=st.lists(st.text(min_size=4))
    )
)
def test_a_masked_contact_says_no_more_than_first_letters(contact: Contact) -> None:
    masked = mask(contact)
    assert contact.name
    assert contact.email
    assert contact.phone
    assert (masked.name, masked.phone) == (f"{contact.name[0]}•••", f"•••{contact.phone[-2:]}")
    assert masked.email == f"{contact.email[0]}•••@{contact.email.rpartition('@')[2][0]}•••"
    assert masked.devices == ["•••"] * len(contact.devices or [])


def test_a_masked_device_says_of_what_kind_it_is() -> None:
    assert mask(Contact(devices=["fcm:secret", "apns:00ff", "webpush:{}", "other:secret", "fcm"])).devices == [
        *("fcm:•••", "apns:•••", "webpush:•••", "•••", "•••")
    ]


# ---- what is shown


def test_choices_show_what_is_on_in_each_category_and_whether_the_user_chose_it() -> None:
    chosen = {"payments": {"email": False, "sms": True}, "watches": {"in_app": True}, "gone": {"push": True}}
    lines = as_text(choices_table(chosen)).replace(console.NOTHING, "-").splitlines()
    shown = [line.split() for line in lines]
    assert shown[0] == ["category", "email", "sms", "push", "in_app"]
    assert {line[0]: line[1:] for line in shown[1:-1]} == {
        "gone": ["-", "-", "on", "-"],
        "inventory": ["(on)", "(off)", "(on)", "(on)"],
        "messages": ["(on)", "(off)", "(on)", "(on)"],
        "payments": ["off", "on", "(on)", "(on)"],
        "security": ["(on)", "(on)", "(on)", "(on)"],
        "watches": ["(on)", "-", "(on)", "on"],
    }
    assert "in brackets: by default" in lines[-1]


TRAIL: dict[str, Any] = {
    "notificationId": "0123456789abcdef0123456789abcdef",
    "userId": "cust_10482",
    "event": {
        "id": "evt_1",
        "producer": "payments",
        "topic": "payments",
        "partition": 2,
        "offset": 41,
        "occurredAt": "2025-11-18T09:12:44.503Z",
    },
    "decision": {
        "outcome": "notified",
        "reason": None,
        "rule": "payment_confirmed",
        "type": "payment",
        "category": "payments",
        "lane": "normal",
        "versions": {"rule": "1", "template": "payment_confirmed@1", "preferences": 3},
        "limiter": {},
        "acceptedAt": "2025-11-18T09:12:44.600Z",
        "decidedAt": "2025-11-18T09:12:44.700Z",
        "request": {"topic": "requests.normal", "partition": 1, "offset": 7},
        "channels": [
            {"channel": "in_app", "isChosen": False, "reason": "opted_out", "deliveryId": None},
            {"channel": "email", "isChosen": True, "reason": "default", "deliveryId": "0123456789abcdef0123456789abcdef-email"},
        ],
    },
    "again": [
        {
            "at": "2025-11-18T10:00:00.000Z",
            "outcome": "duplicate_of",
            "reason": None,
            "request": {"topic": "requests.normal", "partition": 1, "offset": 9},
        }
    ],
    "deliveries": [
        {
            "deliveryId": "0123456789abcdef0123456789abcdef-email",
            "channel": "email",
            "status": "sent",
            "changes": [
                {"at": "2025-11-18T09:12:44.710Z", "status": "queued", "generation": 0, "attempt": 0},
                {"at": "2025-11-18T09:12:44.800Z", "status": "sending", "generation": 0, "attempt": 1, "provider": "smtp"},
                {
                    "at": "2025-11-18T09:12:45.800Z",
                    "status": "retrying",
                    "generation": 0,
                    "attempt": 1,
                    "provider": "smtp",
                    "reason": "421",
                },
                {"at": "2025-11-18T09:13:15.800Z", "status": "sending", "generation": 0, "attempt": 2, "provider": "smtp"},
                {
                    "at": "2025-11-18T09:13:16.000Z",
                    "status": "sent",
                    "generation": 0,
                    "attempt": 2,
                    "provider": "smtp",
                    "reference": "ref-1",
                },
            ],
        }
    ],
    "engagement": {"status": "read", "readAt": "2025-11-18T09:20:00.000Z", "archivedAt": None, "clickedAt": None},
}


def test_a_trail_reads_from_the_event_to_the_end() -> None:
    shown = as_text(render_trail(TRAIL))
    expected = [
        "cust_10482", "evt_1", "payments[2]@41", "notified", "payment_confirmed v1", "version 3", "opted_out",
        "email", "queued", "attempt 1", "smtp", "retrying", "421", "attempt 2", "+31.4 s", "ref-1", "duplicate_of", "read",
    ]  # fmt: skip
    position = -1
    for word in expected:
        position = shown.find(word, position + 1)
        assert position >= 0, f"{word!r} is missing, or too early, in:\n{shown}"


def test_a_trail_without_a_decision_says_so() -> None:
    shown = as_text(
        render_trail(
            {"notificationId": "0" * 32, "userId": "u", "event": None, "decision": None, "again": [], "deliveries": [], "engagement": {}}
        )
    )
    assert "not decided yet" in shown


def test_what_others_wrote_does_not_steer_the_terminal() -> None:
    hostile = deepcopy(TRAIL)
    hostile["event"]["id"] = "evil\x1b[2J\x1b]0;title\x07[bold red]markup[/bold red]\u202e"
    hostile["deliveries"][0]["changes"][2]["reason"] = "a\nb\x9b31m"
    shown = as_text(render_trail(hostile))
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(shown)
    assert "[bold red]markup[/bold red]" in shown


@st.composite
def with_holes(draw: st.DrawFn) -> dict[str, Any]:
    """Return the trail with some of its values missing, as an older or newer web may answer."""

    def pierce(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: pierce(item) if draw(st.integers(0, 9)) else None for name, item in value.items()}
        return [pierce(item) for item in value] if isinstance(value, list) else value

    return {name: pierce(value) if draw(st.integers(0, 9)) else None for name, value in TRAIL.items()}


@given(with_holes())
def test_a_trail_with_missing_parts_is_still_shown(document: dict[str, Any]) -> None:
    assert as_text(render_trail(document))


def test_bytes_are_shown_with_their_offsets() -> None:
    assert hexdump(b"\x00\x00\x00\x00\x07hello\xff wor")[0] == "00000000  00 00 00 00 07 68 65 6c  6c 6f ff 20 77 6f 72     .....hello. wor"
    assert len(hexdump(b"x" * 33)) == 3
    assert hexdump(b"") == []


def test_json_of_a_message_has_camel_case_times_and_base64() -> None:
    shown = console.to_json(examples.example("UserKey"))
    assert isinstance(shown, dict)
    assert set(shown) == {"userId", "wrapped", "createdAt"}
    assert str(shown["createdAt"]).endswith("Z")


# ---- topics as they should be

COUNTS = {Count.USER: 24, Count.INBOUND: 12, Count.INVENTORY: 6, Count.ONE: 1}


def test_three_replicas_ask_for_two_in_sync_and_one_asks_for_itself() -> None:
    for replication, in_sync in ((1, "1"), (3, "2")):
        for target in provisioning.targets(all_topics(), env="prod", counts=COUNTS, replication=replication):
            assert target.config["min.insync.replicas"] == in_sync
            assert target.config["unclean.leader.election.enable"] == "false"
            assert target.replication == replication


def test_the_partitions_of_inbound_topics_are_counted_by_themselves() -> None:
    counts = {target.name: target.partitions for target in provisioning.targets(all_topics(), env="prod", counts=COUNTS, replication=3)}
    assert (counts["payments.prod.events"], counts["notify.prod.parked"], counts["notify.prod.keys"]) == (12, 12, 24)
