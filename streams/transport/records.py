"""One look at a librdkafka consumer: what came, which partitions are at their end, what went wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, cast

from confluent_kafka import Consumer, KafkaError

Place = tuple[str, int]  # topic, partition
# headers of a record that was parked or redriven: where and when (milliseconds since 1970) it was read first
PLACE_HEADERS = ("topic", "partition", "offset", "timestamp")


class Record(Protocol):
    """A record as librdkafka delivers it: `confluent_kafka.Message`, with the types that a delivered one has."""

    def topic(self) -> str:
        """Return the topic, as the cluster names it."""

    def partition(self) -> int:
        """Return the partition."""

    def offset(self) -> int:
        """Return the offset."""

    def timestamp(self) -> tuple[int, int]:
        """Return (kind, milliseconds since 1970)."""

    def key(self) -> bytes | None:
        """Return the key's bytes."""

    def value(self) -> bytes | None:
        """Return the value's bytes; None: a tombstone."""

    def headers(self) -> list[tuple[str, bytes]] | None:
        """Return the headers."""


@dataclass(slots=True)
class Fetched:
    """What one look found. `ends`: where partitions end, by position, behind every record of `records`."""

    records: list[Record] = field(default_factory=list)
    ends: dict[Place, int] = field(default_factory=dict)
    errors: list[tuple[Place, KafkaError]] = field(default_factory=list)


def fetch(consumer: Consumer, *, wait_seconds: float, most: int) -> Fetched:
    """Return what `consumer` has, at most `most` records, as soon as it has anything or `wait_seconds` have passed."""
    found = Fetched()
    # consume() alone would wait its whole time-out for as many as it may return
    first = consumer.poll(wait_seconds)
    if first is None:
        return found
    for message in (first, *consumer.consume(most - 1, 0)):
        error = message.error()
        if error is None:
            found.records.append(cast("Record", message))
            continue
        place = (str(message.topic()), cast("int", message.partition()))
        if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - confluent-kafka's public name for it
            found.ends[place] = cast("int", message.offset())
        else:
            found.errors.append((place, error))
    # an end that was reached before more came is not the end any more
    for record in found.records if found.ends else ():
        place = (record.topic(), record.partition())
        if found.ends.get(place, record.offset() + 1) <= record.offset():
            del found.ends[place]
    return found
