from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.delay import Delay
from agents.ports import KnownSource
from agents.retries import JITTER, SCHEDULES, schedule_of, tier_for, wait_seconds
from schemas import topics
from schemas.errors import InvalidEventError
from schemas.messages import Delivery
from schemas.topics import Channel, Lane, Tier

NOW = datetime(2026, 3, 1, tzinfo=UTC)
TIERS = (5, 60, 600)
DELAY = Delay(dict.fromkeys(Lane, TIERS), now=lambda: NOW)


def held(seconds: float | None, *, lane: Lane = Lane.NORMAL, tier: Tier = Tier.SHORT, channel: str = Channel.EMAIL) -> tuple[str, bytes]:
    """Return the topic and the key to which a delivery goes that was held and has `seconds` left."""
    delivery = Delivery(
        delivery_id="d",
        notification_id="n",
        user_id="u",
        channel=channel,
        lane=lane,
        rule="message",
        category="messages",
        generation=0,
        attempt=2,
        sealed=b"",
        accepted_at=NOW,
        created_at=NOW,
        not_before=None if seconds is None else NOW + timedelta(seconds=seconds),
    )
    source = KnownSource(topic=topics.retry(lane, tier), partition=0, offset=0, at=NOW)
    (output,) = DELAY.decide(delivery, source, {}).outputs
    assert output.value == delivery
    return output.topic, output.key


def test_a_one_time_code_is_tried_within_seconds_and_bulk_within_minutes() -> None:
    assert schedule_of("security", Lane.CRITICAL).waits_seconds[:3] == (1, 2, 4)
    assert schedule_of("payments", Lane.NORMAL).waits_seconds[:4] == (5, 60, 600, 3600)
    assert schedule_of("watches", Lane.BULK).waits_seconds[0] == 60


def test_every_category_and_lane_has_a_schedule_whose_waits_grow() -> None:
    assert SCHEDULES[-1].category is SCHEDULES[-1].lane is None
    for schedule in SCHEDULES:
        assert list(schedule.waits_seconds) == sorted(set(schedule.waits_seconds))


@given(st.text(), st.sampled_from(Lane), st.integers(0, 9), st.integers(0, 20))
def test_a_wait_is_never_shorter_than_scheduled_little_longer_and_the_same_again(
    delivery: str, lane: Lane, generation: int, failures: int
) -> None:
    found = wait_seconds(delivery, category="payments", lane=lane, generation=generation, failures=failures)
    waits = schedule_of("payments", lane).waits_seconds
    if failures >= len(waits):
        assert found is None
        return
    assert found is not None
    assert waits[failures] <= found <= waits[failures] * (1 + JITTER)
    assert found == wait_seconds(delivery, category="payments", lane=lane, generation=generation, failures=failures)


def test_deliveries_that_failed_together_do_not_come_back_together() -> None:
    found = {wait_seconds(f"d{n}", category="payments", lane=Lane.NORMAL, generation=0, failures=2) for n in range(100)}
    assert len(found) == 100


@given(st.floats(min_value=0, max_value=100_000))
def test_a_tier_never_outlasts_the_wait_and_none_longer_would_do(seconds: float) -> None:
    tier = tier_for(seconds, TIERS)
    lasting = dict(zip(Tier, TIERS, strict=True))
    assert tier is None or lasting[tier] <= seconds
    assert all(other <= (lasting[tier] if tier else 0) or other > seconds for other in TIERS)


@given(st.floats(min_value=0, max_value=100_000))
def test_a_wait_is_spent_in_tiers_up_to_a_rest_shorter_than_the_shortest(seconds: float) -> None:
    left, hops = seconds, 0
    while (tier := tier_for(left, TIERS)) is not None:
        left -= dict(zip(Tier, TIERS, strict=True))[tier]
        hops += 1
    assert 0 <= left < TIERS[0]
    assert hops <= seconds / TIERS[-1] + TIERS[-1] / TIERS[-2] + TIERS[-2] / TIERS[0]


@pytest.mark.parametrize(
    ("left", "topic"),
    [
        (None, "deliver.email.normal"),
        (-3_600, "deliver.email.normal"),
        (4.9, "deliver.email.normal"),
        (5, "retry.normal.short"),
        (599, "retry.normal.middle"),
        (7_200, "retry.normal.long"),
    ],
)
def test_what_is_left_of_a_wait_decides_where_a_delivery_goes(left: float | None, topic: str) -> None:
    assert held(left) == (topic, b"u")


def test_a_delivery_stays_in_its_lane_and_channel() -> None:
    assert held(0, lane=Lane.BULK, tier=Tier.LONG, channel=Channel.IN_APP)[0] == "deliver.in_app.bulk"
    assert held(700, lane=Lane.CRITICAL)[0] == "retry.critical.long"


def test_a_delivery_for_a_channel_that_does_not_exist_is_a_dead_letter() -> None:
    with pytest.raises(InvalidEventError):
        held(0, channel="pigeon")
