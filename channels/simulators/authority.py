"""A certificate authority of our own, so that simulators are met over TLS as the real peers are."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

if TYPE_CHECKING:
    from pathlib import Path

_GOOD_FOR = timedelta(days=30)
_SPARE = timedelta(days=1)


def make_authority(folder: Path, *, protocols: tuple[str, ...] = ("h2", "http/1.1"), is_kept: bool = False) -> ssl.SSLContext:
    """Write `ca.pem` into `folder`, and return the context of a server called localhost and 127.0.0.1 that it vouches for.

    `protocols`: what the server agrees to by ALPN, the best first. Keys and certificates are made anew each time, unless
    `is_kept`: then what is there serves on, for as long as it is good.
    """
    chain = folder / "server.pem"
    if not (is_kept and (folder / "ca.pem").exists() and chain.exists() and _is_good(chain)):
        _make(folder, chain)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(chain)
    context.set_alpn_protocols(list(protocols))
    return context


def _is_good(chain: Path) -> bool:
    return x509.load_pem_x509_certificate(chain.read_bytes()).not_valid_after_utc > datetime.now(UTC) + _SPARE


def _make(folder: Path, chain: Path) -> None:
    now = datetime.now(UTC)
    authority_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "notify simulator")])

    def certificate(name: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + _GOOD_FOR)
        )

    authority = (
        certificate(issuer, authority_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
    server = (
        certificate(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]), server_key)
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    (folder / "ca.pem").write_bytes(authority.public_bytes(Encoding.PEM))
    chain.touch(mode=0o600)
    chain.write_bytes(server.public_bytes(Encoding.PEM) + server_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
