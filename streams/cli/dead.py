"""`notify dlq`: what could not be handled, why, and its bytes as they came."""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, cast

import typer
from confluent_kafka import Message
from rich import box
from rich.table import Table
from rich.text import Text

from schemas import topics
from schemas.errors import NotifyError
from streams.cli import console
from streams.cli.context import load_settings
from streams.cli.errors import CliError
from streams.cli.kafka import Reader, partition_count
from streams.cli.spans import seconds_of
from streams.cli.wire import Wire
from streams.settings import Settings
from streams.topics import physical

NEEDS = frozenset({"NOTIFY_KAFKA_BOOTSTRAP"})
SHOW_NEEDS = NEEDS | {"NOTIFY_REGISTRY_URL"}
ROW_BYTES = 16
SHOWN_BYTES = 1_024

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Look at the dead letters: what could not be handled, and why.")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A message set aside. `headers` say why and from where; `at` is when it was set aside."""

    partition: int
    offset: int
    at: datetime
    key: bytes | None
    value: bytes | None
    headers: Mapping[str, str]

    @classmethod
    def of(cls, message: Message) -> DeadLetter:
        """Return the dead letter that `message` of the topic `dead` is."""
        headers = cast("list[tuple[str, bytes | None]]", message.headers() or [])
        return cls(
            partition=cast("int", message.partition()),
            offset=cast("int", message.offset()),
            at=datetime.fromtimestamp(message.timestamp()[1] / 1000, UTC),
            key=message.key(),
            value=message.value(),
            headers={name: (value or b"").decode(errors="replace") for name, value in headers},
        )

    @property
    def id(self) -> str:
        """What `notify dlq show` takes."""
        return f"{self.partition}:{self.offset}"

    @property
    def origin(self) -> str:
        """Where it was read."""
        return f"{self.headers.get('topic', '?')}[{self.headers.get('partition', '?')}]@{self.headers.get('offset', '?')}"

    def to_json(self) -> dict[str, object]:
        """Return what `--json` prints: the headers, not the bytes."""
        return {"id": self.id, "at": console.rfc3339(self.at), "bytes": len(self.value or b""), "headers": dict(self.headers)}


@app.command(
    "list",
    epilog=console.examples(
        "notify dlq list", "notify dlq list --since 2h --error undecodable", "notify dlq list --role ingest --limit 500 --json"
    ),
)
def list_(
    *,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 20,
    error: Annotated[str | None, typer.Option(help="Only this reason, such as undecodable or unroutable.")] = None,
    role: Annotated[str | None, typer.Option(help="Only what this role set aside, such as ingest.")] = None,
    since: Annotated[str | None, typer.Option(metavar="SPAN", help="Only the last 90s, 15m, 12h, 7d …")] = None,
    as_json: console.JsonOption = False,
) -> None:
    """List the newest dead letters. With --json one line each."""
    since_seconds = None if since is None else seconds_of(since, "--since")
    settings, _ = load_settings(os.environ, needs=NEEDS)
    wanted = {name: value for name, value in (("error", error), ("role", role)) if value is not None}
    found, total = find(settings, limit=limit, wanted=wanted, since_seconds=since_seconds)
    if as_json:
        for letter in found:
            console.print_line(letter.to_json())
        return
    if not found:
        console.succeed(f"no dead letters{' of this kind' if wanted or since else ''}")
        return
    console.stdout().print(_table(found))
    console.stderr().print(Text(f"{len(found)} of {total}; see one with `notify dlq show {found[0].id}`", style="dim"))


