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

from kvstore.eviction.arc import ARC
from kvstore.eviction.base import Policy
from kvstore.eviction.fifo import FIFO
from kvstore.eviction.lfu import LFU
from kvstore.eviction.lru import LRU
from kvstore.eviction.mq import GHOSTS, MQ
from kvstore.eviction.s3fifo import S3FIFO
from kvstore.eviction.wtinylfu import WTinyLFU
from tests.eviction.told import Told, come

CAPACITY = 64
# What lives in a family is made as one that tells its family of the keys first.
FACTORIES: tuple[Callable[[int], Policy], ...] = (Told, LRU, FIFO, LFU, S3FIFO, ARC, MQ, WTinyLFU)


@pytest.fixture(
    params=FACTORIES, ids=lambda made: "relevance" if made is Told else made.__name__.lower()
)
def make(request: pytest.FixtureRequest) -> Callable[[int], Policy]:
    made: Callable[[int], Policy] = request.param
    return made


@pytest.fixture
def policy(make: Callable[[int], Policy]) -> Policy:
    return make(CAPACITY)


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
        come(policy, [1, 2], [leaf], 1.0 + step)
        policy.touch([1, 2, leaf], 1.0 + step)
        policy.warm([1, 2], 1.0 + step)
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


def test_what_has_to_stay_is_passed_by(policy: Policy) -> None:
    for block in range(40):  # what they depend on may be spared with them: nothing here
        policy.admit([block], 0.0)
    policy.touch([3], 1.0)
    named, victims = list[int](), policy.victims(9.0)
    key = next(victims, None)
    while key is not None:
        named.append(key)
        try:
            key = victims.send(key % 3 == 0)
        except StopIteration:
            break
    assert sorted(named) == list(range(40)) and len(policy) == 40


def test_others_leave_before_what_was_warmed(policy: Policy) -> None:
    for key in (1, 2, 3):
        policy.admit([key], 0.0)
    first = order(policy)[0]
    come(policy, [first], [9], 1.0)
    assert order(policy).index(9) < order(policy).index(first) and len(policy) == 4


def test_others_leave_before_what_was_deferred(policy: Policy) -> None:
    """It is named after them; nobody is left out."""
    for key in (1, 2, 3):
        policy.admit([key], 0.0)
    victims = policy.victims(9.0)
    first = next(victims)
    victims.send(True)
    victims.close()
    policy.defer([first])
    named = order(policy)
    assert named[0] != first and sorted(named) == [1, 2, 3]


def test_what_was_dropped_is_a_stranger(make: Callable[[int], Policy]) -> None:
    """The number of a dropped block is given to another, which must not inherit its worth."""
    old, new = make(CAPACITY), make(CAPACITY)
    for policy in (old, new):
        policy.admit(range(100, 140), 0.0)
    for at in range(3):
        old.admit([7], 1.0)
        old.touch([7, 7, 7][:at], 1.0)
        old.forget([7])
    old.drop([7])
    for policy in (old, new):
        policy.admit([7], 2.0)
        policy.admit(range(200, 210), 3.0)
    assert order(old) == order(new)


def remembered(thing: object, seen: set[int]) -> int:
    """Entries in all containers below an object."""
    if id(thing) in seen or isinstance(thing, int | float | str | bytearray):
        return 0
    seen.add(id(thing))
    parts: list[Any] = list(getattr(thing, "__dict__", {}).values())
    if isinstance(thing, dict):
        parts += thing.values()
    elif isinstance(thing, list | tuple):
        parts += thing
    elif hasattr(thing, "maxsize"):
        return len(thing)  # type: ignore[arg-type]
    count = len(thing) if isinstance(thing, dict) else 0
    return count + sum(remembered(part, seen) for part in parts)


