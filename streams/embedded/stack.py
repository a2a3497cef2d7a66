"""Kafka, the schema registry, PostgreSQL and the mail server as one thing to start and stop: `notify up` and the tests use it.

They start at the same time, each as soon as its own files are there. The first start on a machine downloads them
(195 MB); later ones take about two seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Final, Self

import aiohttp

from streams.embedded import artifacts, disk
from streams.embedded.kafka import KafkaBroker
from streams.embedded.postgres import PostgresServer
from streams.embedded.processes import (
    LOOPBACK,
    DataDirLock,
    DiskFullError,
    Launch,
    Server,
    StackError,
    accepts_connections,
    choose_port,
    end_leftover,
    inherited_environment,
    require_free_port,
    told_when_full,
)
from streams.embedded.registry import RegistryServer
from streams.embedded.simulators import SimulatorsServer

Progress = Callable[[str, str], None]

REQUEST_TIMEOUT: Final = aiohttp.ClientTimeout(total=5)  # seconds
WARM_UP_DELAY_SECONDS: Final = 10.0
TRAINING_EXIT_SECONDS: Final = 180.0  # at idle priority, on a busy machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Where the stack listens, on 127.0.0.1 only. 0 = any free port, the same as last time when it is free."""

    kafka: int = 19092
    controller: int = 19093
    registry: int = 18081
    smtp: int = 11025
    http: int = 18025
    postgres: int = 15432

    @classmethod
    def free(cls) -> Self:
        """Return ports that are all chosen at the start, as tests want them."""
        return cls(kafka=0, controller=0, registry=0, smtp=0, http=0, postgres=0)


DEFAULT_PORTS: Final = Ports()
SERVERS: Final = ("kafka", "registry", "postgres", "mail", "simulators")
PURPOSES: Final = {
    "kafka": "the Kafka broker",
    "controller": "the Kafka controller",
    "registry": "the schema registry",
    "smtp": "the mail server",
    "http": "the inbox page",
    "postgres": "the database",
}


class MailServer(Server):
    """The development mail server, `streams.embedded.mail`, in its own process."""

    name = "mail"
    stop_grace_seconds = 3

    def __init__(self, data_dir: Path, *, smtp_port: int, http_port: int, env: Mapping[str, str]) -> None:
        super().__init__(data_dir)
        self.smtp_port = smtp_port
        self.http_port = http_port
        self._env = env

    @property
    def smtp_url(self) -> str:
        """Where to send mail to."""
        return f"smtp://{LOOPBACK}:{self.smtp_port}"

    @property
    def http_url(self) -> str:
        """Where to read it."""
        return f"http://{LOOPBACK}:{self.http_port}"

    def ports(self) -> Sequence[int]:
        """Return both ports."""
        return (self.smtp_port, self.http_port)

    async def prepare(self) -> Launch:
        """Return how to start it: with the modules we run ourselves."""
        root = Path(__file__).parents[2]
        options = {"--smtp-port": self.smtp_port, "--http-port": self.http_port, "--data-dir": self.data_dir}
        arguments = [str(word) for pair in options.items() for word in pair]
        return Launch(
            argv=[sys.executable, "-P", "-m", "streams.embedded.mail", *arguments],
            cwd=self.data_dir,
            env=inherited_environment(self._env, PYTHONPATH=str(root), PYTHONUNBUFFERED="1"),
        )

    async def is_ready(self) -> bool:
        """Return whether both sides answer."""
        if not (await accepts_connections(self.smtp_port) and await accepts_connections(self.http_port)):
            return False
        try:
            async with (
                aiohttp.ClientSession(timeout=REQUEST_TIMEOUT) as session,
                session.get(f"{self.http_url}/api/stats") as response,
            ):
                return response.ok
        except (aiohttp.ClientError, TimeoutError):
            return False


