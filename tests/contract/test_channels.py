"""What every channel promises, and how e-mail maps each thing an SMTP server can do, against a real server."""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import ssl
import traceback
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from email import message_from_bytes, policy
from email.header import decode_header, make_header
from email.utils import parseaddr
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import pytest
from aiosmtpd.smtp import SMTP
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import example, given
from hypothesis import strategies as st

from channels.base import Channel, OnUnknown, Receipt
from channels.config import parse_providers, smtp_provider
from channels.email import EmailChannel, build, server_of
from channels.in_app import InAppChannel
from channels.mime import Letterhead, Mailbox, parse_sender, recipient_address
from channels.recording import RecordingChannel
from channels.registry import build_channels
from schemas import topics
from schemas.errors import (
    NotifyError,
    ProviderError,
    ProviderRefusedError,
    ProviderRejectedError,
    ProviderThrottledError,
    ProviderUnavailableError,
    SendUnknownError,
    SettingsError,
)
from schemas.messages import Content, Delivery
from schemas.status import Status
from tests.calling import delivery_on, failure_of, is_a
from tests.ports import no_ports
from tests.smtp_server import Drop, Hold, Reply, SmtpServer, Stage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from email.message import EmailMessage
    from pathlib import Path

    from aiosmtpd.smtp import Envelope, Session

ADDRESS = "planted.address@flowmart.example"
BODY = "planted body"
SENDER = "FlowMart <no-reply@shop.example>"
NOW = dt.datetime(2026, 3, 1, 12, 30, tzinfo=dt.UTC)


def a_delivery(number: int = 1, *, channel: str = "email", **changes: Any) -> Delivery:
    return delivery_on(channel, number, accepted_at=NOW, created_at=NOW, **changes)


def a_content(**changes: str | None) -> Content:
    content = Content(address=ADDRESS, name="Ann", subject="planted subject", text=BODY, html=f"<p>{BODY}</p>")
    return replace(content, **changes)  # type: ignore[arg-type]  # only what may be missing is ever None


def parsed(raw: bytes) -> EmailMessage:
    return message_from_bytes(raw, policy=policy.default)


def name_of(message: EmailMessage) -> str:
    """Return the recipient's name. By the older parser: the newer puts spaces between the encoded words of a long name."""
    (raw,) = (value for header, value in message.raw_items() if header == "To")
    name, _ = parseaddr("".join(raw.splitlines()))
    return str(make_header(decode_header(name))) if "=?" in name and not raw.startswith('"') else name


def body_of(message: EmailMessage, kind: str) -> str:
    part = message.get_body((kind,))
    assert part is not None
    text = part.get_content()
    return cast("str", text).replace("\r\n", "\n")


@asynccontextmanager
async def an_email_channel(server: SmtpServer, *, url: str | None = None, **limits: object) -> AsyncIterator[EmailChannel]:
    channel = EmailChannel(
        replace(server_of(smtp_provider(url or f"smtp://127.0.0.1:{server.port}")), hostname="client.example"),
        Letterhead(parse_sender(SENDER)),
        **limits,  # type: ignore[arg-type]  # by name, as given
    )
    await channel.open()
    try:
        yield channel
    finally:
        await channel.close()
        await server.wait_until(lambda: server.open_connections == 0)


@pytest.fixture(params=[(), ("PIPELINING",)], ids=["step by step", "pipelined"])
async def server(request: pytest.FixtureRequest) -> AsyncIterator[SmtpServer]:
    async with SmtpServer(extensions=request.param) as started:
        yield started


@pytest.fixture
async def email(server: SmtpServer) -> AsyncIterator[EmailChannel]:
    async with an_email_channel(server) as channel:
        yield channel


async def failure(channel: Channel, delivery: Delivery | None = None, content: Content | None = None) -> NotifyError:
    return await failure_of(channel, delivery or a_delivery(), content or a_content())


# --- what every channel promises -------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A channel and the ways in which its provider can be made to fail at the next call."""

    channel: Channel
    troubles: dict[type[NotifyError], Callable[[], None]]


