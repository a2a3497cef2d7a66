"""Foreign events as our own values: one pure function per event type, whatever the record is called, adds or lacks.

An adjustment of stock arrives flat (contracts/InventoryAdjusted.example.json), in an envelope, or in the older form
(`product_id`, `adjusted_quantity`, `new_quantity`, `adjustment_reason`, `adjusted_by`), by product or by sku alone.
A payment arrives flat (contracts/PaymentProcessed.schema.json), in an envelope (contracts/PaymentProcessed.example.json) or
small (`id`, `orderId`, `status`, `processedAt`), with keys in camel or snake case. What is absurd raises InvalidEventError
with the field's path; what names nobody raises UnroutableError. Neither repeats a value, since errors are logged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from enum import StrEnum
from hashlib import blake2b
from uuid import UUID

from schemas.errors import InvalidEventError, UnroutableError
from schemas.ids import digest

MAX_ID_CHARACTERS = 200
MAX_TEXT_CHARACTERS = 1_000
MAX_AMOUNT = 10**12
MAX_QUANTITY = 10**12
DEFAULT_CURRENCY = "USD"

# currencies whose minor unit is not a hundredth. Source: ISO 4217 list one
_DECIMALS = (
    dict.fromkeys(
        ("BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG", "RWF", "UGX", "UYI", "VND", "VUV", "XAF", "XOF", "XPF"), 0
    )
    | dict.fromkeys(("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"), 3)
    | dict.fromkeys(("CLF", "UYW"), 4)
)
_QUANTA = {decimals: Decimal(1).scaleb(-decimals) for decimals in (0, 2, 3, 4)}

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# outside these, a number was no count of milliseconds
_EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)
_LATEST = datetime(2200, 1, 1, tzinfo=UTC)
_LATEST_MILLIS = 7_258_118_400_000

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_WORDS = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")
_NAMES = {
    "paypal": "PayPal",
    "applepay": "Apple Pay",
    "googlepay": "Google Pay",
    "amex": "American Express",
    "jcb": "JCB",
    "ach": "ACH",
    "sepa": "SEPA",
}


class PaymentStatus(StrEnum):
    """How a payment stands."""

    CONFIRMED = "confirmed"
    PENDING = "pending"
    FAILED = "failed"


_STATUSES = {
    "confirmed": PaymentStatus.CONFIRMED,
    "completed": PaymentStatus.CONFIRMED,
    "processed": PaymentStatus.CONFIRMED,
    "pending": PaymentStatus.PENDING,
    "failed": PaymentStatus.FAILED,
    "declined": PaymentStatus.FAILED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentEvent:
    """A payment, whoever told us about it. `amount` has its currency's number of decimals."""

    event_id: str
    payment_id: str | None
    order_id: str | None
    subscription_id: str | None
    user_id: str
    status: PaymentStatus
    amount: Decimal | None
    currency: str
    method: str | None  # for people, such as "Visa ending 4242"
    failure_reason: str | None  # only of a failed payment
    occurred_at: datetime  # aware, UTC
    is_dated: bool  # whether the event itself says when; else `occurred_at` is when we heard of it


def payment(record: Mapping[str, object], *, raw: bytes, at: datetime) -> PaymentEvent:
    """Return the payment in `record`, whose bytes were `raw` and whose Kafka timestamp is `at` (aware).

    The identity of the event is its eventId; else payment and status; else a hash of `raw`; never the offset.
    Raises InvalidEventError when a field is absurd; UnroutableError when all is well but no user is named.
    """
    fields = _fields_of_event(record)
    status = _status(fields)
    payment_id = fields.id("paymentId", "id")
    event_id = fields.id("eventId")
    order_id = fields.id("orderId")
    subscription_id = fields.id("subscriptionId")
    currency = _currency(fields)
    amount = _amount(fields, currency)
    method = _method(fields)
    failure_reason = fields.text("failureReason", "failureMessage", "declineReason")
    occurred_at = _time(fields)
    user_id = fields.id("userId", "customerId")
    # last, so that an absurd event is called invalid, and only a sound one unroutable
    if user_id is None:
        raise UnroutableError("the payment names no user: userId and customerId are missing")
    if event_id is None:
        event_id = f"payment:{payment_id}:{status}" if payment_id else blake2b(raw, digest_size=16).hexdigest()
    return PaymentEvent(
        event_id=event_id,
        payment_id=payment_id,
        order_id=order_id,
        subscription_id=subscription_id,
        user_id=user_id,
        status=status,
        amount=amount,
        currency=currency,
        method=method,
        failure_reason=failure_reason if status is PaymentStatus.FAILED else None,
        occurred_at=occurred_at or at.astimezone(UTC),
        is_dated=occurred_at is not None,
    )


