"""Where a dead letter goes when it is put back, and putting it back once, whatever is killed in between.

Each transaction holds the records that go back and, in the topic `redriven`, a mark for each dead letter they came from.
Whoever begins fences everybody before him and then reads the marks: what is marked was put back, what is not was not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import orjson
from confluent_kafka import KafkaError, KafkaException

from schemas import topics
from schemas.errors import UndecodableError, UnknownSchemaError, VersionConflictError
from schemas.ids import partition_of
from schemas.messages import Delivery, Message, NotificationRequested, Origin
from streams.cli import console
from streams.cli.errors import CliError, explain_kafka
from streams.cli.kafka import Reader, partition_counts, quiet
from streams.cli.letters import DeadLetter
from streams.cli.wire import Wire
from streams.settings import Settings
from streams.topics import DEAD_MAX_BYTES, physical, specs
from streams.transport.admin import topic_facts
from streams.transport.records import PLACE_HEADERS
from streams.transport.writer import RECORD_OVERHEAD_BYTES, AbortedError, FencedError, Headers, Writer

# what one transaction holds at most: killed in between, so much is put back again by the next run, and none of it is seen twice
TRANSACTION_RECORDS = 200
TRANSACTION_BYTES = 8_000_000
# how a client that is no longer wanted learns of it; public, for all their underscores
_FENCED = frozenset({KafkaError._FENCED, KafkaError._FATAL, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH})  # noqa: SLF001
# whose other readers would see a record that is published again; ingest reads `parked` alone
NEIGHBOURS = frozenset({topics.PAYMENTS, topics.INVENTORY})
# read by us alone, and a record that comes again changes nothing or is decided anew: published as it was
AGAIN = frozenset(
    {
        topics.USER_ACTIONS,
        topics.COMMANDS,
        topics.BROADCAST,
        topics.STOCK,
        topics.SIGNALS,
        topics.RECEIPTS,
        topics.PROVIDER_REFS,
        topics.DECISIONS,
        topics.STATUS,
    }
)


class Target(NamedTuple):
    """What a dead letter becomes, and where. `topic` as agents know it; `note`: what the operator should know."""

    topic: str
    partition: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    generation: int
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """It was put back before, as `generation`."""

    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """It cannot be put back, and why."""

    reason: str


Plan = Target | Skipped | Refused


class Marks:
    """Which dead letters were put back: the topic `redriven`. A mark is of the dead letter's place, in this very topic `dead`."""

    def __init__(self, settings: Settings) -> None:
        self._topic = physical(settings.env, topics.REDRIVEN)
        dead = physical(settings.env, topics.DEAD)
        self._dead_id = topic_facts(quiet(settings.cluster), [dead, self._topic])[dead].id
        self._cluster = settings.cluster
        self._generations: dict[bytes, int] = {}

    def read(self) -> None:
        """Read every mark that there is now."""
        with Reader(self._cluster, self._topic, [0]) as reader:
            for message in reader.to_end():
                key, value = message.key(), message.value()
                if key is not None:
                    self._generations[key] = 0 if value is None else int(orjson.loads(value)["generation"])

    def generation(self, letter: DeadLetter) -> int | None:
        """Return as which generation a dead letter was put back; None: it was not."""
        return self._generations.get(self._key(letter))

    def record(self, letter: DeadLetter, target: Target, at: datetime) -> tuple[str, bytes, bytes]:
        """Return topic, key and value of the mark of a dead letter that goes to `target`."""
        value = {"generation": target.generation, "at": console.rfc3339(at), "to": f"{target.topic}[{target.partition}]"}
        return self._topic, self._key(letter), orjson.dumps(value)

    def _key(self, letter: DeadLetter) -> bytes:
        return f"{self._dead_id} {letter.id}".encode()


