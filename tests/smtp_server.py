"""A real SMTP server on loopback that misbehaves on demand, for tests of whatever sends e-mail.

It follows a script: `server.on(Stage.RCPT, Reply("451 4.7.1 later"))` changes what happens at the next RCPT, once. Further
calls for the same stage queue up; without a script it accepts everything.
"""

from __future__ import annotations

import asyncio
import base64
from collections import defaultdict, deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

_DEADLINE_SECONDS = 5.0


class Stage(StrEnum):
    """A moment at which the server can be told to misbehave."""

    GREETING = "GREETING"
    EHLO = "EHLO"
    AUTH = "AUTH"
    STARTTLS = "STARTTLS"
    MAIL = "MAIL"
    RCPT = "RCPT"
    DATA = "DATA"
    MESSAGE = "MESSAGE"  # the first line of a message has come in
    ANSWER = "ANSWER"  # the final dot has come in
    RSET = "RSET"
    NOBODY = "NOBODY"  # DATA without a recipient


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer with this line instead of the usual one; no more happens at this stage."""

    line: str


@dataclass(frozen=True, slots=True)
class Drop:
    """Cut the connection without a word. `is_reset`: with a TCP reset rather than in order."""

    is_reset: bool = True


@dataclass(frozen=True, slots=True)
class Hold:
    """Say nothing until the event is set, then go on as usual. An event that is never set: never answer.

    Ends with the client's connection. Not for `Stage.MESSAGE`, where the client goes on talking.
    """

    until: asyncio.Event = field(default_factory=asyncio.Event)


Action = Reply | Drop | Hold


@dataclass(frozen=True, slots=True)
class Received:
    """An accepted message: its envelope and its bytes, dots unstuffed."""

    sender: str
    recipients: tuple[str, ...]
    raw: bytes


class _DropError(Exception):
    """The script cuts the connection here."""


class SmtpServer:
    """Listens on 127.0.0.1; the port stays the same over `stop` and `start`."""

    def __init__(
        self,
        *,
        tls: ssl.SSLContext | None = None,
        starttls: ssl.SSLContext | None = None,
        login: tuple[str, str] | None = None,
        max_bytes: int | None = None,
        extensions: tuple[str, ...] = (),
    ) -> None:
        self.port = 0
        self.messages: list[Received] = []
        self.connections = 0
        self.open_connections = 0
        self.most_open_connections = 0
        self.commands: list[str] = []
        self.lines: list[bytes] = []
        self.reached: list[Stage] = []
        self._tls = tls
        self._starttls = starttls
        self._login = login
        self._max_bytes = max_bytes
        self._extensions = extensions
        self._script: defaultdict[Stage, deque[Action]] = defaultdict(deque)
        self._server: asyncio.Server | None = None
        self._sessions: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def on(self, stage: Stage, *actions: Action) -> None:
        """Do `actions` at the next times that `stage` comes, one each."""
        self._script[stage].extend(actions)

    async def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, ssl=self._tls, limit=2**20)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and cut every connection."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None
        await self.cut()

    async def cut(self) -> None:
        """Cut every connection, as a server does with idle ones, and wait until they are gone."""
        sessions = dict(self._sessions)
        for task, writer in sessions.items():
            writer.close()
            task.cancel()
        await asyncio.gather(*sessions, return_exceptions=True)

    async def say(self, line: str) -> None:
        """Say something that nobody asked for on every connection, and wait until the clients have hung up."""
        for writer in self._sessions.values():
            writer.write(line.encode() + b"\r\n")
        await self.wait_until(lambda: self.open_connections == 0)

    async def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Return as soon as `is_so()`, which is asked whenever something happened here. Fails after 5 seconds."""
        async with asyncio.timeout(_DEADLINE_SECONDS), self._changed:
            await self._changed.wait_for(is_so)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._sessions[task] = writer
        self.connections += 1
        self.open_connections += 1
        self.most_open_connections = max(self.most_open_connections, self.open_connections)
        try:
            await _Session(self, reader, writer).run()
        except (_DropError, asyncio.CancelledError, asyncio.IncompleteReadError, ConnectionError):
            pass  # how a session ends
        finally:
            writer.close()
            self._sessions.pop(task)
            self.open_connections -= 1
            await self.tell()

    async def tell(self) -> None:
        """Wake whoever waits for something to happen here."""
        async with self._changed:
            self._changed.notify_all()

    def next_action(self, stage: Stage) -> Action | None:
        """Take the script's next action at `stage`."""
        actions = self._script[stage]
        return actions.popleft() if actions else None

    @property
    def login(self) -> tuple[str, str] | None:
        """The one username and password that may send, if anybody has to log in."""
        return self._login

    @property
    def max_bytes(self) -> int | None:
        """The largest message that is taken, if there is a limit."""
        return self._max_bytes

    @property
    def starttls(self) -> ssl.SSLContext | None:
        """What STARTTLS is offered with, if it is."""
        return self._starttls

    def capabilities(self, *, is_secure: bool) -> list[str]:
        """Return what EHLO announces."""
        lines = ["localhost", "8BITMIME", "ENHANCEDSTATUSCODES", *self._extensions]
        if self._max_bytes is not None:
            lines.append(f"SIZE {self._max_bytes}")
        if self._starttls is not None and not is_secure:
            lines.append("STARTTLS")
        if self._login is not None:
            lines.append("AUTH PLAIN")
        return lines


