"""Mail as bytes: what never changes is encoded once, the rest by hand.

EmailMessage takes some hundred times as long. Sources: RFC 5322 (messages), 2045 to 2047 (MIME), 3834 (automatic mail), 6532
(addresses beyond ASCII), 8058 (one-click unsubscribe).
"""

from __future__ import annotations

import binascii
import re
import unicodedata
from dataclasses import dataclass
from datetime import datetime
from email.utils import format_datetime, parseaddr
from typing import TYPE_CHECKING, Final

from schemas.errors import ProviderRejectedError, SettingsError

if TYPE_CHECKING:
    from channels.dkim import Signer
    from schemas.messages import Content, Delivery

_LONGEST_ADDRESS: Final = 320
_LONGEST_LOCAL: Final = 64
_LONGEST_LINE: Final = 998  # RFC 5322 section 2.1.1
_LONGEST_URL: Final = 900  # with its header's name within a line
_ENCODED_WORD_BYTES: Final = 39  # "Subject: " and an encoded word of them stay within the 76 characters of RFC 2047
_LONGEST_PLAIN_HEADER: Final = 66

# no quoted local parts: whatever passes needs no quoting on a command line or in a header
_LOCAL: Final = re.compile(r"[\w.!#$%&'*+/=?^`{|}~-]{1,64}", re.ASCII)
_DOMAIN: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?", re.ASCII)
_HEADER_TOKEN: Final = re.compile(r"[\w.-]{1,200}", re.ASCII)
_URL: Final = re.compile(r"https?://[!-;=?-~]+")
_FORBIDDEN_IN_HEADERS: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_FORBIDDEN_IN_7BIT: Final = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]")

Header = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Mailbox:
    """An address with the name shown beside it."""

    address: str
    name: str | None = None

    @property
    def domain(self) -> str:
        """What follows the @."""
        return self.address.rpartition("@")[2]


def parse_sender(text: str) -> Mailbox:
    """Return the mailbox in `text`: `shop@host` or `Shop <shop@host>`. Raises SettingsError."""
    try:
        if _FORBIDDEN_IN_HEADERS.search(text):
            raise ProviderRejectedError("control characters", code="header")
        name, address = parseaddr(text)
        mailbox = Mailbox(recipient_address(address), name or None)
        if not mailbox.address.isascii():
            raise ProviderRejectedError("a sender that not every server takes", code="address")
    except ProviderRejectedError:
        raise SettingsError(["the sender of e-mail is not an address such as shop@host or Shop <shop@host>"]) from None
    return mailbox


def is_domain(text: str) -> bool:
    """Say whether `text` is a domain in ASCII."""
    return bool(_DOMAIN.fullmatch(text)) and ".." not in text and len(text) <= 253


def recipient_address(address: str) -> str:
    """Return `address` fit for a command line and a header: its domain in ASCII (RFC 3490).

    A local part beyond ASCII stays as it is, composed (NFC): only servers with SMTPUTF8 take it (RFC 6531). Raises
    ProviderRejectedError with the code `address` for anything else than one plain mailbox of at most 320 bytes. Quoted
    local parts are not supported.
    """
    local, _, domain = address.rpartition("@")
    if not domain.isascii():
        try:
            domain = domain.encode("idna").decode("ascii")
        except UnicodeError:
            domain = ""
    if not local.isascii() and local.isprintable():
        local = unicodedata.normalize("NFC", local)
    plain = f"{local}@{domain}"
    if not _is_local(local) or not is_domain(domain) or len(plain.encode()) > _LONGEST_ADDRESS:
        raise ProviderRejectedError("the address is not a mailbox", code="address") from None
    return plain


def _is_local(local: str) -> bool:
    # what is not ASCII is allowed as it is, as long as it can be seen; isprintable: no spaces but U+0020, no surrogates
    visible = "".join(c for c in local if c.isascii())
    if visible == local:
        return bool(_LOCAL.fullmatch(local))
    return local.isprintable() and len(local.encode()) <= _LONGEST_LOCAL and (not visible or bool(_LOCAL.fullmatch(visible)))


def is_token(text: str) -> bool:
    """Say whether `text` can stand in a header and in an address: 1 to 200 letters, digits, dots, hyphens and underscores."""
    return bool(_HEADER_TOKEN.fullmatch(text))


