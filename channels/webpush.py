"""Push to browsers (RFC 8030), encrypted for the one subscription (RFC 8291), in our name (VAPID, RFC 8292).

    webpush://?vapid_key=$VAPID_KEY&subject=mailto:ops@example.com

`vapid_key`: the private key, 32 bytes in base64url as browser libraries make it, or PEM, or a file with either.
`subject`: whom a push service may tell of trouble, a mailto: or https: address. `origins`: more hosts to post to than the
known push services, such as `https://push.example:8443` or `*.push.example`, by comma. `insecure_loopback=1`: also take
endpoints with http on this host. `ca`: PEM of the authorities to trust instead of the system's. The last three are for
simulators.

Endpoints come from users. None is called whose host is not in the list, and no redirection is followed. Nor may users who
hand in endpoints that do not work make the provider look out of service to all others: a host below a listed domain
that does not answer, or credentials refused where they were accepted just before, concern that one subscription.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Protocol

import http_ece
import jwt
import orjson
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from channels.base import Receipt
from channels.devices import LOOPBACK, OTHER_SERVICE, PUSH_SERVICES, Kind, Subscription, endpoint_url, from_base64url, to_base64url
from channels.http1 import Http1Client
from channels.http2 import NO_HTTP2, Answer, Http2Client, steady, varying
from channels.push import (
    TOTAL_SECONDS,
    PushChannel,
    code_of,
    context_of,
    device_of,
    failure,
    fitting,
    gone,
    json_of,
    replaces,
    seconds_left,
    secret_text,
    title_and_message,
)
from schemas.errors import NotifyError, ProviderRefusedError, ProviderRejectedError, ProviderUnavailableError, SettingsError
from schemas.status import Status
from schemas.topics import Lane

if TYPE_CHECKING:
    from collections.abc import Sequence
    from urllib.parse import SplitResult

    from channels.config import Ports, ProviderConfig
    from schemas.messages import Content, Delivery

# where the browsers' own services are: Chrome and its kin, Firefox, Safari, Edge
KNOWN_ORIGINS: Final = ("fcm.googleapis.com", "updates.push.services.mozilla.com", "*.push.apple.com", "*.notify.windows.com")
MAX_PLAIN_BYTES: Final = 3_993  # the 4096 bytes that every service takes, less header, tag and delimiter (RFC 8291 section 4)
_RECORD_BYTES: Final = 4_096
_TOKEN_SECONDS: Final = 12 * 3_600  # RFC 8292 section 2: at most 24 hours
_RENEW_SECONDS: Final = 3_600
_MAX_ORIGINS: Final = 64  # with connections at a time: services spread over hosts
_KNOWN_SECONDS: Final = 600.0
_SENT: Final = frozenset({201, 202})
_URGENCY: Final = {Lane.CRITICAL: steady("urgency", "high"), Lane.NORMAL: steady("urgency", "normal"), Lane.BULK: steady("urgency", "low")}
_ENCODING: Final = steady("content-encoding", "aes128gcm")
_TYPE: Final = steady("content-type", "application/octet-stream")
_ORIGIN: Final = re.compile(r"(?:https://)?(\*\.)?([a-z0-9][a-z0-9.-]{0,252})(?::(\d{1,5}))?")
_SUBJECT: Final = re.compile(r"mailto:[^\s@]+@[^\s@]+|https://\S+")
_LAST_SEGMENT: Final = re.compile(r"[\w.%:=~-]{1,100}", re.ASCII)


class _Client(Protocol):
    async def post(self, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> Answer: ...
    async def close(self) -> None: ...


class Vapid:
    """Our name at the push services: a token for each origin, good for 12 hours and made anew an hour before its end."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, subject: str, now: Callable[[], float]) -> None:
        self._key = key
        self._subject = subject
        self._now = now
        self._tokens: OrderedDict[str, tuple[float, tuple[bytes, bytes]]] = OrderedDict()
        self.public_key = to_base64url(key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint))

    def header(self, origin: str) -> tuple[bytes, bytes]:
        """Return the Authorization header for an origin, such as https://push.example (RFC 8292 section 3)."""
        now = self._now()
        expires, header = self._tokens.get(origin, (0.0, _TYPE))
        if not _RENEW_SECONDS < expires - now <= _TOKEN_SECONDS:  # the clock may have gone back too
            expires = now + _TOKEN_SECONDS
            token = jwt.encode({"aud": origin, "exp": int(expires), "sub": self._subject}, self._key, algorithm="ES256")
            header = steady("authorization", f"vapid t={token}, k={self.public_key}")
            self._tokens[origin] = expires, header
            if len(self._tokens) > _MAX_ORIGINS:
                self._tokens.popitem(last=False)
        return header


