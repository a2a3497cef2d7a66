"""HTTP/2 (RFC 9113) to one origin, exact about what the peer took: certainly nothing, or nobody knows.

A push provider cannot be asked later, so what broke off has to be told apart here. General clients do not: httpcore, below
httpx, fails every request in flight when the peer announces with GOAWAY that it answers these and takes no more (Apple and
Google end connections so every day), and lets a silent stream time all its neighbours out. The state of the protocol is
`h2`'s; this module adds what it leaves open: GOAWAY, refused streams, limits of time, and connections that died unseen.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import struct
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, cast

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
from hpack import HeaderTuple, NeverIndexedHeaderTuple

from schemas.errors import NotifyError, ProviderRefusedError, ProviderUnavailableError, SendUnknownError

MAX_ANSWER_BYTES: Final = 16_384  # those that say something have a few hundred
_FRAME_HEAD_BYTES: Final = 9
_MAX_FRAME_BYTES: Final = 16_384  # what we announce, by leaving it at its default
_GOAWAY: Final = 0x7
_FORGET_STREAMS: Final = 500_000_000  # of the 2^30 that a connection has
_UNLIMITED_STREAMS: Final = 1_000  # as many as we use where the peer sets no limit
_PING_SECONDS: Final = 2.0
_GOODBYE_SECONDS: Final = 1.0

NO_HTTP2: Final = "http1"  # code: the peer chose HTTP/1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the peer answered. `headers` by their names in small letters; of several with one name the last."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def client_context(authorities: str | None = None, *, protocols: Sequence[str] = ("h2", "http/1.1")) -> ssl.SSLContext:
    """Return a context that offers `protocols`. `authorities`: PEM text of those trusted instead of the system's."""
    context = ssl.create_default_context(cadata=authorities)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(list(protocols))
    return context


def varying(name: str, value: str) -> tuple[bytes, bytes]:
    """Return a header that differs from request to request: kept out of the table that spares repeating the others."""
    return cast("tuple[bytes, bytes]", NeverIndexedHeaderTuple(name.encode("ascii"), value.encode("ascii")))


def steady(name: str, value: str) -> tuple[bytes, bytes]:
    """Return a header that many requests have in common."""
    return cast("tuple[bytes, bytes]", HeaderTuple(name.encode("ascii"), value.encode("ascii")))


class _NotTakenError(Exception):
    """The peer said, or the state of the connection proves, that it did nothing about a request."""

    def __init__(self, error: NotifyError, *, is_routine: bool = False) -> None:
        super().__init__()
        self.error = error
        self.is_routine = is_routine  # a connection came to its end in good order: another one will do


