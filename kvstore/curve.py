"""What an LRU cache of any size would hit, estimated from a sample. Part of the brain.

This is fixed-size SHARDS (Waldspurger et al., "Efficient MRC Construction with SHARDS", FAST 2015).
A key is sampled when its hash is below a threshold: then all its uses are seen, and distances among
the sampled, divided by the sampling rate, estimate those among all. When the sample is full, the
threshold sinks. The correction of the paper (SHARDS-adj) is applied: when fewer uses were seen than
the rate says, the lacking ones belong to the hottest keys, and are hits at any size.

Distances are bytes, because blocks of different layouts differ in size. A request uses its whole
chain at once and its leaf is the coldest. So an ancestor is never farther than its descendants,
and a block that an LRU cache holds is reached through blocks that it holds, too; where a client's
keys are not chained so, the largest distance so far counts, which is the same: a block is a hit
when it and all before it are held. It is assumed that what is asked for and missed is stored then.

Blocks of one use form a run; a block is in the run of its last use. Keys that move on together were
together before, so a request costs a few sums over runs (a Fenwick tree), not one for each block.

Counts age: each weighs half as much after `half_life_s`, so the curve tells of the recent past.
Keys farther away than `horizon_bytes` are dropped: else the sample would fill up with the dead.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, chain, repeat
from typing import Any

import numpy as np
import xxhash

WHOLE = 1 << 64
FINGERPRINT_BYTES = 16  # the layout's part of a key
STEPS = 64  # of the histogram, per doubling of the distance
BUCKETS = 64 * STEPS
GAIN_MAX = 2.0**40
SAMPLE_MAX = 16_384
RATE_MAX = 1 / 16  # a sampled key costs some ten times what another does

Ints = np.ndarray[Any, np.dtype[np.int64]]
NONE: Ints = np.zeros(0, np.int64)
Place = tuple[int, int]  # the run of a key, and bytes of the run that were above it


class Curve:
    """Hit ratio by size of an LRU cache, leaf first, of what was observed."""

    def __init__(
        self,
        *,
        sample_max: int = SAMPLE_MAX,
        rate_max: float = RATE_MAX,
        horizon_bytes: float = math.inf,
        half_life_s: float = math.inf,
    ) -> None:
        assert sample_max >= 16 and 0 < rate_max <= 1
        self._sample_max = sample_max
        self._horizon_bytes = horizon_bytes
        self._half_life_s = half_life_s
        self._threshold = int(rate_max * WHOLE)
        self._where: dict[bytes, Place] = {}
        self._runs = _Runs(2 * sample_max)
        self._histogram = [0.0] * BUCKETS
        self._asked = 0.0  # blocks, weighed as those of the histogram
        self._seen = 0.0  # of the sample, the same
        self._start: float | None = None

    @property
    def rate(self) -> float:
        """The share of keys that is sampled."""
        return self._threshold / WHOLE

    @property
    def sampled(self) -> int:
        """Blocks in the sample."""
        return len(self._where)

    def observe(
        self,
        prefix: bytes,
        keys: Sequence[bytes],
        slot_bytes: int,
        now: float,
        *,
        skip: int,
        asked: int,
    ) -> None:
        """A chain of one layout was used; keys[skip:skip + asked] were asked for. No key comes
        twice."""
        gain = self._gain(now)
        self._asked += asked * gain
        digest, threshold = xxhash.xxh3_64_intdigest, self._threshold
        found = [prefix + key for key in keys if digest(key) < threshold]
        if not found:
            return
        first, last = 0, len(found)
        if skip or skip + asked < len(keys):
            first = sum(digest(key) < threshold for key in keys[:skip])
            last -= sum(digest(key) < threshold for key in keys[skip + asked :])
        places = list(map(self._where.get, found))
        if last > first:
            self._count(places[:last], first, slot_bytes, gain)
        self._move(found, places, slot_bytes)

    def hit_ratios(self, sizes: Sequence[float]) -> list[float]:
        """The share of the blocks asked for that a cache of each size would have hit."""
        if self._asked <= 0.0:
            return [0.0] * len(sizes)
        hits = list(accumulate(self._histogram))
        lacking = self._asked - self._seen
        ratios = [
            (hits[_bucket(size)] + lacking) / self._asked if size > 0 else 0.0 for size in sizes
        ]
        return [min(max(ratio, 0.0), 1.0) for ratio in ratios]

    def hit_ratio(self, size_bytes: float) -> float:
        """The share for one size; sizes above the horizon count as the horizon."""
        return self.hit_ratios([size_bytes])[0]

    # -- inside --------------------------------------------------------------------------------

    def _gain(self, now: float) -> float:
        """What one use weighs at this time. Old ones are not made lighter: new ones are heavier."""
        if self._start is None:
            self._start = now
        gain = math.exp2(min(max((now - self._start) / self._half_life_s, 0.0), 1000.0))
        if gain > GAIN_MAX:
            self._start, factor = now, 1.0 / gain
            self._histogram = [count * factor for count in self._histogram]
            self._asked *= factor
            self._seen *= factor
            gain = 1.0
        return gain

    def _count(
        self, places: Sequence[Place | None], first: int, slot_bytes: int, gain: float
    ) -> None:
        """Enter the distances of a chain's sampled keys from `first` on into the histogram."""
        runs, histogram, log2 = self._runs, self._histogram, math.log2
        scale = WHOLE / self._threshold
        weight = gain * scale
        self._seen += (len(places) - first) * weight
        run, newer, farthest = -1, 0, -1
        for at, place in enumerate(places):
            if place is None:
                return  # never seen: nothing behind it is a hit, of whatever size
            if place[0] != run:
                run = place[0]
                newer = runs.newer(run)
                farthest = max(farthest, newer)
                newer -= runs.taken[run]
            distance = newer + place[1]
            if distance > farthest:
                farthest = distance
            if at >= first:
                histogram[int(log2(farthest * scale + slot_bytes) * STEPS)] += weight

    def _move(self, found: list[bytes], places: Sequence[Place | None], slot_bytes: int) -> None:
        """The keys become the newest run, the first of them the hottest."""
        runs, where, count = self._runs, self._where, len(found)
        for run, gone in Counter(place[0] for place in places if place is not None).items():
            runs.take(run, gone * runs.slot_bytes[run])
        new = runs.open(slot_bytes)
        above = range(0, count * slot_bytes, slot_bytes)
        where.update(zip(found, zip(repeat(new), above, strict=False), strict=True))
        runs.fill(new, count * slot_bytes)
        if len(where) > self._sample_max:
            self._sink()
        elif runs.full or runs.total > 1.25 * self._horizon_bytes * self.rate:
            self._rebuild(self._threshold)

    def _sink(self) -> None:
        """Lower the threshold so far that an eighth of the sample, or more, goes."""
        hashes = sorted(map(_hash, self._where))
        self._rebuild(max(hashes[self._sample_max * 7 // 8], 1))

    def _rebuild(self, threshold: int) -> None:
        """Keep what is below the threshold and nearer than the horizon, in runs numbered anew."""
        count, old_sizes = len(self._where), np.array(self._runs.slot_bytes, np.int64)
        places = np.fromiter(chain.from_iterable(self._where.values()), np.int64, 2 * count)
        run, above = places[::2], places[1::2]
        hashes = np.fromiter(map(_hash, self._where), np.uint64, count)
        newest_first = np.lexsort((above, -run))
        kept = newest_first[hashes[newest_first] <= np.uint64(threshold - 1)]
        room = self._horizon_bytes * threshold / WHOLE
        kept = kept[np.cumsum(old_sizes[run[kept]]) <= room]
        first = np.flatnonzero(np.diff(run[kept], prepend=-1))  # of each run, in newest-first order
        lengths = np.diff(first, append=len(kept))
        sizes = old_sizes[run[kept[first]]]
        at = np.arange(len(kept)) - np.repeat(first, lengths)
        number = np.repeat(np.arange(len(first))[::-1], lengths)
        keys = list(self._where)
        found = zip(number.tolist(), (at * np.repeat(sizes, lengths)).tolist(), strict=True)
        self._where = dict(zip([keys[one] for one in kept.tolist()], found, strict=True))
        self._runs = _Runs(2 * self._sample_max, sizes[::-1], (sizes * lengths)[::-1])
        self._threshold = threshold


class _Runs:
    """Live bytes of each run, and their sums (a Fenwick tree). Later runs have higher numbers."""

    def __init__(self, capacity: int, slot_bytes: Ints = NONE, live: Ints = NONE) -> None:
        """Room for so many runs; there are some already, of these slot sizes and live bytes."""
        sums = np.zeros(capacity + 1, np.int64)
        np.cumsum(live, out=sums[1 : len(live) + 1])
        self.total = int(sums[len(live)])
        sums[len(live) :] = self.total
        at = np.arange(capacity + 1)
        self._tree: list[int] = (sums - sums[at & (at - 1)]).tolist()
        self._tree[0] = 0
        self.taken: list[int] = [0] * len(live)  # bytes of each that have moved on, from its front
        self.slot_bytes: list[int] = slot_bytes.tolist()

    @property
    def full(self) -> bool:
        """No more runs can be opened."""
        return len(self.taken) + 1 >= len(self._tree)

    def open(self, slot_bytes: int) -> int:
        """The number of a new run, empty as yet."""
        self.taken.append(0)
        self.slot_bytes.append(slot_bytes)
        return len(self.taken) - 1

    def fill(self, run: int, size: int) -> None:
        """So many bytes are in the run now."""
        self.total += size
        self._add(run, size)

    def take(self, run: int, size: int) -> None:
        """So many bytes have moved on to another run."""
        self.taken[run] += size
        self.total -= size
        self._add(run, -size)

    def newer(self, run: int) -> int:
        """Live bytes of all later runs."""
        tree, at, older = self._tree, run + 1, 0
        while at:
            older += tree[at]
            at &= at - 1
        return self.total - older

    def _add(self, run: int, size: int) -> None:
        tree, at = self._tree, run + 1
        while at < len(tree):
            tree[at] += size
            at += at & -at


def _hash(key: bytes) -> int:
    """What decides whether a key, of a fingerprint and a block's hash, is sampled."""
    return xxhash.xxh3_64_intdigest(key[FINGERPRINT_BYTES:])


def _bucket(size_bytes: float) -> int:
    """The histogram's bucket of a distance."""
    return min(int(math.log2(size_bytes) * STEPS), BUCKETS - 1) if size_bytes >= 1 else 0