@dataclass(kw_only=True)
class Stack:
    """What is running. Its methods may be called from any event loop."""

    data_dir: Path
    ports: Ports
    broker: KafkaBroker
    registry_process: RegistryServer | None = None
    mail_process: MailServer | None = None
    postgres_process: PostgresServer | None = None
    simulators_process: SimulatorsServer | None = None
    _lock: DataDirLock = field(repr=False)
    _warm_up: WarmUp | None = field(default=None, repr=False)

    @property
    def kafka(self) -> str:
        """The broker's host and port."""
        return self.broker.bootstrap_servers

    @property
    def registry(self) -> str:
        """The registry's base URL. Raises StackError when the stack was started without it."""
        if not self.registry_process:
            raise StackError("the registry was not started: call start_stack(registry=True).")
        return self.registry_process.url

    @property
    def mail_smtp(self) -> str:
        """Where to send mail, `smtp://host:port`. Raises StackError when the stack was started without it."""
        return self._mail.smtp_url

    @property
    def mail_http(self) -> str:
        """Where to read mail. Raises StackError when the stack was started without it."""
        return self._mail.http_url

    @property
    def postgres(self) -> str:
        """The database's URL, password included. Raises StackError when the stack was started without it."""
        if not self.postgres_process:
            raise StackError("PostgreSQL was not started: call start_stack(postgres=True).")
        return self.postgres_process.url

    @property
    def providers_file(self) -> Path:
        """What NOTIFY_PROVIDERS_FILE should name. Raises StackError when the stack was started without simulators."""
        if not self.simulators_process:
            raise StackError("the simulated providers were not started: call start_stack(simulators=True).")
        return self.simulators_process.providers_file

    @property
    def _mail(self) -> MailServer:
        if not self.mail_process:
            raise StackError("the mail server was not started: call start_stack(mail=True).")
        return self.mail_process

    @property
    def servers(self) -> list[Server]:
        """Everything that was started."""
        others = (self.registry_process, self.postgres_process, self.mail_process, self.simulators_process)
        return [self.broker, *(each for each in others if each)]

    async def stop(self) -> None:
        """Stop everything at the same time, by force after 6 seconds, and give the data folder back."""
        if self._warm_up:
            await self._warm_up.cancel()
        await asyncio.gather(*(each.stop() for each in self.servers))
        self._lock.release()

    async def __aenter__(self) -> Self:
        """Return the stack, which runs already."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop it."""
        await self.stop()


async def start_stack(  # noqa: PLR0913
    data_dir: Path,
    *,
    cache_dir: Path | None = None,
    ports: Ports = DEFAULT_PORTS,
    progress: Progress | None = None,
    mail: bool = True,
    registry: bool = True,
    postgres: bool = True,
    simulators: bool = False,
    warm_up: bool = True,
    has_short_life: bool = False,
) -> Stack:
    """Start the stack on the data in `data_dir`, creating it the first time; return when everything answers.

    `cache_dir` holds what is downloaded (default: NOTIFY_CACHE_DIR or the user's cache folder). `progress` is called
    with a component and a message, from the event loop and from download threads. `warm_up` lets a later start be
    faster, see `WarmUp`; with `has_short_life` it is for minutes, and Kafka compiles itself less. Raises StackError, naming
    the process that holds a port or the folder, the disk that is full, or with the last log lines of what did not start;
    nothing is left running then.
    """
    data_dir = data_dir.absolute()  # noqa: ASYNC240
    cache = (cache_dir or artifacts.default_cache_dir(os.environ)).absolute()
    with told_when_full("the stack", data_dir):
        lock = DataDirLock(data_dir).acquire()
    try:
        wanted = {"kafka", "controller"} | ({"smtp", "http"} if mail else set())
        wanted |= {name for name, is_wanted in (("registry", registry), ("postgres", postgres)) if is_wanted}
        ports = await _settle_ports(data_dir, ports, wanted)
        stack = Stack(
            data_dir=data_dir,
            ports=ports,
            broker=KafkaBroker(
                data_dir / "kafka",
                port=ports.kafka,
                controller_port=ports.controller,
                start_cache=artifacts.start_cache(cache, artifacts.KAFKA),
                env=os.environ,
            ),
            registry_process=RegistryServer(
                data_dir / "registry",
                port=ports.registry,
                start_cache=artifacts.start_cache(cache, artifacts.REGISTRY),
                env=os.environ,
            )
            if registry
            else None,
            mail_process=MailServer(data_dir / "mail", smtp_port=ports.smtp, http_port=ports.http, env=os.environ) if mail else None,
            postgres_process=PostgresServer(data_dir / "postgres", port=ports.postgres, env=os.environ) if postgres else None,
            simulators_process=SimulatorsServer(data_dir / "simulators", env=os.environ) if simulators else None,
            _lock=lock,
        )
        stack.broker.has_short_life = has_short_life
        # together: each of them alone may have room enough
        if short := disk.shortage({server.data_dir: server.room_bytes for server in stack.servers}, "the stack"):
            raise DiskFullError(short)
        await _start(stack, cache, progress or (lambda _component, _message: None))
    except BaseException:
        lock.release()
        raise
    if warm_up:
        stack._warm_up = WarmUp.start_if_needed(cache, with_registry=registry)  # noqa: SLF001  # built above
    return stack


