"""Why Kafka cannot be reached: which server, which step, and what to look at. librdkafka alone says that all brokers are down."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import time

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, ClusterMetadata  # type: ignore[attr-defined]  # exported, but not said so

from streams.security import KafkaSecurity, Mechanism, Protocol
from streams.transport.cluster import Cluster

CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 5.0
_SLICE_SECONDS = 0.5
_ALERT_SECONDS = 0.5  # TLS 1.3 says only after the handshake that it wanted a certificate
# OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH
_WRONG_NAME = frozenset({62, 64})
_SAID = re.compile(r"(?:SASL authentication error: |handshake failed: )(?P<text>.*?)(?: \(after \d+ms in state \w+\))?$")


class UnreachableError(Exception):
    """No broker answers. The message says in one or two sentences why, and what to do."""


def ask(cluster: Cluster) -> ClusterMetadata:
    """Return what the cluster says of itself. Blocks for at most ANSWER_SECONDS. Raises UnreachableError.

    The way there is tried first, without a name: librdkafka alone does not tell a wrong name from an unknown authority.
    """
    ways = [_look(server, cluster.security) for server in cluster.bootstrap.split(",")]
    if all(ways):
        raise UnreachableError(" ".join(dict.fromkeys(filter(None, ways))))
    found: list[tuple[int, str]] = []
    config = {**cluster.config(), "log_level": 0, "error_cb": lambda error: found.append((error.code(), error.str()))}
    try:
        client = AdminClient(config)
    except KafkaException as error:
        raise UnreachableError(f"There is no token to authenticate with: {error.args[0].str()}.") from error
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            return client.list_topics(timeout=_SLICE_SECONDS)
        except KafkaException as error:
            client.poll(0)
            refused = next((text for code, text in found if code == KafkaError._AUTHENTICATION), None)  # noqa: SLF001 - public, for all its underscore
            if refused is not None:
                match = _SAID.search(refused)
                raise UnreachableError(_explain_authentication(match["text"] if match else refused, cluster.security)) from error
            if time.monotonic() > deadline:
                raise UnreachableError(_silence(cluster.security)) from error


def why_unreachable(cluster: Cluster) -> str:
    """Return in one or two sentences why Kafka did not answer a moment ago. Blocks for some seconds."""
    try:
        ask(cluster)
    except UnreachableError as error:
        return str(error)
    return f"Kafka at {cluster.bootstrap} did not answer, and does again: try again."


def _look(server: str, security: KafkaSecurity) -> str | None:
    """Return what is wrong with the connection to one server, up to TLS; None: nothing."""
    host, _, port = server.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS) as connection:
            if security.protocol.has_tls:
                return _look_at_tls(connection, host, server, security)
            return _look_for_tls(connection, server, security.protocol)
    except socket.gaierror:
        return f"The name {host} cannot be resolved: correct NOTIFY_KAFKA_BOOTSTRAP, or the name service."
    except ConnectionRefusedError:
        return f"Nothing listens at {server}: start Kafka, or correct NOTIFY_KAFKA_BOOTSTRAP."
    except TimeoutError:
        return f"{server} does not answer within {CONNECT_SECONDS:.0f} s: is a firewall between, or the machine down?"
    except OSError as error:
        return f"{server} cannot be reached ({error.strerror or type(error).__name__})."


def _look_at_tls(connection: socket.socket, host: str, server: str, security: KafkaSecurity) -> str | None:
    try:
        with security.tls.context().wrap_socket(connection, server_hostname=host.strip("[]")) as wrapped:
            wrapped.settimeout(_ALERT_SECONDS)
            with contextlib.suppress(TimeoutError):  # silence: it is content
                wrapped.recv(1)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in _WRONG_NAME:
            return (
                f"The certificate of {server} is for another name ({error.verify_message.rstrip('.')}): "
                "use the name in it in NOTIFY_KAFKA_BOOTSTRAP."
            )
        return (
            f"The certificate of {server} is not trusted ({error.verify_message.rstrip('.')}): "
            "NOTIFY_KAFKA_CA_FILE has to hold the authority that signed it."
        )
    except (ssl.SSLError, ConnectionResetError) as error:
        reason = getattr(error, "reason", "") or ""
        if "ALERT" in reason and ("CERTIFICATE" in reason or "UNKNOWN_CA" in reason):
            return (
                f"{server} wants a certificate of ours that it trusts ({reason.lower().replace('_', ' ')}): "
                "set NOTIFY_KAFKA_CERTIFICATE_FILE and NOTIFY_KAFKA_KEY_FILE."
            )
        return (
            f"{server} does not speak TLS, but NOTIFY_KAFKA_SECURITY_PROTOCOL is {security.protocol}: "
            "use another port, or another protocol."
        )
    return None


def _look_for_tls(connection: socket.socket, server: str, protocol: Protocol) -> str | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # nothing is sent but the greeting: whoever answers it speaks TLS
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with context.wrap_socket(connection):
            pass
    except ssl.SSLError as error:
        if "ALERT" not in (error.reason or ""):
            return None
    except OSError:
        return None
    with_tls = Protocol.SASL_SSL if protocol.has_sasl else Protocol.SSL
    return f"{server} speaks TLS, but NOTIFY_KAFKA_SECURITY_PROTOCOL is {protocol}: set {with_tls}."


def _silence(security: KafkaSecurity) -> str:
    """Return why Kafka may say nothing although the connection is made and nobody was refused."""
    if security.protocol.has_sasl:
        return f"Kafka takes the connection and does not answer. It was spoken to with {security.shown}."
    protocol = f"NOTIFY_KAFKA_SECURITY_PROTOCOL is {security.protocol}"
    return f"Kafka takes the connection and then ends it: {protocol}, and this port may ask for a name (SASL)."


def _explain_authentication(reason: str, security: KafkaSecurity) -> str:
    if "supported mechanisms" in reason:
        return f"NOTIFY_KAFKA_SASL_MECHANISM is {security.mechanism}, but {reason[reason.index('broker') :].replace(': ', ' are ')}."
    if security.mechanism is Mechanism.AWS_MSK_IAM:
        return f"Kafka does not accept our IAM identity ({reason}): look at its policy, the region {security.region} and the clock."
    return (
        f"Kafka does not accept the user {security.user!r} with this password ({reason}): "
        "look at NOTIFY_KAFKA_USER, NOTIFY_KAFKA_PASSWORD and NOTIFY_KAFKA_SASL_MECHANISM."
    )
