"""The whole product on the laboratory's stack: its topics, one process a role, users with addresses, and a mail sink."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil
from confluent_kafka import Producer

from agents import stock
from benchmarks.laboratory import PARTITIONS, PYTHON, ROOT, BenchmarkError, Laboratory, in_cluster, outside, tail, wait_for
from schemas import producing, topics
from schemas.codec import Codec, pack
from schemas.ids import partition_of
from schemas.messages import Content, Delivery, NotificationRequested, Origin, StockLevel, UserKey, Watch
from schemas.sealed import KEY_BYTES, seal, wrap
from schemas.topics import Channel, Lane
from streams.cli.wire import Wire
from streams.embedded.processes import choose_port
from streams.roles import Role
from streams.settings import CLIENT_NEEDS, Settings
from streams.topics import specs
from streams.topology import all_topics

_READY_SECONDS = 90.0
_LOAD_SECONDS = 300.0
_SINK_SECONDS = 15.0


@dataclass(slots=True)
class Program:
    """A process of the system."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    port: int = 0

    def cpu_seconds(self) -> float:
        """Return what it used so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def is_ready(self) -> bool:
        """Say whether the worker answers that it is ready. Raises BenchmarkError when it has ended."""
        if self.process.poll() is not None:
            raise BenchmarkError(f"{self.name} ended with {self.process.returncode}:\n{tail(self.log)}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples that have these labels."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as answer:
                text = answer.read().decode()
        except urllib.error.URLError as error:
            raise BenchmarkError(f"{self.name} does not answer:\n{tail(self.log)}") from error
        total = 0.0
        for line in text.splitlines():
            head, _, value = line.rpartition(" ")
            if head.partition("{")[0] == name and all(f'{key}="{wanted}"' in head for key, wanted in labels.items()):
                total += float(value)
        return total


class System:
    """An environment of its own. `workers` by role."""

    def __init__(self, lab: Laboratory, name: str) -> None:
        self.lab = lab
        self.name = name
        self.folder = lab.folder / name
        self.folder.mkdir()
        self.workers: dict[Role, Program] = {}
        self.sink = self._start_sink()
        variables = {**lab.settings, "NOTIFY_ENV": name, "NOTIFY_DATA_DIR": str(self.folder / "client")}
        self._client = {**outside(), **variables}
        self._settings = Settings.from_env(variables, needs=CLIENT_NEEDS)
        lab.make(all_topics(), env=name)

    # ---- processes

    def _spawn(self, name: str, command: Sequence[str], env: Mapping[str, str], *, port: int = 0, stdout: int | None = None) -> Program:
        log = self.folder / f"{name}.log"
        with log.open("ab") as out:
            process = subprocess.Popen(command, env=dict(env), cwd=ROOT, stdout=stdout or out, stderr=out)
        return Program(name, process, log, port)

    def _start_sink(self) -> Program:
        smtp, ask = choose_port(), 0
        ask = choose_port(taken=[smtp])
        self.smtp_url, self._ask_port = f"smtp://127.0.0.1:{smtp}", ask
        sink = self._spawn("sink", [PYTHON, "-m", "benchmarks.sink", str(smtp), str(ask)], outside(), port=smtp)
        wait_for(lambda: is_listening(ask), seconds=_SINK_SECONDS, what=f"the sink listens\n{tail(sink.log)}")
        return sink

    def start(self, *roles: Role, is_pinned: bool = False, **more: str) -> None:
        """Start a worker for each role and wait until all are ready. `is_pinned`: on the program's core; `more`: settings."""
        taken = [worker.port for worker in self.workers.values()]
        for role in roles:
            port = choose_port(taken=taken)
            taken.append(port)
            variables = self.lab.worker_variables(
                role, env=self.name, NOTIFY_WEB_PORT=str(port), NOTIFY_SMTP_URL=self.smtp_url, NOTIFY_WORKER_NAME=f"{role}-a", **more
            )
            if role is Role.STORE and self.lab.postgres is not None:
                variables["NOTIFY_POSTGRES_URL"] = self.lab.postgres.make_database(self.name)
            command = [PYTHON, "-m", "faust", "-A", "streams.app", "worker", "-l", "warn"]
            command = self.lab.cores.pinned(command) if is_pinned else command
            self.workers[role] = self._spawn(role, command, {**outside(), **variables}, port=port)
        for role in roles:
            wait_for(self.workers[role].is_ready, seconds=_READY_SECONDS, what=f"{role} is ready\n{tail(self.workers[role].log)}")

    @contextlib.contextmanager
    def observing(self, output: Path) -> Iterator[None]:
        """Note in `output` when critical in-app deliveries become visible."""
        command = [PYTHON, "-m", "benchmarks.observer", self.lab.kafka, in_cluster(topics.STATUS, self.name), str(output)]
        observer = self._spawn("observer", command, outside(), stdout=subprocess.PIPE)
        try:
            assert observer.process.stdout is not None
            if observer.process.stdout.readline().strip() != b"ready":
                raise BenchmarkError(f"the observer ended:\n{tail(observer.log)}")
            yield
        finally:
            observer.process.kill()
            observer.process.wait()

    def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU seconds of every process so far, the broker's included."""
        postgres = {"PostgreSQL": _cpu_of_family(self.lab.postgres.pid)} if self.lab.postgres and self.lab.postgres.pid else {}
        return {
            **{str(role): worker.cpu_seconds() for role, worker in self.workers.items()},
            "mail sink": self.sink.cpu_seconds(),
            "Kafka broker": _cpu_of_family(self.lab.broker_pid),
            **postgres,
        }

    def close(self) -> None:
        """End every process and delete the topics."""
        for program in [*self.workers.values(), self.sink]:
            program.process.kill()
            program.process.wait()
        self.lab.drop(in_cluster(spec.name, self.name) for spec in all_topics())

    # ---- in and out

    def load_watchers(self, product: str, count: int) -> None:
        """Write `count` watchers of a product, as the router stores them. Before it starts."""
        audience = stock.product_audience(product)
        topic = in_cluster(topics.WATCHES, self.name)
        codec = self._codec(topics.WATCHES)
        at = datetime.now(UTC)
        producer = self.producer(**{"linger.ms": 20})
        for number in range(count):
            user = f"watcher-{number}"
            row = codec.encode(Watch(user_id=user, audience=audience, since=at))
            partition = partition_of(user.encode(), PARTITIONS)
            while True:
                try:
                    producer.produce(topic, row, f"{audience}\0{user}".encode(), partition)
                except BufferError:
                    producer.poll(0.1)
                else:
                    break
        if producer.flush(60):
            raise BenchmarkError("Kafka did not take all watchers")

    def restock(self, product: str) -> None:
        """Publish that a product is back in stock, as ingest does."""
        at = datetime.now(UTC)
        level = StockLevel(
            event_id=f"restock-{product}",
            product_id=product,
            warehouse_id="wh_east_01",
            quantity=200,
            previous_quantity=0,
            occurred_at=at,
            accepted_at=at,
            origin=Origin(topic=topics.INVENTORY, partition=0, offset=0),
        )
        self.lab.fill(in_cluster(topics.STOCK, self.name), [(product.encode(), self._codec(topics.STOCK).encode(level))])

    def load_mails(self, mails: Iterable[tuple[Delivery, Content]]) -> None:
        """Publish mails as the router does, sealed with keys of their users that are published too."""
        at, key = datetime.now(UTC), bytes(range(KEY_BYTES))
        codec = self._codec(topics.deliver(Channel.EMAIL, Lane.NORMAL))
        rows: list[tuple[bytes, bytes]] = []
        users: set[str] = set()
        for delivery, content in mails:
            user = delivery.user_id
            users.add(user)
            sealed = seal(key, pack(content), user_id=user, purpose="content")
            rows.append((user.encode(), codec.encode(replace(delivery, sealed=sealed))))
        codec = self._codec(topics.KEYS)
        keys = (UserKey(user_id=user, wrapped=wrap(self._settings.seal_key, key, user_id=user), created_at=at) for user in users)
        self.lab.fill(in_cluster(topics.KEYS, self.name), ((each.user_id.encode(), codec.encode(each)) for each in keys))
        self.lab.fill(in_cluster(topics.deliver(Channel.EMAIL, Lane.NORMAL), self.name), rows)

    def _codec(self, topic: str) -> Codec:
        with Wire(self._settings) as wire:
            return wire.codec([spec for spec in specs() if spec.name == topic])

    def load_users(self, count: int) -> list[str]:
        """Give `count` users a name and an address, the way `notify prefs load` does; return their ids. The router has to run."""
        users = [f"user-{number:06d}" for number in range(count)]
        lines = [{"userId": user, "name": f"Name {user}", "email": f"{user}@example.com"} for user in users]
        command = [PYTHON, "-c", "from streams.cli import main; main()", "prefs", "load", "-"]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        done = subprocess.run(
            command, env=self._client, cwd=ROOT, input=text, capture_output=True, text=True, timeout=_LOAD_SECONDS, check=False
        )
        if done.returncode:
            raise BenchmarkError(f"the users could not be loaded: {done.stderr[-2000:]}")
        return users

    def payments(self, users: Sequence[str], numbers: range, *, status: str) -> list[tuple[bytes, bytes]]:
        """Return key and value of a payment for each number, as the service that owns them publishes it."""
        schema = producing.ForeignSchema.FLAT
        with Wire(self._settings) as wire:
            ids: dict[str, int] = {schema: wire.register(schema.subject(in_cluster(topics.PAYMENTS, self.name)), schema.text)}
        found: list[tuple[bytes, bytes]] = []
        for number in numbers:
            payment = {
                "eventId": event_id(number),
                "paymentId": f"payment-{number}",
                "userId": users[number % len(users)],
                "orderId": f"order-{number}",
                "amount": 10 + number % 1000 / 100,
                "currency": "EUR",
                "paymentMethod": "CreditCard",
                "status": status,
                **({"failureReason": "Your bank declined the payment."} if status == "failed" else {}),
            }
            found.append((f"payment-{number}".encode(), producing.encode_payment(payment, ids)))
        return found

    def requests(self, users: Sequence[str], count: int) -> Iterable[tuple[bytes, bytes]]:
        """Yield requests to tell a user something, as any service may publish them."""
        with Wire(self._settings) as wire:
            codec: Codec = wire.codec([spec for spec in specs() if spec.name == topics.requests("bulk")])
        now = datetime.now(UTC)
        for number in range(count):
            user = users[number % len(users)]
            data = {"title": "Spring sale", "message": f"Your voucher is {number:08d}."}
            request = NotificationRequested(
                event_id=f"sale-{number}", producer="campaigns", rule="message", user_id=user, data=data, occurred_at=now
            )
            yield user.encode(), codec.encode(request)

    def producer(self, **config: object) -> Producer:
        """Return a producer as other services have it."""
        return Producer(
            {
                "bootstrap.servers": self.lab.kafka,
                "partitioner": "murmur2_random",
                "enable.idempotence": True,
                "queue.buffering.max.messages": 500_000,
                "log_level": 0,
                **config,
            }
        )

    def accepted(self) -> dict[str, float]:
        """Return when the sink accepted each delivery, in seconds since 1970."""
        return accepted_by(self._ask_port)


