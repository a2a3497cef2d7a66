"""`notify token`: a bearer token for the web, for a user or for a service."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from streams.cli import console
from streams.cli.context import load_settings
from streams.cli.spans import seconds_of
from streams.tokens import issue

NEEDS = frozenset({"NOTIFY_TOKEN_KEY"})
EPILOG = console.examples(
    "notify token --user cust_10482 --lifetime 12h",
    "notify token --service orders --lifetime 7d",
    'curl -H "Authorization: Bearer $(notify token)" http://127.0.0.1:6066/users/cust_10482/notifications',
)


def token(
    *,
    user: Annotated[str | None, typer.Option(help="Who the token names; without it the token is a service's and sees every user.")] = None,
    service: Annotated[
        str | None, typer.Option(metavar="NAME", help="Names the service: what it asks for is told apart by it, and limited by itself.")
    ] = None,
    lifetime: Annotated[str, typer.Option(metavar="SPAN", help="How long it holds, such as 90s, 15m, 12h or 7d.")] = "1h",
) -> None:
    """Print a bearer token, and nothing else."""
    if user is not None and not user.strip():
        raise typer.BadParameter("is empty; leave it out for a service's token", param_hint="--user")
    lifetime_seconds = seconds_of(lifetime, "--lifetime")
    settings, _ = load_settings(os.environ, needs=NEEDS)
    try:
        made = issue(settings.token_key, user_id=user, service=service, lifetime_seconds=lifetime_seconds)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--service") from error
    sys.stdout.write(f"{made}\n")
