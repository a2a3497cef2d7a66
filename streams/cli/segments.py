"""`notify segments`: how many SMS segments a text takes, and what it is sent as, without a running system."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from channels.sms import MAX_SEGMENTS, Encoding, Segmented, Transliterate
from channels.sms import segments as segments_of
from schemas.errors import ProviderRejectedError
from streams.cli import console
from streams.cli.errors import CliError

EPILOG = console.examples(
    'notify segments "Your code is 123456."',
    'notify segments "Zażółć gęślą jaźń" --transliterate none',
    "notify preview payment_failed --channel sms --json | jq -r .channels.sms.text | notify segments -",
)
_LIMIT = 255  # as many as can be joined (3GPP TS 23.040 section 9.2.3.24.1)
_SHOWN_CHARACTERS = 10


def segments(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The text; - reads it from stdin.")],
    *,
    transliterate: Annotated[
        Transliterate, typer.Option(help="What may be replaced so that it fits the GSM alphabet, as the option of a provider.")
    ] = Transliterate.ALL,
    as_json: console.JsonOption = False,
) -> None:
    """Show how a text is sent by SMS: its alphabet, and what each segment holds. A segment is what carriers bill.

    160 characters fit one segment of the GSM-7 alphabet, 153 each when there are several; of UCS-2, which one character
    outside that alphabet is enough for, 70 and 67. A text of more than 6 segments is not sent, unless its provider says so.
    """
    given = sys.stdin.read().removesuffix("\n") if text == "-" else text
    try:
        found = segments_of(given, transliterate=transliterate, most=_LIMIT)
    except ProviderRejectedError as error:
        raise CliError(f"It needs more than {_LIMIT} segments, which no carrier joins.") from error
    if as_json:
        parts = [{"used": found.used(part), "room": found.room, "text": part} for part in found.parts]
        console.print_document({"encoding": found.encoding, "segments": len(parts), "parts": parts, "blockers": _blockers(given, found)})
    else:
        console.stdout().print(_table(found))
        if blockers := _blockers(given, found):
            console.warn(f"Not in the GSM alphabet, so it takes UCS-2: {' '.join(blockers[:_SHOWN_CHARACTERS])}")
        elif found.text != given:
            console.warn("Some characters were replaced, so that it fits the GSM alphabet.")
    if len(found.parts) > MAX_SEGMENTS:
        console.warn(
            f"More than {MAX_SEGMENTS} segments: providers cut it after the last of them, unless their max_segments says otherwise."
        )


def _table(found: Segmented) -> Table:
    count = len(found.parts)
    table = Table(box=box.SIMPLE, title=f"{found.encoding}, {count} segment{'' if count == 1 else 's'}", title_justify="left")
    table.add_column("#", justify="right", style="dim")
    table.add_column("used", justify="right")
    table.add_column("text", overflow="fold")
    for number, part in enumerate(found.parts, 1):
        lines = Text("↵\n").join(console.cell(line) for line in part.split("\n"))
        table.add_row(str(number), f"{found.used(part)}/{found.room}", lines)
    return table


def _blockers(given: str, found: Segmented) -> list[str]:
    """Return the characters for whose sake a text is sent in UCS-2, in the order in which they come."""
    if found.encoding is Encoding.GSM7:
        return []
    return [each for each in dict.fromkeys(given) if segments_of(each).encoding is Encoding.UCS2]
