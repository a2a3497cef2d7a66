"""How clients prove who they are to Kafka and the schema registry, and how they know whom they talk to.

Both Kafka clients of a worker (librdkafka and Faust's aiokafka), the command line and the registry's client take what
they need from here, so that none of them can differ.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from schemas.errors import SettingsError

# a token and when it expires, in seconds since 1970. Blocks: it may ask Amazon for credentials
TokenSource = Callable[[], tuple[str, float]]
_RENEW_SECONDS = 60.0  # before a token expires


class Protocol(StrEnum):
    """How a connection to Kafka is protected, in Kafka's own words."""

    PLAINTEXT = "PLAINTEXT"
    SSL = "SSL"
    SASL_PLAINTEXT = "SASL_PLAINTEXT"
    SASL_SSL = "SASL_SSL"

    @property
    def has_tls(self) -> bool:
        """Say whether the connection is encrypted."""
        return self in {Protocol.SSL, Protocol.SASL_SSL}

    @property
    def has_sasl(self) -> bool:
        """Say whether the client names itself through SASL."""
        return self in {Protocol.SASL_PLAINTEXT, Protocol.SASL_SSL}


class Mechanism(StrEnum):
    """How a client names itself through SASL."""

    PLAIN = "PLAIN"
    SCRAM_SHA_256 = "SCRAM-SHA-256"
    SCRAM_SHA_512 = "SCRAM-SHA-512"
    AWS_MSK_IAM = "AWS_MSK_IAM"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Whom to trust and what to show. `ca_file` None: the machine's own authorities; `certificate_file` None: nothing is shown."""

    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    key_password: str | None = field(default=None, repr=False)

    def context(self) -> ssl.SSLContext:
        """Return what Python's clients connect with. Raises OSError or ssl.SSLError for files that are not what they should be."""
        context = ssl.create_default_context(cafile=None if self.ca_file is None else str(self.ca_file))
        if self.certificate_file is not None and self.key_file is not None:
            # without a password OpenSSL would ask for one at the terminal
            context.load_cert_chain(self.certificate_file, self.key_file, password=self.key_password or "")
        return context

    def given(self) -> list[str]:
        """Return the ends of the variables that are set."""
        values = {
            "CA_FILE": self.ca_file,
            "CERTIFICATE_FILE": self.certificate_file,
            "KEY_FILE": self.key_file,
            "KEY_PASSWORD": self.key_password,
        }
        return [name for name, value in values.items() if value is not None]

    def problems(self, prefix: str) -> Iterator[str]:
        """Yield a sentence for each file that cannot be used. `prefix`: of the variables, such as NOTIFY_KAFKA_."""
        if (self.certificate_file is None) is not (self.key_file is None):
            there, missing = ("CERTIFICATE_FILE", "KEY_FILE") if self.key_file is None else ("KEY_FILE", "CERTIFICATE_FILE")
            yield f"{prefix}{missing} is missing: {prefix}{there} is set, and a certificate is shown with its key"
        if self.key_password is not None and self.key_file is None:
            yield f"{prefix}KEY_PASSWORD is set, but {prefix}KEY_FILE is not: there is no key to open"
        unreadable = False
        for name, path in (("CA_FILE", self.ca_file), ("CERTIFICATE_FILE", self.certificate_file), ("KEY_FILE", self.key_file)):
            try:
                if path is not None:
                    path.read_bytes()
            except (OSError, ValueError) as error:
                unreadable = True
                reason = error.strerror if isinstance(error, OSError) else "not a path"
                yield f"{prefix}{name}: {str(path)!r} cannot be read ({reason})"
        if not unreadable:
            yield from self._unusable(prefix)

    def _unusable(self, prefix: str) -> Iterator[str]:
        try:
            Tls(ca_file=self.ca_file).context()
        except (OSError, ValueError):
            yield f"{prefix}CA_FILE: {str(self.ca_file)!r} holds no certificate in PEM"
        if self.certificate_file is None or self.key_file is None:
            return
        try:
            Tls(certificate_file=self.certificate_file, key_file=self.key_file, key_password=self.key_password).context()
        except (OSError, ValueError) as error:
            if "KEY_VALUES_MISMATCH" in str(error):
                yield f"{prefix}KEY_FILE: {str(self.key_file)!r} is not the key of the certificate in {prefix}CERTIFICATE_FILE"
            elif "ENCRYPTED" in self.key_file.read_text("latin-1"):
                said = "does not open" if self.key_password else "is needed to open"
                yield f"{prefix}KEY_PASSWORD {said} {str(self.key_file)!r}"
            else:
                yield f"{prefix}CERTIFICATE_FILE and {prefix}KEY_FILE: no certificate with its key in PEM"


