"""What the environment may say, and what is said about it when it is wrong."""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from schemas.errors import SettingsError
from schemas.topics import Lane
from streams.roles import Role, sender_of
from streams.settings import CLIENT_NEEDS, SECRETS, VARIABLES, WORKER_NEEDS, Settings

KEY = base64.b64encode(bytes(range(32))).decode()
PASSWORD = "planted-password"
WORKER = {
    "NOTIFY_ROLE": "router",
    "NOTIFY_KAFKA_BOOTSTRAP": "kafka-1:9092,kafka-2:9092",
    "NOTIFY_REGISTRY_URL": "http://registry:8081",
    "NOTIFY_SEAL_KEY": KEY,
    "NOTIFY_TOKEN_KEY": KEY,
}


def problems(env: dict[str, str], needs: frozenset[str] = frozenset()) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        Settings.from_env(env, needs=needs)
    return caught.value.problems


def test_nothing_is_needed_to_look_at_the_defaults() -> None:
    settings = Settings.from_env({})
    assert (settings.env, settings.role, settings.kafka, settings.worker_name) == ("dev", None, "", None)
    assert (settings.partitions, settings.inbound_partitions, settings.replication) == (4, 4, 1)
    assert (settings.web_host, settings.web_port) == ("127.0.0.1", 6066)
    assert (settings.dedupe_seconds, settings.session_timeout_seconds, settings.max_open_attempts) == (7 * 86_400, 10, 32)


def test_a_worker_has_what_its_environment_says() -> None:
    settings = Settings.from_env({**WORKER, "NOTIFY_DEDUPE_DAYS": "14", "NOTIFY_REGISTRY_URL": "https://registry/"}, needs=WORKER_NEEDS)
    assert settings.role is Role.ROUTER
    assert settings.kafka == "kafka-1:9092,kafka-2:9092"
    assert settings.registry_url == "https://registry"
    assert settings.seal_key == bytes(range(32))
    assert settings.dedupe_seconds == 14 * 86_400


def test_the_process_own_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "NOTIFY_ENV", "elsewhere")
    assert Settings.from_env({}).env == "dev"


def test_everything_missing_is_named_at_once() -> None:
    found = problems({}, WORKER_NEEDS)
    assert {problem.split()[0] for problem in found} == WORKER_NEEDS
    assert all(" is missing: " in problem for problem in found)
    assert all(problem.endswith(VARIABLES[problem.split()[0]]) for problem in found)


def test_everything_missing_and_malformed_is_named_together() -> None:
    env = {**WORKER, "NOTIFY_ROLE": "chef", "NOTIFY_WEB_PORT": "http", "NOTIFY_KAFKA_BOOTSTRAP": "", "NOTIFY_REGISTRY_URL": "registry"}
    found = problems(env, WORKER_NEEDS)
    assert [problem.split()[0].rstrip(":") for problem in found] == [
        "NOTIFY_ROLE",
        "NOTIFY_KAFKA_BOOTSTRAP",
        "NOTIFY_REGISTRY_URL",
        "NOTIFY_WEB_PORT",
    ]


def test_blank_is_as_if_it_were_not_set() -> None:
    assert Settings.from_env({"NOTIFY_ENV": "  ", "NOTIFY_WEB_PORT": ""}) == Settings.from_env({})
    assert problems({**WORKER, "NOTIFY_SEAL_KEY": " "}, WORKER_NEEDS)[0].startswith("NOTIFY_SEAL_KEY is missing")


def test_an_unknown_variable_of_ours_is_named_and_others_are_none_of_our_business() -> None:
    (problem,) = problems({"NOTIFY_KAFKA": "kafka:9092", "HOME": "/", "KAFKA": "x"})
    assert problem.startswith("NOTIFY_KAFKA is not a setting")


@pytest.mark.parametrize("lane", list(Lane))
def test_a_sender_needs_the_mail_server_and_no_other_role_does(lane: Lane) -> None:
    sender = {**WORKER, "NOTIFY_ROLE": str(sender_of(lane))}
    (problem,) = problems(sender, WORKER_NEEDS)
    assert problem.startswith("NOTIFY_SMTP_URL is missing")
    assert Settings.from_env({**sender, "NOTIFY_SMTP_URL": "smtp://mail:25"}, needs=WORKER_NEEDS).smtp_url == "smtp://mail:25"
    others = [role for role in Role if role.lane is None]
    database = {"NOTIFY_POSTGRES_URL": "postgresql://me:word@postgres/notify"}
    assert {Settings.from_env({**WORKER, **database, "NOTIFY_ROLE": role}, needs=WORKER_NEEDS).smtp_url for role in others} == {""}


