"""Exact counts that the estimates are held against, by plain simulation; and seeded workloads."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence

Chain = Sequence[int]
Cache = OrderedDict[int, None]


def lru_hit_ratio(chains: Iterable[Chain], slots: int) -> float:
    """Of a cache of so many blocks that stores what it misses; the leaf is the coldest."""
    cache = Cache()
    hits = asked = 0
    for chain in chains:
        asked += len(chain)
        hits += leading(chain, cache)
        use(cache, chain, slots)
    return hits / asked


def two_tier_hit_ratios(chains: Iterable[Chain], dram: int, nvme: int) -> tuple[float, float]:
    """Of both tiers and of DRAM, where all that is stored is copied down and hits are copied up."""
    upper = Cache()
    lower = Cache()
    hits = fast = asked = 0
    for chain in chains:
        asked += len(chain)
        found = leading(chain, upper.keys() | lower.keys())
        hits += found
        fast += sum(block in upper for block in chain[:found])
        use(upper, chain, dram)
        use(lower, chain, nvme)
    return hits / asked, fast / asked


def infinite_hit_ratio(chains: Iterable[Chain]) -> float:
    """Of a cache that forgets nothing."""
    seen: set[int] = set()
    hits = asked = 0
    for chain in chains:
        asked += len(chain)
        hits += leading(chain, seen)
        seen.update(chain)
    return hits / asked


def leading(chain: Chain, held: Container[int]) -> int:
    """How many blocks are reached through blocks that are held."""
    for at, block in enumerate(chain):
        if block not in held:
            return at
    return len(chain)


def use(cache: Cache, chain: Chain, slots: int) -> None:
    """All blocks of the chain are the most recent, the first of them the last to go."""
    for block in reversed(chain):
        cache[block] = None
        cache.move_to_end(block)
    while len(cache) > slots:
        cache.popitem(last=False)


def conversations(seed: int, requests: int) -> list[list[int]]:
    """Prompts that share a system prompt, go on where they left off, and are forgotten."""
    rng = random.Random(seed)
    fresh = iter(range(1 << 40))
    roots = [[next(fresh) for _ in range(rng.randint(2, 12))] for _ in range(20)]
    live: list[list[int]] = []
    chains = []
    for _ in range(requests):
        if not live or rng.random() < 0.25:
            live.append(list(roots[int(len(roots) * rng.random() ** 3)]))
        at = max(len(live) - 1 - int(rng.expovariate(1 / 60)), 0)
        live[at] = live[at] + [next(fresh) for _ in range(rng.randint(1, 12))]
        chains.append(live[at])
    return chains


def key(block: int) -> bytes:
    """The block's hash, as an engine that counts would give it."""
    return block.to_bytes(16, "big")
