"""Development mail server: SMTP in, an inbox page and a JSON API out. Not for production; nothing ever leaves it.

`python -m streams.embedded.mail --host 127.0.0.1 --smtp-port 11025 --http-port 18025 --data-dir data/mail`

A message is acknowledged (250) only after it is committed to SQLite, so a count of messages is a count of what senders
were told is accepted. Listens on loopback unless told otherwise. Logs no address and no content.

Recipients that misbehave on purpose, recognised by how their local part starts, at any domain:

    refuse-<code>@…  RCPT is answered with that code, 400 to 599: `refuse-550`, `refuse-452`
    slow-<ms>@…      the message is stored, and the reply to DATA comes after that many milliseconds, at most 60,000
    drop@…           the connection is closed after DATA without a reply; the message is not stored
    drop-stored@…    the same, but the message is stored: what a sender sees as `unknown`

HTTP:

    GET    /                        the inbox
    GET    /api/messages            ?to= &q= &limit= &offset= &summary=1; newest first; X-Total-Count, ETag
    GET    /api/messages/{id}       one message;  /raw  as it arrived
    DELETE /api/messages            forget all
    GET    /api/stats               {"count", "distinctMessageIds"}
    GET    /api/counts?header=NAME  {value of the header: number of accepted messages that carry it}
    GET    /api/faults              what POST has set
    POST   /api/faults              {"mode": "none"}, {"mode": "unreachable"} or {"mode": "refuse", "code": 421}
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import html
import ipaddress
import json
import logging
import queue
import re
import secrets
import signal
import sqlite3
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email import message_from_bytes
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from email.message import EmailMessage
from email.parser import BytesHeaderParser
from email.policy import compat32, default
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, cast

import uvloop
from aiohttp import web
from aiosmtpd.smtp import SMTP, Envelope, Session

log = logging.getLogger(__name__)

SIZE_LIMIT_BYTES: Final = 10 * 2**20
RECIPIENT_LIMIT: Final = 100
CONNECTION_LIMIT: Final = 500
KEPT_MESSAGES: Final = 500_000
BATCH_LIMIT: Final = 500
PAGE_LIMIT: Final = 1000
PAGE_DEFAULT: Final = 100
PREVIEW_CHARACTERS: Final = 160
SLOW_LIMIT_MS: Final = 60_000
REQUEST_LIMIT_BYTES: Final = 2**16
LARGEST_ID: Final = 2**63 - 1

REFUSE: Final = re.compile(r"refuse-([45]\d\d)(?!\d)")
SLOW: Final = re.compile(r"slow-(\d{1,6})(?!\d)")
DROP: Final = re.compile(r"drop(-stored)?(?![a-z0-9])")
ENHANCED: Final = {  # RFC 3463, for the codes that have one usual meaning
    421: "4.3.2",
    450: "4.2.0",
    451: "4.3.0",
    452: "4.2.2",
    550: "5.1.1",
    552: "5.2.2",
    553: "5.1.3",
    554: "5.7.1",
}

SCHEMA: Final = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    received_at TEXT NOT NULL,
    sender TEXT NOT NULL,
    recipients TEXT NOT NULL,
    subject TEXT NOT NULL,
    message_id TEXT NOT NULL,
    headers TEXT NOT NULL,
    raw BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS messages_message_id ON messages (message_id);
CREATE TABLE IF NOT EXISTS recipients (
    address TEXT NOT NULL COLLATE NOCASE,
    message INTEGER NOT NULL,
    PRIMARY KEY (address, message)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS recipients_message ON recipients (message);
"""

