"""In-app messages: the inbox is a projection of the status topic, so being recorded as delivered is the delivery."""

from __future__ import annotations

from typing import TYPE_CHECKING

from channels.base import OnUnknown, Receipt
from schemas import topics
from schemas.status import Status

if TYPE_CHECKING:
    from schemas.messages import Content, Delivery


class InAppChannel:
    """Calls nobody, so nothing can go wrong and a repetition changes nothing: the views know a delivery by its id."""

    def __init__(self, *, max_open: int = 500) -> None:
        self.name: str = topics.Channel.IN_APP
        self.provider = self.reported_as = "inbox"
        self.routes: frozenset[str] | None = None
        self.max_open = max_open
        self.on_unknown = OnUnknown.RESEND
        self.unknown_seconds = 0.0

    async def open(self) -> None:
        """Nothing to get ready."""

    async def send(self, delivery: Delivery, content: Content) -> Receipt:  # noqa: ARG002 - the channel contract
        """Return what `record` returns."""
        return self.record(delivery)

    def record(self, delivery: Delivery) -> Receipt:
        """Return the receipt that, once published, puts the delivery into the inbox."""
        return Receipt(provider=self.provider, reference=delivery.delivery_id, status=Status.DELIVERED)

    def reference_of(self, delivery: Delivery, receipt: Receipt | None) -> None:
        """Return None: there is nobody who reports."""

    async def look_up(self, delivery: Delivery, content: Content) -> Receipt | None:  # noqa: ARG002 - the channel contract
        """Return None: nothing is ever of unknown end."""
        return None

    async def close(self) -> None:
        """Nothing to leave behind."""
