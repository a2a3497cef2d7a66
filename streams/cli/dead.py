"""`notify dlq`: what could not be handled, why, its bytes as they came, and the way back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from schemas.errors import NotifyError
from streams.cli import console, redrive
from streams.cli.context import load_settings
from streams.cli.letters import (
    DeadLetter,
    ErrorOption,
    IdOption,
    ProviderOption,
    RoleOption,
    SinceOption,
    TopicOption,
    UntilOption,
    filter_of,
    find,
    find_one,
    in_environment,
    nothing_found,
    place_of,
)
from streams.cli.redriver import Marks
from streams.cli.wire import Wire
from streams.settings import Settings

NEEDS = frozenset({"NOTIFY_KAFKA_BOOTSTRAP"})
REGISTRY_NEEDS = NEEDS | {"NOTIFY_REGISTRY_URL"}
ROW_BYTES = 16
SHOWN_BYTES = 1_024

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", help="Look at the dead letters: what could not be handled, and why. Put them back."
)


@app.command(
    "list",
    epilog=console.examples(
        "notify dlq list",
        "notify dlq list --since 2h --error undecodable",
        "notify dlq list --topic payments --since 2026-11-23T08:00:00Z --until 1h",
        "notify dlq list --role ingest --limit 500 --json",
    ),
)
def list_(  # noqa: PLR0913 - one parameter an option
    *,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 20,
    error: ErrorOption = None,
    role: RoleOption = None,
    topic: TopicOption = None,
    provider: ProviderOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    ids: IdOption = None,
    as_json: console.JsonOption = False,
) -> None:
    """List the newest dead letters, and which of them were put back. With --json one line each."""
    wanted = filter_of(error=error, role=role, topic=topic, provider=provider, since=since, until=until, ids=ids)
    settings, _ = load_settings(os.environ, needs=NEEDS)
    wanted = in_environment(wanted, settings)
    found, total = find(settings, wanted, limit=limit)
    marks = Marks(settings)
    marks.read()
    if as_json:
        for letter in found:
            console.print_line({**letter.to_json(), "redriven": marks.generation(letter)})
        return
    if not found:
        console.succeed(nothing_found(wanted))
        return
    console.stdout().print(_table(found, marks))
    console.stderr().print(Text(f"{len(found)} of {total}; see one with `notify dlq show {found[0].id}`", style="dim"))


@app.command("show", epilog=console.examples("notify dlq show 0:41", "notify dlq show 0:41 --all-bytes", "notify dlq show 0:41 --json"))
def show(
    place: Annotated[str, typer.Argument(metavar="PARTITION:OFFSET", help="As `notify dlq list` shows it.")],
    *,
    all_bytes: Annotated[bool, typer.Option("--all-bytes", help=f"Show all bytes, not the first {SHOWN_BYTES}.")] = False,
    as_json: console.JsonOption = False,
) -> None:
    """Show a dead letter: headers, the record if it can be decoded, and the bytes as they came."""
    found = place_of(place, "PARTITION:OFFSET")
    settings, _ = load_settings(os.environ, needs=REGISTRY_NEEDS)
    letter = find_one(settings, found)
    decoded, problem = _decode(settings, letter)
    if as_json:
        document = {**letter.to_json(), "key": letter.key, "value": letter.value, "decoded": decoded, "undecodable": problem}
        console.print_document(document)
        return
    _print(letter, decoded, problem, SHOWN_BYTES if not all_bytes else None)


app.command("redrive", epilog=redrive.EPILOG)(redrive.redrive)


def hexdump(raw: bytes) -> list[str]:
    """Return `raw` as lines of offset, 16 bytes and their ASCII."""
    lines: list[str] = []
    for start in range(0, len(raw), ROW_BYTES):
        row = raw[start : start + ROW_BYTES]
        halves = (row[:8].hex(" "), row[8:].hex(" "))
        text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in row)
        lines.append(f"{start:08x}  {halves[0]:<23}  {halves[1]:<23}  {text}")
    return lines


def _decode(settings: Settings, letter: DeadLetter) -> tuple[Mapping[str, object] | None, str | None]:
    with Wire(settings) as wire:
        try:
            return wire.decode_any(letter.value), None
        except NotifyError as error:
            return None, str(error)


def _table(letters: list[DeadLetter], marks: Marks) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for name in ("id", "set aside", "error", "role", "read at", "redriven"):
        table.add_column(name, no_wrap=True)
    table.add_column("message", overflow="fold", min_width=24)
    for letter in letters:
        table.add_row(
            Text(letter.id, style="bold"),
            letter.at.astimezone().strftime("%Y-%m-%d %H:%M:%S"),
            console.cell(letter.headers.get("error", "?"), "red"),
            console.cell(letter.headers.get("role", "?")),
            console.cell(letter.origin, "dim"),
            Text("" if (generation := marks.generation(letter)) is None else f"as generation {generation}", style="green"),
            console.cell(letter.headers.get("message", "")),
        )
    return table


def _print(letter: DeadLetter, decoded: Mapping[str, object] | None, problem: str | None, limit_bytes: int | None) -> None:
    out = console.stdout()
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    table.add_row("dead letter", Text(letter.id, style="bold"))
    table.add_row("set aside", console.show_time(letter.at))
    table.add_row("key", console.cell("none" if letter.key is None else letter.key.decode(errors="backslashreplace")))
    for name, value in letter.headers.items():
        is_moment = name == "timestamp" and value.isascii() and value.isdigit() and len(value) < 15  # anybody may write such a header
        shown = console.show_time(datetime.fromtimestamp(int(value) / 1000, UTC)) if is_moment else value
        table.add_row(console.safe(name), console.cell(shown, "red" if name == "error" else ""))
    out.print(table)
    out.print()
    if decoded is not None:
        out.print(Text("record", style="bold cyan"))
        out.print(Text(console.pretty(decoded)))
    else:
        out.print(Text.assemble(("record ", "bold cyan"), ("cannot be decoded: ", "yellow"), console.cell(problem)))
    out.print()
    raw = letter.value or b""
    head = raw if limit_bytes is None else raw[:limit_bytes]
    out.print(Text.assemble(("bytes ", "bold cyan"), (f"{len(raw):,}", "dim")))
    for row in hexdump(head):
        out.print(Text.assemble((row[:10], "dim"), row[10:60], (row[60:], "cyan")))
    if len(head) < len(raw):
        out.print(Text(f"… {len(raw) - len(head):,} more: --all-bytes", style="dim"))
