"""A full disk, on a real one that is small: who met it says which, how full, and what to do; nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from confluent_kafka import Consumer, KafkaError, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from rich.console import Console

from streams.cli.up import Options, Up
from streams.embedded import artifacts, disk
from streams.embedded.kafka import KafkaBroker
from streams.embedded.postgres import PostgresServer
from streams.embedded.processes import DiskFullError, choose_port
from streams.embedded.stack import Ports, start_stack
from streams.embedded.supervisor import Died, Filling, Happening, NotReturned, Returned, Supervisor
from tests.harness import wait_for

MIB = 2**20
SECONDS = 30
ROOT = Path(__file__).parents[2]
RECORD = bytes(64 * 1024)

Small = Callable[[int], Path]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Small]:
    """Return what makes a file system of so many MiB."""
    made: list[Path] = []

    def mount(megabytes: int) -> Path:
        folder = tmp_path / f"small-{megabytes}"
        folder.mkdir(mode=0o755)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], capture_output=True, text=True, check=False
        )
        if done.returncode:
            # the test with the limit on the size of files needs no right at all
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"mounting is not permitted here: {done.stderr.strip()}")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path, *, leave: int) -> Path:
    """Take all space of a disk but `leave` bytes; return the file to delete."""
    path = folder / "fills-the-disk"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, disk.disk_of(folder).free_bytes - leave)
    return path


async def a_broker(folder: Path) -> KafkaBroker:
    cache = artifacts.default_cache_dir(os.environ)
    port = choose_port()
    broker = KafkaBroker(
        folder / "kafka",
        port=port,
        controller_port=choose_port(taken=[port]),
        start_cache=artifacts.start_cache(cache, artifacts.KAFKA),
        env=os.environ,
    )
    broker.class_path = await artifacts.obtain_kafka(cache, lambda _message: None)
    broker.has_short_life = True
    return broker


def produce_until_refused(broker: KafkaBroker, topic: str) -> int:
    """Publish until the broker has gone; return how many records it acknowledged."""
    admin = AdminClient(broker.client())
    admin.create_topics([NewTopic(topic, 1, 1)])[topic].result(SECONDS)
    acknowledged = 0
    failed: list[KafkaError] = []

    def told(error: KafkaError | None, _message: object) -> None:
        nonlocal acknowledged
        if error is None:
            acknowledged += 1
        else:
            failed.append(error)

    producer = Producer({**broker.client(), "message.timeout.ms": 3_000, "compression.type": "none", "linger.ms": 0, "log_level": 0})
    while not failed:
        with contextlib.suppress(BufferError):
            producer.produce(topic, RECORD, on_delivery=told)
        producer.poll(0.001)
    producer.purge()
    producer.flush(SECONDS)
    return acknowledged


def count(broker: KafkaBroker, topic: str, expected: int) -> int:
    consumer = Consumer({**broker.client(), "group.id": topic, "auto.offset.reset": "earliest"})
    consumer.subscribe([topic])
    found = 0
    deadline = time.monotonic() + SECONDS
    try:
        while found < expected and time.monotonic() < deadline:
            found += sum(message.error() is None for message in consumer.consume(100, timeout=0.2))
    finally:
        consumer.close()
    return found


def assert_is_clear(sentence: str, folder: Path) -> None:
    """Fail unless the sentence names folder, disk, how much is free, and what to do."""
    assert str(folder) in sentence
    assert re.search(rf"the disk mounted at {folder} has [\d.]+ (bytes|KiB|MiB) of [\d.]+ MiB free", sentence), sentence
    assert "Free some space there, or use another folder" in sentence


def test_up_ends_with_one_clear_sentence_when_there_is_too_little_room(small: Small, tmp_path: Path) -> None:
    folder = small(40)
    command = [sys.executable, "-P", "-c", "from streams.cli import main; main()", "up", "--once", "--free-ports", "--data-dir"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NOTIFY_")}
    environment |= {"PYTHONPATH": str(ROOT), "XDG_RUNTIME_DIR": str(tmp_path), "COLUMNS": "2000"}
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    [sentence] = [line for line in done.stderr.splitlines() if line.strip()]
    assert_is_clear(sentence, folder)
    assert re.search(r"The stack needs \d+ MiB in ", sentence)


async def test_a_disk_without_a_byte_is_told_as_such_before_anything_is_started(small: Small) -> None:
    folder = small(8)
    fill(folder, leave=0)
    with pytest.raises(DiskFullError) as caught:
        await start_stack(folder / "data", ports=Ports.free(), warm_up=False)
    assert_is_clear(str(caught.value), folder)


async def test_a_broker_that_dies_of_a_full_disk_is_explained_and_comes_back_with_every_acknowledged_record(small: Small) -> None:
    folder = small(160)
    broker = await a_broker(folder)
    told: list[Happening] = []
    await broker.start()
    supervisor = Supervisor(told.append)
    supervisor.keep([broker])
    try:
        filler = fill(folder, leave=12 * MIB)
        acknowledged = await asyncio.to_thread(produce_until_refused, broker, "full")
        assert acknowledged > 20

        def seen(kind: type[Happening]) -> list[Happening]:
            return [each for each in told if isinstance(each, kind)]

        await asyncio.to_thread(wait_for, lambda: seen(Died) and seen(NotReturned), seconds=SECONDS, what="its death, and a try that fails")
        [filling] = seen(Filling)
        assert isinstance(filling, Filling)
        assert_is_clear(filling.warning, folder)
        died = seen(Died)[0]
        assert isinstance(died, Died)
        assert died.explanation is not None
        assert_is_clear(died.explanation, folder)
        tried = seen(NotReturned)[0]
        assert isinstance(tried, NotReturned)
        assert_is_clear(tried.reason, folder)
        filler.unlink()
        await asyncio.to_thread(wait_for, lambda: seen(Returned), seconds=SECONDS, what="its return")
        assert await asyncio.to_thread(count, broker, "full", acknowledged) >= acknowledged
    finally:
        await supervisor.stop(5)


async def test_a_database_that_dies_of_a_full_disk_is_explained(small: Small) -> None:
    folder = small(200)
    server = PostgresServer(folder / "postgres", port=choose_port(), env=os.environ)
    await server.start()
    try:
        await asyncio.to_thread(run_sql, server, "CREATE TABLE t (v text)")
        filler = fill(folder, leave=0)
        # into its log alone, more than is left of that file; the next one cannot be made
        await asyncio.to_thread(
            run_sql, server, "SELECT pg_logical_emit_message(true, 't', repeat('x', 900000)) FROM generate_series(1, 40)"
        )
        await asyncio.to_thread(wait_for, server.explain_end, seconds=SECONDS, what="its end")
        sentence = server.explain_end()
        assert sentence is not None
        assert_is_clear(sentence, folder)
        with pytest.raises(DiskFullError):
            await server.start()
        filler.unlink()
        await server.start()
        assert await asyncio.to_thread(run_sql, server, "SELECT count(*) FROM t") == "0"
    finally:
        await server.stop()


def run_sql(server: PostgresServer, statement: str) -> str:
    """Return what psql prints; whether it failed is not looked at."""
    from streams.embedded.postgres import _binary

    command = [str(_binary("psql")), "-X", "-q", "-t", "-A", "-d", server.url, "-c", statement]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False).stdout.strip()


async def test_a_broker_that_meets_a_limit_on_the_size_of_files_is_explained(tmp_path: Path) -> None:
    broker = await a_broker(tmp_path)
    await broker.start()
    try:
        assert broker.pid is not None
        # indexes are files of 10 MiB from the start
        psutil.Process(broker.pid).rlimit(psutil.RLIMIT_FSIZE, (11 * MIB, 11 * MIB))
        acknowledged = await asyncio.to_thread(produce_until_refused, broker, "limited")
        assert acknowledged > 100
        await asyncio.to_thread(wait_for, lambda: not broker.is_running, seconds=SECONDS, what="its end")
        sentence = broker.explain_end()
        assert sentence is not None
        assert "a file reached the size that this system allows it (ulimit -f)" in sentence
        assert str(broker.data_dir) in sentence
        await broker.start()
        assert await asyncio.to_thread(count, broker, "limited", acknowledged) >= acknowledged
    finally:
        await broker.stop()


def test_needs_of_folders_on_one_disk_add_up(tmp_path: Path) -> None:
    free = disk.disk_of(tmp_path).free_bytes
    half = free * 2 // 3
    assert disk.shortage({tmp_path / "a": half}, "it") is None
    sentence = disk.shortage({tmp_path / "a" / "not-made-yet": half, tmp_path / "b": half}, "it")
    assert sentence is not None
    assert sentence.startswith("it needs ")


def test_up_shows_what_the_supervisor_tells(tmp_path: Path) -> None:
    shown = io.StringIO()
    options = Options(is_demo=False, is_once=False, data_dir=tmp_path, ready_file=None, port_base=None, is_free=True, environ={})
    run = Up(options, Console(file=shown, width=1_000))
    run._on_happening(
        Died(name="kafka", exit_code=1, lived_seconds=9, delay_seconds=1, explanation="kafka ended because the disk is full.")
    )
    run._on_happening(Filling(warning="the disk is nearly full."))
    died, explanation, warning = shown.getvalue().splitlines()
    assert "kafka died (exit code 1); starting it again in 1 s" in died
    assert explanation.strip() == "kafka ended because the disk is full."
    assert warning.endswith("The disk is nearly full.")
