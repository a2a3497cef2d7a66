"""Personal data on the wire: sealed with a key per user, which is itself wrapped with the deployment's seal key.

Destroying the user's wrapped key (a tombstone in the `keys` topic) makes everything sealed with it unreadable wherever
it was copied (design rule 10). AES-256-GCM (NIST SP 800-38D) with the user id and the purpose as associated data. The
nonce is a keyed hash of purpose and plaintext: sealing the same text again gives the same bytes, so deciding again
decides the same, and a nonce is never shared by two texts.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from schemas.codec import pack
from schemas.errors import UnsealableError
from schemas.messages import NotificationRequested, RequestData

KEY_BYTES = 32
_NONCE_BYTES = 12


@lru_cache(maxsize=20_000)
def _cipher(key: bytes) -> AESGCM:
    return AESGCM(key)


def seal(key: bytes, plaintext: bytes, *, user_id: str, purpose: str) -> bytes:
    """Return nonce and ciphertext of `plaintext`, 28 bytes longer than it. `key` has 32 bytes."""
    associated = f"{purpose}\0{user_id}".encode()
    nonce = blake2b(associated + b"\0" + plaintext, key=key, digest_size=_NONCE_BYTES).digest()
    return nonce + _cipher(key).encrypt(nonce, plaintext, associated)


def unseal(key: bytes, sealed: bytes, *, user_id: str, purpose: str) -> bytes:
    """Return the plaintext. Raises UnsealableError when key, user or purpose are others than at sealing."""
    try:
        return _cipher(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], f"{purpose}\0{user_id}".encode())
    except (InvalidTag, ValueError) as error:
        raise UnsealableError(f"the {purpose} of a user cannot be opened with his key") from error


def wrap(seal_key: bytes, key: bytes, *, user_id: str) -> bytes:
    """Return a user's `key` sealed with the deployment's seal key."""
    return seal(seal_key, key, user_id=user_id, purpose="user-key")


@lru_cache(maxsize=20_000)
def unwrap(seal_key: bytes, wrapped: bytes, *, user_id: str) -> bytes:
    """Return the user's key. Raises UnsealableError when the seal key is not the one that wrapped it."""
    return unseal(seal_key, wrapped, user_id=user_id, purpose="user-key")


def sealed_request(key: bytes, request: NotificationRequested) -> NotificationRequested:
    """Return `request` with its data sealed with the user's `key`: what is said to him is nobody else's business."""
    sealed = seal(key, pack(RequestData(data=request.data)), user_id=request.user_id, purpose="request")
    return replace(request, data={}, sealed=sealed)
