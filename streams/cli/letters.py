"""The dead letters as commands see them: what one is, which ones options mean, and reading them from `dead`."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Annotated, cast

import typer
from confluent_kafka import Message

from schemas import topics
from streams.cli import console
from streams.cli.errors import CliError
from streams.cli.kafka import Reader, partition_count
from streams.cli.spans import moment_of
from streams.settings import Settings
from streams.topics import physical, specs

Place = tuple[int, int]  # partition and offset in `dead`

ErrorOption = Annotated[str | None, typer.Option(help="Only this reason, such as undecodable or unroutable.")]
RoleOption = Annotated[str | None, typer.Option(help="Only what this role set aside, such as ingest.")]
TopicOption = Annotated[str | None, typer.Option(help="Only what was read from this topic, such as payments or requests.normal.")]
ProviderOption = Annotated[str | None, typer.Option(help="Only deliveries that ended at this provider, as the configuration names it.")]
SinceOption = Annotated[str | None, typer.Option(metavar="TIME", help="Only what was set aside since: 90s, 15m, 12h, 7d ago, or a time.")]
UntilOption = Annotated[str | None, typer.Option(metavar="TIME", help="Only what was set aside until then, as --since.")]
IdOption = Annotated[
    list[str] | None, typer.Option("--id", metavar="PARTITION:OFFSET", help="Only this one, as `notify dlq list` shows it; repeatable.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A message set aside. `headers` say why and from where; `at` is when it was set aside."""

    partition: int
    offset: int
    at: datetime
    key: bytes | None
    value: bytes | None
    headers: Mapping[str, str]

    @classmethod
    def of(cls, message: Message) -> DeadLetter:
        """Return the dead letter that `message` of the topic `dead` is."""
        headers = cast("list[tuple[str, bytes | None]]", message.headers() or [])
        return cls(
            partition=cast("int", message.partition()),
            offset=cast("int", message.offset()),
            at=datetime.fromtimestamp(message.timestamp()[1] / 1000, UTC),
            key=message.key(),
            value=message.value(),
            headers={name: (value or b"").decode(errors="replace") for name, value in headers},
        )

    @property
    def id(self) -> str:
        """What `notify dlq show` takes."""
        return f"{self.partition}:{self.offset}"

    @property
    def place(self) -> Place:
        """Where it is in `dead`."""
        return self.partition, self.offset

    @property
    def origin(self) -> str:
        """Where it was read."""
        return f"{self.headers.get('topic', '?')}[{self.headers.get('partition', '?')}]@{self.headers.get('offset', '?')}"

    @property
    def generation(self) -> int:
        """How often it was put back before: 0 for what died at the first reading."""
        text = self.headers.get("generation", "0")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 7 else 0  # else nobody of ours wrote it

    def to_json(self) -> dict[str, object]:
        """Return what `--json` prints: the headers, not the bytes."""
        return {"id": self.id, "at": console.rfc3339(self.at), "bytes": len(self.value or b""), "headers": dict(self.headers)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which dead letters are meant. None, and no places: no matter. `topic` as agents know it; `since` and `until`: set aside then."""

    role: str | None = None
    error: str | None = None
    topic: str | None = None
    provider: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    places: frozenset[Place] = frozenset()

    @property
    def is_given(self) -> bool:
        """Say whether it leaves anything out."""
        return self != Filter()

    def admits(self, letter: DeadLetter) -> bool:
        """Say whether a dead letter is meant."""
        wanted = (("role", self.role), ("error", self.error), ("topic", self.topic), ("provider", self.provider))
        return (
            all(value is None or letter.headers.get(name) == value for name, value in wanted)
            and (self.since is None or letter.at >= self.since)
            and (self.until is None or letter.at <= self.until)
            and (not self.places or letter.place in self.places)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """A part of `dead`: from which to before which offset of each partition."""

    topic: str
    starts: Mapping[int, int]
    ends: Mapping[int, int]

    @property
    def records(self) -> int:
        """How many there are at most."""
        return sum(end - self.starts[number] for number, end in self.ends.items())


def stretch(settings: Settings, wanted: Filter) -> Stretch:
    """Return the part of `dead`, to its end now, in which whatever `wanted` admits is."""
    topic = physical(settings.env, topics.DEAD)
    count = partition_count(settings.cluster, topic)
    partitions = sorted({number for number, _ in wanted.places if number < count}) if wanted.places else list(range(count))
    if not partitions:
        return Stretch(topic=topic, starts={}, ends={})
    with Reader(settings.cluster, topic, partitions) as probe:
        sizes = probe.sizes()
        starts = {number: low for number, (low, _) in sizes.items()}
        ends = {number: high for number, (_, high) in sizes.items()}
        if wanted.since is not None:
            starts = probe.offsets_at(int(wanted.since.timestamp() * 1000))
    for number in partitions if wanted.places else ():
        offsets = [offset for partition, offset in wanted.places if partition == number]
        starts[number] = min(max(starts[number], min(offsets)), ends[number])
        ends[number] = max(starts[number], min(ends[number], max(offsets) + 1))
    return Stretch(topic=topic, starts=starts, ends=ends)


def read(settings: Settings, part: Stretch, wanted: Filter, *, title: str) -> Iterator[DeadLetter]:
    """Yield the dead letters of a part of `dead` that `wanted` admits, each partition in its order, with a bar called `title`."""
    left = {number for number, end in part.ends.items() if part.starts[number] < end}
    if not left:
        return
    with (
        Reader(settings.cluster, part.topic, {number: part.starts[number] for number in left}) as reader,
        console.progress(title, part.records) as advance,
    ):
        for message in reader.to_end(advance):
            number, offset = cast("int", message.partition()), cast("int", message.offset())
            if offset < part.ends[number] and wanted.admits(letter := DeadLetter.of(message)):
                yield letter
            if offset >= part.ends[number] - 1:
                left.discard(number)
                if not left:
                    return


def find(settings: Settings, wanted: Filter, *, limit: int) -> tuple[list[DeadLetter], int]:
    """Return the newest `limit` dead letters that `wanted` admits, newest first, and how many it admits."""
    part = stretch(settings, wanted)
    newest: list[tuple[datetime, int, int, DeadLetter]] = []
    total = 0
    for letter in read(settings, part, wanted, title=f"reading {part.topic}"):
        total += 1
        item = (letter.at, letter.partition, letter.offset, letter)
        if len(newest) < limit:
            heapq.heappush(newest, item)
        else:
            heapq.heappushpop(newest, item)
    return [item[3] for item in sorted(newest, reverse=True)], total


def find_one(settings: Settings, place: Place) -> DeadLetter:
    """Return the dead letter at a place. Raises CliError when there is none."""
    partition, offset = place
    topic = physical(settings.env, topics.DEAD)
    count = partition_count(settings.cluster, topic)
    if partition >= count:
        raise CliError(f"{topic} has the partitions 0 to {count - 1}, not {partition}. `notify dlq list` shows what there is.")
    found, _ = find(settings, Filter(places=frozenset({place})), limit=1)
    if not found:
        raise CliError(
            f"There is no dead letter at {partition}:{offset}. `notify dlq list` shows what there is; they are kept for 30 days."
        )
    return found[0]


def filter_of(  # noqa: PLR0913 - one parameter an option
    *,
    error: str | None,
    role: str | None,
    topic: str | None,
    provider: str | None,
    since: str | None,
    until: str | None,
    ids: list[str] | None,
) -> Filter:
    """Return the filter that a command's options describe. Raises BadParameter."""
    now = datetime.now(UTC)
    return Filter(
        error=error,
        role=role,
        topic=topic,
        provider=provider,
        since=None if since is None else moment_of(since, "--since", now=now),
        until=None if until is None else moment_of(until, "--until", now=now),
        places=frozenset(place_of(text, "--id") for text in ids or ()),
    )


def in_environment(wanted: Filter, settings: Settings) -> Filter:
    """Return the filter with its topic as dead letters name it, which operators may give as the cluster does."""
    names = {physical(settings.env, spec.name): spec.name for spec in specs()}
    return replace(wanted, topic=names.get(wanted.topic or "", wanted.topic))


def place_of(text: str, hint: str) -> Place:
    """Return the place that `text` names. Raises BadParameter, naming `hint`."""
    partition, colon, offset = text.partition(":")
    if not colon or not all(part.isascii() and part.isdigit() for part in (partition, offset)):
        raise typer.BadParameter(f"{text!r} is not PARTITION:OFFSET, such as 0:41", param_hint=hint)
    return int(partition), int(offset)


def nothing_found(wanted: Filter) -> str:
    """Return what a command says when there is none."""
    return f"no dead letters{' of this kind' if wanted.is_given else ''}"
