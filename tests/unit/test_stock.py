"""Adjustments of stock in every shape, what they change, and who hears of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.normalise import InventoryEvent, inventory
from agents.ports import Effects, KnownSource
from agents.stock import LEVELS, PRODUCTS, SEEN, Stock, pretended_user, transition
from agents.triggers import RULES, ingest_inventory
from schemas import topics
from schemas.codec import Codec
from schemas.errors import InvalidEventError
from schemas.ids import murmur2, partition_of
from schemas.messages import Broadcast, DecisionRecord, OutOfStock, Product, StockLevel

CONTRACT = json.loads((Path(__file__).parents[2] / "schemas/contracts/InventoryAdjusted.example.json").read_text())
AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
STOCK = Stock(codec=Codec({"Product": 1}, {}), default_threshold=10, partitions=4, user_partitions=3, seen_seconds=7 * 86_400)


def read(record: Mapping[str, object], raw: bytes = b"raw") -> InventoryEvent:
    return inventory(record, raw=raw, at=AT)


class Warehouse:
    """The role `stock` with its tables: applies what it decides, as the runner does."""

    def __init__(self) -> None:
        self.state: dict[str, dict[bytes, bytes]] = {LEVELS: {}, PRODUCTS: {}, SEEN: {}}
        self.offset = 0

    def _apply(self, effects: Effects) -> list[Any]:
        for row in effects.rows:
            if row.value is None:
                self.state[row.table].pop(row.key, None)
            else:
                self.state[row.table][row.key] = row.value
        return [output.value for output in effects.outputs]

    def adjust(self, event_id: str, before: int | None, after: int, *, minutes: int = 0, **more: Any) -> list[Any]:
        when = AT + timedelta(minutes=minutes)
        record = {"eventId": event_id, "productId": "p1", "warehouseId": "w1", "newQuantity": after, "timestamp": when.isoformat(), **more}
        if before is not None:
            record["previousQuantity"] = before
        source = KnownSource(topic=topics.INVENTORY, partition=0, offset=1, at=when + timedelta(seconds=1))
        (output,) = ingest_inventory(record, source, b"").outputs
        assert isinstance(output.value, StockLevel)
        self.offset += 1
        here = KnownSource(topic=topics.STOCK, partition=0, offset=self.offset, at=AT)
        return self._apply(STOCK.decide_level(output.value, here, self.state))

    def know(self, product: Product | None, key: bytes = b"p1") -> None:
        source = KnownSource(topic=topics.PRODUCTS, partition=partition_of(key, 4), offset=0, at=AT, key=key)
        self._apply(STOCK.decide_product(product, source, self.state))


def of(kind: type[Any], found: list[Any]) -> list[Any]:
    return [each for each in found if isinstance(each, kind)]


# shapes


def test_the_contracts_example() -> None:
    event = read(CONTRACT)
    assert (event.event_id, event.key, event.warehouse_id) == (CONTRACT["eventId"], "prod_1129", "wh_east_01")
    assert (event.quantity, event.previous_quantity, event.adjustment) == (242, 42, 200)
    assert event.correlation_id == CONTRACT["metadata"]["correlationId"]


def test_an_envelope_says_the_same_as_the_flat_event() -> None:
    facts = {name: value for name, value in CONTRACT.items() if name not in {"eventId", "eventType", "timestamp"}}
    enveloped = {"eventId": CONTRACT["eventId"], "type": "InventoryAdjusted", "timestamp": CONTRACT["timestamp"], "data": facts}
    assert read(enveloped) == read(CONTRACT)


def test_the_older_snake_case_form() -> None:
    event = read({"product_id": "p", "adjusted_quantity": -4, "new_quantity": 6, "adjustment_reason": "SALE", "adjusted_by": "u"}, raw=b"x")
    assert (event.product_id, event.adjustment, event.quantity, event.reason) == ("p", -4, 6, "SALE")
    assert event.occurred_at == AT
    assert len(event.event_id) == 32


def test_a_product_may_have_a_sku_only() -> None:
    assert read({"sku": "S-1", "newQuantity": 3}).key == "S-1"


@pytest.mark.parametrize(
    ("kind", "amount", "signed"),
    [
        ("INCREASE", 5, 5),
        ("increase", -5, 5),
        ("Decrease", 5, -5),
        ("DECREASE", -5, -5),
        ("sale", 2, -2),
        (None, -3, -3),
        ("odd", 3, 3),
        ("Stock Out", 2, -2),
        ("WRITE_OFF", 1, -1),
        ("stock-in", 4, 4),
    ],
)
def test_an_adjustment_has_a_sign_whether_it_was_written_with_one(kind: str | None, amount: int, signed: int) -> None:
    assert read({"sku": "s", "adjustedQuantity": amount, "adjustmentType": kind}).adjustment == signed


def test_two_levels_say_more_than_a_word() -> None:
    assert read({"sku": "s", "adjustedQuantity": 5, "adjustmentType": "INCREASE", "previousQuantity": 9, "newQuantity": 4}).adjustment == -5


def test_a_count_sets_the_level() -> None:
    event = read({"sku": "s", "adjustedQuantity": 7, "adjustmentType": "SET"})
    assert (event.quantity, event.adjustment) == (7, None)


@pytest.mark.parametrize(
    ("record", "path"),
    [
        ({"newQuantity": 1}, "productId"),
        ({"sku": "s"}, "newQuantity"),
        ({"sku": "s", "newQuantity": 1.5}, "newQuantity"),
        ({"sku": "s", "newQuantity": True}, "newQuantity"),
        ({"sku": "s", "newQuantity": "many"}, "newQuantity"),
        ({"sku": "s", "newQuantity": float("nan")}, "newQuantity"),
        ({"sku": "s", "newQuantity": float("inf")}, "newQuantity"),
        ({"sku": "s", "newQuantity": 10**13}, "newQuantity"),
        ({"sku": " ", "newQuantity": 1}, "sku"),
        ({"sku": "", "newQuantity": 1}, "productId"),
        ({"sku": "s", "newQuantity": Decimal("1E+40")}, "newQuantity"),
        ({"sku": "s", "newQuantity": Decimal("1E+999999999")}, "newQuantity"),
        ({"sku": "s", "newQuantity": Decimal("sNaN")}, "newQuantity"),
        ({"data": {"sku": "s", "newQuantity": []}}, "data.newQuantity"),
    ],
)
def test_what_is_absurd_is_named(record: dict[str, object], path: str) -> None:
    with pytest.raises(InvalidEventError) as caught:
        read(record)
    assert str(caught.value).startswith(path)


def test_an_empty_text_is_none() -> None:
    empty = {"eventId": "", "productId": "", "warehouseId": "", "orderId": "", "metadata": {"correlationId": ""}}
    event = read({**empty, "sku": "s", "newQuantity": 1})
    assert (event.key, event.product_id, event.warehouse_id, event.order_id, event.correlation_id) == ("s", None, "", None, None)


def test_the_lines_of_one_adjustment_are_events_of_their_own() -> None:
    line = {"adjustmentId": "a", "newQuantity": 1}
    places = [{"sku": sku, "warehouseId": warehouse} for sku in "st" for warehouse in ("w1", "w2", "")]
    assert len({read({**line, **place}).event_id for place in places}) == len(places)
    assert read({**line, **places[0]}).event_id == read({**line, **places[0]}, raw=b"other").event_id


# transitions


def test_running_out_is_told_once_however_often_the_event_is() -> None:
    warehouse = Warehouse()
    first = warehouse.adjust("e1", 18, 0)
    back = warehouse.adjust("e2", 0, 200, minutes=1)
    again = warehouse.adjust("e1", 18, 0)
    assert len(of(OutOfStock, first)) == 1
    assert not of(OutOfStock, back + again)
    assert {b.rule for b in of(Broadcast, first)} == {"out_of_stock"}
    assert {b.rule for b in of(Broadcast, back)} == {"back_in_stock"}
    assert [d.outcome for d in of(DecisionRecord, again)] == ["duplicate_of"]


@pytest.mark.parametrize("timestamp", [None, (AT + timedelta(days=18_000)).isoformat()], ids=["undated", "in the future"])
def test_what_has_no_sound_time_happened_when_it_was_published_and_counts_once(timestamp: str | None) -> None:
    warehouse = Warehouse()
    first = warehouse.adjust("e0", 18, 0, timestamp=timestamp)
    for number in range(1, 40):
        assert not of(OutOfStock, warehouse.adjust(f"e{number}", None, 200 + number, minutes=number, timestamp=timestamp))
    again = warehouse.adjust("e0", 18, 0, minutes=50, timestamp=timestamp)
    later = warehouse.adjust("e99", 18, 0, minutes=51)
    assert [len(of(OutOfStock, each)) for each in (first, again, later)] == [1, 0, 1]
    assert [d.outcome for d in of(DecisionRecord, again)] == ["duplicate_of"]
    assert len(warehouse.state[SEEN]) == 40


def test_an_event_without_a_time_is_forgotten_after_the_window() -> None:
    warehouse = Warehouse()
    for day in range(20):
        warehouse.adjust(f"e{day}", 18, 1, minutes=day * 1440, timestamp=None)
    assert len(warehouse.state[SEEN]) == 8


def test_the_id_of_out_of_stock_is_of_event_warehouse_and_product() -> None:
    ids = [
        event.event_id
        for event_id in ("e1", "e2")
        for warehouse_id in ("w1", "w2")
        for product_id in ("p1", "p2")
        for event in of(OutOfStock, Warehouse().adjust(event_id, 3, 0, warehouseId=warehouse_id, productId=product_id))
    ]
    assert len(set(ids)) == len(ids) == 8
    assert of(OutOfStock, Warehouse().adjust("e1", 5, -2))[0].event_id == ids[0]


def test_each_partition_of_the_users_is_told() -> None:
    warehouse = Warehouse()
    effects = warehouse.adjust("e1", 3, 0)
    assert len(of(Broadcast, effects)) == STOCK.user_partitions
    assert {b.audience for b in of(Broadcast, effects)} == {"warehouse:w1"}


def test_an_older_event_changes_nothing() -> None:
    warehouse = Warehouse()
    warehouse.adjust("e2", 0, 200, minutes=2)
    found = warehouse.adjust("e1", 18, 0, minutes=1)
    assert [(d.outcome, d.reason) for d in of(DecisionRecord, found)] == [("skipped", "superseded")]
    assert not of(OutOfStock, found)


def test_the_level_is_kept_by_warehouse() -> None:
    warehouse = Warehouse()
    warehouse.adjust("e1", 3, 0)
    assert len(of(OutOfStock, warehouse.adjust("e2", 3, 0, warehouseId="w2"))) == 1


def test_out_of_stock_has_the_names_of_its_contract_and_falls_back_to_the_sku() -> None:
    warehouse = Warehouse()
    more: dict[str, Any] = {"productId": None, "sku": "LES-42", "orderId": "ord_1", "metadata": {"correlationId": "c-1"}}
    (event,) = of(OutOfStock, warehouse.adjust("e1", 1, 0, **more))
    assert (event.product_id, event.sku, event.previous_quantity, event.current_quantity) == ("LES-42", "LES-42", 1, 0)
    assert (event.event_type, event.last_sold_order_id, event.metadata["correlationId"]) == ("OutOfStock", "ord_1", "c-1")
    assert event.timestamp == "2026-01-02T03:04:05.000Z"


def test_a_products_own_threshold_goes_before_the_default() -> None:
    warehouse = Warehouse()
    warehouse.know(Product(product_id="p1", name="Shoes", low_stock_threshold=50))
    (broadcast, *_) = of(Broadcast, warehouse.adjust("e1", 60, 49))
    assert (broadcast.rule, broadcast.data["productName"], broadcast.data["threshold"]) == ("low_stock", "Shoes", "50")
    warehouse.know(None)
    assert not of(Broadcast, warehouse.adjust("e2", 60, 40, minutes=1))


def test_only_the_adjustment_is_known_and_the_level_follows() -> None:
    warehouse = Warehouse()
    warehouse.adjust("e1", 20, 12)
    found = warehouse.adjust("e2", None, 0, minutes=1, newQuantity=None, adjustedQuantity=-12)
    assert len(of(OutOfStock, found)) == 1
    unknown = warehouse.adjust("e3", None, 0, warehouseId="w9", newQuantity=None, adjustedQuantity=-1)
    assert [d.reason for d in of(DecisionRecord, unknown)] == ["the level before is not known"]


def test_what_is_no_news_is_a_visible_decision_about_nobody() -> None:
    warehouse = Warehouse()
    (record,) = warehouse.adjust("e1", 42, 242)
    assert (record.outcome, record.user_id) == ("no_rule_matched", "stock:p1")
    assert int(record.notification_id[:8], 16) == murmur2(pretended_user("p1").encode())


def test_a_product_on_a_strange_partition_is_put_on_its_own() -> None:
    here = partition_of(b"p1", 4)
    source = KnownSource(topic=topics.PRODUCTS, partition=(here + 1) % 4, offset=0, at=AT, key=b"p1")
    effects = STOCK.decide_product(Product(product_id="p1"), source, {})
    assert [(o.topic, o.partition) for o in effects.outputs] == [(topics.PRODUCTS, here)]
    with pytest.raises(InvalidEventError):
        STOCK.decide_product(None, source, {})


@given(st.lists(st.integers(-5, 40), min_size=1, max_size=30))
def test_news_alternate_between_running_out_and_coming_back(levels: list[int]) -> None:
    found = [transition(before, after, 10) for before, after in zip([None, *levels], levels, strict=False)]
    told = [rule.name for rule in found if rule is not None and rule is not RULES["low_stock"]]
    assert all(a != b for a, b in itertools.pairwise(told))
