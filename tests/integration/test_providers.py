"""Several providers of one channel, with real workers on a real broker: who is called, how fast, and what an outage costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from channels.simulators.script import Script
from schemas import topics
from schemas.ids import partition_of
from schemas.messages import Delivery
from schemas.status import Status
from schemas.topics import Channel, Lane
from streams.embedded.processes import choose_port
from streams.embedded.stack import Stack
from tests.deliveries import a_delivery, changes, give_keys, publish
from tests.harness import PARTITIONS, System, system, wait_for
from tests.outage import FAILING, Phase, play, two_providers
from tests.simulated import simulated

MAILS = 200
BACKLOG = 600


@pytest.fixture(scope="module")
def running(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    nobody = f"smtp://127.0.0.1:{choose_port()}?name=away&weight=3"
    variables = {"NOTIFY_SMTP_URL": "", "NOTIFY_PROVIDERS": f"{nobody} {stack.mail_smtp}?name=near"}
    with system(stack, tmp_path_factory.mktemp("providers"), variables=variables) as made:
        made.start("sender-normal")
        made.await_ready(seconds=120)
        yield made


def deliver(made: System, found: list[Delivery]) -> None:
    give_keys(made, {each.user_id for each in found})
    for channel in Channel:
        publish(made, topics.deliver(channel, Lane.NORMAL), [each for each in found if each.channel == channel])


def test_with_one_provider_away_the_other_carries_all_at_once_and_the_trail_says_why(running: System) -> None:
    sent = [a_delivery(f"over-{n}", f"over-{n}") for n in range(MAILS)]
    deliver(running, sent)
    wait_for(lambda: Counter(change.status for change in changes(running, *sent))[Status.SENT] == MAILS, seconds=60, what="every mail sent")
    found = changes(running, *sent)
    assert {change.provider for change in found if change.status == Status.SENT} == {"near"}
    begun = [change for change in found if change.status == Status.SENDING and change.provider == "near"]
    assert any("away out: connect" in (change.reason or "") for change in begun)
    # neither time nor attempts of its schedule went into the provider that is away
    retried = [change for change in found if change.status == Status.RETRYING]
    assert {change.provider for change in retried} == {"away"}
    sender = running.workers["sender-normal-a"]
    wait_for(lambda: sender.metric("notify_provider_out", channel="email", provider="away") == 1, seconds=20, what="the gauge")
    assert sender.metric("notify_provider_out", channel="email", provider="near") == 0


def test_what_no_provider_is_there_for_is_skipped_visibly(running: System) -> None:
    text = a_delivery("no-sms", "no-sms", address="+4915223433333", channel=Channel.SMS)
    deliver(running, [text])
    wait_for(lambda: any(c.status == Status.SKIPPED for c in changes(running, text)), seconds=30, what="it skipped")
    (skipped,) = [change for change in changes(running, text) if change.status == Status.SKIPPED]
    assert skipped.reason == "no_provider"


def test_a_partition_with_a_backlog_leaves_the_others_of_its_worker_their_share_of_the_calls(stack: Stack, tmp_path: Path) -> None:
    names = [f"fair-{n}" for n in range(100)]
    users = {number: next(each for each in names if partition_of(each.encode(), PARTITIONS) == number) for number in (0, 1)}
    backlog = [a_delivery(users[0], f"backlog-{n}", address=f"backlog-{n}@example.com") for n in range(BACKLOG)]
    few = [a_delivery(users[1], f"few-{n}", address=f"few-{n}@example.com") for n in range(20)]
    with simulated(FAILING, script=Script(latency=0.1)) as found:
        variables = {"NOTIFY_PROVIDERS": found[FAILING].url, "NOTIFY_SMTP_URL": "", "NOTIFY_MAX_OPEN_ATTEMPTS": "4"}
        with system(stack, tmp_path, variables=variables) as made:
            made.start("sender-normal")
            made.await_ready(seconds=120)
            deliver(made, backlog)
            wait_for(lambda: found.taken(FAILING) > 4, seconds=30, what="the backlog begun")
            deliver(made, few)
            wait_for(lambda: sent(made, few) == len(few), seconds=60, what="the few sent")
            behind = BACKLOG - sent(made, backlog)
            assert behind > BACKLOG // 2, "the others waited until the backlog was sent"


def sent(made: System, deliveries: list[Delivery]) -> int:
    return sum(change.status == Status.SENT for change in changes(made, *deliveries))


def test_a_provider_that_fails_wholly_then_in_part_loses_its_share_and_gets_it_back(stack: Stack, tmp_path: Path) -> None:
    phases = [
        Phase(name="well", seconds=4, script=Script()),
        Phase(name="fails always", seconds=6, script=Script(unavailable=1)),
        Phase(name="fails 30%", seconds=6, script=Script(refuse=0.3)),
        Phase(name="well again", seconds=40, script=Script(), until_share=0.25),
        Phase(name="as before", seconds=3, script=Script()),
    ]
    with two_providers(stack, tmp_path) as (made, providers):
        seen = play(made, providers, phases, per_second=60, settle_seconds=60)
    assert seen.lost() == 0
    assert seen.doubled() == 0
    (_, _, outage), (_, failing, failed), _, _, (_, again, end) = seen.phases
    # equal weights; whichever is seen to be slower, as one is on a busy machine, is given less
    assert 0.2 < seen.share_taken(1, outage) < 0.8
    # calls that were under way, then one probe at a time, less and less often: no storm
    during = [at for at in seen.calls[FAILING] if failing + 0.5 <= at < failed]
    assert len(during) <= 32 + 8
    assert seen.share_taken(failing + 1, failed) < 0.05
    assert seen.share_taken(again, end) > 0.2
    # another provider took over at once: nobody waited for a schedule's first step
    assert max(seen.lateness().values()) < 10
