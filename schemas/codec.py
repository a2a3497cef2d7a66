"""Bytes to dataclass and back, in the Confluent wire format: a zero byte, the schema id as 4 bytes big endian, Avro binary.

Our own topics are read with our schema resolved against the writer's; foreign topics are read with the writer's schema
to a plain mapping and normalised by `agents.normalise`. Decoding never does I/O: `schemas` maps ids that are known
already, and an id that is not raises `UnknownSchemaError`, so that the caller can ask the registry and decode again.
"""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_type_hints

import fastavro
from fastavro.types import AvroMessage

from schemas import messages
from schemas.errors import UndecodableError, UnknownSchemaError

AVRO_FOLDER = Path(__file__).parent / "avro"
HEADER_BYTES = 5
_HEADER = struct.Struct(">bI")
_reader = fastavro.schemaless_reader
_writer = fastavro.schemaless_writer

M = TypeVar("M", bound=messages.Message)
# fastavro's own word for a parsed schema
Schema = Any


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)([A-Z])", lambda match: "_" + match[1].lower(), name)


@cache
def schema_text(name: str) -> str:
    """Return the JSON text of the schema of message `name`, as it is registered."""
    return (AVRO_FOLDER / f"{name}.avsc").read_text("utf-8")


@cache
def own_schema(name: str) -> Schema:
    """Return the parsed schema of message `name`."""
    return fastavro.parse_schema(json.loads(schema_text(name)))


class _Shape:
    """How a dataclass and its Avro record translate: compiled once per class."""

    def __init__(self, kind: type[Any], avro_names: list[str]) -> None:
        attributes = [_snake(name) for name in avro_names]
        declared = [f.name for f in fields(kind)]
        if sorted(attributes) != sorted(declared):
            raise TypeError(f"{kind.__name__}: the dataclass has {sorted(declared)}, its .avsc {sorted(attributes)}")
        self.kind = kind
        self.names = tuple(avro_names)
        self.attributes = tuple(attributes)
        # of a single name the getters would return the value itself, and not a tuple of one
        self.values_of = attrgetter(*attributes, *attributes[:1])
        self.items_of = itemgetter(*avro_names, *avro_names[:1])
        self.nested: dict[str, tuple[str, _Shape, bool]] = {}
        hints = get_type_hints(kind)
        for name, attribute in zip(avro_names, attributes, strict=True):
            for inner in (hints[attribute], *get_args(hints[attribute])):
                if is_dataclass(inner):
                    shape = _Shape(cast("type[Any]", inner), [_camel(f.name) for f in fields(inner)])
                    self.nested[name] = (attribute, shape, getattr(hints[attribute], "__origin__", None) is list)

    def to_mapping(self, message: object) -> dict[str, Any]:
        mapping = dict(zip(self.names, self.values_of(message), strict=False))
        for name, (_, shape, is_list) in self.nested.items():
            value = mapping[name]
            if value is not None:
                mapping[name] = [shape.to_mapping(item) for item in value] if is_list else shape.to_mapping(value)
        return mapping

    def from_mapping(self, mapping: Mapping[str, Any]) -> Any:
        found = dict(zip(self.attributes, self.items_of(mapping), strict=False))
        for attribute, shape, is_list in self.nested.values():
            value = found[attribute]
            if value is not None:
                found[attribute] = [shape.from_mapping(item) for item in value] if is_list else shape.from_mapping(value)
        return self.kind(**found)


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


_shapes: dict[type[Any], _Shape] = {}


def _shape(kind: type[Any]) -> _Shape:
    found = _shapes.get(kind)
    if found is None:
        found = _shapes[kind] = _Shape(kind, [f["name"] for f in json.loads(schema_text(kind.__name__))["fields"]])
    return found


def pack(message: messages.Message) -> bytes:
    """Return `message` as bare Avro, without the wire format's header. For sealed fields."""
    out = io.BytesIO()
    _writer(out, own_schema(type(message).__name__), _shape(type(message)).to_mapping(message))
    return out.getvalue()


