"""The providers of `notify up` that are not mail: an SMS carrier, Twilio and the three push services, simulated in one process.

They listen on any free ports of loopback and write what senders need, credentials and a file for NOTIFY_PROVIDERS_FILE, into
their folder; the file is there when all of them listen.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from streams.embedded.processes import Launch, Server, inherited_environment

PROVIDERS_FILE: Final = "providers.toml"
REPORTED_AFTER_SECONDS: Final = 0.3


class SimulatorsServer(Server):
    """The process that hosts them."""

    name = "simulators"
    stop_grace_seconds = 3

    def __init__(self, data_dir: Path, *, env: Mapping[str, str]) -> None:
        super().__init__(data_dir)
        self._env = env

    @property
    def providers_file(self) -> Path:
        """What NOTIFY_PROVIDERS_FILE should name."""
        return self.data_dir / PROVIDERS_FILE

    def ports(self) -> Sequence[int]:
        """Return none: it takes what is free."""
        return ()

    async def prepare(self) -> Launch:
        """Return how to start it: with the modules we run ourselves."""
        self.providers_file.unlink(missing_ok=True)
        return Launch(
            argv=[sys.executable, "-P", "-m", "streams.embedded.simulators", "--data-dir", str(self.data_dir)],
            cwd=self.data_dir,
            env=inherited_environment(self._env, PYTHONPATH=str(Path(__file__).parents[2]), PYTHONUNBUFFERED="1"),
        )

    async def is_ready(self) -> bool:
        """Return whether all of them listen."""
        return self.providers_file.exists()


async def host(data_dir: Path) -> None:
    """Run every simulator until a signal says stop."""
    from channels.simulators.registry import SIMULATORS, build_simulator  # what starts and stops the process has no use for them
    from channels.simulators.script import Script

    script = Script(receipts_delay=REPORTED_AFTER_SECONDS)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as running:
        tables: list[str] = []
        # mail has a server with an inbox page, and a subscriber of status changes carries nothing to users
        for name in SIMULATORS.keys() - {"smtp", "webhook"}:
            folder = data_dir / name
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            made = await running.enter_async_context(build_simulator(name, script=script, port=0, folder=folder))
            # a JSON text is a TOML text too
            tables.append(f"[providers.{name}]\nurl = {json.dumps(made.url)}\n")
        unfinished = data_dir / f"{PROVIDERS_FILE}.part"
        unfinished.touch(mode=0o600)
        unfinished.write_text("\n".join(tables), encoding="utf-8")
        os.replace(unfinished, data_dir / PROVIDERS_FILE)  # noqa: PTH105 - says what it does: at once
        await stop.wait()


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description="Simulated providers for `notify up`.")
    parser.add_argument("--data-dir", type=Path, required=True)
    asyncio.run(host(parser.parse_args().data_dir))


if __name__ == "__main__":
    main()
