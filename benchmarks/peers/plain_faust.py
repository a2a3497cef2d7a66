"""Faust as its documentation shows it: an agent, `await topic.send`, every setting that matters at its default."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from typing import Any

import faust

from benchmarks.peers.body import Meter, all_preferences, handle

PREFERENCES = all_preferences()
METER = Meter()

app = faust.App(
    os.environ["BENCH_RUN"],
    broker=f"kafka://{os.environ['BENCH_KAFKA']}",
    datadir=tempfile.mkdtemp(prefix="bench-faust-"),
    topic_allow_declare=False,  # the topics are there
    topic_disable_leader=True,
    topic_partitions=int(os.environ["BENCH_PARTITIONS"]),
    consumer_auto_offset_reset="earliest",
    web_enabled=False,
    worker_redirect_stdouts=False,
)
source = app.topic(os.environ["BENCH_INPUT"], key_type=bytes, value_type=bytes, value_serializer="raw")
target = app.topic(os.environ["BENCH_OUTPUT"], key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")


@app.agent(source)
async def notify(stream: Any) -> None:
    """Handle events one by one."""
    async for raw in stream:
        METER.begin()
        key, value = handle(raw, PREFERENCES)
        await target.send(key=key, value=value)
        if METER.add():
            await app.producer.flush()
            METER.done()


if __name__ == "__main__":
    logging.basicConfig(level="WARNING")
    sys.argv = ["faust", "worker", "-l", "warn", "--without-web"]
    app.main()
