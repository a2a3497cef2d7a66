"""E-mail over SMTP (RFC 5321), on a few connections that are kept open.

    smtp+starttls://user:$SMTP_PASSWORD@mail.example:587?bounce_domain=bounces.shop.example
    smtps://user@smtp.gmail.com?auth=xoauth2&token_file=/run/secrets/gmail.token

`smtp+starttls` refuses to go on without TLS, `smtps` is TLS from the start, `smtp` never: for a relay on this host or a trusted
network, since messages and password travel readable. Its options, beside those of every provider:

`from`           who the mail is from, with or without a name; default: NOTIFY_MAIL_FROM
`bounce_domain`  bounces go to an address of this domain that names the delivery and is signed (VERP); default: to the address of `from`
`dkim_domain`, `dkim_selector`, `dkim_key`  signs each mail; the key: a PEM file's path, or the PEM itself as $NAME
`auth`           plain, login or xoauth2; default: the best of a password's that the server offers
`token_file`     holds the access token for xoauth2, and is read at each login: who renews it writes it anew
`ca_file`        PEM of the authorities to trust instead of the system's
`hostname`       how we greet the server; default: this host's name
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, cast

import aiosmtplib

from channels import bounces
from channels.base import OnUnknown, Receipt
from channels.mime import Letterhead, is_domain, is_token, parse_sender, recipient_address
from channels.smtp import Connection, Envelope, Means, Reply, Stage, meaning
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
from schemas.status import Status, Suppression

if TYPE_CHECKING:
    from channels.config import Ports, ProviderConfig
    from channels.dkim import Signer
    from schemas.messages import Content, Delivery

Auth = Literal["plain", "login", "xoauth2"]

_PORTS: Final = {"smtp": 25, "smtp+starttls": 587, "smtps": 465}
_HANGS_UP: Final = 421
_CONNECT_SECONDS: Final = 5.0
_SEND_SECONDS: Final = 10.0
_RESET_SECONDS: Final = 2.0  # all three together are shorter than a drain (streams.shard.DRAIN_SECONDS)
_QUIT_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MailServer:
    """Where mail is handed over, and as whom. `scheme`: smtp, smtp+starttls or smtps."""

    scheme: str
    host: str
    port: int
    username: str | None = None
    password: str = field(default="", repr=False)
    auth: Auth | None = None
    token_file: Path | None = None
    ca_file: Path | None = None
    hostname: str = field(default_factory=socket.gethostname)


def build(config: ProviderConfig, ports: Ports) -> EmailChannel:
    """Return the provider that `config` describes. Reads the key of DKIM. Raises SettingsError."""
    config.only("from", "bounce_domain", "dkim_domain", "dkim_selector", "dkim_key", "auth", "token_file", "ca_file", "hostname")
    sender = config.option("from", _of(parse_sender), None) or parse_sender(ports.mail_from)
    max_open = config.max_open or ports.max_open
    domain = config.option("bounce_domain", _domain, None)
    return EmailChannel(
        server_of(config),
        # as the deployment's mails, whoever carries them: the Message-ID must be the same on each way
        Letterhead(sender, domain=parse_sender(ports.mail_from).domain, signer=signer_of(config)),
        provider=config.name,
        routes=config.routes,
        return_path=(lambda _reference: None) if domain is None else partial(bounces.return_path, domain=domain, key=ports.return_key),
        max_open=max_open,
        unsubscribe_url=ports.unsubscribe_url,
    )


def server_of(config: ProviderConfig) -> MailServer:
    """Return the mail server that `config` names. Raises SettingsError."""
    config.require(host=config.host)
    if config.scheme not in _PORTS:
        raise SettingsError([f"provider {config.name}: {config.scheme} is none of {', '.join(_PORTS)}"])
    auth = config.option("auth", _auth, None)
    token_file = config.option("token_file", Path, None)
    if (auth == "xoauth2") != (token_file is not None) or (auth is not None and config.username is None):
        raise SettingsError([f"provider {config.name}: auth needs a user in the url, and xoauth2 a token_file beside it"])
    ca_file = config.option("ca_file", Path, None)
    if ca_file is not None and config.scheme == "smtp":
        raise SettingsError([f"provider {config.name}: ca_file is for smtps and smtp+starttls, smtp has no certificate"])
    return MailServer(
        scheme=config.scheme,
        host=cast("str", config.host),
        port=config.port or _PORTS[config.scheme],
        username=config.username,
        password=config.password,
        auth=auth,
        token_file=token_file,
        ca_file=ca_file,
        hostname=config.option("hostname", _host_name, socket.gethostname()),
    )


class EmailChannel:
    """Sends through one SMTP server.

    A call has a connection to itself: at most `max_open` are open, and a call beyond them waits for a free one. A connection is
    replaced after `max_age_seconds` or `max_messages`. `connect_timeout_seconds` covers everything up to the login,
    `send_timeout_seconds` one message from MAIL to the last reply. `return_path` returns where bounces of the mail with
    a Message-ID go, or None: to the sender. `unsubscribe_url` returns
    where a click ends mails like a delivery to an address, or None. `tls_context` replaces the trusted authorities.
    """

    def __init__(  # noqa: PLR0913 - limits, each by name
        self,
        server: MailServer,
        letterhead: Letterhead,
        *,
        provider: str = "smtp",
        routes: frozenset[str] | None = None,
        return_path: Callable[[str], str | None] = lambda _reference: None,
        connect_timeout_seconds: float = _CONNECT_SECONDS,
        send_timeout_seconds: float = _SEND_SECONDS,
        max_open: int = 32,
        max_age_seconds: float = 300.0,
        max_messages: int = 100,
        unsubscribe_url: Callable[[Delivery, str], str | None] = lambda _delivery, _address: None,
        tls_context: ssl.SSLContext | None = None,
    ) -> None:
        self.name: str = topics.Channel.EMAIL
        self.provider = provider
        self.reported_as = bounces.REPORTED_AS
        self.routes = routes
        self.max_open = max_open
        self.on_unknown = OnUnknown.RESEND  # with the same Message-ID, by which mailboxes know a repetition
        self.unknown_seconds = 0.0
        self._server = server
        self._letterhead = letterhead
        self._return_path = return_path
        self._connect_timeout_seconds = connect_timeout_seconds
        self._send_timeout_seconds = send_timeout_seconds
        self._max_age_seconds = max_age_seconds
        self._max_messages = max_messages
        self._unsubscribe_url = unsubscribe_url
        self._tls_context = tls_context
        self._slots = asyncio.Semaphore(max_open)
        self._idle: list[Connection] = []  # last in, first out: few connections stay warm, the others grow old and go
        self._opening: set[aiosmtplib.SMTP] = set()
        self._busy: set[Connection] = set()
        self._is_open = False

    def record(self, delivery: Delivery) -> None:
        """Return None: a provider is called."""

    def reference_of(self, delivery: Delivery, receipt: Receipt | None) -> str:  # noqa: ARG002 - the channel contract
        """Return the Message-ID, known or not whether the message arrived.

        Every report on a delivery comes to an address that names the delivery; what our server called the message, only that
        server knows.
        """
        return self._letterhead.message_id(delivery)

    async def open(self) -> None:
        """Load the trusted authorities, where TLS is wanted. Connects only when there is something to send.

        Raises SettingsError when they cannot be loaded.
        """
        if self._tls_context is None and self._server.scheme != "smtp":
            try:
                self._tls_context = await asyncio.to_thread(ssl.create_default_context, cafile=self._server.ca_file)
            except OSError as error:  # ssl.SSLError too
                raise SettingsError([f"provider {self.provider}: ca_file cannot be loaded: {type(error).__name__}"]) from None
        self._is_open = True

    async def send(self, delivery: Delivery, content: Content) -> Receipt:
        """Hand the message over to the server. Returns and raises as the channel contract says, with these codes.

        - of the server, with its enhanced code (RFC 3463): `451 4.7.1`. What they mean is in `channels.smtp`; whatever is
          said before MAIL is unavailable.
        - `address`, `header`, `content`: cannot be sent at all, or not to this server: an address beyond ASCII where it has
          no SMTPUTF8. Rejected.
        - `connect`, `tls`, `auth`: no connection. `connection`, `timeout`, `protocol`: broke off, took too long, or
          answered what is no SMTP; unavailable before the final dot, unknown after it. `closed`: we closed the channel.
        """
        recipient = recipient_address(content.address)
        message = self._letterhead.compose(
            delivery,
            content,
            recipient=recipient,
            at=datetime.now(UTC),
            unsubscribe_url=self._unsubscribe_url(delivery, content.address),
        )
        async with self._slots:
            deadline = asyncio.get_running_loop().time() + self._connect_timeout_seconds + self._send_timeout_seconds
            mail = _Mail(delivery, recipient, message, deadline)
            reused = self._take_idle()
            if reused is not None:
                try:
                    return await self._transact(reused, mail)
                except _StaleError:
                    pass  # the server had given up the idle connection; no byte of the message left
            return await self._transact(await self._connect(deadline), mail)

    async def look_up(self, delivery: Delivery, content: Content) -> Receipt | None:  # noqa: ARG002 - the channel contract
        """Return None: a mail server cannot be asked."""
        return None

    async def close(self) -> None:
        """Say goodbye on idle connections, cut those in use."""
        self._is_open = False
        for smtp in tuple(self._opening):
            smtp.close()
        for connection in tuple(self._busy):
            connection.close()
        idle, self._idle = self._idle, []
        await asyncio.gather(*(_quietly(connection.quit(), _QUIT_SECONDS) for connection in idle))

    async def _connect(self, deadline: float) -> Connection:
        if not self._is_open:
            raise ProviderUnavailableError("the channel is closed", code="closed")
        server = self._server
        smtp = aiosmtplib.SMTP(
            hostname=server.host,
            port=server.port,
            local_hostname=server.hostname,
            timeout=None,  # one limit over all steps, below
            use_tls=server.scheme == "smtps",
            start_tls=False,
            tls_context=self._tls_context,
        )
        self._opening.add(smtp)
        connection: Connection | None = None
        step = "connect"
        try:
            async with _until(deadline, self._connect_timeout_seconds):
                await smtp.connect()
                await smtp.ehlo()
                if server.scheme == "smtp+starttls":
                    step = "tls"
                    await smtp.starttls()
                    await smtp.ehlo()
                if server.username is not None:
                    step = "auth"
                    await self._log_in(smtp, server.username)
            if self._is_open and smtp.protocol is not None and smtp.protocol.transport is not None:
                connection = Connection(smtp.protocol.transport, frozenset(smtp.esmtp_extensions))
        except aiosmtplib.SMTPResponseException as error:
            code = step if error.code < 0 else Reply(error.code, error.message).shown
            raise ProviderUnavailableError(f"the server turned us away: {code}", code=code) from None
        except (aiosmtplib.SMTPException, OSError, ValueError) as error:
            # ValueError: a host name that no resolver can be asked for
            code = "tls" if isinstance(error, ssl.SSLError) or isinstance(error.__cause__, ssl.SSLError) else step
            raise ProviderUnavailableError(f"no connection to the server: {code}", code=code) from error
        finally:
            self._opening.discard(smtp)
            if connection is None:
                smtp.close()
        if connection is None:
            raise ProviderUnavailableError("the channel was closed meanwhile", code="closed" if not self._is_open else "connect")
        self._busy.add(connection)
        return connection

    async def _log_in(self, smtp: aiosmtplib.SMTP, username: str) -> None:
        match self._server.auth:
            case "xoauth2":
                assert self._server.token_file is not None
                token = (await asyncio.to_thread(self._server.token_file.read_text, "utf-8")).strip()
                await smtp.auth_xoauth2(username, token)
            case "plain":
                await smtp.auth_plain(username, self._server.password)
            case "login":
                await smtp.auth_login(username, self._server.password)
            case None:
                await smtp.login(username, self._server.password)

    async def _transact(self, connection: Connection, mail: _Mail) -> Receipt:
        """Send one message on a connection that is ours alone, then give it back or close it."""
        outcome: Receipt | NotifyError | None = None
        try:
            outcome = await self._exchange(connection, mail)
        finally:
            # also on the way of a cancellation, which leaves a reply behind that the next message would take for its own
            if outcome is None or not connection.is_usable:
                self._discard(connection)
            else:
                self._give_back(connection)
        if isinstance(outcome, Receipt):
            return outcome
        raise outcome

    async def _exchange(self, connection: Connection, mail: _Mail) -> Receipt | NotifyError:
        """Return how one message ended, and leave the connection fit for the next one, or not usable. Raises _StaleError."""
        try:
            envelope = self._envelope(connection.extensions, mail)
            async with _until(mail.deadline, self._send_timeout_seconds):
                reply = await connection.exchange(envelope, mail.message)
        except ProviderRejectedError as error:
            return error
        except TimeoutError as error:
            self._drop_idle()  # behind a dead path they would take as long, one after the other
            return self._broken(connection, "timeout", error)
        except ValueError:
            return self._broken(connection, "protocol", None)
        except OSError as error:
            return self._broken(connection, "connection", error)
        if connection.refused is None:
            return Receipt(provider=self.provider, reference=reply.reference, status=Status.SENT, code=reply.shown)
        refusal = self._refusal(connection, reply)
        if reply.code == _HANGS_UP:
            connection.is_usable = False
        elif connection.is_usable:
            connection.is_usable = bool(await _quietly(connection.reset(), _RESET_SECONDS))
        return refusal

    def _envelope(self, extensions: frozenset[str], mail: _Mail) -> Envelope:
        """Return the commands before a message, as far as the server understands them."""
        reference = self._letterhead.message_id(mail.delivery)
        sender = b"MAIL FROM:<%b>" % (self._return_path(reference) or self._letterhead.sender.address).encode("ascii")
        if "size" in extensions:
            sender += b" SIZE=%d" % len(mail.message)  # RFC 1870: too large is refused before it is sent
        if "dsn" in extensions and is_token(reference.replace("@", "")):
            # RFC 3461: a bounce returns the envelope's id, and of the message no more than its headers
            sender += b" RET=HDRS ENVID=%b" % reference.encode("ascii")
        if not mail.recipient.isascii():
            if "smtputf8" not in extensions:
                raise ProviderRejectedError("the server has no SMTPUTF8 for the address", code="address")
            sender += b" SMTPUTF8"
        return Envelope(sender, b"RCPT TO:<%b>" % mail.recipient.encode())

    def _refusal(self, connection: Connection, reply: Reply) -> NotifyError:
        """Return what a reply means that was not as hoped for."""
        code = reply.shown
        sentence = f"the server answered {code} at {connection.stage}"
        match meaning(reply, connection.stage):
            case Means.NONSENSE:
                return self._broken(connection, "protocol", None)
            case Means.UNAVAILABLE:
                if reply.code == _HANGS_UP:
                    return self._hung_up(connection, ProviderUnavailableError(sentence, code=code))
                return ProviderUnavailableError(sentence, code=code)
            case Means.THROTTLED:
                return ProviderThrottledError(sentence, code=code)
            case Means.REFUSED:
                return ProviderRefusedError(sentence, code=code)
            case Means.REJECTED:
                return ProviderRejectedError(sentence, code=code)
            case Means.DEAD:
                return ProviderRejectedError(sentence, code=code, suppresses=Suppression.HARD_BOUNCE)

    def _broken(self, connection: Connection, code: str, cause: Exception | None) -> NotifyError:
        """Return what a connection that broke means."""
        connection.is_usable = False
        if connection.refused is not None and code != "protocol":
            return self._refusal(connection, connection.refused)  # it had been said before
        sentence = f"the connection failed at {connection.stage}: {code}"
        error: NotifyError
        if connection.stage is Stage.ANSWER:
            error = SendUnknownError(sentence, code=code)
        else:
            error = ProviderUnavailableError(sentence, code=code)
            if code == "connection" and connection.stage is not Stage.MESSAGE:
                self._hung_up(connection, error)
        error.__cause__ = cause
        return error

    def _hung_up(self, connection: Connection, error: ProviderUnavailableError) -> ProviderUnavailableError:
        """Return `error`: the server hung up. Raises _StaleError if that may be due to the connection's age alone."""
        connection.is_usable = False
        if connection.is_reused:
            raise _StaleError
        return error

    def _take_idle(self) -> Connection | None:
        oldest = asyncio.get_running_loop().time() - self._max_age_seconds
        while self._idle:
            connection = self._idle.pop()
            if connection.wire.is_open and connection.opened_at > oldest:
                connection.is_reused = True
                self._busy.add(connection)
                return connection
            connection.close()
        return None

    def _give_back(self, connection: Connection) -> None:
        self._busy.discard(connection)
        if self._is_open and connection.messages < self._max_messages:
            self._idle.append(connection)
        else:
            connection.close()

    def _drop_idle(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def _discard(self, connection: Connection) -> None:
        self._busy.discard(connection)
        connection.close()


class _Mail(NamedTuple):
    """A mail on its way. `deadline`: of all that is tried for it, by the loop's clock."""

    delivery: Delivery
    recipient: str
    message: bytes
    deadline: float


class _StaleError(Exception):
    """A connection from the pool was found closed before the message left. Take a new one, once."""


async def _quietly(talk: Coroutine[Any, Any, object], seconds: float) -> object:
    """Return what `talk` returns, None when the connection does not live for so long: whatever is said matters no more."""
    with suppress(OSError, ValueError):
        async with asyncio.timeout(seconds):
            return await talk
    return None


def _until(deadline: float, seconds: float) -> asyncio.Timeout:
    return asyncio.timeout_at(min(deadline, asyncio.get_running_loop().time() + seconds))


def signer_of(config: ProviderConfig) -> Signer | None:
    """Return what signs the mails of a provider; None: nobody. Reads the key. Raises SettingsError."""
    options = {name: config.options.get(name) for name in ("dkim_domain", "dkim_selector", "dkim_key")}
    if not any(options.values()):
        return None
    missing = [name for name, value in options.items() if not value]
    if missing:
        raise SettingsError([f"provider {config.name}: {missing[0]} is missing: DKIM needs {', '.join(options)}"])
    from channels.dkim import Signer  # here: dkimpy brings a DNS client

    domain = config.option("dkim_domain", _domain, "")
    text = options["dkim_key"] or ""
    try:
        key = text.encode("ascii") if text.lstrip().startswith("-----BEGIN ") else Path(text).expanduser().read_bytes()
        return Signer(domain, options["dkim_selector"] or "", key)
    except (OSError, ValueError, RuntimeError) as error:
        raise SettingsError([f"provider {config.name}: the file of dkim_key cannot be read: {type(error).__name__}"]) from None
    except SettingsError as error:
        raise SettingsError([f"provider {config.name}: {problem}" for problem in error.problems]) from None


def _of(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return `parse` as an option's: with a ValueError for a SettingsError."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except SettingsError as error:
            raise ValueError(f"is wrong: {'; '.join(error.problems)}") from None

    return parsed


def _domain(text: str) -> str:
    if not is_domain(text):
        raise ValueError("is not a domain")
    return text


def _host_name(text: str) -> str:
    if not text or not all("!" <= c <= "~" for c in text):
        raise ValueError("holds more than printable ASCII")
    return text


def _auth(text: str) -> Auth:
    match text:
        case "plain" | "login" | "xoauth2":
            return text
        case _:
            raise ValueError("is none of plain, login, xoauth2")
