"""FCM, APNs and Web Push against simulators that speak their protocols: what arrives, and what each way to fail means."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import time
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from channels import apns, fcm, webpush
from channels.apns import ApnsChannel
from channels.base import Channel, OnUnknown, Receipt
from channels.devices import Kind, parse_device, route_of, to_base64url
from channels.fcm import FcmChannel
from channels.http2 import Http2Client, client_context, steady, varying
from channels.push import MAX_TTL_SECONDS, replaces
from channels.simulators.apns import ApnsSimulator
from channels.simulators.authority import make_authority
from channels.simulators.fcm import FcmSimulator
from channels.simulators.http2 import Fault, HttpServer, Reply, Request
from channels.simulators.push import PushSimulator
from channels.simulators.script import Script
from channels.simulators.webpush import WebPushSimulator
from channels.webpush import WebPushChannel
from schemas.errors import (
    NotifyError,
    ProviderError,
    ProviderRefusedError,
    ProviderRejectedError,
    ProviderThrottledError,
    ProviderUnavailableError,
    SendUnknownError,
    SettingsError,
)
from schemas.messages import Content, Delivery
from schemas.status import Status, Suppression
from tests.calling import config_of, delivery_on, failure_of, opened
from tests.ports import no_ports

TITLE, MESSAGE = "planted title", "planted message: Grüße 👋"
NAME = "planted-device"
Changes = dict[str, Any]


PORTS = no_ports()


def a_delivery(number: int = 1, **changes: Any) -> Delivery:
    return delivery_on("push", number, **{"expires_at": dt.datetime.now(dt.UTC) + dt.timedelta(hours=1), **changes})


@dataclass(frozen=True)
class Service:
    """One of the three: its module, its simulator and its channel."""

    module: ModuleType
    simulator: type[PushSimulator]
    channel: Callable[..., Channel]


SERVICES = {
    "fcm": Service(fcm, FcmSimulator, FcmChannel),
    "apns": Service(apns, ApnsSimulator, ApnsChannel),
    "webpush": Service(webpush, WebPushSimulator, WebPushChannel),
}


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest) -> Service:
    return SERVICES[request.param]


@asynccontextmanager
async def running(service: Service, **limits: Any) -> AsyncIterator[tuple[Any, Channel]]:
    """Yield the service's simulator and a channel that sends to it."""
    async with service.simulator() as simulator, opened(service.channel(config_of(simulator.url), PORTS, **limits)) as channel:
        yield simulator, channel
        await channel.close()
        await until(lambda: simulator.server.open_connections == 0)


@pytest.fixture
async def pair(service: Service) -> AsyncIterator[tuple[Any, Channel]]:
    async with running(service) as started:
        yield started


async def until(is_so: Callable[[], bool]) -> None:
    """Return when `is_so()`, looking at each turn of the loop. Fails after 5 seconds."""
    async with asyncio.timeout(5):
        while not is_so():  # noqa: ASYNC110 - nobody else sees what is waited for
            await asyncio.sleep(0)


def connections(channel: Any) -> list[object]:
    """Return the HTTP/2 connections of a channel that it has not seen end."""
    clients: list[Any] = list(channel._clients.values()) if isinstance(channel, WebPushChannel) else [channel._client]
    return [connection for client in clients for connection in client._connections]


def a_content(simulator: PushSimulator, name: str = NAME, **changes: Any) -> Content:
    return replace(Content(address=simulator.address(name), title=TITLE, message=MESSAGE), **changes)  # type: ignore[attr-defined]  # each has it


async def failure(channel: Channel, content: Content, delivery: Delivery | None = None) -> ProviderError | SendUnknownError:
    return await failure_of(channel, delivery or a_delivery(), content, NAME.encode().hex())


# --- what arrives -----------------------------------------------------------------------------------------------------


async def test_a_message_arrives_and_has_a_receipt(pair: tuple[Any, Channel], service: Service) -> None:
    simulator, channel = pair
    receipt = await channel.send(a_delivery(), a_content(simulator))
    (message,) = simulator.messages
    assert (message.title, message.message) == (TITLE, MESSAGE)
    assert receipt == Receipt(provider=channel.provider, reference=message.reference, status=Status.SENT, code=receipt.code)
    assert "planted" not in repr(receipt)
    assert channel.reference_of(a_delivery(), receipt) is None
    assert await channel.look_up(a_delivery(), a_content(simulator)) is None
    assert parse_device(a_content(simulator).address).route in (channel.routes or ())
    assert service.module.__name__.rpartition(".")[2] in (channel.routes or ())


async def test_a_channel_says_what_it_is(pair: tuple[Any, Channel]) -> None:
    _, channel = pair
    assert (channel.name, channel.max_open, channel.on_unknown, channel.unknown_seconds) == ("push", 32, OnUnknown.RESEND, 0)
    assert channel.record(a_delivery()) is None


async def test_what_is_sent_again_takes_the_place_of_the_first(pair: tuple[Any, Channel]) -> None:
    simulator, channel = pair
    for delivery in (a_delivery(), a_delivery(attempt=2), a_delivery(generation=1), a_delivery(2)):
        await channel.send(delivery, a_content(simulator))
    first, again, redriven, other = (message.key for message in simulator.messages)
    assert first == again == redriven == replaces(a_delivery())
    assert other != first
    assert len(first) == 32


def ttl_and_urgency(message: Any, now: float) -> tuple[float, str]:
    """Return what each service was told of time to live and urgency, in one form."""
    if "apns-priority" in message.headers:
        expires = int(message.headers["apns-expiration"])
        return (expires - now if expires else 0), {"10": "now", "5": "later"}[message.headers["apns-priority"]]
    if "ttl" in message.headers:
        return int(message.headers["ttl"]), {"high": "now", "normal": "now", "low": "later"}[message.headers["urgency"]]
    android = message.body["android"]
    return int(android["ttl"][:-1]), {"HIGH": "now", "NORMAL": "later"}[android["priority"]]


@pytest.mark.parametrize(
    ("lane", "lasts_seconds", "ttl", "urgency"),
    [
        ("critical", 60, 60, "now"),
        ("normal", 3_600, 3_600, "now"),
        ("bulk", 86_400, 86_400, "later"),
        ("normal", None, MAX_TTL_SECONDS, "now"),
        ("normal", 365 * 86_400, MAX_TTL_SECONDS, "now"),
        ("normal", -5, 0, "now"),
    ],
)
async def test_the_service_keeps_it_until_it_expires_and_wakes_the_device_unless_it_is_bulk(
    pair: tuple[Any, Channel], lane: str, lasts_seconds: float | None, ttl: float, urgency: str
) -> None:
    simulator, channel = pair
    now = dt.datetime.now(dt.UTC)
    expires = None if lasts_seconds is None else now + dt.timedelta(seconds=lasts_seconds)
    await channel.send(a_delivery(lane=lane, expires_at=expires), a_content(simulator))
    told, how = ttl_and_urgency(simulator.messages[0], now.timestamp())
    assert told == pytest.approx(ttl, abs=3)
    assert how == urgency


async def test_an_apns_id_is_of_the_delivery_and_its_generation() -> None:
    async with running(SERVICES["apns"]) as (simulator, channel):
        for delivery in (a_delivery(), a_delivery(attempt=2), a_delivery(generation=1)):
            await channel.send(delivery, a_content(simulator))
    first, again, redriven = (message.headers["apns-id"] for message in simulator.messages)
    assert first == again != redriven


async def test_fcm_is_told_for_iphones_and_browsers_too() -> None:
    async with running(SERVICES["fcm"]) as (simulator, channel):
        await channel.send(a_delivery(lane="bulk"), a_content(simulator))
    body = simulator.messages[0].body
    key = replaces(a_delivery())
    assert body["android"]["notification"]["tag"] == body["android"]["collapse_key"] == key
    assert body["apns"]["headers"]["apns-collapse-id"] == key
    assert body["apns"]["headers"]["apns-priority"] == "5"
    assert body["webpush"]["headers"] == {"TTL": body["android"]["ttl"][:-1], "Urgency": "low", "Topic": key}


