"""Clusters as users have them: TLS, names, rights. Each role runs with its own user and the least rights; refusals are explained."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from aiohttp import BasicAuth, ClientSession, web
from aiokafka import AIOKafkaConsumer
from confluent_kafka import Producer
from faust.transport.drivers.aiokafka import credentials_to_aiokafka_auth

from schemas import topics
from schemas.ids import notification_id
from schemas.messages import DecisionRecord, StatusChange, UserAction
from streams.cli.doctor import Check, State, examine
from streams.embedded.processes import LOOPBACK, choose_port
from streams.embedded.stack import Stack
from streams.refusals import why_unreachable
from streams.rights import OPERATOR, Kind, Operation, Right, missing, refused_transactions, rights_of, rights_of_operator
from streams.roles import Role
from streams.security import KafkaSecurity, Mechanism, Protocol, Tls, msk_tokens
from streams.settings import CLIENT_NEEDS, Settings
from streams.topology import TOPOLOGY, Step
from streams.transport.cluster import Cluster
from streams.transport.credentials import credentials
from tests.deliveries import codec_of, let_mail_server
from tests.harness import System, system, wait_for
from tests.integration.test_guarantees import identity, mailing, of_run, payment
from tests.integration.test_inventory import an_adjustment, told
from tests.secure_kafka import ADMIN, ADMIN_PASSWORD, Loop, SecureBroker, secure_broker
from tests.token_app import unsigned

PASSWORD = "a-word-nobody-may-see"
TOKEN_SECONDS = 4


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureBroker]:
    with secure_broker(tmp_path_factory.mktemp("secure")) as made:
        yield made


@pytest.fixture(scope="module")
def running(stack: Stack, broker: SecureBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    variables = {
        "NOTIFY_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "NOTIFY_KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
        "NOTIFY_KAFKA_CA_FILE": str(broker.authority.file),
        "NOTIFY_RETRY_TIERS": "1,2,4",
        **named(OPERATOR),
    }
    folder = tmp_path_factory.mktemp("secured")
    with system(stack, folder, partitions=2, cluster=broker.cluster(ADMIN, ADMIN_PASSWORD), variables=variables) as made:
        for role in [*Role, OPERATOR]:
            broker.add_user(f"notify-{role}", PASSWORD)
            broker.grant(f"notify-{role}", rights_of_operator(made.name) if role == OPERATOR else rights_of(Role(role), made.name))
        for role in Role:
            made.start(role, **named(role))
        made.await_ready(seconds=180)
        yield made


def named(role: str) -> dict[str, Any]:
    return {"NOTIFY_KAFKA_USER": f"notify-{role}", "NOTIFY_KAFKA_PASSWORD": PASSWORD}


def ids_of(made: System, topic: str, found: str) -> list[DecisionRecord]:
    return of_run(made, topic, DecisionRecord, {found})


# ---- the whole system


def test_with_exactly_its_rights_every_role_does_its_part(running: System) -> None:
    """All steps have work but two: `parked`, for which the registry would have to go away, and `forward`, which needs subscribers."""
    others = {"closed": "refuse-550@example.com", "unsettled": "drop-stored@example.com"}
    running.load_preferences(
        {**row, "email": others.get(str(row["userId"]), row["email"])}
        for row in mailing(["secured", "recalled", "watching", "bouncing", "closed", "unsettled"])
    )
    critical_through_delay_and_recalled(running)

    assert running.ask("/users/watching/watches/p-1", user="watching", method="PUT")[0] == 202
    sent = running.notify("send", "--user", "unsettled", "--title", "Hello", "--message", "World")
    assert sent.returncode == 0, sent.stderr
    unsettled = sent.stdout.strip()
    paying = ["secured", "bouncing", "closed"]
    running.produce("payments", running.frame_payments([payment(1, user, run=user) for user in paying]))
    secured, bouncing, closed = (identity(user, 1, user) for user in paying)
    wait_for(lambda: running.mails()[f"{secured}-email"] == 1, seconds=40, what="the mail, through ingest, router and sender")
    wait_for(lambda: running.web(f"/notifications/{secured}")[0] == 200, seconds=30, what="the inbox, by views")
    assert running.web(f"/notifications/{secured}/read", method="POST")[0] in {202, 204}
    wait_for(lambda: running.web(f"/notifications/{secured}")[1]["status"] == "read", seconds=30, what="the read mark, by signals")

    wait_for(lambda: running.rows(topics.WATCHES), seconds=30, what="the watch, through the web and the router")
    events = [an_adjustment("gone", "p-1", 5, 0), an_adjustment("back", "p-1", 0, 3)]
    written = running.notify("produce", "inventory", "-", stdin="".join(json.dumps(event) + "\n" for event in events))
    assert written.returncode == 0, written.stderr
    back = told("back", "back_in_stock", "watching")
    wait_for(lambda: running.mails()[f"{back}-email"] == 1, seconds=30, what="the watcher's mail, through stock and the bulk lane")
    assert running.count(topics.OUT_OF_STOCK) == 1

    wait_for(lambda: has(running, closed, "failed"), seconds=30, what="a mailbox that does not exist")
    wait_for(lambda: has(running, bouncing, "sent"), seconds=30, what="a mail that will come back")
    wait_for(lambda: has(running, unsettled, "unknown"), seconds=30, what="an attempt of unknown end")
    reports = [report(unsettled, status="delivered"), report(bouncing, status="bounced", code="5.1.1", suppresses="hard_bounce")]
    loaded = running.notify("receipts", "load", "-", stdin="".join(json.dumps(each) + "\n" for each in reports))
    assert loaded.returncode == 0, loaded.stderr
    sender = running.workers["sender-normal-a"]
    wait_for(lambda: sender.metric("notify_settled_total", status="delivered") == 1, seconds=30, what="it settled, by signals")
    for user in ("closed", "bouncing"):  # one order of a sender, one of signals
        wait_for(partial(is_suppressed, running, user), seconds=30, what=f"{user} suppressed, by the router")
    row = "SELECT status FROM delivery WHERE delivery_id = $1"
    wait_for(lambda: running.query(row, f"{unsettled}-email") == [("delivered",)], seconds=30, what="its row in PostgreSQL, by store")

    assert running.count(topics.DEAD) == 0
    assert {name: worker.exits for name, worker in running.workers.items() if worker.exits} == {}
    assert {(step.role, step.name) for step in TOPOLOGY if not handled(running, step)} == {("ingest", "parked"), ("signals", "forward")}


def critical_through_delay_and_recalled(made: System) -> None:
    """Let the mail server refuse two password resets: one is tried again after a wait, the other is recalled meanwhile."""
    actions = [
        UserAction(
            action_id=f"reset-{user}",
            user_id=user,
            action="password_reset_requested",
            data={"code": "481 205", "expiresInMinutes": "15", "requestedFrom": "Firefox on Linux"},
            occurred_at=datetime.now(UTC),
        )
        for user in ("secured", "recalled")
    ]
    secured, recalled = (
        notification_id(producer="user-actions", event_id=each.action_id, rule="password_reset", user_id=each.user_id) for each in actions
    )
    codec = codec_of(made, topics.USER_ACTIONS)
    let_mail_server(made, mode="refuse", code=451)
    try:
        made.produce(topics.USER_ACTIONS, [(each.user_id.encode(), codec.encode(each)) for each in actions])
        for found in (secured, recalled):
            wait_for(partial(has, made, found, "retrying"), seconds=40, what="a refusal, by sender-critical")
        done = made.notify("recall", "--notification", recalled, "--reason", "a drill")
        assert done.returncode == 0, done.stderr
        wait_for(partial(has, made, recalled, "cancelled"), seconds=30, what="the recall obeyed, after a wait")
    finally:
        let_mail_server(made, mode="none")
    wait_for(lambda: made.mails()[f"{secured}-email"] == 1, seconds=40, what="the mail, at a later attempt")
    assert made.mails()[f"{recalled}-email"] == 0


def has(made: System, notification: str, status: str) -> bool:
    return any(change.status == status for change in of_run(made, topics.STATUS, StatusChange, {notification}))


def report(notification: str, **said: str) -> dict[str, str]:
    """Return what a provider says later of the mail of a notification."""
    return {"provider": "email", "reference": f"{notification}-email.0@flowmart.example", "at": datetime.now(UTC).isoformat(), **said}


def is_suppressed(made: System, user: str) -> bool:
    """Ask for another notification; say whether its mail was left out because the address is dead."""
    asked = made.ask("/notifications", {"userId": user, "rule": "message", "data": {"title": "Hello", "message": "World"}})[2]
    record: DecisionRecord = wait_for(lambda: ids_of(made, topics.DECISIONS, asked["notificationId"]), seconds=30, what="a decision")[0]
    return {choice.channel: choice.reason for choice in record.channels}["email"] == "suppressed: hard_bounce"


def handled(made: System, step: Step) -> float:
    """Return how many records a step worked on."""
    worker = made.workers[f"{step.role}-a"]
    return sum(worker.metric("notify_records_total", topic=topic) for topic in step.reads)


def test_no_role_has_a_right_that_the_list_does_not_give(running: System, broker: SecureBroker) -> None:
    """The users can do what the list says, and the worker of one role cannot do what another's may."""
    for role in Role:
        own = broker.cluster(f"notify-{role}", PASSWORD)
        assert missing(own, rights_of(role, running.name), running.name) == []
    views = broker.cluster("notify-views", PASSWORD)
    wanted = Right(kind=Kind.TOPIC, name=running.topic(topics.DECISIONS), operation=Operation.WRITE)
    assert missing(views, [wanted], running.name) == [wanted]
    assert refused_transactions(views, rights_of(Role.ROUTER, running.name)) != []


