"""SMPP: what each thing that a carrier can do makes of a delivery, against our simulator and against one of others."""

# ruff: noqa: RUF001 - characters that look like others are among what is sent
from __future__ import annotations

import asyncio
import datetime as dt
import logging
import threading
import traceback
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import smpplib.client
import smpplib.consts
from hypothesis import given
from hypothesis import strategies as st

from channels import smpp, smpp_pdu
from channels.base import Channel, OnUnknown
from channels.simulators.authority import make_authority
from channels.simulators.script import Behaviour, Script
from channels.simulators.smpp import Segment, SmppSimulator, text_of
from channels.smpp import ReceiptIds, SmppChannel, parse_receipt, source_of
from channels.smpp_pdu import Address, Command, Pdu, Short, Status, Tag, WireError
from schemas.errors import (
    NotifyError,
    ProviderRefusedError,
    ProviderRejectedError,
    ProviderThrottledError,
    ProviderUnavailableError,
    SendUnknownError,
    SettingsError,
)
from schemas.messages import Content, Delivery, DeliveryReport, ProviderReference
from schemas.status import Status as DeliveryStatus
from schemas.status import Suppression
from tests.calling import config_of, delivery_on, failure_of, is_a, opened
from tests.jsmpp import JsmppServer
from tests.ports import no_ports
from tests.unit.test_receipts import REFERENCE
from tests.unit.test_receipts import Desk as Matching
from tests.waiting import eventually

NUMBER = "+4915123456789"
BODY = "planted text"
LONG = "planted text of several segments, each joined to the others. " * 6  # 3 segments
EMOJI = "\N{GRINNING FACE}"


a_delivery = partial(delivery_on, "sms", route="DE")


def a_content(text: str | None = BODY, address: str = NUMBER) -> Content:
    return Content(address=address, text=text)


class Desk:
    """Takes reports; `fails` of them first."""

    def __init__(self) -> None:
        self.reports: list[DeliveryReport] = []
        self.fails = 0
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def __call__(self, report: DeliveryReport) -> None:
        await self.may_end.wait()
        if self.fails:
            self.fails -= 1
            raise ConnectionError("Kafka is away")
        self.reports.append(report)


@pytest.fixture
def desk() -> Desk:
    return Desk()


def a_channel(url: str, desk: Desk | None = None, *, max_open: int = 32, **limits: float) -> SmppChannel:
    """Return the channel that a URL describes; `limits` are those of its carrier."""
    channel = smpp.build(config_of(url), no_ports(max_open=max_open, report=desk or Desk()))
    channel._carrier = replace(channel._carrier, **limits)  # type: ignore[arg-type]  # by name
    return channel


@pytest.fixture
async def carrier() -> AsyncIterator[SmppSimulator]:
    async with SmppSimulator() as simulator:
        yield simulator


@pytest.fixture
async def channel(carrier: SmppSimulator, desk: Desk) -> AsyncIterator[SmppChannel]:
    async with opened(a_channel(carrier.url, desk)) as made:
        yield made
    await eventually(lambda: carrier.connections == 0)


async def failure(channel: Channel, content: Content | None = None, delivery: Delivery | None = None) -> NotifyError:
    return await failure_of(channel, delivery or a_delivery(), content or a_content(), NUMBER.removeprefix("+"))


# --- what is sent ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown", "segments"),
    [
        (BODY, BODY, 1),
        ("Grüße @£$ {€} §", "Grüße @£$ {€} §", 1),
        ("“Łukasz” – 5 €", '"Lukasz" - 5 €', 1),
        ("日本語 " + EMOJI, "日本語 " + EMOJI, 1),
        ("a" * 160, "a" * 160, 1),
        ("€" * 459, "€" * 459, 7),
        ("я" * 66 + EMOJI + "я" * 66, "я" * 66 + EMOJI + "я" * 66, 3),
        (LONG, LONG, 3),
        ("a" * 1_400, "a" * 1_374 + "...", 9),
        ("…" * 460, "..." * 459, 9),
    ],
)
async def test_a_text_arrives_as_it_was_written(carrier: SmppSimulator, desk: Desk, text: str, shown: str, segments: int) -> None:
    async with opened(a_channel(carrier.url + "&max_segments=9", desk)) as channel:
        receipt = await channel.send(a_delivery(), a_content(text))
        (message,) = carrier.messages
        assert (message.text, message.segments, message.recipient, message.sender) == (shown, segments, NUMBER, "FlowMart")
        assert receipt.reference == " ".join(segment.message_id for segment in carrier.segments)
        assert receipt.status is DeliveryStatus.SENT


async def test_a_long_text_can_be_sent_whole_for_the_carrier_to_split(carrier: SmppSimulator, desk: Desk) -> None:
    async with opened(a_channel(carrier.url + "&long=payload", desk)) as channel:
        await channel.send(a_delivery(), a_content(LONG))
        await channel.send(a_delivery(2), a_content("я" * 100))
    assert [(message.text, message.segments) for message in carrier.messages] == [(LONG, 1), ("я" * 100, 1)]


async def test_segments_of_several_messages_are_not_mixed_up(carrier: SmppSimulator, channel: SmppChannel) -> None:
    texts = {f"{number} {LONG}" for number in range(16)}
    await asyncio.gather(*(channel.send(a_delivery(number), a_content(text)) for number, text in enumerate(texts)))
    assert {message.text for message in carrier.messages} == texts


async def test_every_attempt_of_a_generation_has_the_same_mark(carrier: SmppSimulator, channel: SmppChannel) -> None:
    for delivery in (a_delivery(attempt=1), a_delivery(attempt=2), a_delivery(generation=1), a_delivery(2)):
        await channel.send(delivery, a_content())
    first, again, redriven, other = carrier.messages
    assert first.identity == again.identity
    assert len({first.identity, redriven.identity, other.identity}) == 3


