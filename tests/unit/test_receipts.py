from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.control import Control
from agents.ports import BY_KEY, Effects, KnownSource, SetAside
from agents.receipts import REFERENCE_SECONDS, REFERENCES, WAITING, WAITING_SECONDS, Known, Matcher, Reported, report_key
from schemas import topics
from schemas.codec import Codec
from schemas.errors import InvalidEventError
from schemas.ids import partition_of
from schemas.messages import ControlEntry, DeliveryReport, ProviderReference, StatusChange
from schemas.status import Status, Suppression, order
from streams.inputs import Inputs
from streams.registry import Registry
from streams.settings import Settings
from streams.topology import TOPOLOGY

NOW = datetime(2026, 3, 1, tzinfo=UTC)
PARTITIONS = 4
REFERENCE = ProviderReference(
    provider="smtp",
    reference="d.0@example.com",
    notification_id="n",
    delivery_id="d",
    user_id="u",
    channel="email",
    lane="normal",
    generation=0,
    attempt=1,
    at=NOW,
    category="payments",
)
REPORT = DeliveryReport(report_id="r", provider="smtp", reference=REFERENCE.reference, status="delivered", code="2.0.0", at=NOW)
SCOPED = replace(REFERENCE, address_scope="suppression:email:0123")
BOUNCE = replace(REPORT, status="bounced", code="5.1.1", suppresses=Suppression.HARD_BOUNCE)
COMPLAINT = replace(REPORT, suppresses=Suppression.COMPLAINT, at=NOW + timedelta(hours=1))

MATCHER = Matcher(PARTITIONS)


class Desk:
    """A matcher with its tables: applies what it decides, as the runner does."""

    def __init__(self, matcher: Matcher = MATCHER) -> None:
        self.matcher = matcher
        self.state: dict[str, OrderedDict[bytes, bytes]] = {REFERENCES: OrderedDict(), WAITING: OrderedDict()}
        self.changes: list[StatusChange] = []
        self.orders: list[ControlEntry] = []
        self.offset = 0

    def tell(self, message: ProviderReference | DeliveryReport, *, at: datetime = NOW) -> Effects:
        self.offset += 1
        key = report_key(message.provider, message.reference)
        topic = topics.RECEIPTS if isinstance(message, DeliveryReport) else topics.PROVIDER_REFS
        return self._decide(message, KnownSource(topic=topic, partition=partition_of(key, PARTITIONS), offset=self.offset, at=at, key=key))

    def _decide(self, message: ProviderReference | DeliveryReport, source: KnownSource) -> Effects:
        if isinstance(message, DeliveryReport):
            effects = self.matcher.decide_report(Reported(message, b"raw"), source, self.state)
        else:
            effects = self.matcher.decide_reference(message, source, self.state)
        self._apply(effects)
        for output in effects.outputs:
            if isinstance(output.value, ProviderReference | DeliveryReport):  # sent on to the owner of another key
                assert output.partition is not None
                self._decide(output.value, replace(source, topic=output.topic, partition=output.partition, key=output.key))
        return effects

    def expire(self, at: datetime) -> list[SetAside]:
        return self._apply(self.matcher.expire(at, self.state)).set_aside

    def _apply(self, effects: Effects) -> Effects:
        for row in effects.rows:
            self.state[row.table].pop(row.key, None)
            if row.value is not None:
                self.state[row.table][row.key] = row.value
        self.changes += [output.value for output in effects.outputs if isinstance(output.value, StatusChange)]
        self.orders += [output.value for output in effects.outputs if isinstance(output.value, ControlEntry)]
        return effects

    @property
    def winner(self) -> StatusChange:
        return max(self.changes, key=_order)


def _order(change: StatusChange) -> tuple[int, int, int]:
    return order(generation=change.generation, attempt=change.attempt, status=Status(change.status))


def test_a_report_after_its_reference_changes_the_status_of_that_attempt() -> None:
    desk = Desk()
    desk.tell(replace(REFERENCE, attempt=3, generation=1))
    assert desk.tell(REPORT).counts == ["matched"]
    (change,) = desk.changes
    assert (change.status, change.reason, change.generation, change.attempt, change.delivery_id) == ("delivered", "2.0.0", 1, 3, "d")
    assert change.category == "payments"


def test_a_report_before_its_reference_waits_for_it() -> None:
    desk = Desk()
    assert desk.tell(REPORT).counts == ["waiting"]
    assert not desk.changes
    desk.tell(REFERENCE)
    assert [change.status for change in desk.changes] == ["delivered"]
    assert not desk.state[WAITING]


