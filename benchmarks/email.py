"""Mails a second: ours against its peers on the same sink, `python -m benchmarks.email [--mails 6000] [--repetitions 3]`.

Each program composes and sends the same mails (headers, text and HTML, no attachment), alone on its core; the sink, in a
process of its own on the others, takes them faster than any of them sends and notes when it accepted each. A run counts from
its first mail accepted to its last; an incomplete one, or one with a mail twice, is no figure.

| program     | what it is                                                                                       |
|-------------|--------------------------------------------------------------------------------------------------|
| topic       | a sender, end to end: sealed deliveries on Kafka, intents and outcomes in transactions           |
| ours        | `channels.email` alone, 32 calls at once                                                         |
| signed      | the same with DKIM, RSA of 2048 bits                                                             |
| pool        | EmailMessage, and 32 kept connections of aiosmtplib on uvloop                                    |
| pool-signed | the same, signed by dkimpy                                                                       |
| celery      | a Celery task a mail, prefork: EmailMessage and smtplib, a connection that each process keeps    |
| celery-new  | the same with a connection a mail, as Django's backend does it                                   |

Celery's broker is in the memory of the worker that asks it, which costs less than any other; its tasks are queued before it
starts.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import smtplib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import format_datetime
from pathlib import Path
from typing import Annotated, Any, Final

import aiosmtplib
import dkim
import typer
import uvloop
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from benchmarks.clients import a_delivery
from benchmarks.figures import figure, ratio, table, tenth, times, verdict, whole
from benchmarks.laboratory import PYTHON, ROOT, BenchmarkError, Cores, Laboratory, laboratory, wait_for
from benchmarks.system import accepted_by, is_listening, system
from channels.config import smtp_provider
from channels.dkim import Signer
from channels.email import EmailChannel, server_of
from channels.mime import Letterhead, parse_sender
from schemas.messages import Content
from schemas.status import Status
from streams.embedded.processes import choose_port
from streams.roles import Role

TITLE: Final = "E-mail: mails a second to a sink"
OURS: Final = "ours"
TOPIC: Final = "topic"
AT_ONCE: Final = 32
# of the sender: a call's place is free again when its end is in Kafka, and not when the server has answered
OPEN: Final = 1_000
USERS: Final = 1_000
_TOPIC_SECONDS: Final = 300.0
WARM_UP: Final = 200
SENDER: Final = "FlowMart <no-reply@flowmart.example>"
_NOW: Final = datetime.now(UTC)
_TEXT: Final = "Hello Ann,\n\nwe received your payment of 149.99 EUR for order 10482.\n\nThank you for shopping with FlowMart.\n"
_HTML: Final = """<!doctype html>
<html><body style="font-family: sans-serif; color: #222222">
<h1 style="font-size: 20px">Payment received</h1>
<p>Hello Ann,</p>
<p>we received your payment of <strong>149,99 €</strong> for order <a href="https://flowmart.example/orders/10482">10482</a>.</p>
<table><tr><td>Order</td><td>10482</td></tr><tr><td>Amount</td><td>149,99 €</td></tr></table>
<p>Thank you for shopping with FlowMart.</p>
</body></html>
"""


def a_content(number: int) -> Content:
    return Content(
        address=f"ann{number}@example.com", name="Ann Müller", subject=f"Payment of 149,99 € received, {number}", text=_TEXT, html=_HTML
    )


# ---- programs: each sends mails 0 to `mails` - 1 to the sink at `port`


async def _at_once(mails: int, send: Callable[[Iterator[int]], Any]) -> None:
    numbers = iter(range(mails))
    await asyncio.gather(*(send(numbers) for _ in range(AT_ONCE)))


def ours(port: int, mails: int, *, key: bytes | None = None) -> None:
    """Send through our channel."""

    async def run() -> None:
        letterhead = Letterhead(parse_sender(SENDER), signer=Signer("flowmart.example", "s1", key) if key else None)
        channel = EmailChannel(server_of(smtp_provider(f"smtp://127.0.0.1:{port}")), letterhead, max_open=AT_ONCE)
        await channel.open()

        async def send(numbers: Iterator[int]) -> None:
            for number in numbers:
                await channel.send(a_delivery("email", number), a_content(number))

        await _at_once(mails, send)
        await channel.close()

    uvloop.run(run())


def an_email_message(number: int) -> EmailMessage:
    """Return the same mail as the standard library makes it."""
    delivery, content = a_delivery("email", number), a_content(number)
    mail = EmailMessage()
    mail["From"] = SENDER
    mail["To"] = f"{content.name} <{content.address}>"
    mail["Subject"] = content.subject
    mail["Date"] = format_datetime(datetime.now(UTC))
    mail["Message-ID"] = f"<{delivery.delivery_id}.0@flowmart.example>"
    mail["X-Notify-Delivery"] = delivery.delivery_id
    mail["X-Notify-Notification"] = delivery.notification_id
    mail["Auto-Submitted"] = "auto-generated"
    mail.set_content(content.text or "")
    mail.add_alternative(content.html or "", subtype="html")
    return mail


def pool(port: int, mails: int, *, key: bytes | None = None) -> None:
    """Send through kept connections of aiosmtplib."""

    async def send(numbers: Iterator[int]) -> None:
        async with aiosmtplib.SMTP(hostname="127.0.0.1", port=port, start_tls=False) as smtp:
            for number in numbers:
                mail = an_email_message(number)
                if key is None:
                    await smtp.send_message(mail)
                    continue
                raw = mail.as_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
                raw = dkim.sign(raw, b"s1", b"flowmart.example", key, canonicalize=(b"relaxed", b"relaxed")) + raw
                await smtp.sendmail("no-reply@flowmart.example", [f"ann{number}@example.com"], raw)

    uvloop.run(_at_once(mails, send))


def celery(port: int, mails: int, *, is_kept: bool) -> None:
    """Send by Celery tasks."""
    from celery import Celery

    app = Celery("mails", broker="memory://")
    app.conf.update(worker_prefetch_multiplier=64, task_ignore_result=True, worker_hijack_root_logger=False, worker_send_task_events=False)
    kept: list[smtplib.SMTP] = []

    @app.task(name="send")  # type: ignore[untyped-decorator]  # Celery has no types
    def send(number: int) -> None:
        if is_kept:
            if not kept:
                kept.append(smtplib.SMTP("127.0.0.1", port))
            kept[0].send_message(an_email_message(number))
            return
        with smtplib.SMTP("127.0.0.1", port) as smtp:
            smtp.send_message(an_email_message(number))

    for number in range(mails):
        send.delay(number)
    # a process a core that it has, as Celery does by itself
    app.Worker(
        pool_cls="prefork", concurrency=len(os.sched_getaffinity(0)), loglevel="ERROR", without_mingle=True, without_gossip=True
    ).start()


def _private_key() -> bytes:
    key = rsa.generate_private_key(65_537, 2_048)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())


@dataclass(frozen=True, slots=True)
class Program:
    """What is measured. `run` None: it needs Kafka. `share`: of the mails, of what is slow; `target`: how many times it `against` does."""

    label: str
    run: Callable[[int, int], None] | None
    share: float = 1.0
    target: float | None = None
    against: str | None = TOPIC


PROGRAMS: Final[dict[str, Program]] = {
    TOPIC: Program("a sender, from the delivery topic on", None, against=None),
    OURS: Program("our channel alone, 32 calls at once", ours),
    "pool": Program("EmailMessage, pool of aiosmtplib", pool, share=0.25, target=8.0),
    "celery": Program("Celery, a connection kept", lambda port, mails: celery(port, mails, is_kept=True), share=0.25, target=20.0),
    "celery-new": Program("Celery, a connection a mail", lambda port, mails: celery(port, mails, is_kept=False), share=0.25, target=20.0),
    "signed": Program("our channel, signed (RSA 2048)", lambda port, mails: ours(port, mails, key=_private_key()), share=0.5, against=None),
    "pool-signed": Program(
        "EmailMessage, pool, signed by dkimpy", lambda port, mails: pool(port, mails, key=_private_key()), share=0.1, against="signed"
    ),
}


# ---- measuring


@contextmanager
def sink(cores: Cores) -> Iterator[tuple[int, int]]:
    """Run a sink off the program's core; yield its port, and the one that tells what it accepted."""
    smtp = choose_port()
    ask = choose_port(taken=[smtp])
    command = [PYTHON, "-m", "benchmarks.sink", str(smtp), str(ask)]
    if cores.broker is not None:
        command = ["taskset", "-c", ",".join(map(str, sorted(cores.broker))), *command]
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            wait_for(lambda: is_listening(ask), seconds=30, what="the sink listens")
            yield smtp, ask
        finally:
            process.kill()