@pytest.fixture(params=["recording", "in_app", "email"])
async def subject(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    async with AsyncExitStack() as stack:
        match request.param:
            case "email":
                server = await stack.enter_async_context(SmtpServer())
                channel: Channel = await stack.enter_async_context(an_email_channel(server))
                troubles: dict[type[NotifyError], Callable[[], None]] = {
                    ProviderUnavailableError: lambda: server.on(Stage.GREETING, Reply("421 4.3.2 down")),
                    ProviderRefusedError: lambda: server.on(Stage.RCPT, Reply("451 4.7.1 later")),
                    ProviderRejectedError: lambda: server.on(Stage.RCPT, Reply("550 5.1.1 unknown")),
                    SendUnknownError: lambda: server.on(Stage.ANSWER, Drop()),
                }
            case "in_app":
                channel = InAppChannel()
                troubles = {}
            case _:
                channel = recording = RecordingChannel()
                errors: list[ProviderError | SendUnknownError] = [
                    ProviderUnavailableError("down"),
                    ProviderThrottledError("slower", retry_after_seconds=1),
                    ProviderRefusedError("later"),
                    ProviderRejectedError("never"),
                    SendUnknownError("silence"),
                ]
                troubles = {type(error): partial(recording.then, error) for error in errors}
        await channel.open()
        yield Subject(channel, troubles)
        await channel.close()


async def test_a_channel_says_what_it_is(subject: Subject) -> None:
    channel = subject.channel
    assert channel.name in set(topics.Channel)
    assert channel.provider.isidentifier()
    assert channel.max_open >= 1
    assert channel.on_unknown in set(OnUnknown)


async def test_a_delivery_taken_over_has_a_receipt(subject: Subject) -> None:
    receipt = await subject.channel.send(a_delivery(), a_content())
    assert receipt.provider == subject.channel.provider
    assert receipt.reference
    assert receipt.status in {Status.SENT, Status.DELIVERED}
    assert "planted" not in repr(receipt)


async def test_what_reports_name_a_delivery_by_is_its_own_holds_no_address_and_never_changes(subject: Subject) -> None:
    channel = subject.channel
    first, second = a_delivery(1), a_delivery(2)
    receipts = [await channel.send(each, a_content()) for each in (first, second)]
    names = [channel.reference_of(each, receipt) for each, receipt in zip((first, second), receipts, strict=True)]
    if names == [None, None]:
        return  # nobody reports
    assert len({*names, None}) == 3
    assert "planted" not in repr(names)
    assert channel.reference_of(replace(first, attempt=7), receipts[0]) == names[0]
    assert channel.reference_of(first, None) in {None, names[0]}, "unknown whether it was taken: known by our own id, or not at all"


def test_the_reference_of_a_mail_is_its_message_id() -> None:
    channel = build(smtp_provider("smtp://127.0.0.1:2525"), no_ports(SENDER))
    raw = Letterhead(parse_sender(SENDER)).compose(a_delivery(), a_content(), recipient=ADDRESS, at=NOW)
    (line,) = [line for line in raw.decode("ascii").splitlines() if line.startswith("Message-ID:")]
    assert line == f"Message-ID: <{channel.reference_of(a_delivery(), None)}>"


async def test_the_same_delivery_may_be_sent_again(subject: Subject) -> None:
    await subject.channel.send(a_delivery(attempt=1), a_content())
    await subject.channel.send(a_delivery(attempt=2), a_content())


async def test_as_many_calls_as_it_allows_run_at_once(subject: Subject) -> None:
    calls = [subject.channel.send(a_delivery(n), a_content()) for n in range(subject.channel.max_open)]
    assert len(await asyncio.gather(*calls)) == subject.channel.max_open


async def test_each_failure_is_one_of_the_contract_and_the_channel_goes_on(subject: Subject) -> None:
    for kind, arrange in subject.troubles.items():
        arrange()
        assert type(await failure(subject.channel)) is kind
        await subject.channel.send(a_delivery(), a_content())


async def test_opening_and_closing_twice_changes_nothing_and_a_closed_channel_opens_again(subject: Subject) -> None:
    channel = subject.channel
    await channel.open()
    await channel.send(a_delivery(), a_content())
    await channel.close()
    await channel.close()
    await channel.open()
    await channel.send(a_delivery(), a_content())


async def test_a_cancelled_call_leaves_the_channel_usable(subject: Subject) -> None:
    call = asyncio.ensure_future(subject.channel.send(a_delivery(), a_content()))
    await asyncio.wait([call], timeout=0)  # let it start
    call.cancel()
    await asyncio.wait([call])
    await subject.channel.send(a_delivery(), a_content())


# --- the recording channel and the inbox -----------------------------------------------------------------------------


async def test_the_recording_channel_follows_its_scripts_and_remembers_its_calls() -> None:
    refused = ProviderRefusedError("later", code="451")
    delivered = Receipt(provider="recording", reference="r", status=Status.DELIVERED)
    channel = RecordingChannel([delivered], by_delivery={a_delivery(2).delivery_id: [refused]})
    await channel.open()
    with pytest.raises(ProviderRefusedError) as caught:
        await channel.send(a_delivery(2), a_content())
    assert caught.value is refused
    assert await channel.send(a_delivery(1), a_content()) == delivered
    assert (await channel.send(a_delivery(3), a_content())).reference == a_delivery(3).delivery_id
    assert [call.delivery for call in channel.calls] == [a_delivery(2), a_delivery(1), a_delivery(3)]


async def test_the_recording_channel_holds_calls_until_they_are_released() -> None:
    channel = RecordingChannel()
    await channel.open()
    channel.hold()
    calls = [asyncio.ensure_future(channel.send(a_delivery(n), a_content())) for n in range(5)]
    await asyncio.wait(calls, timeout=0)
    assert channel.running == channel.most_running == 5
    channel.release()
    await asyncio.gather(*calls)
    assert channel.running == 0


async def test_the_inbox_delivers_at_once_under_the_delivery_id() -> None:
    receipt = await InAppChannel().send(a_delivery(channel="in_app"), a_content())
    assert receipt == Receipt(provider="inbox", reference=a_delivery(channel="in_app").delivery_id, status=Status.DELIVERED)


def test_the_registry_has_every_channel_by_its_name() -> None:
    channels = build_channels(parse_providers("smtp://127.0.0.1:2525?name=relay", {}), no_ports(SENDER))
    assert set(channels) == set(topics.Channel)
    assert all(name == channel.name for name, each in channels.items() for channel in each)
    assert [channel.provider for channel in channels["email"]] == ["relay"]


async def test_a_channel_without_a_provider_rejects_visibly() -> None:
    (absent,) = build_channels([], no_ports(SENDER))["sms"]
    with pytest.raises(ProviderRejectedError) as caught:
        await absent.send(a_delivery(channel="sms"), a_content())
    assert caught.value.code == "no_provider"


# --- e-mail: what each reply becomes ---------------------------------------------------------------------------------


async def test_an_accepted_message_is_sent_under_its_queue_id(server: SmtpServer, email: EmailChannel) -> None:
    receipt = await email.send(a_delivery(), a_content())
    assert receipt == Receipt(provider="smtp", reference="Ok: queued as 00000001", status=Status.SENT, code="250 2.0.0")
    assert server.messages[0].sender == "no-reply@shop.example"
    assert server.messages[0].recipients == (ADDRESS,)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        (f"2.0.0 Ok <{ADDRESS}> queued as X1", "Ok queued as X1"),
        (f"2.0.0 {ADDRESS}", None),
        ("2.0.0 " + "q" * 200, "q" * 100),
        ("Ok \udcff\udcfe\x07 X1", "Ok X1"),
    ],
)
async def test_a_reference_holds_no_address_and_is_short(server: SmtpServer, email: EmailChannel, text: str, reference: str | None) -> None:
    server.on(Stage.ANSWER, Reply(f"250 {text}"))
    assert (await email.send(a_delivery(), a_content())).reference == reference


