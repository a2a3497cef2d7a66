"""A carrier that speaks SMPP 3.4: what `channels.smpp` meets at an SMSC, on loopback.

It refuses what a strict carrier refuses: a wrong password, a submit before the bind, addresses and lengths that cannot be,
PDUs that are none. Receipts go to whoever is bound under the account, again and again until one is acknowledged; while
nobody is bound they wait.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Self, cast

from channels import smpp_pdu
from channels.simulators.pace import Pace
from channels.simulators.script import Behaviour, Script, magic
from channels.smpp_pdu import RESPONSE, Address, Bind, Coding, Command, EsmClass, MessageState, Pdu, Short, Status, Tag, WireError
from channels.sms import decode_gsm7, encode_gsm7

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

MAX_REMEMBERED: Final = 200_000
_MAX_INCOMPLETE: Final = 1_000
_MAX_UNACKNOWLEDGED: Final = 100  # receipts a connection may have open
_AGAIN_SECONDS: Final = 0.2  # after a receipt was refused for now
_PERIOD: Final = re.compile(r"(\d{12}\d\d\d[+R-])?")
_SENDER_NAME: Final = re.compile(r"[A-Za-z0-9 .&_-]{1,11}")
_JOINED: Final = bytes((5, 0, 3))
_STATES: Final = {"DELIVRD": MessageState.DELIVERED, "UNDELIV": MessageState.UNDELIVERABLE}
_BINDS: Final = frozenset({Command.BIND_TRANSCEIVER, Command.BIND_TRANSMITTER, Command.BIND_RECEIVER})
_NOT_TAKEN: Final = {
    Behaviour.REFUSE: Status.ESME_RX_T_APPN,
    Behaviour.REJECT: Status.ESME_RINVDSTADR,
    Behaviour.THROTTLE: Status.ESME_RTHROTTLED,
    Behaviour.UNAVAILABLE: Status.ESME_RSYSERR,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A submit_sm that was taken, under its id."""

    message_id: str
    short: Short = field(repr=False)
    at: float  # of the monotonic clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A whole message, as a telephone shows it. Two with the same `identity` are one that was sent twice."""

    message_id: str  # of its last segment
    sender: str
    recipient: str = field(repr=False)  # in E.164
    text: str = field(repr=False)
    segments: int  # submit_sm that it came in
    mark: int | None  # user_message_reference
    at: float

    @property
    def identity(self) -> tuple[str, int | str]:
        """What a repetition has in common: recipient, and the sender's mark, or else the text."""
        return self.recipient, self.text if self.mark is None else self.mark


