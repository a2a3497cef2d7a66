"""docs/scaling.md, from what was measured: how the system grows from one machine to a million notifications a second."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import figures
from benchmarks.figures import TO
from benchmarks.pipeline import ROLES, measured_roles
from benchmarks.state import KEPT, TABLES
from streams.provisioning import COMPACTION
from streams.topics import DAY_SECONDS, TopicSpec
from streams.topology import all_topics

BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
RATES = (1_000, 10_000, 100_000, 1_000_000)
REPLICATION = 3
# cores are planned to be so busy at the peak
BUSY = 0.6
CORES_OF_A_MACHINE, GIB_OF_A_MACHINE = 16, 256
# what a process has for each core it keeps busy, beside its tables
GIB_OF_A_CORE = 2
# fewer cannot lose one: replicas of a record, and workers of a role
LEAST_BROKERS, LEAST_WORKERS = 3, 2
# a partition's shard is one transaction after the other on one event loop: so much of a core at most
SHARD_CORE = 0.5
# a number that many numbers of workers share evenly
PARTITIONS_STEP = 24
# an hour of a core, of a GiB of memory and a month of a GiB of disk, in US dollars: a public cloud's list prices, rounded
CORE_HOUR, GIB_HOUR, DISK_MONTH = 0.04, 0.005, 0.08
HOURS = 730
DAYS_OF_A_MONTH = 30.4
BROKER, POSTGRES = "Kafka broker", "PostgreSQL"
WINDOW, REFERENCES = ("ledger", "dedupe"), "references"
# settings that give the same mails less to remember
SHORT = {"ledger": DAY_SECONDS // 2, "dedupe": DAY_SECONDS // 2, "references": 7 * DAY_SECONDS}
_SAMPLE_ROWS = 100


@dataclass(frozen=True, slots=True)
class Range:
    """A figure of which no more is known than where it is. `least` and `most` alike: it is known."""

    least: float
    most: float

    def times(self, factor: float) -> Range:
        """Return it so many times."""
        return Range(self.least * factor, self.most * factor)

    def plus(self, more: float) -> Range:
        """Return it and `more`."""
        return Range(self.least + more, self.most + more)

    def show(self, form: figures.Format) -> str:
        """Return the figure, or the least and the most."""
        return form(self.least) if self.least == self.most else f"{form(self.least)}{TO}{form(self.most)}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a rate of notifications a second needs. `state_gib`: by table."""

    rate: int
    cores: Mapping[str, float]
    partitions: int
    state_gib: Mapping[str, float]
    disk_tib: Range

    @property
    def memory_gib(self) -> float:
        """Memory of the workers."""
        return sum(self.state_gib.values()) + GIB_OF_A_CORE * self._worker_cores

    @property
    def brokers(self) -> int:
        """Machines of the brokers."""
        return max(LEAST_BROKERS, math.ceil(self.cores[BROKER] / CORES_OF_A_MACHINE))

    @property
    def workers(self) -> int:
        """Machines of the workers: enough for their cores and their memory."""
        return max(LEAST_WORKERS, math.ceil(self._worker_cores / CORES_OF_A_MACHINE), math.ceil(self.memory_gib / GIB_OF_A_MACHINE))

    @property
    def databases(self) -> int:
        """Machines of PostgreSQL."""
        return math.ceil(self.cores[POSTGRES] / CORES_OF_A_MACHINE)

    @property
    def dollars(self) -> Range:
        """A month's cost of cores, memory and disk."""
        memory = self.memory_gib + GIB_OF_A_CORE * (self.cores[BROKER] + self.cores[POSTGRES])
        return self.disk_tib.times(1024 * DISK_MONTH).plus(HOURS * (sum(self.cores.values()) * CORE_HOUR + memory * GIB_HOUR))

    @property
    def dollars_a_million(self) -> Range:
        """The same for a million notifications."""
        return self.dollars.times(1e6 / (self.rate * DAY_SECONDS * DAYS_OF_A_MONTH))

    @property
    def _worker_cores(self) -> float:
        return sum(cores for name, cores in self.cores.items() if name not in {BROKER, POSTGRES})


def row_bytes(name: str, state: Mapping[str, Any]) -> tuple[float, float]:
    """Return what a row of a table takes in memory and on disk; where it was not measured, its bytes and the most that others add."""
    count, tables = state["rows"], state["tables"]
    if name in tables:
        return tables[name]["rss_bytes"] / count, tables[name]["disk_bytes"] / count
    payload = fmean(len(key) + len(value) for key, value in TABLES[name](_SAMPLE_ROWS))
    memory, disk = (max(each[of] - each["payload_bytes"] for each in tables.values()) / count for of in ("rss_bytes", "disk_bytes"))
    return payload + memory, payload + disk


