"""Relevance: what leaves is the block with the least chance to be asked for again, for the time
that it would stay. The default.

It learns how reuse falls with idle time, from the requests that it sees. A request has a class: how
much of it was new, how long ago the request was that it continues, and the hints that came with it.
A block has the class of the request that asked for it last, and how often it was asked for; a block
on which many different prompts build (a system prompt) has a class by the time between requests.
For each class `kvstore.eviction.hazard` learns the worth of keeping a block at each age.

Only leaves are evicted, blocks on which no other resident block depends. In each class the leaf
that is idle for longest and the one idle for shortest compete; the least worthy of all leaves.
What depends on a block that is not there is of no use until that comes back, and goes first.

The index: J. C. Gittins, "Bandit Processes and Dynamic Allocation Indices", J. R. Stat. Soc. B
41(2), 1979. Eviction by learned hazard of classes: N. Beckmann, D. Sanchez, "Maximizing Cache
Performance Under Uncertainty", HPCA 2017. Classes and leaves: ours.

Not where nothing can be learned, as in a scan: LRU then keeps the same and costs less.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvstore.eviction.base import Asked, Request
from kvstore.eviction.columns import Columns
from kvstore.eviction.hazard import Hazard
from kvstore.eviction.ranking import NONE, Ranking

Keys = np.ndarray[Any, np.dtype[np.int32]]

FRESH_BOUNDS = (2, 4, 16)  # new blocks of a request
GAP_BOUNDS_S = (15.0, 60.0, 240.0)  # since the request that it continues
TOUCHES = (0, 1, 2, 3, 3, 4)  # what counts as how often; 0 is for the last block of a request
TOUCHES_MAX = len(TOUCHES) - 1
HUB_FAN = 16  # so many different continuations make a block a hub
FAN_MAX = 255
TIES_MAX, TICK_S = 64, 2.0**-12  # after so many requests at once the next are so far apart
UNPLACED = 1 << 30  # the depth of a block of which it is not known what it continues
HINTS_MAX = 8  # combinations of hints that are told apart
EVEN_TOKENS = 24_576  # before a token whose attention costs as much as all else: 6 x 4,096
SHORT = 64  # chains up to this length are looked at one by one: a call of numpy costs more

_GAPS = len(GAP_BOUNDS_S) + 2  # the first: it continues none
_SHARES = max(TOUCHES) + 1
_PER_HINT = (len(FRESH_BOUNDS) + 1) * _GAPS * _SHARES
_HUBS = HINTS_MAX * _PER_HINT
STRANGER = _HUBS + _GAPS  # no request is known, as for blocks found after a restart
KINDS = STRANGER + 1


class Relevance:
    """A family of rankings, one for each tier and slot size, and what they learn together."""

    contests = True

    def __init__(self, *, prefill: bool = False) -> None:
        """`prefill`: worth is not a chance of hits but of seconds, see EVEN_TOKENS."""
        self.hazard = Hazard(KINDS)
        columns: dict[str, Any] = {
            "cohort": ("i", NONE),
            "parent": ("i", NONE),
            "depth": ("i", UNPLACED),
            "fan": "B",
            "hub": "B",
        }
        self._prefill = prefill
        if prefill:
            columns["weight"] = ("f", 1)
        self.blocks = Columns(**columns)
        self._rankings: list[Ranking] = []
        self._hints: dict[tuple[str, str], int] = {}
        self._now = 0.0
        self._told, self._ties = 0.0, 0  # the time of the last request, and how many came with it

    def make(self, tier: int, capacity: int) -> Ranking:
        ranking = Ranking(
            self.blocks, self.hazard, self._rankings, self._stranger, weighted=self._prefill
        )
        self._rankings.append(ranking)
        return ranking

    def asked(self, request: Request) -> Asked:
        self._ties = 0 if request.now - self._told > TICK_S / 4 else self._ties + 1
        self._told = request.now
        self._now = now = max(request.now, self._now + TICK_S * (self._ties > TIES_MAX))
        known = request.chain
        if not known:
            self.hazard.note_request(now)
            kind = self._request_kind(request, None)
            return Asked(kind, request.fresh, now, request.block_tokens)
        if len(set(known)) < len(known):
            known = list(dict.fromkeys(known))
        self.blocks.reserve(max(known) + 1)
        chain, unplaced = self._heard_of(known)
        if unplaced:  # found after a restart
            self._place(NONE, np.asarray(chain, np.int32))
            self._weigh(chain, request.block_tokens)
        gap = self._gap(chain, now) if len(chain) else None
        length = len(request.chain) + request.fresh
        asked = Asked(self._request_kind(request, gap), length, now, request.block_tokens)
        if len(chain):
            self._touch(chain, asked, whole=not request.fresh)
        self.hazard.note_request(now)
        return asked

    def born(self, parent: int, keys: Sequence[int], asked: Asked) -> None:
        if not keys:
            return
        blocks = self.blocks
        blocks.reserve(max(parent, *keys) + 1)
        if len(keys) <= SHORT:
            self._born_few(parent, keys, asked)
            return
        row = np.asarray(keys, np.int32)
        if (blocks.array("depth")[row] == UNPLACED).any():
            self._place(parent, row)
        unknown = row[blocks.array("cohort")[row] == NONE]
        if not len(unknown):
            return
        blocks.array("fan")[unknown] = 1
        blocks.array("hub")[unknown] = 0
        if unknown[-1] == row[-1]:
            blocks.fan[keys[-1]] = 0
        self._weigh(unknown, asked.block_tokens)
        begin, cohort = self.hazard.begin, blocks.array("cohort")
        kind, length, now, _ = asked
        if len(unknown) > 1:
            cohort[unknown[:-1]] = begin(kind + TOUCHES[1], 1, length, len(unknown) - 1, now)
        cohort[unknown[-1:]] = begin(kind + TOUCHES[0], 1, length, 1, now)

    def _born_few(self, parent: int, keys: Sequence[int], asked: Asked) -> None:
        """As `born`, one by one."""
        blocks = self.blocks
        cohort, fan, hub = blocks.cohort, blocks.fan, blocks.hub
        self._place_few(parent, keys)
        unknown = [key for key in keys if cohort[key] == NONE]
        if not unknown:
            return
        self._weigh(unknown, asked.block_tokens)
        last, inner, (kind, length, now, _) = unknown[-1], NONE, asked
        if len(unknown) > 1:
            inner = self.hazard.begin(kind + TOUCHES[1], 1, length, len(unknown) - 1, now)
        for key in unknown:
            fan[key], hub[key], cohort[key] = 1, 0, inner
        if last == keys[-1]:
            fan[last] = 0
        cohort[last] = self.hazard.begin(kind + TOUCHES[0], 1, length, 1, now)

    def drop(self, keys: Sequence[int]) -> None:
        blocks, end, now = self.blocks, self.hazard.end, self._now
        cohorts, parents, depths = blocks.cohort, blocks.parent, blocks.depth
        known = [key for key in keys if key < blocks.size and cohorts[key] != NONE]
        for cohort, run in itertools.groupby(known, cohorts.__getitem__):
            end(cohort, len(list(run)), now, returned=False)
        for ranking in self._rankings:
            for orphan in ranking.cut(known):
                parents[orphan] = NONE
        for key in known:
            cohorts[key] = NONE
            parents[key] = NONE
            depths[key] = UNPLACED

    def hinted(self, asked: Asked, chain: Sequence[int], reuse: str, tag: str) -> Asked:
        kind = self._hint(reuse, tag) * _PER_HINT + asked.kind % _PER_HINT
        by_cohort: dict[int, list[int]] = {}
        cohorts = self.hazard.cohorts
        for key in chain:
            of = self._cohort(key)
            if of != NONE and cohorts.time[of] == asked.now and cohorts.kind[of] < _HUBS:
                by_cohort.setdefault(of, []).append(key)
        for of, keys in by_cohort.items():
            share, touches = cohorts.kind[of] % _SHARES, cohorts.touches[of]
            self.hazard.end(of, len(keys), asked.now, returned=False)
            new = self.hazard.begin(kind + share, touches, asked.length, len(keys), asked.now)
            moved = np.asarray(keys, np.int32)
            self.blocks.array("cohort")[moved] = new
            for ranking in self._rankings:
                ranking.moved(moved)
        return asked._replace(kind=kind)

    def reused(self, key: int) -> bool:
        cohort = self._cohort(key)
        if cohort == NONE or self.hazard.cohorts.touches[cohort] > 1:
            return True
        return any(ranking.supports(key) for ranking in self._rankings)

    def likely(self, key: int, now: float, horizon_s: float, least: float) -> bool:
        cohort = self._cohort(key)
        if cohort == NONE or not self.hazard.learned:
            return True
        cohorts = self.hazard.cohorts
        age = max(0.0, now - cohorts.time[cohort])
        return self.hazard.chance(cohorts.kind[cohort], age, horizon_s) >= least

    def idle_s(self, key: int, now: float) -> float:
        cohort = self._cohort(key)
        return 0.0 if cohort == NONE else float(now - self.hazard.cohorts.time[cohort])

    def worth(self, keys: Sequence[int], now: float) -> float | None:
        hazard, cohorts, total = self.hazard, self.hazard.cohorts, 0.0
        known = [key for key in keys if self._cohort(key) != NONE]
        for of, run in itertools.groupby(known, self._cohort):
            each = hazard.worth(cohorts.kind[of], max(0.0, now - cohorts.time[of]))
            total += each * sum(self.blocks.weight[key] if self._prefill else 1 for key in run)
        return total / len(known) if known else None

    def _stranger(self, keys: Sequence[int]) -> None:
        """Some of these may never have been heard of, as after a restart."""
        self.blocks.reserve(max(keys, default=0) + 1)
        cohort = self.blocks.cohort
        if len(keys) <= SHORT and NONE not in map(cohort.__getitem__, keys):
            return
        row = np.asarray(keys, np.int32)
        row = row[self.blocks.array("cohort")[row] == NONE]
        if len(row):
            self.blocks.array("cohort")[row] = self.hazard.begin(
                STRANGER, 0, len(row), len(row), self._now
            )
            self.blocks.array("fan")[row] = self.blocks.array("hub")[row] = 0

    # -- inside --------------------------------------------------------------------------------

    def _cohort(self, key: int) -> int:
        """The cohort of a block, NONE when it was never heard of."""
        return int(self.blocks.cohort[key]) if key < self.blocks.size else NONE

    def _request_kind(self, request: Request, gap: float | None) -> int:
        hint = self._hint(request.reuse, request.tag)
        fresh = bisect.bisect(FRESH_BOUNDS, request.fresh)
        return hint * _PER_HINT + (fresh * _GAPS + _gap_share(gap)) * _SHARES

    def _hint(self, reuse: str, tag: str) -> int:
        """The number of a combination of hints; those that come late share the last."""
        hint = self._hints.get((reuse, tag))
        if hint is None and len(self._hints) < HINTS_MAX:
            hint = self._hints[reuse, tag] = len(self._hints)
        return HINTS_MAX - 1 if hint is None else hint

    def _gap(self, chain: Keys | list[int], now: float) -> float | None:
        """Seconds since the request that this one continues, None when it continues none: its known
        blocks then are where prompts part, rather than the most of an earlier request."""
        blocks, cohorts, end = self.blocks, self.hazard.cohorts, int(chain[-1])
        if blocks.fan[end] >= HUB_FAN:
            blocks.array("hub")[chain] = 1
            return None
        before = blocks.cohort[end]
        length = cohorts.length[before]
        if len(chain) >= length / 2 or length - len(chain) <= 3:
            return float(now - cohorts.time[before])
        return None

    def _heard_of(self, known: Sequence[int]) -> tuple[Keys | list[int], bool]:
        """The longest prefix that was heard of, and whether a place in it is not known. A list when
        it is short."""
        if len(known) <= SHORT:
            cohorts = [self.blocks.cohort[key] for key in known]
            if NONE in cohorts:
                known = known[: cohorts.index(NONE)]
            return list(known), UNPLACED in map(self.blocks.depth.__getitem__, known)
        chain = np.asarray(known, np.int32)
        strange = np.flatnonzero(self.blocks.array("cohort")[chain] == NONE)
        if len(strange):
            chain = chain[: strange[0]]
        return chain, bool((self.blocks.array("depth")[chain] == UNPLACED).any())

    def _touch(self, chain: Keys | list[int], asked: Asked, *, whole: bool) -> None:
        """Known blocks were asked for again: they move to new cohorts, run by run."""
        hazard, blocks = self.hazard, self.blocks
        old: Any
        hub: Any
        if isinstance(chain, list):
            old = list(map(blocks.cohort.__getitem__, chain))
            hub = list(map(blocks.hub.__getitem__, chain))
            runs = itertools.groupby(zip(old, hub, strict=True) if any(hub) else old)
            bounds = [0, *itertools.accumulate(len(list(run)) for _, run in runs)]
        else:
            old, hub = blocks.array("cohort")[chain], blocks.array("hub")[chain]
            cut = np.flatnonzero((old[1:] != old[:-1]) | (hub[1:] != hub[:-1])) + 1
            bounds = [0, *cut.tolist(), len(chain)]
        if whole and bounds[-2] < len(chain) - 1:
            bounds.insert(-1, len(chain) - 1)  # the last block of a request is of its own kind
        kind, length, now, _ = asked
        new: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for first, end in itertools.pairwise(bounds):
            cohort = int(old[first])
            touches = min(hazard.cohorts.touches[cohort] + 1, TOUCHES_MAX)
            age = now - hazard.cohorts.time[cohort]
            hazard.end(cohort, end - first, now, returned=True)
            if whole and end == len(chain):
                of = kind + TOUCHES[0]
            elif hub[first]:
                of = _HUBS + _gap_share(age)
            else:
                of = kind + TOUCHES[touches]
            new.setdefault((of, touches), []).append((first, end))
        for (of, touches), parts in new.items():
            count = sum(end - first for first, end in parts)
            cohort = hazard.begin(of, touches, length, count, now)
            for first, end in parts:
                if isinstance(chain, list):
                    for key in chain[first:end]:
                        blocks.cohort[key] = cohort
                else:
                    blocks.array("cohort")[chain[first:end]] = cohort
        for ranking in self._rankings:
            ranking.moved(chain)

    def _place(self, parent: int, row: Keys) -> None:
        """Blocks whose place is not known hang behind those before them in the list.

        A block's place never changes, and it has one before anything hangs behind it: whatever
        lists are sent, blocks never depend on each other in a circle.
        """
        blocks, depths = self.blocks, self.blocks.array("depth")
        if parent != NONE and blocks.depth[parent] == UNPLACED:
            blocks.depth[parent] = 0
        free = depths[row] == UNPLACED
        before = np.concatenate((np.array([parent], np.int32), row[:-1]))
        if free.all():
            first = 0 if parent == NONE else blocks.depth[parent] + 1
            depths[row] = np.arange(first, first + len(row))
        else:
            for key, ahead in zip(row[free].tolist(), before[free].tolist(), strict=True):
                blocks.depth[key] = 0 if ahead == NONE else blocks.depth[ahead] + 1
        blocks.array("parent")[row[free]] = before[free]
        if parent != NONE and free[0] and blocks.fan[parent] < FAN_MAX:
            blocks.fan[parent] += 1
        for ranking in self._rankings:
            ranking.hang(row[free].tolist())

    def _weigh(self, row: Keys | list[int], block_tokens: int) -> None:
        """These blocks have a place: what each of them costs to compute."""
        if self._prefill:
            depths = self.blocks.array("depth")[row]
            self.blocks.array("weight")[row] = 1 + depths * (block_tokens / EVEN_TOKENS)

    def _place_few(self, parent: int, keys: Sequence[int]) -> None:
        """As `_place`, one by one, where some may have their place."""
        blocks, placed, before, level = self.blocks, list[int](), parent, NONE
        depth, parents, fan = blocks.depth, blocks.parent, blocks.fan
        if parent != NONE:
            if depth[parent] == UNPLACED and UNPLACED in map(depth.__getitem__, keys):
                depth[parent] = 0
            level = depth[parent]
        for key in keys:
            level += 1
            if depth[key] == UNPLACED:
                depth[key], parents[key] = level, before
                placed.append(key)
            else:
                level = depth[key]
            before = key
        if parent != NONE and placed and placed[0] == keys[0] and fan[parent] < FAN_MAX:
            fan[parent] += 1
        for ranking in self._rankings:
            ranking.hang(placed)


def _gap_share(gap: float | None) -> int:
    return 0 if gap is None else 1 + bisect.bisect(GAP_BOUNDS_S, gap)
