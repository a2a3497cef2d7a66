"""E-mail over SMTP (RFC 5321), on a few connections that are kept open.

The SMTP replies decide what a delivery becomes, and the moment at which a connection breaks decides whether it can have
arrived: until the line with the final dot was handed over nothing is accepted, after it only the reply tells.
"""

from __future__ import annotations

import asyncio
import binascii
import re
import socket
import ssl
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime, parseaddr
from enum import StrEnum
from typing import TYPE_CHECKING, Final, cast
from urllib.parse import quote, unquote, urlsplit

import aiosmtplib

from channels.base import OnUnknown, Receipt
from schemas import topics
from schemas.errors import (
    NotifyError,
    ProviderError,
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

_PORTS: Final = {"smtp": 25, "smtp+starttls": 587, "smtps": 465}
_COMPLETED, _INTERMEDIATE = 2, 3  # first digits of a reply (RFC 5321 section 4.2.1)
_SERVICE_CLOSING: Final = 421
_AUTHENTICATION: Final = frozenset({530, 534, 535, 538})  # RFC 4954 section 6: about our account, not about a delivery
_ONE_WRITE_BYTES: Final = 65_536
_LONGEST_ADDRESS: Final = 320
_LONGEST_LINE: Final = 998  # RFC 5322 section 2.1.1
_ENCODED_WORD_BYTES: Final = 39  # "Subject: " and an encoded word of them stay within the 76 characters of RFC 2047
_LONGEST_PLAIN_HEADER: Final = 66
_RESET_SECONDS: Final = 5.0
_QUIT_SECONDS: Final = 1.0
_DRAIN_SECONDS: Final = 0.005
_REFERENCE_CHARACTERS: Final = 100

# no quoted local parts: whatever passes needs no quoting on a command line or in a header
_ADDRESS: Final = re.compile(r"[\w.!#$%&'*+/=?^`{|}~-]{1,64}@[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?", re.ASCII)
_HEADER_TOKEN: Final = re.compile(r"[\w.-]{1,200}", re.ASCII)
_HOST_NAME: Final = re.compile(r"[!-~]+")
_FORBIDDEN_IN_HEADERS: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_FORBIDDEN_IN_7BIT: Final = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]")
_ENHANCED_CODE: Final = re.compile(r"([245]\.\d{1,3}\.\d{1,3})(?:\s|$)")  # RFC 3463


@dataclass(frozen=True, slots=True)
class Mailbox:
    """An address with the name shown beside it."""

    address: str
    name: str | None = None

    @property
    def domain(self) -> str:
        """What follows the @."""
        return self.address.rpartition("@")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Server:
    scheme: str
    host: str
    port: int
    username: str | None = None
    password: str = field(default="", repr=False)


def build(config: ProviderConfig, ports: Ports) -> EmailChannel:
    """Return the provider that `config` describes. Raises SettingsError."""
    config.only()
    config.require(host=config.host)
    userinfo = f"{quote(config.username, safe='')}:{quote(config.password, safe='')}@" if config.username else ""
    max_open = config.max_open or ports.max_open
    channel = EmailChannel(
        f"{config.scheme}://{userinfo}{config.host}{f':{config.port}' if config.port else ''}",
        ports.mail_from,
        max_open=max_open,
        # a connection a call, so that none waits for another; together shorter than a drain (streams.runner.DRAIN_SECONDS)
        pool_size=max_open,
        connect_timeout_seconds=5,
        send_timeout_seconds=12,
    )
    channel.provider, channel.routes = config.name, config.routes
    return channel


def message_id(delivery: Delivery, sender: Mailbox) -> str:
    """Return the Message-ID without its angle brackets: the same at each attempt of a redrive generation."""
    return f"{delivery.delivery_id}.{delivery.generation}@{sender.domain}"


