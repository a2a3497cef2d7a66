"""Moves everything that is keyed by user to another number of partitions, while no worker runs.

A user's partition is a hash modulo the count, so with another count most users live elsewhere: the rows of their tables, what
is told of them in `decisions` and `status`, and the watermarks that say how far those were read. Kafka can add partitions
to a topic and cannot take them away, so the count only grows. In this order, so that a run that was cut off is simply run again:

1. Topics that hold nothing that is still needed grow. What other services write meanwhile is put right by its reader.
2. Each changelog grows; then each row whose user moved is written to his new partition and deleted from the old one, both in
   one transaction; the watermarks among them stay. What was moved is where it belongs, and is not looked at again.
3. `decisions` and `status` grow; what is told of users who moved is copied, with its time, and each copy says where it was
   read: a later run goes on behind it. Then the watermarks of their readers are put behind the copies.
4. `dead` grows, which every worker writes to. Until then each worker finds a count that it does not expect, whichever it is
   told, and does not start.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto
from functools import partial
from typing import Any

from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions  # type: ignore[attr-defined]  # exported, but not said so

from schemas import topics
from schemas.errors import SettingsError
from schemas.ids import partition_of, partition_of_notification
from streams.roles import Role
from streams.topics import DEAD_MAX_BYTES, Count, TopicSpec, physical
from streams.topology import PROGRESS, TOPOLOGY, Step, all_topics
from streams.transport.admin import TopicFacts, committed_offsets, offset_bounds, topic_facts
from streams.transport.changelog import apply_record, parted_key, read_to_end, shared_key
from streams.transport.cluster import Cluster
from streams.transport.records import Record, fetch
from streams.transport.writer import Headers, Writer

ANSWER_SECONDS = 10.0
VISIBLE_SECONDS = 30.0
SILENCE_SECONDS = 60.0
CHUNK_RECORDS = 2_000
COPIED_FROM = "copied-from"  # header of a copy: the counts, and where it was read
_GROUP = "notify.{env}.migrate"  # also the transactional id

HISTORY = (topics.DECISIONS, topics.STATUS)
Progress = Callable[[int], None]
_NUMBERS_DIGITS = 32  # of a notification id, with which a delivery id begins


def _by_key(key: bytes, count: int) -> int:
    return partition_of(key, count)


def _by_notification(key: bytes, count: int) -> int:
    return partition_of_notification(key[:_NUMBERS_DIGITS].decode(), count)


def _by_watcher(key: bytes, count: int) -> int:
    return partition_of(key.rpartition(b"\0")[2], count)


# how the partition of a row follows from its key. None: it does not, so that the row goes to every partition
PLACED: Mapping[str, Callable[[bytes, int], int] | None] = {
    "preferences": _by_key,
    "keys": _by_key,
    "watching": _by_key,
    "watches": _by_watcher,
    "inbox": _by_key,
    "seen": _by_notification,
    "attempts": _by_notification,
    "notifications": _by_notification,
    "references": _by_key,
    "waiting": _by_key,
    # a payment, say, whose last word was told: the row does not say of whom, and is looked for by its own requests only
    "subjects": None,
    # calls of the day that a partition counted against its share: a new one begins with what another has used, not with none
    "used": None,
}


# changelogs that hold one table's rows, by their own keys; in the others a key names its table
_TABLE_OF = {topic: table for step in TOPOLOGY for table, topic in step.changelogs().items() if topic != step.changelog}


class Place(Enum):
    """Where a row belongs that belongs to no partition."""

    STAYS = auto()
    EVERYWHERE = auto()


class Kind(StrEnum):
    """What is done with a topic."""

    GROW = "grow"
    ROWS = "rows"
    HISTORY = "history"
    WATERMARKS = "watermarks"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What the migration does with one topic. `moving` of `records` change their partition; watermarks are not among them."""

    topic: str
    kind: Kind
    found: int
    wanted: int
    records: int = 0
    moving: int = 0


