"""A thin HTTP server for the push simulators: HTTP/2 as strict as `h2` is, and HTTP/1.1 for who asks for no more.

Thin means fast enough that it measures its clients and not itself, and able to do what no framework does: refuse a
stream, break one off after the request, end connections by GOAWAY, say nothing. A success without a body ends with its
headers, as Apple's does; common servers send an empty DATA frame after them.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final, cast

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import h11

if TYPE_CHECKING:
    import ssl

MAX_BODY_BYTES: Final = 65_536
_PREFACE: Final = b"PRI "
_STOP_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request, complete. `connection`: equal for those that came over the same one."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    connection: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What is answered."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


class Fault(Enum):
    """What happens in place of an answer. Where a connection has only one request, it is what breaks."""

    REFUSED = "refused"  # RST_STREAM REFUSED_STREAM: nothing was done
    RESET = "reset"  # RST_STREAM INTERNAL_ERROR: nobody knows
    SILENCE = "silence"
    NONSENSE = "nonsense"  # frames that are none


Handler = Callable[[Request], tuple[float, Reply | Fault]]  # and the seconds that it takes


class HttpServer:
    """Listens on loopback. `tls` None: readable. The port stays the same over `stop` and `start`."""

    def __init__(self, answer: Handler, *, port: int = 0, host: str = "127.0.0.1", max_streams: int = 100) -> None:
        self.port = port
        self.max_streams = max_streams  # that a new connection may have at once
        self.connections = 0  # ever made
        self._answer = answer
        self._host = host
        self._server: asyncio.Server | None = None
        self._protocols: set[_Http2 | _Http1] = set()
        self._transports: set[asyncio.Transport] = set()

    async def start(self, tls: ssl.SSLContext | None) -> None:
        """Listen."""
        self._server = await asyncio.get_running_loop().create_server(lambda: _Unknown(self), self._host, self.port, ssl=tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and cut every connection."""
        if self._server is not None:
            self._server.close()
            self.cut()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._server.wait_closed(), _STOP_SECONDS)
            self._server = None

    def cut(self) -> None:
        """Cut every connection without a word."""
        for transport in tuple(self._transports):
            transport.abort()

    def go_away(self, *, is_graceful: bool = True, takes_none: bool = False) -> None:
        """End every HTTP/2 connection by GOAWAY: what came is answered, what comes is not taken.

        `takes_none`: what has come and is not answered is not taken either. Without grace it is an error, not a farewell.
        """
        for protocol in tuple(self._protocols):
            if isinstance(protocol, _Http2):
                protocol.go_away(is_graceful=is_graceful, takes_none=takes_none)

    @property
    def open_connections(self) -> int:
        """How many connections there are now."""
        return len(self._transports)

    # ---- what its connections ask

    def joined(self, transport: asyncio.Transport) -> int:
        """Count a connection; return its number."""
        self._transports.add(transport)
        self.connections += 1
        return self.connections

    def left(self, transport: asyncio.Transport, protocol: _Http2 | _Http1 | None) -> None:
        """Forget a connection."""
        self._transports.discard(transport)
        if protocol is not None:
            self._protocols.discard(protocol)

    def speaks(self, protocol: _Http2 | _Http1) -> None:
        """Remember by which protocol a connection speaks."""
        self._protocols.add(protocol)

    def answer(self, request: Request, reply: Callable[[Reply | Fault], None]) -> None:
        """Answer a request, at once or later."""
        seconds, answer = self._answer(request)
        if seconds > 0:
            asyncio.get_running_loop().call_later(seconds, reply, answer)
        else:
            reply(answer)


