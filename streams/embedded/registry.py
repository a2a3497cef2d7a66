"""Apicurio Registry on this machine, spoken to as a Confluent schema registry; schemas are kept in an H2 file."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import aiohttp

from streams.embedded.artifacts import java
from streams.embedded.processes import LOOPBACK, Launch, Server, accepts_connections, inherited_environment

REQUEST_TIMEOUT: Final = aiohttp.ClientTimeout(total=10)  # seconds; the first answer takes up to half a second
COMPATIBILITY: Final = "BACKWARD"


class RegistryServer(Server):
    """The registry. `url` is the base that Confluent clients take.

    `program_dir` must be set before `start`; `start_cache` is used where it exists, or written with `is_training`.
    """

    name = "registry"

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int,
        program_dir: Path | None = None,
        start_cache: Path | None = None,
        env: Mapping[str, str],
    ) -> None:
        super().__init__(data_dir)
        self.port = port
        self.start_cache = start_cache
        self.is_training = False
        self.program_dir = program_dir or data_dir
        self._env = env

    @property
    def url(self) -> str:
        """The Confluent-compatible base URL."""
        return f"http://{LOOPBACK}:{self.port}/apis/ccompat/v7"

    def ports(self) -> Sequence[int]:
        """Return its one port; the management interface takes any free one."""
        return (self.port,)

    async def prepare(self) -> Launch:
        """Return how to start it."""
        temporary = self.data_dir / "tmp"  # Vert.x leaves its file cache behind when it is killed
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        flags = ["-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData"]
        flags += [f"-Djava.io.tmpdir={temporary}", "-Xlog:disable", "-Xlog:all=error:stderr"]
        if self.start_cache and self.is_training:
            flags.append(f"-XX:AOTCacheOutput={self.start_cache}")
        elif self.start_cache and self.start_cache.exists():
            flags.append(f"-XX:AOTCache={self.start_cache}")
        flags += [
            f"-Dquarkus.http.host={LOOPBACK}",
            f"-Dquarkus.http.port={self.port}",
            f"-Dquarkus.management.host={LOOPBACK}",  # 0.0.0.0:9000 otherwise
            "-Dquarkus.management.port=0",
            "-Dquarkus.log.level=WARN",
            '-Dquarkus.log.category."io.apicurio".level=WARN',  # its audit writes a line for each change
            "-Dquarkus.banner.enabled=false",
            "-Dquarkus.http.access-log.enabled=false",
        ]
        return Launch(
            argv=[str(java()), *flags, "-jar", "quarkus-run.jar"],
            cwd=self.program_dir,
            env=inherited_environment(
                self._env,
                APICURIO_STORAGE_KIND="sql",
                APICURIO_STORAGE_SQL_KIND="h2",
                APICURIO_DATASOURCE_URL=f"jdbc:h2:file:{self.data_dir / 'db'};WRITE_DELAY=0",  # 500 ms otherwise
            ),
            is_idle=self.is_training,
        )

    async def is_ready(self) -> bool:
        """Return whether it lists subjects, which needs its database."""
        if not await accepts_connections(self.port):
            return False
        try:
            async with (
                aiohttp.ClientSession(timeout=REQUEST_TIMEOUT) as session,
                session.get(f"{self.url}/subjects") as response,
            ):
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def after_ready(self) -> None:
        """Make BACKWARD the default, as in Confluent's registry; Apicurio's is NONE. Raises ServerFailedError."""
        try:
            async with (
                aiohttp.ClientSession(timeout=REQUEST_TIMEOUT) as session,
                session.put(f"{self.url}/config", json={"compatibility": COMPATIBILITY}) as response,
            ):
                response.raise_for_status()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self.failure(f"did not accept {COMPATIBILITY} as its default compatibility") from error
