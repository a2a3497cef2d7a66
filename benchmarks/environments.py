"""The peers' virtual environments: made once in the cache folder, from hashed locks, and told apart by their locks' hash."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.laboratory import BenchmarkError
from streams.embedded.artifacts import default_cache_dir

_FOLDER = Path(__file__).parent / "peers"
_INSTALL_SECONDS = 900.0
_STAMP = ".complete"


def python_of(lock: str, say: Callable[[str], None]) -> Path:
    """Return the interpreter of the environment that `requirements-<lock>.txt` describes, which is made when missing.

    Raises BenchmarkError when a package cannot be had.
    """
    requirements = _FOLDER / f"requirements-{lock}.txt"
    identity = hashlib.sha256(requirements.read_bytes()).hexdigest()[:8]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = default_cache_dir(os.environ) / "benchmarks" / f"{lock}-{identity}-python{version}"
    python = folder / "bin" / "python"
    if (folder / _STAMP).exists():
        return python
    say(f"installing {lock} into {folder.parent.name}/{folder.name}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    _run([str(python), "-m", "pip", "install", "--quiet", "--require-hashes", "--requirement", str(requirements)])
    (folder / _STAMP).touch()
    return python


def versions(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of `packages` in an environment."""
    program = "import sys, importlib.metadata as m; print(*[m.version(p) for p in sys.argv[1:]])"
    found = subprocess.run([str(python), "-c", program, *packages], capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(packages, found, strict=True))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_SECONDS, check=False)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command[:4])} failed:\n{done.stderr[-2000:]}")
