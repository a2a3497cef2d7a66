"""Push through the whole pipeline: every kind of device of a user hears of it, and one that is gone leaves his preferences."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from schemas import topics
from schemas.messages import StatusChange
from schemas.status import Status
from streams.embedded.stack import Stack
from tests.harness import System, system, wait_for
from tests.simulated import Simulated, simulated

KINDS = ("fcm", "apns", "webpush")


@pytest.fixture(scope="module")
def running(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[System, Simulated]]:
    with simulated(*KINDS) as found:
        variables = {"NOTIFY_SMTP_URL": "", "NOTIFY_PROVIDERS": found.urls}
        with system(stack, tmp_path_factory.mktemp("push"), variables=variables) as made:
            for role in ("router", "sender-normal"):
                made.start(role)
            made.await_ready(seconds=120)
            yield made, found


def notify(made: System, *arguments: str) -> str:
    done = made.notify(*arguments)
    assert done.returncode == 0, done.stderr
    assert "planted" not in done.stderr
    return done.stdout


def devices_of(made: System, user: str) -> list[str]:
    devices: list[str] = json.loads(notify(made, "prefs", "get", user, "--show-contact", "--json"))["contact"]["devices"]
    return devices


def statuses(made: System, user: str) -> Counter[str]:
    """Return how many push deliveries of a user ended in which way."""
    last: dict[str, StatusChange] = {}
    for message in made.read(topics.STATUS):
        change: StatusChange = made.decode(message, StatusChange)
        if change.user_id == user and change.channel == "push" and change.delivery_id:
            last[change.delivery_id] = change
    return Counter(change.status if change.status == Status.SENT else f"{change.status} {change.reason}" for change in last.values())


def test_each_device_hears_of_it_and_one_that_is_gone_leaves_the_preferences(running: tuple[System, Simulated]) -> None:
    made, found = running
    simulators: Any = {kind: found[kind] for kind in KINDS}
    good = [simulators[kind].address("planted") for kind in KINDS]
    dead = "apns:00magic-gone"
    devices = [option for each in (*good, dead) for option in ("--device", each)]
    notify(made, "prefs", "set", "u-devices", *devices, "--category", "messages.push=on")
    assert devices_of(made, "u-devices") == [*good, dead]

    notify(made, "send", "--user", "u-devices", "--title", "Hello", "--message", "World")
    for kind in KINDS:
        found.await_messages(kind, 1, seconds=60)
    wait_for(lambda: statuses(made, "u-devices")["failed 410 Unregistered"] == 1, seconds=30, what="the dead token failed its delivery")
    wait_for(lambda: devices_of(made, "u-devices") == good, seconds=30, what="the dead token left the preferences")
    assert statuses(made, "u-devices")[Status.SENT] == 3

    notify(made, "send", "--user", "u-devices", "--title", "Hello", "--message", "again")
    for kind in KINDS:
        found.await_messages(kind, 2, seconds=60)
        assert [message.message for message in found.messages(kind)] == ["World", "again"]  # type: ignore[attr-defined]  # what was pushed
    assert len(found.calls("apns")) == 3
    log = "".join(worker.log_text() for worker in made.workers.values())
    assert "planted" not in log
    assert "magic-gone" not in log


def test_a_user_without_devices_is_skipped_and_not_failed(running: tuple[System, Simulated]) -> None:
    made, _ = running
    notify(made, "prefs", "set", "u-none", "--email", "a@example.com", "--category", "messages.push=on")
    notify(made, "send", "--user", "u-none", "--title", "Hello", "--message", "World")
    wait_for(lambda: statuses(made, "u-none").total(), seconds=30, what="a status of push")
    assert statuses(made, "u-none") == {"skipped no_address": 1}
