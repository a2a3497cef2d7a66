# ruff: noqa: INP001 - a program, no package
"""Prints the part of requirements.txt that a worker needs, hashes included: what the tests and tools bring stays behind.

`python runtime_requirements.py [EXTRA ...]`, beside pyproject.toml and requirements.txt. Who needs whom is in the lock's own
`# via` comments. pip checks the result: with --require-hashes it refuses to install anything that is missing here.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

PINNED = re.compile(r"^([a-z0-9][a-z0-9._-]*)==", re.ASCII)
VIA = re.compile(r"^ +#(?: via)? +([a-z0-9][a-z0-9._-]*)$", re.ASCII)


def runtime(pyproject: str, lock: str, extras: Iterable[str] = ()) -> str:
    """Return the blocks of `lock` that the project needs with `extras`. Raises KeyError for an extra that does not exist."""
    project = tomllib.loads(pyproject)["project"]
    wanted = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    needed = {re.split(r"[\[<>=!~; ]", line, maxsplit=1)[0].lower().replace("_", "-") for line in wanted}
    blocks: list[tuple[str, str]] = []
    needed_by: dict[str, set[str]] = {}
    for line in lock.splitlines(keepends=True):
        if found := PINNED.match(line):
            blocks.append((found[1], line))
        elif blocks:
            name, text = blocks[-1]
            blocks[-1] = (name, text + line)
            if found := VIA.match(line):
                needed_by.setdefault(name, set()).add(found[1])
    while more := {name for name, users in needed_by.items() if users & needed} - needed:
        needed |= more
    return "".join(text for name, text in blocks if name in needed)


if __name__ == "__main__":
    sys.stdout.write(runtime(Path("pyproject.toml").read_text("utf-8"), Path("requirements.txt").read_text("utf-8"), sys.argv[1:]))