def compose(delivery: Delivery, content: Content, *, sender: Mailbox, recipient: str, at: datetime) -> bytes:
    r"""Return the message as it goes over the wire: ASCII only, lines ended by \r\n, no line above 998 bytes.

    `recipient` is the address part of `content` as `recipient_address` returns it. Written by hand rather than with
    EmailMessage, which takes some fifty times as long. Raises ProviderRejectedError with the code `header` for control
    characters in name or subject, and `content` when there is neither text nor html. Sources: RFC 5322, 2045, 2047, 3834.
    """
    if not _HEADER_TOKEN.fullmatch(delivery.delivery_id) or not _HEADER_TOKEN.fullmatch(delivery.notification_id):
        raise ProviderRejectedError("an id cannot stand in a header", code="header")
    head = [
        f"From: {_mailbox_header(sender)}",
        f"To: {_mailbox_header(Mailbox(recipient, content.name))}",
        f"Date: {format_datetime(at)}",
        f"Message-ID: <{message_id(delivery, sender)}>",
        f"X-Notify-Delivery: {delivery.delivery_id}",
        f"X-Notify-Notification: {delivery.notification_id}",
        "Auto-Submitted: auto-generated",
        "MIME-Version: 1.0",
    ]
    if content.subject is not None:
        head.append(f"Subject: {_text_header(content.subject)}")
    # plainest first: of several alternatives a reader shows the last one that it can (RFC 2046 section 5.1.4)
    parts = [_part(kind, text) for kind, text in (("plain", content.text), ("html", content.html)) if text is not None]
    if not parts:
        raise ProviderRejectedError("neither text nor html to send", code="content")
    start = "\r\n".join(head).encode("ascii")
    if len(parts) == 1:
        return b"%b\r\n%b\r\n" % (start, parts[0])
    # "=_" cannot occur in either encoding, and `_part` never leaves it in plain text: the boundary is unique
    boundary = b"=_" + delivery.delivery_id[:60].encode("ascii")
    return b'%b\r\nContent-Type: multipart/alternative; boundary="%b"\r\n\r\n--%b\r\n%b\r\n--%b\r\n%b\r\n--%b--\r\n' % (
        start,
        boundary,
        boundary,
        parts[0],
        boundary,
        parts[1],
        boundary,
    )


def recipient_address(address: str) -> str:
    """Return `address` fit for a command line and a header: its domain in ASCII (RFC 3490).

    Raises ProviderRejectedError with the code `address` for anything else than one plain mailbox of at most 320
    characters. Quoted local parts and those beyond ASCII (RFC 6531) are not supported.
    """
    local, _, domain = address.rpartition("@")
    if not domain.isascii():
        try:
            domain = domain.encode("idna").decode("ascii")
        except UnicodeError:
            domain = ""
    plain = f"{local}@{domain}"
    if len(plain) > _LONGEST_ADDRESS or not _ADDRESS.fullmatch(plain) or ".." in domain:
        raise ProviderRejectedError("the address is not a mailbox", code="address") from None
    return plain


