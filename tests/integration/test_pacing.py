"""A provider's quota, counted at the provider: no second has more calls than it allows, while workers come, go and are killed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from agents.pacing import daily_share
from schemas import topics
from schemas.messages import Delivery
from schemas.status import Status
from schemas.topics import Channel, Lane
from streams.embedded.stack import Stack
from tests.deliveries import a_delivery, changes, give_keys, publish
from tests.harness import PARTITIONS, System, system, wait_for
from tests.simulated import Simulated, simulated

PER_SECOND, SHARE = 40, 0.8
SENT = 300
PER_DAY = 40


@pytest.fixture(scope="module")
def provider() -> Iterator[Simulated]:
    with simulated("fcm") as found:
        yield found


def a_push(number: int | str) -> Delivery:
    return a_delivery(f"paced-{number}", f"paced-{number}", address=f"fcm:token-{number}", channel=Channel.PUSH, route="fcm")


def paced(stack: Stack, folder: Path, provider: Simulated, option: str) -> AbstractContextManager[System]:
    return system(
        stack,
        folder,
        variables={"NOTIFY_PROVIDERS": f"{provider['fcm'].url}&{option}", "NOTIFY_SMTP_URL": "", "NOTIFY_LANE_SHARES": "10,80,10"},
    )


def most_in(calls: list[float], *, seconds: float) -> int:
    return max(bisect_left(calls, at + seconds) - first for first, at in enumerate(calls))


def test_workers_together_keep_to_the_quota_while_one_joins_and_one_is_killed(stack: Stack, tmp_path: Path, provider: Simulated) -> None:
    with paced(stack, tmp_path, provider, f"per_second={PER_SECOND}") as made:
        made.start("sender-normal")
        made.await_ready(seconds=120)
        sent = [a_push(number) for number in range(SENT)]
        before = len(provider.calls("fcm"))
        give_keys(made, [each.user_id for each in sent])
        publish(made, topics.deliver(Channel.PUSH, Lane.NORMAL), sent)
        wait_for(lambda: len(provider.calls("fcm")) - before > SENT // 6, seconds=60, what="the first calls")
        second = made.start("sender-normal", name="b")
        wait_for(second.is_ready, seconds=60, what="the second worker")
        wait_for(lambda: len(provider.calls("fcm")) - before > SENT // 2, seconds=60, what="half of the calls")
        second.kill()
        wait_for(lambda: sum(change.status == Status.SENT for change in changes(made, *sent)) >= SENT, seconds=120, what="every push sent")
        calls = provider.calls("fcm")[before:]
        assert SENT <= len(calls) <= SENT + 64  # what was open when one was killed is sent again
        # no lane lends its share: in a second what is late on its way may catch up, but never beyond the whole quota
        assert most_in(calls, seconds=1) <= PER_SECOND
        assert most_in(calls, seconds=5) <= 5 * PER_SECOND * SHARE * 1.05


def test_a_days_quota_is_kept_over_restarts_and_what_waits_spends_no_attempt(stack: Stack, tmp_path: Path, provider: Simulated) -> None:
    with paced(stack, tmp_path, provider, f"per_day={PER_DAY}") as made:
        made.start("sender-normal")
        made.await_ready(seconds=120)
        wait_until_the_day_is_young_enough()
        before = len(provider.calls("fcm"))
        sent = [a_push(f"day-{number}") for number in range(4 * PER_DAY)]
        give_keys(made, [each.user_id for each in sent])
        publish(made, topics.deliver(Channel.PUSH, Lane.NORMAL), sent)
        allowed = sum(daily_share(PER_DAY, SHARE, partition, PARTITIONS) for partition in range(PARTITIONS))
        wait_for(lambda: len(provider.calls("fcm")) - before == allowed, seconds=60, what="the calls of the day")
        made.stop(made.workers["sender-normal-a"])
        made.start("sender-normal")
        made.await_ready(seconds=120)
        last = a_push("day-last")
        give_keys(made, [last.user_id])
        publish(made, topics.deliver(Channel.PUSH, Lane.NORMAL), [last])
        sender = made.workers["sender-normal-a"]
        wait_for(lambda: sender.metric("notify_waiting_deliveries", channel="push") > 0, seconds=60, what="what waits shown")
        assert len(provider.calls("fcm")) - before == allowed
        begun = {change.delivery_id for change in changes(made, *sent, last) if change.attempt}
        assert len(begun) == allowed


def wait_until_the_day_is_young_enough() -> None:
    """Wait for the next day in the last minutes of one: the quota is of a UTC day."""
    wait_for(lambda: datetime.now(UTC).strftime("%H:%M") < "23:57", seconds=240, what="the next day")