@pytest.mark.parametrize("is_early", [True, False])
def test_a_report_told_twice_counts_once(*, is_early: bool) -> None:
    desk = Desk()
    told: list[ProviderReference | DeliveryReport] = [REPORT, replace(REPORT, report_id="again"), REFERENCE]
    told = told if is_early else [REFERENCE, REPORT, REPORT]
    effects = [desk.tell(message) for message in told]
    assert sum(each.counts.count("repeated") for each in effects) == 1
    assert len(desk.changes) == 1


def test_a_reference_told_twice_changes_nothing() -> None:
    desk = Desk()
    for message in (REFERENCE, REPORT, REFERENCE):
        desk.tell(message)
    assert len(desk.changes) == 1


def test_what_was_reported_on_an_unknown_attempt_counts_for_the_attempt_that_repeated_it() -> None:
    desk = Desk()
    for message in (REFERENCE, REPORT, replace(REFERENCE, attempt=2)):
        desk.tell(message)
    assert [(change.status, change.attempt) for change in desk.changes] == [("delivered", 1), ("delivered", 2)]
    assert desk.tell(REFERENCE).counts == ["stale_reference"]


def test_another_delivery_under_the_same_reference_inherits_nothing() -> None:
    desk = Desk()
    for message in (REFERENCE, REPORT, replace(REFERENCE, delivery_id="other")):
        desk.tell(message)
    assert [change.delivery_id for change in desk.changes] == ["d"]


@given(st.permutations([REFERENCE, REPORT, replace(REPORT, status="bounced", code="5.1.1"), REPORT]))
def test_in_any_order_bounced_beats_delivered(told: Sequence[ProviderReference | DeliveryReport]) -> None:
    desk = Desk()
    for message in told:
        desk.tell(message)
    assert desk.winner.status == "bounced"
    assert sorted(change.status for change in desk.changes) == ["bounced", "delivered"]


def test_any_order_of_references_and_reports_ends_in_the_same_status() -> None:
    told: list[ProviderReference | DeliveryReport] = [REFERENCE, replace(REFERENCE, attempt=2), REPORT]
    for sequence in itertools.permutations(told):
        desk = Desk()
        for message in sequence:
            desk.tell(message)
        assert (desk.winner.status, desk.winner.attempt) == ("delivered", 2)


# a message in three parts: its reference names each of them
WHOLE = replace(SCOPED, reference="a b c")
PARTS = [replace(REPORT, reference=part) for part in "abc"]


@given(st.permutations([WHOLE, *PARTS, *PARTS]))
def test_in_any_order_a_message_in_parts_is_delivered_when_the_last_part_is(told: Sequence[ProviderReference | DeliveryReport]) -> None:
    desk = Desk()
    for place, message in enumerate(told):
        so_far = [each.reference for each in told[: place + 1]]
        desk.tell(message)
        assert bool(desk.changes) is ({"a b c", "a", "b", "c"} <= set(so_far))
    (change,) = desk.changes
    assert (change.status, change.reference, change.delivery_id, change.attempt) == ("delivered", "a b c", "d", 1)
    assert not desk.state[WAITING]


@pytest.mark.parametrize("status", ["bounced", "failed", "expired"])
@given(st.data())
def test_what_happens_to_one_part_happens_to_the_message_and_it_is_never_delivered(status: str, data: st.DataObject) -> None:
    ill = replace(PARTS[1], status=status, code="UNDELIV 001")
    messages: list[ProviderReference | DeliveryReport] = [WHOLE, WHOLE, PARTS[0], PARTS[2], ill]
    told = data.draw(st.permutations(messages))
    desk = Desk()
    for place, message in enumerate(told):
        desk.tell(message)
        so_far = {each.reference for each in told[: place + 1]}
        assert bool(desk.changes) is ({"a b c", "b"} <= so_far)
    assert [(change.status, change.reason) for change in desk.changes] == [(status, "UNDELIV 001")]


def test_a_part_that_says_that_the_address_is_dead_suppresses_it() -> None:
    desk = Desk()
    desk.tell(replace(BOUNCE, reference="c"))
    desk.tell(WHOLE)
    assert [order.reason for order in desk.orders] == ["hard_bounce"]


def test_a_later_attempt_in_other_parts_is_delivered_by_its_own() -> None:
    desk = Desk()
    second = replace(WHOLE, reference="d e", attempt=2)
    told: list[ProviderReference | DeliveryReport] = [WHOLE, second, *PARTS[:2], replace(REPORT, reference="d")]
    for message in told:
        desk.tell(message)
    assert not desk.changes
    desk.tell(replace(REPORT, reference="e"))
    assert [(change.status, change.attempt) for change in desk.changes] == [("delivered", 2)]