REPLIES = [
    (Stage.GREETING, "421 4.3.2 shutting down", ProviderUnavailableError, "421 4.3.2"),
    (Stage.GREETING, "450 4.3.2 busy", ProviderUnavailableError, "450 4.3.2"),
    (Stage.GREETING, "554 5.7.1 go away", ProviderUnavailableError, "554 5.7.1"),
    (Stage.GREETING, "hello", ProviderUnavailableError, "connect"),
    (Stage.EHLO, "421 down", ProviderUnavailableError, "421"),
    (Stage.EHLO, "451 4.3.0 later", ProviderUnavailableError, "451 4.3.0"),
    (Stage.MAIL, "421 4.7.0 too many connections", ProviderUnavailableError, "421 4.7.0"),
    (Stage.MAIL, "451 4.7.1 planted later", ProviderRefusedError, "451 4.7.1"),
    (Stage.MAIL, "550 5.7.1 planted sender", ProviderRejectedError, "550 5.7.1"),
    (Stage.MAIL, "530 5.7.0 log in first", ProviderUnavailableError, "530 5.7.0"),
    (Stage.MAIL, "354 what", ProviderUnavailableError, "protocol"),
    (Stage.MAIL, "planted nonsense", ProviderUnavailableError, "protocol"),
    (Stage.RCPT, "421 4.7.0 enough", ProviderUnavailableError, "421 4.7.0"),
    (Stage.RCPT, f"450 4.2.1 <{ADDRESS}> is busy", ProviderRefusedError, "450 4.2.1"),
    (Stage.RCPT, "452 planted, no enhanced code", ProviderRefusedError, "452"),
    (Stage.RCPT, f"550 5.1.1 <{ADDRESS}> unknown", ProviderRejectedError, "550 5.1.1"),
    (Stage.DATA, "421 4.3.2 down", ProviderUnavailableError, "421 4.3.2"),
    (Stage.DATA, "451 4.3.0 planted", ProviderRefusedError, "451 4.3.0"),
    (Stage.DATA, "554 5.5.1 planted", ProviderRejectedError, "554 5.5.1"),
    (Stage.DATA, "250 what", ProviderUnavailableError, "protocol"),
    (Stage.ANSWER, "421 4.3.2 down", ProviderRefusedError, "421 4.3.2"),
    (Stage.ANSWER, f"451 4.7.1 {BODY}", ProviderRefusedError, "451 4.7.1"),
    (Stage.ANSWER, f"554 5.7.1 {BODY}", ProviderRejectedError, "554 5.7.1"),
    (Stage.ANSWER, "354 what", SendUnknownError, "protocol"),
    (Stage.ANSWER, "planted nonsense", SendUnknownError, "protocol"),
]


