"""Push to Apple's devices by APNs, over HTTP/2 and with provider tokens.

    apns://TEAMID.KEYID@api.push.apple.com?topic=com.example.shop&key=/run/secrets/AuthKey.p8
    apns://TEAMID.KEYID@api.sandbox.push.apple.com?topic=com.example.shop&key=$APNS_KEY

`topic`: the app's bundle id. `key`: the .p8 file, or its text. `ca`: PEM of the authorities to trust instead of the
system's, for a simulator. Devices of one app: with another topic or environment than theirs, Apple calls every token bad.
Sources: developer.apple.com, "Sending notification requests to APNs", "Establishing a token-based connection to APNs",
"Handling notification responses from APNs".
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

import jwt
import orjson
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from channels.base import Receipt
from channels.devices import Kind
from channels.http2 import Answer, Http2Client, steady, varying
from channels.push import (
    TOTAL_SECONDS,
    PushChannel,
    code_of,
    context_of,
    device_of,
    failure,
    fitting,
    gone,
    is_urgent,
    json_of,
    replaces,
    retry_after_seconds,
    seconds_left,
    secret_text,
    title_and_message,
)
from schemas.errors import (
    NotifyError,
    ProviderRefusedError,
    ProviderRejectedError,
    ProviderThrottledError,
    ProviderUnavailableError,
    SendUnknownError,
    SettingsError,
)
from schemas.status import Status

if TYPE_CHECKING:
    from channels.config import Ports, ProviderConfig
    from schemas.messages import Content, Delivery

MAX_PAYLOAD_BYTES: Final = 4_096
# Apple: not more often than every 20 minutes, and at least once an hour
OLDEST_TOKEN_SECONDS: Final = 50 * 60.0
YOUNGEST_TOKEN_SECONDS: Final = 20 * 60.0
_REQUEST_SECONDS: Final = 16.0  # both requests, where one has to be repeated: shorter than a drain
_LEAST_SECONDS: Final = 4.0  # for which a repetition is begun
_ACCOUNT: Final = re.compile(r"([A-Za-z0-9]{1,20})\.([A-Za-z0-9]{1,20})")
_TOPIC: Final = re.compile(r"[A-Za-z0-9.-]{1,200}")
_ALERT: Final = steady("apns-push-type", "alert")
# DeviceTokenNotForTopic is none of them: a wrong `topic` of ours would take every device from every user
_DEAD: Final = frozenset({"BadDeviceToken", "Unregistered", "ExpiredToken"})
# about our account or our configuration: a person has to see to it, and nothing is lost meanwhile
_OURS: Final = frozenset({"BadTopic", "MissingTopic", "TopicDisallowed", "BadCertificate", "BadCertificateEnvironment", "BadPath"})


class ProviderToken:
    """The token that says who we are (RFC 7519, ES256): the same for all requests until it is 50 minutes old.

    `now` is the wall clock, in seconds.
    """

    def __init__(self, *, team: str, key_id: str, key: ec.EllipticCurvePrivateKey, now: Callable[[], float]) -> None:
        self._team = team
        self._key_id = key_id
        self._key = key
        self._now = now
        self._made_at = 0.0
        self._text = ""

    def current(self) -> str:
        """Return the token, a new one where it is too old, or where the clock went back to before it."""
        age = self._now() - self._made_at
        if not self._text or not 0 <= age < OLDEST_TOKEN_SECONDS:
            self._make()
        return self._text

    def renew(self, refused: str) -> bool:
        """Make another token after Apple called `refused` expired; say whether there is one.

        Not within the first 20 minutes: Apple would answer TooManyProviderTokenUpdates, and a token as young as that is
        expired only because our clock is wrong.
        """
        if refused == self._text:
            if self._now() - self._made_at < YOUNGEST_TOKEN_SECONDS:
                return False
            self._make()
        return True

    def _make(self) -> None:
        self._made_at = self._now()
        claims = {"iss": self._team, "iat": int(self._made_at)}
        self._text = jwt.encode(claims, self._key, algorithm="ES256", headers={"kid": self._key_id})


class ApnsChannel(PushChannel):
    """Sends to the devices of one app. `now` is the wall clock, in seconds; a request ends within `total_seconds`."""

    def __init__(
        self, config: ProviderConfig, ports: Ports, *, now: Callable[[], float] = time.time, total_seconds: float = TOTAL_SECONDS
    ) -> None:
        super().__init__(config, ports, Kind.APNS)
        config.only("topic", "key", "ca")
        config.require(team_and_key_id=config.username, host=config.host, topic=config.options.get("topic"))
        account = _ACCOUNT.fullmatch(config.username or "")
        topic = config.options["topic"]
        if account is None:
            raise SettingsError([f"provider {config.name}: its url does not begin with apns://TEAMID.KEYID@"])
        if not _TOPIC.fullmatch(topic):
            raise SettingsError([f"provider {config.name}: topic is no bundle id"])
        self._host = config.host or ""
        self._port = config.port or 443
        self._topic = steady("apns-topic", topic)
        self._token = ProviderToken(team=account[1], key_id=account[2], key=_key(config), now=now)
        self._tls = context_of(config)
        self._now = now
        self._total_seconds = total_seconds
        self._client: Http2Client | None = None

    async def open(self) -> None:
        """Get ready; connects when there is something to send."""
        if self._client is None:
            self._client = Http2Client(self._host, self._port, tls=self._tls, total_seconds=self._total_seconds)

    async def send(self, delivery: Delivery, content: Content) -> Receipt:
        """Send to one device. Returns and raises as the channel contract says; the codes are status and Apple's reason.

        The apns-id is of the delivery and its generation, and so the same at each attempt.
        """
        device = device_of(content, Kind.APNS)
        body = compose(delivery, content)
        client = self._client
        if client is None:
            raise ProviderUnavailableError("the channel is closed", code="closed")
        now = self._now()
        ttl = seconds_left(delivery, datetime.fromtimestamp(now, UTC))
        identity = apns_id(delivery)
        headers = [
            self._topic,
            _ALERT,
            _URGENT if is_urgent(delivery) else _PATIENT,
            varying("apns-id", identity),
            varying("apns-collapse-id", replaces(delivery)),
            varying("apns-expiration", str(int(now) + ttl if ttl else 0)),
        ]
        began = time.monotonic()
        token = self._token.current()
        path = f"/3/device/{device.token}"
        answer = await client.post(path, [steady("authorization", f"bearer {token}"), *headers], body)
        left = _REQUEST_SECONDS - (time.monotonic() - began)
        if answer.status == 403 and _reason(answer) == "ExpiredProviderToken" and left > _LEAST_SECONDS and self._token.renew(token):
            token = self._token.current()
            answer = await client.post(path, [steady("authorization", f"bearer {token}"), *headers], body, seconds=left)
        if answer.status == 200:
            if answer.headers.get("apns-id", "").lower() != identity:
                raise SendUnknownError("the provider's answer does not name our message", code="protocol")
            return Receipt(provider=self.provider, reference=identity, status=Status.SENT, code="200")
        raise _error(answer, datetime.fromtimestamp(self._now(), UTC))

    async def close(self) -> None:
        """End the connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()