@pytest.mark.parametrize("character", ["x", "é", "日", "👋", '"', "\x01"])
async def test_a_message_that_is_too_long_is_shortened_and_a_long_title_too(pair: tuple[Any, Channel], character: str) -> None:
    simulator, channel = pair
    whole = character * 5_000
    await channel.send(a_delivery(), a_content(simulator, title="t" * 5_000, message=whole))
    message = simulator.messages[0]
    assert message.message.endswith("…")
    assert whole.startswith(message.message[:-1])
    assert len(message.title) == 200
    assert len(message.message.encode()) > 600


@given(message=st.text(st.characters(exclude_categories=["Cs"]), max_size=6_000), title=st.text(st.characters(exclude_categories=["Cs"])))
def test_no_text_makes_a_payload_that_the_services_refuse(message: str, title: str) -> None:
    content = Content(address="apns:00", title=title, message=message)
    assert len(apns.compose(a_delivery(), content)) <= 4_096
    assert len(webpush.compose(a_delivery(), content)) <= 3_993
    sent = orjson.loads(fcm.compose(a_delivery(), content, token="t", now=dt.datetime.now(dt.UTC)))["message"]
    assert len(orjson.dumps({"notification": sent["notification"], "data": sent["data"]})) <= 4_096


@pytest.mark.parametrize("changes", [{"title": None}, {"message": None}, {"message": "half \ud83d"}, {"title": "\udc4b"}])
async def test_what_cannot_be_shown_is_rejected_without_a_call(pair: tuple[Any, Channel], changes: Changes) -> None:
    simulator, channel = pair
    error = await failure(channel, a_content(simulator, **changes))
    assert isinstance(error, ProviderRejectedError)
    assert (error.code, error.suppresses) == ("content", None)
    assert not simulator.calls


@pytest.mark.parametrize(
    "address", ["", "planted", "sms:planted", "fcm:", "fcm:planted device", "apns:planted", "webpush:{}", "webpush:planted"]
)
async def test_what_is_no_device_of_the_service_is_rejected_without_a_call(pair: tuple[Any, Channel], address: str) -> None:
    simulator, channel = pair
    error = await failure(channel, a_content(simulator, address=address))
    assert isinstance(error, ProviderRejectedError)
    assert (error.code, error.suppresses) == ("address", None)
    assert not simulator.calls


# --- what can go wrong ------------------------------------------------------------------------------------------------

SHARES = [
    (Script(refuse=1), ProviderRefusedError, None),
    (Script(reject=1), ProviderRejectedError, None),
    (Script(throttle=1, retry_after=7), ProviderThrottledError, 7.0),
    (Script(unavailable=1, retry_after=9), ProviderUnavailableError, 9.0),
    (Script(per_second=0.5, retry_after=3), None, None),
    (Script(reset_before=1), ProviderRefusedError, None),
    (Script(reset_after=1), SendUnknownError, None),
    (Script(garbage=1), SendUnknownError, None),
    (Script(time_out=1), SendUnknownError, None),
    (Script(bounce=1), ProviderRejectedError, None),
    (Script(complain=1), ProviderRejectedError, None),
]


@pytest.mark.parametrize(("script", "kind", "seconds"), SHARES, ids=[str(script)[7:60] for script, _, _ in SHARES])
async def test_each_way_to_fail_is_told_apart(
    service: Service, script: Script, kind: type[NotifyError] | None, seconds: float | None
) -> None:
    async with running(service, total_seconds=2) as (simulator, channel):
        simulator.script = script
        if kind is None:
            await channel.send(a_delivery(), a_content(simulator))
            kind, seconds = ProviderThrottledError, script.retry_after
        error = await failure(channel, a_content(simulator))
        assert type(error) is kind
        assert error.code
        if isinstance(error, ProviderRejectedError):
            assert error.suppresses == (Suppression.DEAD_TOKEN if script.bounce or script.complain else None)
        elif isinstance(error, ProviderError):
            assert error.retry_after_seconds == seconds
        simulator.script = Script()
        await channel.send(a_delivery(), a_content(simulator))


@pytest.mark.parametrize(
    ("name", "kind", "suppresses"),
    [
        ("magic-bounce", ProviderRejectedError, Suppression.DEAD_TOKEN),
        ("magic-gone", ProviderRejectedError, Suppression.DEAD_TOKEN),
        ("magic-refuse", ProviderRefusedError, None),
        ("magic-throttle", ProviderThrottledError, None),
        ("magic-timeout", SendUnknownError, None),
    ],
)
async def test_magic_devices_do_the_same_everywhere(
    service: Service, name: str, kind: type[NotifyError], suppresses: Suppression | None
) -> None:
    async with running(service, total_seconds=2) as (simulator, channel):
        await channel.send(a_delivery(), a_content(simulator, "magic-deliver"))
        error = await failure(channel, a_content(simulator, name))
    assert type(error) is kind
    assert getattr(error, "suppresses", None) == suppresses


async def test_nobody_there_is_unavailable_until_somebody_is(service: Service) -> None:
    async with running(service) as (simulator, channel):
        content = a_content(simulator)
        await channel.send(a_delivery(), content)
        await simulator.server.stop()
        await until(lambda: not connections(channel))
        error = await failure(channel, content)
        assert (type(error), error.code) == (ProviderUnavailableError, "connect")
        await simulator.server.start(make_authority(simulator.folder))
        error = await failure(channel, content)  # another authority than the one that was trusted at the start
        assert (type(error), error.code) == (ProviderUnavailableError, "tls")


async def test_a_host_that_does_not_exist_is_unavailable() -> None:
    async with ApnsSimulator() as simulator:
        for host in ("nowhere.invalid", "a" * 64 + ".example", "x..y"):
            config = replace(config_of(simulator.url), host=host)
            async with opened(ApnsChannel(config, PORTS)) as channel:
                error = await failure(channel, a_content(simulator))
                assert (type(error), error.code) == (ProviderUnavailableError, "connect")


