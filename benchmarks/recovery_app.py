"""A worker of the product's own runner that recovers one table, says how long that took and how much memory it has, and ends."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from agents.ports import Effects, Source, State
from benchmarks.runner_app import PREFERENCES, resident_bytes
from schemas import topics
from schemas.codec import Codec
from streams.app import Plan, Worker, build_app
from streams.roles import Role
from streams.runner import Runner
from streams.settings import WORKER_NEEDS, Settings
from streams.shard import Input, Tools
from streams.topics import DEAD_MAX_BYTES, TopicSpec
from streams.topology import Step
from streams.transport.records import Record

ROLE = Role.SIGNALS


def step_of(run: str, changelog: str, *, is_aged: bool = False) -> Step:
    """Return a step whose one table has this changelog. It reads a topic in which there is nothing."""
    aged = (PREFERENCES,) if is_aged else ()
    return Step(name=run, role=ROLE, reads=(f"bench.in.{run}",), tables=((PREFERENCES, changelog),), aged=aged, writes=())


def specs_of(step: Step) -> tuple[TopicSpec, ...]:
    """Return the topics of the step."""
    return (
        *(TopicSpec(name=name) for name in step.reads),
        TopicSpec(name=topics.DEAD, max_message_bytes=DEAD_MAX_BYTES),
        *(TopicSpec(name=name, retention_seconds=None) for name in dict.fromkeys(step.changelogs().values())),
    )


class Acquired(logging.Handler):
    """Waits for the runner to say that it has acquired its shards, then writes the result and ends the process."""

    def __init__(self, app: Worker) -> None:
        super().__init__(logging.INFO)
        self._app = app
        self.began_bytes = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Look at one log record. `shards.acquired` carries the seconds it took."""
        if not str(record.msg).startswith("shards.acquired") or not isinstance(record.args, tuple) or self._app.runner is None:
            return
        grown = resident_bytes() - self.began_bytes
        seconds = record.args[-1]
        result = {"seconds": seconds, "rss_bytes": grown, **_sizes(self._app.runner)}
        Path(os.environ["BENCH_RESULT"]).write_text(json.dumps(result), "utf-8")
        os._exit(0)


def _sizes(runner: Runner) -> dict[str, float]:
    tables = [shard.tables[PREFERENCES] for shard in runner.shards.values()]
    count = sum(len(rows) for rows in tables)
    contents = sum(sys.getsizeof(key) + sys.getsizeof(value) for rows in tables for key, value in rows.items())
    payload = sum(len(key) + len(value) for rows in tables for key, value in rows.items())
    held = contents + sum(sys.getsizeof(rows) for rows in tables)
    return {"rows": count, "payload_bytes": payload, "bytes_per_row": held / max(1, count)}


def make() -> Worker:
    """Return the app that the environment asks for."""
    step = step_of(os.environ["BENCH_RUN"], os.environ["BENCH_SOURCE"], is_aged=bool(os.environ.get("BENCH_AGED")))

    def decode(record: Record) -> Record:
        return record

    def decide(_record: Record, _source: Source, _state: State) -> Effects:
        return Effects()

    def inputs(_step: Step, _codec: Codec) -> Mapping[str, Input]:
        return {step.reads[0]: Input(decode=decode, decide=decide)}

    def tune(_tools: Tools) -> None:
        acquired.began_bytes = resident_bytes()

    settings = Settings.from_env({k: v for k, v in os.environ.items() if k.startswith("NOTIFY_")}, needs=WORKER_NEEDS)
    app = build_app(settings, Plan(steps=(step,), topics=specs_of(step), inputs=inputs, tune=tune))
    acquired = Acquired(app)
    logging.getLogger("streams.runner").addHandler(acquired)
    return app


if __name__ == "__main__":
    make().main()
