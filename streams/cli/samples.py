"""What `schemas/samples` holds, played as its producers would: people, products, payments, adjustments of stock, actions of users.

Each play is news: the ids of events (`eventId`, `paymentId`, `transactionId`, `id` and so on) get the run's suffix, or where they
are UUIDs become other UUIDs, and their times become now. Users, orders and products stay, so that inboxes fill up from run to run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from uuid import UUID, uuid5

from agents import normalise, triggers
from agents.ports import KnownSource
from agents.stock import pretended_user, product_audience, transition, warehouse_audience
from schemas import examples, producing, topics
from schemas.errors import UnroutableError
from schemas.ids import notification_id, partition_of
from schemas.messages import NotificationRequested, UserAction
from streams.cli import console
from streams.cli.kafka import Publisher, partition_count
from streams.cli.keys import ensure_keys
from streams.cli.preferences import Waiting, Wish, parse_wish
from streams.cli.produce import encoder
from streams.cli.watch import ensure_watches
from streams.cli.wire import Wire
from streams.settings import Settings
from streams.topics import physical, specs

ID_FIELDS = frozenset({"eventId", "event_id", "paymentId", "transactionId", "id", "adjustmentId", "actionId"})
TIME_FIELDS = frozenset({"timestamp", "completedAt", "processedAt", "occurredAt"})
NOTIFIED, NO_RULE_MATCHED = "notified", "no_rule_matched"


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """A sample, ready to be published, and what has to become of it.

    `notification`: the id under which its decision is found, with `outcome`; None: nobody is named, so a dead letter.
    """

    number: int
    topic: str  # as agents know it
    key: str
    raw: bytes
    about: str
    notification: str | None
    outcome: str = NOTIFIED


@dataclass(frozen=True, slots=True, kw_only=True)
class People:
    """How many were loaded."""

    users: int
    watches: int
    products: int


def load_people(settings: Settings) -> People:
    """Store the sample products, users' preferences (contacts sealed) and watches, until the router has them. Blocking."""
    products = examples.samples("products")
    users = load_preferences(settings)
    watches = [(str(each["userId"]), str(each["audience"])) for each in examples.samples("watches")]
    publisher = Publisher(settings.cluster)
    with Wire(settings) as wire:
        encode = encoder(settings, next(spec for spec in specs() if spec.name == topics.PRODUCTS), wire)
        for product in products:
            publisher.publish(physical(settings.env, topics.PRODUCTS), *encode(product))
        publisher.require_all()
        ensure_watches(settings, wire, watches, is_wanted=True)
    return People(users=users, watches=len(watches), products=len(products))


def load_preferences(settings: Settings) -> int:
    """Store the sample users' preferences, their contacts sealed; return how many, once the router has them. Blocking."""
    wishes: list[Wish] = [parse_wish(value) for value in examples.samples("preferences")]
    commands, now = physical(settings.env, topics.COMMANDS), datetime.now(UTC)
    with Wire(settings) as wire:
        codec = wire.codec([spec for spec in specs() if spec.name == topics.COMMANDS])
        count = partition_count(settings.cluster, physical(settings.env, topics.PREFERENCES))
        keys = ensure_keys(settings, wire, codec, [wish.user_id for wish in wishes if wish.contact is not None])
        waiting, publisher = Waiting(settings, count), Publisher(settings.cluster)
        for wish in wishes:
            publisher.publish(commands, wish.user_id, codec.encode(wish.command(keys.get(wish.user_id), now)))
        publisher.require_all()
        waiting.until(wire, publisher, {partition_of(wish.user_id.encode(), count): wish.user_id for wish in wishes})
    return len(wishes)


def prepare(settings: Settings, run: str) -> list[Played]:
    """Return the samples, made fresh with `run`, in the order in which they are to be published. Registers schemas; blocking."""
    played: list[Played] = []
    levels: dict[str, int] = {}
    known = {spec.name: spec for spec in specs()}
    with Wire(settings) as wire:
        for stem, topic in (("payments", topics.PAYMENTS), ("inventory", topics.INVENTORY), ("actions", topics.USER_ACTIONS)):
            encode = encoder(settings, known[topic], wire)
            for sample in examples.samples(stem):
                event = fresh(sample, run=run, now=datetime.now(UTC))
                key, raw = encode(event)
                each = Played(number=len(played) + 1, topic=topic, key=key, raw=raw, about=_about(event), notification=None)
                match topic:
                    case topics.PAYMENTS:
                        record = producing.to_record(producing.choose(event), event)
                        each = replace(each, notification=expected(record, raw))
                    case topics.INVENTORY:
                        record = producing.to_record(producing.choose_inventory(event), event)
                        each = expected_of_stock(each, record, levels)
                    case _:
                        each = expected_of_action(each, event)
                played.append(each)
    return played


