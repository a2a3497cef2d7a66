"""What a worker remembers of the schema registry, beside others that share its folder."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from schemas.errors import RegistryUnavailableError
from streams.registry import Registry
from streams.roles import Role
from streams.topics import TopicSpec, specs
from streams.topology import steps_of


async def a_server() -> TestServer:
    """Return a registry that gives each schema it is told of the next number."""
    numbers: dict[str, int] = {}

    async def register(request: web.Request) -> web.Response:
        return web.json_response({"id": numbers.setdefault((await request.json())["schema"], len(numbers) + 1)})

    app = web.Application()
    app.router.add_post("/subjects/{subject}/versions", register)
    server = TestServer(app)
    await server.start_server()
    return server


def of_role(role: Role) -> list[TopicSpec]:
    used = {topic for step in steps_of(role) for topic in (*step.reads, *step.writes)}
    return [spec for spec in specs() if spec.name in used]


async def test_workers_that_share_a_folder_and_start_together_each_start_again_without_the_registry(tmp_path: Path) -> None:
    server = await a_server()
    url = str(server.make_url(""))
    roles = (Role.INGEST, Role.ROUTER, Role.SENDER_CRITICAL, Role.SENDER_BULK, Role.SIGNALS, Role.VIEWS)
    async with AsyncExitStack() as closing:

        def registry() -> Registry:
            found = Registry(url, tmp_path)
            closing.push_async_callback(found.close)
            return found

        async def numbers() -> list[set[int]]:
            return [set(each.schemas) for each in await asyncio.gather(*(registry().codec("dev", of_role(role)) for role in roles))]

        met = await numbers()
        await server.close()
        assert await numbers() == met
        with pytest.raises(RegistryUnavailableError):
            await registry().codec("other", of_role(Role.INGEST))