async def test_credentials_of_somebody_else_are_unavailable_for_all(service: Service) -> None:
    async with service.simulator() as simulator, service.simulator() as stranger:
        config, theirs = config_of(simulator.url), config_of(stranger.url)
        if isinstance(simulator, FcmSimulator):
            account = json.loads((simulator.folder / "firebase.json").read_text())
            key = rsa.generate_private_key(65_537, 2_048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            options = {**config.options, "credentials": json.dumps({**account, "private_key": key.decode()})}
        else:
            secret = {name: theirs.options[name] for name in ("key", "vapid_key") if name in theirs.options}
            options = {**config.options, **secret}
        async with opened(service.channel(replace(config, options=options), PORTS)) as channel:
            error = await failure(channel, a_content(simulator))
    assert type(error) is ProviderUnavailableError
    assert not simulator.messages


async def test_a_closed_channel_leaves_nothing_and_may_be_opened_again(pair: tuple[Any, Channel]) -> None:
    simulator, channel = pair
    await channel.send(a_delivery(), a_content(simulator))
    await channel.close()
    await until(lambda: simulator.server.open_connections == 0)
    error = await failure(channel, a_content(simulator))
    assert (type(error), error.code) == (ProviderUnavailableError, "closed")
    await channel.open()
    await channel.open()
    await channel.send(a_delivery(), a_content(simulator))
    assert len(simulator.messages) == 2


async def test_closing_ends_the_calls_that_run(pair: tuple[Any, Channel]) -> None:
    simulator, channel = pair
    await channel.send(a_delivery(), a_content(simulator))
    simulator.script = Script(time_out=1)
    call = asyncio.create_task(failure(channel, a_content(simulator)))
    await until(lambda: len(simulator.messages) == 2)
    await channel.close()
    async with asyncio.timeout(5):
        assert type(await call) is SendUnknownError


async def test_a_cancelled_call_leaves_the_channel_usable(pair: tuple[Any, Channel]) -> None:
    simulator, channel = pair
    await channel.send(a_delivery(), a_content(simulator))
    simulator.script = Script(latency=60)
    calls = [asyncio.create_task(channel.send(a_delivery(n), a_content(simulator))) for n in range(10)]
    await until(lambda: len(simulator.calls) == 11)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    simulator.script = Script()
    await channel.send(a_delivery(), a_content(simulator))
    assert all(call.cancelled() for call in calls)


async def test_a_silent_call_takes_no_time_from_its_neighbours(service: Service) -> None:
    async with running(service, total_seconds=2) as (simulator, channel):
        silent = asyncio.create_task(failure(channel, a_content(simulator, "magic-timeout")))
        await until(lambda: len(simulator.messages) == 1)
        while not silent.done():
            await channel.send(a_delivery(), a_content(simulator))
        assert type(await silent) is SendUnknownError
        assert simulator.server.connections <= 2  # of which FCM's token endpoint has one


async def test_all_calls_at_once_share_one_connection(service: Service) -> None:
    async with running(service) as (simulator, channel):
        simulator.script = Script(latency=1)
        await asyncio.gather(*(channel.send(a_delivery(n), a_content(simulator, f"d{n}")) for n in range(32)))
        assert len({message.token for message in simulator.messages}) == 32
        assert simulator.calls[-1] - simulator.calls[0] < 1  # the last was there before the first was answered
        assert simulator.server.connections - (isinstance(simulator, FcmSimulator)) == 1


async def test_a_service_that_allows_one_call_at_a_time_is_obeyed(service: Service) -> None:
    async with running(service) as (simulator, channel):
        simulator.server.max_streams = 1
        simulator.script = Script(latency=0.01)
        await asyncio.gather(*(channel.send(a_delivery(n), a_content(simulator, f"d{n}")) for n in range(32)))
        assert len(simulator.messages) == 32
        assert simulator.server.connections - (isinstance(simulator, FcmSimulator)) == 4


async def test_a_connection_that_ends_in_good_order_costs_nobody_anything(service: Service) -> None:
    """GOAWAY: what came is answered, though the connection takes no more; what comes too late goes over another one."""
    async with running(service) as (simulator, channel):
        await channel.send(a_delivery(), a_content(simulator))
        before = simulator.server.connections
        simulator.script = Script(latency=0.1)
        calls = [asyncio.create_task(channel.send(a_delivery(n), a_content(simulator, f"d{n}"))) for n in range(8)]
        await until(lambda: len(simulator.calls) == 9)
        simulator.server.go_away()
        late = [asyncio.create_task(channel.send(a_delivery(n), a_content(simulator, f"d{n}"))) for n in range(8, 16)]
        await asyncio.gather(*calls, *late)
        assert len(simulator.messages) == 17
        assert simulator.server.connections == before + 1


async def test_a_connection_that_ends_before_it_took_a_call_is_tried_once_more(service: Service) -> None:
    async with running(service) as (simulator, channel):
        await channel.send(a_delivery(), a_content(simulator))
        simulator.script = Script(latency=30)
        call = asyncio.create_task(channel.send(a_delivery(2), a_content(simulator)))
        await until(lambda: len(simulator.calls) == 2)
        simulator.script = Script()
        simulator.messages.clear()  # the simulator counted it, and now says that it took it not
        simulator.server.go_away(takes_none=True)
        await call
        assert len(simulator.messages) == 1


async def test_a_connection_that_ends_by_an_error_is_unavailable(service: Service) -> None:
    async with running(service) as (simulator, channel):
        await channel.send(a_delivery(), a_content(simulator))
        simulator.script = Script(latency=30)
        call = asyncio.create_task(failure(channel, a_content(simulator)))
        await until(lambda: len(simulator.calls) == 2)
        simulator.server.go_away(is_graceful=False, takes_none=True)
        error = await call
        assert (type(error), error.code) == (ProviderUnavailableError, "goaway")


async def test_a_connection_that_breaks_leaves_its_calls_unknown(service: Service) -> None:
    async with running(service) as (simulator, channel):
        await channel.send(a_delivery(), a_content(simulator))
        simulator.script = Script(latency=30)
        call = asyncio.create_task(failure(channel, a_content(simulator)))
        await until(lambda: len(simulator.calls) == 2)
        simulator.server.cut()
        error = await call
        assert (type(error), error.code) == (SendUnknownError, "connection")
        simulator.script = Script()
        await channel.send(a_delivery(), a_content(simulator))


async def test_a_simulator_that_starts_again_in_its_folder_knows_its_devices_and_is_known(service: Service, tmp_path: Path) -> None:
    async with service.simulator(folder=tmp_path) as first:
        url, content, port = first.url, a_content(first), first.port
        async with opened(service.channel(config_of(url), PORTS)) as channel:
            await channel.send(a_delivery(), content)
    async with service.simulator(folder=tmp_path, port=port) as again, opened(service.channel(config_of(url), PORTS)) as channel:
        await channel.send(a_delivery(), content)
        assert again.url == url
        assert len(again.messages) == 1


# --- FCM --------------------------------------------------------------------------------------------------------------


class Says(FcmSimulator):
    """FCM that answers one thing."""

    reply: Reply | None = None

    def refusal(self, request: Request) -> Reply | None:
        return self.reply or super().refusal(request)


def fcm_error(
    status: int, word: str, code: str | None = None, *, message: str = "planted", violation: str | None = None, **headers: str
) -> Reply:
    details: list[Changes] = []
    if code is not None:
        details.append({"@type": "type.googleapis.com/google.firebase.fcm.v1.FcmError", "errorCode": code})
    if violation is not None:
        details.append({"@type": "type.googleapis.com/google.rpc.BadRequest", "fieldViolations": [{"field": violation}]})
    error = {"code": status, "message": message, "status": word, "details": details}
    return Reply(status=status, headers=headers, body=orjson.dumps({"error": error}))


NOT_VALID = "The registration token is not a valid FCM registration token"
GONE = Suppression.DEAD_TOKEN


@pytest.mark.parametrize(
    ("reply", "kind", "code", "more"),
    [
        (fcm_error(404, "NOT_FOUND", "UNREGISTERED"), ProviderRejectedError, "404 UNREGISTERED", GONE),
        (fcm_error(400, "INVALID_ARGUMENT", "INVALID_ARGUMENT", message=NOT_VALID), ProviderRejectedError, "400 INVALID_ARGUMENT", GONE),
        (
            fcm_error(400, "INVALID_ARGUMENT", "INVALID_ARGUMENT", violation="message.token"),
            ProviderRejectedError,
            "400 INVALID_ARGUMENT",
            GONE,
        ),
        (
            fcm_error(400, "INVALID_ARGUMENT", "INVALID_ARGUMENT", violation="message.android.ttl"),
            ProviderRejectedError,
            "400 INVALID_ARGUMENT",
            None,
        ),
        (fcm_error(400, "INVALID_ARGUMENT"), ProviderRejectedError, "400 INVALID_ARGUMENT", None),
        (fcm_error(404, "NOT_FOUND"), ProviderUnavailableError, "404 NOT_FOUND", None),
        (Reply(status=404, body=b"<html>planted"), ProviderUnavailableError, "404", None),
        (fcm_error(403, "PERMISSION_DENIED", "SENDER_ID_MISMATCH"), ProviderRejectedError, "403 SENDER_ID_MISMATCH", None),
        (fcm_error(403, "PERMISSION_DENIED"), ProviderUnavailableError, "403 PERMISSION_DENIED", None),
        (fcm_error(401, "UNAUTHENTICATED", "THIRD_PARTY_AUTH_ERROR"), ProviderRefusedError, "401 THIRD_PARTY_AUTH_ERROR", None),
        (fcm_error(401, "UNAUTHENTICATED"), ProviderUnavailableError, "401 UNAUTHENTICATED", None),
        (fcm_error(429, "RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED", **{"retry-after": "33"}), ProviderThrottledError, "429 QUOTA_EXCEEDED", 33),
        (fcm_error(429, "RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED"), ProviderThrottledError, "429 QUOTA_EXCEEDED", 60),
        (fcm_error(503, "UNAVAILABLE", "UNAVAILABLE", **{"retry-after": "5"}), ProviderUnavailableError, "503 UNAVAILABLE", 5),
        (fcm_error(500, "INTERNAL", "INTERNAL", **{"retry-after": "4"}), ProviderRefusedError, "500 INTERNAL", 4),
        (Reply(status=502, body=b"<html>planted"), SendUnknownError, "502", None),
        (Reply(status=504), SendUnknownError, "504", None),
        (Reply(status=302, headers={"location": "https://elsewhere.example/planted"}), ProviderUnavailableError, "302", None),
        (Reply(status=200, body=b'{"name": "planted"}'), SendUnknownError, "protocol", None),
        (Reply(status=200, body=b"[]"), SendUnknownError, "protocol", None),
        (Reply(status=204), SendUnknownError, "204", None),
        (Reply(status=200, body=b"x" * 40_000), SendUnknownError, "too_long", None),
    ],
)
async def test_what_fcm_answers(reply: Reply, kind: type[NotifyError], code: str, more: object) -> None:
    async with running(Service(fcm, Says, FcmChannel)) as (simulator, channel):
        simulator.reply = reply
        error = await failure(channel, a_content(simulator))
    assert (type(error), error.code) == (kind, code)
    assert (error.suppresses if isinstance(error, ProviderRejectedError) else getattr(error, "retry_after_seconds", None)) == more


async def test_one_access_token_serves_all_calls_and_one_that_ended_early_is_replaced_once() -> None:
    clock = [time.time()]
    async with running(SERVICES["fcm"], now=lambda: clock[0]) as (simulator, channel):
        await asyncio.gather(*(channel.send(a_delivery(n), a_content(simulator)) for n in range(20)))
        assert simulator.tokens_given == 1
        clock[0] += 100
        simulator.expire_tokens()
        await asyncio.gather(*(channel.send(a_delivery(n), a_content(simulator)) for n in range(20)))
        assert simulator.tokens_given == 2
        assert len(simulator.messages) == 40


async def test_an_account_that_may_not_send_is_not_given_a_token_for_each_message() -> None:
    async with running(SERVICES["fcm"]) as (simulator, channel):
        await channel.send(a_delivery(), a_content(simulator))
        simulator.expire_tokens()
        for _ in range(3):
            assert (await failure(channel, a_content(simulator))).code == "401 UNAUTHENTICATED"
        assert simulator.tokens_given == 1


async def test_an_access_token_is_renewed_before_it_ends_and_nobody_waits_for_it() -> None:
    clock = [time.time()]
    async with FcmSimulator() as simulator, opened(FcmChannel(config_of(simulator.url), PORTS, now=lambda: clock[0])) as channel:
        await channel.send(a_delivery(), a_content(simulator))
        clock[0] += 3_600 - 250
        await channel.send(a_delivery(), a_content(simulator))
        assert len(simulator.messages) == 2
        await until(lambda: simulator.tokens_given == 2)
        await channel.send(a_delivery(), a_content(simulator))
        assert simulator.tokens_given == 2


async def test_a_token_that_is_still_good_outlives_its_endpoint() -> None:
    clock = [time.time()]
    async with FcmSimulator() as simulator, opened(FcmChannel(config_of(simulator.url), PORTS, now=lambda: clock[0])) as channel:
        await channel.send(a_delivery(), a_content(simulator))
        simulator.refuses_tokens = True
        clock[0] += 3_600 - 250
        await channel.send(a_delivery(), a_content(simulator))
        clock[0] += 250
        error = await failure(channel, a_content(simulator))
        assert (type(error), error.code) == (ProviderUnavailableError, "token")
        simulator.refuses_tokens = False
        await channel.send(a_delivery(), a_content(simulator))
        assert len(simulator.messages) == 3


async def test_a_token_endpoint_that_is_down_is_unavailable() -> None:
    async with FcmSimulator() as simulator, FcmSimulator() as gone:
        config = config_of(simulator.url)
        credentials = (gone.folder / "firebase.json").read_text()
        await gone.server.stop()
        async with opened(FcmChannel(replace(config, options={**config.options, "credentials": credentials}), PORTS)) as channel:
            error = await failure(channel, a_content(simulator))
    assert (type(error), error.code) == (ProviderUnavailableError, "connect")


class Garbled(FcmSimulator):
    """A token endpoint that answers one thing."""

    token_reply = Reply(status=200)

    def other(self, request: Request) -> Reply | None:
        return self.token_reply if request.path == "/token" else None


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b""),
        (200, b"<html>planted"),
        (200, b"[]"),
        (200, b"{}"),
        (200, b'{"access_token": 7, "expires_in": 3600}'),
        (200, b'{"access_token": "pl\\u00e4nted", "expires_in": 3600}'),
        (200, b'{"access_token": "planted", "expires_in": "soon"}'),
        (403, b'{"error": "planted"}'),
        (403, b"[1]"),
    ],
)
async def test_a_token_endpoint_that_answers_nonsense_is_unavailable(status: int, body: bytes) -> None:
    async with running(Service(fcm, Garbled, FcmChannel)) as (simulator, channel):
        simulator.token_reply = Reply(status=status, body=body)
        error = await failure(channel, a_content(simulator))
        assert (type(error), error.code) == (ProviderUnavailableError, "token")


