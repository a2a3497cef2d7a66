"""Signed webhooks as standardwebhooks.com specifies them: who may report to us, and how we sign what we report to others.

Three headers: `webhook-id` (the same at each repetition), `webhook-timestamp` (seconds since 1970) and `webhook-signature`
(signatures between spaces, each `v1,` and base64 of HMAC-SHA256 over `id.timestamp.body`). A secret is `whsec_` and base64 of
24 to 64 bytes. Source: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256

ID, TIMESTAMP, SIGNATURE = "webhook-id", "webhook-timestamp", "webhook-signature"
TOLERANCE_SECONDS = 300
_PREFIX = "whsec_"
_LEAST_BYTES, _MOST_BYTES = 24, 64
_MAX_ID_CHARACTERS = 256
_MAX_SIGNATURES = 10


class BadSignatureError(Exception):
    """Nobody whom we know signed it. The message may be shown; it repeats nothing of the request."""


class StaleSignatureError(BadSignatureError):
    """It was signed too long ago, or by a clock that is ahead: it may be a replay."""


def parse_secret(text: str) -> bytes:
    """Return the key in a secret's text. Raises ValueError, which never repeats it."""
    try:
        key = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("is not whsec_ and base64") from None
    if not text.startswith(_PREFIX) or not _LEAST_BYTES <= len(key) <= _MOST_BYTES:
        raise ValueError(f"is not {_PREFIX} and base64 of {_LEAST_BYTES} to {_MOST_BYTES} bytes")
    return key


def signed(keys: Sequence[bytes], *, message_id: str, at: datetime, body: bytes) -> dict[str, str]:
    """Return the headers that sign `body` under each of `keys`: of two while one takes over from the other."""
    timestamp = str(int(at.timestamp()))
    return {ID: message_id, TIMESTAMP: timestamp, SIGNATURE: " ".join(_signature(key, message_id, timestamp, body) for key in keys)}


def verify(keys: Sequence[bytes], headers: Mapping[str, str], body: bytes, *, now: datetime) -> str:
    """Return the id of a message that one of `keys` signed. Raises BadSignatureError, StaleSignatureError.

    `headers`: looked up by small letters, or in a mapping that does not mind.
    """
    message_id, timestamp, given = (headers.get(name, "") for name in (ID, TIMESTAMP, SIGNATURE))
    if not message_id or not timestamp or not given or len(message_id) > _MAX_ID_CHARACTERS:
        raise BadSignatureError(f"the headers {ID}, {TIMESTAMP} and {SIGNATURE} are required")
    if not timestamp.isascii() or not timestamp.isdigit() or len(timestamp) > 12:
        raise BadSignatureError(f"{TIMESTAMP} is not a number of seconds")
    wanted = [_signature(key, message_id, timestamp, body).encode() for key in keys]
    found = [each.encode(errors="replace") for each in given.split(" ")[:_MAX_SIGNATURES]]
    # all of them are compared, so that the time does not tell which
    matches = [hmac.compare_digest(each, one) for each in found for one in wanted]
    if not any(matches):
        raise BadSignatureError(f"{SIGNATURE} has no signature by a secret that is known here")
    if abs((now - datetime.fromtimestamp(int(timestamp), UTC)).total_seconds()) > TOLERANCE_SECONDS:
        raise StaleSignatureError(f"{TIMESTAMP} is more than {TOLERANCE_SECONDS} seconds away")
    return message_id


def _signature(key: bytes, message_id: str, timestamp: str, body: bytes) -> str:
    text = f"{message_id}.{timestamp}.".encode() + body
    return f"v1,{base64.b64encode(hmac.digest(key, text, sha256)).decode()}"
