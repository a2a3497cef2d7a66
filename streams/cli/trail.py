"""`notify trail`: event → decision → channels → attempts → how it ended, as a tree to read from top to bottom."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.panel import Panel
from rich.text import Text
from rich.tree import Tree

from schemas.ids import is_notification_id
from schemas.status import Engagement, Status
from streams.cli import console, web
from streams.cli.context import load_settings
from streams.cli.errors import CliError

EPILOG = console.examples(
    "notify trail 5f0c…", "notify trail 5f0c… --json", "notify trail $(notify send --user u-1 --title Hi --message there)"
)

# how each status looks: a mark and its style
MARKS: Mapping[str, tuple[str, str]] = {
    Status.ACCEPTED: ("•", "dim"),
    Status.SCHEDULED: ("◷", "cyan"),
    Status.MERGED: ("⇉", "cyan"),
    Status.QUEUED: ("•", "dim"),
    Status.SENDING: ("→", "cyan"),
    Status.RETRYING: ("↻", "yellow"),
    Status.SENT: ("✓", "green"),
    Status.UNKNOWN: ("?", "yellow"),
    Status.EXPIRED: ("⌛", "yellow"),
    Status.CANCELLED: ("⊘", "yellow"),
    Status.SKIPPED: ("⊘", "yellow"),
    Status.FAILED: ("✗", "red"),
    Status.DELIVERED: ("✓", "bold green"),
    Status.BOUNCED: ("✗", "bold red"),
}
_OUTCOME_STYLES = {
    "notified": "bold green",
    "broadcast": "bold green",
    "skipped": "bold yellow",
    "duplicate_of": "bold yellow",
    "conflict": "bold red",
}
_MINUTE_SECONDS, _HOUR_SECONDS, _DAY_SECONDS = 60, 3_600, 86_400


def trail(
    notification: Annotated[str, typer.Argument(metavar="ID", help="The notification id: 32 hexadecimal digits.")],
    *,
    as_json: console.JsonOption = False,
) -> None:
    """Show what became of a notification: why it was sent or not, through whom, at which attempt, and how it ended."""
    settings, web_url = load_settings(os.environ, needs=web.NEEDS)
    if not is_notification_id(notification):
        raise CliError(f"{console.safe(notification)[:80]} is no notification id, which has 32 hexadecimal digits.")
    missing = (
        f"Nothing is known of {notification} yet. It may not have been decided (look again in a moment), "
        "its request may be a dead letter (`notify dlq list`), or it belongs to another environment."
    )
    document = web.get(web_url, settings.token_key, f"/notifications/{notification}/trail", missing=missing)
    if as_json:
        console.print_document(document)
    else:
        console.stdout().print(render_trail(document))


def render_trail(document: Mapping[str, Any]) -> Group:
    """Return a trail, as the web's page `/notifications/{id}/trail` answers it, as something that Rich prints."""
    event, decision = document.get("event"), document.get("decision")
    # what is counted from is when Kafka had it: before that it was not ours to be quick with
    start = _moment((decision or {}).get("acceptedAt")) or _moment((event or {}).get("occurredAt"))
    root = Tree(_title(document), guide_style="dim")
    if event is not None:
        _add_event(root, event, (decision or {}).get("acceptedAt"))
    if decision is None:
        root.add(Text("not decided yet, or decided before the views began", style="dim italic"))
    else:
        _add_decision(root, decision, document.get("deliveries") or [], start)
    known = {choice.get("deliveryId") for choice in (decision or {}).get("channels") or []}
    for delivery in document.get("deliveries") or []:
        if delivery.get("deliveryId") not in known or not delivery.get("deliveryId"):
            _add_delivery(root, delivery, start, {})
    _add_repeats(root, document.get("again") or [])
    _add_engagement(root, document.get("engagement") or {})
    return Group(root)


