"""What each role does with the records of its topics: decoded, decided by a pure function of `agents`, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from secrets import token_bytes
from typing import Any, NamedTuple

from agents import signals, triggers
from agents.control import Control
from agents.delay import Delay
from agents.ports import Effects, KnownSource, Source, State
from agents.receipts import Matcher, Reported
from schemas import topics
from schemas.codec import Codec
from schemas.errors import (
    ProviderUnavailableError,
    RegistryUnavailableError,
    UndecodableError,
    UnknownSchemaError,
)
from schemas.ids import partition_of
from schemas.messages import (
    Broadcast,
    Command,
    DecisionRecord,
    Delivery,
    DeliveryReport,
    EngagementSignal,
    Message,
    NotificationRequested,
    Product,
    ProviderReference,
    StatusChange,
    StockLevel,
    UserAction,
)
from schemas.sealed import KEY_BYTES, sealed_request
from schemas.topics import Lane as LaneName
from streams.followers import KeyFollower
from streams.registry import Registry
from streams.roles import Role
from streams.settings import Settings
from streams.shard import Input
from streams.topology import Step
from streams.transport.records import Record


class Foreign(NamedTuple):
    """A record of a neighbour, decoded with its writer's schema."""

    record: Mapping[str, object]
    raw: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The inputs of every role. `control`: the standing orders; `keys`: the users' keys; each only where the role follows them."""

    settings: Settings
    codec: Codec
    registry: Registry
    control: Callable[[], Control]
    keys: KeyFollower | None

    def of(self, step: Step) -> Mapping[str, Input]:
        """Return what the role of `step` does with each of its topics."""
        match step.role:
            case Role.INGEST:
                return self._ingest(step)
            case Role.ROUTER:
                from agents.router import Router  # here, as below: what one role needs costs all others at their start
                from templates.render import Templates

                router = Router(
                    templates=Templates(),
                    codec=self.codec,
                    seal_key=self.settings.seal_key,
                    new_key=partial(token_bytes, KEY_BYTES),
                    partitions=self.settings.partitions,
                    dedupe_seconds=self.settings.dedupe_seconds,
                    control=self.control(),
                    sms_countries=self.settings.sms_countries,
                )
                requests = {topics.requests(lane): self.own(NotificationRequested, router.decide_request) for lane in LaneName}
                return {
                    topics.COMMANDS: self.own(Command, router.decide_command),
                    # a record of it is milliseconds' work
                    topics.BROADCAST: replace(self.own(Broadcast, router.decide_broadcast), clock_every=1),
                    **requests,
                }
            case Role.STOCK:
                from agents.stock import Stock

                stock = Stock(
                    codec=self.codec,
                    default_threshold=self.settings.low_stock_threshold,
                    partitions=self.settings.inventory_partitions,
                    user_partitions=self.settings.partitions,
                    seen_seconds=self.settings.dedupe_seconds,
                )
                products = self.own(Product, stock.decide_product)
                return {
                    topics.PRODUCTS: replace(products, decode=_or_tombstone(products.decode)),
                    topics.STOCK: self.own(StockLevel, stock.decide_level),
                }
            case Role.SENDER_CRITICAL | Role.SENDER_NORMAL | Role.SENDER_BULK:
                assert step.role.lane is not None
                settled = topics.settled(step.role.lane)
                return {topic: self.own(StatusChange if topic == settled else Delivery, nothing) for topic in step.reads}
            case Role.DELAY:
                delay = Delay(self.settings.retry_tiers_seconds, now=partial(datetime.now, UTC))
                held = self.own(Delivery, delay.decide)
                return {topic: replace(held, due=_due_after(delay.seconds(topic))) for topic in step.reads}
            case Role.SIGNALS:
                return self._signals(step)
            case Role.VIEWS:
                from agents import inbox

                return {
                    topics.DECISIONS: self.own(DecisionRecord, inbox.decide_decision),
                    topics.STATUS: self.own(StatusChange, inbox.decide_status),
                }
            case Role.STORE:
                return {topics.DECISIONS: self.own(DecisionRecord, nothing), topics.STATUS: self.own(StatusChange, nothing)}

    def _signals(self, step: Step) -> dict[str, Input]:
        match step.name:
            case "match":
                matcher = Matcher(self.settings.partitions, self.settings.reference_seconds)
                reports = self.own(DeliveryReport, matcher.decide_report)
                return {
                    topics.PROVIDER_REFS: self.own(ProviderReference, matcher.decide_reference),
                    topics.RECEIPTS: replace(reports, decode=_with_raw(reports.decode)),
                }
            case "forward":
                return {topics.STATUS: self._forwarding()}
            case _:
                return {topics.SIGNALS: self.own(EngagementSignal, signals.decide)}

    def _forwarding(self) -> Input:
        """Return what is done with status changes where there are subscribers.

        The users' keys are looked up before a batch is decided, which may not wait: who has none then was erased.
        """
        from agents.forward import Forwarder

        keys = self.keys
        assert keys is not None
        keyless: dict[int, set[str]] = {}  # by partition, of the batch that is decided next

        def key_of(user_id: str) -> bytes | None:
            key = keys.known_key(user_id)
            if key is None and user_id not in keyless.get(partition_of(user_id.encode(), self.settings.partitions), ()):
                raise ProviderUnavailableError("the user's key is not known yet", code="key")
            return key

        async def learn(records: Iterable[Record]) -> None:
            batch = list(records)
            await self.learn(batch)
            missing: set[str] = set()
            keyless.update((record.partition(), missing) for record in batch[:1])
            for user in {key.decode(errors="replace") for record in batch if (key := record.key())}:
                try:
                    found = await keys.key_of(user)
                except TimeoutError:
                    return  # the batch waits, and asks again
                if found is None:
                    missing.add(user)

        forwarder = Forwarder(subscriptions=self.settings.webhooks, key_of=key_of, control=self.control(), now=partial(datetime.now, UTC))
        return replace(self.own(StatusChange, forwarder.decide), learn=learn)

    def _ingest(self, step: Step) -> dict[str, Input]:
        def decode(message: Record) -> Foreign:
            raw = message.value()
            try:
                return Foreign(self.codec.decode_foreign(raw), raw or b"")
            except UnknownSchemaError as error:
                # `learn` asked a moment ago: what is still not known could not be asked for, unless the registry said no
                self.registry.explain(error.schema_id)
                raise

        keys = self.keys
        assert keys is not None

        def event(found: Foreign, source: Source, _state: State) -> Effects:
            return _sealed(triggers.ingest(source.topic, found.record, source, found.raw), keys)

        def unparked(found: Foreign, source: Source, _state: State) -> Effects:
            original = _original(source)
            return _sealed(triggers.ingest(original.topic, found.record, original, found.raw), keys)

        def action(found: UserAction, source: Source, state: State) -> Effects:
            return _sealed(triggers.ingest_action(found, _first(source), state), keys)

        match step.name:
            case "actions":
                return {topics.USER_ACTIONS: self.own(UserAction, action)}
            case "parked":
                return {topics.PARKED: Input(decode=decode, decide=unparked, learn=self.learn)}
            case _:
                return {topic: Input(decode=decode, decide=event, learn=self.learn, parked_in=topics.PARKED) for topic in step.reads}

    async def learn(self, messages: Iterable[Record]) -> None:
        """Ask the registry for the schemas of `messages` that are not known yet."""
        unknown: set[int] = set()
        for message in messages:
            raw = message.value()
            if raw is not None and len(raw) >= 5 and raw[0] == 0:
                schema_id = int.from_bytes(raw[1:5], "big")
                if schema_id not in self.registry.schemas:
                    unknown.add(schema_id)
        for schema_id in unknown:
            try:
                await self.registry.learn(schema_id)
            except (UnknownSchemaError, UndecodableError):
                continue  # decoding says so, record by record
            except RegistryUnavailableError:
                return

    def own(self, kind: type[Any], decide: Callable[[Any, Source, State], Effects]) -> Input:
        """Return the input of a topic of our own, whose records are of one kind."""

        def decode(message: Record) -> Any:
            try:
                return self.codec.decode(message.value(), kind)
            except UnknownSchemaError as error:
                self.registry.explain(error.schema_id)
                raise

        return Input(decode=decode, decide=decide, learn=self.learn)