class Http2Client:
    """Requests to one origin over few connections. One object serves one event loop.

    `tls` None: readable, and HTTP/2 without asking, for a peer on this host. A request ends within `total_seconds`; until
    `connect_seconds` of them a connection has to be there. A connection carries as many requests at once as the peer
    allows; more than that open the next, up to `max_connections`, and then wait. One that was silent for `quiet_seconds` is
    asked for a sign of life before a message is risked on it.
    """

    def __init__(  # noqa: PLR0913 - limits, each by name
        self,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None,
        connect_seconds: float = 5.0,
        total_seconds: float = 12.0,
        max_connections: int = 4,
        quiet_seconds: float = 30.0,
    ) -> None:
        self._host = host
        self._port = port
        self._tls = tls
        self._connect_seconds = connect_seconds
        self._total_seconds = total_seconds
        self._max_connections = max_connections
        self._quiet_seconds = quiet_seconds
        default_port = 443 if tls else 80
        name = f"[{host}]" if ":" in host else host
        self._authority = steady(":authority", name if port == default_port else f"{name}:{port}")
        self._scheme = steady(":scheme", "https" if tls else "http")
        # at DEBUG it writes every header down: device tokens, and our own
        logging.getLogger("hpack").setLevel(logging.INFO)
        self._last_path = ""
        self._connections: list[_Connection] = []
        self._connecting: asyncio.Task[str | None] | None = None
        self._changed = asyncio.Event()
        self._is_open = True

    async def post(self, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes, *, seconds: float | None = None) -> Answer:
        """Send one request and return its answer, whatever its status.

        `headers` as `steady` and `varying` make them. `seconds`: a limit below the client's. Raises, each with a code:

        - ProviderUnavailableError: not taken. `connect`, `tls`, `http1` (the peer speaks no HTTP/2), `timeout` (no
          connection was free in time), `goaway`, `connection` (lost before everything had left), `closed` (by us).
        - ProviderRefusedError `refused_stream`: not taken, others may be.
        - SendUnknownError `timeout`, `connection`, `stream_reset`, `protocol`, `too_long`, `closed`: everything left.
        """
        # FCM has one path for all, Apple one for each device
        where = (steady if path == self._last_path else varying)(":path", path)
        self._last_path = path
        head = [_POST, self._scheme, self._authority, where, *headers, varying("content-length", str(len(body)))]
        stream: _Stream | None = None
        try:
            async with asyncio.timeout(self._total_seconds if seconds is None else min(seconds, self._total_seconds)):
                is_repeated = False
                while True:
                    connection = await self._ready()
                    stream = connection.request(head, body)
                    try:
                        return await stream.answer
                    except _NotTakenError as error:
                        if is_repeated or not error.is_routine:
                            raise error.error from None
                        is_repeated = True
        except TimeoutError:
            if stream is not None:
                stream.connection.suspect(stream)
            if stream is None or not stream.is_sent:
                raise ProviderUnavailableError("no connection to the provider was free in time", code="timeout") from None
            raise SendUnknownError("the provider did not answer in time", code="timeout") from None
        finally:
            if stream is not None:
                stream.connection.drop(stream)

    async def close(self) -> None:
        """End every connection. Requests still running fail at once."""
        self._is_open = False
        if self._connecting is not None:
            self._connecting.cancel()
        self._changed.set()
        await asyncio.gather(*(connection.close() for connection in tuple(self._connections)))

    async def _ready(self) -> _Connection:
        """Return a connection with room for a request."""
        while self._is_open:
            for connection in self._connections:
                if connection.has_room and await connection.is_alive(self._quiet_seconds) and connection.has_room:
                    return connection
            if self._connecting is None and sum(not each.is_leaving for each in self._connections) < self._max_connections:
                self._connecting = asyncio.create_task(self._connect())
                self._connecting.add_done_callback(self._connected)
            if self._connecting is not None:
                connecting = self._connecting
                await asyncio.wait([connecting])  # whoever gives up waiting leaves it to the others
                code = "closed" if connecting.cancelled() else connecting.result()
                if code is not None:
                    raise ProviderUnavailableError(f"no connection to the provider: {code}", code=code)
            else:
                self._changed.clear()
                await self._changed.wait()
        raise ProviderUnavailableError("the channel is closed", code="closed")

    def _connected(self, _: asyncio.Task[str | None]) -> None:
        self._connecting = None
        self._changed.set()

    async def _connect(self) -> str | None:
        """Open a connection; return a code when that fails, for as many callers as wait."""
        loop = asyncio.get_running_loop()
        connection = _Connection(self, loop)
        is_ready = False
        try:
            async with asyncio.timeout(self._connect_seconds):
                await loop.create_connection(
                    lambda: connection, self._host, self._port, ssl=self._tls, server_hostname=self._host if self._tls else None
                )
                if not connection.speaks_http2:
                    return NO_HTTP2
                await connection.settled
            is_ready = True
        except ssl.SSLError:
            return "tls"
        except (OSError, ValueError):
            return "connect"  # ValueError: a host name that no resolver can be asked for
        finally:
            if not is_ready or not self._is_open:
                connection.abort()
        if connection.is_leaving:
            return "connect"  # greeted us and left
        self._connections.append(connection)
        return None

    def forget(self, connection: _Connection) -> None:
        """Remember a connection no longer, since it ended."""
        if connection in self._connections:
            self._connections.remove(connection)
        self._changed.set()

    def wake(self) -> None:
        """Let whoever waits for room look again."""
        self._changed.set()


