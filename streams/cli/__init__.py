"""The command `notify`: publish, ask why, change preferences, look after topics and dead letters.

Data goes to stdout, with `--json` as one JSON document or as one line each; everything else goes to stderr. Exit codes: 0 done,
1 not or not wholly done, 2 wrong usage or settings.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from streams.cli import (
    console,
    dead,
    doctor,
    inbox,
    preferences,
    preview,
    produce,
    provision,
    rebuild,
    recall,
    receipts,
    segments,
    send,
    simulate,
    store,
    token,
    trail,
    up,
    watch,
    why,
)
from streams.cli.errors import explain

DISTRIBUTION = "flowmart-notifications"
INTERRUPTED_EXIT_CODE = 130
_TELL, _ASK, _RUN = "Tell", "Ask", "Run"


class Commands(TyperGroup):
    """Turns errors into sentences. With --traceback they stay what they are."""

    def invoke(self, ctx: Any) -> Any:
        """Invoke the command; whatever is foreseen to fail ends with its sentences on stderr."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            explained = explain(error)
            if explained is None or ctx.params.get("traceback"):
                raise
            sentences, exit_code = explained
            console.fail(sentences)
            raise typer.Exit(exit_code) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=console.examples(
        "notify produce payments payments.ndjson",
        "notify why cust_10482 evt_pp_a1b2c3d4-e5f6-7890-abcd-ef1234567890",
        "notify doctor",
    ),
)

# one row a command: name, function, epilog, panel in the help
for _name, _function, _epilog, _panel in (
    ("produce", produce.produce, produce.EPILOG, _TELL),
    ("send", send.send, send.EPILOG, _TELL),
    ("watch", watch.watch, watch.EPILOG, _TELL),
    ("suppress", recall.suppress, recall.SUPPRESS_EPILOG, _TELL),
    ("preview", preview.preview, preview.EPILOG, _ASK),
    ("segments", segments.segments, segments.EPILOG, _ASK),
    ("trail", trail.trail, trail.EPILOG, _ASK),
    ("why", why.why, why.EPILOG, _ASK),
    ("user", inbox.user, inbox.EPILOG, _ASK),
    ("token", token.token, token.EPILOG, _ASK),
    ("up", up.up, up.EPILOG, _RUN),
    ("simulate", simulate.simulate, simulate.EPILOG, _RUN),
    ("doctor", doctor.doctor, doctor.EPILOG, _RUN),
):
    app.command(_name, epilog=_epilog, rich_help_panel=_panel)(_function)
app.add_typer(preferences.app, name="prefs", rich_help_panel=_TELL)
app.add_typer(recall.app, name="recall", rich_help_panel=_TELL)
app.add_typer(receipts.app, name="receipts", rich_help_panel=_TELL)
app.add_typer(provision.app, name="topics", rich_help_panel=_RUN)
app.add_typer(dead.app, name="dlq", rich_help_panel=_ASK)
app.add_typer(store.app, name="store", rich_help_panel=_RUN)
app.add_typer(rebuild.app, name="rebuild", rich_help_panel=_RUN)


@app.callback()
def options(
    *,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from, for a bug report.")] = False,
    show_version: Annotated[
        bool,
        typer.Option("-V", "--version", help="Print the version.", is_eager=True, callback=lambda value: _print_version(is_asked=value)),
    ] = False,
) -> None:
    """FlowMart notifications: who hears what, when, through which channel, and why.

    The system is found by its NOTIFY_* variables, or else by a running [cyan]notify up[/cyan] of the same user.
    """
    del traceback, show_version


def main() -> None:
    """Run the command line."""
    try:
        app(prog_name="notify")
    except KeyboardInterrupt:  # before a command runs; Typer sees those that come later
        raise SystemExit(INTERRUPTED_EXIT_CODE) from None


def _print_version(*, is_asked: bool) -> None:
    if not is_asked:
        return
    try:
        number = version(DISTRIBUTION)
    except PackageNotFoundError:  # run from a checkout that is not installed
        number = "unknown"
    sys.stdout.write(f"notify {number}\n")
    raise typer.Exit