async def test_what_expires_is_not_tried_after_that(carrier: SmppSimulator, channel: SmppChannel) -> None:
    soon, late = dt.datetime.now(dt.UTC) + dt.timedelta(minutes=90, seconds=30), dt.datetime.now(dt.UTC) + dt.timedelta(days=9)
    for number, expires_at in enumerate((soon, late, None)):
        await channel.send(a_delivery(number, expires_at=expires_at), a_content())
    periods = [segment.short.validity_period for segment in carrier.segments]
    assert periods[0][:10] == "0000000130"
    assert periods[0].endswith("000R")
    assert periods[1:] == ["", ""]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("+4915112345678", Address(ton=1, npi=1, digits="4915112345678")),
        ("4915112345678", Address(ton=1, npi=1, digits="4915112345678")),
        ("12345", Address(ton=3, npi=0, digits="12345")),
        ("Flow-Mart 1", Address(ton=5, npi=0, digits="Flow-Mart 1")),
    ],
)
def test_a_sender_is_a_number_a_short_code_or_a_name(text: str, address: Address) -> None:
    assert source_of(text) == address


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (a_content(address="planted"), "address"),
        (a_content(address="+49151"), "address"),
        (a_content(None), "content"),
        (a_content(""), "content"),
        (a_content(address="+33612345678"), "country_not_allowed"),
    ],
)
async def test_what_cannot_be_sent_is_rejected_without_a_call(carrier: SmppSimulator, desk: Desk, content: Content, code: str) -> None:
    async with opened(a_channel(carrier.url + "&routes=DE,AT", desk)) as channel:
        assert is_a(await failure(channel, content), ProviderRejectedError, code)
    assert not carrier.calls


# --- what each answer becomes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (Status.ESME_RTHROTTLED, ProviderThrottledError),
        (Status.ESME_RMSGQFUL, ProviderThrottledError),
        (Status.ESME_RSYSERR, ProviderUnavailableError),
        (Status.ESME_RINVSRCADR, ProviderUnavailableError),
        (Status.ESME_RINVBNDSTS, ProviderUnavailableError),
        (Status.ESME_RINVDSTADR, ProviderRejectedError),
        (Status.ESME_RINVMSGLEN, ProviderRejectedError),
        (Status.ESME_RX_P_APPN, ProviderRejectedError),
        (Status.ESME_RINVOPTPARAMVAL, ProviderRejectedError),
        (Status.ESME_RX_T_APPN, ProviderRefusedError),
        (Status.ESME_RSUBMITFAIL, ProviderRefusedError),
        (Status.ESME_RUNKNOWNERR, ProviderRefusedError),
    ],
)
def test_each_status_is_of_one_kind(status: Status, kind: type[NotifyError]) -> None:
    with pytest.raises(NotifyError) as caught:
        smpp._accepted_id(Pdu(Command.SUBMIT_SM_RESP, status, 1))
    assert is_a(caught.value, kind, status.name)


def test_a_status_of_the_carriers_own_is_refused_under_its_number() -> None:
    with pytest.raises(ProviderRefusedError) as caught:
        smpp._accepted_id(Pdu(Command.SUBMIT_SM_RESP, 0x401, 1))
    assert caught.value.code == "0x00000401"


@pytest.mark.parametrize("text", [BODY, LONG])
@pytest.mark.parametrize(
    ("script", "kind", "code"),
    [
        (Script(refuse=1), ProviderRefusedError, "ESME_RX_T_APPN"),
        (Script(reject=1), ProviderRejectedError, "ESME_RINVDSTADR"),
        (Script(throttle=1), ProviderThrottledError, "ESME_RTHROTTLED"),
        (Script(unavailable=1), ProviderUnavailableError, "ESME_RSYSERR"),
    ],
)
async def test_what_a_carrier_does_not_take(  # noqa: PLR0917 - a table's row
    carrier: SmppSimulator, channel: SmppChannel, text: str, script: Script, kind: type[NotifyError], code: str
) -> None:
    await channel.send(a_delivery(), a_content())
    carrier.script = script
    assert is_a(await failure(channel, a_content(text)), kind, code)
    carrier.script = Script()
    await channel.send(a_delivery(2), a_content(text))
    assert (len(carrier.messages), carrier.binds) == (2, 1)


@pytest.mark.parametrize(
    ("script", "code", "binds"),
    [
        (Script(reset_before=1), "connection", 2),
        (Script(reset_after=1), "connection", 2),
        (Script(garbage=1), "protocol", 2),
        (Script(time_out=1), "timeout", 1),
    ],
)
async def test_a_message_that_was_handed_over_and_not_answered_is_unknown(
    carrier: SmppSimulator, desk: Desk, script: Script, code: str, binds: int
) -> None:
    async with opened(a_channel(carrier.url, desk, answer_seconds=0.2)) as channel:
        await channel.send(a_delivery(), a_content())
        carrier.script = script
        assert is_a(await failure(channel), SendUnknownError, code)
        carrier.script = Script()
        await channel.send(a_delivery(2), a_content())
        assert carrier.binds == binds


@pytest.mark.parametrize("script", [Script(reset_after=1), Script(garbage=1), Script(time_out=1)])
async def test_a_long_message_whose_last_segment_never_left_is_not_unknown(carrier: SmppSimulator, desk: Desk, script: Script) -> None:
    async with opened(a_channel(carrier.url, desk, answer_seconds=0.2)) as channel:
        await channel.send(a_delivery(), a_content())
        carrier.script = script
        assert type(await failure(channel, a_content(LONG))) is ProviderUnavailableError
        assert len(carrier.messages) == 1


