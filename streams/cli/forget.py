"""`notify user ID forget`: destroys a user's key, without which nothing that was sealed for him can be opened again."""

from __future__ import annotations

import os
from datetime import UTC, datetime

import typer
from rich.text import Text

from agents.router import MAX_USER_ID_CHARACTERS
from schemas import topics
from schemas.ids import digest
from schemas.messages import Command
from streams.cli import console
from streams.cli.carry_out import carry_out
from streams.cli.context import load_settings
from streams.cli.wire import Wire
from streams.topics import specs

NEEDS = frozenset({"NOTIFY_KAFKA_BOOTSTRAP", "NOTIFY_REGISTRY_URL"})


def forget(user_id: str, *, is_meant: bool, as_json: bool) -> None:
    """Ask, publish the command, and return once the key's tombstone is in Kafka. Raises CliError when the router does nothing."""
    if not user_id.strip() or len(user_id) > MAX_USER_ID_CHARACTERS:
        raise typer.BadParameter(f"is empty or longer than {MAX_USER_ID_CHARACTERS} characters", param_hint="ID")
    settings, _ = load_settings(os.environ, needs=NEEDS)
    if not is_meant:
        typer.confirm(
            f"Destroy the key of {console.safe(user_id)}? His contacts and the words of all his notifications are lost for good",
            abort=True,
            err=True,
        )
    now = datetime.now(UTC)
    command = Command(command_id=digest("cli", "forget", user_id, now.isoformat(), size=12), user_id=user_id, kind="forget", issued_at=now)
    with Wire(settings) as wire:
        codec = wire.codec([spec for spec in specs() if spec.name == topics.COMMANDS])
        carry_out(
            settings,
            codec,
            [command],
            topic=topics.KEYS,
            key_of=lambda each: each.user_id.encode(),
            is_done=lambda _command, value: value is None,
        )
    from streams.erasure import Remains, remains  # what one command needs costs all others at their start

    left = [Remains(*(text.replace("`", "") for text in each)) for each in remains(settings)]
    if as_json:
        shown = [{"what": what, "where": where, "howLong": how_long} for what, where, how_long in left]
        console.print_document({"userId": user_id, "commandId": command.command_id, "isForgotten": True, "remains": shown})
        return
    console.succeed(
        Text.assemble(
            console.cell(user_id, "bold"),
            " is forgotten: his key is destroyed, his preferences and watches are deleted. What was sealed for him, "
            "his contacts and the words of his notifications, cannot be opened any more, wherever a copy of it is.",
        )
    )
    err = console.stderr()
    err.print(Text("\n  What remains:", style="dim"))
    for what, where, how_long in left:
        err.print(Text.assemble("  · ", what, (f"  in {where}: {how_long}", "dim")))