@pytest.mark.parametrize(
    ("role", "right"),
    [
        (Role.ROUTER, "Write on topic {ours}.decisions"),
        (Role.SENDER_NORMAL, "Read on topic {ours}.keys"),
        (Role.SIGNALS, "Read on group {ours}.signals"),
    ],
)
def test_a_worker_that_lacks_a_right_names_it_and_leaves(running: System, broker: SecureBroker, role: Role, right: str) -> None:
    shown = right.format(ours=f"notify.{running.name}")
    taken = next(each for each in rights_of(role, running.name) if each.shown == shown)
    broker.withdraw(f"notify-{role}", taken)
    try:
        worker = running.start(role, name="lacking", **named(role))
        said = f"Kafka does not grant {shown} to SASL_SSL with SCRAM-SHA-512 as notify-{role}"
        wait_for(lambda: said in worker.log_text(), seconds=60, what=f"{said}\n{worker.log_text()[-2000:]}")
        wait_for(lambda: worker.exits, seconds=20, what="its end")
        running.give_up(worker)
        assert worker.exits[0] == 75
        assert f"notify topics acls --role {role}" in worker.log_text()
        assert PASSWORD not in worker.log_text()
        rights = part(running, "rights", NOTIFY_ROLE=role, **named(role))
        assert rights.state is State.FAILED
        assert shown in str(rights.advice)
    finally:
        broker.grant(f"notify-{role}", [taken])