def test_the_store_needs_the_database_and_no_other_role_does() -> None:
    (problem,) = problems({**WORKER, "NOTIFY_ROLE": "store"}, WORKER_NEEDS)
    assert problem.startswith("NOTIFY_POSTGRES_URL is missing")
    (problem,) = problems({**WORKER, "NOTIFY_ROLE": "store", "NOTIFY_POSTGRES_URL": "mysql://me:hush@db/notify"}, WORKER_NEEDS)
    assert "hush" not in problem
    assert Settings.from_env({**WORKER, "NOTIFY_ROLE": "views"}, needs=WORKER_NEEDS).postgres_url == ""


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("NOTIFY_WEB_PORT", 1, 65_535),
        ("NOTIFY_PARTITIONS", 1, 10_000),
        ("NOTIFY_INBOUND_PARTITIONS", 1, 10_000),
        ("NOTIFY_REPLICATION", 1, 9),
        ("NOTIFY_SESSION_TIMEOUT_SECONDS", 6, 300),
        ("NOTIFY_MAX_OPEN_ATTEMPTS", 1, 1_000),
    ],
)
def test_a_number_has_bounds(name: str, low: int, high: int) -> None:
    for value in (low, high):
        Settings.from_env({name: str(value)})
    for text in (str(low - 1), str(high + 1), "-1", "1.5", "many", "1e1", "²", "--5"):
        (problem,) = problems({name: text})
        assert problem.startswith(f"{name}: {text!r} ")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("NOTIFY_ENV", "prod/eu"),
        ("NOTIFY_ENV", "-dev"),
        ("NOTIFY_WORKER_NAME", "two words"),
        ("NOTIFY_WORKER_NAME", "a" * 64),
        ("NOTIFY_ROLE", "sender"),
        ("NOTIFY_KAFKA_BOOTSTRAP", "kafka"),
        ("NOTIFY_KAFKA_BOOTSTRAP", "kafka:9092,"),
        ("NOTIFY_KAFKA_BOOTSTRAP", "kafka:port"),
        ("NOTIFY_REGISTRY_URL", "registry:8081"),
        ("NOTIFY_REGISTRY_URL", "ftp://registry"),
        ("NOTIFY_MAIL_FROM", "FlowMart"),
        ("NOTIFY_MAIL_FROM", "a@b.example\r\nBcc: c@d.example"),
    ],
)
def test_what_is_malformed_is_shown_with_what_is_wanted(name: str, text: str) -> None:
    (problem,) = problems({name: text})
    assert problem.startswith(f"{name}: {text.strip()!r} ")
    assert problem.endswith(VARIABLES[name])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("NOTIFY_SEAL_KEY", PASSWORD),
        ("NOTIFY_SEAL_KEY", f"{PASSWORD}é"),
        ("NOTIFY_SEAL_KEY", base64.b64encode(PASSWORD.encode()).decode()),
        ("NOTIFY_TOKEN_KEY", PASSWORD),
        ("NOTIFY_TOKEN_KEY", base64.b64encode(PASSWORD.encode()).decode()),
        ("NOTIFY_SMTP_URL", PASSWORD),
        ("NOTIFY_SMTP_URL", f"https://user:{PASSWORD}@mail.example"),
        ("NOTIFY_SMTP_URL", f"smtp://user:{PASSWORD}[@mail.example"),
        ("NOTIFY_SMTP_URL", f"smtp://user:{PASSWORD}℀@mail.example"),
        ("NOTIFY_BOUNCES_URL", PASSWORD),
        ("NOTIFY_BOUNCES_URL", f"imap4://bounces:{PASSWORD}@mail.example/INBOX"),
    ],
)
def test_a_malformed_secret_is_named_and_never_shown(name: str, text: str) -> None:
    (problem,) = problems({name: text})
    assert problem.startswith(f"{name}: its value ")
    assert PASSWORD not in problem
    assert text not in problem


def test_every_setting_that_says_that_it_is_secret_is_treated_so_and_no_other() -> None:
    assert {name for name, text in VARIABLES.items() if "secret" in re.split(r"[;,] ", text)} == SECRETS


def test_no_secret_is_in_the_settings_text() -> None:
    url, mailbox = f"smtps://user:{PASSWORD}@mail.example:465", f"imaps://bounces:{PASSWORD}@mail.example"
    env = {**WORKER, "NOTIFY_ROLE": "sender-bulk", "NOTIFY_SMTP_URL": url, "NOTIFY_BOUNCES_URL": mailbox}
    settings = Settings.from_env(env, needs=WORKER_NEEDS)
    assert settings.smtp_url == url
    assert settings.bounces is not None
    assert settings.bounces.password == PASSWORD
    for shown in (repr(settings), str(settings)):
        assert PASSWORD not in shown
        assert repr(settings.seal_key) not in shown


@pytest.mark.parametrize(("name", "size", "is_right"), [("NOTIFY_SEAL_KEY", 32, True), ("NOTIFY_SEAL_KEY", 31, False)])
def test_the_seal_key_has_32_bytes(name: str, size: int, *, is_right: bool) -> None:
    env = {name: base64.b64encode(bytes(size)).decode()}
    if is_right:
        Settings.from_env(env)
    else:
        assert "has 31 bytes, not 32" in problems(env)[0]


def test_the_token_key_has_at_least_32_bytes() -> None:
    Settings.from_env({"NOTIFY_TOKEN_KEY": base64.b64encode(bytes(64)).decode()})
    assert "has 16 bytes, fewer than 32" in problems({"NOTIFY_TOKEN_KEY": base64.b64encode(bytes(16)).decode()})[0]


def test_the_data_folder_is_of_the_user() -> None:
    assert Settings.from_env({"NOTIFY_DATA_DIR": "~/notify"}).data_dir == Path("~/notify").expanduser()


def test_commands_need_no_role() -> None:
    assert {"NOTIFY_ROLE", *CLIENT_NEEDS} == WORKER_NEEDS
    assert set(VARIABLES) >= {*WORKER_NEEDS, *SECRETS}


@given(st.dictionaries(st.sampled_from(sorted(VARIABLES)), st.text(max_size=30)))
@example({"NOTIFY_PROVIDERS_FILE": "\x00"})
def test_any_environment_makes_settings_or_a_list_of_problems(env: dict[str, str]) -> None:
    found: list[str] = []
    try:
        assert Settings.from_env(env, needs=WORKER_NEEDS).role is not None
    except SettingsError as error:
        found = error.problems
    assert all(problem.startswith("NOTIFY_") for problem in found)
