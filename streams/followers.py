"""Compacted topics of which a worker owns nothing, followed to their end and on: the users' keys, and the standing orders."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from confluent_kafka import Consumer, KafkaException, TopicPartition

from schemas.codec import Codec
from schemas.errors import NotifyError, RegistryUnavailableError, UnsealableError
from schemas.ids import partition_of
from schemas.messages import ControlEntry, UserKey
from schemas.sealed import unwrap
from streams.transport.admin import offset_bounds
from streams.transport.changelog import apply_record
from streams.transport.cluster import Cluster, leave
from streams.transport.records import Record, fetch

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_FETCH_WAIT_MS = 100  # a worker that starts or takes partitions over waits so long for the end
_ASK_AGAIN_SECONDS = 1.0
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
        if partitions == self._rows.keys() and not self._stopping.is_set():
            await asyncio.gather(*(self.catch_up(partition) for partition in partitions))
            return
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
        consumer: Consumer | None = None
        try:
            firsts = offset_bounds(self._cluster, [(self._topic, partition) for partition in rows])
            # only now, as `changelog.read_to_end` says
            consumer = Consumer(self._cluster.reading(self._group, fetch_wait_ms=_FETCH_WAIT_MS))
            consumer.assign([TopicPartition(self._topic, partition, firsts[(self._topic, partition)][0]) for partition in rows])
            while not stopping.is_set():
                found = fetch(consumer, wait_seconds=_POLL_SECONDS, most=_CHUNK_RECORDS)
                self._apply(rows, found.records, stopping)
                positions.update({record.partition(): record.offset() + 1 for record in found.records})
                positions.update({partition: end for (_, partition), end in found.ends.items()})
                if found.records or found.ends:
                    self._notify()
        except KafkaException as error:
            if not stopping.is_set():
                leave(f"following {self._topic} failed: {error.args[0]}")
        finally:
            if consumer is not None:
                consumer.close()

    def _apply(self, rows: Mapping[int, dict[bytes, bytes]], records: Sequence[Record], stopping: threading.Event) -> None:
        """Take records over. Called in the thread; what it returned from counts as read."""
        del stopping
        for record in records:
            apply_record(rows[record.partition()], record)

    def _notify(self) -> None:
        loop, moved = self._loop, self._moved
        if loop is not None and moved is not None and not loop.is_closed():
            wake: Callable[[], None] = moved.set
            loop.call_soon_threadsafe(wake)


class OrderFollower(Follower):
    """Follows the topic `control`, whose one partition is everybody's, and keeps its orders decoded.

    `decode` and `learn` as of a runner's input. An order whose schema the registry cannot be asked for holds up what is
    behind it, since it may block an address: a worker that starts is not ready until it was understood. One that is no
    order at all is left out, and said.
    """

    def __init__(
        self,
        cluster: Cluster,
        topic: str,
        *,
        group: str,
        decode: Callable[[Record], ControlEntry],
        learn: Callable[[Iterable[Record]], Awaitable[None]],
    ) -> None:
        super().__init__(cluster, topic, group=group)
        self._decode = decode
        self._learn = learn
        self._entries: dict[str, ControlEntry] = {}
        self.version = 0  # grows with every change
        self.changed: list[Callable[[], None]] = []  # called on the event loop

    def entry(self, scope: str) -> ControlEntry | None:
        """Return the order in force for a scope, as far as the topic was read."""
        return self._entries.get(scope)

    async def follow_all(self) -> None:
        """Follow the whole topic; return when it was read to the end that it has now."""
        await self.follow({0})

    def _apply(self, rows: Mapping[int, dict[bytes, bytes]], records: Sequence[Record], stopping: threading.Event) -> None:
        del rows
        for record in records:
            scope = (record.key() or b"").decode(errors="replace")
            if record.value() is None:
                self._entries.pop(scope, None)
                continue
            try:
                entry = self._understand(record, stopping)
            except NotifyError as error:
                log.error("order.unreadable offset=%d error=%s", record.offset(), error.reason)  # noqa: TRY400 - ours: it says all
                continue
            if entry is not None:
                self._entries[scope] = entry
        if records:
            self.version += 1

    def _understand(self, record: Record, stopping: threading.Event) -> ControlEntry | None:
        """Return the order in a record, None when following ends. Raises NotifyError for what is no order."""
        assert self._loop is not None
        was_asked = False
        while not stopping.is_set():
            try:
                return self._decode(record)
            except RegistryUnavailableError as error:
                if was_asked:
                    log.warning("order.waiting offset=%d error=%s", record.offset(), error)
                    stopping.wait(_ASK_AGAIN_SECONDS)
                was_asked = True
                asyncio.run_coroutine_threadsafe(_awaited(self._learn([record])), self._loop).result()
        return None

    def _notify(self) -> None:
        super()._notify()
        if self._loop is not None and not self._loop.is_closed():
            for told in self.changed:
                self._loop.call_soon_threadsafe(told)


class KeyFollower(Follower):
    """Follows the users' keys. `partitions`: of the users' topics; `open_key` as below, but for the row."""

    def __init__(self, cluster: Cluster, topic: str, *, group: str, partitions: int, open_key: Callable[[bytes], bytes]) -> None:
        super().__init__(cluster, topic, group=group)
        self._partitions = partitions
        self._open = open_key

    async def key_of(self, user_id: str) -> bytes | None:
        """Return a user's key, None when he has none or it was destroyed. Leaves for a wrong seal key. Raises TimeoutError."""
        user = user_id.encode()
        row = await self.look_up(partition_of(user, self._partitions), user)
        return None if row is None else self._open(row)

    def known_key(self, user_id: str) -> bytes | None:
        """Return a user's key as far as the topic was read. Leaves for a wrong seal key."""
        user = user_id.encode()
        row = self.get(partition_of(user, self._partitions), user)
        return None if row is None else self._open(row)


def open_key(codec: Codec, seal_key: bytes, row: bytes) -> bytes:
    """Return the key in a row of the users' keys. Leaves when the seal key is not the one that wrapped it."""
    stored = codec.decode(row, UserKey)
    try:
        return unwrap(seal_key, stored.wrapped, user_id=stored.user_id)
    except UnsealableError:
        # going on would skip every delivery as erased, or set every request aside
        leave("NOTIFY_SEAL_KEY is not the key that wrapped the users' keys")


async def _awaited(work: Awaitable[None]) -> None:
    await work
