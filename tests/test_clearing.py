"""`clear` drops what there is a few blocks at a time, and others are served in between."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from kvstore.clearing import Clearing
from tests.brain.desk import Desk
from tests.loop_by_hand import Loop

AT_ONCE = 4


class SoonLoop(Loop):
    """As an event loop takes calls with arguments."""

    def call_soon(self, call: Any, *arguments: Any) -> None:
        super().call_soon(lambda: call(*arguments))


class Room:
    """A store with a loop around it."""

    def __init__(self, dram: int) -> None:
        self.desk = Desk(dram)
        self.entry = self.desk.layout()
        self.loop = SoonLoop()
        self.answers: list[int] = []
        self.settled = 0
        self.clearing = Clearing(
            self.desk.store, cast(asyncio.AbstractEventLoop, self.loop), self._settle
        )
        self.clearing.at_once = AT_ONCE

    def _settle(self) -> None:
        self.settled += 1
        self.desk.store.digest(self.desk.now)

    def begin(self) -> int | None:
        reply = self.clearing.begin(lambda reply: self.answers.append(reply.forgotten))
        return None if reply is None else cast(int, reply.forgotten)

    def there(self) -> int:
        return len(self.desk.store.catalog)


@pytest.fixture
def room() -> Room:
    return Room(dram=4)


def test_few_are_dropped_at_once(room: Room) -> None:
    room.desk.put(room.entry, *range(AT_ONCE))
    assert room.begin() == AT_ONCE and not room.there()
    assert not room.loop.soon and not room.clearing.runs
    assert room.begin() == 0


def test_many_are_dropped_while_others_are_served(room: Room) -> None:
    room.desk.put(room.entry, *range(10))
    assert room.begin() is None and room.there() == 10 - AT_ONCE
    assert room.desk.tiers(room.entry, *range(6)) == [1] * 6, "the last ones go first"
    room.desk.put(room.entry, 77)
    room.loop.step()
    assert room.there() == 3 and not room.answers
    room.loop.step()
    assert room.answers == [10] and room.settled == 2
    assert not room.loop.soon and not room.clearing.runs
    assert room.desk.tiers(room.entry, 77) == [1], "it came afterwards"
    room.desk.look()


def test_layouts_follow_each_other(room: Room) -> None:
    other = room.desk.layout(2)
    room.desk.put(room.entry, 1, 2, 3)
    room.desk.put(other, 1, 2)
    assert room.begin() is None and room.there() == 1
    room.loop.step()
    assert room.answers == [5] and not room.there()


def test_nobody_remembers_what_was_evicted_before() -> None:
    room = Room(dram=1)
    for key in range(12):
        room.desk.put(room.entry, key)
    ghosts = room.desk.store.catalog.ghosts
    assert len(ghosts) == 8 and room.there() == 4
    assert room.begin() is None
    while room.loop.soon:
        room.loop.step()
    assert room.answers == [4] and not ghosts and not room.entry.index
    room.desk.look()


def test_what_was_forgotten_meanwhile_is_not_counted_twice(room: Room) -> None:
    room.desk.put(room.entry, *range(10))
    room.begin()
    assert room.desk.store.forget(room.entry, list(room.entry.index)[:2]) == 2
    while room.loop.soon:
        room.loop.step()
    assert room.answers == [8] and not room.there()


def test_a_daemon_that_stops_goes_no_further(room: Room) -> None:
    room.desk.put(room.entry, *range(10))
    room.begin()
    room.clearing.close()
    room.loop.step()
    assert room.there() == 6 and not room.answers and not room.loop.soon
