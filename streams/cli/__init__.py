"""The command `notify`: publish, ask why, change preferences, look after topics and dead letters.

Data goes to stdout, with `--json` as one JSON document or as one line each; everything else goes to stderr. Exit codes: 0 done,
1 not or not wholly done, 2 wrong usage or settings.
"""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from typing import Annotated, Any, Final, NamedTuple

import typer
from typer.core import TyperGroup

from streams.cli import console
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


class Command(NamedTuple):
    """A command and where it is: a function of a module, or, without one, the module's commands as its own."""

    module: str
    panel: str
    function: str | None = None
    epilog: str = "EPILOG"


COMMANDS: Final = {
    "produce": Command("produce", _TELL, "produce"),
    "send": Command("send", _TELL, "send"),
    "watch": Command("watch", _TELL, "watch"),
    "suppress": Command("recall", _TELL, "suppress", "SUPPRESS_EPILOG"),
    "preview": Command("preview", _ASK, "preview"),
    "segments": Command("segments", _ASK, "segments"),
    "trail": Command("trail", _ASK, "trail"),
    "why": Command("why", _ASK, "why"),
    "user": Command("inbox", _ASK, "user"),
    "token": Command("token", _ASK, "token"),
    "up": Command("up", _RUN, "up"),
    "simulate": Command("simulate", _RUN, "simulate"),
    "doctor": Command("doctor", _RUN, "doctor"),
    "prefs": Command("preferences", _TELL),
    "recall": Command("recall", _TELL),
    "receipts": Command("receipts", _TELL),
    "topics": Command("provision", _RUN),
    "dlq": Command("dead", _ASK),
    "store": Command("store", _RUN),
    "rebuild": Command("rebuild", _RUN),
}


def build(name: str | None = None) -> typer.Typer:
    """Return the commands, with the one of this `name` alone if there is one: to import all takes twice as long as most run."""
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
    app.callback()(options)
    for each in [name] if name in COMMANDS else COMMANDS:
        command = COMMANDS[each]
        module = import_module(f"{__name__}.{command.module}")
        if command.function is None:
            app.add_typer(module.app, name=each, rich_help_panel=command.panel)
        else:
            epilog = getattr(module, command.epilog)
            app.command(each, epilog=epilog, rich_help_panel=command.panel)(getattr(module, command.function))
    return app


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
        name = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
        gc.disable()  # nothing that is imported is garbage
        app = build(name)
        gc.enable()
        app(prog_name="notify")
    except KeyboardInterrupt:  # before a command runs; Typer sees those that come later
        raise SystemExit(INTERRUPTED_EXIT_CODE) from None


def _print_version(*, is_asked: bool) -> None:
    if not is_asked:
        return
    from importlib.metadata import PackageNotFoundError, version  # a tenth of a second, for one option

    try:
        number = version(DISTRIBUTION)
    except PackageNotFoundError:  # run from a checkout that is not installed
        number = "unknown"
    sys.stdout.write(f"notify {number}\n")
    raise typer.Exit