def run(lab: Laboratory, name: str, mails: int) -> dict[str, float]:
    """Run a program once. Returns mails a second, and CPU microseconds a mail of all its processes."""
    program = PROGRAMS[name]
    at, spent = _from_topic(lab, mails) if program.run is None else _alone(lab.cores, name, mails)
    if len(at) != mails:
        raise BenchmarkError(f"{name} sent {len(at)} of {mails} mails")
    first = WARM_UP if mails > 2 * WARM_UP else 0
    return {"mails_per_second": (len(at) - 1 - first) / (at[-1] - at[first]), "cpu_us_per_mail": spent / mails * 1e6}


def _from_topic(lab: Laboratory, mails: int) -> tuple[list[float], float]:
    """Let a sender work a backlog off. Returns when each mail was accepted, in order, and the sender's CPU seconds."""
    with system(lab) as running, lab.broker_apart():
        lab.cores.keep_off(running.sink.process.pid)
        running.load_mails(
            (replace(a_delivery("email", number), user_id=f"u-{number % USERS}"), a_content(number)) for number in range(mails)
        )
        running.start(Role.SENDER_NORMAL, is_pinned=True, NOTIFY_MAX_OPEN_ATTEMPTS=str(OPEN))
        sender = running.workers[Role.SENDER_NORMAL]
        wait_for(
            # that the outcomes are recorded is part of the work
            lambda: sender.metric("notify_deliveries_total", outcome=Status.SENT) >= mails,
            seconds=_TOPIC_SECONDS,
            what=f"the sender has sent {mails} mails",
            every_seconds=0.5,
        )
        return sorted(running.accepted().values()), sender.cpu_seconds()