def test_a_missing_right_on_transactions_is_named(running: System, broker: SecureBroker) -> None:
    taken = next(each for each in rights_of(Role.SENDER_BULK, running.name) if each.kind is Kind.TRANSACTIONAL_ID)
    running.stop(running.workers["sender-bulk-a"])
    broker.withdraw("notify-sender-bulk", taken)
    try:
        worker = running.start("sender-bulk", **named("sender-bulk"))
        said = f"Kafka does not grant Write on transactional id notify-notify.{running.name}.sender-bulk."
        wait_for(lambda: said in worker.log_text(), seconds=60, what=f"{said}\n{worker.log_text()[-2000:]}")
        wait_for(lambda: worker.exits, seconds=20, what="its end")
        running.give_up(worker)
        assert worker.exits[0] == 75
        rights = part(running, "rights", NOTIFY_ROLE="sender-bulk", **named("sender-bulk"))
        assert taken.shown in str(rights.advice)
    finally:
        broker.grant("notify-sender-bulk", [taken])


# ---- what doctor says


def part(running: System, name: str, **variables: str) -> Check:
    """Return what doctor says about a part."""
    environment = {**running.variables, **variables}
    settings = Settings.from_env({key: value for key, value in environment.items() if value}, needs=CLIENT_NEEDS)
    return next(check for check in examine(settings, "http://127.0.0.1:1") if check.part == name)


