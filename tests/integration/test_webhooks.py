"""Subscribers of status changes, from the topic `status` to a real receiver that verifies, fails, and leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from channels.simulators.push import Pushed
from channels.simulators.script import Script
from channels.simulators.webhook import WebhookSimulator
from schemas import topics
from schemas.ids import is_notification_id
from schemas.messages import StatusChange
from schemas.topics import Lane
from streams.embedded.stack import Stack
from tests.deliveries import a_delivery, codec_of, give_keys, publish
from tests.harness import System, system, wait_for
from tests.simulated import Simulated, simulated

NAMES = ("orders", "failing", "leaving")


@pytest.fixture(scope="module")
def told() -> Iterator[Simulated]:
    with simulated(*(f"webhook:{name}" for name in NAMES)) as found:
        yield found


@pytest.fixture(scope="module")
def running(stack: Stack, told: Simulated, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder: Path = tmp_path_factory.mktemp("webhooks")
    wanted = {"orders": '["sent", "failed", "delivered", "read"]', "failing": '["sent"]', "leaving": '["sent"]'}
    tables = [
        f'[webhooks.{name}]\nurl = "{url_of(told, name)}"\nsecret = "${name.upper()}"\nstatuses = {wanted[name]}\nallow_private = true\n'
        for name in NAMES
    ]
    (folder / "webhooks.toml").write_text("".join(tables))
    secrets = {name.upper(): subscriber(told, name).secret for name in NAMES}
    variables = {"NOTIFY_WEBHOOKS_FILE": str(folder / "webhooks.toml"), "NOTIFY_RETRY_TIERS": "1,2,4", **secrets}
    with system(stack, folder, variables=variables) as made:
        for role in ("signals", "sender-normal", "delay", "views"):
            made.start(role)
        made.await_ready(seconds=120)
        yield made


def subscriber(told: Simulated, name: str) -> WebhookSimulator:
    return cast("WebhookSimulator", told[f"webhook:{name}"])


def url_of(told: Simulated, name: str) -> str:
    return f"{subscriber(told, name).url}?tenant=7"


def let(told: Simulated, name: str, **script: float) -> None:
    told.script(f"webhook:{name}", Script(**script))


def asked(told: Simulated, name: str) -> list[str]:
    """Return the ids of the calls that a subscriber verified, taken or not."""
    return told.on_loop(lambda: list(subscriber(told, name).ids))


def messages(told: Simulated, name: str, user: str = "") -> list[Pushed]:
    """Return what a subscriber took; `user`: of what is about that one."""
    found = told.on_loop(lambda: list(subscriber(told, name).messages))
    return [each for each in found if not user or each.body["data"]["userId"] == user]


def send(made: System, *users: str) -> list[str]:
    """Have a mail sent to each; return the notifications' ids."""
    give_keys(made, users)
    found = [a_delivery(user, user) for user in users]
    publish(made, topics.deliver("email", Lane.NORMAL), found)
    return [each.notification_id for each in found]


def test_a_subscriber_that_fails_at_first_is_told_once_and_holds_nobody_else(running: System, told: Simulated) -> None:
    let(told, "failing", refuse=1.0)
    sent = send(running, "ada")
    wait_for(lambda: messages(told, "orders"), seconds=60, what="the one that is well told")
    wait_for(lambda: asked(told, "failing"), seconds=60, what="the other one called")
    assert not messages(told, "failing"), "it has failed, and nobody waited for it"
    let(told, "failing")
    (message,) = messages(told, "orders")
    assert message.title == "delivery.sent"
    data = message.body["data"]
    assert (data["notificationId"], data["userId"], data["channel"], data["provider"]) == (sent[0], "ada", "email", "smtp")
    assert data["category"] == "payments"
    assert is_notification_id(data["notificationId"])
    wait_for(lambda: messages(told, "failing"), seconds=90, what="the other one told at last")
    assert len(set(asked(told, "failing"))) == 1, "the same message at each attempt"
    assert len(messages(told, "failing")) == 1
    assert [subscriber(told, name).forged for name in NAMES] == [0, 0, 0]


def test_a_change_that_is_read_again_is_the_same_message_and_is_told_once(running: System, told: Simulated) -> None:
    (identity,) = send(running, "eve")
    wait_for(lambda: messages(told, "orders", "eve"), seconds=60, what="sent told")
    (change,) = [
        found
        for record in running.read(topics.STATUS)
        if (found := running.decode(record, StatusChange)).notification_id == identity
        and (found.channel, found.status) == ("email", "sent")
    ]
    codec = codec_of(running, topics.STATUS)
    signals = running.workers["signals-a"]
    before = signals.metric("notify_events_total", outcome="forwarded")
    running.produce(topics.STATUS, [(b"eve", codec.encode(change))])
    wait_for(lambda: signals.metric("notify_events_total", outcome="forwarded") > before, seconds=30, what="it forwarded again")
    sender = running.workers["sender-normal-a"]
    wait_for(lambda: sender.metric("notify_suppressed_total", channel="webhook") >= 1, seconds=30, what="the repetition dropped")
    assert [each.body["data"]["status"] for each in messages(told, "orders", "eve")] == ["sent"]


def test_one_that_is_gone_is_told_no_more_and_an_operator_can_bring_it_back(running: System, told: Simulated) -> None:
    send(running, "first")
    wait_for(lambda: messages(told, "leaving", "first"), seconds=60, what="the first one told")
    let(told, "leaving", complain=1.0)
    send(running, "leaver")
    signals = running.workers["signals-a"]
    sender = running.workers["sender-normal-a"]
    wait_for(lambda: sender.metric("notify_suppressions_total", channel="webhook", reason="gone") >= 1, seconds=60, what="its word taken")
    let(told, "leaving")
    calls = len(asked(told, "leaving"))
    send(running, "later")
    wait_for(lambda: signals.metric("notify_events_total", outcome="gone") >= 1, seconds=30, what="it left out")
    assert len(asked(told, "leaving")) == calls
    lifted = running.notify("suppress", url_of(told, "leaving"), "--channel", "webhook", "--lift")
    assert lifted.returncode == 0, lifted.stderr
    send(running, "again")
    wait_for(lambda: messages(told, "leaving", "again"), seconds=60, what="it told again")


def test_webhooks_are_no_part_of_the_notification_and_their_secrets_are_nowhere(running: System, told: Simulated) -> None:
    (identity,) = send(running, "zoe")
    wait_for(lambda: messages(told, "orders", "zoe"), seconds=60, what="zoe told of")
    views = running.workers["views-a"]
    wait_for(lambda: views.metric("notify_events_total", outcome="of_subscriber") >= 1, seconds=30, what="left out by the projection")
    row = json.loads(running.table("views.project", "notifications")[identity.encode()])
    assert {channel for channel, *_ in row["deliveries"].values()} == {"email"}
    raw = b"".join((record.key() or b"") + (record.value() or b"") for record in running.read(topics.deliver("webhook", Lane.NORMAL)))
    for planted in (b"tenant=7", subscriber(told, "orders").secret.encode(), b"/hooks/"):
        assert planted not in raw
        assert planted not in running.workers["sender-normal-a"].log_text().encode()
