"""Notes when a delivery into the inbox became visible: `python -m benchmarks.observer KAFKA TOPIC OUTPUT`.

Reads the topic `status` as the views do, committed records only, and writes `<delivery id> <seconds since 1970>` for each
critical in-app delivery that is `delivered`. Prints `ready` once it reads.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from confluent_kafka import OFFSET_END, Consumer, TopicPartition

from schemas.codec import unpack
from schemas.messages import StatusChange
from schemas.status import Status
from schemas.topics import Channel, Lane


def main(kafka: str, topic: str, output: Path) -> None:
    """Follow the topic from its end until the process ends."""
    consumer = Consumer(
        {
            "bootstrap.servers": kafka,
            "group.id": "bench-observer",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "fetch.wait.max.ms": 100,
            "log_level": 0,
        }
    )
    partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
    places = [TopicPartition(topic, number) for number in partitions]
    for place in places:
        # by number: OFFSET_END would be looked up with the first fetch, after the first records
        place.offset = consumer.get_watermark_offsets(place, timeout=10)[1]
        assert place.offset != OFFSET_END
    consumer.assign(places)
    print("ready", flush=True)
    # most are the backlog's: told apart without decoding them
    wanted = (Lane.CRITICAL.encode(), Channel.IN_APP.encode(), Status.DELIVERED.encode())
    with output.open("w", buffering=1) as out:
        while True:
            first = consumer.poll(1.0)
            if first is None:
                continue
            messages = [first, *consumer.consume(1_000, 0)]
            now = time.time()
            for message in messages:
                value = message.value()
                if message.error() is None and value is not None and all(word in value for word in wanted):
                    change = unpack(value[5:], StatusChange)
                    if change.status == Status.DELIVERED and change.channel == Channel.IN_APP:
                        out.write(f"{change.delivery_id} {now:.6f}\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