class Planner:
    """Says what becomes of a dead letter. `extend_seconds`: deliveries stay useful for so long from `now` on."""

    def __init__(self, settings: Settings, wire: Wire, *, now: datetime, extend_seconds: int | None) -> None:
        self._now = now
        self._extend_seconds = extend_seconds
        self._wire = wire
        self._encoders: dict[str, Callable[[Message], bytes]] = {}
        counts = partition_counts(settings.cluster)
        self._partitions = {spec.name: counts.get(physical(settings.env, spec.name), 0) for spec in specs()}
        self._max_bytes = {spec.name: spec.max_message_bytes for spec in specs()}

    def plan(self, letter: DeadLetter, marks: Marks) -> Plan:
        """Return where `letter` goes, or why not. Raises RegistryUnavailableError."""
        done = marks.generation(letter)
        if done is not None:
            return Skipped(generation=done)
        origin = _origin(letter)
        if origin is None:
            return Refused(reason="its headers do not say where and when it was read")
        if letter.headers.get("error") == _VERSION_CONFLICT:
            return Refused(reason="its writer was told, and it would conflict again")
        generation = letter.generation + 1
        if origin.topic in NEIGHBOURS:
            return self._parked(letter, origin, generation)
        if origin.topic in AGAIN:
            # a broadcast is a record for each partition of the users: its owner alone knows who of them is in the audience
            return self._target(origin.topic, letter, generation, partition=origin.partition, by_key=origin.topic != topics.BROADCAST)
        kind, _, _ = origin.topic.partition(".")
        try:
            if kind == "requests":
                return self._request(letter, origin, generation)
            if kind in {"deliver", "retry"}:
                return self._delivery(letter, generation)
        except (UndecodableError, UnknownSchemaError) as error:
            return Refused(reason=f"it still cannot be decoded: {error}")
        return Refused(reason=_REASONS.get(origin.topic, "nothing of ours reads this topic record by record"))

    def _parked(self, letter: DeadLetter, origin: Origin, generation: int) -> Plan:
        return self._target(topics.PARKED, letter, generation, partition=origin.partition, by_key=False)

    def _request(self, letter: DeadLetter, origin: Origin, generation: int) -> Plan:
        """Return a request as old as it was, so that old news does not become news, that tells where it was read first."""
        request = self._wire.decode(letter.value, NotificationRequested)
        read_at = datetime.fromtimestamp(int(letter.headers["timestamp"]) / 1000, UTC)
        request = replace(request, accepted_at=request.accepted_at or read_at, origin=request.origin or origin)
        again = replace(letter, key=request.user_id.encode(), value=self._encode(origin.topic, request))
        return self._target(origin.topic, again, generation, partition=origin.partition)

    def _delivery(self, letter: DeadLetter, generation: int) -> Plan:
        """Return a delivery that begins its next generation at the first attempt, wherever it was in the last one."""
        delivery = self._wire.decode(letter.value, Delivery)
        topic = topics.deliver(delivery.channel, delivery.lane)
        if topic not in self._partitions:
            return Refused(reason=f"there is no channel {delivery.channel[:50]!r} in a lane {delivery.lane[:50]!r}")
        generation = max(generation, delivery.generation + 1)
        expires_at, note = self._expiry(delivery.expires_at)
        again = replace(delivery, generation=generation, attempt=1, not_before=None, expires_at=expires_at)
        whole = replace(letter, key=delivery.user_id.encode(), value=self._encode(topic, again))
        return self._target(topic, whole, generation, partition=0, note=note)

    def _expiry(self, expires_at: datetime | None) -> tuple[datetime | None, str | None]:
        if expires_at is None:
            return None, None
        if self._extend_seconds is not None:
            until = max(expires_at, self._now + timedelta(seconds=self._extend_seconds))
            return until, None if until == expires_at else f"useful until {console.show_time(until)} now"
        if expires_at <= self._now:
            return expires_at, f"past its time since {console.show_time(expires_at)}: it will end as expired, unless --extend"
        return expires_at, None

    def _target(  # noqa: PLR0913 - what a record is made of
        self,
        topic: str,
        letter: DeadLetter,
        generation: int,
        *,
        partition: int,
        by_key: bool = True,
        note: str | None = None,
    ) -> Plan:
        count = self._partitions[topic]
        if not count:
            return Refused(reason=f"there is no topic {topic}: run `notify topics ensure`")
        # what has no key stays where it was: its reader puts it on its user's partition, as it does with others' records
        place = partition_of(letter.key, count) if by_key and letter.key else partition % count
        # a reader is told where and when the record was read first: it is no newer than that
        first = [(name, letter.headers[name].encode()) for name in PLACE_HEADERS]
        headers = [*first, ("generation", str(generation).encode())]
        size_bytes = len(letter.key or b"") + len(letter.value or b"") + sum(len(name) + len(value) for name, value in headers)
        if size_bytes + RECORD_OVERHEAD_BYTES > self._max_bytes[topic]:
            return Refused(reason=f"with its headers it is larger than {topic} takes")
        return Target(topic, place, letter.key, letter.value, headers, generation, note)

    def _encode(self, topic: str, message: Message) -> bytes:
        if topic not in self._encoders:
            self._encoders[topic] = self._wire.codec([spec for spec in specs() if spec.name == topic]).encode
        return self._encoders[topic](message)


