"""Outcomes of worker threads reach the loop: all of them, in order, and not all at once."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from kvstore.hands import AT_ONCE, Door, Ended
from kvstore.orders import Move, MoveKind, Outcome

COUNT = 500


def ended(number: int) -> tuple[Move, Outcome, str]:
    return Move(MoveKind.SPILL, number, None, b"", 0, 0), Outcome.DONE, ""


def test_who_asks_comes_between_them() -> None:
    async def play() -> list[Any]:
        loop = asyncio.get_running_loop()
        seen: list[Any] = []
        done = asyncio.Event()

        def take(moves: list[Ended]) -> None:
            seen.append([move.block for move, _, _ in moves])
            loop.call_soon(seen.append, "asked")  # by a client that was readable meanwhile
            if sum(len(one) for one in seen if one != "asked") == 2 * AT_ONCE + 1:
                loop.call_soon(done.set)

        door = Door(loop, take)
        for number in range(2 * AT_ONCE + 1):
            door.report(*ended(number))
        await asyncio.wait_for(done.wait(), 10)
        return seen

    numbers = list(range(2 * AT_ONCE + 1))
    assert asyncio.run(play()) == [
        numbers[:AT_ONCE],
        "asked",
        numbers[AT_ONCE : 2 * AT_ONCE],
        "asked",
        numbers[-1:],
        "asked",
    ]


def test_none_is_forgotten() -> None:
    """Threads report while the loop takes."""

    async def play() -> list[int]:
        loop = asyncio.get_running_loop()
        seen: list[int] = []
        done = asyncio.Event()

        def take(moves: list[Ended]) -> None:
            assert len(moves) <= AT_ONCE
            seen.extend(move.block for move, _, _ in moves)
            if len(seen) == 4 * COUNT:
                done.set()

        door = Door(loop, take)

        def work(first: int) -> None:
            for number in range(first, first + COUNT):
                door.report(*ended(number))

        threads = [threading.Thread(target=work, args=(at * COUNT,)) for at in range(4)]
        for thread in threads:
            thread.start()
        await asyncio.wait_for(done.wait(), 30)
        for thread in threads:
            thread.join()
        return seen

    seen = asyncio.run(play())
    assert sorted(seen) == list(range(4 * COUNT))
    for at in range(4):
        mine = [number for number in seen if number // COUNT == at]
        assert mine == sorted(mine)
