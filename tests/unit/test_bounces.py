"""What comes back to the return path, as mail systems write it."""

from __future__ import annotations

import datetime as dt
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from channels.bounces import key_of, read_reports, return_path
from channels.signing import BadSignatureError
from channels.simulators.smtp import Message, bounce, complaint
from schemas.errors import InvalidEventError
from schemas.messages import DeliveryReport
from schemas.status import Status, Suppression

NOW = dt.datetime(2026, 3, 1, 12, 30, tzinfo=dt.UTC)
DELIVERY = "0123456789abcdef0123456789abcdef-email"
REFERENCE = f"{DELIVERY}.0@shop.example"
KEY = key_of(b"t" * 32)
RETURN_PATH = return_path(REFERENCE, domain="bounces.shop.example", key=KEY) or ""
SENT = Message(
    id=REFERENCE,
    sender=RETURN_PATH,
    recipients=("ann@x.example",),
    raw=f"From: no-reply@shop.example\r\nMessage-ID: <{REFERENCE}>\r\nSubject: hello\r\n\r\nbody\r\n".encode(),
    at=0.0,
)

# as Postfix 3.7 writes it
POSTFIX = f"""\
Return-Path: <>
Date: Sun,  1 Mar 2026 12:30:00 +0000 (UTC)
From: MAILER-DAEMON@relay.example (Mail Delivery System)
Subject: Undelivered Mail Returned to Sender
To: {RETURN_PATH}
Auto-Submitted: auto-replied
MIME-Version: 1.0
Content-Type: multipart/report; report-type=delivery-status;
\tboundary="9C2A0.1772368200/relay.example"
Content-Transfer-Encoding: 8bit
Message-Id: <20260301123000.9C2A1@relay.example>

This is a MIME-encapsulated message.

--9C2A0.1772368200/relay.example
Content-Description: Notification
Content-Type: text/plain; charset=utf-8

<ann@x.example>: host mx.x.example[192.0.2.1] said: 550 5.1.1 unknown

--9C2A0.1772368200/relay.example
Content-Description: Delivery report
Content-Type: message/delivery-status

Reporting-MTA: dns; relay.example
Original-Envelope-Id: {REFERENCE}
X-Postfix-Queue-ID: 9C2A0
X-Postfix-Sender: rfc822; {RETURN_PATH}
Arrival-Date: Sun,  1 Mar 2026 12:29:59 +0000 (UTC)

Final-Recipient: rfc822; ann@x.example
Original-Recipient: rfc822;ann@x.example
Action: failed
Status: 5.1.1
Remote-MTA: dns; mx.x.example
Diagnostic-Code: smtp; 550 5.1.1 <ann@x.example> unknown

--9C2A0.1772368200/relay.example
Content-Description: Undelivered Message Headers
Content-Type: text/rfc822-headers

From: FlowMart <no-reply@shop.example>
Message-ID: <{REFERENCE}>
Subject: hello

--9C2A0.1772368200/relay.example--
"""

# as a big mailbox provider answers: the whole message comes back, and the envelope has no id
WHOLE = f"""\
From: Mail Delivery Subsystem <mailer-daemon@mail.example>
To: {RETURN_PATH}
Subject: Delivery Status Notification (Failure)
References: <{REFERENCE}>
In-Reply-To: <{REFERENCE}>
MIME-Version: 1.0
Content-Type: multipart/report; boundary="000000000000a1b2"; report-type=delivery-status

--000000000000a1b2
Content-Type: multipart/related; boundary="000000000000a1b4"

--000000000000a1b4
Content-Type: multipart/alternative; boundary="000000000000a1b5"

--000000000000a1b5
Content-Type: text/plain; charset="UTF-8"

** Address not found **

--000000000000a1b5--

--000000000000a1b4--

--000000000000a1b2
Content-Type: message/delivery-status

Reporting-MTA: dns; mail.example
Arrival-Date: Sun, 01 Mar 2026 04:30:00 -0800 (PST)

Final-Recipient: rfc822; ann@x.example
Action: failed
Status: 5.0.0
Diagnostic-Code: smtp; 550-5.1.1 The email account that you tried to reach does not exist. Please
 try 550 5.1.1 double-checking the recipient's address.

--000000000000a1b2
Content-Type: message/rfc822

Message-ID: <{REFERENCE}>
Subject: hello

body
--000000000000a1b2--
"""

