"""The messages of our own topics as frozen dataclasses, one per file in `schemas/avro`.

A field here is the Avro field in snake case; `schemas.codec` refuses to start when the two differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a record was read."""

    topic: str
    partition: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NotificationRequested:
    """Somebody is to be told something."""

    event_id: str
    producer: str
    rule: str
    user_id: str
    data: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    subject_key: str | None = None
    is_final: bool = False
    occurred_at: datetime
    accepted_at: datetime | None = None
    origin: Origin | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A change that a user, or somebody for him, asks for. `kind`: ensure_key or set_preferences."""

    command_id: str
    user_id: str
    kind: str
    sealed: bytes | None = None
    locale: str | None = None
    time_zone: str | None = None
    categories: Mapping[str, Mapping[str, bool]] | None = None
    expected_version: int | None = None
    issued_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class UserPreferences:
    """What the router last accepted of a user's preferences. `version` counts from 1."""

    user_id: str
    version: int
    sealed: bytes | None = None
    locale: str | None = None
    time_zone: str | None = None
    categories: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    updated_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Contact:
    """How a user is reached. Personal data: only ever sealed on the wire."""

    name: str | None = None
    email: str | None = None
    phone: str | None = None
    devices: list[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UserKey:
    """A user's encryption key, wrapped with the deployment's seal key."""

    user_id: str
    wrapped: bytes
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelChoice:
    """A channel that a decision chose or rejected, and why."""

    channel: str
    is_chosen: bool
    reason: str
    delivery_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionRecord:
    """What the router decided on one request, and on what grounds."""

    decision_id: str
    notification_id: str
    user_id: str
    outcome: str
    reason: str | None = None
    rule: str
    rule_version: str
    category: str
    lane: str
    type: str
    event_id: str
    producer: str
    origin: Origin | None = None
    request: Origin
    occurred_at: datetime
    accepted_at: datetime
    decided_at: datetime
    preference_version: int
    template_version: str | None = None
    channels: list[ChannelChoice]
    limiter: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    sealed: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """A notification's title and message. Only ever sealed."""

    title: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One notification on one channel, rendered and ready to send. `attempt` is the number of the next one, from 1."""

    delivery_id: str
    notification_id: str
    user_id: str
    channel: str
    lane: str
    rule: str
    category: str
    generation: int
    attempt: int
    sealed: bytes
    accepted_at: datetime
    created_at: datetime
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """An address and what is sent to it. Personal data: only ever sealed on the wire."""

    address: str
    name: str | None = None
    subject: str | None = None
    text: str | None = None
    html: str | None = None
    title: str | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusChange:
    """A step of a delivery (axis `delivery`) or of a notification's engagement (axis `engagement`)."""

    notification_id: str
    delivery_id: str | None = None
    user_id: str
    axis: str
    status: str
    reason: str | None = None
    channel: str | None = None
    lane: str | None = None
    provider: str | None = None
    reference: str | None = None
    generation: int = 0
    attempt: int = 0
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class EngagementSignal:
    """What a recipient did with a notification."""

    signal_id: str
    notification_id: str
    user_id: str
    engagement: str
    at: datetime


Message = (
    NotificationRequested
    | Command
    | UserPreferences
    | Contact
    | UserKey
    | DecisionRecord
    | Headline
    | Delivery
    | Content
    | StatusChange
    | EngagementSignal
)
