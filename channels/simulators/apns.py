"""APNs: what `channels.apns` meets at Apple, on loopback. HTTP/2 over TLS only, and as strict about tokens and headers."""

from __future__ import annotations

import re
import uuid
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import jwt
import orjson
from cryptography.hazmat.primitives.asymmetric import ec

from channels.simulators.http2 import Reply, Request
from channels.simulators.push import Pushed, PushSimulator, kept_key
from channels.simulators.script import Behaviour

if TYPE_CHECKING:
    from pathlib import Path

TEAM: Final = "SIMULATED1"
KEY_ID: Final = "KEY0000001"
TOPIC: Final = "com.flowmart.shop"
MAX_PAYLOAD_BYTES: Final = 4_096
_HOUR: Final = 3_600.0
_TWENTY_MINUTES: Final = 1_200.0
_CLOCK_SECONDS: Final = 60.0  # so far ahead of ours a client's clock may be
_PATH: Final = re.compile(r"/3/device/([^/?#]*)")
_TOKEN: Final = re.compile(r"(?:[0-9a-f]{2}){1,200}|(?:[0-9a-f]{2})*magic-[a-z]+")
_TYPES: Final = frozenset({"alert", "background", "location", "voip", "complication", "fileprovider", "mdm", "liveactivity", "pushtotalk"})
_MAX_COLLAPSE_BYTES: Final = 64
_KNOWN_TOKENS: Final = 1_000


