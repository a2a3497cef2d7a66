"""A mail server to send to, as strict as real ones, that fails as its script says (`channels.simulators.script`).

Speaks ESMTP with PIPELINING, SIZE, 8BITMIME, SMTPUTF8, DSN, ENHANCEDSTATUSCODES, STARTTLS and AUTH (PLAIN, LOGIN, XOAUTH2). What it takes
and lets bounce comes back as a delivery status notification (RFC 3464), a complaint as a report of abuse (RFC 5965): real
mails to the return path, in `reports`, and handed to `on_report`.

| behaviour    | what the client sees                                              |
|--------------|-------------------------------------------------------------------|
| bounce       | taken; later a bounce, 5.1.1                                        |
| refuse       | RCPT: 450 4.2.1                                                   |
| reject       | RCPT: 550 5.7.1                                                   |
| throttle     | RCPT: 454 4.7.0, as Amazon SES says it                            |
| unavailable  | RCPT: 421 4.3.2, and the connection ends                          |
| reset before | the connection breaks at RCPT                                     |
| reset after, time out, garbage | taken; instead of the answer a reset, silence, nonsense |
| complain     | taken; later a report of abuse                                    |
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import random
import re
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Final, NamedTuple, Self, cast
from urllib.parse import quote

import aiosmtplib

from channels.simulators.pace import Pace
from channels.simulators.script import Behaviour, Script, magic

log = logging.getLogger(__name__)

_KEPT: Final = 10_000
_LONGEST_COMMAND: Final = 2_048  # RFC 5321 section 4.5.3.1.4 asks for 512, extensions and addresses add to it
_LONGEST_LINE: Final = 1_000
_MOST_ERRORS: Final = 20
_PATH: Final = re.compile(r"(?:FROM|TO):<([^<>\s]*)>(?: (.*))?", re.IGNORECASE)
_IN_GROUPS: Final = frozenset({"MAIL", "RCPT", "RSET"})  # RFC 2920 section 3.1: all others end a group
_MAIL_PARAMETERS: Final = frozenset({"SIZE", "BODY", "SMTPUTF8", "RET", "ENVID"})
_RCPT_PARAMETERS: Final = frozenset({"NOTIFY", "ORCPT"})
_TAKEN: Final = frozenset(
    {Behaviour.ACCEPT, Behaviour.BOUNCE, Behaviour.COMPLAIN, Behaviour.RESET_AFTER, Behaviour.TIME_OUT, Behaviour.GARBAGE}
)

OnReport = Callable[[str, bytes], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Message:
    """A mail that was taken. `id`: its Message-ID, by which a repetition is known; `raw`: as it was sent, dots unstuffed."""

    id: str
    sender: str
    recipients: tuple[str, ...]
    raw: bytes
    at: float  # by time.monotonic
    envelope_id: str | None = None


class Report(NamedTuple):
    """A bounce or complaint: a mail to `recipient`, the return path of what it is about."""

    recipient: str
    raw: bytes


@dataclass(slots=True, kw_only=True)
class SmtpSimulator:
    """`async with SmtpSimulator(script=Script(refuse=0.1)) as server:` listens until the block ends.

    `tls`: TLS from the start; `starttls`: offers it, and takes no mail and no password before. `login`: who may send, by
    password; `token`: or by XOAUTH2 with that access token. `on_report` is called with each report, its address first;
    `relay` builds one that sends it on.
    """

    script: Script = field(default_factory=Script)
    host: str = "127.0.0.1"
    port: int = 0
    seed: int = 0
    tls: ssl.SSLContext | None = None
    starttls: ssl.SSLContext | None = None
    login: tuple[str, str] | None = None
    token: str | None = None
    is_pipelining: bool = True
    is_utf8: bool = True
    max_bytes: int = 10 * 2**20
    on_report: OnReport | None = None
    messages: deque[Message] = field(default_factory=lambda: deque(maxlen=_KEPT))
    reports: deque[Report] = field(default_factory=lambda: deque(maxlen=_KEPT))
    calls: deque[float] = field(default_factory=lambda: deque(maxlen=100 * _KEPT))  # each RCPT, by time.monotonic
    connections: int = 0
    chance: random.Random = field(init=False, repr=False)
    sessions: set[_Session] = field(default_factory=set, repr=False)
    _pace: Pace = field(default_factory=Pace, repr=False)
    tasks: set[asyncio.Task[None]] = field(default_factory=set, repr=False)
    _server: asyncio.Server | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)  # noqa: S311 - a script's dice

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Session(self), self.host, self.port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        for session in tuple(self.sessions):
            session.abort()
        for task in tuple(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        """What a provider that sends here is configured with; XOAUTH2 and trust are options of its own."""
        scheme = "smtps" if self.tls is not None else "smtp+starttls" if self.starttls is not None else "smtp"
        who = "" if self.login is None else f"{quote(self.login[0], safe='')}:{quote(self.login[1], safe='')}@"
        return f"{scheme}://{who}{self.host}:{self.port}"

    def behaviour(self, recipient: str) -> Behaviour:
        """Draw what becomes of a mail to `recipient`, and count the call."""
        now = time.monotonic()
        self.calls.append(now)
        found = magic(recipient) or self.script.behaviour(self.chance)
        return Behaviour.THROTTLE if found in _TAKEN and self._pace.is_exceeded(self.script.per_second, now) else found

    def take(self, message: Message, behaviours: list[Behaviour]) -> None:
        """Keep a mail, and begin what comes back of it."""
        self.messages.append(message)
        for recipient, behaviour in zip(message.recipients, behaviours, strict=True):
            if behaviour not in {Behaviour.BOUNCE, Behaviour.COMPLAIN} or not message.sender:
                continue  # nothing is ever reported to the empty path (RFC 5321 section 4.5.5)
            if self.chance.random() < self.script.receipts_lost:
                continue
            write = bounce if behaviour is Behaviour.BOUNCE else complaint
            raw = write(message, recipient)
            times = 2 if self.chance.random() < self.script.receipts_doubled else 1
            task = asyncio.get_running_loop().create_task(self._report(Report(message.sender, raw), times))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _report(self, report: Report, times: int) -> None:
        if self.script.receipts_delay:
            await asyncio.sleep(self.script.receipts_delay)
        for _ in range(times):
            self.reports.append(report)
            if self.on_report is not None:
                await self.on_report(*report)

    def extensions(self, *, is_secure: bool) -> list[str]:
        """Return what EHLO announces."""
        lines = ["8BITMIME", "ENHANCEDSTATUSCODES", "DSN", f"SIZE {self.max_bytes}"]
        if self.is_pipelining:
            lines.append("PIPELINING")
        if self.is_utf8:
            lines.append("SMTPUTF8")
        if self.starttls is not None and not is_secure:
            lines.append("STARTTLS")
        elif self.login is not None or self.token is not None:
            lines.append("AUTH" + (" PLAIN LOGIN" if self.login else "") + (" XOAUTH2" if self.token else ""))
        return lines


def relay(host: str, port: int) -> OnReport:
    """Return what hands reports to a mail server, without a login, from the empty path as RFC 3464 says."""

    async def send(recipient: str, raw: bytes) -> None:
        try:
            await aiosmtplib.send(raw, sender="", recipients=[recipient], hostname=host, port=port, start_tls=False, timeout=10)
        except (aiosmtplib.SMTPException, OSError) as error:
            log.warning("report.lost error=%s", type(error).__name__)

    return send


def bounce(
    message: Message, recipient: str, *, action: str = "failed", status: str = "5.1.1", told: str = "550 5.1.1 no such mailbox here"
) -> bytes:
    """Return the delivery status notification (RFC 3464) on a mail, with its headers."""
    kind = "rfc822" if recipient.isascii() else "utf-8"
    envelope = f"Original-Envelope-Id: {message.envelope_id}\r\n" if message.envelope_id else ""
    fields = (
        f"Reporting-MTA: dns; simulator.example\r\n{envelope}Arrival-Date: {_now()}\r\n\r\n"
        f"Final-Recipient: {kind}; {recipient}\r\nAction: {action}\r\nStatus: {status}\r\n"
        f"Remote-MTA: dns; mx.simulator.example\r\nDiagnostic-Code: smtp; {told}\r\n"
    )
    media = "message/delivery-status" if recipient.isascii() else "message/global-delivery-status"
    subject = "Undelivered Mail Returned to Sender" if action == "failed" else "Delayed Mail"
    return _report_mail(message, subject, "delivery-status", "This is the mail system. Your mail has a problem.", media, fields)


def complaint(message: Message, recipient: str, *, kind: str = "abuse") -> bytes:
    """Return the report of a recipient who does not want a mail (RFC 5965), with its headers and without his address."""
    fields = (
        f"Feedback-Type: {kind}\r\nUser-Agent: simulator/1\r\nVersion: 1\r\nOriginal-Mail-From: <{message.sender}>\r\n"
        f"Arrival-Date: {_now()}\r\nReported-Domain: {recipient.rpartition('@')[2]}\r\n"
    )
    return _report_mail(message, "FW: complaint", "feedback-report", "This is an email abuse report.", "message/feedback-report", fields)


def _report_mail(  # noqa: PLR0913, PLR0917 - the parts of a report
    message: Message, subject: str, kind: str, words: str, media: str, fields: str
) -> bytes:
    boundary = "=_report"
    head = message.raw.partition(b"\r\n\r\n")[0]
    start = (
        f"From: MAILER-DAEMON@simulator.example (Mail Delivery System)\r\nTo: {message.sender}\r\nDate: {_now()}\r\n"
        f"Subject: {subject}\r\nAuto-Submitted: auto-replied\r\nMIME-Version: 1.0\r\n"
        f'Content-Type: multipart/report; report-type={kind};\r\n boundary="{boundary}"\r\n\r\n'
        f"--{boundary}\r\nContent-Type: text/plain; charset=us-ascii\r\n\r\n{words}\r\n\r\n"
        f"--{boundary}\r\nContent-Type: {media}\r\n\r\n{fields}\r\n"
        f"--{boundary}\r\nContent-Type: text/rfc822-headers\r\n\r\n"
    )
    return start.encode() + head + f"\r\n\r\n--{boundary}--\r\n".encode()


def _now() -> str:
    return format_datetime(datetime.now(UTC))


class _Session(asyncio.Protocol):
    """One connection."""

    def __init__(self, server: SmtpSimulator) -> None:
        self._server = server
        self._buffer = bytearray()
        self._searched = 0
        self._transport: asyncio.Transport | None = None
        self._is_busy = False  # no more is read from the buffer until an answer is out
        self._is_in_message = False
        self._is_secure = False
        self._is_greeted = False
        self._is_logged_in = False
        self._dialogue: Callable[[str], None] | None = None
        self._errors = 0
        self._handlers: Mapping[str, Callable[[str], None]] = {
            "EHLO": self._greet,
            "HELO": self._greet_plainly,
            "STARTTLS": self._start_tls,
            "AUTH": self._authenticate,
            "MAIL": self._mail,
            "RCPT": self._rcpt,
            "DATA": self._data,
            "RSET": self._reset,
            "NOOP": lambda _rest: self._write("250 2.0.0 ok"),
            "VRFY": lambda _rest: self._write("252 2.0.0 send some mail, I will try"),
            "QUIT": lambda _rest: self._hang_up("221 2.0.0 bye"),
        }
        self._forget()

    def _forget(self) -> None:
        self._sender: str | None = None
        self._parameters: dict[str, str] = {}
        self._recipients: list[tuple[str, Behaviour]] = []

    # ---- the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # a cast: uvloop's transports are no Transport by name
        self._transport = cast("asyncio.Transport", transport)
        self._is_secure = transport.get_extra_info("sslcontext") is not None
        self._server.sessions.add(self)
        self._server.connections += 1
        self._write("220 simulator.example ESMTP")

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - of asyncio
        self._server.sessions.discard(self)
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._is_busy:
            self._work()

    def abort(self) -> None:
        """Break the connection."""
        if self._transport is not None:
            self._transport.abort()

    def _write(self, *lines: str) -> None:
        if self._transport is not None:
            told = [f"{line[:3]}-{line[4:]}" for line in lines[:-1]] + [lines[-1]]
            self._transport.write("".join(f"{line}\r\n" for line in told).encode())

    def _hang_up(self, line: str) -> None:
        self._write(line)
        self._buffer.clear()
        self._is_busy = True
        if self._transport is not None:
            self._transport.close()

    def _later(self, then: Callable[[], None]) -> None:
        """Do `then` after as long as an answer takes; until then nothing more is heard."""
        seconds = self._server.script.seconds(self._server.chance)
        if not seconds:
            then()
            return

        def go_on() -> None:
            self._is_busy = False
            then()
            if not self._is_busy:
                self._work()

        self._is_busy = True
        asyncio.get_running_loop().call_later(seconds, go_on)

    def _work(self) -> None:
        while self._transport is not None and not self._is_busy:
            if self._is_in_message:
                end = self._buffer.find(b"\r\n.\r\n", max(0, self._searched - 4))
                if end < 0:
                    self._searched = len(self._buffer)
                    if len(self._buffer) > self._server.max_bytes + _LONGEST_LINE:
                        self._hang_up("552 5.3.4 much too large")
                    return
                raw = bytes(self._buffer[2 : end + 2])  # without the line end that was put before it
                del self._buffer[: end + 5]
                self._is_in_message = False
                self._end(raw)
                continue
            end = self._buffer.find(b"\n")
            if end < 0 or end > _LONGEST_COMMAND:
                if len(self._buffer) > _LONGEST_COMMAND:
                    self._hang_up("500 5.5.2 line too long")
                return
            line = bytes(self._buffer[: end + 1])
            del self._buffer[: end + 1]
            self._hear(line)

    # ---- commands

    def _hear(self, line: bytes) -> None:
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            self._wrong("500 5.5.2 neither ASCII nor UTF-8")
            return
        if not text.endswith("\r\n") or "\r" in text[:-2] or "\x00" in text:
            self._wrong("500 5.5.2 lines end with CR LF")
            return
        if self._dialogue is not None:
            dialogue, self._dialogue = self._dialogue, None
            dialogue(text[:-2])
            return
        verb, _, rest = text[:-2].partition(" ")
        verb = verb.upper()
        if self._buffer and not (self._server.is_pipelining and verb in _IN_GROUPS):
            self._hang_up("503 5.5.0 improper pipelining")
            return
        handler = self._handlers.get(verb)
        if handler is None:
            self._wrong("500 5.5.1 no such command")
        else:
            handler(rest)

    def _wrong(self, line: str) -> None:
        self._errors += 1
        if self._errors > _MOST_ERRORS:
            self._hang_up("421 4.7.0 too many errors")
        else:
            self._write(line)

    def _greet(self, rest: str) -> None:
        if not rest.strip():
            self._wrong("501 5.5.4 EHLO needs a name")
            return
        self._is_greeted = True
        self._forget()
        self._write("250 simulator.example", *(f"250 {each}" for each in self._server.extensions(is_secure=self._is_secure)))

    def _greet_plainly(self, _rest: str) -> None:
        self._is_greeted = True
        self._forget()
        self._write("250 simulator.example")

    def _reset(self, _rest: str) -> None:
        self._forget()
        self._write("250 2.0.0 ok")

    def _start_tls(self, _rest: str) -> None:
        context = self._server.starttls
        if context is None or self._is_secure:
            self._wrong("502 5.5.1 no TLS here")
            return
        self._write("220 2.0.0 go ahead")
        self._is_busy = True
        transport = self._transport

        async def upgrade() -> None:
            loop = asyncio.get_running_loop()
            self._buffer.clear()  # what was put in before TLS is nobody's word (RFC 3207 section 6)
            try:
                secured = await loop.start_tls(transport, self, context, server_side=True)  # type: ignore[arg-type]  # as uvloop's
            except (OSError, asyncio.CancelledError):
                self.abort()
                return
            self._transport = secured
            self._is_secure = True
            self._is_greeted = False  # RFC 3207 section 4.2: what was said before is forgotten
            self._forget()
            self._is_busy = False
            self._work()

        self._keep(upgrade())

    def _keep(self, talk: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(talk)
        self._server.tasks.add(task)
        task.add_done_callback(self._server.tasks.discard)

    def _authenticate(self, rest: str) -> None:
        mechanism, _, first = rest.partition(" ")
        if self._server.starttls is not None and not self._is_secure:
            self._wrong("538 5.7.11 not without TLS")
        elif not self._is_greeted or self._is_logged_in or self._sender is not None:
            self._wrong("503 5.5.1 not now")
        elif mechanism.upper() == "PLAIN" and self._server.login:
            self._ask("", first, self._is_plain)
        elif mechanism.upper() == "LOGIN" and self._server.login:
            self._ask_login(first)
        elif mechanism.upper() == "XOAUTH2" and self._server.token:
            self._ask("", first, self._is_token)
        else:
            self._wrong("504 5.5.4 no such mechanism")

    def _is_login(self, user: str, password: str) -> bool:
        return (user, password) == self._server.login

    def _is_plain(self, told: str) -> bool:
        _, _, who = told.partition("\0")  # RFC 4616: in whose place, who, password
        user, _, password = who.partition("\0")
        return self._is_login(user, password)

    def _is_token(self, told: str) -> bool:
        fields = dict(part.partition("=")[::2] for part in told.split("\x01") if part)
        who = self._server.login[0] if self._server.login else fields.get("user")
        return fields.get("auth") == f"Bearer {self._server.token}" and fields.get("user") == who

    def _ask_login(self, first: str) -> None:
        def password(user: str) -> None:
            self._dialogue = lambda text: self._decide(self._is_login(user, _decoded(text)))
            self._write("334 UGFzc3dvcmQ6")

        if first:
            password(_decoded(first))
        else:
            self._dialogue = lambda text: password(_decoded(text))
            self._write("334 VXNlcm5hbWU6")

    def _ask(self, challenge: str, first: str, is_right: Callable[[str], object]) -> None:
        if first:
            self._decide(bool(is_right(_decoded(first))))
        else:
            self._dialogue = lambda text: self._decide(bool(is_right(_decoded(text))))
            self._write(f"334 {challenge}")

    def _decide(self, is_right: bool) -> None:
        if is_right:
            self._is_logged_in = True
            self._write("235 2.7.0 ok")
        elif self._server.token is not None and self._server.login is None:
            # RFC 7628 section 3.2.3, as Google does it: why, then an empty answer, then the error
            self._dialogue = lambda _text: self._wrong("535 5.7.8 wrong token")
            self._write("334 " + base64.b64encode(b'{"status":"401"}').decode())
        else:
            self._wrong("535 5.7.8 wrong user or password")

    def _mail(self, rest: str) -> None:
        found = _PATH.fullmatch(rest)
        server = self._server
        parameters = {name.upper(): value for name, _, value in (each.partition("=") for each in ((found and found[2]) or "").split())}
        if not self._is_greeted or self._sender is not None:
            self._wrong("503 5.5.1 not now")
        elif server.starttls is not None and not self._is_secure:
            self._wrong("530 5.7.0 STARTTLS first")
        elif (server.login or server.token) and not self._is_logged_in:
            self._wrong("530 5.7.0 log in first")
        elif found is None or not rest.upper().startswith("FROM:"):
            self._wrong("501 5.5.4 MAIL FROM:<address>")
        elif set(parameters) - _MAIL_PARAMETERS or ("SMTPUTF8" in parameters and not server.is_utf8):
            self._wrong("555 5.5.4 no such parameter")
        elif not rest.isascii() and "SMTPUTF8" not in parameters:
            self._wrong("553 5.6.7 not without SMTPUTF8")
        elif parameters.get("SIZE", "0").isdigit() and int(parameters.get("SIZE", "0")) > server.max_bytes:
            self._write("552 5.3.4 too large")
        else:
            self._sender = found[1]
            self._parameters = parameters
            self._write("250 2.1.0 ok")

    def _rcpt(self, rest: str) -> None:
        found = _PATH.fullmatch(rest)
        parameters = {each.partition("=")[0].upper() for each in ((found and found[2]) or "").split()}
        if self._sender is None:
            self._wrong("503 5.5.1 MAIL first")
        elif found is None or not rest.upper().startswith("TO:") or "@" not in found[1]:
            self._wrong("501 5.1.3 RCPT TO:<address>")
        elif parameters - _RCPT_PARAMETERS:
            self._wrong("555 5.5.4 no such parameter")
        elif not found[1].isascii() and "SMTPUTF8" not in self._parameters:
            self._wrong("553 5.6.7 not without SMTPUTF8")
        elif len(self._recipients) >= 100:
            self._write("452 4.5.3 too many recipients")
        else:
            self._answer_recipient(found[1], self._server.behaviour(found[1]))

    def _answer_recipient(self, recipient: str, behaviour: Behaviour) -> None:
        match behaviour:
            case Behaviour.REFUSE:
                self._later(lambda: self._write("450 4.2.1 mailbox busy, try again later"))
            case Behaviour.REJECT:
                self._later(lambda: self._write("550 5.7.1 refused by policy"))
            case Behaviour.THROTTLE:
                self._later(lambda: self._write("454 4.7.0 Throttling failure: Maximum sending rate exceeded"))
            case Behaviour.UNAVAILABLE:
                self._later(lambda: self._hang_up("421 4.3.2 shutting down"))
            case Behaviour.RESET_BEFORE:
                self._later(self.abort)
            case _:
                self._recipients.append((recipient, behaviour))
                self._write("250 2.1.5 ok")

    def _data(self, rest: str) -> None:
        if rest:
            self._wrong("501 5.5.4 DATA takes nothing")
        elif self._sender is None:
            self._wrong("503 5.5.1 MAIL first")
        elif not self._recipients:
            self._write("554 5.5.1 no valid recipients")
        else:
            self._is_in_message = True
            self._searched = 0
            self._buffer += b"\r\n"  # an empty message is a dot alone
            self._write("354 go on")

    def _end(self, raw: bytes) -> None:
        """Take the message, or not, and answer."""
        sender, parameters, recipients = self._sender, self._parameters, self._recipients
        self._forget()
        if raw.count(b"\n") != raw.count(b"\r\n") or raw.count(b"\r") != raw.count(b"\n"):
            self._write("550 5.5.2 bare line ends")
            return
        if not raw.isascii() and "SMTPUTF8" not in parameters and parameters.get("BODY", "").upper() != "8BITMIME":
            self._write("554 5.6.3 eight bits that were not announced")
            return
        if len(raw) > self._server.max_bytes:
            self._write("552 5.3.4 too large")
            return
        raw = (b"\r\n" + raw).replace(b"\r\n.", b"\r\n")[2:]
        message = Message(
            id=_header(raw, b"message-id").strip("<>"),
            sender=sender or "",
            recipients=tuple(recipient for recipient, _ in recipients),
            raw=raw,
            at=time.monotonic(),
            envelope_id=parameters.get("ENVID"),
        )
        behaviours = [behaviour for _, behaviour in recipients]
        special = next((each for each in behaviours if each not in {Behaviour.BOUNCE, Behaviour.COMPLAIN}), Behaviour.ACCEPT)
        queue_id = f"{len(self._server.calls):08X}"
        match special:
            case Behaviour.RESET_AFTER:
                self._server.take(message, behaviours)
                self._later(self.abort)
            case Behaviour.TIME_OUT:
                self._server.take(message, behaviours)
                self._is_busy = True
            case Behaviour.GARBAGE:
                self._server.take(message, behaviours)
                self._later(lambda: self._write("what a lovely day"))
            case _ if self._server.script.receipts_first and self._server.chance.random() < self._server.script.receipts_first:
                self._server.take(message, behaviours)
                self._later(lambda: self._write(f"250 2.0.0 ok: queued as {queue_id}"))
            case _:
                self._later(lambda: self._accept(message, behaviours, queue_id))

    def _accept(self, message: Message, behaviours: list[Behaviour], queue_id: str) -> None:
        self._server.take(message, behaviours)
        self._write(f"250 2.0.0 ok: queued as {queue_id}")


def _decoded(text: str) -> str:
    try:
        return base64.b64decode(text, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _header(raw: bytes, name: bytes) -> str:
    found = re.search(rb"(?:^|\r\n)" + name + rb":[ \t]*([^\r\n]*)", raw.partition(b"\r\n\r\n")[0], re.IGNORECASE)
    return "" if found is None else found[1].decode("utf-8", "replace").strip()
