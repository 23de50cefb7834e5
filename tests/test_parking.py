"""Requests that wait for room, and how often it is looked whether there is some."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from typing import Any, cast

import pytest

from kvstore.leases import Session
from kvstore.parking import FEW_KEYS, PAUSE_S_MAX, PAUSE_S_PER_KEY, Parking

WAIT_S = 5.0
MANY = 8 * FEW_KEYS
SOMEBODY = cast(Session, object())


class Timer:
    """A call that is due."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class Loop:
    """Time passes when it is told to."""

    def __init__(self) -> None:
        self.now = 10.0
        self._due: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, call: Any, *arguments: Any) -> Timer:
        timer = Timer(lambda: call(*arguments))
        heapq.heappush(self._due, (when, next(self._numbers), timer))
        return timer

    def call_later(self, delay_s: float, call: Any, *arguments: Any) -> Timer:
        return self.call_at(self.now + delay_s, call, *arguments)

    def go_to(self, when: float) -> None:
        while self._due and self._due[0][0] <= when:
            self.now, _, timer = heapq.heappop(self._due)
            if timer.call is not None:
                timer.call()
        self.now = when


class Desk:
    """A parking, and room that comes and goes."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.room = 0
        self.tries: list[tuple[str, float, bool]] = []
        self.answers: list[tuple[str, Any]] = []
        self.late = 0
        self.parking = Parking(
            cast(asyncio.AbstractEventLoop, self.loop), lambda: None, self._after_late
        )

    def _after_late(self) -> None:
        self.late += 1

    def park(self, name: str, keys: int, wait_s: float = WAIT_S) -> None:
        def attempt(last: bool) -> str | None:
            self.tries.append((name, self.loop.now, last))
            if not self.room and not last:
                return None
            self.room = max(0, self.room - 1)
            return name

        self.parking.park(
            SOMEBODY, wait_s, attempt, lambda reply: self.answers.append((name, reply)), keys
        )


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_few_keys_are_tried_whenever_room_may_have_come(desk: Desk) -> None:
    desk.park("few", FEW_KEYS)
    for _ in range(3):
        desk.parking.retry()
    assert len(desk.tries) == 3 and not desk.answers
    desk.room = 1
    desk.parking.retry()
    assert desk.answers == [("few", "few")] and not len(desk.parking)


def test_many_keys_are_tried_after_a_pause(desk: Desk) -> None:
    desk.park("many", MANY)
    began, pause_s = desk.loop.now, MANY * PAUSE_S_PER_KEY
    for step in range(1, 100):
        desk.loop.go_to(began + step * pause_s / 50)
        desk.parking.retry()
    assert len(desk.tries) == 1, "in two pauses, of which the last is not over"
    desk.room = 1
    desk.loop.go_to(began + 2.1 * pause_s)  # nobody says that room has come
    assert desk.answers == [("many", "many")] and len(desk.tries) == 2
    assert desk.late == 2, "what a try ordered is carried out"


def test_room_that_came_within_a_pause_is_found_after_it(desk: Desk) -> None:
    desk.park("many", 1_000_000)
    desk.room = 1
    desk.parking.retry()
    assert not desk.tries
    desk.loop.go_to(desk.loop.now + PAUSE_S_MAX)
    assert desk.answers == [("many", "many")]


def test_who_comes_later_waits_behind(desk: Desk) -> None:
    desk.park("many", MANY)
    desk.park("few", 1)
    desk.room = 2
    desk.parking.retry()
    assert not desk.answers
    desk.loop.go_to(desk.loop.now + 1.0)
    assert [name for name, _ in desk.answers] == ["many", "few"]


def test_a_deadline_does_not_wait_for_a_pause(desk: Desk) -> None:
    desk.park("many", MANY, wait_s=0.001)
    desk.loop.go_to(desk.loop.now + 0.002)
    assert desk.answers == [("many", "many")] and desk.tries[0][2], "the last try"
    desk.loop.go_to(desk.loop.now + 1.0)
    assert len(desk.tries) == 1 and not len(desk.parking)


def test_nobody_is_tried_whose_session_has_ended(desk: Desk) -> None:
    desk.park("many", MANY)
    desk.parking.retry()
    desk.parking.leave(SOMEBODY)
    desk.loop.go_to(desk.loop.now + WAIT_S + 1)
    assert not desk.tries and not desk.answers
