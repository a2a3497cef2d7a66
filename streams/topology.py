"""Every topic → agent → topic on one screen. No other module binds an agent to a topic.

The picture in the README is generated from this table (`make docs`). Every step may also write `dead`.
"""

from __future__ import annotations

from dataclasses import dataclass

from schemas import topics
from schemas.topics import Channel, Lane, Tier
from streams.roles import Role, sender_of
from streams.topics import Count, TopicSpec, specs

REQUESTS = tuple(topics.requests(lane) for lane in Lane)
# a broadcast to the staff of a warehouse does not wait behind a backlog of requests; its chunks are small
ROUTED = (topics.COMMANDS, topics.requests(Lane.CRITICAL), topics.BROADCAST, topics.requests(Lane.NORMAL), topics.requests(Lane.BULK))
RETRY = tuple(topics.retry(lane, tier) for lane in Lane for tier in Tier)
DELIVER = tuple(topics.deliver(channel, lane) for lane in Lane for channel in Channel)
TO_SUBSCRIBERS = tuple(topics.deliver(Channel.WEBHOOK, lane) for lane in Lane)
TO_RECIPIENTS = tuple(topic for topic in DELIVER if topic not in TO_SUBSCRIBERS)
FORWARD = "forward"


PROGRESS = "progress"  # the table of watermarks


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """An agent, what it reads (most urgent first), its tables and what it writes.

    A step's inputs and tables have one partition count: shard n of it owns partition n of each. `tables` maps a table
    to its changelog; None: the step's own, which the tables that are its alone share. `progress`, which holds the
    watermarks, is every step's.
    """

    name: str
    role: Role
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    tables: tuple[tuple[str, str | None], ...] = ()
    count: Count = Count.USER
    aged: tuple[str, ...] = ()  # tables that forget their oldest rows, and so keep the order of last writes
    sorted: tuple[str, ...] = ()  # tables whose rows are found by the beginning of their key
    calls_providers: bool = False
    urgent: tuple[str, ...] = ()  # inputs that those behind them in `reads` make room for

    @property
    def changelog(self) -> str:
        """The topic of the tables that are the step's alone, as agents know topics."""
        return f"{self.role}.{self.name}.changelog"

    def changelogs(self) -> dict[str, str]:
        """Return table → changelog topic, as agents know topics."""
        return {PROGRESS: self.changelog, **{table: log or self.changelog for table, log in self.tables}}

    def own_tables(self) -> list[str]:
        """Return the tables that share the step's own changelog: a transaction costs for each topic it writes to."""
        return [table for table, log in self.changelogs().items() if log == self.changelog]


def _sender(lane: Lane) -> Step:
    return Step(
        name="send",
        role=sender_of(lane),
        reads=(topics.settled(lane), *(topics.deliver(channel, lane) for channel in Channel)),
        tables=(("attempts", None), ("used", None)),
        aged=("attempts",),
        # receipts: what providers report over the connection that they are called by
        writes=(
            topics.STATUS,
            topics.PROVIDER_REFS,
            topics.RECEIPTS,
            topics.CONTROL,
            topics.COMMANDS,
            *(topics.retry(lane, tier) for tier in Tier),
        ),
        calls_providers=True,
    )


TOPOLOGY: tuple[Step, ...] = (
    Step(name="payments", role=Role.INGEST, reads=(topics.PAYMENTS,), writes=(*REQUESTS, topics.PARKED), count=Count.INBOUND),
    Step(
        name="inventory",
        role=Role.INGEST,
        reads=(topics.INVENTORY,),
        writes=(topics.STOCK, topics.PARKED),
        count=Count.INVENTORY,
    ),
    Step(name="actions", role=Role.INGEST, reads=(topics.USER_ACTIONS,), writes=REQUESTS),
    Step(
        name="parked",
        role=Role.INGEST,
        reads=(topics.PARKED,),
        writes=(*REQUESTS, topics.STOCK),
        count=Count.INBOUND,
    ),
    Step(
        name="level",
        role=Role.STOCK,
        reads=(topics.PRODUCTS, topics.STOCK),
        tables=(("products", None), ("levels", None), ("seen", None)),
        aged=("seen",),
        writes=(topics.OUT_OF_STOCK, topics.BROADCAST, topics.DECISIONS, topics.PRODUCTS),
        count=Count.INVENTORY,
    ),
    Step(
        name="decide",
        role=Role.ROUTER,
        reads=ROUTED,
        tables=(
            ("preferences", topics.PREFERENCES),
            ("keys", topics.KEYS),
            ("watches", topics.WATCHES),
            ("watching", None),
            ("seen", None),
            ("subjects", None),
        ),
        aged=("seen", "subjects"),
        sorted=("watches",),
        urgent=(topics.requests(Lane.CRITICAL), topics.requests(Lane.NORMAL)),
        writes=(*TO_RECIPIENTS, topics.DECISIONS, topics.STATUS, topics.COMMANDS, topics.BROADCAST, *REQUESTS),
    ),
    _sender(Lane.CRITICAL),
    _sender(Lane.NORMAL),
    _sender(Lane.BULK),
    Step(name="hold", role=Role.DELAY, reads=RETRY, writes=(*DELIVER, *RETRY)),
    # runs where there are subscribers
    Step(name=FORWARD, role=Role.SIGNALS, reads=(topics.STATUS,), writes=TO_SUBSCRIBERS),
    Step(name="engage", role=Role.SIGNALS, reads=(topics.SIGNALS,), writes=(topics.STATUS,)),
    Step(
        name="match",
        role=Role.SIGNALS,
        reads=(topics.PROVIDER_REFS, topics.RECEIPTS),
        tables=(("references", None), ("waiting", None)),
        aged=("references", "waiting"),
        writes=(topics.STATUS, topics.PROVIDER_REFS, topics.RECEIPTS, topics.CONTROL, *(topics.settled(lane) for lane in Lane)),
    ),
    Step(
        name="project",
        role=Role.VIEWS,
        reads=(topics.DECISIONS, topics.STATUS),
        tables=(("notifications", None), ("inbox", None)),
        writes=(),
    ),
    Step(name="keep", role=Role.STORE, reads=(topics.DECISIONS, topics.STATUS), writes=()),
)


def steps_of(role: Role) -> tuple[Step, ...]:
    """Return the steps that a worker of `role` runs."""
    return tuple(step for step in TOPOLOGY if step.role is role)


def all_topics() -> list[TopicSpec]:
    """Return every topic of the system, changelogs included."""
    return [*specs(), *(TopicSpec(name=step.changelog, count=step.count, retention_seconds=None) for step in TOPOLOGY)]
