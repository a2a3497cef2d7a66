"""What every provider and subscriber promises (`channels.base`), held against its simulator: each way in which the protocol can fail."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import re
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from channels.base import Channel, Receipt
from channels.config import parse_providers
from channels.registry import BUILDERS
from channels.simulators import PROTOCOLS
from channels.simulators.registry import SIMULATORS, Simulator, build_simulator
from channels.simulators.script import Script
from channels.simulators.webhook import WebhookSimulator
from channels.subscriptions import parse_subscriptions
from channels.webhook import WebhookChannel
from schemas.errors import (
    NotifyError,
    ProviderRefusedError,
    ProviderRejectedError,
    ProviderThrottledError,
    ProviderUnavailableError,
    SendUnknownError,
)
from schemas.messages import Content, Delivery, DeliveryReport
from schemas.status import Status, Suppression
from streams.embedded.processes import choose_port
from tests.calling import delivery_on
from tests.ports import no_ports

NOW = dt.datetime.now(dt.UTC)
PLANTED = "planted words of the message"
NAMES = PROTOCOLS
CHANNEL = {"smtp": "email", "smpp": "sms", "twilio": "sms", "fcm": "push", "apns": "push", "webpush": "push", "webhook": "webhook"}
REPORTING = ("smpp",)  # over the connection that they are called by: others report elsewhere, and a subscriber not at all
OVER_HTTP1 = {"twilio", "webhook"}
# who says at once that an address is dead, and what follows; others say so later, in a report
SAYS_GONE = {
    "fcm": Suppression.DEAD_TOKEN,
    "apns": Suppression.DEAD_TOKEN,
    "webpush": Suppression.DEAD_TOKEN,
    "webhook": Suppression.GONE,
}
NUMBER = "+4915223433333"
ANY: type[NotifyError] = NotifyError


class Peer:
    """A simulator with a channel that is configured for it."""

    def __init__(self, name: str, simulator: Simulator, channel: Channel, reports: list[DeliveryReport]) -> None:
        self.name = name
        self.simulator = simulator
        self.channel = channel
        self.reports = reports

    def address(self, word: str = "device") -> str:
        """Return an ordinary address, or with the word of a magic one that one."""
        magic = {"bounce": 2, "refuse": 3, "throttle": 4, "timeout": 5, "gone": 6, "complain": 6}
        match CHANNEL[self.name]:
            case "email":
                return f"{'complain' if word == 'gone' else word}@example.com"
            case "sms":
                return f"+4915223{magic[word]:06d}" if word in magic else NUMBER
            case "webhook":
                return self.simulator.url
            case _:
                name = f"magic-{'gone' if word in {'complain', 'gone'} else word}" if word in magic else word
                return str(self.simulator.address(name))  # type: ignore[attr-defined]  # of the push services

    def delivery(self, number: int = 1) -> Delivery:
        channel = CHANNEL[self.name]
        route = {"sms": "DE", "push": self.name, "webhook": self.name}.get(channel)
        return delivery_on(channel, number, expires_at=NOW + dt.timedelta(hours=1), route=route)

    def content(self, word: str = "device") -> Content:
        address = self.address(word)
        match CHANNEL[self.name]:
            case "email":
                return Content(address=address, subject=PLANTED, text=PLANTED, html=f"<p>{PLANTED}</p>")
            case "sms":
                return Content(address=address, text=PLANTED)
            case "webhook":
                return Content(address=address, text=json.dumps({"type": "delivery.sent", "data": PLANTED}))
            case _:
                return Content(address=address, title="FlowMart", message=PLANTED)

    async def send(self, number: int = 1, word: str = "device") -> Receipt:
        if self.name != "webhook" or word == "device":
            return await self.channel.send(self.delivery(number), self.content(word))
        # where a subscriber is told is its channel's: a magic endpoint has one of its own
        channel = channel_of(entry(self.simulator, f"magic-{word}"), None)
        await channel.open()
        try:
            return await channel.send(self.delivery(number), self.content(word))
        finally:
            await channel.close()

    async def fails(self, kind: type[NotifyError], *, number: int = 1, word: str = "device") -> NotifyError:
        with pytest.raises(kind) as caught:
            await self.send(number, word)
        text = "".join(traceback.format_exception(caught.value))
        content = self.content(word)
        assert PLANTED not in text
        assert content.address.partition(":")[2] not in text if ":" in content.address else content.address not in text
        return caught.value


@asynccontextmanager
async def a_peer(name: str, folder: Path, script: Script | None = None) -> AsyncIterator[Peer]:
    reports: list[DeliveryReport] = []

    async def report(found: DeliveryReport) -> None:
        reports.append(found)

    async with build_simulator(name, script=script or Script(), port=0, folder=folder) as simulator:
        channel = channel_of(entry(simulator), report)
        try:
            yield Peer(name, simulator, channel, reports)
        finally:
            await channel.close()


def entry(simulator: Simulator, endpoint: str = "webhook") -> str:
    """Return what the configuration says of a simulator: a provider's URL, or the table of a subscriber."""
    return simulator.subscription(endpoint) if isinstance(simulator, WebhookSimulator) else simulator.url


