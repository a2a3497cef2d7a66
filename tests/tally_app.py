"""A step that counts records by key, on the product's own runner: the smallest thing whose every mistake shows.

Output `value:n` for the n-th record of a key. Values that begin with `bug` raise, with `large` become too large for the
output topic, with `slow` take 20 ms. TALLY_FAULT=`<point>:<n>` kills the worker at the n-th passage of a point;
with TALLY_SENT it waits before until something of an open transaction has reached the broker. TALLY_TIMEOUT_MS is how long the
broker waits for the end of a transaction, TALLY_POLL_SECONDS how long aiokafka bears with a consumer that fetches nothing.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping

from agents.ports import Effects, Output, Row, Source, State
from schemas import topics
from schemas.codec import Codec
from schemas.errors import UndecodableError
from streams import health
from streams.app import Plan, Worker, build_app
from streams.roles import Role
from streams.settings import WORKER_NEEDS, Settings
from streams.shard import Input, Tools
from streams.topics import DEAD_MAX_BYTES, TopicSpec
from streams.topology import Step
from streams.transport import writer
from streams.transport.admin import open_ends
from streams.transport.records import Record

READS = ("tally.urgent", "tally.in")
OUT = "tally.out"
STEP = Step(name="tally", role=Role.SIGNALS, reads=READS, tables=(("counts", None),), writes=(OUT,))
TOPICS = (
    *(TopicSpec(name=name) for name in READS),
    TopicSpec(name=OUT, max_message_bytes=50_000),
    TopicSpec(name=topics.DEAD, max_message_bytes=DEAD_MAX_BYTES),
    *(TopicSpec(name=name, retention_seconds=None) for name in dict.fromkeys(STEP.changelogs().values())),
)


def decode(message: Record) -> bytes:
    value = message.value()
    if value is None or value.startswith(b"\xff"):
        raise UndecodableError("begins with ff")
    return bytes(value)


def decide(value: bytes, source: Source, state: State) -> Effects:
    assert source.key is not None
    if value.startswith(b"bug"):
        raise ZeroDivisionError
    if value.startswith(b"slow"):
        time.sleep(0.02)
    n = int(state["counts"].get(source.key, b"0")) + 1
    text = b"%s:%d" % (value, n)
    if value.startswith(b"large"):
        text = text.ljust(200_000, b".")
    return Effects([Output(OUT, source.key, text)], [Row("counts", source.key, b"%d" % n)])


def inputs(_step: Step, _codec: Codec) -> Mapping[str, Input]:
    return dict.fromkeys(READS, Input(decode=decode, decide=decide))


def fault(spec: str, before: Callable[[], None]) -> Callable[[str], None]:
    """Return a hook that kills this process at the n-th passage of a point, after `before`."""
    point, _, count = spec.partition(":")
    left = int(count)

    def passed(name: str) -> None:
        nonlocal left
        if name == point:
            left -= 1
            if left == 0:
                before()
                os.kill(os.getpid(), signal.SIGKILL)

    return passed


def tune(tools: Tools) -> None:
    def await_sent() -> None:
        places = [(tools.names.physical[OUT], partition) for partition in range(tools.names.partitions[OUT])]
        while not open_ends(tools.cluster, places):
            pass  # each look is a question to the broker

    if spec := os.environ.get("TALLY_FAULT"):
        tools.fault = fault(spec, await_sent if os.environ.get("TALLY_SENT") else lambda: None)
    if os.environ.get("TALLY_BLIND"):
        # the runner believes that everything fits, so that the broker is the one to refuse
        tools.names = type(tools.names)(
            physical=tools.names.physical,
            logical=tools.names.logical,
            specs={**tools.names.specs, OUT: TopicSpec(name=OUT, max_message_bytes=DEAD_MAX_BYTES)},
            partitions=tools.names.partitions,
            ids=tools.names.ids,
        )


def make() -> Worker:
    if timeout_ms := os.environ.get("TALLY_TIMEOUT_MS"):
        writer.TRANSACTION_TIMEOUT_MS = int(timeout_ms)
        health.FORGOTTEN_SECONDS = 3 * int(timeout_ms) / 1000
        health.LOOK_AT_OPEN_EVERY_SECONDS = 0.5
    settings = Settings.from_env({k: v for k, v in os.environ.items() if k.startswith("NOTIFY_")}, needs=WORKER_NEEDS)
    app = build_app(settings, Plan(steps=(STEP,), topics=TOPICS, inputs=inputs, tune=tune))
    if poll_seconds := os.environ.get("TALLY_POLL_SECONDS"):
        app.conf.broker_max_poll_interval = float(poll_seconds)
    return app


if __name__ == "__main__":
    make().main()
