"""One Kafka broker on this machine: KRaft, controller and broker in one process, 127.0.0.1 only.

Everything that keeps three brokers safe is turned down to one replica; everything that makes a client wait for company
(the rebalance delay) is turned off. Durability and transactions are the real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from streams.embedded import disk
from streams.embedded.artifacts import java
from streams.embedded.processes import (
    LOOPBACK,
    Launch,
    ManagedProcess,
    Server,
    accepts_connections,
    inherited_environment,
)

PROTOCOL_TIMEOUT_SECONDS: Final = 5.0
INTERNAL_PARTITIONS: Final = 8
FORMAT_DEADLINE_SECONDS: Final = 60.0
_TRIES: Final = 6  # of PROTOCOL_TIMEOUT_SECONDS each
CLUSTER_ID: Final = "Zmxvd21hcnQtbm90aWZ5IQ"  # any 16 bytes in base64; one folder is one cluster

# Kafka says nothing at WARN when all is well, and a log of five lines is read.
LOGGING: Final = """\
rootLogger.level=WARN
rootLogger.appenderRef.out.ref=out
appender.out.type=Console
appender.out.name=out
appender.out.layout.type=PatternLayout
appender.out.layout.pattern=%d %-5p %c{1}: %m%n
"""


class KafkaBroker(Server):
    """The broker. `bootstrap_servers` is what clients need; data survives `stop`, `kill` and a new process.

    `class_path` must be set before `start`; `start_cache` is used where it exists, or written with `is_training`.
    Tests derive brokers with encryption, rights or company from it: what they change is public.
    """

    name = "kafka"
    room_bytes = 64 * disk.MIB  # the topics of the system alone have 6 MiB
    heap_megabytes = 512
    replication = 1  # of the broker's own topics
    # within the first thousand transactions the second compiler uses more of a core than it saves (measured: 22 s against 13 s of
    # CPU for 400 transactions, and half as much for each later one)
    has_short_life = False

    def __init__(  # noqa: PLR0913
        self,
        data_dir: Path,
        *,
        port: int,
        controller_port: int,
        class_path: str = "",
        start_cache: Path | None = None,
        env: Mapping[str, str],
    ) -> None:
        super().__init__(data_dir)
        self.port = port
        self.controller_port = controller_port
        self.start_cache = start_cache
        self.is_training = False
        self.class_path = class_path
        self._env = env

    @property
    def bootstrap_servers(self) -> str:
        """Host and port for clients."""
        return f"{LOOPBACK}:{self.port}"

    def ports(self) -> Sequence[int]:
        """Return the clients' port and the controller's."""
        return (self.port, self.controller_port)

    async def prepare(self) -> Launch:
        """Write the configuration and format the storage the first time. Raises ServerFailedError."""
        (self.data_dir / "server.properties").write_text(self.configuration(), encoding="utf-8")
        (self.data_dir / "log4j2.properties").write_text(LOGGING, encoding="ascii")
        temporary = self.data_dir / "tmp"  # unpacked native libraries; a killed broker leaves them
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        if not (self._log_dir / "meta.properties").exists():
            await self._format()
        return self._launch("kafka.Kafka", "server.properties", is_server=True)

    async def is_ready(self) -> bool:
        """Return whether the broker answers a metadata request and knows itself."""
        if not await accepts_connections(self.port):
            return False
        client = AdminClient(self.client())
        try:
            metadata = await asyncio.to_thread(partial(client.list_topics, timeout=PROTOCOL_TIMEOUT_SECONDS))
        except KafkaException:
            return False
        return bool(metadata.brokers)

    async def after_ready(self) -> None:
        """Create the broker's own topics, which it does when first asked, while that client waits for 3 seconds."""
        compacted = {"cleanup.policy": "compact", "segment.bytes": "104857600"}
        topics = [
            NewTopic("__consumer_offsets", INTERNAL_PARTITIONS, self.replication, config=compacted | {"compression.type": "producer"}),
            NewTopic("__transaction_state", INTERNAL_PARTITIONS, self.replication, config=compacted | {"compression.type": "uncompressed"}),
        ]
        client = AdminClient(self.client())

        def create() -> None:
            existing = client.list_topics(timeout=PROTOCOL_TIMEOUT_SECONDS).topics
            if missing := [each for each in topics if each.topic not in existing]:
                for created in client.create_topics(missing).values():
                    with contextlib.suppress(KafkaException):  # a client was faster; or the broker does it itself later
                        created.result(PROTOCOL_TIMEOUT_SECONDS)

        for tries_left in reversed(range(_TRIES)):
            try:
                await asyncio.to_thread(create)
            except (KafkaException, TimeoutError) as error:
                # one that comes back on a busy machine answers one question, and the next one late
                if not tries_left:
                    raise self.failure("could not create its own topics") from error
            else:
                return

    @property
    def _log_dir(self) -> Path:
        return self.data_dir / "data"

    def client(self) -> dict[str, Any]:
        """Return how a client that may do everything is configured."""
        return {"bootstrap.servers": self.bootstrap_servers, "log_level": 0}

    def format_arguments(self) -> Sequence[str]:
        """Return how the storage is formatted the first time."""
        return ("format", "--ignore-formatted", "-t", CLUSTER_ID, "-c", "server.properties")

    async def _format(self) -> None:
        launch = self._launch("kafka.tools.StorageTool", *self.format_arguments())
        self.process = ManagedProcess(launch, log_path=self.data_dir / "format.log", pid_path=self.pid_path)
        try:
            code = await self.process.wait(FORMAT_DEADLINE_SECONDS)
        except BaseException:
            await self.process.kill()
            raise
        if code:
            raise self.failure(f"could not format its storage (exit code {code})")

    def _launch(self, main_class: str, *arguments: str, is_server: bool = False) -> Launch:
        flags = [f"-Xmx{self.heap_megabytes}m", "-XX:+UseSerialGC", "-XX:-UsePerfData", "-Djava.io.tmpdir=tmp"]
        flags.append("-Dlog4j2.configurationFile=log4j2.properties")
        flags += ["-Xlog:disable", "-Xlog:all=error:stderr", "--sun-misc-unsafe-memory-access=allow"]
        if self.start_cache and self.is_training:
            flags += [f"-XX:AOTCacheOutput={self.start_cache}"] if is_server else []
        elif self.start_cache and self.start_cache.exists():
            flags.append(f"-XX:AOTCache={self.start_cache}")
        if not is_server or self.has_short_life:
            flags.append("-XX:TieredStopAtLevel=1")
        return Launch(
            argv=[str(java()), *flags, "-cp", self.class_path, main_class, *arguments],
            cwd=self.data_dir,
            env=inherited_environment(self._env),
            is_idle=self.is_training,
        )

    def configuration(self) -> str:
        """Return the broker's properties."""
        return f"""\
process.roles=broker,controller
node.id=1
# static, not the dynamic quorum: its voter's address would be written into the data, and ports may change
controller.quorum.voters=1@{LOOPBACK}:{self.controller_port}
listeners=PLAINTEXT://{LOOPBACK}:{self.port},CONTROLLER://{LOOPBACK}:{self.controller_port}
advertised.listeners=PLAINTEXT://{LOOPBACK}:{self.port}
controller.listener.names=CONTROLLER
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT
log.dirs={self._log_dir}
# a minute otherwise, and a broker that was killed looks through every deleted topic before it is back
log.segment.delete.delay.ms=1000

auto.create.topics.enable=false
unclean.leader.election.enable=false
message.max.bytes=2097152
replica.fetch.max.bytes=2097152

offsets.topic.replication.factor=1
offsets.topic.num.partitions={INTERNAL_PARTITIONS}
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions={INTERNAL_PARTITIONS}
transaction.abort.timed.out.transaction.cleanup.interval.ms=1000
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=1

group.initial.rebalance.delay.ms=0
# after kill -9 the broker may register again only when its last session has ended: 9 s by default
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500

log.cleaner.dedupe.buffer.size=16777216
log.cleaner.io.buffer.size=262144
"""
