"""What a sender holds of the deliveries that it read and has not done: what is ready, what waits, and what each rests on."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from agents.control import Control
from schemas.messages import Delivery
from streams.gateways import Call, Gateway
from streams.shard import Lane
from streams.transport.records import Record


@dataclass(slots=True)
class Providers:
    """The gateways of a worker by channel, and how to open what is sealed for a user.

    `orders_version` grows whenever `control` may say something else. `tiers_seconds` and `lane_share` (of each provider's
    quota): of the worker's lane. `partitions`: into how many that share is divided.
    """

    gateways: Mapping[str, Gateway]
    key_of: Callable[[str], Awaitable[bytes | None]]
    ledger_seconds: int
    control: Control
    orders_version: Callable[[], int]
    tiers_seconds: Sequence[int]
    lane_share: float
    partitions: int


@dataclass(slots=True)
class Job:
    """A delivery that was read and is not done. `number`: of the attempt that runs, or else of the next one.

    `provider`: who is or was called last. `asks`: who may have taken an earlier attempt, and is asked before the next one.
    `tried`: who refused it since its schedule was counted last. `scope`: of a suppression of its address; `device`: the
    sealed contact that names its dead device.
    """

    delivery: Delivery
    lane: Lane
    record: Record
    number: int
    failures: int
    cut_off: int | None
    provider: str = ""
    asks: str = ""
    outages: int = 0  # that it met here
    tried: set[str] = field(default_factory=set)
    call: Call | None = None
    scope: str | None = None
    device: bytes | None = None

    @property
    def identity(self) -> tuple[str, int]:
        """What is sent at most once at a time."""
        return self.delivery.delivery_id, self.delivery.generation


@dataclass(slots=True)
class Outgoing:
    """One channel of a shard: what is ready, and what waits."""

    ready: deque[Job] = field(default_factory=deque)
    waiting: list[tuple[float, int, Job]] = field(default_factory=list)  # heap by monotonic due time
    stuck_until: float = math.inf  # when what is ready and could not begin may be tried again without being woken

    def wake(self, now: float) -> None:
        """Make ready what has waited long enough; what met an outage goes last, so that another delivery probes."""
        due: list[Job] = []
        while self.waiting and self.waiting[0][0] <= now:
            due.append(heapq.heappop(self.waiting)[2])
        self.ready.extendleft(job for job in reversed(due) if not job.outages)
        self.ready.extend(job for job in due if job.outages)

    def routes(self) -> set[str | None]:
        """Return the routes of what is ready or waits."""
        return {job.delivery.route for job in (*self.ready, *(job for _, _, job in self.waiting))}

    def take_out(self, is_wanted: Callable[[Job], bool]) -> list[Job]:
        """Remove and return the deliveries, ready or waiting, that are wanted."""
        found = [job for job in (*self.ready, *(job for _, _, job in self.waiting)) if is_wanted(job)]
        if found:
            gone = {job.identity for job in found}
            self.ready = deque(job for job in self.ready if job.identity not in gone)
            self.waiting = [entry for entry in self.waiting if entry[2].identity not in gone]
            heapq.heapify(self.waiting)
        return found