_URGENT, _PATIENT = steady("apns-priority", "10"), steady("apns-priority", "5")


def apns_id(delivery: Delivery) -> str:
    """Return the UUID (RFC 9562, version 8) of a delivery's redrive generation."""
    identity = f"{delivery.delivery_id} {delivery.generation}".encode()
    number = int.from_bytes(blake2b(identity, digest_size=16).digest(), "big")
    number = (number & ~(0xF << 76) & ~(0x3 << 62)) | (0x8 << 76) | (0x2 << 62)
    return str(uuid.UUID(int=number))


def compose(delivery: Delivery, content: Content) -> bytes:
    """Return the payload, its message shortened to Apple's 4096 bytes. Raises ProviderRejectedError `content`."""
    title, message = title_and_message(content)
    sound = {"sound": "default"} if is_urgent(delivery) else {}

    def payload(text: str) -> bytes:
        alert = {"title": title, "body": text}
        return orjson.dumps({"aps": {"alert": alert, **sound}, "notification_id": delivery.notification_id})

    return fitting(payload, message, MAX_PAYLOAD_BYTES)


def build(config: ProviderConfig, ports: Ports) -> ApnsChannel:
    """Return the channel that `config` describes. Raises SettingsError."""
    return ApnsChannel(config, ports)


def _reason(answer: Answer) -> str | None:
    reason = json_of(answer).get("reason")
    return reason if isinstance(reason, str) else None


def _error(answer: Answer, now: datetime) -> NotifyError:
    reason = _reason(answer)
    code = code_of(answer, reason)
    again = retry_after_seconds(answer, now)
    match answer.status:
        case 400 | 410 if reason in _DEAD:
            return gone(code)
        case 400 | 404 if reason in _OURS:
            return ProviderUnavailableError("the provider does not accept our topic", code=code)
        case 400 if reason == "IdleTimeout":
            return ProviderRefusedError("the connection idled too long", code=code)
        case 429 if reason == "TooManyProviderTokenUpdates":
            return ProviderThrottledError("the provider got too many tokens of ours", code=code, retry_after_seconds=again)
        case 404 | 405:
            return ProviderUnavailableError("whoever answers is not the provider", code=code)
        case 500 | 503 if reason == "Shutdown":
            return ProviderRefusedError("the server is going down; another will answer", code=code, retry_after_seconds=again)
        case 410:  # without a reason that we know nobody's device is taken away
            return ProviderRejectedError("the provider will never take this delivery", code=code)
        case _:
            return failure(answer, code, now)


def _key(config: ProviderConfig) -> ec.EllipticCurvePrivateKey:
    problem = SettingsError([f"provider {config.name}: key is no private key of P-256 in PEM, such as Apple's .p8"])
    try:
        key = load_pem_private_key(secret_text(config, "key").encode(), password=None)
    except (ValueError, TypeError):
        raise problem from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise problem
    return key
