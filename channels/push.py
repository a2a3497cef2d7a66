"""What the push providers have in common: device addresses, urgency, time to live, secrets, and the sizes that fit.

A device's address is one string: `fcm:TOKEN`, `apns:HEX`, or `webpush:` and the subscription as browsers give it out,
`{"endpoint": "https://…", "keys": {"p256dh": "…", "auth": "…"}}`. A delivery is for one device.
"""

from __future__ import annotations

import base64
import binascii
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import SplitResult, urlsplit

import orjson

from channels.base import OnUnknown
from channels.http2 import Answer, client_context
from schemas import topics
from schemas.errors import (
    ProviderRefusedError,
    ProviderRejectedError,
    ProviderThrottledError,
    ProviderUnavailableError,
    SendUnknownError,
    SettingsError,
)
from schemas.status import Suppression
from schemas.topics import Lane

if TYPE_CHECKING:
    from channels.base import Receipt
    from channels.config import Ports, ProviderConfig
    from schemas.messages import Content, Delivery

MAX_ADDRESS_BYTES: Final = 4_096
MAX_TTL_SECONDS: Final = 28 * 86_400  # what FCM keeps at most, and Web Push services do not shorten
MAX_RETRY_AFTER_SECONDS: Final = 86_400.0
MAX_TITLE_CHARACTERS: Final = 200
TOTAL_SECONDS: Final = 12.0  # of one request; with what comes before it shorter than a drain (streams.runner.DRAIN_SECONDS)
LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})

_FCM_TOKEN: Final = re.compile(r"[A-Za-z0-9_:-]+")
# bytes in hexadecimal, of no fixed length as Apple says; or the name of what a simulator is to do
_APNS_TOKEN: Final = re.compile(r"(?:[0-9A-Fa-f]{2}){0,200}(?:magic-[a-z]+)?")
_REASON: Final = re.compile(r"[A-Za-z0-9_]{1,60}")
_PUBLIC_KEY_BYTES, _AUTH_BYTES = 65, 16  # RFC 8291 section 3.1 and 3.2
_UNCOMPRESSED: Final = 4  # how such a key begins (SEC 1, section 2.3.3)


class Kind(StrEnum):
    """Which push service reaches a device: the route of its deliveries."""

    FCM = "fcm"
    APNS = "apns"
    WEBPUSH = "webpush"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscription:
    """A browser's: where to post, and the keys that only it can open messages with."""

    endpoint: str = field(repr=False)
    public_key: bytes = field(repr=False)  # an uncompressed point of P-256, 65 bytes
    auth_secret: bytes = field(repr=False)  # 16 bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device that can be reached: by its `token`, or, where the kind is webpush, by its `subscription`."""

    kind: Kind
    token: str = field(default="", repr=False)
    subscription: Subscription | None = None


def route_of(address: str) -> Kind | None:
    """Return by which service an address is reached; None when it is no device's."""
    kind, colon, _ = address.partition(":")
    return Kind(kind) if colon and kind in set(Kind) else None


def parse_device(address: str) -> Device:
    """Return the device that an address of at most 4 KiB names. Raises ValueError with a sentence that does not quote it."""
    kind = route_of(address)
    if kind is None:
        raise ValueError(f"does not begin with {', '.join(f'{each}:' for each in Kind)}")
    if len(address.encode("utf-8", "surrogatepass")) > MAX_ADDRESS_BYTES:
        raise ValueError(f"is longer than {MAX_ADDRESS_BYTES} bytes")
    rest = address[len(kind) + 1 :]
    match kind:
        case Kind.FCM:
            if not _FCM_TOKEN.fullmatch(rest):
                raise ValueError("is no registration token after fcm:")
            return Device(kind=kind, token=rest)
        case Kind.APNS:
            if not rest or not _APNS_TOKEN.fullmatch(rest):
                raise ValueError("is no device token in hexadecimal digits after apns:")
            return Device(kind=kind, token=rest.lower())
        case Kind.WEBPUSH:
            return Device(kind=kind, subscription=_parse_subscription(rest))


