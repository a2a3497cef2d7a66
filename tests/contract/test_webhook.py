"""Telling a subscriber over real HTTP: what it verifies, and what each of its answers means."""

from __future__ import annotations

import asyncio
import base64
import signal
import socket
import ssl
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from standardwebhooks import Webhook

from channels.base import Receipt
from channels.simulators.http2 import Fault, HttpServer, Reply, Request
from channels.simulators.webhook import WebhookSimulator
from channels.subscriptions import Subscription, is_public, parse_subscriptions
from channels.webhook import PublicResolver, WebhookChannel
from schemas.errors import (
    NotifyError,
    ProviderRefusedError,
    ProviderRejectedError,
    ProviderThrottledError,
    ProviderUnavailableError,
    SendUnknownError,
    SettingsError,
)
from schemas.messages import Content, Delivery, StatusChange
from schemas.status import Status, Suppression
from tests.deliveries import a_delivery

SECRET, OLD = ("whsec_" + base64.b64encode(letter * 32).decode() for letter in (b"s", b"o"))
TEXT = '{"type":"delivery.delivered"}'
DELIVERY: Delivery = replace(a_delivery("u", "e"), channel="webhook", delivery_id="0b-webhook-1", route="orders")
CONTENT = Content(address="https://orders.example/", text=TEXT)


def subscription(url: str, *, secret: str = f"{SECRET} {OLD}") -> Subscription:
    text = f"[webhooks.orders]\nurl = {url!r}\nsecret = '$SECRETS'\nallow_private = true\n"
    (found,) = parse_subscriptions(text, {"SECRETS": secret})
    return found


@asynccontextmanager
async def opened(url: str, *, secret: str = f"{SECRET} {OLD}", total_seconds: float = 5.0) -> AsyncIterator[WebhookChannel]:
    channel = WebhookChannel(subscription(url, secret=secret), total_seconds=total_seconds)
    await channel.open()
    try:
        yield channel
    finally:
        await channel.close()


@pytest.fixture
async def subscriber() -> AsyncIterator[WebhookSimulator]:
    async with WebhookSimulator() as running:
        yield running


@pytest.fixture
async def channel(subscriber: WebhookSimulator) -> AsyncIterator[WebhookChannel]:
    async with opened(subscriber.url, secret=subscriber.secret) as channel:
        yield channel


@asynccontextmanager
async def answering(answer: Reply | Fault, calls: list[Request] | None = None) -> AsyncIterator[str]:
    """Answer every call so; yield the URL."""

    def note(request: Request) -> tuple[float, Reply | Fault]:
        if calls is not None:
            calls.append(request)
        return 0.0, answer

    server = HttpServer(note)
    await server.start(None)
    try:
        yield f"http://127.0.0.1:{server.port}/hooks/orders?tenant=7"
    finally:
        await server.stop()


async def test_a_subscriber_verifies_what_it_is_told_with_either_of_two_secrets() -> None:
    calls: list[Request] = []
    async with answering(Reply(status=204), calls) as url, opened(url) as channel:
        for _ in range(2):
            assert await channel.send(DELIVERY, CONTENT) == Receipt(provider="orders", status=Status.SENT, code="204")
    assert [each.headers["webhook-id"] for each in calls] == ["0b-webhook-1"] * 2, "the same id at each attempt"
    for each in calls:
        assert (each.method, each.path) == ("POST", "/hooks/orders?tenant=7")
        for secret in (SECRET, OLD):
            # with the standard's own library: ours has both ends of the simulator
            assert Webhook(secret).verify(each.body, dict(each.headers)) == {"type": "delivery.delivered"}


async def test_a_simulated_subscriber_knows_what_is_repeated_and_what_forged(subscriber: WebhookSimulator, channel: WebhookChannel) -> None:
    for delivery in (DELIVERY, DELIVERY, replace(DELIVERY, delivery_id="0b-webhook-2")):
        await channel.send(delivery, CONTENT)
    assert [each.key for each in subscriber.messages] == list(subscriber.ids) == ["0b-webhook-1", "0b-webhook-1", "0b-webhook-2"]
    assert {key: each.body["type"] for key, each in subscriber.told.items()} == dict.fromkeys(subscriber.ids, "delivery.delivered")
    async with opened(subscriber.url, secret=OLD) as stranger:
        with pytest.raises(ProviderRefusedError) as caught:
            await stranger.send(DELIVERY, CONTENT)
    assert (caught.value.code, subscriber.forged, len(subscriber.messages)) == ("401", 1, 3)


