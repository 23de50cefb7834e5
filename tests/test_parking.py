"""Requests that wait for room, and how often it is looked whether there is some."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from kvstore.leases import Session
from kvstore.parking import FEW_KEYS, PAUSE_S_MAX, PAUSE_S_PER_KEY, Parking
from tests.simulate.clock import Clock, Process

WAIT_S = 5.0
MANY = 8 * FEW_KEYS
SOMEBODY = cast(Session, object())


class Desk:
    """A parking, and room that comes and goes."""

    def __init__(self) -> None:
        self.clock = Clock()
        self._loop = Process(self.clock, "parking")
        self.room = 0
        self.tries: list[tuple[str, float, bool]] = []
        self.answers: list[tuple[str, Any]] = []
        self.late = 0
        self.parking = Parking(
            cast(asyncio.AbstractEventLoop, self._loop), lambda: None, self._after_late
        )

    def _after_late(self) -> None:
        self.late += 1

    def go_to(self, when: float) -> None:
        """What is due until then happens."""
        there: list[bool] = []
        self._loop.call_at(when, there.append, True)
        while not there:
            event = self.clock.next()
            assert event is not None
            event.callback(*event.args)

    def park(self, name: str, keys: int, wait_s: float = WAIT_S) -> None:
        def attempt(last: bool) -> str | None:
            self.tries.append((name, self.clock.now, last))
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
    began, pause_s = desk.clock.now, MANY * PAUSE_S_PER_KEY
    for step in range(1, 100):
        desk.go_to(began + step * pause_s / 50)
        desk.parking.retry()
    assert len(desk.tries) == 1, "in two pauses, of which the last is not over"
    desk.room = 1
    desk.go_to(began + 2.1 * pause_s)  # nobody says that room has come
    assert desk.answers == [("many", "many")] and len(desk.tries) == 2
    assert desk.late == 2, "what a try ordered is carried out"


def test_room_that_came_within_a_pause_is_found_after_it(desk: Desk) -> None:
    desk.park("many", 1_000_000)
    desk.room = 1
    desk.parking.retry()
    assert not desk.tries
    desk.go_to(desk.clock.now + PAUSE_S_MAX)
    assert desk.answers == [("many", "many")]


def test_who_comes_later_waits_behind(desk: Desk) -> None:
    desk.park("many", MANY)
    desk.park("few", 1)
    desk.room = 2
    desk.parking.retry()
    assert not desk.answers
    desk.go_to(desk.clock.now + 1.0)
    assert [name for name, _ in desk.answers] == ["many", "few"]


def test_a_deadline_does_not_wait_for_a_pause(desk: Desk) -> None:
    desk.park("many", MANY, wait_s=0.001)
    desk.go_to(desk.clock.now + 0.002)
    assert desk.answers == [("many", "many")] and desk.tries[0][2], "the last try"
    desk.go_to(desk.clock.now + 1.0)
    assert len(desk.tries) == 1 and not len(desk.parking)


def test_nobody_is_tried_whose_session_has_ended(desk: Desk) -> None:
    desk.park("many", MANY)
    desk.parking.retry()
    desk.parking.leave(SOMEBODY)
    desk.go_to(desk.clock.now + WAIT_S + 1)
    assert not desk.tries and not desk.answers
