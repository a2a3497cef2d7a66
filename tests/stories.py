"""What the router and the senders would have written about notifications: decisions and status changes to project."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from schemas.codec import pack
from schemas.ids import notification_id
from schemas.messages import ChannelChoice, DecisionRecord, Headline, Origin, StatusChange
from schemas.sealed import seal
from schemas.status import Axis, Engagement, Status

START = datetime(2026, 1, 15, 9, 30, 0, 125_000, tzinfo=UTC)
USER_KEY = b"u" * 32
Record = DecisionRecord | StatusChange


def an_id(event: str, user: str) -> str:
    return notification_id(producer="payments", event_id=event, rule="payment", user_id=user)


def a_decision(event: str, user: str, *, at: datetime = START, outcome: str = "notified", event_id: str | None = None) -> DecisionRecord:
    notification = an_id(event, user)
    headline = pack(Headline(title=f"Title {event}", message="We received 12.50 EUR"))
    return DecisionRecord(
        decision_id=f"{outcome}-{notification}-{at.timestamp()}",
        notification_id=notification,
        user_id=user,
        outcome=outcome,
        reason=None if outcome == "notified" else "opted_out",
        rule="payment",
        rule_version="1",
        category="payments",
        lane="normal",
        type="payment",
        event_id=event if event_id is None else event_id,
        producer="payments",
        origin=Origin(topic="payments", partition=1, offset=7),
        request=Origin(topic="requests.normal", partition=0, offset=9),
        occurred_at=at,
        accepted_at=at,
        decided_at=at,
        preference_version=0,
        template_version="1",
        channels=[
            ChannelChoice(channel=channel, is_chosen=True, reason="wanted", delivery_id=f"{notification}-{channel}")
            for channel in ("in_app", "email")
        ],
        metadata={"orderId": "o-1"},
        sealed=seal(USER_KEY, headline, user_id=user, purpose="headline") if outcome == "notified" else None,
    )


def a_change(
    event: str,
    user: str,
    status: Status = Status.DELIVERED,
    *,
    channel: str = "in_app",
    at: datetime = START + timedelta(seconds=1),
    attempt: int = 1,
    generation: int = 0,
    reason: str | None = None,
) -> StatusChange:
    return StatusChange(
        notification_id=an_id(event, user),
        delivery_id=f"{an_id(event, user)}-{channel}",
        user_id=user,
        axis=Axis.DELIVERY,
        status=status,
        channel=channel,
        provider="smtp" if channel == "email" else None,
        generation=generation,
        attempt=attempt,
        reason=reason,
        at=at,
    )


def an_engagement(event: str, user: str, engagement: Engagement = Engagement.READ, *, at: datetime = START) -> StatusChange:
    return StatusChange(notification_id=an_id(event, user), user_id=user, axis=Axis.ENGAGEMENT, status=engagement, at=at)


def a_story(event: str, user: str, *, at: datetime = START, is_read: bool = False) -> tuple[DecisionRecord, Sequence[StatusChange]]:
    """Return the decision to send by e-mail and in the app, and what became of both, in the order of the log."""
    steps = [(Status.QUEUED, 0), (Status.SENDING, 1), (Status.SENT, 1)]
    changes = [a_change(event, user, Status.DELIVERED, at=at + timedelta(milliseconds=5))]
    changes += [
        a_change(event, user, status, channel="email", attempt=attempt, at=at + timedelta(milliseconds=10 * number))
        for number, (status, attempt) in enumerate(steps)
    ]
    if is_read:
        changes.append(an_engagement(event, user, at=at + timedelta(minutes=1)))
    return a_decision(event, user, at=at), changes
