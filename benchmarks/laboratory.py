"""An embedded stack of its own in a temporary folder, and what every benchmark does with it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._listoffsets import OffsetSpec

from streams.embedded.stack import Ports, Stack, start_stack
from streams.provisioning import apply, plan, targets
from streams.topics import Count, TopicSpec, physical
from streams.transport.admin import PASSING, learn_leaders

ROOT = Path(__file__).parent.parent
PARTITIONS = 4
ENV = "bench"
_STOP_SECONDS = 30.0
_ANSWER_SECONDS = 30.0
_GROUP_SECONDS = 30.0
_FLUSH_SECONDS = 120.0
T = TypeVar("T")


class BenchmarkError(Exception):
    """A benchmark could not be carried out, or its outcome is not complete. Its figures mean nothing."""


@dataclass(frozen=True, slots=True)
class Cores:
    """Which core the measured program runs on, and which ones the broker. Both None: this machine cannot tell them apart."""

    program: int | None
    broker: frozenset[int] | None

    @classmethod
    def of_this_machine(cls) -> Cores:
        """Return a core for the program and the others for the broker, where there are two and `taskset` is there."""
        if shutil.which("taskset") is None or not hasattr(os, "sched_getaffinity"):
            return cls(None, None)
        first, *others = sorted(os.sched_getaffinity(0))
        return cls(first, frozenset(others)) if others else cls(None, None)

    def pinned(self, command: Sequence[str]) -> list[str]:
        """Return `command` on the program's core."""
        return [*command] if self.program is None else ["taskset", "-c", str(self.program), *command]

    def keep_off(self, pid: int) -> None:
        """Keep a process that runs already off the program's core."""
        if self.broker is not None:
            _move(pid, self.broker)


def wait_for(condition: Callable[[], T | None], *, seconds: float, what: str, every_seconds: float = 0.05) -> T:
    """Return the first true value of `condition`. Raises BenchmarkError after `seconds`, saying what did not happen."""
    deadline = time.monotonic() + seconds
    while True:
        if found := condition():
            return found
        if time.monotonic() > deadline:
            raise BenchmarkError(f"after {seconds:.0f} s still not: {what}")
        time.sleep(every_seconds)


