"""The users' keys, without which no address may enter Kafka: found in the `keys` topic, asked of the router where missing."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from datetime import UTC, datetime

from confluent_kafka import Message

from schemas import topics
from schemas.codec import Codec
from schemas.ids import digest, partition_of
from schemas.messages import Command, UserKey
from schemas.sealed import unwrap
from streams.cli.errors import CliError
from streams.cli.kafka import Progress, Publisher, Reader, partition_count
from streams.cli.wire import Wire
from streams.settings import Settings
from streams.topics import physical

# the router answers within milliseconds; so long without a single new key means that nobody does
SILENCE_SECONDS = 20.0


def ensure_keys(  # noqa: PLR0913
    settings: Settings,
    wire: Wire,
    codec: Codec,
    users: Collection[str],
    *,
    progress: Progress | None = None,
    silence_seconds: float = SILENCE_SECONDS,
) -> dict[str, bytes]:
    """Return the key of each of `users`; the router makes those that are missing.

    One pass over the users' partitions, one command for each missing key. Raises CliError when the router does not answer.
    """
    topic = physical(settings.env, topics.KEYS)
    count = partition_count(settings.cluster, topic)
    wanted = set(users)
    partitions = sorted({partition_of(user.encode(), count) for user in wanted})
    wrapped: dict[str, bytes] = {}

    def take(message: Message) -> None:
        user = (message.key() or b"").decode(errors="replace")
        if user not in wanted:
            return
        if message.value() is None:  # erased: a new key is needed, and only the router may make it
            wrapped.pop(user, None)
        else:
            wrapped[user] = wire.decode(message.value(), UserKey).wrapped

    with Reader(settings.cluster, topic, partitions) as reader:
        for message in reader.to_end():
            take(message)
        missing = wanted - wrapped.keys()
        if missing:
            ask_for_keys(settings, codec, missing)
            _await_keys(reader, take, lambda: len(wanted) - len(wrapped), len(missing), progress, silence_seconds)
    return {user: unwrap(settings.seal_key, key, user_id=user) for user, key in wrapped.items()}


def find_key(settings: Settings, wire: Wire, user_id: str) -> bytes | None:
    """Return the key of a user; None when there is none, or none any more."""
    topic = physical(settings.env, topics.KEYS)
    raw_key, newest = user_id.encode(), None
    partition = partition_of(raw_key, partition_count(settings.cluster, topic))
    with Reader(settings.cluster, topic, [partition]) as reader:
        for message in reader.to_end():
            if message.key() == raw_key:
                newest = message.value()
    return None if newest is None else unwrap(settings.seal_key, wire.decode(newest, UserKey).wrapped, user_id=user_id)


def ask_for_keys(settings: Settings, codec: Codec, users: Collection[str]) -> None:
    """Publish a command for each of `users`: make his key."""
    now = datetime.now(UTC)
    publisher = Publisher(settings.cluster)
    for number, user in enumerate(sorted(users)):
        command_id = digest("cli", "ensure_key", user, now.isoformat(), size=12)
        command = Command(command_id=command_id, user_id=user, kind="ensure_key", issued_at=now)
        publisher.publish(physical(settings.env, topics.COMMANDS), user, codec.encode(command), number=number)
    publisher.require_all()


def _await_keys(  # noqa: PLR0913, PLR0917 - private, called once
    reader: Reader, take: Callable[[Message], None], left: Callable[[], int], asked: int, progress: Progress | None, silence_seconds: float
) -> None:
    deadline = time.monotonic() + silence_seconds
    while (before := left()) > 0:
        for message in reader.more(0.2):
            take(message)
        if left() < before:
            deadline = time.monotonic() + silence_seconds
        elif time.monotonic() > deadline:
            raise CliError(
                f"{left():,} of {asked:,} new users got no key within {silence_seconds:g} s, so nothing can be sealed for them. "
                "Is the router running? `notify doctor` says; nothing was stored, so the command can simply be repeated."
            )
        if progress is not None:
            progress(asked - left())
