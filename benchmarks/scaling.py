"""docs/scaling.md, from what was measured: how the system grows from one machine to a million notifications a second."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import figures

BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
RATES = (1_000, 10_000, 100_000, 1_000_000)
REPLICATION = 3
# cores are planned to be so busy at the peak
BUSY = 0.6
CORES_OF_A_MACHINE = 16
# a partition's shard is one transaction after the other on one event loop: so much of a core at most
SHARD_CORE = 0.5
DAY_SECONDS = 86_400
# (topics' share of the log) kept so many days on average: requests and deliveries 14, decisions and status 90
KEPT_DAYS = 14
WINDOW_DAYS = 7
# an hour of a core, of a GiB of memory and a month of a GiB of disk, in US dollars: a public cloud's list prices, rounded
CORE_HOUR, GIB_HOUR, DISK_MONTH = 0.04, 0.005, 0.08
HOURS = 730


@dataclass(frozen=True, slots=True)
class Plan:
    """What a rate of notifications a second needs."""

    rate: int
    cores: dict[str, float]
    partitions: int
    state_gib: float
    disk_tib: float

    @property
    def machines(self) -> int:
        """Machines of CORES_OF_A_MACHINE cores."""
        return math.ceil(sum(self.cores.values()) / CORES_OF_A_MACHINE)

    @property
    def dollars(self) -> float:
        """A month's cost of cores, memory and disk."""
        cores = sum(self.cores.values())
        memory = self.state_gib + 2 * cores
        return HOURS * (cores * CORE_HOUR + memory * GIB_HOUR) + self.disk_tib * 1024 * DISK_MONTH


def plans(pipeline: dict[str, Any], state: dict[str, Any]) -> list[Plan]:
    """Return the plan of each rate, from the results of the benchmarks of the pipeline and of state."""
    runs = pipeline["runs"]
    names = [name for name in runs[0]["cpu_us_per_notification"] if name != "mail sink"]
    cpu = {name: figures.figure([run["cpu_us_per_notification"][name] for run in runs]).median for name in names}
    log_bytes = figures.figure([run["log_bytes_per_notification"] for run in runs]).median
    rows = {name: each["rss_bytes"] / state["rows"] for name, each in state["tables"].items()}
    # an id a notification, and a row of the ledger a delivery
    window_bytes = rows["dedupe"] + 2 * rows["ledger"]
    slowest = max(micros for name, micros in cpu.items() if name != "Kafka broker")
    found = []
    for rate in RATES:
        cores = {name: rate * micros / 1e6 / BUSY for name, micros in cpu.items()}
        cores["Kafka broker"] *= REPLICATION
        found.append(
            Plan(
                rate=rate,
                cores=cores,
                partitions=max(24, math.ceil(rate * slowest / 1e6 / SHARD_CORE)),
                state_gib=rate * DAY_SECONDS * WINDOW_DAYS * window_bytes / 2**30,
                disk_tib=rate * DAY_SECONDS * KEPT_DAYS * log_bytes * REPLICATION / 2**40,
            )
        )
    return found


def tables(pipeline: dict[str, Any], state: dict[str, Any]) -> str:
    """Return the tables of the page."""
    found = plans(pipeline, state)
    header = ["", *(f"{plan.rate:,}/s" for plan in found)]
    names = list(found[0].cores)
    rows = [[f"cores of {name}", *(f"{plan.cores[name]:,.1f}" for plan in found)] for name in names]
    rows += [
        ["**cores together**", *(f"{sum(plan.cores.values()):,.0f}" for plan in found)],
        [f"machines of {CORES_OF_A_MACHINE} cores", *(f"{plan.machines:,}" for plan in found)],
        ["partitions keyed by user", *(f"{plan.partitions:,}" for plan in found)],
        [f"state of the window of {WINDOW_DAYS} days, GiB", *(f"{plan.state_gib:,.0f}" for plan in found)],
        [f"log of {KEPT_DAYS} days, {REPLICATION} replicas, TiB", *(f"{plan.disk_tib:,.1f}" for plan in found)],
        ["dollars a month, about", *(f"{round(plan.dollars, -2):,.0f}" for plan in found)],
        ["dollars a million notifications, about", *(f"{plan.dollars / (plan.rate * DAY_SECONDS * 30.4 / 1e6):.2f}" for plan in found)],
    ]
    return figures.table(header, rows)


def write(page: Path, results: dict[str, Any]) -> bool:
    """Put the tables of `results` between the page's marks. False: what they follow from was not measured."""
    if not {"2", "6"} <= results.keys():
        return False
    text = page.read_text("utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    shown = tables(results["2"]["result"], results["6"]["result"])
    page.write_text(f"{head}{BEGIN}\n\n{shown}\n\n{END}{tail}", "utf-8")
    return True
