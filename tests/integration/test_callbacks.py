"""Providers' calls as they make them: signed by them or refused, published once, answered when Kafka has them."""

from __future__ import annotations

import base64
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA1, SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from standardwebhooks import Webhook

from agents.receipts import report_key
from channels import twilio
from channels.signing import TOLERANCE_SECONDS, parse_secret
from schemas import topics
from schemas.errors import ProviderUnavailableError
from schemas.messages import DeliveryReport, Message
from streams.views.callbacks import MAX_FORM_BYTES, MAX_REPORTS_BYTES, SNS_AGE, Callbacks, FetchError, Outcome, install_callbacks
from streams.views.pages import WebContext, install
from tests.integration.test_web import Worker, served

PUBLIC = "https://notifications.flowmart.example/notify"
TOKEN = "twilio-auth-token"
SECRET = "whsec_" + base64.b64encode(b"s" * 32).decode()
TOPIC = "arn:aws:sns:eu-west-1:123456789012:ses-events"
CERTIFICATE_URL = "https://sns.eu-west-1.amazonaws.com/SimpleNotificationService-0123456789abcdef.pem"
SUBSCRIBE_URL = "https://sns.eu-west-1.amazonaws.com/?Action=ConfirmSubscription&TopicArn=x&Token=y"
MESSAGE_ID = "0b-email.0@flowmart.example"


@dataclass(kw_only=True)
class Desk(Worker):
    """A views worker whose publishing, counting and fetching is looked at."""

    counted: Counter[tuple[str, str]] = field(default_factory=Counter)
    fetched: list[str] = field(default_factory=list)
    pages: dict[str, bytes] = field(default_factory=dict)

    async def publish(self, topic: str, key: bytes, message: Message) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.published.append((topic, key, message))

    async def fetch(self, url: str) -> bytes:
        self.fetched.append(url)
        if url not in self.pages:
            raise FetchError("Amazon answered 404")
        return self.pages[url]

    def count(self, source: str, outcome: Outcome) -> None:
        self.counted[(source, outcome)] += 1

    def context(self) -> WebContext:
        return replace(super().context(), now=lambda: datetime.now(UTC))

    @property
    def reports(self) -> list[DeliveryReport]:
        found: list[DeliveryReport] = []
        for topic, key, message in self.published:
            assert isinstance(message, DeliveryReport)
            assert (topic, key) == (topics.RECEIPTS, report_key(message.provider, message.reference))
            found.append(message)
        return found


@asynccontextmanager
async def opened(desk: Desk) -> AsyncIterator[str]:
    callbacks = Callbacks(
        public_url=PUBLIC,
        tokens={"twilio-de": TOKEN},
        ses_topics=frozenset({TOPIC}),
        keys=(parse_secret(SECRET),),
        fetch=desk.fetch,
        count=desk.count,
    )

    def add(app: Any) -> None:
        install(app, desk.context())
        install_callbacks(app, callbacks)

    async with served(add) as url:
        yield url


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
async def url(desk: Desk) -> AsyncIterator[str]:
    async with opened(desk) as base:
        yield base