# --- APNs -------------------------------------------------------------------------------------------------------------


class AppleSays(ApnsSimulator):
    reply: Reply | None = None

    def refusal(self, request: Request) -> Reply | None:
        return self.reply or super().refusal(request)


def apple(status: int, reason: str, **headers: str) -> Reply:
    return Reply(
        status=status, headers={"apns-id": "00000000-0000-0000-0000-000000000000", **headers}, body=orjson.dumps({"reason": reason})
    )


@pytest.mark.parametrize(
    ("reply", "kind", "code", "more"),
    [
        (apple(400, "BadDeviceToken"), ProviderRejectedError, "400 BadDeviceToken", GONE),
        (apple(400, "DeviceTokenNotForTopic"), ProviderRejectedError, "400 DeviceTokenNotForTopic", None),
        (apple(410, "Unregistered"), ProviderRejectedError, "410 Unregistered", GONE),
        (apple(410, "ExpiredToken"), ProviderRejectedError, "410 ExpiredToken", GONE),
        (Reply(status=410, body=b"planted"), ProviderRejectedError, "410", None),
        (apple(400, "BadCollapseId"), ProviderRejectedError, "400 BadCollapseId", None),
        (apple(413, "PayloadTooLarge"), ProviderRejectedError, "413 PayloadTooLarge", None),
        (apple(400, "TopicDisallowed"), ProviderUnavailableError, "400 TopicDisallowed", None),
        (apple(400, "BadTopic"), ProviderUnavailableError, "400 BadTopic", None),
        (apple(400, "IdleTimeout"), ProviderRefusedError, "400 IdleTimeout", None),
        (apple(403, "InvalidProviderToken"), ProviderUnavailableError, "403 InvalidProviderToken", None),
        (apple(403, "ExpiredProviderToken"), ProviderUnavailableError, "403 ExpiredProviderToken", None),
        (apple(403, "Forbidden"), ProviderUnavailableError, "403 Forbidden", None),
        (apple(404, "BadPath"), ProviderUnavailableError, "404 BadPath", None),
        (apple(405, "MethodNotAllowed"), ProviderUnavailableError, "405 MethodNotAllowed", None),
        (apple(429, "TooManyRequests", **{"retry-after": "12"}), ProviderThrottledError, "429 TooManyRequests", 12),
        (apple(429, "TooManyProviderTokenUpdates"), ProviderThrottledError, "429 TooManyProviderTokenUpdates", None),
        (apple(500, "InternalServerError"), ProviderRefusedError, "500 InternalServerError", None),
        (apple(503, "ServiceUnavailable"), ProviderUnavailableError, "503 ServiceUnavailable", None),
        (apple(503, "Shutdown"), ProviderRefusedError, "503 Shutdown", None),
        (apple(400, "planted reason with spaces"), ProviderRejectedError, "400", None),
        (Reply(status=200, headers={"apns-id": "another"}), SendUnknownError, "protocol", None),
        (Reply(status=200), SendUnknownError, "protocol", None),
    ],
)
async def test_what_apple_answers(reply: Reply, kind: type[NotifyError], code: str, more: object) -> None:
    async with running(Service(apns, AppleSays, ApnsChannel)) as (simulator, channel):
        simulator.reply = reply
        error = await failure(channel, a_content(simulator))
    assert (type(error), error.code) == (kind, code)
    assert (error.suppresses if isinstance(error, ProviderRejectedError) else getattr(error, "retry_after_seconds", None)) == more