class Letterhead:
    """What all mails of a sender have in common, encoded once.

    `domain` is the right side of every Message-ID: the same for all providers, since a mailbox knows a repetition by its
    Message-ID. `signer`: signs each mail.
    """

    def __init__(self, sender: Mailbox, *, domain: str | None = None, signer: Signer | None = None) -> None:
        self.sender = sender
        self._domain = domain or sender.domain
        self._signer = signer
        self._from = (b"From", _mailbox_header(sender))
        self._constant: tuple[Header, ...] = ((b"Auto-Submitted", b"auto-generated"), (b"MIME-Version", b"1.0"))
        self._date = (0, b"")

    def message_id(self, delivery: Delivery) -> str:
        """Return the Message-ID without its angle brackets: the same at each attempt of a redrive generation."""
        return f"{delivery.delivery_id}.{delivery.generation}@{self._domain}"

    def compose(self, delivery: Delivery, content: Content, *, recipient: str, at: datetime, unsubscribe_url: str | None = None) -> bytes:
        r"""Return the message as it goes over the wire, dots not doubled: lines ended by \r\n, none above 998 bytes.

        ASCII only, unless the local part of `recipient` is not. `recipient` is the address part of `content` as
        `recipient_address` returns it. A click on `unsubscribe_url` ends such mails (RFC 8058). Raises
        ProviderRejectedError with the code `header` for control characters in name, subject or URL, and `content` when
        there is neither text nor html.
        """
        if not is_token(delivery.delivery_id) or not is_token(delivery.notification_id):
            raise ProviderRejectedError("an id cannot stand in a header", code="header")
        delivery_id = delivery.delivery_id.encode("ascii")
        head = [
            self._from,
            (b"To", _mailbox_header(Mailbox(recipient, content.name))),
            (b"Date", self._dated(at)),
            (b"Message-ID", b"<%b>" % self.message_id(delivery).encode("ascii")),
            (b"X-Notify-Delivery", delivery_id),
            (b"X-Notify-Notification", delivery.notification_id.encode("ascii")),
            *self._constant,
        ]
        if content.subject is not None:
            head.append((b"Subject", _text_header(content.subject)))
        if unsubscribe_url is not None:
            head += _unsubscribe_headers(unsubscribe_url)
        # plainest first: of several alternatives a reader shows the last one that it can (RFC 2046 section 5.1.4)
        parts = [_part(kind, text) for kind, text in ((b"plain", content.text), (b"html", content.html)) if text is not None]
        if not parts:
            raise ProviderRejectedError("neither text nor html to send", code="content")
        if len(parts) == 1:
            kind, encoding, body = parts[0]
            head += [(b"Content-Type", kind), (b"Content-Transfer-Encoding", encoding)]
        else:
            # "=_" cannot occur in either encoding, and `_part` never leaves it in plain text: the boundary is unique
            boundary = b"=_" + delivery_id[:60]
            head.append((b"Content-Type", b'multipart/alternative;\r\n boundary="%b"' % boundary))
            body = b"".join(
                [b"--%b\r\nContent-Type: %b\r\nContent-Transfer-Encoding: %b\r\n\r\n%b\r\n" % (boundary, *part) for part in parts]
                + [b"--%b--" % boundary]
            )
        body += b"\r\n"
        signature = b"" if self._signer is None else self._signer.sign(head, body, at=at)
        return b"%b%b\r\n%b" % (signature, b"".join([b"%b: %b\r\n" % header for header in head]), body)

    def _dated(self, at: datetime) -> bytes:
        """Return the date; mails of one second share it."""
        second = int(at.timestamp())
        if self._date[0] != second:
            self._date = (second, format_datetime(at).encode("ascii"))
        return self._date[1]


def _unsubscribe_headers(url: str) -> tuple[Header, Header]:
    if len(url) > _LONGEST_URL or not _URL.fullmatch(url):
        raise ProviderRejectedError("the url to unsubscribe at cannot stand in a header", code="header")
    return (
        (b"List-Unsubscribe", b"<%b>" % url.encode("ascii")),
        (b"List-Unsubscribe-Post", b"List-Unsubscribe=One-Click"),
    )


def _mailbox_header(mailbox: Mailbox) -> bytes:
    if _FORBIDDEN_IN_HEADERS.search(mailbox.name or ""):
        raise ProviderRejectedError("a name holds control characters", code="header")
    name = (mailbox.name or "").strip()
    if not name:
        return mailbox.address.encode()
    if _is_plain(name):
        quoted = name.replace("\\", "\\\\").replace('"', '\\"')
        phrase = f'"{quoted}"'
    else:
        phrase = _encoded_words(name)
    return f"{phrase}\r\n <{mailbox.address}>".encode()


def _text_header(text: str) -> bytes:
    if _FORBIDDEN_IN_HEADERS.search(text):
        raise ProviderRejectedError("the subject holds control characters", code="header")
    return (text if _is_plain(text) else _encoded_words(text)).encode("ascii")


def _is_plain(text: str) -> bool:
    return text.isascii() and len(text) <= _LONGEST_PLAIN_HEADER and "=?" not in text and text == text.strip()


def _encoded_words(text: str) -> str:
    """Return `text` as base64 words of RFC 2047, one a line, none ending within a character."""
    raw = text.encode()
    words: list[bytes] = []
    start = 0
    while start < len(raw):
        end = start + _ENCODED_WORD_BYTES
        while end < len(raw) and raw[end] & 0xC0 == 0x80:  # goes on with a character
            end -= 1
        words.append(raw[start:end])
        start = end
    return "\r\n ".join(f"=?utf-8?b?{binascii.b2a_base64(word, newline=False).decode('ascii')}?=" for word in words)


def _part(kind: bytes, text: str) -> tuple[bytes, bytes, bytes]:
    """Return a MIME part's type, encoding and body, in the shortest encoding that survives every server."""
    raw = text.replace("\r\n", "\n").replace("\r", "\n").encode("utf-8", "replace")
    if (
        raw.isascii()
        and b"=_" not in raw
        and not _FORBIDDEN_IN_7BIT.search(raw)
        and max(map(len, raw.split(b"\n"))) <= _LONGEST_LINE - 1  # a leading dot is doubled on the wire
    ):
        encoding, body = b"7bit", raw
    else:
        encoding, body = b"quoted-printable", binascii.b2a_qp(raw, istext=True)
        if len(body) > len(raw) * 3 // 2:
            lines = raw.replace(b"\n", b"\r\n")
            encoding = b"base64"
            body = b"\n".join(binascii.b2a_base64(lines[i : i + 57], newline=False) for i in range(0, len(lines), 57))
    return b"text/%b; charset=utf-8" % kind, encoding, body.replace(b"\n", b"\r\n")
