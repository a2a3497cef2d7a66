"""The projection in PostgreSQL: the rows of the views' tables, whatever dies, and pages beyond what the tables keep."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from agents.inbox import Notification
from streams.embedded.stack import Stack
from tests.harness import System, system, wait_for

USERS = 6


@pytest.fixture
def world(stack: Stack, tmp_path: Path) -> Iterator[System]:
    with system(stack, tmp_path) as made:
        yield made


def fetch(url: str, query: str) -> list[asyncpg.Record]:
    async def ask() -> list[asyncpg.Record]:
        connection = await asyncpg.connect(url)
        try:
            return list(await connection.fetch(query))
        finally:
            await connection.close()

    return asyncio.run(ask())


def stored(url: str) -> dict[str, bytes]:
    """Return what PostgreSQL says, by notification id; each id once."""
    rows = fetch(url, "SELECT notification_id, document FROM notification")
    found = {row["notification_id"]: row["document"] for row in rows}
    assert len(found) == len(rows)
    return found


def test_thin(world: System) -> None:
    roles = ["router", "sender-normal", "views", "store"]
    url = world.use_database()
    workers = [world.start(role) for role in roles]
    world.await_ready(*workers)
    for n in range(20):
        done = world.notify("send", "--user", f"u-{n % USERS}", "--title", "t", "--message", f"m{n}")
        assert done.returncode == 0, done.stderr
    def same() -> bool:
        table = {key.decode(): value for key, value in world.rows("views.project.notifications").items()}
        return len(table) == 20 and stored(url) == table
    wait_for(same, seconds=30, what="same")
    print(world.workers["store-a"].get("/metrics")[1].decode())
    print(world.workers["store-a"].get("/health/ready"))
