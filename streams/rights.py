"""What each role may do in Kafka, and no more: derived from the topology, printed by `notify topics acls`, checked at start.

Kafka's Read and Write include Describe, and Write on a topic includes what an idempotent producer needs (since Kafka 3.0).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, cast

from confluent_kafka import KafkaError, KafkaException, Producer, TopicCollection
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # exported, but not said so
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from schemas import topics
from streams.outside import CLI, FOLLOWERS, OUTSIDE, WRITTEN_BY_WEB
from streams.roles import Role
from streams.topics import SHARED, physical
from streams.topology import all_topics, steps_of
from streams.transport.cluster import Cluster

OPERATOR = "operator"  # whoever runs the command line: makes topics, looks, redrives, migrates
ANSWER_SECONDS = 10.0
_SHOWN = 5


class Kind(StrEnum):
    """What a right is about. The values are kafka-acls' options."""

    TOPIC = "topic"
    GROUP = "group"
    TRANSACTIONAL_ID = "transactional-id"

    @property
    def words(self) -> str:
        """How people call it."""
        return {Kind.TOPIC: "topic", Kind.GROUP: "group", Kind.TRANSACTIONAL_ID: "transactional id"}[self]


class Operation(StrEnum):
    """What may be done, in Kafka's own words."""

    READ = "Read"
    WRITE = "Write"
    CREATE = "Create"
    ALTER = "Alter"
    DESCRIBE = "Describe"
    DESCRIBE_CONFIGS = "DescribeConfigs"
    ALTER_CONFIGS = "AlterConfigs"


_ACL_OPERATION: Mapping[Operation, AclOperation] = {
    Operation.READ: AclOperation.READ,
    Operation.WRITE: AclOperation.WRITE,
    Operation.CREATE: AclOperation.CREATE,
    Operation.ALTER: AclOperation.ALTER,
    Operation.DESCRIBE: AclOperation.DESCRIBE,
    Operation.DESCRIBE_CONFIGS: AclOperation.DESCRIBE_CONFIGS,
    Operation.ALTER_CONFIGS: AclOperation.ALTER_CONFIGS,
}
_ACL_RESOURCE = {
    Kind.TOPIC: ResourceType.TOPIC,
    Kind.GROUP: ResourceType.GROUP,
    Kind.TRANSACTIONAL_ID: ResourceType.TRANSACTIONAL_ID,
}


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Right:
    """An operation on what has this name, or with `is_prefix` on all whose names begin with it."""

    kind: Kind
    name: str
    operation: Operation
    is_prefix: bool = False

    @property
    def shown(self) -> str:
        """The right in words: `Write on topic notify.dev.dead`."""
        return f"{self.operation} on {self.kind.words} {self.name}{'*' if self.is_prefix else ''}"

    def command(self, principal: str) -> str:
        """Return the options of kafka-acls that give this right."""
        pattern = " --resource-pattern-type prefixed" if self.is_prefix else ""
        return f"--add --allow-principal '{principal}' --operation {self.operation} --{self.kind} '{self.name}'{pattern}"

    def binding(self, principal: str) -> AclBinding:
        """Return what the admin client creates and deletes."""
        pattern = ResourcePatternType.PREFIXED if self.is_prefix else ResourcePatternType.LITERAL
        operation = _ACL_OPERATION[self.operation]
        return AclBinding(_ACL_RESOURCE[self.kind], self.name, pattern, principal, "*", operation, AclPermissionType.ALLOW)


def rights_of(role: Role, env: str) -> list[Right]:
    """Return what a worker of `role` needs, and nothing else."""
    reads, writes = {topic for topic, roles in FOLLOWERS.items() if role in roles}, {topics.DEAD}
    for step in steps_of(role):
        tables = step.changelogs().values()
        reads |= {*step.reads, *tables}
        writes |= {*step.writes, *tables}
    if role is Role.VIEWS:
        writes |= WRITTEN_BY_WEB
    group = f"notify.{env}.{role}"
    return sorted(
        [
            *(Right(kind=Kind.TOPIC, name=physical(env, topic), operation=Operation.READ) for topic in reads),
            *(Right(kind=Kind.TOPIC, name=physical(env, topic), operation=Operation.WRITE) for topic in writes),
            Right(kind=Kind.GROUP, name=group, operation=Operation.READ),
            # librdkafka looks for the coordinator of a group even where it joins none
            Right(kind=Kind.GROUP, name=f"{group}.", operation=Operation.DESCRIBE, is_prefix=True),
            Right(kind=Kind.TRANSACTIONAL_ID, name=f"notify-{group}.", operation=Operation.WRITE, is_prefix=True),
        ]
    )


