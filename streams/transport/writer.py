"""The transactional producer of one shard: outputs, changed rows and watermark of a batch become visible together.

Whoever called `acquire` last owns the shard: the broker refuses every other writer with the same transactional id.
All calls but `begin` and `produce` block; the runner makes them in a thread pool.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

from confluent_kafka import KafkaError, KafkaException, Producer

from streams.transport.cluster import Cluster

log = logging.getLogger(__name__)

TRANSACTION_TIMEOUT_MS = 15_000
_CALL_SECONDS = 60.0
_MOST_REPEATS = 3
_METADATA_SECONDS = 5.0
# what one record adds to its key, value and headers on the wire, generously
RECORD_OVERHEAD_BYTES = 128

Headers = Sequence[tuple[str, bytes]]


class FencedError(Exception):
    """Another worker owns the shard, or the producer is broken for good. The process has to go."""


class WrongClockError(FencedError):
    """The broker refuses the time that our records carry, which is our machine's. Nothing can be written until it is right."""

    def __init__(self) -> None:
        super().__init__(
            "Kafka refuses records of this machine's time: its clock is more than an hour ahead (message.timestamp.after.max.ms). "
            "Synchronise it (chrony, systemd-timesyncd); nothing was lost, and nothing was sent for what could not be recorded"
        )


class AbortedError(Exception):
    """The transaction could not be committed; it is aborted. `too_large`: a record exceeded the broker's limit."""

    def __init__(self, message: str, *, too_large: bool) -> None:
        super().__init__(message)
        self.too_large = too_large


