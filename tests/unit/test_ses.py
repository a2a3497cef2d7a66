from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from channels.ses import is_certificate_url, is_subscribe_url, report_of

AT = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
TIME = "2026-01-15T09:30:00.000Z"


def an_event(kind: str, said: dict[str, Any], *, mail: dict[str, Any] | None = None) -> str:
    base = {"timestamp": TIME, "messageId": "ses-1", "commonHeaders": {"messageId": "<d-email.0@flowmart.example>"}}
    return json.dumps({"eventType": kind, kind.lower(): {"timestamp": TIME, **said}, "mail": base if mail is None else mail})


@pytest.mark.parametrize(
    ("kind", "said", "meant"),
    [
        ("Delivery", {"smtpResponse": "250 2.6.0 <ada@example.com> queued"}, ("delivered", "2.6.0", None)),
        ("Delivery", {"smtpResponse": "250 ok"}, ("delivered", "delivered", None)),
        (
            "Bounce",
            {"bounceType": "Permanent", "bounceSubType": "NoEmail", "bouncedRecipients": [{"emailAddress": "ada@example.com"}]},
            ("bounced", "Permanent NoEmail", "hard_bounce"),
        ),
        ("Bounce", {"bounceType": "Transient", "bounceSubType": "MailboxFull"}, ("bounced", "Transient MailboxFull", None)),
        ("Bounce", {"bounceType": "Undetermined", "bouncedRecipients": [{"status": "4.4.7"}]}, ("bounced", "4.4.7", None)),
        ("Complaint", {"complaintFeedbackType": "abuse"}, ("delivered", "complaint abuse", "complaint")),
        ("Complaint", {}, ("delivered", "complaint", "complaint")),
        ("Complaint", {"complaintSubType": "OnAccountSuppressionList"}, ("bounced", "complaint", "complaint")),
        ("Reject", {"reason": "Bad content"}, ("failed", "rejected", None)),
    ],
)
def test_an_event_becomes_a_report_without_any_address(kind: str, said: dict[str, Any], meant: tuple[str, str, str | None]) -> None:
    report = report_of(an_event(kind, said), reported_as="email")
    assert report is not None
    assert (report.status, report.code, report.suppresses) == meant
    assert (report.provider, report.reference, report.at) == ("email", "d-email.0@flowmart.example", AT)
    assert "ada" not in repr(report)


@pytest.mark.parametrize(
    ("kind", "said"), [("Send", {}), ("Open", {}), ("DeliveryDelay", {}), ("Complaint", {"complaintFeedbackType": "not-spam"})]
)
def test_what_changes_no_status_is_no_report(kind: str, said: dict[str, Any]) -> None:
    assert report_of(an_event(kind, said), reported_as="email") is None


def test_the_message_id_is_found_among_the_headers_too() -> None:
    mail = {"headers": [{"name": "From", "value": "x"}, {"name": "Message-Id", "value": "<a.0@b>"}]}
    report = report_of(an_event("Delivery", {}, mail=mail), reported_as="email")
    assert report is not None
    assert report.reference == "a.0@b"


@pytest.mark.parametrize("text", ["", "[]", "7", "{}", '{"eventType": "Bounce"}', an_event("Whim", {}), an_event("Delivery", {}, mail={})])
def test_what_is_no_event_or_names_no_mail_says_so_without_quoting_it(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no event of SES|does not name") as caught:
        report_of(text, reported_as="email")
    assert "Whim" not in str(caught.value)


def test_only_amazons_own_hosts_are_asked() -> None:
    good = ("https://sns.eu-west-1.amazonaws.com/a-1.pem", "https://sns.cn-north-1.amazonaws.com.cn/a.pem")
    assert all(is_certificate_url(url) and is_subscribe_url(url) for url in good)
    for host in (
        "sns.eu-west-1.amazonaws.com.evil.example",
        "evil.example",
        "sns.amazonaws.com@evil.example",
        "SNS.eu-west-1.amazonaws.com",
        "[",
    ):
        assert not is_subscribe_url(f"https://{host}/a.pem")
    for path in ("/a.txt", "/a/b.pem", "/../a.pem", "/"):
        assert not is_certificate_url(f"https://sns.eu-west-1.amazonaws.com{path}")
    assert not is_subscribe_url("http://sns.eu-west-1.amazonaws.com/")
