"""The workers of a laptop as child processes, and whoever starts again what has died.

Three processes for ten roles. Measured on two cores with the first seven of them, from the start of the processes until every
role is ready, and their memory (the proportional share of it, which counts what they have in common once):

    one role a process (7)                                                         10.6 s   420 MiB
    [ingest router] [sender-critical] [sender-normal sender-bulk] [signals views]   5.7 s   268 MiB
    [ingest router] [sender-critical] [all others]                                  5.3 s   211 MiB   chosen
    [sender-critical] [all others]                                                  3.1 s   152 MiB
    all in one                                                                      3.5 s    99 MiB

The critical sender has a process of its own: no bulk mail, page or crash of another role is in its way. So have ingest,
stock, router and delay, on which it waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Final

import aiohttp

from streams.embedded import disk
from streams.embedded.processes import (
    LOOPBACK,
    Launch,
    Server,
    StackError,
    accepts_connections,
    choose_port,
    end_leftover,
    inherited_environment,
    require_free_port,
)
from streams.roles import Role

# a process and the roles that share it
GROUPS: Final[Mapping[str, tuple[Role, ...]]] = {
    "routing": (Role.INGEST, Role.STOCK, Role.ROUTER, Role.DELAY),
    "critical": (Role.SENDER_CRITICAL,),
    "general": (Role.SENDER_NORMAL, Role.SENDER_BULK, Role.SIGNALS, Role.VIEWS, Role.STORE),
}
FIRST_DELAY_SECONDS: Final = 0.5
LONGEST_DELAY_SECONDS: Final = 10.0
SOUND_SECONDS: Final = 60.0  # whoever lived so long begins with the first delay again
WORKER_GRACE_SECONDS: Final = 4.0
LOOK_SECONDS: Final = 0.1
DISK_SECONDS: Final = 2.0
LOW_BYTES: Final = 64 * disk.MIB
HEALTH_TIMEOUT: Final = aiohttp.ClientTimeout(total=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Died:
    """A process ended by itself. `exit_code` negative: the signal that ended it."""

    name: str
    exit_code: int | None
    lived_seconds: float
    delay_seconds: float  # until it is started again
    explanation: str | None = None  # a sentence, when the exit code alone would tell nobody what to do

    @property
    def cause(self) -> str:
        """How it ended, for people."""
        code = self.exit_code or 0
        if code >= 0:
            return f"exit code {code}"
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Returned:
    """It was started again and answers."""

    name: str
    pid: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NotReturned:
    """Starting it again failed; the next try is in `delay_seconds`."""

    name: str
    reason: str
    delay_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Filling:
    """A disk is nearly full: `warning` says which, and how full. Told once, and again after it had room."""

    warning: str


Happening = Died | Returned | NotReturned | Filling
Tell = Callable[[Happening], None]


class WorkerProcess(Server):
    """Roles that share a process (`streams.embedded.worker`). Ready when each of them is."""

    stop_grace_seconds = WORKER_GRACE_SECONDS

    def __init__(self, name: str, ports: Mapping[Role, int], *, folder: Path, variables: Mapping[str, str], env: Mapping[str, str]) -> None:
        super().__init__(folder)
        self.name = name
        self.ports_of = dict(ports)
        self._variables = variables
        self._env = env

    def ports(self) -> Sequence[int]:
        """Return the web ports of its roles."""
        return list(self.ports_of.values())

    async def prepare(self) -> Launch:
        """Return how to start it. Its name in the consumer groups stays the same, so that a quick restart moves no partition."""
        root = Path(__file__).parents[2]
        return Launch(
            argv=[sys.executable, "-P", "-m", "streams.embedded.worker", *(f"{role}:{port}" for role, port in self.ports_of.items())],
            cwd=self.data_dir,
            env=inherited_environment(
                self._env, **self._variables, NOTIFY_WORKER_NAME=f"up-{self.name}", PYTHONPATH=str(root), PYTHONUNBUFFERED="1"
            ),
        )

    async def is_ready(self) -> bool:
        """Return whether `/health/ready` of every role says so."""
        if not all(await asyncio.gather(*(accepts_connections(port) for port in self.ports()))):
            await asyncio.sleep(LOOK_SECONDS)
            return False
        try:
            async with aiohttp.ClientSession(timeout=HEALTH_TIMEOUT) as session:
                answers = await asyncio.gather(*(_status(session, port) for port in self.ports()))
        except (aiohttp.ClientError, TimeoutError):
            answers = []
        if answers and all(status == HTTPStatus.OK for status in answers):
            return True
        await asyncio.sleep(LOOK_SECONDS)
        return False


async def _status(session: aiohttp.ClientSession, port: int) -> int:
    async with session.get(f"http://{LOOPBACK}:{port}/health/ready") as answer:
        return answer.status


class Supervisor:
    """Starts again what dies, after 0.5 s, 1 s, 2 s and so on up to 10 s, and tells what happens."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._servers: list[Server] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._disks: asyncio.Task[None] | None = None

    @property
    def servers(self) -> Sequence[Server]:
        """Everything that is kept."""
        return self._servers

    def keep(self, servers: Iterable[Server]) -> None:
        """Look after `servers`, which run already."""
        for server in servers:
            self._servers.append(server)
            self._tasks.append(asyncio.create_task(self._keep(server), name=f"keep {server.name}"))
        if self._servers and self._disks is None:
            self._disks = asyncio.create_task(self._watch_disks(), name="watch disks")
            self._tasks.append(self._disks)

    async def release(self) -> None:
        """Look after nothing any more; whoever is just being started again is killed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self._disks = None

    async def stop(self, grace_seconds: float) -> None:
        """Stop everything at the same time: SIGTERM, and SIGKILL after `grace_seconds`."""
        await self.release()
        for server in self._servers:
            server.stop_grace_seconds = grace_seconds
        await asyncio.gather(*(server.stop() for server in self._servers))

    async def _watch_disks(self) -> None:
        """Warn before a disk is full: Kafka ends when it is, and the mail server refuses."""
        low: set[Path] = set()
        while True:
            found = {each.mount_point: each for each in (disk.disk_of(server.data_dir) for server in self._servers)}
            for place, each in found.items():
                if each.free_bytes < LOW_BYTES and place not in low:
                    self._tell(Filling(warning=f"{each}, below {disk.human(LOW_BYTES)}. {disk.ADVICE}."))
                    low.add(place)
                elif each.free_bytes > 2 * LOW_BYTES:
                    low.discard(place)
            await asyncio.sleep(DISK_SECONDS)

    async def _keep(self, server: Server) -> None:
        delay = FIRST_DELAY_SECONDS
        while True:
            began = time.monotonic()
            while server.is_running:  # noqa: ASYNC110 - a process sets no event
                await asyncio.sleep(LOOK_SECONDS)
            lived = time.monotonic() - began
            if lived >= SOUND_SECONDS:
                delay = FIRST_DELAY_SECONDS
            self._tell(
                Died(
                    name=server.name,
                    exit_code=server.exit_code,
                    lived_seconds=lived,
                    delay_seconds=delay,
                    explanation=server.explain_end(),
                )
            )
            delay = await self._bring_back(server, delay)

    async def _bring_back(self, server: Server, delay: float) -> float:
        """Return the delay for the next time, once `server` answers again."""
        while True:
            await asyncio.sleep(delay)
            delay = min(2 * delay, LONGEST_DELAY_SECONDS)
            try:
                seconds = await server.start()
            except (StackError, OSError) as error:
                self._tell(NotReturned(name=server.name, reason=str(error), delay_seconds=delay))
                continue
            self._tell(Returned(name=server.name, pid=server.pid or 0, seconds=seconds))
            return delay


async def start_all(servers: Sequence[Server], started: Callable[[Server, float], None]) -> None:
    """Start `servers` at the same time, telling of each how many seconds it took.

    Raises ServerFailedError for the first that ends or is not ready in time; nothing is left running then.
    """

    async def start(server: Server) -> None:
        started(server, await server.start())

    tasks = [asyncio.create_task(start(server)) for server in servers]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(server.kill() for server in servers))
        raise


def kill_now(servers: Iterable[Server]) -> None:
    """Kill everything with -9 and wait for nothing."""
    for server in servers:
        if (pid := server.pid) is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)


@dataclass(frozen=True, slots=True, kw_only=True)
class WebPorts:
    """Where the roles answer, and where their metrics are gathered."""

    of_role: Mapping[Role, int]
    of_metrics: int


async def settle_web_ports(folder: Path, first: int | None) -> WebPorts:
    """Return `first` for the views, the next ones for the other roles, and then one for the metrics page.

    None: any free ports, the same as last time when they are free. `folder` holds the workers' files; whatever an earlier
    run left alive there is ended. Raises PortInUseError naming the process.
    """
    await asyncio.gather(*(end_leftover(folder / f"{name}.pid") for name in GROUPS))
    roles = [Role.VIEWS, *(role for role in Role if role is not Role.VIEWS)]
    names = [*roles, "metrics"]
    if first is not None:
        for offset, name in enumerate(names):
            require_free_port(first + offset, purpose=f"the web of {name}" if name in roles else "the metrics page")
        return WebPorts(of_role={role: first + offset for offset, role in enumerate(roles)}, of_metrics=first + len(roles))
    path = folder / "ports.json"
    remembered: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        remembered = json.loads(path.read_text(encoding="ascii"))
    chosen: dict[str, int] = {}
    for name in names:
        chosen[name] = choose_port(remembered.get(name, 0), taken=chosen.values())
    path.write_text(json.dumps(chosen), encoding="ascii")
    return WebPorts(of_role={role: chosen[role] for role in roles}, of_metrics=chosen["metrics"])
