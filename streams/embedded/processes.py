"""Child processes that never outlive us, and errors that name whoever is in the way.

Three rules hold for each child. It dies with its parent, even when the parent is killed with -9 (on Linux, through
PR_SET_PDEATHSIG). Ctrl-C in the terminal does not reach it: the parent decides the order in which things stop. And its
output goes to a file whose last lines are part of every error.

The kernel ties a child to the *thread* that started it: start servers from a thread that lives as long as they should,
the event loop's own, never from `asyncio.to_thread`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import random
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final, Self

import psutil

from streams.embedded import disk

LOOPBACK: Final = "127.0.0.1"
POLL_SECONDS: Final = 0.02
LOG_LIMIT_BYTES: Final = 5 * 2**20
TAIL_LINES: Final = 20
TAIL_BYTES: Final = 4096
SEARCHED_BYTES: Final = 2**18
COMMAND_CHARACTERS: Final = 100
_kept_ports: Final[dict[int, socket.socket]] = {}
INHERITED_VARIABLES: Final = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH")

# Runs in the child and then becomes the command. Not `preexec_fn`: that runs Python between fork and exec, which can
# deadlock in a process with threads, and librdkafka starts several.
LAUNCHER: Final = """
import ctypes, os, sys
death_signal, parent, idle, user = map(int, sys.argv[1:5])
if user >= 0:
    libc = ctypes.CDLL(None)
    libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    # folders above the data may be closed to that user: keep the right to read (CAP_DAC_READ_SEARCH), where root has
    # only the one to override (CAP_DAC_OVERRIDE) that one, and drop all others
    header, rights = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, rights)
    right = 2 if rights[1] & 4 else 1
    libc.capset(header, (ctypes.c_uint32 * 6)(1 << right, 1 << right, 1 << right, 0, 0, 0))
    libc.prctl(47, 2, right, 0, 0)  # PR_CAP_AMBIENT_RAISE, kept across exec
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, death_signal, 0, 0, 0)  # PR_SET_PDEATHSIG, kept across exec, lost by a change of user
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)
if idle:
    os.nice(19)
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
os.execv(sys.argv[5], sys.argv[5:])
"""


class StackError(Exception):
    """The embedded stack cannot do what was asked. The message says why and what to do; show it and stop."""


class PortInUseError(StackError):
    """Another process listens on `port`. Stop it, or give the stack another port (0 = choose a free one)."""

    def __init__(self, port: int, owner: str, *, purpose: str) -> None:
        self.port = port
        self.owner = owner
        super().__init__(f"{owner}, but {purpose} needs it. Stop that process, or choose another port (0 = any free one).")


class DataDirInUseError(StackError):
    """Another running stack owns `path`. Stop it, or use another folder."""

    def __init__(self, path: Path, holder: str) -> None:
        self.path = path
        self.holder = holder
        super().__init__(f"the data folder {path} is in use by {holder}. Stop that process, or use another folder.")


class DiskFullError(StackError):
    """The disk of a data folder is full, or has too little room for a start. Free some, or use another folder."""


class ServerFailedError(StackError):
    """A server exited, or was not ready in time. `log_tail` holds its last lines; `log_path` is the whole log."""

    def __init__(self, name: str, reason: str, *, log_path: Path, log_tail: str) -> None:
        self.name = name
        self.log_path = log_path
        self.log_tail = log_tail
        super().__init__(f"{name} {reason}. Its log is {log_path}; the last lines are:\n{log_tail or '(nothing was logged)'}")


@contextlib.contextmanager
def told_when_full(what: str, folder: Path) -> Iterator[None]:
    """Turn an OSError that says the disk is full into a DiskFullError that names the disk of `folder`."""
    try:
        yield
    except OSError as error:
        if error.errno in disk.FULL:
            raise DiskFullError(f"{what} cannot write in {folder}: {disk.disk_of(folder)}. {disk.ADVICE}.") from error
        raise


def describe_process(pid: int) -> str:
    """Return `pid 123 (java kafka.Kafka server.properties)`: enough to recognise it, without flags and class paths."""
    try:
        words = psutil.Process(pid).cmdline()
    except psutil.Error:
        words = []
    if not words:
        return f"pid {pid}"
    kept = [Path(words[0]).name]
    skip = False
    for word in words[1:]:
        if skip or word in {"-cp", "-classpath"}:
            skip = not skip
        elif not word.startswith(("-X", "-D", "--add-", "--enable-", "--sun-")):
            kept.append(word)
    text = " ".join(" ".join(kept).split())
    if len(text) > COMMAND_CHARACTERS:
        text = text[: COMMAND_CHARACTERS - 1] + "…"
    return f"pid {pid} ({text})"


def describe_port_owner(port: int) -> str | None:
    """Return `port 9092 is in use by pid 123 (java …)`, or None when nothing listens on `port` of this machine."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:  # macOS without root
        connections = []
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
            owner = describe_process(connection.pid) if connection.pid else "a process of another user"
            return f"port {port} is in use by {owner}"
    return None if is_port_free(port) else f"port {port} is in use by a process that cannot be named"