def test_ghosts_are_bounded(policy: Policy) -> None:
    for key in range(40 * CAPACITY):
        policy.admit([key], float(key))
        policy.touch([key], float(key))
        if len(policy) > CAPACITY:
            policy.forget(list(islice(policy.victims(0.0), 1)))
    assert len(policy) == CAPACITY
    assert remembered(policy, set()) <= (3 + GHOSTS) * CAPACITY


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


# -- the others beside what is obviously right --------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_lfu_beside_a_sort(seed: int) -> None:
    chance, lfu = random.Random(seed), LFU(20)
    model: dict[int, tuple[int, int]] = {}  # count, when last
    for step in range(400):
        key = chance.randrange(30)
        if key not in model:
            lfu.admit([key], 0.0)
            model[key] = (1, step)
        elif chance.random() < 0.7:
            lfu.touch([key], 0.0)
            model[key] = (model[key][0] + 1, step)
        else:
            lfu.forget([key])
            del model[key]
        assert order(lfu) == sorted(model, key=model.__getitem__)


@pytest.mark.parametrize("seed", range(5))
def test_arc_beside_four_lists(seed: int) -> None:
    chance, room = random.Random(seed), 8
    arc, target = ARC(room), 0.0
    t1, t2, b1, b2 = list[int](), list[int](), list[int](), list[int]()
    for _ in range(600):
        key = min(chance.randrange(24), chance.randrange(24))
        if key in t1 or key in t2:
            arc.touch([key], 0.0)
            (t1 if key in t1 else t2).remove(key)
            t2.append(key)
            continue
        if len(t1) + len(t2) == room:
            first, ghost = (t1, b1) if len(t1) > target or not t2 else (t2, b2)
            assert order(arc)[0] == first[0]
            arc.forget(first[:1])
            ghost.append(first.pop(0))
        b1[:] = b1[max(0, len(t1) + len(b1) - room) :]
        if key in b1:
            target = min(room, target + max(1.0, len(b2) / len(b1)))
            b1.remove(key)
            t2.append(key)
        elif key in b2:
            target = max(0.0, target - max(1.0, len(b1) / len(b2)))
            b2.remove(key)
            t2.append(key)
        else:
            t1.append(key)
        arc.admit([key], 0.0)
        b1[:] = b1[max(0, len(t1) + len(b1) - room) :]
        b2[:] = b2[max(0, len(t1) + len(t2) + len(b1) + len(b2) - 2 * room) :]
        assert sorted(order(arc)) == sorted(t1 + t2)


def test_s3fifo_gives_a_second_chance_and_remembers_who_left_the_trial() -> None:
    policy = S3FIFO(10)
    for key in range(5):
        policy.admit([key], 0.0)
    policy.touch([0], 1.0)
    policy.touch([0], 1.0)
    assert order(policy) == [1, 2, 3, 4, 0]
    policy.forget([1])
    policy.admit([1], 2.0)
    assert order(policy) == [2, 3, 4, 0, 1]


def test_mq_lets_idle_blocks_sink() -> None:
    policy = MQ(4)
    policy.admit([1], 0.0)
    policy.touch([1], 0.0)
    policy.admit([2], 0.0)
    assert order(policy) == [2, 1], "asked for twice"
    for key in range(10, 30):
        policy.admit([key], 0.0)
    assert order(policy).index(1) < order(policy).index(29), "long ago"


def test_wtinylfu_keeps_a_frequent_block_from_newcomers() -> None:
    policy = WTinyLFU(4)
    for key in range(4):
        policy.admit([key], 0.0)
    policy.touch([0, 1, 2], 0.0)
    policy.admit([9], 1.0)
    assert order(policy)[:2] == [3, 9]


def test_wtinylfu_forgets_how_often_a_dropped_block_was_seen() -> None:
    policy = WTinyLFU(4)
    for at in range(3):
        policy.admit([3], 0.0)
        policy.forget([3])
        if at == 2:
            policy.drop([3])
    policy.admit([0], 0.0)
    policy.touch([0], 0.0)
    policy.admit([3], 0.0)
    assert order(policy)[0] == 3, "seen once, against twice"
