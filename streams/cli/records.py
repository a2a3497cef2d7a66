"""JSON as people write it to records of our own schemas: camelCase, times in RFC 3339 or milliseconds, bytes in base64."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from difflib import get_close_matches

from schemas.codec import Schema, own_schema
from schemas.errors import InvalidEventError

_BITS = {"int": 31, "long": 63}
_NAMES = {
    "string": "a text",
    "boolean": "true or false",
    "int": "a whole number",
    "long": "a whole number",
    "double": "a number",
    "bytes": "base64",
}


def to_record(name: str, value: Mapping[str, object]) -> dict[str, object]:
    """Return `value` as a record of message `name`, with the defaults of what it leaves out.

    Raises InvalidEventError, naming the field, for one that is missing, unknown, or of another type than the schema says.
    """
    return _record(own_schema(name), value, "", {})


def _record(schema: Schema, value: Mapping[str, object], path: str, named: dict[str, Schema]) -> dict[str, object]:
    named[schema["name"]] = schema
    prefix = f"{path}." if path else ""
    known = {field["name"] for field in schema["fields"]}
    for name in value:
        if name not in known:
            similar = get_close_matches(name, known, n=1)
            raise InvalidEventError(
                prefix + name[:40], "is not a field" + (f"; is {similar[0]} meant?" if similar else f" of {schema['name']}")
            )
    record: dict[str, object] = {}
    for field in schema["fields"]:
        name = field["name"]
        if name in value:
            record[name] = _value(field["type"], value[name], prefix + name, named)
        elif "default" in field:
            record[name] = field["default"]
        else:
            raise InvalidEventError(prefix + name, "is missing")
    return record


def _value(schema: Schema, value: object, path: str, named: dict[str, Schema]) -> object:  # noqa: C901 - one case a type
    match schema:
        case list():  # every union of ours is null or one type
            return None if value is None else _value(schema[1], value, path, named)
        case {"logicalType": "timestamp-millis"}:
            return _time(value, path)
        case {"type": "record"} if isinstance(value, Mapping):
            return _record(schema, value, path, named)
        case {"type": "array", "items": item} if isinstance(value, Sequence) and not isinstance(value, str):
            return [_value(item, each, f"{path}[{index}]", named) for index, each in enumerate(value)]
        case {"type": "map", "values": item} if isinstance(value, Mapping):
            return {str(key): _value(item, each, f"{path}.{str(key)[:40]}", named) for key, each in value.items()}
        case "string" if isinstance(value, str):
            return value
        case "boolean" if isinstance(value, bool):
            return value
        case "int" | "long" if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= _BITS[schema]:
            return value
        case "double" if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        case "bytes" if isinstance(value, str):
            return _bytes(value, path)
        case str() if schema in named and isinstance(value, Mapping):
            return _record(named[schema], value, path, named)
    raise InvalidEventError(path, f"is not {_expected(schema)}")


def _expected(schema: Schema) -> str:
    match schema:
        case {"type": "array"}:
            return "a list"
        case str() if schema in _NAMES:
            return _NAMES[schema]
    return "an object"


def _time(value: object, path: str) -> datetime:
    try:
        if isinstance(value, str):
            at = datetime.fromisoformat(value)
            if at.tzinfo is not None:
                return at
        elif isinstance(value, int) and not isinstance(value, bool):
            return datetime.fromtimestamp(value / 1000, UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise InvalidEventError(path, "is not a time") from error
    raise InvalidEventError(path, "is neither a time such as 2025-11-18T09:12:44Z nor milliseconds since 1970")


def _bytes(value: str, path: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error as error:
        raise InvalidEventError(path, "is not base64") from error