class SmppSimulator:
    """A carrier with one account. `receipts_in_decimal`: receipts write in decimal what answers write in hexadecimal.

    `has_tlvs`: receipts say by TLVs too what their text says; `has_echo`: they repeat the user_message_reference. `window`:
    submits that a connection may have open. A share of 1 of `unavailable` or `reset_before` turns binds away too.
    """

    def __init__(  # noqa: PLR0913 - what can be chosen, each by name
        self,
        *,
        script: Script | None = None,
        port: int = 0,
        seed: int = 0,
        system_id: str = "notify",
        password: str = "secret",  # noqa: S107 - a simulator's
        window: int = 1_000,
        receipts_in_decimal: bool = False,
        has_tlvs: bool = True,
        has_echo: bool = True,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.script = script or Script()
        self.messages: deque[Message] = deque(maxlen=MAX_REMEMBERED)
        self.segments: deque[Segment] = deque(maxlen=MAX_REMEMBERED)
        self.calls: deque[float] = deque(maxlen=MAX_REMEMBERED)  # monotonic time of each submit_sm
        self.binds = 0  # that were accepted
        self.enquiries = 0  # enquire_link that came
        self.acknowledged = 0  # receipts and messages that we acknowledged
        self.is_silent = False  # reads, and answers nothing
        self._port = port
        self._chance = random.Random(seed)  # noqa: S311 - the same each time is what is wanted
        self._account = (system_id, password)
        self._window = window
        self._receipts_in_decimal = receipts_in_decimal
        self._has_tlvs = has_tlvs
        self._has_echo = has_echo
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._peers: list[_Peer] = []
        self._next_id = 0x18A80000 + self._chance.randrange(0x10000)
        self._pace = Pace()
        self._incomplete: OrderedDict[tuple[str, str, int], dict[int, Segment]] = OrderedDict()
        self._outgoing: deque[Short] = deque(maxlen=MAX_REMEMBERED)
        self._timers: set[asyncio.TimerHandle] = set()

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        """How to configure a provider with it (`channels.config`)."""
        name, password = self._account
        scheme = "smpps" if self._tls else "smpp"
        ids = "&receipt_ids=decimal" if self._receipts_in_decimal else ""
        return f"{scheme}://{name}:{password}@127.0.0.1:{self.port}?from=FlowMart{ids}"

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._peers)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.get_running_loop().create_server(lambda: _Peer(self), "127.0.0.1", self._port, ssl=self._tls)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for timer in self._timers:
            timer.cancel()
        self.cut()
        await self._server.wait_closed()

    def cut(self) -> None:
        """Break every connection."""
        for peer in tuple(self._peers):
            peer.cut()

    def unbind(self) -> None:
        """End every connection as a carrier does before it goes for maintenance."""
        for peer in tuple(self._peers):
            peer.request(Command.UNBIND)

    def enquire(self) -> None:
        """Ask every connection for a sign of life."""
        for peer in tuple(self._peers):
            peer.request(Command.ENQUIRE_LINK)

    def inject(self, data: bytes) -> None:
        """Send bytes as they are on every connection."""
        for peer in tuple(self._peers):
            peer.write(data)

    def say(self, sender: str, text: str) -> None:
        """Send a message of a telephone's owner to us."""
        try:
            coding, message = Coding.DEFAULT, encode_gsm7(text)
        except ValueError:
            coding, message = Coding.UCS2, text.encode("utf-16-be")
        source = Address(ton=1, npi=1, digits=sender.removeprefix("+"))
        self._send(Short(source=source, destination=Address(ton=5, digits="FlowMart"), data_coding=coding, message=message))

    # ---- for its connections

    def added(self, peer: _Peer) -> None:
        """Know a connection."""
        self._peers.append(peer)

    def lost(self, peer: _Peer) -> None:
        """Forget a connection; what it did not acknowledge goes to another."""
        self._peers.remove(peer)
        self._outgoing.extendleft(reversed(peer.unacknowledged.values()))
        self.pump()

    def bind(self, bind: Bind) -> Status | None:
        """Return the answer to a bind; None to break the connection."""
        if self.script.reset_before >= 1:
            return None
        if self.script.unavailable >= 1:
            return Status.ESME_RSYSERR
        name, password = self._account
        if bind.system_id != name:
            return Status.ESME_RINVSYSID
        if bind.password != password:
            return Status.ESME_RINVPASWD
        self.binds += 1
        return Status.ESME_ROK

    def submit(self, peer: _Peer, pdu: Pdu) -> None:
        """Take a submit_sm, or do what the script says."""
        now = time.monotonic()
        self.calls.append(now)
        try:
            short = Short.decode(pdu.body)
            refusal = _refusal(short)
        except WireError:
            short, refusal = None, Status.ESME_RINVCMDLEN
        behaviour = self.script.behaviour(self._chance)
        if short is not None:
            behaviour = magic("+" + short.destination.digits) or behaviour
        if behaviour is Behaviour.UNAVAILABLE:
            refusal = Status.ESME_RSYSERR
        elif peer.open_submits >= self._window:
            refusal = Status.ESME_RMSGQFUL
        elif self._pace.is_exceeded(self.script.per_second, now):
            refusal = Status.ESME_RTHROTTLED
        peer.open_submits += 1
        seconds = self.script.seconds(self._chance)
        if seconds:
            self._after(seconds, lambda: self._end(peer, pdu, short, refusal, behaviour))
        else:
            self._end(peer, pdu, short, refusal, behaviour)

    def acknowledge(self, peer: _Peer, pdu: Pdu) -> None:
        """Take the answer to a deliver_sm: what was refused for now comes again."""
        refused = peer.unacknowledged.pop(pdu.sequence, None)
        if refused is None:
            return
        if pdu.status == Status.ESME_RX_T_APPN:
            self._after(_AGAIN_SECONDS, lambda: self._send(refused))
        else:
            self.acknowledged += 1
        self.pump()

    def pump(self) -> None:
        """Send what waits to who is bound."""
        receivers = [peer for peer in self._peers if peer.is_receiver]
        while self._outgoing and receivers:
            peer = min(receivers, key=lambda each: len(each.unacknowledged))
            if len(peer.unacknowledged) >= _MAX_UNACKNOWLEDGED:
                return
            peer.deliver(self._outgoing.popleft())

    # ---- what becomes of a message

    def _end(self, peer: _Peer, pdu: Pdu, short: Short | None, refusal: Status | None, behaviour: Behaviour) -> None:
        peer.open_submits -= 1
        if short is None or refusal is not None:
            peer.answer(pdu, refusal or Status.ESME_RSUBMITFAIL)
            return
        if behaviour in _NOT_TAKEN:
            peer.answer(pdu, _NOT_TAKEN[behaviour])
            return
        if behaviour is Behaviour.RESET_BEFORE:
            peer.cut()
            return
        segment = self._take(short)
        answer = segment.message_id.encode() + b"\0"
        is_first = self._chance.random() < self.script.receipts_first
        if is_first:
            self._report(segment, behaviour)
        match behaviour:
            case Behaviour.RESET_AFTER:
                peer.cut()
            case Behaviour.TIME_OUT:
                pass
            case Behaviour.GARBAGE:
                peer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            case _:
                peer.answer(pdu, Status.ESME_ROK, answer)
        if not is_first:
            self._report(segment, behaviour)

    def _take(self, short: Short) -> Segment:
        self._next_id += 1
        segment = Segment(message_id=f"{self._next_id:x}", short=short, at=time.monotonic())
        self.segments.append(segment)
        if not short.esm_class & EsmClass.USER_DATA_HEADER:
            self._whole([segment])
            return segment
        reference, total, number = short.message[3:6]
        key = (short.source.digits, short.destination.digits, reference)
        known = self._incomplete.setdefault(key, {})
        known[number] = segment
        if len(known) == total:
            del self._incomplete[key]
            self._whole([known[each] for each in sorted(known)])
        elif len(self._incomplete) > _MAX_INCOMPLETE:
            self._incomplete.popitem(last=False)
        return segment

    def _whole(self, segments: list[Segment]) -> None:
        last = segments[-1]
        self.messages.append(
            Message(
                message_id=last.message_id,
                sender=last.short.source.digits,
                recipient="+" + last.short.destination.digits,
                text="".join(text_of(each.short) for each in segments),
                segments=len(segments),
                mark=_mark(last.short),
                at=last.at,
            )
        )

    def _report(self, segment: Segment, behaviour: Behaviour) -> None:
        state = "UNDELIV" if behaviour is Behaviour.BOUNCE else "DELIVRD"
        wanted = segment.short.registered_delivery & 3
        receipts = 0
        if wanted == 1 or (wanted == 2 and state == "UNDELIV"):  # 2: failures only (section 5.2.17)
            lost = self._chance.random() < self.script.receipts_lost
            receipts = 0 if lost else 2 if self._chance.random() < self.script.receipts_doubled else 1

        def send() -> None:
            for _ in range(receipts):
                self._send(self._receipt(segment, state))
            if behaviour is Behaviour.COMPLAIN:
                self.say("+" + segment.short.destination.digits, "STOP")

        if self.script.receipts_delay:
            self._after(self.script.receipts_delay, send)
        else:
            send()

    def _receipt(self, segment: Segment, state: str) -> Short:
        short = segment.short
        at = datetime.now(UTC).strftime("%y%m%d%H%M")
        shown = str(int(segment.message_id, 16)) if self._receipts_in_decimal else segment.message_id
        is_delivered = state == "DELIVRD"
        text = (
            f"id:{shown} sub:001 dlvrd:{int(is_delivered):03} submit date:{at} done date:{at} stat:{state} "
            f"err:{0 if is_delivered else 1:03} Text:{text_of(short)[:20]}"
        )
        tlvs: dict[int, bytes] = {}
        if self._has_tlvs:
            tlvs[Tag.RECEIPTED_MESSAGE_ID] = segment.message_id.encode() + b"\0"
            tlvs[Tag.MESSAGE_STATE] = bytes((_STATES[state],))
        if self._has_echo and Tag.USER_MESSAGE_REFERENCE in short.tlvs:
            tlvs[Tag.USER_MESSAGE_REFERENCE] = short.tlvs[Tag.USER_MESSAGE_REFERENCE]
        return Short(
            source=short.destination,
            destination=short.source,
            esm_class=EsmClass.RECEIPT,
            message=text.encode("latin-1", "replace"),
            tlvs=tlvs,
        )

    def _send(self, short: Short) -> None:
        self._outgoing.append(short)
        self.pump()

    def _after(self, seconds: float, what: Callable[[], None]) -> None:
        def run() -> None:
            self._timers.discard(timer)
            what()

        timer = asyncio.get_running_loop().call_later(seconds, run)
        self._timers.add(timer)