def _parse_subscription(text: str) -> Subscription:
    try:
        value = orjson.loads(text)
        endpoint, keys = value["endpoint"], value["keys"]
        public_key, auth_secret = from_base64url(keys["p256dh"]), from_base64url(keys["auth"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("is no subscription with endpoint and keys after webpush:") from None
    if len(public_key) != _PUBLIC_KEY_BYTES or public_key[0] != _UNCOMPRESSED or len(auth_secret) != _AUTH_BYTES:
        raise ValueError("has keys that are none of a subscription")
    endpoint_url(endpoint)
    return Subscription(endpoint=endpoint, public_key=public_key, auth_secret=auth_secret)


def endpoint_url(endpoint: object) -> SplitResult:
    """Return the parts of a subscription's endpoint. Raises ValueError for what is no https address, or http on loopback."""
    problem = "has an endpoint that is no https address"
    if not isinstance(endpoint, str) or not endpoint.isascii() or not endpoint.isprintable() or " " in endpoint:
        raise ValueError(problem)
    try:
        parts = urlsplit(endpoint)
        _ = parts.port  # is parsed only now
    except ValueError:
        raise ValueError(problem) from None
    is_secure = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK)
    if not is_secure or not parts.hostname or "@" in parts.netloc or parts.fragment or "\\" in parts.netloc:
        raise ValueError(problem)
    return parts


def device_of(content: Content, kind: Kind) -> Device:
    """Return the device that `content` is for. Raises ProviderRejectedError `address` unless it is of this kind."""
    try:
        device = parse_device(content.address)
    except ValueError:
        raise ProviderRejectedError("the address is no device", code="address") from None
    if device.kind is not kind:
        raise ProviderRejectedError(f"the device is not reached by {kind}", code="address")
    return device


def from_base64url(text: str) -> bytes:
    """Return the bytes in base64url, with or without padding. Raises ValueError."""
    try:
        return base64.b64decode(text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4), altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise ValueError("is no base64url") from error


def to_base64url(data: bytes) -> str:
    """Return `data` in base64url without padding (RFC 7515 section 2)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


# ---- what is sent


def replaces(delivery: Delivery) -> str:
    """Return the name under which a device, or the service before it, puts a repetition in the place of the first.

    32 characters of base64url: as many as the Topic of Web Push may have (RFC 8030 section 5.4), and within 64 of APNs.
    """
    return to_base64url(blake2b(delivery.delivery_id.encode(), digest_size=24).digest())


def is_urgent(delivery: Delivery) -> bool:
    """Say whether the device is woken at once. Only bulk waits until it is awake anyhow."""
    return delivery.lane != Lane.BULK


def seconds_left(delivery: Delivery, now: datetime) -> int:
    """Return how long the service keeps trying: until the delivery expires, at most 28 days. 0: now or never."""
    if delivery.expires_at is None:
        return MAX_TTL_SECONDS
    return min(MAX_TTL_SECONDS, max(0, int((delivery.expires_at - now).total_seconds())))


def title_and_message(content: Content) -> tuple[str, str]:
    """Return what is shown; the title shortened to 200 characters. Raises ProviderRejectedError `content` without either."""
    if content.title is None or content.message is None:
        raise ProviderRejectedError("no title and message to show", code="content")
    return shortened(content.title, MAX_TITLE_CHARACTERS), content.message


def shortened(text: str, characters: int) -> str:
    """Return `text`, or as much of it as fits in so many characters with an ellipsis at its end."""
    return text if len(text) <= characters else text[: max(0, characters - 1)].rstrip() + "…"


def fitting(encode: Callable[[str], bytes], message: str, limit_bytes: int) -> bytes:
    """Return `encode(message)`, the message shortened until it fits: a push announces, the inbox has all of it.

    Raises ProviderRejectedError `content` when nothing fits, or when it cannot be written as UTF-8.
    """
    try:
        encoded = encode(message)
        if len(encoded) <= limit_bytes:
            return encoded
        low, high = 0, min(len(message), limit_bytes)
        while low < high:  # the longest that fits is in low..high
            middle = (low + high + 1) // 2
            low, high = (middle, high) if len(encode(shortened(message, middle))) <= limit_bytes else (low, middle - 1)
        encoded = encode(shortened(message, low))
    except (TypeError, ValueError):
        raise ProviderRejectedError("half a character cannot be sent", code="content") from None
    if len(encoded) > limit_bytes:
        raise ProviderRejectedError("too much besides the message to fit", code="content")
    return encoded


# ---- what is answered


def code_of(answer: Answer, reason: object = None) -> str:
    """Return what the trail keeps of an answer: its status, and the provider's own word where it is one."""
    return f"{answer.status} {reason}" if isinstance(reason, str) and _REASON.fullmatch(reason) else str(answer.status)


def json_of(answer: Answer) -> Mapping[str, Any]:
    """Return the object in an answer's body; an empty one where there is none."""
    try:
        value = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def retry_after_seconds(answer: Answer, now: datetime) -> float | None:
    """Return the seconds in Retry-After (RFC 9110 section 10.2.3), from 0 to a day; None where there is none."""
    text = answer.headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), MAX_RETRY_AFTER_SECONDS)
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return min(max(0.0, (at - now).total_seconds()), MAX_RETRY_AFTER_SECONDS)


