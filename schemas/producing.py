"""Events as other services write them to Kafka, for the CLI and the demo: which Avro schema, and how JSON becomes its record.

The files in `schemas/foreign` belong to the producers of payments and of inventory. Nothing here is used for reading: readers take any
writer's schema and normalise (`agents.normalise`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from functools import cache
from pathlib import Path

import fastavro

from schemas import topics
from schemas.codec import Schema, frame
from schemas.errors import InvalidEventError

FOREIGN_FOLDER = Path(__file__).parent / "foreign"

_INTEGER_BITS = {"int": 32, "long": 64}


class ForeignSchema(StrEnum):
    """A schema that another service writes with. The value is the stem of its file in `schemas/foreign`."""

    FLAT = "payments.flat"
    ENVELOPED = "payments.enveloped"
    INVENTORY_FLAT = "inventory.flat"
    INVENTORY_ENVELOPED = "inventory.enveloped"
    INVENTORY_SNAKE = "inventory.snake"

    @property
    def text(self) -> str:
        """The schema's JSON text, as it is registered."""
        return (FOREIGN_FOLDER / f"{self.value}.avsc").read_text("utf-8")

    def subject(self, topic: str) -> str:
        """Return the registry's subject for this schema in `topic`, such as `payments.dev.events-com.flowmart.payments.PaymentProcessed`.

        One topic carries several record types, hence topic *and* record name (Confluent's TopicRecordNameStrategy).
        """
        return f"{topic}-{parsed(self)['name']}"


@cache
def parsed(stem: str) -> Schema:
    """Return the parsed schema of `schemas/foreign/<stem>.avsc`."""
    return fastavro.parse_schema(json.loads(ForeignSchema(stem).text))


def choose(payment: Mapping[str, object]) -> ForeignSchema:
    """Return the schema that fits the shape of `payment`: enveloped when there is a `data` object, else flat."""
    return ForeignSchema.ENVELOPED if isinstance(payment.get("data"), Mapping) else ForeignSchema.FLAT


def choose_inventory(adjustment: Mapping[str, object]) -> ForeignSchema:
    """Return the schema that fits the shape of `adjustment`: enveloped, the older form in snake case, else flat."""
    if isinstance(adjustment.get("data"), Mapping):
        return ForeignSchema.INVENTORY_ENVELOPED
    return ForeignSchema.INVENTORY_SNAKE if any("_" in name for name in adjustment) else ForeignSchema.INVENTORY_FLAT


# a neighbour's topic -> which schema an event of it is written with
CHOOSE: Mapping[str, Callable[[Mapping[str, object]], ForeignSchema]] = {
    topics.PAYMENTS: choose,
    topics.INVENTORY: choose_inventory,
}


def to_record(stem: str, event: Mapping[str, object]) -> dict[str, object]:
    """Return an event as a record of schema `stem`, ready for `schemas.codec.frame`.

    Fields that the schema does not have are dropped, missing ones become null.
    Raises InvalidEventError, naming the field, when a value has another type than the schema says.
    """
    return _record(parsed(stem), event, "")


def encode_payment(payment: Mapping[str, object], ids: Mapping[str, int]) -> bytes:
    """Return `payment` in the wire format. `ids` maps each schema's stem to its id in the registry. Raises InvalidEventError."""
    stem = choose(payment)
    return frame(ids[stem], parsed(stem), to_record(stem, payment))


def _record(schema: Schema, value: Mapping[str, object], path: str) -> dict[str, object]:
    prefix = f"{path}." if path else ""
    return {field["name"]: _value(field["type"], value.get(field["name"]), prefix + field["name"]) for field in schema["fields"]}


def _value(schema: Schema, value: object, path: str) -> object:  # noqa: C901 - an arm a type
    match schema:
        case list():  # every field here is null or one type
            return None if value is None else _value(schema[1], value, path)
        case {"type": "record"} if isinstance(value, Mapping):
            return _record(schema, value, path)
        case {"type": "array", "items": item} if isinstance(value, Sequence) and not isinstance(value, str):
            return [_value(item, each, f"{path}[{index}]") for index, each in enumerate(value)]
        case {"type": "map", "values": item} if isinstance(value, Mapping):
            return {_text(str(key), path): _value(item, each, f"{path}.{key}") for key, each in value.items()}
        case "string" if isinstance(value, str):
            return _text(value, path)
        case "double" if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            if not math.isfinite(number):
                raise InvalidEventError(path, "is no finite number")
            return number
        case "int" | "long" if isinstance(value, int) and not isinstance(value, bool):
            if value.bit_length() >= _INTEGER_BITS[schema]:
                raise InvalidEventError(path, f"does not fit {_INTEGER_BITS[schema]} bits")
            return value
    raise InvalidEventError(path, f"is {_kind(value)}, expected {_expected(schema)}")


def _text(value: str, path: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidEventError(path, "holds half a surrogate pair, which is no text") from error
    return value


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a text"
        case Mapping():
            return "an object"
        case Sequence():
            return "a list"
    return f"a {type(value).__name__}"


def _expected(schema: Schema) -> str:
    name = schema if isinstance(schema, str) else schema["type"]
    return {
        "string": "a text",
        "double": "a number",
        "int": "a whole number",
        "long": "a whole number",
        "record": "an object",
        "map": "an object",
        "array": "a list",
    }[name]
