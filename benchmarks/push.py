"""Push messages a second: our channels against their plain clients in a loop, `python -m benchmarks.push [--messages 3000]`.

All talk to the same simulator, over TLS, which runs in a process of its own and counts what it took. A plain client is what
a service writes that has no notification system: one message after the other through httpx with HTTP/2, and for browsers
through http_ece and requests, as pywebpush does it. httpx with as many calls at once as our channel has shows how much of
the difference is concurrency, and how much the client.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import http_ece
import httpx
import jwt
import orjson
import requests
import typer
import uvloop
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from benchmarks import clients
from benchmarks.clients import OPEN, PORTS, Match, Target, seconds_at_once, seconds_in_a_loop, seconds_of_channel
from channels import apns, fcm, webpush
from channels.base import Channel
from channels.config import Ports, ProviderConfig, parse_providers
from channels.devices import from_base64url
from channels.fcm import AccessTokens
from channels.http2 import client_context
from channels.simulators.apns import TOPIC, ApnsSimulator
from channels.simulators.fcm import FcmSimulator
from channels.simulators.push import PushSimulator
from channels.simulators.webpush import SUBJECT, WebPushSimulator
from channels.webpush import Vapid
from schemas.messages import Content

TITLE: Final = "Push: messages a second to a simulator"
SIMULATORS: Final[dict[str, type[PushSimulator]]] = {"fcm": FcmSimulator, "apns": ApnsSimulator, "webpush": WebPushSimulator}
BUILDERS: Final[dict[str, Callable[[ProviderConfig, Ports], Channel]]] = {"fcm": fcm.build, "apns": apns.build, "webpush": webpush.build}
TEXT: Final = "We received 149.99 EUR for order 10482. Thank you!"


async def serve(kind: str) -> None:
    """Be a simulator until stdin ends."""
    async with SIMULATORS[kind]() as simulator:
        await clients.serve(simulator, simulator.address("device"))  # type: ignore[attr-defined]  # each has one


def send_ours(where: Target, messages: int) -> float:
    """Return the seconds that our channel takes."""
    (config,) = parse_providers(where.url, {})
    content = Content(address=where.address, title="Payment received", message=TEXT)
    return uvloop.run(seconds_of_channel(BUILDERS[where.kind](config, PORTS), content, messages))


# ---- plain clients


@dataclass(frozen=True, slots=True)
class Plain:
    """What a plain client posts, and how it is authorised."""

    url: str
    context: Any
    authorities: str
    make: Callable[[int], tuple[dict[str, str], bytes]]
    success: int


def plain(where: Target) -> Plain:
    """Return the plain client's part: the same message, said with the libraries that everybody has."""
    (config,) = parse_providers(where.url, {})
    authorities = Path(config.options["ca"]).read_text("utf-8")
    make = {"fcm": _plain_fcm, "apns": _plain_apns, "webpush": _plain_webpush}[where.kind]
    url, messages = make(where, config, authorities)
    return Plain(url, client_context(authorities), config.options["ca"], messages, 201 if where.kind == "webpush" else 200)


def _plain_fcm(where: Target, config: ProviderConfig, authorities: str) -> tuple[str, Callable[[int], tuple[dict[str, str], bytes]]]:
    info = json.loads(Path(config.options["credentials"]).read_text("utf-8"))
    token = uvloop.run(AccessTokens(info, authorities=authorities).current())
    headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}

    def message(number: int) -> tuple[dict[str, str], bytes]:
        shown = {"title": "Payment received", "body": TEXT}
        android = {"ttl": "3600s", "notification": {"tag": str(number)}}
        return headers, orjson.dumps({"message": {"token": where.address[4:], "notification": shown, "android": android}})

    return f"https://localhost:{config.port}/v1/projects/{config.username}/messages:send", message


def _plain_apns(where: Target, config: ProviderConfig, _: str) -> tuple[str, Callable[[int], tuple[dict[str, str], bytes]]]:
    key = load_pem_private_key(Path(config.options["key"]).read_bytes(), None)
    team, _dot, key_id = (config.username or "").partition(".")
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    token = jwt.encode({"iss": team, "iat": int(time.time())}, key, algorithm="ES256", headers={"kid": key_id})
    headers = {"authorization": f"bearer {token}", "apns-topic": TOPIC, "apns-push-type": "alert", "apns-priority": "10"}

    def message(number: int) -> tuple[dict[str, str], bytes]:
        payload = {"aps": {"alert": {"title": "Payment received", "body": TEXT}, "sound": "default"}}
        return {**headers, "apns-collapse-id": str(number)}, orjson.dumps(payload)

    return f"https://localhost:{config.port}/3/device/{where.address[5:]}", message


