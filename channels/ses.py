"""What Amazon SES reports on mails, in notifications of Amazon SNS: how they are signed, and what they mean. Calls nobody.

SES tells bounces, complaints and deliveries to a topic of SNS, which posts them to us (docs.aws.amazon.com: "Contents of
event data that Amazon SES publishes", "Verifying the signatures of Amazon SNS messages"). SES gives each mail an id of its
own, and repeats the Message-ID that we gave it in `commonHeaders`: by that the delivery is known.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Self
from urllib.parse import urlsplit

import orjson
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA1, SHA256

from schemas.ids import digest
from schemas.messages import DeliveryReport
from schemas.status import Status, Suppression

_HOST = re.compile(r"sns\.[a-z]{2,3}(?:-[a-z0-9]+)+\.amazonaws\.com(?:\.cn)?")
_CERTIFICATE_PATH = re.compile(r"/[A-Za-z0-9_-]{1,100}\.pem")
_ENHANCED = re.compile(r"\b[245]\.\d{1,3}\.\d{1,3}\b")
_HASHES = {"1": SHA1, "2": SHA256}


class Kind(StrEnum):
    """Types of messages that SNS posts."""

    NOTIFICATION = "Notification"
    SUBSCRIPTION = "SubscriptionConfirmation"
    UNSUBSCRIPTION = "UnsubscribeConfirmation"


# which fields are signed, in this order, where they are there
_SIGNED: Mapping[Kind, tuple[str, ...]] = {
    Kind.NOTIFICATION: ("Message", "MessageId", "Subject", "Timestamp", "TopicArn", "Type"),
    Kind.SUBSCRIPTION: ("Message", "MessageId", "SubscribeURL", "Timestamp", "Token", "TopicArn", "Type"),
    Kind.UNSUBSCRIPTION: ("Message", "MessageId", "SubscribeURL", "Timestamp", "Token", "TopicArn", "Type"),
}


class ForgedError(Exception):
    """It was not Amazon who signed it. The message may be shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnsMessage:
    """A message of SNS as it was posted. Nothing of it is to be believed before `check_signature` returned."""

    kind: Kind
    message_id: str
    topic: str
    text: str
    at: datetime
    certificate_url: str
    subscribe_url: str
    signature: bytes
    signature_version: str
    signed_text: bytes

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Return the message in `body`. Raises ValueError, without quoting it."""
        try:
            given = orjson.loads(body)
        except orjson.JSONDecodeError:
            raise ValueError("is no JSON") from None
        if not isinstance(given, dict):
            raise ValueError("is no JSON object")  # noqa: TRY004 - of what was posted, not of a caller
        texts = {name: value for name, value in given.items() if isinstance(value, str)}
        try:
            kind = Kind(texts["Type"])
            return cls(
                kind=kind,
                message_id=texts["MessageId"],
                topic=texts["TopicArn"],
                text=texts["Message"],
                at=_moment(texts["Timestamp"]),
                certificate_url=texts["SigningCertURL"],
                subscribe_url=texts.get("SubscribeURL", ""),
                signature=base64.b64decode(texts["Signature"], validate=True),
                signature_version=texts["SignatureVersion"],
                signed_text="".join(f"{name}\n{texts[name]}\n" for name in _SIGNED[kind] if name in texts).encode(),
            )
        except (KeyError, ValueError, binascii.Error):
            raise ValueError("is no message of SNS") from None

    def check_signature(self, certificate_pem: bytes, *, now: datetime) -> None:
        """Raise ForgedError unless the certificate's key signed it, and the certificate is valid now."""
        algorithm = _HASHES.get(self.signature_version)
        if algorithm is None:
            raise ForgedError("the version of the signature is neither 1 nor 2")
        try:
            certificate = x509.load_pem_x509_certificate(certificate_pem)
        except ValueError:
            raise ForgedError("the certificate is none") from None
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            raise ForgedError("the certificate is not valid now")
        key = certificate.public_key()
        if not isinstance(key, rsa.RSAPublicKey):
            raise ForgedError("the certificate has no RSA key")
        try:
            key.verify(self.signature, self.signed_text, padding.PKCS1v15(), algorithm())
        except InvalidSignature:
            raise ForgedError("the signature is not of this message") from None