@asynccontextmanager
async def apple_at(apples: list[float], ours: list[float]) -> AsyncIterator[tuple[ApnsSimulator, Channel]]:
    """Yield a simulator and a channel whose clocks can be moved."""
    async with AsyncExitStack() as stack:
        simulator = await stack.enter_async_context(ApnsSimulator(clock=lambda: apples[0]))
        yield simulator, await stack.enter_async_context(opened(ApnsChannel(config_of(simulator.url), PORTS, now=lambda: ours[0])))


async def test_a_provider_token_is_kept_for_long_and_renewed_before_apple_calls_it_expired() -> None:
    clock = [1_800_000_000.0]
    async with apple_at(clock, clock) as (simulator, channel):
        for minutes, tokens in ((0, 1), (19, 1), (30, 1), (30, 2), (49, 2), (2, 3)):
            clock[0] += minutes * 60
            await channel.send(a_delivery(), a_content(simulator))
            assert simulator.provider_tokens == tokens
        assert len(simulator.messages) == 6


async def test_a_provider_token_that_apple_calls_expired_is_renewed_and_the_message_sent_once_more() -> None:
    apples, ours = [1_800_000_000.0], [1_800_000_000.0 - 15 * 60]  # our clock is late
    async with apple_at(apples, ours) as (simulator, channel):
        await channel.send(a_delivery(), a_content(simulator))
        apples[0] += 48 * 60
        ours[0] += 48 * 60
        await asyncio.gather(*(channel.send(a_delivery(n), a_content(simulator)) for n in range(5)))
        assert simulator.provider_tokens == 2
        assert len(simulator.messages) == 6
        assert len(simulator.calls) == 11


async def test_a_young_provider_token_is_not_renewed_however_expired_apple_calls_it() -> None:
    apples, ours = [1_800_000_000.0], [1_800_000_000.0 - 2 * 3_600]
    async with apple_at(apples, ours) as (simulator, channel):
        for _ in range(3):
            error = await failure(channel, a_content(simulator))
            assert (type(error), error.code) == (ProviderUnavailableError, "403 ExpiredProviderToken")
        assert simulator.provider_tokens == 1
        assert len(simulator.calls) == 3


async def test_a_clock_that_is_set_back_makes_a_new_provider_token() -> None:
    apples, ours = [1_800_000_000.0], [1_800_000_000.0 + 3_600]
    async with apple_at(apples, ours) as (simulator, channel):
        assert (await failure(channel, a_content(simulator))).code == "403 InvalidProviderToken"  # of the future
        ours[0] -= 3_600
        await channel.send(a_delivery(), a_content(simulator))
        assert len(simulator.messages) == 1


async def test_the_simulator_refuses_what_apple_refuses() -> None:
    """What our channel never does, so that others who test against the simulator meet it."""
    async with running(SERVICES["apns"]) as (simulator, channel):
        await channel.send(a_delivery(), a_content(simulator))
        good = dict(simulator.messages[0].headers)
        tls = client_context((simulator.folder / "ca.pem").read_text())
        client = Http2Client("localhost", simulator.port, tls=tls)

        async def reason(path: str = "/3/device/00ff", body: bytes = b'{"aps": {}}', **changes: str | None) -> str:
            names = ("authorization", "apns-topic", "apns-push-type", "apns-id", "apns-collapse-id", "apns-priority", "apns-expiration")
            headers = {name: good[name] for name in names} | {name.replace("_", "-"): value for name, value in changes.items()}
            answer = await client.post(path, [varying(name, value) for name, value in headers.items() if value is not None], body)
            return str(orjson.loads(answer.body)["reason"]) if answer.body else str(answer.status)

        assert await reason() == "200"
        assert await reason(authorization=None) == "MissingProviderToken"
        assert await reason(authorization="bearer e30.e30.e30") == "InvalidProviderToken"
        assert await reason(apns_topic=None) == "MissingTopic"
        assert await reason(apns_topic="com.example.other") == "TopicDisallowed"
        assert await reason(apns_push_type=None) == "InvalidPushType"
        assert await reason(apns_id="1") == "BadMessageId"
        assert await reason(apns_collapse_id="x" * 65) == "BadCollapseId"
        assert await reason(apns_priority="7") == "BadPriority"
        assert await reason(apns_expiration="soon") == "BadExpirationDate"
        assert await reason("/3/device/xyz") == "BadDeviceToken"
        assert await reason("/3/device/") == "MissingDeviceToken"
        assert await reason("/2/device/00ff") == "BadPath"
        assert await reason(body=b"") == "PayloadEmpty"
        assert await reason(body=b"[]") == "PayloadEmpty"
        assert await reason(body=b'{"aps": {"x": "%b"}}' % (b"x" * 4_096)) == "PayloadTooLarge"
        young = apns.ProviderToken(
            team="SIMULATED1", key_id="KEY0000001", key=apns._key(config_of(simulator.url)), now=lambda: time.time() + 30
        )
        assert await reason(authorization=f"bearer {young.current()}") == "TooManyProviderTokenUpdates"
        await client.close()


# --- Web Push ---------------------------------------------------------------------------------------------------------


class BrowsersSay(WebPushSimulator):
    reply: Reply | None = None

    def refusal(self, request: Request) -> Reply | None:
        return self.reply or super().refusal(request)


