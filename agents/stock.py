"""How many there are of each product in each warehouse, and who hears of it when that changes.

An event seen before, or older than the newest one, changes nothing. One that does not say when it happened, or says that it
will, happened when it was published: published again it looks new, and so its id is remembered. Three transitions are
news: *out of stock* (told to other services and to the warehouse's staff), *low* (its staff) and *back in stock* (whoever
watches the product). Each event leaves a decision record: of the pretended user `stock:<product>`, since it is about nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from struct import Struct
from typing import Self

import orjson

from agents.ports import Effects, Output, Row, Source, State, origin_of
from agents.triggers import INVENTORY_PRODUCER, NO_RULE, RULES, Rule, moment_text
from schemas import topics
from schemas.codec import Codec
from schemas.errors import InvalidEventError
from schemas.ids import digest, notification_id, partition_of
from schemas.messages import Broadcast, DecisionRecord, OutOfStock, Product, StockLevel
from schemas.topics import Lane

LEVELS, PRODUCTS, SEEN = "levels", "products", "seen"
# ids of the newest events of a level: some may be of one moment, and then none is older than the other
_IDS_KEPT = 32
# a clock may be ahead by so much. A time further away would keep out all that really happens until then
_AHEAD = timedelta(minutes=5)
_SEEN = Struct(">q")  # row of `seen`: when, in milliseconds since 1970
_PRUNE_ROWS = 2
_OUT, _LOW, _BACK = RULES["out_of_stock"], RULES["low_stock"], RULES["back_in_stock"]


def product_audience(key: str) -> str:
    """Return the audience of those who watch a product, named by its id or else its sku."""
    return f"product:{key}"


def warehouse_audience(warehouse_id: str) -> str:
    """Return the audience of the staff who watch a warehouse."""
    return f"warehouse:{warehouse_id}"


def pretended_user(key: str) -> str:
    """Return the user id under which the decisions about a product's stock are kept."""
    return f"stock:{key}"


@dataclass(frozen=True, slots=True)
class Level:
    """A row of the table `levels`: how many there are, as of when, and the newest events that said so."""

    quantity: int
    at_ms: int
    event_ids: tuple[str, ...] = ()

    @classmethod
    def of(cls, row: bytes) -> Self:
        """Return the level in a stored row."""
        quantity, at_ms, event_ids = orjson.loads(row)
        return cls(quantity, at_ms, tuple(event_ids))

    def row(self) -> bytes:
        """Return the row as it is stored."""
        return orjson.dumps([self.quantity, self.at_ms, self.event_ids])