def publish(settings: Settings, played: Sequence[Played]) -> None:
    """Publish what `prepare` returned; return once Kafka has acknowledged all. Blocking."""
    publisher = Publisher(settings.cluster)
    for each in played:
        publisher.publish(physical(settings.env, each.topic), each.key, each.raw, number=each.number)
    publisher.require_all()


def fresh(event: Mapping[str, object], *, run: str, now: datetime) -> dict[str, object]:
    """Return `event` as one that happens now, with ids that only this `run` has."""
    changed: dict[str, object] = {}
    for name, value in event.items():
        if isinstance(value, Mapping):
            changed[name] = fresh(value, run=run, now=now)
        elif name in ID_FIELDS and isinstance(value, str):
            changed[name] = _another(value, run)
        elif name in TIME_FIELDS:
            changed[name] = console.rfc3339(now)
        else:
            changed[name] = value
    return changed


def expected(record: Mapping[str, object], raw: bytes) -> str | None:
    """Return the id of the notification that a payment becomes; None when it names nobody."""
    nowhere = KnownSource(topic="", partition=0, offset=0, at=datetime.now(UTC))
    try:
        effects = triggers.ingest_payment(record, nowhere, raw)
    except UnroutableError:
        return None
    request = effects.outputs[0].value
    assert isinstance(request, NotificationRequested)
    return _identity(request)


def expected_of_stock(played: Played, record: Mapping[str, object], levels: dict[str, int]) -> Played:
    """Return `played` with what its adjustment of stock must become; `levels` are those after the samples before it."""
    event = normalise.inventory(record, raw=played.raw, at=datetime.now(UTC))
    assert event.quantity is not None
    rule = transition(levels.get(event.key), event.quantity, _threshold(event.key))
    levels[event.key] = event.quantity
    if rule is None:
        user, name, outcome = pretended_user(event.key), triggers.NO_RULE, NO_RULE_MATCHED
    else:
        is_back = rule.name == "back_in_stock"
        audience = product_audience(event.key) if is_back else warehouse_audience(event.warehouse_id)
        user, name, outcome = next(_watching(audience)), rule.name, NOTIFIED
    identity = notification_id(producer=triggers.INVENTORY_PRODUCER, event_id=event.event_id, rule=name, user_id=user)
    return replace(played, notification=identity, outcome=outcome)


def expected_of_action(played: Played, event: Mapping[str, object]) -> Played:
    """Return `played` with what its action of a user must become."""
    now = datetime.now(UTC)
    action = UserAction(action_id=str(event["actionId"]), user_id=str(event["userId"]), action=str(event["action"]), occurred_at=now)
    request = triggers.ingest_action(action, KnownSource(topic="", partition=0, offset=0, at=now), {}).outputs[0].value
    assert isinstance(request, NotificationRequested)
    outcome = NOTIFIED if request.rule != triggers.NO_RULE else NO_RULE_MATCHED
    return replace(played, notification=_identity(request), outcome=outcome)


def _identity(request: NotificationRequested) -> str:
    return notification_id(producer=request.producer, event_id=request.event_id, rule=request.rule, user_id=request.user_id)


def _threshold(product: str) -> int:
    return next(int(each["lowStockThreshold"]) for each in examples.samples("products") if each["productId"] == product)


def _watching(audience: str) -> Iterator[str]:
    return (str(each["userId"]) for each in examples.samples("watches") if each["audience"] == audience)


def _another(identifier: str, run: str) -> str:
    try:
        return str(uuid5(UUID(identifier), run))
    except ValueError:
        return f"{identifier}-{run}"


def _about(event: Mapping[str, object]) -> str:
    data = event.get("data")
    facts = data if isinstance(data, Mapping) and "action" not in event else event
    if "action" in facts:
        return str(facts["action"])
    if product := facts.get("productId") or facts.get("product_id"):
        return f"stock of {product} now {facts.get('newQuantity', facts.get('new_quantity'))}"
    amount = f"{facts['amount']:,} {facts.get('currency', '')}".strip() if isinstance(facts.get("amount"), int | float) else ""
    return " ".join(part for part in ("payment", str(facts.get("status", "")), amount) if part)