def log_byte_days(pipeline: Mapping[str, Any]) -> Range:
    """Return what a notification leaves in the topics, each byte times the days that its topic keeps it, without the rows of tables.

    Results of earlier releases do not say which topic the bytes are in: then it is the shortest and the longest time for all.
    """
    runs = pipeline["runs"]
    days = {spec.name: _kept_days(spec) for spec in all_topics()}
    if all("log_bytes_by_topic" in run for run in runs):
        found = fmean(sum(count * days[topic] for topic, count in run["log_bytes_by_topic"].items()) for run in runs)
        return Range(found, found)
    kept = [spec.retention_seconds / DAY_SECONDS for spec in all_topics() if spec.retention_seconds is not None]
    log_bytes = figures.figure([run["log_bytes_per_notification"] for run in runs]).median
    return Range(log_bytes * min(kept), log_bytes * max(kept))


def _kept_days(spec: TopicSpec) -> float:
    """Return how long a topic keeps what is written to it. A compacted one: until it is cleaned, what stays then is rows."""
    seconds = spec.retention_seconds or spec.forgets_seconds
    return int(COMPACTION["max.compaction.lag.ms"]) / 1000 / DAY_SECONDS if seconds is None else seconds / DAY_SECONDS


def plans(pipeline: Mapping[str, Any], state: Mapping[str, Any]) -> list[Plan]:
    """Return the plan of each rate, from the results of the benchmarks of the pipeline and of state."""
    runs = pipeline["runs"]
    cpu = {name: figures.figure([run["cpu_us_per_notification"][name] for run in runs]).median for name in _measured(pipeline)}
    sizes = {name: row_bytes(name, state) for name in KEPT}
    slowest = max(micros for name, micros in cpu.items() if name not in {BROKER, POSTGRES})
    byte_days = log_byte_days(pipeline)
    found = []
    for rate in RATES:
        cores = {name: rate * micros / 1e6 / BUSY for name, micros in cpu.items()}
        cores[BROKER] *= REPLICATION
        rows_disk = sum(rate * KEPT[name].rows_for_each_per_second * disk for name, (_, disk) in sizes.items())
        found.append(
            Plan(
                rate=rate,
                cores=cores,
                partitions=PARTITIONS_STEP * math.ceil(rate * slowest / 1e6 / SHARD_CORE / PARTITIONS_STEP),
                state_gib={name: rate * KEPT[name].rows_for_each_per_second * memory / 2**30 for name, (memory, _) in sizes.items()},
                disk_tib=byte_days.times(rate * DAY_SECONDS).plus(rows_disk).times(REPLICATION / 2**40),
            )
        )
    return found


def _measured(pipeline: Mapping[str, Any]) -> list[str]:
    return [*measured_roles(pipeline["runs"]), BROKER, POSTGRES]


def _window(plan: Plan) -> float:
    return sum(plan.state_gib[name] for name in WINDOW)


