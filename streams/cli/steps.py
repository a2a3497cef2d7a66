"""What a long start is doing: one row a step with a spinner, a tick and its seconds; plain lines where there is no terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Final, Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from streams.cli import console as output

PLAIN_SECONDS: Final = 2.0  # between two lines about the same step that only say how far it is
REFRESH_PER_SECOND: Final = 12


class _State(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(slots=True)
class _Step:
    name: str
    state: _State = _State.PENDING
    text: str = ""
    began_at: float = 0.0
    ended_at: float = 0.0
    said_at: float = 0.0


class Steps:
    """The steps called `names`, in this order. Methods may be called from any thread."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self._console = console
        self._steps = {name: _Step(name) for name in names}
        self._width = max(len(name) for name in names)
        self._spinner = Spinner("dots", style="cyan")
        self._lock = threading.Lock()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        """Show the rows from now on."""
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._table,
                console=self._console,
                refresh_per_second=REFRESH_PER_SECOND,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the rows as they are; what still ran when an error came has failed."""
        if error is not None:
            for step in list(self._steps.values()):
                if step.state is _State.RUNNING:
                    self._end(step.name, step.text, _State.FAILED)
        if self._live is not None:
            self._live.stop()

    def begin(self, name: str, text: str = "") -> None:
        """Begin a step, or say how far it is."""
        with self._lock:
            step, now = self._steps[name], time.monotonic()
            is_new = step.state is _State.PENDING
            if is_new:
                step.state, step.began_at = _State.RUNNING, now
            if step.state is not _State.RUNNING:
                return
            step.text = text
            is_due = is_new or now - step.said_at > PLAIN_SECONDS
            if self._live is None and is_due and text:
                step.said_at = now
                self._console.print(f"  … {name:<{self._width}}  {output.safe(text)}", soft_wrap=True, markup=False)

    def end(self, name: str, text: str) -> None:
        """Tick a step off."""
        self._end(name, text, _State.DONE)

    def _end(self, name: str, text: str, state: _State) -> None:
        with self._lock:
            step = self._steps[name]
            if step.state is _State.PENDING:
                step.began_at = time.monotonic()
            step.state, step.text, step.ended_at = state, text, time.monotonic()
            if self._live is None:
                line = Text.assemble("  ", _mark(state), " ", f"{name:<{self._width}}  ", output.safe(text), f"  ({_seconds(step)})")
                self._console.print(line, soft_wrap=True)

    def _table(self) -> RenderableType:
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(width=3, justify="right")
        table.add_column(width=self._width + 1)
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        table.add_column(justify="right", width=8)
        for step in self._steps.values():
            mark: RenderableType = self._spinner if step.state is _State.RUNNING else _mark(step.state)
            is_pending = step.state is _State.PENDING
            table.add_row(
                mark,
                Text(step.name, style="dim" if is_pending else "bold"),
                Text(output.safe(step.text), style="" if step.state is _State.DONE else "cyan"),
                Text("" if is_pending else _seconds(step), style="dim"),
            )
        return table


def _mark(state: _State) -> Text:
    return {
        _State.PENDING: Text("·", style="dim"),
        _State.RUNNING: Text("…", style="cyan"),
        _State.DONE: Text("✓", style="bold green"),
        _State.FAILED: Text("✗", style="bold red"),
    }[state]


def _seconds(step: _Step) -> str:
    return f"{(step.ended_at or time.monotonic()) - step.began_at:.1f} s"