def is_port_free(port: int) -> bool:
    """Return whether a server could listen on 127.0.0.1:`port` now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            if error.errno in {errno.EADDRINUSE, errno.EACCES}:
                return False
            raise
    return True


def require_free_port(port: int, *, purpose: str) -> None:
    """Raise PortInUseError, naming the process, when something listens on `port`; `purpose` says who wants it."""
    if not is_port_free(port):
        raise PortInUseError(port, describe_port_owner(port) or f"port {port} is in use", purpose=purpose)


def choose_port(remembered: int = 0, *, taken: Iterable[int] = ()) -> int:
    """Return a free port that is not in `taken`: `remembered` when it still is free, otherwise any.

    Any other is kept for this process, so that nobody who chooses by this function gets it before its server listens.
    Never from the range the kernel gives to outgoing connections: while a server is down, a client that retries there
    can connect to itself, and then the server cannot come back on its port.
    """
    taken = frozenset(taken)
    if remembered and remembered not in taken and is_port_free(remembered):
        return remembered
    for port in random.sample(range(20000, _first_outgoing_port()), k=2000):
        if port not in taken and _keep_port(port):
            return port
    raise StackError("no free port between 20000 and 32767 on 127.0.0.1. Stop some of the processes that listen there.")


def _keep_port(port: int) -> bool:
    """Bind `port` without listening on it, until this process ends; say whether it was free.

    Linux lets a server that sets SO_REUSEADDR, as all of ours do, listen on a port that is bound like this; a second
    process that binds it as we do is refused. Other systems would refuse the server too: there nothing is kept.
    """
    if sys.platform != "linux":
        return is_port_free(port)
    holder = socket.socket()
    try:
        holder.bind((LOOPBACK, port))
    except OSError as error:
        holder.close()
        if error.errno in {errno.EADDRINUSE, errno.EACCES}:
            return False
        raise
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _kept_ports[port] = holder
    return True


def _first_outgoing_port() -> int:
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        first = 32768
    return first if 24000 <= first <= 49152 else 32768  # a machine tuned otherwise: the usual bound


class DataDirLock:
    """One stack per data folder: an flock on `<folder>/.lock`, which the kernel releases however we end."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._file: IO[str] | None = None

    def acquire(self) -> Self:
        """Take the lock, creating the folder when needed. Raises DataDirInUseError naming the holder."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # the inbox holds personal data
        file = self.path.open("a+", encoding="ascii")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            pid = file.read().strip()
            file.close()
            raise DataDirInUseError(self.path.parent, describe_process(int(pid)) if pid.isdigit() else "another process") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self._file = file
        return self

    def release(self) -> None:
        """Give the folder back. The file stays: deleting it would let two processes lock different files."""
        if self._file:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        """Take the lock."""
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        """Give it back."""
        self.release()


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What to execute. `env` replaces ours, so that no variable of the shell can change how a server behaves."""

    argv: Sequence[str]
    cwd: Path
    env: Mapping[str, str] = field(default_factory=dict)
    death_signal: signal.Signals = signal.SIGTERM  # sent by the kernel when our thread ends
    stop_signal: signal.Signals = signal.SIGTERM
    is_idle: bool = False  # run only when nobody else wants the processor
    user: int | None = None  # the id of the user and group to become, for a server that refuses to run as root


def inherited_environment(env: Mapping[str, str], **more: str) -> dict[str, str]:
    """Return the few variables of `env` that a child may see, plus `more`."""
    return {name: env[name] for name in INHERITED_VARIABLES if name in env} | more


