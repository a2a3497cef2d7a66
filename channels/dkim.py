"""DKIM signatures (RFC 6376, with Ed25519 as in RFC 8463), made while a mail is composed.

dkimpy takes a message apart that was just put together, and raises to powers in Python: some twenty times as long. So it
only checks us: once when a key is loaded, since a signature that nobody can verify is worse than none, and in the tests.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

import dkim
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from schemas.errors import SettingsError

Header = tuple[bytes, bytes]

# where there: what a reader sees, what a reply or a thread follows, and the one click that RFC 8058 section 4 wants signed
SIGNED: Final = (
    b"From",
    b"To",
    b"Subject",
    b"Date",
    b"Message-ID",
    b"MIME-Version",
    b"Content-Type",
    b"Content-Transfer-Encoding",
    b"List-Unsubscribe",
    b"List-Unsubscribe-Post",
)
_SIGNED: Final = frozenset(SIGNED)
# signed once more than they are there: none can be added behind our back (RFC 6376 section 8.15)
_SEALED: Final = (b"from", b"to", b"subject")
_LEAST_RSA_BITS: Final = 1024  # RFC 8301 section 3.2
_SPACES: Final = re.compile(rb"[ \t\r\n]+")
_SPACES_IN_LINE: Final = re.compile(rb"[ \t]+")
_SELECTOR: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


class Signer:
    """Signs for `domain` with the private key whose public half is in the DNS at `{selector}._domainkey.{domain}`.

    `key`: PEM of an RSA key of 1024 bits and more, or an Ed25519 key, which not every receiver knows yet. Raises
    SettingsError, which never quotes the key.
    """

    def __init__(self, domain: str, selector: str, key: bytes) -> None:
        if not _SELECTOR.fullmatch(selector):
            raise SettingsError(["the DKIM selector is not a word of letters, digits, dots and hyphens"])
        try:
            loaded = serialization.load_pem_private_key(key, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise SettingsError(["the DKIM key is not a private key in PEM without a password"]) from None
        if not isinstance(loaded, RSAPrivateKey | Ed25519PrivateKey) or (
            isinstance(loaded, RSAPrivateKey) and loaded.key_size < _LEAST_RSA_BITS
        ):
            raise SettingsError([f"the DKIM key is neither Ed25519 nor RSA of {_LEAST_RSA_BITS} bits and more"])
        self._key = loaded
        self._domain = domain
        self.name = f"{selector}._domainkey.{domain}"  # where the DNS has the public half
        self._algorithm = "rsa" if isinstance(loaded, RSAPrivateKey) else "ed25519"
        self._start = f"v=1; a={self._algorithm}-sha256; c=relaxed/relaxed; d={domain}; s={selector};\r\n t=".encode("ascii")
        self._check()

    @property
    def record(self) -> str:
        """What the DNS has to say at `name`, in a TXT record."""
        if isinstance(self._key, RSAPrivateKey):
            public = self._key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        else:
            public = self._key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        return f"v=DKIM1; k={self._algorithm}; p={base64.b64encode(public).decode('ascii')}"

    def is_published(self, record: str) -> bool:
        """Say whether `record`, which the DNS has, is our public half: other tags do not matter, nor does white space."""
        ours, theirs = (dict(tag.partition("=")[::2] for tag in re.sub(r"\s", "", text).split(";")) for text in (self.record, record))
        return theirs.get("p") == ours["p"] and theirs.get("k", "rsa") == ours["k"]

    def sign(self, head: Sequence[Header], body: bytes, *, at: datetime) -> bytes:
        r"""Return the header that signs a mail, ended by \r\n: it goes before all others.

        `head`: the headers, no name twice, each value folded as it is sent; `body`: with its last \r\n.
        """
        signed = [(name.lower(), value) for name, value in head if name in _SIGNED]
        names = b":".join([*(name for name, _ in signed), *(name for name in _SEALED)])
        body_hash = base64.b64encode(hashlib.sha256(_relaxed(body)).digest())
        value = b"%b%d;\r\n h=%b;\r\n bh=%b;\r\n b=" % (self._start, int(at.timestamp()), _folded(names, b":"), body_hash)
        told = b"".join([b"%b:%b\r\n" % (name, _SPACES.sub(b" ", each).strip(b" ")) for name, each in signed])
        signature = base64.b64encode(self._signature(b"%bdkim-signature:%b" % (told, _SPACES.sub(b" ", value))))
        lines = b"\r\n ".join([signature[i : i + 72] for i in range(0, len(signature), 72)])
        return b"DKIM-Signature: %b%b\r\n" % (value, lines)

    def _signature(self, told: bytes) -> bytes:
        if isinstance(self._key, RSAPrivateKey):
            return self._key.sign(told, padding.PKCS1v15(), hashes.SHA256())
        return self._key.sign(hashlib.sha256(told).digest())  # RFC 8463 section 3: of the hash

    def _check(self) -> None:
        """Raise SettingsError when another's verifier does not understand what we sign."""
        head = [(b"From", f"check@{self._domain}".encode("ascii")), (b"Subject", b"check")]
        body = b"A mail  that nobody \r\ngets.\r\n\r\n"
        mail = self.sign(head, body, at=datetime.now(UTC)) + b"".join(b"%b: %b\r\n" % each for each in head) + b"\r\n" + body
        if self._algorithm == "rsa" and not dkim.verify(mail, dnsfunc=lambda *_args, **_options: self.record.encode("ascii")):
            raise SettingsError(["the DKIM key makes signatures that do not verify"])


def _folded(names: bytes, separator: bytes) -> bytes:
    """Return a list of names in lines below 78 characters: two are enough."""
    middle = names.find(separator, 60)
    return names if middle < 0 else b"%b%b\r\n %b" % (names[:middle], separator, names[middle + 1 :])


def _relaxed(body: bytes) -> bytes:
    r"""Return `body`, which ends with \r\n, in the form that is hashed (RFC 6376 section 3.4.4)."""
    if b"  " in body or b"\t" in body or b" \r\n" in body:
        body = _SPACES_IN_LINE.sub(b" ", body).replace(b" \r\n", b"\r\n")
    if body.endswith(b"\r\n\r\n"):
        body = body.rstrip(b"\r\n") + b"\r\n"
    return b"" if body == b"\r\n" else body
