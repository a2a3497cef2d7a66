"""What comes back to the return path: bounces (RFC 3464) and complaints (RFC 5965) as delivery reports.

The delivery is known by the Message-ID of what was sent, which is in the part of the mail that comes back or in the envelope's
id (RFC 3461), or else by the address that it comes back to (VERP): `bounces+{delivery}.{generation}@{bounce domain}`.

Who knows a mail's Message-ID can forge a bounce of it; that is its recipient, and whoever carried it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from email import message_from_bytes
from email.message import Message
from email.parser import BytesParser
from typing import Final

from channels.smtp import is_dead
from schemas.errors import InvalidEventError
from schemas.ids import digest
from schemas.messages import DeliveryReport
from schemas.status import Status, Suppression

REPORTED_AS: Final = "email"  # by whom reports are: whoever writes one does not know which of our providers sent the mail

_PREFIX: Final = "bounces+"
_LONGEST_LOCAL: Final = 64  # RFC 5321 section 4.5.3.1.1
_RETURN_PATH: Final = re.compile(re.escape(_PREFIX) + r"([\w.-]{1,56})@[\w.-]+", re.ASCII | re.IGNORECASE)
_REFERENCE: Final = re.compile(r"[\w.-]{1,200}\.\d{1,9}@[\w.-]{1,253}", re.ASCII)
_STATUS: Final = re.compile(r"\b([245]\.\d{1,3}\.\d{1,3})\b")
# where a mailbox keeps the address that a mail came to, by whose software it is
_CAME_TO: Final = ("X-Original-To", "Delivered-To", "Envelope-To", "X-Envelope-To", "To")
_NOTHING_FINAL: Final = frozenset({"delayed", "relayed", "expanded"})  # RFC 3464 section 2.3.3
# RFC 5965 section 7.3; what is done about the others is nobody's wish
_FEEDBACK: Final[Mapping[str, Suppression | None]] = {
    "abuse": Suppression.COMPLAINT,
    "fraud": Suppression.COMPLAINT,
    "opt-out": Suppression.UNSUBSCRIBED,  # of the drafts, and still sent
    "not-spam": None,
    "virus": None,
    "auth-failure": None,  # RFC 6591: about a signature
}


def return_path(reference: str, domain: str) -> str | None:
    """Return the address at `domain` that bounces of the mail with this Message-ID go to; None: it would be too long."""
    local = _PREFIX + reference.rpartition("@")[0]
    return f"{local}@{domain}" if len(local) <= _LONGEST_LOCAL else None


def read_reports(raw: bytes, *, domain: str, at: datetime) -> list[DeliveryReport]:
    """Return the reports in a mail that came to the return path: none where it says nothing final, such as a delay.

    `domain`: of our Message-IDs; `at`: when it came. The end of `raw` may be missing. Reading it again gives the same reports.
    Raises InvalidEventError for what is no report, or on nothing that we sent; it quotes nothing.
    """
    try:
        mail = message_from_bytes(raw)
        parts = {part.get_content_type(): part for part in reversed(list(mail.walk()))}
        if status := parts.get("message/delivery-status") or parts.get("message/global-delivery-status"):  # RFC 6533
            return list(_of_status(status, mail, parts, domain, at))
        if feedback := parts.get("message/feedback-report"):
            return list(_of_feedback(feedback, mail, parts, domain, at))
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
        # what the standard library's parser raises, besides defects, for mails that are none
        raise InvalidEventError("mail", "cannot be parsed") from None
    raise InvalidEventError("mail", "is neither a bounce nor a complaint")


def _of_status(status: Message, mail: Message, parts: Mapping[str, Message], domain: str, at: datetime) -> Iterator[DeliveryReport]:
    blocks = [block for block in _blocks(status) if block.get("Action")]
    if not blocks:
        raise InvalidEventError("mail", "is a bounce without a recipient")
    envelopes = [_text(block, "Original-Envelope-Id") for block in _blocks(status)]
    found: dict[str, DeliveryReport] = {}
    for block in blocks:
        action = _text(block, "Action").strip().lower()
        if action in _NOTHING_FINAL:
            continue
        reference = _reference(mail, parts, domain, envelopes)
        if action == "failed":
            code = _failure(block)
            suppresses = Suppression.HARD_BOUNCE if is_dead(code) else None
            report = _report(reference, Status.BOUNCED, code, suppresses, at)
        elif action == "delivered":
            report = _report(reference, Status.DELIVERED, _status_of(_text(block, "Status")), None, at)
        else:
            raise InvalidEventError("mail", "is a bounce with an action that is none")
        found[report.report_id] = report
    yield from found.values()


def _of_feedback(feedback: Message, mail: Message, parts: Mapping[str, Message], domain: str, at: datetime) -> Iterator[DeliveryReport]:
    fields = next(_blocks(feedback))
    kind = _text(fields, "Feedback-Type").strip().lower()
    if kind not in _FEEDBACK:
        raise InvalidEventError("mail", "is feedback of a kind that is unknown")
    suppresses = _FEEDBACK[kind]
    if suppresses is not None:
        reference = _reference(mail, parts, domain, [_text(fields, "Original-Envelope-Id")], [_text(fields, "Original-Mail-From")])
        yield _report(reference, Status.DELIVERED, kind, suppresses, at)


def _report(reference: str, status: Status, code: str | None, suppresses: Suppression | None, at: datetime) -> DeliveryReport:
    return DeliveryReport(
        report_id=digest(REPORTED_AS, reference, status, code or "", size=16),
        provider=REPORTED_AS,
        reference=reference,
        status=status,
        code=code,
        at=at,
        suppresses=suppresses,
    )


def _failure(block: Message) -> str:
    """Return the status of a failure. The last server's own word says more than one that ends in zeros."""
    status = _status_of(_text(block, "Status"))
    told = _status_of(_text(block, "Diagnostic-Code"))
    if status is None or (status.endswith(".0.0") and told is not None and told[0] == status[0]):
        return told or status or "5.0.0"
    return status


