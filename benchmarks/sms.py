"""SMS a second: our channels against their plain clients in a loop, `python -m benchmarks.sms [--messages 3000]`.

All talk to the same simulator, which runs in a process of its own and counts what it took. Over SMPP each message asks for a
receipt, and receipts are acknowledged as they come; those still on their way at the end are not waited for. Twilio is given
no callback URL: reports would go to another process. A plain client is what a service writes that has no notification
system: one message after the other, through smpplib or requests, where ours has 32 calls at once. A carrier on this machine
answers at once; one that answers after 20 ms, as over a network, shows what having more under way is worth. The window is
10 messages near and 32 far.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final

import requests
import smpplib.client
import smpplib.consts
import typer
import uvloop

from benchmarks import clients
from benchmarks.clients import OPEN, PORTS, Match, Send, Target, seconds_in_a_loop, seconds_of_channel
from channels import smpp, twilio
from channels.base import Channel
from channels.config import Ports, ProviderConfig, parse_providers
from channels.simulators.script import Script
from channels.simulators.smpp import SmppSimulator
from channels.simulators.twilio import SENDER, TwilioSimulator
from schemas.messages import Content

TITLE: Final = "SMS: messages a second to a simulator"
FAR: Final = Script(latency=0.02)
NEAR: Final = Script()
TEXT: Final = "FlowMart: we received 149.99 EUR for order 10482. Thank you!"
NUMBER: Final = "+4915123456789"


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


def config_of(where: Target) -> ProviderConfig:
    """Return the provider's configuration."""
    (config,) = parse_providers(where.url + SERVICES[where.kind].options, {})
    return config


async def serve(kind: str) -> None:
    """Be a simulator until stdin ends."""
    async with SERVICES[kind].simulator(script=SERVICES[kind].script) as simulator:
        await clients.serve(simulator, NUMBER)


def send_ours(where: Target, messages: int) -> float:
    """Return the seconds that our channel takes."""
    channel = SERVICES[where.kind].build(config_of(where), PORTS)
    return uvloop.run(seconds_of_channel(channel, Content(address=NUMBER, text=TEXT), messages, route="DE"))


# ---- plain clients


def send_smpplib(where: Target, messages: int) -> float:
    """Return the seconds that smpplib takes, one message after the other; receipts are read as they come between answers.

    With TCP_NODELAY, which it does not set: else the answer to a receipt and the next message wait for each other's
    acknowledgement, and 25 to 40 messages a second are all that it does.
    """
    config = config_of(where)
    logging.getLogger("smpplib").setLevel(logging.ERROR)
    client = smpplib.client.Client(config.host, config.port, allow_unknown_opt_params=True, timeout=10, logger_name="smpplib")
    answered: list[int] = []
    client.set_message_sent_handler(lambda pdu: answered.append(pdu.sequence))
    client.set_message_received_handler(lambda pdu: None)  # noqa: ARG005 - smpplib's name of it
    client.connect()
    client._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # noqa: SLF001 - it offers no way
    client.bind_transceiver(system_id=config.username, password=config.password)

    def send(number: int) -> None:
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

    taken = seconds_in_a_loop(messages, send)
    # what is left in the socket would be read as the answer to the unbind
    client.disconnect()
    return taken


def send_requests(where: Target, messages: int) -> float:
    """Return the seconds that requests takes, one message after the other on a connection that is kept."""
    config = config_of(where)
    url = f"http://{config.host}:{config.port}/2010-04-01/Accounts/{config.username}/Messages.json"
    with requests.Session() as session:
        session.trust_env = False
        session.auth = (config.username or "", config.password)

        def send(_number: int) -> None:
            answer = session.post(url, data={"To": NUMBER, "From": SENDER, "Body": TEXT}, timeout=10)
            assert answer.status_code == 201

        return seconds_in_a_loop(messages, send)


OURS: Final = f"our channel, {OPEN} calls at once"
LOOPS: Final[dict[str, tuple[str, Send]]] = {
    "smpp": ("smpplib in a loop", send_smpplib),
    "twilio": ("requests in a loop", send_requests),
}
MATCHES: Final = {
    kind: Match(service.name, dict(((OURS, send_ours), LOOPS[kind.partition("-")[0]])), service.share) for kind, service in SERVICES.items()
}


# ---- figures


def measure(messages: int, repetitions: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Return messages a second for each service and client, a value a repetition."""
    return clients.measure("benchmarks.sms", MATCHES, messages, repetitions, say)


def describe(found: dict[str, Any]) -> str:
    """Return the table of the page."""
    return clients.describe(MATCHES, found["rates"])


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
