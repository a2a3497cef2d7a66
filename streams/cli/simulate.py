"""`notify simulate`: a provider on this machine that speaks the real protocol, and fails when told to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.live import Live
from rich.table import Table
from rich.text import Text

from channels.simulators import PROTOCOLS
from channels.simulators.script import Script, parse_script
from channels.simulators.smtp import SmtpSimulator, relay
from streams.cli import console
from streams.cli.errors import CliError

if TYPE_CHECKING:
    from channels.simulators.registry import Simulator

EPILOG = console.examples(
    "notify simulate smtp",
    'notify simulate smpp --port 2775 --script "latency=0.2 throttle=0.1 receipts_delay=2 receipts_lost=0.05"',
    "notify simulate fcm --folder credentials",
    "notify simulate webhook --folder subscriber",
)
_LOOK_SECONDS = 0.5

Protocol = StrEnum("Protocol", {name: name for name in PROTOCOLS})  # type: ignore[misc]  # made of the table, so that it is one


def simulate(  # noqa: PLR0913 - one parameter an option
    *,
    protocol: Annotated[Protocol, typer.Argument(help="What it speaks.")],
    port: Annotated[int | None, typer.Option(min=0, max=65_535, help="Where it listens on 127.0.0.1; 0: any.")] = None,
    script: Annotated[str, typer.Option(metavar="TEXT", help="How it fails, such as `latency=0.2 refuse=0.1`.")] = "",
    seed: Annotated[int, typer.Option(help="The same seed fails the same way.")] = 0,
    folder: Annotated[
        Path | None, typer.Option(metavar="D", help="Where the credentials are made that a client needs; default: a temporary folder.")
    ] = None,
    bounces_to: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="The mail server that smtp hands bounces and complaints to; default: none come.")
    ] = None,
) -> None:
    """Run a simulated provider, or a subscriber of status changes, until Ctrl-C, and print how to configure it.

    Whatever the script says, magic recipients always do the same: deliver@, bounce@, refuse@, throttle@, timeout@ and complain@ any
    domain; numbers that end with 000001 to 000006; tokens and endpoints that end with magic-deliver, magic-bounce and so on.
    """
    from channels.simulators.registry import build_simulator

    try:
        wanted = parse_script(script)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--script") from None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    made = build_simulator(protocol, script=wanted, port=port, folder=folder, seed=seed)
    if bounces_to is not None:
        host, _, number = bounces_to.rpartition(":")
        if not isinstance(made, SmtpSimulator) or not host or not number.isdigit():
            raise typer.BadParameter("is HOST:PORT, and for smtp only", param_hint="--bounces-to")
        made.on_report = relay(host, int(number))
    asyncio.run(_run(protocol, made, wanted))


async def _run(name: str, made: Simulator, script: Script) -> None:
    from channels.simulators.webhook import WebhookSimulator

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        async with made:
            sys.stdout.write(f"{made.url}\n")
            sys.stdout.flush()
            out = console.stderr()
            entry = (
                f"NOTIFY_WEBHOOKS_FILE={made.file} subscribes it"
                if isinstance(made, WebhookSimulator)
                else "the line above is an entry of NOTIFY_PROVIDERS"
            )
            out.print(Text(f"{name} on 127.0.0.1:{made.port}; {entry}. Ctrl-C stops.", style="dim"))
            shown = " ".join(f"{key}={value:g}" for key, value in _changed(script).items())
            if shown:
                out.print(Text(f"script: {shown}", style="dim"))
            with Live(console=out, refresh_per_second=4, transient=True) if out.is_terminal else contextlib.nullcontext() as live:
                while not stop.is_set():
                    if live is not None:
                        live.update(_table(made))
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(stop.wait(), _LOOK_SECONDS)
            out.print(Text(f"{len(made.calls)} calls, {len(made.messages)} messages accepted", style="dim"))
    except OSError as error:
        raise CliError(f"{name} cannot listen: {os.strerror(error.errno or 0)}. --port N takes another port, --port 0 any.") from error


def _changed(script: Script) -> dict[str, float]:
    usual = Script()
    return {name: getattr(script, name) for name in Script.__dataclass_fields__ if getattr(script, name) != getattr(usual, name)}


def _table(made: Simulator) -> Table:
    now = asyncio.get_running_loop().time()
    lately = sum(1 for at in reversed(made.calls) if at > now - 1)
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_row("calls", f"{len(made.calls)}")
    table.add_row("accepted", f"{len(made.messages)}")
    table.add_row("in the last second", f"{lately}")
    return table
