"""Three brokers, replication 3: one is killed and comes back, another is lost for good, under load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial

import pytest

from schemas import topics
from schemas.messages import DecisionRecord, Delivery, NotificationRequested, StatusChange
from schemas.topics import Channel, Lane, deliver, requests
from streams.embedded.processes import LOOPBACK
from streams.embedded.stack import Stack
from streams.outside import FOLLOWERS
from streams.roles import Role
from streams.topology import all_topics, steps_of
from streams.transport.cluster import Cluster
from tests.harness import System, system, wait_for
from tests.integration.test_guarantees import identity, inbox_of, mailing, of_run, payment
from tests.secure_kafka import CompanyBroker, Loop, three_brokers

ROLES = (Role.INGEST, Role.ROUTER, Role.SENDER_NORMAL, Role.VIEWS)
TOTAL, PART = 1_200, 420
USERS = [f"spread-{i}" for i in range(100)]
RUN = "brokers"
BOUND = 2 * 32  # calls that the sender has open at once, for each of the two brokers that it loses


@pytest.fixture(scope="module")
def company(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Loop, list[CompanyBroker]]]:
    with three_brokers(tmp_path_factory.mktemp("brokers")) as made:
        yield made


@pytest.fixture(scope="module")
def running(stack: Stack, company: tuple[Loop, list[CompanyBroker]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    _, brokers = company
    cluster = Cluster(bootstrap=",".join(f"{LOOPBACK}:{broker.port}" for broker in brokers))
    used = {topics.DEAD, *FOLLOWERS, *(topic for role in ROLES for step in steps_of(role) for topic in (*step.reads, *step.writes))}
    used |= {topic for role in ROLES for step in steps_of(role) for topic in step.changelogs().values()}
    specs = [spec for spec in all_topics() if spec.name in used]
    variables = {"NOTIFY_REPLICATION": "3"}
    with system(stack, tmp_path_factory.mktemp("spread"), specs, partitions=2, cluster=cluster, variables=variables) as made:
        for role in ROLES:
            made.start(role)
        made.await_ready(seconds=120)
        yield made


def leader(made: System, topic: str) -> int:
    """Return the number of the broker that leads partition 0."""
    name = made.topic(topic)
    return int(made.admin.list_topics(name, timeout=10).topics[name].partitions[0].leader)


def behind(made: System) -> int:
    """Return how many partitions have fewer than three replicas in sync."""
    found = made.admin.list_topics(timeout=10).topics.values()
    return sum(len(partition.isrs) < 3 for topic in found for partition in topic.partitions.values())


def test_a_leader_that_is_killed_and_a_broker_that_is_lost_cost_nothing(running: System, company: tuple[Loop, list[CompanyBroker]]) -> None:
    loop, brokers = company
    running.load_preferences(mailing(USERS))
    framed = running.frame_payments(payment(i, USERS[i % len(USERS)], run=RUN) for i in range(TOTAL))
    wanted = {identity(RUN, i, USERS[i % len(USERS)]) for i in range(TOTAL)}
    router = running.workers["router-a"]

    def decided(least: int) -> None:
        wait_for(lambda: router.metric("notify_decisions_total") >= least, seconds=60, what=f"{least} decisions")

    running.produce("payments", framed[:PART])
    decided(PART // 4)
    killed = leader(running, requests(Lane.NORMAL))
    loop.run(brokers[killed - 1].kill())
    running.produce("payments", framed[PART : 2 * PART])
    wait_for(lambda: leader(running, requests(Lane.NORMAL)) != killed, seconds=30, what="another leader")
    wait_for(lambda: sent(running, wanted).total() >= PART + PART // 4, seconds=90, what="sending goes on with two brokers")
    loop.run(brokers[killed - 1].start())
    wait_for(lambda: behind(running) == 0, seconds=60, what="three replicas in sync again")

    running.produce("payments", framed[2 * PART : 2 * PART + PART // 2])
    lost = next(number for number in (1, 2, 3) if number not in {killed, leader(running, topics.STATUS)})
    loop.run(brokers[lost - 1].kill())
    running.produce("payments", framed[2 * PART + PART // 2 :])

    wait_for(lambda: len(sent(running, wanted)) == TOTAL, seconds=120, what="every mail")
    ended = partial(of_run, running, "status", StatusChange, wanted)
    wait_for(
        lambda: len({change.delivery_id for change in ended() if change.status in {"sent", "delivered"}}) == 2 * TOTAL,
        seconds=60,
        what="every delivery done",
    )
    wait_for(lambda: all(len(inbox_of(running, user)) == TOTAL // len(USERS) for user in USERS[:10]), seconds=60, what="inboxes complete")
    requested = running.messages(requests(Lane.NORMAL), NotificationRequested)
    once = {
        "requests": Counter(request.event_id for request in requested if request.event_id.startswith(f"payment:{RUN}-pay")),
        "decisions": Counter(record.notification_id for record in of_run(running, "decisions", DecisionRecord, wanted)),
        "deliver.email": Counter(d.delivery_id for d in of_run(running, deliver(Channel.EMAIL, Lane.NORMAL), Delivery, wanted)),
        "deliver.in_app": Counter(d.delivery_id for d in of_run(running, deliver(Channel.IN_APP, Lane.NORMAL), Delivery, wanted)),
        "status queued": Counter(change.delivery_id for change in ended() if change.status == "queued"),
    }
    doubled = sent(running, wanted).total() - TOTAL
    left = {name: worker.exits for name, worker in running.workers.items() if worker.exits}
    print(f"\nbrokers: killed {killed} (came back) and {lost} (for good); lost 0 of {TOTAL}; mails doubled {doubled}")
    print(f"brokers: workers that left and were started again: {left or 'none'}")
    for what, ids in once.items():
        expected = 2 * TOTAL if what == "status queued" else TOTAL
        print(f"brokers: {what}: {len(ids)} ids, {ids.total() - len(ids)} doubled")
        assert (len(ids), ids.total()) == (expected, expected), what
    assert doubled <= BOUND
    assert running.count(topics.DEAD) == 0


def sent(made: System, wanted: set[str]) -> Counter[str]:
    return Counter({found: n for found, n in made.mails().items() if found.removesuffix("-email") in wanted})