def test_references_of_parts_are_forgotten_too() -> None:
    desk = Desk()
    desk.tell(WHOLE)
    assert len(desk.state[REFERENCES]) == 4
    later = NOW + timedelta(seconds=REFERENCE_SECONDS + 1)
    for number in range(3):
        desk.tell(replace(REFERENCE, reference=f"other-{number}", at=later), at=later)
    assert len(desk.state[REFERENCES]) == 3


def test_a_report_on_a_part_that_is_on_another_partition_is_sent_on_as_that_parts() -> None:
    desk = Desk()
    part, whole = report_key("smtp", "b"), partition_of(report_key("smtp", "a b c"), PARTITIONS)
    report = replace(REPORT, reference="a b c")
    source = KnownSource(topic=topics.RECEIPTS, partition=(whole + 1) % PARTITIONS, offset=0, at=NOW, key=part)
    (output,) = desk.matcher.decide_report(Reported(report, b"raw"), source, desk.state).outputs
    assert output == (topics.RECEIPTS, part, report, whole)


def test_a_report_that_nothing_answers_to_is_a_dead_letter_after_three_days_with_where_it_was_read() -> None:
    desk = Desk()
    desk.tell(REPORT)
    assert not desk.expire(NOW + timedelta(seconds=WAITING_SECONDS - 1))
    (aside,) = desk.expire(NOW + timedelta(seconds=WAITING_SECONDS + 1))
    key = report_key(REPORT.provider, REPORT.reference)
    assert (aside.source.topic, aside.source.partition, aside.source.offset) == ("receipts", partition_of(key, PARTITIONS), 1)
    assert (aside.source.at, aside.source.key, aside.value, aside.error.reason) == (NOW, key, b"raw", "unknown_reference")
    assert not desk.state[WAITING]


def test_reports_under_one_reference_are_dead_letters_together_and_hold_up_no_others() -> None:
    desk = Desk()
    desk.tell(REPORT)
    desk.tell(replace(REPORT, reference="other"), at=NOW + timedelta(hours=1))
    desk.tell(replace(REPORT, status="bounced"), at=NOW + timedelta(hours=48))
    waiting = timedelta(seconds=WAITING_SECONDS + 1)
    assert [aside.source.key for aside in desk.expire(NOW + timedelta(hours=1) + waiting)] == [report_key("smtp", "other")]
    assert not desk.expire(NOW + timedelta(hours=47) + waiting)
    assert [aside.source.offset for aside in desk.expire(NOW + timedelta(hours=48) + waiting)] == [1, 3]


def test_a_reference_that_is_told_again_does_not_keep_those_behind_it() -> None:
    desk = Desk()
    desk.tell(REFERENCE)
    desk.tell(replace(REFERENCE, reference="other"))
    later = NOW + timedelta(seconds=REFERENCE_SECONDS + 1)
    desk.tell(replace(REFERENCE, attempt=2, at=later), at=later)
    assert list(desk.state[REFERENCES]) == [report_key("smtp", REFERENCE.reference)]


@pytest.mark.parametrize("seconds", [REFERENCE_SECONDS, 86_400])
def test_a_reference_is_known_as_long_as_is_asked_for_and_then_forgotten(seconds: int) -> None:
    desk = Desk(Matcher(PARTITIONS, seconds))
    desk.tell(REFERENCE)
    for name, after in (("timely", seconds), ("later", seconds + 1)):
        at = NOW + timedelta(seconds=after)
        desk.tell(replace(REFERENCE, reference=name, at=at), at=at)
        is_known = report_key("smtp", REFERENCE.reference) in desk.state[REFERENCES]
        assert is_known is (after <= seconds)
    assert list(desk.state[REFERENCES]) == [report_key("smtp", "timely"), report_key("smtp", "later")]


