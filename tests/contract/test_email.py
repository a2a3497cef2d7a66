"""E-mail against its simulator: what is configured, signed and asked of a server, what each reply means, what comes back."""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import hashlib
import re
import ssl
from contextlib import asynccontextmanager
from dataclasses import replace
from email import message_from_bytes, policy
from pathlib import Path
from typing import TYPE_CHECKING

import aiosmtplib
import dkim
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from dkim.canonicalization import Relaxed

from channels.bounces import read_reports, return_path
from channels.config import Ports, ProviderConfig, parse_providers, parse_providers_file, smtp_provider
from channels.dkim import Signer
from channels.email import EmailChannel, build
from channels.mime import Letterhead, parse_sender
from channels.simulators.script import Script
from channels.simulators.smtp import SmtpSimulator
from channels.smtp import Means, Reply, Stage, meaning
from schemas.errors import (
    NotifyError,
    ProviderRefusedError,
    ProviderRejectedError,
    ProviderThrottledError,
    ProviderUnavailableError,
    SendUnknownError,
    SettingsError,
)
from schemas.status import Status, Suppression
from tests.calling import is_a
from tests.contract.test_channels import a_content, a_delivery, certificate, failure, server_side
from tests.ports import RETURN_KEY, no_ports
from tests.smtp_server import Drop, SmtpServer
from tests.smtp_server import Reply as Say
from tests.smtp_server import Stage as Moment

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from email.message import EmailMessage

    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

__all__ = ["certificate"]  # a fixture

SENDER = "FlowMart <no-reply@shop.example>"
CLICK = "https://shop.example/unsubscribe?token=" + "t" * 120


def one_provider(url: str, options: str = "", env: dict[str, str] | None = None) -> ProviderConfig:
    (config,) = parse_providers(url + ("?" + options if options else ""), env or {})
    return config


@asynccontextmanager
async def opened(config: ProviderConfig, ports: Ports | None = None) -> AsyncIterator[EmailChannel]:
    channel = build(config, ports or no_ports(SENDER))
    await channel.open()
    try:
        yield channel
    finally:
        await channel.close()


@pytest.fixture
async def peer() -> AsyncIterator[SmtpSimulator]:
    async with SmtpSimulator() as started:
        yield started


@pytest.fixture
async def email(peer: SmtpSimulator) -> AsyncIterator[EmailChannel]:
    async with opened(one_provider(peer.url, "bounce_domain=bounces.shop.example")) as channel:
        yield channel


def parsed(raw: bytes) -> EmailMessage:
    return message_from_bytes(raw, policy=policy.default)


# --- what each reply means -------------------------------------------------------------------------------------------

MEANINGS = [
    ("421 4.7.0 too many connections", Stage.RCPT, Means.UNAVAILABLE),
    ("421 4.3.2 down", Stage.ANSWER, Means.REFUSED),
    ("530 5.7.0 log in first", Stage.MAIL, Means.UNAVAILABLE),
    ("535 5.7.8 the password expired", Stage.MAIL, Means.UNAVAILABLE),
    ("450 4.2.1 greylisted", Stage.RCPT, Means.REFUSED),
    ("451 4.7.1 greylisted", Stage.RCPT, Means.REFUSED),
    ("451 4.7.1 later", Stage.ANSWER, Means.REFUSED),
    ("450 4.2.2 full", Stage.RCPT, Means.REFUSED),
    ("452 4.3.1 disk full", Stage.MAIL, Means.THROTTLED),
    ("452 no more", Stage.RCPT, Means.REFUSED),
    ("454 Throttling failure: Maximum sending rate exceeded.", Stage.DATA, Means.THROTTLED),
    ("421 4.7.28 unusual rate", Stage.ANSWER, Means.REFUSED),
    ("450 4.7.28 unusual rate", Stage.ANSWER, Means.THROTTLED),
    ("550 5.1.1 unknown", Stage.RCPT, Means.DEAD),
    ("550 5.1.1 unknown", Stage.ANSWER, Means.DEAD),
    ("550 5.1.1 unknown", Stage.MAIL, Means.REJECTED),
    ("556 5.1.10 null MX", Stage.RCPT, Means.DEAD),
    ("550 5.2.1 closed", Stage.RCPT, Means.DEAD),
    ("552 5.2.2 full", Stage.RCPT, Means.REFUSED),
    ("552 5.3.4 too large", Stage.MAIL, Means.REJECTED),
    ("550 no", Stage.RCPT, Means.REJECTED),
    ("550 5.7.1 policy", Stage.RCPT, Means.REJECTED),
    ("554 5.7.1 spam", Stage.ANSWER, Means.REJECTED),
    ("554 5.6.0 content", Stage.ANSWER, Means.REJECTED),
    ("550 5.1.11 not the same as 5.1.1", Stage.RCPT, Means.REJECTED),
    ("354 what", Stage.MAIL, Means.NONSENSE),
    ("250 what", Stage.DATA, Means.NONSENSE),
]