async def test_the_last_segment_is_handed_over_when_all_others_were_accepted(carrier: SmppSimulator, channel: SmppChannel) -> None:
    carrier.script = Script(refuse=0.5)
    for number in range(30):
        with suppress(ProviderRefusedError):
            await channel.send(a_delivery(number), a_content(LONG))
    ends = [segment.short.message[5] for segment in carrier.segments]
    assert 0 < ends.count(3) <= len(carrier.messages) < 30
    # each is reported on, and only the last one carries the mark by which a message is found that may have been sent
    assert all(segment.short.registered_delivery == 1 for segment in carrier.segments)
    assert all((Tag.USER_MESSAGE_REFERENCE in segment.short.tlvs) == (segment.short.message[5] == 3) for segment in carrier.segments)


async def test_a_connection_that_breaks_leaves_all_that_were_handed_over_unknown(carrier: SmppSimulator, desk: Desk) -> None:
    async with opened(a_channel(carrier.url, desk)) as channel:
        carrier.script = Script(latency=30)
        calls = [asyncio.ensure_future(failure(channel, delivery=a_delivery(number))) for number in range(20)]
        await eventually(lambda: len(carrier.calls) == 10)
        carrier.cut()
        errors = await asyncio.gather(*calls)
    kinds = [type(error) for error in errors]
    assert (kinds.count(SendUnknownError), kinds.count(ProviderUnavailableError)) == (10, 10), "the window's were handed over, no other"
    assert len(carrier.calls) == 10


async def test_no_more_are_under_way_than_the_window_allows(carrier: SmppSimulator, desk: Desk) -> None:
    async with SmppSimulator(window=5, script=Script(latency=0.01)) as strict, opened(a_channel(strict.url + "&window=5", desk)) as channel:
        await asyncio.gather(*(channel.send(a_delivery(number), a_content()) for number in range(32)))
        assert len(strict.messages) == 32
    async with SmppSimulator(window=5, script=Script(latency=0.05)) as strict, opened(a_channel(strict.url + "&window=6", desk)) as channel:
        ends = await asyncio.gather(*(channel.send(a_delivery(number), a_content()) for number in range(6)), return_exceptions=True)
        assert [end.code for end in ends if isinstance(end, ProviderThrottledError)] == ["ESME_RMSGQFUL"]


async def test_who_waits_too_long_for_the_window_was_not_sent(carrier: SmppSimulator, desk: Desk) -> None:
    carrier.script = Script(latency=30)
    async with opened(a_channel(carrier.url + "&window=1", desk, total_seconds=0.5)) as channel:
        first = asyncio.ensure_future(failure(channel))
        await eventually(lambda: len(carrier.calls) == 1)
        assert is_a(await failure(channel), ProviderThrottledError, "window")
        assert is_a(await first, SendUnknownError, "timeout")
    assert len(carrier.calls) == 1


async def test_a_carriers_pace_is_throttled(carrier: SmppSimulator, channel: SmppChannel) -> None:
    carrier.script = Script(per_second=10)
    ends = await asyncio.gather(*(channel.send(a_delivery(number), a_content()) for number in range(25)), return_exceptions=True)
    assert sum(isinstance(end, ProviderThrottledError) for end in ends) == 15
    assert len(carrier.messages) == 10


@pytest.mark.parametrize(
    ("ending", "kind"),
    [("000003", ProviderRefusedError), ("000004", ProviderThrottledError), ("000005", SendUnknownError)],
)
async def test_magic_numbers_do_what_they_are_for(carrier: SmppSimulator, desk: Desk, ending: str, kind: type[NotifyError]) -> None:
    async with opened(a_channel(carrier.url, desk, answer_seconds=0.2)) as channel:
        assert type(await failure(channel, a_content(address=f"+4915123{ending}"))) is kind


# --- the connection --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code"),
    [(("secret", "wrong"), "ESME_RINVPASWD"), (("notify", "nobody"), "ESME_RINVSYSID")],
)
async def test_wrong_credentials_are_unavailable_and_not_told(carrier: SmppSimulator, change: tuple[str, str], code: str) -> None:
    async with opened(a_channel(carrier.url.replace(*change))) as channel:
        error = await failure(channel)
        assert is_a(error, ProviderUnavailableError, code)
        assert change[1] not in "".join(traceback.format_exception(error))


async def test_nobody_there_is_unavailable() -> None:
    async with SmppSimulator() as simulator:
        url = simulator.url
    async with opened(a_channel(url)) as channel:
        assert is_a(await failure(channel), ProviderUnavailableError, "connect")


@pytest.mark.parametrize(("script", "code"), [(Script(reset_before=1), "connection"), (Script(unavailable=1), "ESME_RSYSERR")])
async def test_a_bind_that_fails_is_unavailable(carrier: SmppSimulator, desk: Desk, script: Script, code: str) -> None:
    carrier.script = script
    async with opened(a_channel(carrier.url, desk)) as channel:
        assert is_a(await failure(channel), ProviderUnavailableError, code)
        carrier.script = Script()
        await channel.send(a_delivery(), a_content())


async def test_a_carrier_that_does_not_answer_the_bind_is_unavailable(carrier: SmppSimulator, desk: Desk) -> None:
    carrier.is_silent = True
    async with opened(a_channel(carrier.url, desk, connect_seconds=0.2)) as channel:
        assert is_a(await failure(channel), ProviderUnavailableError, "bind")
    await eventually(lambda: carrier.connections == 0)


