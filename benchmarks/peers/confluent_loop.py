"""A hand-written confluent-kafka loop: consume a thousand, handle, produce, commit once a second. No tables, no guarantees."""

from __future__ import annotations

import os
import time

from confluent_kafka import Consumer, Producer

from benchmarks.peers.body import LIBRDKAFKA_PRODUCER, Meter, all_preferences, handle


def main() -> None:
    """Run until the meter has enough."""
    kafka, output = os.environ["BENCH_KAFKA"], os.environ["BENCH_OUTPUT"]
    preferences = all_preferences()
    consumer = Consumer(
        {"bootstrap.servers": kafka, "group.id": os.environ["BENCH_RUN"], "auto.offset.reset": "earliest", "enable.auto.commit": False}
    )
    producer = Producer({"bootstrap.servers": kafka, **LIBRDKAFKA_PRODUCER, "delivery.report.only.error": True})
    consumer.subscribe([os.environ["BENCH_INPUT"]])
    meter = Meter()
    is_done = False
    committed_at = time.monotonic()
    while not is_done:
        messages = consumer.consume(1000, 0.5)
        if messages:
            meter.begin()
        for message in messages:
            key, value = handle(message.value() or b"", preferences)
            producer.produce(output, value, key)
        producer.poll(0)
        is_done = meter.add(len(messages))
        if messages and (is_done or time.monotonic() - committed_at > 1):
            producer.flush(30)
            consumer.commit(asynchronous=False)
            committed_at = time.monotonic()
    meter.done()


if __name__ == "__main__":
    main()
