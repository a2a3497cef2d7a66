"""A channel that sends nothing and remembers everything, for tests of whoever sends. It keeps the channel contract."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from channels.base import OnUnknown, Receipt
from schemas import topics
from schemas.errors import ProviderError, ProviderUnavailableError, SendUnknownError
from schemas.status import Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from schemas.messages import Content, Delivery

Outcome = Receipt | ProviderError | SendUnknownError


class Call(NamedTuple):
    """One call of `send`."""

    delivery: Delivery
    content: Content


class RecordingChannel:
    """Answers each call with the next outcome of its script: a receipt to return or an error to raise.

    `by_delivery` holds scripts for single deliveries, by id, and goes before `script`. A call without an outcome is sent,
    with the delivery id as its reference. `hold()` keeps calls waiting, recorded, until `release()`.
    """

    def __init__(  # noqa: PLR0913 - what a channel is
        self,
        script: Iterable[Outcome] = (),
        *,
        by_delivery: Mapping[str, Iterable[Outcome]] | None = None,
        name: str = topics.Channel.EMAIL,
        max_open: int = 32,
        on_unknown: OnUnknown = OnUnknown.RESEND,
        provider: str = "recording",
        routes: frozenset[str] | None = None,
        unknown_seconds: float = 0.0,
    ) -> None:
        self.name = name
        self.provider = self.reported_as = provider
        self.routes = routes
        self.max_open = max_open
        self.on_unknown = on_unknown
        self.unknown_seconds = unknown_seconds
        self.calls: list[Call] = []
        self.running = 0
        self.most_running = 0
        self._script = deque(script)
        self._by_delivery = {delivery_id: deque(outcomes) for delivery_id, outcomes in (by_delivery or {}).items()}
        self._is_open = False
        self._going = asyncio.Event()
        self._going.set()

    def then(self, *outcomes: Outcome) -> None:
        """Add to the end of the script."""
        self._script.extend(outcomes)

    def hold(self) -> None:
        """Let no call end from now on."""
        self._going.clear()

    def release(self) -> None:
        """Let calls end again."""
        self._going.set()

    def record(self, delivery: Delivery) -> None:
        """Return None: a provider is called."""

    def reference_of(self, delivery: Delivery, receipt: Receipt | None) -> str | None:  # noqa: ARG002 - the channel contract
        """Return the receipt's reference, as providers do that make the ids themselves."""
        return None if receipt is None else receipt.reference

    async def open(self) -> None:
        """Take calls from now on."""
        self._is_open = True

    async def send(self, delivery: Delivery, content: Content) -> Receipt:
        """Record the call, then return or raise what the script says."""
        if not self._is_open:
            raise ProviderUnavailableError("the channel is closed", code="closed")
        self.calls.append(Call(delivery, content))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self._going.wait()
        finally:
            self.running -= 1
        script = self._by_delivery.get(delivery.delivery_id) or self._script
        if not script:
            return Receipt(provider=self.provider, reference=delivery.delivery_id, status=Status.SENT)
        outcome = script.popleft()
        if isinstance(outcome, Receipt):
            return outcome
        raise outcome

    async def look_up(self, delivery: Delivery, content: Content) -> Receipt | None:  # noqa: ARG002 - the channel contract
        """Return None: nobody can be asked."""
        return None

    async def close(self) -> None:
        """Take no more calls."""
        self._is_open = False