@pytest.mark.parametrize("data", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0\0\0\x0f" + b"x" * 20, b"\xff" * 16])
async def test_what_is_no_smpp_ends_the_connection(carrier: SmppSimulator, channel: SmppChannel, data: bytes) -> None:
    await eventually(lambda: carrier.binds == 1)
    carrier.inject(data)
    await eventually(lambda: carrier.binds == 2)
    await channel.send(a_delivery(), a_content())


async def test_an_answer_to_what_was_not_asked_is_not_taken_for_one(carrier: SmppSimulator, desk: Desk) -> None:
    carrier.script = Script(latency=30)
    async with opened(a_channel(carrier.url, desk)) as channel:
        call = asyncio.ensure_future(failure(channel))
        await eventually(lambda: carrier.calls)
        carrier.inject(Pdu(Command.ENQUIRE_LINK_RESP, 0, 2).encode())  # of the submit's number
        assert is_a(await call, SendUnknownError, "protocol")


async def test_over_tls_it_is_the_same(desk: Desk, tmp_path: Path) -> None:
    async with SmppSimulator(tls=make_authority(tmp_path, protocols=())) as carrier:
        assert carrier.url.startswith("smpps://")
        async with opened(a_channel(f"{carrier.url}&ca={tmp_path / 'ca.pem'}", desk)) as channel:
            await channel.send(a_delivery(), a_content(LONG))
        assert [message.text for message in carrier.messages] == [LONG]
        async with opened(a_channel(carrier.url, desk)) as stranger:
            assert is_a(await failure(stranger), ProviderUnavailableError, "tls")
        async with opened(a_channel(carrier.url.replace("smpps", "smpp"), desk, connect_seconds=2)) as readable:
            assert type(await failure(readable)) is ProviderUnavailableError


async def test_it_binds_before_there_is_something_to_send_and_again_when_it_was_cut(carrier: SmppSimulator, channel: SmppChannel) -> None:
    await eventually(lambda: carrier.binds == 1)
    carrier.cut()
    await eventually(lambda: carrier.binds == 2)
    carrier.unbind()
    await eventually(lambda: carrier.binds == 3)
    await channel.send(a_delivery(), a_content())
    assert carrier.binds == 3


async def test_a_carrier_that_ends_each_connection_at_once_is_not_run_against(desk: Desk) -> None:
    class Fickle(SmppSimulator):
        def bind(self, bind: smpp_pdu.Bind) -> Status | None:
            asyncio.get_running_loop().call_later(0.01, self.cut)
            self.calls.append(asyncio.get_running_loop().time())
            return super().bind(bind)

    async with Fickle() as carrier, opened(a_channel(carrier.url, desk)):
        await eventually(lambda: carrier.binds == 4, seconds=20)
        times = list(carrier.calls)
    assert all(later - earlier >= 0.25 * 2**number for number, (earlier, later) in enumerate(pairwise(times)))


async def test_it_asks_for_a_sign_of_life_and_gives_one(carrier: SmppSimulator, desk: Desk) -> None:
    async with opened(a_channel(carrier.url, desk, enquire_seconds=0.05)) as channel:
        await eventually(lambda: carrier.enquiries >= 3)
        carrier.enquire()
        await channel.send(a_delivery(), a_content())
        assert carrier.binds == 1


async def test_a_carrier_that_fell_silent_is_left(carrier: SmppSimulator, desk: Desk) -> None:
    async with opened(a_channel(carrier.url, desk, enquire_seconds=0.05, probe_seconds=0.1, connect_seconds=0.1)) as channel:
        await channel.send(a_delivery(), a_content())
        carrier.is_silent = True
        await eventually(lambda: carrier.connections == 0)
        carrier.is_silent = False
        await eventually(lambda: carrier.binds == 2)


async def test_a_missing_answer_makes_it_ask_whether_anybody_is_there(carrier: SmppSimulator, desk: Desk) -> None:
    carrier.script = Script(time_out=1)
    async with opened(a_channel(carrier.url, desk, answer_seconds=0.05)) as channel:
        assert is_a(await failure(channel), SendUnknownError, "timeout")
        await eventually(lambda: carrier.enquiries == 1)
        assert carrier.binds == 1


async def test_as_many_calls_as_it_allows_share_one_connection(carrier: SmppSimulator, channel: SmppChannel) -> None:
    await asyncio.gather(*(channel.send(a_delivery(number), a_content()) for number in range(channel.max_open)))
    assert (len(carrier.messages), carrier.binds) == (32, 1)


async def test_a_cancelled_call_leaves_the_channel_usable(carrier: SmppSimulator, channel: SmppChannel) -> None:
    carrier.script = Script(latency=0.1)
    calls = [asyncio.ensure_future(channel.send(a_delivery(number), a_content())) for number in range(32)]
    await eventually(lambda: carrier.calls)
    for call in calls[::2]:
        call.cancel()
    await asyncio.wait(calls)
    carrier.script = Script()
    await asyncio.gather(*(channel.send(a_delivery(number), a_content()) for number in range(32)))
    assert carrier.binds == 1


async def test_closing_unbinds_fails_what_runs_and_leaves_nothing(carrier: SmppSimulator, desk: Desk) -> None:
    carrier.script = Script(latency=30)
    channel = a_channel(carrier.url, desk)
    before = threading.active_count(), len(asyncio.all_tasks())
    await channel.open()
    calls = [asyncio.ensure_future(failure(channel, delivery=a_delivery(number))) for number in range(3)]
    await eventually(lambda: len(carrier.calls) == 3)
    await channel.close()
    assert all(is_a(error, SendUnknownError, "closed") for error in await asyncio.gather(*calls))
    assert is_a(await failure(channel), ProviderUnavailableError, "closed")
    await eventually(lambda: carrier.connections == 0)
    assert (threading.active_count(), len(asyncio.all_tasks())) == before
    await channel.close()
    carrier.script = Script()
    async with opened(channel):
        await channel.send(a_delivery(), a_content())


async def test_closing_while_it_binds_ends_the_attempt_and_who_waits_for_it(carrier: SmppSimulator, desk: Desk) -> None:
    carrier.is_silent = True
    channel = a_channel(carrier.url, desk, connect_seconds=60)
    await channel.open()
    calls = [asyncio.ensure_future(failure(channel, delivery=a_delivery(number))) for number in range(3)]
    await eventually(lambda: carrier.connections == 1)
    async with asyncio.timeout(5):
        await channel.close()
        assert all(is_a(error, ProviderUnavailableError, "closed") for error in await asyncio.gather(*calls))
    await eventually(lambda: carrier.connections == 0)


# --- receipts --------------------------------------------------------------------------------------------------------


async def test_a_receipt_reports_the_delivery_under_its_reference(carrier: SmppSimulator, channel: SmppChannel, desk: Desk) -> None:
    receipt = await channel.send(a_delivery(), a_content())
    await eventually(lambda: carrier.acknowledged == 1)
    (report,) = desk.reports
    assert report.reference == channel.reference_of(a_delivery(), receipt) == receipt.reference
    assert (report.provider, report.status, report.code, report.suppresses) == ("smpp", "delivered", "DELIVRD", None)
    assert channel.reference_of(a_delivery(), None) is None
    assert "planted" not in repr(report)


class Bounced(SmppSimulator):
    """Reports in `states` on the segments of a message, by their number."""

    states: Mapping[int, Behaviour] = {}

    def _report(self, segment: Segment, behaviour: Behaviour) -> None:
        super()._report(segment, self.states.get(segment.short.message[5], behaviour))


async def status_of(carrier: SmppSimulator, script: Script, *, receivers: int = 1) -> list[str]:
    """Return what becomes of a long message by its receipts, as whoever matches them says, each time that it is said."""
    desk, matcher = Desk(), Matching()
    carrier.script = script
    async with AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(opened(a_channel(carrier.url, desk))) for _ in range(receivers)]
        await eventually(lambda: carrier.binds == receivers)
        receipt = await channels[0].send(a_delivery(), a_content(LONG))
        reference = channels[0].reference_of(a_delivery(), receipt)
        assert reference is not None
        expected = 6 if script.receipts_doubled else 3
        await eventually(lambda: carrier.acknowledged == expected)
    reports = [replace(report, status=str(report.status)) for report in desk.reports]  # as they come from Kafka
    known = replace(REFERENCE, provider="smpp", reference=reference, channel="sms")
    told: list[ProviderReference | DeliveryReport] = [known, *reports] if script.receipts_delay else [*reports, known]
    for message in told:
        matcher.tell(message)
    return [change.status for change in matcher.changes]


