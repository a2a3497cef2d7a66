"""What a process imports when it starts: tests start hundreds of them, and a deployment waits for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

KEY = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
ENVIRONMENT = {
    "NOTIFY_KAFKA_BOOTSTRAP": "127.0.0.1:1",
    "NOTIFY_REGISTRY_URL": "http://127.0.0.1:1",
    "NOTIFY_SEAL_KEY": KEY,
    "NOTIFY_TOKEN_KEY": KEY,
    "NOTIFY_SMTP_URL": "smtp://127.0.0.1:1",
}
OF_A_ROLE = {"views": {"h2", "jinja2"}}
HEAVY = {
    "alembic",
    "dkim",
    "google.auth",
    "h2",
    "http_ece",
    "jinja2",
    "jwt",
    "matplotlib",
    "phonenumbers",
    "requests",
    "rich",
    "sqlalchemy",
}


def loaded(code: str, **environment: str) -> set[str]:
    """Return which of the heavy modules a new process has after `code`."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("NOTIFY_")}
    show = f"\nimport json, sys\nprint(json.dumps(sorted(set(sys.modules) & set({sorted(HEAVY)}))))"
    done = subprocess.run(
        [sys.executable, "-c", code + show], env={**ours, **environment}, capture_output=True, text=True, check=True, timeout=60
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("role", ["ingest", "views"])
def test_a_worker_starts_without_what_other_roles_need_and_collects_garbage_again(role: str) -> None:
    found = loaded("from streams.app import app\nimport gc\nassert gc.isenabled()", **ENVIRONMENT, NOTIFY_ROLE=role)
    assert found <= OF_A_ROLE.get(role, set())


def test_a_sender_of_mails_starts_without_what_other_channels_need() -> None:
    code = "from channels.config import *\nfrom channels.registry import *\nfrom tests.ports import no_ports\n"
    code += "build_channels(parse_providers('smtp://h', {}), no_ports())"
    assert loaded(code) == set()


def test_the_command_line_starts_without_what_most_commands_do_not_need() -> None:
    assert loaded("import streams.cli") <= {"rich"}