def _plain_webpush(where: Target, config: ProviderConfig, _: str) -> tuple[str, Callable[[int], tuple[dict[str, str], bytes]]]:
    subscription = json.loads(where.address.partition(":")[2])
    key = load_pem_private_key(Path(config.options["vapid_key"]).read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    endpoint = subscription["endpoint"]
    parts = urlsplit(endpoint)
    name, value = Vapid(key, SUBJECT, time.time).header(f"{parts.scheme}://{parts.netloc}")
    headers = {name.decode(): value.decode(), "content-encoding": "aes128gcm", "ttl": "3600", "urgency": "normal"}
    public_key, auth = (from_base64url(subscription["keys"][part]) for part in ("p256dh", "auth"))

    def message(number: int) -> tuple[dict[str, str], bytes]:
        payload = orjson.dumps({"title": "Payment received", "body": TEXT, "tag": str(number)})
        body = http_ece.encrypt(
            payload,
            salt=os.urandom(16),
            private_key=ec.generate_private_key(ec.SECP256R1()),
            dh=public_key,
            auth_secret=auth,
            version="aes128gcm",
        )
        return {**headers, "topic": str(number)}, body

    return endpoint, message


def send_requests(where: Target, messages: int) -> float:
    """Return the seconds that requests takes, one message after the other."""
    how = plain(where)
    with requests.Session() as session:
        session.trust_env = False
        session.verify = how.authorities

        def send(number: int) -> None:
            headers, body = how.make(number)
            assert session.post(how.url, data=body, headers=headers, timeout=10).status_code == how.success

        return seconds_in_a_loop(messages, send)


def send_httpx(where: Target, messages: int) -> float:
    """Return the seconds that httpx takes, one message after the other."""
    how = plain(where)
    with httpx.Client(http2=True, verify=how.context, trust_env=False) as client:

        def send(number: int) -> None:
            headers, body = how.make(number)
            assert client.post(how.url, content=body, headers=headers).status_code == how.success

        return seconds_in_a_loop(messages, send)


def send_httpx_at_once(where: Target, messages: int) -> float:
    """Return the seconds that httpx takes with as many calls at once as our channel has."""
    how = plain(where)

    async def all_of() -> float:
        async with httpx.AsyncClient(http2=True, verify=how.context, trust_env=False, timeout=30) as client:

            async def send(number: int) -> None:
                headers, body = how.make(number)
                assert (await client.post(how.url, content=body, headers=headers)).status_code == how.success

            return await seconds_at_once(messages, send)

    return uvloop.run(all_of())


OURS: Final = "our channel"
AT_ONCE: Final = f"httpx, {OPEN} at once"
MATCHES: Final = {
    "fcm": Match("FCM", {OURS: send_ours, "httpx in a loop": send_httpx, AT_ONCE: send_httpx_at_once}),
    "apns": Match("APNs", {OURS: send_ours, "httpx in a loop": send_httpx, AT_ONCE: send_httpx_at_once}),
    "webpush": Match("Web Push", {OURS: send_ours, "http_ece and requests in a loop": send_requests, AT_ONCE: send_httpx_at_once}),
}


# ---- figures


def measure(messages: int, repetitions: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Return messages a second for each service and client, a value a repetition."""
    return clients.measure("benchmarks.push", MATCHES, messages, repetitions, say)


def describe(found: dict[str, Any]) -> str:
    """Return the table of the page."""
    return clients.describe(MATCHES, found["rates"])


def main(
    messages: Annotated[int, typer.Option(min=1, help="How many each client sends.")] = 3_000,
    repetitions: Annotated[int, typer.Option(min=1, help="How often.")] = 1,
    serve_kind: Annotated[str | None, typer.Option("--serve", hidden=True)] = None,
) -> None:
    """Measure, and print the table."""
    if serve_kind is not None:
        uvloop.run(serve(serve_kind))
        return
    print(describe(measure(messages, repetitions, print)))


if __name__ == "__main__":
    typer.run(main)
