"""Reads compacted topics to their end, in bulk: tables at assignment, and what others write, as it goes on."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

from streams.transport.admin import offset_bounds
from streams.transport.cluster import Cluster

_CHUNK_RECORDS = 10_000
_POLL_SECONDS = 0.2
# a partition that is not at its end after so long without a record: the broker is away or the topic is missing
_SILENCE_SECONDS = 60.0


class ChangelogError(Exception):
    """A changelog cannot be read to its end. The worker cannot own the partition."""


def reading_config(cluster: Cluster, group: str, *, fetch_wait_ms: int) -> dict[str, object]:
    """Return the configuration of a consumer that reads a log from the beginning and commits nothing.

    `fetch_wait_ms`: how long the broker may hold an empty answer back, and so how late the end is noticed.
    """
    return cluster.config(
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        enable_partition_eof=True,
        fetch_wait_max_ms=fetch_wait_ms,
        fetch_error_backoff_ms=20,
        topic_metadata_refresh_fast_interval_ms=20,
        queued_max_messages_kbytes=65_536,
    )


def read_to_end(
    cluster: Cluster,
    *,
    group: str,
    tables: Mapping[tuple[str, int], dict[bytes, bytes]],
    progress: Callable[[int], None] = lambda _count: None,
) -> int:
    """Replay changelog partitions into `tables`, (topic, partition) -> rows; return the number of records read.

    Blocks. The end is that of the moment when it is reached, by position: commit markers and aborted records after the
    last record do not matter. `progress` is told how many records each chunk held. Raises ChangelogError.
    """
    if not tables:
        return 0
    consumer = Consumer(reading_config(cluster, group, fetch_wait_ms=10))
    rows_of = {(topic, partition): rows for (topic, partition), rows in tables.items()}
    remaining = set(rows_of)
    count = 0
    silent_since = time.monotonic()
    try:
        # offsets, not "the beginning": librdkafka would wait half a second to look that up
        firsts = offset_bounds(cluster, list(rows_of))
        consumer.assign([TopicPartition(*place, firsts[place][0]) for place in rows_of])
        with _collector_at_rest():
            while remaining:
                messages = _chunk(consumer)
                if messages:
                    silent_since = time.monotonic()
                elif time.monotonic() - silent_since > _SILENCE_SECONDS:
                    raise ChangelogError(f"no end of {sorted(remaining)} within {_SILENCE_SECONDS:.0f} s")
                read = 0
                for message in messages:
                    error = message.error()
                    place = (message.topic(), message.partition())
                    if error is None:
                        read += 1
                        value = message.value()
                        if value is None:
                            rows_of[place].pop(message.key(), None)
                        else:
                            rows_of[place][message.key()] = value
                    elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - confluent-kafka's public name for it
                        remaining.discard(place)
                    elif error.code() in {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.TOPIC_AUTHORIZATION_FAILED}:
                        raise ChangelogError(f"{place[0]}: {error}")
                count += read
                if read:
                    progress(read)
    finally:
        consumer.close()
    return count


def _chunk(consumer: Consumer) -> Sequence[Message]:
    # consume() alone would wait its whole time-out for a full chunk
    first = consumer.poll(_POLL_SECONDS)
    return [] if first is None else [first, *consumer.consume(_CHUNK_RECORDS, 0)]


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
