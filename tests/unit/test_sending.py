"""A report that a delivery arrived, while the attempt after the one that it is about is under way: nothing is sent once more."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from agents.control import Control
from agents.sender import Attempt, AttemptState
from channels.recording import RecordingChannel
from schemas import topics
from schemas.errors import ProviderError, ProviderRefusedError, ProviderRejectedError, SendUnknownError
from schemas.messages import Delivery, StatusChange
from schemas.status import Status, order
from streams.gateways import gateways_of
from streams.metrics import Metrics
from streams.outgoing import Providers
from streams.roles import Role
from streams.sending import ATTEMPTS, SendingShard
from tests.deliveries import KEY, a_delivery
from tests.shards import KeptWriter, Told, batch, keep, lane, of_messages, step_of, tools
from tests.waiting import eventually

NOW = datetime.now(UTC)
STEP = step_of(Role.SENDER_NORMAL, "send")
DELIVER, SETTLED = topics.deliver("email", "normal"), topics.settled("normal")
DELIVERY = a_delivery("u", "e")
FIRST = StatusChange(
    notification_id=DELIVERY.notification_id,
    delivery_id=DELIVERY.delivery_id,
    user_id="u",
    axis="delivery",
    status=Status.DELIVERED,
    channel="email",
    lane="normal",
    provider="recording",
    generation=0,
    attempt=1,
    at=NOW,
)
CUT_OFF = Attempt(generation=0, number=1, state=AttemptState.OPEN, failures=0, at_ms=round(NOW.timestamp() * 1000), provider="recording")


async def key_of(_user: str) -> bytes:
    return KEY


class Desk:
    """A shard of a sender whose ledger says that a crash left the first attempt open."""

    def __init__(self, channel: RecordingChannel, ledger: bytes = CUT_OFF.row()) -> None:
        self.channel = channel
        providers = Providers(
            gateways=gateways_of({"email": (channel,)}, {}, max_open=32, lane_share=1.0, metrics=Metrics(Role.SENDER_NORMAL)),
            key_of=key_of,
            ledger_seconds=86_400,
            control=Control(lambda _scope: None, seal_key=bytes(32)),
            orders_version=lambda: 0,
            tiers_seconds=(5, 60, 600),
            lane_share=1.0,
            partitions=4,
        )
        lanes = [lane(topic, of_messages(lambda *_: None)) for topic in (SETTLED, DELIVER)]
        self.shard = SendingShard(tools(), STEP, 0, lanes, providers=providers)
        self.writer: KeptWriter = keep(self.shard)
        self.shard.tables[ATTEMPTS][DELIVERY.delivery_id.encode()] = ledger
        self.shard.start()

    def tell(self, message: Delivery | StatusChange) -> None:
        topic = DELIVER if isinstance(message, Delivery) else SETTLED
        self.shard.offer(batch(topic, 0, Told(message, b"u", 0, NOW), end=1))

    def watermark(self, topic: str) -> int | None:
        """Return to where an input is done, as committed."""
        return self.shard.lanes[topic].watermark

    @property
    def row(self) -> Attempt:
        return Attempt.of(self.shard.tables[ATTEMPTS][DELIVERY.delivery_id.encode()])

    @property
    def status(self) -> str:
        changes = self.writer.messages(topics.STATUS, StatusChange)
        return max((*changes, FIRST), key=lambda c: order(generation=c.generation, attempt=c.attempt, status=Status(c.status))).status

    async def close(self) -> None:
        await self.channel.close()
        self.shard.give_up()


async def under_way(channel: RecordingChannel) -> Desk:
    """Return a desk whose second attempt is under way, with a report that the first one arrived."""
    await channel.open()
    channel.hold()
    desk = Desk(channel)
    desk.tell(DELIVERY)
    await eventually(lambda: channel.running)
    desk.tell(FIRST)
    await eventually(lambda: not desk.shard.lanes[SETTLED].queue)
    return desk


@pytest.mark.parametrize(
    "end",
    [
        ProviderRefusedError("later", code="451"),
        ProviderRejectedError("no", code="550"),
        SendUnknownError("lost", code="timeout"),
    ],
)
async def test_the_attempt_that_was_under_way_is_the_last_one_and_the_delivery_ends_as_delivered(
    end: ProviderError | SendUnknownError,
) -> None:
    desk = await under_way(RecordingChannel([end]))
    assert desk.watermark(SETTLED) is None, "until it is acted upon"
    desk.channel.release()
    await eventually(lambda: desk.watermark(SETTLED) == desk.watermark(DELIVER) == 1)
    assert (desk.row.number, desk.row.state, desk.row.is_unknown, desk.status) == (2, AttemptState.DONE, False, "delivered")
    assert not [each for commit in desk.writer.commits for each in commit if each.topic.startswith("retry.") or each.topic == topics.DEAD]
    assert len(desk.channel.calls) == 1
    await desk.close()


async def test_an_attempt_that_ends_well_ends_as_it_would_without_the_report() -> None:
    desk = await under_way(RecordingChannel())
    desk.channel.release()
    await eventually(lambda: desk.watermark(SETTLED) == desk.watermark(DELIVER) == 1)
    assert (desk.row.state, desk.status) == (AttemptState.DONE, "sent")
    await desk.close()


async def test_after_a_crash_the_report_is_read_again_and_nothing_more_is_sent() -> None:
    before = await under_way(RecordingChannel())
    assert before.row.state is AttemptState.OPEN
    before.shard.give_up()
    channel = RecordingChannel()
    await channel.open()
    after = Desk(channel, before.row.row())
    after.tell(FIRST)
    after.tell(DELIVERY)
    await eventually(lambda: after.watermark(SETTLED) == after.watermark(DELIVER) == 1)
    assert (after.row.number, after.row.state, after.status) == (2, AttemptState.DONE, "delivered")
    assert not channel.calls
    before.channel.release()
    await before.close()
    await after.close()
