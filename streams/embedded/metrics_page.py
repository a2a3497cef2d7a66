"""One address for the metrics of every role: `notify up` has seven, and nobody wants to type seven ports.

Each sample gets the label `role`; families with the same name are joined, as the exposition format demands.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import aiohttp
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from streams.embedded.processes import LOOPBACK
from streams.roles import Role

TIMEOUT: Final = aiohttp.ClientTimeout(total=5)
_SAMPLE: Final = re.compile(r"([A-Za-z_:][A-Za-z0-9_:]*)(?:\{(.*)\})? (\S+.*)")


@dataclass(slots=True)
class _Family:
    comments: list[str] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)


class MetricsPage:
    """Serves `/metrics` on `port`, gathered from the roles whenever it is asked for."""

    def __init__(self, port: int, roles: Mapping[Role, int]) -> None:
        self.url = f"http://{LOOPBACK}:{port}/metrics"
        self._port = port
        self._roles = dict(roles)
        self._session: aiohttp.ClientSession | None = None
        application = web.Application()
        application.router.add_get("/metrics", self._answer)
        self._runner = web.AppRunner(application, access_log=None, handle_signals=False)

    async def start(self) -> None:
        """Listen. Raises OSError when the port is taken."""
        self._session = aiohttp.ClientSession(timeout=TIMEOUT)
        await self._runner.setup()
        await web.TCPSite(self._runner, LOOPBACK, self._port, shutdown_timeout=0.2).start()

    async def stop(self) -> None:
        """Stop listening."""
        await self._runner.cleanup()
        if self._session is not None:
            await self._session.close()

    async def _answer(self, _request: web.Request) -> web.Response:
        texts = await asyncio.gather(*(self._ask(port) for port in self._roles.values()))
        gathered = join(dict(zip(self._roles, texts, strict=True)))
        return web.Response(body=gathered.encode(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _ask(self, port: int) -> str | None:
        assert self._session is not None
        try:
            async with self._session.get(f"http://{LOOPBACK}:{port}/metrics") as answer:
                return await answer.text() if answer.ok else None
        except (aiohttp.ClientError, TimeoutError):
            return None


def join(texts: Mapping[Role, str | None]) -> str:
    """Return the expositions of several roles as one. None: the role does not answer, which `notify_role_up` tells."""
    up = _Family(["# HELP notify_role_up 1 when the role's own page answers.", "# TYPE notify_role_up gauge"])
    families = {"notify_role_up": up}
    for role, text in texts.items():
        up.samples.append(f'notify_role_up{{role="{role}"}} {0 if text is None else 1}')
        family = up
        for line in (text or "").splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = families.setdefault(line.split(" ", 3)[2], _Family())
                if line not in family.comments:
                    family.comments.append(line)
            elif found := _SAMPLE.fullmatch(line):
                name, labels, value = found.groups()
                inside = f'role="{role}"' + (f",{labels}" if labels else "")
                family.samples.append(f"{name}{{{inside}}} {value}")
    return "".join("\n".join([*family.comments, *family.samples, ""]) for family in families.values())
