"""Tells a subscriber of status changes by a POST that it can verify, as standardwebhooks.com has it.

Each subscriber (`channels.subscriptions`) is a provider of its own, which carries the route of its name only: one that is
slow or away makes nobody else wait. It answers 2xx when it has the message; 410 ends its subscription. The same message has
the same `webhook-id` at each attempt, so that a subscriber knows a repetition.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final
from urllib.parse import urlsplit

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from channels.base import OnUnknown, Receipt
from channels.http1 import Http1Client
from channels.http2 import Answer
from channels.signing import signed
from channels.subscriptions import Subscription, is_public
from schemas import topics
from schemas.errors import NotifyError, ProviderRefusedError, ProviderRejectedError, ProviderThrottledError, ProviderUnavailableError
from schemas.messages import Content, Delivery
from schemas.status import Status, Suppression

_MAX_RETRY_AFTER_SECONDS: Final = 86_400.0


class WebhookChannel:
    """Tells one subscriber. `tls_context` replaces the system's trusted authorities; a call ends within `total_seconds`."""

    def __init__(
        self,
        subscription: Subscription,
        *,
        max_open: int = 32,
        tls_context: ssl.SSLContext | None = None,
        total_seconds: float = 12.0,
    ) -> None:
        self.name: str = topics.Channel.WEBHOOK
        self.provider = self.reported_as = subscription.name
        self.routes: frozenset[str] | None = frozenset({subscription.name})
        self.max_open = max_open
        self.on_unknown = OnUnknown.RESEND  # under the same id, by which the subscriber knows a repetition
        self.unknown_seconds = 0.0
        self._subscription = subscription
        self._tls_context = tls_context
        self._total_seconds = total_seconds
        parts = urlsplit(subscription.url)
        self._origin = f"{parts.scheme}://{parts.netloc}"
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._client: Http1Client | None = None

    def record(self, delivery: Delivery) -> None:
        """Return None: a subscriber is called."""

    def reference_of(self, delivery: Delivery, receipt: Receipt | None) -> None:
        """Return None: subscribers report nothing."""

    async def open(self) -> None:
        """Load the trusted authorities, where TLS is wanted. Connects only when there is something to tell."""
        if self._client is not None:
            return
        if self._tls_context is None and self._origin.startswith("https:"):
            self._tls_context = await asyncio.to_thread(ssl.create_default_context)
        self._client = Http1Client(
            self._origin,
            tls=self._tls_context,
            max_open=self.max_open,
            total_seconds=self._total_seconds,
            resolver=None if self._subscription.allow_private else PublicResolver(),
            needs_body=False,  # whoever answered 2xx has the message: telling it again for the sake of a body would double it
        )

    async def send(self, delivery: Delivery, content: Content) -> Receipt:
        """Tell the subscriber. Returns and raises as the channel contract says; codes are HTTP statuses, or of `channels.http1`.

        What is answered with anything but 2xx waits alone and is told again by its schedule: a subscriber's mistake is
        mended one day. That holds for 401, 403, 502 and 504 too: they may come of this message alone, of a body that breaks
        the signature or the process there, and must hold no other. 410 is its word that it wants to hear no more.
        """
        if self._client is None:
            raise ProviderUnavailableError("the channel is closed", code="closed")
        body = (content.text or "").encode()
        headers = signed(self._subscription.keys, message_id=delivery.delivery_id, at=datetime.now(UTC), body=body)
        headers |= {"content-type": "application/json", "user-agent": "flowmart-notifications"}
        named = [(name.encode(), value.encode()) for name, value in headers.items()]
        answer = await self._client.post(self._path, named, body)
        if 200 <= answer.status < 300:
            return Receipt(provider=self.provider, status=Status.SENT, code=str(answer.status))
        raise _meaning(answer)

    async def look_up(self, delivery: Delivery, content: Content) -> Receipt | None:  # noqa: ARG002 - the channel contract
        """Return None: subscribers cannot be asked."""
        return None

    async def close(self) -> None:
        """End every connection. Calls still running fail."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()


class PublicResolver(AbstractResolver):
    """Resolves names to addresses of the internet only, at each connection: whatever a name says, nobody inside is called."""

    def __init__(self) -> None:
        self._resolver = ThreadedResolver()

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        """Return the public addresses of `host`. Raises OSError when it has none."""
        found = await self._resolver.resolve(host, port, family)
        public = [each for each in found if is_public(each["host"])]
        if not public:
            raise OSError("the name has no address of the internet")
        return public

    async def close(self) -> None:
        """End nothing: there is nothing to end."""


def _meaning(answer: Answer) -> NotifyError:
    """Return what an answer other than 2xx means."""
    code = str(answer.status)
    sentence = f"the subscriber answered {code}"
    wait = _retry_after(answer.headers.get("retry-after"))
    if answer.status == 410:
        return ProviderRejectedError(sentence, code=code, suppresses=Suppression.GONE)
    if answer.status == 429 or (answer.status == 503 and wait is not None):
        return ProviderThrottledError(sentence, code=code, retry_after_seconds=wait)
    return ProviderRefusedError(sentence, code=code, retry_after_seconds=wait)


def _retry_after(text: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for, a number or a date (RFC 9110 section 10.2.3)."""
    if text is None:
        return None
    if text.isascii() and text.isdigit():
        return min(float(text[:12]), _MAX_RETRY_AFTER_SECONDS)
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    return min(max((at - datetime.now(UTC)).total_seconds(), 0.0), _MAX_RETRY_AFTER_SECONDS)
