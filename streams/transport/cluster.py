"""What librdkafka is told about the cluster, in one place, and what happens when the cluster says no for good."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from streams.security import KafkaSecurity

log = logging.getLogger(__name__)

# the exit code of a worker that left because it was fenced or could not go on; a supervisor starts it again
LEFT_EXIT_CODE = 75


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """How to reach Kafka: bootstrap servers and whatever else every client is configured with."""

    bootstrap: str
    security: KafkaSecurity = field(default_factory=KafkaSecurity)
    extra: Mapping[str, object] = field(default_factory=dict)

    def config(self, **more: object) -> dict[str, Any]:
        """Return the configuration of a client, with `more` on top (underscores stand for dots).

        Raises SettingsError when what the security needs is not installed.
        """
        return {
            "bootstrap.servers": self.bootstrap,
            "log_level": 3,
            "socket.keepalive.enable": True,
            "reconnect.backoff.ms": 50,
            "reconnect.backoff.max.ms": 1_000,
            "logger": RateLimited(logging.getLogger("streams.librdkafka"), seconds=30.0),
            **self.security.librdkafka(),
            **self.extra,
            **{name.replace("_", "."): value for name, value in more.items()},
        }

    def reading(self, group: str, *, fetch_wait_ms: int) -> dict[str, Any]:
        """Return the configuration of a consumer that is told where to read, sees committed records and commits nothing.

        `fetch_wait_ms`: how long the broker may hold an empty answer back, and so how late an end is noticed.
        """
        return self.config(
            group_id=group,
            enable_auto_commit=False,
            enable_auto_offset_store=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            enable_partition_eof=True,
            fetch_wait_max_ms=fetch_wait_ms,
            fetch_error_backoff_ms=20,
            fetch_queue_backoff_ms=10,
            fetch_message_max_bytes=2_097_152,
            topic_metadata_refresh_fast_interval_ms=20,
            queued_max_messages_kbytes=32_768,
        )


class RateLimited(logging.LoggerAdapter[logging.Logger]):
    """Passes each distinct message at most once in `seconds`: an absent broker is said once, not a hundred times a second."""

    def __init__(self, logger: logging.Logger, *, seconds: float) -> None:
        super().__init__(logger, {})
        self._seconds = seconds
        self._said: dict[str, float] = {}

    def log(self, level: int, msg: object, *args: object, **_options: object) -> None:
        """Log unless the same was said a moment ago."""
        said = str(args[0]) if args else str(msg)
        now = time.monotonic()
        if now - self._said.get(said, -self._seconds) >= self._seconds:
            self._said = {said: now} | {k: t for k, t in self._said.items() if now - t < self._seconds}
            super().log(level, msg, *args)


def leave(reason: str) -> NoReturn:
    """End the process at once. Whatever was promised is in Kafka; an orderly stop of a fenced worker only hangs."""
    log.critical("worker.left reason=%r", reason)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(LEFT_EXIT_CODE)
