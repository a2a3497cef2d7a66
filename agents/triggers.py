"""Which news becomes which notification: the rules, and the request that an event turns into.

A rule is looked up by the name in NotificationRequested. Other services may ask for any rule; payments ask through here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from agents import normalise
from agents.normalise import PaymentEvent, PaymentStatus
from agents.ports import Effects, Output, Source
from schemas import topics
from schemas.messages import NotificationRequested, Origin
from schemas.topics import Channel, Lane

PAYMENTS_PRODUCER = "payments"

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
                defaults=frozenset(_BOTH),
                template="payment_confirmed",
                max_age_seconds=3 * _DAY_SECONDS,
            ),
            Rule(
                name="payment_failed",
                version="1",
                category="payments",
                type="payment",
                lane=Lane.CRITICAL,  # the user has to act, and soon
                channels=_BOTH,
                defaults=frozenset(_BOTH),
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
                defaults=frozenset(_BOTH),
                template="payment_pending",
                max_age_seconds=6 * _HOUR_SECONDS,  # what comes of it is the news
            ),
            # from another service or from support: data holds `title` and `message`
            Rule(
                name="message",
                version="1",
                category="messages",
                type="message",
                lane=Lane.NORMAL,
                channels=_BOTH,
                defaults=frozenset(_BOTH),
                template="message",
                max_age_seconds=3 * _DAY_SECONDS,
            ),
        )
    }
)

_RULE_OF_STATUS = {
    PaymentStatus.CONFIRMED: RULES["payment_confirmed"],
    PaymentStatus.PENDING: RULES["payment_pending"],
    PaymentStatus.FAILED: RULES["payment_failed"],
}


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
        origin=Origin(topic=source.topic, partition=source.partition, offset=source.offset),
    )
    output = Output(topics.requests(rule.lane), event.user_id.encode(), request)
    return Effects(outputs=[output], counts=[rule.name])


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