@pytest.mark.parametrize(("stage", "line", "kind", "code"), REPLIES)
async def test_a_reply_becomes_an_error(  # noqa: PLR0917 - two fixtures, four parameters
    server: SmtpServer, email: EmailChannel, stage: Stage, line: str, kind: type[NotifyError], code: str
) -> None:
    server.on(stage, Reply(line))
    assert is_a(await failure(email), kind, code)
    assert server.messages == []
    await email.send(a_delivery(), a_content())
    assert len(server.messages) == 1
    if code == "protocol":
        assert server.connections == 2  # nobody knows where in the conversation the first one is


BREAKS = [
    (Stage.GREETING, ProviderUnavailableError, "connect"),
    (Stage.EHLO, ProviderUnavailableError, "connect"),
    (Stage.MAIL, ProviderUnavailableError, "connection"),
    (Stage.RCPT, ProviderUnavailableError, "connection"),
    (Stage.DATA, ProviderUnavailableError, "connection"),
    (Stage.ANSWER, SendUnknownError, "connection"),
]


@pytest.mark.parametrize("is_reset", [True, False])
@pytest.mark.parametrize(("stage", "kind", "code"), BREAKS)
async def test_a_lost_connection_is_unknown_only_after_the_final_dot(
    server: SmtpServer, email: EmailChannel, stage: Stage, kind: type[NotifyError], code: str, *, is_reset: bool
) -> None:
    server.on(stage, Drop(is_reset=is_reset))
    assert is_a(await failure(email), kind, code)


async def test_a_large_message_cut_off_before_its_final_dot_was_certainly_not_accepted(server: SmtpServer, email: EmailChannel) -> None:
    server.on(Stage.MESSAGE, Drop())
    large = a_content(text=f"{BODY}\n" * 2_000_000)  # more than the system takes off our hands
    assert is_a(await failure(email, content=large), ProviderUnavailableError, "connection")


async def test_a_small_message_cut_off_while_the_server_reads_it_is_unknown(server: SmtpServer, email: EmailChannel) -> None:
    server.on(Stage.MESSAGE, Drop())
    assert is_a(await failure(email), SendUnknownError, "connection")


async def test_a_large_message_arrives_whole(server: SmtpServer, email: EmailChannel) -> None:
    text = ".\r\n..dots\r\n" * 100_000
    await email.send(a_delivery(), a_content(text=text))
    assert body_of(parsed(server.messages[0].raw), "plain") == text.replace("\r\n", "\n")


SILENCES = [
    (Stage.GREETING, ProviderUnavailableError, "connect"),
    (Stage.EHLO, ProviderUnavailableError, "connect"),
    (Stage.MAIL, ProviderUnavailableError, "timeout"),
    (Stage.RCPT, ProviderUnavailableError, "timeout"),
    (Stage.DATA, ProviderUnavailableError, "timeout"),
    (Stage.ANSWER, SendUnknownError, "timeout"),
]


@pytest.mark.parametrize(("stage", "kind", "code"), SILENCES)
async def test_silence_is_unknown_only_after_the_final_dot(server: SmtpServer, stage: Stage, kind: type[NotifyError], code: str) -> None:
    async with an_email_channel(server, connect_timeout_seconds=0.2, send_timeout_seconds=0.2) as channel:
        server.on(stage, Hold())
        assert is_a(await failure(channel), kind, code)
        await channel.send(a_delivery(), a_content())


async def test_a_slow_server_within_the_time_limit_is_fine(server: SmtpServer, email: EmailChannel) -> None:
    hold = Hold()
    server.on(Stage.ANSWER, hold)
    call = asyncio.ensure_future(email.send(a_delivery(), a_content()))
    await server.wait_until(lambda: Stage.ANSWER in server.reached)
    assert not call.done()
    hold.until.set()
    assert (await call).status is Status.SENT


