"""Subscribers of status changes, from the topic `status` to a real receiver that verifies, fails, and leaves."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import pytest

from schemas import topics
from schemas.ids import is_notification_id
from schemas.messages import StatusChange
from schemas.topics import Lane
from streams.embedded.stack import Stack
from tests.deliveries import a_delivery, codec_of, give_keys, publish
from tests.harness import System, system, wait_for
from tests.subscriber import Subscriber, statuses

SECRET = "whsec_" + base64.b64encode(b"s" * 32).decode()


@contextmanager
def receivers(*names: str) -> Iterator[dict[str, Subscriber]]:
    """Run receivers in a thread of their own: the test waits without an event loop."""
    found = {name: Subscriber(secret=SECRET) for name in names}
    loop = asyncio.new_event_loop()
    ready, done = threading.Event(), asyncio.Event()

    async def run() -> None:
        async with AsyncExitStack() as stack:
            for each in found.values():
                await stack.enter_async_context(each.running())
            ready.set()
            await done.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield found
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join(10)
        loop.close()


@pytest.fixture(scope="module")
def told() -> Iterator[dict[str, Subscriber]]:
    with receivers("orders", "failing", "leaving") as found:
        yield found


@pytest.fixture(scope="module")
def running(stack: Stack, told: dict[str, Subscriber], tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder: Path = tmp_path_factory.mktemp("webhooks")
    wanted = {"orders": '["sent", "failed", "delivered", "read"]', "failing": '["sent"]', "leaving": '["sent"]'}
    (folder / "webhooks.toml").write_text(
        "".join(
            f'[webhooks.{name}]\nurl = "{told[name].url}"\nsecret = "$HOOK"\nstatuses = {words}\nallow_private = true\n'
            for name, words in wanted.items()
        )
    )
    variables = {"NOTIFY_WEBHOOKS_FILE": str(folder / "webhooks.toml"), "HOOK": SECRET, "NOTIFY_RETRY_TIERS": "1,2,4"}
    with system(stack, folder, variables=variables) as made:
        for role in ("signals", "sender-normal", "delay", "views"):
            made.start(role)
        made.await_ready(seconds=120)
        yield made


def send(made: System, *users: str) -> list[str]:
    """Have a mail sent to each; return the notifications' ids."""
    give_keys(made, users)
    found = [a_delivery(user, user) for user in users]
    publish(made, topics.deliver("email", Lane.NORMAL), found)
    return [each.notification_id for each in found]


def test_a_subscriber_that_fails_at_first_is_told_once_and_holds_nobody_else(running: System, told: dict[str, Subscriber]) -> None:
    orders, failing = told["orders"], told["failing"]
    failing.script(500)
    sent = send(running, "ada")
    wait_for(lambda: orders.told, seconds=60, what="the one that is well told")
    assert not failing.told, "it has failed, and nobody waited for it"
    (message,) = orders.told
    assert message.message["type"] == "delivery.sent"
    data = message.message["data"]
    assert (data["notificationId"], data["userId"], data["channel"], data["provider"]) == (sent[0], "ada", "email", "smtp")
    assert data["category"] == "payments"
    assert is_notification_id(data["notificationId"])
    wait_for(lambda: failing.told, seconds=90, what="the other one told at last")
    assert len(set(failing.calls)) == 1, "the same message at each attempt"
    assert len(failing.told) == 1
    assert (orders.forged, failing.forged) == (0, 0)


def test_a_change_that_is_read_again_is_the_same_message_and_is_told_once(running: System, told: dict[str, Subscriber]) -> None:
    orders = told["orders"]
    (identity,) = send(running, "eve")
    wait_for(lambda: any(each.message["data"]["userId"] == "eve" for each in orders.told), seconds=60, what="sent told")
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
    about_eve = [each for each in orders.told if each.message["data"]["userId"] == "eve"]
    assert Counter(each.message_id for each in about_eve).most_common(1)[0][1] == 1
    assert statuses(about_eve) == ["sent"]


def test_one_that_is_gone_is_told_no_more_and_an_operator_can_bring_it_back(running: System, told: dict[str, Subscriber]) -> None:
    leaving = told["leaving"]
    wait_for(lambda: leaving.told, seconds=60, what="the first one told")
    leaving.script(410)
    send(running, "leaver")
    signals = running.workers["signals-a"]
    sender = running.workers["sender-normal-a"]
    wait_for(lambda: sender.metric("notify_suppressions_total", channel="webhook", reason="gone") == 1, seconds=60, what="its word taken")
    calls = len(leaving.calls)
    send(running, "later")
    wait_for(lambda: signals.metric("notify_events_total", outcome="gone") >= 1, seconds=30, what="it left out")
    assert len(leaving.calls) == calls
    lifted = running.notify("suppress", leaving.url, "--channel", "webhook", "--lift")
    assert lifted.returncode == 0, lifted.stderr
    send(running, "again")
    wait_for(lambda: len(leaving.calls) > calls, seconds=60, what="it told again")


def test_webhooks_are_no_part_of_the_notification_and_their_secrets_are_nowhere(running: System, told: dict[str, Subscriber]) -> None:
    (identity,) = send(running, "zoe")
    wait_for(lambda: any(each.message["data"]["userId"] == "zoe" for each in told["orders"].told), seconds=60, what="zoe told of")
    views = running.workers["views-a"]
    wait_for(lambda: views.metric("notify_events_total", outcome="of_subscriber") >= 1, seconds=30, what="left out by the projection")
    row = json.loads(running.rows("views.project.notifications")[identity.encode()])
    assert {channel for channel, *_ in row["deliveries"].values()} == {"email"}
    raw = b"".join((record.key() or b"") + (record.value() or b"") for record in running.read(topics.deliver("webhook", Lane.NORMAL)))
    for planted in (b"tenant=7", SECRET.encode(), b"/hooks/"):
        assert planted not in raw
        assert planted not in running.workers["sender-normal-a"].log_text().encode()
