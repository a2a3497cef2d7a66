"""Reads compacted topics to their end, in bulk: tables at assignment, and what others write, as it goes on."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from confluent_kafka import Consumer, KafkaError, TopicPartition

from streams.transport.admin import offset_bounds
from streams.transport.cluster import Cluster
from streams.transport.records import Place, Record, fetch

_CHUNK_RECORDS = 10_000
_POLL_SECONDS = 0.2
# a partition that is not at its end after so long without a record: the broker is away or the topic is missing
_SILENCE_SECONDS = 60.0
_HOPELESS = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.TOPIC_AUTHORIZATION_FAILED}


class ChangelogError(Exception):
    """A changelog cannot be read to its end. The worker cannot own the partition."""


def read_to_end(
    cluster: Cluster,
    *,
    group: str,
    apply: Mapping[Place, Callable[[Record], None]],
    progress: Callable[[int], None] = lambda _count: None,
) -> int:
    """Replay changelog partitions, each record into what its (topic, partition) has in `apply`; return how many were read.

    Blocks. The end is that of the moment when it is reached, by position: commit markers and aborted records after the
    last record do not matter. `progress` is told how many records each chunk held. Raises ChangelogError.
    """
    if not apply:
        return 0
    # offsets, not "the beginning": librdkafka would wait half a second to look that up
    firsts = offset_bounds(cluster, list(apply))
    # only now: one that is told what to read after it has connected looks for the leaders a second later
    consumer = Consumer(cluster.reading(group, fetch_wait_ms=10))
    remaining = set(apply)
    count = 0
    silent_since = time.monotonic()
    try:
        consumer.assign([TopicPartition(*place, firsts[place][0]) for place in apply])
        with _collector_at_rest():
            while remaining:
                found = fetch(consumer, wait_seconds=_POLL_SECONDS, most=_CHUNK_RECORDS)
                for place, error in found.errors:
                    if error.code() in _HOPELESS:
                        raise ChangelogError(f"{place[0]}: {error}")
                for record in found.records:
                    apply[(record.topic(), record.partition())](record)
                remaining -= found.ends.keys()
                if found.records or found.ends:
                    silent_since = time.monotonic()
                    count += len(found.records)
                    progress(len(found.records))
                elif time.monotonic() - silent_since > _SILENCE_SECONDS:
                    raise ChangelogError(f"no end of {sorted(remaining)} within {_SILENCE_SECONDS:.0f} s")
    finally:
        consumer.close()
    return count


def apply_record(rows: dict[bytes, bytes], record: Record) -> None:
    """Change `rows` as a record of a compacted topic says. A record without a key changes nothing."""
    key = record.key()
    if key is not None:
        _change(rows, key, record.value())


def shared_key(table: str, key: bytes) -> bytes:
    """Return the key of a row in a changelog that tables share."""
    return b"%b\0%b" % (table.encode(), key)


def parted_key(key: bytes) -> tuple[str, bytes]:
    """Return (table, the row's own key) of a record in a changelog that tables share."""
    table, _, own = key.partition(b"\0")
    return table.decode(), own


def apply_shared(tables: Mapping[bytes, dict[bytes, bytes]], record: Record) -> None:
    """As `apply_record`, for a changelog that `tables`, by encoded name, share. A table that is not among them is not ours."""
    table, _, key = (record.key() or b"").partition(b"\0")
    if (rows := tables.get(table)) is not None:
        _change(rows, key, record.value())


def _change(rows: dict[bytes, bytes], key: bytes, value: bytes | None) -> None:
    # behind all others, as it stands in the changelog once that is compacted: of some tables the oldest rows are forgotten
    rows.pop(key, None)
    if value is not None:
        rows[key] = value


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    # millions of new objects, none of them garbage: with the collector on, 1M rows took four times as long
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
