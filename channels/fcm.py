"""Push to Android, and to whatever else Firebase reaches, by FCM's HTTP v1 API.

    fcm://PROJECT@fcm.googleapis.com?credentials=/run/secrets/firebase.json
    fcm://PROJECT@fcm.googleapis.com?credentials=$FIREBASE_JSON

`credentials`: a service account's JSON, or a file with it. Its `token_uri` says where access tokens come from.
`ca`: PEM of the authorities to trust instead of the system's, for a simulator.
Sources: firebase.google.com/docs/reference/fcm/rest/v1 (projects.messages, ErrorCode), RFC 7523.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import quote, urlsplit

import google.auth.exceptions
import google.auth.transport.requests
import orjson
import requests
from google.oauth2 import service_account
from requests.adapters import HTTPAdapter

from channels.base import Receipt
from channels.devices import LOOPBACK, Kind
from channels.http2 import Answer, Http2Client, steady
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
    seconds_left,
    secret_text,
    title_and_message,
)
from schemas.errors import (
    NotifyError,
    ProviderRefusedError,
    ProviderRejectedError,
    ProviderUnavailableError,
    SendUnknownError,
    SettingsError,
)
from schemas.status import Status

if TYPE_CHECKING:
    from channels.config import Ports, ProviderConfig
    from schemas.messages import Content, Delivery

SCOPE: Final = "https://www.googleapis.com/auth/firebase.messaging"
MAX_PAYLOAD_BYTES: Final = 4_096
_JSON: Final = steady("content-type", "application/json")
_MESSAGE_NAME: Final = re.compile(r"projects/[^/\s]{1,100}/messages/[\w:%.=-]{1,200}", re.ASCII)
_ACCESS_TOKEN: Final = re.compile(r"[!-~]+")
_THIRD_PARTY: Final = "THIRD_PARTY_AUTH_ERROR"
_QUOTA_SECONDS: Final = 60.0  # what Google asks for where it names no time
_TOKEN_SECONDS: Final = 4.0  # with a request's 12 s shorter than a drain (streams.shard.DRAIN_SECONDS)
_AGAIN_SECONDS: Final = 5.0  # between attempts to renew a token that is still good
_YOUNG_SECONDS: Final = 60.0
_RENEW_SECONDS: Final = 300.0  # before its end, or a tenth of its time if that is less


class AccessTokens:
    """A service account's access tokens: renewed before they expire, by one thread however many ask.

    `info`: the service account. `authorities`: PEM text of those to trust; None: the system's. Raises ValueError for what is
    no service account.
    """

    def __init__(self, info: Mapping[str, Any], *, authorities: str | None, now: Callable[[], float] = time.time) -> None:
        self._credentials = cast(
            "Any",  # google-auth's types say less than it returns
            service_account.Credentials.from_service_account_info(dict(info), scopes=[SCOPE]),  # type: ignore[no-untyped-call]
        )
        self._authorities = authorities
        self._now = now
        self._token: str | None = None
        self._given_at = self._renew_at = self._expires_at = 0.0
        self._renewing: asyncio.Task[str | None] | None = None

    async def current(self) -> str:
        """Return a token that is good for a while. Raises ProviderUnavailableError `token` when none is to be had in time."""
        is_good = self._token is not None and self._now() < self._expires_at
        if self._renewing is None and (not is_good or self._now() >= self._renew_at):
            self._renewing = asyncio.create_task(self._renew())
        if self._token is not None and is_good:
            return self._token  # if a new one is on its way, nobody waits for it
        renewing = self._renewing
        assert renewing is not None
        await asyncio.wait([renewing], timeout=_TOKEN_SECONDS)
        code = "token" if not renewing.done() or renewing.cancelled() else renewing.result()
        if code is not None or self._token is None:
            raise ProviderUnavailableError("no access token was given to our account", code=code or "token")
        return self._token

    def replace(self, refused: str) -> bool:
        """Say whether there is, or will be, another token than one that was not accepted.

        None within the first minute: then it is not the token that ended but our account that may not send.
        """
        if refused == self._token:
            if self._now() - self._given_at < _YOUNG_SECONDS:
                return False
            self._forget()
        return True

    async def close(self) -> None:
        """Forget the token, and whoever is fetching one."""
        self._forget()
        if self._renewing is not None:
            self._renewing.cancel()

    def _forget(self) -> None:
        self._token, self._renew_at, self._expires_at = None, 0.0, 0.0

    async def _renew(self) -> str | None:
        """Fetch a token; return a code when that fails."""
        try:
            token, seconds = await asyncio.to_thread(self._fetch)
        except (google.auth.exceptions.GoogleAuthError, OSError, ValueError, TypeError, KeyError) as error:
            # beside its own errors google-auth lets through what an answer that is none leads to; no cause: it may quote
            # the assertion
            self._renew_at = self._now() + _AGAIN_SECONDS
            return "connect" if isinstance(error, google.auth.exceptions.TransportError) else "token"
        finally:
            self._renewing = None
        self._token = token
        self._given_at = self._now()
        self._expires_at = self._given_at + seconds
        self._renew_at = self._expires_at - min(_RENEW_SECONDS, seconds / 10)
        return None

    def _fetch(self) -> tuple[str, float]:
        session = requests.Session()
        session.trust_env = False  # neither proxies nor authorities from the environment
        if self._authorities is not None:
            session.mount("https://", _Trusting(self._authorities))
        with session:
            ask = google.auth.transport.requests.Request(session)
            self._credentials.refresh(partial(ask, timeout=_TOKEN_SECONDS))
        expires: datetime | None = self._credentials.expiry
        seconds = 0.0 if expires is None else (expires.replace(tzinfo=UTC) - datetime.now(UTC)).total_seconds()
        token = self._credentials.token
        if not isinstance(token, str) or not _ACCESS_TOKEN.fullmatch(token):
            raise ValueError("the access token cannot stand in a header")
        return token, seconds


class _Trusting(HTTPAdapter):
    """Trusts authorities given as text."""

    def __init__(self, authorities: str) -> None:
        self._authorities = authorities
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        context = ssl.create_default_context(cadata=self._authorities)
        super().init_poolmanager(*args, ssl_context=context, **kwargs)


class FcmChannel(PushChannel):
    """Sends through one Firebase project. `now` is the wall clock, in seconds; a request ends within `total_seconds`."""

    def __init__(
        self, config: ProviderConfig, ports: Ports, *, now: Callable[[], float] = time.time, total_seconds: float = TOTAL_SECONDS
    ) -> None:
        super().__init__(config, ports, Kind.FCM)
        config.only("credentials", "ca")
        config.require(project=config.username, host=config.host)
        self._host = config.host or ""
        self._port = config.port or 443
        self._path = f"/v1/projects/{quote(config.username or '', safe='')}/messages:send"
        info = _service_account(config)
        authorities = secret_text(config, "ca") if config.options.get("ca") else None
        self._tls = context_of(config)
        self._now = now
        self._total_seconds = total_seconds
        self._client: Http2Client | None = None
        try:
            self._tokens = AccessTokens(info, authorities=authorities, now=now)
        except ValueError:
            # no cause: it may quote the key
            raise SettingsError([f"provider {config.name}: credentials is no service account with its key"]) from None

    async def open(self) -> None:
        """Get ready; neither a token nor a connection is fetched before there is something to send."""
        if self._client is None:
            self._client = Http2Client(self._host, self._port, tls=self._tls, total_seconds=self._total_seconds)

    async def send(self, delivery: Delivery, content: Content) -> Receipt:
        """Send to one device. Returns and raises as the channel contract says; the codes are status and FCM's error code.

        A dead token: UNREGISTERED, and INVALID_ARGUMENT about the token. SENDER_ID_MISMATCH rejects without suppressing:
        were the project configured wrongly, every token would have it.
        """
        device = device_of(content, Kind.FCM)
        body = compose(delivery, content, token=device.token, now=datetime.fromtimestamp(self._now(), UTC))
        client = self._client
        if client is None:
            raise ProviderUnavailableError("the channel is closed", code="closed")
        loop = asyncio.get_running_loop()
        until = loop.time() + _TOKEN_SECONDS + self._total_seconds
        token = await self._tokens.current()
        answer = await client.post(self._path, _headers(token), body, seconds=until - loop.time())
        if (
            answer.status == 401
            and _error_code(answer) != _THIRD_PARTY
            and self._tokens.replace(token)
            and until - loop.time() > _TOKEN_SECONDS
        ):
            # the token ended before its time: revoked, or our clock is wrong
            token = await self._tokens.current()
            answer = await client.post(self._path, _headers(token), body, seconds=until - loop.time())
        return self._receipt(answer)

    async def close(self) -> None:
        """End the connections."""
        client, self._client = self._client, None
        await self._tokens.close()
        if client is not None:
            await client.close()

    def _receipt(self, answer: Answer) -> Receipt:
        if answer.status == 200:
            name = json_of(answer).get("name")
            if not isinstance(name, str) or not _MESSAGE_NAME.fullmatch(name):
                raise SendUnknownError("the provider's answer names no message", code="protocol")
            return Receipt(provider=self.provider, reference=name, status=Status.SENT, code="200")
        raise _error(answer, datetime.fromtimestamp(self._now(), UTC))


def compose(delivery: Delivery, content: Content, *, token: str, now: datetime) -> bytes:
    """Return the request's body: one message that replaces an earlier one of the same delivery, wherever the token leads.

    Title and message are shortened to the 4096 bytes that FCM carries. Raises ProviderRejectedError `content`.
    """
    title, message = title_and_message(content)
    same, ttl, urgent = replaces(delivery), seconds_left(delivery, now), is_urgent(delivery)
    data = {"notification_id": delivery.notification_id, "delivery_id": delivery.delivery_id}

    def payload(text: str) -> bytes:
        return orjson.dumps({"notification": {"title": title, "body": text}, "data": data})

    fitted = orjson.loads(fitting(payload, message, MAX_PAYLOAD_BYTES))
    return orjson.dumps(
        {
            "message": {
                "token": token,
                **fitted,
                # the tag is what replaces on the device; FCM ignores the key for what is shown without the app's help
                "android": {
                    "collapse_key": same,
                    "priority": "HIGH" if urgent else "NORMAL",
                    "ttl": f"{ttl}s",
                    "notification": {"tag": same},
                },
                # of tokens that lead to an iPhone or a browser
                "apns": {
                    "headers": {
                        "apns-collapse-id": same,
                        "apns-priority": "10" if urgent else "5",
                        "apns-expiration": str(int(now.timestamp()) + ttl if ttl else 0),
                    }
                },
                "webpush": {
                    "headers": {"TTL": str(ttl), "Urgency": "normal" if urgent else "low", "Topic": same},
                    "notification": {"tag": same},
                },
            }
        }
    )


def build(config: ProviderConfig, ports: Ports) -> FcmChannel:
    """Return the channel that `config` describes. Raises SettingsError."""
    return FcmChannel(config, ports)


def _headers(token: str) -> list[tuple[bytes, bytes]]:
    return [steady("authorization", f"Bearer {token}"), _JSON]


def _error_code(answer: Answer) -> str | None:
    """Return FCM's own code of an error; where there is none Google's status."""
    error = json_of(answer).get("error")
    if not isinstance(error, dict):
        return None
    for detail in _details(error):
        if isinstance(code := detail.get("errorCode"), str):
            return code
    status = error.get("status")
    return status if isinstance(status, str) else None


def _details(error: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    details = error.get("details")
    return [each for each in details if isinstance(each, dict)] if isinstance(details, list) else []


def _is_about_the_token(answer: Answer) -> bool:
    error = json_of(answer).get("error")
    if not isinstance(error, dict):
        return False
    violations = [each for detail in _details(error) for each in detail.get("fieldViolations") or () if isinstance(each, dict)]
    if violations:
        return any(each.get("field") == "message.token" for each in violations)
    # the older form, whose only mark is its sentence
    return str(error.get("message")).startswith("The registration token is not a valid FCM")


def _error(answer: Answer, now: datetime) -> NotifyError:
    word = _error_code(answer)
    code = code_of(answer, word)
    match word:
        case "UNREGISTERED" if answer.status == 404:
            return gone(code)
        case "INVALID_ARGUMENT" if answer.status == 400 and _is_about_the_token(answer):
            return gone(code)
        case "SENDER_ID_MISMATCH":
            return ProviderRejectedError("the device belongs to another sender", code=code)
        case code_ if code_ == _THIRD_PARTY:  # Apple or a browser's service refuses Firebase: other devices may pass
            return ProviderRefusedError("the service behind Firebase does not accept its credentials", code=code)
        case _ if answer.status == 404:  # not about the device: a wrong project, or not Firebase at all
            return ProviderUnavailableError("the provider does not know our project", code=code)
        case _:
            return failure(answer, code, now, throttled_seconds=_QUOTA_SECONDS)


def _service_account(config: ProviderConfig) -> Mapping[str, Any]:
    problem = SettingsError([f"provider {config.name}: credentials is no service account in JSON, with an https token_uri"])
    try:
        info = json.loads(secret_text(config, "credentials"))
        parts = urlsplit(info["token_uri"])
    except (ValueError, KeyError, TypeError):
        raise problem from None
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK):
        raise problem
    return cast("Mapping[str, Any]", info)