def _sealed(effects: Effects, keys: KeyFollower) -> Effects:
    """Seal what requests say of users who have a key; the router makes the others', with their first notification."""
    for number, output in enumerate(effects.outputs):
        if isinstance(output.value, NotificationRequested) and (key := keys.known_key(output.value.user_id)) is not None:
            effects.outputs[number] = output._replace(value=sealed_request(key, output.value))
    return effects


def nothing(_message: Message, _source: Source, _state: State) -> Effects:
    """Decide for a shard that calls providers or a database: it never asks."""
    raise AssertionError("a shard that calls providers or a database decides nothing")


def _due_after(seconds: int) -> Callable[[Record], float]:
    """Return when a record is due that waits so long from its timestamp, in seconds since 1970."""
    return lambda message: message.timestamp()[1] / 1000 + seconds


def _with_raw(decode: Callable[[Record], DeliveryReport]) -> Callable[[Record], Reported]:
    """Return `decode` with the record's bytes beside what they say."""
    return lambda message: Reported(decode(message), message.value() or b"")


def _or_tombstone(decode: Callable[[Record], Any]) -> Callable[[Record], Any]:
    """Return `decode` for a compacted topic of others, whose records may be tombstones: they become None."""
    return lambda message: None if message.value() is None else decode(message)


def _first(source: Source) -> Source:
    """Return where a record was read first when it was redriven, else where it is read: old news stays old."""
    if dict(source.headers).get("topic") != source.topic.encode():
        return source
    try:
        return _original(source)
    except UndecodableError:
        return source


def _original(source: Source) -> KnownSource:
    """Return where a parked record was read first."""
    headers = dict(source.headers)
    try:
        return KnownSource(
            topic=headers["topic"].decode(),
            partition=int(headers["partition"]),
            offset=int(headers["offset"]),
            at=datetime.fromtimestamp(int(headers["timestamp"]) / 1000, UTC),
            key=source.key,
            headers=source.headers,
        )
    except (KeyError, ValueError, OverflowError) as error:
        raise UndecodableError("a parked record without the headers that say where it came from") from error