# the example of RFC 5965 appendix B.2, on a mail of ours, without its Message-ID
COMPLAINT = f"""\
From: <abusedesk@example.com>
Date: Thu, 8 Mar 2005 17:40:36 EDT
Subject: FW: Earn money
To: <abuse@example.net>
MIME-Version: 1.0
Content-Type: multipart/report; report-type=feedback-report;
     boundary="part1_13d.2e68ed54_boundary"

--part1_13d.2e68ed54_boundary
Content-Type: text/plain; charset="US-ASCII"
Content-Transfer-Encoding: 7bit

This is an email abuse report for an email message received from IP
192.0.2.1 on Thu, 8 Mar 2005 14:00:00 EDT.

--part1_13d.2e68ed54_boundary
Content-Type: message/feedback-report

Feedback-Type: abuse
User-Agent: SomeGenerator/1.0
Version: 1
Original-Mail-From: <{RETURN_PATH}>
Original-Rcpt-To: <user@example.com>
Arrival-Date: Thu, 8 Mar 2005 14:00:00 EDT
Reporting-MTA: dns; mail.example.com
Source-IP: 192.0.2.1
Reported-Domain: example.net
Removal-Recipient: user@example.com

--part1_13d.2e68ed54_boundary
Content-Type: message/rfc822
Content-Disposition: inline

From: <somespammer@example.net>
To: <Undisclosed Recipients>
Subject: Earn money
MIME-Version: 1.0

Spam Spam Spam
--part1_13d.2e68ed54_boundary--
"""


def read(raw: str | bytes) -> list[DeliveryReport]:
    return read_reports(raw.replace("\n", "\r\n").encode() if isinstance(raw, str) else raw, domain="shop.example", key=KEY, at=NOW)


def told(raw: str | bytes) -> tuple[str, str, str | None, str | None]:
    (report,) = read(raw)
    assert (report.provider, report.at) == ("email", NOW)
    return report.reference, report.status, report.code, report.suppresses


@pytest.mark.parametrize("raw", [POSTFIX, WHOLE], ids=["postfix", "whole"])
def test_a_bounce_is_read(raw: str) -> None:
    assert told(raw) == (REFERENCE, Status.BOUNCED, "5.1.1", Suppression.HARD_BOUNCE)


def test_a_complaint_is_read() -> None:
    assert told(COMPLAINT) == (REFERENCE, Status.DELIVERED, "abuse", Suppression.COMPLAINT)


LOCAL, MAC = RETURN_PATH.partition("@")[0].rsplit(".", 1)
OTHER = f"{DELIVERY[:-7]}0-email.0"  # what was said to somebody else, whose id can be computed


@pytest.mark.parametrize(
    "address",
    [
        f"{LOCAL}@bounces.shop.example",  # as before there were MACs
        f"{LOCAL}.@bounces.shop.example",
        f"{LOCAL}.{MAC[:-1]}@bounces.shop.example",
        f"{LOCAL}.{MAC}x@bounces.shop.example",
        f"{LOCAL}.{'a' * len(MAC)}@bounces.shop.example",
        f"{LOCAL[:-1]}1.{MAC}@bounces.shop.example",  # another generation
        f"bounces+{OTHER}.{MAC}@bounces.shop.example",
        return_path(REFERENCE, domain="bounces.shop.example", key=key_of(b"u" * 32)) or "",
        "no-reply@shop.example",
    ],
)
@pytest.mark.parametrize("raw", [POSTFIX, WHOLE, COMPLAINT], ids=["postfix", "whole", "complaint"])
def test_a_report_to_a_return_path_that_we_did_not_sign_is_not_believed(raw: str, address: str) -> None:
    with pytest.raises(BadSignatureError) as caught:
        read(raw.replace(RETURN_PATH, address))
    assert "ann" not in str(caught.value)


def test_who_has_a_return_path_can_report_on_its_delivery_and_no_other() -> None:
    forged = POSTFIX.replace(f"{DELIVERY}.0@", f"{OTHER}@")
    assert OTHER in forged
    assert told(forged)[0] == REFERENCE


def test_a_return_path_is_found_among_other_addresses_and_in_the_headers_that_came_back() -> None:
    unsigned = f"To: <a@b.example>, {LOCAL}.aaaaaaaaaa@b.example,"
    assert told(POSTFIX.replace("To: ", f"{unsigned}\n ", 1))[0] == REFERENCE
    returned = POSTFIX.replace(f"To: {RETURN_PATH}", "To: bounces@shop.example")
    assert told(returned.replace("Message-ID:", f"Return-Path: <{RETURN_PATH}>\nMessage-ID:"))[0] == REFERENCE


def test_a_return_path_is_known_in_capitals_too() -> None:
    assert told(POSTFIX.replace(f"To: {RETURN_PATH}", f"To: {RETURN_PATH.upper()}"))[0] == REFERENCE


