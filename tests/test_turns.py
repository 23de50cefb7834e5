"""Turns on the event loop: who goes before whom, and who waits. The loop is called by hand."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import cast

import pytest

from kvstore.limits import Bucket, Limits
from kvstore.protos import kvstore_pb2 as pb
from kvstore.turns import DEBT_S_MAX, LONG_PART, LONG_S, ROUND_S, Share, Turns, may_be_long
from tests.loop_by_hand import Loop


@pytest.fixture
def loop() -> Loop:
    return Loop()


def share_of(loop: Loop, turns: Turns | None = None, **limits: int) -> Share:
    bounds = Limits(**limits)
    return Share(cast(asyncio.AbstractEventLoop, loop), turns or Turns(), lambda: bounds, Counter())


def test_a_tenant_with_much_to_do_goes_round_by_round(loop: Loop) -> None:
    """Each turn takes half a round: three are over it, then the loop looks at the others."""
    share, other, went = share_of(loop), share_of(loop), []

    def turn(name: str, of: Share) -> Callable[[], None]:
        def go() -> None:
            went.append(name)
            of.took(0.0, ROUND_S * 0.4)

        return go

    for number in range(6):
        share.later(turn(f"busy {number}", share))
    assert share.full
    loop.step()
    assert went == ["busy 0", "busy 1", "busy 2"]
    other.later(turn("other", other))
    assert share.full, "who comes now has to go behind those that wait"
    loop.step()
    assert went[3:] == ["busy 3", "busy 4", "busy 5", "other"]
    loop.step()
    assert not loop.soon


def test_whoever_asks_again_goes_behind_the_others(loop: Loop) -> None:
    share, went = share_of(loop), []

    def greedy() -> None:
        went.append("greedy")
        if len(went) < 4:
            share.later(greedy)

    share.later(greedy)
    share.later(lambda: went.append("modest"))
    while loop.soon:
        loop.step()
    assert went == ["greedy", "modest", "greedy", "greedy"]


def test_a_failure_in_a_turn_does_not_end_the_rounds(loop: Loop) -> None:
    share, went = share_of(loop), []

    def broken() -> None:
        raise RuntimeError

    share.later(broken)
    share.later(lambda: went.append("next"))
    with pytest.raises(RuntimeError):
        loop.step()
    loop.step()
    assert went == ["next"]


def test_long_requests_wait_while_others_are_about(loop: Loop) -> None:
    turns = Turns()
    hostile, honest = share_of(loop, turns), share_of(loop, turns)
    now = time.monotonic()
    for _ in range(40):
        hostile.took(now - 0.025, now, long=True)
    assert hostile.wait_s(Bucket(), long=True) == 0.0, "alone, it may go on"
    honest.took(now, time.monotonic())
    wait_s = hostile.wait_s(Bucket(), long=True)
    assert wait_s == pytest.approx((DEBT_S_MAX - LONG_S) / LONG_PART, abs=0.3)
    assert hostile._limited == {"long_requests": 1}
    assert hostile.wait_s(Bucket(), long=False) == 0.0, "short ones do not wait"
    assert honest.wait_s(Bucket(), long=True) == 0.0, "others' debts are not its own"


def test_a_few_long_requests_do_not_wait(loop: Loop) -> None:
    turns = Turns()
    share = share_of(loop, turns)
    now = time.monotonic()
    share_of(loop, turns).took(now, now)
    share.took(now - LONG_S / 2, now, long=True)
    assert share.wait_s(Bucket(), long=True) == 0.0


def test_what_is_long() -> None:
    assert not may_be_long(pb.LOOKUP, 100)
    assert may_be_long(pb.LOOKUP, 1 << 20)
    assert may_be_long(pb.VERIFY, 0)


@pytest.mark.parametrize(
    ("limits", "limit"),
    [
        ({"requests_per_s": 10}, "requests_per_s"),
        ({"requests_per_s_tenant": 10}, "requests_per_s_tenant"),
    ],
)
def test_who_asks_too_fast_waits(loop: Loop, limits: dict[str, int], limit: str) -> None:
    share, bucket = share_of(loop, None, **limits), Bucket()
    for _ in range(12):
        assert share.wait_s(bucket, long=False) == 0.0
        share.paid(bucket, 0)
    assert 0.0 < share.wait_s(bucket, long=False) <= 0.3
    assert share._limited == {limit: 1}
