"""Telling a subscriber over real HTTP: what it verifies, and what each of its answers means."""

from __future__ import annotations

import asyncio
import base64
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from channels.base import Receipt
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
from tests.subscriber import Subscriber

SECRET, OLD = ("whsec_" + base64.b64encode(letter * 32).decode() for letter in (b"s", b"o"))
TEXT = '{"type":"delivery.delivered"}'
DELIVERY: Delivery = replace(a_delivery("u", "e"), channel="webhook", delivery_id="0b-webhook-1", route="orders")
CONTENT = Content(address="https://orders.example/", text=TEXT)


def subscription(url: str, **options: object) -> Subscription:
    listed = "".join(f"{name} = {str(value).lower() if isinstance(value, bool) else value!r}\n" for name, value in options.items())
    text = f"[webhooks.orders]\nurl = {url!r}\nsecret = '${{NEW}} $OLD'\nallow_private = true\n{listed}"
    (found,) = parse_subscriptions(text, {"NEW": SECRET, "OLD": OLD})
    return found


@asynccontextmanager
async def opened(url: str, *, total_seconds: float = 5.0) -> AsyncIterator[WebhookChannel]:
    channel = WebhookChannel(subscription(url), total_seconds=total_seconds)
    await channel.open()
    try:
        yield channel
    finally:
        await channel.close()


Means = tuple[type[NotifyError], float | None]


@pytest.fixture
async def subscriber() -> AsyncIterator[Subscriber]:
    async with Subscriber(secret=SECRET).running() as running:
        yield running


@pytest.fixture
async def channel(subscriber: Subscriber) -> AsyncIterator[WebhookChannel]:
    async with opened(subscriber.url, total_seconds=1.0) as channel:
        yield channel


async def test_a_subscriber_verifies_what_it_is_told_with_either_of_two_secrets(subscriber: Subscriber, channel: WebhookChannel) -> None:
    for secret in (SECRET, OLD):
        subscriber.secret = secret
        receipt = await channel.send(DELIVERY, CONTENT)
        assert receipt == Receipt(provider="orders", status=Status.SENT, code="204")
    assert [each.message for each in subscriber.told] == [{"type": "delivery.delivered"}] * 2
    assert (subscriber.calls, subscriber.forged) == (["0b-webhook-1"] * 2, 0), "the same id at each attempt"


@pytest.mark.parametrize(
    ("answer", "headers", "means"),
    [
        (500, {}, (ProviderRefusedError, None)),
        (404, {}, (ProviderRefusedError, None)),
        (302, {"Location": "http://127.0.0.1:1/"}, (ProviderRefusedError, None)),
        (503, {}, (ProviderRefusedError, None)),
        (503, {"Retry-After": "7"}, (ProviderThrottledError, 7.0)),
        (429, {"Retry-After": "3"}, (ProviderThrottledError, 3.0)),
        (429, {"Retry-After": "soon"}, (ProviderThrottledError, None)),
        (410, {}, (ProviderRejectedError, None)),
    ],
)
async def test_each_answer_means_what_the_contract_says(
    subscriber: Subscriber, channel: WebhookChannel, answer: int, headers: Mapping[str, str], means: Means
) -> None:
    kind, wait = means
    subscriber.script(answer)
    subscriber.headers = dict(headers)
    with pytest.raises(kind) as caught:
        await channel.send(DELIVERY, CONTENT)
    error = caught.value
    assert getattr(error, "code", None) == str(answer)
    assert getattr(error, "retry_after_seconds", None) == wait
    assert getattr(error, "suppresses", None) == (Suppression.GONE if answer == 410 else None)
    assert "127.0.0.1" not in str(error)
    subscriber.headers = {}
    assert (await channel.send(DELIVERY, CONTENT)).status is Status.SENT


async def test_retry_after_may_be_a_moment(subscriber: Subscriber, channel: WebhookChannel) -> None:
    subscriber.script(429)
    subscriber.headers = {"Retry-After": format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)}
    with pytest.raises(ProviderThrottledError) as caught:
        await channel.send(DELIVERY, CONTENT)
    assert 50 < (caught.value.retry_after_seconds or 0) <= 60


@pytest.mark.parametrize(("answer", "code"), [("drop", "connection"), ("hang", "timeout")])
async def test_what_left_and_was_not_answered_is_unknown(subscriber: Subscriber, channel: WebhookChannel, answer: str, code: str) -> None:
    subscriber.script(answer)
    with pytest.raises(SendUnknownError) as caught:
        await channel.send(DELIVERY, CONTENT)
    assert caught.value.code == code
    assert (await channel.send(DELIVERY, CONTENT)).status is Status.SENT


async def test_garbage_for_an_answer_is_unknown() -> None:
    async def rave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"220 mail.example ESMTP\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(rave, "127.0.0.1", 0)
    async with server, opened(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/") as channel:
        with pytest.raises(SendUnknownError) as caught:
            await channel.send(DELIVERY, CONTENT)
        assert caught.value.code == "protocol"


async def test_nobody_there_and_a_tls_failure_are_outages_of_this_subscriber(subscriber: Subscriber) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        async with opened(f"http://127.0.0.1:{probe.getsockname()[1]}/") as channel:
            with pytest.raises(ProviderUnavailableError) as caught:
                await channel.send(DELIVERY, CONTENT)
            assert caught.value.code == "connect"
    async with opened(subscriber.url.replace("http:", "https:")) as channel:
        with pytest.raises(ProviderUnavailableError) as caught:
            await channel.send(DELIVERY, CONTENT)
        assert caught.value.code in {"tls", "connect"}


async def test_a_cancelled_call_leaves_the_channel_usable(subscriber: Subscriber, channel: WebhookChannel) -> None:
    subscriber.script("hang")
    call = asyncio.create_task(channel.send(DELIVERY, CONTENT))
    await asyncio.wait_for(subscriber.called.wait(), 5)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert (await channel.send(DELIVERY, CONTENT)).status is Status.SENT


async def test_a_name_that_leads_inside_is_never_called_without_leave(subscriber: Subscriber) -> None:
    port = subscriber.url.split(":")[2].split("/")[0]
    allowed = subscription(subscriber.url)
    inside = WebhookChannel(replace(allowed, url=f"http://localhost:{port}/hooks/x", allow_private=False), total_seconds=2.0)
    await inside.open()
    with pytest.raises(ProviderUnavailableError) as caught:
        await inside.send(DELIVERY, CONTENT)
    await inside.close()
    assert caught.value.code == "connect"
    assert subscriber.calls == []
    with pytest.raises(OSError, match="no address of the internet"):
        await PublicResolver().resolve("localhost", 80)


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
