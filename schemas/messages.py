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
    sealed: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestData:
    """A request's data where it may hold personal data. Only ever sealed; goes before the request's plain `data`."""

    data: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class UserAction:
    """Something a user did that he may have to hear of."""

    action_id: str
    user_id: str
    action: str
    data: Mapping[str, str] = field(default_factory=dict)
    occurred_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class StockLevel:
    """An adjustment of a product's stock in one warehouse. `quantity` None: only the signed `adjustment` is known."""

    event_id: str
    product_id: str | None = None
    sku: str | None = None
    product_name: str | None = None
    warehouse_id: str
    quantity: int | None = None
    previous_quantity: int | None = None
    adjustment: int | None = None
    reason: str | None = None
    order_id: str | None = None
    correlation_id: str | None = None
    occurred_at: datetime
    accepted_at: datetime
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """What is to be known of a product. `low_stock_threshold` None: the default applies."""

    product_id: str
    name: str | None = None
    low_stock_threshold: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutOfStock:
    """A product ran out in a warehouse: an event for other services. `timestamp` is RFC 3339 text, as they expect it."""

    event_id: str
    event_type: str = "OutOfStock"
    timestamp: str
    product_id: str
    product_name: str | None = None
    sku: str | None = None
    warehouse_id: str | None = None
    previous_quantity: int | None = None
    current_quantity: int
    last_sold_order_id: str | None = None
    restock_estimate: str | None = None
    affected_pending_orders: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Broadcast:
    """Tell everyone in an audience. `cursor`: the user id up to which it was told; `expanded`: how many those were."""

    broadcast_id: str
    audience: str
    rule: str
    producer: str
    event_id: str
    data: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    subject_key: str | None = None
    cursor: str | None = None
    expanded: int = 0
    occurred_at: datetime
    accepted_at: datetime
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Somebody wants to hear of something: a user in an audience, such as product:prod_1129."""

    user_id: str
    audience: str
    since: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlEntry:
    """A standing order to every router and sender: a recall or a suppression. `agents.control` knows the scopes."""

    scope: str
    reason: str
    before: datetime | None = None
    issued_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderReference:
    """Whom a provider's report belongs to: the delivery and the attempt that the provider knows by `reference`.

    `is_unknown`: nobody knows whether the provider took the attempt over, so its sender waits for the report.
    """

    provider: str
    reference: str
    notification_id: str
    delivery_id: str
    user_id: str
    channel: str
    lane: str
    generation: int
    attempt: int
    at: datetime
    address_scope: str | None = None
    is_unknown: bool = False
    category: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryReport:
    """A provider's later word on a delivery. `status`: delivered, bounced, failed or expired.

    `suppresses`: a value of `schemas.status.Suppression` when the word is that nothing more may be sent to the address.
    """

    report_id: str
    provider: str
    reference: str
    status: str
    code: str | None = None
    at: datetime
    suppresses: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A change that a user, or somebody for him, asks for.

    `kind`: ensure_key; set_preferences; add_device: as set_preferences, and the devices come to those that he has;
    remove_device: they go, nothing else changes; watch or unwatch an `audience`; forget: destroy his key and all his rows.
    """

    command_id: str
    user_id: str
    kind: str
    sealed: bytes | None = None
    locale: str | None = None
    time_zone: str | None = None
    categories: Mapping[str, Mapping[str, bool]] | None = None
    expected_version: int | None = None
    issued_at: datetime
    audience: str | None = None


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
    """One notification on one channel, rendered and ready to send. `attempt` is the number of the next one, from 1.

    `route`: what of the address decides which providers can carry it: a number's country (DE), or a device's kind (apns,
    webpush/fcm.googleapis.com).
    """

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
    producer: str | None = None
    event_id: str | None = None
    not_before: datetime | None = None
    route: str | None = None


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
    category: str | None = None


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
    | RequestData
    | UserAction
    | StockLevel
    | Product
    | OutOfStock
    | Broadcast
    | Watch
    | ControlEntry
    | ProviderReference
    | DeliveryReport
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
