"""The SMTP that a logged-in connection speaks (RFC 5321, pipelined as RFC 2920 says), and what its replies mean.

The moment at which a connection breaks decides whether a message can have been accepted: until the line with the final dot
was handed over nothing is, after it only the reply tells.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Mapping
from enum import StrEnum
from typing import Final, NamedTuple, cast

_LONGEST_REPLY: Final = 32_768
_LONGEST_LINE: Final = 8_192
_ONE_WRITE_BYTES: Final = 65_536
_COMPLETED, _INTERMEDIATE = 2, 3  # first digits of a reply (RFC 5321 section 4.2.1)
_ENHANCED: Final = re.compile(r"([245]\.\d{1,3}\.\d{1,3})(?:\s|$)")  # RFC 3463
_REFERENCE_CHARACTERS: Final = 100


class Stage(StrEnum):
    """How far a message got."""

    MAIL = "MAIL"
    RCPT = "RCPT"
    DATA = "DATA"
    MESSAGE = "message"
    ANSWER = "end of message"  # the final dot was handed over: from here on it can have been accepted


class Reply(NamedTuple):
    """A reply of the server. `text`: its lines without the code. It can quote an address: for nobody's eyes."""

    code: int
    text: str

    @property
    def status(self) -> str | None:
        """The enhanced status (RFC 3463), such as 5.1.1."""
        found = _ENHANCED.match(self.text)
        return found[1] if found else None

    @property
    def shown(self) -> str:
        """What may be told of it: `550 5.1.1`."""
        status = self.status
        return f"{self.code} {status}" if status else str(self.code)

    @property
    def reference(self) -> str | None:
        """What the server called the message, without whatever looks like an address."""
        words = _ENHANCED.sub("", self.text, count=1).encode("ascii", "ignore").decode("ascii").split()
        kept = " ".join(word for word in words if "@" not in word and word.isprintable())
        return kept[:_REFERENCE_CHARACTERS] or None


class Means(StrEnum):
    """What a reply that is not as hoped for means for the delivery."""

    UNAVAILABLE = "unavailable"  # not about this delivery: all fare alike
    THROTTLED = "throttled"
    REFUSED = "refused"
    REJECTED = "rejected"
    DEAD = "dead"  # rejected, since there is no such mailbox: nothing more goes there
    NONSENSE = "nonsense"  # no reply to what was asked: nobody knows where in the conversation we are


# codes that say more than the enhanced status beside them
_BY_CODE: Final[Mapping[int, Means]] = {
    421: Means.UNAVAILABLE,  # the server hangs up, on whomever
    # about our account (RFC 4954 section 6): a person must look, and nothing is lost meanwhile
    530: Means.UNAVAILABLE,
    534: Means.UNAVAILABLE,
    535: Means.UNAVAILABLE,
    538: Means.UNAVAILABLE,
    454: Means.THROTTLED,  # Amazon SES: maximum sending rate, or daily quota, exceeded
}
# RFC 3463, with the additions of the IANA registry; what is not here follows its first digit, 4 refused and 5 rejected
_BY_STATUS: Final[Mapping[str, Means]] = {
    "4.3.1": Means.THROTTLED,  # its disk is full, for all
    "4.3.2": Means.THROTTLED,  # it takes nothing for the moment
    "4.4.5": Means.THROTTLED,  # congested
    "4.7.28": Means.THROTTLED,  # Gmail: an unusual rate of mail from our address
    "5.1.1": Means.DEAD,  # no such mailbox
    "5.1.2": Means.DEAD,  # no such domain
    "5.1.3": Means.DEAD,  # no mailbox can be called so
    "5.1.6": Means.DEAD,  # moved away, nobody knows where
    "5.1.10": Means.DEAD,  # its domain takes no mail at all (RFC 7505)
    "5.2.1": Means.DEAD,  # the mailbox was closed
    "5.2.2": Means.REFUSED,  # the mailbox is full: for today
    # 5.7.* and the rest of 5.*: about us or the message, by policy; another message to the same mailbox may pass
}
_BY_DIGIT: Final[Mapping[int, Means]] = {4: Means.REFUSED, 5: Means.REJECTED}


