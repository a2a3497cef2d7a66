"""Bearer tokens of the web: who asks. Signed JWTs (RFC 7519, HS256) that name a user, or carry the service scope.

A user's token has the claim `sub`; a service's has `scope: "service"` and no `sub`. Every token ends (`exp`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import jwt

ISSUER = "flowmart-notifications"
AUDIENCE = "flowmart-notifications-web"
SERVICE_SCOPE = "service"
DEFAULT_LIFETIME_SECONDS = 3_600
LEEWAY_SECONDS = 5  # clocks of issuer and verifier may differ by so much
MAX_HEADER_CHARACTERS = 4_096

_ALGORITHM = "HS256"


class UnauthorizedError(Exception):
    """No valid token. Answer 401; the message may be shown, it never repeats the token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks: exactly one of a user and a service."""

    user_id: str | None
    is_service: bool

    def may_see(self, user_id: str) -> bool:
        """Say whether the caller may see what belongs to `user_id`."""
        return self.is_service or self.user_id == user_id


def issue(key: bytes, *, user_id: str | None, lifetime_seconds: int = DEFAULT_LIFETIME_SECONDS) -> str:
    """Return a token for `user_id`, or with the service scope when it is None. Raises ValueError for an empty user id."""
    if user_id == "":
        raise ValueError("a token needs a user id, or None for a service")
    now = int(time.time())
    claims: dict[str, object] = {"iss": ISSUER, "aud": AUDIENCE, "iat": min(now, now + lifetime_seconds), "exp": now + lifetime_seconds}
    claims |= {"scope": SERVICE_SCOPE} if user_id is None else {"sub": user_id}
    return jwt.encode(claims, key, algorithm=_ALGORITHM)


def verify(key: bytes, header_value: str | None) -> Caller:
    """Return who sent the Authorization header `header_value`. Raises UnauthorizedError."""
    if not header_value:
        raise UnauthorizedError("a bearer token is required")
    if len(header_value) > MAX_HEADER_CHARACTERS:
        raise UnauthorizedError(f"the Authorization header is longer than {MAX_HEADER_CHARACTERS} characters")
    scheme, _, token = header_value.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise UnauthorizedError("the Authorization header is not of the form: Bearer <token>")
    try:
        claims = jwt.decode(
            token.strip(),
            key,
            algorithms=[_ALGORITHM],
            issuer=ISSUER,
            audience=AUDIENCE,
            leeway=LEEWAY_SECONDS,
            options={"require": ["exp", "iat", "iss", "aud"], "enforce_minimum_key_length": True},
        )
    except jwt.ExpiredSignatureError:
        raise UnauthorizedError("the token has expired") from None
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise UnauthorizedError("the token is not valid") from None
    match claims.get("sub"), claims.get("scope"):
        case None, "service":
            return Caller(user_id=None, is_service=True)
        case str(user_id), None if user_id:
            return Caller(user_id=user_id, is_service=False)
    raise UnauthorizedError("the token names neither a user nor a service")