def _status_of(text: str) -> str | None:
    found = _STATUS.search(text)
    return found[1] if found else None


def _reference(mail: Message, parts: Mapping[str, Message], domain: str, envelopes: Iterable[str], came_to: Iterable[str] = ()) -> str:
    """Return the Message-ID of what was sent. Raises InvalidEventError."""
    ids = [*envelopes, *(_text(sent, "Message-ID") for sent in _sent(parts)), _text(mail, "In-Reply-To"), _text(mail, "References")]
    for text in ids:
        if (found := _REFERENCE.search(text)) is not None and found[0].rpartition("@")[2].lower() == domain.lower():
            return found[0]
    for text in [*came_to, *(each for name in _CAME_TO for each in map(str, mail.get_all(name, [])))]:
        if (path := _RETURN_PATH.search(text)) is not None:
            return f"{path[1].lower()}@{domain}"
    raise InvalidEventError("mail", "is a report on nothing that was sent from here")


def _sent(parts: Mapping[str, Message]) -> Iterator[Message]:
    """Yield what came back of the message: whole, or its headers only (RFC 6522)."""
    for kind in ("message/rfc822", "message/global", "text/rfc822-headers", "message/global-headers"):
        part = parts.get(kind)
        if part is None:
            continue
        if part.is_multipart():
            yield from _blocks(part)
        else:
            text = part.get_payload(decode=True)
            if isinstance(text, bytes):
                yield BytesParser().parsebytes(text, headersonly=True)


def _blocks(part: Message) -> Iterator[Message]:
    """Yield the messages or groups of fields that a part consists of."""
    payload = part.get_payload()
    if isinstance(payload, list):
        for each in payload:
            if isinstance(each, Message):
                yield each
                # of the kinds that the parser has not heard of the first group is taken for the headers of a mail
                if not each.is_multipart() and part.get_content_type() == "message/global-delivery-status":
                    yield from _groups(each)
    else:
        yield from _groups(part)


def _groups(part: Message) -> Iterator[Message]:
    text = part.get_payload(decode=True)
    for group in re.split(rb"\r?\n\r?\n", text) if isinstance(text, bytes) else ():
        if group.strip():
            yield BytesParser().parsebytes(group.lstrip(b"\r\n"), headersonly=True)


def _text(fields: Message, name: str) -> str:
    return str(fields.get(name, ""))
