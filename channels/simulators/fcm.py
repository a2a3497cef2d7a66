"""FCM's HTTP v1 API with the token endpoint before it: what `channels.fcm` meets at Google, on loopback.

`/token` gives an access token for an assertion that the service account signed (RFC 7523); only with one that it gave, and
that has not expired, is a message taken. What is not a message by the API's definition is refused as the API does.
"""

from __future__ import annotations

import re
import secrets
from functools import cache
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, quote

import jwt
import orjson
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from channels.simulators.http2 import Reply, Request
from channels.simulators.push import Pushed, PushSimulator, kept_key
from channels.simulators.script import Behaviour

if TYPE_CHECKING:
    from pathlib import Path

PROJECT: Final = "flowmart-simulated"
ACCOUNT: Final = f"notify@{PROJECT}.iam.gserviceaccount.com"
SCOPE: Final = "https://www.googleapis.com/auth/firebase.messaging"
GRANT: Final = "urn:ietf:params:oauth:grant-type:jwt-bearer"
GOOGLES_AUDIENCE: Final = "https://oauth2.googleapis.com/token"  # which google-auth names, wherever it asks
MAX_PAYLOAD_BYTES: Final = 4_096
_TOKEN: Final = re.compile(r"[A-Za-z0-9_:-]{1,4096}")
_TTL: Final = re.compile(r"\d{1,7}(\.\d{1,9})?s")
_FIELDS: Final = frozenset({"token", "notification", "data", "android", "apns", "webpush", "fcm_options", "name"})
_MAX_TTL_SECONDS: Final = 2_419_200


class FcmSimulator(PushSimulator):
    """One project. `token_seconds`: how long access tokens are good."""

    token_seconds = 3_600.0
    project = PROJECT

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tokens_given = 0
        self.refuses_tokens = False  # as when the account's key was revoked
        self._key: rsa.RSAPrivateKey | None = None
        self._tokens: dict[str, float] = {}  # access token -> wall clock at its end
        self._sent = 0

    @property
    def url(self) -> str:
        """How to configure a provider with it."""
        host = self.origin.partition("://")[2]
        return (
            f"fcm://{self.project}@{host}?credentials={quote(str(self.folder / 'firebase.json'))}&ca={quote(str(self.folder / 'ca.pem'))}"
        )

    def address(self, name: str) -> str:
        """Return the address of a device."""
        return f"fcm:{name}"

    def make_credentials(self, folder: Path) -> None:
        """Write `firebase.json`, as the console gives it out."""
        self._key = kept_key(folder / "account.pem", _new_key)
        info = {
            "type": "service_account",
            "project_id": self.project,
            "private_key_id": "1",
            "private_key": self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
            "client_email": ACCOUNT,
            "client_id": "1",
            "token_uri": f"{self.origin}/token",
        }
        file = folder / "firebase.json"
        file.touch(mode=0o600)
        file.write_bytes(orjson.dumps(info))

    def expire_tokens(self) -> None:
        """Let no token that was given be good any longer."""
        self._tokens.clear()

    def other(self, request: Request) -> Reply | None:
        """Give an access token."""
        if request.path != "/token":
            return None
        form = {name: values[0] for name, values in parse_qs(request.body.decode("latin-1")).items()}
        if request.method != "POST" or form.get("grant_type") != GRANT:
            return _json(400, {"error": "unsupported_grant_type"})
        assert self._key is not None
        try:
            claims = jwt.decode(
                form.get("assertion", ""),
                self._key.public_key(),
                algorithms=["RS256"],
                audience=[GOOGLES_AUDIENCE, f"{self.origin}/token"],
                issuer=ACCOUNT,
                options={"require": ["iat", "exp", "scope"]},
            )
        except jwt.PyJWTError:
            return _json(400, {"error": "invalid_grant", "error_description": "Invalid JWT Signature."})
        if self.refuses_tokens or claims["exp"] - claims["iat"] > 3_600 or SCOPE not in claims["scope"].split():
            return _json(400, {"error": "invalid_grant", "error_description": "Invalid JWT."})
        now = self._clock()
        self._tokens = {token: end for token, end in self._tokens.items() if end > now}
        token = f"ya29.{secrets.token_urlsafe(120)}"
        self._tokens[token] = now + self.token_seconds
        self.tokens_given += 1
        return _json(200, {"access_token": token, "expires_in": int(self.token_seconds), "token_type": "Bearer"})

    def token_of(self, request: Request) -> str:
        """Return the registration token."""
        message = _message(request)
        token = message.get("token") if message else None
        return token if isinstance(token, str) else ""

    def refusal(self, request: Request) -> Reply | None:
        """Refuse what FCM refuses."""
        if request.path != f"/v1/projects/{self.project}/messages:send":
            return _error(404, "NOT_FOUND", None)
        if request.method != "POST":
            return _error(405, "METHOD_NOT_ALLOWED", None)
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind != "Bearer" or self._tokens.get(token, 0.0) <= self._clock():
            return _error(401, "UNAUTHENTICATED", None)
        message = _message(request)
        if message is None or set(message) - _FIELDS:
            return _invalid("message")
        if not isinstance(message.get("token"), str) or not _TOKEN.fullmatch(message["token"]):
            return _invalid("message.token")
        data = message.get("data", {})
        if not isinstance(data, dict) or not all(isinstance(value, str) for value in data.values()):
            return _invalid("message.data[0].value")
        android = message.get("android", {})
        ttl = android.get("ttl", "0s")
        if not _TTL.fullmatch(ttl) or float(ttl[:-1]) > _MAX_TTL_SECONDS:
            return _invalid("message.android.ttl")
        if android.get("priority", "NORMAL") not in {"NORMAL", "HIGH"}:
            return _invalid("message.android.priority")
        shown = message.get("notification", {})
        if len(orjson.dumps({"notification": shown, "data": data})) > MAX_PAYLOAD_BYTES:
            return _error(400, "INVALID_ARGUMENT", None)
        return None

    def message(self, request: Request) -> Pushed:
        """Return the message."""
        message = _message(request) or {}
        self._sent += 1
        shown = message.get("notification", {})
        return Pushed(
            reference=f"projects/{self.project}/messages/0:{self._sent:016d}%f{self._sent:07x}",
            key=message.get("android", {}).get("notification", {}).get("tag", ""),
            token=message["token"],
            title=shown.get("title", ""),
            message=shown.get("body", ""),
            headers=request.headers,
            body=message,
            at=self.calls[-1],
        )

    def accepted(self, message: Pushed) -> Reply:
        """Name the message."""
        return _json(200, {"name": message.reference})

    def failed(self, behaviour: Behaviour) -> Reply:
        """Say no in FCM's words."""
        match behaviour:
            case Behaviour.THROTTLE:
                return _error(429, "RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED", self.retry_after())
            case Behaviour.UNAVAILABLE:
                return _error(503, "UNAVAILABLE", "UNAVAILABLE", self.retry_after())
            case Behaviour.REFUSE:
                return _error(500, "INTERNAL", "INTERNAL")
            case Behaviour.REJECT:
                return _invalid("message.notification")
            case Behaviour.BOUNCE:
                return _invalid("message.token")
            case _:
                return _error(404, "NOT_FOUND", "UNREGISTERED")


