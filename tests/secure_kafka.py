"""A broker as users have it: TLS with an authority of its own, SCRAM users, rights; and three brokers. For tests only."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ipaddress
import os
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from confluent_kafka.admin import (  # type: ignore[attr-defined]  # exported, but not said so
    AclBindingFilter,
    AdminClient,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from streams.embedded import artifacts
from streams.embedded.kafka import KafkaBroker
from streams.embedded.processes import LOOPBACK, choose_port
from streams.rights import Right
from streams.security import KafkaSecurity, Mechanism, Protocol, Tls
from streams.transport.cluster import Cluster

T = TypeVar("T")
ADMIN, ADMIN_PASSWORD = "admin", "admin-secret"
LISTENERS = ("SCRAM", "MUTUAL", "TOKENS", "PLAIN")


class Authority:
    """A certificate authority in a folder. Keys are PKCS#8, as Java's PEM stores and librdkafka both read them."""

    def __init__(self, folder: Path, name: str = "Test authority") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        builder = self._builder(self._name, self._key.public_key()).add_extension(constraints, critical=True)
        self.file = folder / f"{name.replace(' ', '-').lower()}.pem"
        self.file.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *, hosts: Sequence[str] = (), password: str | None = None) -> Tls:
        """Return a certificate for `name` with its key, and this authority to trust. `hosts`: names of a server."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key.public_key())
        if hosts:
            names = [x509.IPAddress(ipaddress.ip_address(host)) if host[0].isdigit() else x509.DNSName(host) for host in hosts]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate, secret = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        certificate.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        how: Any = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
        secret.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how))
        return Tls(ca_file=self.file, certificate_file=certificate, key_file=secret, key_password=password)

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=2))
        )


class SecureBroker(KafkaBroker):
    """A broker where nobody may do anything without a right, except `admin`.

    Listeners: SCRAM (SASL_SSL), MUTUAL (SSL with a client's certificate), TOKENS (SASL_SSL with unsigned OAuth tokens, in
    Amazon's place) and PLAIN (SASL_PLAINTEXT with SCRAM).
    """

    heap_megabytes = 256
    has_short_life = True

    def __init__(self, folder: Path, authority: Authority, *, heard: Mapping[str, int], controller_port: int) -> None:
        super().__init__(folder, port=heard["SCRAM"], controller_port=controller_port, env=os.environ)
        self.authority = authority
        self.heard = heard
        # the broker's certificate names 127.0.0.1 and not localhost
        authority.issue("broker", hosts=[LOOPBACK])

    def ports(self) -> Sequence[int]:
        return (*self.heard.values(), self.controller_port)

    def cluster(self, user: str, password: str, *, listener: str = "SCRAM") -> Cluster:
        """Return how `user` reaches the broker with SCRAM."""
        return Cluster(bootstrap=f"{LOOPBACK}:{self.heard[listener]}", security=self.security(user, password))

    def security(self, user: str, password: str) -> KafkaSecurity:
        tls = Tls(ca_file=self.authority.file)
        return KafkaSecurity(protocol=Protocol.SASL_SSL, mechanism=Mechanism.SCRAM_SHA_512, user=user, password=password, tls=tls)

    def grant(self, user: str, rights: Sequence[Right]) -> None:
        """Give `user` these rights."""
        self._done(self._admin.create_acls([right.binding(f"User:{user}") for right in rights]))

    def withdraw(self, user: str, right: Right) -> None:
        """Take one right away."""
        found = right.binding(f"User:{user}")
        fields = (
            found.restype,
            found.name,
            found.resource_pattern_type,
            found.principal,
            found.host,
            found.operation,
            found.permission_type,
        )
        self._done(self._admin.delete_acls([AclBindingFilter(*fields)]))

    def add_user(self, user: str, password: str) -> None:
        """Make a SCRAM user."""
        info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        self._done(self._admin.alter_user_scram_credentials([UserScramCredentialUpsertion(user, info, password.encode())]))

    @cached_property
    def _admin(self) -> AdminClient:
        # kept: a client that goes takes its pending requests with it
        return AdminClient(self.client())

    def _done(self, futures: Mapping[Any, Any]) -> None:
        for future in futures.values():
            future.result(10)

    def client(self) -> dict[str, Any]:
        return {**self.cluster(ADMIN, ADMIN_PASSWORD).config(), "log_level": 0}

    def format_arguments(self) -> Sequence[str]:
        return (*super().format_arguments(), "--add-scram", f"SCRAM-SHA-512=[name={ADMIN},password={ADMIN_PASSWORD}]")

    def configuration(self) -> str:
        plain = super().configuration()
        kept = [line for line in plain.splitlines() if not line.startswith(("listeners=", "advertised.", "listener.security"))]
        addresses = [f"{name}://{LOOPBACK}:{port}" for name, port in self.heard.items()]
        # Java wants certificate and key in one store
        store = self.authority.folder / "broker.store.pem"
        store.write_text((self.authority.folder / "broker.key").read_text() + (self.authority.folder / "broker.pem").read_text())
        scram = "org.apache.kafka.common.security.scram.ScramLoginModule required"
        bearer = "org.apache.kafka.common.security.oauthbearer"
        unsigned = "internals.unsecured.OAuthBearerUnsecuredValidatorCallbackHandler"
        return "\n".join(
            [
                *kept,
                f"listeners={','.join(addresses)},CONTROLLER://{LOOPBACK}:{self.controller_port}",
                f"advertised.listeners={','.join(addresses)}",
                "listener.security.protocol.map=CONTROLLER:PLAINTEXT,SCRAM:SASL_SSL,MUTUAL:SSL,TOKENS:SASL_SSL,PLAIN:SASL_PLAINTEXT",
                "inter.broker.listener.name=SCRAM",
                "sasl.mechanism.inter.broker.protocol=SCRAM-SHA-512",
                "sasl.enabled.mechanisms=SCRAM-SHA-512",
                f'listener.name.scram.scram-sha-512.sasl.jaas.config={scram} username="{ADMIN}" password="{ADMIN_PASSWORD}";',
                f"listener.name.plain.scram-sha-512.sasl.jaas.config={scram};",
                "listener.name.tokens.sasl.enabled.mechanisms=OAUTHBEARER",
                f"listener.name.tokens.oauthbearer.sasl.jaas.config={bearer}.OAuthBearerLoginModule required;",
                f"listener.name.tokens.oauthbearer.sasl.server.callback.handler.class={bearer}.{unsigned}",
                # a session ends with its token, unless its client shows another one before (KIP-368)
                "listener.name.tokens.oauthbearer.connections.max.reauth.ms=3600000",
                "ssl.keystore.type=PEM",
                f"ssl.keystore.location={store}",
                "ssl.truststore.type=PEM",
                f"ssl.truststore.location={self.authority.file}",
                "listener.name.mutual.ssl.client.auth=required",
                "listener.name.mutual.ssl.principal.mapping.rules=RULE:^CN=(.*)$/$1/,DEFAULT",
                "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer",
                # ANONYMOUS is the broker itself at its controller, which hears nobody else
                f"super.users=User:{ADMIN};User:ANONYMOUS",
                "",
            ]
        )


class CompanyBroker(KafkaBroker):
    """One of several brokers."""

    heap_megabytes = 256
    has_short_life = True
    replication = 3

    def __init__(self, folder: Path, *, number: int, ports: Sequence[int], controller_ports: Sequence[int]) -> None:
        super().__init__(folder, port=ports[number - 1], controller_port=controller_ports[number - 1], env=os.environ)
        self.number = number
        self.all_ports = ports
        self._voters = ",".join(f"{n}@{LOOPBACK}:{port}" for n, port in enumerate(controller_ports, 1))

    def configuration(self) -> str:
        changed = {
            "node.id": str(self.number),
            "controller.quorum.voters": self._voters,
            "offsets.topic.replication.factor": "3",
            "transaction.state.log.replication.factor": "3",
            "transaction.state.log.min.isr": "2",
            "share.coordinator.state.topic.replication.factor": "3",
            "share.coordinator.state.topic.min.isr": "2",
            "replica.lag.time.max.ms": "5000",
        }
        kept = [line for line in super().configuration().splitlines() if line.partition("=")[0] not in changed]
        return "\n".join([*kept, *(f"{name}={value}" for name, value in changed.items()), ""])

    async def after_ready(self) -> None:
        """Do nothing: the brokers' own topics are made when all are there."""


class Loop:
    """An event loop in a thread of its own: servers die with the thread they began in."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="servers", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    for _ in range(count):
        found.append(choose_port(taken=found))
    return found


async def _class_path() -> tuple[str, Path]:
    cache = artifacts.default_cache_dir(os.environ)
    return await artifacts.obtain_kafka(cache, lambda _said: None), artifacts.start_cache(cache, artifacts.KAFKA)


@contextlib.contextmanager
def secure_broker(folder: Path) -> Iterator[SecureBroker]:
    """Yield a running broker with encryption and rights."""
    *ports, controller = _free_ports(len(LISTENERS) + 1)
    broker = SecureBroker(
        folder / "kafka", Authority(folder / "tls"), heard=dict(zip(LISTENERS, ports, strict=True)), controller_port=controller
    )
    loop = Loop()
    try:
        broker.class_path, broker.start_cache = loop.run(_class_path())
        loop.run(broker.start())
        yield broker
    finally:
        loop.run(broker.kill())
        loop.close()


@contextlib.contextmanager
def three_brokers(folder: Path) -> Iterator[tuple[Loop, list[CompanyBroker]]]:
    """Yield three running brokers, each broker and controller, and the loop that starts and kills them."""
    ports, controllers = (found := _free_ports(6))[:3], found[3:]
    brokers = [CompanyBroker(folder / f"kafka-{n}", number=n, ports=ports, controller_ports=controllers) for n in (1, 2, 3)]
    loop = Loop()

    async def start() -> None:
        await asyncio.gather(*(broker.start() for broker in brokers))
        await KafkaBroker.after_ready(brokers[0])

    try:
        path, cache = loop.run(_class_path())
        for broker in brokers:
            broker.class_path, broker.start_cache = path, cache
        loop.run(start())
        yield loop, brokers
    finally:
        for broker in brokers:
            loop.run(broker.kill())
        loop.close()