def _title(document: Mapping[str, Any]) -> Text:
    statuses = [str(delivery.get("status")) for delivery in document.get("deliveries") or []]
    title = Text.assemble(
        ("notification ", "dim"),
        console.cell(document.get("notificationId"), "bold"),
        ("  for ", "dim"),
        console.cell(document.get("userId"), "bold"),
    )
    for delivery, status in zip(document.get("deliveries") or [], statuses, strict=True):
        mark, style = MARKS.get(status, ("•", ""))
        title.append_text(Text.assemble("  ", (f"{mark} ", style), console.cell(delivery.get("channel") or "", style)))
    return title


def _add_event(root: Tree, event: Mapping[str, Any], accepted_at: object) -> None:
    line = Text.assemble(("event     ", "bold cyan"), console.cell(event.get("id")), (" from ", "dim"), console.cell(event.get("producer")))
    node = root.add(line)
    node.add(_facts([("occurred ", _time(event.get("occurredAt"))), ("accepted ", _time(accepted_at)), ("read at ", _place(event))]))


def _add_decision(root: Tree, decision: Mapping[str, Any], deliveries: Sequence[Mapping[str, Any]], start: datetime | None) -> None:
    outcome = str(decision.get("outcome"))
    line = Text.assemble(("decision  ", "bold cyan"), console.cell(outcome, _OUTCOME_STYLES.get(outcome, "bold")))
    if decision.get("reason"):
        line.append_text(Text.assemble((": ", "dim"), console.cell(decision["reason"], "yellow")))
    line.append_text(_later(start, decision.get("decidedAt")))
    node = root.add(line)
    versions = decision.get("versions") or {}
    rule = f"{decision['rule']} v{versions.get('rule')}" if decision.get("rule") else "none"
    node.add(_facts([("rule ", rule), ("category ", decision.get("category")), ("lane ", decision.get("lane"))]))
    preferences = f"version {versions['preferences']}" if versions.get("preferences") else "none stored, defaults"
    node.add(
        _facts(
            [("preferences ", preferences), ("template ", versions.get("template")), ("request ", _place(decision.get("request") or {}))]
        )
    )
    for name, state in sorted((decision.get("limiter") or {}).items()):
        node.add(_facts([(f"{console.safe(name)} ", state)]))
    of_id = {delivery.get("deliveryId"): delivery for delivery in deliveries}
    for choice in decision.get("channels") or []:
        delivery = of_id.get(choice.get("deliveryId"))
        if delivery is not None:
            _add_delivery(root, delivery, start, choice)
        else:
            _add_choice(root, choice)


def _add_choice(root: Tree, choice: Mapping[str, Any]) -> None:
    is_chosen = bool(choice.get("isChosen"))
    mark, style = ("•", "green") if is_chosen else ("⊘", "yellow")
    root.add(
        Text.assemble(
            ("channel   ", "bold cyan"),
            (f"{mark} ", style),
            console.cell(choice.get("channel"), "bold" if is_chosen else "dim"),
            (" chosen: " if is_chosen else " not used: ", "dim"),
            console.cell(choice.get("reason"), style),
        )
    )


def _add_delivery(root: Tree, delivery: Mapping[str, Any], start: datetime | None, choice: Mapping[str, Any]) -> None:
    status = str(delivery.get("status"))
    mark, style = MARKS.get(status, ("•", ""))
    line = Text.assemble(
        ("channel   ", "bold cyan"),
        (f"{mark} ", style),
        console.cell(delivery.get("channel") or "no channel", "bold"),
        " ",
        console.cell(status, style),
    )
    if choice.get("reason"):
        line.append_text(
            Text.assemble(("  chosen: " if choice.get("isChosen") else "  not used: ", "dim"), console.cell(choice["reason"], "dim"))
        )
    node = root.add(line)
    attempt_node, attempt = node, (0, 0)
    for change in delivery.get("changes") or []:
        number = (int(change.get("generation") or 0), int(change.get("attempt") or 0))
        if number[1] and number != attempt:
            attempt_node, attempt = node.add(_attempt(number, change)), number
        (attempt_node if number[1] else node).add(_change(change, start))


