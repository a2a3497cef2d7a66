"""NDJSON from a file or a pipe: a bad line is reported by its number, and the rest goes on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import orjson

from streams.cli import console
from streams.cli.errors import CliError

SHOWN_BAD_LINES = 50  # a file of the wrong kind must not scroll everything else away
KEPT_BAD_LINES = 1_000
_BOM = b"\xef\xbb\xbf"


class Lines:
    """The objects in an NDJSON file (`-`: stdin) with their line numbers, from 1. Empty lines are passed over."""

    def __init__(self, source: str) -> None:
        self.bad_lines = 0
        self.problems: list[tuple[int, str]] = []
        self.read_bytes = 0
        self._source = source
        if source == "-":
            self._file: IO[bytes] = sys.stdin.buffer
            self.total_bytes: int | None = None
            return
        try:
            self._file = Path(source).open("rb")  # noqa: SIM115 - closed by __exit__
            self.total_bytes = os.fstat(self._file.fileno()).st_size or None
        except OSError as error:
            raise CliError(f"{source} cannot be read: {error.strerror}.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._source != "-":
            self._file.close()

    def objects(self, progress: Callable[[int], None]) -> Iterator[tuple[int, dict[str, object]]]:
        """Yield (line number, object); a line that is no JSON object is rejected."""
        for number, line in enumerate(self._file, 1):
            self.read_bytes += len(line)
            progress(self.read_bytes)
            text = (line.removeprefix(_BOM) if number == 1 else line).strip()
            if not text:
                continue
            try:
                value = orjson.loads(text)
            except orjson.JSONDecodeError as error:
                self.reject(number, f"is no JSON: {error.msg} (column {error.colno})")
                continue
            if isinstance(value, dict):
                yield number, value
            else:
                self.reject(number, "is no JSON object")

    def reject(self, number: int, problem: str) -> None:
        """Report a bad line on stderr and remember it."""
        self.bad_lines += 1
        if self.bad_lines <= KEPT_BAD_LINES:
            self.problems.append((number, problem))
        if self.bad_lines <= SHOWN_BAD_LINES:
            console.fail([f"line {number}: {problem}"])
        elif self.bad_lines == SHOWN_BAD_LINES + 1:
            console.fail(["… and more; --json lists up to a thousand"])

    def problems_as_json(self) -> list[dict[str, object]]:
        """Return the bad lines for a JSON summary."""
        return [{"line": number, "problem": problem} for number, problem in sorted(self.problems)]
