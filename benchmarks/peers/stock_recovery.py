"""Stock Faust recovers one table, values as raw bytes; measured from the assignment until its recovery says that it is done."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

import faust

app = faust.App(
    os.environ["BENCH_RUN"],
    broker=f"kafka://{os.environ['BENCH_KAFKA']}",
    datadir=tempfile.mkdtemp(prefix="bench-faust-"),
    topic_allow_declare=False,  # the topics are there
    topic_disable_leader=True,
    topic_partitions=int(os.environ["BENCH_PARTITIONS"]),
    table_standby_replicas=0,
    stream_recovery_delay=0.0,  # by default it waits a while first
    consumer_auto_offset_reset="earliest",
    web_enabled=False,
    worker_redirect_stdouts=False,
)
source = app.topic(os.environ["BENCH_INPUT"], key_type=bytes, value_type=bytes, value_serializer="raw")
changelog = app.topic(os.environ["BENCH_SOURCE"], key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")
table = app.Table(
    "preferences",
    partitions=int(os.environ["BENCH_PARTITIONS"]),
    key_type=bytes,
    value_type=bytes,
    changelog_topic=changelog,
)
RESULT = Path(os.environ["BENCH_RESULT"])
began: list[float] = []


@app.agent(source)
async def notify(stream: Any) -> None:
    """Use the table, as an agent would."""
    async for key in stream:
        table.get(key)


@app.on_partitions_assigned.connect
async def assigned(*_arguments: Any, **_more: Any) -> None:
    """Start the clock."""
    if not began:
        began.append(time.perf_counter())


@table.on_recover
async def recovered() -> NoReturn:
    """Stop it."""
    result = {"rows": len(table), "seconds": time.perf_counter() - began[0]}
    RESULT.write_text(json.dumps(result), "utf-8")  # noqa: ASYNC240 - the process ends here
    os._exit(0)


if __name__ == "__main__":
    logging.basicConfig(level="WARNING")
    sys.argv = ["faust", "worker", "-l", "warn", "--without-web"]
    app.main()