@dataclass(slots=True)
class Migration:
    """From `old` to `new` partitions of all topics that are keyed by user. Every call blocks."""

    cluster: Cluster
    env: str
    old: int
    new: int
    _facts: dict[str, TopicFacts] = field(default_factory=dict)
    _known_watermarks: dict[str, dict[tuple[str, int], int]] = field(default_factory=dict)  # by changelog, as the workers left them

    # ---- before

    def problems(self) -> list[str]:
        """Return why it cannot be done now; nothing when it can. Changes nothing. Raises KafkaException, SettingsError."""
        if self.new <= self.old:
            return [f"there are {self.old} partitions, and Kafka cannot take any away: choose more than {self.old}"]
        self._look()
        counts = {topic: facts.partitions for topic, facts in self._facts.items()}
        if set(counts.values()) == {self.new}:
            return [f"all topics have {self.new} partitions already: set NOTIFY_PARTITIONS={self.new} and start the workers"]
        if counts[topics.DEAD] != self.old:
            return [f"the topics have {counts[topics.DEAD]} partitions, not {self.old} as NOTIFY_PARTITIONS says: correct it"]
        others = sorted(topic for topic, count in counts.items() if count not in {self.old, self.new})
        if others:
            name, count = physical(self.env, others[0]), counts[others[0]]
            return [f"{name} has {count} partitions, neither {self.old} nor {self.new}: end the migration to {count} that was begun first"]
        busy = self._busy()
        if busy:
            named = "one with a stable name is gone only after the session time-out"
            return [f"workers are in their groups ({', '.join(busy)}): stop all of them; {named}"]
        until = "start the workers, wait until nothing is behind, and stop them again"
        return [
            f"{step.role} has not read {count:,} records of {physical(self.env, topic)}: {until}" for step, topic, count in self._unread()
        ]

    def plan(self, progress: Progress = lambda _count: None) -> list[Part]:
        """Return what would be done with each topic. Reads all tables and the history; changes nothing."""
        self._look()
        parts = [Part(topic=topic, kind=Kind.GROW, found=self._count(topic), wanted=self.new) for topic in self._plain()]
        for topic in self._changelogs():
            if self._holds_watermarks_only(topic):
                parts.append(Part(topic=topic, kind=Kind.WATERMARKS, found=self._count(topic), wanted=self.new))
                continue
            rows = moving = 0
            for partition, found in self._rows(topic, progress):
                for key in found:
                    place = self._place(topic, key)
                    rows += place is not Place.STAYS
                    moving += place not in {Place.STAYS, partition}
            parts.append(Part(topic=topic, kind=Kind.ROWS, found=self._count(topic), wanted=self.new, records=rows, moving=moving))
        for topic in HISTORY:
            records = moving = 0
            for record in self._records(topic, dict.fromkeys(range(self.old), 0)):
                records += 1
                moving += self._moves(record)
                progress(1)
            parts.append(Part(topic=topic, kind=Kind.HISTORY, found=self._count(topic), wanted=self.new, records=records, moving=moving))
        return parts

    # ---- doing it

    def run(self, progress: Progress = lambda _count: None) -> None:
        """Do it, or what is left of it. `problems` came first. Raises KafkaException, SettingsError, FencedError."""
        group = _GROUP.format(env=self.env)
        writer = Writer(self.cluster, transactional_id=group, max_message_bytes=DEAD_MAX_BYTES)
        # a run that was killed may have left a transaction open: what it wrote becomes visible, or never
        writer.acquire()
        self._known_watermarks.clear()  # somebody may have thought about it for long
        self._look()
        self._grow(writer, [topic for topic in self._plain() if topic != topics.DEAD])
        for topic in self._changelogs():
            self._grow(writer, [topic])
            if not self._holds_watermarks_only(topic):
                self._move_rows(writer, topic, progress)
        for topic in HISTORY:
            reached = self._reached(topic) if self._count(topic) == self.new else {}
            self._grow(writer, [topic])
            self._copy(writer, topic, reached, progress)
            self._pass(writer, topic)
        self._append_again(writer, topics.SIGNALS)
        self._grow(writer, [topics.DEAD])

    def _move_rows(self, writer: Writer, topic: str, progress: Progress) -> None:
        name = physical(self.env, topic)
        spread: dict[int, dict[bytes, bytes]] = {}
        # an even number: a row and its deletion are never parted
        for chunk in _chunks(self._moved(topic, spread, progress), 2 * CHUNK_RECORDS):
            writer.begin()
            for partition, key, value in chunk:
                writer.produce(name, value, key, partition)
            writer.commit()
        everything: dict[bytes, bytes] = {}
        for rows in spread.values():
            everything |= rows
        missing = ((partition, key) for key in everything for partition in range(self.new) if key not in spread[partition])
        for chunk in _chunks(missing, 2 * CHUNK_RECORDS):
            writer.begin()
            for partition, key in chunk:
                writer.produce(name, everything[key], key, partition)
            writer.commit()

    def _moved(self, topic: str, spread: dict[int, dict[bytes, bytes]], progress: Progress) -> Iterator[tuple[int, bytes, bytes | None]]:
        """Yield each row that moves, at its new place, and its deletion at the old one. Fill `spread`: what goes everywhere."""
        for partition, rows in self._rows(topic, progress):
            everywhere = spread[partition] = {}
            for key, value in rows.items():
                place = self._place(topic, key)
                if place is Place.EVERYWHERE:
                    everywhere[key] = value
                elif isinstance(place, int) and place != partition:
                    yield place, key, value
                    yield partition, key, None

    def _copy(self, writer: Writer, topic: str, reached: Mapping[int, int], progress: Progress) -> None:
        name = physical(self.env, topic)
        records = self._records(topic, {partition: reached.get(partition, -1) + 1 for partition in range(self.old)})
        moved = (record for record in _counted(records, progress) if self._moves(record))
        for chunk in _chunks(moved, CHUNK_RECORDS):
            writer.begin()
            for record in chunk:
                here = f"{self._mark}{record.partition()}:{record.offset()}".encode()
                headers: Headers = [*(record.headers() or ()), (COPIED_FROM, here)]
                partition = partition_of(record.key() or b"", self.new)
                writer.produce(name, record.value(), record.key(), partition, headers, timestamp_ms=record.timestamp()[1])
            writer.commit()

    def _pass(self, writer: Writer, topic: str) -> None:
        """Put the watermarks of a topic's readers behind everything in it."""
        ends = {partition: end for (_, partition), (_, end) in self._bounds(topic, range(self.new)).items()}
        for step in self._readers(topic):
            if not self._has_run(step):
                continue
            writer.begin()
            for partition, end in ends.items():
                writer.produce(physical(self.env, step.changelog), b"%d" % end, self._watermark_key(topic), partition)
            writer.commit()
            # a hint for whoever asks the group how far it is
            offsets = [TopicPartition(physical(self.env, topic), partition, end) for partition, end in ends.items()]
            request = ConsumerGroupTopicPartitions(f"notify.{self.env}.{step.role}", offsets)
            admin = AdminClient(self.cluster.config())
            for future in admin.alter_consumer_group_offsets([request], request_timeout=ANSWER_SECONDS).values():
                future.result()

    def _append_again(self, writer: Writer, topic: str) -> None:
        """Move what came into an input after it was found to be read to its end: its reader takes each record where it lies."""
        (step,) = self._readers(topic)
        watermarks = self._watermarks(step)
        starts = {partition: watermarks.get((topic, partition), 0) for partition in range(self.old)}
        records = list(self._records(topic, starts))
        if not records:
            return
        ends = {partition: end for (_, partition), (_, end) in self._bounds(topic, range(self.old)).items()}
        writer.begin()
        for record in records:
            partition = partition_of(record.key() or b"", self.new)
            writer.produce(physical(self.env, topic), record.value(), record.key(), partition, record.headers())
        for partition, end in ends.items():
            writer.produce(physical(self.env, step.changelog), b"%d" % end, self._watermark_key(topic), partition)
        writer.commit()

    def _grow(self, writer: Writer, names: Sequence[str]) -> None:
        """Give topics their new partitions, and return when the brokers know of them, and `writer` too."""
        asked = [NewPartitions(physical(self.env, topic), self.new) for topic in names if self._count(topic) < self.new]
        if not asked:
            return
        admin = AdminClient(self.cluster.config())
        for future in admin.create_partitions(asked, request_timeout=2 * ANSWER_SECONDS).values():
            future.result()
        deadline = time.monotonic() + VISIBLE_SECONDS
        while True:
            found = admin.list_topics(timeout=ANSWER_SECONDS).topics
            missing = [
                each.topic for each in asked if not _is_grown(found.get(each.topic), self.new) or writer.partitions(each.topic) < self.new
            ]
            if not missing:
                break
            if time.monotonic() > deadline:
                problem = f"{missing[0]} has no leaders for its new partitions after {VISIBLE_SECONDS:.0f} s: are all brokers up?"
                raise SettingsError([problem])
        self._look()

    # ---- what is there

    def _look(self) -> None:
        names = {spec.name: physical(self.env, spec.name) for spec in self._specs()}
        found = topic_facts(self.cluster, list(names.values()))
        self._facts = {topic: found[name] for topic, name in names.items()}

    def _specs(self) -> list[TopicSpec]:
        return [spec for spec in all_topics() if spec.count is Count.USER]

    def _count(self, topic: str) -> int:
        return self._facts[topic].partitions

    def _steps(self) -> list[Step]:
        return [step for step in TOPOLOGY if step.count is Count.USER]

    def _changelogs(self) -> list[str]:
        """Return the topics of all tables, those first of which no row moves."""
        found = dict.fromkeys(topic for step in self._steps() for topic in step.changelogs().values())
        return sorted(found, key=lambda topic: not self._holds_watermarks_only(topic))

    def _holds_watermarks_only(self, topic: str) -> bool:
        return any(topic == step.changelog and step.own_tables() == [PROGRESS] for step in self._steps())

    def _plain(self) -> list[str]:
        kept = {*HISTORY, *self._changelogs()}
        return [spec.name for spec in self._specs() if spec.name not in kept]

    def _readers(self, topic: str) -> list[Step]:
        return [step for step in self._steps() if topic in step.reads]

    def _busy(self) -> list[str]:
        admin = AdminClient(self.cluster.config())
        groups = {f"notify.{self.env}.{role}": role for role in Role}
        busy: list[str] = []
        for group, future in admin.describe_consumer_groups(list(groups), request_timeout=ANSWER_SECONDS).items():
            try:
                members = len(future.result(2 * ANSWER_SECONDS).members)
            except KafkaException as error:
                if error.args[0].code() != KafkaError.GROUP_ID_NOT_FOUND:  # newer brokers answer so for a group that never was
                    raise
                members = 0
            if members:
                busy.append(f"{groups[group]}: {members}")
        return busy

    def _unread(self) -> Iterator[tuple[Step, str, int]]:
        """Yield (step, input, records that it has not read). Of a step that never ran nothing is asked."""
        for step in self._steps():
            watermarks = self._watermarks(step)
            places = [(physical(self.env, topic), partition) for topic in step.reads for partition in range(self._count(topic))]
            hints = committed_offsets(self.cluster, f"notify.{self.env}.{step.role}", places)
            if not watermarks and not hints:
                continue
            for topic in step.reads:
                starts = {
                    partition: max(watermarks.get((topic, partition), 0), hints.get((physical(self.env, topic), partition), 0))
                    for partition in range(self._count(topic))
                }
                count = sum(1 for record in self._records(topic, starts) if not self._is_copied_now(record))
                # what came into it since an earlier run is moved at the end
                if count and not (topic == topics.SIGNALS and self._count(topic) == self.new):
                    yield step, topic, count

    def _has_run(self, step: Step) -> bool:
        return bool(self._watermarks(step))

    def _watermarks(self, step: Step) -> dict[tuple[str, int], int]:
        """Return (input, partition) -> watermark, as the step's workers left it."""
        if step.changelog not in self._known_watermarks:
            self._known_watermarks[step.changelog] = {
                (read, partition): int(row)
                for partition, rows in self._rows(step.changelog)
                for read in step.reads
                if (row := rows.get(self._watermark_key(read))) is not None
            }
        return self._known_watermarks[step.changelog]

    def _watermark_key(self, topic: str) -> bytes:
        return shared_key(PROGRESS, f"{self._facts[topic].id} {topic}".encode())

    @property
    def _mark(self) -> str:
        return f"{self.old}>{self.new}:"

    def _reached(self, topic: str) -> dict[int, int]:
        """Return for each old partition the offset of the last record that an earlier run copied."""
        reached: dict[int, int] = {}
        for record in self._records(topic, dict.fromkeys(range(self.new), 0)):
            mark = dict(record.headers() or ()).get(COPIED_FROM, b"").decode()
            if mark.startswith(self._mark):
                partition, offset = map(int, mark.removeprefix(self._mark).split(":"))
                reached[partition] = max(offset, reached.get(partition, -1))
        return reached

    # ---- reading

    def _place(self, topic: str, key: bytes) -> int | Place:
        """Return the new partition of a row of a changelog."""
        table = _TABLE_OF.get(topic)
        if table is None:
            table, key = parted_key(key)
        if table not in PLACED:
            return Place.STAYS  # watermarks, and what another release left behind
        place = PLACED[table]
        return Place.EVERYWHERE if place is None else place(key, self.new)

    def _moves(self, record: Record) -> bool:
        """Say whether a record of the history is its user's, and he moves. What an earlier migration left behind is nobody's."""
        key = record.key() or b""
        is_his = partition_of(key, self.old) == record.partition()
        return is_his and partition_of(key, self.new) != record.partition()

    def _is_copied_now(self, record: Record) -> bool:
        return dict(record.headers() or ()).get(COPIED_FROM, b"").startswith(self._mark.encode())

    def _rows(self, topic: str, progress: Progress = lambda _count: None) -> Iterator[tuple[int, dict[bytes, bytes]]]:
        """Yield (partition, rows) of a compacted topic, a partition at a time."""
        name = physical(self.env, topic)
        for partition in range(self._count(topic)):
            rows: dict[bytes, bytes] = {}
            apply = {(name, partition): partial(apply_record, rows)}
            read_to_end(self.cluster, group=_GROUP.format(env=self.env), apply=apply, progress=progress)
            yield partition, rows

    def _bounds(self, topic: str, partitions: Iterable[int]) -> dict[tuple[str, int], tuple[int, int]]:
        return offset_bounds(self.cluster, [(physical(self.env, topic), partition) for partition in partitions])

    def _records(self, topic: str, starts: Mapping[int, int]) -> Iterator[Record]:
        """Yield the committed records of partitions from `starts` on, to the ends that they have now, by position."""
        name = physical(self.env, topic)
        bounds = {partition: found for (_, partition), found in self._bounds(topic, starts).items()}
        ends = {partition: high for partition, (low, high) in bounds.items() if max(low, starts[partition]) < high}
        if not ends:
            return
        consumer = Consumer(self.cluster.reading(_GROUP.format(env=self.env), fetch_wait_ms=10))
        try:
            consumer.assign([TopicPartition(name, partition, max(starts[partition], bounds[partition][0])) for partition in ends])
            silent_since = time.monotonic()
            while ends:
                found = fetch(consumer, wait_seconds=0.2, most=5_000)
                if found.records or found.ends:
                    silent_since = time.monotonic()
                elif time.monotonic() - silent_since > SILENCE_SECONDS:
                    raise SettingsError([f"Kafka sends nothing of {name} for {SILENCE_SECONDS:.0f} s: are all brokers up?"])
                for record in found.records:
                    if record.partition() in ends and record.offset() < ends[record.partition()]:
                        yield record
                    if record.offset() + 1 >= ends.get(record.partition(), 0):
                        ends.pop(record.partition(), None)
                for (_, partition), end in found.ends.items():
                    if end >= ends.get(partition, 0):
                        ends.pop(partition, None)
        finally:
            consumer.close()


def _is_grown(topic: Any, count: int) -> bool:
    return topic is not None and len(topic.partitions) >= count and all(each.leader >= 0 for each in topic.partitions.values())


def _counted(records: Iterator[Record], progress: Progress) -> Iterator[Record]:
    for record in records:
        progress(1)
        yield record


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
