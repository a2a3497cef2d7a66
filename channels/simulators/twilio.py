"""Twilio's message API for one account: what `channels.twilio` meets, on loopback.

It refuses what Twilio refuses, with Twilio's codes, lists messages by filter, and posts signed status callbacks.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import format_datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import parse_qs, urlencode, urlsplit

import aiohttp
from aiohttp import web

from channels.simulators.pace import Pace
from channels.simulators.script import Behaviour, Script, magic
from channels.sms import segments
from channels.twilio import REFERENCE, sign

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Coroutine, Mapping

MAX_REMEMBERED: Final = 200_000
SENDER: Final = "+15005550006"
MAX_CHARACTERS: Final = 1_600
_MAX_PAGE: Final = 1_000
_CALLBACK_ATTEMPTS: Final = 3
_CALLBACK_SECONDS: Final = 5.0
_AGAIN_SECONDS: Final = 0.2
_NUMBER: Final = re.compile(r"\+[1-9]\d{6,14}")
_OPTED_OUT: Final = (400, 21610, "Attempt to send to unsubscribed recipient")


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A message that was taken. Two with the same `identity` are one that was sent twice."""

    sid: str
    sender: str
    recipient: str = field(repr=False)
    text: str = field(repr=False)
    service: str
    callback: str  # where its status is posted; empty: nowhere
    status: str
    error: int | None = None
    created_at: datetime
    sent_at: datetime | None = None
    at: float  # of the monotonic clock

    @property
    def identity(self) -> tuple[str, str]:
        """What a repetition has in common: recipient, and the sender's own reference, or else the text."""
        reference = parse_qs(urlsplit(self.callback).query).get(REFERENCE)
        return self.recipient, reference[0] if reference else self.text