def channel_of(text: str, report: object) -> Channel:
    if text.startswith("[webhooks."):
        (subscription,) = parse_subscriptions(text, {})
        return WebhookChannel(subscription)
    (config,) = parse_providers(text, {})
    return BUILDERS[config.scheme](config, no_ports(report=report))  # type: ignore[arg-type]  # as given


@pytest.fixture(params=NAMES)
async def peer(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Peer]:
    async with a_peer(request.param, tmp_path) as found:
        await found.channel.open()
        yield found


async def let(peer: Peer, **script: float) -> None:
    peer.simulator.script = Script(**script)


async def eventually(condition: Callable[[], object], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - it looks at lists
            await asyncio.sleep(0.01)


def test_every_simulator_is_held_to_it() -> None:
    assert set(PROTOCOLS) == set(SIMULATORS)


async def test_what_is_accepted_is_sent_and_arrives_once(peer: Peer) -> None:
    receipt = await peer.send()
    assert receipt.status is Status.SENT
    assert receipt.provider == peer.channel.provider
    assert len(peer.simulator.messages) == 1


async def test_many_at_once_arrive_once_each(peer: Peer) -> None:
    many = min(32, peer.channel.max_open)
    receipts = await asyncio.gather(*(peer.send(number) for number in range(many)))
    assert len(peer.simulator.messages) == many
    references = [peer.channel.reference_of(peer.delivery(number), receipt) for number, receipt in enumerate(receipts)]
    known = [reference for reference in references if reference is not None]
    assert len(set(known)) == len(known)


async def test_slow_is_not_failed(peer: Peer) -> None:
    await let(peer, latency=0.3)
    assert (await peer.send()).status is Status.SENT


@pytest.mark.parametrize(
    ("behaviour", "kind", "of_subscriber"),
    [
        ("refuse", ProviderRefusedError, ProviderRefusedError),
        # told again all the same: a subscriber's mistake is mended one day
        ("reject", ProviderRejectedError, ProviderRefusedError),
        ("throttle", ProviderThrottledError, ProviderThrottledError),
        # 503 with Retry-After: it said how long, and is left alone as a provider is that nobody reaches
        ("unavailable", ProviderUnavailableError, ProviderThrottledError),
        ("reset_before", NotifyError, SendUnknownError),
        ("reset_after", SendUnknownError, SendUnknownError),
    ],
)
async def test_each_failure_is_named_and_the_channel_goes_on(
    peer: Peer, behaviour: str, kind: type[NotifyError], of_subscriber: type[NotifyError]
) -> None:
    await let(peer, **{behaviour: 1.0})
    error = await peer.fails(of_subscriber if peer.name == "webhook" else kind)
    assert getattr(error, "code", None), "without a code the trail says nothing"
    if behaviour == "reset_before":
        # over HTTP/1.1 nobody can tell whether a request was worked on before the connection broke
        assert isinstance(error, SendUnknownError if peer.name in OVER_HTTP1 else ProviderUnavailableError | ProviderRefusedError)
        assert not peer.simulator.messages
    if behaviour == "reset_after":
        assert len(peer.simulator.messages) == 1
    await let(peer)
    await eventually_sends(peer)


async def eventually_sends(peer: Peer) -> None:
    """Send until it goes: a connection that broke may be found broken once more."""
    for number in range(100, 110):
        try:
            assert (await peer.send(number)).status is Status.SENT
        except ProviderUnavailableError:
            await asyncio.sleep(0.2)
        else:
            return
    raise AssertionError("the channel did not recover")


async def test_a_throttled_call_says_how_long_to_wait_where_the_protocol_does(peer: Peer) -> None:
    await let(peer, throttle=1.0, retry_after=7)
    error = await peer.fails(ProviderThrottledError)
    assert isinstance(error, ProviderThrottledError)
    if peer.name in {"twilio", "fcm", "apns", "webpush", "webhook"}:
        assert error.retry_after_seconds == 7


async def test_no_answer_and_an_answer_that_is_none_are_unknown(tmp_path: Path) -> None:
    """All providers side by side: each waits for its own time limit."""

    async def one(name: str, behaviour: str) -> None:
        folder = tmp_path / f"{name}-{behaviour}"
        folder.mkdir()
        async with a_peer(name, folder, Script(**{behaviour: 1.0})) as found:
            await found.channel.open()
            async with asyncio.timeout(19):  # shorter than a drain
                await found.fails(SendUnknownError)
            found.simulator.script = Script()
            await eventually_sends(found)

    await asyncio.gather(*(one(name, behaviour) for name in NAMES for behaviour in ("time_out", "garbage")))


async def test_nobody_there_is_unavailable_and_costs_nothing(peer: Peer) -> None:
    here, nowhere = str(peer.simulator.port), str(choose_port())
    away = channel_of(entry(peer.simulator).replace(here, nowhere), None)
    await away.open()
    try:
        # a browser's subscription names its push service itself
        content = replace(peer.content(), address=peer.address().replace(f":{here}", f":{nowhere}"))
        with pytest.raises(ProviderUnavailableError):
            await away.send(peer.delivery(), content)
    finally:
        await away.close()


def without_trust(text: str) -> str:
    """Return what `entry` says with TLS that cannot succeed: the server speaks none, or its authority is not among the trusted ones."""
    for plain, encrypted in (("smtp://", "smtps://"), ("smpp://", "smpps://"), ("twilio+http://", "twilio://"), ("http://", "https://")):
        text = text.replace(plain, encrypted)
    return re.sub(r"&ca=[^&]*", "", text)


@pytest.mark.parametrize("name", NAMES)
async def test_a_tls_failure_is_unavailable_and_nothing_is_sent(name: str, tmp_path: Path) -> None:
    async with a_peer(name, tmp_path) as plain:
        channel = channel_of(without_trust(entry(plain.simulator)), None)
        await channel.open()
        peer = Peer(name, plain.simulator, channel, [])
        try:
            await peer.fails(ProviderUnavailableError)
        finally:
            await channel.close()
        assert not peer.simulator.messages
        assert not peer.simulator.calls


async def test_a_cancelled_call_leaves_the_channel_usable(peer: Peer) -> None:
    await let(peer, latency=5)
    call = asyncio.ensure_future(peer.send())
    await eventually(lambda: len(peer.simulator.calls) == 1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await let(peer)
    await eventually_sends(peer)


async def test_a_closed_channel_sends_nothing_and_may_be_opened_again(peer: Peer) -> None:
    await peer.send()
    await peer.channel.close()
    await peer.fails(ProviderUnavailableError, number=2)
    await peer.channel.open()
    assert (await peer.send(3)).status is Status.SENT


@pytest.mark.parametrize(("word", "kind"), [("refuse", ProviderRefusedError), ("throttle", ProviderThrottledError)])
async def test_magic_recipients_do_the_same_whatever_the_script_says(peer: Peer, word: str, kind: type[NotifyError]) -> None:
    await peer.fails(kind, word=word)
    assert (await peer.send(2)).status is Status.SENT


@pytest.mark.parametrize(("name", "suppression"), SAYS_GONE.items())
async def test_a_dead_address_is_suppressed(name: str, suppression: Suppression, tmp_path: Path) -> None:
    async with a_peer(name, tmp_path) as found:
        await found.channel.open()
        error = await found.fails(ProviderRejectedError, word="gone")
    assert isinstance(error, ProviderRejectedError)
    assert error.suppresses is suppression


@pytest.mark.parametrize("name", REPORTING)
@pytest.mark.parametrize(
    ("script", "least", "most"),
    [
        (Script(), 1, 1),
        (Script(receipts_doubled=1.0), 2, 2),
        (Script(receipts_first=1.0), 1, 1),
        (Script(receipts_delay=0.3), 1, 1),
        (Script(receipts_lost=1.0), 0, 0),
    ],
    ids=["once", "twice", "before the answer", "late", "never"],
)
async def test_reports_come_in_under_the_reference_of_the_send(name: str, tmp_path: Path, script: Script, least: int, most: int) -> None:
    async with a_peer(name, tmp_path, script) as found:
        await found.channel.open()
        receipt = await found.send()
        reference = found.channel.reference_of(found.delivery(), receipt)
        if least:
            await eventually(lambda: len(found.reports) >= least)
        else:
            await found.send(2)
        assert len(found.reports) <= most
        for each in found.reports:
            assert (each.provider, each.reference, each.status) == (found.channel.reported_as, reference, "delivered")
        # however often it is told, it is one report
        assert len({each.report_id for each in found.reports}) <= 1


@pytest.mark.parametrize(
    ("name", "kind"),
    # a subscriber that does not know the secret answers as one that fails at this message: each of them waits alone
    [(name, ProviderRefusedError if name == "webhook" else ProviderUnavailableError) for name in NAMES],
)
async def test_wrong_credentials_reject_nothing_for_good(name: str, kind: type[NotifyError], tmp_path: Path) -> None:
    async with a_peer(name, tmp_path) as found:
        wrong = tmp_path / "wrong"
        wrong.mkdir()
        async with build_simulator(name, script=Script(), port=0, folder=wrong) as other:
            # one account's credentials at another one's door
            url = entry(other).replace(str(other.port), str(found.simulator.port))
            if name in {"smtp", "smpp", "twilio"}:
                scheme, _, rest = found.simulator.url.partition("://")
                url = f"{scheme}://nobody:wrong@{rest.rpartition('@')[2]}"
            if name in {"fcm", "apns", "webpush"}:
                url = url.replace(str(wrong / "ca.pem"), str(tmp_path / "ca.pem"))
            stranger = channel_of(url, None)
            await stranger.open()
            try:
                with pytest.raises(kind):
                    await stranger.send(found.delivery(), found.content())
            finally:
                await stranger.close()
        assert not found.simulator.messages
