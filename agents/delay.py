"""Holds deliveries back until their next attempt may begin, without ever calling a provider.

A topic is one tier of one lane: each of its records waits equally long from its timestamp, so the head of a partition is
always the next one due, and holding needs neither a heap nor a table. What is left of a longer wait is spent in the
longest tier that is over before it; a rest shorter than the shortest tier is the sender's to hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from agents.ports import Effects, Output, Source, State
from agents.retries import Tiers, tier_for
from schemas import topics
from schemas.errors import InvalidEventError
from schemas.messages import Delivery
from schemas.topics import Channel, Lane, Tier


@dataclass(frozen=True, slots=True)
class Delay:
    """The decisions of the role delay. `now` is the wall clock: after a standstill only the wait that is left counts."""

    tiers_seconds: Tiers
    now: Callable[[], datetime]
    _places: dict[str, tuple[Lane, int]] = field(init=False)

    def __post_init__(self) -> None:
        places = {
            topics.retry(lane, tier): (lane, seconds) for lane in Lane for tier, seconds in zip(Tier, self.tiers_seconds[lane], strict=True)
        }
        object.__setattr__(self, "_places", places)

    def seconds(self, topic: str) -> int:
        """Return how long the records of a topic wait."""
        return self._places[topic][1]

    def decide(self, delivery: Delivery, source: Source, state: State) -> Effects:
        """Decide where `delivery` goes, its time in this tier being over: another tier, or back to its sender.

        Counts `held` or `returned`. Raises InvalidEventError for a channel that does not exist.
        """
        del state
        if delivery.channel not in set(Channel):
            raise InvalidEventError("channel", "is not one of the channels")
        lane = self._places[source.topic][0]
        left = 0.0 if delivery.not_before is None else (delivery.not_before - self.now()).total_seconds()
        tier = tier_for(left, self.tiers_seconds[lane])
        key = delivery.user_id.encode()
        if tier is not None:
            return Effects([Output(topics.retry(lane, tier), key, delivery)], counts=["held"])
        return Effects([Output(topics.deliver(delivery.channel, lane), key, delivery)], counts=["returned"])
