"""`notify why`: what was decided for a user about an event, straight from the log, without the web."""

from __future__ import annotations

import os
from typing import Annotated, cast

import typer
from rich.text import Text
from rich.tree import Tree

from schemas import topics
from schemas.errors import UndecodableError
from schemas.ids import partition_of
from schemas.messages import DecisionRecord, Origin
from streams.cli import console
from streams.cli.context import load_settings
from streams.cli.errors import CliError
from streams.cli.kafka import Reader, partition_count
from streams.cli.wire import Wire
from streams.settings import Settings
from streams.topics import physical

NEEDS = frozenset({"NOTIFY_KAFKA_BOOTSTRAP", "NOTIFY_REGISTRY_URL"})
EPILOG = console.examples("notify why cust_10482 evt_pp_a1b2c3d4-e5f6-7890-abcd-ef1234567890", "notify why u-1 pay-77 --json")
_STYLES = {
    "notified": "bold green",
    "broadcast": "bold green",
    "skipped": "bold yellow",
    "duplicate_of": "bold yellow",
    "conflict": "bold red",
}


def why(
    user: Annotated[str, typer.Argument(metavar="USER", help="The user id.")],
    event: Annotated[str, typer.Argument(metavar="EVENT", help="The event id.")],
    *,
    as_json: console.JsonOption = False,
) -> None:
    """Show every decision about an event for a user, with its reasons. With --json one line a decision."""
    settings, _ = load_settings(os.environ, needs=NEEDS)
    decisions = find_decisions(settings, user, event)
    if not decisions:
        raise CliError(
            f"Nothing was decided for {console.safe(user)} about the event {console.safe(event)} in "
            f"{physical(settings.env, topics.DECISIONS)}, which keeps 90 days. Check that both ids are spelled exactly so. "
            "Look for the event among the dead letters (`notify dlq list`), "
            f"and in {physical(settings.env, topics.PARKED)} if the registry was away. `notify doctor` says whether ingest and router run."
        )
    for decision in decisions:
        if as_json:
            console.print_line(console.to_json(decision))
        else:
            console.stdout().print(render_decision(decision))


def find_decisions(settings: Settings, user_id: str, event_id: str) -> list[DecisionRecord]:
    """Return the decisions for a user about an event, oldest first, from the user's partition."""
    topic, key = physical(settings.env, topics.DECISIONS), user_id.encode()
    partition = partition_of(key, partition_count(settings.cluster, topic))
    found: list[DecisionRecord] = []
    with Wire(settings) as wire, Reader(settings.cluster, topic, [partition]) as reader:
        low, high = reader.sizes()[partition]
        with console.progress(f"reading {topic}[{partition}]", high - low) as advance:
            for message in reader.to_end():
                offset = cast("int", message.offset())
                if offset % 1_000 == 0:
                    advance(offset - low)
                if message.key() != key:
                    continue
                try:
                    decision = wire.decode(message.value(), DecisionRecord)
                except UndecodableError:
                    console.warn(f"{topic}[{partition}]@{offset} cannot be decoded and is passed over")
                    continue
                if decision.event_id == event_id:
                    found.append(decision)
    return found


def render_decision(decision: DecisionRecord) -> Tree:
    """Return a decision as something that Rich prints."""
    title = Text.assemble(console.cell(decision.outcome, _STYLES.get(decision.outcome, "bold")))
    if decision.reason:
        title.append_text(Text.assemble((": ", "dim"), console.cell(decision.reason, "yellow")))
    title.append_text(Text.assemble(("  notification ", "dim"), console.cell(decision.notification_id)))
    root = Tree(title, guide_style="dim")
    _row(root, "event", f"{decision.event_id} from {decision.producer}, occurred {console.show_time(decision.occurred_at)}")
    _row(root, "decided", f"{console.show_time(decision.decided_at)}, accepted {console.show_time(decision.accepted_at)}")
    rule = f"{decision.rule} v{decision.rule_version}, category {decision.category}, lane {decision.lane}" if decision.rule else "none"
    _row(root, "rule", rule)
    stored = f"version {decision.preference_version}" if decision.preference_version else "none stored, the defaults applied"
    _row(root, "preferences", stored)
    if decision.template_version:
        _row(root, "template", decision.template_version)
    for name, state in sorted(decision.limiter.items()):
        _row(root, name, state)
    for choice in decision.channels:
        mark, style = ("✓", "green") if choice.is_chosen else ("⊘", "yellow")
        verdict = "chosen" if choice.is_chosen else "not used"
        root.add(
            Text.assemble(
                (f"{mark} ", style),
                console.cell(f"{choice.channel:<9}", "bold"),
                (f"{verdict}: ", "dim"),
                console.cell(choice.reason, style),
            )
        )
    _row(root, "request", _place(decision.request))
    if decision.origin is not None:
        _row(root, "read at", _place(decision.origin))
    return root


def _row(root: Tree, label: str, value: str) -> None:
    root.add(Text.assemble(console.cell(f"{label:<12}", "dim"), console.cell(value)))


def _place(origin: Origin) -> str:
    return f"{origin.topic}[{origin.partition}]@{origin.offset}"
