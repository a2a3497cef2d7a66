"""`notify produce`: NDJSON to Avro to Kafka, as the services that publish to us would do it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Annotated

import typer
from rich.text import Text

from schemas import producing, topics
from schemas.codec import frame, own_schema, schema_text
from schemas.errors import InvalidEventError
from schemas.producing import ForeignSchema
from streams.cli import console, records
from streams.cli.context import load_settings
from streams.cli.errors import EXIT_FAILURE, CliError
from streams.cli.kafka import Publisher, partition_count
from streams.cli.lines import Lines
from streams.cli.wire import Wire
from streams.settings import Settings
from streams.topics import TopicSpec, physical, specs

NEEDS = frozenset({"NOTIFY_KAFKA_BOOTSTRAP", "NOTIFY_REGISTRY_URL"})
# topics that others may write to; of all the rest, a role is the only writer
PUBLIC = frozenset(
    {
        topics.PAYMENTS,
        topics.INVENTORY,
        topics.PRODUCTS,
        topics.USER_ACTIONS,
        topics.COMMANDS,
        topics.SIGNALS,
        *(topics.requests(lane) for lane in topics.Lane),
    }
)
ALIASES = {"actions": topics.USER_ACTIONS}
# what the record of a neighbour's event is keyed by: the first of these that it has
KEYS: Mapping[str, tuple[str, ...]] = {
    topics.PAYMENTS: ("paymentId", "payment_id", "id", "transactionId", "eventId"),
    topics.INVENTORY: ("productId", "product_id", "sku", "eventId", "event_id"),
}

# an object -> key and value of its record; raises InvalidEventError
Encode = Callable[[Mapping[str, object]], tuple[str, bytes]]

EPILOG = console.examples(
    "notify produce payments payments.ndjson",
    "cat payments.ndjson | notify produce payments.dev.events -",
    "notify produce inventory schemas/samples/inventory.ndjson",
    "notify produce requests.normal requests.ndjson --json",
)


def produce(
    topic: Annotated[
        str,
        typer.Argument(
            metavar="TOPIC",
            help="Full name, or short: payments, inventory, actions, products, requests.critical|normal|bulk, commands, signals.",
        ),
    ],
    file: Annotated[str, typer.Argument(metavar="FILE", help="NDJSON, one object a line; - is stdin.")],
    *,
    as_json: console.JsonOption = False,
) -> None:
    """Publish the lines of an NDJSON file as Avro records.

    Payments and adjustments of inventory may be flat or in an envelope, adjustments also in snake case; each shape has its own
    schema. Other topics take their own message, in camelCase.
    A bad line is reported by its number and the rest goes on; the exit code is then 1.
    """
    settings, _ = load_settings(os.environ, needs=NEEDS)
    spec = find_public(settings.env, topic)
    name = physical(settings.env, spec.name)
    with Lines(file) as lines, Wire(settings) as wire:
        partition_count(settings.cluster, name)
        encode = encoder(settings, spec, wire)
        publisher = Publisher(settings.cluster)
        with console.progress(f"publishing to {name}", lines.total_bytes) as advance:
            for number, value in lines.objects(advance):
                try:
                    key, raw = encode(value)
                except InvalidEventError as error:
                    lines.reject(number, str(error))
                else:
                    publisher.publish(name, key, raw, number=number)
            publisher.finish()
        for number, problem in publisher.failures:
            lines.reject(number, problem)
    _summarise(name, publisher, lines, as_json=as_json)
    if lines.bad_lines:
        raise typer.Exit(EXIT_FAILURE)


def find_public(env: str, topic: str) -> TopicSpec:
    """Return the topic called `topic`, by its full or its short name. Raises CliError unless anybody may write to it."""
    known = {spec.name: spec for spec in specs()}
    topic = ALIASES.get(topic, topic)
    short = next((name for name in known if topic in {name, physical(env, name)}), None)
    offered = f"One may publish to {', '.join(sorted(PUBLIC))}."
    if short is None:
        raise CliError(f"There is no topic {topic} in the environment {env}. {offered}")
    if short not in PUBLIC:
        raise CliError(f"Only the service itself writes to {physical(env, short)}. {offered}")
    return known[short]


def event_key(topic: str, event: Mapping[str, object]) -> str:
    """Return what the record of an event for a neighbour's `topic` is keyed by. Raises InvalidEventError when nothing is there."""
    data = event.get("data")
    for part in (data if isinstance(data, Mapping) else {}, event):
        for name in KEYS[topic]:
            value = part.get(name)
            if isinstance(value, str) and value:
                return value
    raise InvalidEventError(KEYS[topic][0], "is missing, and so is any other id: a record needs a key")


def encoder(settings: Settings, spec: TopicSpec, wire: Wire) -> Encode:
    """Return what makes records for the topic `spec` of JSON objects. Registers schemas as they are met."""
    topic = physical(settings.env, spec.name)
    if spec.schema is None:
        ids: dict[str, int] = {}

        def encode_foreign(event: Mapping[str, object]) -> tuple[str, bytes]:
            shape: ForeignSchema = producing.CHOOSE[spec.name](event)
            record = producing.to_record(shape, event)
            key = event_key(spec.name, event)
            if shape not in ids:
                ids[shape] = wire.register(shape.subject(topic), shape.text)
            return key, frame(ids[shape], producing.parsed(shape), record)

        return encode_foreign
    message = spec.schema
    schema_id = wire.register(f"{topic}-value", schema_text(message))
    key_field = "productId" if spec.name == topics.PRODUCTS else "userId"

    def encode_own(value: Mapping[str, object]) -> tuple[str, bytes]:
        record = records.to_record(message, value)
        key = str(record[key_field])
        if not key:
            raise InvalidEventError(key_field, "is empty")
        return key, frame(schema_id, own_schema(message), record)

    return encode_own


def _summarise(topic: str, publisher: Publisher, lines: Lines, *, as_json: bool) -> None:
    if as_json:
        console.print_document(
            {"topic": topic, "published": publisher.delivered, "badLines": lines.bad_lines, "problems": lines.problems_as_json()}
        )
        return
    places = sorted((number, offset) for (_, number), (offset, _) in publisher.last.items())
    text = Text.assemble((f"{publisher.delivered:,}", "bold"), f" published to {topic}")
    if places:
        text.append(f"  (last offsets: {', '.join(f'{number}:{offset}' for number, offset in places)})", style="dim")
    if lines.bad_lines:
        text.append(f"  ·  {lines.bad_lines:,} bad line{'' if lines.bad_lines == 1 else 's'}", style="red")
    console.succeed(text)
