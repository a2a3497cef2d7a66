"""Topics as this system needs them: what differs in the cluster, making it so, and a worker's check before it starts.

Partitions are never added: keys would move to other partitions, away from their tables. Topics of other services are
made where they are missing (a laptop) and never altered.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar, cast

from confluent_kafka import ConsumerGroupTopicPartitions, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # exported, but not said so
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ConfigSource,
    NewTopic,
    OffsetSpec,
    ResourceType,
    TopicMetadata,
)

from schemas.errors import SettingsError
from streams.topics import Count, TopicSpec, physical
from streams.transport.admin import learn_leaders, patiently

T = TypeVar("T")
ANSWER_SECONDS = 10.0
VISIBLE_SECONDS = 30.0
_POLL_SECONDS = 0.05
SAFE_REPLICAS = 3
OUR_PREFIX = "notify."
SHOWN_NAMES = 3

# a table is recovered from its changelog: keep it small. A tombstone of a key erases a person: compact within a day
COMPACTION: Mapping[str, str] = {
    "cleanup.policy": "compact",
    "min.cleanable.dirty.ratio": "0.1",
    "segment.ms": str(3_600_000),
    "segment.bytes": str(100 * 2**20),
    "max.compaction.lag.ms": str(86_400_000),
}


class StartAt(StrEnum):
    """Where a consumer group begins that has no position yet."""

    EARLIEST = "earliest"
    LATEST = "latest"


class Action(StrEnum):
    """What is to be done with a topic."""

    CREATE = "create"
    ALTER = "alter"
    KEEP = "keep"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A topic as it should be. `name` as in the cluster; `config`: the settings that differ from Kafka's defaults."""

    name: str
    count: Count
    partitions: int
    replication: int
    config: Mapping[str, str]

    @property
    def is_ours(self) -> bool:
        """Say whether this service owns the topic: others' are never altered."""
        return self.name.startswith(OUR_PREFIX)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A setting of a topic that is not as it should be. `found` None: there is none."""

    setting: str
    found: str | None
    wanted: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a topic needs. `problem`: why it cannot be had; `advice`: what an operator should look at, which stops nothing."""

    target: Target
    action: Action
    differences: tuple[Difference, ...] = ()
    problem: str | None = None
    advice: str | None = None


def targets(specs: Iterable[TopicSpec], *, env: str, counts: Mapping[Count, int], replication: int) -> list[Target]:
    """Return the topics that `specs` become in a cluster."""
    return [
        Target(
            name=physical(env, spec.name),
            count=spec.count,
            partitions=counts[spec.count],
            replication=replication,
            config=_config(spec, replication),
        )
        for spec in specs
    ]


def plan(admin: AdminClient, wanted: Sequence[Target]) -> list[Change]:
    """Return what each topic of `wanted` needs. Changes nothing. Raises KafkaException when no broker answers."""
    found = admin.list_topics(timeout=ANSWER_SECONDS).topics
    existing = [target for target in wanted if target.name in found and found[target.name].error is None]
    configs = describe(admin, [target.name for target in existing])
    return [
        _compare(target, found[target.name], configs[target.name])
        if target.name in configs
        else Change(target=target, action=Action.CREATE, differences=_all_of(target))
        for target in wanted
    ]


def problems(changes: Sequence[Change]) -> list[str]:
    """Return why `changes` cannot be made: one sentence for all topics with the same problem; nothing when they can."""
    refused = [change for change in changes if change.action is Action.REFUSE]
    return _count_problems((change.target, int(change.differences[0].found or 0)) for change in refused)


def apply(admin: AdminClient, changes: Sequence[Change]) -> None:
    """Create and alter what `changes` ask for, and return when every broker knows of it.

    Raises SettingsError, before anything is changed, with the problem of each refused topic; KafkaException when Kafka refuses.
    """
    refused = problems(changes)
    if refused:
        raise SettingsError(refused)
    created = [change.target for change in changes if change.action is Action.CREATE]
    altered = [change for change in changes if change.action is Action.ALTER]
    if created:
        _create(admin, created)
    if altered:
        _alter(admin, altered)


def check_partitions(admin: AdminClient, wanted: Iterable[Target]) -> None:
    """Return when every topic of `wanted` is there with its number of partitions.

    Raises SettingsError with a sentence for those that are missing and one for each wrong count.
    A worker that went on would look for keys in the wrong partitions.
    """
    _check(admin.list_topics(timeout=ANSWER_SECONDS).topics, wanted)


def _check(found: Mapping[str, TopicMetadata], wanted: Iterable[Target]) -> None:
    missing: list[str] = []
    wrong: list[tuple[Target, int]] = []
    for target in wanted:
        topic = found.get(target.name)
        if topic is None or topic.error is not None:
            missing.append(target.name)
        elif len(topic.partitions) != target.partitions:
            wrong.append((target, len(topic.partitions)))
    problems = _count_problems(wrong)
    if missing:
        some = ", ".join(missing[:SHOWN_NAMES]) + (f" and {len(missing) - SHOWN_NAMES} more topics" if len(missing) > SHOWN_NAMES else "")
        problems.append(f"{some} {'does' if len(missing) == 1 else 'do'} not exist: run `notify topics ensure`")
    if problems:
        raise SettingsError(problems)