class TwilioSimulator:
    """An account. `callbacks`: the HTTP status that each status callback was answered with; 0: nobody answered."""

    def __init__(  # noqa: PLR0913 - what can be chosen, each by name
        self,
        *,
        script: Script | None = None,
        port: int = 0,
        seed: int = 0,
        sid: str = "AC" + "0123456789abcdef" * 2,
        token: str = "simulated-auth-token",  # noqa: S107 - a simulator's
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.script = script or Script()
        self.calls: deque[float] = deque(maxlen=MAX_REMEMBERED)  # monotonic time of each request to send
        self.look_ups = 0
        self.callbacks: deque[int] = deque(maxlen=MAX_REMEMBERED)
        self.opted_out: set[str] = set()
        self.sid = sid
        self.token = token
        self._messages: OrderedDict[str, Message] = OrderedDict()
        self._port = port
        self._tls = tls
        self._chance = random.Random(seed)  # noqa: S311 - the same each time is what is wanted
        self._runner: web.AppRunner | None = None
        self._client: aiohttp.ClientSession | None = None
        self._stopped = asyncio.Event()
        self._pace = Pace()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def messages(self) -> list[Message]:
        """What was taken, in order, each as it stands."""
        return list(self._messages.values())

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._port

    @property
    def url(self) -> str:
        """How to configure a provider with it (`channels.config`)."""
        scheme = "twilio" if self._tls else "twilio+http"
        return f"{scheme}://{self.sid}:{self.token}@127.0.0.1:{self.port}?{urlencode({'from': SENDER})}"

    async def __aenter__(self) -> Self:
        app = web.Application()
        base = f"/2010-04-01/Accounts/{self.sid}"
        app.add_routes(
            [
                web.post(f"{base}/Messages.json", self._send),
                web.get(f"{base}/Messages.json", self._list),
                web.get(base + "/Messages/{sid:SM[0-9a-f]{32}}.json", self._show),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, ssl_context=self._tls)
        await site.start()
        self._port = self._runner.addresses[0][1]
        # its own client: a callback that is slow or lost must not hold up the others
        timeout = aiohttp.ClientTimeout(total=_CALLBACK_SECONDS)
        self._client = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=100), trust_env=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopped.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.close()
        if self._runner is not None:
            await self._runner.cleanup()

    # ---- the API

    async def _send(self, request: web.Request) -> web.StreamResponse:
        now = time.monotonic()
        self.calls.append(now)
        form = {name: value for name, value in (await request.post()).items() if isinstance(value, str)}
        recipient = form.get("To", "")
        behaviour = magic(recipient) or self.script.behaviour(self._chance)
        if seconds := self.script.seconds(self._chance):
            await asyncio.sleep(seconds)
        if (refusal := self._not_taken(request, form, behaviour, now)) is not None:
            return refusal
        message = self._take(form, now)
        is_first = self._chance.random() < self.script.receipts_first
        if is_first:
            await self._report(message, behaviour)
        else:
            self._start(self._report(message, behaviour))
        match behaviour:
            case Behaviour.RESET_AFTER:
                return self._cut(request)
            case Behaviour.TIME_OUT:
                await self._stopped.wait()
                return self._cut(request)
            case Behaviour.GARBAGE:
                return web.Response(status=201, body=b"<html>\xff", content_type="text/html")
        return web.json_response(self._resource(message), status=201)

    def _not_taken(self, request: web.Request, form: Mapping[str, str], behaviour: Behaviour, now: float) -> web.StreamResponse | None:
        """Answer a message that is not taken; None when it is."""
        if behaviour is Behaviour.UNAVAILABLE:
            return self._failed(503, 20503, "Service Unavailable", retry_after=True)
        if behaviour is Behaviour.RESET_BEFORE:
            return self._cut(request)
        if self._pace.is_exceeded(self.script.per_second, now) or behaviour is Behaviour.THROTTLE:
            return self._failed(429, 20429, "Too Many Requests", retry_after=True)
        if (refusal := self._refusal(request, form)) is not None:
            return refusal
        if behaviour is Behaviour.REFUSE:
            return self._failed(500, 20500, "Internal Server Error")
        if behaviour is Behaviour.REJECT:
            return self._failed(400, 21211, "Invalid 'To' Phone Number")
        return None

    async def _list(self, request: web.Request) -> web.StreamResponse:
        self.look_ups += 1
        if (refusal := self._turned_away(request)) is not None:
            return refusal
        query = request.query
        found = [message for message in reversed(self._messages.values()) if _fits(message, query)]
        size = min(max(int(query.get("PageSize", "50")), 1), _MAX_PAGE)
        page = max(int(query.get("Page", "0")), 0)
        shown = list(islice(found, page * size, (page + 1) * size))
        has_more = len(found) > (page + 1) * size
        following = urlencode({**query, "Page": page + 1, "PageSize": size})
        return web.json_response(
            {
                "messages": [self._resource(message) for message in shown],
                "page": page,
                "page_size": size,
                "uri": request.path_qs,
                "next_page_uri": f"{request.path}?{following}" if has_more else None,
            }
        )

    async def _show(self, request: web.Request) -> web.StreamResponse:
        if (refusal := self._turned_away(request)) is not None:
            return refusal
        message = self._messages.get(request.match_info["sid"])
        return self._failed(404, 20404, "Not found") if message is None else web.json_response(self._resource(message))

    def _turned_away(self, request: web.Request) -> web.StreamResponse | None:
        try:
            given = aiohttp.BasicAuth.decode(request.headers.get("Authorization", ""), encoding="utf-8")
        except ValueError:
            given = None
        if given is None or (given.login, given.password) != (self.sid, self.token):
            return self._failed(401, 20003, "Authenticate")
        return None

    def _refusal(self, request: web.Request, form: Mapping[str, str]) -> web.StreamResponse | None:
        """Return how Twilio refuses a request, whatever the script says; None when it is sound."""
        if (refusal := self._turned_away(request)) is not None:
            return refusal
        callback = urlsplit(form.get("StatusCallback", "http://h"))
        validity = form.get("ValidityPeriod", "1")
        problems = (
            (not _NUMBER.fullmatch(form.get("To", "")), 21211, "Invalid 'To' Phone Number"),
            (not form.get("From") and not form.get("MessagingServiceSid"), 21603, "A 'From' phone number is required"),
            (bool(form.get("From")) and form["From"] != SENDER, 21606, "The 'From' phone number is not valid for this account"),
            (not form.get("Body"), 21602, "Message body is required"),
            (len(form.get("Body", "")) > MAX_CHARACTERS, 21617, "The concatenated message body exceeds the 1600 character limit"),
            (callback.scheme not in {"http", "https"} or not callback.hostname, 21609, "The 'StatusCallback' URL is not a valid URL"),
            (not validity.isdigit() or not 1 <= int(validity) <= 36_000, 21620, "Invalid ValidityPeriod"),
            (form.get("To") in self.opted_out, *_OPTED_OUT[1:]),
        )
        for is_so, code, text in problems:
            if is_so:
                return self._failed(400, code, text)
        return None

    def _failed(self, status: int, code: int, text: str, *, retry_after: bool = False) -> web.Response:
        headers = {"Retry-After": str(max(0, round(self.script.retry_after)))} if retry_after else {}
        value = {"code": code, "message": text, "more_info": f"https://www.twilio.com/docs/errors/{code}", "status": status}
        return web.json_response(value, status=status, headers=headers)

    def _cut(self, request: web.Request) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()
        return web.Response()

    def _resource(self, message: Message) -> dict[str, Any]:
        return {
            "sid": message.sid,
            "account_sid": self.sid,
            "api_version": "2010-04-01",
            "to": message.recipient,
            "from": message.sender or None,
            "messaging_service_sid": message.service or None,
            "body": message.text,
            "direction": "outbound-api",
            "status": message.status,
            "error_code": message.error,
            "error_message": None,
            "num_segments": str(len(segments(message.text, most=99).parts)),
            "num_media": "0",
            "date_created": format_datetime(message.created_at),
            "date_updated": format_datetime(message.sent_at or message.created_at),
            "date_sent": None if message.sent_at is None else format_datetime(message.sent_at),
            "uri": f"/2010-04-01/Accounts/{self.sid}/Messages/{message.sid}.json",
        }

    # ---- what becomes of a message

    def _take(self, form: Mapping[str, str], now: float) -> Message:
        message = Message(
            sid=f"SM{self._chance.getrandbits(128):032x}",
            sender=form.get("From", ""),
            recipient=form["To"],
            text=form["Body"],
            service=form.get("MessagingServiceSid", ""),
            callback=form.get("StatusCallback", ""),
            status="queued",
            created_at=datetime.now(UTC).replace(microsecond=0),
            at=now,
        )
        self._messages[message.sid] = message
        if len(self._messages) > MAX_REMEMBERED:
            self._messages.popitem(last=False)
        return message

    async def _report(self, message: Message, behaviour: Behaviour) -> None:
        """Let a message go its way, posting each step where its sender wants to hear of them."""
        script = self.script
        is_lost = self._chance.random() < script.receipts_lost
        times = 2 if self._chance.random() < script.receipts_doubled else 1
        await self._step(message, "sent")
        if script.receipts_delay:
            await asyncio.sleep(script.receipts_delay)
        error: int | None = None
        match behaviour:
            case Behaviour.BOUNCE:
                status, error = "undelivered", 30003
            case Behaviour.COMPLAIN:
                status, error = "failed", _OPTED_OUT[1]
                self.opted_out.add(message.recipient)
            case _:
                status = "delivered"
        for _ in range(times):
            await self._step(message, status, error, is_lost=is_lost)

    async def _step(self, message: Message, status: str, error: int | None = None, *, is_lost: bool = False) -> None:
        now = datetime.now(UTC).replace(microsecond=0)
        known = self._messages.get(message.sid, message)
        self._messages[message.sid] = current = replace(known, status=status, error=error, sent_at=known.sent_at or now)
        if not message.callback or is_lost:
            return
        form = {
            "AccountSid": self.sid,
            "ApiVersion": "2010-04-01",
            "From": current.sender,
            "MessageSid": current.sid,
            "MessageStatus": status,
            "SmsSid": current.sid,
            "SmsStatus": status,
            "To": current.recipient,
            **({"ErrorCode": str(error)} if error else {}),
        }
        headers = {"X-Twilio-Signature": sign(message.callback, form, self.token)}
        assert self._client is not None
        for attempt in range(_CALLBACK_ATTEMPTS):
            if attempt:
                await asyncio.sleep(_AGAIN_SECONDS)
            try:
                async with self._client.post(message.callback, data=form, headers=headers, allow_redirects=False) as answer:
                    self.callbacks.append(answer.status)
                    if answer.status // 100 != 5:
                        return
            except (aiohttp.ClientError, TimeoutError):
                self.callbacks.append(0)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _fits(message: Message, query: Mapping[str, str]) -> bool:
    """Say whether a message is in a list: by number, and by the day it was sent, which what is queued has not."""
    day = "" if message.sent_at is None else f"{message.sent_at:%Y-%m-%d}"
    tests: tuple[tuple[str, Callable[[str], bool]], ...] = (
        ("To", lambda value: message.recipient == value),
        ("From", lambda value: message.sender == value),
        ("DateSent", lambda value: day == value),
        ("DateSent>", lambda value: bool(day) and day >= value),
        ("DateSent<", lambda value: bool(day) and day <= value),
    )
    return all(test(query[name]) for name, test in tests if name in query)
