"""The example beside each schema, as a message: for tests, documentation and people who build a producer.

`schemas/avro/<Name>.example.json` is the record as JSON, with two conventions where JSON has no type of its own: bytes are
base64 (RFC 4648, with padding) and timestamps are RFC 3339 strings in UTC. A missing field has its default. They tell one
story, of one user: what is sealed in one of them is another, and opens with `SEAL_KEY`.

`schemas/samples` holds what other systems send: payments, and preferences for the users whom they name.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import fastavro

from schemas import codec, messages

# wraps the user key of the examples; not a secret, and no deployment's
SEAL_KEY = bytes(range(32))

SAMPLES_FOLDER = Path(__file__).parent / "samples"


def example(name: str) -> messages.Message:
    """Return the example of message `name`, such as `Delivery`."""
    record = json.loads((codec.AVRO_FOLDER / f"{name}.example.json").read_text("utf-8"))
    schema = codec.own_schema(name)
    out = io.BytesIO()
    # written and read again, so that missing fields have their defaults
    fastavro.schemaless_writer(out, schema, cast("Mapping[str, object]", _value(schema, record)))
    return cast("messages.Message", codec.unpack(out.getvalue(), getattr(messages, name)))


def samples(stem: str) -> list[dict[str, Any]]:
    """Return the JSON objects of `schemas/samples/<stem>.ndjson`: `payments` or `preferences`."""
    return [json.loads(line) for line in (SAMPLES_FOLDER / f"{stem}.ndjson").read_text("utf-8").splitlines()]


def _value(schema: codec.Schema, value: object) -> object:
    match schema:
        case list():  # every union here is null or one type
            return None if value is None else _value(schema[1], value)
        case {"logicalType": "timestamp-millis"}:
            return datetime.fromisoformat(cast("str", value))
        case "bytes":
            return base64.b64decode(cast("str", value), validate=True)
        case {"type": "array", "items": item}:
            return [_value(item, each) for each in cast("list[object]", value)]
        case {"type": "record", "fields": fields}:
            record = cast("dict[str, object]", value)
            types = {field["name"]: field["type"] for field in fields}
            return {name: _value(types[name], each) for name, each in record.items()}
    return value  # text, number, boolean, a map of those, or a record named before: as they are in JSON
