"""What a recipient did becomes a status change on the engagement axis, beside the changes of deliveries."""

from __future__ import annotations

from agents.inbox import engagement_of, require_recipient
from agents.ports import Effects, Output, Source, State
from schemas import topics
from schemas.messages import EngagementSignal, StatusChange
from schemas.status import Axis


def decide(signal: EngagementSignal, source: Source, state: State) -> Effects:
    """Decide the status change that `signal` makes. A repeated signal makes the same one, and the projection merges it.

    Counts the engagement. Raises InvalidEventError when it does not exist, or the notification is not this user's.
    """
    del source, state
    require_recipient(signal.notification_id, signal.user_id)
    engagement = engagement_of(signal.engagement)
    change = StatusChange(
        notification_id=signal.notification_id,
        user_id=signal.user_id,
        axis=Axis.ENGAGEMENT,
        status=engagement,
        at=signal.at,
    )
    return Effects(outputs=[Output(topics.STATUS, signal.user_id.encode(), change)], counts=[engagement])