def test_doctor_finds_nothing_missing_for_the_operator(running: System) -> None:
    assert part(running, "kafka").found == (f"1 broker at {running.cluster.bootstrap}, SASL_SSL with SCRAM-SHA-512 as notify-operator")
    assert part(running, "rights") == Check(part="rights", state=State.PASSED, found="all that the operator needs")
    assert part(running, "topics").state is State.PASSED


PLAIN: dict[str, Any] = dict.fromkeys(("NOTIFY_KAFKA_USER", "NOTIFY_KAFKA_PASSWORD", "NOTIFY_KAFKA_SASL_MECHANISM"), "")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"NOTIFY_KAFKA_PASSWORD": "wrong"}, "does not accept the user 'notify-operator' with this password"),
        (
            {"NOTIFY_KAFKA_SASL_MECHANISM": "PLAIN"},
            "NOTIFY_KAFKA_SASL_MECHANISM is PLAIN, but broker's supported mechanisms are SCRAM-SHA-512",
        ),
        ({"NOTIFY_KAFKA_CA_FILE": ""}, "is not trusted"),
        ({"NOTIFY_KAFKA_BOOTSTRAP": "localhost:{SCRAM}"}, "is for another name"),
        (
            {"NOTIFY_KAFKA_SECURITY_PROTOCOL": "PLAINTEXT", "NOTIFY_KAFKA_CA_FILE": "", **PLAIN},
            "speaks TLS, but NOTIFY_KAFKA_SECURITY_PROTOCOL is PLAINTEXT: set SSL",
        ),
        ({"NOTIFY_KAFKA_BOOTSTRAP": "127.0.0.1:{PLAIN}"}, "does not speak TLS, but NOTIFY_KAFKA_SECURITY_PROTOCOL is SASL_SSL"),
        ({"NOTIFY_KAFKA_SECURITY_PROTOCOL": "SSL", **PLAIN}, "this port may ask for a name (SASL)"),
        (
            {"NOTIFY_KAFKA_SECURITY_PROTOCOL": "SSL", "NOTIFY_KAFKA_BOOTSTRAP": "127.0.0.1:{MUTUAL}", **PLAIN},
            "set NOTIFY_KAFKA_CERTIFICATE_FILE",
        ),
        ({"NOTIFY_KAFKA_BOOTSTRAP": "127.0.0.1:{closed}"}, "Nothing listens at"),
        ({"NOTIFY_KAFKA_BOOTSTRAP": "kafka.invalid:9092"}, "kafka.invalid cannot be resolved"),
    ],
    ids=[
        "password",
        "mechanism",
        "authority",
        "host",
        "plaintext-to-tls",
        "tls-to-plaintext",
        "no-name",
        "no-certificate",
        "closed",
        "name",
    ],
)
def test_doctor_explains_each_refusal(running: System, broker: SecureBroker, variables: dict[str, str], said: str) -> None:
    ports = {**broker.heard, "closed": choose_port()}
    check = part(running, "kafka", **{name: value.format(**ports) for name, value in variables.items()})
    assert check.state is State.FAILED
    assert said in str(check.advice)
    assert PASSWORD not in str(check)


# ---- tokens, as Amazon MSK wants them