class _Peer(asyncio.Protocol):
    """One connection to the carrier."""

    def __init__(self, carrier: SmppSimulator) -> None:
        self.is_sender = self.is_receiver = False
        self.open_submits = 0
        self.unacknowledged: dict[int, Short] = {}
        self._carrier = carrier
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._out: list[bytes] = []
        self._sequence = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._carrier.added(self)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        self.is_sender = self.is_receiver = False
        self._carrier.lost(self)

    def data_received(self, data: bytes) -> None:
        if self._carrier.is_silent:
            return
        self._buffer += data
        try:
            for pdu in smpp_pdu.split(self._buffer):
                self._take(pdu)
        except WireError:
            self.write(Pdu(Command.GENERIC_NACK, Status.ESME_RINVCMDLEN, 0).encode())
            self.leave()

    def write(self, data: bytes) -> None:
        """Send with whatever else is written in this turn of the loop."""
        if self._carrier.is_silent:
            return
        if not self._out:
            asyncio.get_running_loop().call_soon(self._flush)
        self._out.append(data)

    def answer(self, request: Pdu, status: int, body: bytes = b"") -> None:
        self.write(Pdu(request.command | RESPONSE, status, request.sequence, body).encode())

    def request(self, command: Command, body: bytes = b"") -> int:
        self._sequence = smpp_pdu.following(self._sequence)
        self.write(Pdu(command, 0, self._sequence, body).encode())
        return self._sequence

    def deliver(self, short: Short) -> None:
        self.unacknowledged[self.request(Command.DELIVER_SM, short.encode())] = short

    def cut(self) -> None:
        """Break the connection; what is not written yet is lost."""
        self.is_receiver = False
        self._out.clear()
        if self._transport is not None:
            self._transport.abort()

    def leave(self) -> None:
        """End the connection after what was written."""
        self.is_receiver = False
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def _flush(self) -> None:
        if self._out and self._transport is not None:
            self._transport.write(b"".join(self._out))
        self._out.clear()

    def _take(self, pdu: Pdu) -> None:
        match pdu.command:
            case Command.SUBMIT_SM if self.is_sender:
                self._carrier.submit(self, pdu)
            case Command.SUBMIT_SM | Command.DELIVER_SM:
                self.answer(pdu, Status.ESME_RINVBNDSTS)
            case command if command in _BINDS:
                self._bind(pdu)
            case Command.ENQUIRE_LINK:
                self._carrier.enquiries += 1
                self.answer(pdu, Status.ESME_ROK)
            case Command.UNBIND:
                self.answer(pdu, Status.ESME_ROK)
                self.leave()
            case Command.DELIVER_SM_RESP:
                self._carrier.acknowledge(self, pdu)
            case Command.UNBIND_RESP:
                self.leave()
            case command if command & RESPONSE:
                pass
            case _:
                self.write(Pdu(Command.GENERIC_NACK, Status.ESME_RINVCMDID, pdu.sequence).encode())

    def _bind(self, pdu: Pdu) -> None:
        if self.is_sender or self.is_receiver:
            self.answer(pdu, Status.ESME_RALYBND)
            return
        try:
            status = self._carrier.bind(Bind.decode(pdu.body))
        except WireError:
            status = Status.ESME_RINVCMDLEN
        if status is None:
            self.cut()
            return
        version = Tag.SC_INTERFACE_VERSION.to_bytes(2, "big") + bytes((0, 1, smpp_pdu.VERSION))
        self.answer(pdu, status, b"simulator\0" + version if status == Status.ESME_ROK else b"")
        if status != Status.ESME_ROK:
            self.leave()
            return
        self.is_sender = pdu.command != Command.BIND_RECEIVER
        self.is_receiver = pdu.command != Command.BIND_TRANSMITTER
        self._carrier.pump()