async def test_nobody_listening_is_unavailable_until_the_server_is_back(server: SmtpServer, email: EmailChannel) -> None:
    await email.send(a_delivery(), a_content())
    await server.stop()
    assert is_a(await failure(email), ProviderUnavailableError, "connect")
    await server.start()
    await email.send(a_delivery(), a_content())


@pytest.mark.parametrize("host", ["no-such-host.invalid", "..", "x" * 80])
async def test_a_host_nobody_knows_is_unavailable(server: SmtpServer, host: str) -> None:
    async with an_email_channel(server, url=f"smtp://{host}:25") as channel:
        assert is_a(await failure(channel), ProviderUnavailableError, "connect")


# --- e-mail: login and TLS -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(secret + signed.public_bytes(serialization.Encoding.PEM))
    return path


def server_side(certificate: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    return context


async def test_a_wrong_password_is_unavailable_and_the_right_one_sends() -> None:
    async with SmtpServer(login=("shop", "p@ss/word")) as server:
        async with an_email_channel(server, url=f"smtp://shop:wrong@127.0.0.1:{server.port}") as channel:
            assert is_a(await failure(channel), ProviderUnavailableError, "535 5.7.8")
        async with an_email_channel(server, url=f"smtp://shop:p%40ss%2Fword@127.0.0.1:{server.port}") as channel:
            await channel.send(a_delivery(), a_content())
        assert len(server.messages) == 1


async def test_a_server_without_login_is_unavailable_to_whom_has_one(server: SmtpServer) -> None:
    async with an_email_channel(server, url=f"smtp://shop:secret@127.0.0.1:{server.port}") as channel:
        assert is_a(await failure(channel), ProviderUnavailableError, "auth")


@pytest.mark.parametrize("scheme", ["smtps", "smtp+starttls"])
async def test_tls_sends_to_a_trusted_server_and_never_to_another(certificate: Path, scheme: str) -> None:
    ours = server_side(certificate)
    at_once, later = (ours, None) if scheme == "smtps" else (None, ours)
    async with SmtpServer(tls=at_once, starttls=later, login=("a", "b")) as server:
        url = f"{scheme}://a:b@127.0.0.1:{server.port}"
        async with an_email_channel(server, url=url) as distrusting:
            assert is_a(await failure(distrusting), ProviderUnavailableError, "tls")
        assert "AUTH" not in server.commands
        trust = ssl.create_default_context(cafile=str(certificate))
        async with an_email_channel(server, url=url, tls_context=trust) as trusting:
            await trusting.send(a_delivery(1), a_content())
            await trusting.send(a_delivery(2), a_content())
        assert len(server.messages) == 2


async def test_starttls_that_is_not_offered_sends_nothing(server: SmtpServer) -> None:
    async with an_email_channel(server, url=f"smtp+starttls://a:b@127.0.0.1:{server.port}") as channel:
        assert is_a(await failure(channel), ProviderUnavailableError, "tls")
    assert server.commands == ["EHLO"]


async def test_starttls_that_is_refused_sends_nothing(certificate: Path) -> None:
    async with SmtpServer(starttls=server_side(certificate)) as server:
        server.on(Stage.STARTTLS, Reply("454 4.7.0 not now"))
        async with an_email_channel(server, url=f"smtp+starttls://a:b@127.0.0.1:{server.port}") as channel:
            assert is_a(await failure(channel), ProviderUnavailableError, "454 4.7.0")
        assert "AUTH" not in server.commands


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:25", "http://127.0.0.1:25", "smtp://", "smtp://h:port", "smtp://u:hunter2@h:99999", "smtp://[::1"]
)
def test_a_malformed_url_is_a_settings_error_without_the_password(url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        build(smtp_provider(url), no_ports(SENDER))
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("sender", ["", "shop", "a b@c", "x@y\r\nBcc: z@y", '"x\ny" <a@b>'])
def test_a_malformed_sender_is_a_settings_error(sender: str) -> None:
    with pytest.raises(SettingsError):
        build(smtp_provider("smtp://127.0.0.1"), no_ports(sender))


# --- e-mail: connections ---------------------------------------------------------------------------------------------


async def test_one_message_after_the_other_goes_over_one_connection(server: SmtpServer, email: EmailChannel) -> None:
    for number in range(20):
        await email.send(a_delivery(number), a_content())
    assert (len(server.messages), server.connections) == (20, 1)


async def test_messages_at_once_share_the_connections_of_the_pool(server: SmtpServer) -> None:
    async with an_email_channel(server, max_open=5) as channel:
        for _ in range(4):
            await asyncio.gather(*(channel.send(a_delivery(number), a_content()) for number in range(channel.max_open)))
    assert len(server.messages) == 20
    assert server.connections == server.most_open_connections == 5


@pytest.mark.parametrize("stage", [Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.ANSWER])
@pytest.mark.parametrize("line", ["451 4.7.1 later", "550 5.7.1 never"])
async def test_a_refusal_keeps_the_connection_and_leaves_nothing_on_it(
    server: SmtpServer, email: EmailChannel, stage: Stage, line: str
) -> None:
    server.on(stage, Reply(line))
    await failure(email, content=a_content(address="refused@flowmart.example"))
    await email.send(a_delivery(), a_content())
    assert server.connections == 1
    assert server.messages[0].recipients == (ADDRESS,)


@pytest.mark.parametrize("action", [Reply("502 5.5.1 what"), Reply("421 4.3.2 down"), Drop()])
async def test_a_connection_that_cannot_be_reset_is_closed_and_the_refusal_stands(
    server: SmtpServer, email: EmailChannel, action: Reply | Drop
) -> None:
    server.on(Stage.RCPT, Reply("451 4.7.1 later"))
    server.on(Stage.RSET, action)
    assert is_a(await failure(email), ProviderRefusedError, "451 4.7.1")
    await email.send(a_delivery(), a_content())
    assert server.connections == 2


async def test_an_idle_connection_that_the_server_cut_is_replaced(server: SmtpServer, email: EmailChannel) -> None:
    await email.send(a_delivery(1), a_content())
    await server.cut()
    await email.send(a_delivery(2), a_content())
    assert (len(server.messages), server.connections) == (2, 2)


@pytest.mark.parametrize("stage", [Stage.MAIL, Stage.RCPT, Stage.DATA])
@pytest.mark.parametrize("action", [Drop(), Drop(is_reset=False), Reply("421 4.4.2 idle for too long")])
async def test_a_reused_connection_found_closed_before_the_message_is_replaced_once(
    server: SmtpServer, email: EmailChannel, stage: Stage, action: Drop | Reply
) -> None:
    await email.send(a_delivery(1), a_content())
    server.on(stage, action)
    await email.send(a_delivery(2), a_content())
    assert (len(server.messages), server.connections) == (2, 2)
    server.on(stage, action, action)
    assert isinstance(await failure(email), ProviderUnavailableError)
    assert server.connections == 3


async def test_a_message_that_left_on_a_reused_connection_is_never_repeated(server: SmtpServer, email: EmailChannel) -> None:
    await email.send(a_delivery(1), a_content())
    server.on(Stage.ANSWER, Drop())
    assert is_a(await failure(email), SendUnknownError, "connection")
    assert server.connections == 1


async def test_a_connection_retires_after_its_messages(server: SmtpServer) -> None:
    async with an_email_channel(server, max_messages=3) as channel:
        for number in range(7):
            await channel.send(a_delivery(number), a_content())
    assert (server.connections, server.most_open_connections <= 2) == (3, True)


async def test_a_connection_retires_at_its_age(server: SmtpServer) -> None:
    async with an_email_channel(server, max_age_seconds=0) as channel:
        for number in range(3):
            await channel.send(a_delivery(number), a_content())
    assert server.connections == 3


async def test_the_server_going_silent_drops_the_idle_connections_too(server: SmtpServer) -> None:
    async with an_email_channel(server, send_timeout_seconds=0.2) as channel:
        await asyncio.gather(*(channel.send(a_delivery(number), a_content()) for number in range(8)))
        assert server.open_connections == 8
        server.on(Stage.MAIL, Hold())
        assert is_a(await failure(channel), ProviderUnavailableError, "timeout")
        await server.wait_until(lambda: server.open_connections <= 1)  # the held session sees the end once it reads again
        await server.cut()


async def test_cancelling_a_call_closes_its_connection(server: SmtpServer, email: EmailChannel) -> None:
    server.on(Stage.RCPT, Hold())
    call = asyncio.ensure_future(email.send(a_delivery(1), a_content()))
    await server.wait_until(lambda: Stage.RCPT in server.reached)
    call.cancel()
    await asyncio.wait([call])
    assert call.cancelled()
    await email.send(a_delivery(2), a_content())
    assert server.connections == 2
    await server.cut()


async def test_closing_says_goodbye_and_leaves_no_connection(server: SmtpServer, email: EmailChannel) -> None:
    await asyncio.gather(*(email.send(a_delivery(number), a_content()) for number in range(8)))
    assert server.open_connections == 8
    await email.close()
    await server.wait_until(lambda: server.open_connections == 0)
    assert server.commands.count("QUIT") == 8
    assert is_a(await failure(email), ProviderUnavailableError, "closed")


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        (Stage.GREETING, ProviderUnavailableError),
        (Stage.MAIL, ProviderUnavailableError),
        (Stage.ANSWER, SendUnknownError),
    ],
)
async def test_closing_cuts_the_calls_that_run(server: SmtpServer, email: EmailChannel, stage: Stage, kind: type[NotifyError]) -> None:
    arrived = Hold()
    server.on(stage, arrived)
    call = asyncio.ensure_future(failure(email))
    await server.wait_until(lambda: stage in server.reached)
    await email.close()
    arrived.until.set()
    assert isinstance(await call, kind)
    await server.wait_until(lambda: server.open_connections == 0)