async def test_both_clients_authenticate_with_tokens(running: System, broker: SecureBroker) -> None:
    tokens = unsigned("notify-signals")
    security = KafkaSecurity(
        protocol=Protocol.SASL_SSL,
        mechanism=Mechanism.AWS_MSK_IAM,
        region="eu-west-1",
        tls=Tls(ca_file=broker.authority.file),
        tokens=tokens,
    )
    cluster = Cluster(bootstrap=f"{LOOPBACK}:{broker.heard['TOKENS']}", security=security)
    progress = running.topic("signals.engage.changelog")
    transactional_id = f"notify-{progress}-tokens"

    def write() -> None:
        producer = Producer(cluster.config(transactional_id=transactional_id))
        producer.init_transactions(20)
        producer.begin_transaction()
        producer.produce(running.topic(topics.STATUS), b"by token", b"token", 0)
        producer.commit_transaction(20)

    consumer = AIOKafkaConsumer(
        running.topic(topics.SIGNALS),
        bootstrap_servers=cluster.bootstrap,
        group_id=f"notify.{running.name}.signals.tokens",
        auto_offset_reset="earliest",
        **credentials_to_aiokafka_auth(credentials(security)),
    )
    broker.grant("notify-signals", [Right(kind=Kind.GROUP, name=f"notify.{running.name}.signals.tokens", operation=Operation.READ)])
    await asyncio.to_thread(running.produce, topics.SIGNALS, [(b"nobody", b"no signal")])
    await consumer.start()
    try:
        record = await asyncio.wait_for(consumer.getone(), 20)
        assert record.topic == running.topic(topics.SIGNALS)
    finally:
        await consumer.stop()
    await asyncio.to_thread(write)
    refused = replace(cluster, security=replace(security, tokens=lambda: ("not.a.token", time.time() + 100)))
    assert "does not accept our IAM identity" in await asyncio.to_thread(why_unreachable, refused)


def test_a_worker_does_its_work_with_tokens_beyond_the_end_of_each(running: System, broker: SecureBroker) -> None:
    """Faust's group member, readers, shards and admin clients, as one worker has them. The broker ends sessions with their tokens."""
    running.stop(running.workers["stock-a"])
    worker = running.start(
        "stock",
        module="tests.token_app",
        NOTIFY_KAFKA_BOOTSTRAP=f"{LOOPBACK}:{broker.heard['TOKENS']}",
        NOTIFY_KAFKA_SASL_MECHANISM="AWS_MSK_IAM",
        NOTIFY_KAFKA_REGION="eu-west-1",
        NOTIFY_KAFKA_USER="",
        NOTIFY_KAFKA_PASSWORD="",
        TOKEN_USER="notify-stock",
        TOKEN_SECONDS=str(TOKEN_SECONDS),
    )
    running.await_ready(worker)
    began, number = time.monotonic(), 0
    while time.monotonic() - began < 2 * TOKEN_SECONDS:
        written = running.count(topics.OUT_OF_STOCK)
        running.produce("inventory", running.frame_adjustments([an_adjustment(f"by-token-{number}", f"p-token-{number}", 5, 0)]))
        wait_for(lambda: running.count(topics.OUT_OF_STOCK) > written, seconds=40, what="its OutOfStock")  # noqa: B023 - called at once
        number += 1
    rows = {key.split(b"\0")[0].decode() for key in running.table("stock.level", "levels")}
    assert {f"p-token-{n}" for n in range(number)} <= rows, "its rows in the changelog"
    assert worker.exits == []


def test_the_signer_makes_a_token_for_msk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PASSWORD)
    tokens = msk_tokens("eu-west-1")
    token, expires = tokens()
    url = urlsplit(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode())
    asked = parse_qs(url.query)
    assert url.hostname == "kafka.eu-west-1.amazonaws.com"
    assert asked["Action"] == ["kafka-cluster:Connect"]
    assert asked["X-Amz-Credential"][0].startswith("AKIDEXAMPLE/")
    assert asked["X-Amz-Credential"][0].endswith("/eu-west-1/kafka-cluster/aws4_request")
    assert PASSWORD not in url.geturl()
    assert 600 < expires - time.time() <= 900
    assert tokens() == (token, expires), "kept until shortly before it expires"
    security = KafkaSecurity(protocol=Protocol.SASL_SSL, mechanism=Mechanism.AWS_MSK_IAM, region="eu-west-1")
    config = security.librdkafka()
    assert (config["security.protocol"], config["sasl.mechanism"], config["oauth_cb"]("")) == ("SASL_SSL", "OAUTHBEARER", (token, expires))
    member = credentials_to_aiokafka_auth(credentials(security))
    assert (member["security_protocol"], member["sasl_mechanism"]) == ("SASL_SSL", "OAUTHBEARER")
    assert asyncio.run(member["sasl_oauth_token_provider"].token()) == token


# ---- the registry


