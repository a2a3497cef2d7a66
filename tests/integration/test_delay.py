"""Waits of retries on a real broker: never early, hardly late, and through kills and rebalances each exactly once."""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from confluent_kafka import Producer

from agents.retries import tier_for, wait_seconds
from agents.sender import Attempt, AttemptState
from schemas import topics
from schemas.ids import partition_of
from schemas.messages import Delivery, StatusChange
from schemas.topics import Channel, Lane, Tier
from streams.embedded.stack import Stack
from streams.transport.changelog import shared_key
from streams.transport.reader import MAX_HELD_RECORDS
from tests.deliveries import a_delivery, changes, codec_of, give_keys, let_mail_server, publish
from tests.harness import PARTITIONS, System, system, wait_for

TIERS = (1, 2, 4)
LATE_SECONDS = 1.0
ROUNDS = 3  # that nothing is late is said of an idle system: one of these finds it idle


@pytest.fixture
def delaying(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    variables = {"NOTIFY_RETRY_TIERS": ",".join(map(str, TIERS))}
    with system(stack, tmp_path_factory.mktemp("delay"), variables=variables) as made:
        try:
            yield made
        finally:
            let_mail_server(made, mode="none")


def publish_held(made: System, deliveries: list[Delivery], *, least: float, most: float) -> list[Delivery]:
    """Publish deliveries, each to the tier that its wait of `least` to `most` seconds calls for; return them as published."""
    dice = random.Random(len(deliveries))
    by_topic: dict[str, list[tuple[Delivery, float]]] = defaultdict(list)
    for delivery in deliveries:
        wait = dice.uniform(least, most)
        tier = tier_for(wait, TIERS)
        assert tier is not None
        by_topic[topics.retry(delivery.lane, tier)].append((delivery, wait))
    codec = codec_of(made, *by_topic)
    producer = Producer({"bootstrap.servers": made.stack.kafka, "partitioner": "murmur2_random", "linger.ms": 5})
    for topic in by_topic:
        producer.list_topics(made.topic(topic))  # or else the first record of each waits for it
    published: list[Delivery] = []
    for topic, each in by_topic.items():
        for delivery, wait in each:
            # as late as possible: in a sender the wait begins when the record is made
            held = replace(delivery, not_before=datetime.now(UTC) + timedelta(seconds=wait))
            producer.produce(made.topic(topic), codec.encode(held), held.user_id)
            published.append(held)
    assert producer.flush(30) == 0
    return published


def returned(made: System, *lanes: Lane) -> list[tuple[Delivery, float]]:
    """Return the deliveries that came back, each with when, in seconds since 1970."""
    return [
        (made.decode(record, Delivery), record.timestamp()[1] / 1000)
        for lane in lanes
        for record in made.read(topics.deliver(Channel.EMAIL, lane))
    ]


def retries(run: str, count: int) -> list[Delivery]:
    return [a_delivery(f"{run}-{n % 50}", f"{run}-{n}", lane=tuple(Lane)[n % len(Lane)], attempt=2) for n in range(count)]


def test_deliveries_return_in_their_lane_and_in_order_with_less_than_the_shortest_tier_left(delaying: System) -> None:
    delaying.await_ready(delaying.start("delay"), seconds=60)
    sent: list[Delivery] = []
    for number in range(ROUNDS):
        held = publish_held(delaying, retries(f"tiers-{number}", 600), least=1, most=12)
        sent += held
        wait_for(lambda: len(returned(delaying, *Lane)) >= len(sent), seconds=40, what="all returned")  # noqa: B023 - called at once
        found = returned(delaying, *Lane)
        assert Counter(each.delivery_id for each, _ in found) == Counter(each.delivery_id for each in sent)
        lane_of = {each.delivery_id: each.lane for each in sent}
        assert all(each.lane == lane_of[each.delivery_id] for each, _ in found)
        now_held = {each.delivery_id for each in held}
        left = [each.not_before.timestamp() - at for each, at in found if each.not_before is not None and each.delivery_id in now_held]
        print(f"\ndelay: {len(left)} held in tiers of {TIERS} s: returned {min(left):.3f} to {max(left):.3f} s before their time")
        assert max(left) < TIERS[0] + 0.002, "the sender holds less than the shortest tier; moments have whole milliseconds"
        if min(left) > -LATE_SECONDS:
            break
    else:
        pytest.fail(f"late by {-min(left):.1f} s in the last of {ROUNDS} rounds")
    # of one tier what went in first comes out first
    same = [
        a_delivery(f"order-{n % 8}", f"order-{n}", attempt=2, not_before=datetime.now(UTC) + timedelta(seconds=1.5)) for n in range(200)
    ]
    publish(delaying, topics.retry(Lane.NORMAL, Tier.SHORT), same)
    wait_for(lambda: len(returned(delaying, Lane.NORMAL)) >= len(sent) // 3 + 200, seconds=20, what="those of one tier returned")
    came = [each.delivery_id for each, _ in returned(delaying, Lane.NORMAL)]
    for partition in range(PARTITIONS):
        mine = [each.delivery_id for each in same if partition_of(each.user_id.encode(), PARTITIONS) == partition]
        assert [each for each in came if each in set(mine)] == mine


def test_more_than_a_worker_takes_in_at_once_returns_in_order_and_once(delaying: System) -> None:
    worker = delaying.start("delay")
    delaying.await_ready(worker, seconds=60)
    user = next(f"many-{n}" for n in itertools.count() if partition_of(f"many-{n}".encode(), PARTITIONS) == 0)
    sent = publish_held(delaying, [a_delivery(user, f"many-{n}", attempt=2) for n in range(3 * MAX_HELD_RECORDS)], least=4, most=4.5)
    wait_for(lambda: delaying.count(topics.deliver(Channel.EMAIL, Lane.NORMAL)) >= len(sent), seconds=60, what="all returned")
    found = returned(delaying, Lane.NORMAL)
    assert [each.delivery_id for each, _ in found] == [each.delivery_id for each in sent], "in their order"
    late = [at - each.not_before.timestamp() for each, at in found if each.not_before is not None]
    print(f"\ndelay: {len(found)} of one partition, {MAX_HELD_RECORDS} at a time: {max(late):.3f} s after their time at most")


def test_after_a_standstill_only_the_wait_that_is_left_counts_and_random_bytes_among_them_harm_nobody(delaying: System) -> None:
    dice = random.Random(12)
    noise = [dice.randbytes(dice.randrange(1, 100)) for _ in range(50)]
    delaying.produce(topics.retry(Lane.NORMAL, Tier.LONG), [(b"still-%d" % (n % 20), value) for n, value in enumerate(noise)])
    long_due = [a_delivery(f"still-{n}", f"still-{n}", attempt=2, not_before=datetime.now(UTC) - timedelta(seconds=60)) for n in range(20)]
    publish(delaying, topics.retry(Lane.NORMAL, Tier.LONG), long_due)
    began = datetime.now(UTC)
    worker = delaying.start("delay")
    delaying.await_ready(worker, seconds=60)
    wait_for(lambda: len(returned(delaying, Lane.NORMAL)) == 20, seconds=20, what="all returned")
    assert max(at for _, at in returned(delaying, Lane.NORMAL)) < began.timestamp() + 20
    assert Counter(record.value() for record in delaying.read(topics.DEAD)) == Counter(noise), "as they came"
    assert worker.get("/health/live")[0] == 200


def test_a_kill_and_a_rebalance_of_delay_workers_lose_and_double_nothing(delaying: System) -> None:
    first, second = delaying.start("delay", name="a"), delaying.start("delay", name="b")
    delaying.await_ready(first, second, seconds=90)
    sent = publish_held(delaying, retries("kill", 2_000), least=1, most=15)
    wait_for(lambda: len(returned(delaying, *Lane)) >= 200, seconds=30, what="some returned")
    first.kill()
    wait_for(lambda: len(returned(delaying, *Lane)) >= 800, seconds=60, what="more returned")
    delaying.stop(second)
    wait_for(lambda: len(returned(delaying, *Lane)) >= len(sent), seconds=90, what="all returned")
    counts = Counter(each.delivery_id for each, _ in returned(delaying, *Lane))
    doubled = counts.total() - len(counts)
    print(f"\ndelay: {len(sent)} held, one worker killed, one stopped: lost {len(sent) - len(counts)}, doubled {doubled}")
    assert set(counts) == {each.delivery_id for each in sent}
    assert doubled == 0
    assert first.exits
    assert not delaying.read(topics.DEAD)


def refused(number: int) -> list[Delivery]:
    return [
        a_delivery(
            f"late-{n}",
            f"late-{number}-{n}",
            address=f"refuse-451-{n}@example.com",
            lane=Lane.CRITICAL,
            category="security",
            lasts_seconds=22,
        )
        for n in range(12)
    ]


def lateness_of(found: list[StatusChange], delivery: Delivery) -> list[float]:
    """Return by how many seconds each retry of a delivery began after its time."""
    late: list[float] = []
    for retrying, sending in zip(found[1::2], found[2::2], strict=False):
        wait = wait_seconds(delivery.delivery_id, category="security", lane=Lane.CRITICAL, generation=0, failures=retrying.attempt - 1)
        assert wait is not None
        assert sending.attempt == retrying.attempt + 1
        late.append((sending.at - retrying.at).total_seconds() - wait)
    return late


def test_a_refused_delivery_is_tried_as_scheduled_on_time_and_expires_with_the_servers_code(delaying: System) -> None:
    give_keys(delaying, [each.user_id for each in refused(0)])
    delaying.start("delay")
    sender = delaying.start("sender-critical")
    delaying.await_ready(seconds=90)
    # the first mail of a process takes longer than the others
    warm = a_delivery("late-0", "warm", lane=Lane.CRITICAL)
    publish(delaying, topics.deliver(Channel.EMAIL, Lane.CRITICAL), [warm])
    wait_for(lambda: delaying.mails()[warm.delivery_id], seconds=30, what="a first mail")
    for number in range(ROUNDS):
        sent = refused(number)
        publish(delaying, topics.deliver(Channel.EMAIL, Lane.CRITICAL), sent)
        wait_for(lambda: sum(c.status == "expired" for c in changes(delaying, *sent)) == len(sent), seconds=60, what="all expired")  # noqa: B023 - called at once
        lateness: list[float] = []
        for delivery in sent:
            found = sorted(changes(delaying, delivery), key=lambda change: (change.attempt, change.at))
            assert [c.status for c in found] == ["sending", "retrying"] * (len(found) // 2 - 1) + ["sending", "expired"]
            assert found[-1].reason is not None
            assert found[-1].reason.startswith("no_time_left: 451")
            lateness += lateness_of(found, delivery)
        print(f"\ndelay: {len(lateness)} retries began {min(lateness) * 1000:.0f} to {max(lateness) * 1000:.0f} ms after their time")
        assert min(lateness) > -0.005, "moments have whole milliseconds"
        if max(lateness) < LATE_SECONDS:
            assert len(lateness) >= 3 * len(sent), "1, 2 and 4 s later, at least"
            break
    else:
        pytest.fail(f"late by {max(lateness):.1f} s in the last of {ROUNDS} rounds")
    through = {tier: delaying.count(topics.retry(Lane.CRITICAL, tier)) for tier in Tier}
    print(f"delay: records in tiers: {through}")
    assert all(through.values())
    assert sender.metric("notify_suppressed_total") == 0


def test_after_the_last_attempt_a_delivery_has_failed_and_is_a_dead_letter_as_it_was_read(delaying: System) -> None:
    user = "last"
    give_keys(delaying, [user])
    delivery = a_delivery(user, "last", address="refuse-452@example.com", attempt=8)
    ledger = Attempt(generation=0, number=7, state=AttemptState.DELAYED, failures=7, at_ms=round(datetime.now(UTC).timestamp() * 1000))
    partition = partition_of(user.encode(), PARTITIONS)
    key = shared_key("attempts", delivery.delivery_id.encode())
    delaying.produce_to("sender-normal.send.changelog", partition, [(key, ledger.row())])
    delaying.await_ready(delaying.start("sender-normal"), seconds=60)
    copy = a_delivery(user, "last", address="refuse-452@example.com", attempt=7)
    publish(delaying, topics.deliver(Channel.EMAIL, Lane.NORMAL), [copy, delivery, delivery])
    wait_for(lambda: [c for c in changes(delaying, delivery) if c.status == "failed"], seconds=30, what="its end")
    letter = wait_for(lambda: delaying.read(topics.DEAD), seconds=10, what="its dead letter")[0]
    raw = [record.value() for record in delaying.read(topics.deliver(Channel.EMAIL, Lane.NORMAL))]
    assert letter.value() == raw[1]
    headers = dict(letter.headers() or ())
    assert (headers["error"], headers["topic"]) == (b"attempts_exhausted", b"deliver.email.normal")
    listed = [delaying.notify("dlq", "list", "--provider", provider, "--json").stdout.splitlines() for provider in ("smtp", "other")]
    assert [len(lines) for lines in listed] == [1, 0], "dead letters are found by the provider at whom they ended"
    found = changes(delaying, delivery)
    assert [(c.status, c.attempt) for c in found] == [("sending", 8), ("failed", 8)], "the copies began nothing"
    assert found[-1].reason == "attempts_exhausted: 452 4.2.2"
    suppressed = delaying.workers["sender-normal-a"]
    wait_for(lambda: suppressed.metric("notify_suppressed_total") == 2, seconds=10, what="both copies counted")


def test_rows_of_the_ledger_that_are_past_the_window_go_faster_than_new_ones_come(delaying: System) -> None:
    user, count = "pruned", 500
    give_keys(delaying, [user])
    long_ago = round((datetime.now(UTC) - timedelta(days=8)).timestamp() * 1000)
    row = Attempt(generation=0, number=1, state=AttemptState.DONE, failures=0, at_ms=long_ago)
    old = [(shared_key("attempts", f"old-{n}".encode()), row.row()) for n in range(count)]
    waits = b"email-waits"  # in front of all, and not over
    old.insert(0, (shared_key("attempts", waits), replace(row, state=AttemptState.WAITING).row()))
    delaying.produce_to("sender-normal.send.changelog", partition_of(user.encode(), PARTITIONS), old)
    delaying.await_ready(delaying.start("sender-normal"), seconds=60)
    # nobody is called for these: hundreds are recorded in a transaction
    sent = [a_delivery(user, f"pruned-{n}", channel=Channel.IN_APP) for n in range(count)]
    publish(delaying, topics.deliver(Channel.IN_APP, Lane.NORMAL), sent)
    wait_for(lambda: sum(c.status == "delivered" for c in changes(delaying, *sent)) == count, seconds=30, what="each delivered")
    assert set(delaying.table("sender-normal.send", "attempts")) == {waits, *(each.delivery_id.encode() for each in sent)}


def test_kills_of_delay_and_sender_amid_refusals_lose_nothing_and_begin_no_attempt_twice(delaying: System) -> None:
    total = 300
    users = [f"flap-{n}" for n in range(total)]
    give_keys(delaying, users)
    delay, sender = delaying.start("delay"), delaying.start("sender-critical")
    delaying.await_ready(seconds=90)
    sent = [a_delivery(user, user, lane=Lane.CRITICAL, category="security", lasts_seconds=600) for user in users]
    let_mail_server(delaying, mode="refuse", code=451)
    publish(delaying, topics.deliver(Channel.EMAIL, Lane.CRITICAL), sent)

    def retrying() -> int:
        return len({(c.delivery_id, c.attempt) for c in changes(delaying, *sent) if c.status == "retrying"})

    wait_for(lambda: retrying() >= total, seconds=30, what="each refused once")
    delay.kill()
    wait_for(lambda: retrying() >= 2 * total, seconds=60, what="each refused twice")
    sender.kill()
    wait_for(lambda: retrying() >= 3 * total, seconds=60, what="each refused three times")
    let_mail_server(delaying, mode="none")
    wait_for(lambda: sum(m in delaying.mails() for m in (d.delivery_id for d in sent)) == total, seconds=120, what="a mail for each")
    wait_for(
        lambda: len({c.delivery_id for c in changes(delaying, *sent) if c.status == "sent"}) == total,
        seconds=60,
        what="each recorded as sent",
    )
    mails = delaying.mails()
    doubled = sum(mails[each.delivery_id] for each in sent) - total
    begun = Counter((c.delivery_id, c.attempt) for c in changes(delaying, *sent) if c.status == "sending")
    twice = sum(count - 1 for count in begun.values())
    print(
        f"\ndelay: {total} refused and tried again, delay and sender killed: lost 0, mails doubled {doubled}, attempts begun twice {twice}"
    )
    assert twice == 0
    assert doubled == 0, "the sender was killed while every mail was refused"
    assert (len(delay.exits), len(sender.exits)) == (1, 1)
    assert not delaying.read(topics.DEAD)


def test_an_outage_spends_no_attempt_of_a_schedule(delaying: System) -> None:
    user = "patient"
    give_keys(delaying, [user])
    delaying.await_ready(delaying.start("sender-critical"), seconds=60)
    let_mail_server(delaying, mode="unreachable")
    delivery = a_delivery(user, user, lane=Lane.CRITICAL, category="security")
    publish(delaying, topics.deliver(Channel.EMAIL, Lane.CRITICAL), [delivery])
    wait_for(lambda: sum(c.status == "retrying" for c in changes(delaying, delivery)) >= 4, seconds=40, what="four probes")
    let_mail_server(delaying, mode="none")
    wait_for(lambda: delaying.mails()[delivery.delivery_id], seconds=40, what="the mail after the outage")
    row = wait_for(
        lambda: [
            attempt
            for value in delaying.table("sender-critical.send", "attempts").values()
            if (attempt := Attempt.of(value)).state is AttemptState.DONE
        ],
        seconds=10,
        what="its row",
    )[0]
    assert (row.failures, row.number >= 5) == (0, True)
    assert sum(delaying.count(topics.retry(Lane.CRITICAL, tier)) for tier in Tier) == 0


def test_a_delivery_that_comes_too_early_is_held_through_delay_without_an_attempt(delaying: System) -> None:
    user = "early"
    give_keys(delaying, [user])
    delaying.start("delay")
    delaying.start("sender-normal")
    delaying.await_ready(seconds=90)
    until = datetime.now(UTC) + timedelta(seconds=6.5)
    delivery = a_delivery(user, user, not_before=until)
    publish(delaying, topics.deliver(Channel.EMAIL, Lane.NORMAL), [delivery])
    wait_for(lambda: [c for c in changes(delaying, delivery) if c.status == "sent"], seconds=30, what="sent")
    found = changes(delaying, delivery)
    assert [(c.status, c.attempt) for c in found] == [("sending", 1), ("sent", 1)]
    assert -0.005 < (found[0].at - until).total_seconds() < LATE_SECONDS
    assert sum(delaying.count(topics.retry(Lane.NORMAL, tier)) for tier in Tier) == 2, "4 and 2 s; the rest in the sender"