async def test_closing_while_a_call_connects_sends_nothing(server: SmtpServer, email: EmailChannel) -> None:
    call = asyncio.ensure_future(failure(email))
    await asyncio.wait([call], timeout=0)
    await email.close()
    assert is_a(await call, ProviderUnavailableError, "closed")
    await server.wait_until(lambda: server.open_connections == 0)
    assert "MAIL" not in server.commands


async def test_a_message_above_the_servers_limit_is_rejected_before_it_is_sent() -> None:
    async with SmtpServer(max_bytes=10_000) as server, an_email_channel(server) as channel:
        assert is_a(await failure(channel, content=a_content(text=BODY * 1000)), ProviderRejectedError, "552 5.3.4")
        await channel.send(a_delivery(), a_content())
        assert "DATA" in server.commands
        assert server.connections == 1


# --- e-mail: what is sent --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "",
        "planted",
        "@planted.example",
        "planted@",
        "planted one@x.example",
        "planted@x.example\r\nRCPT TO:<b@x.example>",
        "planted@x.example> SIZE=1",
        "planted@a@b.example",
        '"planted"@x.example',
        "planted\x00@x.example",
        "plänted one@x.example",
        "pl\u200bnted@x.example",
        "pl\x85nted@x.example",
        "plän" * 20 + "@planted.example",
        "planted@x..example",
        "planted@bücher..example",
        "p" * 65 + "@planted.example",
        "planted@" + "x" * 320,
    ],
)
async def test_what_is_no_address_is_rejected_without_a_call(server: SmtpServer, email: EmailChannel, address: str) -> None:
    assert is_a(await failure(email, content=a_content(address=address)), ProviderRejectedError, "address")
    assert server.connections == 0


