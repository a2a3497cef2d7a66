from __future__ import annotations

import asyncio

from streams.shard import Turns


async def test_the_most_urgent_takes_its_turn_first_and_turns_do_not_overlap() -> None:
    turns = Turns()
    order: list[int] = []
    working = 0

    async def work(urgency: int) -> None:
        nonlocal working
        await turns.take(urgency)
        working += 1
        assert working == 1
        order.append(urgency)
        working -= 1

    await asyncio.gather(*(work(urgency) for urgency in (3, 2, 3, 0, 1, 0, 2)))
    assert order == [0, 0, 1, 2, 2, 3, 3]


async def test_a_turn_whose_taker_is_gone_is_passed_on() -> None:
    turns = Turns()
    first = asyncio.create_task(turns.take(0))
    second = asyncio.create_task(turns.take(1))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait_for(second, 1)
