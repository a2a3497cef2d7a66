"""Payments as others tell them, in every shape, and every way in which they can be absurd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.normalise import MAX_AMOUNT, PaymentEvent, PaymentStatus, payment
from schemas.errors import InvalidEventError, NotifyError, UnroutableError
from schemas.examples import samples

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
FLAT, ENVELOPED, FAILED, PENDING, SMALL = samples("payments")


def read(record: dict[str, Any], *, raw: bytes = b"raw", at: datetime = AT) -> PaymentEvent:
    return payment(record, raw=raw, at=at)


def a_payment(**changes: object) -> dict[str, object]:
    return {"paymentId": "pay_1", "userId": "u1", "status": "confirmed", **changes}


# shapes


def test_the_flat_payment_of_the_contract() -> None:
    assert read(FLAT) == PaymentEvent(
        event_id="payment:0d9a7b54-6c2e-4f13-8b60-5a1c3e9d7f42:confirmed",
        payment_id="0d9a7b54-6c2e-4f13-8b60-5a1c3e9d7f42",
        order_id="c4d0a6f2-51b7-4b8e-9a0d-0f6a1e7b2c93",
        subscription_id=None,
        user_id="1b6e2c1a-9d52-4f0e-8a77-2f4d9c0b5e31",
        status=PaymentStatus.CONFIRMED,
        amount=Decimal("64.50"),
        currency="GBP",
        method="Debit card",
        failure_reason=None,
        occurred_at=datetime(2025, 11, 18, 9, 12, 44, 503000, tzinfo=UTC),
        is_dated=True,
    )


def test_the_enveloped_example_of_the_contract() -> None:
    assert read(ENVELOPED) == PaymentEvent(
        event_id="evt_pp_a1b2c3d4-e5f6-7890-abcd-ef1234567890",
        payment_id="pay_4b5c6d7e-8f9a-0b1c-2d3e-4f5a6b7c8d9e",
        order_id="ord_92840123",
        subscription_id=None,
        user_id="cust_10482",
        status=PaymentStatus.CONFIRMED,
        amount=Decimal("189.97"),
        currency="USD",
        method="Visa ending 4242",
        failure_reason=None,
        occurred_at=datetime(2024, 3, 15, 11, 4, 33, 218000, tzinfo=UTC),
        is_dated=True,
    )


def test_a_failed_and_a_pending_payment() -> None:
    assert (read(FAILED).status, read(FAILED).failure_reason) == (PaymentStatus.FAILED, "Your bank declined the payment.")
    assert (read(PENDING).status, read(PENDING).amount) == (PaymentStatus.PENDING, Decimal(12800))


def test_the_small_payment_is_routable_once_it_names_a_user() -> None:
    event = read(SMALL | {"userId": "u1"})
    assert (event.payment_id, event.order_id, event.status) == ("pay_1", "ord_86702", PaymentStatus.CONFIRMED)
    assert (event.amount, event.method, event.currency) == (None, None, "USD")
    assert event.occurred_at == datetime(2025, 11, 18, 11, 20, tzinfo=UTC)


def _snake(value: object) -> object:
    if isinstance(value, dict):
        return {"".join(f"_{c.lower()}" if c.isupper() else c for c in name): _snake(each) for name, each in value.items()}
    return value


@pytest.mark.parametrize("record", [FLAT, ENVELOPED, FAILED, PENDING])
def test_keys_in_snake_case_say_the_same(record: dict[str, Any]) -> None:
    snake = _snake(record)
    assert isinstance(snake, dict)
    assert read(snake) == read(record)


@pytest.mark.parametrize("record", [FLAT, ENVELOPED, FAILED, PENDING])
def test_nulls_and_fields_that_nobody_knows_change_nothing(record: dict[str, Any]) -> None:
    more = copy.deepcopy(record) | {"colour": "red", "nested": {"a": [1]}, "event_id": record.get("eventId"), "user_id": None}
    assert read(more) == read(record)


def test_an_envelopes_own_id_is_not_the_payments() -> None:
    assert read({"id": "cloud_1", "data": a_payment(paymentId=None)}).payment_id is None
    assert read({"id": "cloud_1", "data": a_payment(paymentId=None, id="pay_2")}).payment_id == "pay_2"


def test_the_envelope_tells_what_its_data_do_not() -> None:
    record = {"userId": "u9", "timestamp": "2025-01-01T00:00:00Z", "data": {"paymentId": "pay_1", "status": "failed"}}
    assert (read(record).user_id, read(record).occurred_at.year) == ("u9", 2025)


# identity


def test_without_an_event_id_payment_and_status_identify_the_event() -> None:
    assert read(a_payment()).event_id == "payment:pay_1:confirmed"
    assert read(a_payment(status="COMPLETED"), raw=b"other", at=AT + timedelta(days=1)).event_id == "payment:pay_1:confirmed"
    assert read(a_payment(status="pending")).event_id == "payment:pay_1:pending"


def test_without_a_payment_id_the_bytes_identify_the_event() -> None:
    one = read(a_payment(paymentId=None), raw=b"1").event_id
    assert one == read(a_payment(paymentId=None), raw=b"1", at=AT + timedelta(days=1)).event_id
    assert one != read(a_payment(paymentId=None), raw=b"2").event_id
    assert len(one) == 32


# statuses


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("confirmed Confirmed CONFIRMED completed Completed processed PROCESSED", PaymentStatus.CONFIRMED),
        ("pending Pending PENDING", PaymentStatus.PENDING),
        ("failed FAILED declined Declined", PaymentStatus.FAILED),
    ],
)
def test_a_status_is_known_in_any_case(words: str, status: PaymentStatus) -> None:
    assert {read(a_payment(status=word)).status for word in words.split()} == {status}


@pytest.mark.parametrize("status", [None, "", "refunded", "confirmed?", 1, True, ["confirmed"]])
def test_any_other_status_is_invalid(status: object) -> None:
    with pytest.raises(InvalidEventError) as caught:
        read(a_payment(status=status))
    assert caught.value.field == "status"


def test_only_a_failed_payment_has_a_failure_reason() -> None:
    assert read(a_payment(failureReason="too late")).failure_reason is None
    assert read(a_payment(failureReason="too late", status="failed")).failure_reason == "too late"


# users


@pytest.mark.parametrize("name", ["userId", "user_id", "customerId", "customer_id"])
def test_a_user_by_any_of_his_names(name: str) -> None:
    assert read({"paymentId": "pay_1", "status": "failed", name: "u7"}).user_id == "u7"


def test_a_sound_payment_without_a_user_is_unroutable() -> None:
    for record in (SMALL, a_payment(userId=None), a_payment(userId="", customerId="")):
        with pytest.raises(UnroutableError):
            read(record)


def test_an_absurd_payment_without_a_user_is_invalid() -> None:
    for absurd in ({"status": "refunded"}, {"amount": -1}, {"currency": "dollars"}, {"processedAt": "noon"}):
        with pytest.raises(InvalidEventError):
            read(SMALL | absurd)


# amounts


@pytest.mark.parametrize(
    ("amount", "currency", "expected"),
    [
        (189.97, "USD", "189.97"),
        (0.1 + 0.2, "USD", "0.30"),
        (1.005, "EUR", "1.01"),
        (64.5, "gbp", "64.50"),
        (0, "USD", "0.00"),
        (-0.0, "USD", "0.00"),
        (12800.0, "JPY", "12800"),
        (1.2345, "KWD", "1.235"),
        (1.23456, "CLF", "1.2346"),
        (1.2345, "XXX", "1.23"),
        ("189.97", "USD", "189.97"),
        (Decimal("189.970"), "USD", "189.97"),
        (1e12, "USD", "1000000000000.00"),
        (1e-300, "USD", "0.00"),
    ],
)
def test_an_amount_has_its_currencys_decimals_and_no_others(amount: object, currency: str, expected: str) -> None:
    event = read(a_payment(amount=amount, currency=currency))
    assert (f"{event.amount:f}", event.currency) == (expected, currency.upper())


def test_without_a_currency_it_is_dollars() -> None:
    assert read(a_payment(amount=1)).currency == "USD"


@pytest.mark.parametrize(
    "amount",
    [
        -0.01, -1, MAX_AMOUNT + 1, 1e13, pytest.param(10**5000, id="huge"), float("nan"), float("inf"), -float("inf"), "NaN", "sNaN",
        "1e400", "ten", "", True, [1], {}, b"1",
    ],
)  # fmt: skip
def test_an_absurd_amount_is_invalid(amount: object) -> None:
    with pytest.raises(InvalidEventError) as caught:
        read(a_payment(amount=amount))
    assert caught.value.field == "amount"


@pytest.mark.parametrize("currency", ["", "US", "USDT", "U$D", "ÜSD", 840, True])
def test_an_absurd_currency_is_invalid(currency: object) -> None:
    with pytest.raises(InvalidEventError) as caught:
        read(a_payment(currency=currency))
    assert caught.value.field == "currency"


# methods


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("CreditCard", "Credit card"),
        ("DebitCard", "Debit card"),
        ("BankTransfer", "Bank transfer"),
        ("PayPal", "PayPal"),
        ("Crypto", "Crypto"),
        ("credit_card", "Credit card"),
        ("CREDIT_CARD", "Credit card"),
        ("Gift card, FlowMart", "Gift card, FlowMart"),
        ("", None),
        (None, None),
        ({"type": "credit_card", "brand": "visa", "last4": "4242"}, "Visa ending 4242"),
        ({"type": "credit_card", "brand": "MASTERCARD"}, "Mastercard"),
        ({"type": "credit_card", "last4": "4242"}, "Credit card ending 4242"),
        ({"type": "bank_transfer", "last4": None}, "Bank transfer"),
        ({"last4": "4242"}, None),
        ({}, None),
    ],
)
def test_a_method_is_told_in_words(method: object, expected: str | None) -> None:
    assert read(a_payment(paymentMethod=method)).method == expected


def test_a_whole_card_number_is_never_shown() -> None:
    assert read(a_payment(paymentMethod={"brand": "visa", "last4": "4242424242424242"})).method == "Visa"


# times


@pytest.mark.parametrize("name", ["timestamp", "processedAt", "completedAt", "occurredAt", "occurred_at"])
@pytest.mark.parametrize(
    "value",
    [
        "2025-11-18T09:12:44.5Z",
        "2025-11-18t09:12:44.500z",
        "2025-11-18 10:12:44.500000000+01:00",
        1763457164500,
        1763457164500.0,
        datetime(2025, 11, 18, 9, 12, 44, 500000, tzinfo=UTC),
        datetime(2025, 11, 18, 4, 12, 44, 500000, tzinfo=timezone(timedelta(hours=-5))),
    ],
)
def test_a_time_in_any_form_is_the_same_time(name: str, value: object) -> None:
    event = read(a_payment(**{name: value}))
    assert event.occurred_at == datetime(2025, 11, 18, 9, 12, 44, 500000, tzinfo=UTC)
    assert (event.occurred_at.tzinfo, event.is_dated) == (UTC, True)


def test_an_undated_event_happened_when_we_heard_of_it() -> None:
    event = read(a_payment(), at=AT.astimezone(timezone(timedelta(hours=9))))
    assert (event.occurred_at, event.occurred_at.tzinfo, event.is_dated) == (AT, UTC, False)


@pytest.mark.parametrize(
    "value",
    [
        "", "noon", "2025-11-18", "2025-11-18T09:12:44", "2025-02-30T00:00:00Z", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00",
        1763457164, -1, 10**30, float("nan"), float("inf"), True, [2025], "2025-11-18T09:12:44Z\ud800",
        datetime(2025, 11, 18),  # noqa: DTZ001 - without a zone on purpose
    ],
)  # fmt: skip
def test_an_absurd_time_is_invalid(value: object) -> None:
    with pytest.raises(InvalidEventError) as caught:
        read(a_payment(timestamp=value))
    assert caught.value.field == "timestamp"


# ids and texts


@pytest.mark.parametrize("name", ["eventId", "paymentId", "orderId", "userId", "subscriptionId"])
@pytest.mark.parametrize("value", ["  ", "x" * 201, "a\nb", "a\0b", "a\x85b", "\udfff", 1.5, True, ["u1"], {"id": "u1"}, b"u1", 10**30])
def test_an_absurd_id_is_invalid(name: str, value: object) -> None:
    with pytest.raises(InvalidEventError) as caught:
        read(a_payment(**{name: value}))
    assert caught.value.field == name


def test_an_empty_id_is_none() -> None:
    assert read(a_payment(userId="", customerId="u9", orderId="")).user_id == "u9"
    assert read(a_payment(orderId="")).order_id is None


def test_an_id_may_be_a_number_or_a_uuid_and_200_characters_long() -> None:
    assert read(a_payment(userId=7)).user_id == "7"
    assert read(a_payment(userId=UUID(int=7))).user_id == "00000000-0000-0000-0000-000000000007"
    assert read(a_payment(userId="ü" * 200)).user_id == "ü" * 200


def test_texts_have_a_bound() -> None:
    with pytest.raises(InvalidEventError, match="failure_reason: has more than 1000 characters"):
        read(a_payment(status="failed", failure_reason="x" * 1001))


def _nested(**changes: object) -> dict[str, Any]:
    record = copy.deepcopy(ENVELOPED)
    record["data"].update(changes)
    return record


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda: _nested(amount=-1), "data.amount"),
        (lambda: _nested(paymentMethod={"brand": 7}), "data.paymentMethod.brand"),
        (lambda: _nested(paymentMethod={"brand": "visa", "last4": ["4"]}), "data.paymentMethod.last4"),
        (lambda: _nested(paymentMethod=7), "data.paymentMethod"),
        (lambda: _nested(status=None), "data.status"),
        (lambda: ENVELOPED | {"eventId": " "}, "eventId"),
        (lambda: a_payment(payment_method=7), "payment_method"),
    ],
)
def test_the_path_to_what_is_absurd_is_named_as_the_producer_spells_it(make: Callable[[], dict[str, Any]], path: str) -> None:
    with pytest.raises(InvalidEventError) as caught:
        read(make())
    assert caught.value.field == path


# whatever comes

_leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.decimals()
    | st.text(alphabet=st.characters(codec=None), max_size=30)
    | st.binary(max_size=5)
    | st.datetimes(timezones=st.none() | st.just(UTC))
    | st.uuids()
    | st.sampled_from(["confirmed", "pending", "failed", "USD", "u1", "2025-11-18T09:12:44Z", 1763457164500])
)
_names = st.text(max_size=5) | st.sampled_from(
    [
        "eventId", "event_id", "id", "paymentId", "orderId", "userId", "customer_id", "status", "amount", "currency", "paymentMethod",
        "type", "brand", "last4", "data", "timestamp", "processedAt", "completedAt", "occurredAt", "failureReason",
        "subscriptionId", "metadata",
    ]
)  # fmt: skip
_records = st.recursive(
    st.dictionaries(_names, _leaves, max_size=12),
    lambda inner: st.dictionaries(_names, _leaves | inner | st.lists(_leaves, max_size=2), max_size=12),
    max_leaves=4,
)


@given(_records)
def test_no_record_raises_anything_but_our_errors(record: dict[str, Any]) -> None:
    try:
        event = read(record)
    except NotifyError as error:
        assert isinstance(error, InvalidEventError | UnroutableError)  # noqa: PT017 - which of two is for others to say
    else:
        assert event.user_id
        assert event.occurred_at.tzinfo is UTC


_absurd = st.sampled_from([[], "x" * 1001, float("nan"), "\0", b"", {"a": 1}, -1, ""]) | _leaves


@given(st.sampled_from([FLAT, ENVELOPED, FAILED, PENDING, SMALL]), st.dictionaries(_names, _absurd, max_size=3), st.booleans())
def test_no_sound_payment_with_something_replaced_does_either(record: dict[str, Any], changes: dict[str, object], inside: bool) -> None:
    changed = copy.deepcopy(record)
    (changed["data"] if inside and "data" in changed else changed).update(changes)
    try:
        read(changed)
    except NotifyError as error:
        assert "\0" not in str(error)  # noqa: PT017 - errors are logged


@given(st.decimals(0, MAX_AMOUNT, places=2))
def test_no_cent_is_lost_on_the_way_through_a_double(amount: Decimal) -> None:
    assert read(a_payment(amount=float(amount))).amount == amount
