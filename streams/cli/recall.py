"""`notify recall` and `notify suppress`: stop what is not sent yet, and addresses for good, by orders in the topic `control`.

Routers and senders follow the topic, so an order is obeyed a moment after it was published. What a provider has taken over
is sent: no order brings it back.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from agents.control import Control, event_scope, notification_scope, rule_scope
from agents.triggers import RULES
from schemas import topics
from schemas.errors import NotifyError
from schemas.ids import is_notification_id
from schemas.messages import ControlEntry
from schemas.topics import Channel
from streams.cli import console
from streams.cli.context import load_settings
from streams.cli.errors import CliError
from streams.cli.kafka import Publisher, Reader, partition_count
from streams.cli.spans import moment_of
from streams.cli.wire import Wire
from streams.settings import Settings
from streams.topics import physical, specs

NEEDS = frozenset({"NOTIFY_KAFKA_BOOTSTRAP", "NOTIFY_REGISTRY_URL"})
SEALED_NEEDS = NEEDS | {"NOTIFY_SEAL_KEY"}
REASON_CHARACTERS = 200

EPILOG = console.examples(
    'notify recall --notification 1bd7bcd611c14834dd0bcaca98148dc0 --reason "wrong price"',
    'notify recall --event inventory:evt_3d4e5f6a --reason "delivery was counted twice"',
    'notify recall --rule back_in_stock --reason "the import ran twice"',
    "notify recall list",
    "notify recall lift recall:rule:back_in_stock",
)
SUPPRESS_EPILOG = console.examples(
    'notify suppress ada@example.com --reason "asked by telephone"',
    "notify suppress ada@example.com --lift",
)

ReasonOption = Annotated[str | None, typer.Option(metavar="TEXT", help="Why: it stands in the trail. No personal data.")]

app = typer.Typer(rich_markup_mode="rich", invoke_without_command=True, help="Stop what was decided and is not sent yet.", epilog=EPILOG)


@app.callback()
def recall(  # noqa: PLR0913 - one parameter an option
    context: typer.Context,
    *,
    notification: Annotated[str | None, typer.Option(metavar="ID", help="One notification.")] = None,
    event: Annotated[
        str | None, typer.Option(metavar="PRODUCER:EVENT", help="All that an event led to; `notify trail` shows both names.")
    ] = None,
    rule: Annotated[str | None, typer.Option(metavar="NAME", help="All that a rule decided on events accepted so far.")] = None,
    before: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="With --rule: on events accepted before then, a span ago (15m) or a time; it may be to come."),
    ] = None,
    reason: ReasonOption = None,
    as_json: console.JsonOption = False,
) -> None:
    """Stop what was decided and is not sent yet: its deliveries end as cancelled.

    Senders look immediately before each attempt, also of what waits for its next one. What comes later of the same event or
    notification is not sent either, until the order is lifted.
    """
    if context.invoked_subcommand is not None:
        return
    now = datetime.now(UTC)
    scope = _scope(notification=notification, event=event, rule=rule)
    if before is not None and rule is None:
        raise typer.BadParameter("goes with --rule", param_hint="--before")
    until = None if rule is None else now if before is None else moment_of(before, "--before", now=now)
    entry = ControlEntry(scope=scope, reason=_reason(reason), before=until, issued_at=now)
    settings, _ = load_settings(os.environ, needs=NEEDS)
    _publish(settings, scope, entry)
    _say(entry, as_json=as_json, done="recalled")


@app.command("list", epilog=console.examples("notify recall list", "notify recall list --json"))
def list_(*, as_json: console.JsonOption = False) -> None:
    """List the orders in force, recalls and suppressions, oldest first. With --json one line each."""
    settings, _ = load_settings(os.environ, needs=NEEDS)
    entries = sorted(_orders(settings), key=lambda entry: entry.issued_at)
    if as_json:
        for entry in entries:
            console.print_line(console.to_json(entry))
        return
    if not entries:
        console.succeed("no order is in force")
        return
    table = Table(box=box.SIMPLE, show_edge=False)
    for heading in ("since", "scope", "accepted before", "reason"):
        table.add_column(heading, overflow="fold")
    for entry in entries:
        until = console.NOTHING if entry.before is None else console.show_time(entry.before)
        table.add_row(console.show_time(entry.issued_at), console.cell(entry.scope), until, console.cell(entry.reason))
    console.stdout().print(table)


@app.command("lift", epilog=console.examples("notify recall lift recall:rule:back_in_stock"))
def lift(
    scope: Annotated[str, typer.Argument(metavar="SCOPE", help="As `notify recall list` shows it.")],
    *,
    as_json: console.JsonOption = False,
) -> None:
    """Lift an order. What it cancelled stays cancelled."""
    settings, _ = load_settings(os.environ, needs=NEEDS)
    if not any(entry.scope == scope for entry in _orders(settings)):
        raise CliError(f"No order has the scope {console.safe(scope)[:200]}. `notify recall list` shows those in force.")
    _publish(settings, scope, None)
    if as_json:
        console.print_document({"scope": scope, "isLifted": True})
    else:
        console.succeed(Text.assemble("lifted ", console.cell(scope, "bold")))


def suppress(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="The address; - reads it from stdin, away from the shell's history.")],
    *,
    channel: Annotated[Channel, typer.Option(help="The channel that it belongs to.")] = Channel.EMAIL,
    reason: ReasonOption = None,
    is_lifted: Annotated[bool, typer.Option("--lift", help="Send to it again.")] = False,
    as_json: console.JsonOption = False,
) -> None:
    """Send nothing to an address any more, whoever has it: its deliveries are skipped as suppressed.

    What the router decided before goes out still. Kafka gets to know a keyed hash of the address only.
    """
    plain = sys.stdin.readline().strip() if address == "-" else address
    if not plain.strip():
        raise typer.BadParameter("is empty", param_hint="ADDRESS")
    settings, _ = load_settings(os.environ, needs=SEALED_NEEDS)
    scope = Control(lambda _scope: None, seal_key=settings.seal_key).scope_of(channel, plain)
    if is_lifted:
        # of single categories too: its owner left them by a mail's link
        scopes = [entry.scope for entry in _orders(settings) if entry.scope == scope or entry.scope.startswith(f"{scope}:")]
        for each in scopes or [scope]:
            lift(each, as_json=as_json)
        return
    entry = ControlEntry(scope=scope, reason=_reason(reason), issued_at=datetime.now(UTC))
    _publish(settings, scope, entry)
    _say(entry, as_json=as_json, done="suppressed")


def _scope(*, notification: str | None, event: str | None, rule: str | None) -> str:
    """Return the scope that the options name. Raises BadParameter unless exactly one does."""
    match notification, event, rule:
        case str(), None, None:
            if not is_notification_id(notification):
                raise typer.BadParameter("is no notification id, which has 32 hexadecimal digits", param_hint="--notification")
            return notification_scope(notification)
        case None, str(), None:
            producer, colon, event_id = event.partition(":")
            if not producer or not colon or not event_id:
                raise typer.BadParameter("is not PRODUCER:EVENT", param_hint="--event")
            return event_scope(producer, event_id)
        case None, None, str():
            if rule not in RULES:
                raise typer.BadParameter(f"is none of the rules {', '.join(RULES)}", param_hint="--rule")
            return rule_scope(rule)
    raise typer.BadParameter("give one of --notification, --event and --rule", param_hint="recall")


def _reason(text: str | None) -> str:
    plain = (text or "").strip()
    if not plain or len(plain) > REASON_CHARACTERS or "@" in plain:
        problem = f"is missing, longer than {REASON_CHARACTERS} characters, or holds an address: it stands in trails"
        raise typer.BadParameter(problem, param_hint="--reason")
    return plain


def _publish(settings: Settings, scope: str, entry: ControlEntry | None) -> None:
    topic = physical(settings.env, topics.CONTROL)
    partition_count(settings.cluster, topic)
    with Wire(settings) as wire:
        codec = wire.codec([spec for spec in specs() if spec.name == topics.CONTROL])
    publisher = Publisher(settings.cluster)
    publisher.publish(topic, scope, None if entry is None else codec.encode(entry))
    publisher.require_all()


def _orders(settings: Settings) -> Iterator[ControlEntry]:
    """Yield the orders in force; says on stderr which cannot be read."""
    topic = physical(settings.env, topics.CONTROL)
    partition_count(settings.cluster, topic)
    rows: dict[bytes, bytes] = {}
    with Reader(settings.cluster, topic, [0]) as reader:
        for message in reader.to_end():
            key, value = message.key(), message.value()
            if key is not None and value is not None:
                rows[key] = value
            elif key is not None:
                rows.pop(key, None)
    with Wire(settings) as wire:
        for key, value in rows.items():
            try:
                yield wire.decode(value, ControlEntry)
            except NotifyError as error:
                console.fail([f"the order of {key.decode(errors='replace')} cannot be read: {error}"])


def _say(entry: ControlEntry, *, as_json: bool, done: str) -> None:
    if as_json:
        console.print_document(console.to_json(entry))
        return
    console.succeed(Text.assemble(f"{done}: ", console.cell(entry.scope, "bold"), "; `notify recall lift` takes it back"))