class EmailChannel:
    """Sends through one SMTP server.

    `url` is `smtp+starttls://user:password@host:587` (refuses to go on without TLS), `smtps://…` (TLS from the start) or
    `smtp://…` (never TLS: for a relay on this host or a trusted network, since messages and password travel readable).
    Percent-encode what is special in a password. `sender` is an address, with or without a name: `Shop <shop@host>`.

    At most `pool_size` connections are open; calls beyond it wait for a free one. A connection is replaced after
    `max_age_seconds` or `max_messages`. `connect_timeout_seconds` covers everything up to the login,
    `send_timeout_seconds` one message from MAIL to the last reply. `hostname` is how we greet; this host's name if None.
    `tls_context` replaces the system's trusted authorities. Raises SettingsError for a malformed url or sender.
    """

    def __init__(  # noqa: PLR0913 - limits, each by name
        self,
        url: str,
        sender: str,
        *,
        pool_size: int = 8,
        connect_timeout_seconds: float = 10.0,
        send_timeout_seconds: float = 30.0,
        max_open: int = 32,
        max_age_seconds: float = 300.0,
        max_messages: int = 100,
        hostname: str | None = None,
        tls_context: ssl.SSLContext | None = None,
    ) -> None:
        self.name: str = topics.Channel.EMAIL
        self.provider = "smtp"
        self.reported_as = "smtp"
        self.routes: frozenset[str] | None = None
        self.max_open = max_open
        self.on_unknown = OnUnknown.RESEND  # with the same Message-ID, by which mailboxes know a repetition
        self.unknown_seconds = 0.0
        self._server = _parse_url(url)
        self._sender = _parse_sender(sender)
        self._connect_timeout_seconds = connect_timeout_seconds
        self._send_timeout_seconds = send_timeout_seconds
        self._max_age_seconds = max_age_seconds
        self._max_messages = max_messages
        self._hostname = hostname or socket.gethostname()
        if not _HOST_NAME.fullmatch(self._hostname):
            raise SettingsError(["the name to greet the SMTP server with holds more than printable ASCII"])
        self._tls_context = tls_context
        self._mail = f"MAIL FROM:<{self._sender.address}>".encode("ascii")
        self._slots = asyncio.Semaphore(pool_size)
        self._idle: list[_Connection] = []  # last in, first out: few connections stay warm, the others grow old and go
        self._busy: set[_Connection] = set()
        self._is_open = False

    def record(self, delivery: Delivery) -> None:
        """Return None: a provider is called."""

    def reference_of(self, delivery: Delivery, receipt: Receipt | None) -> str:  # noqa: ARG002 - the channel contract
        """Return the Message-ID, known or not whether the message arrived.

        Every report on a delivery returns at least the message's headers (RFC 3464 and 6522), whoever wrote it on the way;
        what our server called the message, only that server knows.
        """
        return message_id(delivery, self._sender)

    async def open(self) -> None:
        """Load the trusted authorities, where TLS is wanted. Connects only when there is something to send."""
        if self._tls_context is None and self._server.scheme != "smtp":
            self._tls_context = await asyncio.to_thread(ssl.create_default_context)
        self._is_open = True

    async def send(self, delivery: Delivery, content: Content) -> Receipt:
        """Hand the message over to the server. Returns and raises as the channel contract says, with these codes.

        - of the server, with its enhanced code (RFC 3463): `451 4.7.1`. 4xx is refused and 5xx rejected, except what
          is not about this delivery, which is unavailable: anything before MAIL, 421 before the message, and a missing or
          failed login (a person must look, and nothing is lost meanwhile).
        - `address`, `header`, `content`: cannot be sent at all. Rejected, without a call.
        - `connect`, `tls`, `auth`: no connection. `connection`, `timeout`, `protocol`: broke off, took too long, or
          answered what is no SMTP; unavailable before the final dot, unknown after it. `closed`: we closed the channel.
        """
        recipient = recipient_address(content.address)
        message = compose(delivery, content, sender=self._sender, recipient=recipient, at=datetime.now(UTC))
        async with self._slots:
            reused = self._take_idle()
            if reused is not None:
                try:
                    return await self._transact(reused, recipient, message)
                except _StaleError:
                    pass  # the server had given up the idle connection; no byte of the message left
            return await self._transact(await self._connect(), recipient, message)

    async def look_up(self, delivery: Delivery, content: Content) -> Receipt | None:  # noqa: ARG002 - the channel contract
        """Return None: a mail server cannot be asked."""
        return None

    async def close(self) -> None:
        """Say goodbye on idle connections, cut those in use."""
        self._is_open = False
        for connection in tuple(self._busy):
            connection.close()
        idle, self._idle = self._idle, []
        await asyncio.gather(*(connection.quit() for connection in idle))

    async def _connect(self) -> _Connection:
        if not self._is_open:
            raise ProviderUnavailableError("the channel is closed", code="closed")
        smtp = aiosmtplib.SMTP(
            hostname=self._server.host,
            port=self._server.port,
            local_hostname=self._hostname,
            timeout=None,  # one limit over all steps, below
            use_tls=self._server.scheme == "smtps",
            start_tls=False,
            tls_context=self._tls_context,
        )
        connection = _Connection(smtp)
        self._busy.add(connection)
        is_ready = False
        step = "connect"
        try:
            async with asyncio.timeout(self._connect_timeout_seconds):
                await smtp.connect()
                await smtp.ehlo()
                if self._server.scheme == "smtp+starttls":
                    step = "tls"
                    await smtp.starttls()
                    await smtp.ehlo()
                if self._server.username is not None:
                    step = "auth"
                    await smtp.login(self._server.username, self._server.password)
            is_ready = self._is_open
        except aiosmtplib.SMTPResponseException as error:
            code = step if error.code < 0 else _code(aiosmtplib.SMTPResponse(error.code, error.message))
            raise ProviderUnavailableError(f"the server turned us away: {code}", code=code) from error
        except (aiosmtplib.SMTPException, OSError, ValueError) as error:
            # ValueError: a host name that no resolver can be asked for
            code = "tls" if isinstance(error, ssl.SSLError) or isinstance(error.__cause__, ssl.SSLError) else step
            raise ProviderUnavailableError(f"no connection to the server: {code}", code=code) from error
        finally:
            if not is_ready:
                self._discard(connection)
        if not is_ready:
            raise ProviderUnavailableError("the channel was closed meanwhile", code="closed")
        return connection

    async def _transact(self, connection: _Connection, recipient: str, message: bytes) -> Receipt:
        """Send one message on a connection that is ours alone, then give it back or close it."""
        outcome: Receipt | NotifyError | None = None
        try:
            try:
                async with asyncio.timeout(self._send_timeout_seconds):
                    reply = await connection.exchange(self._mail, recipient, message)
            except TimeoutError as error:
                self._drop_idle()  # behind a dead path they would take as long, one after the other
                outcome = connection.broken("timeout")
                outcome.__cause__ = error
            except aiosmtplib.SMTPResponseException:
                outcome = connection.broken("protocol")  # without its cause, which quotes the server
            except (aiosmtplib.SMTPException, OSError) as error:
                outcome = connection.broken("connection")
                outcome.__cause__ = error
            else:
                outcome = self._judge(connection, reply)
                if isinstance(outcome, ProviderError) and connection.is_usable:
                    await connection.reset(is_closing=reply.code == _SERVICE_CLOSING)
        finally:
            # also on the way of a cancellation, which leaves a reply behind that the next message would take for its own
            if outcome is None or not connection.is_usable:
                self._discard(connection)
            else:
                self._give_back(connection)
        if isinstance(outcome, Receipt):
            return outcome
        raise outcome

    def _judge(self, connection: _Connection, reply: aiosmtplib.SMTPResponse) -> Receipt | NotifyError:
        """Return what the last reply of an exchange means."""
        code = _code(reply)
        sentence = f"the server answered {code} at {connection.stage}"
        is_answer = connection.stage is _Stage.ANSWER
        match reply.code // 100:
            case digit if digit == _COMPLETED and is_answer:
                return Receipt(provider=self.provider, reference=_reference(reply.message), status=Status.SENT, code=code)
            case 4 if reply.code == _SERVICE_CLOSING and not is_answer:
                return connection.unavailable(sentence, code)
            case 5 if reply.code in _AUTHENTICATION and not is_answer:
                return ProviderUnavailableError(sentence, code=code)
            case 4:
                return ProviderRefusedError(sentence, code=code)
            case 5:
                return ProviderRejectedError(sentence, code=code)
            case _:
                return connection.broken("protocol")

    def _take_idle(self) -> _Connection | None:
        oldest = asyncio.get_running_loop().time() - self._max_age_seconds
        while self._idle:
            connection = self._idle.pop()
            if connection.smtp.is_connected and connection.opened_at > oldest:
                connection.is_reused = True
                self._busy.add(connection)
                return connection
            connection.close()
        return None

    def _give_back(self, connection: _Connection) -> None:
        self._busy.discard(connection)
        if self._is_open and connection.messages < self._max_messages:
            self._idle.append(connection)
        else:
            connection.close()

    def _drop_idle(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def _discard(self, connection: _Connection) -> None:
        self._busy.discard(connection)
        connection.close()


class _StaleError(Exception):
    """A connection from the pool was found closed before the message left. Take a new one, once."""


class _Stage(StrEnum):
    """How far a message got."""

    MAIL = "MAIL"
    RCPT = "RCPT"
    DATA = "DATA"
    MESSAGE = "message"
    ANSWER = "end of message"  # the final dot was handed over: from here on it can have been accepted


class _Connection:
    """A connection and how far its current message got: `stage` says whether it can have been accepted."""

    def __init__(self, smtp: aiosmtplib.SMTP) -> None:
        self.smtp = smtp
        self.opened_at = asyncio.get_running_loop().time()
        self.messages = 0
        self.is_reused = False
        self.is_usable = True
        self.stage = _Stage.MAIL

    async def exchange(self, mail: bytes, recipient: str, message: bytes) -> aiosmtplib.SMTPResponse:
        """Return the first reply that is not as hoped for, or else the last one; `stage` says to what.

        Speaks through the commands rather than `SMTP.sendmail`, whose errors quote address and server and do not tell
        whether the message left.
        """
        self.messages += 1
        if self.smtp.supports_extension("size"):
            mail = b"%b SIZE=%d" % (mail, len(message))  # RFC 1870: too large is refused before it is sent
        for stage, command, hoped_for in (
            (_Stage.MAIL, mail, _COMPLETED),
            (_Stage.RCPT, b"RCPT TO:<%b>" % recipient.encode("ascii"), _COMPLETED),
            (_Stage.DATA, b"DATA", _INTERMEDIATE),
        ):
            self.stage = stage
            reply = await self.smtp.execute_command(command)
            if reply.code // 100 != hoped_for:
                return reply
        self.stage = _Stage.MESSAGE
        protocol = self.smtp.protocol
        if protocol is None:
            raise aiosmtplib.SMTPServerDisconnected("Connection lost")
        message = message.replace(b"\r\n.", b"\r\n..")  # RFC 5321 section 4.5.2
        if len(message) <= _ONE_WRITE_BYTES:
            protocol.write(message + b".\r\n")
        else:
            # the dot waits until the system took all else: a large message cut off by then was certainly not accepted
            protocol.write(message)
            while _unsent_bytes(protocol):  # noqa: ASYNC110 - the transport tells its protocol, which is not ours
                await asyncio.sleep(_DRAIN_SECONDS)
            protocol.write(b".\r\n")
        self.stage = _Stage.ANSWER
        return await protocol.read_response()

    def broken(self, code: str) -> NotifyError:
        """Return what a connection that broke at this stage means."""
        self.is_usable = False
        sentence = f"the connection failed at {self.stage}: {code}"
        if self.stage is _Stage.ANSWER:
            return SendUnknownError(sentence, code=code)
        if code == "connection" and self.stage is not _Stage.MESSAGE:
            return self.unavailable(sentence, code)
        return ProviderUnavailableError(sentence, code=code)

    def unavailable(self, sentence: str, code: str) -> ProviderUnavailableError:
        """Return that the server hung up. Raises _StaleError if that may be due to the connection's age alone."""
        if self.is_reused:
            self.is_usable = False
            raise _StaleError
        return ProviderUnavailableError(sentence, code=code)

    async def reset(self, *, is_closing: bool) -> None:
        """Make the connection fit for the next message after a refusal, or else not usable."""
        self.is_usable = False
        if is_closing:
            return
        with suppress(aiosmtplib.SMTPException, OSError):  # the refusal is what the caller is told
            reply = await self.smtp.execute_command(b"RSET", timeout=_RESET_SECONDS)
            self.is_usable = reply.code // 100 == _COMPLETED

    async def quit(self) -> None:
        """Close politely, without waiting for long."""
        with suppress(aiosmtplib.SMTPException, OSError):
            await self.smtp.execute_command(b"QUIT", timeout=_QUIT_SECONDS)
        self.close()

    def close(self) -> None:
        self.is_usable = False
        self.smtp.close()


def _unsent_bytes(protocol: aiosmtplib.protocol.SMTPProtocol) -> int:
    # a cast: uvloop's transports are no WriteTransport by name
    transport = cast("asyncio.WriteTransport | None", protocol.transport)
    return 0 if transport is None else transport.get_write_buffer_size()


def _parse_url(url: str) -> _Server:
    # no message quotes the url: it holds a password
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise SettingsError(["the SMTP url has a malformed host or port"]) from None
    if parts.scheme not in _PORTS or not parts.hostname:
        raise SettingsError([f"the SMTP url is not one of {', '.join(f'{scheme}://host:port' for scheme in _PORTS)}"])
    return _Server(
        scheme=parts.scheme,
        host=parts.hostname,
        port=port or _PORTS[parts.scheme],
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password or ""),
    )


