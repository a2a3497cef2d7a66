"""The users' keys, as a worker that does not own their table sees them: the compacted topic, followed to its end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping

from confluent_kafka import Consumer, KafkaException, TopicPartition

from streams.transport.admin import offset_bounds
from streams.transport.changelog import apply_record
from streams.transport.cluster import Cluster, leave
from streams.transport.records import fetch

_POLL_SECONDS = 0.1
_CHUNK_RECORDS = 10_000
CATCH_UP_SECONDS = 30.0


class Follower:
    """Follows partitions of a compacted topic in a thread. Rows are encoded, as they are in the topic."""

    def __init__(self, cluster: Cluster, topic: str, *, group: str) -> None:
        self._cluster = cluster
        self._topic = topic
        self._group = group
        self._rows: dict[int, dict[bytes, bytes]] = {}
        self._positions: dict[int, int] = {}
        self._stopping = threading.Event()
        self._moved: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def follow(self, partitions: set[int]) -> None:
        """Follow exactly these partitions; return when each was read to the end that it has now."""
        self._stopping.set()
        self._stopping = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._moved = asyncio.Event()
        self._rows = {partition: {} for partition in partitions}
        self._positions = dict.fromkeys(partitions, -1)
        if not partitions:
            return
        arguments = (self._rows, self._positions, self._stopping)
        threading.Thread(target=self._run, args=arguments, name=f"follow {self._topic}", daemon=True).start()
        await asyncio.gather(*(self.catch_up(partition) for partition in partitions))

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()

    def tables(self) -> list[Mapping[bytes, bytes]]:
        """Return the rows of each followed partition."""
        return list(self._rows.values())

    def get(self, partition: int, key: bytes) -> bytes | None:
        """Return the row as far as the topic was read."""
        return self._rows.get(partition, {}).get(key)

    async def catch_up(self, partition: int) -> None:
        """Return when `partition` was read to the end that it has now. Raises TimeoutError after CATCH_UP_SECONDS."""
        loop = asyncio.get_running_loop()
        place = (self._topic, partition)
        async with asyncio.timeout(CATCH_UP_SECONDS):
            bounds = await loop.run_in_executor(None, offset_bounds, self._cluster, [place])
            while self._positions.get(partition, -1) < bounds[place][1]:
                if self._moved is None or partition not in self._positions:
                    return
                self._moved.clear()
                await self._moved.wait()

    async def look_up(self, partition: int, key: bytes) -> bytes | None:
        """Return the row, having read to the end first when it is not there: what was written before is seen."""
        found = self.get(partition, key)
        if found is None:
            await self.catch_up(partition)
            found = self.get(partition, key)
        return found

    def _run(self, rows: dict[int, dict[bytes, bytes]], positions: dict[int, int], stopping: threading.Event) -> None:
        consumer = Consumer(self._cluster.reading(self._group, fetch_wait_ms=500))
        try:
            firsts = offset_bounds(self._cluster, [(self._topic, partition) for partition in rows])
            consumer.assign([TopicPartition(self._topic, partition, firsts[(self._topic, partition)][0]) for partition in rows])
            while not stopping.is_set():
                found = fetch(consumer, wait_seconds=_POLL_SECONDS, most=_CHUNK_RECORDS)
                for record in found.records:
                    apply_record(rows[record.partition()], record)
                    positions[record.partition()] = record.offset() + 1
                positions.update({partition: end for (_, partition), end in found.ends.items()})
                if found.records or found.ends:
                    self._notify()
        except KafkaException as error:
            if not stopping.is_set():
                leave(f"following {self._topic} failed: {error.args[0]}")
        finally:
            consumer.close()

    def _notify(self) -> None:
        loop, moved = self._loop, self._moved
        if loop is not None and moved is not None and not loop.is_closed():
            wake: Callable[[], None] = moved.set
            loop.call_soon_threadsafe(wake)