def meaning(reply: Reply, stage: Stage) -> Means:
    """Return what a reply means that ended an exchange at `stage`."""
    if reply.code // 100 not in _BY_DIGIT:
        return Means.NONSENSE
    found = _BY_CODE.get(reply.code)
    if found is Means.UNAVAILABLE and stage is Stage.ANSWER:
        return Means.REFUSED  # it took the whole message to say so: that is about the message
    found = found or _BY_STATUS.get(reply.status or "") or _BY_DIGIT[reply.code // 100]
    if found is Means.DEAD and stage is Stage.MAIL:
        return Means.REJECTED  # about the sender's mailbox
    return found


def is_dead(status: str) -> bool:
    """Say whether an enhanced status, of a reply or of a later report, says that the mailbox itself is dead."""
    return _BY_STATUS.get(status) is Means.DEAD


class Wire(asyncio.Protocol):
    """Commands out, replies in, in their order. Takes a transport over from whoever opened it."""

    def __init__(self, transport: asyncio.BaseTransport) -> None:
        # a cast: uvloop's transports are no Transport by name
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_protocol(self)
        self._rest = b""
        self._lines: list[bytes] = []
        self._replies: deque[Reply] = deque()
        self._expected = 0
        self._waiter: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._is_paused = False
        self._end: Exception | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._end is None and not self._transport.is_closing()

    def write(self, lines: bytes, *, replies: int) -> None:
        """Hand whole lines over that so many replies will answer. Raises ConnectionError."""
        if not self.is_open:
            raise ConnectionResetError("the connection is closed")
        self._expected += replies
        self._transport.write(lines)

    async def write_through(self, data: bytes) -> None:
        """Hand data over, and return when the system took all of it. Raises ConnectionError."""
        self._transport.set_write_buffer_limits(high=0)  # `resume_writing` when nothing is left
        self.write(data, replies=0)
        if self._is_paused and self._end is None:
            self._drained = asyncio.get_running_loop().create_future()
            await self._drained
        if self._end is not None:
            raise self._end

    async def reply(self) -> Reply:
        """Return the next reply. Raises ConnectionError when none comes any more, ValueError when it is none."""
        while not self._replies:
            if self._end is not None:
                raise self._end
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._replies.popleft()

    def close(self) -> None:
        """Close the connection."""
        self._finish(ConnectionAbortedError("the connection was closed"))
        self._transport.close()

    def abort(self) -> None:
        """Close the connection at once: what it did not send yet is dropped."""
        self._finish(ConnectionAbortedError("the connection was closed"))
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take replies in."""
        if self._end is not None:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if not line[:3].isdigit() or len(line) > _LONGEST_LINE:
                self._nonsense()
                return
            self._lines.append(line[4:].strip())
            if line[3:4] == b"-":
                continue
            if self._expected == 0:
                # nobody was asked: a server that gives an idle connection up says so
                self._finish(ConnectionResetError("the server hung up"))
                self._transport.close()
                return
            self._expected -= 1
            self._replies.append(Reply(int(line[:3]), b"\n".join(self._lines).decode("utf-8", "replace")))
            self._lines.clear()
        if len(self._rest) + sum(map(len, self._lines)) > _LONGEST_REPLY:
            self._nonsense()
        elif self._replies:
            self._wake()

    def eof_received(self) -> bool:
        """Close our side too."""
        self._finish(ConnectionResetError("the server hung up"))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever waits."""
        self._finish(exc if isinstance(exc, ConnectionError) else ConnectionResetError("the connection broke"))

    def pause_writing(self) -> None:
        """Note that the system does not take everything at once."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """Note that it took the rest."""
        self._is_paused = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def _nonsense(self) -> None:
        self._finish(ValueError("no reply of SMTP"))
        self._transport.abort()

    def _finish(self, end: Exception) -> None:
        self._end = self._end or end
        self._wake()
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Envelope(NamedTuple):
    """The commands before a message, without their line ends."""

    mail: bytes
    rcpt: bytes


_ENVELOPE: Final = ((Stage.MAIL, _COMPLETED), (Stage.RCPT, _COMPLETED), (Stage.DATA, _INTERMEDIATE))


class Connection:
    """A connection and how far its current message got: `stage` says whether it can have been accepted.

    `extensions`: what the server's EHLO announced, in small letters. `refused` is the first reply that was not as hoped for,
    known even where the conversation breaks after it.
    """

    def __init__(self, transport: asyncio.BaseTransport, extensions: frozenset[str]) -> None:
        self.wire = Wire(transport)
        self.extensions = extensions
        self.opened_at = asyncio.get_running_loop().time()
        self.messages = 0
        self.is_reused = False
        self.is_usable = True
        self.stage = Stage.MAIL
        self.refused: Reply | None = None
        self._is_pipelining = "pipelining" in extensions

    async def exchange(self, envelope: Envelope, message: bytes) -> Reply:
        """Return the first reply that is not as hoped for, or else the last one; `stage` says to what.

        Raises ConnectionError when the connection breaks, ValueError when an answer is no reply.
        """
        self.messages += 1
        self.refused = None
        refused = await (self._ask_at_once(envelope) if self._is_pipelining else self._ask(envelope))
        if refused is not None:
            return refused
        self.stage = Stage.MESSAGE
        message = message.replace(b"\r\n.", b"\r\n..")  # RFC 5321 section 4.5.2
        if len(message) <= _ONE_WRITE_BYTES:
            self.wire.write(message + b".\r\n", replies=1)
        else:
            # the dot waits until the system took all else: a large message cut off by then was certainly not accepted
            await self.wire.write_through(message)
            self.wire.write(b".\r\n", replies=1)
        self.stage = Stage.ANSWER
        reply = await self.wire.reply()
        if reply.code // 100 != _COMPLETED:
            self.refused = reply
        return reply

    async def _ask(self, envelope: Envelope) -> Reply | None:
        """Return the first refusal of the envelope, asking step by step; None: the message may follow."""
        for (stage, hoped_for), command in zip(_ENVELOPE, (*envelope, b"DATA"), strict=True):
            self.stage = stage
            self.wire.write(command + b"\r\n", replies=1)
            reply = await self.wire.reply()
            if reply.code // 100 != hoped_for:
                self.refused = reply
                return reply
        return None

    async def _ask_at_once(self, envelope: Envelope) -> Reply | None:
        """Do the same in one round trip (RFC 2920): the replies to all three are read, whatever the first one was."""
        self.stage = Stage.MAIL
        self.wire.write(b"%b\r\n%b\r\nDATA\r\n" % envelope, replies=3)
        for stage, hoped_for in _ENVELOPE:
            if self.refused is None:
                self.stage = stage
            reply = await self.wire.reply()
            if reply.code // 100 != hoped_for and self.refused is None:
                self.refused = reply
        if self.refused is not None and reply.code // 100 == _INTERMEDIATE:
            # it waits for a message to nobody (RFC 2920 section 3.1): the empty one
            self.wire.write(b".\r\n", replies=1)
            await self.wire.reply()
        return self.refused

    async def reset(self) -> bool:
        """Make the connection fit for the next message after a refusal; say whether it is."""
        self.wire.write(b"RSET\r\n", replies=1)
        return (await self.wire.reply()).code // 100 == _COMPLETED

    async def quit(self) -> None:
        """Say goodbye and wait for the answer, then close."""
        try:
            self.wire.write(b"QUIT\r\n", replies=1)
            await self.wire.reply()
        finally:
            self.close()

    def close(self) -> None:
        """Close the connection."""
        self.is_usable = False
        self.wire.close()
