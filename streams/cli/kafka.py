"""Reading and publishing as a command does it: to the end that is there now, with every delivery's result looked at."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Self

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from streams.cli.errors import CliError, explain_kafka
from streams.topics import DEAD_MAX_BYTES
from streams.transport.cluster import Cluster

ANSWER_SECONDS = 5.0
SILENCE_SECONDS = 20.0  # a broker that sends nothing for so long before the end of a topic is as good as away
DELIVERY_SECONDS = 60.0
FETCH_RECORDS = 5_000
# the client connects again by itself; the silence is what is measured
_PASSING = frozenset({KafkaError._ALL_BROKERS_DOWN, KafkaError._TRANSPORT})  # noqa: SLF001 - public, for all their underscores

# what a topic answers that was made, or changed its leader, a moment ago
_LEADERLESS = frozenset({KafkaError.LEADER_NOT_AVAILABLE, KafkaError.NOT_LEADER_FOR_PARTITION})
_PAUSE_SECONDS = 0.1

Progress = Callable[[int], None]
# line or item, what went wrong
Failure = tuple[int, str]


def quiet(cluster: Cluster) -> Cluster:
    """Return `cluster` for a command: named as one, and librdkafka's own log off. Errors reach us as values."""
    return replace(cluster, extra={**cluster.extra, "client.id": "notify-cli", "log_level": 0})


def admin(cluster: Cluster) -> AdminClient:
    """Return an admin client. Connects when first used."""
    return AdminClient(quiet(cluster).config())


def partition_counts(cluster: Cluster) -> Mapping[str, int]:
    """Return how many partitions each topic has. Raises KafkaException when no broker answers."""
    metadata = admin(cluster).list_topics(timeout=ANSWER_SECONDS)
    return {name: len(topic.partitions) for name, topic in metadata.topics.items() if topic.error is None}


def partition_count(cluster: Cluster, topic: str) -> int:
    """Return how many partitions `topic` has. Raises CliError when it does not exist."""
    count = partition_counts(cluster).get(topic)
    if not count:
        raise CliError(f"The topic {topic} does not exist. Run `notify topics ensure`, or check NOTIFY_ENV.")
    return count


class Reader:
    """Reads partitions of a topic from `start` (default: the beginning), committed records only, and commits nothing."""

    def __init__(self, cluster: Cluster, topic: str, partitions: Mapping[int, int] | list[int]) -> None:
        config = quiet(cluster).config(
            group_id="notify-cli",  # asked for by the client, used for nothing
            enable_auto_commit=False,
            enable_partition_eof=True,
            isolation_level="read_committed",
            auto_offset_reset="earliest",
            fetch_wait_max_ms=50,
        )
        self._consumer = Consumer(config)
        self._topic = topic
        # before the assignment: else librdkafka looks for the leaders at its leisure, half a second later
        self._consumer.list_topics(topic, timeout=ANSWER_SECONDS)
        starts = partitions if isinstance(partitions, Mapping) else dict.fromkeys(partitions, OFFSET_BEGINNING)
        self._starts = starts
        self._ended: set[int] = set()
        self._consumer.assign([TopicPartition(topic, number, offset) for number, offset in starts.items()])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._consumer.close()

    def sizes(self) -> dict[int, tuple[int, int]]:
        """Return the first and the next offset of each partition."""
        return {number: self._size(number) for number in self._starts}

    def _size(self, number: int) -> tuple[int, int]:
        deadline = time.monotonic() + SILENCE_SECONDS
        while True:
            try:
                offsets: tuple[int, int] = self._consumer.get_watermark_offsets(TopicPartition(self._topic, number), timeout=ANSWER_SECONDS)
            except KafkaException as error:
                if error.args[0].code() not in _LEADERLESS or time.monotonic() > deadline:
                    raise
            else:
                return offsets
            time.sleep(_PAUSE_SECONDS)
            self._consumer.list_topics(self._topic, timeout=ANSWER_SECONDS)  # who leads now

    def offsets_at(self, since_ms: int) -> dict[int, int]:
        """Return each partition's first offset with a timestamp from `since_ms` on; its end when there is none."""
        ends = self.sizes()
        asked = [TopicPartition(self._topic, number, since_ms) for number in self._starts]
        found = self._consumer.offsets_for_times(asked, timeout=ANSWER_SECONDS)
        return {item.partition: item.offset if item.offset >= 0 else ends[item.partition][1] for item in found}

    def to_end(self, progress: Progress | None = None) -> Iterator[Message]:
        """Yield every record up to the end of each partition, by position. Raises CliError after a long silence."""
        read = 0
        silent_since = time.monotonic()
        while len(self._ended) < len(self._starts):
            records = self.more(0.5)
            if records:
                silent_since = time.monotonic()
            elif time.monotonic() - silent_since > SILENCE_SECONDS and len(self._ended) < len(self._starts):
                raise CliError(f"Kafka stopped sending {self._topic} before its end. Try again; `notify doctor` checks the cluster.")
            yield from records
            read += len(records)
            if progress is not None:
                progress(read)

    def more(self, timeout_seconds: float) -> list[Message]:
        """Return the next records, at most `timeout_seconds` later; none when none came."""
        records: list[Message] = []
        first = self._consumer.poll(timeout_seconds)
        if first is None:
            return records
        # a batch alone would wait the whole time-out for its last record
        for message in (first, *self._consumer.consume(FETCH_RECORDS, 0)):
            error = message.error()
            if error is None:
                records.append(message)
            elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - public, for all its underscore
                self._ended.add(_number(message.partition()))
            elif not error.retriable() and error.code() not in _PASSING:
                raise KafkaException(error)
        return records


