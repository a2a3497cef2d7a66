"""The sample users and payments of `schemas/samples`, played as their producers would: sealed preferences, Avro payments.

Each play is news: the ids of payments (`eventId`, `paymentId`, `transactionId`, `id`) get the run's suffix, or where they are
UUIDs become other UUIDs, and their times become now. Users and orders stay, so that inboxes fill up from run to run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID, uuid5

from agents import triggers
from agents.ports import KnownSource
from schemas import examples, producing, topics
from schemas.codec import frame
from schemas.errors import UnroutableError
from schemas.ids import notification_id, partition_of
from schemas.messages import NotificationRequested
from streams.cli import console
from streams.cli.kafka import Publisher, partition_count
from streams.cli.keys import ensure_keys
from streams.cli.preferences import Waiting, Wish, parse_wish
from streams.cli.produce import payment_key
from streams.cli.wire import Wire
from streams.settings import Settings
from streams.topics import physical, specs

PREFERENCES_FILE = examples.SAMPLES_FOLDER / "preferences.ndjson"
PAYMENTS_FILE = examples.SAMPLES_FOLDER / "payments.ndjson"
ID_FIELDS = frozenset({"eventId", "paymentId", "transactionId", "id"})
TIME_FIELDS = frozenset({"timestamp", "completedAt", "processedAt"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """A sample that was published. `notification`: the id that it must become; None: nobody is named, so a dead letter."""

    number: int
    raw: bytes
    about: str
    notification: str | None


def load_preferences(settings: Settings) -> int:
    """Store the sample users' preferences, their contacts sealed; return how many, once the router has them. Blocking."""
    wishes: list[Wish] = [parse_wish(value) for value in examples.samples("preferences")]
    commands, now = physical(settings.env, topics.COMMANDS), datetime.now(UTC)
    with Wire(settings) as wire:
        codec = wire.codec([spec for spec in specs() if spec.name == topics.COMMANDS])
        count = partition_count(settings.kafka, physical(settings.env, topics.PREFERENCES))
        keys = ensure_keys(settings, wire, codec, [wish.user_id for wish in wishes if wish.contact is not None])
        waiting, publisher = Waiting(settings, count), Publisher(settings.kafka)
        for wish in wishes:
            publisher.publish(commands, wish.user_id, codec.encode(wish.command(keys.get(wish.user_id), now)))
        publisher.require_all()
        waiting.until(wire, publisher, {partition_of(wish.user_id.encode(), count): wish.user_id for wish in wishes})
    return len(wishes)


def play_payments(settings: Settings, run: str) -> list[Played]:
    """Publish the sample payments, made fresh with `run`; return them once Kafka has acknowledged all. Blocking."""
    topic = physical(settings.env, topics.PAYMENTS)
    played: list[Played] = []
    publisher = Publisher(settings.kafka)
    samples = examples.samples("payments")
    with Wire(settings) as wire:
        ids = {shape: wire.register(shape.subject(topic), shape.text) for shape in {producing.choose(sample) for sample in samples}}
        for number, sample in enumerate(samples, 1):
            payment = fresh(sample, run=run, now=datetime.now(UTC))
            shape = producing.choose(payment)
            record = producing.to_record(shape, payment)
            raw = frame(ids[shape], producing.parsed(shape), record)
            publisher.publish(topic, payment_key(payment), raw, number=number)
            played.append(Played(number=number, raw=raw, about=_about(payment), notification=expected(record, raw)))
        publisher.require_all()
    return played


def fresh(payment: Mapping[str, object], *, run: str, now: datetime) -> dict[str, object]:
    """Return `payment` as one that happens now, with ids that only this `run` has."""
    changed: dict[str, object] = {}
    for name, value in payment.items():
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
    return notification_id(producer=request.producer, event_id=request.event_id, rule=request.rule, user_id=request.user_id)


def _another(identifier: str, run: str) -> str:
    try:
        return str(uuid5(UUID(identifier), run))
    except ValueError:
        return f"{identifier}-{run}"


def _about(payment: Mapping[str, object]) -> str:
    data = payment.get("data")
    facts = data if isinstance(data, Mapping) else payment
    amount = f"{facts['amount']:,} {facts.get('currency', '')}".strip() if isinstance(facts.get("amount"), int | float) else ""
    return " ".join(part for part in ("payment", str(facts.get("status", "")), amount) if part)
