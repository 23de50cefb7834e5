"""What each policy is worth on a small seeded trace, and that the judge itself is right."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from kvstore.eviction.lru import LRU
from tests.eviction.anchors import BELADY, POLICIES
from tests.eviction.exact import Chain, belady, hit_ratio

CAPACITY = 120
# Hit ratios on `sessions(1)`. A change of a policy changes its line, and says why.
RATIOS = {
    "lru": 0.4838,
    "fifo": 0.3761,
    "lfu": 0.3588,
    "s3fifo": 0.3879,
    "arc": 0.4523,
    "mq": 0.4716,
    "wtinylfu": 0.4315,
    "belady": 0.6898,
}


def sessions(seed: int) -> list[Chain]:
    """Sessions that grow by a few blocks a turn, behind one of four system prompts, and end."""
    chance, fresh = random.Random(seed), iter(range(10**6))
    prompts = [[next(fresh) for _ in range(5)] for _ in range(4)]
    live: list[list[int]] = []
    requests: list[Chain] = []
    for _ in range(1_500):
        if len(live) < 12 or chance.random() < 0.1:
            live.append(list(chance.choice(prompts)))
        session = chance.choice(live)
        session += [next(fresh) for _ in range(chance.randint(1, 6))]
        requests.append(tuple(session))
        if chance.random() < 0.15 or len(session) > 60:
            live.remove(session)
    return requests


@pytest.mark.parametrize("name", [*POLICIES, BELADY])
def test_the_worth_of_a_policy(name: str) -> None:
    requests = sessions(1)
    if name == BELADY:
        ratio = belady(requests, CAPACITY)
    else:
        ratio = hit_ratio(requests, POLICIES[name](CAPACITY), CAPACITY, warm=name != "fifo")
    assert round(ratio, 4) == RATIOS[name]


def test_only_what_lies_behind_hits_is_a_hit() -> None:
    """Block 2 is there when the second request comes, but nothing of use before it."""
    assert hit_ratio([(1, 2), (9, 2)], LRU(), 3) == 0.0
    assert hit_ratio([(1, 2), (1, 2, 3)], LRU(), 3) == 2 / 3


@pytest.mark.parametrize("seed", range(4))
def test_nobody_beats_belady(seed: int) -> None:
    """Not even one who tries every choice: the best of all sets of residents, step by step."""
    chance = random.Random(seed)
    trees = [(1,), (1, 2), (1, 2, 3), (1, 4), (5,), (5, 6), (5, 6, 7)]
    requests = [chance.choice(trees) for _ in range(10)]
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for at, chain in enumerate(requests):
        after: dict[frozenset[int], int] = {}
        for kept, hits in best.items():
            found = next((i for i, block in enumerate(chain) if block not in kept), len(chain))
            value = hits + (found if 2 * at >= len(requests) else 0)
            blocks = sorted(kept | set(chain))
            for choice in combinations(blocks, min(3, len(blocks))):
                state = frozenset(choice)
                after[state] = max(after.get(state, 0), value)
        best = after
    total = sum(len(chain) for chain in requests[5:])
    assert belady(requests, 3) <= max(best.values()) / total
    for make in POLICIES.values():
        assert hit_ratio(requests, make(3), 3, compete=True) <= max(best.values()) / total