def _parse_sender(sender: str) -> Mailbox:
    try:
        if _FORBIDDEN_IN_HEADERS.search(sender):
            raise ProviderRejectedError("control characters", code="header")
        name, address = parseaddr(sender)
        mailbox = Mailbox(recipient_address(address), name or None)
    except ProviderRejectedError:
        raise SettingsError(["the sender of e-mail is not an address such as shop@host or Shop <shop@host>"]) from None
    return mailbox


def _code(reply: aiosmtplib.SMTPResponse) -> str:
    enhanced = _ENHANCED_CODE.match(reply.message)
    return f"{reply.code} {enhanced[1]}" if enhanced else str(reply.code)


def _reference(text: str) -> str | None:
    """Return what the server called the message, without whatever looks like an address."""
    words = _ENHANCED_CODE.sub("", text, count=1).encode("ascii", "ignore").decode("ascii").split()
    kept = " ".join(word for word in words if "@" not in word and word.isprintable())
    return kept[:_REFERENCE_CHARACTERS] or None


def _mailbox_header(mailbox: Mailbox) -> str:
    if _FORBIDDEN_IN_HEADERS.search(mailbox.name or ""):
        raise ProviderRejectedError("a name holds control characters", code="header")
    name = (mailbox.name or "").strip()
    if not name:
        return mailbox.address
    if _is_plain(name):
        quoted = name.replace("\\", "\\\\").replace('"', '\\"')
        phrase = f'"{quoted}"'
    else:
        phrase = _encoded_words(name)
    return f"{phrase}\r\n <{mailbox.address}>"