_POST: Final = steady(":method", "POST")


@dataclass(slots=True, eq=False)
class _Stream:
    """One request and its answer."""

    number: int
    connection: _Connection
    answer: asyncio.Future[Answer]
    rest: bytes  # of the body, that the peer's window has no room for yet
    is_sent: bool = False  # its last byte was handed to the system
    sent_at: float = 0.0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class _Connection(asyncio.Protocol):
    """One connection. Nothing in it waits: requests begin, bytes come in, answers are set."""

    def __init__(self, client: Http2Client, loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        # our own headers are well formed; without normalising, what is `steady` is kept in the peer's table, tokens included
        config = h2.config.H2Configuration(header_encoding="utf-8", normalize_outbound_headers=False, validate_outbound_headers=False)
        self._h2 = h2.connection.H2Connection(config)
        self._buffer = bytearray()
        self._streams: dict[int, _Stream] = {}
        self._blocked: deque[_Stream] = deque()
        self._complete: list[_Stream] = []  # that the next write brings to their end
        self._is_flush_due = False
        self.is_leaving = False  # takes no new requests
        self._is_dead = False  # as far as we can tell
        self._opened = 0
        self._heard_at = loop.time()
        self._pong: asyncio.Future[None] | None = None
        self.settled: asyncio.Future[None] = loop.create_future()
        self._gone: asyncio.Future[None] = loop.create_future()

    # ---- what the client asks

    @property
    def speaks_http2(self) -> bool:
        """Say whether the peer agreed to HTTP/2. Without TLS it is not asked."""
        assert self._transport is not None
        tls = self._transport.get_extra_info("ssl_object")
        return tls is None or tls.selected_alpn_protocol() == "h2"

    @property
    def has_room(self) -> bool:
        """Say whether one more request may begin."""
        return not self.is_leaving and len(self._streams) < min(self._h2.remote_settings.max_concurrent_streams, _UNLIMITED_STREAMS)

    def request(self, headers: list[tuple[bytes, bytes]], body: bytes) -> _Stream:
        """Begin a request; there has to be room."""
        number = self._h2.get_next_available_stream_id()
        stream = _Stream(number=number, connection=self, answer=self._loop.create_future(), rest=body)
        self._streams[number] = stream
        self._opened += 1
        self.is_leaving = self.is_leaving or self._opened >= _FORGET_STREAMS
        self._h2.send_headers(number, headers, end_stream=False)
        self._send_body(stream)
        self._flush_soon()
        return stream

    def drop(self, stream: _Stream) -> None:
        """Give up a request, if it still runs, and tell the peer."""
        if stream.answer.done() and not stream.answer.cancelled():
            stream.answer.exception()  # seen, or nobody will
        if self._streams.pop(stream.number, None) is None:
            return
        with suppress(h2.exceptions.ProtocolError):
            self._h2.reset_stream(stream.number, h2.errors.ErrorCodes.CANCEL)
        self._flush_soon()
        self._freed()

    def suspect(self, stream: _Stream) -> None:
        """Take no more requests where a request got no answer in time, nor anything else came since it was sent.

        Such a connection may be dead without our knowing. Requests in flight may still be lucky.
        """
        if stream.is_sent and self._heard_at < stream.sent_at:
            self.is_leaving = self._is_dead = True

    async def is_alive(self, quiet_seconds: float) -> bool:
        """Return False, and end the connection, when it was silent for so long and does not answer now."""
        if self._streams or self._loop.time() - self._heard_at < quiet_seconds:
            return True
        if self._pong is None:
            self._pong = self._loop.create_future()
            self._h2.ping(b"\0" * 8)
            self._flush_soon()
        try:
            async with asyncio.timeout(_PING_SECONDS):
                await asyncio.shield(self._pong)
        except TimeoutError:
            self.abort()
            return False
        return not self.is_leaving

    async def close(self) -> None:
        """Say goodbye, fail what still runs, and return when nothing is left."""
        self._fail_all("closed")
        with suppress(h2.exceptions.ProtocolError):
            self._h2.close_connection()
        self._flush()
        if self._transport is not None:
            self._transport.close()
        await asyncio.wait([self._gone], timeout=_GOODBYE_SECONDS)
        self.abort()

    def abort(self) -> None:
        """Cut the connection."""
        self.is_leaving = True
        if self._transport is not None:
            self._transport.abort()

    # ---- what the transport tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if self.speaks_http2:
            self._h2.local_settings = h2.settings.Settings(client=True, initial_values={h2.settings.SettingCodes.ENABLE_PUSH: 0})
            self._h2.initiate_connection()
            self._flush()

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        self._buffer += data
        try:
            self._read()
        except (h2.exceptions.H2Error, ValueError):
            # ValueError: header bytes that are no text
            self._fail_all("protocol")
            self._flush()
            self.abort()
            return
        self._flush()

    def connection_lost(self, _: Exception | None) -> None:
        self._fail_all("connection")
        if not self.settled.done():
            self.settled.set_exception(ConnectionResetError())
            self.settled.exception()  # nobody may be waiting any more
        if self._pong is not None and not self._pong.done():
            self._pong.set_result(None)
        if not self._gone.done():
            self._gone.set_result(None)
        self._client.forget(self)

    # ---- frames

    def _read(self) -> None:
        """Give the complete frames to h2, except GOAWAY: after one h2 would take no more answers."""
        start = end = 0
        buffer = self._buffer
        while len(buffer) - end >= _FRAME_HEAD_BYTES:
            length = int.from_bytes(buffer[end : end + 3], "big")
            if length > _MAX_FRAME_BYTES:
                raise h2.exceptions.FrameTooLargeError
            following = end + _FRAME_HEAD_BYTES + length
            if following > len(buffer):
                break
            if buffer[end + 3] == _GOAWAY:
                self._take(buffer[start:end])
                self._leave(bytes(buffer[end + _FRAME_HEAD_BYTES : following]))
                start = following
            end = following
        self._take(buffer[start:end])
        del buffer[:end]

    def _take(self, frames: bytearray) -> None:
        if frames:
            for event in self._h2.receive_data(bytes(frames)):
                self._on(event)

    def _on(self, event: h2.events.Event) -> None:  # noqa: C901 - a case for each event
        match event:
            case h2.events.ResponseReceived(stream_id=int(number), headers=headers) if number in self._streams:
                stream = self._streams[number]
                fields = {str(name): str(value) for name, value in headers or ()}
                stream.status = int(fields.pop(":status", "0"))
                stream.headers = fields
            case h2.events.DataReceived(stream_id=int(number), data=data, flow_controlled_length=int(length)):
                if number in self._streams:
                    self._h2.acknowledge_received_data(length, number)
                    self._collect(self._streams[number], data or b"")
            case h2.events.StreamEnded(stream_id=int(number)) if number in self._streams:
                self._finish(self._streams[number])
            case h2.events.StreamReset(stream_id=int(number), error_code=code) if number in self._streams:
                self._reset(self._streams.pop(number), code)
            case h2.events.RemoteSettingsChanged():
                if not self.settled.done():
                    self.settled.set_result(None)
                self._send_blocked()
                self._client.wake()
            case h2.events.WindowUpdated():
                self._send_blocked()
            case h2.events.PingAckReceived() if self._pong is not None:
                if not self._pong.done():
                    self._pong.set_result(None)
                self._pong = None
            case _:
                pass  # informational answers, trailers, and what concerns a request that was given up

    def _collect(self, stream: _Stream, data: bytes) -> None:
        stream.body += data
        if len(stream.body) > MAX_ANSWER_BYTES:
            stream.fail(SendUnknownError("the provider's answer has no end", code="too_long"))

    def _finish(self, stream: _Stream) -> None:
        del self._streams[stream.number]
        if stream.rest:
            # answered before the body had left: the answer stands, the rest is not wanted
            with suppress(h2.exceptions.ProtocolError):
                self._h2.reset_stream(stream.number, h2.errors.ErrorCodes.NO_ERROR)
        if not stream.answer.done():
            stream.answer.set_result(Answer(status=stream.status, headers=stream.headers, body=bytes(stream.body)))
        self._freed()

    def _reset(self, stream: _Stream, code: object) -> None:
        if code == h2.errors.ErrorCodes.REFUSED_STREAM:  # RFC 9113 section 8.7: nothing was done about it
            stream.fail(_NotTakenError(ProviderRefusedError("the provider refused the request for now", code="refused_stream")))
        elif stream.is_sent:
            stream.fail(SendUnknownError("the provider broke the request off", code="stream_reset"))
        else:
            stream.fail(_NotTakenError(ProviderRefusedError("the provider broke the request off before its end", code="stream_reset")))
        self._freed()

    def _leave(self, payload: bytes) -> None:
        """Follow a GOAWAY: what is above the last stream was not taken, the rest is still answered (RFC 9113 section 6.8)."""
        if len(payload) < 8:
            raise h2.exceptions.FrameDataMissingError
        last, code = struct.unpack_from(">II", payload)
        self.is_leaving = True
        for stream in [stream for number, stream in self._streams.items() if number > last & 0x7FFFFFFF]:
            del self._streams[stream.number]
            error = ProviderUnavailableError("the provider ended the connection before it took the request", code="goaway")
            stream.fail(_NotTakenError(error, is_routine=code == h2.errors.ErrorCodes.NO_ERROR))
        self._freed()

    def _freed(self) -> None:
        if self.is_leaving and not self._streams and self._transport is not None:
            if self._is_dead:
                self._transport.abort()  # nobody would read a farewell
            else:
                self._flush()
                self._transport.close()
        self._client.wake()

    def _fail_all(self, code: str) -> None:
        """Fail every request: those that left completely are of unknown end."""
        self.is_leaving = True
        streams, self._streams = self._streams, {}
        self._blocked.clear()
        for stream in streams.values():
            if stream.is_sent:
                stream.fail(SendUnknownError(f"no answer came from the provider: {code}", code=code))
            else:
                stream.fail(_NotTakenError(ProviderUnavailableError(f"the connection broke off: {code}", code=code)))

    # ---- writing

    def _send_blocked(self) -> None:
        blocked, self._blocked = self._blocked, deque()
        for stream in blocked:
            if stream.number in self._streams:
                self._send_body(stream)

    def _send_body(self, stream: _Stream) -> None:
        """Send what the peer's windows have room for; the rest follows when it makes some."""
        while True:
            room = min(self._h2.local_flow_control_window(stream.number), self._h2.max_outbound_frame_size)
            if room <= 0 and stream.rest:
                self._blocked.append(stream)
                return
            part, stream.rest = stream.rest[:room], stream.rest[room:]
            self._h2.send_data(stream.number, part, end_stream=not stream.rest)
            if not stream.rest:
                self._complete.append(stream)
                return

    def _flush_soon(self) -> None:
        """Write at the end of this turn of the loop: requests that begin together leave together."""
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flush_due = False
        complete, self._complete = self._complete, []
        data = self._h2.data_to_send()
        if not data or self._transport is None or self._transport.is_closing():
            return
        for stream in complete:
            stream.is_sent = True
            stream.sent_at = self._loop.time()
        self._transport.write(data)
