"""SMS a second: our channels against their plain clients in a loop, `python -m benchmarks.sms [--messages 3000]`.

All talk to the same simulator, which runs in a process of its own and counts what it took. Over SMPP each message asks for a
receipt, and receipts are acknowledged as they come; those still on their way at the end are not waited for. Twilio is given
no callback URL: reports would go to another process. A plain client is what a service writes that has no notification
system: one message after the other, through smpplib or requests, where ours has 32 calls at once. A carrier on this machine
answers at once; one that answers after 20 ms, as over a network, shows what having more under way is worth. The window is
10 messages near and 32 far.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Final

import requests
import smpplib.client
import smpplib.consts
import typer
import uvloop

from benchmarks.figures import Figure, figure, ratio, tenth, whole
from channels import smpp, twilio
from channels.base import Channel
from channels.config import Ports, ProviderConfig, parse_providers
from channels.simulators.script import Script
from channels.simulators.smpp import SmppSimulator
from channels.simulators.twilio import SENDER, TwilioSimulator
from schemas.messages import Content, Delivery, DeliveryReport

TITLE: Final = "SMS: messages a second to a simulator"
OPEN: Final = 32
WARM_UP: Final = 100
FAR: Final = Script(latency=0.02)
NEAR: Final = Script()
TEXT: Final = "FlowMart: we received 149.99 EUR for order 10482. Thank you!"
NUMBER: Final = "+4915123456789"


async def _reported(_: DeliveryReport) -> None:
    """Take a report, at no cost."""


PORTS: Final = Ports(
    mail_from="a@b.example", max_open=OPEN, report=_reported, unsubscribe_url=lambda *_: None, callback_url=lambda _: None, return_key=b""
)


@dataclass(frozen=True, slots=True)
class Service:
    """A protocol at a distance. `share`: of the messages, so that one after the other does not take for ever."""

    name: str
    simulator: Callable[..., Any]
    build: Callable[[ProviderConfig, Ports], Channel]
    script: Script
    options: str = ""
    share: float = 1.0


SERVICES: Final = {
    "smpp": Service("SMPP", SmppSimulator, smpp.build, NEAR),
    "smpp-far": Service("SMPP, 20 ms away", SmppSimulator, smpp.build, FAR, options="&window=32", share=0.1),
    "twilio": Service("Twilio", TwilioSimulator, twilio.build, NEAR, share=0.5),
    "twilio-far": Service("Twilio, 20 ms away", TwilioSimulator, twilio.build, FAR, share=0.1),
}


@dataclass(frozen=True, slots=True)
class Target:
    """A simulator that runs: how to configure a provider with it."""

    kind: str
    url: str
    process: subprocess.Popen[str]

    @property
    def config(self) -> ProviderConfig:
        """The provider's configuration."""
        (config,) = parse_providers(self.url + SERVICES[self.kind].options, {})
        return config

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
    command = [sys.executable, "-m", "benchmarks.sms", "--serve", kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
        assert process.stdout is not None
        try:
            yield Target(kind, process.stdout.readline().strip(), process)
        finally:
            process.send_signal(signal.SIGTERM)


async def serve(kind: str) -> None:
    """Be a simulator until stdin ends."""
    async with SERVICES[kind].simulator(script=SERVICES[kind].script) as simulator:
        print(simulator.url, flush=True)
        loop = asyncio.get_running_loop()
        counted = 0
        while await loop.run_in_executor(None, sys.stdin.readline):
            print(len(simulator.messages) - counted, flush=True)
            counted = len(simulator.messages)


# ---- ours


def a_delivery(number: int) -> Delivery:
    now = datetime.now(UTC)
    return Delivery(
        delivery_id=f"{number:032x}-sms",
        notification_id=f"{number:032x}",
        user_id="u",
        channel="sms",
        lane="normal",
        rule="payment_confirmed",
        category="payments",
        generation=0,
        attempt=1,
        sealed=b"",
        accepted_at=now,
        created_at=now,
        expires_at=now + timedelta(hours=1),
        route="DE",
    )


def send_ours(where: Target, messages: int) -> float:
    """Return the seconds that our channel takes."""

    async def send() -> float:
        channel = SERVICES[where.kind].build(where.config, PORTS)
        await channel.open()
        content = Content(address=NUMBER, text=TEXT)

        async def sender(numbers: Iterator[int]) -> None:
            for number in numbers:
                await channel.send(a_delivery(number), content)

        await sender(iter(range(WARM_UP)))
        rest = iter(range(WARM_UP, WARM_UP + messages))
        began = time.perf_counter()
        await asyncio.gather(*(sender(rest) for _ in range(OPEN)))
        taken = time.perf_counter() - began
        await channel.close()
        return taken

    return uvloop.run(send())


# ---- plain clients


def send_smpplib(where: Target, messages: int) -> float:
    """Return the seconds that smpplib takes, one message after the other; receipts are read as they come between answers.

    With TCP_NODELAY, which it does not set: else the answer to a receipt and the next message wait for each other's
    acknowledgement, and 25 to 40 messages a second are all that it does.
    """
    config = where.config
    logging.getLogger("smpplib").setLevel(logging.ERROR)
    client = smpplib.client.Client(config.host, config.port, allow_unknown_opt_params=True, timeout=10, logger_name="smpplib")
    answered: list[int] = []
    client.set_message_sent_handler(lambda pdu: answered.append(pdu.sequence))
    client.set_message_received_handler(lambda pdu: None)  # noqa: ARG005 - smpplib's name of it
    client.connect()
    client._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # noqa: SLF001 - it offers no way
    client.bind_transceiver(system_id=config.username, password=config.password)
    began = 0.0
    for number in range(WARM_UP + messages):
        if number == WARM_UP:
            began = time.perf_counter()
        client.send_message(
            source_addr_ton=smpplib.consts.SMPP_TON_ALNUM,
            source_addr="FlowMart",
            dest_addr_ton=smpplib.consts.SMPP_TON_INTL,
            dest_addr_npi=smpplib.consts.SMPP_NPI_ISDN,
            destination_addr=NUMBER[1:],
            short_message=TEXT.encode("ascii"),
            registered_delivery=True,
        )
        while len(answered) <= number:
            client.read_once()
    taken = time.perf_counter() - began
    # what is left in the socket would be read as the answer to the unbind
    client.disconnect()
    return taken


def send_requests(where: Target, messages: int) -> float:
    """Return the seconds that requests takes, one message after the other on a connection that is kept."""
    config = where.config
    url = f"http://{config.host}:{config.port}/2010-04-01/Accounts/{config.username}/Messages.json"
    with requests.Session() as session:
        session.trust_env = False
        session.auth = (config.username or "", config.password)
        began = 0.0
        for number in range(WARM_UP + messages):
            if number == WARM_UP:
                began = time.perf_counter()
            answer = session.post(url, data={"To": NUMBER, "From": SENDER, "Body": TEXT}, timeout=10)
            assert answer.status_code == 201
        return time.perf_counter() - began


OURS: Final = f"our channel, {OPEN} calls at once"
LOOPS: Final[dict[str, tuple[str, Callable[[Target, int], float]]]] = {
    "smpp": ("smpplib in a loop", send_smpplib),
    "twilio": ("requests in a loop", send_requests),
}


# ---- figures


def measure(messages: int, repetitions: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Return messages a second for each service and client, a value a repetition. Both clients have their turn in each one."""
    found: dict[str, dict[str, list[float]]] = {}
    for kind, service in SERVICES.items():
        loop, send_in_loop = LOOPS[kind.partition("-")[0]]
        peers: dict[str, Callable[[Target, int], float]] = {OURS: send_ours, loop: send_in_loop}
        found[kind] = {peer: [] for peer in peers}
        count = max(1, round(messages * service.share))
        with target(kind) as where:
            for repetition in range(repetitions):
                for peer, send in peers.items():
                    rate = count / send(where, count)
                    if (taken := where.taken()) < count:
                        raise RuntimeError(f"{service.name}, {peer}: {taken} of {count} messages arrived")
                    found[kind][peer].append(rate)
                    say(f"{service.name}, {peer}: {rate:,.0f} messages/s ({repetition + 1}/{repetitions})")
    return {"messages": messages, "open": OPEN, "rates": found}


def describe(found: dict[str, Any]) -> str:
    """Return the table of the page."""
    lines = ["| service | client | messages/s | our channel, times as many |", "|---|---|---:|---:|"]
    for kind, peers in found["rates"].items():
        ours = peers[OURS]
        for peer, rates in peers.items():
            times: Figure | None = None if peer == OURS else ratio(ours, rates)
            lines.append(f"| {SERVICES[kind].name} | {peer} | {figure(rates).show(whole)} | {'' if times is None else times.show(tenth)} |")
    return "\n".join(lines) + "\n"


def main(
    messages: Annotated[int, typer.Option(min=1, help="How many each client sends at most.")] = 3_000,
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