class _Session:
    """One connection."""

    def __init__(self, server: SmtpServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.server = server
        self.reader = reader
        self.writer = writer
        self.is_secure = writer.get_extra_info("sslcontext") is not None
        self.sender: str | None = None
        self.recipients: list[str] = []
        self.ahead = b""  # what came while it was holding: a pipelining client goes on talking

    async def line(self) -> bytes:
        """Return the next line; nothing at the end."""
        if b"\n" not in self.ahead:
            line, self.ahead = self.ahead + await self.reader.readline(), b""
            return line
        line, newline, self.ahead = self.ahead.partition(b"\n")
        return line + newline

    async def run(self) -> None:
        handlers = {
            "EHLO": self.ehlo,
            "STARTTLS": self.start_tls,
            "AUTH": self.authenticate,
            "MAIL": self.mail,
            "RCPT": self.rcpt,
            "DATA": self.data,
            "RSET": self.rset,
        }
        await self.answer(Stage.GREETING, "220 localhost ready")
        while line := await self.line():
            self.server.lines.append(line)
            verb, _, rest = line.decode("utf-8", "replace").rstrip("\r\n").partition(" ")
            self.server.commands.append(verb)
            if verb == "QUIT":
                await self.write("221 2.0.0 bye")
                return
            if verb in handlers:
                await handlers[verb](rest)
            else:
                await self.write("502 5.5.1 what?")

    async def ehlo(self, _: str) -> None:
        lines = self.server.capabilities(is_secure=self.is_secure)
        await self.answer(Stage.EHLO, "\r\n".join([f"250-{line}" for line in lines[:-1]] + [f"250 {lines[-1]}"]))

    async def mail(self, rest: str) -> None:
        address, _, options = rest.removeprefix("FROM:").partition(" ")
        size = int(dict(each.partition("=")[::2] for each in options.split()).get("SIZE") or 0)
        if self.server.max_bytes is not None and size > self.server.max_bytes:
            await self.write("552 5.3.4 too large")
        elif await self.answer(Stage.MAIL, "250 2.1.0 ok"):
            self.sender = address.strip("<>")

    async def rcpt(self, rest: str) -> None:
        if await self.answer(Stage.RCPT, "250 2.1.5 ok"):
            self.recipients.append(rest.removeprefix("TO:").strip("<>"))

    async def rset(self, _: str) -> None:
        self.forget()
        await self.answer(Stage.RSET, "250 2.0.0 ok")

    async def answer(self, stage: Stage, usual: str) -> bool:
        """Follow the script at `stage`; say whether it was passed as usual."""
        if not await self.follow(stage):
            return False
        await self.write(usual)
        return True

    async def follow(self, stage: Stage) -> bool:
        self.server.reached.append(stage)
        await self.server.tell()
        match self.server.next_action(stage):
            case Reply(line=line):
                await self.write(line)
                if line.startswith("421"):
                    raise _DropError
                return False
            case Drop(is_reset=is_reset):
                if is_reset:
                    self.writer.transport.abort()
                raise _DropError
            case Hold(until=until):
                await self.hold(until)
        return True

    async def hold(self, until: asyncio.Event) -> None:
        """Wait for the event, or for the client to give up."""

        async def listen() -> None:
            while more := await self.reader.read(2**16):
                self.ahead += more

        released = asyncio.ensure_future(until.wait())
        gone = asyncio.ensure_future(listen())
        try:
            await asyncio.wait([released, gone], return_when=asyncio.FIRST_COMPLETED)
        finally:
            released.cancel()
            gone.cancel()
        if not until.is_set():
            raise _DropError

    async def write(self, lines: str) -> None:
        self.writer.write(lines.encode("utf-8", "surrogateescape") + b"\r\n")
        await self.writer.drain()

    async def start_tls(self, _: str) -> None:
        context = self.server.starttls
        if context is not None and await self.answer(Stage.STARTTLS, "220 2.0.0 go ahead"):
            await self.writer.start_tls(context)
            self.is_secure = True

    async def authenticate(self, rest: str) -> None:
        _, username, password = base64.b64decode(rest.partition(" ")[2]).decode().split("\0")
        is_right = (username, password) == self.server.login
        await self.answer(Stage.AUTH, "235 2.7.0 ok" if is_right else "535 5.7.8 wrong username or password")

    async def data(self, _: str) -> None:
        if self.sender is None or not self.recipients:
            if not await self.answer(Stage.NOBODY, "503 5.5.1 no"):
                # told to take a message to nobody, which RFC 2920 allows
                while await self.line() not in {b".\r\n", b""}:
                    pass
                await self.write("554 5.5.1 no valid recipients")
            return
        if not await self.answer(Stage.DATA, "354 go ahead"):
            return
        lines = [await self.line()]
        if not await self.follow(Stage.MESSAGE):
            raise _DropError
        while lines[-1] != b".\r\n":
            lines.append(await self.line())
            if not lines[-1]:
                raise _DropError
        if await self.follow(Stage.ANSWER):
            raw = b"".join(line[1:] if line.startswith(b".") else line for line in lines[:-1])
            self.server.messages.append(Received(self.sender, tuple(self.recipients), raw))
            await self.write(f"250 2.0.0 Ok: queued as {len(self.server.messages):08X}")
            await self.server.tell()
        self.forget()

    def forget(self) -> None:
        self.sender = None
        self.recipients = []
