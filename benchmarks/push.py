"""Push messages a second: our channels against their plain clients in a loop, `python -m benchmarks.push [--messages 3000]`.

All talk to the same simulator, over TLS, which runs in a process of its own and counts what it took. A plain client is what
a service writes that has no notification system: one message after the other through httpx with HTTP/2, and for browsers
through http_ece and requests, as pywebpush does it. httpx with as many calls at once as our channel has shows how much of
the difference is concurrency, and how much the client.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
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

from benchmarks.figures import Figure, figure, ratio, tenth, whole
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
from schemas.messages import Content, Delivery, DeliveryReport

TITLE: Final = "Push: messages a second to a simulator"
OPEN: Final = 32
WARM_UP: Final = 100
SIMULATORS: Final[dict[str, type[PushSimulator]]] = {"fcm": FcmSimulator, "apns": ApnsSimulator, "webpush": WebPushSimulator}
BUILDERS: Final[dict[str, Callable[[ProviderConfig, Ports], Channel]]] = {"fcm": fcm.build, "apns": apns.build, "webpush": webpush.build}
NAMES: Final = {"fcm": "FCM", "apns": "APNs", "webpush": "Web Push"}
TEXT: Final = "We received 149.99 EUR for order 10482. Thank you!"


async def _no_reports(_: DeliveryReport) -> None:
    """Take no report: there are none."""


PORTS: Final = Ports(
    mail_from="a@b.example", max_open=OPEN, report=_no_reports, unsubscribe_url=lambda *_: None, callback_url=lambda _: None, return_key=b""
)


@dataclass(frozen=True, slots=True)
class Target:
    """A simulator that runs: how to configure a provider with it, and the address of a device."""

    kind: str
    url: str
    address: str
    process: subprocess.Popen[str]

    def taken(self) -> int:
        """Ask how many messages it has taken since it was asked last."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("count\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@contextmanager
def target(kind: str) -> Iterator[Target]:
    """Run a simulator in its own process."""
    command = [sys.executable, "-m", "benchmarks.push", "--serve", kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
        assert process.stdout is not None
        try:
            found = json.loads(process.stdout.readline())
            yield Target(kind, found["url"], found["address"], process)
        finally:
            process.send_signal(signal.SIGTERM)


async def serve(kind: str) -> None:
    """Be a simulator until stdin ends."""
    async with SIMULATORS[kind]() as simulator:
        address = simulator.address("device")  # type: ignore[attr-defined]  # each has one
        print(json.dumps({"url": simulator.url, "address": address}), flush=True)
        loop = asyncio.get_running_loop()
        while await loop.run_in_executor(None, sys.stdin.readline):
            print(len(simulator.messages), flush=True)
            simulator.messages.clear()


# ---- ours


def a_delivery(number: int) -> Delivery:
    now = datetime.now(UTC)
    return Delivery(
        delivery_id=f"{number:032x}-push",
        notification_id=f"{number:032x}",
        user_id="u",
        channel="push",
        lane="normal",
        rule="payment_confirmed",
        category="payments",
        generation=0,
        attempt=1,
        sealed=b"",
        accepted_at=now,
        created_at=now,
        expires_at=now + timedelta(hours=1),
    )


def send_ours(where: Target, messages: int) -> float:
    """Return the seconds that our channel takes."""

    async def send() -> float:
        (config,) = parse_providers(where.url, {})
        channel = BUILDERS[where.kind](config, PORTS)
        await channel.open()
        content = Content(address=where.address, title="Payment received", message=TEXT)
        numbers = iter(range(WARM_UP + messages))

        async def sender(until: int) -> None:
            for number in numbers:
                await channel.send(a_delivery(number), content)
                if number >= until:
                    return

        await asyncio.gather(*(sender(WARM_UP - OPEN) for _ in range(OPEN)))
        began = time.perf_counter()
        await asyncio.gather(*(sender(WARM_UP + messages) for _ in range(OPEN)))
        taken = time.perf_counter() - began
        await channel.close()
        return taken

    return uvloop.run(send())


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
        began = 0.0
        for number in range(WARM_UP + messages):
            if number == WARM_UP:
                began = time.perf_counter()
            headers, body = how.make(number)
            assert session.post(how.url, data=body, headers=headers, timeout=10).status_code == how.success
        return time.perf_counter() - began


def send_httpx(where: Target, messages: int) -> float:
    """Return the seconds that httpx takes, one message after the other."""
    how = plain(where)
    with httpx.Client(http2=True, verify=how.context, trust_env=False) as client:
        began = 0.0
        for number in range(WARM_UP + messages):
            if number == WARM_UP:
                began = time.perf_counter()
            headers, body = how.make(number)
            assert client.post(how.url, content=body, headers=headers).status_code == how.success
        return time.perf_counter() - began


def send_httpx_at_once(where: Target, messages: int) -> float:
    """Return the seconds that httpx takes with as many calls at once as our channel has."""
    how = plain(where)

    async def send() -> float:
        async with httpx.AsyncClient(http2=True, verify=how.context, trust_env=False, timeout=30) as client:

            async def sender(numbers: Iterator[int]) -> None:
                for number in numbers:
                    headers, body = how.make(number)
                    assert (await client.post(how.url, content=body, headers=headers)).status_code == how.success

            await sender(iter(range(WARM_UP)))
            rest = iter(range(WARM_UP, WARM_UP + messages))
            began = time.perf_counter()
            await asyncio.gather(*(sender(rest) for _ in range(OPEN)))
            return time.perf_counter() - began

    return uvloop.run(send())


OURS: Final = "our channel"
AT_ONCE: Final = f"httpx, {OPEN} at once"
PEERS: Final[dict[str, dict[str, Callable[[Target, int], float]]]] = {
    "fcm": {OURS: send_ours, "httpx in a loop": send_httpx, AT_ONCE: send_httpx_at_once},
    "apns": {OURS: send_ours, "httpx in a loop": send_httpx, AT_ONCE: send_httpx_at_once},
    "webpush": {OURS: send_ours, "http_ece and requests in a loop": send_requests, AT_ONCE: send_httpx_at_once},
}


# ---- figures


def measure(messages: int, repetitions: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Return messages a second for each service and client, a value a repetition. All clients have their turn in each one."""
    found: dict[str, dict[str, list[float]]] = {kind: {peer: [] for peer in peers} for kind, peers in PEERS.items()}
    for kind, peers in PEERS.items():
        with target(kind) as where:
            for repetition in range(repetitions):
                for peer, send in peers.items():
                    rate = messages / send(where, messages)
                    if (taken := where.taken()) < messages:
                        raise RuntimeError(f"{NAMES[kind]}, {peer}: {taken} of {messages} messages arrived")
                    found[kind][peer].append(rate)
                    say(f"{NAMES[kind]}, {peer}: {rate:,.0f} messages/s ({repetition + 1}/{repetitions})")
    return {"messages": messages, "open": OPEN, "rates": found}


def describe(found: dict[str, Any]) -> str:
    """Return the table of the page."""
    lines = ["| service | client | messages/s | our channel, times as many |", "|---|---|---:|---:|"]
    for kind, peers in found["rates"].items():
        ours = peers[OURS]
        for peer, rates in peers.items():
            times: Figure | None = None if peer == OURS else ratio(ours, rates)
            lines.append(f"| {NAMES[kind]} | {peer} | {figure(rates).show(whole)} | {'' if times is None else times.show(tenth)} |")
    return "\n".join(lines) + "\n"


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
