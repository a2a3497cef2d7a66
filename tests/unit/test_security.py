"""What the environment may say about names, certificates and rights, and what follows from it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import replace
from typing import Any

import faust
import pytest
from typer.testing import CliRunner

from schemas import topics
from schemas.errors import SettingsError
from streams.cli import build
from streams.outside import FOLLOWERS
from streams.rights import Kind, Operation, Right, rights_of, rights_of_operator
from streams.roles import Role
from streams.security import KafkaSecurity, Mechanism, Protocol, Tls
from streams.settings import Settings
from streams.topics import SHARED, physical
from streams.topology import steps_of
from streams.transport.cluster import Cluster
from streams.transport.credentials import credentials
from tests.harness import ROOT
from tests.secure_kafka import Authority

PASSWORD = "planted-password"
SCRAM = {
    "NOTIFY_KAFKA_SECURITY_PROTOCOL": "sasl_ssl",
    "NOTIFY_KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
    "NOTIFY_KAFKA_USER": "router",
    "NOTIFY_KAFKA_PASSWORD": PASSWORD,
}
IAM = {"NOTIFY_KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "NOTIFY_KAFKA_SASL_MECHANISM": "AWS_MSK_IAM", "NOTIFY_KAFKA_REGION": "eu-west-1"}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


def problems(env: dict[str, str]) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        Settings.from_env(env)
    assert not [problem for problem in caught.value.problems if PASSWORD in problem]
    return caught.value.problems


# ---- settings


def test_without_a_word_nothing_is_encrypted_and_nobody_is_named() -> None:
    settings = Settings.from_env({"NOTIFY_KAFKA_BOOTSTRAP": "kafka:9092"})
    assert settings.cluster == Cluster(bootstrap="kafka:9092")
    assert "security.protocol" not in settings.cluster.config()
    assert credentials(settings.kafka_security) is None


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (
            {"NOTIFY_KAFKA_SECURITY_PROTOCOL": "SASL_SSL"},
            ["NOTIFY_KAFKA_SASL_MECHANISM is missing: NOTIFY_KAFKA_SECURITY_PROTOCOL is SASL_SSL; one of PLAIN"],
        ),
        (
            {"NOTIFY_KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "NOTIFY_KAFKA_SASL_MECHANISM": "PLAIN"},
            ["NOTIFY_KAFKA_USER is missing", "NOTIFY_KAFKA_PASSWORD is missing"],
        ),
        (
            {"NOTIFY_KAFKA_USER": "u", "NOTIFY_KAFKA_PASSWORD": PASSWORD, "NOTIFY_KAFKA_CA_FILE": "/ca.pem"},
            ["NOTIFY_KAFKA_CA_FILE is set, but", "NOTIFY_KAFKA_USER is set, but", "NOTIFY_KAFKA_PASSWORD is set, but"],
        ),
        (
            {**IAM, "NOTIFY_KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT", "NOTIFY_KAFKA_USER": "u", "NOTIFY_KAFKA_REGION": ""},
            [
                "NOTIFY_KAFKA_SECURITY_PROTOCOL is SASL_PLAINTEXT, but AWS_MSK_IAM",
                "NOTIFY_KAFKA_REGION is missing",
                "NOTIFY_KAFKA_USER is set",
            ],
        ),
        ({**SCRAM, "NOTIFY_KAFKA_REGION": "eu-west-1"}, ["NOTIFY_KAFKA_REGION is set, but NOTIFY_KAFKA_SASL_MECHANISM is SCRAM-SHA-512"]),
        ({"NOTIFY_KAFKA_SECURITY_PROTOCOL": "TLS"}, ["NOTIFY_KAFKA_SECURITY_PROTOCOL: 'TLS' is not one of PLAINTEXT, SSL"]),
        (
            {**SCRAM, "NOTIFY_KAFKA_CA_FILE": "/nowhere/ca.pem", "NOTIFY_KAFKA_KEY_FILE": "/nowhere/key"},
            [
                "NOTIFY_KAFKA_CERTIFICATE_FILE is missing",
                "NOTIFY_KAFKA_CA_FILE: '/nowhere/ca.pem' cannot be read",
                "NOTIFY_KAFKA_KEY_FILE:",
            ],
        ),
        ({**SCRAM, "NOTIFY_KAFKA_CA_FILE": __file__}, ["NOTIFY_KAFKA_CA_FILE: "]),
        (
            {"NOTIFY_REGISTRY_URL": "http://registry", "NOTIFY_REGISTRY_USER": "u", "NOTIFY_REGISTRY_CA_FILE": "/ca.pem"},
            ["NOTIFY_REGISTRY_PASSWORD is missing", "NOTIFY_REGISTRY_CA_FILE is set, but NOTIFY_REGISTRY_URL does not begin with https://"],
        ),
        ({"NOTIFY_REGISTRY_URL": f"https://u:{PASSWORD}@registry"}, ["NOTIFY_REGISTRY_URL: its value has a name or password in it"]),
    ],
)
def test_each_problem_is_a_sentence_of_its_own(env: dict[str, str], expected: list[str]) -> None:
    found = problems(env)
    assert len(found) == len(expected), found
    for said, begins in zip(found, expected, strict=True):
        assert said.startswith(begins)


def test_a_key_that_does_not_fit_its_certificate_or_its_password_is_named(authority: Authority) -> None:
    shown, other, closed = authority.issue("shown"), authority.issue("other"), authority.issue("closed", password=PASSWORD)

    def said(tls: Tls) -> list[str]:
        return list(KafkaSecurity(protocol=Protocol.SSL, tls=tls).problems())

    assert said(shown) == said(closed) == []
    assert said(replace(shown, key_file=other.key_file)) == [
        f"NOTIFY_KAFKA_KEY_FILE: '{other.key_file}' is not the key of the certificate in NOTIFY_KAFKA_CERTIFICATE_FILE"
    ]
    assert said(replace(closed, key_password=None)) == [f"NOTIFY_KAFKA_KEY_PASSWORD is needed to open '{closed.key_file}'"]
    assert said(replace(closed, key_password="wrong")) == [f"NOTIFY_KAFKA_KEY_PASSWORD does not open '{closed.key_file}'"]
    assert said(replace(shown, certificate_file=shown.key_file)) == [
        "NOTIFY_KAFKA_CERTIFICATE_FILE and NOTIFY_KAFKA_KEY_FILE: no certificate with its key in PEM"
    ]


def test_no_password_is_in_what_is_shown(authority: Authority) -> None:
    closed = authority.issue("shown-nowhere", password=PASSWORD)
    env = {
        **SCRAM,
        "NOTIFY_KAFKA_CERTIFICATE_FILE": str(closed.certificate_file),
        "NOTIFY_KAFKA_KEY_FILE": str(closed.key_file),
        "NOTIFY_KAFKA_KEY_PASSWORD": PASSWORD,
        "NOTIFY_REGISTRY_USER": "u",
        "NOTIFY_REGISTRY_PASSWORD": PASSWORD,
    }
    settings = Settings.from_env(env)
    assert settings.kafka_security.password == settings.registry_security.password == PASSWORD
    for shown in (repr(settings), repr(settings.cluster), settings.kafka_security.shown, repr(credentials(settings.kafka_security))):
        assert PASSWORD not in shown


# ---- both Kafka clients


def test_both_kafka_clients_get_the_same_name(authority: Authority) -> None:
    settings = Settings.from_env({**SCRAM, "NOTIFY_KAFKA_CA_FILE": str(authority.file)})
    config = settings.cluster.config()
    assert (config["security.protocol"], config["sasl.mechanism"], config["sasl.username"]) == ("SASL_SSL", "SCRAM-SHA-512", "router")
    assert (config["sasl.password"], config["ssl.ca.location"]) == (PASSWORD, str(authority.file))
    member: Any = credentials(settings.kafka_security)
    assert isinstance(member, faust.SASLCredentials)
    assert (member.protocol.value, member.mechanism.value, member.username) == ("SASL_SSL", "SCRAM-SHA-512", "router")
    assert member.password == PASSWORD
    assert member.ssl_context is not None
    assert member.ssl_context.check_hostname


def test_both_kafka_clients_show_the_same_certificate(authority: Authority) -> None:
    tls = authority.issue("both", password=PASSWORD)
    security = KafkaSecurity(protocol=Protocol.SSL, tls=tls)
    config = security.librdkafka()
    assert (config["ssl.certificate.location"], config["ssl.key.location"]) == (str(tls.certificate_file), str(tls.key_file))
    assert config["ssl.key.password"] == PASSWORD
    assert isinstance(credentials(security), faust.SSLCredentials)


def test_tokens_are_shared_by_both_kafka_clients() -> None:
    security = KafkaSecurity(protocol=Protocol.SASL_SSL, mechanism=Mechanism.AWS_MSK_IAM, tokens=lambda: ("token", 12.5))
    config = security.librdkafka()
    assert (config["sasl.mechanism"], config["oauth_cb"]("")) == ("OAUTHBEARER", ("token", 12.5))
    assert isinstance(credentials(security), faust.OAuthCredentials)


def test_without_the_signer_the_extra_is_named_and_others_never_import_it() -> None:
    program = """