STATUSES = [
    ("5.1.1", "550 5.1.1 unknown", "5.1.1", True),
    ("5.1.10", "556 5.1.10 null MX", "5.1.10", True),
    ("5.2.1", "550 5.2.1 closed", "5.2.1", True),
    ("5.7.1", "550 5.7.1 policy", "5.7.1", False),  # about us: another mail may pass
    ("5.2.2", "552 5.2.2 full", "5.2.2", False),
    ("5.0.0", "550 no such user", "5.0.0", False),
    ("4.4.7", "421 4.4.7 delivery time expired", "4.4.7", False),
    ("4.0.0", "550 5.1.1 unknown", "4.0.0", False),
    ("5.0.0", "550 5.1.1 unknown", "5.1.1", True),
    ("rubbish", "550 5.1.1 unknown", "5.1.1", True),
    ("rubbish", "rubbish", "5.0.0", False),
]


@pytest.mark.parametrize(("status", "diagnostic", "code", "is_dead"), STATUSES)
def test_only_a_dead_mailbox_suppresses_its_address(status: str, diagnostic: str, code: str, *, is_dead: bool) -> None:
    suppresses = Suppression.HARD_BOUNCE if is_dead else None
    assert told(bounce(SENT, "ann@x.example", status=status, told=diagnostic)) == (REFERENCE, Status.BOUNCED, code, suppresses)


@pytest.mark.parametrize("action", ["delayed", "relayed", "expanded", "Delayed"])
def test_what_says_nothing_final_is_no_report(action: str) -> None:
    assert read(bounce(SENT, "ann@x.example", action=action, status="4.4.1")) == []


def test_a_delivery_that_was_asked_about_is_delivered() -> None:
    assert told(bounce(SENT, "ann@x.example", action="delivered", status="2.0.0", told="250 ok")) == (
        REFERENCE,
        Status.DELIVERED,
        "2.0.0",
        None,
    )


@pytest.mark.parametrize(("kind", "suppresses"), [("fraud", Suppression.COMPLAINT), ("opt-out", Suppression.UNSUBSCRIBED)])
def test_feedback_that_ends_mails(kind: str, suppresses: Suppression) -> None:
    assert told(complaint(SENT, "ann@x.example", kind=kind)) == (REFERENCE, Status.DELIVERED, kind, suppresses)


@pytest.mark.parametrize("kind", ["not-spam", "virus", "auth-failure"])
def test_feedback_that_ends_nothing(kind: str) -> None:
    assert read(complaint(SENT, "ann@x.example", kind=kind)) == []


def test_an_address_beyond_ascii_bounces_too() -> None:
    assert told(bounce(SENT, "pelé@x.example"))[:2] == (REFERENCE, Status.BOUNCED)


def test_reading_again_gives_the_same_report() -> None:
    assert read(POSTFIX) == read(POSTFIX)
    assert read(POSTFIX)[0].report_id != read(POSTFIX.replace("5.1.1", "5.2.1"))[0].report_id


def test_several_recipients_that_failed_alike_are_one_report() -> None:
    block = "Final-Recipient: rfc822; ann@x.example\n"
    doubled = POSTFIX.replace(block, f"Final-Recipient: rfc822; b@x.example\nAction: failed\nStatus: 5.1.1\n\n{block}")
    assert len(read(doubled)) == 1


def test_a_bounce_whose_end_is_missing_is_read_by_what_there_is() -> None:
    raw = POSTFIX.replace("\n", "\r\n").encode()
    assert told(raw[: raw.index(b"Content-Description: Undelivered")])[:2] == (REFERENCE, Status.BOUNCED)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ("", "neither"),
        ("Subject: out of office\n\nI am away", "neither"),
        (POSTFIX.replace("Action: failed", "Action: eaten"), "an action that is none"),
        (POSTFIX.replace("Action: failed\n", ""), "without a recipient"),
        (COMPLAINT.replace("Feedback-Type: abuse", "Feedback-Type: applause"), "a kind that is unknown"),
    ],
)
def test_what_is_not_understood_says_so_and_quotes_nothing(raw: str, problem: str) -> None:
    with pytest.raises(InvalidEventError, match=problem) as caught:
        read(raw)
    assert "ann" not in str(caught.value)


WHOLE_BYTES = POSTFIX.replace("\n", "\r\n").encode()


@given(st.binary(max_size=200), st.integers(0, len(WHOLE_BYTES)), st.integers(0, 300))
@example(b"", 0, len(WHOLE_BYTES))
@example(b"Content-Type: multipart/report; boundary=x\r\n\r\n--x\r\n" * 400, 0, 0)
def test_whatever_comes_is_a_report_or_is_not_understood(junk: bytes, at: int, cut: int) -> None:
    with suppress(InvalidEventError, BadSignatureError):
        for report in read(WHOLE_BYTES[:at] + junk + WHOLE_BYTES[at + cut :]):
            assert report.status in {Status.BOUNCED, Status.DELIVERED}
            assert report.reference.endswith("@shop.example")