def _alone(cores: Cores, name: str, mails: int) -> tuple[list[float], float]:
    """Run a program that needs nothing but the sink. Returns when each mail was accepted, in order, and its CPU seconds."""
    with sink(cores) as (port, ask), tempfile.TemporaryFile() as log:
        command = cores.pinned([PYTHON, "-W", "ignore", "-m", "benchmarks.email", "--as", name, "--port", str(port), "--mails", str(mails)])
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log) as process:
            try:
                wait_for(
                    lambda: len(accepted_by(ask)) >= mails or process.poll() is not None,
                    seconds=60 + mails / 20,
                    what=f"{name} has sent {mails} mails",
                    every_seconds=1.0,
                )
            finally:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                if process.poll() is None:
                    process.kill()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        at = sorted(accepted_by(ask).values())
        if len(at) != mails:
            log.seek(0)
            raise BenchmarkError(f"{name} sent {len(at)} of {mails} mails:\n{log.read()[-2000:].decode()}")
    return at, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(
    lab: Laboratory, mails: int, repetitions: int, names: Sequence[str], say: Callable[[str], None]
) -> dict[str, list[dict[str, float]]]:
    """Run each program once a repetition, in rotating order."""
    if TOPIC in names:
        run(lab, TOPIC, mails)  # for practice: a broker that has just started compiles its code first
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for repetition in range(repetitions):
        turn = repetition % len(names)
        for name in [*names[turn:], *names[:turn]]:
            found[name].append(run(lab, name, max(WARM_UP, int(mails * PROGRAMS[name].share))))
            say(f"{repetition + 1}/{repetitions} {PROGRAMS[name].label}: {found[name][-1]['mails_per_second']:,.0f} mails/s")
    return found


def describe(found: dict[str, list[dict[str, float]]]) -> str:
    """Return the figures as a table."""
    rates = {name: [each["mails_per_second"] for each in runs] for name, runs in found.items()}
    rows = []
    for name, runs in found.items():
        program = PROGRAMS[name]
        compared = ratio(rates[program.against], rates[name]) if program.against in rates else None
        rows.append(
            [
                program.label,
                figure(rates[name]).show(whole),
                figure([each["cpu_us_per_mail"] for each in runs]).show(tenth),
                compared.show(times) if compared else "",
                f"≥ {times(program.target)}" if program.target else "",
                verdict(is_met=compared.median >= program.target) if compared and program.target else "",
            ]
        )
    return table(["program", "mails/s", "CPU µs/mail, start included", "ours ÷ it", "target", ""], rows)


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(  # noqa: PLR0913 - one parameter an option
    *,
    mails: Annotated[int, typer.Option(help="Of ours; the slower programs send fewer.")] = 20_000,
    repetitions: Annotated[int, typer.Option(help="How often each is measured.")] = 3,
    only: Annotated[str, typer.Option(help=f"Which, by comma: {', '.join(PROGRAMS)}.")] = ",".join(PROGRAMS),
    results: Annotated[Path | None, typer.Option(help="Where the raw figures go.")] = None,
    program: Annotated[str | None, typer.Option("--as", hidden=True)] = None,
    port: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Measure, and print a table."""
    if program is not None:
        alone = PROGRAMS[program].run
        assert alone is not None
        alone(port, mails)
        return
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", flush=True)

    with laboratory(say) as lab:
        found = measure(lab, mails, repetitions, only.split(","), say)
    if results is not None:
        results.write_text(json.dumps(found) + "\n", "utf-8")
    print(f"\n# {TITLE}\n\n{describe(found)}")


if __name__ == "__main__":
    sys.exit(app(prog_name="python -m benchmarks.email"))
