"""What a command shows: data on stdout, everything about the work itself on stderr, so that pipes get nothing but data."""

from __future__ import annotations

import base64
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from typing import Annotated

import orjson
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

REFRESH_SECONDS = 0.1
NOTHING = "\N{EN DASH}"  # in place of a value that is not there
PIPE_COLUMNS = 200  # a pipe has no width; tables must not cut ids there

# told how far the work has come
Advance = Callable[[int], None]

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]


def stdout() -> Console:
    """Return the console for data."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS)


def stderr() -> Console:
    """Return the console for progress, warnings and errors."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def safe(text: object) -> str:
    """Return `text` without control characters: what others wrote must not steer the terminal."""
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in {"Cc", "Cs", "Cf"} else c for c in str(text))


def cell(text: object, style: str = "") -> Text:
    """Return `text` for a table or a line, free of control characters and of markup."""
    return Text(safe(text), style=style)


def warn(message: str) -> None:
    """Say something on stderr that does not stop the command."""
    stderr().print(Text.assemble(("! ", "bold yellow"), safe(message)))


def succeed(message: Text | str) -> None:
    """Say on stderr that something is done."""
    stderr().print(Text.assemble(("✓ ", "bold green"), message))


def fail(sentences: list[str]) -> None:
    """Say on stderr why the command stops."""
    for sentence in sentences:
        stderr().print(Text.assemble(("✗ ", "bold red"), safe(sentence)))


def print_line(value: object) -> None:
    """Print `value` as one line of NDJSON."""
    sys.stdout.write(orjson.dumps(value, default=_plain).decode() + "\n")


def print_document(value: object) -> None:
    """Print `value` as one JSON document."""
    sys.stdout.write(orjson.dumps(value, default=_plain, option=orjson.OPT_INDENT_2).decode() + "\n")


def pretty(value: object) -> str:
    """Return `value` as indented JSON for a terminal."""
    text = orjson.dumps(value, default=_plain, option=orjson.OPT_INDENT_2).decode()
    return "\n".join(safe(line) for line in text.split("\n"))


def to_json(value: object) -> object:
    """Return a message as JSON's types: fields in camelCase, times in RFC 3339, bytes in base64."""
    if is_dataclass(value) and not isinstance(value, type):
        return {_camel(f.name): to_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, datetime | bytes):
        return _plain(value)
    return value


def show_time(at: datetime) -> str:
    """Return `at` in the local zone, to the millisecond."""
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def rfc3339(at: datetime) -> str:
    """Return `at` in RFC 3339, UTC, to the millisecond."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Advance]:
    """Show a bar on stderr, when it is a terminal. Yields the function that is told how far the work has come."""
    console = stderr()
    if not console.is_terminal:
        yield lambda _: None
        return
    columns = (
        SpinnerColumn(style="cyan"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=32, complete_style="cyan", finished_style="green"),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True),
    )
    # what is printed meanwhile goes above the bar; into a pipe it goes as it is, not to where the bar is
    is_shared = sys.stdout.isatty()
    with Progress(*columns, console=console, transient=True, redirect_stdout=is_shared) as bar:
        task = bar.add_task(description, total=total)
        shown_at = time.monotonic()

        def advance(done: int) -> None:
            nonlocal shown_at
            now = time.monotonic()
            if now - shown_at >= REFRESH_SECONDS:  # an update costs more than what is counted
                shown_at = now
                bar.update(task, completed=done)

        yield advance


def examples(*lines: str) -> str:
    """Return the epilog of a command's help: what one would type."""
    shown = [f"  [cyan]{line.replace('[', chr(92) + '[')}[/cyan]" for line in lines]
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(shown)


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return rfc3339(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value)
