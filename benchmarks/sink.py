"""A mail server that takes everything, faster than anything sends: `python -m benchmarks.sink SMTP_PORT ASK_PORT`.

It remembers when it accepted each delivery; whoever connects to ASK_PORT is told, a line each, and the connection ends.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import cast

import uvloop

_HEADER = b"\r\nX-Notify-Delivery: "
_END = b"\r\n.\r\n"
_REPLIES = {
    b"EHLO": b"250-sink\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 SIZE 33554432\r\n",
    b"MAIL": b"250 2.1.0 OK\r\n",
    b"RCPT": b"250 2.1.5 OK\r\n",
    b"DATA": b"354 go on\r\n",
    b"QUIT": b"221 2.0.0 bye\r\n",
}

Accepted = list[tuple[bytes, float]]


class Smtp(asyncio.Protocol):
    """One connection."""

    def __init__(self, accepted: Accepted) -> None:
        self._accepted = accepted
        self._buffer = bytearray()
        self._is_in_message = False
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # a cast: uvloop's transports are no WriteTransport by name
        self._transport = cast("asyncio.WriteTransport", transport)
        self._transport.write(b"220 sink\r\n")

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(_END if self._is_in_message else b"\r\n")) >= 0:
            if self._is_in_message:
                self._take(end)
                del self._buffer[: end + len(_END)]
            else:
                self._answer(bytes(self._buffer[:4]).upper())
                del self._buffer[: end + 2]

    def _take(self, end: int) -> None:
        start = self._buffer.find(_HEADER, 0, end) + len(_HEADER)
        self._accepted.append((bytes(self._buffer[start : self._buffer.find(b"\r\n", start)]), time.time()))
        self._is_in_message = False
        self._write(b"250 2.0.0 taken\r\n")

    def _answer(self, verb: bytes) -> None:
        self._write(_REPLIES.get(verb, b"250 2.0.0 OK\r\n"))
        if verb == b"DATA":
            self._is_in_message = True
        elif verb == b"QUIT" and self._transport is not None:
            self._transport.close()

    def _write(self, reply: bytes) -> None:
        if self._transport is not None:
            self._transport.write(reply)


class Ask(asyncio.Protocol):
    """Tells what was accepted so far."""

    def __init__(self, accepted: Accepted) -> None:
        self._accepted = accepted

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        answer = cast("asyncio.WriteTransport", transport)
        answer.write(b"".join(b"%b %.6f\n" % line for line in self._accepted))
        answer.close()


async def serve(smtp_port: int, ask_port: int) -> None:
    """Serve until the process ends."""
    accepted: Accepted = []
    loop = asyncio.get_running_loop()
    await loop.create_server(lambda: Smtp(accepted), "127.0.0.1", smtp_port)
    await loop.create_server(lambda: Ask(accepted), "127.0.0.1", ask_port)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2])))
