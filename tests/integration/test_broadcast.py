"""Telling a large audience: expanded by the owners of the users' partitions, in chunks, through a crash."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin._listoffsets import OffsetSpec

from schemas import topics
from schemas.codec import unpack
from schemas.ids import partition_of
from schemas.messages import NotificationRequested, StockLevel, Watch
from schemas.messages import Origin as Place
from streams.cli.wire import Wire
from streams.embedded.stack import Stack
from streams.topics import specs
from streams.transport.admin import learn_leaders
from tests.harness import System, system, wait_for

PRODUCT = "prod_1129"


def load_watchers(made: System, count: int) -> list[str]:
    """Write what the router would have accepted: rows of its compacted topic, each on its user's partition."""
    users = [f"watcher-{number}" for number in range(count)]
    audience, now = f"product:{PRODUCT}", datetime.now(UTC)
    with Wire(made.settings) as wire:
        codec = wire.codec([spec for spec in specs() if spec.name == topics.WATCHES])
    by_partition: dict[int, list[tuple[bytes, bytes]]] = {number: [] for number in range(made.partitions)}
    for user in users:
        row = codec.encode(Watch(user_id=user, audience=audience, since=now))
        by_partition[partition_of(user.encode(), made.partitions)].append((f"{audience}\0{user}".encode(), row))
    for partition, rows in by_partition.items():
        made.produce_to(topics.WATCHES, partition, rows)
    return users


def restocked(made: System, event_id: str) -> None:
    """Publish that the product is back in stock, as ingest would."""
    now = datetime.now(UTC)
    level = StockLevel(
        event_id=event_id,
        product_id=PRODUCT,
        warehouse_id="wh_east_01",
        quantity=200,
        previous_quantity=0,
        occurred_at=now,
        accepted_at=now,
        origin=Place(topic=topics.INVENTORY, partition=0, offset=0),
    )
    with Wire(made.settings) as wire:
        codec = wire.codec([spec for spec in specs() if spec.name == topics.STOCK])
    made.produce(topics.STOCK, [(PRODUCT.encode(), codec.encode(level))])


def ends(made: System, topic: str) -> int:
    """Return how far a topic was written, its commit markers included."""
    wanted = {TopicPartition(made.topic(topic), number): OffsetSpec.latest() for number in range(made.partitions)}  # type: ignore[no-untyped-call]  # upstream has no types here
    learn_leaders(made.admin, [made.topic(topic)])
    return sum(found.result().offset for found in made.admin.list_offsets(wanted).values())


@pytest.mark.parametrize("watchers", [40_000, pytest.param(200_000, marks=pytest.mark.soak)])
def test_watchers_are_told_once_each_although_the_router_is_killed_in_the_middle(stack: Stack, tmp_path: Path, watchers: int) -> None:
    with system(stack, tmp_path) as made:
        users = load_watchers(made, watchers)
        router, stock = made.start("router"), made.start("stock")
        made.await_ready(seconds=90)
        restocked(made, "evt-back")
        wait_for(lambda: ends(made, "requests.bulk") > watchers // 5, seconds=60, what="a part of the watchers told")
        router.kill()
        wait_for(lambda: router.exits, seconds=30, what="the router gone")
        assert ends(made, "requests.bulk") < watchers, "the router was done before it was killed"
        made.await_ready(router)

        def told() -> Counter[str] | None:
            """Return how often each was told, once every request that there will be is committed."""
            if ends(made, "requests.bulk") < watchers:
                return None
            records = made.read("requests.bulk")
            if len(records) < watchers:
                return None
            return Counter(unpack((record.value() or b"")[5:], NotificationRequested).user_id for record in records)

        found = wait_for(told, seconds=120, what="every watcher told")
        made.stop(stock)
        print(f"\nwatchers={len(users):,} told={len(found):,} twice={sum(n > 1 for n in found.values())} exits={router.exits}")
        assert found == Counter(users)
