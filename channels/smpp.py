"""SMS over SMPP 3.4: one connection to a carrier, over which many messages are under way at once, and its receipts come back.

    smpp://system:$SMPP_PASSWORD@smsc.example:2775?from=FlowMart&name=carrier-de&routes=DE,AT&per_second=50

`smpps` is the same within TLS. Options:

`from`            who the message is from: a number (+49…), a short code, or up to 11 letters and digits. Needed
`system_type`     where the carrier asks for one
`window`          messages under way at once on the connection; default 10. Carriers allow 1 to some hundred
`long`            `udh`: a text of several segments is sent as joined segments; `payload`: whole, and the carrier splits it
`receipt_ids`     `same`: receipts name a message as the answer to it did; `decimal`: in decimal what the answer named in
                  hexadecimal; `hex`: the reverse. Default same. Wrong: no receipt is ever matched
`transliterate`   `all`, `punctuation` or `none` (`channels.sms.Transliterate`); default all
`max_segments`    what is longer is cut, and ends in three dots; default 6
`enquire_seconds` silence after which the connection is tried; default 30
`echo`            `yes`: each message carries a user_message_reference, and receipts that repeat it settle attempts of
                  unknown end; `no` for a carrier that refuses optional parameters. Default yes
`ca`              a file with the authorities (PEM) to trust instead of the system's, for smpps

What an attempt was is decided by the answer's command_status; a connection that breaks after a message was handed to it
leaves that message unknown, since the carrier may have it. Nothing in SMPP lets a carrier know a repetition.

Receipts of long messages. Sent as segments, a message has as many ids, and receipts may come to any worker that is bound
under the same name, before or after a crash, so that no worker sees them all. Therefore none of them adds them up: the
message's reference is all ids, with blanks between them, each receipt is reported under the id that it names, and who matches
reports (`agents.receipts`) says delivered when all segments are, and anything else as soon as one segment is that. The last
segment is handed over when all others were accepted, so a message of which a segment was refused is never shown. The
receipts of those others are of nothing that was sent, and end as `unknown_reference`. An attempt of unknown end that is found
by a receipt which came to another worker than the one that sent it is known by its last segment alone.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import re
import ssl
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, TypeVar, cast

from channels import smpp_pdu, sms
from channels.base import OnUnknown, Receipt
from channels.options import Switch, one_of, trust_in, whole
from channels.smpp_pdu import (
    RESPONSE,
    Address,
    Bind,
    Coding,
    Command,
    EsmClass,
    MessageState,
    Pdu,
    Reader,
    Short,
    Tag,
    WireError,
    name_of,
)
from channels.smpp_pdu import Status as Answer
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
from schemas.ids import digest
from schemas.messages import DeliveryReport
from schemas.status import Status, Suppression

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from channels.config import Ports, ProviderConfig
    from channels.sms import Segmented
    from schemas.messages import Content, Delivery

K = TypeVar("K")

log = logging.getLogger(__name__)

_PORTS: Final = {"smpp": 2775, "smpps": 3550}
_UNBIND_SECONDS: Final = 1.0
_UNKNOWN_SECONDS: Final = 600.0
_BACKOFF_SECONDS: Final = (0.5, 30.0)
_MAX_REMEMBERED: Final = 10_000
_MAX_VALIDITY_SECONDS: Final = 2 * 86_400  # carriers refuse what is longer than they keep messages; theirs applies then
_LEAST_VALIDITY_SECONDS: Final = 60

# what concerns our account or our way to speak: others will fare alike, and nothing is lost until a person has looked
_OURS: Final = frozenset(
    {
        Answer.ESME_RINVCMDID,
        Answer.ESME_RINVBNDSTS,
        Answer.ESME_RALYBND,
        Answer.ESME_RSYSERR,
        Answer.ESME_RINVSRCADR,
        Answer.ESME_RBINDFAIL,
        Answer.ESME_RINVPASWD,
        Answer.ESME_RINVSYSID,
        Answer.ESME_RINVSERTYP,
        Answer.ESME_RINVSRCTON,
        Answer.ESME_RINVSRCNPI,
        Answer.ESME_RINVSYSTYP,
    }
)
_THROTTLED: Final = frozenset({Answer.ESME_RTHROTTLED, Answer.ESME_RMSGQFUL})
# about this message, and as true next time. All others, a carrier's own among them, are about this moment
_NEVER: Final = frozenset(
    {
        Answer.ESME_RINVMSGLEN,
        Answer.ESME_RINVCMDLEN,
        Answer.ESME_RINVPRTFLG,
        Answer.ESME_RINVREGDLVFLG,
        Answer.ESME_RINVDSTADR,
        Answer.ESME_RINVESMCLASS,
        Answer.ESME_RINVDSTTON,
        Answer.ESME_RINVDSTNPI,
        Answer.ESME_RINVREPFLAG,
        Answer.ESME_RINVSCHED,
        Answer.ESME_RINVEXPIRY,
        Answer.ESME_RINVDFTMSGID,
        Answer.ESME_RX_P_APPN,
        Answer.ESME_RINVOPTPARSTREAM,
        Answer.ESME_ROPTPARNOTALLWD,
        Answer.ESME_RINVPARLEN,
        Answer.ESME_RMISSINGOPTPARAM,
        Answer.ESME_RINVOPTPARAMVAL,
    }
)

# a receipt's state -> where it leaves the delivery; None: it is on its way still, or nobody knows (appendix B, section 5.2.28)
_STATES: Final[dict[str, Status | None]] = {
    "DELIVRD": Status.DELIVERED,
    "EXPIRED": Status.EXPIRED,
    "DELETED": Status.FAILED,
    "UNDELIV": Status.BOUNCED,
    "REJECTD": Status.FAILED,
    "ENROUTE": None,
    "ACCEPTD": None,
    "UNKNOWN": None,
}
_STATE_NAMES: Final = {
    MessageState.ENROUTE: "ENROUTE",
    MessageState.DELIVERED: "DELIVRD",
    MessageState.EXPIRED: "EXPIRED",
    MessageState.DELETED: "DELETED",
    MessageState.UNDELIVERABLE: "UNDELIV",
    MessageState.ACCEPTED: "ACCEPTD",
    MessageState.UNKNOWN: "UNKNOWN",
    MessageState.REJECTED: "REJECTD",
}
_ID: Final = re.compile(r"\bid:\s*(\S+)", re.IGNORECASE)
_STATE: Final = re.compile(r"\bstat:\s*([A-Za-z]+)", re.IGNORECASE)
_ERROR: Final = re.compile(r"\berr:\s*(\w{1,10})", re.IGNORECASE)
# by which a recipient ends all messages, in the languages of our shops
_STOP_WORDS: Final = frozenset({"stop", "stopall", "stopp", "unsubscribe", "cancel", "end", "quit", "arret", "arrêt", "baja", "alto"})

_SENDER_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .&_-]{0,10}")
_SENDER_NUMBER: Final = re.compile(r"\+?[0-9]{3,20}")
_LONGEST_SHORT_CODE: Final = 8


class Long(StrEnum):
    """How a text of several segments is sent."""

    UDH = "udh"
    PAYLOAD = "payload"


class ReceiptIds(StrEnum):
    """How receipts name a message, compared with the answer to its submit_sm."""

    SAME = "same"
    DECIMAL = "decimal"
    HEX = "hex"

    def of_answer(self, message_id: str) -> str:
        """Return the name of a message that the answer called `message_id`."""
        return message_id if self is ReceiptIds.SAME else _number(message_id, 16 if self is ReceiptIds.DECIMAL else 10)

    def of_receipt(self, message_id: str) -> str:
        """Return the name of a message that a receipt's text calls `message_id`."""
        return message_id if self is ReceiptIds.SAME else _number(message_id, 10 if self is ReceiptIds.DECIMAL else 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Carrier:
    """Where a carrier is and how it wants to be spoken to."""

    host: str
    port: int
    is_secure: bool
    system_id: str
    password: str = field(repr=False)
    source: Address
    system_type: str = ""
    window: int = 10
    long: Long = Long.UDH
    receipt_ids: ReceiptIds = ReceiptIds.SAME
    transliterate: sms.Transliterate = sms.Transliterate.ALL
    max_segments: int = sms.MAX_SEGMENTS
    enquire_seconds: float = 30.0
    has_echo: bool = True
    connect_seconds: float = 5.0
    answer_seconds: float = 10.0
    total_seconds: float = 16.0  # of one send, whatever it meets: shorter than a drain (streams.shard.DRAIN_SECONDS)
    probe_seconds: float = 10.0  # for the answer to enquire_link
    max_reports: int = 200  # receipts that are being made durable; the carrier sends the others again


class Told(NamedTuple):
    """What a receipt says. `message_id`: in the words of the carrier, None where it does not say."""

    message_id: str | None
    is_as_answered: bool  # the id is written as in the answer to submit_sm, whatever the receipts' texts do
    status: Status | None
    code: str


def build(config: ProviderConfig, ports: Ports) -> SmppChannel:
    """Return the provider that `config` describes. Raises SettingsError."""
    config.only("from", "system_type", "window", "long", "receipt_ids", "transliterate", "max_segments", "enquire_seconds", "echo", "ca")
    sender = config.options.get("from", "")
    config.require(host=config.host, user=config.username, **{"from": sender})
    assert config.host is not None
    assert config.username is not None
    carrier = Carrier(
        host=config.host,
        port=config.port or _PORTS[config.scheme],
        is_secure=config.scheme == "smpps",
        system_id=config.username,
        password=config.password,
        source=config.option("from", source_of, Address()),
        system_type=config.options.get("system_type", ""),
        window=config.option("window", whole(1, 1_000), 10),
        long=config.option("long", one_of(Long), Long.UDH),
        receipt_ids=config.option("receipt_ids", one_of(ReceiptIds), ReceiptIds.SAME),
        transliterate=config.option("transliterate", one_of(sms.Transliterate), sms.Transliterate.ALL),
        max_segments=config.option("max_segments", whole(1, 255), sms.MAX_SEGMENTS),
        enquire_seconds=float(config.option("enquire_seconds", whole(1, 3_600), 30)),
        has_echo=config.option("echo", one_of(Switch), Switch.YES) is Switch.YES,
    )
    return SmppChannel(
        carrier,
        report=ports.report,
        provider=config.name,
        routes=config.routes,
        max_open=config.max_open or ports.max_open,
        tls_context=config.option("ca", trust_in, None),
    )


def source_of(text: str) -> Address:
    """Return the address of a sender: a number in international form, a short code, or a name. Raises ValueError."""
    if _SENDER_NUMBER.fullmatch(text):
        digits = text.removeprefix("+")
        if text.startswith("+") or len(digits) > _LONGEST_SHORT_CODE:
            return Address(ton=1, npi=1, digits=digits)  # international, E.164
        return Address(ton=3, npi=0, digits=digits)  # known to the carrier's network only
    if _SENDER_NAME.fullmatch(text):
        return Address(ton=5, npi=0, digits=text)  # alphanumeric
    raise ValueError("is neither a number, nor a name of up to 11 letters and digits")


def parse_receipt(short: Short) -> Told:
    """Return what a delivery receipt says, by its TLVs where it has them, else by its text (appendix B)."""
    text = short.whole_message.decode("latin-1")
    tlv_id = short.tlvs.get(Tag.RECEIPTED_MESSAGE_ID, b"").split(b"\0")[0].decode("latin-1")
    text_id = _ID.search(text)
    state_tlv, state_text = short.tlvs.get(Tag.MESSAGE_STATE, b""), _STATE.search(text)
    state = state_text[1].upper()[:7] if state_text else ""
    if len(state_tlv) == 1:
        state = _STATE_NAMES.get(MessageState(state_tlv[0]), "") if 1 <= state_tlv[0] <= 8 else ""
    error = _ERROR.search(text)
    code = f"{state} {error[1]}" if error and error[1].strip("0") else state
    message_id = tlv_id or (text_id[1] if text_id else None)
    # some write the TLV as they write the text, though it should be as in the answer (section 5.3.2.12)
    is_as_answered = bool(tlv_id) and not (text_id and text_id[1] == tlv_id)
    return Told(message_id, is_as_answered, _STATES.get(state), code)


class SmppChannel:
    """Sends through one carrier. `report`: told what receipts say, and returns when that is durable.

    From `open` on it is bound, or tries to be, with growing pauses: receipts come only to who is. A call that finds it not
    bound tries at once. `tls_context` replaces the system's trusted authorities.
    """

    def __init__(  # noqa: PLR0913 - what a channel is
        self,
        carrier: Carrier,
        *,
        report: Callable[[DeliveryReport], Awaitable[None]],
        provider: str = "smpp",
        routes: frozenset[str] | None = None,
        max_open: int = 32,
        tls_context: ssl.SSLContext | None = None,
    ) -> None:
        self.name: str = topics.Channel.SMS
        self.provider = self.reported_as = provider  # ids are a carrier's own
        self.routes = routes
        self.max_open = max_open
        self.on_unknown = OnUnknown.RESEND
        self.unknown_seconds = _UNKNOWN_SECONDS
        self._carrier = carrier
        self._report = report
        self._tls_context = tls_context
        self._bind_request = _bind_body(carrier, provider)
        self._is_open = False
        self._session: _Session | None = None
        self._binding: asyncio.Task[_Session] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._reports: set[asyncio.Task[None]] = set()
        self._secret = os.urandom(16)
        # counted, not computed: two long messages to one telephone at the same time must not share a reference
        self._joints = itertools.count(self._secret[0])
        # by the recipient: the name of the last message to him, for when he answers STOP
        self._last: _Memory[bytes] = _Memory()
        # by the recipient and our mark: ids of messages whose answer came too late, or whose receipt repeats the mark
        self._marked: _Memory[tuple[bytes, int]] = _Memory()
        # likewise: ids of all segments but the last, of messages whose last one was handed over
        self._begun: _Memory[tuple[bytes, int]] = _Memory()

    def record(self, delivery: Delivery) -> None:
        """Return None: a provider is called."""

    def reference_of(self, delivery: Delivery, receipt: Receipt | None) -> str | None:  # noqa: ARG002 - the channel contract
        """Return the carrier's ids of all segments as its receipts write them, with blanks between them.

        None while nobody knows them: `look_up` may find them later.
        """
        if receipt is None or receipt.reference is None:
            return None
        return self._as_reported(receipt.reference)

    async def open(self) -> None:
        """Load the trusted authorities, where TLS is wanted, and begin to bind. Does not wait for the carrier."""
        if self._is_open:
            return
        if self._carrier.is_secure and self._tls_context is None:
            self._tls_context = await asyncio.to_thread(ssl.create_default_context)
        self._is_open = True
        self._keeper = asyncio.create_task(self._keep_bound())

    async def send(self, delivery: Delivery, content: Content) -> Receipt:
        """Hand the message over to the carrier. Returns and raises as the channel contract says, with these codes.

        - of the carrier: the name of its command_status, such as `ESME_RINVDSTADR`, or `0x00000401` for one of its own.
        - `address`, `country_not_allowed`, `content`: cannot be sent at all. Rejected, without a call.
        - `connect`, `tls`, `bind`: no connection, or no answer to the bind. `window`: as many messages are under way as may
          be, for too long: throttled.
        - `connection`, `timeout`, `protocol`, `silent`, `unbound`, `closed`: broke off, took too long, answered what is no
          SMPP, was silent, was ended by the carrier or by us; unknown when the last or only segment had been handed over.
        """
        deadline = asyncio.get_running_loop().time() + self._carrier.total_seconds
        number = sms.carried(content.address, self.routes)
        if not content.text:
            raise ProviderRejectedError("no text to send", code="content")
        text = sms.fitted(content.text, transliterate=self._carrier.transliterate, most=self._carrier.max_segments)
        *before, last = self._bodies(delivery, number, text)
        session = await self._bound()
        recipient = self._digest(number.e164)
        key = (recipient, sms.mark(delivery, 16))
        ids = await _all_accepted(session.submit(body, deadline) for body in before)
        if (begun := _reference(ids)) is not None:
            self._begun.put(key, begun)
        answer = await session.submit(last, deadline, lambda late: self._answered_late(key, ids, late))
        reference = _reference([*ids, _accepted_id(answer)])
        if reference is not None:
            self._last.put(recipient, self._as_reported(reference))
        return Receipt(provider=self.provider, reference=reference, status=Status.SENT)

    async def look_up(self, delivery: Delivery, content: Content) -> Receipt | None:
        """Return the receipt of a message whose answer came too late, or whose delivery receipt repeats our mark.

        A carrier cannot be asked by what we know, so this asks nobody: None says that this worker heard nothing of it.
        """
        try:
            number = sms.parse_number(content.address)
        except ProviderRejectedError:
            return None  # it was never sent
        reference = self._marked.get((self._digest(number.e164), sms.mark(delivery, 16)))
        return None if reference is None else Receipt(provider=self.provider, reference=reference, status=Status.SENT)

    async def close(self) -> None:
        """Unbind and leave. Calls that run fail; receipts that are not durable yet are left for the carrier to send again."""
        self._is_open = False
        tasks = [task for task in (self._keeper, self._binding, *self._reports) if task is not None]
        self._keeper = self._binding = None
        for task in tasks:
            task.cancel()
        session, self._session = self._session, None
        if session is not None:
            await session.unbind()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- the connection

    async def _keep_bound(self) -> None:
        """Bind again whenever the connection ended, the sooner the longer it held."""
        now = asyncio.get_running_loop().time
        pause, longest = _BACKOFF_SECONDS
        while True:
            began = now()
            try:
                session = await self._bound()
            except ProviderUnavailableError as error:
                code = error.code
            else:
                log.info("provider.bound provider=%s", self.provider)
                await session.ended.wait()
                code = session.broken
            log.warning("provider.unbound provider=%s code=%s", self.provider, code)
            if now() - began > longest:
                pause = _BACKOFF_SECONDS[0]
            await asyncio.sleep(pause * (0.5 + random.random()))  # noqa: S311 - jitter
            pause = min(pause * 2, longest)

    async def _bound(self) -> _Session:
        """Return the session, binding first where there is none. All who wait for it share one attempt."""
        if self._session is not None and self._session.broken is None:
            return self._session
        if not self._is_open:
            raise ProviderUnavailableError("the channel is closed", code="closed")
        if self._binding is None:
            self._binding = asyncio.create_task(self._connect())
            self._binding.add_done_callback(self._bind_ended)
        binding = self._binding
        try:
            return await asyncio.shield(binding)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not binding.cancelled() or (task is not None and task.cancelling()):
                raise  # the caller is cancelled, not the attempt alone
            raise ProviderUnavailableError("the channel was closed meanwhile", code="closed") from None
        except ProviderUnavailableError as error:  # a new one for each who waits: they may be raised on in parallel
            raise ProviderUnavailableError(str(error), code=error.code) from None

    def _bind_ended(self, task: asyncio.Task[_Session]) -> None:
        if self._binding is task:
            self._binding = None
        if not task.cancelled():
            task.exception()  # whoever waits has it; nobody may wait any more

    async def _connect(self) -> _Session:
        carrier = self._carrier
        session = _Session(carrier, self._take_delivery)
        step = "connect"
        try:
            async with asyncio.timeout(carrier.connect_seconds):
                await asyncio.get_running_loop().create_connection(
                    lambda: session, carrier.host, carrier.port, ssl=self._tls_context if carrier.is_secure else None
                )
                step = "bind"
                answer = await session.call(Command.BIND_TRANSCEIVER, self._bind_request)
            if answer.status:
                code = name_of(answer.status)
                raise ProviderUnavailableError(f"the carrier turned us away: {code}", code=code)
        except BaseException as error:
            session.end("closed")
            if isinstance(error, OSError | ValueError | _BrokenError):
                code = "tls" if isinstance(error, ssl.SSLError) else getattr(error, "code", step)
                raise ProviderUnavailableError(f"no connection to the carrier: {code}", code=code) from None
            raise
        if not self._is_open:
            session.end("closed")
            raise ProviderUnavailableError("the channel was closed meanwhile", code="closed")
        session.start()
        self._session = session
        return session

    # ---- out

    def _bodies(self, delivery: Delivery, number: sms.Number, text: Segmented) -> list[bytes]:
        """Return the bodies of the submit_sm that carry a message, in their order."""
        carrier = self._carrier
        is_gsm = text.encoding is sms.Encoding.GSM7
        parts = [sms.encode_gsm7(part) if is_gsm else part.encode("utf-16-be") for part in text.parts]
        is_joined = len(parts) > 1 and carrier.long is Long.UDH
        parts = smpp_pdu.joined(next(self._joints) % 256, parts) if is_joined else [b"".join(parts)]
        is_payload = len(text.parts) > 1 and not is_joined
        echo: dict[int, bytes] = {Tag.USER_MESSAGE_REFERENCE: sms.mark(delivery, 16).to_bytes(2, "big")} if carrier.has_echo else {}
        validity = _validity(delivery)
        return [
            Short(
                source=carrier.source,
                destination=Address(ton=1, npi=1, digits=number.e164.removeprefix("+")),
                esm_class=EsmClass.USER_DATA_HEADER if is_joined else 0,
                validity_period=validity,
                registered_delivery=1,
                data_coding=Coding.DEFAULT if is_gsm else Coding.UCS2,
                message=b"" if is_payload else part,
                # of the last segment alone: without it nothing was sent, whatever receipts of the others say
                tlvs={**echo, Tag.MESSAGE_PAYLOAD: part} if is_payload else echo if place == len(parts) else {},
            ).encode()
            for place, part in enumerate(parts, 1)
        ]

    def _answered_late(self, key: tuple[bytes, int], before: Sequence[str | None], answer: Pdu) -> None:
        """Remember the ids of a message whose sender no longer waited."""
        with suppress(NotifyError):
            reference = _reference([*before, _accepted_id(answer)])
            if reference is not None:
                self._marked.put(key, reference)

    def _as_reported(self, reference: str) -> str:
        """Return ids as receipts write them."""
        return " ".join(self._carrier.receipt_ids.of_answer(each) for each in reference.split(" "))

    # ---- in

    def _take_delivery(self, session: _Session, pdu: Pdu) -> None:
        """Take a deliver_sm in: it is acknowledged when what it says is durable."""
        if len(self._reports) >= self._carrier.max_reports:
            session.answer(pdu, Answer.ESME_RX_T_APPN)
            return
        task = asyncio.create_task(self._pass_on(session, pdu))
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)

    async def _pass_on(self, session: _Session, pdu: Pdu) -> None:
        try:
            report = self._read(Short.decode(pdu.body))
        except WireError:
            session.answer(pdu, Answer.ESME_RX_P_APPN)  # as unreadable next time
            return
        if report is not None:
            try:
                await self._report(report)
            except Exception as error:  # whatever it was: what is not durable is not acknowledged
                log.warning("report.refused provider=%s error=%s", self.provider, type(error).__name__)
                session.answer(pdu, Answer.ESME_RX_T_APPN)
                return
        session.answer(pdu, Answer.ESME_ROK)

    def _read(self, short: Short) -> DeliveryReport | None:
        """Return what a deliver_sm reports; None for what changes nothing."""
        kind = short.esm_class & smpp_pdu.MESSAGE_TYPE
        who = self._digest("+" + short.source.digits.removeprefix("+"))
        if kind == EsmClass.RECEIPT:
            return self._read_receipt(short, who)
        if kind or not _is_stop(short):
            return None
        reference = self._last.get(who)
        if reference is None:
            log.warning("stop.unmatched provider=%s", self.provider)
            return None
        return self._reported(reference, Status.DELIVERED, "STOP", Suppression.UNSUBSCRIBED)

    def _read_receipt(self, short: Short, who: bytes) -> DeliveryReport | None:
        told = parse_receipt(short)
        if told.message_id is None:
            return None
        ids = self._carrier.receipt_ids
        reference = ids.of_answer(told.message_id) if told.is_as_answered else ids.of_receipt(told.message_id)
        echo = short.tlvs.get(Tag.USER_MESSAGE_REFERENCE, b"")
        if len(echo) == 2:
            as_answered = told.message_id if told.is_as_answered or ids is ReceiptIds.SAME else _as_answered(reference, ids)
            key = (who, int.from_bytes(echo, "big"))
            before = self._begun.get(key) or ""
            self._marked.put(key, _reference([*before.split(), as_answered]) or as_answered)
        return None if told.status is None else self._reported(reference, told.status, told.code, None)

    def _reported(self, reference: str, status: Status, code: str, suppresses: Suppression | None) -> DeliveryReport:
        return DeliveryReport(
            report_id=digest(self.reported_as, reference, status, code, size=16),
            provider=self.reported_as,
            reference=reference,
            status=status,
            code=code or None,
            at=datetime.now(UTC),
            suppresses=suppresses,
        )

    def _digest(self, number: str) -> bytes:
        return blake2b(number.encode(), digest_size=8, key=self._secret).digest()


