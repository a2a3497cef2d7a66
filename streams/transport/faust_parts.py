"""Every subclass of a Faust class, and so every place that builds on Faust's private parts (pinned: 0.15.3).

Faust's consumer keeps the group: membership, assignment, offsets. It fetches nothing: all partitions are paused in it,
and records come from `streams.transport.reader`. Faust's recovery keeps its place in a rebalance but asks the runner to
acquire the partitions, which fences earlier owners before it reads a changelog. tests/contract asserts that each
private name used here exists.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import aiokafka
import faust
from faust.assignor.partition_assignor import PartitionAssignor
from faust.exceptions import ImproperlyConfigured
from faust.tables.manager import TableManager
from faust.tables.recovery import RebalanceAgain, Recovery, ServiceStopped
from faust.transport.consumer import Fetcher
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from faust.types.tuples import ConsumerMessage
from mode import Service

from streams.transport.cluster import leave

if TYPE_CHECKING:
    from streams.transport.reader import Batch

FAUST_VERSION = "0.15.3"
_LAST_SECONDS = 1.0  # for tasks to end that were cancelled
log = logging.getLogger(__name__)


class Owner(Protocol):
    """What the transport asks of the runner."""

    async def acquire(self, assigned: set[TP]) -> None:
        """Own the assigned partitions: fence, recover, ready to decide."""

    async def start_reading(self) -> None:
        """Read every owned input from its watermark on."""

    async def drain(self) -> None:
        """Stop reading; finish or abandon what runs, bounded in time."""

    def resume(self) -> None:
        """Let batches pass that were read for the current assignment."""

    async def next_batch(self) -> Batch:
        """Return the next batch read for the current assignment."""

    def committable(self) -> Mapping[TP, int]:
        """Return the offsets to commit to the group: a hint, and what lag tools look at."""


class NotifyApp(faust.App):
    """A Faust app whose records travel in batches and transactions. `owner` is set before it starts."""

    owner: Owner
    health_failed: Callable[[BaseException], None] = staticmethod(lambda _error: None)

    def _new_transport(self) -> BatchTransport:
        return BatchTransport(self.conf.broker_consumer, self)


class PromptWorker(faust.Worker):
    """Faust's worker, gone when its apps have stopped: mode waits a second for tasks that never end, and a second for nothing."""

    def _gather_all(self) -> None:
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self.loop.run_until_complete(asyncio.wait(tasks, timeout=_LAST_SECONDS))

    async def _sentinel_task(self) -> None:
        """Let what is cancelled take its turn."""


class KnowingAssignor(PartitionAssignor):
    """Faust's assignor, which takes a topic that the metadata lacks for one without partitions.

    The leader of a group that asks just after the only broker came back would assign nothing to anybody: a stable group that nobody
    who comes back, as the static member that he was, has a reason to change.
    """

    def assign(self, cluster: Any, member_metadata: Any) -> Any:
        """Assign as Faust does, or end the worker: the group asks the next leader, or it again."""
        wanted = {topic for member in member_metadata.values() for topic in member.subscription}
        if missing := sorted(topic for topic in wanted if not cluster.partitions_for_topic(topic)):
            leave(f"asked to assign the partitions of {len(wanted)} topics while the metadata lacks {len(missing)}, such as {missing[0]}")
        return super().assign(cluster, member_metadata)


class GroupThread(driver.AIOKafkaConsumerThread):
    """aiokafka's consumer as a group member only."""

    async def on_start(self) -> None:
        """Start a consumer that is always about to fetch.

        One that has fetched nothing for `broker_max_poll_interval` (1,000 s) leaves its group, and never joins it again.
        """
        await super().on_start()
        self.add_context(self._ensure_consumer()._subscription.fetch_context())  # noqa: SLF001 - aiokafka has no public way

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        """Pause everything in aiokafka, so that it fetches nothing, then go on as Faust does."""
        consumer = self._ensure_consumer()
        consumer.pause(*(aiokafka.TopicPartition(tp.topic, tp.partition) for tp in assigned))
        await super().on_partitions_assigned(assigned, generation_id)

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Do nothing: Faust would complain that aiokafka fetches nothing. `/health/ready` watches progress."""


class BatchConsumer(driver.Consumer):
    """Faust's consumer, with batches from the runner and offsets from its watermarks."""

    def _new_consumer_thread(self) -> GroupThread:
        return GroupThread(self, loop=self.loop, beacon=self.beacon)

    @property
    def _owner(self) -> Owner:
        return cast("NotifyApp", self.app).owner

    async def pump(self, is_stopped: Callable[[], bool]) -> None:
        """Hand batches to Faust's conductor, which hands them to the agents."""
        while not (self.should_stop or is_stopped()):
            batch = await self._owner.next_batch()
            tp = TP(batch.topic, batch.partition)
            message = ConsumerMessage(
                batch.topic, batch.partition, 0, 0.0, 0, None, None, cast("Any", batch), None, tp=tp,
                generation_id=self.app.consumer_generation_id,
            )  # fmt: skip
            try:
                await self.callback(message)
            except KeyError:
                # the conductor has no callback for a partition that a rebalance took a moment ago
                log.debug("batch.stale topic=%s partition=%d", batch.topic, batch.partition)

    def ack(self, message: Any) -> bool:
        """Do nothing: a record is done when the runner's transaction is committed."""
        message.acked = True
        return False

    async def wait_empty(self) -> None:
        """Let the runner drain, then commit what it reached. Faust calls this before partitions are given up."""
        if hasattr(self.app, "owner"):  # not when the start failed
            await self._owner.drain()
            await self.commit()

    async def force_commit(self, topics: Any = None, start_new_transaction: bool = True) -> bool:  # noqa: ARG002 - Faust's signature
        """Commit the watermarks of the partitions that are still ours."""
        assignment = self.assignment()
        changed = {
            tp: offset for tp, offset in self._owner.committable().items() if tp in assignment and self._committed_offset[tp] != offset
        }
        if not changed or not await self._commit(changed):
            return False
        self._committed_offset.update(changed)
        return True

    async def perform_seek(self) -> None:
        """Start reading at the watermarks. Faust calls this when recovery is complete."""
        await self._owner.start_reading()