class Laboratory:
    """The stack, its topics, and programs that run against it."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self.kafka = stack.kafka
        self.registry = stack.registry
        self.broker_pid = stack.broker.pid or 0
        self.postgres = stack.postgres_process
        self.folder = folder
        self.cores = Cores.of_this_machine()
        # librdkafka's own log is off: what matters reaches us as values
        self._client: dict[str, str | int | float | bool] = {"bootstrap.servers": self.kafka, "log_level": 0}
        self.admin = AdminClient(self._client)
        self._runs = 0
        self._failures: list[KafkaError] = []
        key = base64.b64encode(bytes(range(32))).decode()
        # one worker's settings; more on top
        self.settings = {
            "NOTIFY_KAFKA_BOOTSTRAP": self.kafka,
            "NOTIFY_REGISTRY_URL": self.registry,
            "NOTIFY_SEAL_KEY": key,
            "NOTIFY_TOKEN_KEY": key,
            "NOTIFY_PARTITIONS": str(PARTITIONS),
            "NOTIFY_INBOUND_PARTITIONS": str(PARTITIONS),
            "NOTIFY_INVENTORY_PARTITIONS": str(PARTITIONS),
            "NOTIFY_SESSION_TIMEOUT_SECONDS": "6",
        }

    def new_run(self, prefix: str) -> str:
        """Return a name that no run of this laboratory had."""
        self._runs += 1
        return f"{prefix}{self._runs}"

    @contextlib.contextmanager
    def broker_apart(self) -> Iterator[None]:
        """Keep the broker off the program's core."""
        if self.cores.broker is None:
            yield
            return
        everywhere = frozenset(os.sched_getaffinity(0))
        self.cores.keep_off(self.broker_pid)
        try:
            yield
        finally:
            _move(self.broker_pid, everywhere)

    # ---- topics

    def make(self, specs: Iterable[TopicSpec], *, env: str = ENV) -> None:
        """Create the topics that are missing."""
        wanted = targets(specs, env=env, counts=dict.fromkeys(Count, PARTITIONS) | {Count.ONE: 1}, replication=1)
        apply(self.admin, plan(self.admin, wanted))
        # a client that comes before the leaders are up waits for seconds, and that is nobody's figure
        self._ends({target.name: target.partitions for target in wanted})

    def drop(self, names: Iterable[str]) -> None:
        """Delete topics by their names in the cluster."""
        for future in self.admin.delete_topics(list(names)).values():
            with contextlib.suppress(KafkaException):  # room on the disk is all that is lost
                future.result()

    def forget_group(self, group: str) -> None:
        """Delete a consumer group, once the last member of an earlier run is gone."""

        def is_gone() -> bool:
            try:
                self.admin.delete_consumer_groups([group])[group].result()
            except KafkaException as error:
                code = error.args[0].code()
                if code == KafkaError.GROUP_ID_NOT_FOUND:
                    return True
                if code != KafkaError.NON_EMPTY_GROUP:
                    raise
                return False
            return True

        wait_for(is_gone, seconds=_GROUP_SECONDS, what=f"the group {group} is empty", every_seconds=0.2)

    def fill(self, topic: str, records: Iterable[tuple[bytes, bytes]]) -> None:
        """Publish records, without transactions. `topic` as in the cluster."""
        producer = Producer(
            {
                **self._client,
                "partitioner": "murmur2_random",
                "linger.ms": 20,
                "enable.idempotence": True,
                "queue.buffering.max.messages": 500_000,
                "delivery.report.only.error": True,
                "on_delivery": self._failed,
            }
        )
        self._failures.clear()
        for key, value in records:
            while True:
                try:
                    producer.produce(topic, value, key)
                except BufferError:
                    producer.poll(0.1)
                else:
                    break
        if producer.flush(_FLUSH_SECONDS) or self._failures:
            raise BenchmarkError(f"Kafka did not take all records of {topic}: {self._failures[:1]}")

    def _failed(self, error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            self._failures.append(error)

    def end(self, topic: str) -> int:
        """Return the sum of a topic's end offsets."""
        return sum(self._ends({topic: PARTITIONS}))

    def _ends(self, topics: Mapping[str, int]) -> list[int]:
        """Return the end of every partition of `topics`, name -> how many it has."""
        places = [TopicPartition(name, number) for name, count in topics.items() for number in range(count)]
        asked = {place: OffsetSpec.latest() for place in places}  # type: ignore[no-untyped-call]

        def answer() -> list[int] | None:
            try:
                learn_leaders(self.admin, topics)
                return [future.result(_ANSWER_SECONDS).offset for future in self.admin.list_offsets(asked).values()]
            except KafkaException as error:
                # a topic made a moment ago may have no leader yet, or not everywhere the same
                if error.args[0].code() in PASSING:
                    return None
                raise

        return wait_for(answer, seconds=_ANSWER_SECONDS, what="the topics have leaders")

    def read(self, topic: str) -> Iterator[Message]:
        """Yield every committed record of a topic, to its end."""
        consumer = Consumer(
            {
                **self._client,
                "group.id": "bench-read",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "enable.partition.eof": True,
                "auto.offset.reset": "earliest",
            }
        )
        try:
            consumer.assign([TopicPartition(topic, number, 0) for number in range(PARTITIONS)])
            remaining = set(range(PARTITIONS))
            while remaining:
                for message in consumer.consume(5_000, 0.2):
                    error = message.error()
                    if error is None:
                        yield message
                    elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - confluent-kafka's public name for it
                        remaining.discard(message.partition() or 0)
        finally:
            consumer.close()

    # ---- programs

    def run(self, command: Sequence[str], *, variables: Mapping[str, str], seconds: float, name: str) -> dict[str, Any]:
        """Run a program on its core until it has written its result; return that.

        Raises BenchmarkError, with the end of what it said, when it ends without, or takes longer than `seconds`.
        """
        result = self.folder / f"{name}.json"
        log = self.folder / f"{name}.log"
        env = {
            **outside(),
            **variables,
            "BENCH_RESULT": str(result),
            "BENCH_KAFKA": self.kafka,
            "BENCH_PARTITIONS": str(PARTITIONS),
            "TMPDIR": str(self.folder),  # what a program leaves behind goes with the folder
        }
        with log.open("wb") as out:
            process = subprocess.Popen(self.cores.pinned(command), env=env, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                raise BenchmarkError(f"{name} took longer than {seconds:.0f} s:\n{tail(log)}") from None
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if not result.exists():
            raise BenchmarkError(f"{name} ended with {process.returncode} and no result:\n{tail(log)}")
        found: dict[str, Any] = json.loads(result.read_text("utf-8"))
        return found

    def worker_variables(self, role: str, *, env: str = ENV, **more: str) -> dict[str, str]:
        """Return the settings of a worker of `role`."""
        folder = self.folder / f"data-{env}-{role}"
        return {**self.settings, "NOTIFY_ENV": env, "NOTIFY_ROLE": role, "NOTIFY_DATA_DIR": str(folder), **more}


def _move(pid: int, cores: frozenset[int]) -> None:
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):  # it has ended
            os.sched_setaffinity(int(thread.name), cores)


def outside() -> dict[str, str]:
    """Return this process's environment without the product's settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("NOTIFY_", "BENCH_", "PYTHONPATH"))}


def tail(log: Path, characters: int = 3_000) -> str:
    """Return the end of a log."""
    return log.read_text("utf-8", "replace")[-characters:] if log.exists() else ""


def in_cluster(name: str, env: str = ENV) -> str:
    """Return a topic's name in the cluster."""
    return physical(env, name)


@contextlib.contextmanager
def laboratory(say: Callable[[str], None]) -> Iterator[Laboratory]:
    """Start a stack on free ports in a temporary folder; stop and delete it at the end."""
    loop = asyncio.new_event_loop()
    # servers die with the thread that started them: one of their own
    thread = threading.Thread(target=loop.run_forever, name="embedded-stack", daemon=True)
    thread.start()
    with tempfile.TemporaryDirectory(prefix="flowmart-benchmarks-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        starting = start_stack(
            folder / "stack",
            ports=Ports.free(),
            mail=False,
            warm_up=False,
            progress=lambda part, text: say(f"{part}: {text}"),
        )
        stack = asyncio.run_coroutine_threadsafe(starting, loop).result()
        try:
            yield Laboratory(stack, folder)
        finally:
            asyncio.run_coroutine_threadsafe(stack.stop(), loop).result(_STOP_SECONDS)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


PYTHON = sys.executable
