"""Work that is put off until the event loop has a quiet moment. The loop is called by hand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import cast

import pytest

from kvstore import busy_poll
from kvstore.busy_poll import BARRED, LONGER, REST_S, BusyPoll
from tests.loop_by_hand import Loop

WINDOW_S = 0.001


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 10.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(busy_poll, "time", type("Time", (), {"monotonic": clock}))
    return clock


def awake(loop: Loop, window_s: float = WINDOW_S) -> BusyPoll:
    return BusyPoll(cast(asyncio.AbstractEventLoop, loop), window_s)


def pieces(count: int, done: list[int]) -> Callable[[], bool]:
    def work() -> bool:
        done.append(len(done))
        return len(done) < count

    return work


def test_work_waits_for_a_quiet_moment(loop: Loop, clock: Clock) -> None:
    poll, done = awake(loop), list[int]()
    poll.served()
    assert poll.later(pieces(2, done))
    loop.step()
    assert not done
    clock.now += REST_S * 1.01
    loop.step()
    assert done == [0], "a piece at a time: events are looked for in between"
    loop.step()
    assert done == [0, 1]
    loop.step()
    assert done == [0, 1]


def test_a_request_puts_work_off_again(loop: Loop, clock: Clock) -> None:
    poll, done = awake(loop), list[int]()
    poll.served()
    poll.later(pieces(1, done))
    for _ in range(5):
        clock.now += REST_S * 0.9
        poll.served()
        loop.step()
    assert not done
    clock.now += REST_S * 1.01
    loop.step()
    assert done == [0]


def test_it_does_not_sleep_before_the_work_is_done(loop: Loop, clock: Clock) -> None:
    poll, done = awake(loop), list[int]()
    poll.served()
    poll.later(pieces(3, done))
    clock.now += 2 * WINDOW_S
    rounds = 0
    while loop.soon:
        loop.step()
        rounds += 1
        assert rounds < 10
    assert done == [0, 1, 2]
    assert not poll.later(pieces(1, done)), "it sleeps now"


def test_work_is_noted_once(loop: Loop, clock: Clock) -> None:
    poll, done = awake(loop), list[int]()
    work = pieces(1, done)
    poll.served()
    assert poll.later(work)
    assert poll.later(work)
    clock.now += 2 * REST_S
    loop.step()
    loop.step()
    assert done == [0]


def test_work_that_fails_is_not_the_end(loop: Loop, clock: Clock) -> None:
    def fail() -> bool:
        raise ValueError("a defect")

    poll, done = awake(loop), list[int]()
    poll.served()
    poll.later(fail)
    poll.later(pieces(1, done))
    clock.now += 2 * REST_S
    with pytest.raises(ValueError, match="a defect"):
        loop.step()
    loop.step()
    assert done == [0]
    clock.now += 2 * WINDOW_S
    while loop.soon:
        loop.step()
    assert not poll.later(fail), "it sleeps now"


def awake_for(poll: BusyPoll, loop: Loop, clock: Clock) -> float:
    """A request comes now; for how many windows the loop stays awake after it."""
    poll.served()
    started, step_s = clock.now, WINDOW_S / 16
    while loop.soon:
        loop.step()
        clock.now += step_s
    return (clock.now - started) / WINDOW_S


def test_it_waits_for_who_is_away_for_longer(loop: Loop, clock: Clock) -> None:
    poll = awake(loop)
    assert awake_for(poll, loop, clock) == pytest.approx(1, abs=0.2)
    clock.now += WINDOW_S  # a request two windows after the last one
    for _ in range(2):
        assert awake_for(poll, loop, clock) == pytest.approx(LONGER, abs=0.2)
        clock.now -= WINDOW_S
    clock.now += 2 * WINDOW_S
    assert awake_for(poll, loop, clock) == pytest.approx(1, abs=0.2), "that was in vain"


def test_requests_that_follow_at_once_change_nothing(loop: Loop, clock: Clock) -> None:
    poll = awake(loop)
    for away_windows, expected in (
        (2, LONGER),
        (0.5, LONGER),
        (10, 1),
        (0.5, 1),
        (LONGER - 1, LONGER),
    ):
        poll.served()
        clock.now += away_windows * WINDOW_S
        poll.served()
        assert poll._until - clock.now == pytest.approx(expected * WINDOW_S)


def test_it_gives_way_to_who_needs_the_processor(loop: Loop, clock: Clock) -> None:
    poll = awake(loop)
    poll.served()
    clock.now += 2 * WINDOW_S
    poll.served()
    loop.step()
    clock.now += 1.5 * WINDOW_S  # others ran on it
    loop.step()
    assert not loop.soon, "it sleeps"
    for windows in [1] * BARRED + [LONGER]:
        clock.now += 2 * WINDOW_S
        poll.served()
        assert poll._until - clock.now == pytest.approx(windows * WINDOW_S)


@pytest.mark.parametrize("window_s", [0.0, WINDOW_S])
def test_who_sleeps_takes_no_work(loop: Loop, window_s: float) -> None:
    assert not awake(loop, window_s).later(lambda: False)


def test_a_short_window_has_quiet_moments_too(loop: Loop) -> None:
    poll, done = awake(loop, REST_S / 2), list[int]()
    poll.served()
    assert poll.later(pieces(1, done))
    deadline = time.monotonic() + 10
    while loop.soon and time.monotonic() < deadline:
        loop.step()
    assert done == [0]
