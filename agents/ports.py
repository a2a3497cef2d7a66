"""What a decision sees and what it returns. The runner (`streams.runner`) makes effects real, a batch in one transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from schemas.messages import Message

# a shard's tables by name: encoded key -> encoded row, as the decision before this one left them
State = Mapping[str, Mapping[bytes, bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where and when a record was read. `at` is its Kafka timestamp: a decision's only clock."""

    topic: str  # as `schemas.topics` names it, without the environment's prefix
    partition: int
    offset: int
    at: datetime
    key: bytes | None = None
    headers: Sequence[tuple[str, bytes]] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """A record to publish. `partition` None: by the key, as the Java client does."""

    topic: str
    key: bytes
    value: Message | bytes
    partition: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A changed row of a table; `value` None deletes it."""

    table: str
    key: bytes
    value: bytes | None


@dataclass(slots=True)
class Effects:
    """What a decision wants: records to publish, rows to change, outcomes to count (metric label values)."""

    outputs: list[Output] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    counts: list[str] = field(default_factory=list)