@pytest.mark.parametrize(
    ("answer", "headers", "kind", "wait"),
    [
        (500, {}, ProviderRefusedError, None),
        (400, {}, ProviderRefusedError, None),
        (401, {}, ProviderRefusedError, None),
        (403, {}, ProviderRefusedError, None),
        (404, {}, ProviderRefusedError, None),
        (302, {"location": "http://127.0.0.1:1/"}, ProviderRefusedError, None),
        (502, {}, ProviderRefusedError, None),
        (503, {}, ProviderRefusedError, None),
        (504, {}, ProviderRefusedError, None),
        (503, {"retry-after": "7"}, ProviderThrottledError, 7.0),
        (429, {"retry-after": "3"}, ProviderThrottledError, 3.0),
        (429, {"retry-after": "soon"}, ProviderThrottledError, None),
        (410, {}, ProviderRejectedError, None),
    ],
)
async def test_each_answer_means_what_the_contract_says(
    answer: int, headers: Mapping[str, str], kind: type[NotifyError], wait: float | None
) -> None:
    async with answering(Reply(status=answer, headers=headers)) as url, opened(url) as channel:
        with pytest.raises(kind) as caught:
            await channel.send(DELIVERY, CONTENT)
    error = caught.value
    assert getattr(error, "code", None) == str(answer)
    assert getattr(error, "retry_after_seconds", None) == wait
    assert getattr(error, "suppresses", None) == (Suppression.GONE if answer == 410 else None)
    assert "127.0.0.1" not in str(error)


async def test_retry_after_may_be_a_moment() -> None:
    moment = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    async with answering(Reply(status=429, headers={"retry-after": moment})) as url, opened(url) as channel:
        with pytest.raises(ProviderThrottledError) as caught:
            await channel.send(DELIVERY, CONTENT)
    assert 50 < (caught.value.retry_after_seconds or 0) <= 60


@pytest.mark.parametrize(("answer", "code"), [(Fault.RESET, "connection"), (Fault.SILENCE, "timeout"), (Fault.NONSENSE, "protocol")])
async def test_what_left_and_was_not_answered_is_unknown(answer: Fault, code: str) -> None:
    async with answering(answer) as url, opened(url, total_seconds=0.5) as channel:
        with pytest.raises(SendUnknownError) as caught:
            await channel.send(DELIVERY, CONTENT)
    assert caught.value.code == code