class _Memory(Generic[K]):
    """Remembers the newest entries, a bounded number of them."""

    def __init__(self) -> None:
        self._entries: OrderedDict[K, str] = OrderedDict()

    def put(self, key: K, value: str) -> None:
        self._entries[key] = value
        self._entries.move_to_end(key)
        if len(self._entries) > _MAX_REMEMBERED:
            self._entries.popitem(last=False)

    def get(self, key: K) -> str | None:
        return self._entries.get(key)


class _BrokenError(Exception):
    """The connection ended before an answer came."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class _Session(asyncio.Protocol):
    """One connection. `broken`: why it ended, None while it has not."""

    def __init__(self, carrier: Carrier, on_delivery: Callable[[_Session, Pdu], None]) -> None:
        self.broken: str | None = None
        self.ended = asyncio.Event()
        self._carrier = carrier
        self._on_delivery = on_delivery
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._out: list[bytes] = []
        self._sequence = 0
        self._calls: dict[int, tuple[int, asyncio.Future[Pdu]]] = {}  # by sequence number: command, answer
        self._abandoned: OrderedDict[int, Callable[[Pdu], None]] = OrderedDict()
        self._window = asyncio.Semaphore(carrier.window)
        self._writable = asyncio.Event()
        self._writable.set()
        self._heard_at = 0.0
        self._probe = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Watch the connection, now that it is bound."""
        if self.broken is None:
            self._watch = asyncio.create_task(self._watch_link())

    async def submit(self, body: bytes, deadline: float, on_late: Callable[[Pdu], None] | None = None) -> Pdu:
        """Hand one submit_sm over and return the answer, good or bad. `deadline`: of the loop's clock.

        Raises ProviderThrottledError and ProviderUnavailableError when it was not handed over, and SendUnknownError when it
        was and no answer came. `on_late` is called with an answer that comes after that.
        """
        seconds = self._carrier.answer_seconds
        try:
            # what is handed over late has hardly any time left for its answer, and would be unknown
            async with asyncio.timeout_at(deadline - min(seconds, deadline - self._loop.time()) / 2):
                await self._writable.wait()
                await self._window.acquire()
        except TimeoutError:
            raise ProviderThrottledError("as many messages are under way as the carrier allows", code="window") from None
        try:
            if self.broken is not None:
                raise ProviderUnavailableError(f"the connection ended: {self.broken}", code=self.broken)
            async with asyncio.timeout_at(min(deadline, self._loop.time() + seconds)):
                return await self.call(Command.SUBMIT_SM, body, on_late)
        except TimeoutError:
            self._probe.set()  # is it slow, or gone?
            raise SendUnknownError("the carrier did not answer in time", code="timeout") from None
        except _BrokenError as error:
            raise SendUnknownError(f"the connection ended before the answer came: {error.code}", code=error.code) from None
        finally:
            self._window.release()

    async def call(self, command: Command, body: bytes = b"", on_late: Callable[[Pdu], None] | None = None) -> Pdu:
        """Send a request and return what answers it. Raises _BrokenError."""
        if self.broken is not None:
            raise _BrokenError(self.broken)
        self._sequence = sequence = smpp_pdu.following(self._sequence)
        answer: asyncio.Future[Pdu] = self._loop.create_future()
        self._calls[sequence] = command, answer
        self._write(Pdu(command, 0, sequence, body))
        try:
            return await answer
        finally:
            if self._calls.pop(sequence, None) is not None and on_late is not None and self.broken is None:
                self._abandoned[sequence] = on_late
                if len(self._abandoned) > _MAX_REMEMBERED:
                    self._abandoned.popitem(last=False)

    def answer(self, request: Pdu, status: int) -> None:
        """Answer a deliver_sm."""
        self._write(Pdu(request.command | RESPONSE, status, request.sequence, b"\0"))

    async def unbind(self) -> None:
        """Fail what runs, say goodbye, and leave."""
        self._fail_calls("closed")
        is_answered = False
        with suppress(_BrokenError, TimeoutError):
            async with asyncio.timeout(_UNBIND_SECONDS):
                await self.call(Command.UNBIND)
                is_answered = True
        self.end("closed", is_polite=is_answered)

    def end(self, code: str, *, is_polite: bool = False) -> None:
        """End the connection; calls that run fail. Polite: what was written still leaves."""
        if self.broken is not None:
            return
        if is_polite:
            self._flush()
        self.broken = code
        self._out.clear()
        self._fail_calls(code)
        self._abandoned.clear()
        self._writable.set()
        self.ended.set()
        if self._watch is not None:
            self._watch.cancel()
        if self._transport is None:
            return
        if is_polite:
            self._transport.close()
        else:
            self._transport.abort()

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # a cast: uvloop's transports are no Transport by name
        self._transport = made = cast("asyncio.Transport", transport)
        self._heard_at = self._loop.time()
        if self.broken is not None:
            made.abort()

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        self.end("connection")

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        self._buffer += data
        try:
            for pdu in smpp_pdu.split(self._buffer):
                self._take(pdu)
        except WireError:
            self.end("protocol")

    # ---- in and out

    def _take(self, pdu: Pdu) -> None:
        if pdu.command & RESPONSE:
            self._take_answer(pdu)
            return
        match pdu.command:
            case Command.DELIVER_SM:
                self._on_delivery(self, pdu)
            case Command.ENQUIRE_LINK:
                self._write(Pdu(Command.ENQUIRE_LINK_RESP, 0, pdu.sequence))
            case Command.UNBIND:
                self._write(Pdu(Command.UNBIND_RESP, 0, pdu.sequence))
                self.end("unbound", is_polite=True)
            case Command.ALERT_NOTIFICATION:
                pass  # has no answer
            case _:
                self._write(Pdu(Command.GENERIC_NACK, Answer.ESME_RINVCMDID, pdu.sequence))

    def _take_answer(self, pdu: Pdu) -> None:
        command, answer = self._calls.get(pdu.sequence, (0, None))
        is_nack = pdu.command == Command.GENERIC_NACK
        if answer is None:
            on_late = self._abandoned.pop(pdu.sequence, None)
            if on_late is not None:
                on_late(pdu)
            elif is_nack:
                raise WireError("the other side cannot read what we send")
            return
        if not is_nack and pdu.command != command | RESPONSE:
            raise WireError("an answer to what was not asked")
        del self._calls[pdu.sequence]
        if not answer.done():
            answer.set_result(pdu)

    def _write(self, pdu: Pdu) -> None:
        """Send with whatever else is written in this turn of the loop: a full window is one packet."""
        if self.broken is not None:
            return
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(pdu.encode())

    def _flush(self) -> None:
        if self._out and self._transport is not None:
            self._transport.write(b"".join(self._out))
        self._out.clear()

    def _fail_calls(self, code: str) -> None:
        calls = [answer for _, answer in self._calls.values()]
        self._calls.clear()
        for answer in calls:
            if not answer.done():
                answer.set_exception(_BrokenError(code))

    async def _watch_link(self) -> None:
        """Ask for a sign of life after silence, or when an answer is missing; without one the connection is gone."""
        while True:
            quiet_until = self._heard_at + self._carrier.enquire_seconds
            with suppress(TimeoutError):
                async with asyncio.timeout_at(quiet_until):
                    await self._probe.wait()
            if not self._probe.is_set() and self._heard_at + self._carrier.enquire_seconds > self._loop.time():
                continue
            self._probe.clear()
            try:
                async with asyncio.timeout(self._carrier.probe_seconds):
                    await self.call(Command.ENQUIRE_LINK)
            except TimeoutError:
                self._watch = None  # this one, which ends by itself
                self.end("silent")
                return
            except _BrokenError:
                return


