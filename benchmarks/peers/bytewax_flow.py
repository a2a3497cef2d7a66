"""Bytewax: a Kafka source, `map`, a Kafka sink. Commits nothing and recovers nothing; reads the topic to its end."""

from __future__ import annotations

import os
from typing import Any

import bytewax.operators as op  # type: ignore[import-not-found]  # lives in this peer's own environment
from bytewax.connectors.kafka import KafkaSink, KafkaSinkMessage, KafkaSource  # type: ignore[import-not-found]  # as above
from bytewax.dataflow import Dataflow  # type: ignore[import-not-found]  # as above
from bytewax.testing import run_main  # type: ignore[import-not-found]  # as above

from benchmarks.peers.body import Meter, all_preferences, handle


def main() -> None:
    """Run until the topic's end."""
    kafka = [os.environ["BENCH_KAFKA"]]
    preferences = all_preferences()
    meter = Meter()

    def notify(message: Any) -> Any:
        meter.begin()
        meter.add()
        key, value = handle(message.value, preferences)
        return KafkaSinkMessage(key, value)

    flow = Dataflow("benchmark")
    stream = op.input("in", flow, KafkaSource(kafka, [os.environ["BENCH_INPUT"]], tail=False, batch_size=1000))
    sink = KafkaSink(kafka, os.environ["BENCH_OUTPUT"], add_config={"linger.ms": "5", "enable.idempotence": "true"})
    op.output("out", op.map("notify", stream, notify), sink)
    run_main(flow)
    meter.done()


if __name__ == "__main__":
    main()
