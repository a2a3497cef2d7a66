"""Drives real worker processes on the session's Kafka: starts, kills and freezes them, feeds topics, reads them back."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from fastavro import parse_schema

from schemas.codec import frame, unpack
from schemas.producing import choose, choose_inventory, to_record
from streams.cli.produce import event_key
from streams.embedded.processes import choose_port
from streams.embedded.stack import Stack
from streams.provisioning import apply, plan, targets
from streams.settings import CLIENT_NEEDS, Settings
from streams.tokens import issue
from streams.topics import TopicSpec, physical
from streams.topology import all_topics
from streams.transport.changelog import apply_record, parted_key
from streams.transport.cluster import Cluster
from streams.transport.records import Record, fetch

ROOT = Path(__file__).parent.parent
PARTITIONS = 4
PRINTED_SECONDS = 2.0
PATIENCE = 2
M = TypeVar("M")
_counter = itertools.count(1)


def wait_for(condition: Callable[[], Any], *, seconds: float, what: str) -> Any:
    """Return the first true value of `condition`; fail after twice `seconds`, saying `what` did not happen.

    `seconds` is more than it takes on a machine with two free cores; others are slower. What a promise limits is measured, not waited for.
    What takes long to look at is looked at less often. Long waits are printed: of a test that fails later they tell where its
    time went.
    """
    began = time.monotonic()
    deadline = began + PATIENCE * seconds
    pause = threading.Event()
    while True:
        looked_at = time.monotonic()
        if found := condition():
            if (waited := time.monotonic() - began) > PRINTED_SECONDS:
                print(f"waited {waited:.1f} s for {what.partition(chr(10))[0]}")
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"after {PATIENCE * seconds:g} s still not: {what}")
        pause.wait(max(0.05, min(0.5, 2 * (time.monotonic() - looked_at))))


@dataclass
class WorkerProcess:
    """One worker process. `logs` of all its lives are in one file."""

    name: str
    command: Sequence[str]
    env: Mapping[str, str]
    log: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    is_wanted: bool = True
    starts: int = 0
    exits: list[int] = field(default_factory=list)

    def start(self) -> None:
        self.starts += 1
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, env=self.env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def get(self, path: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=2) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError:
            return 0, b""

    def is_ready(self) -> bool:
        return self.get("/health/ready")[0] == 200

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples that have these labels, 0 when it does not answer."""
        total = 0.0
        for line in self.get("/metrics")[1].decode().splitlines():
            head, _, value = line.rpartition(" ")
            if head.partition("{")[0] == name and all(f'{k}="{v}"' in head for k, v in labels.items()):
                total += float(value)
        return total

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class System:
    """An environment of its own on the session's stack: topics, workers, readers."""

    def __init__(
        self,
        stack: Stack,
        folder: Path,
        specs: Iterable[TopicSpec] | None = None,
        *,
        partitions: int = PARTITIONS,
        cluster: Cluster | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """`cluster`: another Kafka than the stack's, as who may do everything reaches it; `variables`: more of them, for everybody."""
        self.stack = stack
        self.cluster = cluster or Cluster(bootstrap=stack.kafka)
        # librdkafka's log stays on: a test that fails wants it
        self._kafka = {"bootstrap.servers": self.cluster.bootstrap, **self.cluster.security.librdkafka()}
        self.folder = folder
        self.name = f"t{os.getpid()}x{next(_counter)}"
        self.specs = list(specs if specs is not None else all_topics())
        self.partitions = partitions
        self.workers: dict[str, WorkerProcess] = {}
        self._supervising = True
        self._starting = threading.Lock()  # nobody is given up while it is started again
        self._kept: Producer | None = None
        self._foreign: dict[str, tuple[int, Any]] = {}
        self._read: dict[str, list[Record]] = {}
        self._messages: dict[str, list[Any]] = {}
        self.admin = AdminClient(self._kafka)
        key = base64.b64encode(bytes(range(32))).decode()
        self.variables = {
            "NOTIFY_ENV": self.name,
            "NOTIFY_KAFKA_BOOTSTRAP": self.cluster.bootstrap,
            "NOTIFY_REGISTRY_URL": stack.registry,
            "NOTIFY_SEAL_KEY": key,
            "NOTIFY_TOKEN_KEY": key,
            "NOTIFY_SMTP_URL": stack.mail_smtp,
            "NOTIFY_PARTITIONS": str(partitions),
            "NOTIFY_INBOUND_PARTITIONS": str(partitions),
            "NOTIFY_INVENTORY_PARTITIONS": str(partitions),
            "NOTIFY_SESSION_TIMEOUT_SECONDS": "6",
            "NOTIFY_DATA_DIR": str(folder / "client"),
            **(variables or {}),
        }
        self.settings = Settings.from_env(self.variables, needs=CLIENT_NEEDS)
        wanted = targets(self.specs, env=self.name, counts=self.settings.counts, replication=self.settings.replication)
        apply(self.admin, plan(self.admin, wanted))
        threading.Thread(target=self._supervise, daemon=True).start()

    def topic(self, name: str) -> str:
        return physical(self.name, name)

    # ---- the database

    def use_database(self) -> str:
        """Give this environment a database of its own; return its URL. Workers that start from now on know it."""
        assert self.stack.postgres_process is not None
        url = self.variables["NOTIFY_POSTGRES_URL"] = self.stack.postgres_process.make_database(self.name)
        return url

    def query(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Return the rows that this environment's database answers with."""

        async def fetch() -> list[tuple[Any, ...]]:
            connection = await asyncpg.connect(self.variables["NOTIFY_POSTGRES_URL"])
            try:
                return [tuple(row) for row in await connection.fetch(statement, *values)]
            finally:
                await connection.close()

        return asyncio.run(fetch())

    # ---- workers

    def start(self, role: str, *, name: str = "a", module: str = "", is_static: bool = True, **env: str) -> WorkerProcess:
        """Start a worker of `role`; `module`: a test's own app instead of the product's."""
        port = choose_port(taken=[worker.port for worker in self.workers.values()])
        if role == "store":
            self.use_database()
        variables = {
            **{k: v for k, v in os.environ.items() if not k.startswith("NOTIFY_")},
            **self.variables,
            "NOTIFY_ROLE": role,
            "NOTIFY_WEB_PORT": str(port),
            "NOTIFY_DATA_DIR": str(self.folder / f"{role}-{name}"),
            **({"NOTIFY_WORKER_NAME": f"{role}-{name}"} if is_static else {}),
            **env,
        }
        target = ["-m", module, "worker"] if module else ["-m", "faust", "-A", "streams.app", "worker"]
        worker = WorkerProcess(
            name=f"{role}-{name}",
            command=[sys.executable, *target, "-l", "info"],
            env=variables,
            log=self.folder / f"{role}-{name}.log",
            port=port,
        )
        worker.start()
        self.workers[worker.name] = worker
        return worker

    def await_ready(self, *workers: WorkerProcess, seconds: float = 120) -> None:
        for worker in workers or self.workers.values():
            wait_for(worker.is_ready, seconds=seconds, what=f"{worker.name} ready\n{worker.log_text()[-3000:]}")

    def stop(self, *workers: WorkerProcess, seconds: float = 40) -> None:
        """Stop workers in good order, all at once, and do not start them again."""
        for worker in workers:
            with self._starting:
                worker.is_wanted = False
            assert worker.process is not None
            worker.process.terminate()
        for worker in workers:
            assert worker.process is not None
            worker.process.wait(seconds)
        self.workers = {name: each for name, each in self.workers.items() if each not in workers}

    def give_up(self, worker: WorkerProcess) -> None:
        """Kill a worker, and do not start it again."""
        with self._starting:
            worker.is_wanted = False
        assert worker.process is not None
        worker.process.kill()
        worker.process.wait(10)
        del self.workers[worker.name]

    def close(self) -> None:
        with self._starting:
            self._supervising = False
        for worker in self.workers.values():
            worker.is_wanted = False
            if worker.process is not None and worker.process.poll() is None:
                worker.process.send_signal(signal.SIGCONT)
                worker.process.kill()
                worker.process.wait()
        if self.cluster.bootstrap == self.stack.kafka:
            self._delete_topics()

    def _delete_topics(self) -> None:
        """Delete the topics of this environment: a broker that is killed looks through every partition before it is back.

        With the topics of two dozen environments that takes half a minute of a core, and longer than a start may on a busy one.
        """
        try:
            found = [name for name in self.admin.list_topics(timeout=10).topics if f".{self.name}." in name]
        except KafkaException as error:
            print(f"the topics of {self.name} were not deleted: {error.args[0]}")  # what failed before says more
            return
        for name, deleted in (self.admin.delete_topics(found, operation_timeout=30) if found else {}).items():
            try:
                deleted.result()
            except KafkaException as error:
                print(f"{name} was not deleted: {error.args[0]}")

    def _supervise(self) -> None:
        pause = threading.Event()
        while self._supervising:
            for worker in list(self.workers.values()):
                with self._starting:
                    process = worker.process if self._supervising and worker.is_wanted else None
                    if process is not None and (code := process.poll()) is not None:
                        worker.exits.append(code)
                        worker.start()
            pause.wait(0.1)

    def delete_groups(self, roles: Iterable[str]) -> None:
        """Delete the consumer groups of roles that no worker runs any more, and with them what they committed."""
        for role in roles:
            wait_for(partial(self._delete_group, f"notify.{self.name}.{role}"), seconds=30, what=f"the group of {role} gone")

    def _delete_group(self, group: str) -> bool:
        # refused as long as a static member that was stopped has not timed out
        try:
            self.admin.delete_consumer_groups([group])[group].result()
        except KafkaException as error:
            if error.args[0].code() == KafkaError.NON_EMPTY_GROUP:
                return False
            raise
        return True

    # ---- topics

    def produce(self, topic: str, records: Iterable[tuple[bytes | None, bytes | None]], **config: object) -> None:
        """Publish (key, value) records, with the Java client's partitioner unless `config` says otherwise."""
        self._publish(topic, ((key, value, -1) for key, value in records), config)

    def produce_to(self, topic: str, partition: int, records: Iterable[tuple[bytes, bytes]]) -> None:
        """Publish (key, value) records to one partition: rows of a table whose key is not what it is partitioned by."""
        self._publish(topic, ((key, value, partition) for key, value in records), {})

    def _publish(self, topic: str, records: Iterable[tuple[bytes | None, bytes | None, int]], config: Mapping[str, object]) -> None:
        producer = self._producer(config)
        name = self.topic(topic)
        # the first record for a topic that a producer has not met would wait for half a second
        producer.list_topics(name, timeout=30)
        failed: list[KafkaError] = []
        for key, value, partition in records:
            while True:
                try:
                    producer.produce(name, value, key, partition, on_delivery=lambda error, _m: failed.append(error) if error else None)
                    break
                except BufferError:
                    producer.poll(0.1)
            producer.poll(0)
        assert producer.flush(60) == 0
        assert not failed, failed[:3]

    def _producer(self, config: Mapping[str, object]) -> Producer:
        """Return the kept producer, or with `config` a new one."""
        if self._kept is not None and not config:
            return self._kept
        made = Producer(
            {
                **self._kafka,
                "partitioner": "murmur2_random",
                "linger.ms": 5,
                "enable.idempotence": True,
                "message.max.bytes": 1_200_000,
                **{name.replace("_", "."): value for name, value in config.items()},
            }
        )
        if not config:
            self._kept = made
        return made

    def read(self, topic: str) -> list[Record]:
        """Return every committed record of a topic, to the end that it has now. What was read before is not read again."""
        seen = self._read.setdefault(topic, [])
        seen += self.follow(topic, after=seen)
        return list(seen)

    def messages(self, topic: str, kind: type[M]) -> list[M]:
        """Return every committed record of one of our topics as its message."""
        seen = self._messages.setdefault(topic, [])
        seen += (self.decode(record, kind) for record in self.read(topic)[len(seen) :])
        return list(seen)

    def follow(self, topic: str, *, after: Iterable[Record] = ()) -> Iterator[Record]:
        """Read a topic from its start, or from behind these records of it, to the end that it has now."""
        consumer = Consumer(
            {
                **self._kafka,
                "group.id": f"read-{self.name}",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "enable.partition.eof": True,
                "auto.offset.reset": "earliest",
                "fetch.wait.max.ms": 10,  # an end is told when there is nothing more, and not half a second later
            }
        )
        name = self.topic(topic)
        partitions = range(len(self.admin.list_topics(name).topics[name].partitions))
        starts = {record.partition(): record.offset() + 1 for record in after}
        consumer.assign([TopicPartition(name, partition, starts.get(partition, 0)) for partition in partitions])
        remaining = set(partitions)
        try:
            while remaining:
                found = fetch(consumer, wait_seconds=0.2, most=5_000)
                yield from found.records
                remaining -= {partition for _, partition in found.ends}
        finally:
            consumer.close()

    def count(self, topic: str) -> int:
        return len(self.read(topic))

    def rows(self, topic: str) -> dict[bytes, bytes]:
        """Return what a compacted topic says."""
        found: dict[bytes, bytes] = {}
        for record in self.follow(topic):
            apply_record(found, record)
        return found

    def table(self, step: str, table: str) -> dict[bytes, bytes]:
        """Return the rows of a table that is a step's alone, by their own keys; `step` is role and step, as in `router.decide`."""
        found = {parted_key(key): value for key, value in self.rows(f"{step}.changelog").items()}
        return {key: value for (name, key), value in found.items() if name == table}

    # ---- the product's own ways in

    def notify(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run the command `notify` against this environment."""
        command = [sys.executable, "-c", "from streams.cli import main; main()", *arguments]
        env = {**{k: v for k, v in os.environ.items() if not k.startswith("NOTIFY_")}, **self.variables}
        return subprocess.run(command, env=env, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=120, check=False)

    def load_preferences(self, rows: Iterable[Mapping[str, object]]) -> None:
        done = self.notify("prefs", "load", "-", stdin="".join(json.dumps(row) + "\n" for row in rows))
        assert done.returncode == 0, done.stderr

    def frame_payments(self, payments: Iterable[Mapping[str, object]]) -> list[tuple[bytes | None, bytes]]:
        """Return payments, of either shape, as their service publishes them."""
        found: list[tuple[bytes | None, bytes]] = []
        for payment in payments:
            stem = choose(payment)
            if stem not in self._foreign:
                text = (ROOT / "schemas" / "foreign" / f"{stem}.avsc").read_text()
                self._foreign[stem] = (self.register(f"{self.topic('payments')}-{stem}", text), parse_schema(json.loads(text)))
            schema_id, schema = self._foreign[stem]
            key = str(payment.get("paymentId") or payment.get("id") or "").encode()
            found.append((key or None, frame(schema_id, schema, to_record(stem, payment))))
        return found

    def frame_adjustments(self, adjustments: Iterable[Mapping[str, object]]) -> list[tuple[bytes | None, bytes]]:
        """Return adjustments of stock, of any shape, as their service publishes them."""
        found: list[tuple[bytes | None, bytes]] = []
        for adjustment in adjustments:
            shape = choose_inventory(adjustment)
            if shape not in self._foreign:
                schema_id = self.register(f"{self.topic('inventory')}-{shape}", shape.text)
                self._foreign[shape] = (schema_id, parse_schema(json.loads(shape.text)))
            schema_id, schema = self._foreign[shape]
            found.append((event_key("inventory", adjustment).encode(), frame(schema_id, schema, to_record(shape, adjustment))))
        return found

    def register(self, subject: str, text: str) -> int:
        """Register a schema and return its id."""
        body = json.dumps({"schema": text, "schemaType": "AVRO"}).encode()
        request = urllib.request.Request(
            f"{self.stack.registry}/subjects/{subject}/versions", body, {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(json.loads(answer.read())["id"])

    def decode(self, message: Record, kind: type[Any]) -> Any:
        """Return a record of one of our topics as its message."""
        return unpack((message.value() or b"")[5:], kind)

    def web(self, path: str, *, user: str | None = None, method: str = "GET") -> tuple[int, Any]:
        """Ask the worker of role views. `user` None: with the service scope."""
        token = issue(self.settings.token_key, user_id=user)
        port = self.workers["views-a"].port
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Authorization": f"Bearer {token}"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                body = answer.read()
                return answer.status, json.loads(body) if body else None
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")
        except OSError:
            return 0, None

    def ask(
        self,
        path: str,
        body: object = None,
        *,
        user: str | None = None,
        service: str | None = None,
        method: str = "POST",
        headers: Mapping[str, str] | None = None,
        worker: str = "views-a",
    ) -> tuple[int, Mapping[str, str], Any]:
        """Send JSON (bytes as they are) to a worker of role views, `user` None: as a service; return status, headers and JSON."""
        content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        token = issue(self.settings.token_key, user_id=user, service=service)
        sent = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", **(headers or {})}
        request = urllib.request.Request(f"http://127.0.0.1:{self.workers[worker].port}{path}", content, sent, method=method)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, dict(answer.headers), json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), json.loads(error.read() or b"null")

    # ---- mail

    def mails(self) -> Counter[str]:
        """Return how often the mail server accepted each delivery of this environment's users."""
        with urllib.request.urlopen(f"{self.stack.mail_http}/api/counts?header=X-Notify-Delivery", timeout=30) as answer:
            return Counter(json.loads(answer.read()))


@contextlib.contextmanager
def system(
    stack: Stack,
    folder: Path,
    specs: Iterable[TopicSpec] | None = None,
    *,
    partitions: int = PARTITIONS,
    cluster: Cluster | None = None,
    variables: Mapping[str, str] | None = None,
) -> Iterator[System]:
    made = System(stack, folder, specs, partitions=partitions, cluster=cluster, variables=variables)
    try:
        yield made
    finally:
        made.close()
