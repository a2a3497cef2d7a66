"""The order of a table's rows, by which its oldest ones are forgotten: live, after a recovery, and after an aborted transaction."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from agents.receipts import REFERENCES, WAITING
from streams.deciding import DecidingShard
from streams.roles import Role
from streams.transport.changelog import apply_shared
from streams.transport.records import Record
from tests.shards import keep, rows_of, step_of, tools

STEP = step_of(Role.SIGNALS, "match")


@dataclass(frozen=True)
class Row:
    """A record of a changelog."""

    key_bytes: bytes
    content: bytes | None

    def key(self) -> bytes:
        return self.key_bytes

    def value(self) -> bytes | None:
        return self.content


def compacted(log: Sequence[Row]) -> list[Row]:
    """Return what Kafka leaves of a log: of each key the last record, in its place."""
    last = {row.key_bytes: place for place, row in enumerate(log)}
    return [row for place, row in enumerate(log) if last[row.key_bytes] == place]


def recovered(log: Sequence[Row]) -> list[bytes]:
    rows: dict[bytes, bytes] = OrderedDict()
    for row in log:
        apply_shared({WAITING.encode(): rows}, cast("Record", row))
    return list(rows)


@given(st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c", b"d"]), st.sampled_from([b"1", b"2", None])), max_size=12))
def test_rows_are_in_the_order_of_last_writes_whether_their_worker_wrote_them_or_recovered_them(
    writes: list[tuple[bytes, bytes | None]],
) -> None:
    shard = DecidingShard(tools(), STEP, 0, [])
    writer = keep(shard)
    for key, value in writes:
        shard.put(WAITING, key, value)
    writer.commit()
    log = [Row(each.key or b"", each.value) for each in writer.written(STEP.changelog)]
    live = rows_of(shard)[WAITING]
    assert live == sorted(live, key=lambda key: max(place for place, (each, _) in enumerate(writes) if each == key))
    assert recovered(log) == live
    assert recovered(compacted(log)) == live


def test_old_rows_whose_deletion_is_undone_are_the_first_again() -> None:
    shard = DecidingShard(tools(), STEP, 0, [])
    keep(shard)
    shard.tables[REFERENCES].update(dict.fromkeys([b"old", b"older", b"young"], b"row"))
    for key in (b"old", b"older"):
        shard.put(REFERENCES, key, None)
    shard.put(REFERENCES, b"new", b"row")
    shard.undo()
    assert rows_of(shard)[REFERENCES] == [b"old", b"older", b"young"]
