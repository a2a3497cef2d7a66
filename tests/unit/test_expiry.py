"""When reports that wait for their reference are given up: only once no reference is left to be read, and then all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import orjson

from agents.receipts import REFERENCES, WAITING, Matcher, Reported, report_key
from schemas import topics
from schemas.codec import pack
from schemas.ids import partition_of
from schemas.messages import ProviderReference, StatusChange
from streams.deciding import DecidingShard, Timer
from streams.roles import Role
from tests.shards import KeptWriter, Told, batch, keep, lane, of_messages, step_of, tools
from tests.waiting import eventually

NOW = datetime.now(UTC)
LONG_AGO = NOW - timedelta(hours=73)
PARTITIONS = 4
NAMES = [name for name in map(str, range(10_000)) if partition_of(report_key("smtp", name), PARTITIONS) == 0]


def a_reference(name: str, place: int) -> Told:
    known = ProviderReference(
        provider="smtp",
        reference=name,
        notification_id="n",
        delivery_id=name,
        user_id="u",
        channel="email",
        lane="normal",
        generation=0,
        attempt=1,
        at=LONG_AGO,
    )
    return Told(known, report_key("smtp", name), place, LONG_AGO)


def a_shard(*, seconds: float) -> tuple[DecidingShard, KeptWriter]:
    """Return a shard of the step `match`; it asks what has waited for too long, for the first time at once."""
    matcher = Matcher(PARTITIONS)
    references = of_messages(matcher.decide_reference)
    reports = of_messages(matcher.decide_report, lambda record: Reported(record.message, pack(record.message)))
    lanes = [lane(topics.PROVIDER_REFS, references), lane(topics.RECEIPTS, reports, urgency=1)]
    shard = DecidingShard(tools(), step_of(Role.SIGNALS, "match"), 0, lanes, timer=Timer(seconds=seconds, decide=matcher.expire))
    shard._rang_at = time.monotonic() - seconds
    return shard, keep(shard)


def park(shard: DecidingShard, names: Sequence[str]) -> None:
    """Put reports of long ago into the table, as an earlier worker left them."""
    at_ms = round(LONG_AGO.timestamp() * 1000)
    for place, name in enumerate(names):
        shard.tables[WAITING][report_key("smtp", name)] = orjson.dumps([[0, place, at_ms, "delivered", None, at_ms, "cmF3"]])


async def test_no_report_is_given_up_while_references_are_still_to_be_read() -> None:
    shard, writer = a_shard(seconds=0.01)
    park(shard, NAMES[:1])
    shard.start()
    shard.offer(batch(topics.RECEIPTS, 0, end=0))
    shard.offer(batch(topics.PROVIDER_REFS, 0, a_reference(NAMES[1], 0)))
    await eventually(lambda: shard.lanes[topics.PROVIDER_REFS].watermark == 1)
    assert not writer.written(topics.DEAD)
    shard.offer(batch(topics.PROVIDER_REFS, 1, a_reference(NAMES[0], 1), end=2))
    await eventually(lambda: writer.messages(topics.STATUS, StatusChange))
    assert [change.status for change in writer.messages(topics.STATUS, StatusChange)] == ["delivered"]
    assert not shard.tables[WAITING]
    assert not writer.written(topics.DEAD)
    shard.give_up()


async def test_all_that_waited_too_long_is_given_up_in_a_row_and_what_comes_meanwhile_has_its_turn() -> None:
    shard, writer = a_shard(seconds=3_600)
    park(shard, NAMES[:1_201])
    shard.offer(batch(topics.PROVIDER_REFS, 0, end=0))
    shard.offer(batch(topics.RECEIPTS, 0, end=0))

    def told_meanwhile(_step: str) -> None:
        if not writer.commits and not shard.lanes[topics.PROVIDER_REFS].queue:
            shard.offer(batch(topics.PROVIDER_REFS, 1, a_reference(NAMES[2_000], 0), end=1))

    shard.tools.fault = told_meanwhile
    shard.start()
    await eventually(lambda: not shard.tables[WAITING] and len(writer.commits) == 4)
    assert [sum(each.topic == topics.DEAD for each in commit) for commit in writer.commits] == [500, 0, 500, 201]
    assert list(shard.tables[REFERENCES]) == [report_key("smtp", NAMES[2_000])]
    shard.give_up()
