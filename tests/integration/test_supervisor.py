"""Whoever dies is started again, ever more slowly, and says so."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from streams.embedded.keys import obtain_keys
from streams.embedded.metrics_page import join
from streams.embedded.processes import Launch, PortInUseError, Server, ServerFailedError, StackError, choose_port
from streams.embedded.supervisor import Died, Happening, NotReturned, Returned, Supervisor, settle_web_ports, start_all
from streams.roles import Role

DEADLINE_SECONDS = 20


class Sleeper(Server):
    """A process that waits, or with `exit_code` ends at once."""

    name = "sleeper"

    def __init__(self, data_dir: Path, *, exit_code: int | None = None) -> None:
        super().__init__(data_dir)
        self.exit_with = exit_code

    def ports(self) -> Sequence[int]:
        return ()

    async def prepare(self) -> Launch:
        code = "import signal; signal.pause()" if self.exit_with is None else f"raise SystemExit({self.exit_with})"
        return Launch(argv=[sys.executable, "-I", "-c", code], cwd=self.data_dir)

    async def is_ready(self) -> bool:
        return self.is_running and self.exit_with is None


class Diary:
    """What the supervisor told."""

    def __init__(self) -> None:
        self.entries: list[Happening] = []
        self._news = asyncio.Event()

    def write(self, happening: Happening) -> None:
        self.entries.append(happening)
        self._news.set()

    async def until(self, count: int) -> list[Happening]:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while len(self.entries) < count:
                self._news.clear()
                await self._news.wait()
        return self.entries


async def test_a_killed_process_comes_back_and_every_death_is_told(tmp_path: Path) -> None:
    server, diary = Sleeper(tmp_path), Diary()
    await server.start()
    supervisor = Supervisor(diary.write)
    supervisor.keep([server])
    first = server.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    died, returned = await diary.until(2)
    assert isinstance(died, Died)
    assert (died.name, died.cause, died.delay_seconds) == ("sleeper", "SIGKILL", 0.5)
    assert isinstance(returned, Returned)
    assert returned.pid == server.pid != first
    await supervisor.stop(grace_seconds=2)
    assert not server.is_running
    assert len(diary.entries) == 2  # being stopped is no death


async def test_each_try_waits_longer(tmp_path: Path) -> None:
    server, diary = Sleeper(tmp_path), Diary()
    await server.start()
    supervisor = Supervisor(diary.write)
    supervisor.keep([server])
    server.exit_with = 7
    await server.kill()
    entries = await diary.until(3)
    assert [each.delay_seconds for each in entries if isinstance(each, Died | NotReturned)] == [0.5, 1.0, 2.0]
    assert isinstance(entries[1], NotReturned)
    assert "exit code 7" in entries[1].reason
    await supervisor.stop(grace_seconds=2)


async def test_when_one_does_not_start_none_is_left(tmp_path: Path) -> None:
    good, bad = Sleeper(tmp_path / "good"), Sleeper(tmp_path / "bad", exit_code=2)
    with pytest.raises(ServerFailedError, match="exit code 2"):
        await start_all([good, bad], lambda _server, _seconds: None)
    assert not good.is_running


async def test_web_ports_stay_the_same_from_run_to_run(tmp_path: Path) -> None:
    first = await settle_web_ports(tmp_path, None)
    assert await settle_web_ports(tmp_path, None) == first
    assert set(first.of_role) == set(Role)
    assert len({*first.of_role.values(), first.of_metrics}) == len(Role) + 1


async def test_a_taken_web_port_is_named(tmp_path: Path) -> None:
    base = choose_port()
    server = await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", base + 1)
    async with server:
        with pytest.raises(PortInUseError, match=f"pid {os.getpid()}"):
            await settle_web_ports(tmp_path, base)


def test_keys_are_made_once_and_only_for_their_owner(tmp_path: Path) -> None:
    keys = obtain_keys(tmp_path, {})
    assert obtain_keys(tmp_path, {}) == keys
    assert (tmp_path / "keys.json").stat().st_mode & 0o777 == 0o600
    assert obtain_keys(tmp_path, {"NOTIFY_SEAL_KEY": "another"}) == {**keys, "NOTIFY_SEAL_KEY": "another"}


def test_keys_that_others_may_read_are_refused(tmp_path: Path) -> None:
    obtain_keys(tmp_path, {})
    (tmp_path / "keys.json").chmod(0o644)
    with pytest.raises(StackError, match="chmod 600"):
        obtain_keys(tmp_path, {})


def test_given_keys_are_not_stored(tmp_path: Path) -> None:
    given = {"NOTIFY_SEAL_KEY": "a", "NOTIFY_TOKEN_KEY": "b"}
    assert obtain_keys(tmp_path, given) == given
    assert list(tmp_path.iterdir()) == []


def test_metrics_of_several_roles_become_one_page() -> None:
    text = '# HELP n_total What.\n# TYPE n_total counter\nn_total{topic="a b} c"} 1.0\n# HELP g Plain.\n# TYPE g gauge\ng 2.0\n'
    page = join({Role.INGEST: text, Role.ROUTER: text, Role.VIEWS: None})
    assert page.splitlines() == [
        "# HELP notify_role_up 1 when the role's own page answers.",
        "# TYPE notify_role_up gauge",
        'notify_role_up{role="ingest"} 1',
        'notify_role_up{role="router"} 1',
        'notify_role_up{role="views"} 0',
        "# HELP n_total What.",
        "# TYPE n_total counter",
        'n_total{role="ingest",topic="a b} c"} 1.0',
        'n_total{role="router",topic="a b} c"} 1.0',
        "# HELP g Plain.",
        "# TYPE g gauge",
        'g{role="ingest"} 2.0',
        'g{role="router"} 2.0',
    ]