@dataclass(frozen=True, slots=True, kw_only=True)
class Stock:
    """The decisions of the role `stock`. `partitions` of its own topics, `user_partitions` of the users'.

    `seen_seconds`: so long an event without a time is remembered.
    """

    codec: Codec
    default_threshold: int
    partitions: int
    user_partitions: int
    seen_seconds: int

    def decide_product(self, product: Product | None, source: Source, state: State) -> Effects:
        """Remember what is to be known of a product; None, a tombstone, forgets it. Raises InvalidEventError."""
        del state
        if not source.key:
            raise InvalidEventError("key", "is missing: it names the product")
        partition = partition_of(source.key, self.partitions)
        if partition != source.partition:
            if product is None:
                # on another partition it removes nothing, neither here nor in the topic
                raise InvalidEventError("partition", f"is {source.partition}, but a tombstone of this key belongs on {partition}")
            return Effects([Output(topics.PRODUCTS, source.key, product, partition)], [], ["rekeyed"])
        return Effects([], [Row(PRODUCTS, source.key, None if product is None else self.codec.encode(product))], ["product"])

    def decide_level(self, event: StockLevel, source: Source, state: State) -> Effects:
        """Decide what an adjustment changes, and who hears of it."""
        key = event.product_id or event.sku or ""
        place = f"{key}\0{event.warehouse_id}".encode()
        row = state[LEVELS].get(place)
        known = None if row is None else Level.of(row)
        is_dated = event.occurred_at != event.accepted_at and event.occurred_at <= event.accepted_at + _AHEAD
        at_ms = round((event.occurred_at if is_dated else event.accepted_at).timestamp() * 1000)
        mark = bytes.fromhex(digest(key, event.warehouse_id, event.event_id, size=16))
        if mark in state[SEEN] or (known is not None and event.event_id in known.event_ids):
            return self._nothing(event, source, key, outcome="duplicate_of", reason=self._identity(event, key, NO_RULE))
        if known is not None and at_ms < known.at_ms:
            return self._nothing(event, source, key, outcome="skipped", reason="superseded")
        before = _before(event, known)
        quantity = event.quantity if event.quantity is not None else _after(before, event.adjustment)
        if quantity is None:
            return self._nothing(event, source, key, outcome="no_rule_matched", reason="the level before is not known")
        ids = (*(known.event_ids if known else ()), event.event_id)[-_IDS_KEPT:]
        rows = [Row(LEVELS, place, Level(quantity, at_ms, ids).row())]
        if not is_dated:
            rows += [Row(SEEN, mark, _SEEN.pack(at_ms)), *self._expired(state, at_ms)]
        product = self._product(state, key)
        threshold = self.default_threshold
        if product is not None and product.low_stock_threshold is not None:
            threshold = product.low_stock_threshold
        rule = transition(before, quantity, threshold)
        if rule is None:
            reason = f"{'unknown' if before is None else before} -> {quantity}, threshold {threshold}"
            effects = self._nothing(event, source, key, outcome="no_rule_matched", reason=reason)
            effects.rows += rows
            return effects
        name = event.product_name or (product.name if product else None)
        audience = product_audience(key) if rule is _BACK else warehouse_audience(event.warehouse_id)
        outputs = list(self._broadcasts(event, source, rule, audience, _data(event, key, name, before, quantity, threshold)))
        if rule is _OUT:
            outputs.append(Output(topics.OUT_OF_STOCK, key.encode(), _out_of_stock(event, key, name, before, quantity)))
        record = self._record(event, source, key, rule=rule, outcome="broadcast", reason=audience)
        outputs.append(Output(topics.DECISIONS, record.user_id.encode(), record))
        return Effects(outputs, rows, [f"decision:{rule.name}"])

    def _expired(self, state: State, now_ms: int) -> Iterator[Row]:
        for mark, value in islice(state[SEEN].items(), _PRUNE_ROWS):
            if now_ms - _SEEN.unpack(value)[0] > self.seen_seconds * 1000:
                yield Row(SEEN, mark, None)

    def _product(self, state: State, key: str) -> Product | None:
        row = state[PRODUCTS].get(key.encode())
        return None if row is None else self.codec.decode(row, Product)

    def _broadcasts(self, event: StockLevel, source: Source, rule: Rule, audience: str, data: dict[str, str]) -> Iterator[Output]:
        """Yield the broadcast for each partition of the users: its owner knows who of them is in the audience."""
        broadcast = Broadcast(
            broadcast_id=digest(event.event_id, rule.name, audience, size=16),
            audience=audience,
            rule=rule.name,
            producer=INVENTORY_PRODUCER,
            event_id=event.event_id,
            data=data,
            occurred_at=event.occurred_at,
            accepted_at=event.accepted_at,
            origin=origin_of(source),
        )
        for partition in range(self.user_partitions):
            yield Output(topics.BROADCAST, broadcast.broadcast_id.encode(), broadcast, partition)

    def _nothing(self, event: StockLevel, source: Source, key: str, *, outcome: str, reason: str) -> Effects:
        record = self._record(event, source, key, rule=None, outcome=outcome, reason=reason)
        return Effects([Output(topics.DECISIONS, record.user_id.encode(), record)], [], [f"decision:{outcome}"])

    def _identity(self, event: StockLevel, key: str, rule: str) -> str:
        return notification_id(producer=INVENTORY_PRODUCER, event_id=event.event_id, rule=rule, user_id=pretended_user(key))

    def _record(  # noqa: PLR0913 - everything that a decision rests on
        self, event: StockLevel, source: Source, key: str, *, rule: Rule | None, outcome: str, reason: str
    ) -> DecisionRecord:
        here = origin_of(source)
        identity = self._identity(event, key, rule.name if rule else NO_RULE)
        return DecisionRecord(
            decision_id=digest(identity, here.topic, str(here.partition), str(here.offset), size=16),
            notification_id=identity,
            user_id=pretended_user(key),
            outcome=outcome,
            reason=reason,
            rule=rule.name if rule else NO_RULE,
            rule_version=rule.version if rule else "",
            category=rule.category if rule else "inventory",
            lane=rule.lane if rule else Lane.BULK,
            type="inventory",
            event_id=event.event_id,
            producer=INVENTORY_PRODUCER,
            origin=event.origin,
            request=here,
            occurred_at=event.occurred_at,
            accepted_at=event.accepted_at,
            decided_at=source.at,
            preference_version=0,
            channels=[],
        )


def transition(before: int | None, after: int, threshold: int) -> Rule | None:
    """Return the rule for a level that went from `before` (None: not known) to `after`; None: that is no news."""
    if before is None:
        return None
    if before > 0 >= after:
        return _OUT
    if before <= 0 < after:
        return _BACK
    if before > threshold >= after:
        return _LOW
    return None


def _before(event: StockLevel, known: Level | None) -> int | None:
    """Return the level before the event: what we knew, else what the event says of it."""
    if known is not None:
        return known.quantity
    if event.previous_quantity is not None:
        return event.previous_quantity
    if event.quantity is not None and event.adjustment is not None:
        return event.quantity - event.adjustment
    return None


def _after(before: int | None, adjustment: int | None) -> int | None:
    return None if before is None or adjustment is None else before + adjustment


def _data(event: StockLevel, key: str, name: str | None, before: int | None, quantity: int, threshold: int) -> dict[str, str]:  # noqa: PLR0913, PLR0917 - what the templates name, once
    return {
        "productId": key,
        "productName": name or "",
        "sku": event.sku or "",
        "warehouseId": event.warehouse_id,
        "quantity": str(max(0, quantity)),
        "previousQuantity": "" if before is None else str(before),
        "threshold": str(threshold),
        "occurredAt": moment_text(event.occurred_at),
    }


def _out_of_stock(event: StockLevel, key: str, name: str | None, before: int | None, quantity: int) -> OutOfStock:
    return OutOfStock(
        event_id=f"evt_{digest(event.event_id, event.warehouse_id, key, size=16)}",
        timestamp=event.occurred_at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        product_id=key,
        product_name=name,
        sku=event.sku,
        warehouse_id=event.warehouse_id or None,
        previous_quantity=before,
        current_quantity=quantity,
        last_sold_order_id=event.order_id,
        metadata={
            "source": "flowmart-notify",
            "triggeredBy": event.event_id,
            **({"correlationId": event.correlation_id} if event.correlation_id else {}),
        },
    )