def _attempt(number: tuple[int, int], change: Mapping[str, Any]) -> Text:
    line = Text.assemble(("attempt ", "cyan"), (str(number[1]), "cyan"))
    if number[0]:
        line.append(f" (redrive {number[0]})", style="dim")
    if change.get("provider"):
        line.append_text(Text.assemble((" through ", "dim"), console.cell(change["provider"])))
    return line


def _change(change: Mapping[str, Any], start: datetime | None) -> Text:
    status = str(change.get("status"))
    mark, style = MARKS.get(status, ("•", ""))
    line = Text.assemble((f"{mark} ", style), console.cell(f"{status:<10}", style))
    line.append_text(_later(start, change.get("at")))
    if change.get("reason"):
        line.append_text(Text.assemble("  ", console.cell(change["reason"], style)))
    if change.get("reference"):
        line.append_text(Text.assemble(("  ref ", "dim"), console.cell(change["reference"], "dim")))
    return line


def _add_repeats(root: Tree, repeats: Sequence[Mapping[str, Any]]) -> None:
    for repeat in repeats:
        outcome = str(repeat.get("outcome"))
        line = Text.assemble(("again     ", "bold cyan"), console.cell(outcome, _OUTCOME_STYLES.get(outcome, "yellow")))
        if repeat.get("reason"):
            line.append_text(Text.assemble((": ", "dim"), console.cell(repeat["reason"])))
        root.add(line).add(_facts([("at ", _time(repeat.get("at"))), ("request ", _place(repeat.get("request") or {}))]))


def _add_engagement(root: Tree, engagement: Mapping[str, Any]) -> None:
    seen = [("read", "readAt"), ("archived", "archivedAt"), ("clicked", "clickedAt")]
    happened = [(word, engagement[name]) for word, name in seen if engagement.get(name)]
    if not happened:
        if engagement.get("status") == Engagement.UNREAD:
            root.add(Text.assemble(("recipient ", "bold cyan"), ("○ unread", "dim")))
        return
    line = Text("recipient ", style="bold cyan")
    for word, at in happened:
        line.append_text(Text.assemble((f"● {word} ", "green"), (f"{_time(at)}  ", "dim")))
    root.add(line)


def _facts(facts: Sequence[tuple[str, object]]) -> Text:
    line = Text()
    for label, value in facts:
        if value is None or value == "":
            continue
        line.append_text(Text.assemble("   " if line else "", (label, "dim"), console.cell(value)))
    return line


def _place(origin: Mapping[str, Any]) -> str | None:
    if not origin.get("topic"):
        return None
    return f"{origin['topic']}[{origin.get('partition')}]@{origin.get('offset')}"


def _moment(text: object) -> datetime | None:
    try:
        return datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        return None


def _time(text: object) -> str | None:
    at = _moment(text)
    return None if at is None else console.show_time(at)


def _later(start: datetime | None, text: object) -> Text:
    at = _moment(text)
    if at is None:
        return Text()
    if start is None:
        return Text(f"  {console.show_time(at)}", style="dim")
    # the date only where it is another one than where the count begins
    shown = console.show_time(at) if at.astimezone().date() != start.astimezone().date() else console.show_time(at).partition(" ")[2]
    return Text(f"  {shown}  {_span((at - start).total_seconds())}", style="dim")


def _span(seconds: float) -> str:
    sign, size = ("+" if seconds >= 0 else "-"), abs(seconds)
    if size < 1:
        return f"{sign}{size * 1000:.0f} ms"
    if size < _MINUTE_SECONDS:
        return f"{sign}{size:.1f} s"
    if size < _HOUR_SECONDS:
        return f"{sign}{size / _MINUTE_SECONDS:.0f} min"
    return f"{sign}{size / _HOUR_SECONDS:.1f} h" if size < _DAY_SECONDS else f"{sign}{size / _DAY_SECONDS:.0f} d"


def panel(document: Mapping[str, Any]) -> Panel:
    """Return a trail in a frame, for live output between other lines."""
    return Panel(render_trail(document), border_style="dim", padding=(0, 1))