def tables(pipeline: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """Return the table of the page."""
    found = plans(pipeline, state)

    window, references = (_days(KEPT[name].seconds) for name in ("dedupe", REFERENCES))
    is_estimate = " (estimated)" if REFERENCES not in state["tables"] else ""
    rows = [
        [f"cores of {name}", *(f"{plan.cores[name]:,.1f}" if name in plan.cores else "not measured" for plan in found)]
        for name in (*(str(role) for role in ROLES), BROKER, POSTGRES)
    ]
    rows += [
        ["**cores together**", *(f"{sum(plan.cores.values()):,.0f}" for plan in found)],
        [f"memory: ids and ledger of {window} days, GiB", *(f"{_window(plan):,.0f}" for plan in found)],
        [f"memory: references of {references} days{is_estimate}, GiB", *(f"{plan.state_gib[REFERENCES]:,.0f}" for plan in found)],
        ["machines for workers", *(f"{plan.workers:,}" for plan in found)],
        ["machines for brokers", *(f"{plan.brokers:,}" for plan in found)],
        ["machines for PostgreSQL", *(f"{plan.databases:,}" for plan in found)],
        ["partitions keyed by user", *(f"{plan.partitions:,}" for plan in found)],
        [f"log, {REPLICATION} replicas, TiB", *(plan.disk_tib.show(figures.whole) for plan in found)],
        ["dollars a month, about", *(plan.dollars.show(lambda dollars: f"{round(dollars, -2):,.0f}") for plan in found)],
        ["dollars a million notifications, about", *(plan.dollars_a_million.show(figures.tenth) for plan in found)],
    ]
    return figures.table(["", *(f"{plan.rate:,}/s" for plan in found)], rows)


def page(results: Mapping[str, Any]) -> str:
    """Return what the page says from figures: the table, what it follows from, and what ends first."""
    pipeline, state = results["2"]["result"], results["6"]["result"]
    notes = "\n".join(_wrapped(note) for note in _notes(pipeline, state))
    ends = "\n".join(f"| {' | '.join(row)} |" for row in _ends(pipeline, state))
    return f"{tables(pipeline, state)}\n\n{notes}\n\n## What ends first\n\n| what | where | what to do |\n|---|---|---|\n{ends}"


def _notes(pipeline: Mapping[str, Any], state: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the table follows from."""
    runs, roles = pipeline["runs"], measured_roles(pipeline["runs"])
    of_roles = figures.figure([sum(run["cpu_us_per_notification"][name] for name in roles) for run in runs]).median
    of_broker = figures.figure([run["cpu_us_per_notification"][BROKER] for run in runs]).median
    absent = "".join(f" `{role}` was not measured, and is missing in the sum." for role in ROLES if role not in roles)
    yield (
        f"Cores: a notification has two deliveries, by e-mail and in the app. It cost {of_roles / 1000:.1f} ms of CPU of the roles and "
        f"{of_broker / 1000:.1f} ms of the broker ([performance.md](performance.md), section 2).{absent} Cores are planned to be "
        f"{100 * BUSY:.0f} % busy. The broker's are counted for {REPLICATION} replicas: a follower costs less than a leader, and nothing "
        "better was measured."
    )
    estimate = ""
    if REFERENCES not in state["tables"]:
        estimate = " A row of references was not measured: it is put down as its bytes and the most that other rows take beside theirs."
    yield (
        "Memory: two rows of the ledger and two of ids and finished payments for `NOTIFY_DEDUPE_DAYS`, one of references for "
        f"`NOTIFY_REFERENCE_DAYS`, as section 6 counts them.{estimate} What grows with the users instead is not in it: preferences, keys, "
        "watches, and up to 100 notifications of each inbox in `views`."
    )
    yield (
        f"Machines have {CORES_OF_A_MACHINE} cores and {GIB_OF_A_MACHINE} GiB. There are at least {LEAST_BROKERS} of brokers and "
        f"{LEAST_WORKERS} of workers, so that one may be lost; where few cores are needed, smaller ones do."
    )
    kept = log_byte_days(pipeline)
    days = [spec.retention_seconds / DAY_SECONDS for spec in all_topics() if spec.retention_seconds is not None]
    weighed = (
        "each topic's bytes for as many days as it keeps them, those of a compacted one for a day, and then its rows."
        if kept.least == kept.most
        else f"which topic the bytes are in was not measured. The first figure takes {min(days):g} days for all of them, which most topics "
        f"keep, the second {max(days):g} days, which decisions and statuses are kept."
    )
    yield f"Log: {weighed} The database's disk is not in it: it grows by the month (`NOTIFY_STORE_MONTHS`)."
    yield (
        f"Prices are rounded list prices of a public cloud: {CORE_HOUR:g} $ an hour for a core, {GIB_HOUR:g} $ for a GiB of memory, "
        f"{DISK_MONTH:g} $ a month for a GiB of disk. What providers of e-mail and SMS charge is not in it, and is more than all of this."
    )


def _ends(pipeline: Mapping[str, Any], state: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield what ends first, where, and what to do."""
    plan = plans(pipeline, state)[1]
    window, references = f"{_window(plan):,.0f} GiB of ids and ledger", f"{plan.state_gib[REFERENCES]:,.0f} GiB of references"
    less = sum(gib * SHORT[name] / KEPT[name].seconds for name, gib in plan.state_gib.items())
    shorter = (
        "remember for a shorter time. `NOTIFY_REFERENCE_DAYS` has to cover how late somebody reports on a mail: 5 days for a bounce, weeks "
        "for a complaint. `NOTIFY_DEDUPE_DAYS` has to cover how late a producer may repeat an event, and how long after its first attempt "
        f"a delivery may be read again, not the retention. With {_days(SHORT[REFERENCES])} days and {_days(SHORT['dedupe'])} days it is "
        f"{less:,.0f} GiB together. A table on disk (RocksDB) would be the next step; it is not built"
    )
    yield "memory", f"tables are dicts in the workers' memory. At {plan.rate:,}/s: {window}, {references}", shorter
    yield "one shard's speed", "a user partition's router is one Python core at most", "more partitions, from the start"
    rates = [round(state["rows"] / each["seconds"] / 1e6, 2) for each in state["tables"].values()]
    rate = Range(min(rates), max(rates)).show(figures.hundredth)
    yield (
        "recovery time",
        f"a worker that dies has its rows read again by another: {rate} million rows a second (section 6)",
        "more workers with fewer rows each; static membership (`NOTIFY_WORKER_NAME`), so that a restart moves nothing",
    )
    yield (
        "PostgreSQL",
        "one primary takes what `store` writes on a few cores; how fast it is filled anew is in [operations.md](operations.md#postgresql)",
        "the store lags without harm to sending. Keep fewer months, or give each cell its own database",
    )
    yield (
        "the broker's transactions",
        "about six small transactions a notification when nothing is waiting; they batch under load",
        "fewer, busier shards; faster disks do not help, cores do",
    )
    yield (
        "hot users",
        "one user is one partition: a broadcast to everyone is spread, a million events of one user are not",
        "rate limits at the producer",
    )


def _wrapped(note: str) -> str:
    return textwrap.fill(f"- {note}", width=139, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _days(seconds: float) -> str:
    return f"{seconds / DAY_SECONDS:g}"


def write(target: Path, results: Mapping[str, Any]) -> bool:
    """Put what follows from `results` between the page's marks. False: what it follows from was not measured."""
    if not {"2", "6"} <= results.keys():
        return False
    target.write_text(rendered(target.read_text("utf-8"), results), "utf-8")
    return True


def rendered(text: str, results: Mapping[str, Any]) -> str:
    """Return the page `text` with what follows from `results` between its marks."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{page(results)}\n\n{END}{tail}"