async def _all_accepted(submits: Iterable[Coroutine[None, None, Pdu]]) -> list[str | None]:
    """Wait for all segments but the last, and return their ids. Raises what the worst of them met.

    Whatever that was, the message is not complete, and so was not sent: never SendUnknownError.
    """
    found = await asyncio.gather(*(_accepted(submit) for submit in submits), return_exceptions=True)
    errors = [each for each in found if isinstance(each, BaseException)]
    for kind in (ProviderRejectedError, ProviderThrottledError, ProviderUnavailableError, ProviderRefusedError):
        for error in errors:
            if isinstance(error, kind):
                raise error
    for error in errors:
        if isinstance(error, SendUnknownError):
            raise ProviderUnavailableError("not all segments were taken", code=error.code) from None
        raise error
    return [each for each in found if not isinstance(each, BaseException)]


async def _accepted(submit: Coroutine[None, None, Pdu]) -> str | None:
    return _accepted_id(await submit)


def _reference(ids: Sequence[str | None]) -> str | None:
    """Return the name of a message by the ids of its segments; None where one has none. Some carriers give all of them one id."""
    known = [each for each in ids if each]
    return " ".join(dict.fromkeys(known)) if known and len(known) == len(ids) else None


def _accepted_id(answer: Pdu) -> str | None:
    """Return the id of the message that an answer accepts; None when it has none. Raises what the answer means."""
    if answer.status == Answer.ESME_ROK and answer.command == Command.SUBMIT_SM_RESP:
        try:
            message_id = Reader(answer.body).text(65)
        except WireError:
            raise SendUnknownError("the carrier's answer is none", code="protocol") from None
        return message_id if message_id and " " not in message_id else None  # with a blank it would be two
    code = name_of(answer.status)
    sentence = f"the carrier did not take it: {code}"
    if answer.status in _OURS:
        raise ProviderUnavailableError(sentence, code=code)
    if answer.status in _THROTTLED:
        raise ProviderThrottledError(sentence, code=code)
    if answer.status in _NEVER:
        raise ProviderRejectedError(sentence, code=code)
    raise ProviderRefusedError(sentence, code=code)


