"""The embedded stack is real: real broker, real registry, real SMTP, real kill -9."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import smtplib
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from email.message import EmailMessage
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from uuid import uuid4

import asyncpg
import psutil
import pytest
from confluent_kafka import Consumer, KafkaException, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from streams.embedded.artifacts import Artifact, ArtifactError, WrongHashError, download
from streams.embedded.processes import (
    DataDirInUseError,
    PortInUseError,
    ServerFailedError,
    choose_port,
    describe_port_owner,
)
from streams.embedded.stack import Ports, Stack, start_stack

DEADLINE_SECONDS = 60
STOP_LIMIT_SECONDS = 8
ROOT = Path(__file__).parents[2]


# --- Kafka


def test_a_record_is_produced_and_consumed(stack: Stack) -> None:
    topic = create_topic(stack)
    produce(stack, topic, [b"one", b"two"])
    assert consume(stack, topic, 2) == [b"one", b"two"]


def test_only_committed_transactions_are_read(stack: Stack) -> None:
    topic = create_topic(stack)
    producer = Producer({"bootstrap.servers": stack.kafka, "transactional.id": topic})
    producer.init_transactions(DEADLINE_SECONDS)
    for value, finish in ((b"aborted", producer.abort_transaction), (b"committed", producer.commit_transaction)):
        producer.begin_transaction()
        producer.produce(topic, value, key=b"key")
        producer.flush(DEADLINE_SECONDS)
        finish(DEADLINE_SECONDS)
    assert consume(stack, topic, 1) == [b"committed"]


def test_a_misspelled_topic_is_not_created(stack: Stack) -> None:
    producer = Producer({"bootstrap.servers": stack.kafka, "topic.metadata.propagation.max.ms": 100})
    with pytest.raises(KafkaException, match=r"UNKNOWN_TOPIC"):
        produce_with(producer, f"misspelled-{uuid4()}", [b""])


async def test_a_killed_broker_comes_back_on_its_port_with_its_data(stack: Stack) -> None:
    topic = create_topic(stack)
    produce(stack, topic, [b"before"])
    address, pid = stack.kafka, stack.broker.pid
    await stack.broker.kill()
    assert stack.broker.exit_code == -signal.SIGKILL
    await stack.broker.start()
    assert (stack.kafka, stack.broker.is_running) == (address, True)
    assert stack.broker.pid != pid
    produce(stack, topic, [b"after"])
    assert consume(stack, topic, 2) == [b"before", b"after"]


# --- the registry


def test_the_registry_registers_and_is_backward(stack: Stack) -> None:
    subject = f"{uuid4()}-value"
    status, body = call(f"{stack.registry}/subjects/{subject}/versions", {"schema": json.dumps(record("a"))})
    assert (status, body["id"] > 0) == (200, True)
    assert call(f"{stack.registry}/schemas/ids/{body['id']}")[0] == 200
    assert call(f"{stack.registry}/config")[1]["compatibilityLevel"] == "BACKWARD"
    status, _ = call(f"{stack.registry}/subjects/{subject}/versions", {"schema": json.dumps(record("a", "new"))})
    assert status == 409


async def test_a_killed_registry_keeps_its_schemas(stack: Stack) -> None:
    assert stack.registry_process
    subject = f"{uuid4()}-value"
    _, body = call(f"{stack.registry}/subjects/{subject}/versions", {"schema": json.dumps(record("a"))})
    await stack.registry_process.kill()
    await stack.registry_process.start()
    assert call(f"{stack.registry}/subjects/{subject}/versions/latest")[1]["id"] == body["id"]


# --- PostgreSQL


async def test_a_killed_database_comes_back_at_once_with_its_data(stack: Stack) -> None:
    server = stack.postgres_process
    assert server is not None
    url = server.make_database(f"embedded-{uuid4()}")
    assert await ask_database(url, "CREATE TABLE kept AS SELECT 7 AS number") is None
    await server.kill()
    with pytest.raises(ConnectionRefusedError):
        await ask_database(url, "SELECT 1")
    await server.start()
    assert await ask_database(url, "SELECT number FROM kept") == 7
    # whoever else kills it leaves its children to be waited for
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    async with asyncio.timeout(DEADLINE_SECONDS):
        while server.is_running:  # noqa: ASYNC110 - a process sets no event
            await asyncio.sleep(0.01)
    await server.start()
    assert await ask_database(url, "SELECT number FROM kept") == 7


async def test_the_database_runs_as_nobody_asks_for_its_password_and_opens_no_folder(stack: Stack) -> None:
    server = stack.postgres_process
    assert server is not None
    if os.geteuid() == 0:
        assert psutil.Process(server.pid).username() == "nobody"
    assert stack.data_dir.stat().st_mode & 0o077 == 0
    password = urlsplit(stack.postgres).password
    assert password
    with pytest.raises(asyncpg.InvalidPasswordError):
        await ask_database(stack.postgres.replace(password, "guess"), "SELECT 1")


async def ask_database(url: str, query: str) -> Any:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


# --- mail


def test_a_message_sent_over_smtp_is_readable(stack: Stack) -> None:
    to = an_address("mia")
    send(stack, to, subject="Schöne Grüße <b>", text="Hello", html="<p>Hello</p>")
    [message] = messages(stack, to)
    assert (message["to"], message["subject"], message["text"]) == ([to], "Schöne Grüße <b>", "Hello\n")
    assert message["html"] == "<p>Hello</p>\n"
    assert message["headers"]["X-Notify-Delivery"] == to
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", message["receivedAt"])
    assert call(f"{stack.mail_http}/api/messages/{message['id']}")[1] == message


def test_messages_are_newest_first_in_pages(stack: Stack) -> None:
    to = an_address("pages")
    for number in range(3):
        send(stack, to, subject=str(number))
    assert [each["subject"] for each in messages(stack, to)] == ["2", "1", "0"]
    url = f"{stack.mail_http}/api/messages?to={quote(to)}&limit=1&offset=1"
    with urllib.request.urlopen(url) as response:  # our own server
        assert response.headers["X-Total-Count"] == "3"
        assert [each["subject"] for each in json.load(response)] == ["1"]
    assert call(f"{stack.mail_http}/api/messages?limit=0")[0] == 400


def test_an_address_beyond_ascii_is_accepted(stack: Stack) -> None:
    to = an_address("andré")
    send(stack, to, subject="Grüße")
    assert messages(stack, to)[0]["to"] == [to]


@pytest.mark.parametrize("code", [550, 452, 451, 554])
def test_a_recipient_refuses_with_the_code_it_names(stack: Stack, code: int) -> None:
    to = an_address(f"refuse-{code}")
    with pytest.raises(smtplib.SMTPRecipientsRefused) as refused:
        send(stack, to)
    assert refused.value.recipients[to][0] == code
    assert messages(stack, to) == []


def test_a_slow_recipient_is_stored_before_the_reply_comes(stack: Stack) -> None:
    to = an_address("slow-400")
    began = time.monotonic()
    send(stack, to)
    assert time.monotonic() - began >= 0.4
    assert len(messages(stack, to)) == 1


@pytest.mark.parametrize(("local_part", "stored"), [("drop", 0), ("drop-stored", 1)])
def test_a_dropping_recipient_gives_no_reply(stack: Stack, local_part: str, stored: int) -> None:
    to = an_address(local_part)
    with pytest.raises(smtplib.SMTPServerDisconnected):
        send(stack, to)
    assert len(messages(stack, to)) == stored


def test_duplicates_are_counted_by_header(stack: Stack) -> None:
    delivery = str(uuid4())
    for _ in range(2):
        send(stack, an_address("twice"), delivery=delivery)
    assert call(f"{stack.mail_http}/api/counts?header=x-notify-delivery")[1][delivery] == 2
    assert call(f"{stack.mail_http}/api/counts?header=a'b")[0] == 400


@pytest.fixture
def faults(stack: Stack) -> Iterator[Callable[..., None]]:
    def set_faults(**values: object) -> None:
        assert call(f"{stack.mail_http}/api/faults", values)[0] == 200

    yield set_faults
    set_faults(mode="none")


@pytest.mark.parametrize("code", [421, 451])
def test_the_whole_server_can_refuse(stack: Stack, faults: Callable[..., None], code: int) -> None:
    faults(mode="refuse", code=code)
    with pytest.raises(smtplib.SMTPSenderRefused) as refused:
        send(stack, an_address("refused"))
    assert refused.value.smtp_code == code
    faults(mode="none")
    send(stack, an_address("accepted"))


def test_the_whole_server_can_be_unreachable(stack: Stack, faults: Callable[..., None]) -> None:
    with smtp(stack) as open_before:
        faults(mode="unreachable")
        with pytest.raises(OSError):  # noqa: PT011  # reset or closed, as the kernel likes
            smtp(stack)
        with pytest.raises(smtplib.SMTPServerDisconnected):
            open_before.noop()


def test_a_fault_that_makes_no_sense_is_refused(stack: Stack) -> None:
    for body in ({"mode": "odd"}, {"mode": "refuse", "code": 250}, {"mode": "refuse", "code": "x"}, [1]):
        assert call(f"{stack.mail_http}/api/faults", body)[0] == 400


def test_the_inbox_page_is_for_this_machine_only(stack: Stack) -> None:
    with urllib.request.urlopen(stack.mail_http) as response:
        page, policy = response.read().decode(), response.headers["Content-Security-Policy"]
    nonce = re.search(r"script-src 'nonce-([^']+)'", policy)
    assert nonce
    assert f'<script nonce="{nonce[1]}">' in page
    assert "default-src 'none'" in policy
    assert re.findall(r"""(?:src|href)=["']?https?://""", page) == []
    foreign = urllib.request.Request(stack.mail_http, headers={"Host": "inbox.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(foreign)


async def test_a_killed_mail_server_keeps_what_it_acknowledged(stack: Stack) -> None:
    assert stack.mail_process
    to = an_address("kept")
    send(stack, to)
    await stack.mail_process.kill()
    await stack.mail_process.start()
    assert len(messages(stack, to)) == 1


def test_no_address_reaches_the_log(stack: Stack) -> None:
    assert stack.mail_process
    send(stack, an_address("planted"), subject="planted")
    assert "planted" not in stack.mail_process.log_path.read_text()


# --- the stack


def test_everything_listens_on_loopback_only(stack: Stack) -> None:
    for server in stack.servers:
        listening = [each for each in psutil.Process(server.pid).net_connections("tcp") if each.status == "LISTEN"]
        assert listening
        assert {each.laddr.ip.removeprefix("::ffff:") for each in listening} == {"127.0.0.1"}


async def test_stop_leaves_no_process_and_a_second_start_resumes(tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []
    first = await start_stack(tmp_path, ports=Ports.free(), progress=lambda *words: told.append(words), warm_up=False, has_short_life=True)
    try:
        pids = [server.pid for server in first.servers]
        topic = create_topic(first)
        produce(first, topic, [b"kept"])
        send(first, "kept@example.com")
        call(f"{first.registry}/subjects/kept/versions", {"schema": json.dumps(record("a"))})
    finally:
        began = time.monotonic()
        await first.stop()
    assert time.monotonic() - began < STOP_LIMIT_SECONDS
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []
    assert {name for name, message in told if message.startswith("ready in ")} == {"kafka", "registry", "postgres", "mail"}

    async with await start_stack(tmp_path, ports=Ports.free(), warm_up=False, has_short_life=True) as second:
        assert second.ports == first.ports
        assert consume(second, topic, 1) == [b"kept"]
        assert len(messages(second, "kept@example.com")) == 1
        assert call(f"{second.registry}/subjects")[1] == ["kept"]


async def test_a_data_folder_in_use_is_named_with_its_process(stack: Stack) -> None:
    with pytest.raises(DataDirInUseError, match=rf"pid {os.getpid()} \(") as caught:
        await start_stack(stack.data_dir, ports=Ports.free())
    assert str(stack.data_dir) in str(caught.value)


async def test_a_port_in_use_is_named_with_its_process(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", choose_port())) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=rf"port {port} is in use by pid {os.getpid()} \(.*the schema registry"):
            await start_stack(tmp_path, ports=Ports(kafka=0, controller=0, registry=port, smtp=0, http=0, postgres=0))
        assert str(os.getpid()) in (describe_port_owner(port) or "")
    assert describe_port_owner(port) is None


async def test_a_server_that_cannot_start_shows_why_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "kafka" / "data").mkdir(parents=True)
    (tmp_path / "kafka" / "data" / "meta.properties").write_text("version=1\nnode.id=7\ncluster.id=another\n")
    with pytest.raises(ServerFailedError, match=r"(?s)kafka .*kafka\.log.*node\.?\s?id") as caught:
        await start_stack(tmp_path, ports=Ports.free(), registry=False, warm_up=False, has_short_life=True)
    assert caught.value.log_tail
    children = psutil.Process().children(recursive=True)
    assert [child for child in children if child.cwd().startswith(str(tmp_path))] == []


async def test_children_die_with_a_killed_parent_and_the_next_start_takes_over(tmp_path: Path) -> None:
    program = f"""
import asyncio, pathlib
from streams.embedded.stack import Ports, start_stack

async def main():
    stack = await start_stack(pathlib.Path({str(tmp_path)!r}), ports=Ports.free(), registry=False, warm_up=False, has_short_life=True)
    print(*(server.pid for server in stack.servers), flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
    try:
        assert parent.stdout
        pids = [int(word) for word in (await asyncio.to_thread(parent.stdout.readline)).split()]
        assert len(pids) == 3
    finally:
        parent.kill()
        parent.wait()
    async with await start_stack(tmp_path, ports=Ports.free(), registry=False, warm_up=False, has_short_life=True):
        assert [pid for pid in pids if is_alive(pid)] == []


async def test_children_die_without_anyone_starting_again(tmp_path: Path) -> None:
    program = f"""
import asyncio, pathlib, sys
from streams.embedded.processes import Launch, ManagedProcess

folder = pathlib.Path({str(tmp_path)!r})
launch = Launch(argv=["/bin/sleep", "3600"], cwd=folder)
print(ManagedProcess(launch, log_path=folder / "log", pid_path=folder / "pid").pid, flush=True)
sys.stdin.read()
"""
    parent = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    pid = int(await asyncio.to_thread(parent.stdout.readline))
    await until(lambda: psutil.Process(pid).cmdline()[:1] == ["/bin/sleep"])
    assert os.getsid(pid) == pid  # Ctrl-C goes to the terminal's own group
    parent.kill()
    parent.communicate()
    await until(lambda: not is_alive(pid))


# --- downloads


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "maven" / "org" / "example" / "tool" / "1").mkdir(parents=True)
    (tmp_path / "maven" / "org" / "example" / "tool" / "1" / "tool-1.jar").write_bytes(b"content")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SilentHandler, directory=str(tmp_path / "maven")))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


class SilentHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


def test_a_download_is_checked_and_kept(tmp_path: Path, repository: str) -> None:
    told: list[str] = []
    [path] = fetch(tmp_path / "downloads", repository, hashlib.sha256(b"content").hexdigest(), told)
    assert (path.name, path.read_bytes()) == ("tool-1.jar", b"content")
    assert told
    assert fetch(tmp_path / "downloads", "http://127.0.0.1:9", hashlib.sha256(b"content").hexdigest()) == [path]


def test_a_wrong_hash_names_the_file_and_what_to_do(tmp_path: Path, repository: str) -> None:
    with pytest.raises(WrongHashError, match=r"tool-1\.jar .*Start again"):
        fetch(tmp_path / "downloads", repository, "0" * 64)
    assert list((tmp_path / "downloads").iterdir()) == []


def test_a_download_that_fails_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot download tool-1\.jar"):
        fetch(tmp_path / "downloads", "http://127.0.0.1:9", "0" * 64)


# --- helpers


def fetch(downloads: Path, repository: str, sha256: str, told: list[str] | None = None) -> list[Path]:
    artifact = Artifact(sha256=sha256, size_bytes=7, coordinate="org.example:tool:1:jar")
    progress = (told if told is not None else []).append
    return download([artifact], downloads, repository=repository, progress=progress, cancelled=threading.Event())


def is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def until(is_true: Callable[[], bool]) -> None:
    async def poll() -> None:
        while not is_true():  # noqa: ASYNC110
            await asyncio.sleep(0.02)

    await within(poll())


async def within(waiting: Awaitable[None]) -> None:
    await asyncio.wait_for(waiting, DEADLINE_SECONDS)


def create_topic(stack: Stack) -> str:
    topic = f"test-{uuid4()}"
    client = AdminClient({"bootstrap.servers": stack.kafka})
    client.create_topics([NewTopic(topic, 1, 1)])[topic].result(DEADLINE_SECONDS)
    return topic


def produce(stack: Stack, topic: str, values: list[bytes]) -> None:
    produce_with(Producer({"bootstrap.servers": stack.kafka, "acks": "all"}), topic, values)


def produce_with(producer: Producer, topic: str, values: list[bytes]) -> None:
    for value in values:
        producer.produce(topic, value, key=b"key", on_delivery=raise_error)
    assert producer.flush(DEADLINE_SECONDS) == 0


def raise_error(error: object, _message: object) -> None:
    if error:
        raise KafkaException(error)


def consume(stack: Stack, topic: str, count: int) -> list[bytes]:
    consumer = Consumer(
        {
            "bootstrap.servers": stack.kafka,
            "group.id": str(uuid4()),
            "auto.offset.reset": "earliest",
            "isolation.level": "read_committed",
        }
    )
    consumer.subscribe([topic])
    values: list[bytes] = []
    deadline = time.monotonic() + DEADLINE_SECONDS
    try:
        while len(values) < count and time.monotonic() < deadline:
            message = consumer.poll(0.2)
            if message is not None and message.error() is None:
                values.append(message.value() or b"")
    finally:
        consumer.close()
    return values


def record(*names: str) -> dict[str, Any]:
    return {"type": "record", "name": "Test", "fields": [{"name": name, "type": "string"} for name in names]}


def call(url: str, body: object = None) -> tuple[int, Any]:
    request = urllib.request.Request(url)
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE_SECONDS) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def an_address(local_part: str) -> str:
    return f"{local_part}+{uuid4().hex}@example.com"


def smtp(stack: Stack) -> smtplib.SMTP:
    address = urlsplit(stack.mail_smtp)
    return smtplib.SMTP(address.hostname or "", address.port or 0, timeout=DEADLINE_SECONDS)


def send(stack: Stack, to: str, *, subject: str = "Hello", text: str = "Hello", html: str = "", delivery: str = "") -> None:
    message = EmailMessage()
    message["From"] = "notify@example.com"
    message["To"] = to
    message["Subject"] = subject
    message["X-Notify-Delivery"] = delivery or to
    message.set_content(text)
    if html:
        message.add_alternative(html, subtype="html")
    with smtp(stack) as client:
        client.send_message(message)


def messages(stack: Stack, to: str) -> list[dict[str, Any]]:
    status, found = call(f"{stack.mail_http}/api/messages?to={quote(to)}")
    assert status == 200
    return list(found)