async def _settle_ports(data_dir: Path, ports: Ports, wanted: set[str]) -> Ports:
    """Return `ports` with every 0 replaced, and remember them for the next run."""
    await asyncio.gather(*(end_leftover(data_dir / name / f"{name}.pid") for name in SERVERS))
    path = data_dir / "ports.json"
    remembered: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        remembered = json.loads(path.read_text(encoding="utf-8"))
    settled = {each.name: getattr(ports, each.name) for each in fields(ports)}
    for name in sorted(wanted):
        if settled[name]:
            require_free_port(settled[name], purpose=PURPOSES[name])
        else:
            settled[name] = choose_port(remembered.get(name, 0), taken=settled.values())
    with told_when_full("the stack", data_dir):
        path.write_text(json.dumps(remembered | {name: settled[name] for name in wanted}), encoding="utf-8")
    return replace(ports, **settled)


async def _start(stack: Stack, cache: Path, tell: Progress) -> None:
    """Start every server of `stack`; on any failure kill those that run and raise the first error."""

    async def start(server: Server, files: Awaitable[None]) -> None:
        await files
        tell(server.name, "starting")
        seconds = await server.start()
        tell(server.name, f"ready in {seconds:.1f} s")

    async def kafka_files() -> None:
        stack.broker.class_path = await artifacts.obtain_kafka(cache, partial(tell, "kafka"))

    async def registry_files(server: RegistryServer) -> None:
        server.program_dir = await artifacts.obtain_registry(cache, partial(tell, "registry"))

    async def no_files() -> None:
        return

    tasks = [asyncio.create_task(start(stack.broker, kafka_files()))]
    if stack.registry_process:
        tasks.append(asyncio.create_task(start(stack.registry_process, registry_files(stack.registry_process))))
    others = (stack.postgres_process, stack.mail_process, stack.simulators_process)
    tasks += [asyncio.create_task(start(server, no_files())) for server in others if server]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(each.kill() for each in stack.servers))
        raise


class WarmUp:
    """Makes later starts faster: once per machine, throwaway servers are run and Java writes down what it loaded.

    Runs while the stack does, only when nobody else wants the processor, in a thread with an event loop of its own, and
    ends with the stack: what is not finished then is tried again next time. Nothing depends on it.
    """

    def __init__(self, cache: Path, names: Sequence[str]) -> None:
        self._cache = cache
        self._names = names
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._train())
        self._thread = threading.Thread(target=self._run, name="warm-up", daemon=True)
        self._thread.start()

    @classmethod
    def start_if_needed(cls, cache: Path, *, with_registry: bool) -> WarmUp | None:
        """Return a running warm-up, or None when the caches are there."""
        names = [artifacts.KAFKA, *([artifacts.REGISTRY] if with_registry else [])]
        missing = [each for each in names if not artifacts.start_cache(cache, each).exists()]
        return cls(cache, missing) if missing else None

    async def cancel(self) -> None:
        """End it and its servers."""
        with contextlib.suppress(RuntimeError):  # its loop is closed: it has ended by itself
            self._loop.call_soon_threadsafe(self._task.cancel)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    async def _train(self) -> None:
        await asyncio.sleep(WARM_UP_DELAY_SECONDS)
        for name in self._names:
            with contextlib.suppress(StackError, OSError):
                await train(self._cache, name)


async def train(cache: Path, name: str) -> None:
    """Write the start cache of KAFKA or REGISTRY into `cache`, with a throwaway server at idle priority.

    Takes about 10 s of processor time. Raises StackError, also when another process is doing the same.
    """
    with DataDirLock(cache / f".{name}.training"), tempfile.TemporaryDirectory(prefix="flowmart-notify-") as folder:
        final = artifacts.start_cache(cache, name)
        unfinished = Path(folder) / final.name
        port = choose_port()
        controller_port = choose_port(taken=[port])
        server: KafkaBroker | RegistryServer
        if name == artifacts.KAFKA:
            server = KafkaBroker(Path(folder), port=port, controller_port=controller_port, start_cache=unfinished, env=os.environ)
            server.class_path = await artifacts.obtain_kafka(cache, _silent)
        else:
            server = RegistryServer(Path(folder), port=port, start_cache=unfinished, env=os.environ)
            server.program_dir = await artifacts.obtain_registry(cache, _silent)
        server.is_training = True
        server.ready_deadline_seconds = server.stop_grace_seconds = TRAINING_EXIT_SECONDS
        try:
            await server.start()
            await server.stop()  # Java writes the file on its way out
        except BaseException:
            await server.kill()
            raise
        if unfinished.exists():
            copied = final.with_suffix(".part")  # the temporary folder may be on another disk
            await asyncio.to_thread(shutil.copyfile, unfinished, copied)
            copied.replace(final)


def _silent(_message: str) -> None:
    """Tell nobody."""