async def post(url: str, data: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
    async with aiohttp.ClientSession() as client, client.post(url, data=data, headers=headers) as answer:
        return answer.status, await answer.read()


# ---- Twilio


TWILIO_PATH = "/callbacks/twilio/twilio-de?reference=0b-sms.0"
DELIVERED = {"MessageSid": "SM1", "MessageStatus": "delivered", "AccountSid": "AC1"}


async def call_twilio(
    base: str, form: Mapping[str, str], *, path: str = TWILIO_PATH, signed_path: str | None = None, token: str = TOKEN
) -> tuple[int, bytes]:
    signature = twilio.sign(PUBLIC + (signed_path or path), form, token)
    body = aiohttp.FormData(dict(form))()._value
    headers = {"X-Twilio-Signature": signature, "Content-Type": "application/x-www-form-urlencoded"}
    return await post(base + path, body, headers)


async def test_a_status_callback_of_twilio_becomes_a_report_and_the_same_again_is_no_second_one(desk: Desk, url: str) -> None:
    for _ in range(2):
        assert await call_twilio(url, DELIVERED) == (204, b"")
    (report,) = desk.reports
    assert (report.provider, report.reference, report.status, report.suppresses) == ("twilio", "0b-sms.0", "delivered", None)
    assert desk.counted == {("twilio", "published"): 1, ("twilio", "repeated"): 1}


async def test_an_opt_out_that_twilio_reports_suppresses_the_number(desk: Desk, url: str) -> None:
    assert (await call_twilio(url, {"MessageStatus": "undelivered", "ErrorCode": "21610"}))[0] == 204
    assert [(report.status, report.suppresses) for report in desk.reports] == [("bounced", "unsubscribed")]


async def test_a_message_that_is_on_its_way_is_answered_and_published_nowhere(desk: Desk, url: str) -> None:
    assert (await call_twilio(url, {"MessageStatus": "sent"}))[0] == 204
    assert desk.published == []
    assert desk.counted == {("twilio", "nothing"): 1}


@pytest.mark.parametrize(
    "wrong",
    [
        {"token": "another"},
        {"signed_path": "/callbacks/twilio/twilio-de?reference=another"},
        {"path": "/callbacks/twilio/nobody?reference=0b-sms.0"},
    ],
)
async def test_what_twilio_did_not_sign_is_refused_and_counted(desk: Desk, url: str, wrong: Mapping[str, str]) -> None:
    status, body = await call_twilio(url, DELIVERED, **wrong)
    assert (status, json.loads(body)["type"].rpartition(":")[2]) == (403, "bad-signature")
    assert desk.published == []
    assert desk.counted == {("twilio", "refused"): 1}


async def test_a_form_that_is_too_large_is_not_read(desk: Desk, url: str) -> None:
    assert (await call_twilio(url, {**DELIVERED, "Body": "x" * MAX_FORM_BYTES}))[0] == 413
    assert desk.published == []


async def test_what_kafka_did_not_take_is_refused_and_taken_when_it_is_told_again(desk: Desk, url: str) -> None:
    desk.refusal = ProviderUnavailableError("no broker")
    assert (await call_twilio(url, DELIVERED))[0] == 503
    desk.refusal = None
    assert (await call_twilio(url, DELIVERED))[0] == 204
    assert len(desk.reports) == 1


async def test_a_callback_is_answered_in_milliseconds(desk: Desk, url: str) -> None:
    async with aiohttp.ClientSession() as client:
        seconds = []
        for number in range(50):
            form = {**DELIVERED, "MessageSid": f"SM{number}"}
            path = f"/callbacks/twilio/twilio-de?reference={number}"
            headers = {"X-Twilio-Signature": twilio.sign(PUBLIC + path, form, TOKEN)}
            began = time.perf_counter()
            async with client.post(url + path, data=form, headers=headers) as answer:
                assert answer.status == 204
            seconds.append(time.perf_counter() - began)
    assert sorted(seconds)[len(seconds) // 2] < 0.05
    assert len(desk.reports) == 50


# ---- Amazon SES


@dataclass(frozen=True, kw_only=True)
class Amazon:
    """Whoever holds the key of a certificate."""

    key: rsa.RSAPrivateKey = field(default_factory=lambda: rsa.generate_private_key(65537, 2048))

    def certificate(self, *, days: int = 1) -> bytes:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sns.amazonaws.com")])
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(self.key.public_key()).serial_number(1)
        made = builder.not_valid_before(now - timedelta(days=9)).not_valid_after(now + timedelta(days=days)).sign(self.key, SHA256())
        return made.public_bytes(Encoding.PEM)

    def sign(self, message: Mapping[str, str]) -> bytes:
        """Return the message as SNS posts it."""
        names = ["Message", "MessageId", "Subject", "SubscribeURL", "Timestamp", "Token", "TopicArn", "Type"]
        text = "".join(f"{name}\n{message[name]}\n" for name in names if name in message)
        hash_ = SHA256() if message["SignatureVersion"] == "2" else SHA1()
        signature = self.key.sign(text.encode(), padding.PKCS1v15(), hash_)
        return json.dumps({**message, "Signature": base64.b64encode(signature).decode()}).encode()


AMAZON, STRANGER = Amazon(), Amazon()
BOUNCE = {
    "notificationType": "Bounce",
    "bounce": {
        "bounceType": "Permanent",
        "bounceSubType": "General",
        "bouncedRecipients": [
            {"emailAddress": "ada@example.com", "status": "5.1.1", "diagnosticCode": "smtp; 550 5.1.1 <ada@example.com>"}
        ],
        "timestamp": "2026-01-15T09:30:00.000Z",
    },
    "mail": {"messageId": "0102-ses", "source": "n@flowmart.example", "commonHeaders": {"messageId": f"<{MESSAGE_ID}>"}},
}


def a_notification(event: object, **changes: str) -> dict[str, str]:
    base = {
        "Type": "Notification",
        "MessageId": "sns-1",
        "TopicArn": TOPIC,
        "Message": json.dumps(event),
        "Timestamp": datetime.now(UTC).isoformat(),
        "SignatureVersion": "2",
        "SigningCertURL": CERTIFICATE_URL,
    }
    return base | changes


@pytest.fixture
def amazon(desk: Desk) -> Amazon:
    desk.pages = {CERTIFICATE_URL: AMAZON.certificate(), SUBSCRIBE_URL: b"<ok/>"}
    return AMAZON


async def call_ses(base: str, body: bytes) -> tuple[int, bytes]:
    return await post(
        f"{base}/callbacks/ses", body, {"Content-Type": "text/plain; charset=UTF-8", "x-amz-sns-message-type": "Notification"}
    )


@pytest.mark.parametrize("version", ["1", "2"])
async def test_a_bounce_that_ses_reports_suppresses_the_address_and_is_published_once(
    desk: Desk, url: str, amazon: Amazon, version: str
) -> None:
    body = amazon.sign(a_notification(BOUNCE, SignatureVersion=version, Subject="Amazon SES Email Event Notification"))
    for _ in range(2):
        assert await call_ses(url, body) == (204, b"")
    (report,) = desk.reports
    assert (report.provider, report.reference, report.status, report.code) == ("email", MESSAGE_ID, "bounced", "5.1.1")
    assert (report.suppresses, report.at) == ("hard_bounce", datetime(2026, 1, 15, 9, 30, tzinfo=UTC))
    assert desk.fetched == [CERTIFICATE_URL], "the certificate is fetched once"
    assert desk.counted == {("ses", "published"): 1, ("ses", "repeated"): 1}


async def test_a_subscription_of_a_topic_of_ours_is_confirmed_and_of_others_never(desk: Desk, url: str, amazon: Amazon) -> None:
    asked = a_notification("x", Type="SubscriptionConfirmation", Token="t", SubscribeURL=SUBSCRIBE_URL)
    assert (await call_ses(url, amazon.sign(asked)))[0] == 204
    assert desk.fetched == [CERTIFICATE_URL, SUBSCRIBE_URL]
    for change in (
        {"TopicArn": TOPIC + "x"},
        {"SubscribeURL": "https://sns.eu-west-1.amazonaws.com.evil.example/"},
        {"SubscribeURL": "http://sns.eu-west-1.amazonaws.com/"},
        {"SubscribeURL": "https://sns.eu-west-1.amazonaws.com:8443/"},
        {"SubscribeURL": "https://a@sns.eu-west-1.amazonaws.com/"},
        {"SubscribeURL": "https://169.254.169.254/"},
    ):
        assert (await call_ses(url, amazon.sign(asked | change)))[0] == 403
    assert len(desk.fetched) == 2
    assert desk.published == []


async def test_what_amazon_did_not_sign_is_refused_whatever_it_says(desk: Desk, url: str, amazon: Amazon) -> None:
    good = json.loads(amazon.sign(a_notification(BOUNCE)))
    forged = [
        STRANGER.sign(a_notification(BOUNCE)),
        json.dumps({**good, "Message": json.dumps({**BOUNCE, "more": 1})}).encode(),
        json.dumps({**good, "SignatureVersion": "1"}).encode(),
        json.dumps({**good, "SignatureVersion": "3"}).encode(),
        STRANGER.sign(a_notification(BOUNCE, SigningCertURL="https://sns.evil.example/a.pem")),
        STRANGER.sign(a_notification(BOUNCE, SigningCertURL="https://sns.eu-west-1.amazonaws.com/a/../x.pem?y")),
        amazon.sign(a_notification(BOUNCE, TopicArn=TOPIC + "x")),
    ]
    for body in forged:
        status, answer = await call_ses(url, body)
        assert (status, json.loads(answer)["type"].rpartition(":")[2]) == (403, "bad-signature")
    assert desk.published == []
    assert set(desk.fetched) == {CERTIFICATE_URL}
    assert desk.counted == {("ses", "refused"): len(forged)}


async def test_a_certificate_that_has_expired_proves_nothing(desk: Desk, url: str, amazon: Amazon) -> None:
    desk.pages[CERTIFICATE_URL] = amazon.certificate(days=-1)
    assert (await call_ses(url, amazon.sign(a_notification(BOUNCE))))[0] == 403
    desk.pages[CERTIFICATE_URL] = amazon.certificate()
    assert (await call_ses(url, amazon.sign(a_notification(BOUNCE))))[0] == 204


async def test_a_message_of_sns_that_is_too_old_is_a_replay(desk: Desk, url: str, amazon: Amazon) -> None:
    old = (datetime.now(UTC) - SNS_AGE - timedelta(seconds=1)).isoformat()
    assert (await call_ses(url, amazon.sign(a_notification(BOUNCE, Timestamp=old))))[0] == 403
    assert desk.counted == {("ses", "stale"): 1}


async def test_while_amazon_does_not_answer_it_is_asked_to_tell_it_again(desk: Desk, url: str, amazon: Amazon) -> None:
    pages, desk.pages = desk.pages, {}
    assert (await call_ses(url, amazon.sign(a_notification(BOUNCE))))[0] == 503
    desk.pages = pages
    assert (await call_ses(url, amazon.sign(a_notification(BOUNCE))))[0] == 204
    assert len(desk.reports) == 1


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"Type": "Notification"}', b"\xff"])
async def test_what_is_no_message_of_sns_is_a_bad_request(desk: Desk, url: str, body: bytes) -> None:
    assert (await call_ses(url, body))[0] == 400
    assert desk.counted == {("ses", "malformed"): 1}


# ---- services of ours


def a_report(**changes: object) -> dict[str, object]:
    return {"provider": "smtp", "reference": MESSAGE_ID, "status": "delivered", "at": "2026-01-15T09:30:00Z", **changes}


async def call_receipts(
    base: str, body: bytes, *, at: datetime | None = None, secret: str = SECRET, name: str = "msg_1"
) -> tuple[int, bytes]:
    moment = at or datetime.now(UTC)
    signature = Webhook(secret).sign(name, moment, body.decode(errors="replace"))
    headers = {"webhook-id": name, "webhook-timestamp": str(int(moment.timestamp())), "webhook-signature": f"v1,AAAA {signature}"}
    return await post(f"{base}/callbacks/receipts", body, headers)


def reports(*each: object) -> bytes:
    return json.dumps({"reports": each}).encode()


async def test_a_service_reports_with_the_signature_that_the_standard_library_makes(desk: Desk, url: str) -> None:
    body = reports(a_report(code="2.0.0"), a_report(reference="other", status="bounced", suppresses="hard_bounce"))
    for _ in range(2):
        assert await call_receipts(url, body) == (204, b"")
    assert [(each.reference, each.status, each.suppresses) for each in desk.reports] == [
        (MESSAGE_ID, "delivered", None),
        ("other", "bounced", "hard_bounce"),
    ]
    assert desk.counted == {("receipts", "published"): 1, ("receipts", "repeated"): 1}


async def test_an_address_in_the_code_of_a_report_does_not_reach_kafka(desk: Desk, url: str) -> None:
    quoted = a_report(status="bounced", code="550 <zebulon@planted.example> is unknown")
    assert await call_receipts(url, reports(quoted, a_report(code="<zebulon@planted.example>"))) == (204, b"")
    assert [each.code for each in desk.reports] == ["550 is unknown", None]


async def test_a_report_of_nobody_or_of_long_ago_is_refused(desk: Desk, url: str) -> None:
    stranger = "whsec_" + base64.b64encode(b"x" * 32).decode()
    assert (await call_receipts(url, reports(a_report()), secret=stranger))[0] == 403
    for seconds in (-TOLERANCE_SECONDS - 5, TOLERANCE_SECONDS + 5):
        assert (await call_receipts(url, reports(a_report()), at=datetime.now(UTC) + timedelta(seconds=seconds)))[0] == 403
    assert (await post(f"{url}/callbacks/receipts", reports(a_report()), {}))[0] == 403
    assert desk.counted == {("receipts", "refused"): 2, ("receipts", "stale"): 2}
    assert desk.published == []


@pytest.mark.parametrize(
    ("report", "named"),
    [
        (a_report(status="read"), "status"),
        (a_report(reference=""), "reference"),
        (a_report(at="today"), "at"),
        (a_report(at="2026-01-15T09:30:00"), "at"),
        (a_report(suppresses="whim"), "suppresses"),
        (a_report(email="a@b.c"), "email"),
        (7, "reports[0]"),
    ],
)
async def test_a_report_that_says_nothing_of_use_names_its_field(desk: Desk, url: str, report: object, named: str) -> None:
    status, answer = await call_receipts(url, reports(report))
    assert (status, json.loads(answer)["field"].rpartition(".")[2]) == (422, named)
    assert desk.published == []


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"reports": []}', reports(*[a_report()] * 101)])
async def test_a_body_without_reports_is_a_bad_request(desk: Desk, url: str, body: bytes) -> None:
    assert (await call_receipts(url, body))[0] == 400
    assert (await call_receipts(url, reports(a_report(code="x" * MAX_REPORTS_BYTES))))[0] == 413
