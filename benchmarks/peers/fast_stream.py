"""FastStream on aiokafka, in batches. BENCH_KEYED=1: each output has its user's key, as all other programs' outputs have.

Without it FastStream takes a shorter path, and its outputs go to any partition.
"""

from __future__ import annotations

import asyncio
import os

from faststream import AckPolicy  # type: ignore[import-not-found]  # lives in this peer's own environment
from faststream.kafka import KafkaBroker, KafkaPublishMessage  # type: ignore[import-not-found]  # as above

from benchmarks.peers.body import Meter, all_preferences, handle

PREFERENCES = all_preferences()
METER = Meter()
IS_KEYED = bool(os.environ.get("BENCH_KEYED"))

broker = KafkaBroker(os.environ["BENCH_KAFKA"], logger=None, graceful_timeout=5, acks="all", max_batch_size=262_144, linger_ms=0)
publisher = broker.publisher(os.environ["BENCH_OUTPUT"], batch=True)


async def raw_body(message: object) -> bytes:
    """Leave decoding to the body."""
    return message.body  # type: ignore[attr-defined, no-any-return]  # FastStream's own message


@broker.subscriber(  # type: ignore[untyped-decorator]  # as above
    os.environ["BENCH_INPUT"],
    batch=True,
    max_records=1000,
    decoder=raw_body,
    group_id=os.environ["BENCH_RUN"],
    auto_offset_reset="earliest",
    ack_policy=AckPolicy.ACK,
)
async def notify(messages: list[bytes]) -> None:
    """Handle a batch."""
    METER.begin()
    handled = [handle(raw, PREFERENCES) for raw in messages]
    if IS_KEYED:
        await publisher.publish(*[KafkaPublishMessage(value, key=key) for key, value in handled])
    else:
        await publisher.publish(*[value for _, value in handled])
    if METER.add(len(messages)):
        METER.done()


async def main() -> None:
    """Run until the meter has enough."""
    await broker.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