def rights_of_operator(env: str) -> list[Right]:
    """Return what whoever runs the command line needs: everything but deleting in this service's own topics."""
    ours = f"notify.{env}."
    operations = set(Operation) - {Operation.DESCRIBE}  # Read includes it
    found = [Right(kind=Kind.TOPIC, name=ours, operation=operation, is_prefix=True) for operation in operations]
    for topic in SHARED:
        outside = OUTSIDE[topic]
        wanted = {Operation.DESCRIBE, Operation.DESCRIBE_CONFIGS}
        wanted |= {Operation.WRITE} if CLI in outside.writers else set()
        wanted |= {Operation.READ} if CLI in outside.readers else set()
        found += [Right(kind=Kind.TOPIC, name=physical(env, topic), operation=operation) for operation in wanted]
    return sorted(
        [
            *found,
            Right(kind=Kind.GROUP, name="notify-cli", operation=Operation.DESCRIBE),
            Right(kind=Kind.GROUP, name=ours, operation=Operation.READ, is_prefix=True),
            Right(kind=Kind.TRANSACTIONAL_ID, name=ours, operation=Operation.WRITE, is_prefix=True),
        ]
    )


def missing(cluster: Cluster, rights: Sequence[Right], env: str) -> list[Right]:
    """Return which of `rights` Kafka does not grant to us. Blocks. Raises KafkaException when it does not answer.

    A prefix of topics is looked at in each of the environment's topics. Of a group only what can be asked for without
    joining it: whether it may be seen, and all that it grants once it exists. What does not exist lacks nothing.
    """
    admin = AdminClient(cluster.config())
    of_topics = _resolved((right for right in rights if right.kind is Kind.TOPIC), env)
    groups = [right for right in rights if right.kind is Kind.GROUP and not right.is_prefix]
    return sorted({*_missing_topics(admin, of_topics), *_missing_groups(admin, groups)})


def refused_transactions(cluster: Cluster, rights: Iterable[Right]) -> list[Right]:
    """Return the rights on transactional ids that Kafka does not grant to us. Blocks.

    Kafka tells only who begins: an id that no worker uses is begun with, and forgotten by the broker a week later.
    """
    return [right for right in rights if right.kind is Kind.TRANSACTIONAL_ID and _is_refused(cluster, right)]


def sentence(lacking: Sequence[Right], *, who: str, role: str) -> str:
    """Return what is missing and what to do. `who`: as whom we are connected."""
    some = ", ".join(right.shown for right in lacking[:_SHOWN]) + (
        f" and {len(lacking) - _SHOWN} more rights" if len(lacking) > _SHOWN else ""
    )
    return f"Kafka does not grant {some} to {who}: `notify topics acls --role {role}` lists what is needed"


def _resolved(rights: Iterable[Right], env: str) -> list[Right]:
    names = [physical(env, spec.name) for spec in all_topics()]
    return [
        Right(kind=right.kind, name=name, operation=right.operation)
        for right in rights
        for name in ([name for name in names if name.startswith(right.name)] if right.is_prefix else [right.name])
    ]


def _missing_topics(admin: AdminClient, rights: Sequence[Right]) -> Iterator[Right]:
    names = sorted({right.name for right in rights})
    if not names:
        return
    futures = admin.describe_topics(TopicCollection(names), include_authorized_operations=True, request_timeout=ANSWER_SECONDS)
    for name, future in futures.items():
        granted = _granted(future, KafkaError.TOPIC_AUTHORIZATION_FAILED)
        yield from (right for right in rights if right.name == name and not _is_granted(right, granted))


def _missing_groups(admin: AdminClient, rights: Sequence[Right]) -> Iterator[Right]:
    names = sorted({right.name for right in rights})
    if not names:
        return
    futures = admin.describe_consumer_groups(names, include_authorized_operations=True, request_timeout=ANSWER_SECONDS)
    for name, future in futures.items():
        granted = _granted(future, KafkaError.GROUP_AUTHORIZATION_FAILED)
        yield from (right for right in rights if right.name == name and not _is_granted(right, granted))


def _granted(future: Future[Any], refused: int) -> set[AclOperation] | None:
    """Return the operations that are granted; None: what is asked about does not exist."""
    try:
        operations = future.result(2 * ANSWER_SECONDS).authorized_operations
    except KafkaException as error:
        code = error.args[0].code()
        if code == refused:
            return set()
        if code in {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.GROUP_ID_NOT_FOUND}:
            return None
        raise
    return set(operations or ()) or None


def _is_granted(right: Right, granted: set[AclOperation] | None) -> bool:
    return granted is None or _ACL_OPERATION[right.operation] in granted


def _is_refused(cluster: Cluster, right: Right) -> bool:
    probe = Producer(cluster.config(transactional_id=f"{right.name}probe" if right.is_prefix else right.name))
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            probe.init_transactions(ANSWER_SECONDS)
        except KafkaException as error:
            cause = cast("KafkaError", error.args[0])
            if cause.code() == KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED:
                return True
            if not cause.retriable() or time.monotonic() > deadline:
                raise
        else:
            return False
