"""Which news becomes which notification: the rules, and the request that an event turns into.

A rule is looked up by the name in NotificationRequested. Other services may ask for any rule; payments ask through here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType

from agents import normalise
from agents.normalise import PaymentEvent, PaymentStatus
from agents.ports import BY_KEY, Effects, Output, Source, State, origin_of
from schemas import topics
from schemas.errors import InvalidEventError, UnroutableError
from schemas.messages import NotificationRequested, StockLevel, UserAction
from schemas.topics import Channel, Lane

PAYMENTS_PRODUCER = "payments"
INVENTORY_PRODUCER = "inventory"
ACTIONS_PRODUCER = "user-actions"
# a request that no rule is known for, so that the decision says so; its data tells under EVENT what happened
NO_RULE = ""
EVENT = "event"

_MINUTE_SECONDS = 60

_HOUR_SECONDS = 3_600
_DAY_SECONDS = 24 * _HOUR_SECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How an event type becomes notifications. Raise `version` with every change: decisions record it."""

    name: str
    version: str
    category: str  # the unit of preferences
    type: str  # what GetNotificationDetails shows
    lane: Lane
    channels: tuple[Channel, ...]  # those it may use, in the order in which they are tried
    defaults: frozenset[Channel]  # those that are on for a user who chose nothing; the same for all rules of a category
    template: str
    max_age_seconds: int  # older than this, by Kafka timestamp, it is no news any more


_BOTH = (Channel.IN_APP, Channel.EMAIL)
_WITH_PUSH = (*_BOTH, Channel.PUSH)
_ALL = (*_WITH_PUSH, Channel.SMS)
# a text message costs money and interrupts: only who asked for it gets it, except to get back into an account
_USUAL = frozenset(_WITH_PUSH)
_SECURITY = _USUAL | {Channel.SMS}

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        rule.name: rule
        for rule in (
            Rule(
                name="payment_confirmed",
                version="1",
                category="payments",
                type="payment",
                lane=Lane.NORMAL,
                channels=_BOTH,
                defaults=_USUAL,
                template="payment_confirmed",
                max_age_seconds=3 * _DAY_SECONDS,
            ),
            Rule(
                name="payment_failed",
                version="2",
                category="payments",
                type="payment",
                lane=Lane.CRITICAL,  # the user has to act, and soon
                channels=_ALL,
                defaults=_USUAL,
                template="payment_failed",
                max_age_seconds=3 * _DAY_SECONDS,
            ),
            Rule(
                name="payment_pending",
                version="1",
                category="payments",
                type="payment",
                lane=Lane.NORMAL,
                channels=(Channel.IN_APP,),  # nothing to do yet: not worth a mail
                defaults=_USUAL,
                template="payment_pending",
                max_age_seconds=6 * _HOUR_SECONDS,  # what comes of it is the news
            ),
            # to the staff who watch the warehouse
            Rule(
                name="out_of_stock",
                version="2",
                category="inventory",
                type="inventory",
                lane=Lane.CRITICAL,
                channels=_ALL,
                defaults=_USUAL,
                template="out_of_stock",
                max_age_seconds=_DAY_SECONDS,
            ),
            Rule(
                name="low_stock",
                version="1",
                category="inventory",
                type="inventory",
                lane=Lane.NORMAL,
                channels=_BOTH,
                defaults=_USUAL,
                template="low_stock",
                max_age_seconds=_DAY_SECONDS,
            ),
            # to the users who watch the product
            Rule(
                name="back_in_stock",
                version="2",
                category="watches",
                type="product",
                lane=Lane.BULK,
                channels=_WITH_PUSH,
                defaults=_USUAL,
                template="back_in_stock",
                max_age_seconds=2 * _DAY_SECONDS,
            ),
            Rule(
                name="password_reset",
                version="2",
                category="security",
                type="account",
                lane=Lane.CRITICAL,  # the user sits and waits for it
                channels=(Channel.EMAIL, Channel.SMS),  # who cannot sign in has no inbox
                defaults=_SECURITY,
                template="password_reset",
                max_age_seconds=15 * _MINUTE_SECONDS,
            ),
            Rule(
                name="new_sign_in",
                version="2",
                category="security",
                type="account",
                lane=Lane.NORMAL,
                channels=_WITH_PUSH,
                defaults=_SECURITY,
                template="new_sign_in",
                max_age_seconds=_DAY_SECONDS,
            ),
            # from another service or from support: data holds `title` and `message`
            Rule(
                name="message",
                version="2",
                category="messages",
                type="message",
                lane=Lane.NORMAL,
                channels=_ALL,
                defaults=_USUAL,
                template="message",
                max_age_seconds=3 * _DAY_SECONDS,
            ),
        )
    }
)

# action -> its rule, and the keys that its templates name
_RULE_OF_ACTION = {
    "password_reset_requested": (RULES["password_reset"], ("code", "expiresInMinutes", "requestedFrom")),
    "signed_in": (RULES["new_sign_in"], ("device", "location")),
}

_RULE_OF_STATUS = {
    PaymentStatus.CONFIRMED: RULES["payment_confirmed"],
    PaymentStatus.PENDING: RULES["payment_pending"],
    PaymentStatus.FAILED: RULES["payment_failed"],
}


