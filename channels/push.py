"""What the push providers have in common: urgency, time to live, sizes that fit, what statuses mean, secrets."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson

from channels.base import OnUnknown
from channels.devices import Device, Kind, parse_device, to_base64url
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

MAX_TTL_SECONDS: Final = 28 * 86_400  # what FCM keeps at most, and Web Push services do not shorten
MAX_RETRY_AFTER_SECONDS: Final = 86_400.0
MAX_TITLE_CHARACTERS: Final = 200
TOTAL_SECONDS: Final = 12.0  # of one request; with what comes before it shorter than a drain (streams.shard.DRAIN_SECONDS)
_REASON: Final = re.compile(r"[A-Za-z0-9_]{1,60}")


def device_of(content: Content, kind: Kind) -> Device:
    """Return the device that `content` is for. Raises ProviderRejectedError `address` unless it is of this kind."""
    try:
        device = parse_device(content.address)
    except ValueError:
        raise ProviderRejectedError("the address is no device", code="address") from None
    if device.kind is not kind:
        raise ProviderRejectedError(f"the device is not reached by {kind}", code="address")
    return device


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
