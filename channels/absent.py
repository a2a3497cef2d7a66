"""A channel that no provider is configured for: each of its deliveries is skipped, and says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from channels.base import OnUnknown, Receipt
from schemas.errors import ProviderRejectedError

if TYPE_CHECKING:
    from schemas.messages import Content, Delivery

NO_PROVIDER = "no_provider"


class AbsentChannel:
    """Calls nobody."""

    def __init__(self, name: str, *, max_open: int = 32) -> None:
        self.name = name
        self.provider = self.reported_as = "none"
        self.routes: frozenset[str] | None = None
        self.max_open = max_open
        self.on_unknown = OnUnknown.RESEND  # nothing ever left
        self.unknown_seconds = 0.0

    def record(self, delivery: Delivery) -> None:
        """Return None: the refusal is the answer to a call, so that it has an attempt of its own."""

    def reference_of(self, delivery: Delivery, receipt: Receipt | None) -> None:
        """Return None: there is nobody who reports."""

    async def open(self) -> None:
        """Nothing to get ready."""

    async def send(self, delivery: Delivery, content: Content) -> Receipt:  # noqa: ARG002 - the channel contract
        """Raise ProviderRejectedError."""
        raise ProviderRejectedError(f"no provider is configured for {self.name}", code=NO_PROVIDER)

    async def look_up(self, delivery: Delivery, content: Content) -> Receipt | None:  # noqa: ARG002 - the channel contract
        """Return None: nobody can be asked."""
        return None

    async def close(self) -> None:
        """Nothing to leave behind."""