@app.command("show", epilog=console.examples("notify dlq show 0:41", "notify dlq show 0:41 --all-bytes", "notify dlq show 0:41 --json"))
def show(
    place: Annotated[str, typer.Argument(metavar="PARTITION:OFFSET", help="As `notify dlq list` shows it.")],
    *,
    all_bytes: Annotated[bool, typer.Option("--all-bytes", help=f"Show all bytes, not the first {SHOWN_BYTES}.")] = False,
    as_json: console.JsonOption = False,
) -> None:
    """Show a dead letter: headers, the record if it can be decoded, and the bytes as they came."""
    partition, colon, offset = place.partition(":")
    if not colon or not partition.isdigit() or not offset.isdigit():
        raise typer.BadParameter(f"{place!r} is not PARTITION:OFFSET, such as 0:41", param_hint="PARTITION:OFFSET")
    settings, _ = load_settings(os.environ, needs=SHOW_NEEDS)
    letter = find_one(settings, int(partition), int(offset))
    decoded, problem = _decode(settings, letter)
    if as_json:
        document = {**letter.to_json(), "key": letter.key, "value": letter.value, "decoded": decoded, "undecodable": problem}
        console.print_document(document)
        return
    _print(letter, decoded, problem, SHOWN_BYTES if not all_bytes else None)


def find(settings: Settings, *, limit: int, wanted: Mapping[str, str], since_seconds: int | None) -> tuple[list[DeadLetter], int]:
    """Return the newest `limit` dead letters whose headers say `wanted`, and how many there are in what was read."""
    topic = physical(settings.env, topics.DEAD)
    partitions = list(range(partition_count(settings.kafka, topic)))
    newest: list[tuple[datetime, int, int, DeadLetter]] = []
    total = 0
    with Reader(settings.kafka, topic, partitions) as probe:
        if since_seconds is not None:
            starts = probe.offsets_at(int((time.time() - since_seconds) * 1000))
        else:
            starts = {number: low for number, (low, _) in probe.sizes().items()}
        ends = {number: high for number, (_, high) in probe.sizes().items()}
    with (
        Reader(settings.kafka, topic, starts) as reader,
        console.progress(f"reading {topic}", sum(ends[number] - starts[number] for number in partitions)) as advance,
    ):
        for message in reader.to_end(advance):
            letter = DeadLetter.of(message)
            if any(letter.headers.get(name) != value for name, value in wanted.items()):
                continue
            total += 1
            item = (letter.at, letter.partition, letter.offset, letter)
            if len(newest) < limit:
                heapq.heappush(newest, item)
            else:
                heapq.heappushpop(newest, item)
    return [item[3] for item in sorted(newest, reverse=True)], total


def find_one(settings: Settings, partition: int, offset: int) -> DeadLetter:
    """Return the dead letter at a place. Raises CliError when there is none."""
    topic = physical(settings.env, topics.DEAD)
    count = partition_count(settings.kafka, topic)
    if partition >= count:
        raise CliError(f"{topic} has the partitions 0 to {count - 1}, not {partition}. `notify dlq list` shows what there is.")
    with Reader(settings.kafka, topic, [partition]) as probe:
        low, high = probe.sizes()[partition]
    nothing = f"There is no dead letter at {partition}:{offset}. `notify dlq list` shows what there is; they are kept for 30 days."
    if not low <= offset < high:
        raise CliError(nothing)
    with Reader(settings.kafka, topic, {partition: offset}) as reader:
        message = next(reader.to_end(), None)
    if message is None or message.offset() != offset:
        raise CliError(nothing)
    return DeadLetter.of(message)


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


def _table(letters: list[DeadLetter]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for name in ("id", "set aside", "error", "role", "read at"):
        table.add_column(name, no_wrap=True)
    table.add_column("message", overflow="fold", min_width=24)
    for letter in letters:
        table.add_row(
            Text(letter.id, style="bold"),
            letter.at.astimezone().strftime("%Y-%m-%d %H:%M:%S"),
            console.cell(letter.headers.get("error", "?"), "red"),
            console.cell(letter.headers.get("role", "?")),
            console.cell(letter.origin, "dim"),
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
        is_moment = name == "timestamp" and value.isascii() and value.isdigit()
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