def _text_header(text: str) -> str:
    if _FORBIDDEN_IN_HEADERS.search(text):
        raise ProviderRejectedError("the subject holds control characters", code="header")
    return text if _is_plain(text) else _encoded_words(text)


def _is_plain(text: str) -> bool:
    return text.isascii() and len(text) <= _LONGEST_PLAIN_HEADER and "=?" not in text and text == text.strip()


def _encoded_words(text: str) -> str:
    """Return `text` as base64 words of RFC 2047, one a line, none ending within a character."""
    words: list[bytes] = []
    word = b""
    for character in text:
        encoded = character.encode()
        if len(word) + len(encoded) > _ENCODED_WORD_BYTES:
            words.append(word)
            word = b""
        word += encoded
    words.append(word)
    return "\r\n ".join(f"=?utf-8?b?{binascii.b2a_base64(word, newline=False).decode('ascii')}?=" for word in words)


def _part(kind: str, text: str) -> bytes:
    """Return a MIME part, its headers first, in the shortest encoding that survives every server."""
    raw = text.replace("\r\n", "\n").replace("\r", "\n").encode("utf-8", "replace")
    if (
        raw.isascii()
        and b"=_" not in raw
        and not _FORBIDDEN_IN_7BIT.search(raw)
        and max(map(len, raw.split(b"\n"))) <= _LONGEST_LINE - 1  # a leading dot is doubled on the wire
    ):
        encoding, body = b"7bit", raw
    else:
        encoding, body = b"quoted-printable", binascii.b2a_qp(raw, istext=True)
        if len(body) > len(raw) * 3 // 2:
            lines = raw.replace(b"\n", b"\r\n")
            encoding = b"base64"
            body = b"\n".join(binascii.b2a_base64(lines[i : i + 57], newline=False) for i in range(0, len(lines), 57))
    return b"Content-Type: text/%b; charset=utf-8\r\nContent-Transfer-Encoding: %b\r\n\r\n%b" % (
        kind.encode("ascii"),
        encoding,
        body.replace(b"\n", b"\r\n"),
    )