class BatchFetcher(Fetcher):
    """Faust's fetcher service, pumping batches instead of messages."""

    @Service.task
    async def _fetcher(self) -> None:
        await cast("BatchConsumer", self.app.consumer).pump(lambda: self.should_stop)


class BatchTransport(driver.Transport):
    """aiokafka's transport with the parts above."""

    Consumer: ClassVar[Any] = BatchConsumer
    Fetcher: ClassVar[Any] = BatchFetcher


class BatchRecovery(Recovery):
    """Faust's recovery, reading changelogs in bulk and only after the partitions are fenced."""

    @Service.task
    async def _restart_recovery(self) -> None:
        app = cast("NotifyApp", self.app)
        while not self.should_stop:
            if await self.wait_for_stopped(self.signal_recovery_start):  # type: ignore[arg-type]  # mode's annotation names its own Event
                return
            self.signal_recovery_start.clear()
            generation = self._generation_id
            try:
                await self._wait(app.owner.acquire(set(app.assignor.assigned_actives())))
                await self.on_recovery_completed(generation)
                # not before: Faust clears its queues when it resumes, also when it was resumed by an assignment that is over
                app.owner.resume()
            except RebalanceAgain:
                self.log.info("another rebalance began during recovery")
            except ServiceStopped:
                return
            except asyncio.CancelledError:
                raise
            except Exception as error:
                app.health_failed(error)


class BatchTableManager(TableManager):
    """Faust's table manager with the recovery above, started at once."""

    async def on_start(self) -> None:
        """Register the tables. Faust waits a second for tables that agents make as they start; ours make none."""
        await self._update_channels()
        await self.recovery.start()

    @property
    def recovery(self) -> Recovery:
        """Recovery service used by this table manager."""
        if self._recovery is None:
            self._recovery = BatchRecovery(self.app, self, beacon=self.beacon, loop=self.loop)
        return self._recovery


class PartitionedTable(faust.Table):  # type: ignore[type-arg]  # Faust's Table is generic only for annotations
    """A table whose rows live in one dict a partition, encoded. Only the runner writes, in its transactions."""

    def __init__(self, app: faust.App, *, name: str, changelog: str, partitions: int) -> None:
        topic = app.topic(changelog, key_type=bytes, value_type=bytes, internal=False, partitions=partitions)
        super().__init__(app, name=name, partitions=partitions, key_type=bytes, value_type=bytes, changelog_topic=topic)
        self.shards: dict[int, dict[bytes, bytes]] = {}

    def __getitem__(self, key: Any) -> bytes:
        for rows in self.shards.values():
            if key in rows:
                return rows[key]
        raise KeyError(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError(f"table {self.name}: rows are changed by decisions only")

    def __delitem__(self, key: Any) -> None:
        raise TypeError(f"table {self.name}: rows are changed by decisions only")

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.shards.values())

    def apply_changelog_batch(self, batch: Iterable[Any]) -> None:
        """Do nothing: the runner reads changelogs."""

    async def on_recovery_completed(self, active_tps: set[TP], standby_tps: set[TP]) -> None:
        """Do nothing more: rows of lost partitions went with their shard."""


class BatchSchema(faust.Schema):  # type: ignore[type-arg]  # as above
    """The value of an input's message is the batch itself. Decoding is the runner's, so it cannot raise here."""

    def loads_key(self, app: Any, message: Any, *, loads: Any = None, serializer: Any = None) -> None:
        """Return no key: the batch has many."""

    def loads_value(self, app: Any, message: Any, *, loads: Any = None, serializer: Any = None) -> Any:  # noqa: ARG002 - Faust's signature
        """Return the batch."""
        return message.value


def check_version() -> None:
    """Raise ImproperlyConfigured when Faust is not the version that this module was written against."""
    if faust.__version__ != FAUST_VERSION:
        raise ImproperlyConfigured(f"faust-streaming is {faust.__version__}; streams/transport builds on {FAUST_VERSION}")