class _Sign(StrEnum):
    """Which way an adjustment goes that is written without a sign."""

    UP = "up"
    DOWN = "down"
    ABSOLUTE = "absolute"  # the quantity itself


# in lower case, without what stands between words; an amount with any other word goes by its own sign
_WORDS_OF = {
    _Sign.UP: "increase add addition in inbound positive stockin receipt received restock replenish replenishment return returned found",
    _Sign.DOWN: "decrease remove removal subtract out outbound negative stockout sale sold shipment shipped damage damaged loss lost theft "
    "stolen expired writeoff shrinkage",
    _Sign.ABSOLUTE: "set absolute count cyclecount stocktake",
}
_SIGNS = {word: sign for sign, words in _WORDS_OF.items() for word in words.split()}
_BETWEEN_WORDS = re.compile(r"[\s_-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class InventoryEvent:
    """An adjustment of a product's stock in one warehouse. Either `quantity` or `adjustment` is known, or both."""

    event_id: str
    product_id: str | None
    sku: str | None
    product_name: str | None
    warehouse_id: str  # empty where the event names none
    quantity: int | None  # how many there are now
    previous_quantity: int | None
    adjustment: int | None  # signed
    reason: str | None
    order_id: str | None
    correlation_id: str | None
    occurred_at: datetime  # aware, UTC

    @property
    def key(self) -> str:
        """What the stock is kept by: the product, else the sku."""
        return self.product_id or self.sku or ""


def inventory(record: Mapping[str, object], *, raw: bytes, at: datetime) -> InventoryEvent:
    """Return the adjustment of stock in `record`, whose bytes were `raw` and whose Kafka timestamp is `at` (aware).

    The identity of the event is its eventId; else its adjustmentId, which the lines of one document may share, with product
    and warehouse; else a hash of `raw`; never the offset.
    Raises InvalidEventError when a field is absurd, or neither product nor sku, or no quantity is named.
    """
    fields = _fields_of_event(record)
    product_id, sku = fields.id("productId"), fields.id("sku")
    if product_id is None and sku is None:
        raise InvalidEventError("productId", "is missing, and so is sku")
    warehouse_id = fields.id("warehouseId", "warehouse", "locationId") or ""
    event_id, adjustment_id = fields.id("eventId"), fields.id("adjustmentId")
    if event_id is None and adjustment_id is not None:
        event_id = f"adjustment:{adjustment_id}:{digest(warehouse_id, product_id or sku or '', size=8)}"
    elif event_id is None:
        event_id = blake2b(raw, digest_size=16).hexdigest()
    quantity, previous = fields.whole("newQuantity", "currentQuantity"), fields.whole("previousQuantity")
    adjustment = fields.whole("adjustedQuantity", "quantityChange", "adjustment")
    sign = _SIGNS.get(_BETWEEN_WORDS.sub("", (fields.text("adjustmentType", "type") or "").lower()))
    if quantity is None and sign is _Sign.ABSOLUTE:
        quantity, adjustment = adjustment, None
    if quantity is None and adjustment is None:
        raise InvalidEventError("newQuantity", "is missing, and so is adjustedQuantity")
    path, metadata = fields.find("metadata")
    more = _Fields((f"{path}.", metadata)) if isinstance(metadata, Mapping) else _Fields(("", {}))
    return InventoryEvent(
        event_id=event_id,
        product_id=product_id,
        sku=sku,
        product_name=fields.text("productName"),
        warehouse_id=warehouse_id,
        quantity=quantity,
        previous_quantity=previous,
        adjustment=_signed(adjustment, sign, quantity=quantity, previous=previous),
        reason=fields.text("reason", "adjustmentReason"),
        order_id=fields.id("orderId") or more.id("orderId"),
        correlation_id=fields.id("correlationId") or more.id("correlationId"),
        occurred_at=_time(fields) or at.astimezone(UTC),
    )


def _signed(adjustment: int | None, sign: _Sign | None, *, quantity: int | None, previous: int | None) -> int | None:
    """Return what was added, below zero for what was taken away. Two levels say it better than any word."""
    if quantity is not None and previous is not None:
        return quantity - previous
    match sign:
        case _Sign.UP if adjustment is not None:
            return abs(adjustment)
        case _Sign.DOWN if adjustment is not None:
            return -abs(adjustment)
        case _Sign.ABSOLUTE:
            return None
        case _:
            return adjustment


class _Fields:
    """Fields by name in any case, found in one or more records. Each has the prefix of its path; earlier ones come first."""

    def __init__(self, *records: tuple[str, Mapping[str, object]]) -> None:
        self._levels = [(prefix, _by_plain_name(record)) for prefix, record in records]

    def find(self, *names: str, unless: object = None) -> tuple[str, object]:
        """Return path and value of the first of `names` that is there, not null and not `unless`; else the first name and None."""
        for prefix, level in self._levels:
            for name in names:
                found = level.get(name.lower())
                if found is not None and found[1] != unless:
                    return prefix + found[0], found[1]
        return self._levels[0][0] + names[0], None

    def text(self, *names: str) -> str | None:
        path, value = self.find(*names)
        return None if value is None else _text(path, value)

    def whole(self, *names: str) -> int | None:
        path, value = self.find(*names)
        match value:
            case None:
                return None
            case bool():
                raise InvalidEventError(path, "is no number but bool")
            case int():
                number = value
            case float() if value.is_integer():
                number = int(value)
            case Decimal() if value.is_finite() and value.copy_abs() > MAX_QUANTITY:
                raise InvalidEventError(path, f"is beyond {MAX_QUANTITY}")  # an integer of it may take all memory
            case Decimal() if value.is_finite() and value == int(value):
                number = int(value)
            case str() if re.fullmatch(r"[+-]?[0-9]{1,18}", value.strip()):
                number = int(value)
            case float() | Decimal() | str():
                raise InvalidEventError(path, "is no whole number")
            case _:
                raise InvalidEventError(path, f"is no number but {type(value).__name__}")
        if abs(number) > MAX_QUANTITY:
            raise InvalidEventError(path, f"is beyond {MAX_QUANTITY}")
        return number

    def id(self, *names: str) -> str | None:
        # empty: its producer's schema does not allow null
        path, value = self.find(*names, unless="")
        if isinstance(value, UUID) or (isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < 64):
            value = str(value)
        if value is None:
            return None
        text = _text(path, value)
        if not text.strip():
            raise InvalidEventError(path, "is empty")
        if len(text) > MAX_ID_CHARACTERS:
            raise InvalidEventError(path, f"has more than {MAX_ID_CHARACTERS} characters")
        if _CONTROL.search(text):
            raise InvalidEventError(path, "holds control characters")
        return text


def _fields_of_event(record: Mapping[str, object]) -> _Fields:
    """Return the fields of an event and, if it is in an envelope, of its `data` before them."""
    data = record.get("data")
    if not isinstance(data, Mapping):
        return _Fields(("", record))
    # an envelope's own `id` says nothing about the payment
    return _Fields(("data.", data), ("", {name: value for name, value in record.items() if name != "id"}))


def _by_plain_name(record: Mapping[str, object]) -> dict[str, tuple[str, object]]:
    """Return name and value of each field that is not null, by its name without case and underscores."""
    found: dict[str, tuple[str, object]] = {}
    for name, value in record.items():
        if value is not None and isinstance(name, str):
            found.setdefault(name.replace("_", "").lower(), (name, value))
    return found


def _text(path: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidEventError(path, f"is no text but {type(value).__name__}")
    if len(value) > MAX_TEXT_CHARACTERS:
        raise InvalidEventError(path, f"has more than {MAX_TEXT_CHARACTERS} characters")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidEventError(path, "holds half a surrogate pair, which is no text") from error
    return value


def _status(fields: _Fields) -> PaymentStatus:
    path, value = fields.find("status")
    if value is None:
        raise InvalidEventError(path, "is missing")
    status = _STATUSES.get(_text(path, value).strip().lower())
    if status is None:
        raise InvalidEventError(path, f"is none of {', '.join(_STATUSES)}")
    return status


def _currency(fields: _Fields) -> str:
    path, value = fields.find("currency")
    if value is None:
        return DEFAULT_CURRENCY
    text = _text(path, value)
    if not (len(text) == 3 and text.isascii() and text.isalpha()):
        raise InvalidEventError(path, "is no ISO 4217 code of three letters")
    return text.upper()


def _amount(fields: _Fields, currency: str) -> Decimal | None:
    path, value = fields.find("amount")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        raise InvalidEventError(path, f"is no number but {type(value).__name__}")
    try:
        # by way of the shortest text of a float: 189.97, not 189.969999999999998863131622783839702606201171875
        amount = Decimal(str(value) if isinstance(value, float) else _text(path, value) if isinstance(value, str) else value)
    except InvalidOperation as error:
        raise InvalidEventError(path, "is no number") from error
    if not amount.is_finite():
        raise InvalidEventError(path, "is not finite")
    if amount < 0:
        raise InvalidEventError(path, "is negative")
    if amount > MAX_AMOUNT:
        raise InvalidEventError(path, f"is above {MAX_AMOUNT}")
    # without the sign that -0.0 keeps
    return amount.quantize(_QUANTA[_DECIMALS.get(currency, 2)], rounding=ROUND_HALF_UP).copy_abs()


def _method(fields: _Fields) -> str | None:
    path, value = fields.find("paymentMethod")
    if value is None:
        return None
    if not isinstance(value, Mapping):
        return _words(_text(path, value)) or None
    method = _Fields((f"{path}.", value))
    name = _words(method.text("brand") or method.text("type") or "")
    last4 = method.text("last4")
    # whoever puts a whole card number there must not see it in a mail
    return f"{name} ending {last4}" if name and last4 and re.fullmatch(r"[0-9]{4}", last4) else name or None


def _words(name: str) -> str:
    """Return an identifier as words: CreditCard and credit_card become "Credit card"; other text stays as it is."""
    plain = name.replace("_", "").replace(" ", "").lower()
    if plain in _NAMES:
        return _NAMES[plain]
    if not re.fullmatch(r"[A-Za-z0-9_]+", name):
        return name.strip()
    return " ".join(_WORDS.findall(name)).capitalize()


def _time(fields: _Fields) -> datetime | None:
    path, value = fields.find("occurredAt", "completedAt", "processedAt", "adjustedAt", "timestamp")
    try:
        match value:
            case None:
                return None
            case datetime():
                when = value
            case str():
                when = datetime.fromisoformat(_text(path, value).upper())
            case bool():
                raise InvalidEventError(path, "is no time but bool")
            case int() | float() if abs(value) <= _LATEST_MILLIS:
                when = _EPOCH + timedelta(milliseconds=value)
            case int() | float():
                raise InvalidEventError(path, "is no count of milliseconds since 1970")
            case _:
                raise InvalidEventError(path, f"is no time but {type(value).__name__}")
        if when.tzinfo is None:
            raise InvalidEventError(path, "has no time zone")
        when = when.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidEventError(path, "is no RFC 3339 time") from error
    if not _EARLIEST <= when < _LATEST:
        raise InvalidEventError(path, "lies before 2000 or after 2199; numbers count milliseconds")
    return when
