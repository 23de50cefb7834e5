"""The contract of `Policy`, which every policy passes; a new one is one more line in FACTORIES."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from types import FrameType
from typing import Any

import pytest

from kvstore.eviction.base import Policy
from kvstore.eviction.lru import LRU

FACTORIES: tuple[Callable[[], Policy], ...] = (LRU,)


@pytest.fixture(params=FACTORIES, ids=lambda factory: factory.__name__.lower())
def policy(request: pytest.FixtureRequest) -> Policy:
    made: Policy = request.param()
    return made


def order(policy: Policy, now: float = 9.0) -> list[int]:
    return list(policy.victims(now))


def test_a_new_policy_is_empty(policy: Policy) -> None:
    assert len(policy) == 0 and 1 not in policy and order(policy) == []


def test_what_is_admitted_is_resident_until_it_is_forgotten(policy: Policy) -> None:
    policy.admit([1, 2, 3], 0.0)
    assert len(policy) == 3 and all(key in policy for key in (1, 2, 3))
    policy.forget([2])
    assert len(policy) == 2 and 2 not in policy and sorted(order(policy)) == [1, 3]
    policy.admit([2], 1.0)
    assert len(policy) == 3 and 2 in policy


def test_every_resident_key_is_named_once(policy: Policy) -> None:
    policy.admit(range(100), 0.0)
    policy.touch(range(0, 100, 3), 1.0)
    policy.forget(range(0, 100, 5))
    named = order(policy)
    assert sorted(named) == [key for key in range(100) if key % 5]


def test_strangers_are_passed_over(policy: Policy) -> None:
    policy.admit([1, 2], 0.0)
    policy.touch([7, 1, 8], 1.0)
    policy.forget([9, 8])
    assert len(policy) == 2 and sorted(order(policy)) == [1, 2] and 7 not in policy


def test_nothing_is_admitted_twice(policy: Policy) -> None:
    policy.admit([1], 0.0)
    with pytest.raises(AssertionError, match="admitted twice"):
        policy.admit([1], 1.0)


def test_no_keys_is_no_change(policy: Policy) -> None:
    policy.admit([1, 2], 0.0)
    before = order(policy)
    policy.admit([], 1.0)
    policy.touch([], 1.0)
    policy.forget([])
    assert order(policy) == before


def test_naming_victims_changes_nothing(policy: Policy) -> None:
    policy.admit(range(50), 0.0)
    policy.touch(range(20, 30), 1.0)
    before = order(policy)
    for looked_at in (0, 1, 7, 50):
        assert list(islice(policy.victims(9.0), looked_at)) == before[:looked_at]
        assert order(policy) == before and len(policy) == 50


@pytest.mark.parametrize("touches", [0, 1, 3])
def test_the_leaf_goes_before_what_it_depends_on(policy: Policy, touches: int) -> None:
    """Of one prefix the last block is worth least: the others are of use without it."""
    policy.admit([10, 11, 12, 13], 0.0)
    policy.admit([20, 21], 0.0)
    for at in range(touches):
        policy.touch([10, 11, 12, 13], 1.0 + at)
        policy.touch([20, 21], 1.0 + at)
    named = order(policy)
    assert [key for key in named if key < 20] == [13, 12, 11, 10]
    assert [key for key in named if key >= 20] == [21, 20]


def test_a_shared_prefix_outlives_its_branches(policy: Policy) -> None:
    policy.admit([1, 2, 3], 0.0)
    for step, leaf in enumerate((30, 31, 32)):
        policy.admit([leaf], 1.0 + step)
        policy.touch([1, 2, leaf], 1.0 + step)
    named = order(policy)
    assert named.index(1) > named.index(2) > max(named.index(leaf) for leaf in (3, 30, 31))


@pytest.mark.parametrize("seed", range(5))
def test_any_history_keeps_the_books(policy: Policy, seed: int) -> None:
    chance, resident = random.Random(seed), set[int]()
    for step in range(400):
        keys = chance.sample(range(60), chance.randint(0, 8))
        verb = chance.choice(("admit", "touch", "forget", "evict"))
        if verb == "admit":
            policy.admit([key for key in keys if key not in resident], float(step))
            resident.update(keys)
        elif verb == "touch":
            policy.touch(keys, float(step))
        else:
            if verb == "evict":
                keys = list(islice(policy.victims(float(step)), len(keys)))
            policy.forget(keys)
            resident.difference_update(keys)
        assert len(policy) == len(resident)
        assert sorted(order(policy, float(step))) == sorted(resident)
        assert all((key in policy) == (key in resident) for key in range(60))


class Counted(int):
    """A key that counts how often it is hashed or compared: the work that a container does."""

    work = 0

    def __hash__(self) -> int:
        Counted.work += 1
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        Counted.work += 1
        return super().__eq__(other)


def work_of(call: Callable[[], Any]) -> int:
    """Lines that a call runs, and keys that it hashes or compares. Time is never measured."""
    lines = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    Counted.work, before = 0, sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines + Counted.work


def shift(policy: Policy, fresh: Iterator[Counted], now: float) -> None:
    """One block in, one asked for, one out: what a full tier does all day."""
    policy.admit([next(fresh)], now)
    victim = next(iter(policy.victims(now)))
    policy.touch([victim], now)
    policy.forget([next(iter(policy.victims(now)))])


def test_the_work_for_a_block_does_not_grow_with_the_tier(policy: Policy) -> None:
    """Counted, not timed: the same steps cost the same among 100 blocks and among 20,000."""
    costs = []
    for size in (100, 20_000):
        fresh = (Counted(10**6 + at) for at in range(10**6))
        policy.forget(order(policy))
        policy.admit([Counted(at) for at in range(size)], 0.0)
        costs.append(sum(work_of(partial(shift, policy, fresh, 1.0)) for _ in range(200)))
    few, many = costs
    assert many <= 2 * few, f"{few} steps among 100 keys, {many} among 20,000"


# -- LRU alone ---------------------------------------------------------------------------------


def test_lru_names_the_idle_for_longest() -> None:
    lru = LRU()
    for key in range(5):
        lru.admit([key], float(key))
    lru.touch([0, 3], 9.0)
    assert order(lru) == [1, 2, 4, 3, 0], "within one access the last goes first"


@pytest.mark.parametrize("seed", range(3))
def test_lru_beside_a_list(seed: int) -> None:
    chance, lru, model = random.Random(seed), LRU(), list[int]()
    for step in range(300):
        keys = chance.sample(range(40), chance.randint(1, 6))
        new = [key for key in keys if key not in model]
        if chance.random() < 0.3:
            lru.forget(keys)
            model = [key for key in model if key not in keys]
        elif chance.random() < 0.5:
            lru.admit(new, float(step))
            model += new[::-1]
        else:
            lru.touch(keys, float(step))
            known = [key for key in keys if key in model]
            model = [key for key in model if key not in known] + known[::-1]
        assert order(lru) == model
