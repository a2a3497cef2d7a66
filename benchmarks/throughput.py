"""Benchmark 1: the same body on the product's runner and on its peers, one core for the program, the other for the broker."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from benchmarks import environments, figures, runner_app
from benchmarks.laboratory import PYTHON, BenchmarkError, Laboratory, in_cluster
from benchmarks.peers import body
from benchmarks.sizes import Sizes
from streams.topics import TopicSpec

TITLE = "Runner and peers"
SOURCE = "bench.in"
OURS = "ours"
_RUN_SECONDS = 180.0
_VISIBLE_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A program under test. `lock`: its environment, None for the product's own. `target`: how many times faster we are to be."""

    name: str
    label: str
    module: str
    package: str
    lock: str | None = None
    target: float | None = None
    is_slow: bool = False
    variables: dict[str, str] = field(default_factory=dict)


PEERS = (
    Peer(name=OURS, label="this runner, every guarantee on", module="benchmarks.runner_app", package="faust-streaming"),
    Peer(name="faust", label="plain Faust", module="benchmarks.peers.plain_faust", package="faust-streaming", target=18.0, is_slow=True),
    Peer(name="quix", label="Quix Streams", module="benchmarks.peers.quix_streams", package="quixstreams", lock="quix", target=2.0),
    Peer(
        name="faststream",
        label="FastStream [kafka], batch",
        module="benchmarks.peers.fast_stream",
        package="faststream",
        lock="faststream",
        target=1.0,
    ),
    Peer(
        name="faststream-keyed",
        label="FastStream [kafka], batch, outputs keyed",
        module="benchmarks.peers.fast_stream",
        package="faststream",
        lock="faststream",
        variables={"BENCH_KEYED": "1"},
    ),
    Peer(name="bytewax", label="Bytewax", module="benchmarks.peers.bytewax_flow", package="bytewax", lock="bytewax", target=1.0),
    Peer(
        name="confluent",
        label="hand-written confluent-kafka loop",
        module="benchmarks.peers.confluent_loop",
        package="confluent-kafka",
        target=0.75,
    ),
)


def prepare(lab: Laboratory, source: str, events: int) -> None:
    """Make the input and the preferences' changelog."""
    specs = [TopicSpec(name=source), TopicSpec(name=runner_app.PREFERENCES_TOPIC, retention_seconds=None)]
    lab.make(specs)
    changelog = in_cluster(runner_app.PREFERENCES_TOPIC)
    if lab.end(changelog) == 0:
        lab.fill(changelog, ((user.encode(), orjson.dumps(row)) for user, row in body.all_preferences().items()))
    lab.fill(in_cluster(source), map(body.event, range(events)))


def run_ours(lab: Laboratory, source: str, events: int, *, with_seen: bool = False, **variables: str) -> dict[str, Any]:
    """Run our step over the first `events` of `source` and check that each has its output. Returns what the meter says."""
    run = lab.new_run("run")
    step = runner_app.step_of(run, source, with_seen=with_seen)
    specs = runner_app.specs_of(step)
    lab.make(specs)
    lab.forget_group(f"notify.bench.{runner_app.ROLE}")
    found = lab.run(
        [PYTHON, "-W", "ignore", "-m", "benchmarks.runner_app", "worker", "-l", "warn"],
        variables=lab.worker_variables(
            runner_app.ROLE,
            NOTIFY_WEB_PORT=str(free_port()),
            BENCH_RUN=run,
            BENCH_SOURCE=source,
            BENCH_EVENTS=str(events),
            **({"BENCH_SEEN": "1"} if with_seen else {}),
            **variables,
        ),
        seconds=_RUN_SECONDS + events / 2_000,
        name=run,
    )
    check(lab, in_cluster(runner_app.output_of(run)), found, events)
    own = {in_cluster(name) for name in (*step.writes, *step.changelogs().values())} - {in_cluster(runner_app.PREFERENCES_TOPIC)}
    lab.drop(own)
    return found


def run_peer(lab: Laboratory, peer: Peer, python: Path, source: str, events: int) -> dict[str, Any]:
    """Run a peer and check that each event it counted has its output."""
    run = lab.new_run(peer.name)
    output = runner_app.output_of(run)
    lab.make([TopicSpec(name=output)])
    found = lab.run(
        [str(python), "-W", "ignore", "-m", peer.module],
        variables={
            "BENCH_RUN": run,
            "BENCH_INPUT": in_cluster(source),
            "BENCH_OUTPUT": in_cluster(output),
            "BENCH_EVENTS": str(events),
            **peer.variables,
        },
        seconds=_RUN_SECONDS,
        name=run,
    )
    check(lab, in_cluster(output), found, events)
    lab.drop([in_cluster(output)])
    return found