def unpack(raw: bytes, kind: type[M]) -> M:
    """Return the message of type `kind` in `raw`, bare Avro as `pack` writes it. Raises UndecodableError."""
    try:
        mapping = _reader(io.BytesIO(raw), own_schema(kind.__name__), None)
        return cast("M", _shape(kind).from_mapping(cast("Mapping[str, Any]", mapping)))
    except Exception as error:
        raise UndecodableError(f"no {kind.__name__}: {type(error).__name__}") from error


class Codec:
    """Encodes and decodes the values of topics.

    `written_as` maps a message's name to the schema id under which it is registered; `schemas` maps every schema id
    known so far to its parsed schema. Both may grow while workers run.
    """

    def __init__(self, written_as: Mapping[str, int], schemas: dict[int, Schema]) -> None:
        self.schemas = schemas
        self._encoders: dict[type[Any], tuple[bytes, Schema, Callable[[object], dict[str, Any]]]] = {}
        for name, schema_id in written_as.items():
            kind = getattr(messages, name)
            schemas[schema_id] = own_schema(name)  # the same object as the reader: no resolution on the hot path
            self._encoders[kind] = (_HEADER.pack(0, schema_id), own_schema(name), _shape(kind).to_mapping)

    def encode(self, message: messages.Message) -> bytes:
        """Return `message` in the wire format. Raises ValueError when a value does not fit its schema."""
        header, schema, to_mapping = self._encoders[type(message)]
        out = io.BytesIO()
        out.write(header)
        _writer(out, schema, to_mapping(message))
        return out.getvalue()

    def decode(self, raw: bytes | None, kind: type[M]) -> M:
        """Return the message of type `kind` in `raw`. Raises UndecodableError or UnknownSchemaError."""
        schema_id = schema_id_of(raw)
        writer = self.schemas.get(schema_id)
        if writer is None:
            raise UnknownSchemaError(f"schema {schema_id} is not known", schema_id=schema_id)
        reader = own_schema(kind.__name__)
        body = io.BytesIO(cast("bytes", raw))
        body.seek(HEADER_BYTES)
        try:
            mapping = _reader(body, writer, None if writer is reader else reader)
            return cast("M", _shape(kind).from_mapping(cast("Mapping[str, Any]", mapping)))
        except Exception as error:
            raise UndecodableError(f"no {kind.__name__}: {type(error).__name__}") from error

    def decode_foreign(self, raw: bytes | None) -> Mapping[str, object]:
        """Return the record in `raw` as its writer's schema says, whatever it is called.

        Raises UndecodableError when the bytes do not fit the schema, or are no record; UnknownSchemaError.
        """
        schema_id = schema_id_of(raw)
        writer = self.schemas.get(schema_id)
        if writer is None:
            raise UnknownSchemaError(f"schema {schema_id} is not known", schema_id=schema_id)
        body = io.BytesIO(cast("bytes", raw))
        body.seek(HEADER_BYTES)
        try:
            value: AvroMessage = _reader(body, writer, None)
        except Exception as error:
            raise UndecodableError(f"does not fit schema {schema_id}: {type(error).__name__}") from error
        if body.read(1):
            raise UndecodableError(f"bytes are left over after a record of schema {schema_id}")
        if not isinstance(value, dict):
            raise UndecodableError(f"schema {schema_id} is no record")
        return value


def schema_id_of(raw: bytes | None) -> int:
    """Return the schema id in the header of `raw`. Raises UndecodableError when there is none."""
    if raw is None:
        raise UndecodableError("a tombstone: there is no value")
    if len(raw) < HEADER_BYTES:
        raise UndecodableError(f"{len(raw)} bytes are too few for the wire format's header")
    magic, schema_id = _HEADER.unpack_from(raw)
    if magic != 0:
        raise UndecodableError(f"magic byte {magic & 0xFF:#04x}, expected 0x00: not in the Confluent wire format")
    return int(schema_id)


def frame(schema_id: int, schema: Schema, value: Mapping[str, object]) -> bytes:
    """Return `value` encoded with any schema, in the wire format. For producers of foreign events."""
    out = io.BytesIO()
    out.write(_HEADER.pack(0, schema_id))
    _writer(out, schema, value)
    return out.getvalue()
