"""`kill -9` of senders in the middle of their calls, on every channel: nothing is lost, and duplicates stay within the bound."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import cast

import pytest

from channels.simulators.push import Pushed
from channels.simulators.registry import SIMULATORS
from channels.simulators.script import Script
from channels.simulators.webhook import WebhookSimulator
from schemas import topics
from schemas.messages import Delivery
from schemas.status import Status
from schemas.topics import Channel, Lane
from streams.embedded.stack import Stack
from tests.deliveries import a_delivery, changes, give_keys, publish
from tests.harness import System, system, wait_for
from tests.simulated import Simulated, simulated

EACH = 150
KILLS = 2
OPEN = 8  # calls at once: the bound on what one kill doubles
NAMES = tuple(SIMULATORS)
PROVIDERS = tuple(name for name in NAMES if name != "webhook")  # a subscriber is configured in a file of its own


@pytest.fixture(scope="module")
def providers() -> Iterator[Simulated]:
    # slow enough that a kill meets calls under way
    with simulated(*NAMES, script=Script(latency=0.05, jitter=0.05)) as found:
        yield found


@pytest.fixture(scope="module")
def running(stack: Stack, tmp_path_factory: pytest.TempPathFactory, providers: Simulated) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("crash")
    # two carriers of SMS: each has a country of its own, so that each is called
    urls = " ".join(
        f"{providers[name].url}{'&' if '?' in providers[name].url else '?'}max_open={OPEN}{_ROUTES.get(name, '')}" for name in PROVIDERS
    )
    # what it is told is published here, as much as of the others, and not by signals: nothing here is archived
    (folder / "webhooks.toml").write_text(f'{subscriber(providers).subscription()}statuses = ["archived"]\n')
    variables = {
        "NOTIFY_PROVIDERS": urls,
        "NOTIFY_WEBHOOKS_FILE": str(folder / "webhooks.toml"),
        "NOTIFY_SMTP_URL": "",
        "NOTIFY_MAX_OPEN_ATTEMPTS": str(OPEN),
        "NOTIFY_RETRY_TIERS": "1,2,4",
    }
    with system(stack, folder, variables=variables) as made:
        for role in ("sender-critical", "delay", "signals"):
            made.start(role)
        made.await_ready(seconds=120)
        yield made


_ROUTES = {"smpp": "&routes=DE", "twilio": "&routes=GB"}


def a_push(kind: str, address: str, number: int) -> Delivery:
    return of(kind, number, address=address, channel=Channel.PUSH, route=kind)


def subscriber(providers: Simulated) -> WebhookSimulator:
    return cast("WebhookSimulator", providers["webhook"])


def of(kind: str, number: int, *, address: str, channel: Channel, route: str | None = None, text: str = "World") -> Delivery:
    # one-time codes: what may have arrived is sent again at once
    name = f"{kind}-{number}"
    return a_delivery(name, name, address=address, channel=channel, route=route, lane=Lane.CRITICAL, category="security", text=text)


def all_of(name: str, number: int, providers: Simulated) -> Delivery:
    match name:
        case "smtp":
            return of(name, number, address=f"smtp-{number}@example.com", channel=Channel.EMAIL)
        case "smpp":
            return of(name, number, address=f"+4915223{number + 100_000:06d}", channel=Channel.SMS, route="DE")
        case "twilio":
            return of(name, number, address=f"+447400{number + 100_000:06d}", channel=Channel.SMS, route="GB")
        case "webhook":
            return of(name, number, address=providers[name].url, channel=Channel.WEBHOOK, route=name, text='{"type": "delivery.sent"}')
        case _:
            return a_push(name, providers[name].address(f"{name}-device-{number}"), number)  # type: ignore[attr-defined]  # of the push services


def test_senders_killed_in_the_middle_of_their_calls_lose_nothing_on_any_channel(running: System, providers: Simulated) -> None:
    sent = {name: [all_of(name, number, providers) for number in range(EACH)] for name in NAMES}
    flat = [each for found in sent.values() for each in found]
    give_keys(running, {each.user_id for each in flat})
    for channel in Channel:
        publish(running, topics.deliver(channel, Lane.CRITICAL), [each for each in flat if each.channel == channel])
    sender = running.workers["sender-critical-a"]
    for kill in range(1, KILLS + 1):
        for name in NAMES:
            providers.await_messages(name, EACH * kill // (KILLS + 1), seconds=120)
        sender.kill()
        wait_for(sender.is_ready, seconds=60, what="the sender again")
    ended = {Status.SENT, Status.DELIVERED}
    wait_for(
        lambda: {change.delivery_id for change in changes(running, *flat) if change.status in ended} == {each.delivery_id for each in flat},
        seconds=180,
        what="every delivery at its provider",
    )
    unknown = Counter((change.provider, change.reason) for change in changes(running, *flat) if change.status == Status.UNKNOWN)
    doubled = {}
    for name in NAMES:
        counts = Counter(recipient(message) for message in providers.messages(name))
        assert len(counts) == EACH, f"{name}: lost {EACH - len(counts)}"
        doubled[name] = counts.total() - EACH
    print(f"doubled, of {EACH} each, by {KILLS} kills with {OPEN} calls at once: {doubled}; of unknown end: {dict(unknown)}")
    calls = providers.on_loop(lambda: Counter(subscriber(providers).ids))
    print(f"calls of a webhook-id, and how many ids had so many: {dict(Counter(calls.values()))}")
    # a subscriber that remembers ids has each message once
    assert providers.on_loop(lambda: set(subscriber(providers).told)) == {each.delivery_id for each in sent["webhook"]}
    assert calls.total() == len(providers.messages("webhook")), "each call was taken"
    # what was sent twice was open at a kill, or met no answer: each of them is in the trail
    assert {reason for _, reason in unknown} == {"cut_off"}, unknown
    for name, count in doubled.items():
        assert count <= unknown[name, "cut_off"] <= KILLS * OPEN, (doubled, unknown)


def recipient(message: object) -> str:
    """Return whom a simulator's message went to, whatever the protocol calls it: each delivery of this test goes to another."""
    # but a subscriber is always the same: its messages have an id
    if isinstance(message, Pushed) and message.token == "webhook":
        return message.key
    for name in ("recipient", "recipients", "token"):
        if value := getattr(message, name, None):
            return str(value)
    raise AssertionError(f"{type(message).__name__} names nobody")
