"""Against mail servers that are not ours: Postfix queues, retries and bounces; GreenMail shows over IMAP what it understood."""

from __future__ import annotations

import asyncio
import datetime as dt
import imaplib
import ipaddress
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from email import message_from_bytes, policy
from itertools import count
from pathlib import Path

import aiosmtplib
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509.oid import NameOID

from channels.bounces import return_path
from channels.config import smtp_provider
from channels.email import EmailChannel, build
from channels.simulators.script import Script
from channels.simulators.smtp import SmtpSimulator
from schemas.errors import ProviderUnavailableError
from schemas.messages import Content, Delivery, DeliveryReport
from schemas.status import Status, Suppression
from streams.bounces import ASIDE, BounceReader
from streams.embedded.processes import choose_port
from streams.mailbox import Mailbox, parse_mailbox
from streams.metrics import Metrics
from streams.roles import Role
from tests.harness import wait_for
from tests.mail_servers import GreenMail, greenmail, postfix
from tests.ports import RETURN_KEY, no_ports
from tests.smtp_server import Reply, SmtpServer, Stage

SENDER = "FlowMart <no-reply@shop.example>"
BOUNCES = "bounces@bounces.shop.example"
NOW = dt.datetime.now(dt.UTC)
_numbers = count(1)


@pytest.fixture(scope="module")
def keystore(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with server.p12, and ca.pem to trust it by."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - dt.timedelta(hours=1))
        .not_valid_after(NOW + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("greenmail")
    encryption = serialization.BestAvailableEncryption(b"changeit")
    (folder / "server.p12").write_bytes(pkcs12.serialize_key_and_certificates(b"x", key, certificate, None, encryption))
    (folder / "ca.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return folder


@pytest.fixture(scope="module")
def mailboxes(keystore: Path) -> Iterator[GreenMail]:
    with greenmail(keystore / "server.p12", "changeit") as running:
        yield running


@dataclass(frozen=True, slots=True)
class Relay:
    """A running Postfix, and the port of the peer that it hands all mail to, whoever listens there."""

    port: int
    peer_port: int

    def peer(self) -> SmtpServer:
        server = SmtpServer(extensions=("PIPELINING", "SMTPUTF8"))
        server.port = self.peer_port
        return server


@pytest.fixture(scope="module")
def relay() -> Iterator[Relay]:
    peer_port = choose_port()
    aliases = {r"bounces\+.*@bounces\.shop\.example": BOUNCES}
    with postfix(relay_to=peer_port, aliases=aliases) as port:
        yield Relay(port, peer_port)


@pytest.fixture
def mailbox(mailboxes: GreenMail) -> Mailbox:
    """Return a mailbox that nobody used before."""
    return parse_mailbox(
        f"imap://bounces-{(number := next(_numbers))}%40x.example:bounces-{number}%40x.example@127.0.0.1:{mailboxes.imap}?every=1"
    )


def a_delivery() -> Delivery:
    identity = f"{next(_numbers):032x}"
    return Delivery(
        delivery_id=f"{identity}-email",
        notification_id=identity,
        user_id="u-1",
        channel="email",
        lane="normal",
        rule="payment_confirmed",
        category="payments",
        generation=0,
        attempt=1,
        sealed=b"",
        accepted_at=NOW,
        created_at=NOW,
    )


@asynccontextmanager
async def sending_to(port: int) -> AsyncIterator[EmailChannel]:
    config = smtp_provider(f"smtp://127.0.0.1:{port}")
    channel = build(replace(config, options={"bounce_domain": "bounces.shop.example", "hostname": "shop.example"}), no_ports(SENDER))
    await channel.open()
    try:
        yield channel
    finally:
        await channel.close()


async def until(is_so: Callable[[], object], what: str) -> None:
    """Return as soon as `is_so()`; it is asked in a thread, since mailboxes are."""
    await asyncio.to_thread(wait_for, is_so, seconds=30, what=what)


def mails_in(mailbox: Mailbox, folder: str = "INBOX") -> list[bytes]:
    imap = imaplib.IMAP4(mailbox.host, mailbox.port, timeout=10)
    try:
        with suppress(imaplib.IMAP4.error):  # there is no mailbox before its first mail
            imap.login(mailbox.user, mailbox.password)
        if imap.state != "AUTH" or imap.select(folder, readonly=True)[0] != "OK":
            return []
        uids = imap.uid("SEARCH", "ALL")[1][0].split()
        found = [imap.uid("FETCH", uid.decode(), "(BODY.PEEK[])")[1] for uid in uids]
        return [row[1] for rows in found for row in rows if isinstance(row, tuple)]
    finally:
        imap.logout()


class Kafka:
    """Takes reports, and fails on demand."""

    def __init__(self) -> None:
        self.reports: list[DeliveryReport] = []
        self.fails_after: int | None = None

    async def publish(self, report: DeliveryReport) -> None:
        if self.fails_after is not None and len(self.reports) >= self.fails_after:
            raise ProviderUnavailableError("Kafka did not acknowledge", code="kafka")
        self.reports.append(report)


def reading(mailbox: Mailbox, kafka: Kafka, *, is_ours: Callable[[], bool] = lambda: True, metrics: Metrics | None = None) -> BounceReader:
    return BounceReader(
        mailbox,
        domain="shop.example",
        key=RETURN_KEY,
        publish=kafka.publish,
        is_ours=is_ours,
        metrics=metrics or Metrics(Role.SIGNALS),
    )


async def deliver(mailboxes: GreenMail, mailbox: Mailbox, raw: bytes) -> None:
    await aiosmtplib.send(raw, sender="x@x.example", recipients=[mailbox.user], hostname="127.0.0.1", port=mailboxes.smtp, start_tls=False)


async def a_bounce(local: str = "bounce") -> tuple[str, bytes]:
    """Return a reference and the report on it."""
    async with SmtpSimulator() as peer, sending_to(peer.port) as channel:
        delivery = a_delivery()
        await channel.send(delivery, Content(address=f"{local}@x.example", subject="Hello", text="World"))
        await until(lambda: peer.reports, "a report")
        return channel.reference_of(delivery, None), peer.reports[0].raw


# --- GreenMail -------------------------------------------------------------------------------------------------------


async def test_another_server_understands_a_mail_as_it_was_meant(mailboxes: GreenMail) -> None:
    content = Content(
        address="ann@inbox.example",
        name="Zoë “Ω” Łukasz",
        subject="Zahlung über 12,50 € bestätigt — 支払い ✅",
        text="Grüße,\n.\n..dots\n" + "a long line " * 200 + "\n",
        html="<p>Grüße &amp; 日本語 ✅</p>\n" * 40,
    )
    async with sending_to(mailboxes.smtp) as channel:
        delivery = a_delivery()
        await channel.send(delivery, content)
    imap = imaplib.IMAP4("127.0.0.1", mailboxes.imap, timeout=10)
    imap.login(content.address, content.address)
    imap.select()
    (structure,) = imap.fetch("1", "(BODYSTRUCTURE)")[1]
    imap.logout()
    assert isinstance(structure, bytes)
    assert b'"PLAIN"' in structure.upper()
    assert b'"HTML"' in structure.upper()
    assert b'"ALTERNATIVE"' in structure.upper()
    (raw,) = mails_in(parse_mailbox(f"imap://ann%40inbox.example:ann%40inbox.example@127.0.0.1:{mailboxes.imap}"))
    mail = message_from_bytes(raw, policy=policy.default)
    assert mail["Subject"] == content.subject
    assert mail["Message-ID"] == f"<{channel.reference_of(delivery, None)}>"
    assert mail["To"].addresses[0].display_name == content.name
    for kind, told in (("plain", content.text), ("html", content.html)):
        part = mail.get_body((kind,))
        assert part is not None
        assert part.get_content().replace("\r\n", "\n") == told


async def test_a_report_is_published_and_its_mail_removed(mailboxes: GreenMail, mailbox: Mailbox) -> None:
    kafka, metrics = Kafka(), Metrics(Role.SIGNALS)
    bounced, complained = await a_bounce(), await a_bounce("complain")
    for _, raw in (bounced, complained):
        await deliver(mailboxes, mailbox, raw)
    assert await reading(mailbox, kafka, metrics=metrics).look() == 2
    assert [(report.reference, report.status, report.suppresses) for report in kafka.reports] == [
        (bounced[0], Status.BOUNCED, Suppression.HARD_BOUNCE),
        (complained[0], Status.DELIVERED, Suppression.COMPLAINT),
    ]
    assert mails_in(mailbox) == []
    assert metrics.registry.get_sample_value("notify_bounces_total", {"outcome": "reported"}) == 2
    assert await reading(mailbox, kafka).look() == 0


async def test_what_is_not_understood_is_moved_aside_whole(mailboxes: GreenMail, mailbox: Mailbox) -> None:
    kafka, metrics = Kafka(), Metrics(Role.SIGNALS)
    _, report = await a_bounce()
    away = b"Subject: out of office\r\nTo: bounces@x.example\r\n\r\nI am away.\r\n"
    for raw in (away, report, away):
        await deliver(mailboxes, mailbox, raw)
    assert await reading(mailbox, kafka, metrics=metrics).look() == 3
    assert len(kafka.reports) == 1
    assert mails_in(mailbox) == []
    kept = mails_in(mailbox, ASIDE)
    assert len(kept) == 2
    assert all(b"I am away." in raw for raw in kept)
    assert metrics.registry.get_sample_value("notify_bounces_total", {"outcome": "not_understood"}) == 2


async def test_a_report_that_kafka_does_not_take_stays_in_the_mailbox(mailboxes: GreenMail, mailbox: Mailbox) -> None:
    kafka = Kafka()
    reports = [await a_bounce() for _ in range(3)]
    for _, raw in reports:
        await deliver(mailboxes, mailbox, raw)
    kafka.fails_after = 1
    with pytest.raises(ProviderUnavailableError):
        await reading(mailbox, kafka).look()
    assert len(mails_in(mailbox)) == 2
    kafka.fails_after = None
    await reading(mailbox, kafka).look()
    assert [report.reference for report in kafka.reports] == [reference for reference, _ in reports]
    assert mails_in(mailbox) == []


async def test_only_the_worker_whose_turn_it_is_reads(mailboxes: GreenMail, mailbox: Mailbox) -> None:
    kafka, is_ours = Kafka(), False
    _, raw = await a_bounce()
    await deliver(mailboxes, mailbox, raw)
    running = asyncio.ensure_future(reading(mailbox, kafka, is_ours=lambda: is_ours).run())
    await asyncio.wait([running], timeout=0.3)
    assert (kafka.reports, len(mails_in(mailbox))) == ([], 1)
    is_ours = True
    await until(lambda: kafka.reports, "the report")
    running.cancel()
    await asyncio.wait([running])


async def test_a_mailbox_that_does_not_answer_is_asked_again(
    mailboxes: GreenMail, mailbox: Mailbox, caplog: pytest.LogCaptureFixture
) -> None:
    kafka = Kafka()
    _, raw = await a_bounce()
    await deliver(mailboxes, mailbox, raw)
    reader = reading(replace(mailbox, port=1), kafka)
    running = asyncio.ensure_future(reader.run())
    await until(lambda: "bounces.unavailable" in caplog.text, "a warning")
    reader._mailbox = mailbox
    await until(lambda: kafka.reports, "the report")
    running.cancel()
    await asyncio.wait([running])
    assert mailbox.user not in caplog.text


async def test_tls_reads_a_trusted_mailbox_and_no_other(mailboxes: GreenMail, mailbox: Mailbox, keystore: Path) -> None:
    kafka = Kafka()
    _, raw = await a_bounce()
    await deliver(mailboxes, mailbox, raw)
    secure = replace(mailbox, scheme="imaps", port=mailboxes.imaps)
    with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
        await reading(secure, kafka).look()
    assert await reading(replace(secure, ca_file=keystore / "ca.pem"), kafka).look() == 1
    with pytest.raises(imaplib.IMAP4.error):  # it offers no STARTTLS
        await reading(replace(mailbox, scheme="imap+starttls"), kafka).look()


# --- Postfix ---------------------------------------------------------------------------------------------------------


async def test_postfix_queues_what_its_peer_refuses_and_delivers_it_later(relay: Relay) -> None:
    async with relay.peer() as peer, sending_to(relay.port) as channel:
        peer.on(Stage.RCPT, Reply("451 4.7.1 greylisted"))
        delivery = a_delivery()
        receipt = await channel.send(delivery, Content(address="ann@far.example", subject="Hello", text="World"))
        assert receipt.status is Status.SENT
        assert receipt.reference
        await until(lambda: peer.messages, "the mail delivered")
        assert peer.commands.count("RCPT") == 2
        (message,) = peer.messages
        assert message.sender == return_path(channel.reference_of(delivery, None), domain="bounces.shop.example", key=RETURN_KEY)
        assert f"Message-ID: <{channel.reference_of(delivery, None)}>".encode() in message.raw


async def test_a_bounce_of_postfix_is_read_from_the_mailbox_as_its_delivery(relay: Relay, mailboxes: GreenMail, mailbox: Mailbox) -> None:
    kafka = Kafka()
    found = []
    async with relay.peer() as peer, sending_to(relay.port) as channel:
        peer.on(Stage.RCPT, Reply("550 5.1.1 no such user"))
        for number, address in enumerate(("nobody@far.example", "ann@far.example"), 1):
            delivery = a_delivery()
            await channel.send(delivery, Content(address=address, subject="Hello", text="World"))
            found.append(channel.reference_of(delivery, None))
            await until(lambda: len(peer.messages) == number, "the bounce")  # noqa: B023 - awaited here
            bounce = peer.messages[-1]
            assert (bounce.sender, bounce.recipients) == ("", (BOUNCES,))
            # GreenMail refuses the empty sender of a bounce, so it is put into the mailbox for Postfix
            await deliver(mailboxes, mailbox, bounce.raw)
            peer.on(Stage.RCPT, Reply("550 5.7.1 by policy"))
    assert await reading(mailbox, kafka).look() == 2
    assert [(report.reference, report.status, report.code, report.suppresses) for report in kafka.reports] == [
        (found[0], Status.BOUNCED, "5.1.1", Suppression.HARD_BOUNCE),
        (found[1], Status.BOUNCED, "5.7.1", None),
    ]


async def test_postfix_takes_an_address_beyond_ascii(relay: Relay) -> None:
    async with relay.peer() as peer, sending_to(relay.port) as channel:
        await channel.send(a_delivery(), Content(address="pelé@far.example", name="Pelé", subject="Olá", text="World"))
        await until(lambda: peer.messages, "the mail delivered")
        assert peer.messages[0].recipients == ("pelé@far.example",)


async def test_postfix_gets_along_with_the_simulator(relay: Relay) -> None:
    async with SmtpSimulator(script=Script(latency=0.05), port=relay.peer_port) as peer, sending_to(relay.port) as channel:
        sent = [a_delivery() for _ in range(20)]
        contents = (Content(address=f"a{number}@far.example", subject="Hi", text="x") for number in range(20))
        await asyncio.gather(*map(channel.send, sent, contents))
        await until(lambda: len(peer.messages) == len(sent), "all delivered")
        assert {message.id for message in peer.messages} == {channel.reference_of(each, None) for each in sent}