def ingest(topic: str, record: Mapping[str, object], source: Source, raw: bytes) -> Effects:
    """Return what `record` of a neighbour's `topic` becomes, read at `source` from the bytes `raw`.

    Raises InvalidEventError or UnroutableError: the record is a dead letter.
    """
    match topic:
        case topics.PAYMENTS:
            return ingest_payment(record, source, raw)
        case topics.INVENTORY:
            return ingest_inventory(record, source, raw)
        case _:
            raise UnroutableError("it was parked from a topic that this role does not read")


def ingest_payment(record: Mapping[str, object], source: Source, raw: bytes) -> Effects:
    """Return the request that `record`, read at `source` from the bytes `raw`, becomes.

    Raises InvalidEventError or UnroutableError: the record is a dead letter.
    """
    return requests_of_payment(normalise.payment(record, raw=raw, at=source.at), source)


def requests_of_payment(event: PaymentEvent, source: Source) -> Effects:
    """Return the request to tell the payer. Its data has every key that the templates know, empty where nothing is known."""
    rule = _RULE_OF_STATUS[event.status]
    request = NotificationRequested(
        event_id=event.event_id,
        producer=PAYMENTS_PRODUCER,
        rule=rule.name,
        user_id=event.user_id,
        data=_data(event),
        # GetNotificationDetails allows no metadata without an orderId
        metadata={"orderId": event.order_id} if event.order_id else {},
        subject_key=f"payment:{event.payment_id}" if event.payment_id else None,
        is_final=event.status is not PaymentStatus.PENDING,
        occurred_at=event.occurred_at,
        accepted_at=source.at,
        origin=origin_of(source),
    )
    output = Output(topics.requests(rule.lane), event.user_id.encode(), request)
    return Effects(outputs=[output], counts=[rule.name])


def ingest_inventory(record: Mapping[str, object], source: Source, raw: bytes) -> Effects:
    """Return the adjustment of stock in `record`, read at `source` from the bytes `raw`, under the key of its product.

    Raises InvalidEventError: the record is a dead letter.
    """
    event = normalise.inventory(record, raw=raw, at=source.at)
    level = StockLevel(
        event_id=event.event_id,
        product_id=event.product_id,
        sku=event.sku,
        product_name=event.product_name,
        warehouse_id=event.warehouse_id,
        quantity=event.quantity,
        previous_quantity=event.previous_quantity,
        adjustment=event.adjustment,
        reason=event.reason,
        order_id=event.order_id,
        correlation_id=event.correlation_id,
        occurred_at=event.occurred_at,
        accepted_at=source.at,
        origin=origin_of(source),
    )
    return Effects(outputs=[Output(topics.STOCK, event.key.encode(), level, BY_KEY)], counts=["stock"])


def ingest_action(action: UserAction, source: Source, state: State) -> Effects:
    """Return the request to tell the user of his action; for an action without a rule, one that is decided as such.

    Raises UnroutableError when it names no user, InvalidEventError when it has no id: two such actions would be one.
    """
    del state
    if not action.action_id:
        raise InvalidEventError("actionId", "is empty: it is what tells one action from the next")
    if not action.user_id:
        raise UnroutableError("the action names no user: userId is empty")
    found = _RULE_OF_ACTION.get(action.action)
    if found is None:
        rule_name, lane, data = NO_RULE, Lane.BULK, {EVENT: f"{topics.USER_ACTIONS}: {action.action[:100]}"}
    else:
        rule, keys = found
        rule_name, lane = rule.name, rule.lane
        data = {**dict.fromkeys(keys, ""), **action.data, "occurredAt": moment_text(action.occurred_at)}
    request = NotificationRequested(
        event_id=action.action_id,
        producer=ACTIONS_PRODUCER,
        rule=rule_name,
        user_id=action.user_id,
        data=data,
        occurred_at=action.occurred_at,
        accepted_at=source.at,
        origin=origin_of(source),
    )
    return Effects(outputs=[Output(topics.requests(lane), action.user_id.encode(), request, BY_KEY)], counts=[rule_name or "no_rule"])


def moment_text(moment: datetime) -> str:
    """Return an aware UTC `moment` as templates show it, such as 15 March 2024 at 11:04 UTC."""
    return f"{moment.day} {moment:%B %Y} at {moment:%H:%M} UTC"


def _data(event: PaymentEvent) -> dict[str, str]:
    # a date that we made up would be another one when the event is told again, and the request another request
    on = f"{event.occurred_at.day} {event.occurred_at:%B %Y}" if event.is_dated else ""
    return {
        "paymentId": event.payment_id or "",
        "orderId": event.order_id or "",
        "subscriptionId": event.subscription_id or "",
        "amount": "" if event.amount is None else f"{event.amount:f}",
        "currency": event.currency,
        "method": event.method or "",
        "failureReason": event.failure_reason or "",
        "occurredOn": on,
        # the user's zone is not known here, so the zone is said
        "occurredAt": f"{on} at {event.occurred_at:%H:%M} UTC" if on else "",
    }
