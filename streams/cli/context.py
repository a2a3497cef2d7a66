"""How a command finds the system: by NOTIFY_* variables, or else by the file that a running `notify up` leaves.

The file holds keys, so it lives in a folder that only its user can enter: `$XDG_RUNTIME_DIR/flowmart-notify`, or
`flowmart-notify-<uid>` in the folder for temporary files. Whatever another user could have written is refused.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from schemas.errors import SettingsError
from streams.cli.errors import EXIT_SETTINGS, CliError
from streams.settings import CLIENT_NEEDS, Settings

FILE_NAME = "up.json"
PREFIX = "NOTIFY_"
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - to connect to, not to listen on


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A `notify up` that said where it is. `process_birth` tells its pid from a later process with the same number."""

    path: Path
    variables: Mapping[str, str]
    web_url: str
    pid: int
    process_birth: str | None
    started_at: datetime

    @property
    def is_stale(self) -> bool:
        """Say whether the process that wrote the file has ended."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return _birth(self.pid) != self.process_birth


def write_running(variables: Mapping[str, str], web_url: str, *, environ: Mapping[str, str] = os.environ) -> Path:
    """Leave the file by which other commands of this user find this process; return its path.

    `variables`: the NOTIFY_* variables that describe the system. Raises CliError when the folder is not private.
    """
    folder = _folders(environ)[0]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_private(folder, is_folder=True)
    content = {
        "env": {name: value for name, value in variables.items() if name.startswith(PREFIX)},
        "webUrl": web_url,
        "pid": os.getpid(),
        "processBirth": _birth(os.getpid()),
        "startedAt": datetime.now(UTC).isoformat(),
    }
    path = folder / FILE_NAME
    temporary = folder / f".{FILE_NAME}.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(orjson.dumps(content, option=orjson.OPT_INDENT_2))
    temporary.replace(path)
    return path


def remove_running(*, environ: Mapping[str, str] = os.environ) -> None:
    """Remove this process's file; a file that another process has written since stays."""
    for folder in _folders(environ):
        with contextlib.suppress(CliError, OSError):
            running = _read(folder / FILE_NAME)
            if running is not None and running.pid == os.getpid():
                running.path.unlink()


def find_running(environ: Mapping[str, str]) -> Running | None:
    """Return the running `notify up`, else a stale one, else None. Raises CliError for a file that cannot be trusted."""
    found = [running for folder in _folders(environ) if (running := _read(folder / FILE_NAME)) is not None]
    return next((running for running in found if not running.is_stale), found[0] if found else None)


def load_settings(environ: Mapping[str, str], *, needs: frozenset[str] = CLIENT_NEEDS) -> tuple[Settings, str]:
    """Return the settings that a command works with, and the URL of the web.

    Variables of the environment win. When it names none of `CLIENT_NEEDS`, a running `notify up` fills the gaps; when it
    names any, it means another system, and the two are never mixed: personal data must not be sealed with the wrong key.
    Raises SettingsError with every problem at once.
    """
    own = {name: value for name, value in environ.items() if name.startswith(PREFIX) and value.strip()}
    # what `$NAME` in the URL of a provider or the secret of a subscriber stands for
    others = {name: value for name, value in environ.items() if not name.startswith(PREFIX)}
    if needs <= own.keys() or own.keys() & CLIENT_NEEDS:
        settings = Settings.from_env({**others, **own}, needs=needs)
        return settings, _web_url(settings)
    running = find_running(environ)
    if running is None:
        raise _not_found(own, needs, "No `notify up` is running: start it, or set the variables.")
    if running.is_stale:
        since = running.started_at.astimezone().strftime("%Y-%m-%d %H:%M")
        raise _not_found(
            own,
            needs,
            f"{running.path} is left from the `notify up` of {since}, whose process {running.pid} has ended: "
            "start `notify up` again, or set the variables.",
        )
    settings = Settings.from_env({**others, **running.variables, **own}, needs=needs)
    is_moved = bool(own.keys() & {"NOTIFY_WEB_HOST", "NOTIFY_WEB_PORT"})
    return settings, _web_url(settings) if is_moved else running.web_url


def _not_found(own: Mapping[str, str], needs: frozenset[str], hint: str) -> SettingsError:
    try:
        Settings.from_env(own, needs=needs)
    except SettingsError as error:
        return SettingsError([hint, *error.problems])
    return SettingsError([hint])


def _web_url(settings: Settings) -> str:
    host = _ANYWHERE.get(settings.web_host, settings.web_host)
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.web_port}"


def _folders(environ: Mapping[str, str]) -> list[Path]:
    folders = [Path(environ.get("TMPDIR") or tempfile.gettempdir()) / f"flowmart-notify-{os.getuid()}"]
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    with contextlib.suppress(OSError):
        if runtime and Path(runtime).stat().st_uid == os.getuid():  # `su` and `sudo -E` keep the other user's
            folders.insert(0, Path(runtime) / "flowmart-notify")
    return folders


def _require_private(path: Path, *, is_folder: bool) -> None:
    facts = path.lstat()
    is_right_kind = stat.S_ISDIR(facts.st_mode) if is_folder else stat.S_ISREG(facts.st_mode)
    if not is_right_kind or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        wanted = "folder of yours with mode 0700" if is_folder else "file of yours with mode 0600"
        raise CliError(
            f"{path} is not a {wanted}, so another user could have written it, and it is not trusted. "
            "Look who made it, remove it, and start `notify up` again.",
            exit_code=EXIT_SETTINGS,
        )


def _read(path: Path) -> Running | None:
    if not path.parent.is_symlink() and not path.exists():
        return None
    _require_private(path.parent, is_folder=True)
    _require_private(path, is_folder=False)
    try:
        content: dict[str, Any] = orjson.loads(path.read_bytes())
        return Running(
            path=path,
            variables={str(name): str(value) for name, value in content["env"].items()},
            web_url=str(content["webUrl"]).rstrip("/"),
            pid=int(content["pid"]),
            process_birth=content["processBirth"],
            started_at=datetime.fromisoformat(content["startedAt"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CliError(f"{path} is damaged. Remove it, and start `notify up` again.", exit_code=EXIT_SETTINGS) from error


def _birth(pid: int) -> str | None:
    # clock ticks from boot to the start of the process (proc(5), field 22); other systems than Linux do not say
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