def is_certificate_url(url: str) -> bool:
    """Say whether a certificate may be fetched from `url`: from Amazon itself, or anybody could sign."""
    return _is_amazon(url) and _CERTIFICATE_PATH.fullmatch(urlsplit(url).path) is not None


def is_subscribe_url(url: str) -> bool:
    """Say whether a subscription may be confirmed by a GET of `url`."""
    return _is_amazon(url)


def report_of(text: str, *, reported_as: str) -> DeliveryReport | None:
    """Return what an event of SES, a notification's text, says of a mail; None: nothing that changes its status.

    Raises ValueError for what is no event of SES, or does not name the Message-ID: the original headers have to be included.
    """
    try:
        event = orjson.loads(text)
        kind = event.get("eventType") or event["notificationType"]
        mail = event["mail"]
        found = _meaning(kind, event)
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError):
        raise ValueError("is no event of SES") from None
    if found is None:
        return None
    reference = _reference(mail)
    if reference is None:
        raise ValueError("does not name the mail's Message-ID: let SES include the original headers")
    return DeliveryReport(
        report_id=digest(reported_as, reference, found.status, found.code, size=16),
        provider=reported_as,
        reference=reference,
        status=found.status,
        code=found.code,
        at=found.at,
        suppresses=found.suppresses,
    )


@dataclass(frozen=True, slots=True)
class _Meaning:
    status: Status
    code: str
    at: datetime
    suppresses: Suppression | None = None


def _meaning(kind: str, event: Mapping[str, Any]) -> _Meaning | None:
    """Return what an event means; None: the mail is on its way still, or its reader did something."""
    match kind:
        case "Delivery":
            said = event["delivery"]
            return _Meaning(Status.DELIVERED, _enhanced(said.get("smtpResponse")) or "delivered", _moment(said["timestamp"]))
        case "Bounce":
            said = event["bounce"]
            recipients = said.get("bouncedRecipients") or [{}]
            code = _enhanced(recipients[0].get("status")) or f"{said['bounceType']} {said.get('bounceSubType', '')}".strip()
            # Transient: full, too large, or away; the next mail may pass
            suppresses = Suppression.HARD_BOUNCE if said["bounceType"] == "Permanent" else None
            return _Meaning(Status.BOUNCED, code, _moment(said["timestamp"]), suppresses)
        case "Complaint":
            said = event["complaint"]
            if said.get("complaintFeedbackType") == "not-spam":
                return None
            # SES itself does not send to who complained before
            was_held = said.get("complaintSubType") == "OnAccountSuppressionList"
            status = Status.BOUNCED if was_held else Status.DELIVERED
            code = "complaint" if was_held else f"complaint {said.get('complaintFeedbackType') or ''}".strip()
            return _Meaning(status, code, _moment(said["timestamp"]), Suppression.COMPLAINT)
        case "Reject":
            return _Meaning(Status.FAILED, "rejected", _moment(event["mail"]["timestamp"]))
        case "DeliveryDelay" | "Send" | "Open" | "Click" | "Subscription" | "AmazonSnsSubscriptionSucceeded":
            return None
    raise ValueError("is an unknown event")


def _reference(mail: Mapping[str, Any]) -> str | None:
    common = mail.get("commonHeaders") or {}
    listed = [each.get("value") for each in mail.get("headers") or [] if str(each.get("name", "")).lower() == "message-id"]
    found = next((each for each in (common.get("messageId"), *listed) if isinstance(each, str)), None)
    return None if found is None else found.strip().removeprefix("<").removesuffix(">") or None


def _enhanced(text: object) -> str | None:
    found = _ENHANCED.search(text) if isinstance(text, str) else None
    return None if found is None else found[0]


def _is_amazon(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return (
            parts.scheme == "https"
            and parts.port is None
            and parts.username is None
            and parts.netloc == parts.hostname
            and _HOST.fullmatch(parts.netloc) is not None
        )
    except ValueError:
        return False


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
