"""`python -m benchmarks [--only 1,3] [--quick]`: measure, then write docs/performance.md."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import email, growth, latency, machine, pipeline, profiling, push, recovery, report, scaling, sms, state, throughput
from benchmarks.laboratory import BenchmarkError, Laboratory, laboratory
from benchmarks.sizes import QUICK, Sizes

Say = Callable[[str], None]
Measure = Callable[[Laboratory, Sizes, Say], dict[str, Any]]
# those that run in the product's own environment: a smoke test installs nothing
_OWN_PEERS = ",".join(peer.name for peer in throughput.PEERS if peer.lock is None)
_ALL_PEERS = ",".join(peer.name for peer in throughput.PEERS)


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(  # noqa: PLR0913 - one parameter an option
    *,
    only: Annotated[str, typer.Option(metavar="NAMES", help=f"Which benchmarks, by comma: {', '.join(report.SECTIONS)}.")] = ",".join(
        report.SECTIONS
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: a smoke test. Writes no page unless --page says where.")] = False,
    repetitions: Annotated[int | None, typer.Option(min=1, help="How often each is measured; default 3, with --quick 1.")] = None,
    peers: Annotated[str | None, typer.Option(metavar="NAMES", help=f"Peers of benchmark 1, by comma: {_ALL_PEERS}.")] = None,
    results: Annotated[Path | None, typer.Option(help="Where the raw figures go; default benchmarks/results/latest.json.")] = None,
    page: Annotated[Path | None, typer.Option(help="Where the page goes; default docs/performance.md.")] = None,
    render: Annotated[bool, typer.Option("--render", help="Measure nothing, write the page from the raw figures.")] = False,
) -> None:
    """Measure and write the page. Starts its own Kafka on free ports, in a temporary folder."""
    raw = results or (None if quick else report.RESULTS)
    target = page or (None if quick else report.REPORT)
    if not render:
        sizes = QUICK if quick else Sizes()
        if repetitions is not None:
            sizes = dataclasses.replace(sizes, repetitions=repetitions)
        names = _names("--only", only, report.SECTIONS)
        chosen = _names("--peers", peers or (_OWN_PEERS if quick else _ALL_PEERS), [peer.name for peer in throughput.PEERS])
        _measure(names, chosen, sizes, raw)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(report.render(report.load(raw)), "utf-8")
        print(f"written: {target.name}")
        if target == report.REPORT and scaling.write(report.REPORT.with_name("scaling.md"), report.load(raw)):
            print("written: scaling.md")


def _measure(names: list[str], peers: list[str], sizes: Sizes, raw: Path | None) -> None:
    measures: dict[str, Measure] = {
        "1": partial(throughput.measure, names=peers),
        "2": pipeline.measure,
        "3": recovery.measure,
        "4": latency.measure,
        "5": growth.measure,
        "6": state.measure,
        "7": lambda lab, sizes, say: email.measure(lab, sizes.mails, sizes.repetitions, tuple(email.PROGRAMS), say),
        "8": lambda _lab, sizes, say: sms.measure(sizes.provider_messages, sizes.repetitions, say),
        "9": lambda _lab, sizes, say: push.measure(sizes.provider_messages, sizes.repetitions, say),
        "profile": profiling.measure,
    }
    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    began = time.monotonic()
    say: Say = lambda text: print(f"{time.monotonic() - began:6.0f} s  {text}", flush=True)  # noqa: E731 - one line
    try:
        with laboratory(say) as lab:
            for number, name in enumerate(names, 1):
                title, describe = report.SECTIONS[name]
                say(f"[{number}/{len(names)}] {title}")
                found = measures[name](lab, sizes, say)
                describe(found)  # figures that cannot be shown are none
                report.store(raw, name, {"command": command, "machine": machine.facts(), "result": found})
    except BenchmarkError as error:
        print(f"failed: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    say("done")


def _names(option: str, text: str, known: Any) -> list[str]:
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise typer.BadParameter(f"{', '.join(unknown) or 'nothing'} is none of {', '.join(known)}", param_hint=option)
    return [name for name in known if name in wanted]


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
