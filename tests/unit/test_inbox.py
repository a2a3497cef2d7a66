"""The projection: whatever the order and repetition of what it reads, the same rows; and never more of them than its bounds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import inbox, signals
from agents.inbox import INBOX, NOTIFICATIONS, SHELF_SIZES, Inbox, Notification, Shelf, millis
from agents.ports import Effects, KnownSource
from schemas.errors import InvalidEventError
from schemas.ids import NotificationId, delivery_id, notification_id
from schemas.messages import ChannelChoice, DecisionRecord, EngagementSignal, Origin, StatusChange
from schemas.status import Axis, Engagement, Status, order

USER = "user-1"
START = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
SOURCE = KnownSource(topic="status", partition=0, offset=0, at=START)
Tables = dict[str, dict[bytes, bytes]]
Record = DecisionRecord | StatusChange


def an_id(event: str = "e1", user: str = USER) -> NotificationId:
    return notification_id(producer="payments", event_id=event, rule="payment", user_id=user)


def a_decision(
    event: str = "e1", *, decided: float = 0, outcome: str = "notified", decision: str = "", sealed: bytes | None = b"\0sealed"
) -> DecisionRecord:
    notification = an_id(event)
    at = START + timedelta(seconds=decided)
    return DecisionRecord(
        decision_id=decision or f"decision-{event}",
        notification_id=notification,
        user_id=USER,
        outcome=outcome,
        reason="sent_before" if outcome == "duplicate_of" else None,
        rule="payment",
        rule_version="1",
        category="payments",
        lane="normal",
        type="payment",
        event_id=event,
        producer="payments",
        origin=Origin(topic="payments", partition=1, offset=7),
        request=Origin(topic="requests.normal", partition=0, offset=9),
        occurred_at=at,
        accepted_at=at,
        decided_at=at,
        preference_version=0,
        template_version="1",
        channels=[ChannelChoice(channel="in_app", is_chosen=True, reason="wanted", delivery_id=f"{notification}-in_app")],
        limiter={"b": "2", "a": "1"},
        metadata={"orderId": "o-1"},
        sealed=sealed,
    )


def a_change(
    status: Status = Status.DELIVERED, *, event: str = "e1", channel: str = "in_app", attempt: int = 1, generation: int = 0, at: float = 1
) -> StatusChange:
    return StatusChange(
        notification_id=an_id(event),
        delivery_id=f"{an_id(event)}-{channel}",
        user_id=USER,
        axis=Axis.DELIVERY,
        status=status,
        channel=channel,
        generation=generation,
        attempt=attempt,
        at=START + timedelta(seconds=at),
    )


def an_engagement(engagement: Engagement = Engagement.READ, *, event: str = "e1", at: float = 2) -> StatusChange:
    return StatusChange(
        notification_id=an_id(event), user_id=USER, axis=Axis.ENGAGEMENT, status=engagement, at=START + timedelta(seconds=at)
    )


def apply(tables: Tables, effects: Effects) -> None:
    assert not effects.outputs
    for row in effects.rows:
        if row.value is None:
            tables[row.table].pop(row.key, None)
        else:
            tables[row.table][row.key] = row.value


def projected(records: Iterable[Record], tables: Tables | None = None) -> Tables:
    tables = {NOTIFICATIONS: {}, INBOX: {}} if tables is None else tables
    for record in records:
        apply(tables, decided(record, tables))
    return tables


def decided(record: Record, tables: Tables) -> Effects:
    if isinstance(record, DecisionRecord):
        return inbox.decide_decision(record, SOURCE, tables)
    return inbox.decide_status(record, SOURCE, tables)


def the_row(tables: Tables, event: str = "e1") -> Notification:
    return Notification.decode(tables[NOTIFICATIONS][an_id(event).encode()])


def shelf(tables: Tables, which: Shelf = Shelf.INBOX) -> list[str]:
    return [notification for _, notification in Inbox.decode(tables[INBOX].get(USER.encode())).listed(which)]


def assert_each_row_stands_on_one_shelf(tables: Tables) -> None:
    standing = [notification for which in Shelf for notification in shelf(tables, which)]
    assert len(standing) == len(set(standing))
    assert {each.encode() for each in standing} == set(tables[NOTIFICATIONS])


moments = st.integers(0, 20).map(float)
delivery_changes = st.builds(
    a_change,
    st.sampled_from(list(Status)),
    event=st.sampled_from(["e1", "e2"]),
    channel=st.sampled_from(["in_app", "email"]),
    attempt=st.integers(0, 3),
    generation=st.integers(0, 1),
    at=moments,
)
engagements = st.builds(an_engagement, st.sampled_from(list(Engagement)), event=st.sampled_from(["e1", "e2"]), at=moments)
decisions = st.builds(
    a_decision,
    st.sampled_from(["e1", "e2"]),
    decided=moments,
    outcome=st.sampled_from(["notified", "skipped"]),
    decision=st.sampled_from(["d1", "d2", "d3"]),
)


@given(
    records=st.lists(delivery_changes | engagements | decisions, max_size=12, unique_by=repr),
    data=st.data(),
)
def test_any_order_and_repetition_of_records_gives_the_same_bytes(records: Sequence[Record], data: st.DataObject) -> None:
    # a decision id names one decision
    by_id = {record.decision_id + record.notification_id: record for record in records if isinstance(record, DecisionRecord)}
    records = [*by_id.values(), *(record for record in records if isinstance(record, StatusChange))]
    shuffled = data.draw(
        st.permutations([*records, *data.draw(st.lists(st.sampled_from(records), max_size=8) if records else st.just([]))])
    )

    once, again = projected(records), projected(shuffled)

    assert again == once
    assert_each_row_stands_on_one_shelf(once)


# few distinct values, so that the same delivery is told conflicting things at the same order
conflicting_changes = st.builds(a_change, st.sampled_from(list(Status)), attempt=st.just(1), at=st.integers(0, 3).map(float))
conflicting_engagements = st.builds(an_engagement, st.sampled_from(list(Engagement)), at=st.integers(0, 5).map(float))


@given(changes=st.lists(conflicting_changes, max_size=6) | st.lists(conflicting_engagements, max_size=6), data=st.data())
def test_any_order_of_conflicting_changes_gives_the_same_bytes(changes: list[StatusChange], data: st.DataObject) -> None:
    assert projected(data.draw(st.permutations(changes))) == projected(changes)


def test_of_two_changes_with_equal_order_the_earlier_one_stays() -> None:
    earlier, later = a_change(Status.MERGED, at=1), a_change(Status.CANCELLED, at=2)

    for changes in ([earlier, later], [later, earlier]):
        assert the_row(projected(changes)).deliveries[f"{an_id()}-in_app"].current.status == Status.MERGED


def test_a_late_read_does_not_undo_a_newer_one() -> None:
    newer, unread, late = an_engagement(at=5), an_engagement(Engagement.UNREAD, at=3), an_engagement(at=1)

    assert the_row(projected([newer, unread, late])).engaged.is_read


@given(changes=st.lists(delivery_changes, min_size=1, max_size=20))
def test_the_current_status_is_the_highest_in_order(changes: list[StatusChange]) -> None:
    tables = projected(changes)

    for event in {change.notification_id for change in changes}:
        row = Notification.decode(tables[NOTIFICATIONS][event.encode()])
        for key, state in row.deliveries.items():
            highest = max(
                order(generation=change.generation, attempt=change.attempt, status=Status(change.status))
                for change in changes
                if change.delivery_id == key
            )
            assert state.current.order == highest


@given(data=st.data(), reads=st.lists(moments, min_size=1, max_size=5))
def test_read_stays_read_unless_a_later_unread_says_otherwise(data: st.DataObject, reads: list[float]) -> None:
    others: list[Record] = data.draw(
        st.lists(delivery_changes | engagements.filter(lambda each: each.status != Engagement.UNREAD), max_size=8)
    )
    known: list[Record] = [a_decision(), *others, *(an_engagement(at=at) for at in reads)]
    records = data.draw(st.permutations(known))

    assert the_row(projected(records)).engaged.is_read


def test_a_repeated_record_changes_no_row() -> None:
    records: list[Record] = [a_decision(), a_change(), an_engagement()]
    tables = projected(records)

    for record in records:
        assert decided(record, tables) == Effects(counts=["unchanged"])


def test_a_status_may_arrive_before_its_decision() -> None:
    tables = projected([a_change()])
    assert shelf(tables) == []
    assert shelf(tables, Shelf.PENDING) == [an_id()]

    projected([a_decision()], tables)
    assert shelf(tables) == [an_id()]
    assert shelf(tables, Shelf.PENDING) == []


def test_only_what_was_delivered_in_the_app_is_in_the_inbox() -> None:
    tables = projected([a_decision("e1"), a_decision("e2"), a_decision("e3", outcome="skipped")])
    projected([a_change(event="e1"), a_change(event="e2", channel="email")], tables)

    assert shelf(tables) == [an_id("e1")]
    assert set(shelf(tables, Shelf.OTHERS)) == {an_id("e2"), an_id("e3")}


def test_a_redrive_does_not_take_a_notification_out_of_the_inbox() -> None:
    tables = projected([a_decision(), a_change(), a_change(Status.SENDING, generation=1)])

    assert shelf(tables) == [an_id()]
    assert the_row(tables).deliveries[f"{an_id()}-in_app"].current.status == Status.SENDING


def test_the_inbox_is_newest_first_and_what_falls_off_is_deleted() -> None:
    size = SHELF_SIZES[Shelf.INBOX]
    events = [f"e{number}" for number in range(size + 20)]
    tables = projected(
        record for number, event in enumerate(events) for record in (a_decision(event, decided=number), a_change(event=event))
    )

    assert shelf(tables) == [an_id(event) for event in reversed(events)][:size]
    assert_each_row_stands_on_one_shelf(tables)
    assert len(tables[NOTIFICATIONS]) == size


def test_what_never_reaches_the_inbox_is_bounded_too() -> None:
    events = [f"e{number}" for number in range(450)]
    tables = projected(a_decision(event, decided=number, outcome="skipped") for number, event in enumerate(events))
    projected((a_change(event=f"late{number}", at=number) for number in range(450)), tables)

    assert len(shelf(tables, Shelf.OTHERS)) == SHELF_SIZES[Shelf.OTHERS]
    assert len(shelf(tables, Shelf.PENDING)) == SHELF_SIZES[Shelf.PENDING]
    assert_each_row_stands_on_one_shelf(tables)


def test_what_is_older_than_a_full_shelf_leaves_no_row() -> None:
    tables = projected(a_decision(f"e{number}", decided=number) for number in range(1, 101))
    before = dict(tables[NOTIFICATIONS])
    shelves = Inbox.decode(tables[INBOX][USER.encode()]).shelves

    projected([a_change(event="old", channel="email", at=0), a_decision("old", decided=0)], tables)

    assert tables[NOTIFICATIONS] == before
    assert Inbox.decode(tables[INBOX][USER.encode()]).shelves == shelves


@settings(max_examples=15, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(["shuffled", "decisions first", "statuses first"]))
def test_after_its_edge_nothing_of_the_inbox_is_missing(random: Random, order: str) -> None:
    events = [f"e{number}" for number in range(260)]
    delivered = [event for event in events if random.random() < 0.7]
    first: list[Record] = [a_decision(event, decided=number) for number, event in enumerate(events)]
    then: list[Record] = [a_change(event=event, at=number) for number, event in enumerate(events) if event in delivered]
    records = [*then, *first] if order == "statuses first" else [*first, *then]
    if order == "shuffled":
        random.shuffle(records)

    row = Inbox.decode(projected(records)[INBOX][USER.encode()])

    edge = row.whole_after
    assert edge is not None
    truth = sorted(((millis(START) + 1_000 * events.index(event), an_id(event)) for event in delivered), reverse=True)
    assert [place for place in row.listed() if place > edge] == [place for place in truth if place > edge]


def test_an_inbox_is_whole_while_nothing_of_it_fell_off() -> None:
    skipped = (replace(a_decision(f"s{number}", decided=number, outcome="skipped"), channels=[]) for number in range(300))
    tables = projected(
        [*skipped, *(record for n in range(100) for record in (a_decision(f"e{n}", decided=500 + n), a_change(event=f"e{n}")))]
    )
    assert Inbox.decode(tables[INBOX][USER.encode()]).whole_after is None

    projected([a_decision("one more", decided=900), a_change(event="one more")], tables)

    assert Inbox.decode(tables[INBOX][USER.encode()]).whole_after == (millis(START) + 500_000, an_id("e0"))


def test_the_changes_of_a_row_are_bounded_to_the_newest() -> None:
    tables = projected([a_decision()])
    projected((a_change(Status.SENDING, attempt=number, at=number) for number in range(1, 100)), tables)

    assert [change.attempt for change in the_row(tables).changes] == list(range(36, 100))


@pytest.mark.parametrize("outcome", ["duplicate_of", "conflict"])
def test_a_repetition_is_noted_and_overwrites_nothing(outcome: str) -> None:
    tables = projected([a_decision(), a_change()])
    before = the_row(tables)

    projected([a_decision(decided=60, outcome=outcome, decision="again", sealed=None)], tables)

    after = the_row(tables)
    assert after.decision == before.decision
    assert [(repeat.outcome, repeat.decision_id) for repeat in after.repeats] == [(outcome, "again")]
    assert shelf(tables) == [an_id()]


def test_a_repetition_of_what_is_no_longer_kept_leaves_no_row() -> None:
    tables: Tables = {NOTIFICATIONS: {}, INBOX: {}}

    effects = inbox.decide_decision(a_decision(outcome="duplicate_of"), SOURCE, tables)

    assert effects == Effects(counts=["repeat_of_unknown"])


def test_a_later_decision_on_the_same_id_is_noted_beside_the_first() -> None:
    row = the_row(projected([a_decision(decided=60, decision="second"), a_decision(decision="first")]))

    assert row.decision is not None
    assert row.decision["decisionId"] == "first"
    assert [repeat.decision_id for repeat in row.repeats] == ["second"]


def test_the_headline_stays_sealed_as_it_came() -> None:
    assert the_row(projected([a_decision(sealed=b"\xff\0sealed")])).sealed_headline == b"\xff\0sealed"


def test_a_row_reads_back_as_written() -> None:
    row = the_row(projected([a_decision(), a_change(), an_engagement(), a_decision(outcome="conflict", decision="again")]))

    assert Notification.decode(row.encode()) == row


@pytest.mark.parametrize(
    "change",
    [
        StatusChange(notification_id="n1", user_id=USER, axis="delivery", status="sent", at=START),
        StatusChange(notification_id=an_id(user="other"), user_id=USER, axis="delivery", status="sent", at=START),
        StatusChange(notification_id=an_id(), user_id=USER, axis="mood", status="sent", at=START),
        StatusChange(notification_id=an_id(), user_id=USER, axis="delivery", status="lost", at=START),
        StatusChange(notification_id=an_id(), user_id=USER, axis="engagement", status="liked", at=START),
    ],
)
def test_an_absurd_change_is_refused(change: StatusChange) -> None:
    with pytest.raises(InvalidEventError):
        inbox.decide_status(change, SOURCE, {NOTIFICATIONS: {}, INBOX: {}})


def test_a_step_without_delivery_is_kept_too() -> None:
    change = StatusChange(notification_id=an_id(), user_id=USER, axis="delivery", status="skipped", reason="opted_out", at=START)
    named = StatusChange(notification_id=an_id(), user_id=USER, axis="delivery", status="skipped", channel="email", at=START)

    deliveries = the_row(projected([change, named])).deliveries

    assert deliveries[""].current.reason == "opted_out"
    assert (
        deliveries[delivery_id(notification_id(producer="payments", event_id="e1", rule="payment", user_id=USER), "email")].channel
        == "email"
    )


def test_a_signal_becomes_a_change_on_the_engagement_axis() -> None:
    signal = EngagementSignal(signal_id="s1", notification_id=an_id(), user_id=USER, engagement="clicked", at=START)

    effects = signals.decide(signal, SOURCE, {})

    [output] = effects.outputs
    assert (output.topic, output.key) == ("status", USER.encode())
    assert output.value == StatusChange(notification_id=an_id(), user_id=USER, axis="engagement", status="clicked", at=START)
    assert effects.counts == ["clicked"]


@pytest.mark.parametrize(("notification", "engagement"), [(an_id(), "liked"), (an_id(user="other"), "read"), ("n1", "read")])
def test_an_absurd_signal_is_refused(notification: str, engagement: str) -> None:
    signal = EngagementSignal(signal_id="s1", notification_id=notification, user_id=USER, engagement=engagement, at=START)

    with pytest.raises(InvalidEventError):
        signals.decide(signal, SOURCE, {})
