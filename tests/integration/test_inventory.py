"""Adjustments of stock, down to those who hear of them: staff, users who watch a product, and other services."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from agents.stock import pretended_user
from schemas.ids import notification_id
from schemas.messages import DecisionRecord, StockLevel
from streams.cli.wire import Wire
from streams.embedded.stack import Stack
from tests.harness import System, system, wait_for

ROLES = ("ingest", "stock", "router", "sender-critical", "sender-normal", "sender-bulk", "views")
CONTRACTS = Path(__file__).parents[2] / "schemas" / "contracts"
EXAMPLE = json.loads((CONTRACTS / "InventoryAdjusted.example.json").read_text())
OUT_EXAMPLE = json.loads((CONTRACTS / "OutOfStock.example.json").read_text())
STAFF, SHOPPER = "staff-1", "shopper-1"
WAREHOUSE = "wh_east_01"


@pytest.fixture(scope="module")
def running(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with system(stack, tmp_path_factory.mktemp("inventory")) as made:
        for role in ROLES:
            made.start(role)
        made.await_ready(seconds=150)
        made.load_preferences([{"userId": user, "name": user, "email": f"{user}@example.com"} for user in (STAFF, SHOPPER)])
        assert made.notify("watch", STAFF, "--warehouse", WAREHOUSE).returncode == 0
        yield made


def an_adjustment(event_id: str, product: str, before: int | None, after: int, **changes: object) -> dict[str, object]:
    event = {
        **EXAMPLE,
        "eventId": event_id,
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "productId": product,
        "sku": f"sku-{product}",
        "warehouseId": WAREHOUSE,
        "previousQuantity": before,
        "adjustedQuantity": None if before is None else after - before,
        "newQuantity": after,
        **changes,
    }
    return {name: value for name, value in event.items() if value is not None}


def told(event_id: str, rule: str, user: str) -> str:
    return notification_id(producer="inventory", event_id=event_id, rule=rule, user_id=user)


def adjust(made: System, *events: dict[str, object]) -> None:
    made.produce("inventory", made.frame_adjustments(events))


def decisions(made: System, product: str) -> list[DecisionRecord]:
    user = pretended_user(product)
    return [made.decode(message, DecisionRecord) for message in made.read("decisions") if message.key() == user.encode()]


def await_decisions(made: System, product: str, count: int) -> list[str]:
    wait_for(lambda: len(decisions(made, product)) == count, seconds=40, what=f"{count} decisions about {product}")
    return [record.outcome for record in decisions(made, product)]


def run_out(made: System, product: str) -> list[bytes]:
    return [message.value() or b"" for message in made.read("out-of-stock") if message.key() == product.encode()]


def test_the_contracts_example_is_understood_and_matches_no_rule(running: System) -> None:
    adjust(running, EXAMPLE)
    assert await_decisions(running, "prod_1129", 1) == ["no_rule_matched"]
    (level,) = [running.decode(m, StockLevel) for m in running.read("stock") if m.key() == b"prod_1129"]
    assert (level.event_id, level.warehouse_id, level.quantity, level.previous_quantity) == (EXAMPLE["eventId"], WAREHOUSE, 242, 42)
    shown = running.notify("why", pretended_user("prod_1129"), EXAMPLE["eventId"])
    assert shown.returncode == 0, shown.stderr
    assert "no_rule_matched: 42 -> 242" in shown.stdout


def test_18_to_0_then_0_to_200_then_the_first_again_is_one_out_of_stock(running: System) -> None:
    product = "prod-out"
    first, back = an_adjustment("out-1", product, 18, 0, orderId="ord_86701"), an_adjustment("out-2", product, 0, 200)
    adjust(running, first, back, first)
    assert await_decisions(running, product, 3) == ["broadcast", "broadcast", "duplicate_of"]
    (raw,) = run_out(running, product)

    event = as_others_read_it(running, raw)
    assert event.keys() == OUT_EXAMPLE.keys()
    assert {name: event[name] for name in ("eventType", "productId", "sku", "warehouseId", "previousQuantity", "currentQuantity")} == {
        "eventType": "OutOfStock",
        "productId": product,
        "sku": f"sku-{product}",
        "warehouseId": WAREHOUSE,
        "previousQuantity": 18,
        "currentQuantity": 0,
    }
    assert (event["lastSoldOrderId"], event["metadata"]["triggeredBy"]) == ("ord_86701", "out-1")
    assert datetime.fromisoformat(event["timestamp"]) == datetime.fromisoformat(str(first["timestamp"]))

    found = told("out-1", "out_of_stock", STAFF)
    wait_for(lambda: running.mails()[f"{found}-email"] == 1, seconds=40, what="the staff's mail")
    explained = running.web(f"/notifications/{found}/trail")[1]
    assert (explained["decision"]["lane"], explained["decision"]["outcome"]) == ("critical", "notified")


def test_a_product_without_an_id_goes_by_its_sku(running: System) -> None:
    adjust(running, an_adjustment("sku-1", "", 1, 0, productId=None, sku="WBH-1"))
    assert await_decisions(running, "WBH-1", 1) == ["broadcast"]
    (raw,) = run_out(running, "WBH-1")
    assert as_others_read_it(running, raw)["productId"] == "WBH-1"


def test_stock_at_or_below_the_products_threshold_is_low_and_the_staff_hear_it_once(running: System) -> None:
    product = "prod-low"
    line = json.dumps({"productId": product, "name": "Lamp", "lowStockThreshold": 20})
    assert running.notify("produce", "products", "-", stdin=line).returncode == 0
    wait_for(lambda: running.table("stock.level", "products").get(product.encode()), seconds=20, what="the product known")
    levels = (31, 21, 20, 19)
    adjust(running, *(an_adjustment(f"low-{after}", product, before, after) for before, after in zip((40, *levels), levels, strict=False)))
    assert await_decisions(running, product, 4) == ["no_rule_matched", "no_rule_matched", "broadcast", "no_rule_matched"]
    found = told("low-20", "low_stock", STAFF)
    wait_for(lambda: running.mails()[f"{found}-email"] == 1, seconds=40, what="the staff's mail")
    assert running.web(f"/notifications/{found}/trail")[1]["decision"]["lane"] == "normal"


def test_who_watches_a_product_hears_that_it_is_back_and_who_stopped_does_not(running: System) -> None:
    product, former = "prod-back", "shopper-2"
    for user in (SHOPPER, former):
        assert running.notify("watch", user, product).returncode == 0
    assert running.notify("watch", former, product, "--remove").returncode == 0
    adjust(running, an_adjustment("back-1", product, 0, 200))
    found = told("back-1", "back_in_stock", SHOPPER)
    wait_for(lambda: running.mails()[f"{found}-email"] == 1, seconds=40, what="the watcher's mail")
    page = wait_for(
        lambda: (seen := running.web(f"/notifications/{found}", user=SHOPPER))[0] == 200 and seen[1], seconds=20, what="the page"
    )
    assert page["title"] == "Back in stock"
    assert running.web(f"/notifications/{told('back-1', 'back_in_stock', former)}")[0] == 404


def test_all_shapes_of_an_adjustment_say_the_same(running: System) -> None:
    facts = {"productId": "prod-shape", "warehouseId": WAREHOUSE, "adjustmentType": "decrease", "adjustedQuantity": 5, "newQuantity": 0}
    old = {"product_id": "prod-shape", "warehouse_id": WAREHOUSE, "adjusted_quantity": 200, "new_quantity": 200}
    now = datetime.now(UTC).isoformat()
    adjust(
        running,
        {"eventId": "shape-1", "timestamp": now, "type": "InventoryAdjusted", "source": "shop", "data": facts, "metadata": {}},
        {"event_id": "shape-2", "timestamp": now, "adjustment_reason": "delivery", "adjusted_by": "usr_1", **old},
        {"eventId": "shape-3", "timestamp": now, **facts, "adjustedQuantity": -200},
    )
    assert await_decisions(running, "prod-shape", 3) == ["broadcast"] * 3
    assert len(run_out(running, "prod-shape")) == 2


def as_others_read_it(made: System, raw: bytes) -> Mapping[str, Any]:
    """Return the event as a service reads it that knows nothing of ours but the registry."""
    with Wire(made.settings) as wire:
        return wire.decode_any(raw)
