"""Twilio's API: what each of its answers makes of a delivery, and what its callbacks report, against a simulator of it."""

from __future__ import annotations

import asyncio
import datetime as dt
import traceback
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import aiohttp
import pytest
from aiohttp import web

from channels import twilio
from channels.base import Channel, OnUnknown, Receipt
from channels.http2 import Answer
from channels.simulators.authority import make_authority
from channels.simulators.script import Script
from channels.simulators.twilio import SENDER, TwilioSimulator
from channels.twilio import TwilioChannel, report_of_callback, sign, verify_twilio
from schemas.errors import (
    NotifyError,
    ProviderRefusedError,
    ProviderRejectedError,
    ProviderThrottledError,
    ProviderUnavailableError,
    SendUnknownError,
    SettingsError,
)
from schemas.messages import Content, Delivery, DeliveryReport
from schemas.status import Status, Suppression
from tests.calling import config_of, delivery_on, failure_of, is_a, opened
from tests.ports import no_ports
from tests.waiting import eventually

NUMBER = "+4915123456789"
BODY = "planted text"


a_delivery = partial(delivery_on, "sms", route="DE")


def a_content(text: str | None = BODY, address: str = NUMBER) -> Content:
    return Content(address=address, text=text)


class Desk:
    """Where callbacks are posted: verifies each as the web does, and keeps its report. `fails` of them are answered 503 first."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.reports: list[DeliveryReport] = []
        self.states: list[str] = []
        self.fails = 0
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_post("/callbacks/twilio/{provider}", self._take)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    def url(self, provider: str) -> str:
        assert self._runner is not None
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}/callbacks/twilio/{provider}"

    async def _take(self, request: web.Request) -> web.Response:
        params = {name: str(value) for name, value in (await request.post()).items()}
        if self.fails:
            self.fails -= 1
            return web.Response(status=503)
        if not verify_twilio(str(request.url), params, request.headers["X-Twilio-Signature"], self.token):
            return web.Response(status=403)
        self.states.append(params["MessageStatus"])
        report = report_of_callback(str(request.url), params)
        if report is not None:
            self.reports.append(report)
        return web.Response(status=204)


@pytest.fixture
async def service() -> AsyncIterator[TwilioSimulator]:
    async with TwilioSimulator() as simulator:
        yield simulator


@pytest.fixture
async def desk(service: TwilioSimulator) -> AsyncIterator[Desk]:
    async with Desk(service.token) as listening:
        yield listening


def a_channel(url: str, *, callback_url: Callable[[str], str | None] = lambda _: None, total_seconds: float = 5.0) -> TwilioChannel:
    channel = twilio.build(config_of(url), no_ports(callback_url=callback_url))
    channel._total_seconds = total_seconds
    return channel


@pytest.fixture
async def channel(service: TwilioSimulator, desk: Desk) -> AsyncIterator[TwilioChannel]:
    async with opened(a_channel(service.url, callback_url=desk.url)) as made:
        yield made


async def failure(channel: Channel, content: Content | None = None, delivery: Delivery | None = None) -> NotifyError:
    return await failure_of(channel, delivery or a_delivery(), content or a_content(), NUMBER.removeprefix("+"), "simulated-auth-token")


# --- what is sent ----------------------------------------------------------------------------------------------------


async def test_a_text_arrives_with_who_it_is_from_and_where_to_report(service: TwilioSimulator, channel: TwilioChannel, desk: Desk) -> None:
    receipt = await channel.send(a_delivery(7, generation=2), a_content("“Łukasz” & +1 = 5 €"))
    (message,) = service.messages
    assert (message.text, message.recipient, message.sender) == ('"Lukasz" & +1 = 5 €', NUMBER, SENDER)
    assert receipt == Receipt(provider="twilio", reference=message.sid, status=Status.SENT)
    assert message.callback == f"{desk.url('twilio')}?reference={7:032x}-sms.2"
    assert message.identity == (NUMBER, channel.reference_of(a_delivery(7, generation=2), receipt))


async def test_a_messaging_service_may_choose_the_sender(service: TwilioSimulator) -> None:
    url = service.url.partition("?")[0] + "?service=MG0123"
    async with opened(a_channel(url)) as channel:
        await channel.send(a_delivery(), a_content())
        assert (service.messages[0].service, service.messages[0].sender) == ("MG0123", "")
        assert await channel.look_up(a_delivery(2), a_content()) is None
        assert channel.reference_of(a_delivery(), None) is None, "nobody listens"
        assert service.messages[0].callback == ""


async def test_a_callback_url_with_a_query_keeps_it(service: TwilioSimulator) -> None:
    async with opened(a_channel(service.url, callback_url=lambda name: f"http://127.0.0.1:9/x?p={name}")) as channel:
        await channel.send(a_delivery(), a_content())
    assert service.messages[0].callback == f"http://127.0.0.1:9/x?p=twilio&reference={1:032x}-sms.0"


async def test_what_expires_is_not_tried_after_that(service: TwilioSimulator, channel: TwilioChannel) -> None:
    now = dt.datetime.now(dt.UTC)
    assert twilio._validity(a_delivery(expires_at=now + dt.timedelta(minutes=10, seconds=1))) == {"ValidityPeriod": "600"}
    assert twilio._validity(a_delivery(expires_at=now + dt.timedelta(days=1))) == twilio._validity(a_delivery()) == {}
    await channel.send(a_delivery(expires_at=now + dt.timedelta(minutes=10)), a_content())
    assert len(service.messages) == 1


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (a_content(address="planted"), "address"),
        (a_content(None), "content"),
        (a_content(address="+33612345678"), "country_not_allowed"),
    ],
)
async def test_what_cannot_be_sent_is_rejected_without_a_call(service: TwilioSimulator, content: Content, code: str) -> None:
    async with opened(a_channel(service.url + "&routes=DE,AT")) as channel:
        assert is_a(await failure(channel, content), ProviderRejectedError, code)
    assert not service.calls


# --- what each answer becomes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "kind", "code", "retry_after"),
    [
        (Script(refuse=1), ProviderRefusedError, "20500", None),
        (Script(reject=1), ProviderRejectedError, "21211", None),
        (Script(throttle=1, retry_after=7), ProviderThrottledError, "20429", 7),
        (Script(unavailable=1, retry_after=9), ProviderUnavailableError, "20503", 9),
        (Script(reset_before=1), SendUnknownError, "connection", None),
        (Script(reset_after=1), SendUnknownError, "connection", None),
        (Script(garbage=1), SendUnknownError, "protocol", None),
    ],
)
async def test_each_way_to_fail_is_one_of_the_contract_and_the_channel_goes_on(  # noqa: PLR0917 - a table's row
    service: TwilioSimulator, channel: TwilioChannel, script: Script, kind: type[NotifyError], code: str, retry_after: float | None
) -> None:
    await channel.send(a_delivery(), a_content())
    service.script = script
    error = await failure(channel)
    assert is_a(error, kind, code)
    assert getattr(error, "retry_after_seconds", None) == retry_after
    service.script = Script()
    await channel.send(a_delivery(2), a_content())


async def test_an_answer_that_does_not_come_leaves_it_unknown(service: TwilioSimulator) -> None:
    service.script = Script(time_out=1)
    async with opened(a_channel(service.url, total_seconds=0.3)) as channel:
        assert is_a(await failure(channel), SendUnknownError, "timeout")
    assert len(service.messages) == 1


@pytest.mark.parametrize(
    ("status", "code", "kind", "suppresses"),
    [
        (400, 21211, ProviderRejectedError, Suppression.HARD_BOUNCE),
        (400, 21614, ProviderRejectedError, Suppression.HARD_BOUNCE),
        (400, 21610, ProviderRejectedError, Suppression.UNSUBSCRIBED),
        (400, 21408, ProviderRejectedError, None),
        (400, 21617, ProviderRejectedError, None),
        (400, 21606, ProviderUnavailableError, None),
        (401, 20003, ProviderUnavailableError, None),
        (403, None, ProviderUnavailableError, None),
        (404, 20404, ProviderUnavailableError, None),
        (301, None, ProviderUnavailableError, None),
        (429, None, ProviderThrottledError, None),
        (400, 14107, ProviderThrottledError, None),
        (500, None, ProviderRefusedError, None),
        (409, None, ProviderRefusedError, None),
        (502, None, ProviderUnavailableError, None),
        (503, None, ProviderUnavailableError, None),
        (504, None, SendUnknownError, None),
    ],
)
def test_each_error_is_of_one_kind(status: int, code: int | None, kind: type[NotifyError], suppresses: Suppression | None) -> None:
    body = b"{}" if code is None else b'{"code": %d, "message": "planted"}' % code
    error = twilio._meaning(twilio._Answer.of(Answer(status=status, headers={}, body=body)))
    assert is_a(error, kind, str(code or status))
    assert getattr(error, "suppresses", None) == suppresses
    assert "planted" not in str(error)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("3", 3),
        ("0", 0),
        ("999999999", 86_400),
        ("Wed, 01 Jan 2020 00:00:00 GMT", 0),
        ("Fri, 01 Jan 2100 00:00:00 GMT", 86_400),
        ("soon", None),
        ("-1", None),
        ("", None),
    ],
)
def test_the_time_to_wait_is_a_number_or_a_date(header: str, seconds: float | None) -> None:
    answer = twilio._Answer.of(Answer(status=429, headers={"retry-after": header}, body=b"[]"))
    assert answer.retry_after_seconds == seconds


async def test_wrong_credentials_are_unavailable_and_not_told(service: TwilioSimulator) -> None:
    async with opened(a_channel(service.url.replace(service.token, "simulated-auth-token-of-others"))) as channel:
        assert is_a(await failure(channel), ProviderUnavailableError, "20003")
        with pytest.raises(ProviderUnavailableError):
            await channel.look_up(a_delivery(), a_content())


async def test_nobody_there_is_unavailable() -> None:
    async with TwilioSimulator() as simulator:
        url = simulator.url
    async with opened(a_channel(url)) as channel:
        assert is_a(await failure(channel), ProviderUnavailableError, "connect")
    assert is_a(await failure(channel), ProviderUnavailableError, "closed")


async def test_over_tls_it_is_the_same(tmp_path: Path) -> None:
    context = await asyncio.to_thread(make_authority, tmp_path, protocols=("http/1.1",))
    async with TwilioSimulator(tls=context) as service:
        assert service.url.startswith("twilio://")
        async with opened(a_channel(f"{service.url}&ca={tmp_path / 'ca.pem'}")) as channel:
            await channel.send(a_delivery(), a_content())
        async with opened(a_channel(service.url)) as stranger:
            assert is_a(await failure(stranger), ProviderUnavailableError, "tls")
    assert len(service.messages) == 1


@pytest.mark.parametrize(
    ("ending", "kind"),
    [("000003", ProviderRefusedError), ("000004", ProviderThrottledError), ("000005", SendUnknownError)],
)
async def test_magic_numbers_do_what_they_are_for(service: TwilioSimulator, ending: str, kind: type[NotifyError]) -> None:
    async with opened(a_channel(service.url, total_seconds=0.3)) as channel:
        assert type(await failure(channel, a_content(address=f"+4915123{ending}"))) is kind


async def test_a_pace_that_is_too_fast_is_throttled(service: TwilioSimulator, channel: TwilioChannel) -> None:
    service.script = Script(per_second=10)
    ends = await asyncio.gather(*(channel.send(a_delivery(number), a_content()) for number in range(25)), return_exceptions=True)
    assert sum(isinstance(end, ProviderThrottledError) for end in ends) == 15


async def test_a_cancelled_call_and_a_close_leave_nothing_behind(service: TwilioSimulator, channel: TwilioChannel) -> None:
    service.script = Script(latency=30)
    calls = [asyncio.ensure_future(channel.send(a_delivery(number), a_content())) for number in range(4)]
    await eventually(lambda: len(service.calls) == 4)
    calls[0].cancel()
    await asyncio.wait(calls[:1])
    await channel.close()
    ends = await asyncio.gather(*calls[1:], return_exceptions=True)
    assert {type(end) for end in ends} == {SendUnknownError}
    service.script = Script()
    await channel.open()
    await channel.send(a_delivery(), a_content())


# --- callbacks -------------------------------------------------------------------------------------------------------


async def test_a_callback_reports_the_delivery_under_its_reference(service: TwilioSimulator, channel: TwilioChannel, desk: Desk) -> None:
    receipt = await channel.send(a_delivery(), a_content())
    await eventually(lambda: desk.reports)
    (report,) = desk.reports
    assert report.reference == channel.reference_of(a_delivery(), receipt) == channel.reference_of(a_delivery(), None)
    assert (report.provider, report.status, report.code, report.suppresses) == (channel.reported_as, "delivered", "delivered", None)
    assert desk.states == ["sent", "delivered"]
    assert set(service.callbacks) == {204}
    assert "planted" not in repr(report)


@pytest.mark.parametrize(
    ("address", "status", "code", "suppresses"),
    [("+4915123000002", "bounced", "undelivered 30003", None), ("+4915123000006", "failed", "failed 21610", Suppression.UNSUBSCRIBED)],
)
async def test_what_does_not_arrive_is_reported_with_its_cause(  # noqa: PLR0917 - a table's row
    channel: TwilioChannel, desk: Desk, address: str, status: str, code: str, suppresses: Suppression | None
) -> None:
    await channel.send(a_delivery(), a_content(address=address))
    await eventually(lambda: desk.reports)
    assert (desk.reports[0].status, desk.reports[0].code, desk.reports[0].suppresses) == (status, code, suppresses)


async def test_who_opted_out_is_rejected_from_then_on(channel: TwilioChannel, desk: Desk) -> None:
    await channel.send(a_delivery(), a_content(address="+4915123000006"))
    await eventually(lambda: desk.reports)
    error = await failure(channel, a_content(address="+4915123000006"))
    assert is_a(error, ProviderRejectedError, "21610")
    assert isinstance(error, ProviderRejectedError)
    assert error.suppresses is Suppression.UNSUBSCRIBED


@pytest.mark.parametrize("script", [Script(receipts_delay=0.05), Script(receipts_first=1), Script(receipts_doubled=1)])
async def test_a_callback_late_early_or_twice_is_the_same_report(
    service: TwilioSimulator, channel: TwilioChannel, desk: Desk, script: Script
) -> None:
    service.script = script
    for number in range(5):
        await channel.send(a_delivery(number), a_content())
    await eventually(lambda: len(desk.reports) == (10 if script.receipts_doubled else 5))
    assert len({report.report_id for report in desk.reports}) == 5


@pytest.mark.parametrize("script", [Script(reset_after=1), Script(garbage=1)])
async def test_a_callback_settles_an_attempt_whose_answer_never_came(
    service: TwilioSimulator, channel: TwilioChannel, desk: Desk, script: Script
) -> None:
    service.script = script
    assert type(await failure(channel, delivery=a_delivery(7))) is SendUnknownError
    await eventually(lambda: desk.reports)
    assert desk.reports[0].reference == channel.reference_of(a_delivery(7), None)


async def test_the_simulator_posts_again_what_was_not_taken(service: TwilioSimulator, channel: TwilioChannel, desk: Desk) -> None:
    desk.fails = 1
    await channel.send(a_delivery(), a_content())
    await eventually(lambda: desk.reports)
    assert list(service.callbacks) == [503, 204, 204]


async def test_lost_callbacks_do_not_come(service: TwilioSimulator, channel: TwilioChannel, desk: Desk) -> None:
    service.script = Script(receipts_lost=1)
    await channel.send(a_delivery(), a_content())
    await eventually(lambda: service.messages[0].status == "delivered")
    assert desk.states == ["sent"]


# Twilio's own examples: its documentation of signatures, and the tests of its libraries
VECTORS = [("+12349013030", "0/KCTR6DLpKmkAf8muzZqo1nDgQ="), ("+14158675309", "RSOYDt4T1cUTdK1PDd93/VVr8B8=")]


@pytest.mark.parametrize(("caller", "signature"), VECTORS)
def test_signatures_are_those_of_twilios_examples(caller: str, signature: str) -> None:
    url = "https://mycompany.com/myapp.php?foo=1&bar=2"
    params = {"CallSid": "CA1234567890ABCDE", "Caller": caller, "Digits": "1234", "From": caller, "To": "+18005551212"}
    assert sign(url, params, "12345") == signature
    assert verify_twilio(url, params, signature, "12345")
    assert verify_twilio(url.replace(".com/", ".com:443/"), params, signature, "12345")
    for wrong in ("", "x", signature[:-2] + "A=", signature.lower(), "é"):
        assert not verify_twilio(url, params, wrong, "12345")
    assert not verify_twilio(url, params, signature, "12346")
    assert not verify_twilio(url, {**params, "Digits": "1235"}, signature, "12345")
    assert not verify_twilio(url + "&x=1", params, signature, "12345")
    assert not verify_twilio("https://[", params, signature, "12345")


def test_the_port_may_be_signed_or_not_and_a_parameter_may_come_twice() -> None:
    params = {"a": ["2", "1", "1"], "b": "x"}
    for signed in ("https://h/x", "https://h:443/x"):
        for called in ("https://h/x", "https://h:443/x"):
            assert verify_twilio(called, params, sign(signed, params, "t"), "t")
    assert verify_twilio("https://h:8443/x", params, sign("https://h/x", params, "t"), "t")
    assert not verify_twilio("https://h/x", params, sign("https://h:8443/x", params, "t"), "t")
    assert sign("u", {"a": ["2", "1", "1"]}, "t") == sign("u", {"a": ["1", "2"]}, "t")


@pytest.mark.parametrize(
    ("params", "status", "code", "suppresses"),
    [
        ({"MessageStatus": "delivered"}, "delivered", "delivered", None),
        ({"MessageStatus": "read"}, "delivered", "read", None),
        ({"MessageStatus": "undelivered", "ErrorCode": "30005"}, "bounced", "undelivered 30005", Suppression.HARD_BOUNCE),
        ({"MessageStatus": "undelivered", "ErrorCode": "30003"}, "bounced", "undelivered 30003", None),
        ({"MessageStatus": "failed", "ErrorCode": "30007"}, "failed", "failed 30007", None),
        ({"MessageStatus": "failed", "ErrorCode": "planted"}, "failed", "failed", None),
        ({"MessageStatus": "canceled"}, "failed", "canceled", None),
        ({"SmsStatus": "delivered"}, "delivered", "delivered", None),
    ],
)
def test_each_status_that_ends_a_message(params: dict[str, str], status: str, code: str, suppresses: Suppression | None) -> None:
    report = report_of_callback("https://h/callbacks/twilio/x?reference=d.0", params)
    assert report is not None
    assert (report.reference, report.status, report.code, report.suppresses) == ("d.0", status, code, suppresses)


@pytest.mark.parametrize("state", ["accepted", "scheduled", "queued", "sending", "sent", "receiving", "received", "news"])
def test_a_status_on_the_way_reports_nothing(state: str) -> None:
    assert report_of_callback("https://h/x?reference=d.0", {"MessageStatus": state}) is None


@pytest.mark.parametrize(("url", "params"), [("https://h/x", {"MessageStatus": "sent"}), ("https://h/x?reference=d.0", {}), ("", {})])
def test_what_is_no_callback_of_ours_is_a_value_error(url: str, params: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="no status callback"):
        report_of_callback(url, params)


# --- look-ups --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [Script(reset_after=1), Script(garbage=1)])
async def test_a_look_up_finds_what_was_taken_and_not_answered(service: TwilioSimulator, script: Script) -> None:
    async with opened(a_channel(service.url)) as channel:
        delivery = a_delivery(7)
        assert await channel.look_up(delivery, a_content()) is None
        service.script = script
        assert type(await failure(channel, delivery=delivery)) is SendUnknownError
        service.script = Script()
        found = await channel.look_up(replace(delivery, attempt=2), a_content())
        assert found == Receipt(provider="twilio", reference=service.messages[0].sid, status=Status.SENT)


async def test_a_look_up_takes_no_other_message_for_it(service: TwilioSimulator, channel: TwilioChannel) -> None:
    await channel.send(a_delivery(1), a_content())  # the same words to the same number, and known to be another
    await channel.send(a_delivery(2), a_content("planted otherwise"))
    await channel.send(a_delivery(3), a_content(address="+4915123456780"))
    assert await channel.look_up(a_delivery(7), a_content()) is None
    assert await channel.look_up(a_delivery(7), a_content(address="nobody")) is None
    assert await channel.look_up(a_delivery(7), a_content(None)) is None
    assert service.look_ups == 1


async def test_a_look_up_takes_nothing_older_than_the_delivery(service: TwilioSimulator) -> None:
    async with opened(a_channel(service.url)) as before, opened(a_channel(service.url)) as after:
        await before.send(a_delivery(1), a_content())
        later = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=10)
        assert await after.look_up(a_delivery(7, created_at=later), a_content()) is None
        assert await after.look_up(a_delivery(7, created_at=later - dt.timedelta(seconds=15)), a_content()) is not None


@pytest.mark.parametrize("messages", [b"[]", b'{"messages": null}', b'{"messages": [{}, 1]}', b'{"messages": [{"date_created": 7}]}'])
async def test_a_strange_list_holds_nothing(messages: bytes) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=messages, content_type="application/json")

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with opened(a_channel(f"twilio+http://AC1:t@127.0.0.1:{runner.addresses[0][1]}?from=X")) as channel:
        assert await channel.look_up(a_delivery(), a_content()) is None
    await runner.cleanup()


async def test_a_look_up_that_is_not_answered_is_unavailable(service: TwilioSimulator) -> None:
    async with opened(a_channel(service.url)) as channel:
        channel._path = "/elsewhere"
        with pytest.raises(ProviderUnavailableError) as caught:
            await channel.look_up(a_delivery(), a_content())
        assert caught.value.code == "404"


async def test_the_simulator_lists_messages_as_twilio_does(service: TwilioSimulator, channel: TwilioChannel) -> None:
    for number in range(5):
        await channel.send(a_delivery(number), a_content(f"planted {number}"))
    await eventually(lambda: all(message.status == "delivered" for message in service.messages))
    today = f"{dt.datetime.now(dt.UTC):%Y-%m-%d}"
    base = f"http://127.0.0.1:{service.port}"
    auth = "Basic " + b64encode(f"{service.sid}:{service.token}".encode()).decode()
    async with aiohttp.ClientSession(base, headers={"Authorization": auth}) as session:

        async def listed(**query: str) -> dict[str, Any]:
            async with session.get(f"/2010-04-01/Accounts/{service.sid}/Messages.json", params=query) as answer:
                found: dict[str, Any] = await answer.json()
                return found

        first = await listed(PageSize="2", To=NUMBER)
        assert [message["body"] for message in first["messages"]] == ["planted 4", "planted 3"]
        async with session.get(first["next_page_uri"]) as answer:
            second = await answer.json()
        assert [message["body"] for message in second["messages"]] == ["planted 2", "planted 1"]
        assert len((await listed(**{"DateSent>": today}))["messages"]) == 5
        assert not (await listed(**{"DateSent<": "2020-01-01"}))["messages"]
        assert not (await listed(To="+4915123456780"))["messages"]
        async with session.get(first["messages"][0]["uri"]) as answer:
            assert (await answer.json())["num_segments"] == "1"


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("twilio://AC1:hunter2@h", "from or service"),
        ("twilio://AC1@h?from=X", "password"),
        ("twilio://h?from=X", "user"),
        ("twilio://AC1:hunter2@h?from=X&service=MG1", "one of them is wanted"),
        ("twilio+http://AC1:hunter2@api.twilio.com?from=X", "simulator on this host"),
        ("twilio://AC1:hunter2@h?from=X&max_segments=11", "max_segments is not a whole number"),
        ("twilio://AC1:hunter2@h?from=X&window=5", "window is not an option"),
    ],
)
def test_a_malformed_configuration_names_the_provider_and_never_the_password(url: str, problem: str) -> None:
    with pytest.raises(SettingsError) as caught:
        twilio.build(config_of(url), no_ports())
    told = "".join(traceback.format_exception(caught.value))
    assert "provider twilio" in told
    assert problem in told
    assert "hunter2" not in told


def test_a_configuration_becomes_a_channel() -> None:
    config = config_of("twilio://AC1:$T@api.twilio.com?from=%2B14155550100&name=us&routes=US&max_open=7", T="hunter2")
    channel = twilio.build(config, no_ports())
    assert (channel.name, channel.provider, channel.reported_as, channel.routes) == ("sms", "us", "twilio", frozenset({"US"}))
    assert (channel.max_open, channel.on_unknown, channel.unknown_seconds) == (7, OnUnknown.RESEND, 600)
    assert channel._account.origin == "https://api.twilio.com"
    assert channel._account.sender == "+14155550100"
    assert "hunter2" not in repr(channel._account)