class Redriver:
    """Puts dead letters back. Making one takes over from every other `notify dlq redrive` of the environment."""

    def __init__(self, settings: Settings, marks: Marks) -> None:
        self._env = settings.env
        self._marks = marks
        self._writer = Writer(quiet(settings.cluster), transactional_id=f"notify.{settings.env}.redrive", max_message_bytes=DEAD_MAX_BYTES)
        try:
            self._writer.acquire()
        except FencedError as error:
            raise self._explained(error) from error
        # only now: what the one before could still commit is committed
        marks.read()

    def publish(self, batch: Sequence[tuple[DeadLetter, Target]]) -> None:
        """Put a batch back. Raises CliError, and then nothing of the batch was put back."""
        if not batch:
            return
        try:
            self._transact(batch)
        except AbortedError as error:
            raise CliError(f"Kafka aborted a transaction ({error}), and nothing of it was put back.", _RUN_AGAIN) from error
        except FencedError as error:
            raise self._explained(error) from error

    def _transact(self, batch: Sequence[tuple[DeadLetter, Target]]) -> None:
        now = datetime.now(UTC)
        self._writer.begin()
        for letter, target in batch:
            topic = physical(self._env, target.topic)
            self._writer.produce(topic, target.value, target.key, target.partition, target.headers)
            marked, key, value = self._marks.record(letter, target, now)
            self._writer.produce(marked, value, key, 0)
        self._writer.commit()

    def _explained(self, error: FencedError) -> CliError:
        cause = error.__cause__
        if isinstance(cause, KafkaException) and cause.args[0].code() not in _FENCED:
            return CliError(explain_kafka(cause), _RUN_AGAIN)
        return CliError(
            f"Another `notify dlq redrive` of the environment {self._env} began after this one, or Kafka gave this one up: it stops.",
            _RUN_AGAIN,
        )


_NUMBER = re.compile(r"[0-9]{1,18}")
_LATEST_MS = 253_402_300_799_999  # the end of the year 9999, which is Python's last
_RUN_AGAIN = "What was put back is remembered: run the command again for the rest, and nothing is put back twice."
_VERSION_CONFLICT = VersionConflictError().reason
_REASONS: Mapping[str, str] = {
    topics.PRODUCTS: "a later record of the product may be in force: publish the product again",
    topics.PARKED: "it was parked without the headers that say where it came from",
}


def _origin(letter: DeadLetter) -> Origin | None:
    """Return where a dead letter was read; None when its headers do not say."""
    topic, *numbers = (letter.headers.get(name, "") for name in PLACE_HEADERS)
    # anybody may write to some topics, and so such headers: in a sound one no number has more digits, and no year is later
    if not topic or not all(_NUMBER.fullmatch(number) for number in numbers) or int(numbers[2]) > _LATEST_MS:
        return None
    return Origin(topic=topic, partition=int(numbers[0]), offset=int(numbers[1]))
