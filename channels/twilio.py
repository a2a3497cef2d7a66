"""SMS over Twilio's Programmable Messaging API (2010-04-01), with its status callbacks.

    twilio://AC0123:$TWILIO_TOKEN@api.twilio.com?from=%2B14155550100

User and password are the account's SID and its auth token, which also signs the callbacks. `twilio+http` is the same without
TLS, for a simulator on this host. Options:

`from`            the number or name that messages are from, or
`service`         the SID of a Messaging Service that chooses one; one of both is needed
`transliterate`   `all`, `punctuation` or `none` (`channels.sms.Transliterate`); default all
`max_segments`    what is longer is cut, and ends in three dots; default 6
`ca`              a file with the authorities (PEM) to trust instead of the system's

Twilio knows no idempotency key. What it knows of ours is the callback's URL, which it keeps with the message: it names the
delivery, so that a callback settles an attempt whose answer never came. Where there is no callback URL, or before the
delivery is sent again, `look_up` searches the account's messages.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ssl
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import orjson

from channels import sms
from channels.base import OnUnknown, Receipt
from channels.http1 import Http1Client
from channels.http2 import Answer
from channels.options import one_of, trust_in, whole
from schemas import topics
from schemas.errors import (
    NotifyError,
    ProviderRefusedError,
    ProviderRejectedError,
    ProviderThrottledError,
    ProviderUnavailableError,
    SendUnknownError,
    SettingsError,
)
from schemas.ids import digest
from schemas.messages import DeliveryReport
from schemas.status import Status, Suppression

if TYPE_CHECKING:
    from channels.config import Ports, ProviderConfig
    from schemas.messages import Content, Delivery

REPORTED_AS: Final = "twilio"
REFERENCE: Final = "reference"  # in the query of a callback's URL
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_TOTAL_SECONDS: Final = 12.0  # of one request; shorter than a drain (streams.shard.DRAIN_SECONDS)
_UNKNOWN_SECONDS: Final = 600.0
_MAX_ANSWER_BYTES: Final = 2**20
_MAX_RETRY_AFTER_SECONDS: Final = 86_400.0
_MAX_REMEMBERED: Final = 10_000
_MAX_VALIDITY_SECONDS: Final = 36_000
_PAGE_SIZE: Final = 100

# Twilio's error codes (twilio.com/docs/api/errors). About our account or our settings: nothing is lost until a person looked
_OURS: Final = frozenset(
    {20003, 20005, 20006, 20008, 20404, 21212, 21401, 21603, 21606, 21659, 21660, 21661, 21701, 21702, 21703, 21704, 30002}
)
_THROTTLED: Final = frozenset({14107, 20429, 21611})
# the number is none, or none that takes messages
_DEAD: Final = frozenset({21211, 21217, 21614, 30005, 30006})
_OPTED_OUT: Final = 21610
# MessageStatus -> where it leaves the delivery; with any other it is on its way still
_STATES: Final = {
    "delivered": Status.DELIVERED,
    "read": Status.DELIVERED,
    "undelivered": Status.BOUNCED,
    "failed": Status.FAILED,
    "canceled": Status.FAILED,
}


def build(config: ProviderConfig, ports: Ports) -> TwilioChannel:
    """Return the provider that `config` describes. Raises SettingsError."""
    config.only("from", "service", "transliterate", "max_segments", "ca")
    sender, service = config.options.get("from", ""), config.options.get("service", "")
    config.require(host=config.host, user=config.username, password=config.password, from_or_service=sender or service)
    if sender and service:
        raise SettingsError([f"provider {config.name}: from and service are given; one of them is wanted"])
    is_secure = config.scheme == "twilio"
    if not is_secure and config.host not in _LOOPBACK:
        raise SettingsError([f"provider {config.name}: {config.scheme} is for a simulator on this host; its token would be readable"])
    host = f"[{config.host}]" if ":" in (config.host or "") else config.host
    return TwilioChannel(
        Account(
            origin=f"{'https' if is_secure else 'http'}://{host}{f':{config.port}' if config.port else ''}",
            sid=config.username or "",
            token=config.password,
            sender=sender,
            service=service,
        ),
        provider=config.name,
        callback_url=ports.callback_url(config.name),
        routes=config.routes,
        max_open=config.max_open or ports.max_open,
        transliterate=config.option("transliterate", one_of(sms.Transliterate), sms.Transliterate.ALL),
        max_segments=config.option("max_segments", whole(1, 10), sms.MAX_SEGMENTS),
        tls_context=config.option("ca", trust_in, None),
    )


def verify_twilio(url: str, params: Mapping[str, str | Sequence[str]], signature: str, token: str) -> bool:
    """Say whether `signature` (X-Twilio-Signature) is of the account with `token`, over a form posted to `url`.

    `url`: as it was given to Twilio, with its query. Whether its port was signed too depends on Twilio's age: both
    are taken. A parameter that comes several times has a list. A wrong signature takes as long as a right one.
    Source: twilio.com/docs/usage/security, and the request validator of Twilio's own libraries.
    """
    given = signature.encode("utf-8", "replace")
    matches = [hmac.compare_digest(given, sign(each, params, token).encode("ascii")) for each in _forms(url)]
    return any(matches)


def sign(url: str, params: Mapping[str, str | Sequence[str]], token: str) -> str:
    """Return the signature of a form posted to `url`: HMAC-SHA1 over both, in base64."""
    text = url
    for name in sorted(params):
        value = params[name]
        text += "".join(name + each for each in ([value] if isinstance(value, str) else sorted(set(value))))
    return base64.b64encode(hmac.new(token.encode(), text.encode("utf-8", "replace"), hashlib.sha1).digest()).decode("ascii")


def report_of_callback(url: str, params: Mapping[str, str]) -> DeliveryReport | None:
    """Return what a status callback reports; None while the message is on its way still.

    `url`: where it was posted, whose query names the delivery. Raises ValueError for what is no status callback of ours.
    """
    reference = dict(parse_qsl(urlsplit(url).query)).get(REFERENCE)
    state = params.get("MessageStatus") or params.get("SmsStatus")
    if not reference or not state:
        raise ValueError("is no status callback of a message from here")
    status = _STATES.get(state)
    if status is None:
        return None
    error = params.get("ErrorCode", "")
    error = error if error.isascii() and error.isdigit() and len(error) <= 10 else ""
    code = f"{state} {error}" if error else state
    return DeliveryReport(
        report_id=digest(REPORTED_AS, reference, status, code, size=16),
        provider=REPORTED_AS,
        reference=reference,
        status=status,
        code=code,
        at=datetime.now(UTC),
        suppresses=_suppresses(int(error or 0)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """An account and who its messages are from: a number or name (`sender`), or a Messaging Service."""

    origin: str
    sid: str
    token: str = field(repr=False)
    sender: str = ""
    service: str = ""


class TwilioChannel:
    """Sends through one account. `callback_url`: where Twilio reports; None: nobody listens.

    `tls_context` replaces the system's trusted authorities; a request ends within `total_seconds`.
    """

    def __init__(  # noqa: PLR0913 - what a channel is
        self,
        account: Account,
        *,
        provider: str = "twilio",
        callback_url: str | None = None,
        routes: frozenset[str] | None = None,
        max_open: int = 32,
        transliterate: sms.Transliterate = sms.Transliterate.ALL,
        max_segments: int = sms.MAX_SEGMENTS,
        tls_context: ssl.SSLContext | None = None,
        total_seconds: float = _TOTAL_SECONDS,
    ) -> None:
        self.name: str = topics.Channel.SMS
        self.provider = provider
        self.reported_as = REPORTED_AS  # by a reference of ours, whatever the account
        self.routes = routes
        self.max_open = max_open
        self.on_unknown = OnUnknown.RESEND
        self.unknown_seconds = _UNKNOWN_SECONDS
        self._account = account
        self._callback_url = callback_url
        self._transliterate = transliterate
        self._max_segments = max_segments
        self._tls_context = tls_context
        self._total_seconds = total_seconds
        self._path = f"/2010-04-01/Accounts/{quote(account.sid, safe='')}/Messages.json"
        credentials = base64.b64encode(f"{account.sid}:{account.token}".encode())
        self._headers = [(b"Authorization", b"Basic " + credentials), (b"Content-Type", b"application/x-www-form-urlencoded")]
        self._http: Http1Client | None = None
        # of messages that were accepted here: their SID, and our name of the delivery
        self._accepted: OrderedDict[str, str] = OrderedDict()

    def record(self, delivery: Delivery) -> None:
        """Return None: a provider is called."""

    def reference_of(self, delivery: Delivery, receipt: Receipt | None) -> str | None:  # noqa: ARG002 - the channel contract
        """Return the name that the callback's URL carries, known or not whether the message arrived; None without a URL."""
        return None if self._callback_url is None else _reference(delivery)

    async def open(self) -> None:
        """Load the trusted authorities, where TLS is wanted. Connects only when there is something to send."""
        if self._http is not None:
            return
        is_secure = self._account.origin.startswith("https:")
        if is_secure and self._tls_context is None:
            self._tls_context = await asyncio.to_thread(ssl.create_default_context)
        self._http = Http1Client(
            self._account.origin,
            tls=self._tls_context if is_secure else None,
            max_open=self.max_open,
            total_seconds=self._total_seconds,
            max_answer_bytes=_MAX_ANSWER_BYTES,
        )

    async def send(self, delivery: Delivery, content: Content) -> Receipt:
        """Hand the message over to Twilio. Returns and raises as the channel contract says, with these codes.

        - of Twilio: its error code, such as `21211`, or the HTTP status where it gave none, such as `503`.
        - `address`, `country_not_allowed`, `content`: cannot be sent at all. Rejected, without a call.
        - `connect`, `tls`: no connection. `connection`, `timeout`, `protocol`: broke off, took too long, or answered what is
          no answer; unknown, as the request may have been read. `closed`: we closed the channel.
        """
        number = sms.carried(content.address, self.routes)
        form = {"To": number.e164, "Body": self._text(content), **self._sender(), **_validity(delivery)}
        if self._callback_url is not None:
            joint = "&" if urlsplit(self._callback_url).query else "?"
            form["StatusCallback"] = f"{self._callback_url}{joint}{urlencode({REFERENCE: _reference(delivery)})}"
        answer = _Answer.of(await self._opened().post(self._path, self._headers, urlencode(form).encode("ascii")))
        if answer.status // 100 != 2:
            raise _meaning(answer)
        sid = answer.value.get("sid")
        if not isinstance(sid, str) or not sid:
            raise SendUnknownError("Twilio's answer is none", code="protocol")
        self._accepted[sid] = _reference(delivery)
        if len(self._accepted) > _MAX_REMEMBERED:
            self._accepted.popitem(last=False)
        return Receipt(provider=self.provider, reference=sid, status=Status.SENT)

    async def look_up(self, delivery: Delivery, content: Content) -> Receipt | None:
        """Return the receipt of a message to this number with this text, that Twilio took after the delivery was created.

        Twilio does not say what the callback's URL was. Two deliveries with one text to one number, of which this worker did
        not send the other, are therefore taken for one: the recipient has read it. Raises ProviderUnavailableError or
        ProviderThrottledError when Twilio does not tell.
        """
        try:
            number, text = sms.carried(content.address, self.routes), self._text(content)
        except ProviderRejectedError:
            return None  # it was never sent
        # no filter by the day sent: what is queued has none
        query = urlencode({"To": number.e164, "PageSize": _PAGE_SIZE})
        answer = _Answer.of(await self._opened().get(f"{self._path}?{query}", self._headers[:1]))
        if answer.status != 200:
            meaning = _meaning(answer)
            is_passing = isinstance(meaning, ProviderThrottledError | ProviderUnavailableError)
            raise meaning if is_passing else ProviderUnavailableError(f"Twilio does not tell: {answer.status}", code=str(answer.status))
        earliest = delivery.created_at + answer.ahead - timedelta(seconds=1)  # Twilio tells whole seconds
        listed = answer.value.get("messages")
        for message in (each for each in listed if isinstance(each, dict)) if isinstance(listed, list) else ():
            sid, created = message.get("sid"), _moment(message.get("date_created"))
            is_ours = self._accepted.get(str(sid), _reference(delivery)) == _reference(delivery)
            is_from_us = not self._account.sender or message.get("from") == self._account.sender
            is_same = message.get("to") == number.e164 and str(message.get("body", "")).strip() == text.strip()
            if is_ours and is_from_us and is_same and created is not None and created >= earliest:
                return Receipt(provider=self.provider, reference=sid, status=Status.SENT)
        return None

    async def close(self) -> None:
        """End every connection. Calls that run fail."""
        http, self._http = self._http, None
        if http is not None:
            await http.close()

    def _text(self, content: Content) -> str:
        if not content.text:
            raise ProviderRejectedError("no text to send", code="content")
        return sms.fitted(content.text, transliterate=self._transliterate, most=self._max_segments).text

    def _sender(self) -> dict[str, str]:
        account = self._account
        return {"MessagingServiceSid": account.service} if account.service else {"From": account.sender}

    def _opened(self) -> Http1Client:
        if self._http is None:
            raise ProviderUnavailableError("the channel is closed", code="closed")
        return self._http


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What Twilio answered: `value` is empty where it is no JSON object. `ahead`: how far its clock is before ours."""

    status: int
    value: Mapping[str, Any]
    retry_after_seconds: float | None
    ahead: timedelta

    @classmethod
    def of(cls, answer: Answer) -> _Answer:
        try:
            value = orjson.loads(answer.body)
        except orjson.JSONDecodeError:
            value = None
        now = datetime.now(UTC)
        at = _moment(answer.headers.get("date"))
        return cls(
            status=answer.status,
            value=value if isinstance(value, dict) else {},
            retry_after_seconds=_retry_after(answer.headers.get("retry-after"), now),
            ahead=timedelta(0) if at is None else at - now,
        )


def _meaning(answer: _Answer) -> NotifyError:
    """Return what an answer other than success means."""
    given = answer.value.get("code")
    number = given if isinstance(given, int) else 0
    code = str(number or answer.status)
    sentence = f"Twilio did not take it: {code}"
    wait = answer.retry_after_seconds
    if answer.status == 429 or number in _THROTTLED:
        return ProviderThrottledError(sentence, code=code, retry_after_seconds=wait)
    if answer.status in {401, 403, 404, 502, 503} or answer.status // 100 in {1, 3} or number in _OURS:
        return ProviderUnavailableError(sentence, code=code, retry_after_seconds=wait)
    if answer.status == 504:
        # whoever answers for Twilio had passed it on
        return SendUnknownError(sentence, code=code)
    if answer.status == 400:
        return ProviderRejectedError(sentence, code=code, suppresses=_suppresses(number))
    return ProviderRefusedError(sentence, code=code, retry_after_seconds=wait)


def _suppresses(code: int) -> Suppression | None:
    if code == _OPTED_OUT:
        return Suppression.UNSUBSCRIBED
    return Suppression.HARD_BOUNCE if code in _DEAD else None


def _reference(delivery: Delivery) -> str:
    return f"{delivery.delivery_id}.{delivery.generation}"


def _validity(delivery: Delivery) -> dict[str, str]:
    """Return for how many seconds Twilio may try; nothing where that is longer than it takes."""
    if delivery.expires_at is None:
        return {}
    seconds = int((delivery.expires_at - datetime.now(UTC)).total_seconds())
    return {"ValidityPeriod": str(max(1, seconds))} if seconds <= _MAX_VALIDITY_SECONDS else {}


def _moment(text: object) -> datetime | None:
    """Return a moment as Twilio and HTTP write it (RFC 2822)."""
    try:
        found = parsedate_to_datetime(text) if isinstance(text, str) else None
    except ValueError:
        return None
    return found.replace(tzinfo=UTC) if found is not None and found.tzinfo is None else found


def _retry_after(text: str | None, now: datetime) -> float | None:
    """Return the seconds that a Retry-After header asks for, a number or a date (RFC 9110 section 10.2.3)."""
    if text is None:
        return None
    if text.isascii() and text.isdigit():
        return min(float(text), _MAX_RETRY_AFTER_SECONDS)
    at = _moment(text)
    return None if at is None else min(max((at - now).total_seconds(), 0.0), _MAX_RETRY_AFTER_SECONDS)


def _forms(url: str) -> list[str]:
    """Return `url` as it came, without its port, and with the port that its scheme implies: Twilio signs one of these."""
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname or ""
    except ValueError:
        return [url]
    host = f"[{host}]" if ":" in host else host
    userinfo = f"{parts.netloc.rpartition('@')[0]}@" if "@" in parts.netloc else ""
    implied = {"https": 443, "http": 80}.get(parts.scheme)
    ends = ["", f":{implied}"] if port in {None, implied} and implied else [""]
    return list(dict.fromkeys([url, *(urlunsplit(parts._replace(netloc=f"{userinfo}{host}{end}")) for end in ends)]))
