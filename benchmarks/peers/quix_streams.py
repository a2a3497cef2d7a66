"""Quix Streams: `apply` and `to_topic`, at least once, no state store."""

from __future__ import annotations

import os
import tempfile

from quixstreams import Application  # type: ignore[import-not-found]  # lives in this peer's own environment

from benchmarks.peers.body import Meter, all_preferences, handle


def main() -> None:
    """Run until the meter has enough."""
    preferences = all_preferences()
    meter = Meter()
    app = Application(
        broker_address=os.environ["BENCH_KAFKA"],
        consumer_group=os.environ["BENCH_RUN"],
        auto_offset_reset="earliest",
        auto_create_topics=False,
        use_changelog_topics=False,
        loglevel="ERROR",
        producer_extra_config={"linger.ms": 5, "enable.idempotence": True},
        commit_interval=1.0,
        state_dir=tempfile.mkdtemp(prefix="bench-quix-"),
    )
    source = app.topic(os.environ["BENCH_INPUT"], value_deserializer="bytes", key_deserializer="bytes")
    target = app.topic(os.environ["BENCH_OUTPUT"], value_serializer="bytes", key_serializer="bytes")

    def notify(raw: bytes) -> bytes:
        meter.begin()
        meter.add()
        return handle(raw, preferences)[1]

    app.dataframe(source).apply(notify).to_topic(target)
    app.run(count=meter.wanted, collect=False)
    meter.done()


if __name__ == "__main__":
    main()
