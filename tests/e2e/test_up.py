"""`notify up` as a user runs it: real processes, real ports, real signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from streams.embedded.processes import choose_port
from tests.harness import wait_for

ROOT = Path(__file__).parents[2]
NOTIFY = [sys.executable, "-P", "-c", "from streams.cli import main; main()"]
START_SECONDS = 120
STOP_SECONDS = 10
SAMPLES, SAMPLES_NOTIFIED = 12, 9
PAYMENT_MAILS = 3


@dataclass
class Running:
    """A `notify up` in the background."""

    process: subprocess.Popen[bytes]
    output: Path
    ready_file: Path
    environment: Mapping[str, str]

    @property
    def ready(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ready_file.read_text())
        return found

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def children(self) -> list[psutil.Process]:
        found: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return found

    def wait_for_line(self, text: str, *, seconds: float = START_SECONDS) -> None:
        wait_for(lambda: text in self.text() or self.process.poll() is not None, seconds=seconds, what=text)
        assert text in self.text(), self.text()

    def stop(self, number: signal.Signals) -> float:
        began = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(3 * STOP_SECONDS)
        return time.monotonic() - began


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    runtime = tmp_path_factory.mktemp("runtime")
    runtime.chmod(0o700)
    # what says how the network is reached has to stay: the first run downloads
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NOTIFY_") or name == "NOTIFY_CACHE_DIR"}
    return {**kept, "PYTHONPATH": str(ROOT), "XDG_RUNTIME_DIR": str(runtime), "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("up") / "data"


@pytest.fixture(scope="module")
def first_run(environment: dict[str, str], data_dir: Path) -> subprocess.CompletedProcess[str]:
    return notify(environment, "up", "--once", "--free-ports", "--data-dir", str(data_dir), seconds=START_SECONDS)


@pytest.fixture(scope="module")
def second_run(first_run: subprocess.CompletedProcess[str], environment: dict[str, str], data_dir: Path) -> Iterator[Running]:
    """Return a running system on the data of the first run, its samples played."""
    assert first_run.returncode == 0, first_run.stdout + first_run.stderr
    with running(environment, data_dir, "--free-ports") as found:
        found.wait_for_line("Ctrl-C stops everything")
        yield found


def test_once_plays_the_samples_and_prints_every_trail(first_run: subprocess.CompletedProcess[str]) -> None:
    assert first_run.returncode == 0, first_run.stdout + first_run.stderr
    out = first_run.stdout
    assert f"All {SAMPLES} samples ended as they should: {SAMPLES_NOTIFIED} notified, 2 without a rule, 1 in dead" in out
    assert "dead: unroutable" in out
    assert out.count("decision  notified") == SAMPLES_NOTIFIED
    assert out.count("decision  no_rule_matched") == 2
    assert out.count("decision  broadcast") == 3
    assert out.count("✓ in_app delivered") == SAMPLES_NOTIFIED - 1  # who resets a password cannot see his inbox
    assert out.count("✓ email sent") == SAMPLES_NOTIFIED - 1  # a pending payment is not worth a mail
    # a password reset, a failed payment, and what ran out of stock; five devices in all
    assert sum(out.count(f"✓ sms {status}  chosen") for status in ("sent", "delivered")) == 3
    assert out.count("✓ push sent") == 5
    assert "Traceback" not in out + first_run.stderr


def test_a_second_run_resumes_and_shows_new_notifications(second_run: Running) -> None:
    assert f"All {SAMPLES} samples ended as they should" in second_run.text()
    assert " created" not in second_run.text()  # its topics were there
    mails = get(second_run.ready["mail"]["http"] + "/api/messages")
    assert len([mail for mail in mails if "payment" in mail["subject"].lower()]) == 2 * PAYMENT_MAILS
    inbox = get(second_run.ready["web"] + "/users/cust_10482/notifications", token=second_run.ready["token"])
    assert len([each for each in inbox["notifications"] if each["title"] == "Payment received"]) == 2


def test_the_ready_file_says_where_everything_is(second_run: Running) -> None:
    ready = second_run.ready
    assert stat.S_IMODE(second_run.ready_file.stat().st_mode) == 0o600
    host, port = ready["kafka"].split(":")
    socket.create_connection((host, int(port)), timeout=5).close()
    assert ready["mail"]["smtp"].startswith("smtp://127.0.0.1:")
    assert any(subject.startswith("notify.dev.") for subject in get(ready["registry"] + "/subjects"))
    with urllib.request.urlopen(ready["metrics"], timeout=5) as answer:
        metrics = answer.read().decode()
    assert 'notify_decisions_total{role="router",outcome="notified"}' in metrics
    assert metrics.count("# TYPE notify_records_total ") == 1
    assert "notify_role_up{" in metrics
    assert " 0\n" not in metrics.split("# HELP notify_records_total")[0]  # no role is missing


def test_other_commands_find_it_without_any_settings(second_run: Running) -> None:
    folder = Path(second_run.environment["XDG_RUNTIME_DIR"]) / "flowmart-notify"
    assert stat.S_IMODE((folder / "up.json").stat().st_mode) == 0o600
    found = notify(second_run.environment, "user", "cust_10482", "--json")
    assert found.returncode == 0, found.stderr
    notification = json.loads(found.stdout)["notifications"][0]["notificationId"]
    shown = notify(second_run.environment, "trail", notification)
    assert shown.returncode == 0, shown.stderr
    assert "✓ in_app delivered" in shown.stdout


def test_what_is_sent_meanwhile_is_printed_too(second_run: Running) -> None:
    sent = notify(second_run.environment, "send", "--user", "cust_10482", "--title", "Hi", "--message", "there")
    assert sent.returncode == 0, sent.stderr
    second_run.wait_for_line(f"notification {sent.stdout.strip()}", seconds=30)


def test_a_data_folder_in_use_is_named_with_its_process(second_run: Running, data_dir: Path) -> None:
    found = notify(second_run.environment, "up", "--free-ports", "--data-dir", str(data_dir))
    assert found.returncode == 1
    assert f"pid {second_run.process.pid}" in found.stderr
    assert str(data_dir) in found.stderr
    assert "Traceback" not in found.stdout + found.stderr
    assert second_run.ready_file.exists()


def test_a_killed_worker_is_started_again_visibly(second_run: Running, data_dir: Path) -> None:
    pid = int((data_dir / "workers" / "critical.pid").read_text().split()[0])
    os.kill(pid, signal.SIGKILL)
    second_run.wait_for_line("critical died (SIGKILL); starting it again in 0.5 s", seconds=10)
    second_run.wait_for_line("critical is back after", seconds=60)
    assert int((data_dir / "workers" / "critical.pid").read_text().split()[0]) != pid


def test_ctrl_c_stops_everything_and_leaves_nothing_behind(environment: dict[str, str], tmp_path: Path) -> None:
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    with running({**environment, "XDG_RUNTIME_DIR": str(runtime)}, tmp_path / "data", "--no-demo", "--free-ports") as found:
        wait_for(lambda: found.ready_file.exists() or found.process.poll() is not None, seconds=START_SECONDS, what="ready")
        children = found.children()
        names = {" ".join(child.cmdline()) for child in children}
        assert {"mail", "worker"} <= {part for name in names for part in ("mail", "worker") if f"streams.embedded.{part}" in name}
        assert found.stop(signal.SIGINT) < STOP_SECONDS
        assert found.process.returncode == 0, found.text()
        assert [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []
        assert "Traceback" not in found.text()
        assert not found.ready_file.exists()
        assert not (runtime / "flowmart-notify" / "up.json").exists()
        assert stat.S_IMODE((tmp_path / "data" / "keys.json").stat().st_mode) == 0o600


def test_a_second_ctrl_c_kills_at_once(environment: dict[str, str], tmp_path: Path) -> None:
    with running(environment, tmp_path / "data", "--no-demo", "--free-ports") as found:
        found.wait_for_line("schemas", seconds=START_SECONDS)
        children = found.children()
        assert children
        found.process.send_signal(signal.SIGINT)
        assert found.stop(signal.SIGTERM) < STOP_SECONDS
        assert found.process.returncode != 0
        wait_for(lambda: not any(child.is_running() for child in children), seconds=STOP_SECONDS, what="all children ended")
        assert "Traceback" not in found.text()


def test_a_port_in_use_is_named_with_its_process(environment: dict[str, str], tmp_path: Path) -> None:
    base = choose_port()
    with socket.create_server(("127.0.0.1", base)):
        found = notify(environment, "up", "--port-base", str(base), "--data-dir", str(tmp_path / "data"))
    assert found.returncode == 1
    assert f"port {base} is in use by pid {os.getpid()}" in found.stderr.lower()
    assert "Traceback" not in found.stdout + found.stderr


def test_a_misspelled_setting_stops_it_before_anything_starts(environment: dict[str, str], tmp_path: Path) -> None:
    found = notify({**environment, "NOTIFY_PARTITION": "8"}, "up", "--data-dir", str(tmp_path / "data"))
    assert found.returncode == 2
    assert "NOTIFY_PARTITION is not a setting" in found.stderr
    assert not (tmp_path / "data").exists()


@contextmanager
def running(environment: Mapping[str, str], data_dir: Path, *options: str) -> Iterator[Running]:
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    output, ready_file = data_dir.parent / "output.txt", data_dir.parent / "ready.json"
    command = [*NOTIFY, "up", "--data-dir", str(data_dir), "--ready-file", str(ready_file), *options]
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment, cwd=data_dir.parent, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    found = Running(process, output, ready_file, environment)
    try:
        yield found
    finally:
        if process.poll() is None:
            found.stop(signal.SIGTERM)


def notify(environment: Mapping[str, str], *arguments: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    command: Sequence[str] = [*NOTIFY, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False, stdin=subprocess.DEVNULL)


def get(url: str, *, token: str | None = None) -> Any:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read())