Json = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """One accepted DATA command: envelope and content, with what searches need taken from the header."""

    received_at: str
    sender: str
    recipients: tuple[str, ...]
    subject: str
    message_id: str
    headers: str  # JSON, names in lower case
    raw: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A row of the inbox."""

    id: int
    received_at: str
    sender: str
    recipients: list[str]
    subject: str
    raw: bytes


class Store:
    """Messages in SQLite. One thread writes, committing whatever has gathered in one transaction; readers share one."""

    def __init__(self, path: Path, *, kept_messages: int = KEPT_MESSAGES) -> None:
        self._kept_messages = kept_messages
        self._writer = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._writer.executescript(SCHEMA)
        self._reader = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._reading = threading.Lock()
        self._jobs: queue.SimpleQueue[tuple[Callable[[], object], asyncio.Future[object]] | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._write, name="mail-store", daemon=True)
        self._thread.start()

    async def add(self, message: Incoming) -> None:
        """Return once `message` is committed. Raises sqlite3.Error when it cannot be stored."""
        await self._submit(lambda: self._insert(message))

    async def clear(self) -> int:
        """Delete every message; returns how many there were."""
        return cast("int", await self._submit(self._delete))

    async def page(
        self, *, to: str | None, search: str | None, limit: int, offset: int, id_: int | None = None
    ) -> tuple[list[Stored], int]:
        """Return the newest messages that match, and how many match in all."""
        conditions, values = ["1"], list[object]()
        if to is not None:
            conditions.append("id IN (SELECT message FROM recipients WHERE address = ?)")
            values.append(to)
        if search:
            conditions.append("instr(lower(subject || ' ' || recipients || ' ' || sender), ?)")
            values.append(search.lower())
        if id_ is not None:
            conditions.append("id = ?")
            values.append(id_)
        where = " AND ".join(conditions)
        columns = "id, received_at, sender, recipients, subject, raw"
        rows = await self._read(
            f"SELECT {columns} FROM messages WHERE {where} ORDER BY id DESC LIMIT ? OFFSET ?",  # noqa: S608  # our texts
            (*values, limit, offset),
        )
        [(total,)] = await self._read(f"SELECT count(*) FROM messages WHERE {where}", values)  # noqa: S608
        found = [
            Stored(id=number, received_at=at, sender=sender, recipients=json.loads(to), subject=subject, raw=raw)
            for number, at, sender, to, subject, raw in rows
        ]
        return found, total

    async def version(self) -> str:
        """Return a text that changes whenever a message comes or goes."""
        [(newest, count)] = await self._read("SELECT coalesce(max(id), 0), count(*) FROM messages")
        return f"{newest}-{count}"

    async def stats(self) -> Json:
        """Return how many messages there are, and how many different Message-IDs they carry."""
        [(count, distinct)] = await self._read("SELECT count(*), count(DISTINCT message_id) FROM messages")
        return {"count": count, "distinctMessageIds": distinct}

    async def counts(self, header: str) -> Json:
        """Return for each value of `header` how many messages carry it; messages without it are not counted."""
        path = f'$."{header.lower()}"'
        return dict(
            await self._read(
                "SELECT CAST(json_extract(headers, ?1) AS TEXT) AS value, count(*) FROM messages"
                " WHERE json_extract(headers, ?1) IS NOT NULL GROUP BY value",
                (path,),
            )
        )

    def close(self) -> None:
        """Write what is waiting and close the file."""
        self._jobs.put(None)
        self._thread.join()
        self._reader.close()
        self._writer.close()

    async def _submit(self, job: Callable[[], object]) -> object:
        done: asyncio.Future[object] = self._loop.create_future()
        self._jobs.put((job, done))
        return await done

    async def _read(self, sql: str, values: Sequence[object] = ()) -> list[Any]:  # rows are whatever was asked for
        def read() -> list[Any]:
            with self._reading:
                return self._reader.execute(sql, values).fetchall()

        return await asyncio.to_thread(read)

    def _write(self) -> None:
        is_open = True
        while is_open:
            batch = [self._jobs.get()]
            with contextlib.suppress(queue.Empty):
                while len(batch) < BATCH_LIMIT:
                    batch.append(self._jobs.get_nowait())
            is_open = None not in batch
            jobs = [each for each in batch if each]
            results: list[object] = []
            failure: sqlite3.Error | None = None
            try:
                self._writer.execute("BEGIN")
                results = [job() for job, _ in jobs]
                self._writer.execute("COMMIT")
            except sqlite3.Error as error:
                failure = error
                with contextlib.suppress(sqlite3.Error):
                    self._writer.execute("ROLLBACK")
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._settle, [done for _, done in jobs], results, failure)

    @staticmethod
    def _settle(waiting: list[asyncio.Future[object]], results: list[object], failure: sqlite3.Error | None) -> None:
        for number, done in enumerate(waiting):
            if done.done():  # its connection was lost
                continue
            if failure:
                done.set_exception(failure)
            else:
                done.set_result(results[number])

    def _insert(self, message: Incoming) -> None:
        number = self._writer.execute(
            "INSERT INTO messages (received_at, sender, recipients, subject, message_id, headers, raw) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                message.received_at,
                message.sender,
                json.dumps(message.recipients, ensure_ascii=False),
                message.subject,
                message.message_id,
                message.headers,
                message.raw,
            ),
        ).lastrowid
        self._writer.executemany("INSERT OR IGNORE INTO recipients VALUES (?, ?)", [(address, number) for address in message.recipients])
        if number and number > self._kept_messages:
            oldest = number - self._kept_messages
            self._writer.execute("DELETE FROM messages WHERE id <= ?", (oldest,))
            self._writer.execute("DELETE FROM recipients WHERE message <= ?", (oldest,))

    def _delete(self) -> int:
        self._writer.execute("DELETE FROM recipients")
        return self._writer.execute("DELETE FROM messages").rowcount


def decoded(value: object) -> str:
    """Return a header's value as text: unfolded, encoded words and raw UTF-8 decoded, never raising."""
    text = re.sub(r"\r?\n(?=[ \t])", "", str(value))
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if "=?" in text:
        with contextlib.suppress(HeaderParseError, LookupError, ValueError):
            text = str(make_header(decode_header(text)))
    return " ".join(text.split("\n")).strip()


