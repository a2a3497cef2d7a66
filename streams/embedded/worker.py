"""Several roles in one process: `python -m streams.embedded.worker ingest:6068 router:6069`.

On a laptop a process a role would cost a Python each. The apps are the same as in production, under the same ids and in
the same consumer groups, each with a web port of its own; only the event loop is shared.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mode import Service

from schemas.errors import NotifyError, SettingsError
from streams.app import EXIT_SETTINGS, Worker, build_app
from streams.roles import Role, step_back
from streams.settings import CLIENT_NEEDS, Settings
from streams.transport.faust_parts import PromptWorker

USAGE = "usage: python -m streams.embedded.worker ROLE:PORT [ROLE:PORT ...]"


class Together(Service):
    """Starts and stops apps at the same time; Faust's worker would wait for each before it begins the next."""

    def __init__(self, apps: Sequence[Worker], **options: Any) -> None:
        super().__init__(**options)
        self._apps = apps
        for app in apps:
            app.beacon.reattach(self.beacon)  # a crash of one ends the process

    async def on_start(self) -> None:
        """Return when every app has started."""
        for app in self._apps:
            app.in_worker = True
        await asyncio.gather(*(app.maybe_start() for app in self._apps))

    async def on_stop(self) -> None:
        """Return when every app has stopped."""
        await asyncio.gather(*(app.stop() for app in self._apps))


class SharedWorker(PromptWorker):
    """Faust's worker, running several apps."""

    def __init__(self, apps: Sequence[Worker]) -> None:
        self._apps = apps
        super().__init__(apps[0], loglevel="INFO", workdir=Path.cwd(), redirect_stdouts=False)

    def on_init_dependencies(self) -> Iterable[Any]:
        """Return the one service that is all apps."""
        super().on_init_dependencies()
        return [Together(self._apps, beacon=self.beacon, loop=self.loop)]


def build_apps(arguments: Sequence[str], settings: Settings) -> list[Worker]:
    """Return the app of each `role:port`. Raises SettingsError with a sentence for each that is not one."""
    problems: list[str] = []
    apps: list[Worker] = []
    for argument in arguments:
        name, _, port = argument.partition(":")
        if name not in set(Role) or not port.isdigit():
            problems.append(f"{argument!r} is not ROLE:PORT; the roles are {', '.join(Role)}")
            continue
        # a member of that name that comes back with another URL is handed its old assignment, and Faust refuses that
        member = f"{settings.worker_name}-{port}" if settings.worker_name else None
        apps.append(build_app(dataclasses.replace(settings, role=Role(name), web_port=int(port), worker_name=member)))
    if not arguments:
        problems.append(USAGE)
    if problems:
        raise SettingsError(problems)
    return apps


def main(arguments: Sequence[str]) -> None:
    """Run the roles that `arguments` name until a signal. Does not return."""
    try:
        settings = Settings.from_env(os.environ, needs=CLIENT_NEEDS)
        apps = build_apps(arguments, settings)
    except NotifyError as error:
        problems = error.problems if isinstance(error, SettingsError) else [str(error)]
        sys.stderr.write("This worker cannot start:\n" + "".join(f"  - {problem}\n" for problem in problems))
        raise SystemExit(EXIT_SETTINGS) from None
    step_back(app.role for app in apps)
    gc.freeze()  # what was imported stays for good: collections need not look at it again
    SharedWorker(apps).execute_from_commandline()


if __name__ == "__main__":
    main(sys.argv[1:])
