"""How each topic is called in a cluster and how it is kept. `notify topics ensure` makes what this table says."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from schemas import topics
from schemas.topics import Channel, Lane

DAY_SECONDS = 86_400
INBOUND_MAX_BYTES = 1_048_588  # Kafka's default max.message.bytes, which the neighbours' topics have
DEAD_MAX_BYTES = INBOUND_MAX_BYTES + 65_536  # dead accepts whatever the inbound topics accept, with its headers


class Count(StrEnum):
    """Whose partition count a topic follows."""

    USER = "user"
    INBOUND = "inbound"


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicSpec:
    """How a topic is kept. `name` as agents know it; `retention_seconds` None: compacted, kept for ever."""

    name: str
    count: Count = Count.USER
    retention_seconds: int | None = 14 * DAY_SECONDS
    max_message_bytes: int = INBOUND_MAX_BYTES
    schema: str | None = None  # message in it; None: bytes of others, or rows of a table

    @property
    def is_compacted(self) -> bool:
        """Say whether only the newest record of each key is kept."""
        return self.retention_seconds is None


def physical(env: str, name: str) -> str:
    """Return the name in the cluster: the neighbours' topics have their own form, ours begin with `notify.{env}`."""
    return f"payments.{env}.events" if name == topics.PAYMENTS else f"notify.{env}.{name}"


def specs() -> list[TopicSpec]:
    """Return the topics of the system that are no changelog of one step's table (`streams.topology.all_topics` adds those)."""
    return [
        TopicSpec(name=topics.PAYMENTS, count=Count.INBOUND),
        TopicSpec(name=topics.PARKED, count=Count.INBOUND, max_message_bytes=DEAD_MAX_BYTES),
        *(TopicSpec(name=topics.requests(lane), schema="NotificationRequested") for lane in Lane),
        TopicSpec(name=topics.COMMANDS, schema="Command"),
        TopicSpec(name=topics.PREFERENCES, retention_seconds=None, schema="UserPreferences"),
        TopicSpec(name=topics.KEYS, retention_seconds=None, schema="UserKey"),
        TopicSpec(name=topics.DECISIONS, retention_seconds=90 * DAY_SECONDS, schema="DecisionRecord"),
        *(TopicSpec(name=topics.deliver(channel, lane), schema="Delivery") for channel in Channel for lane in Lane),
        TopicSpec(name=topics.STATUS, retention_seconds=90 * DAY_SECONDS, schema="StatusChange"),
        TopicSpec(name=topics.SIGNALS, schema="EngagementSignal"),
        TopicSpec(name=topics.DEAD, retention_seconds=30 * DAY_SECONDS, max_message_bytes=DEAD_MAX_BYTES),
    ]