class Publisher:
    """Publishes records; `failures` holds those that Kafka did not take, by the number that they were given."""

    def __init__(self, cluster: Cluster) -> None:
        config = quiet(cluster).config(
            acks="all",
            enable_idempotence=True,
            partitioner="murmur2_random",
            linger_ms=5,
            compression_type="lz4",
            delivery_timeout_ms=int(DELIVERY_SECONDS * 1000),
            message_max_bytes=DEAD_MAX_BYTES,  # the broker decides what is too large for a topic
        )
        self._producer = Producer(config)
        # says at once when nobody answers, and saves the half second after which the idempotent producer looks again
        self._producer.list_topics(timeout=ANSWER_SECONDS)
        self.delivered = 0
        self.failures: list[Failure] = []
        # (topic, partition) -> offset and timestamp in milliseconds of the last record there
        self.last: dict[tuple[str, int], tuple[int, int]] = {}

    def publish(self, topic: str, key: str, value: bytes | None, *, number: int = 0) -> None:
        """Hand a record over, a tombstone if it has no value. Its result is known after `finish`."""

        def on_delivery(error: KafkaError | None, message: Message) -> None:
            if error is not None:
                self.failures.append((number, explain_kafka(KafkaException(error))))
                return
            self.delivered += 1
            place = (topic, _number(message.partition()))
            offset = _number(message.offset())
            if offset >= self.last.get(place, (-1, 0))[0]:
                self.last[place] = (offset, message.timestamp()[1])

        while True:
            try:
                self._producer.produce(topic, value, key.encode(), on_delivery=on_delivery)
            except BufferError:
                self._producer.poll(0.1)  # the buffer is full: let deliveries make room
                continue
            except KafkaException as error:
                self.failures.append((number, explain_kafka(error)))
            break
        self._producer.poll(0)

    def finish(self) -> None:
        """Wait until the result of every record is known."""
        # delivery.timeout.ms settles each of them, one way or the other
        while self._producer.flush(1.0):
            pass

    def require_all(self) -> None:
        """Wait for every result. Raises CliError when Kafka did not take everything."""
        self.finish()
        if self.failures:
            total = self.delivered + len(self.failures)
            raise CliError(f"Kafka took {self.delivered} of {total} records. {self.failures[0][1]}")


def _number(value: int | None) -> int:
    return -1 if value is None else value
