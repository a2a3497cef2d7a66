"""What workers ask the cluster about topics. Blocking calls; the runner makes them in its pool."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

from confluent_kafka import Consumer, IsolationLevel, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._listoffsets import ListOffsetsResultInfo, OffsetSpec

from schemas.errors import SettingsError
from streams.transport.cluster import Cluster

T = TypeVar("T")
Answers = Mapping[TopicPartition, Future[ListOffsetsResultInfo]]
_CALL_SECONDS = 30.0
_TRY_SECONDS = 3.0
_PAUSE_SECONDS = 0.1
# what a new topic, a change of leaders, or a broker that just went or came, ends a call with. Of these answers librdkafka's
# `retriable` says no
PASSING = frozenset(
    {
        KafkaError._TIMED_OUT,  # noqa: SLF001 - public, for all their underscores
        KafkaError._TRANSPORT,  # noqa: SLF001
        KafkaError._ALL_BROKERS_DOWN,  # noqa: SLF001
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.UNKNOWN_LEADER_EPOCH,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.OFFSET_NOT_AVAILABLE,
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError.BROKER_NOT_AVAILABLE,
        KafkaError.KAFKA_STORAGE_ERROR,
        KafkaError.NOT_COORDINATOR,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicFacts:
    """What a topic is: a recreated one has another id."""

    id: str
    partitions: int


def topic_facts(cluster: Cluster, names: Sequence[str]) -> dict[str, TopicFacts]:
    """Return the id and partition count of each topic. Raises SettingsError naming every topic that is missing."""
    admin = AdminClient(cluster.config())
    futures = admin.describe_topics(TopicCollection(list(names)), request_timeout=_CALL_SECONDS)
    found: dict[str, TopicFacts] = {}
    problems: list[str] = []
    for name, future in futures.items():
        try:
            description = future.result()
        except KafkaException as error:
            problems.append(f"topic {name}: {error.args[0].str()}; `notify topics ensure` makes what is missing")
        else:
            found[name] = TopicFacts(id=str(description.topic_id), partitions=len(description.partitions))
    if problems:
        raise SettingsError(problems)
    return found


def offset_bounds(cluster: Cluster, places: Sequence[tuple[str, int]]) -> dict[tuple[str, int], tuple[int, int]]:
    """Return (first offset, end offset of what is committed) for each (topic, partition). Raises KafkaException."""
    if not places:
        return {}
    return patiently(partial(_offset_bounds, cluster, places))


def open_ends(cluster: Cluster, places: Sequence[tuple[str, int]]) -> dict[tuple[str, int], int]:
    """Return where the first transaction begins that has no end yet, for each (topic, partition) with one. Raises KafkaException."""
    if not places:
        return {}
    return patiently(partial(_open_ends, cluster, places))


def _open_ends(cluster: Cluster, places: Sequence[tuple[str, int]]) -> dict[tuple[str, int], int]:
    admin = _client(cluster, places)
    # the stable end first: what is written meanwhile looks open, and what ends meanwhile too, but nothing open looks ended
    latest = OffsetSpec.latest()  # type: ignore[no-untyped-call]  # upstream has no types here
    stable = _offsets(_asked(admin, places, latest, IsolationLevel.READ_COMMITTED))
    ends = _offsets(_asked(admin, places, latest, IsolationLevel.READ_UNCOMMITTED))
    return {place: offset for place, offset in stable.items() if offset < ends[place]}


def learn_leaders(admin: AdminClient, topics: Iterable[str], *, seconds: float = _TRY_SECONDS) -> None:
    """Let a client know who leads the partitions of `topics`. To be called before it is asked for offsets. Raises KafkaException.

    One that does not know looks for the leaders in two threads at once (librdkafka's `query_leaders_async`), and that ends in a lost
    answer and a time-out, or in a crash of the process: docs/adr/0015-clients-know-the-leaders.md.
    """
    for topic in sorted(set(topics)):
        admin.list_topics(topic, timeout=seconds)


def _client(cluster: Cluster, places: Sequence[tuple[str, int]]) -> AdminClient:
    """Return a new client that knows who leads `places`.

    New each time: one that waits for a leader that is gone does so until its time is up, and librdkafka 2.16 meanwhile connects to it
    thousands of times a second.
    """
    admin = AdminClient(cluster.config())
    learn_leaders(admin, (topic for topic, _ in places))
    return admin


def _asked(admin: AdminClient, places: Sequence[tuple[str, int]], what: OffsetSpec, level: IsolationLevel) -> Answers:
    asked = dict.fromkeys([TopicPartition(topic, partition) for topic, partition in places], what)
    return admin.list_offsets(asked, isolation_level=level, request_timeout=_TRY_SECONDS)


def _offsets(answers: Answers) -> dict[tuple[str, int], int]:
    return {(tp.topic, tp.partition): future.result().offset for tp, future in answers.items()}


def patiently(ask: Callable[[], T], *, seconds: float = _CALL_SECONDS) -> T:
    """Return what `ask` answers, again and again for `seconds` while the cluster is only between two states. Raises KafkaException."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return ask()
        except KafkaException as error:
            cause: KafkaError = error.args[0]
            if not (cause.retriable() or cause.code() in PASSING) or time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE_SECONDS)


def _offset_bounds(cluster: Cluster, places: Sequence[tuple[str, int]]) -> dict[tuple[str, int], tuple[int, int]]:
    admin = _client(cluster, places)
    earliest, latest = cast("list[OffsetSpec]", [OffsetSpec.earliest(), OffsetSpec.latest()])  # type: ignore[no-untyped-call]  # upstream has no types here
    first = _asked(admin, places, earliest, IsolationLevel.READ_COMMITTED)
    last = _offsets(_asked(admin, places, latest, IsolationLevel.READ_COMMITTED))
    return {place: (offset, last[place]) for place, offset in _offsets(first).items()}


def committed_offsets(cluster: Cluster, group: str, places: Sequence[tuple[str, int]]) -> dict[tuple[str, int], int]:
    """Return what `group` committed for each (topic, partition) that it committed anything for. Joins no group. Raises KafkaException."""
    if not places:
        return {}
    return patiently(partial(_committed_offsets, cluster, group, places))


def _committed_offsets(cluster: Cluster, group: str, places: Sequence[tuple[str, int]]) -> dict[tuple[str, int], int]:
    consumer = Consumer(cluster.config(group_id=group, enable_auto_commit=False))
    try:
        found = consumer.committed([TopicPartition(topic, partition) for topic, partition in places], timeout=_CALL_SECONDS)
    finally:
        consumer.close()
    return {(tp.topic, tp.partition): tp.offset for tp in found if tp.offset >= 0}
