"""Devices that push reaches, by their addresses.

An address is one string: `fcm:TOKEN`, `apns:HEX`, or `webpush:` and the subscription as browsers give it out,
`{"endpoint": "https://…", "keys": {"p256dh": "…", "auth": "…"}}`. A delivery is for one device.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final
from urllib.parse import SplitResult, urlsplit

import orjson

MAX_ADDRESS_BYTES: Final = 4_096
# where browsers' push services are: of itself, or of all hosts below it. One of them may fail while the others do well
PUSH_SERVICES: Final = ("fcm.googleapis.com", "updates.push.services.mozilla.com", "web.push.apple.com", "notify.windows.com")
OTHER_SERVICE: Final = "other"
LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})

_FCM_TOKEN: Final = re.compile(r"[A-Za-z0-9_:-]+")
# bytes in hexadecimal, of no fixed length as Apple says; or the name of what a simulator is to do
_APNS_TOKEN: Final = re.compile(r"(?:[0-9A-Fa-f]{2}){0,200}(?:magic-[a-z]+)?")
_PUBLIC_KEY_BYTES, _AUTH_BYTES = 65, 16  # RFC 8291 section 3.1 and 3.2
_UNCOMPRESSED: Final = 4  # how such a key begins (SEC 1, section 2.3.3)


class Kind(StrEnum):
    """Which kind of push service reaches a device."""

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

    @property
    def route(self) -> str:
        """The route of its deliveries: its kind, and of a browser which service is behind it, as `channels.base.service_of` reads."""
        return str(self.kind) if self.subscription is None else f"{self.kind}/{_service(self.subscription.endpoint)}"


def _service(endpoint: str) -> str:
    """Return the push service at an endpoint. Users name endpoints, so what is not known has one name: the set stays small."""
    host = urlsplit(endpoint).hostname or ""
    return next((known for known in PUSH_SERVICES if host == known or host.endswith(f".{known}")), OTHER_SERVICE)


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


def from_base64url(text: str) -> bytes:
    """Return the bytes in base64url, with or without padding. Raises ValueError."""
    try:
        return base64.b64decode(text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4), altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise ValueError("is no base64url") from error


def to_base64url(data: bytes) -> str:
    """Return `data` in base64url without padding (RFC 7515 section 2)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")