@pytest.mark.parametrize(
    ("reply", "kind", "code", "more"),
    [
        (Reply(status=404), ProviderRejectedError, "404", GONE),
        (Reply(status=410), ProviderRejectedError, "410", GONE),
        (Reply(status=400), ProviderRejectedError, "400", None),
        (Reply(status=413), ProviderRejectedError, "413", None),
        (Reply(status=401), ProviderUnavailableError, "401", None),
        (Reply(status=403, body=b'{"reason": "BadJwtToken"}'), ProviderUnavailableError, "403 BadJwtToken", None),
        (Reply(status=400, body=b'{"reason": "VapidPkHashMismatch"}'), ProviderRefusedError, "400 VapidPkHashMismatch", None),
        (Reply(status=403, body=b"the credentials do not correspond to planted"), ProviderRefusedError, "403", None),
        (Reply(status=429, headers={"retry-after": "20"}), ProviderThrottledError, "429", 20),
        (Reply(status=429, headers={"retry-after": "soon"}), ProviderThrottledError, "429", None),
        (Reply(status=429, headers={"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}), ProviderThrottledError, "429", 0),
        (Reply(status=429, headers={"retry-after": "99999999999999"}), ProviderThrottledError, "429", 86_400),
        (Reply(status=500), ProviderRefusedError, "500", None),
        (Reply(status=503, headers={"retry-after": "8"}), ProviderUnavailableError, "503", 8),
        (Reply(status=307, headers={"location": "http://169.254.169.254/"}), ProviderUnavailableError, "307", None),
        (Reply(status=204), SendUnknownError, "204", None),
    ],
)
@pytest.mark.parametrize("is_secure", [True, False], ids=["http2", "http1"])
async def test_what_push_services_answer(reply: Reply, kind: type[NotifyError], code: str, more: object, *, is_secure: bool) -> None:
    async with BrowsersSay(is_secure=is_secure) as simulator, opened(WebPushChannel(config_of(simulator.url), PORTS)) as channel:
        simulator.reply = reply
        error = await failure(channel, a_content(simulator))
    assert (type(error), error.code) == (kind, code)
    assert (error.suppresses if isinstance(error, ProviderRejectedError) else getattr(error, "retry_after_seconds", None)) == more


async def test_a_message_is_opened_by_its_browser_alone() -> None:
    async with running(SERVICES["webpush"]) as (simulator, channel):
        await channel.send(a_delivery(), a_content(simulator))
        assert simulator.messages[0].body == {
            "title": TITLE,
            "body": MESSAGE,
            "tag": replaces(a_delivery()),
            "notificationId": a_delivery().notification_id,
        }
        assert simulator.messages[0].headers["topic"] == replaces(a_delivery())
        async with WebPushSimulator() as other:  # of whose browsers the address has the keys
            keys = other.subscription(NAME)["keys"]
        address = f"webpush:{json.dumps({**simulator.subscription(NAME), 'keys': keys})}"
        error = await failure(channel, a_content(simulator, address=address))
        assert (type(error), error.code) == (ProviderRejectedError, "400 BadEncryption")


@pytest.mark.parametrize("protocols", [("http/1.1",), ("h2",)])
async def test_a_service_without_http2_is_spoken_to_as_it_can(protocols: tuple[str, ...]) -> None:
    async with WebPushSimulator() as simulator:
        await simulator.server.stop()
        await simulator.server.start(make_authority(simulator.folder, protocols=protocols))
        async with opened(WebPushChannel(config_of(simulator.url), PORTS)) as channel:
            await asyncio.gather(*(channel.send(a_delivery(n), a_content(simulator, f"d{n}")) for n in range(32)))
            await channel.send(a_delivery(99), a_content(simulator))
        assert len(simulator.messages) == 33
        assert {("host" in message.headers, ":path" in message.headers) for message in simulator.messages} == {(True, protocols == ("h2",))}
        await until(lambda: simulator.server.open_connections == 0)


async def test_without_http2_a_push_service_that_needs_it_is_unavailable() -> None:
    async with ApnsSimulator() as simulator:
        await simulator.server.stop()
        await simulator.server.start(make_authority(simulator.folder, protocols=("http/1.1",)))
        async with opened(ApnsChannel(config_of(simulator.url), PORTS)) as channel:
            error = await failure(channel, a_content(simulator))
    assert (type(error), error.code) == (ProviderUnavailableError, "http1")


@pytest.mark.parametrize("behaviour", ["reset_after", "time_out", "garbage", "reset_before"])
async def test_over_http1_whatever_breaks_off_is_unknown(behaviour: str) -> None:
    async with AsyncExitStack() as stack:
        simulator = await stack.enter_async_context(WebPushSimulator(is_secure=False))
        channel = await stack.enter_async_context(opened(WebPushChannel(config_of(simulator.url), PORTS, total_seconds=2)))
        await channel.send(a_delivery(), a_content(simulator))
        simulator.script = Script(**{behaviour: 1.0})
        assert type(await failure(channel, a_content(simulator))) is SendUnknownError
        simulator.script = Script()
        await channel.send(a_delivery(), a_content(simulator))
        await simulator.server.stop()
        await until(lambda: simulator.server.open_connections == 0)
        error = await failure(channel, a_content(simulator))
        assert (type(error), error.code) == (ProviderUnavailableError, "connect")


async def test_no_host_is_called_that_is_not_in_the_list() -> None:
    async with WebPushSimulator() as simulator:
        config = config_of(simulator.url)
        content = a_content(simulator)
        for origins in ("", "https://localhost:1", "https://localhost", "*.localhost", "*.push.example"):
            async with opened(WebPushChannel(replace(config, options={**config.options, "origins": origins}), PORTS)) as channel:
                error = await failure(channel, content)
                assert (type(error), error.code) == (ProviderRejectedError, "origin")
        assert simulator.server.connections == 0


async def test_a_host_that_a_user_made_up_is_no_outage_of_the_services() -> None:
    async with running(SERVICES["webpush"]) as (simulator, channel):
        await channel.send(a_delivery(), a_content(simulator))
        for host in ("planted.notify.windows.invalid", "xn--.notify.windows.invalid"):
            config = config_of(simulator.url)
            config = replace(config, options={**config.options, "origins": f"{simulator.origin},*.notify.windows.invalid"})
            address = f"webpush:{json.dumps({**simulator.subscription(NAME), 'endpoint': f'https://{host}/x'})}"
            async with opened(WebPushChannel(config, PORTS)) as other:
                error = await failure(other, a_content(simulator, address=address))
                assert (type(error), error.code) == (ProviderRefusedError, "connect")


@pytest.mark.parametrize("status", [401, 403, 302])
async def test_credentials_that_were_accepted_just_before_are_refused_for_one_subscription_only(status: int) -> None:
    clock = [1_800_000_000.0]
    async with AsyncExitStack() as stack:
        simulator = await stack.enter_async_context(BrowsersSay(clock=lambda: clock[0]))
        channel = await stack.enter_async_context(opened(WebPushChannel(config_of(simulator.url), PORTS, now=lambda: clock[0])))
        for reply, minutes, kind in (
            (status, 0, ProviderUnavailableError),
            (None, 0, None),
            (status, 9, ProviderRefusedError),
            (status, 2, ProviderUnavailableError),
        ):
            clock[0] += minutes * 60
            simulator.reply = None if reply is None else Reply(status=reply)
            if kind is None:
                await channel.send(a_delivery(), a_content(simulator))
            else:
                assert type(await failure(channel, a_content(simulator))) is kind


@pytest.mark.parametrize(
    ("endpoint", "is_allowed"),
    [
        ("https://fcm.googleapis.com/fcm/send/x", True),
        ("https://updates.push.services.mozilla.com/wpush/v2/x", True),
        ("https://web.push.apple.com/x", True),
        ("https://wns2-db5p.notify.windows.com/w/?token=x", True),
        ("https://FCM.GoogleAPIs.com/x", True),
        ("https://fcm.googleapis.com:8443/x", False),
        ("https://fcm.googleapis.com.evil.example/x", False),
        ("https://evil-push.apple.com.evil.example/x", False),
        ("https://push.apple.com/x", False),
        ("https://xpush.apple.com/x", False),
        ("https://169.254.169.254/latest", False),
        ("http://127.0.0.1/x", False),
    ],
)
def test_the_known_services_are_allowed_and_nobody_else(endpoint: str, is_allowed: bool) -> None:
    origins = webpush.Origins(webpush.KNOWN_ORIGINS, insecure_loopback=False)
    from urllib.parse import urlsplit

    assert origins.allow(urlsplit(endpoint)) is is_allowed


async def test_our_name_is_signed_once_for_hours_and_anew_before_it_ends() -> None:
    clock = [1_800_000_000.0]
    async with AsyncExitStack() as stack:
        simulator = await stack.enter_async_context(WebPushSimulator(clock=lambda: clock[0]))
        channel = await stack.enter_async_context(opened(WebPushChannel(config_of(simulator.url), PORTS, now=lambda: clock[0])))
        seen: list[str] = []
        for hours in (0, 6, 4.9, 0.2, 24):
            clock[0] += hours * 3_600
            await channel.send(a_delivery(), a_content(simulator))
            seen.append(simulator.messages[-1].headers["authorization"])
    assert seen[0] == seen[1] == seen[2]
    assert len(set(seen[2:])) == 3


async def test_a_vapid_key_comes_as_pem_as_base64url_or_in_a_file() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    raw = to_base64url(key.private_numbers().private_value.to_bytes(32, "big"))
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    names = {
        WebPushChannel(config_of("webpush://?vapid_key=$KEY&subject=mailto:a@b.example", KEY=text), PORTS)._vapid.public_key
        for text in (raw, pem)
    }
    assert len(names) == 1


# --- addresses --------------------------------------------------------------------------------------------------------

KEYS = {"p256dh": to_base64url(b"\x04" + b"k" * 64), "auth": to_base64url(b"a" * 16)}


def subscribed(**changes: Any) -> str:
    return "webpush:" + json.dumps({"endpoint": "https://push.example/x", "keys": KEYS, **changes})


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("fcm:cZ1_-x:APA91b", Kind.FCM),
        ("apns:00FFaa", Kind.APNS),
        ("apns:magic-bounce", Kind.APNS),
        (subscribed(), Kind.WEBPUSH),
        (subscribed(expirationTime=None, more=1), Kind.WEBPUSH),
        (subscribed(endpoint="http://127.0.0.1:8080/x"), Kind.WEBPUSH),
        (subscribed(keys={name: value + "==" for name, value in KEYS.items()}), Kind.WEBPUSH),
    ],
)
def test_a_device_is_read_from_its_address(address: str, kind: Kind) -> None:
    assert route_of(address) is kind
    device = parse_device(address)
    assert device.kind is kind
    assert bool(device.token) is (kind is not Kind.WEBPUSH)
    assert (device.subscription is not None) is (kind is Kind.WEBPUSH)
    assert "APA91b" not in repr(device)
    assert "push.example" not in repr(device)


@pytest.mark.parametrize(
    ("address", "route"),
    [
        ("fcm:x", "fcm"),
        ("apns:00", "apns"),
        (subscribed(endpoint="https://fcm.googleapis.com/fcm/send/x"), "webpush/fcm.googleapis.com"),
        (subscribed(endpoint="https://UPDATES.push.services.mozilla.com:443/wpush/v2/x"), "webpush/updates.push.services.mozilla.com"),
        (subscribed(endpoint="https://web.push.apple.com/x"), "webpush/web.push.apple.com"),
        (subscribed(endpoint="https://wns2-par02p.notify.windows.com/w/?token=x"), "webpush/notify.windows.com"),
        (subscribed(endpoint="https://anotify.windows.com/x"), "webpush/other"),
        (subscribed(endpoint="https://fcm.googleapis.com.evil.example/x"), "webpush/other"),
        (subscribed(endpoint="http://127.0.0.1:8080/x"), "webpush/other"),
    ],
)
def test_a_devices_route_names_the_push_service_and_none_that_users_think_of(address: str, route: str) -> None:
    assert parse_device(address).route == route
    key = to_base64url(ec.generate_private_key(ec.SECP256R1()).private_numbers().private_value.to_bytes(32, "big"))
    browsers = WebPushChannel(config_of("webpush://?vapid_key=$KEY&subject=mailto:a@b.example", KEY=key), PORTS)
    assert (route in (browsers.routes or ())) is route.startswith("webpush")


@pytest.mark.parametrize(
    "address",
    [
        "",
        "device-7f3a91",
        "gcm:x",
        "FCM:x",
        "fcm:",
        "fcm:a b",
        "fcm:a\n",
        "fcm:" + "x" * 4_093,
        "apns:",
        "apns:0",
        "apns:0g",
        "apns:" + "00" * 201,
        "webpush:",
        "webpush:[]",
        "webpush:{}",
        "webpush:null",
        subscribed(endpoint="http://push.example/x"),
        subscribed(endpoint="https://a@push.example/x"),
        subscribed(endpoint="https:///x"),
        subscribed(endpoint="https://push.example:99999/x"),
        subscribed(endpoint="https://push.example/x#y"),
        subscribed(endpoint="https://push.example/x y"),
        subscribed(endpoint="https://püsh.example/"),
        subscribed(endpoint="https://push.example\\@evil.example/"),
        subscribed(endpoint=None),
        subscribed(keys={}),
        subscribed(keys=None),
        subscribed(keys={**KEYS, "auth": 1}),
        subscribed(keys={**KEYS, "auth": "AAAA"}),
        subscribed(keys={**KEYS, "p256dh": KEYS["auth"]}),
        subscribed(keys={**KEYS, "p256dh": "!" * 87}),
        subscribed(more="x" * 4_096),
        "fcm:\ud800",
    ],
)
def test_what_is_no_device_is_refused_without_being_quoted(address: str) -> None:
    with pytest.raises(ValueError, match=r"^(does not begin|is |has )") as caught:
        parse_device(address)
    assert "push.example" not in str(caught.value)


@given(st.text())
def test_any_text_is_a_device_or_a_value_error(text: str) -> None:
    for prefix in ("", "fcm:", "apns:", "webpush:"):
        try:
            parse_device(prefix + text)
        except ValueError:
            continue


async def test_a_key_that_is_no_point_of_the_curve_is_rejected() -> None:
    async with running(SERVICES["webpush"]) as (simulator, channel):
        address = f"webpush:{json.dumps({**simulator.subscription(NAME), 'keys': KEYS})}"
        error = await failure(channel, a_content(simulator, address=address))
        assert (type(error), error.code) == (ProviderRejectedError, "address")


# --- configuration ----------------------------------------------------------------------------------------------------

RSA = "-----BEGIN PRIVATE KEY-----\nhunter2\n-----END PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("fcm://fcm.googleapis.com?credentials=$SECRET", "no project"),
        ("fcm://p@fcm.googleapis.com", "no credentials"),
        ("fcm://p@fcm.googleapis.com?credentials=/nowhere/hunter2", "neither a secret nor a file"),
        ("fcm://p@fcm.googleapis.com?credentials=%7B%22hunter2%22%3A1%7D", "no service account"),
        ("fcm://p@fcm.googleapis.com?credentials=$ACCOUNT", "no service account"),
        ("fcm://p@fcm.googleapis.com?credentials=$ACCOUNT&colour=red", "colour is not an option"),
        ("apns://api.push.apple.com?topic=a&key=$PEM", "no team and key id"),
        ("apns://TEAM@api.push.apple.com?topic=a&key=$PEM", "TEAMID.KEYID"),
        ("apns://T.K@api.push.apple.com?key=$PEM", "no topic"),
        ("apns://T.K@api.push.apple.com?topic=a+b&key=$PEM", "bundle id"),
        ("apns://T.K@api.push.apple.com?topic=a&key=$PEM", "no private key"),
        ("webpush://?subject=mailto:a@b.example", "no vapid key"),
        ("webpush://?vapid_key=$SECRET", "no subject"),
        ("webpush://?vapid_key=$PEM&subject=a@b.example", "mailto"),
        ("webpush://?vapid_key=$PEM&subject=mailto:a@b.example", "no private key"),
        ("webpush://?vapid_key=$RAW&subject=mailto:a@b.example&origins=ftp://x", "no origin"),
        ("webpush://?vapid_key=$RAW&subject=mailto:a@b.example&insecure_loopback=yes", "neither 0 nor 1"),
        ("webpush://?vapid_key=$RAW&subject=mailto:a@b.example&ca=$PEM", "no certificate"),
    ],
)
def test_a_configuration_that_cannot_work_says_so_and_no_secret(url: str, says: str) -> None:
    account = json.dumps({"token_uri": "http://token.example", "private_key": "hunter2", "client_email": "hunter2"})
    config = config_of(url, SECRET="hunter2", PEM=RSA, ACCOUNT=account, RAW=to_base64url(b"k" * 32))
    module = SERVICES[config.scheme].module
    with pytest.raises(SettingsError, match=says) as caught:
        module.build(config, PORTS)
    told = "".join(traceback.format_exception(caught.value))
    assert f"provider {config.name}: " in str(caught.value)
    assert "hunter2" not in told