@pytest.fixture(scope="module")
def guarded_registry(stack: Stack, broker: SecureBroker) -> Iterator[str]:
    """Yield the URL of the session's registry behind TLS and a password, as companies have it."""
    tls = broker.authority.issue("registry", hosts=[LOOPBACK])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    assert tls.certificate_file is not None
    context.load_cert_chain(tls.certificate_file, tls.key_file)

    async def forward(request: web.Request) -> web.StreamResponse:
        try:
            who = BasicAuth.decode(request.headers.get("Authorization", ""))
        except ValueError:
            return web.Response(status=401)
        if who.password != PASSWORD:
            return web.Response(status=401)
        if who.login == "stranger":
            return web.Response(status=403)
        kind = {"Content-Type": request.headers.get("Content-Type", "application/json")}
        async with ClientSession() as session:
            answer = await session.request(request.method, f"{stack.registry}{request.path_qs}", data=await request.read(), headers=kind)
            return web.Response(status=answer.status, body=await answer.read(), content_type=answer.content_type)

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", forward)
    runner, port, loop = web.AppRunner(application), choose_port(), Loop()

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, LOOPBACK, port, ssl_context=context).start()

    loop.run(start())
    try:
        yield f"https://{LOOPBACK}:{port}"
    finally:
        loop.run(runner.cleanup())
        loop.close()


def test_a_worker_with_a_certificate_runs_where_one_is_required_and_with_a_registry_that_asks_for_a_password(
    running: System, broker: SecureBroker, guarded_registry: str
) -> None:
    running.stop(running.workers["ingest-a"])
    shown = broker.authority.issue("notify-ingest", password="opens-the-key")
    worker = running.start(
        "ingest",
        NOTIFY_KAFKA_BOOTSTRAP=f"{LOOPBACK}:{broker.heard['MUTUAL']}",
        NOTIFY_KAFKA_SECURITY_PROTOCOL="SSL",
        NOTIFY_KAFKA_CERTIFICATE_FILE=str(shown.certificate_file),
        NOTIFY_KAFKA_KEY_FILE=str(shown.key_file),
        NOTIFY_KAFKA_KEY_PASSWORD="opens-the-key",
        **PLAIN,
        **registry_variables(broker, guarded_registry),
    )
    running.await_ready(worker)
    running.produce("payments", running.frame_payments([payment(1, "mutual", run="mutual", status="pending")]))
    found = identity("mutual", 1, "mutual", "pending")
    wait_for(lambda: ids_of(running, "decisions", found), seconds=40, what="its decision")
    assert worker.exits == []
    assert "opens-the-key" not in worker.log_text()
    assert PASSWORD not in worker.log_text()


def registry_variables(broker: SecureBroker, url: str) -> dict[str, Any]:
    return {
        "NOTIFY_REGISTRY_URL": url,
        "NOTIFY_REGISTRY_USER": "notify",
        "NOTIFY_REGISTRY_PASSWORD": PASSWORD,
        "NOTIFY_REGISTRY_CA_FILE": str(broker.authority.file),
    }


def test_doctor_explains_what_the_registry_refuses(running: System, broker: SecureBroker, guarded_registry: str) -> None:
    variables = registry_variables(broker, guarded_registry)
    assert part(running, "registry", **variables).state is State.PASSED
    assert part(running, "schemas", **variables).state is State.PASSED
    wrong = {**variables, "NOTIFY_REGISTRY_PASSWORD": "wrong"}
    assert "does not accept the name 'notify' (401)" in str(part(running, "registry", **wrong).advice)
    stranger = {**variables, "NOTIFY_REGISTRY_USER": "stranger"}
    assert "does not allow this to the name 'stranger' (403)" in str(part(running, "registry", **stranger).advice)
    untrusted = {**variables, "NOTIFY_REGISTRY_CA_FILE": ""}
    assert "certificate is refused" in str(part(running, "registry", **untrusted).advice)
    plain = {**variables, "NOTIFY_REGISTRY_CA_FILE": "", "NOTIFY_REGISTRY_URL": guarded_registry.replace("https", "http")}
    assert part(running, "registry", **plain).state is State.FAILED