@pytest.mark.parametrize("script", [Script(receipts_delay=0.05), Script(receipts_first=1), Script(receipts_doubled=1)])
@pytest.mark.parametrize("receivers", [1, 3])
async def test_a_long_message_is_delivered_when_all_segments_are(carrier: SmppSimulator, script: Script, receivers: int) -> None:
    assert await status_of(carrier, script, receivers=receivers) == ["delivered"]


@pytest.mark.parametrize("script", [Script(receipts_delay=0.05), Script(receipts_first=1), Script(receipts_doubled=1)])
@pytest.mark.parametrize("number", [1, 2, 3])
async def test_a_long_message_of_which_one_segment_bounces_has_bounced(script: Script, number: int) -> None:
    async with Bounced() as carrier:
        carrier.states = {number: Behaviour.BOUNCE}
        assert await status_of(carrier, script) == ["bounced"]


async def test_a_long_message_of_unknown_end_is_found_with_all_of_its_segments(desk: Desk) -> None:
    class Vague(SmppSimulator):
        """Answers to all segments but the last of a message."""

        def _end(self, peer: Any, pdu: Pdu, short: Short | None, refusal: Status | None, behaviour: Behaviour) -> None:
            is_last = short is not None and short.message[5] == short.message[4]
            super()._end(peer, pdu, short, refusal, Behaviour.TIME_OUT if is_last else behaviour)

    async with Vague() as carrier, opened(a_channel(carrier.url, desk, answer_seconds=0.1)) as channel:
        assert type(await failure(channel, a_content(LONG))) is SendUnknownError
        await eventually(lambda: carrier.acknowledged == 3)
        found = await channel.look_up(a_delivery(), a_content(LONG))
        assert found is not None
        assert channel.reference_of(a_delivery(), found) == " ".join(segment.message_id for segment in carrier.segments)


async def test_a_message_that_was_not_completed_is_not_taken_for_sent_by_receipts_of_its_segments(desk: Desk) -> None:
    class Full(SmppSimulator):
        """Has no room for the last segment of a message."""

        def _end(self, peer: Any, pdu: Pdu, short: Short | None, refusal: Status | None, behaviour: Behaviour) -> None:
            is_last = short is not None and short.message[5] == short.message[4]
            super()._end(peer, pdu, short, Status.ESME_RMSGQFUL if is_last else refusal, behaviour)

    async with Full() as carrier, opened(a_channel(carrier.url, desk)) as channel:
        assert is_a(await failure(channel, a_content(LONG)), ProviderThrottledError, "ESME_RMSGQFUL")
        await eventually(lambda: carrier.acknowledged == 2)
        assert await channel.look_up(a_delivery(), a_content(LONG)) is None


@pytest.mark.parametrize(
    ("ids", "reference"), [(["a"], "a"), (["a", "b"], "a b"), (["a", "a"], "a"), (["a", None], None), ([None], None), ([], None)]
)
def test_a_messages_reference_is_the_ids_of_all_segments(ids: list[str | None], reference: str | None) -> None:
    assert smpp._reference(ids) == reference


async def test_a_message_that_cannot_be_delivered_bounces(carrier: SmppSimulator, channel: SmppChannel, desk: Desk) -> None:
    await channel.send(a_delivery(), a_content(address="+4915123000002"))
    await eventually(lambda: desk.reports)
    assert (desk.reports[0].status, desk.reports[0].code) == ("bounced", "UNDELIV 001")


