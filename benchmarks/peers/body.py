"""The same work for the runner and its peers: Avro decode, preference look-up, f-string, Avro encode; and one meter for all.

Every program in this folder runs as `python -m benchmarks.peers.<name>`, most of them in a virtual environment of their
own: nothing here imports more than fastavro.
"""

from __future__ import annotations

import io
import json
import os
import struct
import time
import uuid
from pathlib import Path
from typing import Any, NoReturn, Protocol

import fastavro

USERS = 10_000
EVENT_SCHEMA_ID, DELIVERY_SCHEMA_ID = 7, 8
_EMAIL_EVERY = 50

_EVENT = fastavro.parse_schema(
    {
        "type": "record",
        "name": "PaymentEvent",
        "fields": [
            {"name": "event_id", "type": "string"},
            {"name": "event_type", "type": {"type": "enum", "name": "Kind", "symbols": ["PAYMENT_CAPTURED", "PAYMENT_FAILED"]}},
            {"name": "user_id", "type": "string"},
            {"name": "order_id", "type": "string"},
            {"name": "sku", "type": "string"},
            {"name": "warehouse", "type": ["null", "string"]},
            {"name": "quantity", "type": "int"},
            {"name": "amount_minor", "type": "long"},
            {"name": "currency", "type": "string"},
            {"name": "occurred_at", "type": "long"},
            {"name": "attributes", "type": {"type": "map", "values": "string"}},
        ],
    }
)
_DELIVERY = fastavro.parse_schema(
    {
        "type": "record",
        "name": "Delivery",
        "fields": [
            {"name": "id", "type": "string"},
            {"name": "user", "type": "string"},
            {"name": "channel", "type": "string"},
            {"name": "title", "type": "string"},
            {"name": "body", "type": "string"},
            {"name": "ts", "type": "long"},
        ],
    }
)
_HEADER = struct.Struct(">bI")
_read_header = _HEADER.unpack_from
_DELIVERY_HEADER = _HEADER.pack(0, DELIVERY_SCHEMA_ID)
_schemas: dict[int, Any] = {EVENT_SCHEMA_ID: _EVENT}
_reader = fastavro.schemaless_reader
_writer = fastavro.schemaless_writer


class Preferences(Protocol):
    """What the body asks of preferences: a user's, as a mapping with `name` and `payment`."""

    def __getitem__(self, user: str, /) -> dict[str, Any]: ...


def user_of(number: int) -> str:
    """Return the id of user `number`."""
    return f"user-{number:08d}"


def preference_of(number: int) -> dict[str, Any]:
    """Return what user `number` wants."""
    return {"name": f"Name {number}", "payment": ("inapp",) if number % _EMAIL_EVERY else ("inapp", "email")}


def all_preferences() -> dict[str, dict[str, Any]]:
    """Return the preferences of all users, as the peers hold them: decoded, in a dict."""
    return {user_of(number): preference_of(number) for number in range(USERS)}


def handle(raw: bytes, preferences: Preferences) -> tuple[bytes, bytes]:
    """Return key and value of the delivery that the event in `raw` becomes."""
    _magic, schema_id = _read_header(raw)
    body = io.BytesIO(raw)
    body.seek(5)
    event: Any = _reader(body, _schemas[schema_id], None)
    user = event["user_id"]
    preference = preferences[user]
    out = io.BytesIO()
    out.write(_DELIVERY_HEADER)
    _writer(
        out,
        _DELIVERY,
        {
            "id": event["event_id"] + ":inapp",
            "user": user,
            "channel": preference["payment"][0],
            "title": "Payment received",
            "body": f"We received {event['amount_minor'] / 100:.2f} {event['currency']} for {event['order_id']}, {preference['name']}",
            "ts": event["occurred_at"],
        },
    )
    return user.encode(), out.getvalue()


def event(number: int) -> tuple[bytes, bytes]:
    """Return key and value of event `number`, as a producer writes it."""
    user = user_of(number % USERS)
    out = io.BytesIO()
    out.write(_HEADER.pack(0, EVENT_SCHEMA_ID))
    _writer(
        out,
        _EVENT,
        {
            "event_id": str(uuid.UUID(int=number + (1 << 100))),
            "event_type": "PAYMENT_CAPTURED",
            "user_id": user,
            "order_id": f"ord-{number:010d}",
            "sku": "SKU-123456-BLK",
            "warehouse": "ams-1",
            "quantity": 3,
            "amount_minor": 129900 + number % 1000,
            "currency": "EUR",
            "occurred_at": 1760000000000 + number,
            "attributes": {"src": "web", "ab": "b"},
        },
    )
    return user.encode(), out.getvalue()


def delivery_key(value: bytes) -> bytes:
    """Return what tells an output from all others: its id, without decoding the rest."""
    length = value[5] >> 1  # a zigzag varint of one byte: ids are short
    return value[6 : 6 + length]


class Meter:
    """From the first event in hand (joining the group excluded) until every output is acknowledged; CPU of all threads."""

    def __init__(self) -> None:
        self.wanted = int(os.environ["BENCH_EVENTS"])
        self.count = 0
        self._began: tuple[float, float] | None = None

    def begin(self) -> None:
        """Start the clocks; later calls do nothing."""
        if self._began is None:
            self._began = time.perf_counter(), time.process_time()

    def add(self, count: int = 1) -> bool:
        """Count events that were handled; say whether that is all."""
        self.count += count
        return self.count >= self.wanted

    def spent(self) -> tuple[float, float]:
        """Return wall and CPU seconds so far."""
        assert self._began is not None
        return time.perf_counter() - self._began[0], time.process_time() - self._began[1]

    def done(self, **more: object) -> NoReturn:
        """Write the result where BENCH_RESULT says and end the process."""
        wall_seconds, cpu_seconds = self.spent()
        result = {
            "events": self.count,
            "events_per_second": self.count / wall_seconds,
            "cpu_us_per_event": cpu_seconds / self.count * 1e6,
            "rss_bytes": peak_bytes(),
            **more,
        }
        Path(os.environ["BENCH_RESULT"]).write_text(json.dumps(result), "utf-8")
        os._exit(0)


def peak_bytes() -> int:
    """Return the most memory this process had; 0 where /proc does not say. Not `ru_maxrss`: it survives exec."""
    try:
        status = Path("/proc/self/status").read_text("ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)


# what every program that produces through librdkafka is told
LIBRDKAFKA_PRODUCER: dict[str, Any] = {
    "linger.ms": 5,
    "acks": "all",
    "enable.idempotence": True,
    "partitioner": "murmur2_random",
    "queue.buffering.max.messages": 500_000,
}
