"""Reads the owned partitions of one topic in a thread of its own and hands them over in batches.

One reader a topic, because a broker answers one fetch of a consumer at a time: a critical topic that shared its
consumer with an idle or a paused one would wait for that one's long poll. Only committed records are delivered, and the
end of a partition is told by position, not by record, since what follows the last record may be a commit marker.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from streams.transport.cluster import Cluster, leave
from streams.transport.records import Fetched, Record, fetch

log = logging.getLogger(__name__)

MAX_BATCH_RECORDS = 2_000
# above so many unfinished records of a partition nothing more of it is taken
MAX_OUTSTANDING_RECORDS = 8_000
# the same where records wait for their time: what waits stays in Kafka
MAX_HELD_RECORDS = 2_000
_POLL_SECONDS = 0.05
_PATIENCE_SECONDS = 0.25
_FETCH_WAIT_MS = 500
# ends without a record are told so often: they move positions only, and there is one behind every lone record
_ENDS_SECONDS = 0.25


@dataclass(slots=True)
class Batch:
    """Records of one partition in offset order. An empty one says that the partition was read to `end_offset`.

    `number` counts the batches of a partition in an epoch, from 0: whoever gets them sees whether one is missing.
    """

    topic: str
    partition: int
    epoch: int
    number: int
    records: Sequence[Record]
    end_offset: int | None = None


class _Telling:
    """What was told in an epoch: how many batches of each partition; and their ends that nobody was told of yet."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.untold: dict[int, int] = {}
        self._told_at = -math.inf
        self._numbers: defaultdict[int, Iterator[int]] = defaultdict(itertools.count)

    def batch(self, topic: str, partition: int, records: Sequence[Record], end: int | None) -> Batch:
        """Return the next batch of a partition."""
        return Batch(topic, partition, self.epoch, next(self._numbers[partition]), records, end)

    def due(self) -> dict[int, int]:
        """Return what is to be told now, if it is time."""
        now = time.monotonic()
        if not self.untold or now - self._told_at < _ENDS_SECONDS:
            return {}
        due, self.untold = self.untold, {}
        self._told_at = now
        return due


class Reader:
    """Reads one topic. `start` and `stop` bracket an assignment; `deliver` is called in the reader's thread.

    `most`: unfinished records of a partition, beyond which nothing more of it is taken.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        group: str,
        topic: str,
        deliver: Callable[[list[Batch]], None],
        most: int = MAX_OUTSTANDING_RECORDS,
    ) -> None:
        self._most = most
        self.topic = topic
        # a position that Kafka has no more must be heard of: "earliest" would go on after the gap as if nothing had been lost
        self._config = cluster.reading(group, fetch_wait_ms=_FETCH_WAIT_MS) | {"auto.offset.reset": "error"}
        self._deliver = deliver
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._room = threading.Event()
        self._outstanding: dict[int, int] = {}

    def start(self, positions: Mapping[int, int], *, epoch: int) -> None:
        """Read the partitions in `positions`, each from its offset on, marking batches with `epoch`."""
        if not positions:
            return
        self._stopping = threading.Event()
        # a new one each time: a thread of an earlier assignment may still count in its own
        self._outstanding = dict.fromkeys(positions, 0)
        arguments = (dict(positions), epoch, self._stopping, self._outstanding)
        self._thread = threading.Thread(target=self._run, args=arguments, name=f"read {self.topic}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end. Batches that it still delivers carry an old epoch; it is not waited for."""
        self._stopping.set()
        self._thread = None

    def finished(self, partition: int, records: int) -> None:
        """Say that `records` of `partition` are done, so that fetching may go on."""
        with self._lock:
            if partition in self._outstanding:
                self._outstanding[partition] -= records
                if self._outstanding[partition] < self._most:
                    self._room.set()

    def _run(self, positions: dict[int, int], epoch: int, stopping: threading.Event, outstanding: dict[int, int]) -> None:
        consumer = Consumer(self._config)
        try:
            consumer.assign([TopicPartition(self.topic, partition, offset) for partition, offset in positions.items()])
            paused: set[int] = set()
            telling = _Telling(epoch)
            while not stopping.is_set():
                if not self._has_room(consumer, paused, outstanding):
                    continue
                batches = self._sort(fetch(consumer, wait_seconds=_POLL_SECONDS, most=MAX_BATCH_RECORDS), telling)
                if batches and not stopping.is_set():
                    with self._lock:
                        for batch in batches:
                            outstanding[batch.partition] += len(batch.records)
                    self._deliver(batches)
        except KafkaException as error:
            # a reader that stopped would be a topic that silently waits
            if not stopping.is_set():
                leave(f"reading {self.topic} failed: {error.args[0]}")
        finally:
            consumer.close()

    def _has_room(self, consumer: Consumer, paused: set[int], outstanding: Mapping[int, int]) -> bool:
        """Say whether to fetch now. A partition that stays full is paused, so that it does not hold up the others.

        Not at once: pausing throws away what librdkafka has fetched ahead, and fetching that again takes longer than
        most backlogs take to fall.
        """
        free = {p for p in paused if outstanding[p] < self._most // 2}
        if free:
            consumer.resume([TopicPartition(self.topic, p) for p in free])
            paused -= free
        self._room.clear()
        full = {p for p, n in outstanding.items() if n >= self._most and p not in paused}
        if not full:
            return True
        if self._room.wait(_PATIENCE_SECONDS):
            return False  # look again
        consumer.pause([TopicPartition(self.topic, p) for p in full])
        paused |= full
        return True

    def _sort(self, found: Fetched, telling: _Telling) -> list[Batch]:
        for (_, partition), error in found.errors:
            if error.code() == KafkaError._AUTO_OFFSET_RESET:  # noqa: SLF001 - confluent-kafka's public name for it
                # the next start compares positions with what is left, counts the gap, and is not ready
                leave(f"{self.topic} partition {partition}: what is next to be read is gone, by retention or deletion")
            if not error.retriable():
                log.warning("reader.error topic=%s partition=%s error=%s", self.topic, partition, error)
        records: dict[int, list[Record]] = defaultdict(list)
        for record in found.records:
            records[record.partition()].append(record)
        telling.untold |= {partition: end for (_, partition), end in found.ends.items()}
        batches = []
        for partition, each in records.items():
            end = telling.untold.pop(partition, None)
            # one that was found before these records is none any more
            batches.append(telling.batch(self.topic, partition, each, end if end is None or end > each[-1].offset() else None))
        return [*batches, *(telling.batch(self.topic, partition, (), end) for partition, end in telling.due().items())]