def failure(
    answer: Answer, code: str, now: datetime, *, throttled_seconds: float | None = None
) -> ProviderUnavailableError | ProviderThrottledError | ProviderRefusedError | ProviderRejectedError | SendUnknownError:
    """Return what a status means that the protocol gives no meaning of its own.

    `throttled_seconds`: the wait where a 429 names none.
    """
    again = retry_after_seconds(answer, now)
    match answer.status:
        case 429:
            wait = throttled_seconds if again is None else again
            return ProviderThrottledError("the provider asks us to slow down", code=code, retry_after_seconds=wait)
        case 401 | 403 | 407:
            return ProviderUnavailableError("the provider does not accept our credentials", code=code, retry_after_seconds=again)
        case 503:
            return ProviderUnavailableError("the provider is out of service", code=code, retry_after_seconds=again)
        case 502 | 504:  # somebody between us lost the answer
            return SendUnknownError("no answer came through from the provider", code=code)
        case status if 500 <= status < 600:
            return ProviderRefusedError("the provider failed on this delivery", code=code, retry_after_seconds=again)
        case status if 400 <= status < 500:
            return ProviderRejectedError("the provider will never take this delivery", code=code)
        case status if 300 <= status < 400:  # not followed: whoever answers here is not the provider
            return ProviderUnavailableError("the provider is somewhere else", code=code)
        case _:
            return SendUnknownError("the provider's answer says nothing", code=code)


def gone(code: str) -> ProviderRejectedError:
    """Return what a device that is no more is answered with."""
    return ProviderRejectedError("the device is gone", code=code, suppresses=Suppression.DEAD_TOKEN)


# ---- how it is configured


def secret_text(config: ProviderConfig, option: str) -> str:
    """Return the secret of an option: its text, or what the file says that it names. Raises SettingsError, quoting neither."""
    value = config.options.get(option, "").strip()
    config.require(**{option: value})
    if value.startswith(("-----BEGIN", "{")):
        return value
    try:
        return Path(value).read_text("utf-8")
    except (OSError, ValueError):
        raise SettingsError([f"provider {config.name}: {option} is neither a secret nor a file that can be read"]) from None


def context_of(config: ProviderConfig, *, protocols: Sequence[str] = ("h2", "http/1.1")) -> ssl.SSLContext:
    """Return how the provider is trusted: by the system's authorities, or those in the PEM text or file of `ca`."""
    authorities = secret_text(config, "ca") if config.options.get("ca") else None
    try:
        return client_context(authorities, protocols=protocols)
    except (ssl.SSLError, ValueError):
        raise SettingsError([f"provider {config.name}: ca is no certificate in PEM"]) from None


class PushChannel:
    """What the three have in common beside `open`, `send` and `close`."""

    def __init__(self, config: ProviderConfig, ports: Ports, kind: Kind) -> None:
        self.name: str = topics.Channel.PUSH
        self.provider = config.name
        self.reported_as: str = kind
        self.routes: frozenset[str] | None = frozenset({str(kind)})
        self.max_open = config.max_open or ports.max_open
        self.on_unknown = OnUnknown.RESEND  # a repetition takes the place of the first on the device, by `replaces`
        self.unknown_seconds = 0.0

    def record(self, delivery: Delivery) -> None:
        """Return None: a provider is called."""

    def reference_of(self, delivery: Delivery, receipt: Receipt | None) -> None:
        """Return None: no push service reports later."""

    async def look_up(self, delivery: Delivery, content: Content) -> Receipt | None:  # noqa: ARG002 - the channel contract
        """Return None: no push service can be asked."""
        return None