def test_the_options_that_the_lead_names_are_taken(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "key.p8").write_bytes(key)
    channel = apns.build(
        config_of(f"apns://T.K@api.push.apple.com?topic=com.x&key={quote(str(tmp_path / 'key.p8'))}&max_open=7&name=ios"), PORTS
    )
    assert (channel.provider, channel.reported_as, channel.max_open) == ("ios", "apns", 7)


# --- the client of HTTP/2 ---------------------------------------------------------------------------------------------


@asynccontextmanager
async def plain_server(
    answer: Callable[[Request], tuple[float, Reply | Fault]], **limits: Any
) -> AsyncIterator[tuple[HttpServer, Http2Client]]:
    server = HttpServer(answer)
    await server.start(None)
    client = Http2Client("127.0.0.1", server.port, tls=None, **limits)
    try:
        yield server, client
    finally:
        await client.close()
        await server.stop()


async def test_more_than_the_window_holds_waits_for_room_and_arrives_whole() -> None:
    bodies: list[bytes] = []

    def answer(request: Request) -> tuple[float, Reply]:
        bodies.append(request.body)
        return 0.0, Reply(status=200, body=request.body[:1])

    async with plain_server(answer) as (_, client):
        sent = [bytes([n]) * 60_000 for n in range(20)]
        answers = await asyncio.gather(*(client.post("/", [], body) for body in sent))
        assert [answer.body for answer in answers] == [body[:1] for body in sent]
        assert sorted(bodies) == sent


