"""What a decision sees and what it returns. A shard (`streams.shard`) makes effects real, a batch in one transaction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple, Protocol

from schemas.errors import NotifyError
from schemas.messages import Message, Origin


class SortedRows(Protocol):
    """What a table that is declared as sorted can do besides: find rows by the beginning of their key."""

    def irange(
        self, minimum: bytes | None = None, maximum: bytes | None = None, inclusive: tuple[bool, bool] = (True, True)
    ) -> Iterator[bytes]:
        """Yield the keys from `minimum` to `maximum` in their order."""


# a shard's tables by name: encoded key -> encoded row, as the decision before this one left them
State = Mapping[str, Mapping[bytes, bytes]]


class Source(Protocol):
    """Where and when a record was read. `at` is its Kafka timestamp: a decision's only clock."""

    @property
    def topic(self) -> str:
        """The topic as `schemas.topics` names it, without the environment's prefix."""

    @property
    def partition(self) -> int:
        """The partition."""

    @property
    def offset(self) -> int:
        """The offset."""

    @property
    def at(self) -> datetime:
        """The Kafka timestamp, aware, UTC."""

    @property
    def key(self) -> bytes | None:
        """The key's bytes."""

    @property
    def headers(self) -> Sequence[tuple[str, bytes]]:
        """The headers."""


def origin_of(source: Source) -> Origin:
    """Return where a record was read, as messages say it."""
    return Origin(topic=source.topic, partition=source.partition, offset=source.offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownSource:
    """A source whose facts are given: of a parked record, of a test."""

    topic: str
    partition: int
    offset: int
    at: datetime
    key: bytes | None = None
    headers: Sequence[tuple[str, bytes]] = ()


BY_KEY = -1


class Output(NamedTuple):
    """A record to publish. `partition` None: the shard's own, or BY_KEY where topics follow another count."""

    topic: str
    key: bytes
    value: Message | bytes
    partition: int | None = None


class Row(NamedTuple):
    """A changed row of a table; `value` None deletes it."""

    table: str
    key: bytes
    value: bytes | None


class SetAside(NamedTuple):
    """An earlier record that nothing can come of any more: a dead letter, as it was read at `source`."""

    source: Source
    value: bytes | None
    error: NotifyError


@dataclass(slots=True)
class Effects:
    """What a decision wants: records to publish, rows to change, outcomes to count (metric label values), dead letters."""

    outputs: list[Output] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    counts: list[str] = field(default_factory=list)
    set_aside: list[SetAside] = field(default_factory=list)
