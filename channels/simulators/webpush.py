"""A push service for browsers, and the browsers: what `channels.webpush` meets at Google, Mozilla or Apple, on loopback.

It checks what RFC 8030 and 8292 ask of an application server, and opens each message as the subscribed browser would
(RFC 8291); what cannot be opened was not delivered. Every path below /push/ is a subscription, all with the same keys.
"""

from __future__ import annotations

import re
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import http_ece
import jwt
import orjson
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from channels.devices import from_base64url, to_base64url
from channels.simulators.http2 import Reply, Request
from channels.simulators.push import Pushed, PushSimulator, kept_key
from channels.simulators.script import Behaviour

if TYPE_CHECKING:
    from pathlib import Path

SUBJECT: Final = "mailto:operations@flowmart.example"
MAX_BODY_BYTES: Final = 4_096
_DAY: Final = 86_400
_AUTHORIZATION: Final = re.compile(r"vapid t=([\w.-]+), ?k=([\w-]+)", re.ASCII | re.IGNORECASE)
_TOPIC: Final = re.compile(r"[A-Za-z0-9_-]{1,32}")
_URGENCIES: Final = frozenset({"very-low", "low", "normal", "high"})
_KNOWN_TOKENS: Final = 1_000


class WebPushSimulator(PushSimulator):
    """One service with any number of browsers, all subscribed for the one application server whose key it made."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._application: ec.EllipticCurvePrivateKey | None = None
        self._browser: ec.EllipticCurvePrivateKey | None = None
        self._auth_secret = b""
        self._tokens: dict[tuple[str, str], int] = {}  # token and key, of a good signature -> end
        self._opened: dict[str, Any] = {}
        self._sent = 0

    @property
    def url(self) -> str:
        """How to configure a provider with it."""
        options = f"vapid_key={quote(str(self.folder / 'vapid.pem'))}&subject={quote(SUBJECT)}"
        if not self._is_secure:
            return f"webpush://?{options}&insecure_loopback=1"
        return f"webpush://?{options}&origins={quote(self.origin)}&ca={quote(str(self.folder / 'ca.pem'))}"

    def address(self, name: str) -> str:
        """Return the address of a browser."""
        return f"webpush:{orjson.dumps(self.subscription(name)).decode()}"

    def subscription(self, name: str) -> dict[str, Any]:
        """Return a browser's subscription, as its page would send it in."""
        assert self._browser is not None
        keys = {"p256dh": to_base64url(_point(self._browser)), "auth": to_base64url(self._auth_secret)}
        return {"endpoint": f"{self.origin}/push/{name}", "expirationTime": None, "keys": keys}

    def make_credentials(self, folder: Path) -> None:
        """Write `vapid.pem`, the application server's key, `browser.pem`, that of all browsers, and one's `subscription.json`."""
        self._application, self._browser = (
            kept_key(folder / name, lambda: ec.generate_private_key(ec.SECP256R1())) for name in ("vapid.pem", "browser.pem")
        )
        self._auth_secret = sha256(self._browser.private_numbers().private_value.to_bytes(32, "big")).digest()[:16]
        (folder / "subscription.json").write_bytes(orjson.dumps(self.subscription("device")))

    def other(self, request: Request) -> Reply | None:
        """Know nothing outside of /push/."""
        return None if request.path.startswith("/push/") else Reply(status=404)

    def token_of(self, request: Request) -> str:
        """Return the browser's name."""
        return request.path.removeprefix("/push/")

    def refusal(self, request: Request) -> Reply | None:
        """Refuse what push services refuse."""
        headers = request.headers
        if request.method != "POST":
            return Reply(status=405)
        refused = self._unauthorised(headers.get("authorization", ""))
        if refused is not None:
            return refused
        if not headers.get("ttl", "").isdigit():  # RFC 8030 section 5.2: must be there
            return _no(400, "MissingTtl")
        if headers.get("urgency", "normal") not in _URGENCIES:
            return _no(400, "BadUrgency")
        if "topic" in headers and not _TOPIC.fullmatch(headers["topic"]):
            return _no(400, "BadTopic")
        if len(request.body) > MAX_BODY_BYTES:
            return _no(413, "PayloadTooLarge")
        if headers.get("content-encoding") != "aes128gcm":
            return _no(400, "BadEncoding")
        return None if self._open(request) else _no(400, "BadEncryption")

    def message(self, request: Request) -> Pushed:
        """Return the message, opened."""
        self._sent += 1
        shown = self._opened
        return Pushed(
            reference=f"message-{self._sent}",
            key=request.headers.get("topic", ""),
            token=self.token_of(request),
            title=shown.get("title", ""),
            message=shown.get("body", ""),
            headers=request.headers,
            body=shown,
            at=self.calls[-1],
        )

    def accepted(self, message: Pushed) -> Reply:
        """Say where the message is now."""
        return Reply(status=201, headers={"location": f"{self.origin}/message/{message.reference}"})

    def failed(self, behaviour: Behaviour) -> Reply:
        """Say no."""
        match behaviour:
            case Behaviour.THROTTLE:
                return Reply(status=429, headers=self.retry_after())
            case Behaviour.UNAVAILABLE:
                return Reply(status=503, headers=self.retry_after())
            case Behaviour.REFUSE:
                return Reply(status=500)
            case Behaviour.REJECT:
                return _no(413, "PayloadTooLarge")
            case Behaviour.BOUNCE:
                return Reply(status=404)
            case _:
                return Reply(status=410)

    def _unauthorised(self, authorization: str) -> Reply | None:
        match = _AUTHORIZATION.fullmatch(authorization)
        if match is None:
            return _no(401, "MissingAuthorization")
        token, key = match.groups()
        expires = self._tokens.get((token, key)) or self._verified(token, key)
        now = self._clock()
        if expires is None or not now < expires <= now + _DAY:
            return _no(403, "BadJwtToken")
        assert self._application is not None
        if from_base64url(key) != _point(self._application):
            return Reply(status=401)
        return None

    def _verified(self, token: str, key: str) -> int | None:
        try:
            public = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), from_base64url(key))
            claims = jwt.decode(token, public, algorithms=["ES256"], audience=self.origin, options={"verify_exp": False})
        except (jwt.PyJWTError, ValueError):
            return None
        subject = claims.get("sub", "")
        if not isinstance(claims.get("exp"), int) or not str(subject).startswith(("mailto:", "https://")):
            return None
        if len(self._tokens) > _KNOWN_TOKENS:
            self._tokens.clear()
        self._tokens[token, key] = claims["exp"]
        return self._tokens[token, key]

    def _open(self, request: Request) -> bool:
        try:
            plain = http_ece.decrypt(request.body, private_key=self._browser, auth_secret=self._auth_secret, version="aes128gcm")
            value = orjson.loads(plain)
        except (http_ece.ECEException, ValueError):
            return False
        self._opened = value if isinstance(value, dict) else {}
        return True


def _point(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def _no(status: int, reason: str) -> Reply:
    return Reply(status=status, headers={"content-type": "application/json"}, body=orjson.dumps({"reason": reason}))
