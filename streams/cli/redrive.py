"""`notify dlq redrive`: dead letters go back to where they came from, each once."""

from __future__ import annotations

import heapq
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from streams.cli import console
from streams.cli.context import load_settings
from streams.cli.errors import EXIT_FAILURE
from streams.cli.letters import (
    DeadLetter,
    ErrorOption,
    Filter,
    IdOption,
    Place,
    ProviderOption,
    RoleOption,
    SinceOption,
    Stretch,
    TopicOption,
    UntilOption,
    filter_of,
    in_environment,
    nothing_found,
    read,
    stretch,
)
from streams.cli.redriver import TRANSACTION_BYTES, TRANSACTION_RECORDS, Marks, Plan, Planner, Redriver, Refused, Skipped, Target
from streams.cli.spans import seconds_of
from streams.cli.wire import Wire
from streams.settings import Settings

NEEDS = frozenset({"NOTIFY_KAFKA_BOOTSTRAP", "NOTIFY_REGISTRY_URL"})
SHOWN_ROWS = 50  # of a dry run's table; --json shows all
EPILOG = console.examples(
    "notify dlq redrive --error unknown_rule --dry-run",
    "notify dlq redrive --role ingest --since 2h --until 30m",
    "notify dlq redrive --id 0:41 --id 3:7 --yes",
    "notify dlq redrive --topic deliver.email.normal --extend 12h --json",
)


def redrive(  # noqa: PLR0913 - one parameter an option
    *,
    error: ErrorOption = None,
    role: RoleOption = None,
    topic: TopicOption = None,
    provider: ProviderOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    ids: IdOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many that can go back, oldest first.")] = None,
    extend: Annotated[
        str | None, typer.Option(metavar="SPAN", help="Deliveries stay useful for so long from now on: 90s, 15m, 12h, 7d …")
    ] = None,
    is_dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go where.")] = False,
    is_confirmed: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: console.JsonOption = False,
) -> None:
    """Put dead letters back where they came from, each once, as their next generation. Mend the cause first.

    What was put back before is skipped, also by a run that was killed, so the command may always be run again. The exit code is 1
    when something was refused. With --json one line each.
    """
    wanted = filter_of(error=error, role=role, topic=topic, provider=provider, since=since, until=until, ids=ids)
    extend_seconds = None if extend is None else seconds_of(extend, "--extend")
    settings, _ = load_settings(os.environ, needs=NEEDS)
    wanted = in_environment(wanted, settings)
    with Wire(settings) as wire:
        planner = Planner(settings, wire, now=datetime.now(UTC), extend_seconds=extend_seconds)
        work = _Work(
            settings=settings, planner=planner, wanted=wanted, part=stretch(settings, wanted), marks=Marks(settings), as_json=as_json
        )
        work.survey(limit)
        if is_dry_run:
            work.show_plan()
        else:
            work.confirm(is_confirmed=is_confirmed)
            work.run()
    work.report_missing()
    if work.refused:
        raise typer.Exit(EXIT_FAILURE)