class Writer:
    """One transactional producer. Not thread-safe: one call at a time."""

    def __init__(self, cluster: Cluster, *, transactional_id: str, max_message_bytes: int) -> None:
        self.transactional_id = transactional_id
        self._too_large = False
        self._wrong_clock = False
        self._config = cluster.config(
            transactional_id=transactional_id,
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
            delivery_timeout_ms=TRANSACTION_TIMEOUT_MS,
            partitioner="murmur2_random",
            linger_ms=5,  # a commit flushes at once; until then records gather
            message_max_bytes=max_message_bytes + 65_536,
            queue_buffering_max_messages=500_000,
            delivery_report_only_error=True,
        )
        self._config["on_delivery"] = self._on_delivery
        self._producer: Producer | None = None
        self._is_begun = False
        self.is_open = False

    def acquire(self) -> None:
        """Fence every earlier owner and abort what it left open. Blocks; raises FencedError when refused for good."""
        producer = Producer(self._config)
        with contextlib.suppress(KafkaException):  # what follows asks for itself, and waits for the answer
            # Without a connection librdkafka looks for its coordinator half a second later. And the first record for a topic that the
            # producer has never met would hold its transaction up
            producer.list_topics(timeout=_METADATA_SECONDS)
        deadline = time.monotonic() + 3 * _CALL_SECONDS
        while True:
            try:
                producer.init_transactions(_CALL_SECONDS)
                break
            except KafkaException as error:
                if error.args[0].code() == KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED:
                    problem = f"Kafka does not grant Write on transactional id {self.transactional_id}"
                    raise FencedError(f"{problem}: `notify topics acls` lists what each role needs") from error
                if not error.args[0].retriable() or time.monotonic() > deadline:
                    raise FencedError(f"{self.transactional_id}: {error.args[0]}") from error
        self._producer = producer

    def partitions(self, topic: str) -> int:
        """Ask a broker how many partitions a topic has, 0: none, and let the next records know. Blocks. Raises KafkaException."""
        found = self._live().list_topics(topic, timeout=_METADATA_SECONDS).topics.get(topic)
        return 0 if found is None or found.error is not None else len(found.partitions)

    def begin(self) -> None:
        """Begin a transaction."""
        if self.is_open:
            raise FencedError(f"{self.transactional_id}: a transaction is open already")
        self._too_large = False
        producer = self._live()
        try:
            if not self._is_begun:
                producer.begin_transaction()
        except KafkaException as error:
            raise FencedError(f"{self.transactional_id}: {error.args[0]}") from error
        self.is_open = self._is_begun = True

    def produce(  # noqa: PLR0913 - what a record is made of
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None,
        partition: int = -1,
        headers: Headers | None = None,
        *,
        timestamp_ms: int = 0,
    ) -> None:
        """Add a record to the open transaction. Partition -1: by the key; timestamp 0: now. Raises FencedError, AbortedError."""
        producer = self._live()
        while True:
            try:
                if headers is None:
                    producer.produce(topic, value, key, partition)
                else:
                    producer.produce(topic, value, key, partition, headers=list(headers), timestamp=timestamp_ms)
            except BufferError:
                producer.poll(0.01)
            except KafkaException as error:
                self._raise(error)
            else:
                return

    def commit(self) -> None:
        """Commit the open transaction. Blocks. Raises AbortedError (aborted already) or FencedError."""
        producer = self._live()
        deadline = time.monotonic() + 2 * _CALL_SECONDS
        while True:
            try:
                producer.commit_transaction(_CALL_SECONDS)
            except KafkaException as error:
                if error.args[0].retriable() and time.monotonic() < deadline:
                    continue
                self._raise(error)
            self.is_open = self._is_begun = False
            # the next one, here where waiting for librdkafka's own thread holds nobody up; the broker hears of its first record
            with contextlib.suppress(KafkaException):  # said again by `begin`
                producer.begin_transaction()
                self._is_begun = True
            return

    def abort(self) -> None:
        """Abort the open transaction, if there is one. Blocks. Raises FencedError."""
        if not self.is_open:
            return
        deadline = time.monotonic() + 2 * _CALL_SECONDS
        while True:
            try:
                self._live().abort_transaction(_CALL_SECONDS)
            except KafkaException as error:
                if error.args[0].retriable() and time.monotonic() < deadline:
                    continue
                raise FencedError(f"{self.transactional_id}: {error.args[0]}") from error
            self.is_open = self._is_begun = False
            return

    def discard(self) -> None:
        """Give the producer up without a word to the broker: the next owner fences it."""
        self._producer = None

    def _live(self) -> Producer:
        if self._producer is None:
            raise FencedError(f"{self.transactional_id}: not acquired")
        return self._producer

    def _raise(self, error: KafkaException) -> None:
        reason: KafkaError = error.args[0]
        if reason.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            self._too_large = True
        if self._producer is not None:
            with contextlib.suppress(KafkaException):  # a fatal error, again: what it means is said below
                self._producer.poll(0)  # what the broker refused before tells more than what failed because of it
        if self._wrong_clock or reason.code() == KafkaError.INVALID_TIMESTAMP:
            raise WrongClockError from error
        if reason.txn_requires_abort() or reason.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            self.abort()
            raise AbortedError(str(reason), too_large=self._too_large) from error
        raise FencedError(f"{self.transactional_id}: {reason}") from error

    def _on_delivery(self, error: KafkaError | None, _message: object) -> None:
        if error is not None and error.code() == KafkaError.INVALID_TIMESTAMP:
            self._wrong_clock = True
        if error is not None and error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            self._too_large = True


class RepeatingWriter(Writer):
    """A writer for those who cannot decide again: a transaction that was aborted is made again from what was produced."""

    def __init__(self, cluster: Cluster, *, transactional_id: str, max_message_bytes: int) -> None:
        super().__init__(cluster, transactional_id=transactional_id, max_message_bytes=max_message_bytes)
        self._produced: list[Callable[[], None]] = []

    def produce(  # noqa: PLR0913 - what a record is made of
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None,
        partition: int = -1,
        headers: Headers | None = None,
        *,
        timestamp_ms: int = 0,
    ) -> None:
        """As Writer.produce. Raises AbortedError only for what is too large."""
        produce = partial(super().produce, topic, value, key, partition, headers, timestamp_ms=timestamp_ms)
        self._produced.append(produce)
        if self.is_open:  # else it was aborted since it began: `commit` makes all of it again
            try:
                produce()
            except AbortedError as error:
                if error.too_large:
                    raise

    def commit(self) -> None:
        """As Writer.commit, with up to _MOST_REPEATS repetitions."""
        try:
            for repeat in itertools.count():
                try:
                    if not self.is_open:
                        self.begin()
                        for produce in self._produced:
                            produce()
                    super().commit()
                except AbortedError as error:
                    if error.too_large or repeat == _MOST_REPEATS:
                        raise
                    log.warning("transaction.repeated id=%s records=%d error=%s", self.transactional_id, len(self._produced), error)
                else:
                    return
        finally:
            self._produced.clear()
