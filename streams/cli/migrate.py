"""`notify topics migrate`: everything that is keyed by user to another number of partitions, while no worker runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from schemas.errors import SettingsError
from streams.cli import console, kafka
from streams.cli.context import load_settings
from streams.cli.errors import CliError
from streams.migration import Kind, Migration, Part
from streams.topics import physical
from streams.transport.writer import AbortedError, FencedError

NEEDS = frozenset({"NOTIFY_KAFKA_BOOTSTRAP"})
EPILOG = console.examples("notify topics migrate --partitions 6 --dry-run", "notify topics migrate --partitions 6")
_WORDS = {
    Kind.GROW: "",
    Kind.ROWS: "{moving:,} of {records:,} rows move",
    Kind.HISTORY: "{moving:,} of {records:,} records are copied",
    Kind.WATERMARKS: "stays, and is put behind what is copied",
}


def migrate(
    *,
    partitions: Annotated[int, typer.Option(help="How many there will be, more than NOTIFY_PARTITIONS says.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: console.JsonOption = False,
) -> None:
    """Move everything that is keyed by user to more partitions. All workers have to be stopped, with nothing left to read.

    A run that was cut off is run again, and goes on. Until one has ended, no worker starts. Then set NOTIFY_PARTITIONS everywhere.
    """
    settings, _ = load_settings(os.environ, needs=NEEDS)
    work = Migration(cluster=kafka.quiet(settings.cluster), env=settings.env, old=settings.partitions, new=partitions)
    if problems := work.problems():
        raise CliError(*(f"{problem[0].upper()}{problem[1:]}." for problem in problems), "Nothing was changed.")
    with console.progress("reading what is there", None) as advance:
        count = _Sum(advance)
        parts = work.plan(count.add)
    if as_json:
        console.print_document(
            {"done": not dry_run, "from": work.old, "to": work.new, "topics": [_document(settings.env, part) for part in parts]}
        )
    else:
        console.stdout().print(_table(settings.env, parts))
    if dry_run:
        return
    if not yes and sys.stdin.isatty() and not typer.confirm(f"Move them from {work.old} to {work.new} partitions?", err=True):
        raise CliError("Nothing was changed.")
    try:
        with console.progress("moving", None) as advance:
            work.run(_Sum(advance).add)
    except (FencedError, AbortedError, SettingsError) as error:
        again = (
            f"Run `notify topics migrate --partitions {partitions}` again: it goes on where this one ended. Until then no worker starts."
        )
        raise CliError(f"The migration was cut off: {error}.", again) from error
    console.succeed(
        f"{len(parts)} topics have {work.new} partitions. Set NOTIFY_PARTITIONS={work.new} for all workers and commands, then start them."
    )


class _Sum:
    """Tells a progress bar how many there were in all."""

    def __init__(self, advance: console.Advance) -> None:
        self._advance = advance
        self._total = 0

    def add(self, count: int) -> None:
        self._total += count
        self._advance(self._total)


def _table(env: str, parts: Sequence[Part]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    table.add_column("topic", no_wrap=True)
    table.add_column("partitions", justify="right", no_wrap=True)
    table.add_column("what is in it")
    for part in parts:
        count = str(part.found) if part.found == part.wanted else f"{part.found} → {part.wanted}"
        table.add_row(physical(env, part.topic), count, _WORDS[part.kind].format(moving=part.moving, records=part.records))
    return table


def _document(env: str, part: Part) -> dict[str, object]:
    return {
        "topic": physical(env, part.topic),
        "does": part.kind,
        "found": part.found,
        "wanted": part.wanted,
        "records": part.records,
        "moving": part.moving,
    }