@pytest.mark.parametrize(("line", "stage", "means"), MEANINGS)
def test_a_reply_means(line: str, stage: Stage, means: Means) -> None:
    assert meaning(Reply(int(line[:3]), line[4:]), stage) is means


async def test_only_a_dead_mailbox_suppresses_its_address() -> None:
    async with SmtpServer(extensions=("PIPELINING",)) as server, opened(smtp_provider(f"smtp://127.0.0.1:{server.port}")) as channel:
        for line, suppresses in (("550 5.1.1 unknown", Suppression.HARD_BOUNCE), ("550 5.7.1 policy", None), ("550 no", None)):
            server.on(Moment.RCPT, Say(line))
            error = await failure(channel)
            assert isinstance(error, ProviderRejectedError)
            assert error.suppresses is suppresses
        server.on(Moment.RCPT, Say("454 Throttling failure: Maximum sending rate exceeded."))
        assert is_a(await failure(channel), ProviderThrottledError, "454")
        assert server.connections == 1


# --- the conversation ------------------------------------------------------------------------------------------------


async def test_the_envelope_leaves_in_one_write_where_the_server_pipelines() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 hello\r\n")
        await reader.readline()
        writer.write(b"250-hello\r\n250 PIPELINING\r\n")
        commands = [await reader.readline() for _ in range(3)]  # nothing is answered until all three are here
        assert [command[:4] for command in commands] == [b"MAIL", b"RCPT", b"DATA"]
        writer.write(b"250 ok\r\n250 ok\r\n354 go on\r\n")
        await reader.readuntil(b"\r\n.\r\n")
        writer.write(b"250 taken\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, opened(smtp_provider(f"smtp://127.0.0.1:{server.sockets[0].getsockname()[1]}")) as channel:
        assert (await channel.send(a_delivery(), a_content())).status is Status.SENT


async def test_a_server_that_wants_a_message_to_nobody_gets_an_empty_one() -> None:
    async with SmtpServer(extensions=("PIPELINING",)) as server, opened(smtp_provider(f"smtp://127.0.0.1:{server.port}")) as channel:
        server.on(Moment.RCPT, Say("550 5.1.1 unknown"))
        server.on(Moment.NOBODY, Say("354 go ahead"))
        assert is_a(await failure(channel), ProviderRejectedError, "550 5.1.1")
        await channel.send(a_delivery(), a_content())
        assert (len(server.messages), server.connections) == (1, 1)


async def test_a_refusal_stands_though_the_connection_breaks_after_it() -> None:
    async with SmtpServer(extensions=("PIPELINING",)) as server, opened(smtp_provider(f"smtp://127.0.0.1:{server.port}")) as channel:
        await channel.send(a_delivery(1), a_content())
        server.on(Moment.RCPT, Say("550 5.1.1 unknown"))
        server.on(Moment.NOBODY, Drop(is_reset=False))
        assert is_a(await failure(channel), ProviderRejectedError, "550 5.1.1")
        await channel.send(a_delivery(2), a_content())


async def test_a_server_that_says_goodbye_to_an_idle_connection_costs_nothing() -> None:
    async with SmtpServer() as server, opened(smtp_provider(f"smtp://127.0.0.1:{server.port}")) as channel:
        await channel.send(a_delivery(1), a_content())
        await server.say("421 4.4.2 idle for too long")
        await channel.send(a_delivery(2), a_content())
        assert (len(server.messages), server.connections) == (2, 2)
        assert server.commands.count("MAIL") == 2


async def test_an_address_beyond_ascii_goes_where_it_is_taken(peer: SmtpSimulator, email: EmailChannel) -> None:
    content = a_content(address="pelé@bücher.example", name="Pelé")
    await email.send(a_delivery(), content)
    (message,) = peer.messages
    assert message.recipients == ("pelé@xn--bcher-kva.example",)
    assert "\r\n <pelé@xn--bcher-kva.example>\r\n".encode() in message.raw  # RFC 6532
    async with SmtpSimulator(is_utf8=False) as older, opened(smtp_provider(older.url)) as channel:
        assert is_a(await failure(channel, content=replace(content, address="plänted@x.example")), ProviderRejectedError, "address")
        await channel.send(a_delivery(), a_content())
        assert older.connections == 1


async def test_the_envelope_names_the_delivery_for_whoever_sends_it_back(peer: SmtpSimulator, email: EmailChannel) -> None:
    delivery = a_delivery(7, generation=2)
    await email.send(delivery, a_content())
    (message,) = peer.messages
    reference = email.reference_of(delivery, None)
    assert message.sender == return_path(reference, domain="bounces.shop.example", key=RETURN_KEY)
    assert message.sender.startswith(f"bounces+{delivery.delivery_id}.2.")
    assert message.envelope_id == message.id == reference


async def test_without_a_bounce_domain_bounces_go_to_the_sender(peer: SmtpSimulator) -> None:
    async with opened(smtp_provider(peer.url)) as channel:
        await channel.send(a_delivery(), a_content())
    assert peer.messages[0].sender == "no-reply@shop.example"


async def test_every_provider_sends_a_delivery_under_the_same_message_id(peer: SmtpSimulator) -> None:
    for options in ("name=a", "name=b&from=Other%20%3Cshop@other.example%3E&bounce_domain=b.other.example"):
        async with opened(one_provider(peer.url, options)) as channel:
            await channel.send(a_delivery(), a_content())
    first, second = (parsed(message.raw) for message in peer.messages)
    assert first["Message-ID"] == second["Message-ID"]
    assert second["From"].addresses[0].addr_spec == "shop@other.example"


def test_a_delivery_id_that_is_too_long_for_an_address_has_no_return_path_of_its_own() -> None:
    longest = return_path("x" * 45 + "@shop.example", domain="b.example", key=RETURN_KEY)
    assert longest is not None
    assert len(longest.partition("@")[0]) == 64  # RFC 5321 section 4.5.3.1.1
    assert return_path("x" * 46 + "@shop.example", domain="b.example", key=RETURN_KEY) is None


# --- login -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auth", ["", "auth=plain", "auth=login"])
async def test_a_password_logs_in(auth: str) -> None:
    async with SmtpSimulator(login=("shop", "p@ss word")) as peer:
        async with opened(one_provider(peer.url, auth)) as channel:
            await channel.send(a_delivery(), a_content())
        wrong = peer.url.replace("p%40ss", "wrong")
        async with opened(one_provider(wrong, auth)) as channel:
            assert is_a(await failure(channel), ProviderUnavailableError, "535 5.7.8")
        assert len(peer.messages) == 1


async def test_an_access_token_logs_in_and_is_read_anew_for_each_login(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("old\n")
    async with SmtpSimulator(token="new") as peer:
        config = one_provider(f"smtp://shop@127.0.0.1:{peer.port}", f"auth=xoauth2&token_file={file}")
        async with opened(config) as channel:
            assert is_a(await failure(channel), ProviderUnavailableError, "535 5.7.8")
            file.write_text("new\n")
            await channel.send(a_delivery(), a_content())
            file.unlink()
            await channel.send(a_delivery(), a_content())
        async with opened(config) as channel:
            assert is_a(await failure(channel), ProviderUnavailableError, "auth")
        assert len(peer.messages) == 2


@pytest.mark.parametrize("is_at_once", [True, False])
async def test_tls_trusts_the_authority_that_is_configured(certificate: Path, *, is_at_once: bool) -> None:
    context = server_side(certificate)
    at_once, later = (context, None) if is_at_once else (None, context)
    async with SmtpSimulator(login=("a", "b"), tls=at_once, starttls=later) as peer:
        async with opened(smtp_provider(peer.url)) as distrusting:
            assert is_a(await failure(distrusting), ProviderUnavailableError, "tls")
        async with opened(one_provider(peer.url, f"ca_file={certificate}")) as channel:
            await asyncio.gather(*(channel.send(a_delivery(n), a_content()) for n in range(8)))
        assert len(peer.messages) == 8


async def test_a_ca_file_that_is_none_is_said_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="provider smtps: ca_file cannot be loaded"):
        await build(one_provider("smtps://127.0.0.1", f"ca_file={tmp_path}/none.pem"), no_ports(SENDER)).open()


# --- what is signed --------------------------------------------------------------------------------------------------


def pem(key: PrivateKeyTypes) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


@pytest.fixture(scope="module")
def rsa_key() -> bytes:
    return pem(rsa.generate_private_key(65_537, 2_048))


def verifies(raw: bytes, signer: Signer) -> bool:
    def lookup(name: bytes, timeout: int = 5) -> bytes:
        assert name == b"s1._domainkey.shop.example."
        return signer.record.encode()

    return bool(dkim.verify(raw, dnsfunc=lookup))


BODIES = [
    {},
    {"text": "no html", "html": None},
    {"text": "spaces  and\ttabs \n \n\n\n", "html": "<p>  x  </p>   \n\n"},
    {"text": ".\n..dots\n", "html": "<p>日本語 ✅</p>" * 50},
    {"text": "", "html": None},
    {"text": "\n\n\n", "html": None},
    {"name": "Zoë the very long-named recipient of this message, and then some", "subject": "Zahlung über 12,50 € — " * 9},
    {"subject": "inner   spaces"},
]


@pytest.mark.parametrize("changes", BODIES)
async def test_a_signature_verifies_as_it_arrives(rsa_key: bytes, peer: SmtpSimulator, changes: dict[str, str | None]) -> None:
    signer = Signer("shop.example", "s1", rsa_key)
    config = one_provider(peer.url, "dkim_domain=shop.example&dkim_selector=s1&dkim_key=$KEY", {"KEY": rsa_key.decode()})
    async with opened(config, no_ports(SENDER, unsubscribe_url=lambda _delivery, _address: CLICK)) as channel:
        await channel.send(a_delivery(), a_content(**changes))
    (message,) = peer.messages
    assert verifies(message.raw, signer)
    for altered in (
        message.raw.replace(b"From: ", b"From: x", 1),
        message.raw.replace(b"unsubscribe?", b"unsubscribe/?", 1),
        message.raw.replace(b"One-Click", b"Two-Click", 1),
        message.raw.replace(b"MIME-Version", b"Subject: another\r\nMIME-Version", 1),
        message.raw + b"more\r\n",
    ):
        assert altered != message.raw
        assert not verifies(altered, signer)


def test_an_ed25519_signature_is_one_of_rfc_8463() -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    signer = Signer("shop.example", "s1", pem(key))
    raw = Letterhead(parse_sender(SENDER), signer=signer).compose(
        a_delivery(), a_content(), recipient="a@b.example", at=dt.datetime.now(dt.UTC)
    )
    # dkimpy verifies these with a library of its own only, so its canonical form is hashed here
    head, _, body = raw.partition(b"\r\n\r\n")
    headers = [tuple(line.split(b":", 1)) for line in re.split(rb"\r\n(?![ \t])", head)]
    fields = dict(re.findall(r"(\w+)=([^;]*)", re.sub(r"\s", "", headers[0][1].decode())))
    assert fields["a"] == "ed25519-sha256"
    assert base64.b64encode(hashlib.sha256(Relaxed.canonicalize_body(body)).digest()).decode() == fields["bh"]
    canonical = Relaxed.canonicalize_headers(headers)
    by_name: dict[bytes, bytes] = dict(canonical)
    told = b"".join(name.encode() + b":" + by_name[name.encode()] for name in dict.fromkeys(fields["h"].split(":")))
    unsigned = re.sub(rb"b=[^;=]+=*\s*$", b"b=", by_name[b"dkim-signature"])
    signature = base64.b64decode(fields["b"])
    key.public_key().verify(signature, hashlib.sha256(told + b"dkim-signature:" + unsigned).digest())
    assert signer.record.startswith("v=DKIM1; k=ed25519; p=")


async def test_one_click_ends_such_mails(peer: SmtpSimulator) -> None:
    asked: list[tuple[str, str]] = []

    def page(delivery: object, address: str) -> str | None:
        asked.append((str(getattr(delivery, "category", "")), address))
        return CLICK

    async with opened(smtp_provider(peer.url), no_ports(SENDER, unsubscribe_url=page)) as channel:
        await channel.send(a_delivery(), a_content())
    message = parsed(peer.messages[0].raw)
    assert message["List-Unsubscribe"] == f"<{CLICK}>"
    assert message["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    assert asked == [("payments", a_content().address)]


async def test_mails_that_cannot_be_left_say_nothing_of_it(peer: SmtpSimulator, email: EmailChannel) -> None:
    await email.send(a_delivery(), a_content())
    assert "List-Unsubscribe" not in parsed(peer.messages[0].raw)


@pytest.mark.parametrize("url", ["https://x.example/\r\nBcc: a", "mailto:a@b.example", "https://x.example/<>", "https://x/" + "y" * 1000])
async def test_a_page_that_cannot_stand_in_a_header_stops_the_mail(peer: SmtpSimulator, url: str) -> None:
    async with opened(smtp_provider(peer.url), no_ports(SENDER, unsubscribe_url=lambda _delivery, _address: url)) as channel:
        assert is_a(await failure(channel), ProviderRejectedError, "header")


# --- configuration ---------------------------------------------------------------------------------------------------

WRONG = [
    ("smtp://h", "colour=red", "colour is not an option"),
    ("smtp://h", "from=nobody", "from is wrong"),
    ("smtp://h", "bounce_domain=a..b", "bounce_domain is not a domain"),
    ("smtp://h", "dkim_domain=shop.example", "dkim_selector is missing"),
    ("smtp://h", "dkim_domain=shop.example&dkim_selector=s1&dkim_key=/no/such/file", "dkim_key cannot be read"),
    ("smtp://h", "dkim_domain=shop.example&dkim_selector=s1&dkim_key=$KEY", "not a private key in PEM"),
    ("smtp://h", "dkim_domain=shop.example&dkim_selector=a%20b&dkim_key=$KEY", "selector is not a word"),
    ("smtp://u@h", "auth=ntlm", "auth is none of"),
    ("smtp://u@h", "auth=xoauth2", "xoauth2 a token_file"),
    ("smtp://h", "auth=plain", "auth needs a user"),
    ("smtp://h", "ca_file=/x", "ca_file is for smtps"),
    ("smtps://h", "hostname=a%20b", "hostname holds more"),
    ("smtp:///", "", "its url has no host"),
]


@pytest.mark.parametrize(("url", "options", "problem"), WRONG)
def test_what_is_configured_wrongly_is_said_without_the_secret(url: str, options: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(problem)) as caught:
        build(one_provider(url, options, {"KEY": "-----BEGIN hunter2"}), no_ports(SENDER))
    assert str(caught.value).startswith("provider smtp")
    assert "hunter2" not in str(caught.value)


def test_a_file_of_providers_configures_the_same(tmp_path: Path, rsa_key: bytes) -> None:
    key = tmp_path / "dkim.pem"
    key.write_bytes(rsa_key)
    text = f"""
    [providers.relay]
    url = "smtp+starttls://relay.example"
    bounce_domain = "bounces.shop.example"
    dkim_domain = "shop.example"
    dkim_selector = "s1"
    dkim_key = "{key}"
    """
    (config,) = parse_providers_file(text, {})
    channel = build(config, no_ports(SENDER, max_open=7))
    assert (channel.provider, channel.reported_as, channel.max_open) == ("relay", "email", 7)
    assert "BEGIN" not in repr(config)


# --- the simulator ---------------------------------------------------------------------------------------------------

BEHAVIOURS: list[tuple[str, type[NotifyError], str, bool]] = [
    ("refuse", ProviderRefusedError, "450 4.2.1", False),
    ("reject", ProviderRejectedError, "550 5.7.1", False),
    ("throttle", ProviderThrottledError, "454 4.7.0", False),
    ("unavailable", ProviderUnavailableError, "421 4.3.2", False),
    ("reset_before", ProviderUnavailableError, "connection", False),
    ("reset_after", SendUnknownError, "connection", True),
    ("garbage", SendUnknownError, "protocol", True),
]


@pytest.mark.parametrize("is_pipelining", [True, False])
@pytest.mark.parametrize(("name", "kind", "code", "is_taken"), BEHAVIOURS)
async def test_a_script_makes_the_server_fail(
    name: str, kind: type[NotifyError], code: str, *, is_taken: bool, is_pipelining: bool
) -> None:
    async with SmtpSimulator(is_pipelining=is_pipelining) as peer, opened(smtp_provider(peer.url)) as channel:
        await channel.send(a_delivery(1), a_content())
        peer.script = Script(**{name: 1.0})
        assert is_a(await failure(channel, a_delivery(2)), kind, code)
        assert (len(peer.messages) == 2) is is_taken
        peer.script = Script()
        await channel.send(a_delivery(3), a_content())
        assert peer.messages[-1].id.startswith(a_delivery(3).delivery_id)


async def test_magic_recipients_fail_whatever_the_script_says(peer: SmtpSimulator, email: EmailChannel) -> None:
    for local, kind in (("refuse", ProviderRefusedError), ("throttle", ProviderThrottledError)):
        with pytest.raises(kind):
            await email.send(a_delivery(), a_content(address=f"{local}@x.example"))
    peer.script = Script(reject=1.0)
    await email.send(a_delivery(), a_content(address="deliver@x.example"))


async def test_a_silent_server_is_unknown(peer: SmtpSimulator) -> None:
    channel = build(smtp_provider(peer.url), no_ports(SENDER))
    channel._send_timeout_seconds = 0.2
    await channel.open()
    assert is_a(await failure(channel, content=a_content(address="timeout@x.example")), SendUnknownError, "timeout")
    await channel.close()


async def test_a_quota_is_kept_by_throttling(peer: SmtpSimulator, email: EmailChannel) -> None:
    peer.script = Script(per_second=3)
    ends = await asyncio.gather(*(email.send(a_delivery(n), a_content()) for n in range(8)), return_exceptions=True)
    assert [type(end) for end in ends].count(ProviderThrottledError) == 5
    assert (len(peer.messages), len(peer.calls)) == (3, 8)


async def test_a_slow_server_answers_in_the_end(peer: SmtpSimulator, email: EmailChannel) -> None:
    peer.script = Script(latency=0.05)
    began = asyncio.get_running_loop().time()
    await asyncio.gather(*(email.send(a_delivery(n), a_content()) for n in range(4)))
    assert asyncio.get_running_loop().time() - began >= 0.05


async def reports(peer: SmtpSimulator, count: int) -> None:
    async with asyncio.timeout(5):
        while len(peer.reports) < count:
            await asyncio.wait(peer.tasks)


async def test_what_bounces_comes_back_to_its_return_path_and_is_read_as_the_delivery(peer: SmtpSimulator, email: EmailChannel) -> None:
    cases = [("bounce", Status.BOUNCED, "5.1.1", Suppression.HARD_BOUNCE), ("complain", Status.DELIVERED, "abuse", Suppression.COMPLAINT)]
    for number, (local, status, code, suppresses) in enumerate(cases):
        delivery = a_delivery(number)
        await email.send(delivery, a_content(address=f"{local}@x.example"))
        await reports(peer, number + 1)
        back = peer.reports[-1]
        assert back.recipient == peer.messages[-1].sender
        (report,) = read_reports(back.raw, domain="shop.example", key=RETURN_KEY, at=dt.datetime.now(dt.UTC))
        assert (report.provider, report.reference) == (email.reported_as, email.reference_of(delivery, None))
        assert (report.status, report.code, report.suppresses) == (status, code, suppresses)


async def test_reports_are_lost_and_doubled_as_the_script_says(peer: SmtpSimulator, email: EmailChannel) -> None:
    peer.script = Script(bounce=1.0, receipts_doubled=1.0)
    await email.send(a_delivery(1), a_content())
    await reports(peer, 2)
    peer.script = Script(bounce=1.0, receipts_lost=1.0)
    await email.send(a_delivery(2), a_content())
    assert (len(peer.messages), len(peer.tasks)) == (2, 0)
    first, second = peer.reports
    assert first == second


STRICT = [
    ("MAIL FROM:<a@b.example>", "503"),
    ("EHLO ", "501"),
    ("HELO x\r\nRCPT TO:<a@b.example>", "503"),
    ("EHLO x|MAIL FROM:a@b.example", "501"),
    ("EHLO x|MAIL FROM:<a@b.example> COLOUR=red", "555"),
    ("EHLO x|MAIL FROM:<ä@b.example>", "553"),
    ("EHLO x|MAIL FROM:<a@b.example>|RCPT TO:<nobody>", "501"),
    ("EHLO x|MAIL FROM:<a@b.example>|DATA", "554"),
    ("EHLO x|MAIL FROM:<a@b.example>|MAIL FROM:<a@b.example>", "503"),
    ("EHLO x|MAIL FROM:<a@b.example> SIZE=999999999", "552"),
    ("EHLO x|MAIL FROM:<a@b.example>|RCPT TO:<a@b.example>|DATA|bare\nline\r\n.", "550"),
    ("EHLO x|MAIL FROM:<a@b.example>|RCPT TO:<a@b.example>|DATA|Grüße\r\n.", "554"),
    ("EHLO x|AUTH PLAIN AGEAYg==", "504"),
    ("EHLO x|STARTTLS", "502"),
    ("NOOP\r\nNOOP", "503"),
    ("DATA\r\nmore", "503"),
    ("x" * 3000, "500"),
    ("NOOP\nNOOP", "500"),
]


@pytest.mark.parametrize(("script", "code"), STRICT)
async def test_the_simulator_refuses_what_a_real_server_refuses(peer: SmtpSimulator, script: str, code: str) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", peer.port)
    await reader.readline()
    async with asyncio.timeout(5):
        for line in script.split("|"):
            writer.write(line.encode() + b"\r\n")
            answer = await reader.readline()
            while answer[3:4] == b"-":
                answer = await reader.readline()
    writer.close()
    assert answer.decode()[:3] == code
    assert not peer.messages


async def test_another_client_gets_along_with_the_simulator(certificate: Path) -> None:
    async with SmtpSimulator(login=("a", "b"), starttls=server_side(certificate)) as peer:
        trust = ssl.create_default_context(cafile=str(certificate))
        await aiosmtplib.send(
            b"Subject: x\r\nMessage-ID: <1@x>\r\n\r\n.\r\n..\r\n",
            sender="a@b.example",
            recipients=["c@d.example", "e@f.example"],
            hostname="127.0.0.1",
            port=peer.port,
            username="a",
            password="b",
            start_tls=True,
            tls_context=trust,
        )
    (message,) = peer.messages
    assert (message.id, message.recipients) == ("1@x", ("c@d.example", "e@f.example"))
    assert message.raw == b"Subject: x\r\nMessage-ID: <1@x>\r\n\r\n.\r\n..\r\n"


def test_the_dns_has_our_key_or_another(rsa_key: bytes) -> None:
    signer = Signer("shop.example", "s1", rsa_key)
    assert signer.name == "s1._domainkey.shop.example"
    assert signer.is_published(signer.record)
    assert signer.is_published(signer.record.replace("k=rsa; ", "t=s; ").replace("; ", " ;  "))
    assert not signer.is_published(signer.record[:-8])
    assert not signer.is_published("v=spf1 -all")
    assert not signer.is_published("v=DKIM1; p=")  # revoked
