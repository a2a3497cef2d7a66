"""`notify watch`: who wants to hear of a product that is back in stock, or of a warehouse's stock."""

from __future__ import annotations

import os
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.text import Text

from agents.router import MAX_USER_ID_CHARACTERS, watch_key
from agents.stock import product_audience, warehouse_audience
from schemas import topics
from schemas.ids import digest, partition_of
from schemas.messages import Command
from streams.cli import console
from streams.cli.carry_out import carry_out
from streams.cli.context import load_settings
from streams.cli.kafka import Reader, partition_count
from streams.cli.wire import Wire
from streams.settings import Settings
from streams.topics import physical, specs

NEEDS = frozenset({"NOTIFY_KAFKA_BOOTSTRAP", "NOTIFY_REGISTRY_URL"})
EPILOG = console.examples(
    "notify watch u-1 prod_1129",
    "notify watch u-1 prod_1129 --remove",
    "notify watch staff-7 --warehouse wh_east_01",
)

# user and audience
Watched = tuple[str, str]


def watch(
    user: Annotated[str, typer.Argument(metavar="USER", help="The user id.")],
    product: Annotated[str | None, typer.Argument(metavar="[PRODUCT]", help="The product id, else the sku.")] = None,
    *,
    warehouse: Annotated[
        str | None, typer.Option(metavar="W", help="Watch this warehouse's stock instead: for staff, out of stock and running low.")
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Watch it no more.")] = False,
    as_json: console.JsonOption = False,
) -> None:
    """Tell a user when a product is back in stock, or a member of the staff what runs out in a warehouse.

    Returns when the router has it; repeating it changes nothing.
    """
    if (product is None) == (warehouse is None):
        raise typer.BadParameter("give either a product or --warehouse", param_hint="PRODUCT")
    if not user.strip() or len(user) > MAX_USER_ID_CHARACTERS:
        raise typer.BadParameter(f"is empty or longer than {MAX_USER_ID_CHARACTERS} characters", param_hint="USER")
    audience = product_audience(product) if product is not None else warehouse_audience(warehouse or "")
    settings, _ = load_settings(os.environ, needs=NEEDS)
    with Wire(settings) as wire:
        changed = ensure_watches(settings, wire, {(user, audience)}, is_wanted=not remove)
    if as_json:
        console.print_document({"userId": user, "audience": audience, "isWatched": not remove, "isChanged": bool(changed)})
        return
    said = ("watches no more" if remove else "watches") if changed else ("did not watch" if remove else "watches already")
    console.succeed(Text.assemble(console.cell(user), f" {said} ", console.cell(audience)))


def ensure_watches(settings: Settings, wire: Wire, watched: Collection[Watched], *, is_wanted: bool) -> int:
    """Let each user watch his audience (or no more), and return how many that changed, once the router has them.

    Raises CliError when it refuses one, or does not answer.
    """
    found = _stored(settings, {user for user, _ in watched})
    changing = [(user, audience) for user, audience in watched if (watch_key(audience, user.encode()) in found) is not is_wanted]
    if not changing:
        return 0
    now = datetime.now(UTC)
    kind = "watch" if is_wanted else "unwatch"
    commands = [
        Command(
            command_id=digest("cli", kind, user, audience, now.isoformat(), size=12),
            user_id=user,
            kind=kind,
            audience=audience,
            issued_at=now,
        )
        for user, audience in changing
    ]
    carry_out(
        settings,
        wire.codec([spec for spec in specs() if spec.name == topics.COMMANDS]),
        commands,
        topic=topics.WATCHES,
        key_of=lambda command: watch_key(command.audience or "", command.user_id.encode()),
        is_done=lambda _command, value: (value is not None) is is_wanted,
    )
    return len(changing)


def _stored(settings: Settings, users: Collection[str]) -> set[bytes]:
    """Return the keys of the watches in the users' partitions."""
    topic = physical(settings.env, topics.WATCHES)
    count = partition_count(settings.cluster, topic)
    found: set[bytes] = set()
    with Reader(settings.cluster, topic, sorted({partition_of(user.encode(), count) for user in users})) as reader:
        for message in reader.to_end():
            if message.value() is None:
                found.discard(message.key() or b"")
            else:
                found.add(message.key() or b"")
    return found
