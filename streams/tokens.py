"""Bearer tokens of the web: who asks. Signed JWTs (RFC 7519, HS256) that name a user, or carry the service scope.

A user's token has the claim `sub`; a service's has `scope: "service"` and no `sub`, and may name the service in `client_id`
(RFC 9068): its requests are told apart by it. Every token ends (`exp`).
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

ISSUER = "flowmart-notifications"
AUDIENCE = "flowmart-notifications-web"
SERVICE_SCOPE = "service"
DEFAULT_LIFETIME_SECONDS = 3_600
LEEWAY_SECONDS = 5  # clocks of issuer and verifier may differ by so much
MAX_HEADER_CHARACTERS = 4_096

_ALGORITHM = "HS256"
_SERVICE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class UnauthorizedError(Exception):
    """No valid token. Answer 401; the message may be shown, it never repeats the token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks: exactly one of a user and a service. `service`: its name, where the token says it."""

    user_id: str | None
    is_service: bool
    service: str | None = None

    @property
    def subject(self) -> str:
        """Who the token names, for what is counted or scoped by it. A user and a service never have the same."""
        return f"service:{self.service or ''}" if self.is_service else f"user:{self.user_id}"

    def may_see(self, user_id: str) -> bool:
        """Say whether the caller may see what belongs to `user_id`."""
        return self.is_service or self.user_id == user_id


def issue(key: bytes, *, user_id: str | None, service: str | None = None, lifetime_seconds: int = DEFAULT_LIFETIME_SECONDS) -> str:
    """Return a token for `user_id`, or with the service scope when it is None; `service` names the service.

    Raises ValueError for an empty user id, and for a name that is none or goes with a user.
    """
    import jwt  # here, as below: PyJWT brings X.509, and of the workers views alone has tokens

    if user_id == "":
        raise ValueError("a token needs a user id, or None for a service")
    if service is not None and (user_id is not None or not _SERVICE_NAME.fullmatch(service)):
        raise ValueError("a service's name has 1 to 63 letters, digits, dots, hyphens and underscores, and goes with no user")
    now = int(time.time())
    claims: dict[str, object] = {"iss": ISSUER, "aud": AUDIENCE, "iat": min(now, now + lifetime_seconds), "exp": now + lifetime_seconds}
    claims |= {"scope": SERVICE_SCOPE} if user_id is None else {"sub": user_id}
    if service is not None:
        claims["client_id"] = service
    return jwt.encode(claims, key, algorithm=_ALGORITHM)


def verify(key: bytes, header_value: str | None) -> Caller:
    """Return who sent the Authorization header `header_value`. Raises UnauthorizedError."""
    import jwt

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
    match claims.get("sub"), claims.get("scope"), claims.get("client_id"):
        case None, "service", None:
            return Caller(user_id=None, is_service=True)
        case None, "service", str(name) if _SERVICE_NAME.fullmatch(name):
            return Caller(user_id=None, is_service=True, service=name)
        case str(user_id), None, None if user_id:
            return Caller(user_id=user_id, is_service=False)
    raise UnauthorizedError("the token names neither a user nor a service")