@pytest.mark.parametrize("receipts", [Script(receipts_delay=0.05), Script(receipts_first=1), Script(receipts_doubled=1)])
async def test_a_receipt_late_early_or_twice_is_the_same_report(
    carrier: SmppSimulator, channel: SmppChannel, desk: Desk, receipts: Script
) -> None:
    carrier.script = receipts
    sent = [await channel.send(a_delivery(number), a_content()) for number in range(5)]
    expected = 10 if receipts.receipts_doubled else 5
    await eventually(lambda: len(desk.reports) == carrier.acknowledged == expected)
    assert {report.reference for report in desk.reports} == {receipt.reference for receipt in sent}
    assert len({report.report_id for report in desk.reports}) == 5


@pytest.mark.parametrize("has_tlvs", [True, False])
async def test_receipts_in_decimal_find_the_ids_that_answers_wrote_in_hexadecimal(desk: Desk, *, has_tlvs: bool) -> None:
    async with SmppSimulator(receipts_in_decimal=True, has_tlvs=has_tlvs) as carrier, opened(a_channel(carrier.url, desk)) as channel:
        receipt = await channel.send(a_delivery(), a_content())
        await eventually(lambda: desk.reports)
        assert receipt.reference is not None
        assert desk.reports[0].reference == channel.reference_of(a_delivery(), receipt) == str(int(receipt.reference, 16))