@pytest.mark.parametrize("field", ["subject", "name"])
@pytest.mark.parametrize("character", ["\r\n", "\n", "\r", "\x00", "\t", "\x1b", "\x7f", "\x85", "\u2028", "\ud800"])
async def test_control_characters_never_reach_a_header(server: SmtpServer, email: EmailChannel, field: str, character: str) -> None:
    content = a_content(**{field: f"planted{character}Bcc: planted@x.example"})
    assert is_a(await failure(email, content=content), ProviderRejectedError, "header")
    assert server.connections == 0


async def test_an_id_that_cannot_stand_in_a_header_is_rejected(email: EmailChannel) -> None:
    delivery = replace(a_delivery(), delivery_id="x>\r\nBcc: planted@x.example")
    assert is_a(await failure(email, delivery), ProviderRejectedError, "header")


async def test_nothing_to_say_is_rejected(email: EmailChannel) -> None:
    assert is_a(await failure(email, content=a_content(text=None, html=None)), ProviderRejectedError, "content")


async def test_every_attempt_has_the_same_message_id_and_each_redrive_its_own(server: SmtpServer, email: EmailChannel) -> None:
    server.on(Stage.ANSWER, Drop())
    await failure(email, a_delivery(7, attempt=1))
    for delivery in (a_delivery(7, attempt=2), a_delivery(7, attempt=3), a_delivery(7, generation=1)):
        await email.send(delivery, a_content())
    ids = [parsed(received.raw)["Message-ID"] for received in server.messages]
    assert ids == [f"<{7:032x}-email.{generation}@shop.example>" for generation in (0, 0, 1)]


