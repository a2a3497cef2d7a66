"""A subscriber of status changes as a test needs it: verifies what it is told with the standard's own library, and can fail."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from standardwebhooks import Webhook


@dataclass(frozen=True, slots=True)
class Told:
    """A message that was verified."""

    message_id: str
    message: dict[str, Any]


@dataclass(kw_only=True)
class Subscriber:
    """`answers`: statuses, or `drop` and `hang`, for the next calls; then 204. What it answers 2xx is in `told`."""

    secret: str
    answers: deque[int | str] = field(default_factory=deque)
    headers: dict[str, str] = field(default_factory=dict)
    told: list[Told] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)  # ids, in the order of the calls
    forged: int = 0
    url: str = ""
    called: asyncio.Event = field(default_factory=asyncio.Event)
    _hanging: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        message_id = request.headers["webhook-id"]
        self.calls.append(message_id)
        self.called.set()
        try:
            Webhook(self.secret).verify(body, dict(request.headers))
        except Exception:
            self.forged += 1
            return web.Response(status=401)
        answer = self.answers.popleft() if self.answers else 204
        if answer == "drop":
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        if answer == "hang":
            await self._hanging.wait()
            return web.Response()
        status = int(answer)
        if 200 <= status < 300:
            self.told.append(Told(message_id, json.loads(body)))
        return web.Response(status=status, headers=self.headers)

    def script(self, *answers: int | str) -> None:
        """Answer so from now on, one after the other."""
        self.answers = deque(answers)

    def ids(self) -> set[str]:
        return {each.message_id for each in self.told}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Subscriber]:
        application = web.Application()
        application.router.add_post("/hooks/{tail:.*}", self.answer)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        (address,) = runner.addresses
        self.url = f"http://127.0.0.1:{address[1]}/hooks/orders?tenant=7"
        try:
            yield self
        finally:
            self._hanging.set()
            await runner.cleanup()


def statuses(told: Iterable[Told]) -> list[str]:
    """Return what was told, in order, as the words of its statuses."""
    return [each.message["data"]["status"] for each in told]