@pytest.mark.parametrize("status", [200, 410])
@pytest.mark.parametrize(
    ("length", "is_cut"),
    [(100, True), (100, False), (10_000_000, True)],
    ids=["broken off", "no end in time", "longer than anybody reads"],
)
async def test_a_subscriber_has_answered_when_its_status_came_whatever_becomes_of_the_body(status: int, length: int, is_cut: bool) -> None:
    done = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 %d So\r\ncontent-length: %d\r\n\r\n" % (status, length) + b"." * (length // 2))
        with suppress(ConnectionError):  # of the long one the channel reads a part
            await writer.drain()
        if not is_cut:
            await done.wait()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, opened(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", total_seconds=0.5) as channel:
        if status == 200:
            assert (await channel.send(DELIVERY, CONTENT)).code == "200"
        else:
            with pytest.raises(ProviderRejectedError):
                await channel.send(DELIVERY, CONTENT)
        done.set()


async def test_nobody_there_and_a_tls_failure_are_outages_of_this_subscriber(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        async with opened(f"http://127.0.0.1:{probe.getsockname()[1]}/") as channel:
            with pytest.raises(ProviderUnavailableError) as caught:
                await channel.send(DELIVERY, CONTENT)
            assert caught.value.code == "connect"
    async with WebhookSimulator(is_secure=True, folder=tmp_path) as subscriber:
        async with opened(subscriber.url, secret=subscriber.secret) as channel:
            with pytest.raises(ProviderUnavailableError) as caught:
                await channel.send(DELIVERY, CONTENT)
            assert caught.value.code == "tls", "nobody whom we trust vouches for it"
        assert not subscriber.calls
        trusting = WebhookChannel(
            subscription(subscriber.url, secret=subscriber.secret), tls_context=ssl.create_default_context(cafile=tmp_path / "ca.pem")
        )
        await trusting.open()
        assert (await trusting.send(DELIVERY, CONTENT)).status is Status.SENT
        await trusting.close()


async def test_a_name_that_leads_inside_is_never_called_without_leave(subscriber: WebhookSimulator) -> None:
    allowed = subscription(subscriber.url)
    inside = WebhookChannel(replace(allowed, url=f"http://localhost:{subscriber.port}/hooks/x", allow_private=False), total_seconds=2.0)
    await inside.open()
    with pytest.raises(ProviderUnavailableError) as caught:
        await inside.send(DELIVERY, CONTENT)
    await inside.close()
    assert caught.value.code == "connect"
    assert not subscriber.calls
    with pytest.raises(OSError, match="no address of the internet"):
        await PublicResolver().resolve("localhost", 80)


async def test_the_command_runs_a_subscriber_and_says_how_to_subscribe_it(tmp_path: Path) -> None:
    running = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "from streams.cli import main; main()", "simulate", "webhook", "--port", "0", "--folder", str(tmp_path),
        stdout=PIPE, stderr=PIPE,
    )  # fmt: skip
    assert running.stdout is not None
    url = (await asyncio.wait_for(running.stdout.readline(), 60)).decode().strip()
    (found,) = parse_subscriptions((tmp_path / "webhooks.toml").read_text("utf-8"), {})
    assert found.url == url
    channel = WebhookChannel(found)
    await channel.open()
    for _ in range(2):
        await channel.send(DELIVERY, CONTENT)
    await channel.close()
    running.send_signal(signal.SIGINT)
    _, said = await asyncio.wait_for(running.communicate(), 60)
    assert running.returncode == 0, said
    assert f"NOTIFY_WEBHOOKS_FILE={tmp_path}/webhooks.toml" in said.decode()
    assert "2 calls, 2 messages accepted" in said.decode()


def test_only_addresses_of_the_internet_are_public() -> None:
    inside = (
        "127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255",
        "::1", "::", "fe80::1%eth0", "fc00::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "ff02::1", "localhost", "",
    )  # fmt: skip
    assert [each for each in inside if is_public(each)] == []
    assert all(is_public(each) for each in ("8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808"))


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("", "has no url"),
        ("url = 'http://orders.example/'\nsecret = '$S'", "is not https"),
        ("url = 'http://127.0.0.1/'\nsecret = '$S'", "is not https"),
        ("url = 'https://127.0.0.1/'\nsecret = '$S'", "not of the internet"),
        ("url = 'https://localhost/'\nsecret = '$S'", "not of the internet"),
        ("url = 'https://169.254.169.254/latest'\nsecret = '$S'", "not of the internet"),
        ("url = 'https://[::ffff:10.0.0.1]/'\nsecret = '$S'", "not of the internet"),
        ("url = 'http://10.0.0.1/'\nsecret = '$S'\nallow_private = true", "is not https"),
        ("url = 'https://user:word@orders.example/'\nsecret = '$S'", "without name or password"),
        ("url = 'ftp://orders.example/'\nsecret = '$S'", "is not an https URL"),
        ("url = 'https://orders.example/'", "has no secret"),
        ("url = 'https://orders.example/'\nsecret = '$T'", "$T is not in the environment"),
        ("url = 'https://orders.example/'\nsecret = 'hunter2'", "its secret is not whsec_"),
        ("url = 'https://orders.example/'\nsecret = '$S'\nstatuses = ['gone']", "statuses is not a list of"),
        ("url = 'https://orders.example/'\nsecret = '$S'\nchannels = ['webhook']", "channels is not a list of"),
        ("url = 'https://orders.example/'\nsecret = '$S'\nper_second = 0", "per_second is not a number"),
        ("url = 'https://orders.example/'\nsecret = '$S'\nretries = 3", "retries is not an option"),
        ("url = 'https://orders.example/'\nsecret = '$S'\nallow_private = 1", "neither true nor false"),
    ],
)
def test_a_subscription_that_cannot_be_says_why_and_repeats_no_secret(lines: str, problem: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_subscriptions(f"[webhooks.orders]\n{lines}", {"S": SECRET})
    (found,) = caught.value.problems
    assert found.startswith("webhook orders: ")
    assert problem in found
    assert "hunter2" not in found
    assert "word" not in found.replace("password", "")


def test_subscriptions_are_data() -> None:
    text = "[webhooks.a]\nurl='https://a.example/x'\nsecret='$S'\nstatuses=['bounced','read']\nchannels=['sms']\n"
    text += "categories=['payments']\nper_second=5\n"
    (found,) = parse_subscriptions(text, {"S": SECRET})
    assert (found.name, found.per_second, found.allow_private) == ("a", 5.0, False)
    change = StatusChange(
        notification_id="n", user_id="u", axis="delivery", status="bounced", channel="sms", category="payments", at=DELIVERY.created_at
    )
    assert found.wants(change)
    assert found.wants(replace(change, status="read", channel=None, category=None))
    for other in (replace(change, channel="email"), replace(change, status="delivered"), replace(change, category="messages")):
        assert not found.wants(other)
    assert "a.example" not in repr(found)
    assert parse_subscriptions("", {}) == ()
