"""How each topic is called in a cluster and how it is kept. `notify topics ensure` makes what this table says."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from agents.receipts import REFERENCE_SECONDS
from schemas import topics
from schemas.topics import Channel, Lane, Tier

DAY_SECONDS = 86_400
# topics that have other services at one of their ends
SHARED = {
    topics.PAYMENTS: "payments.{env}.events",
    topics.INVENTORY: "inventory.{env}.events",
    topics.OUT_OF_STOCK: "inventory.{env}.out-of-stock",
}
INBOUND_MAX_BYTES = 1_048_588  # Kafka's default max.message.bytes, which the neighbours' topics have
DEAD_MAX_BYTES = INBOUND_MAX_BYTES + 65_536  # dead accepts whatever the inbound topics accept, with its headers


class Count(StrEnum):
    """Whose partition count a topic follows."""

    USER = "user"
    INBOUND = "inbound"  # the payments topic
    INVENTORY = "inventory"  # the inventory topic
    ONE = "one"  # a single partition: read whole by many

    @property
    def variable(self) -> str:
        """The setting that says how many."""
        return {
            Count.USER: "NOTIFY_PARTITIONS",
            Count.INBOUND: "NOTIFY_INBOUND_PARTITIONS",
            Count.INVENTORY: "NOTIFY_INVENTORY_PARTITIONS",
            Count.ONE: "always 1",
        }[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicSpec:
    """How a topic is kept. `name` as agents know it; `retention_seconds` None: compacted, kept for ever."""

    name: str
    count: Count = Count.USER
    retention_seconds: int | None = 14 * DAY_SECONDS
    max_message_bytes: int = INBOUND_MAX_BYTES
    schema: str | None = None  # message in it; None: bytes of others, or rows of a table
    forgets_seconds: int | None = None  # compacted topics: rows that nobody wrote again for so long go too

    @property
    def is_compacted(self) -> bool:
        """Say whether only the newest record of each key is kept."""
        return self.retention_seconds is None


def physical(env: str, name: str) -> str:
    """Return the name in the cluster: the neighbours' topics have their own form, ours begin with `notify.{env}`."""
    return SHARED[name].format(env=env) if name in SHARED else f"notify.{env}.{name}"


def specs() -> list[TopicSpec]:
    """Return the topics of the system that are no changelog of one step's table (`streams.topology.all_topics` adds those)."""
    return [
        TopicSpec(name=topics.PAYMENTS, count=Count.INBOUND),
        TopicSpec(name=topics.INVENTORY, count=Count.INVENTORY),
        TopicSpec(name=topics.OUT_OF_STOCK, count=Count.INVENTORY, schema="OutOfStock"),
        TopicSpec(name=topics.PRODUCTS, count=Count.INVENTORY, retention_seconds=None, schema="Product"),
        TopicSpec(name=topics.USER_ACTIONS, schema="UserAction"),
        TopicSpec(name=topics.PARKED, count=Count.INBOUND, max_message_bytes=DEAD_MAX_BYTES),
        TopicSpec(name=topics.STOCK, count=Count.INVENTORY, schema="StockLevel"),
        TopicSpec(name=topics.BROADCAST, schema="Broadcast"),
        TopicSpec(name=topics.WATCHES, retention_seconds=None, schema="Watch"),
        *(TopicSpec(name=topics.requests(lane), schema="NotificationRequested") for lane in Lane),
        TopicSpec(name=topics.COMMANDS, schema="Command"),
        TopicSpec(name=topics.PREFERENCES, retention_seconds=None, schema="UserPreferences"),
        TopicSpec(name=topics.CONTROL, count=Count.ONE, retention_seconds=None, schema="ControlEntry"),
        TopicSpec(name=topics.KEYS, retention_seconds=None, schema="UserKey"),
        TopicSpec(name=topics.DECISIONS, retention_seconds=90 * DAY_SECONDS, schema="DecisionRecord"),
        *(TopicSpec(name=topics.deliver(channel, lane), schema="Delivery") for channel in Channel for lane in Lane),
        TopicSpec(name=topics.STATUS, retention_seconds=90 * DAY_SECONDS, schema="StatusChange"),
        *(TopicSpec(name=topics.settled(lane), schema="StatusChange") for lane in Lane),
        *(TopicSpec(name=topics.retry(lane, tier), schema="Delivery") for lane in Lane for tier in Tier),
        TopicSpec(name=topics.SIGNALS, schema="EngagementSignal"),
        TopicSpec(name=topics.PROVIDER_REFS, retention_seconds=None, forgets_seconds=REFERENCE_SECONDS, schema="ProviderReference"),
        TopicSpec(name=topics.RECEIPTS, schema="DeliveryReport"),
        TopicSpec(name=topics.DEAD, retention_seconds=30 * DAY_SECONDS, max_message_bytes=DEAD_MAX_BYTES),
        # which dead letters were redriven, by their place in `dead`: `notify dlq redrive` does nothing twice
        TopicSpec(name=topics.REDRIVEN, count=Count.ONE, retention_seconds=None, forgets_seconds=30 * DAY_SECONDS),
    ]