def test_the_settings_say_how_long_references_are_known(tmp_path: Path) -> None:
    assert Settings.from_env({}).reference_seconds == REFERENCE_SECONDS
    settings = Settings.from_env({"NOTIFY_REFERENCE_DAYS": "7"})
    control = Control(lambda _scope: None, seal_key=bytes(32))
    inputs = Inputs(
        settings=settings, codec=Codec({}, {}), registry=Registry("http://nobody", tmp_path), control=lambda: control, keys=None
    )
    (match,) = [step for step in TOPOLOGY if step.name == "match"]
    state = {REFERENCES: OrderedDict({b"email old": Known.of(REFERENCE).encode()}), WAITING: OrderedDict()}
    key = report_key("smtp", REFERENCE.reference)
    for days, forgotten in ((6.9, []), (7.1, [b"email old"])):
        source = KnownSource(
            topic=topics.PROVIDER_REFS, partition=partition_of(key, settings.partitions), offset=1, at=NOW + timedelta(days=days), key=key
        )
        effects = inputs.of(match)[topics.PROVIDER_REFS].decide(REFERENCE, source, state)
        assert [row.key for row in effects.rows if row.value is None] == forgotten


def test_a_report_on_another_partition_than_its_references_is_sent_on() -> None:
    desk = Desk()
    key = report_key(REPORT.provider, REPORT.reference)
    here = partition_of(key, PARTITIONS)
    source = KnownSource(topic=topics.RECEIPTS, partition=(here + 1) % PARTITIONS, offset=0, at=NOW, key=b"")
    (output,) = desk.matcher.decide_report(Reported(REPORT, b"raw"), source, desk.state).outputs
    assert output == (topics.RECEIPTS, key, REPORT, here)


def test_a_hard_bounce_suppresses_the_address_that_it_is_about() -> None:
    desk = Desk()
    desk.tell(SCOPED)
    effects = desk.tell(BOUNCE)
    assert effects.counts == ["matched", "suppression:hard_bounce"]
    assert desk.orders == [ControlEntry(scope="suppression:email:0123", reason="hard_bounce", issued_at=NOW)]
    (output,) = [output for output in effects.outputs if output.topic == topics.CONTROL]
    assert (output.key, output.partition) == (b"suppression:email:0123", BY_KEY)
    assert [change.status for change in desk.changes] == ["bounced"]


def test_a_hard_bounce_that_comes_before_its_reference_suppresses_the_address_when_that_is_known() -> None:
    desk = Desk()
    desk.tell(BOUNCE)
    assert not desk.orders
    assert "suppression:hard_bounce" in desk.tell(SCOPED).counts
    assert [order.reason for order in desk.orders] == ["hard_bounce"]


@given(st.permutations([SCOPED, REPORT, COMPLAINT, COMPLAINT]))
def test_a_complaint_suppresses_the_address_though_the_delivery_was_reported_before(
    told: Sequence[ProviderReference | DeliveryReport],
) -> None:
    desk = Desk()
    for message in told:
        desk.tell(message)
    assert [(order.reason, order.issued_at) for order in desk.orders] == [("complaint", COMPLAINT.at)]
    assert [change.status for change in desk.changes] == ["delivered"]


def test_a_bounce_told_again_does_not_bring_back_an_order_that_a_person_lifted() -> None:
    desk = Desk()
    for message in (SCOPED, BOUNCE, BOUNCE, replace(SCOPED, attempt=2), BOUNCE):
        desk.tell(message)
    assert len(desk.orders) == 1


def test_a_bounce_of_what_has_no_address_of_its_own_suppresses_nothing() -> None:
    desk = Desk()
    desk.tell(REFERENCE)
    assert desk.tell(BOUNCE).counts == ["matched"]
    assert not desk.orders


def test_rows_of_the_release_before_are_still_understood() -> None:
    desk = Desk()
    key = report_key(REPORT.provider, REPORT.reference)
    desk.state[REFERENCES][key] = b'["n","d","u","email","normal",0,1,1772323200000,{},true]'
    assert desk.tell(BOUNCE).counts == ["matched"]
    other = Desk()
    other.state[WAITING][key] = b'[[0,1,1772323200000,"bounced","5.1.1",1772323200000,"cmF3"]]'
    other.tell(SCOPED)
    assert ([change.status for change in other.changes], other.orders) == (["bounced"], [])


@pytest.mark.parametrize(
    "report",
    [
        replace(REPORT, status="read"),
        replace(REPORT, reference=""),
        replace(REPORT, provider="x" * 501),
        replace(REPORT, suppresses="whim"),
    ],
)
def test_a_report_that_says_nothing_of_use_is_a_dead_letter(report: DeliveryReport) -> None:
    with pytest.raises(InvalidEventError):
        Desk().tell(report)


def test_a_code_that_quotes_an_address_does_not_carry_it_into_the_trail() -> None:
    desk = Desk()
    desk.tell(REFERENCE)
    desk.tell(replace(REPORT, status="bounced", code="550 <ada@example.com> unknown"))
    assert desk.changes[0].reason == "550 unknown"
