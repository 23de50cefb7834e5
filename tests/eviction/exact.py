"""What a policy is worth: an exact simulator of prefix semantics, and the best that is possible.

A block hits only when all blocks before it in its request hit. What misses is inserted. Requests
are chains of numbers in prefix order; ratios are over the last half of the requests.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from kvstore.eviction.base import Policy

Chain = Sequence[int]
NEVER = 1 << 60


def hit_ratio(
    requests: Sequence[Chain],
    policy: Policy,
    capacity: int,
    *,
    compete: bool = False,
    warm: bool = True,
) -> float:
    """Hits per block asked for. A request's own blocks stay while it is inserted; with `compete`,
    new blocks come first and leave at once where the policy says so. Without `warm` policies are
    not told that blocks came behind residents: a plain FIFO, which would be LRU otherwise."""
    hits = total = 0
    for at, chain in enumerate(requests):
        resident = [block for block in chain if block in policy]
        if 2 * at >= len(requests):
            total += len(chain)
            hits += leading(chain, resident)
        policy.touch(resident, float(at))
        known = set(resident)
        fresh = [block for block in chain if block not in known]
        if compete:
            policy.admit(fresh, float(at))
            policy.warm(resident if warm else (), float(at))
            evict(policy, len(policy) - capacity, set(), float(at))
            continue
        evict(policy, len(policy) + len(fresh) - capacity, set(chain), float(at))
        policy.admit(fresh[: capacity - len(policy)], float(at))
        policy.warm(resident if warm else (), float(at))
        assert len(policy) <= capacity
    return hits / total if total else 0.0


def leading(chain: Chain, resident: Sequence[int]) -> int:
    """How many blocks of the chain hit."""
    for at, (asked, found) in enumerate(zip(chain, resident, strict=False)):
        if asked != found:
            return at
    return min(len(chain), len(resident))


def evict(policy: Policy, short: int, stay: set[int], now: float) -> None:
    """Up to `short` victims leave, none of them in `stay`."""
    if short <= 0:
        return
    gone: list[int] = []
    victims = policy.victims(now)
    block = next(victims, None)
    while block is not None:
        if block not in stay:
            gone.append(block)
            if len(gone) == short:
                break
        try:
            block = victims.send(block in stay)
        except StopIteration:
            break
    victims.close()
    policy.forget(gone)


def belady(requests: Sequence[Chain], capacity: int) -> float:
    """Hits per block asked for when who leaves is who is asked for last in the future; of a chain,
    its leaf. New blocks compete at once. What depends on a block is never asked for before it, so
    whoever is asked for last is a leaf."""
    later = next_uses(requests)
    resident: dict[int, int] = {}  # and when each is asked for next
    order: list[tuple[int, int, int]] = []
    hits = total = 0
    for at, chain in enumerate(requests):
        if 2 * at >= len(requests):
            total += len(chain)
            hits += leading(chain, [block for block in chain if block in resident])
        for depth, (block, use) in enumerate(zip(chain, later[at], strict=True)):
            resident[block] = use
            heapq.heappush(order, (-use, -depth, block))
        while len(resident) > capacity:
            use, _, block = heapq.heappop(order)
            if resident.get(block) == -use:
                del resident[block]
    return hits / total if total else 0.0


def next_uses(requests: Sequence[Chain]) -> list[list[int]]:
    """For each block of each request the next request that asks for it, or NEVER."""
    seen: dict[int, int] = {}
    uses: list[list[int]] = []
    for at in range(len(requests) - 1, -1, -1):
        uses.append([seen.get(block, NEVER) for block in requests[at]])
        seen.update(dict.fromkeys(requests[at], at))
    return uses[::-1]
