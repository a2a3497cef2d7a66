"""`notify user`: what a user finds in the inbox, and how he is forgotten."""

from __future__ import annotations

import os
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from schemas.status import Engagement
from streams.cli import console, web
from streams.cli.context import load_settings
from streams.cli.forget import forget

MAX_LIMIT = 200
SHOWN_CHARACTERS = 160
EPILOG = console.examples(
    "notify user cust_10482", "notify user cust_10482 --unread --limit 5", "notify user cust_10482 --json", "notify user cust_10482 forget"
)


class Action(StrEnum):
    """What is to be done about the user."""

    FORGET = "forget"


def user(  # noqa: PLR0913 - one parameter an option
    user_id: Annotated[str, typer.Argument(metavar="ID", help="The user id.")],
    action: Annotated[
        Action | None,
        typer.Argument(metavar="[forget]", help="Destroy his key and delete his rows: what was sealed for him is erased everywhere."),
    ] = None,
    *,
    unread: Annotated[bool, typer.Option("--unread", help="Only what has not been read.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=MAX_LIMIT, help="At most so many, newest first.")] = 20,
    yes: Annotated[bool, typer.Option("--yes", help="With forget: do not ask whether it is meant.")] = False,
    as_json: console.JsonOption = False,
) -> None:
    """Show a user's inbox, newest first; with [cyan]forget[/cyan] erase him instead. With --json the answer of the web as it is."""
    if action is Action.FORGET:
        forget(user_id, is_meant=yes, as_json=as_json)
        return
    settings, web_url = load_settings(os.environ, needs=web.NEEDS)
    path = f"/users/{quote(user_id, safe='')}/notifications?limit={limit}&status={'unread' if unread else 'all'}"
    document = web.get(web_url, settings.token_key, path, missing="The web has no such page. Is it the web of a views worker?")
    if as_json:
        console.print_document(document)
        return
    notifications: list[dict[str, Any]] = document["notifications"]
    if not notifications:
        console.succeed(f"{console.safe(user_id)} has no {'unread ' if unread else ''}notifications")
        return
    console.stdout().print(_table(notifications))


def _table(notifications: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    table.add_column("")
    table.add_column("created", no_wrap=True)
    table.add_column("title", overflow="fold")
    table.add_column("message", overflow="fold", min_width=24)
    table.add_column("id", no_wrap=True, style="dim")
    for item in notifications:
        is_unread = item["status"] == Engagement.UNREAD
        created = datetime.fromisoformat(item["createdAt"]).astimezone()
        table.add_row(
            Text("●", style="cyan") if is_unread else Text("○", style="dim"),
            f"{created:%Y-%m-%d %H:%M}",
            console.cell(item["title"], "bold" if is_unread else ""),
            console.cell(_short(" ".join(str(item["message"]).split()))),
            console.cell(item["notificationId"]),
        )
    return table


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"