async def test_bytes_that_are_no_http2_leave_the_call_unknown() -> None:
    async with plain_server(lambda _: (0.0, Fault.NONSENSE)) as (_, client):
        with pytest.raises(SendUnknownError) as caught:
            await client.post("/", [], b"x")
        assert caught.value.code == "protocol"


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"220 localhost ESMTP\r\n", b"", b"\0" * 50])
async def test_a_peer_that_greets_us_by_something_else_is_unavailable(greeting: bytes) -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with server:
        client = Http2Client("127.0.0.1", server.sockets[0].getsockname()[1], tls=None)
        with pytest.raises(ProviderUnavailableError) as caught:
            await client.post("/", [], b"x")
        assert caught.value.code == "connect"
        await client.close()


async def test_a_peer_that_takes_the_connection_and_says_nothing_is_unavailable() -> None:
    async with await asyncio.start_server(lambda *_: None, "127.0.0.1", 0) as server:
        client = Http2Client("127.0.0.1", server.sockets[0].getsockname()[1], tls=None, connect_seconds=0.2)
        with pytest.raises(ProviderUnavailableError) as caught:
            await client.post("/", [], b"x")
        assert caught.value.code == "connect"
        await client.close()


async def test_a_call_for_which_no_connection_gets_free_was_not_taken() -> None:
    async with plain_server(lambda _: (30.0, Reply(status=200)), total_seconds=2, max_connections=1) as (server, client):
        server.max_streams = 1
        ends = await asyncio.gather(*(client.post("/", [], b"x") for _ in range(3)), return_exceptions=True)
        assert sorted(type(end).__name__ for end in ends) == ["ProviderUnavailableError", "ProviderUnavailableError", "SendUnknownError"]
        assert {getattr(end, "code", None) for end in ends} == {"timeout"}


class Tunnel:
    """Between a client and a server, until it freezes: then nothing comes through, and nobody is told."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._is_frozen = asyncio.Event()
        self._pumps: set[asyncio.Task[None]] = set()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        is_frozen = self._is_frozen
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        for source, target in ((reader, back), (there, writer)):
            self._pumps.add(asyncio.create_task(self._pump(source, target, is_frozen)))

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, is_frozen: asyncio.Event) -> None:
        while data := await source.read(65_536):
            if not is_frozen.is_set():
                target.write(data)
        if not is_frozen.is_set():
            target.close()

    def freeze(self) -> None:
        self._is_frozen.set()
        self._is_frozen = asyncio.Event()  # for those that come later

    async def close(self) -> None:
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)


async def test_a_connection_that_died_unseen_is_found_before_a_message_is_risked_on_it() -> None:
    server = HttpServer(lambda _: (0.0, Reply(status=200)))
    await server.start(None)
    tunnel = Tunnel(server.port)
    async with await asyncio.start_server(tunnel.accept, "127.0.0.1", 0) as listening:
        client = Http2Client("127.0.0.1", listening.sockets[0].getsockname()[1], tls=None, quiet_seconds=0)
        await client.post("/", [], b"x")
        await client.post("/", [], b"x")  # asked for a sign of life, and gave it
        assert server.connections == 1
        tunnel.freeze()
        answers = await asyncio.gather(*(client.post("/", [], b"x") for _ in range(3)))
        assert [answer.status for answer in answers] == [200] * 3
        assert server.connections == 2
        await client.close()
        await tunnel.close()
    await server.stop()


async def test_a_connection_that_went_silent_is_left_and_does_not_linger() -> None:
    server = HttpServer(lambda _: (0.0, Reply(status=200)))
    await server.start(None)
    tunnel = Tunnel(server.port)
    async with await asyncio.start_server(tunnel.accept, "127.0.0.1", 0) as listening:
        client = Http2Client("127.0.0.1", listening.sockets[0].getsockname()[1], tls=None, total_seconds=2)
        await client.post("/", [], b"x")
        tunnel.freeze()
        with pytest.raises(SendUnknownError):
            await client.post("/", [], b"x")
        assert (await client.post("/", [], b"x")).status == 200
        assert server.connections == 2
        assert len(client._connections) == 1
        await client.close()
        await tunnel.close()
    await server.stop()


async def test_a_call_that_is_cancelled_is_no_sign_of_a_dead_connection() -> None:
    async with plain_server(lambda request: (30.0 if request.path == "/slow" else 0.0, Reply(status=200))) as (server, client):
        await client.post("/", [], b"x")
        slow = asyncio.create_task(client.post("/slow", [], b"x"))
        await until(lambda: bool(client._connections[0]._streams))
        await asyncio.sleep(0)
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        await client.post("/", [], b"x")
        assert server.connections == 1


async def test_a_peer_that_allows_no_call_for_now_is_waited_for() -> None:
    async with plain_server(lambda _: (0.0, Reply(status=200)), total_seconds=0.5) as (server, client):
        server.max_streams = 0
        with pytest.raises(ProviderUnavailableError) as caught:
            await client.post("/", [], b"x")
        assert caught.value.code == "timeout"


async def test_headers_that_stay_the_same_are_sent_once() -> None:
    """A provider token is some 200 bytes: with the peer's table of headers it is one byte from the second request on."""
    seen: list[Request] = []

    def answer(request: Request) -> tuple[float, Reply]:
        seen.append(request)
        return 0.0, Reply(status=200)

    async with plain_server(answer) as (_, client):
        for number in range(3):
            await client.post(f"/{number}", [steady("authorization", "bearer " + "x" * 300), varying("apns-id", str(number))], b"x")
        (connection,) = client._connections
        table = dict(connection._h2.encoder.header_table.dynamic_entries)
        assert {request.headers["authorization"] for request in seen} == {"bearer " + "x" * 300}
        assert [request.headers["apns-id"] for request in seen] == ["0", "1", "2"]
        assert b"authorization" in table
        assert b"apns-id" not in table