async def test_a_message_arrives_as_it_was_written(server: SmtpServer, email: EmailChannel) -> None:
    content = a_content(
        name="Zoë “Ω” Łukasz 山田太郎 the very long-named recipient of this message",
        subject="Zahlung über 12,50 € bestätigt — 支払いが確認されました ✅ and then a good deal more to say about it all",
        text="Grüße,\n.\n..dots\nFrom here\n" + "a long line " * 200 + "\n日本語 ✅\n",
        html='<p style="color:red">Grüße &amp; 日本語 ✅</p>\n.\n' + "<b>x</b>" * 500,
    )
    await email.send(a_delivery(3), content)
    raw = server.messages[0].raw
    message = parsed(raw)
    assert message.defects == []
    assert message["Subject"] == content.subject
    assert name_of(message) == content.name
    assert message["To"].addresses[0].addr_spec == ADDRESS
    assert message["From"].addresses[0].display_name == "FlowMart"
    assert message["From"].addresses[0].addr_spec == "no-reply@shop.example"
    assert message["X-Notify-Delivery"] == a_delivery(3).delivery_id
    assert message["X-Notify-Notification"] == a_delivery(3).notification_id
    assert message["Auto-Submitted"] == "auto-generated"
    assert abs(message["Date"].datetime - dt.datetime.now(dt.UTC)) < dt.timedelta(minutes=1)
    assert message.get_content_type() == "multipart/alternative"
    assert [part.get_content_type() for part in message.iter_parts()] == ["text/plain", "text/html"]
    assert body_of(message, "plain") == content.text
    assert body_of(message, "html") == content.html
    assert raw.isascii()
    assert max(map(len, raw.splitlines())) <= 998
    head = raw.partition(b"\r\n\r\n")[0]
    assert all(len(line) <= 76 for line in head.splitlines() if b"=?" in line)


@pytest.mark.parametrize(("kind", "field"), [("plain", "html"), ("html", "text")])
async def test_text_or_html_alone_is_a_message_too(server: SmtpServer, email: EmailChannel, kind: str, field: str) -> None:
    await email.send(a_delivery(), a_content(**{field: None}))
    message = parsed(server.messages[0].raw)
    assert message.get_content_type() == f"text/{kind}"
    assert BODY in body_of(message, kind)


def composed(content: Content) -> EmailMessage:
    recipient = recipient_address(content.address)
    raw = Letterhead(Mailbox("a@b.example")).compose(a_delivery(), content, recipient=recipient, at=NOW)
    lines = raw.split(b"\r\n")
    assert raw.isascii()
    assert not any(b"\r" in line or b"\n" in line for line in lines)
    assert max(map(len, lines)) <= 998
    assert raw.endswith(b"\r\n")
    message = parsed(raw)
    assert not message.defects
    return message


printable = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=120)
bodies = st.text(st.characters(exclude_categories=["Cs"]), max_size=300).map(lambda text: text.replace("\r", ""))


@given(subject=printable)
@example(subject="=?utf-8?q?x?=")
@example(subject=" leading and trailing ")
@example(subject="x" * 2000)
def test_any_subject_comes_back(subject: str) -> None:
    assert composed(a_content(subject=subject))["Subject"] == subject


@given(name=printable)
@example(name='A "quoted" \\ name, with <everything>; (even) this: @')
@example(name="=?utf-8?q?x?=")
def test_any_name_comes_back_and_never_changes_the_address(name: str) -> None:
    message = composed(a_content(name=name))
    assert name_of(message) == name.strip()
    assert [address.addr_spec for address in message["To"].addresses] == [ADDRESS]


@given(text=bodies, html=bodies)
@example(text="=_x--", html="--=_" + a_delivery().delivery_id)
@example(text="trailing space \n\ttab\t\n", html="x" * 998)
@example(text=".", html="\x00\x0b\x0c\x1c")
@example(text="日本語" * 100, html="=" * 200)
def test_any_body_comes_back(text: str, html: str) -> None:
    message = composed(a_content(text=text, html=html))
    assert (body_of(message, "plain"), body_of(message, "html")) == (text, html)


def test_a_domain_beyond_ascii_goes_out_in_ascii() -> None:
    assert recipient_address("ann@bücher.example") == "ann@xn--bcher-kva.example"


async def test_a_server_that_is_not_ours_understands_the_same() -> None:
    envelopes: list[Envelope] = []

    class Inbox:
        async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: ARG002, N802 - aiosmtpd's
            envelopes.append(envelope)
            return "250 OK"

    listening = await asyncio.get_running_loop().create_server(lambda: SMTP(Inbox()), "127.0.0.1", 0)
    channel = build(smtp_provider(f"smtp://127.0.0.1:{listening.sockets[0].getsockname()[1]}"), no_ports(SENDER))
    await channel.open()
    contents = [a_content(text=f".{number}\n..\n.\nGrüße", subject=f"№ {number}") for number in range(32)]
    await asyncio.gather(*(channel.send(a_delivery(n), content) for n, content in enumerate(contents)))
    await channel.close()
    listening.close()
    messages = [parsed(cast("bytes", envelope.content)) for envelope in envelopes]
    assert {message["Subject"] for message in messages} == {content.subject for content in contents}
    assert {body_of(message, "plain") for message in messages} == {content.text for content in contents}
