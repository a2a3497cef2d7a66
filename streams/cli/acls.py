"""`notify topics acls`: what each role may do in Kafka and no more, as a table, as JSON, or as options of kafka-acls."""

from __future__ import annotations

import os
from itertools import groupby
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from streams.cli import console
from streams.cli.context import load_settings
from streams.cli.errors import EXIT_SETTINGS, CliError
from streams.rights import OPERATOR, Right, rights_of, rights_of_operator
from streams.roles import Role

EPILOG = console.examples(
    "notify topics acls --role router",
    "notify topics acls --role router --commands | xargs -L1 kafka-acls --bootstrap-server kafka-1:9092",
    "notify topics acls --json",
)


def acls(
    *,
    role: Annotated[str | None, typer.Option(help=f"One of {', '.join(Role)}, or {OPERATOR}: who runs this command line.")] = None,
    commands: Annotated[
        bool, typer.Option("--commands", help="Print the options of kafka-acls that give the rights, a right a line.")
    ] = False,
    principal: Annotated[str | None, typer.Option(help="Who gets them, with --commands.", show_default="User:notify-{role}")] = None,
    as_json: console.JsonOption = False,
) -> None:
    """List the rights that each role needs, and no others. Asks no cluster; the environment is NOTIFY_ENV."""
    settings, _ = load_settings({"NOTIFY_ENV": "dev", **os.environ}, needs=frozenset())
    names = [*map(str, Role), OPERATOR]
    if role is not None and role not in names:
        raise CliError(f"{role!r} is no role; there are {', '.join(names)}.", exit_code=EXIT_SETTINGS)
    found = {name: rights_for(name, settings.env) for name in names if role in {None, name}}
    if as_json:
        console.print_document(
            {"environment": settings.env, "roles": {name: [_document(right) for right in rights] for name, rights in found.items()}}
        )
    elif commands:
        for name, rights in found.items():
            for right in rights:
                typer.echo(right.command(principal or f"User:notify-{name}"))
    else:
        console.stdout().print(_table(found))


def rights_for(name: str, env: str) -> list[Right]:
    """Return the rights of a role, or of the operator."""
    return rights_of_operator(env) if name == OPERATOR else rights_of(Role(name), env)


def _table(found: dict[str, list[Right]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for head in ("role", "on", "name", "may"):
        table.add_column(head, no_wrap=head != "may")
    for role, rights in found.items():
        shown = role
        for (kind, name, is_prefix), same in groupby(
            sorted(rights, key=lambda right: (right.kind, right.name)), lambda right: (right.kind, right.name, right.is_prefix)
        ):
            table.add_row(shown, kind.words, f"{name}{'*' if is_prefix else ''}", ", ".join(right.operation for right in same))
            shown = ""
    return table


def _document(right: Right) -> dict[str, object]:
    pattern = "prefixed" if right.is_prefix else "literal"
    return {"resource": right.kind, "name": right.name, "pattern": pattern, "operation": right.operation}