def check(lab: Laboratory, output: str, found: dict[str, Any], events: int) -> None:
    """Raise BenchmarkError unless every event has its output; note how many outputs came more than once."""
    if found["events"] < events:
        raise BenchmarkError(f"{output}: {found['events']} of {events} events were handled")
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while True:
        count, ids = 0, set()
        for message in lab.read(output):
            count += 1
            ids.add(body.delivery_key(message.value() or b""))
        if len(ids) >= found["events"]:
            break
        # the broker answers a commit before it has written the markers that make the records visible
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{output}: {found['events']} events were handled, but {len(ids)} outputs are there")
        time.sleep(0.1)
    found["repeated_outputs"] = count - len(ids)


def free_port() -> int:
    """Return a free port for a worker's web side."""
    from streams.embedded.processes import choose_port

    return choose_port()


def measure(lab: Laboratory, sizes: Sizes, say: Callable[[str], None], names: Sequence[str]) -> dict[str, Any]:
    """Run every peer of `names` once a repetition, in rotating order."""
    peers = [peer for peer in PEERS if peer.name in names]
    pythons = {peer.name: Path(PYTHON) if peer.lock is None else environments.python_of(peer.lock, say) for peer in peers}
    say(f"writing {sizes.events:,} events")
    prepare(lab, SOURCE, sizes.events)
    runs: dict[str, list[dict[str, Any]]] = {peer.name: [] for peer in peers}
    with lab.broker_apart():
        for repetition in range(sizes.repetitions):
            turn = repetition % len(peers)
            for peer in peers[turn:] + peers[:turn]:
                events = sizes.slow_events if peer.is_slow else sizes.events
                is_ours = peer.name == OURS
                found = run_ours(lab, SOURCE, events) if is_ours else run_peer(lab, peer, pythons[peer.name], SOURCE, events)
                runs[peer.name].append(found)
                say(f"{repetition + 1}/{sizes.repetitions} {peer.label}: {found['events_per_second']:,.0f} events/s")
    versions = {peer.name: environments.versions(pythons[peer.name], (peer.package,)) for peer in peers}
    return {"runs": runs, "versions": versions}


def describe(result: dict[str, Any]) -> str:
    """Return the section of the report."""
    runs: dict[str, list[dict[str, Any]]] = result["runs"]
    rates = {name: [run["events_per_second"] for run in found] for name, found in runs.items()}
    rows = []
    for peer in PEERS:
        if peer.name not in runs:
            continue
        found = runs[peer.name]
        package, version = next(iter(result["versions"][peer.name].items()))
        compared = figures.ratio(rates[OURS], rates[peer.name]) if OURS in rates and peer.name != OURS else None
        rows.append(
            [
                peer.label if peer.name == OURS else f"{peer.label} ({package} {version})",
                figures.figure(rates[peer.name]).show(figures.whole),
                figures.figure([run["cpu_us_per_event"] for run in found]).show(figures.tenth),
                figures.whole(figures.figure([run["rss_bytes"] for run in found]).median / 2**20),
                compared.show(figures.times) if compared else "",
                f"≥ {figures.times(peer.target)}" if peer.target else "",
                figures.verdict(is_met=compared.median >= peer.target) if compared and peer.target else "",
            ]
        )
    counts = {name: found[0]["events"] for name, found in runs.items()}
    most = max(counts.values())
    fewer = [f"{peer.label}: {counts[peer.name]:,}" for peer in PEERS if counts.get(peer.name, most) < most]
    repeated = sum(run.get("repeated_outputs", 0) for found in runs.values() for run in found)
    return f"""\
Every program does the same to each event: decode Avro, look a user's preferences up, fill in a sentence, encode Avro, publish
(`benchmarks/peers/body.py`). {most:,} events in 4 partitions{f" ({'; '.join(fewer)})" if fewer else ""}; the program on one core, the
broker on the others. The clock starts with the first event in hand, so that joining the group does not count, and stops when every
output is acknowledged, ours committed. The outputs of each run were then read and counted: one for each event\
{"" if not repeated else f" ({repeated:,} came more than once)"}.

This runner's row includes what the others' do not: a transaction a batch with outputs, changed rows and watermark; a fence against
earlier owners; preferences in a table recovered from its changelog, decoded at each look-up; and one changed row per event. Its
peers hold preferences decoded in a dict, keep no state, and promise at-least-once (Bytewax: nothing, as it commits nothing).

{figures.table(["program", "events/s", "CPU µs/event", "RSS MB", "ours ÷ it", "target", ""], rows)}

FastStream's outputs have no keys in the row with the target, which is its fastest way; everybody else's have, as ours must.
"""
