"""`notify topics`: the topics as the topology wants them, the difference shown before anything is changed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from schemas.errors import SettingsError
from streams import provisioning
from streams.cli import acls, console, kafka, migrate
from streams.cli.context import load_settings
from streams.cli.errors import CliError
from streams.provisioning import Action, Change, StartAt, Target
from streams.roles import Role
from streams.settings import Settings
from streams.topics import physical
from streams.topology import TOPOLOGY, all_topics

NEEDS = frozenset({"NOTIFY_KAFKA_BOOTSTRAP"})
_MARKS = {
    Action.CREATE: Text("+ create", style="green"),
    Action.ALTER: Text("~ alter", style="yellow"),
    Action.KEEP: Text("= keep", style="dim"),
    Action.REFUSE: Text("✗ refuse", style="bold red"),
}
_DAY_MS, _HOUR_MS, _MEBIBYTE = 86_400_000, 3_600_000, 2**20

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Make the topics, and keep them as the topology wants them.")


@app.callback()
def topics_() -> None:
    """Make the topics, and keep them as the topology wants them."""


app.command("acls", epilog=acls.EPILOG)(acls.acls)
app.command("migrate", epilog=migrate.EPILOG)(migrate.migrate)


@app.command(
    "ensure",
    epilog=console.examples("notify topics ensure --dry-run", "notify topics ensure", "notify topics ensure --start-at latest"),
)
def ensure(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")] = False,
    start_at: Annotated[
        StartAt | None,
        typer.Option(help="Where ingest begins in the inbound topics, on partitions where its group has no position yet."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before settings of topics are altered.")] = False,
    as_json: console.JsonOption = False,
) -> None:
    """Create the topics that are missing and mend the settings of the others. Partitions are never added: keys would move.

    What would change is shown first; in a terminal, altering is asked for. Partition counts and replicas come from
    NOTIFY_PARTITIONS, NOTIFY_INBOUND_PARTITIONS, NOTIFY_INVENTORY_PARTITIONS and NOTIFY_REPLICATION.
    """
    settings, _ = load_settings(os.environ, needs=NEEDS)
    admin = kafka.admin(settings.cluster)
    changes = provisioning.plan(admin, wanted(settings))
    problems = provisioning.problems(changes)
    if not as_json:
        _print(changes)
    begun: dict[tuple[str, int], int] = {}
    if not (dry_run or problems or yes or as_json):
        _ask(changes)
    if not dry_run and not problems:
        try:
            provisioning.apply(admin, changes)
        except SettingsError as error:
            raise CliError(*(_capital(problem) for problem in error.problems)) from error
        if start_at is not None:
            begun = provisioning.start_group(admin, ingest_group(settings.env), inbound_topics(settings.env), start_at)
    if as_json:
        console.print_document(_document(changes, begun, is_done=not dry_run and not problems))
    if problems:
        raise CliError(*(_capital(problem) for problem in problems), "Nothing was changed.")
    if not as_json:
        _summarise(changes, begun, dry_run=dry_run, start_at=start_at)


def _ask(changes: Sequence[Change]) -> None:
    """Ask whether topics may be altered, where somebody can answer: a shorter retention deletes records."""
    altered = sum(change.action is Action.ALTER for change in changes)
    if (
        altered
        and sys.stdin.isatty()
        and not typer.confirm(f"Alter the settings of {altered} topic{'' if altered == 1 else 's'}?", err=True)
    ):
        raise CliError("Nothing was changed.")


def wanted(settings: Settings) -> list[Target]:
    """Return every topic of the system as it should be."""
    return provisioning.targets(all_topics(), env=settings.env, counts=settings.counts, replication=settings.replication)


def ingest_group(env: str) -> str:
    """Return the consumer group that reads the inbound topics."""
    return f"notify.{env}.{Role.INGEST}"


def inbound_topics(env: str) -> list[str]:
    """Return the topics of other services that ingest reads, as they are called in the cluster."""
    read = [physical(env, name) for step in TOPOLOGY if step.role is Role.INGEST for name in step.reads]
    return [name for name in read if not name.startswith(provisioning.OUR_PREFIX)]


def _print(changes: Sequence[Change]) -> None:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("topic", no_wrap=True)
    table.add_column("partitions", justify="right")
    table.add_column("settings", overflow="fold")
    for change in changes:
        if change.action is Action.KEEP:
            continue
        table.add_row(_MARKS[change.action], change.target.name, str(change.target.partitions), _differences(change))
    if table.row_count:
        console.stdout().print(table)
    for change in changes:
        if change.advice:
            console.warn(_capital(change.advice))


def _differences(change: Change) -> Text:
    if change.action is Action.CREATE:
        return _kept(change.target)
    text = Text()
    for item in change.differences:
        found, wanted = (_human(item.setting, value or console.NOTHING) for value in (item.found, item.wanted))
        text.append_text(
            Text.assemble("   " if text else "", (f"{item.setting} ", "dim"), (found, "red"), (" → ", "dim"), (wanted, "green"))
        )
    return text


def _kept(target: Target) -> Text:
    """Return what tells a new topic from the others."""
    retention = target.config.get("retention.ms")
    kept = f"kept {_human('retention.ms', retention)}" if retention else "compacted"
    replicas = f"{target.replication} replica{'' if target.replication == 1 else 's'}"
    return Text.assemble(
        (f"{kept:<10}", "" if retention else "cyan"), (f"  {replicas}, {target.config['min.insync.replicas']} in sync to write", "dim")
    )


def _human(setting: str, value: str) -> str:
    if not value.isdigit():
        return value
    number = int(value)
    if setting.endswith(".ms"):
        return f"{number // _DAY_MS} d" if number % _DAY_MS == 0 else f"{number / _HOUR_MS:g} h"
    if setting.endswith(".bytes") and number % _MEBIBYTE == 0:
        return f"{number // _MEBIBYTE} MiB"
    return value


def _summarise(changes: Sequence[Change], begun: dict[tuple[str, int], int], *, dry_run: bool, start_at: StartAt | None) -> None:
    counts = {action: sum(change.action is action for change in changes) for action in Action}
    would = "to be " if dry_run else ""
    parts = [
        f"{counts[Action.CREATE]} {would}created" if counts[Action.CREATE] else "",
        f"{counts[Action.ALTER]} {would}altered" if counts[Action.ALTER] else "",
        f"{counts[Action.KEEP]} as they should be" if counts[Action.KEEP] else "",
    ]
    console.succeed(f"{len(changes)} topics: {', '.join(part for part in parts if part)}")
    if start_at is None or dry_run:
        return
    if begun:
        console.succeed(f"ingest begins at the {start_at} record of {len(begun)} partitions")
    else:
        console.succeed("ingest has positions already; they stay")


def _document(changes: Sequence[Change], begun: dict[tuple[str, int], int], *, is_done: bool) -> dict[str, object]:
    return {
        "done": is_done,
        "topics": [
            {
                "topic": change.target.name,
                "action": change.action,
                "differences": [{"setting": item.setting, "found": item.found, "wanted": item.wanted} for item in change.differences],
                "problem": change.problem,
                "advice": change.advice,
            }
            for change in changes
        ],
        "started": [{"topic": topic, "partition": number, "offset": offset} for (topic, number), offset in sorted(begun.items())],
    }


def _capital(sentence: str) -> str:
    return f"{sentence[0].upper()}{sentence[1:].rstrip('.')}."
