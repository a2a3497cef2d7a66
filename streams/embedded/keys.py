"""The two keys of a laptop's system, made once and kept in its data folder, where nobody else may read.

Without the same seal key the next run could read nothing that this one stored.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from secrets import token_bytes
from typing import Final

from streams.embedded.processes import StackError

FILE_NAME: Final = "keys.json"
KEY_BYTES: Final = 32
NAMES: Final = ("NOTIFY_SEAL_KEY", "NOTIFY_TOKEN_KEY")


def obtain_keys(data_dir: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Return NOTIFY_SEAL_KEY and NOTIFY_TOKEN_KEY: those of `environ`, else those in `data_dir`, made the first time.

    Raises StackError when the file is damaged or others may read it.
    """
    path = data_dir / FILE_NAME
    stored = _read(path)
    missing = [name for name in NAMES if name not in stored]
    given = {name: environ[name] for name in NAMES if environ.get(name, "").strip()}
    if missing and given.keys() < set(NAMES):
        stored |= {name: base64.b64encode(token_bytes(KEY_BYTES)).decode() for name in missing}
        _write(path, stored)
    return {name: given.get(name) or stored[name] for name in NAMES}


def _read(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_mode & 0o077:
            raise StackError(f"{path} holds keys, and others may read it. Make it yours alone: chmod 600 {path}")
        found = json.loads(path.read_text(encoding="ascii"))
        return {name: str(found[name]) for name in NAMES}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise StackError(
            f"{path} is damaged. Restore it, or use another data folder: what was sealed cannot be read without it."
        ) from error


def _write(path: Path, keys: Mapping[str, str]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w", encoding="ascii") as file:
        json.dump(keys, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
