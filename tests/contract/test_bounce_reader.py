"""The reader of bounces against a server that does less than GreenMail: no folders, access tokens instead of passwords."""

from __future__ import annotations

import asyncio
import base64
import imaplib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from channels.bounces import return_path
from channels.simulators.smtp import Message, bounce
from schemas.messages import DeliveryReport
from streams.bounces import BounceReader
from streams.mailbox import Mailbox, parse_mailbox
from streams.metrics import Metrics
from streams.roles import Role
from tests.ports import RETURN_KEY

REFERENCE = "0123456789abcdef0123456789abcdef-email.0@shop.example"
RETURN_PATH = return_path(REFERENCE, domain="b.example", key=RETURN_KEY) or ""
SENT = Message(REFERENCE, RETURN_PATH, ("a@b.example",), f"Message-ID: <{REFERENCE}>\r\n\r\n".encode(), 0.0)
FORGED = bounce(replace(SENT, sender=f"bounces+{REFERENCE.partition('@')[0]}.aaaaaaaaaa@b.example"), "a@b.example")
AWAY = b"Subject: out of office\r\n\r\nI am away.\r\n"


class Server:
    """One mailbox, in which mails can be flagged and deleted; there are no other folders."""

    def __init__(self, mails: dict[int, bytes]) -> None:
        self.mails = mails
        self.flags: dict[int, set[str]] = {uid: set() for uid in mails}
        self.tokens: list[str] = []
        self.commands: list[str] = []
        self.port = 0

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"* OK ready\r\n")
        while line := await reader.readline():
            tag, command = line.decode().strip().split(" ", 1)
            self.commands.append(command)
            if command.startswith("AUTHENTICATE XOAUTH2"):
                writer.write(b"+ \r\n")
                self.tokens.append(base64.b64decode(await reader.readline()).decode())
            for told in self.answer(command):
                writer.write(told)
            writer.write(f"{tag} {'NO' if command.startswith(('CREATE', 'UID COPY')) else 'OK'} done\r\n".encode())
        writer.close()

    def answer(self, command: str) -> list[bytes]:
        if command == "CAPABILITY":
            return [b"* CAPABILITY IMAP4REV1 AUTH=XOAUTH2\r\n"]
        if command.startswith("UID SEARCH"):
            wanted = [str(uid) for uid, flags in self.flags.items() if not flags]
            return [f"* SEARCH {' '.join(wanted)}\r\n".encode()]
        if found := re.match(r"UID FETCH (\d+)", command):
            raw = self.mails[int(found[1])]
            return [b"* 1 FETCH (UID %b BODY[]<0> {%d}\r\n%b)\r\n" % (found[1].encode(), len(raw), raw)]
        if found := re.match(r"UID STORE ([\d,]+) \+FLAGS.SILENT \(\\(\w+)\)", command):
            for uid in found[1].split(","):
                self.flags[int(uid)].add(found[2])
        if command == "EXPUNGE":
            self.flags = {uid: flags for uid, flags in self.flags.items() if "Deleted" not in flags}
        return []


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[Mailbox]:
    listening = await asyncio.start_server(server.talk, "127.0.0.1", 0)
    async with listening:
        yield parse_mailbox(f"imap://u:secret@127.0.0.1:{listening.sockets[0].getsockname()[1]}")


def reading(mailbox: Mailbox, reports: list[DeliveryReport], metrics: Metrics | None = None) -> BounceReader:
    async def publish(report: DeliveryReport) -> None:
        reports.append(report)

    metrics = metrics or Metrics(Role.SIGNALS)
    return BounceReader(mailbox, domain="shop.example", key=RETURN_KEY, publish=publish, is_ours=lambda: True, metrics=metrics)


async def test_what_is_not_understood_is_flagged_where_no_folder_can_be_made_and_not_read_again() -> None:
    reports: list[DeliveryReport] = []
    server = Server({1: AWAY, 2: bounce(SENT, "a@b.example")})
    async with serving(server) as mailbox:
        reader = reading(mailbox, reports)
        assert await reader.look() == 2
        assert server.flags == {1: {"Flagged"}}
        assert await reader.look() == 0
    assert [report.reference for report in reports] == [REFERENCE]


async def test_a_report_that_anybody_could_have_written_is_kept_counted_and_logged_and_reports_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reports: list[DeliveryReport] = []
    metrics = Metrics(Role.SIGNALS)
    server = Server({1: FORGED})
    async with serving(server) as mailbox:
        assert await reading(mailbox, reports, metrics).look() == 1
    assert (reports, server.flags) == ([], {1: {"Flagged"}})
    assert metrics.registry.get_sample_value("notify_bounces_total", {"outcome": "unsigned"}) == 1
    assert "bounce.unsigned" in caplog.text
    assert "b.example" not in caplog.text


async def test_an_access_token_logs_in_and_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "token"
    server = Server({})
    async with serving(server) as mailbox:
        reader = reading(replace(mailbox, token_file=file), [])
        for token in ("first", "second"):
            file.write_text(f"{token}\n")
            await reader.look()
        file.unlink()
        with pytest.raises(OSError, match="No such file"):
            await reader.look()
    assert server.tokens == ["user=u\x01auth=Bearer first\x01\x01", "user=u\x01auth=Bearer second\x01\x01"]


async def test_no_password_is_sent_without_the_tls_that_was_asked_for() -> None:
    server = Server({})
    async with serving(server) as mailbox:
        with pytest.raises(imaplib.IMAP4.error):
            await reading(replace(mailbox, scheme="imap+starttls"), []).look()
    assert not any(command.startswith(("LOGIN", "AUTHENTICATE")) for command in server.commands)


def test_a_mailbox_is_a_url() -> None:
    found = parse_mailbox("imaps://b%40x.example:p%2Fw@imap.example/Bounces%20here?every=60&ca_file=/ca.pem")
    assert (found.scheme, found.host, found.port) == ("imaps", "imap.example", 993)
    assert (found.user, found.password, found.folder) == ("b@x.example", "p/w", "Bounces here")
    assert (found.every_seconds, found.ca_file) == (60, Path("/ca.pem"))
    assert parse_mailbox("imap+starttls://u:p@h").port == 143
    assert "p/w" not in repr(found)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "imaps://h",
        "pop3://u:hunter2@h",
        "imaps://u:hunter2@h:port",
        'imaps://u:hunter2@h/a"b',
        "imaps://u:hunter2@h?colour=red",
        "imaps://u:hunter2@h?every=0",
        "imaps://u:hunter2@h?auth=xoauth2",
        "imaps://u:hunter2@h?token_file=/x",
    ],
)
def test_what_is_no_mailbox_says_so_without_the_password(text: str) -> None:
    with pytest.raises(ValueError, match=r"^(is|has) ") as caught:
        parse_mailbox(text)
    assert "hunter2" not in str(caught.value)