class Origins:
    """Which hosts may be posted to. Raises ValueError, naming the pattern that is none."""

    def __init__(self, patterns: Iterable[str], *, insecure_loopback: bool) -> None:
        self._hosts: set[tuple[str, int]] = set()
        self._domains: set[tuple[str, int]] = set()
        self._insecure_loopback = insecure_loopback
        for pattern in patterns:
            match = _ORIGIN.fullmatch(pattern)
            if match is None:
                raise ValueError(f"{pattern[:60]!r} is no origin such as https://push.example or *.push.example")
            star, host, port = match.groups()
            (self._domains if star else self._hosts).add((host, int(port or 443)))

    def allow(self, parts: SplitResult) -> bool:
        """Say whether an endpoint may be called."""
        host, port = parts.hostname or "", parts.port or 443
        if parts.scheme != "https":
            return self._insecure_loopback and host in LOOPBACK
        return (host, port) in self._hosts or any(port == at and host.endswith(f".{domain}") for domain, at in self._domains)

    def is_named(self, parts: SplitResult) -> bool:
        """Say whether an endpoint's host is in the list itself, and not only the domain above it: then it exists."""
        return parts.scheme != "https" or (parts.hostname or "", parts.port or 443) in self._hosts


class WebPushChannel(PushChannel):
    """Sends to browsers, each by the service that its subscription names.

    `now` is the wall clock, in seconds; a request ends within `total_seconds`.
    """

    def __init__(
        self, config: ProviderConfig, ports: Ports, *, now: Callable[[], float] = time.time, total_seconds: float = TOTAL_SECONDS
    ) -> None:
        super().__init__(config, ports, Kind.WEBPUSH)
        # the kind alone is the route of deliveries from before services had circuits of their own
        self.routes = frozenset({str(Kind.WEBPUSH), *(f"{Kind.WEBPUSH}/{service}" for service in (*PUSH_SERVICES, OTHER_SERVICE))})
        config.only("vapid_key", "subject", "origins", "insecure_loopback", "ca")
        config.require(subject=config.options.get("subject"))
        subject = config.options["subject"]
        if not _SUBJECT.fullmatch(subject):
            raise SettingsError([f"provider {config.name}: subject is neither mailto:somebody@host nor https://…"])
        more = [each.strip().lower() for each in config.options.get("origins", "").split(",") if each.strip()]
        try:
            self._origins = Origins((*KNOWN_ORIGINS, *more), insecure_loopback=config.option("insecure_loopback", _flag, default=False))
        except ValueError as error:
            raise SettingsError([f"provider {config.name}: origins: {error}"]) from None
        self._vapid = Vapid(_key(config), subject, now)
        self._tls = context_of(config)
        self._tls_http1 = context_of(config, protocols=("http/1.1",))
        self._now = now
        self._total_seconds = total_seconds
        self._clients: OrderedDict[str, _Client] = OrderedDict()
        self._accepted_at: dict[str, float] = {}  # origin -> when it took a message last
        self._is_open = False

    async def open(self) -> None:
        """Get ready; connects when there is something to send."""
        self._is_open = True

    async def send(self, delivery: Delivery, content: Content) -> Receipt:
        """Send to one browser. Returns and raises as the channel contract says; the codes are status and the service's reason.

        The reference is the last part of the Location that the service made, ours where it made none. `origin`: a host
        that is not in the list, rejected without a call.
        """
        subscription = device_of(content, Kind.WEBPUSH).subscription
        assert subscription is not None
        parts = endpoint_url(subscription.endpoint)
        if not self._origins.allow(parts):
            raise ProviderRejectedError("the subscription is at no push service that we may call", code="origin")
        body = encrypt(compose(delivery, content), subscription)
        origin = f"{parts.scheme}://{parts.netloc.lower()}"
        topic = replaces(delivery)
        ttl = seconds_left(delivery, datetime.fromtimestamp(self._now(), UTC))
        headers = [
            self._vapid.header(origin),
            _ENCODING,
            _TYPE,
            _URGENCY[Lane(delivery.lane)],
            varying("ttl", str(ttl)),
            varying("topic", topic),
        ]
        path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        try:
            answer = await self._post(origin, parts, path, headers, body)
        except ProviderUnavailableError as error:
            if self._origins.is_named(parts) or not self._is_open:
                raise
            raise ProviderRefusedError("the subscription's host does not answer", code=error.code) from None
        if answer.status in _SENT:
            self._accepted_at[origin] = self._now()
            reference = _reference(answer, subscription) or topic
            return Receipt(provider=self.provider, reference=reference, status=Status.SENT, code=str(answer.status))
        raise _error(answer, datetime.fromtimestamp(self._now(), UTC), is_known=self._is_known(origin))

    async def close(self) -> None:
        """End the connections."""
        self._is_open = False
        while self._clients:
            _, client = self._clients.popitem()
            await client.close()

    def _is_known(self, origin: str) -> bool:
        """Say whether a service took a message from us a little while ago: then it is there, and our credentials are good."""
        return 0 <= self._now() - self._accepted_at.get(origin, -math.inf) < _KNOWN_SECONDS

    async def _post(self, origin: str, parts: SplitResult, path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> Answer:
        client = await self._client(origin, parts)
        try:
            return await client.post(path, headers, body)
        except ProviderUnavailableError as error:
            if error.code != NO_HTTP2:
                raise
        # the service has no HTTP/2: nothing left but the greeting, and from now on it is asked by HTTP/1.1
        if self._is_open and self._clients.get(origin) is client:
            self._clients[origin] = self._http1(origin)
            await client.close()
        return await (await self._client(origin, parts)).post(path, headers, body)

    async def _client(self, origin: str, parts: SplitResult) -> _Client:
        if not self._is_open:
            raise ProviderUnavailableError("the channel is closed", code="closed")
        client = self._clients.get(origin)
        if client is None:
            is_secure = parts.scheme == "https"
            client = (
                Http2Client(parts.hostname or "", parts.port or 443, tls=self._tls, total_seconds=self._total_seconds)
                if is_secure
                else self._http1(origin)
            )
            self._clients[origin] = client
        self._clients.move_to_end(origin)
        while len(self._clients) > max(_MAX_ORIGINS, self.max_open + 1):  # more than calls run: the oldest is idle
            name, oldest = self._clients.popitem(last=False)
            self._accepted_at.pop(name, None)
            await oldest.close()
        return client

    def _http1(self, origin: str) -> Http1Client:
        return Http1Client(
            origin, tls=self._tls_http1 if origin.startswith("https:") else None, max_open=self.max_open, total_seconds=self._total_seconds
        )


def compose(delivery: Delivery, content: Content) -> bytes:
    """Return what the page's service worker gets: JSON with title, body, the tag by which it replaces, and the notification's id.

    The message is shortened to what every service takes. Raises ProviderRejectedError `content`.
    """
    title, message = title_and_message(content)
    rest = {"tag": replaces(delivery), "notificationId": delivery.notification_id}
    return fitting(lambda text: orjson.dumps({"title": title, "body": text, **rest}), message, MAX_PLAIN_BYTES)


def encrypt(plain: bytes, subscription: Subscription) -> bytes:
    """Return `plain` as only the subscription's browser can read it (RFC 8291). Raises ProviderRejectedError `address`."""
    try:
        encrypted = http_ece.encrypt(
            plain,
            salt=os.urandom(16),
            private_key=ec.generate_private_key(ec.SECP256R1()),
            dh=subscription.public_key,
            auth_secret=subscription.auth_secret,
            rs=_RECORD_BYTES,
            version="aes128gcm",
        )
    except ValueError:  # a point that is not on the curve
        raise ProviderRejectedError("the subscription's key is none", code="address") from None
    assert isinstance(encrypted, bytes)
    return encrypted


def build(config: ProviderConfig, ports: Ports) -> WebPushChannel:
    """Return the channel that `config` describes. Raises SettingsError."""
    return WebPushChannel(config, ports)


def _reference(answer: Answer, subscription: Subscription) -> str | None:
    """Return the service's name for the message, unless it says where the browser is reached."""
    name = answer.headers.get("location", "").rpartition("/")[2] or answer.headers.get("apns-id", "")
    return name if _LAST_SEGMENT.fullmatch(name) and name not in subscription.endpoint else None


def _error(answer: Answer, now: datetime, *, is_known: bool) -> NotifyError:
    reason = json_of(answer).get("reason")
    code = code_of(answer, reason)
    if answer.status in {404, 410}:  # RFC 8030 section 7.3
        return gone(code)
    if answer.status in {400, 401, 403} and (reason == "VapidPkHashMismatch" or b"do not correspond to" in answer.body):
        # Apple and Google say that it is this subscription's: others may pass. A new key by mistake would meet it at each,
        # so nothing is rejected for good
        return ProviderRefusedError("the subscription was made for another key than ours", code=code)
    if is_known and (answer.status in {401, 403} or 300 <= answer.status < 400):
        return ProviderRefusedError("the service accepts us, but not for this subscription", code=code)
    return failure(answer, code, now)


def _flag(text: str) -> bool:
    if text not in {"0", "1"}:
        raise ValueError("is neither 0 nor 1")
    return text == "1"


def _key(config: ProviderConfig) -> ec.EllipticCurvePrivateKey:
    problem = SettingsError([f"provider {config.name}: vapid_key is no private key of P-256 in base64url or PEM"])
    value = config.options.get("vapid_key", "").strip()
    text = value if _is_raw(value) else secret_text(config, "vapid_key").strip()
    try:
        key = (
            ec.derive_private_key(int.from_bytes(from_base64url(text), "big"), ec.SECP256R1())
            if _is_raw(text)
            else load_pem_private_key(text.encode(), password=None)
        )
    except (ValueError, TypeError):
        raise problem from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise problem
    return key


def _is_raw(text: str) -> bool:
    try:
        return len(from_base64url(text)) == 32
    except ValueError:
        return False
