"""`notify receipts load`: what providers reported later, from a file, as their webhooks would tell it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated

import typer
from rich.text import Text

from agents.receipts import REPORTED, plain_code, report_key
from schemas import topics
from schemas.codec import frame, own_schema, schema_text
from schemas.errors import InvalidEventError
from schemas.ids import digest
from schemas.status import Suppression
from streams.cli import console, records
from streams.cli.context import load_settings
from streams.cli.errors import EXIT_FAILURE
from streams.cli.kafka import Publisher, partition_count
from streams.cli.lines import Lines
from streams.cli.wire import Wire
from streams.topics import physical

NEEDS = frozenset({"NOTIFY_KAFKA_BOOTSTRAP", "NOTIFY_REGISTRY_URL"})
MESSAGE = "DeliveryReport"

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="What providers reported on deliveries after they took them over.")


@app.callback()
def receipts() -> None:
    """Look after what providers reported on deliveries after they took them over."""


@app.command("load", epilog=console.examples("notify receipts load reports.ndjson", "cat reports.ndjson | notify receipts load - --json"))
def load(
    file: Annotated[str, typer.Argument(metavar="FILE", help="NDJSON, one report a line; - is stdin.")],
    *,
    as_json: console.JsonOption = False,
) -> None:
    """Publish reports: provider, reference, status (delivered, bounced, failed, expired), at; code and reportId if known.

    `suppresses` (hard_bounce, complaint, unsubscribed, dead_token) says besides that nothing more may be sent to the address.

    The reference is what the provider knows the delivery by: for e-mail the Message-ID without its brackets. A report on what
    was not sent yet waits for it, for three days. A bad line is reported by its number and the rest goes on; the exit code
    is then 1.
    """
    settings, _ = load_settings(os.environ, needs=NEEDS)
    topic = physical(settings.env, topics.RECEIPTS)
    with Lines(file) as lines, Wire(settings) as wire:
        partition_count(settings.cluster, topic)
        schema_id = wire.register(f"{topic}-value", schema_text(MESSAGE))
        publisher = Publisher(settings.cluster)
        with console.progress(f"publishing to {topic}", lines.total_bytes) as advance:
            for number, value in lines.objects(advance):
                try:
                    record = to_record(value)
                except InvalidEventError as error:
                    lines.reject(number, str(error))
                    continue
                key = report_key(str(record["provider"]), str(record["reference"])).decode()
                publisher.publish(topic, key, frame(schema_id, own_schema(MESSAGE), record), number=number)
            publisher.finish()
        for number, problem in publisher.failures:
            lines.reject(number, problem)
    if as_json:
        summary = {"topic": topic, "published": publisher.delivered, "badLines": lines.bad_lines, "problems": lines.problems_as_json()}
        console.print_document(summary)
    else:
        console.succeed(Text.assemble((f"{publisher.delivered:,}", "bold"), f" published to {topic}"))
    if lines.bad_lines:
        raise typer.Exit(EXIT_FAILURE)


def to_record(value: Mapping[str, object]) -> dict[str, object]:
    """Return a report, as JSON has it, as a record; without an id it gets one of its content. Raises InvalidEventError.

    What looks like an address in its code is left out: nothing in Kafka holds one that erasure does not reach.
    """
    if isinstance(code := value.get("code"), str):
        value = {**value, "code": plain_code(code)}
    text = digest(*(f"{name}={value[name]}" for name in sorted(value)), size=12)
    record = records.to_record(MESSAGE, {"reportId": text, **value})
    for name in ("provider", "reference"):
        if not record[name]:
            raise InvalidEventError(name, "is empty")
    if record["status"] not in REPORTED:
        raise InvalidEventError("status", f"is none of {', '.join(sorted(REPORTED))}")
    if record["suppresses"] is not None and record["suppresses"] not in set(Suppression):
        raise InvalidEventError("suppresses", f"is none of {', '.join(sorted(Suppression))}")
    return record