def received(envelope: Envelope, *, now: datetime) -> Incoming:
    """Return the message in `envelope`, which has just arrived."""
    raw = cast("bytes", envelope.original_content)
    message = BytesHeaderParser(policy=compat32).parsebytes(raw)
    headers = grouped((name.lower(), decoded(value)) for name, value in message.raw_items())  # `get` loses raw UTF-8
    return Incoming(
        received_at=now.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        sender=printable(envelope.mail_from or ""),
        recipients=tuple(printable(address) for address in envelope.rcpt_tos if address),
        subject=first(headers.get("subject", "")),
        message_id=first(headers.get("message-id", "")),
        headers=json.dumps(headers, ensure_ascii=False),
        raw=raw,
    )


def printable(address: str) -> str:
    """Return `address` without the escapes of bytes that are no UTF-8, which SQLite would refuse."""
    return address.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def grouped(headers: Iterable[tuple[str, str]]) -> dict[str, str | list[str]]:
    """Return name → value, or → the list of values where a name comes more than once."""
    result: dict[str, str | list[str]] = {}
    for name, value in headers:
        match result.get(name):
            case None:
                result[name] = value
            case list() as values:
                values.append(value)
            case str() as first:
                result[name] = [first, value]
    return result


def first(value: str | list[str]) -> str:
    """Return the value of a header that should be there once."""
    return value if isinstance(value, str) else value[0]


def document(stored: Stored) -> Json:
    """Return the API's full object for a message."""
    message = parsed(stored.raw)
    return {
        "id": stored.id,
        "from": stored.sender,
        "to": stored.recipients,
        "subject": stored.subject,
        "headers": grouped((name, decoded(value)) for name, value in message.raw_items()),
        "text": part(message, "plain"),
        "html": part(message, "html"),
        "attachments": [{"filename": each.get_filename(), "contentType": each.get_content_type()} for each in message.iter_attachments()]
        if message.is_multipart()
        else [],
        "sizeBytes": len(stored.raw),
        "receivedAt": stored.received_at,
    }


def summary(stored: Stored) -> Json:
    """Return the API's short object: what a list shows."""
    message = parsed(stored.raw)
    text = part(message, "plain")
    if text is None:
        text = html.unescape(re.sub(r"(?s)<(style|script|title).*?</\1>|<[^>]*>", " ", part(message, "html") or ""))
    return {
        "id": stored.id,
        "from": stored.sender,
        "to": stored.recipients,
        "subject": stored.subject,
        "preview": " ".join(text.split())[:PREVIEW_CHARACTERS],
        "receivedAt": stored.received_at,
    }


def parsed(raw: bytes) -> EmailMessage:
    """Return the MIME tree of `raw`."""
    return message_from_bytes(raw, policy=default)


