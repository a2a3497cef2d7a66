"""jSMPP's simulator of an SMS carrier: a peer that others wrote, so that our reading of SMPP is not proved by itself.

It cannot be told an address, and listens on all of them. Its port is chosen anew each time, and it holds nothing but tests.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from streams.embedded.artifacts import default_cache_dir, java, obtain_carrier
from streams.embedded.processes import LOOPBACK, Launch, Server, choose_port, inherited_environment

SYSTEM_ID, PASSWORD = "j", "jpwd"


class JsmppServer(Server):
    """The simulator. `url` is how a provider is configured with it: its receipts write ids in decimal, its answers in hexadecimal."""

    name = "carrier"

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir)
        self.port = choose_port()

    @property
    def url(self) -> str:
        return f"smpp://{SYSTEM_ID}:{PASSWORD}@{LOOPBACK}:{self.port}?from=1616&receipt_ids=decimal"

    def ports(self) -> Sequence[int]:
        return (self.port,)

    async def prepare(self) -> Launch:
        class_path = await obtain_carrier(default_cache_dir(os.environ), lambda _: None)
        flags = [
            "-Xmx64m",
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=info",
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
            "-XX:-UsePerfData",
            f"-Djsmpp.simulator.port={self.port}",
        ]
        return Launch(
            argv=[str(java()), *flags, "-cp", class_path, "org.jsmpp.examples.SMPPServerSimulator"],
            cwd=self.data_dir,
            env=inherited_environment(os.environ),
        )

    async def is_ready(self) -> bool:
        # not by connecting: it would wait a minute for that connection's bind before it accepts the next
        return self.process is not None and "Listening on port" in self.process.log_end()