@cache
def _new_key() -> rsa.RSAPrivateKey:
    """Return a key, the same for all simulators of a process: making one takes longer than anything else that they do."""
    return rsa.generate_private_key(public_exponent=65_537, key_size=2_048)


def _message(request: Request) -> dict[str, Any] | None:
    try:
        value = orjson.loads(request.body)
    except orjson.JSONDecodeError:
        return None
    message = value.get("message") if isinstance(value, dict) else None
    return message if isinstance(message, dict) else None


def _json(status: int, value: object, headers: dict[str, str] | None = None) -> Reply:
    return Reply(status=status, headers={"content-type": "application/json; charset=UTF-8", **(headers or {})}, body=orjson.dumps(value))


def _error(status: int, word: str, code: str | None, headers: dict[str, str] | None = None) -> Reply:
    details = [{"@type": "type.googleapis.com/google.firebase.fcm.v1.FcmError", "errorCode": code}] if code else []
    error = {"code": status, "message": f"Simulated: {word}.", "status": word, "details": details}
    return _json(status, {"error": error}, headers)


def _invalid(name: str) -> Reply:
    details = [
        {"@type": "type.googleapis.com/google.firebase.fcm.v1.FcmError", "errorCode": "INVALID_ARGUMENT"},
        {"@type": "type.googleapis.com/google.rpc.BadRequest", "fieldViolations": [{"field": name, "description": "Simulated."}]},
    ]
    message = "Request contains an invalid argument."
    return _json(400, {"error": {"code": 400, "message": message, "status": "INVALID_ARGUMENT", "details": details}})