def text_of(short: Short) -> str:
    """Return the text of a segment, without its header."""
    data = short.whole_message
    if short.esm_class & EsmClass.USER_DATA_HEADER:
        data = data[data[0] + 1 :]
    if short.data_coding == Coding.UCS2:
        return data.decode("utf-16-be", "surrogatepass")
    return decode_gsm7(data) if short.data_coding == Coding.DEFAULT else data.decode("latin-1")


def _refusal(short: Short) -> Status | None:
    """Return how a strict carrier refuses a message; None when it is sound."""
    source, destination = short.source, short.destination
    if destination.ton != 1 or destination.npi != 1 or not destination.digits.isdecimal() or not 7 <= len(destination.digits) <= 15:
        return Status.ESME_RINVDSTADR
    is_name = source.ton == 5 and _SENDER_NAME.fullmatch(source.digits)
    is_number = source.ton in {0, 1, 3} and source.digits.isdecimal()
    if not is_name and not is_number:
        return Status.ESME_RINVSRCADR
    if short.esm_class not in {0, 1, 2, 3, EsmClass.USER_DATA_HEADER}:
        return Status.ESME_RINVESMCLASS
    if short.registered_delivery & 3 == 3:
        return Status.ESME_RINVREGDLVFLG
    if not _PERIOD.fullmatch(short.validity_period):
        return Status.ESME_RINVEXPIRY
    return None if _is_sound(short) else Status.ESME_RINVMSGLEN


def _is_sound(short: Short) -> bool:
    """Say whether a message fits a segment, or stands whole in its payload."""
    payload = short.tlvs.get(Tag.MESSAGE_PAYLOAD)
    if payload is not None:
        return not short.message and bool(payload)
    message = short.message
    is_joined = bool(short.esm_class & EsmClass.USER_DATA_HEADER)
    if is_joined and not (message.startswith(_JOINED) and len(message) > 6 and 1 <= message[5] <= message[4]):
        return False
    if short.data_coding != Coding.DEFAULT:
        return 0 < len(message) <= 140
    # the header's six bytes take the room of seven septets
    septets = message[6:] if is_joined else message
    return 0 < len(septets) + (7 if is_joined else 0) <= 160 and max(septets) < 128


def _mark(short: Short) -> int | None:
    found = short.tlvs.get(Tag.USER_MESSAGE_REFERENCE)
    return None if found is None else int.from_bytes(found, "big")