@dataclass(frozen=True, slots=True, kw_only=True)
class KafkaSecurity:
    """How Kafka is talked to. `tokens`: where tokens come from instead of Amazon, for clusters with an authority of their own."""

    protocol: Protocol = Protocol.PLAINTEXT
    mechanism: Mechanism | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    region: str | None = None
    tls: Tls = Tls()
    tokens: TokenSource | None = field(default=None, repr=False, compare=False)

    @property
    def shown(self) -> str:
        """How the connection is protected and as whom, for people."""
        who = self.user or ("an IAM identity" if self.mechanism is Mechanism.AWS_MSK_IAM else None)
        how = f"{self.protocol} with {self.mechanism}" if self.mechanism else str(self.protocol)
        return f"{how} as {who}" if who else f"{how} with a certificate" if self.tls.certificate_file else how

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each thing that is missing, contradicts another, or would silently not be used."""
        prefix, protocol = "NOTIFY_KAFKA_", f"NOTIFY_KAFKA_SECURITY_PROTOCOL is {self.protocol}"
        if self.protocol.has_tls:
            yield from self.tls.problems(prefix)
        else:
            for name in self.tls.given():
                yield f"{prefix}{name} is set, but {protocol}, which does not use TLS: set SSL or SASL_SSL"
        of_sasl = {"SASL_MECHANISM": self.mechanism, "USER": self.user, "PASSWORD": self.password, "REGION": self.region}
        given = [name for name, value in of_sasl.items() if value is not None]
        if not self.protocol.has_sasl:
            for name in given:
                yield f"{prefix}{name} is set, but {protocol}, which does not use SASL: set SASL_SSL"
        elif self.mechanism is None:
            yield f"{prefix}SASL_MECHANISM is missing: {protocol}; one of {', '.join(Mechanism)}"
        elif self.mechanism is Mechanism.AWS_MSK_IAM:
            yield from self._iam_problems(protocol)
        else:
            for name in ("USER", "PASSWORD"):
                if name not in given:
                    yield f"{prefix}{name} is missing: {prefix}SASL_MECHANISM is {self.mechanism}"
            if "REGION" in given:
                yield f"{prefix}REGION is set, but {prefix}SASL_MECHANISM is {self.mechanism}: only AWS_MSK_IAM uses it"

    def _iam_problems(self, protocol: str) -> Iterator[str]:
        prefix = "NOTIFY_KAFKA_"
        if not self.protocol.has_tls:
            yield f"{protocol}, but AWS_MSK_IAM needs SASL_SSL: its tokens must not travel unencrypted"
        if self.region is None:
            yield f"{prefix}REGION is missing: AWS_MSK_IAM signs for a region, such as eu-west-1"
        for name, value in (("USER", self.user), ("PASSWORD", self.password)):
            if value is not None:
                yield f"{prefix}{name} is set, but AWS_MSK_IAM takes credentials from Amazon's own chain: remove it"

    def token_source(self) -> TokenSource:
        """Return where tokens come from. Raises SettingsError when the signer is not installed."""
        if self.tokens is not None:
            return self.tokens
        assert self.region is not None
        return msk_tokens(self.region)

    def librdkafka(self) -> dict[str, Any]:
        """Return the part of a librdkafka configuration that is about security. Raises SettingsError: the signer is not installed."""
        if self.protocol is Protocol.PLAINTEXT:
            return {}
        config: dict[str, Any] = {"security.protocol": str(self.protocol)}
        for name, path in (("ca", self.tls.ca_file), ("certificate", self.tls.certificate_file), ("key", self.tls.key_file)):
            if path is not None:
                config[f"ssl.{name}.location"] = str(path)
        if self.tls.key_password is not None:
            config["ssl.key.password"] = self.tls.key_password
        if self.mechanism is Mechanism.AWS_MSK_IAM:
            tokens = self.token_source()
            config |= {"sasl.mechanism": "OAUTHBEARER", "oauth_cb": lambda _config: tokens()}
        elif self.mechanism is not None:
            config |= {"sasl.mechanism": str(self.mechanism), "sasl.username": self.user, "sasl.password": self.password}
        return config


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrySecurity:
    """How the schema registry is talked to: a name and password with each request, and TLS where its URL begins with https."""

    user: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: Tls = Tls()

    def problems(self, url: str) -> Iterator[str]:
        """Yield a sentence for each thing that is missing, contradicts another, or would silently not be used."""
        prefix = "NOTIFY_REGISTRY_"
        if (self.user is None) is not (self.password is None):
            there, missing = ("USER", "PASSWORD") if self.password is None else ("PASSWORD", "USER")
            yield f"{prefix}{missing} is missing: {prefix}{there} is set"
        if url.startswith("https://"):
            yield from self.tls.problems(prefix)
            return
        for name in self.tls.given():
            yield f"{prefix}{name} is set, but {prefix}URL does not begin with https://, so it would not be used"


@cache  # one token for all clients of the process
def msk_tokens(region: str) -> TokenSource:
    """Return a source of tokens for Amazon MSK in `region`, signed with what Amazon's own chain finds (environment, profile, role).

    A token is used until shortly before it expires (they live 15 minutes). Raises SettingsError when the signer is not installed.
    """
    try:
        from aws_msk_iam_sasl_signer import MSKAuthTokenProvider
    except ImportError as error:
        problem = "NOTIFY_KAFKA_SASL_MECHANISM is AWS_MSK_IAM, whose signer is not installed: pip install 'flowmart-notifications[msk]'"
        raise SettingsError([problem]) from error
    kept: list[tuple[str, float]] = []

    def tokens() -> tuple[str, float]:
        if not kept or kept[0][1] - time.time() < _RENEW_SECONDS:
            token, expires_ms = MSKAuthTokenProvider.generate_auth_token(region)
            kept[:] = [(token, expires_ms / 1000)]
        return kept[0]

    return tokens
