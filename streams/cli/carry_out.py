"""A command for the router, published and waited for: until the compacted topic that it changes says so, or it was refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from schemas import topics
from schemas.codec import Codec
from schemas.ids import partition_of
from schemas.messages import Command
from streams.cli.errors import CliError
from streams.cli.kafka import Publisher, Reader, partition_count
from streams.cli.letters import DeadLetter
from streams.settings import Settings
from streams.topics import physical

# the router answers within milliseconds; so long without any of what is awaited means that nobody does
SILENCE_SECONDS = 20.0


def carry_out(  # noqa: PLR0913 - what is asked, and how to see that it is done
    settings: Settings,
    codec: Codec,
    commands: Sequence[Command],
    *,
    topic: str,
    key_of: Callable[[Command], bytes],
    is_done: Callable[[Command, bytes | None], bool],
    silence_seconds: float = SILENCE_SECONDS,
) -> None:
    """Publish `commands` and return when the record of each one's key in `topic`, written since, is as `is_done` wants it.

    Raises CliError when the router refuses one, or does nothing for `silence_seconds`.
    """
    watched, dead = physical(settings.env, topic), physical(settings.env, topics.DEAD)
    count = partition_count(settings.cluster, watched)
    waiting = {key_of(command): command for command in commands}
    partitions = sorted({partition_of(command.user_id.encode(), count) for command in commands})
    with (
        Reader(settings.cluster, watched, _ends(settings, watched, partitions)) as changes,
        Reader(settings.cluster, dead, _ends(settings, dead, list(range(partition_count(settings.cluster, dead))))) as refusals,
    ):
        publisher = Publisher(settings.cluster)
        for command in commands:
            publisher.publish(physical(settings.env, topics.COMMANDS), command.user_id, codec.encode(command))
        publisher.require_all()
        deadline = time.monotonic() + silence_seconds
        while waiting:
            for message in changes.more(0.1):
                key = message.key() or b""
                if key in waiting and is_done(waiting[key], message.value()):
                    del waiting[key]
                    deadline = time.monotonic() + silence_seconds
            users = {command.user_id.encode() for command in waiting.values()}
            for letter in map(DeadLetter.of, refusals.more(0)):
                if letter.headers.get("topic") == topics.COMMANDS and letter.key in users:
                    reason = letter.headers.get("message") or letter.headers.get("error", "no reason given")
                    raise CliError(f"The router refused: {reason}.")
            if time.monotonic() > deadline:
                raise CliError(
                    f"Published, but the router has not done it within {silence_seconds:g} s. Is the router running? "
                    "`notify doctor` says; it will be done when it runs."
                )


def _ends(settings: Settings, topic: str, partitions: list[int]) -> Mapping[int, int]:
    with Reader(settings.cluster, topic, partitions) as reader:
        return {number: end for number, (_, end) in reader.sizes().items()}