def start_group(admin: AdminClient, group: str, topics: Sequence[str], at: StartAt) -> dict[tuple[str, int], int]:
    """Commit where `group` begins in `topics`, on the partitions where it has no position; return those offsets."""
    counts = {name: len(topic.partitions) for name, topic in admin.list_topics(timeout=ANSWER_SECONDS).topics.items()}
    places = [TopicPartition(name, number) for name in topics for number in range(counts.get(name, 0))]
    committed = committed_offsets(admin, group, places)
    unset = [place for place in places if (place.topic, place.partition) not in committed]
    if not unset:
        return {}
    spec = offset_spec(at)

    def found() -> list[TopicPartition]:
        learn_leaders(admin, (place.topic for place in unset), seconds=ANSWER_SECONDS)
        futures = admin.list_offsets(dict.fromkeys(unset, spec), request_timeout=ANSWER_SECONDS)
        return [TopicPartition(place.topic, place.partition, future.result(ANSWER_SECONDS).offset) for place, future in futures.items()]

    # topics made a moment ago: the broker that leads them may not know yet that it does
    offsets = patiently(found)
    request = ConsumerGroupTopicPartitions(group, offsets)
    for future in admin.alter_consumer_group_offsets([request], request_timeout=ANSWER_SECONDS).values():
        _check_offsets(_result(future).topic_partitions)
    return {(place.topic, place.partition): place.offset for place in offsets}


def committed_offsets(admin: AdminClient, group: str, places: Sequence[TopicPartition]) -> dict[tuple[str, int], int]:
    """Return the offsets that `group` has committed among `places`; nothing for a group that does not exist."""
    if not places:
        return {}
    request = ConsumerGroupTopicPartitions(group, [TopicPartition(place.topic, place.partition) for place in places])
    found: dict[tuple[str, int], int] = {}
    for future in admin.list_consumer_group_offsets([request], request_timeout=ANSWER_SECONDS).values():
        try:
            answer = _result(future)
        except KafkaException as error:
            if error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
                continue
            raise
        found |= {(place.topic, place.partition): place.offset for place in answer.topic_partitions if place.offset >= 0}
    return found


def offset_spec(at: StartAt) -> Any:
    """Return how the admin client is asked for the first or the next offset."""
    return OffsetSpec.latest() if at is StartAt.LATEST else OffsetSpec.earliest()  # type: ignore[no-untyped-call]


def describe(admin: AdminClient, names: Sequence[str]) -> dict[str, dict[str, ConfigEntry]]:
    """Return the settings of the topics `names` as the brokers apply them."""
    if not names:
        return {}
    asked = [ConfigResource(ResourceType.TOPIC, name) for name in names]
    futures = admin.describe_configs(asked, request_timeout=ANSWER_SECONDS)
    return {resource.name: _result(future) for resource, future in futures.items()}


def _config(spec: TopicSpec, replication: int) -> dict[str, str]:
    kept = (
        dict(COMPACTION)
        if spec.retention_seconds is None and spec.forgets_seconds is None
        else {**COMPACTION, "cleanup.policy": "compact,delete", "retention.ms": str(spec.forgets_seconds * 1000)}
        if spec.forgets_seconds is not None
        else {"cleanup.policy": "delete", "retention.ms": str((spec.retention_seconds or 0) * 1000)}
    )
    return {
        **kept,
        "max.message.bytes": str(spec.max_message_bytes),
        # said even where it is 1: a broker's default of 2 would refuse every record of a single replica
        "min.insync.replicas": "2" if replication >= SAFE_REPLICAS else "1",
        "unclean.leader.election.enable": "false",
    }


def _all_of(target: Target) -> tuple[Difference, ...]:
    return (
        Difference(setting="partitions", found=None, wanted=str(target.partitions)),
        Difference(setting="replicas", found=None, wanted=str(target.replication)),
        *(Difference(setting=name, found=None, wanted=value) for name, value in target.config.items()),
    )


def _compare(target: Target, topic: TopicMetadata, config: Mapping[str, ConfigEntry]) -> Change:
    count = len(topic.partitions)
    if count != target.partitions:
        difference = Difference(setting="partitions", found=str(count), wanted=str(target.partitions))
        (problem,) = _count_problems([(target, count)])
        return Change(target=target, action=Action.REFUSE, differences=(difference,), problem=problem)
    if not target.is_ours:
        return Change(target=target, action=Action.KEEP)
    differences = _differences(target, config)
    replicas = min((len(partition.replicas) for partition in topic.partitions.values()), default=0)
    advice = None
    if replicas < target.replication:
        advice = (
            f"{target.name} has {replicas} of {target.replication} replicas (NOTIFY_REPLICATION): "
            "add the others with kafka-reassign-partitions, which this command does not do"
        )
    action = Action.ALTER if differences else Action.KEEP
    return Change(target=target, action=action, differences=differences, advice=advice)