@dataclass(slots=True, kw_only=True)
class _Work:
    """One redrive: looked at as a whole first, then done a transaction at a time."""

    settings: Settings
    planner: Planner
    wanted: Filter
    part: Stretch
    marks: Marks
    as_json: bool
    refused: int = 0
    _missing: set[Place] = field(init=False)
    _survey: Counter[str] = field(default_factory=Counter)
    _chosen: frozenset[Place] | None = None  # None: all

    def __post_init__(self) -> None:
        self._missing = set(self.wanted.places)

    def survey(self, limit: int | None) -> None:
        """Look at everything once: what there is, and with a limit which can go back and are the oldest. Holds `limit` places."""
        self.marks.read()
        oldest: list[tuple[float, int, int]] = []  # a heap of negated numbers, so that its first is the newest
        for letter in self._letters("looking"):
            self._missing.discard(letter.place)
            plan = self.planner.plan(letter, self.marks)
            if limit is not None and isinstance(plan, Target):
                item = (-letter.at.timestamp(), -letter.partition, -letter.offset)
                (heapq.heappush if len(oldest) < limit else heapq.heappushpop)(oldest, item)
            self._survey[_kind(plan)] += 1
        if limit is not None:
            self._chosen = frozenset((-partition, -offset) for _, partition, offset in oldest)

    def show_plan(self) -> None:
        """Show what would go where."""
        table = _result_table()
        shown = total = 0
        for letter in self._letters("planning"):
            plan = self.planner.plan(letter, self.marks)
            total += 1
            self.refused += isinstance(plan, Refused)
            if self.as_json:
                console.print_line(_line(letter, plan, "would_redrive"))
            elif shown < SHOWN_ROWS:
                shown += 1
                table.add_row(*_cells(letter, plan))
        if self.as_json:
            return
        if not total:
            console.succeed(nothing_found(self.wanted))
            return
        console.stdout().print(table)
        console.stderr().print(Text(f"{shown} of {total} shown; nothing was put back", style="dim"))

    def confirm(self, *, is_confirmed: bool) -> None:
        """Ask whoever sits at the terminal. Raises Abort when he does not want it."""
        ready = self._survey["redriven"] if self._chosen is None else min(self._survey["redriven"], len(self._chosen))
        if ready == 0 or is_confirmed or not sys.stdin.isatty():
            return
        others = [
            f"{self._survey[kind]:,} {text}"
            for kind, text in (("skipped", "already put back"), ("refused", "that cannot be put back"))
            if self._survey[kind]
        ]
        besides = f" (besides {' and '.join(others)})" if others else ""
        typer.confirm(f"Put {ready:,} dead letter{'' if ready == 1 else 's'} back{besides}?", abort=True, err=True)

    def run(self) -> None:
        """Put them back, and say of each what became of it as soon as that is certain."""
        if not self._survey:
            if not self.as_json:
                console.succeed(nothing_found(self.wanted))
            return
        counts: Counter[str] = Counter()
        redriver = Redriver(self.settings, self.marks)
        for batch in self._batches():
            redriver.publish([(letter, plan) for letter, plan in batch if isinstance(plan, Target)])
            for letter, plan in batch:
                counts[_kind(plan)] += 1
                if self.as_json:
                    console.print_line(_line(letter, plan, "redriven"))
                else:
                    console.stdout().print(_sentence(letter, plan))
        self.refused = counts["refused"]
        if not self.as_json:
            console.succeed(", ".join(f"{counts[kind]:,} {kind}" for kind in ("redriven", "skipped", "refused")))

    def _batches(self) -> Iterator[list[tuple[DeadLetter, Plan]]]:
        """Yield what there is to do, as much at a time as goes into one transaction."""
        batch: list[tuple[DeadLetter, Plan]] = []
        held_bytes = 0
        for letter in self._letters("redriving"):
            batch.append((letter, self.planner.plan(letter, self.marks)))
            held_bytes += len(letter.value or b"")
            if len(batch) >= TRANSACTION_RECORDS or held_bytes >= TRANSACTION_BYTES:
                yield batch
                batch, held_bytes = [], 0
        if batch:
            yield batch

    def report_missing(self) -> None:
        """Refuse what was named by its id and is not there."""
        for partition, offset in sorted(self._missing):
            self.refused += 1
            reason = "there is no such dead letter, or another filter leaves it out"
            if self.as_json:
                console.print_line({"id": f"{partition}:{offset}", "outcome": "refused", "reason": reason})
            else:
                console.fail([f"{partition}:{offset} refused: {reason}"])

    def _letters(self, title: str) -> Iterator[DeadLetter]:
        for letter in read(self.settings, self.part, self.wanted, title=title):
            if self._chosen is None or letter.place in self._chosen:
                yield letter


def _kind(plan: Plan) -> str:
    match plan:
        case Target():
            return "redriven"
        case Skipped():
            return "skipped"
        case Refused():
            return "refused"


def _line(letter: DeadLetter, plan: Plan, done: str) -> Mapping[str, object]:
    """Return what --json prints of a plan; `done` is the word for what goes back."""
    head = {"id": letter.id, "readAt": letter.origin, "error": letter.headers.get("error")}
    match plan:
        case Target():
            where = {"to": plan.topic, "partition": plan.partition, "generation": plan.generation, "note": plan.note}
            return {**head, "outcome": done, **where}
        case Skipped(generation=generation):
            return {**head, "outcome": "skipped", "generation": generation, "reason": "already redriven"}
        case Refused(reason=reason):
            return {**head, "outcome": "refused", "reason": reason}


def _sentence(letter: DeadLetter, plan: Plan) -> Text:
    identity = f"{letter.id:<10}"
    match plan:
        case Target():
            done = f"redriven to {plan.topic}[{plan.partition}] as generation {plan.generation}"
            note = f"  {plan.note}" if plan.note else ""
            return Text.assemble(("✓ ", "green"), (identity, "bold"), done, console.cell(note, "yellow"))
        case Skipped(generation=generation):
            return Text.assemble(("- ", "dim"), (identity, "bold"), (f"skipped: already redriven as generation {generation}", "dim"))
        case Refused(reason=reason):
            return Text.assemble(("✗ ", "red"), (identity, "bold"), ("refused: ", "red"), console.cell(reason))


def _result_table() -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for name in ("id", "read at", "error", "to", "generation"):
        table.add_column(name, no_wrap=True)
    table.add_column("note", overflow="fold", min_width=24)
    return table


def _cells(letter: DeadLetter, plan: Plan) -> list[Text]:
    head = [
        Text(letter.id, style="bold"),
        console.cell(letter.origin, "dim"),
        console.cell(letter.headers.get("error", "?"), "red"),
    ]
    match plan:
        case Target():
            return [
                *head,
                console.cell(f"{plan.topic}[{plan.partition}]"),
                Text(str(plan.generation)),
                console.cell(plan.note or "", "yellow"),
            ]
        case Skipped(generation=generation):
            return [*head, Text(console.NOTHING), Text(str(generation), "dim"), Text("already redriven", "dim")]
        case Refused(reason=reason):
            return [*head, Text(console.NOTHING), Text(console.NOTHING), Text.assemble(("refused: ", "red"), console.cell(reason))]
