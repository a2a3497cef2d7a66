"""Links that end mails of a category to an address: sealed tokens that name no one, and end (RFC 8058).

Whoever has the mail has the token, and need not log in; so it opens nothing but this one choice. It holds the scope of a
suppression (a keyed hash of the address) and the category, sealed with AES-256-GCM under a key derived from the deployment's
token key: nobody can read or make one. The same delivery has the same link at each attempt.
"""

from __future__ import annotations

import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import Error as Base64Error
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256

from agents.control import category_scope
from schemas.errors import UnsealableError
from schemas.messages import Delivery
from schemas.sealed import seal, unseal
from schemas.topics import Lane

PATH = "/unsubscribe/"
# a sender has to honour it for 30 days at least (16 CFR 316.5); a mail is read later than that
LIFETIME = timedelta(days=60)
MAX_TOKEN_CHARACTERS = 512
_VERSION = b"\x01"
_PURPOSE = "unsubscribe"


class InvalidLinkError(Exception):
    """The token is none of ours. The message may be shown."""


class ExpiredLinkError(Exception):
    """The token was ours, and its time is over. The message may be shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsubscribe:
    """What a link ends: notifications of `category` to the address of `scope`, a suppression's (`agents.control`)."""

    scope: str
    category: str
    expires_at: datetime

    @property
    def order_scope(self) -> str:
        """The scope of the order that it asks for."""
        return category_scope(self.scope, self.category)

    @property
    def channel(self) -> str:
        """The channel that the scope names."""
        return self.scope.split(":")[1]


def unsubscribe_url(base_url: str, token_key: bytes, delivery: Delivery, address_scope: str) -> str | None:
    """Return the link for a delivery's mail; None where it cannot be left: what is critical was asked for by its reader.

    `base_url`: what the public reaches the web of `views` by. `address_scope`: as `Control.scope_of` returns it.
    """
    if delivery.lane == Lane.CRITICAL or not base_url:
        return None
    found = Unsubscribe(scope=address_scope, category=delivery.category, expires_at=delivery.created_at + LIFETIME)
    return f"{base_url.rstrip('/')}{PATH}{token_of(token_key, found)}"


def token_of(token_key: bytes, found: Unsubscribe) -> str:
    """Return the token of what a link ends: base64url, without padding."""
    _, channel, address_hash = found.scope.split(":")
    plain = b"".join(
        (
            _VERSION,
            int(found.expires_at.timestamp()).to_bytes(5, "big"),
            bytes.fromhex(address_hash),
            f"{channel}\0{found.category}".encode(),
        )
    )
    return urlsafe_b64encode(seal(_key(token_key), plain, user_id="", purpose=_PURPOSE)).decode().rstrip("=")


def open_token(token_key: bytes, token: str, *, now: datetime) -> Unsubscribe:
    """Return what a link ends. Raises InvalidLinkError, ExpiredLinkError."""
    invalid = InvalidLinkError("this link is not complete, or none of ours")
    if len(token) > MAX_TOKEN_CHARACTERS:
        raise invalid
    try:
        sealed = urlsafe_b64decode(token.encode("ascii") + b"=" * (-len(token) % 4))
        plain = unseal(_key(token_key), sealed, user_id="", purpose=_PURPOSE)
    except (Base64Error, UnicodeEncodeError, UnsealableError):
        raise invalid from None
    if plain[:1] != _VERSION:
        raise invalid
    channel, _, category = plain[6 + sha256().digest_size :].decode().partition("\0")
    expires_at = datetime.fromtimestamp(int.from_bytes(plain[1:6], "big"), UTC)
    if expires_at < now:
        raise ExpiredLinkError("this link has expired")
    scope = f"suppression:{channel}:{plain[6 : 6 + sha256().digest_size].hex()}"
    return Unsubscribe(scope=scope, category=category, expires_at=expires_at)


def _key(token_key: bytes) -> bytes:
    return hmac.digest(token_key, b"unsubscribe", sha256)