class ManagedProcess:
    """A started child: its output in a file, its own session, dead when we are."""

    def __init__(self, launch: Launch, *, log_path: Path, pid_path: Path) -> None:
        self.log_path = log_path
        self._pid_path = pid_path
        if log_path.exists() and log_path.stat().st_size > LOG_LIMIT_BYTES:
            log_path.replace(log_path.with_suffix(".log.1"))
        self._stop_signal = launch.stop_signal
        user = -1 if launch.user is None else launch.user
        numbers = (launch.death_signal, os.getpid(), launch.is_idle, user)
        command = [sys.executable, "-I", "-S", "-c", LAUNCHER, *(str(int(number)) for number in numbers)]
        with log_path.open("ab") as log:
            self._log_start = log.tell()
            self._child = subprocess.Popen(  # noqa: S603  # our own argument list, no shell
                [*command, *launch.argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=launch.cwd,
                env=dict(launch.env),
                start_new_session=True,
            )
        with contextlib.suppress(psutil.Error):
            pid_path.write_text(f"{self.pid} {psutil.Process(self.pid).create_time()}", encoding="ascii")

    @property
    def pid(self) -> int:
        """The process id, also after the end."""
        return self._child.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative = the signal that ended it."""
        return self._child.poll()

    @property
    def is_running(self) -> bool:
        """Whether the process still exists."""
        return self.exit_code is None

    def log_tail(self) -> str:
        """Return the last lines this run has written, at most 20 lines and 4 KiB."""
        return "\n".join(self.log_end(TAIL_BYTES).rstrip().splitlines()[-TAIL_LINES:])

    def log_end(self, limit_bytes: int = SEARCHED_BYTES) -> str:
        """Return the last bytes this run has written: what a server says of its end may come before many traces."""
        with self.log_path.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, end - limit_bytes))
            return log.read().decode(errors="replace")

    async def wait(self, deadline_seconds: float | None = None) -> int:
        """Return the exit code once the process has ended. Raises TimeoutError after `deadline_seconds`."""
        end = None if deadline_seconds is None else time.monotonic() + deadline_seconds
        while (code := self.exit_code) is None:
            if end is not None and time.monotonic() > end:
                raise TimeoutError
            await asyncio.sleep(POLL_SECONDS)
        self._pid_path.unlink(missing_ok=True)
        return code

    async def stop(self, grace_seconds: float) -> int:
        """Ask it to end (`Launch.stop_signal`), wait up to `grace_seconds`, then kill. Returns the exit code."""
        self._signal(self._stop_signal)
        try:
            return await self.wait(grace_seconds)
        except TimeoutError:
            return await self.kill()

    async def kill(self) -> int:
        """Kill it and whatever it started (SIGKILL), as a crash would. Returns the exit code once it is gone."""
        with contextlib.suppress(ProcessLookupError):
            if self.is_running:
                os.killpg(self.pid, signal.SIGKILL)  # its session is its own, so the group is too
        return await self.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self.is_running:
            self._child.send_signal(number)


async def end_leftover(pid_path: Path, grace_seconds: float = 5) -> None:
    """End the process of an earlier run that `pid_path` names, if it still lives.

    Only called with the data folder locked: its owner is dead, and the server is either ending (the kernel has told
    it) or, on systems without PR_SET_PDEATHSIG, orphaned. The start time tells it from a stranger with the same pid.
    """
    try:
        pid, created = pid_path.read_text(encoding="ascii").split()  # noqa: ASYNC240
        process = psutil.Process(int(pid))
        if abs(process.create_time() - float(created)) > 0.02:  # clock ticks
            return
        process.terminate()
    except (OSError, ValueError, psutil.NoSuchProcess):
        return
    end = time.monotonic() + grace_seconds
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > end:
                process.kill()
            await asyncio.sleep(POLL_SECONDS)


class Server(ABC):
    """A server on a fixed port that can be started, stopped, killed and started again on the same data.

    Not bound to an event loop: a test may restart a server that a fixture started in another one.
    """

    name: str
    stop_grace_seconds: float = 6
    ready_deadline_seconds: float = 60
    room_bytes: int = 8 * disk.MIB  # free space without which a start would fail soon, or half-way

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.process: ManagedProcess | None = None

    @property
    def log_path(self) -> Path:
        """Where the server's output goes, over all its runs."""
        return self.data_dir / f"{self.name}.log"

    @property
    def pid_path(self) -> Path:
        """Where the running server's pid is kept for the run after a crash."""
        return self.data_dir / f"{self.name}.pid"

    @property
    def pid(self) -> int | None:
        """The running process's id, or None."""
        return self.process.pid if self.process and self.process.is_running else None

    @property
    def is_running(self) -> bool:
        """Whether the process exists; see `is_ready` for whether it answers."""
        return self.pid is not None

    @property
    def exit_code(self) -> int | None:
        """The last process's exit code, None while it runs or before the first start."""
        return self.process.exit_code if self.process else None

    @abstractmethod
    def ports(self) -> Sequence[int]:
        """Return the ports it listens on."""

    @abstractmethod
    async def prepare(self) -> Launch:
        """Write what the server needs on disk and return how to start it."""

    @abstractmethod
    async def is_ready(self) -> bool:
        """Return whether it answers its own protocol. Asked again until it does."""

    async def after_ready(self) -> None:  # noqa: B027  # most servers need nothing more
        """Configure the server through its own interface."""

    async def start(self) -> float:
        """Start the server and wait until it answers; returns how many seconds that took.

        Raises PortInUseError, DiskFullError, and ServerFailedError with the log's last lines when it exits or is not
        ready in a minute (nothing is left running then). Does nothing when it runs already.
        """
        if self.is_running:
            return 0.0
        with told_when_full(self.name, self.data_dir):
            return await self._start()

    async def _start(self) -> float:
        began = time.monotonic()
        if short := disk.shortage({self.data_dir: self.room_bytes}, self.name):
            raise DiskFullError(short)
        self.data_dir.mkdir(parents=True, exist_ok=True)
        await end_leftover(self.pid_path)
        for port in self.ports():
            require_free_port(port, purpose=self.name)
        self.process = ManagedProcess(await self.prepare(), log_path=self.log_path, pid_path=self.pid_path)
        try:
            await self._wait_until_ready(self.process, began + self.ready_deadline_seconds)
            await self.after_ready()
        except BaseException:
            await self.process.kill()
            raise
        return time.monotonic() - began

    async def stop(self) -> None:
        """Stop it in order, by force after `stop_grace_seconds`."""
        if self.process:
            await self.process.stop(self.stop_grace_seconds)

    async def kill(self) -> None:
        """Kill it with -9 and return once it is gone."""
        if self.process:
            await self.process.kill()

    async def restart(self) -> float:
        """Stop it if it runs, start it on the same data and port; returns the seconds until it was ready."""
        await self.stop()
        return await self.start()

    async def _wait_until_ready(self, process: ManagedProcess, deadline: float) -> None:
        while not await self.is_ready():
            if not process.is_running:
                raise self.failure(f"ended with exit code {process.exit_code} instead of starting")
            if time.monotonic() > deadline:
                raise self.failure(f"was not ready after {self.ready_deadline_seconds:.0f} s")
            await asyncio.sleep(POLL_SECONDS)

    def failure(self, reason: str, process: ManagedProcess | None = None) -> StackError:
        """Return the error for `reason`: that the disk is full, if it is, else one with the log's last lines.

        `process`: whose log it is in, when not the server's own.
        """
        process = process or self.process
        if process and (explanation := disk.explain(self.name, self.data_dir, process.log_end())):
            return DiskFullError(explanation)
        tail = process.log_tail() if process else ""
        return ServerFailedError(self.name, reason, log_path=process.log_path if process else self.log_path, log_tail=tail)

    def explain_end(self) -> str | None:
        """Return a sentence when the process ended for want of space, None when for something else or not at all."""
        if self.process is None or self.is_running:
            return None
        return disk.explain(self.name, self.data_dir, self.process.log_end())


async def accepts_connections(port: int) -> bool:
    """Return whether something accepts TCP connections on 127.0.0.1:`port`: cheap enough to ask every 20 ms."""
    try:
        async with asyncio.timeout(1):
            _, writer = await asyncio.open_connection(LOOPBACK, port)
    except OSError:  # TimeoutError included
        return False
    writer.close()
    return True