def part(message: EmailMessage, subtype: str) -> str | None:
    """Return the text of the body's `plain` or `html` part, None when it has none."""
    try:
        body = cast("EmailMessage | None", message.get_body((subtype,)))
    except (AttributeError, ValueError):  # a multipart that is none: the parser kept it as text
        body = None
    if body is None:
        return None
    try:
        return str(body.get_content()).replace("\r\n", "\n")
    except (LookupError, ValueError):  # unknown charset, bad transfer encoding
        payload = body.get_payload(decode=True)
        return payload.decode("utf-8", "replace") if isinstance(payload, bytes) else str(payload)


class FaultMode(StrEnum):
    """How the whole server misbehaves."""

    NONE = "none"
    REFUSE = "refuse"
    UNREACHABLE = "unreachable"


@dataclass(slots=True, kw_only=True)
class Faults:
    """What POST /api/faults has set. `code` is the reply when the mode is `refuse`."""

    mode: FaultMode = FaultMode.NONE
    code: int = 451

    @property
    def refusal(self) -> str | None:
        """The reply to every sender, or None."""
        return reply(self.code, "Refused on request") if self.mode is FaultMode.REFUSE else None


def reply(code: int, text: str) -> str:
    """Return an SMTP reply line with its enhanced status code."""
    return f"{code} {ENHANCED.get(code, f'{code // 100}.0.0')} {text}"