def event_id(number: int) -> str:
    """Return the event id of payment `number`."""
    return f"payment-event-{number}"


@contextlib.contextmanager
def system(lab: Laboratory) -> Iterator[System]:
    """Return a system without workers; whatever it started ends with it."""
    made = System(lab, lab.new_run("bench"))
    try:
        yield made
    finally:
        made.close()


def accepted_by(ask_port: int) -> dict[str, float]:
    """Return when a sink accepted each delivery, in seconds since 1970."""
    found: dict[str, float] = {}
    for line in _ask(ask_port).splitlines():
        delivery, _, at = line.decode("ascii").partition(" ")
        found.setdefault(delivery, float(at))
    return found


def is_listening(port: int) -> bool:
    """Say whether somebody listens on a port of this machine."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _ask(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        chunks = []
        while chunk := connection.recv(1 << 20):
            chunks.append(chunk)
    return b"".join(chunks)


def now() -> float:
    """Return seconds since 1970, the clock that all processes share."""
    return time.time()


def _cpu_of_family(pid: int) -> float:
    """Return what a process and those that it started have used so far, those that have ended included."""
    process = psutil.Process(pid)
    own = process.cpu_times()
    total = own.user + own.system + getattr(own, "children_user", 0.0) + getattr(own, "children_system", 0.0)
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended, and is counted with its parent
            times = child.cpu_times()
            total += times.user + times.system
    return float(total)
