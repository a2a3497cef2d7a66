"""What comes back to the return path: bounces (RFC 3464) and complaints (RFC 5965) as delivery reports.

The delivery is known by the address that a mail comes back to (VERP): `bounces+{delivery}.{generation}.{mac}@{bounce domain}`. Who
sends a report proves with it that he saw the mail: ids can be computed from events, the MAC from nothing but a key of ours. So
a report is believed about this one delivery, whatever Message-ID it quotes. The mail's recipient, and whoever carried it, can
still forge a bounce of it.
"""

from __future__ import annotations

import hmac
import re
from base64 import b32encode
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from email import message_from_bytes
from email.message import Message
from email.parser import BytesParser
from hashlib import sha256
from typing import Final

from channels.signing import BadSignatureError
from channels.smtp import is_dead
from schemas.errors import InvalidEventError
from schemas.ids import digest
from schemas.messages import DeliveryReport
from schemas.status import Status, Suppression

REPORTED_AS: Final = "email"  # by whom reports are: whoever writes one does not know which of our providers sent the mail

_PREFIX: Final = "bounces+"
_LONGEST_LOCAL: Final = 64  # RFC 5321 section 4.5.3.1.1
# 50 bits, in letters that survive a relay's change of case: who guesses sends 2^49 mails for one address, and is counted
_MAC_CHARACTERS: Final = 10
_RETURN_PATH: Final = re.compile(re.escape(_PREFIX) + rf"([\w.-]{{1,45}})\.([a-z2-7]{{{_MAC_CHARACTERS}}})@", re.ASCII)
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


def key_of(token_key: bytes) -> bytes:
    """Return the key that signs return paths, derived from the deployment's token key."""
    return hmac.digest(token_key, b"return path", sha256)


def return_path(reference: str, *, domain: str, key: bytes) -> str | None:
    """Return the address at `domain` that bounces of the mail with this Message-ID go to; None: it would be too long."""
    delivery = reference.rpartition("@")[0]
    local = f"{_PREFIX}{delivery}.{_mac(key, delivery)}"
    return f"{local}@{domain}" if len(local) <= _LONGEST_LOCAL else None


def _mac(key: bytes, delivery: str) -> str:
    return b32encode(hmac.digest(key, delivery.lower().encode(), sha256)).decode()[:_MAC_CHARACTERS].lower()


def read_reports(raw: bytes, *, domain: str, key: bytes, at: datetime) -> list[DeliveryReport]:
    """Return the reports in a mail that came to the return path: none where it says nothing final, such as a delay.

    `domain`: of our Message-IDs; `key`: as `key_of` returns it; `at`: when it came. The end of `raw` may be missing. Reading it
    again gives the same reports. Raises InvalidEventError for what is no report, and BadSignatureError for one that came to no
    return path of ours; neither quotes anything.
    """
    try:
        mail = message_from_bytes(raw)
        parts = {part.get_content_type(): part for part in reversed(list(mail.walk()))}
        if status := parts.get("message/delivery-status") or parts.get("message/global-delivery-status"):  # RFC 6533
            return list(_of_status(status, lambda: _reference(mail, parts, domain, key), at))
        if feedback := parts.get("message/feedback-report"):
            return list(_of_feedback(feedback, lambda sender: _reference(mail, parts, domain, key, sender), at))
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
        # what the standard library's parser raises, besides defects, for mails that are none
        raise InvalidEventError("mail", "cannot be parsed") from None
    raise InvalidEventError("mail", "is neither a bounce nor a complaint")


def _of_status(status: Message, reference_of: Callable[[], str], at: datetime) -> Iterator[DeliveryReport]:
    blocks = [block for block in _blocks(status) if block.get("Action")]
    if not blocks:
        raise InvalidEventError("mail", "is a bounce without a recipient")
    found: dict[str, DeliveryReport] = {}
    for block in blocks:
        action = _text(block, "Action").strip().lower()
        if action in _NOTHING_FINAL:
            continue
        reference = reference_of()
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


def _of_feedback(feedback: Message, reference_of: Callable[[str], str], at: datetime) -> Iterator[DeliveryReport]:
    fields = next(_blocks(feedback))
    kind = _text(fields, "Feedback-Type").strip().lower()
    if kind not in _FEEDBACK:
        raise InvalidEventError("mail", "is feedback of a kind that is unknown")
    suppresses = _FEEDBACK[kind]
    if suppresses is not None:
        yield _report(reference_of(_text(fields, "Original-Mail-From")), Status.DELIVERED, kind, suppresses, at)


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


def _reference(mail: Message, parts: Mapping[str, Message], domain: str, key: bytes, sender: str = "") -> str:
    """Return the Message-ID of what was sent, by the first return path that we signed. Raises BadSignatureError.

    `sender`: whom the reporter knows the mail from; a feedback loop reports to an address of its own.
    """
    came_to = (str(each) for name in _CAME_TO for each in mail.get_all(name, []))
    for text in (sender, *came_to, *(_text(sent, "Return-Path") for sent in _sent(parts))):
        for path in _RETURN_PATH.finditer(text.lower()):
            if hmac.compare_digest(path[2], _mac(key, path[1])):
                return f"{path[1]}@{domain}"
    raise BadSignatureError("came to no return path that was signed here")


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