class ApnsSimulator(PushSimulator):
    """One app of one team."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._key: ec.EllipticCurvePrivateKey | None = None
        self._issued: dict[str, float] = {}  # provider token, of a good signature -> iat
        self._current: dict[int, tuple[str, float]] = {}  # connection -> the token it uses, and its iat

    @property
    def url(self) -> str:
        """How to configure a provider with it."""
        host = self.origin.partition("://")[2]
        key, authorities = quote(str(self.folder / "AuthKey.p8")), quote(str(self.folder / "ca.pem"))
        return f"apns://{TEAM}.{KEY_ID}@{host}?topic={TOPIC}&key={key}&ca={authorities}"

    def address(self, name: str) -> str:
        """Return the address of a device: hexadecimal, unless it is a magic one."""
        return f"apns:{name if name.startswith('magic-') else name.encode().hex()}"

    @property
    def provider_tokens(self) -> int:
        """How many different provider tokens it has seen."""
        return len(self._issued)

    def make_credentials(self, folder: Path) -> None:
        """Write `AuthKey.p8`, as Apple gives it out."""
        self._key = kept_key(folder / "AuthKey.p8", lambda: ec.generate_private_key(ec.SECP256R1()))

    def other(self, request: Request) -> Reply | None:  # noqa: ARG002 - what a simulator is asked
        """Return None: there is nothing else."""
        return None

    def token_of(self, request: Request) -> str:
        """Return the device token."""
        match = _PATH.fullmatch(request.path)
        return match[1] if match else ""

    def refusal(self, request: Request) -> Reply | None:  # noqa: C901, PLR0912 - as many as there are reasons
        """Refuse what Apple refuses, with its reason."""
        headers = request.headers
        if request.method != "POST":
            return self._no(405, "MethodNotAllowed", request)
        if not request.path.startswith("/3/device/"):
            return self._no(404, "BadPath", request)
        refused = self._unauthorised(request)
        if refused is not None:
            return refused
        token = self.token_of(request)
        if not token:
            return self._no(400, "MissingDeviceToken", request)
        if not _TOKEN.fullmatch(token):
            return self._no(400, "BadDeviceToken", request)
        if "apns-topic" not in headers:
            return self._no(400, "MissingTopic", request)
        if headers["apns-topic"] != TOPIC:
            return self._no(400, "TopicDisallowed", request)
        if headers.get("apns-push-type") not in _TYPES:
            return self._no(400, "InvalidPushType", request)
        if headers.get("apns-priority", "10") not in {"1", "5", "10"}:
            return self._no(400, "BadPriority", request)
        if not headers.get("apns-expiration", "0").isdigit():
            return self._no(400, "BadExpirationDate", request)
        if "apns-id" in headers and not _is_uuid(headers["apns-id"]):
            return self._no(400, "BadMessageId", request)
        if len(headers.get("apns-collapse-id", "").encode()) > _MAX_COLLAPSE_BYTES:
            return self._no(400, "BadCollapseId", request)
        if not request.body:
            return self._no(400, "PayloadEmpty", request)
        if len(request.body) > MAX_PAYLOAD_BYTES:
            return self._no(413, "PayloadTooLarge", request)
        if not isinstance(_payload(request).get("aps"), dict):
            return self._no(400, "PayloadEmpty", request)
        return None

    def message(self, request: Request) -> Pushed:
        """Return the message."""
        payload = _payload(request)
        alert = payload["aps"].get("alert", {})
        return Pushed(
            reference=request.headers.get("apns-id", str(uuid.uuid4())),
            key=request.headers.get("apns-collapse-id", ""),
            token=self.token_of(request),
            title=alert.get("title", ""),
            message=alert.get("body", ""),
            headers=request.headers,
            body=payload,
            at=self.calls[-1],
        )

    def accepted(self, message: Pushed) -> Reply:
        """Say yes, without a body."""
        return Reply(status=200, headers={"apns-id": message.reference})

    def failed(self, behaviour: Behaviour) -> Reply:
        """Say no in Apple's words."""
        match behaviour:
            case Behaviour.THROTTLE:
                return self._no(429, "TooManyRequests", None, self.retry_after())
            case Behaviour.UNAVAILABLE:
                return self._no(503, "ServiceUnavailable", None, self.retry_after())
            case Behaviour.REFUSE:
                return self._no(500, "InternalServerError")
            case Behaviour.REJECT:
                return self._no(413, "PayloadTooLarge")
            case Behaviour.BOUNCE:
                return self._no(400, "BadDeviceToken")
            case _:
                return self._no(410, "Unregistered")

    def _unauthorised(self, request: Request) -> Reply | None:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if not token or kind.lower() != "bearer":
            return self._no(403, "MissingProviderToken", request)
        issued_at = self._issued.get(token) or self._verified(token)
        if issued_at is None:
            return self._no(403, "InvalidProviderToken", request)
        now = self._clock()
        if issued_at > now + _CLOCK_SECONDS:
            return self._no(403, "InvalidProviderToken", request)
        if issued_at < now - _HOUR:
            return self._no(403, "ExpiredProviderToken", request)
        current, began = self._current.get(request.connection, (token, issued_at))
        if current != token and issued_at - began < _TWENTY_MINUTES:
            return self._no(429, "TooManyProviderTokenUpdates", request)
        if len(self._current) > _KNOWN_TOKENS:
            self._current.clear()
        self._current[request.connection] = token, issued_at
        return None

    def _verified(self, token: str) -> float | None:
        assert self._key is not None
        try:
            header = jwt.get_unverified_header(token)
            # iat is judged by the caller, with a clock that tests can move
            claims = jwt.decode(token, self._key.public_key(), algorithms=["ES256"], issuer=TEAM, options={"verify_iat": False})
        except jwt.PyJWTError:
            return None
        if header.get("kid") != KEY_ID or not isinstance(claims.get("iat"), int):
            return None
        if len(self._issued) > _KNOWN_TOKENS:
            self._issued.clear()
        self._issued[token] = float(claims["iat"])
        return self._issued[token]

    def _no(self, status: int, reason: str, request: Request | None = None, headers: dict[str, str] | None = None) -> Reply:
        value: dict[str, object] = {"reason": reason}
        if status == 410:
            value["timestamp"] = int(self._clock() * 1000)
        identity = (request.headers.get("apns-id") if request else None) or str(uuid.uuid4())
        return Reply(status=status, headers={"apns-id": identity, **(headers or {})}, body=orjson.dumps(value))


def _payload(request: Request) -> dict[str, Any]:
    try:
        value = orjson.loads(request.body)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text.lower()
    except ValueError:
        return False