async def test_a_receipt_is_acknowledged_when_it_is_durable_and_comes_again_when_it_is_not(
    carrier: SmppSimulator, channel: SmppChannel, desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    desk.fails = 1
    desk.may_end.clear()
    await channel.send(a_delivery(), a_content())
    assert carrier.acknowledged == 0
    with caplog.at_level(logging.INFO):
        desk.may_end.set()
        await eventually(lambda: carrier.acknowledged == 1)
    assert len(desk.reports) == 1
    assert "report.refused" in caplog.text
    assert "planted" not in caplog.text
    assert NUMBER[1:] not in caplog.text


async def test_what_was_not_durable_when_the_connection_ended_comes_again(carrier: SmppSimulator, desk: Desk) -> None:
    desk.may_end.clear()
    async with opened(a_channel(carrier.url, desk)) as channel:
        receipt = await channel.send(a_delivery(), a_content())
    desk.may_end.set()
    assert not desk.reports
    async with opened(a_channel(carrier.url, desk)):  # sends nothing: being bound is enough
        await eventually(lambda: carrier.acknowledged == 1)
    assert [report.reference for report in desk.reports] == [receipt.reference]


async def test_a_flood_of_receipts_holds_up_no_answers(carrier: SmppSimulator, desk: Desk) -> None:
    desk.may_end.clear()
    async with opened(a_channel(carrier.url, desk, max_reports=20)) as channel:
        for number in range(60):
            await channel.send(a_delivery(number), a_content())
        assert carrier.acknowledged == 0
        desk.may_end.set()
        await eventually(lambda: carrier.acknowledged == 60)
    assert len(desk.reports) == 60


async def test_somebody_who_answers_stop_is_unsubscribed(carrier: SmppSimulator, channel: SmppChannel, desk: Desk) -> None:
    receipt = await channel.send(a_delivery(), a_content(address="+4915123000006"))
    await eventually(lambda: len(desk.reports) == 2)
    stop = next(report for report in desk.reports if report.suppresses)
    assert (stop.reference, stop.suppresses, stop.code) == (receipt.reference, Suppression.UNSUBSCRIBED, "STOP")


async def test_what_else_people_write_is_acknowledged_and_changes_nothing(
    carrier: SmppSimulator, channel: SmppChannel, desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    await channel.send(a_delivery(), a_content())
    await eventually(lambda: carrier.acknowledged == 1)
    carrier.say(NUMBER, "planted: thank you, don't stop")
    carrier.say(NUMBER, "planted 日本語")
    carrier.say("+4915199999999", "Stop!")  # nobody we wrote to
    await eventually(lambda: carrier.acknowledged == 4)
    assert len(desk.reports) == 1
    assert "planted" not in caplog.text


@pytest.mark.parametrize("script", [Script(time_out=1), Script(reset_after=1), Script(garbage=1)])
async def test_a_receipt_that_repeats_our_mark_settles_what_was_unknown(carrier: SmppSimulator, desk: Desk, script: Script) -> None:
    carrier.script = script
    async with opened(a_channel(carrier.url, desk, answer_seconds=0.1)) as channel:
        assert type(await failure(channel, delivery=a_delivery(7))) is SendUnknownError
        await eventually(lambda: desk.reports)
        found = await channel.look_up(a_delivery(7, attempt=2), a_content())
        assert found is not None
        assert channel.reference_of(a_delivery(7), found) == desk.reports[0].reference == carrier.messages[0].message_id
        for other, content in ((a_delivery(8), a_content()), (a_delivery(7), a_content(address="+4915123456780"))):
            assert await channel.look_up(other, content) is None
        assert await channel.look_up(a_delivery(7), a_content(address="nobody")) is None


async def test_an_answer_that_came_too_late_settles_what_was_unknown(desk: Desk) -> None:
    slow = SmppSimulator(has_echo=False, receipts_in_decimal=True, has_tlvs=False, script=Script(latency=0.2))
    async with slow as carrier, opened(a_channel(carrier.url, desk, answer_seconds=0.05)) as channel:
        assert is_a(await failure(channel, delivery=a_delivery(7)), SendUnknownError, "timeout")
        await eventually(lambda: desk.reports)
        found = await channel.look_up(a_delivery(7), a_content())
        assert found is not None
        assert found.reference == carrier.messages[0].message_id
        assert channel.reference_of(a_delivery(7), found) == desk.reports[0].reference


async def test_without_echo_no_optional_parameter_is_sent(carrier: SmppSimulator, desk: Desk) -> None:
    async with opened(a_channel(carrier.url + "&echo=no", desk)) as channel:
        await channel.send(a_delivery(), a_content())
    assert not carrier.segments[0].short.tlvs


RECEIPT = "id:0123456789 sub:001 dlvrd:001 submit date:0812152239 done date:0812152240 stat:{} err:{} text:planted"


@pytest.mark.parametrize(
    ("state", "error", "status", "code"),
    [
        ("DELIVRD", "000", DeliveryStatus.DELIVERED, "DELIVRD"),
        ("EXPIRED", "000", DeliveryStatus.EXPIRED, "EXPIRED"),
        ("DELETED", "00A", DeliveryStatus.FAILED, "DELETED 00A"),
        ("UNDELIV", "011", DeliveryStatus.BOUNCED, "UNDELIV 011"),
        ("REJECTD", "1", DeliveryStatus.FAILED, "REJECTD 1"),
        ("ACCEPTD", "000", None, "ACCEPTD"),
        ("ENROUTE", "000", None, "ENROUTE"),
        ("UNKNOWN", "000", None, "UNKNOWN"),
        ("WHATEVER", "000", None, "WHATEVE"),
        ("delivrd", "000", DeliveryStatus.DELIVERED, "DELIVRD"),
    ],
)
def test_each_state_of_a_receipt(state: str, error: str, status: DeliveryStatus | None, code: str) -> None:
    told = parse_receipt(Short(source=Address(), destination=Address(), esm_class=4, message=RECEIPT.format(state, error).encode()))
    assert (told.message_id, told.status, told.code) == ("0123456789", status, code)


@pytest.mark.parametrize(
    ("text", "message_id"),
    [
        ("ID: 7f stat:DELIVRD", "7f"),
        ("stat:DELIVRD id:a-b_c.1", "a-b_c.1"),
        ("stat:DELIVRD", None),
        ("", None),
        ("id: stat:DELIVRD", "stat:DELIVRD"),
    ],
)
def test_receipts_that_are_written_otherwise(text: str, message_id: str | None) -> None:
    assert parse_receipt(Short(source=Address(), destination=Address(), esm_class=4, message=text.encode())).message_id == message_id


def test_a_receipts_tlvs_go_before_its_text() -> None:
    tlvs: dict[int, bytes] = {Tag.RECEIPTED_MESSAGE_ID: b"7F\0", Tag.MESSAGE_STATE: b"\x05"}
    told = parse_receipt(Short(source=Address(), destination=Address(), message=RECEIPT.format("DELIVRD", "000").encode(), tlvs=tlvs))
    assert (told.message_id, told.is_as_answered, told.status) == ("7F", True, DeliveryStatus.BOUNCED)


@pytest.mark.parametrize(
    ("ids", "answered", "told"),
    [
        (ReceiptIds.SAME, "18A8-x", "18A8-x"),
        (ReceiptIds.DECIMAL, "18a8c542", "413713730"),
        (ReceiptIds.DECIMAL, "18A8C542", "0413713730"),
        (ReceiptIds.HEX, "413713730", "18A8C542"),
        (ReceiptIds.HEX, "0413713730", "018a8c542"),
    ],
)
def test_ids_of_receipts_and_answers_meet(ids: ReceiptIds, answered: str, told: str) -> None:
    assert ids.of_answer(answered) == ids.of_receipt(told)


# --- configuration and wire ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("smpp://u:hunter2@h", "from"),
        ("smpp://h?from=X", "user"),
        ("smpp://u:hunter2@h?from=a-name-that-is-too-long", "from is neither"),
        ("smpp://u:hunter2@h?from=X&window=0", "window is not a whole number"),
        ("smpp://u:hunter2@h?from=X&long=split", "long is none of udh, payload"),
        ("smpp://u:hunter2@h?from=X&receipt_ids=octal", "receipt_ids is none of"),
        ("smpp://u:hunter2@h?from=X&transliterate=yes", "transliterate is none of"),
        ("smpp://u:hunter2@h?from=X&color=red", "color is not an option"),
        ("smpp://u:hunter2@h?from=X&ca=/nowhere", "ca is not a file"),
        ("smpp://a-user-of-16-bytes:hunter2@h?from=X", "user has more than 15"),
        ("smpp://u:hunter2@h?from=X&system_type=0123456789abc", "system_type"),
    ],
)
def test_a_malformed_configuration_names_the_provider_and_never_the_password(url: str, problem: str) -> None:
    with pytest.raises(SettingsError) as caught:
        smpp.build(config_of(url), no_ports())
    told = "".join(traceback.format_exception(caught.value))
    assert "provider smpp" in told
    assert problem in told
    assert "hunter2" not in told


def test_a_configuration_becomes_a_channel() -> None:
    config = config_of("smpps://sys:$PW@h?from=1616&name=carrier-de&routes=DE,AT&max_open=7&long=payload&window=50", PW="hunter2")
    channel = smpp.build(config, no_ports())
    assert (channel.name, channel.provider, channel.reported_as) == ("sms", "carrier-de", "carrier-de")
    assert (channel.routes, channel.max_open, channel.on_unknown) == (frozenset({"DE", "AT"}), 7, OnUnknown.RESEND)
    assert (channel.unknown_seconds, channel._carrier.port, channel._carrier.window) == (600, 3550, 50)
    assert "hunter2" not in repr(channel._carrier)


addresses = st.builds(Address, ton=st.integers(0, 6), npi=st.integers(0, 18), digits=st.text("0123456789AZ", max_size=20))