class Handler:
    """aiosmtpd's hooks: stores what is accepted and misbehaves where it was asked to."""

    def __init__(self, store: Store, faults: Faults) -> None:
        self._store = store
        self._faults = faults

    async def handle_MAIL(  # noqa: N802  # aiosmtpd's name
        self, server: SMTP, _session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        """Answer MAIL FROM."""
        if refusal := self._faults.refusal:
            return await self._refuse(server, refusal)
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return "250 2.1.0 OK"

    async def handle_RCPT(  # noqa: N802
        self, server: SMTP, _session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        """Answer RCPT TO."""
        if refusal := self._faults.refusal:
            return await self._refuse(server, refusal)
        if found := REFUSE.match(address.lower()):
            return reply(int(found[1]), "Refused on request")
        if len(envelope.rcpt_tos) >= RECIPIENT_LIMIT:
            return "452 4.5.3 Too many recipients"
        envelope.rcpt_tos.append(address)
        envelope.rcpt_options.extend(options)
        return "250 2.1.5 OK"

    async def handle_DATA(self, server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802
        """Store the message, then answer."""
        if refusal := self._faults.refusal:
            return await self._refuse(server, refusal)
        addresses = [address.lower() for address in envelope.rcpt_tos if address]
        drop = next(filter(None, map(DROP.match, addresses)), None)
        if not drop or drop[1]:
            try:
                await self._store.add(received(envelope, now=datetime.now(UTC)))
            except sqlite3.Error as error:
                log.error("message.not_stored error=%s", type(error).__name__)  # noqa: TRY400  # a trace could quote
                return "452 4.3.1 Cannot store the message"
        if drop:
            cast("asyncio.Transport", server.transport).abort()
            await asyncio.get_running_loop().create_future()  # until the lost connection cancels us
        delays = [int(found[1]) for found in map(SLOW.match, addresses) if found]
        if delays:
            await asyncio.sleep(min(max(delays), SLOW_LIMIT_MS) / 1000)
        return "250 2.0.0 Stored"

    async def handle_exception(self, error: Exception) -> str:
        """Answer after an error of ours; its text could quote the message, so only its type is logged."""
        log.error("session.failed error=%s", type(error).__name__)
        return "451 4.3.0 Internal error"

    async def _refuse(self, server: SMTP, refusal: str) -> str:
        if refusal.startswith("421"):  # the code that announces a closing connection
            await server.push(refusal)
            cast("asyncio.Transport", server.transport).close()
            await asyncio.get_running_loop().create_future()
        return refusal


class InboxProtocol(SMTP):
    """One SMTP connection, known to the server as long as it is open."""

    def __init__(self, handler: Handler, connections: set[asyncio.Transport]) -> None:
        super().__init__(
            handler,
            data_size_limit=SIZE_LIMIT_BYTES,
            enable_SMTPUTF8=True,
            hostname="inbox.localhost",
            ident="FlowMart development mail server",
            loop=asyncio.get_running_loop(),
        )
        self._connections = connections
        self._peer: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the connection."""
        self._peer = cast("asyncio.Transport", transport)
        self._connections.add(self._peer)
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        """Forget the connection."""
        self._connections.discard(cast("asyncio.Transport", self._peer))
        super().connection_lost(error)


class Refuser(asyncio.Protocol):
    """Closes a connection at once: `reason` is said first, or nothing at all when it is empty."""

    def __init__(self, reason: bytes) -> None:
        self._reason = reason

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Close it."""
        if self._reason:
            cast("asyncio.Transport", transport).write(self._reason)
            transport.close()
        else:
            cast("asyncio.Transport", transport).abort()


class Inbox:
    """The HTTP side."""

    def __init__(self, store: Store, faults: Faults, connections: set[asyncio.Transport], *, host: str) -> None:
        self._store = store
        self._faults = faults
        self._connections = connections
        self._host = host
        self._page = (files(__package__) / "inbox.html").read_text(encoding="utf-8")

    def application(self) -> web.Application:
        """Return the routes."""
        application = web.Application(middlewares=[self._guard], client_max_size=REQUEST_LIMIT_BYTES)
        application.add_routes(
            [
                web.get("/", self.page),
                web.get("/api/messages", self.messages),
                web.delete("/api/messages", self.clear),
                web.get(r"/api/messages/{id:\d{1,18}}", self.message),
                web.get(r"/api/messages/{id:\d{1,18}}/raw", self.raw),
                web.get("/api/stats", self.stats),
                web.get("/api/counts", self.counts),
                web.get("/api/faults", self.faults),
                web.post("/api/faults", self.set_faults),
            ]
        )
        return application

    async def page(self, _request: web.Request) -> web.Response:
        """Answer GET /."""
        nonce = secrets.token_urlsafe(16)
        local = "http://127.0.0.1:* http://localhost:*"
        policy = (  # a mail in its frame inherits it: no script, no request to anywhere but this machine
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; img-src 'self' data: {local};"
            " connect-src 'self'; frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return web.Response(
            text=self._page.replace("{{nonce}}", nonce),
            content_type="text/html",
            headers={"Content-Security-Policy": policy},
        )

    async def messages(self, request: web.Request) -> web.Response:
        """Answer GET /api/messages."""
        etag = await self._store.version()
        if request.headers.get("If-None-Match") == f'"{etag}"':
            return web.Response(status=304)
        found, total = await self._store.page(
            to=request.query.get("to"),
            search=request.query.get("q"),
            limit=number(request, "limit", PAGE_DEFAULT, 1, PAGE_LIMIT),
            offset=number(request, "offset", 0, 0, LARGEST_ID),
        )
        describe = summary if request.query.get("summary") else document
        body = await asyncio.to_thread(lambda: json.dumps([describe(each) for each in found]))
        response = web.json_response(text=body, headers={"X-Total-Count": str(total)})
        response.etag = etag
        return response

    async def message(self, request: web.Request) -> web.Response:
        """Answer GET /api/messages/{id}."""
        return web.json_response(document(await self._one(request)))

    async def raw(self, request: web.Request) -> web.Response:
        """Answer GET /api/messages/{id}/raw; as plain text, so that no browser interprets it."""
        stored = await self._one(request)
        return web.Response(body=stored.raw, content_type="text/plain", charset="utf-8")

    async def clear(self, _request: web.Request) -> web.Response:
        """Answer DELETE /api/messages."""
        return web.json_response({"deleted": await self._store.clear()})

    async def stats(self, _request: web.Request) -> web.Response:
        """Answer GET /api/stats."""
        return web.json_response(await self._store.stats())

    async def counts(self, request: web.Request) -> web.Response:
        """Answer GET /api/counts."""
        header = request.query.get("header", "")
        if not re.fullmatch(r"[A-Za-z0-9-]{1,100}", header):
            raise problem(web.HTTPBadRequest, "header must be the name of a header")
        return web.json_response(await self._store.counts(header))

    async def faults(self, _request: web.Request) -> web.Response:
        """Answer GET /api/faults."""
        return web.json_response({"mode": self._faults.mode, "code": self._faults.code})

    async def set_faults(self, request: web.Request) -> web.Response:
        """Answer POST /api/faults."""
        if request.content_type != "application/json":  # what a foreign page cannot send without asking first
            raise problem(web.HTTPUnsupportedMediaType, "send application/json")
        try:
            body = await request.json()
            mode = FaultMode(body["mode"])
            code = int(body.get("code", 451))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise problem(web.HTTPBadRequest, "mode must be one of: " + ", ".join(FaultMode)) from None
        if not 400 <= code <= 599:
            raise problem(web.HTTPBadRequest, "code must be between 400 and 599")
        self._faults.mode, self._faults.code = mode, code
        if mode is FaultMode.UNREACHABLE:
            for transport in list(self._connections):
                transport.abort()
        log.info("faults.set mode=%s code=%d", mode, code)
        return await self.faults(request)

    async def _one(self, request: web.Request) -> Stored:
        found, _ = await self._store.page(to=None, search=None, limit=1, offset=0, id_=int(request.match_info["id"]))
        if not found:
            raise problem(web.HTTPNotFound, "no such message")
        return found[0]

    @web.middleware
    async def _guard(self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        """Refuse names that are not ours: a page elsewhere may make its own name point to this machine."""
        name = request.url.host or ""
        if is_loopback(self._host) and not is_loopback(name):
            raise problem(web.HTTPForbidden, "this server answers only to 127.0.0.1 and localhost")
        response = await handler(request)
        response.headers.update({"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"})
        return response


def problem(kind: type[web.HTTPException], text: str) -> web.HTTPException:
    """Return an HTTP error with a JSON body."""
    return kind(text=json.dumps({"error": text}), content_type="application/json")


def number(request: web.Request, name: str, otherwise: int, least: int, most: int) -> int:
    """Return a query parameter. Raises HTTPBadRequest when it is not between `least` and `most`."""
    text = request.query.get(name)
    if text is None:
        return otherwise
    if not re.fullmatch(r"\d{1,19}", text) or not least <= int(text) <= most:
        raise problem(web.HTTPBadRequest, f"{name} must be a number from {least} to {most}")
    return int(text)


def is_loopback(host: str) -> bool:
    """Return whether `host` names only this machine."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


async def serve(*, host: str, smtp_port: int, http_port: int, data_dir: Path) -> None:
    """Serve both sides until SIGTERM or SIGINT. Raises OSError when a port is in use."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, stopped.set)
    data_dir.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240
    store = Store(data_dir / "mail.sqlite")
    faults = Faults()
    connections: set[asyncio.Transport] = set()
    handler = Handler(store, faults)

    def connect() -> asyncio.Protocol:
        if faults.mode is FaultMode.UNREACHABLE:
            return Refuser(b"")
        if len(connections) >= CONNECTION_LIMIT:
            return Refuser(b"421 4.7.0 Too many connections\r\n")
        return InboxProtocol(handler, connections)

    smtp = await loop.create_server(connect, host, smtp_port, backlog=CONNECTION_LIMIT)
    runner = web.AppRunner(Inbox(store, faults, connections, host=host).application(), access_log=None)
    try:
        await runner.setup()
        await web.TCPSite(runner, host, http_port, shutdown_timeout=0.5).start()
        log.info("mail.ready host=%s smtp_port=%d http_port=%d", host, smtp_port, http_port)
        await stopped.wait()
    finally:
        smtp.close()
        for transport in list(connections):
            transport.abort()
        await runner.cleanup()
        store.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the server from the command line."""
    parser = argparse.ArgumentParser(prog="python -m streams.embedded.mail", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; loopback by default")
    parser.add_argument("--smtp-port", type=int, default=11025)
    parser.add_argument("--http-port", type=int, default=18025)
    parser.add_argument("--data-dir", type=Path, required=True)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    logging.getLogger("mail.log").setLevel(logging.CRITICAL)  # aiosmtpd's, which names addresses
    if not is_loopback(options.host):
        log.warning("mail.exposed host=%s: whoever reaches this address can read every message", options.host)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(
            serve(
                host=options.host,
                smtp_port=options.smtp_port,
                http_port=options.http_port,
                data_dir=options.data_dir,
            )
        )


if __name__ == "__main__":
    main()