class _Unknown(asyncio.Protocol):
    """A connection that has said nothing yet: its first bytes tell which protocol it speaks."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._number = 0
        self._first = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._number = self._server.joined(self._transport)

    def connection_lost(self, _: Exception | None) -> None:
        assert self._transport is not None
        self._server.left(self._transport, None)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        self._first += data
        if len(self._first) < len(_PREFACE):
            return
        kind = _Http2 if self._first.startswith(_PREFACE) else _Http1
        protocol = kind(self._server, self._transport, self._number)
        self._server.speaks(protocol)
        self._transport.set_protocol(protocol)
        protocol.data_received(self._first)


@dataclass(slots=True)
class _Stream:
    headers: dict[str, str]
    body: bytearray = field(default_factory=bytearray)
    is_complete: bool = False


class _Http2(asyncio.Protocol):
    def __init__(self, server: HttpServer, transport: asyncio.Transport, number: int) -> None:
        self._server = server
        self._transport = transport
        self._number = number
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        self._h2.local_settings = h2.settings.Settings(
            client=False, initial_values={h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: server.max_streams}
        )
        self._streams: dict[int, _Stream] = {}
        self._last = 0  # the highest stream that was taken
        self._last_taken: int | None = None  # after a GOAWAY
        self._is_flush_due = False
        self._h2.initiate_connection()
        self._flush()

    def go_away(self, *, is_graceful: bool, takes_none: bool) -> None:
        if takes_none:
            self._streams.clear()
        self._last_taken = 0 if takes_none else self._last
        code = h2.errors.ErrorCodes.NO_ERROR if is_graceful else h2.errors.ErrorCodes.INTERNAL_ERROR
        # by hand: h2 itself would send nothing more after one
        self._flush()
        self._transport.write(b"\0\0\x08\x07\0" + struct.pack(">III", 0, self._last_taken, code))
        self._close_when_done()

    def connection_lost(self, _: Exception | None) -> None:
        self._streams.clear()
        self._server.left(self._transport, self)

    def data_received(self, data: bytes) -> None:
        try:
            for event in self._h2.receive_data(data):
                self._on(event)
        except h2.exceptions.ProtocolError:
            self._flush()  # h2 has written why
            self._transport.close()
            return
        self._flush()

    def _on(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RequestReceived(stream_id=int(number), headers=headers):
                if self._last_taken is not None and number > self._last_taken:
                    return
                self._last = max(self._last, number)
                self._streams[number] = _Stream({str(name): str(value) for name, value in headers or ()})
            case h2.events.DataReceived(stream_id=int(number), data=data, flow_controlled_length=int(length)):
                self._h2.acknowledge_received_data(length, number)
                if number in self._streams:
                    self._streams[number].body += data or b""
                    if len(self._streams[number].body) > MAX_BODY_BYTES:
                        self._reply(number, Reply(status=413))
            case h2.events.StreamEnded(stream_id=int(number)) if number in self._streams:
                self._complete(number, self._streams[number])
            case h2.events.StreamReset(stream_id=int(number)):
                self._streams.pop(number, None)
                self._close_when_done()
            case _:
                pass

    def _complete(self, number: int, stream: _Stream) -> None:
        headers = stream.headers
        request = Request(
            method=headers[":method"],
            path=headers[":path"],
            headers={**headers, "host": headers.get(":authority", headers.get("host", ""))},
            body=bytes(stream.body),
            connection=self._number,
        )
        self._server.answer(request, lambda reply: self._reply(number, reply))

    def _reply(self, number: int, reply: Reply | Fault) -> None:
        if number not in self._streams or self._transport.is_closing():
            return
        with suppress(h2.exceptions.ProtocolError):  # it may have been given up in this very moment
            match reply:
                case Reply():
                    self._send(number, reply)
                case Fault.REFUSED:
                    self._h2.reset_stream(number, h2.errors.ErrorCodes.REFUSED_STREAM)
                case Fault.RESET:
                    self._h2.reset_stream(number, h2.errors.ErrorCodes.INTERNAL_ERROR)
                case Fault.SILENCE:
                    return
                case Fault.NONSENSE:
                    self._flush()
                    self._transport.write(b"\xff" * 16)
        self._streams.pop(number, None)
        self._flush_soon()
        self._close_when_done()

    def _send(self, number: int, reply: Reply) -> None:
        headers = [(":status", str(reply.status)), *reply.headers.items()]
        self._h2.send_headers(number, headers, end_stream=not reply.body)
        size = self._h2.max_outbound_frame_size
        for start in range(0, len(reply.body), size):  # within the client's first window: enough for any answer
            self._h2.send_data(number, reply.body[start : start + size], end_stream=start + size >= len(reply.body))

    def _close_when_done(self) -> None:
        if self._last_taken is not None and not self._streams:
            self._flush()
            self._transport.close()

    def _flush_soon(self) -> None:
        if not self._is_flush_due:
            self._is_flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flush_due = False
        data = self._h2.data_to_send()
        if data and not self._transport.is_closing():
            self._transport.write(data)


class _Http1(asyncio.Protocol):
    def __init__(self, server: HttpServer, transport: asyncio.Transport, number: int) -> None:
        self._server = server
        self._transport = transport
        self._number = number
        self._h11 = h11.Connection(h11.SERVER)
        self._head: h11.Request | None = None
        self._body = bytearray()

    def connection_lost(self, _: Exception | None) -> None:
        self._server.left(self._transport, self)

    def data_received(self, data: bytes) -> None:
        self._h11.receive_data(data)
        self._read()

    def _read(self) -> None:
        try:
            while True:
                match self._h11.next_event():
                    case h11.Request() as head:
                        self._head, self._body = head, bytearray()
                    case h11.Data(data=data):
                        self._body += data
                        if len(self._body) > MAX_BODY_BYTES:
                            self._transport.close()
                            return
                    case h11.EndOfMessage():
                        self._complete()
                    case h11.ConnectionClosed():
                        self._transport.close()
                        return
                    case _:
                        return  # needs more, or waits for our answer
        except h11.RemoteProtocolError:
            self._transport.close()

    def _complete(self) -> None:
        assert self._head is not None
        request = Request(
            method=self._head.method.decode(),
            path=self._head.target.decode(),
            headers={name.decode().lower(): value.decode("latin-1") for name, value in self._head.headers},
            body=bytes(self._body),
            connection=self._number,
        )
        self._server.answer(request, self._reply)

    def _reply(self, reply: Reply | Fault) -> None:
        if self._transport.is_closing():
            return
        match reply:
            case Reply():
                headers = [*reply.headers.items(), ("content-length", str(len(reply.body)))]
                parts = [
                    self._h11.send(h11.Response(status_code=reply.status, headers=headers)),
                    self._h11.send(h11.Data(data=reply.body)),
                    self._h11.send(h11.EndOfMessage()),
                ]
                self._transport.write(b"".join(part for part in parts if part))
                if self._h11.our_state is h11.MUST_CLOSE:
                    self._transport.close()
                else:
                    self._h11.start_next_cycle()
                    asyncio.get_running_loop().call_soon(self._read)
            case Fault.SILENCE:
                pass
            case Fault.NONSENSE:
                self._transport.write(b"220 localhost ESMTP\r\n")
                self._transport.close()
            case Fault.REFUSED | Fault.RESET:
                self._transport.abort()