@given(
    short=st.builds(
        Short,
        service_type=st.text("CMT", max_size=5),
        source=addresses,
        destination=addresses,
        esm_class=st.integers(0, 255),
        validity_period=st.just("000000013000000R") | st.just(""),
        registered_delivery=st.integers(0, 31),
        data_coding=st.integers(0, 255),
        message=st.binary(max_size=254),
        tlvs=st.dictionaries(st.integers(0, 0xFFFF), st.binary(max_size=300), max_size=3),
    ),
    cuts=st.lists(st.integers(1, 40), max_size=5),
)
def test_pdus_come_back_from_the_wire_however_they_are_cut(short: Short, cuts: list[int]) -> None:
    pdus = [Pdu(Command.SUBMIT_SM, 0, number, short.encode()) for number in (1, 2)]
    wire = b"".join(pdu.encode() for pdu in pdus)
    buffer, found = bytearray(), []
    for cut in (*cuts, len(wire)):
        buffer += wire[:cut]
        wire = wire[cut:]
        found += smpp_pdu.split(buffer)
    assert found == pdus
    assert not buffer
    assert Short.decode(found[1].body) == short


@given(data=st.binary(max_size=200))
def test_no_bytes_can_do_more_than_end_the_connection(data: bytes) -> None:
    for decode in (Short.decode, smpp_pdu.Bind.decode, lambda body: smpp_pdu.split(bytearray(body))):
        with suppress(WireError):
            decode(data)


# --- peers that others wrote -----------------------------------------------------------------------------------------


async def test_the_client_of_others_understands_our_simulator(carrier: SmppSimulator) -> None:
    told: dict[str, Any] = {}

    def talk() -> None:
        client = smpplib.client.Client("127.0.0.1", carrier.port, allow_unknown_opt_params=True, timeout=10)
        client.set_message_sent_handler(lambda pdu: told.update(id=pdu.message_id.decode()))
        client.set_message_received_handler(lambda pdu: told.update(receipt=pdu.short_message.decode(), tlv=pdu.receipted_message_id))
        client.connect()
        client.bind_transceiver(system_id="notify", password="secret")
        client.send_message(
            source_addr_ton=smpplib.consts.SMPP_TON_ALNUM,
            source_addr="FlowMart",
            dest_addr_ton=smpplib.consts.SMPP_TON_INTL,
            dest_addr_npi=smpplib.consts.SMPP_NPI_ISDN,
            destination_addr=NUMBER[1:],
            short_message=b"planted text",
            registered_delivery=True,
        )
        client.read_once()
        client.read_once()
        client.unbind()
        client.disconnect()

    await asyncio.to_thread(talk)
    assert told["id"] == carrier.messages[0].message_id
    assert f"id:{told['id']} " in told["receipt"]
    assert told["tlv"].rstrip(b"\0").decode() == told["id"]
    assert carrier.messages[0].text == BODY
    assert carrier.acknowledged == 1


@pytest.fixture(scope="module")
def jsmpp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JsmppServer]:
    """JSMPP's simulator, on a loop and thread of its own: it dies with the thread that started it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="jsmpp", daemon=True)
    thread.start()
    server = JsmppServer(tmp_path_factory.mktemp("jsmpp"))
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(120)
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def test_jsmpp_takes_texts_of_both_alphabets_and_its_receipts_are_matched(jsmpp: JsmppServer, desk: Desk) -> None:
    async with opened(a_channel(jsmpp.url, desk)) as channel:
        receipts = [
            await channel.send(a_delivery(number), a_content(text))
            for number, text in enumerate(("planted {€} Grüße", "日本語 " + EMOJI, LONG, "я" * 300))
        ]
        found = [channel.reference_of(a_delivery(), receipt) for receipt in receipts]
        assert [len((each or "").split()) for each in found] == [1, 1, 3, 5]
        references = {part for each in found for part in (each or "").split()}
        # receipts of what is sent by others to the same simulator are not ours
        await eventually(lambda: references <= {report.reference for report in desk.reports}, seconds=30)
    assert {report.status for report in desk.reports if report.reference in references} == {"delivered"}


async def test_jsmpp_takes_a_message_payload(jsmpp: JsmppServer, desk: Desk) -> None:
    async with opened(a_channel(jsmpp.url + "&long=payload", desk)) as channel:
        assert (await channel.send(a_delivery(), a_content(LONG))).reference


async def test_jsmpp_turns_a_wrong_password_away(jsmpp: JsmppServer) -> None:
    async with opened(a_channel(jsmpp.url.replace("jpwd", "wrong"))) as channel:
        assert is_a(await failure(channel), ProviderUnavailableError, "ESME_RINVPASWD")


async def test_jsmpp_throttles_who_sends_too_much_at_once_and_goes_on_with_who_keeps_to_a_window(jsmpp: JsmppServer, desk: Desk) -> None:
    async with opened(a_channel(jsmpp.url, desk)) as channel:
        await asyncio.gather(*(channel.send(a_delivery(number), a_content()) for number in range(500)))
    # far more than its queue of 100 holds
    async with opened(a_channel(jsmpp.url + "&window=1000", desk)) as channel:
        ends = await asyncio.gather(*(channel.send(a_delivery(number), a_content()) for number in range(1_000)), return_exceptions=True)
    codes = {getattr(end, "code", None) for end in ends}
    assert "ESME_RTHROTTLED" in codes
    assert all(isinstance(end, ProviderThrottledError) for end in ends if getattr(end, "code", None) == "ESME_RTHROTTLED")
    assert codes <= {None, "ESME_RTHROTTLED", "unbound", "connection"}


def test_text_of_a_joined_segment_leaves_its_header_out() -> None:
    (first, _) = smpp_pdu.joined(7, [b"ab", b"cd"])
    assert text_of(Short(source=Address(), destination=Address(), esm_class=0x40, message=first)) == "ab"