def _bind_body(carrier: Carrier, provider: str) -> bytes:
    """Return the body of the bind. Raises SettingsError."""
    try:
        return Bind(system_id=carrier.system_id, password=carrier.password, system_type=carrier.system_type).encode()
    except ValueError:
        raise SettingsError(
            [f"provider {provider}: its user has more than 15 characters, its password 64, or its system_type 12"]
        ) from None


def _validity(delivery: Delivery) -> str:
    """Return how long the carrier may try, as a relative time (section 7.1.1.2); empty: as long as it does."""
    if delivery.expires_at is None:
        return ""
    seconds = int((delivery.expires_at - datetime.now(UTC)).total_seconds())
    if seconds > _MAX_VALIDITY_SECONDS:
        return ""
    minutes, second = divmod(max(seconds, _LEAST_VALIDITY_SECONDS), 60)
    hours, minute = divmod(minutes, 60)
    day, hour = divmod(hours, 24)
    return f"0000{day:02}{hour:02}{minute:02}{second:02}000R"


def _is_stop(short: Short) -> bool:
    encoding = "utf-16-be" if short.data_coding == Coding.UCS2 else "latin-1"
    return short.whole_message.decode(encoding, "replace").strip(" \r\n\t.!").lower() in _STOP_WORDS


def _number(text: str, base: int) -> str:
    try:
        return str(int(text, base))
    except ValueError:
        return text  # a name of another form is compared as it is


def _as_answered(reference: str, ids: ReceiptIds) -> str:
    """Return how the answer to submit_sm would have written an id that a receipt wrote in its own way."""
    return f"{int(reference):x}" if ids is ReceiptIds.DECIMAL and reference.isdigit() else reference