def _differences(target: Target, config: Mapping[str, ConfigEntry]) -> tuple[Difference, ...]:
    return tuple(
        Difference(setting=name, found=found.value if (found := config.get(name)) is not None else None, wanted=value)
        for name, value in target.config.items()
        if name not in config or not _is_same(config[name], value)
    )


def _is_same(entry: ConfigEntry, wanted: str) -> bool:
    # set on the topic itself, or the same by default: a default that changes later is found by the next run
    found = entry.value
    if found is None:
        return False
    try:
        return float(found) == float(wanted)
    except ValueError:
        return bool(found == wanted)


def _count_problems(wrong: Iterable[tuple[Target, int]]) -> list[str]:
    """Return one sentence for all topics with the same wrong number of partitions."""
    alike: dict[tuple[Count, int, int], list[str]] = {}
    for target, found in wrong:
        alike.setdefault((target.count, target.partitions, found), []).append(target.name)
    problems: list[str] = []
    for (count, wanted, found), names in alike.items():
        variable = count.variable
        have = f"the topic {names[0]} has" if len(names) == 1 else f"{len(names)} topics, such as {names[0]}, have"
        can_grow = count is Count.USER and found < wanted
        way = (
            f"`notify topics migrate --partitions {wanted}` raises them"
            if can_grow
            else "the partitions of a topic in use cannot be changed"
        )
        problems.append(
            f"{have} {found} partition{'' if found == 1 else 's'}, not {wanted} as {variable} says: "
            f"set {variable}={found} if the topics are right; {way}"
        )
    return problems


def _create(admin: AdminClient, created: Sequence[Target]) -> None:
    topics = [
        NewTopic(target.name, num_partitions=target.partitions, replication_factor=target.replication, config=dict(target.config))
        for target in created
    ]
    for future in admin.create_topics(topics, operation_timeout=ANSWER_SECONDS, request_timeout=2 * ANSWER_SECONDS).values():
        try:
            _result(future)
        except KafkaException as error:
            code = error.args[0].code()
            if code == KafkaError.TOPIC_ALREADY_EXISTS:  # somebody else was faster; its partitions are checked below
                continue
            if code == KafkaError.INVALID_REPLICATION_FACTOR:
                brokers = len(admin.list_topics(timeout=ANSWER_SECONDS).brokers)
                problem = (
                    f"NOTIFY_REPLICATION asks for {created[0].replication} replicas, but Kafka has {brokers} "
                    f"broker{'' if brokers == 1 else 's'}: set it to at most {brokers}, or start more brokers"
                )
                raise SettingsError([problem]) from error
            raise

    seen: dict[str, TopicMetadata] = {}
    agreed = 0

    def missing() -> list[str]:
        nonlocal agreed
        metadata = admin.list_topics(timeout=ANSWER_SECONDS)
        seen.update(metadata.topics)
        found = [target.name for target in created if not _has_leaders(metadata.topics.get(target.name))]
        # each look asks some broker: one that knows does not mean that the next one does
        agreed = 0 if found else agreed + 1
        return found or ([] if agreed >= len(metadata.brokers) else [created[0].name])

    _await(missing, "was created, but has no leaders yet")
    _check(seen, created)


def _await(missing: Callable[[], list[str]], problem: str) -> None:
    """Return when nothing is missing: the controller has agreed, and brokers learn of it a moment later."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while names := missing():
        if time.monotonic() > deadline:
            raise SettingsError([f"the topic {names[0]} {problem} after {VISIBLE_SECONDS:.0f} s: look whether all brokers are up"])
        time.sleep(_POLL_SECONDS)


def _has_leaders(topic: TopicMetadata | None) -> bool:
    return topic is not None and bool(topic.partitions) and all(partition.leader >= 0 for partition in topic.partitions.values())


def _alter(admin: AdminClient, altered: Sequence[Change]) -> None:
    resources = [
        ConfigResource(
            ResourceType.TOPIC,
            change.target.name,
            incremental_configs=[
                ConfigEntry(
                    item.setting, item.wanted, incremental_operation=AlterConfigOpType.SET, source=ConfigSource.DYNAMIC_TOPIC_CONFIG
                )
                for item in change.differences
            ],
        )
        for change in altered
    ]
    for future in admin.incremental_alter_configs(resources, request_timeout=ANSWER_SECONDS).values():
        _result(future)
    names = [change.target.name for change in altered]

    def missing() -> list[str]:
        configs = describe(admin, names)
        return [change.target.name for change in altered if _differences(change.target, configs[change.target.name])]

    _await(missing, "was altered, but is not yet kept so")


def _check_offsets(places: Sequence[TopicPartition]) -> None:
    for place in places:
        if place.error is not None:
            raise KafkaException(place.error)


def _result(future: Future[T]) -> T:
    return cast("Any", future).result(3 * ANSWER_SECONDS)  # type: ignore[no-any-return]