import sys
from streams.settings import Settings
from schemas.errors import SettingsError
import streams.app
assert not [name for name in sys.modules if name.startswith(("boto", "aws_msk"))]
sys.modules["aws_msk_iam_sasl_signer"] = None
settings = Settings.from_env({variables})
try:
    settings.cluster.config()
except SettingsError as error:
    print(*error.problems)
"""
    done = subprocess.run(
        [sys.executable, "-c", program.replace("{variables}", repr(IAM))], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "pip install 'flowmart-notifications[msk]'" in done.stdout


# ---- rights


@pytest.mark.parametrize("role", Role)
def test_a_role_may_read_what_it_reads_and_write_what_it_writes_and_nothing_else(role: Role) -> None:
    own = {topic for step in steps_of(role) for topic in step.changelogs().values()}
    read = {topic for step in steps_of(role) for topic in step.reads} | {topic for topic, roles in FOLLOWERS.items() if role in roles}
    written = {topic for step in steps_of(role) for topic in step.writes} | {topics.DEAD}
    granted = {(right.operation, right.name) for right in rights_of(role, "x") if right.kind is Kind.TOPIC}
    assert {name for operation, name in granted if operation is Operation.READ} == {physical("x", topic) for topic in read | own}
    by_web = {
        topics.COMMANDS,
        topics.SIGNALS,
        topics.CONTROL,
        topics.RECEIPTS,
        *(topic for topic in map(topics.requests, ("critical", "normal", "bulk"))),
    }
    wanted = written | own | (by_web if role is Role.VIEWS else set())
    assert {name for operation, name in granted if operation is Operation.WRITE} == {physical("x", topic) for topic in wanted}
    assert {operation for operation, _ in granted} == {Operation.READ, Operation.WRITE}


def test_no_right_of_a_role_reaches_into_another_role_or_environment() -> None:
    for role in Role:
        for right in rights_of(role, "x"):
            if right.is_prefix:
                assert right.name.endswith(f"notify.x.{role}.")
    assert {right.name for right in rights_of_operator("x") if right.is_prefix} == {"notify.x."}
    names = {right.name for right in rights_of_operator("x") if right.kind is Kind.TOPIC and not right.is_prefix}
    assert names == {physical("x", topic) for topic in SHARED}


def test_the_rights_are_printed_as_options_of_kafka_acls() -> None:
    done = CliRunner().invoke(
        build(), ["topics", "acls", "--role", "router", "--commands", "--principal", "User:CN=router"], env={"NOTIFY_ENV": "x"}
    )
    assert done.exit_code == 0, done.output
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(rights_of(Role.ROUTER, "x"))
    assert all(line[:3] == ["--add", "--allow-principal", "User:CN=router"] for line in lines)
    assert ["--operation", "Write", "--topic", "notify.x.decisions"] in [line[3:] for line in lines]
    prefixed = ["--operation", "Write", "--transactional-id", "notify-notify.x.router.", "--resource-pattern-type", "prefixed"]
    assert prefixed in [line[3:] for line in lines]
    unknown = CliRunner().invoke(build(), ["topics", "acls", "--role", "nobody"], env={"NOTIFY_ENV": "x"})
    assert unknown.exit_code == 2
    assert "'nobody' is no role" in unknown.stderr


def test_a_right_says_itself_in_words() -> None:
    assert Right(kind=Kind.TOPIC, name="a", operation=Operation.READ).shown == "Read on topic a"
    assert Right(kind=Kind.TRANSACTIONAL_ID, name="a.", operation=Operation.WRITE, is_prefix=True).shown == "Write on transactional id a.*"
