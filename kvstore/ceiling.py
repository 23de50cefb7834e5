"""What a cache that never forgets would hit, estimated while running. Part of the brain.

An asked block counts as possible when its key was asked for or stored before. To know that exactly,
every key ever seen would have to be kept; a HyperLogLog sketch of fixed size counts distinct ones.
It counts by increments: feeding keys that it has seen moves its estimate by nothing, feeding new
ones moves it, on average, by their number. So what it moves by when missed keys are fed is the
number of misses that no cache could have avoided. Keys that are hit need not be fed: whoever is
hit was stored. Keys that are stored without having been asked for are fed, and nothing is counted.

The standard error is 0.83 / sqrt(2 ** LG_K), of the avoidable misses alone: 0.23 % of at most all
blocks asked for. Blocks of an earlier daemon that are found after a restart are not in the sketch:
one that is hit counts as possible, one that is lost before it is asked for does not.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Sequence
from typing import Any

import xxhash
from datasketches import hll_sketch, tgt_hll_type  # type: ignore[import-untyped]

LG_K = 17  # 128 KiB: three standard errors are 0.7 points


class Ceiling:
    """The share of all blocks asked for that had been seen before."""

    def __init__(self) -> None:
        self.asked = 0
        self._seen: Any = hll_sketch(LG_K, tgt_hll_type.HLL_8)
        _LIVE.add(self)
        self._first = 0.0  # missed keys that nobody had named before

    @property
    def hit_ratio(self) -> float | None:
        """Estimate of what could have been hit; None before the first request."""
        if not self.asked:
            return None
        return min(max(1.0 - self._first / self.asked, 0.0), 1.0)

    def observe(self, prefix: bytes, missed: Sequence[bytes], hit: int) -> None:
        """A request was answered: so many hits, and these keys not. `prefix` is the layout's."""
        self.asked += hit + len(missed)
        if missed:
            before = self._seen.get_estimate()
            self.stored(prefix, missed)
            self._first += self._seen.get_estimate() - before

    def stored(self, prefix: bytes, keys: Sequence[bytes]) -> None:
        """Keys are known from now on, whether somebody asked for them or not."""
        update, digest = self._seen.update, xxhash.xxh3_64_intdigest
        for key in keys:
            update(digest(prefix + key) >> 1)  # the sketch takes signed numbers


_LIVE: weakref.WeakSet[Ceiling] = weakref.WeakSet()


@atexit.register
def _end() -> None:
    """The library writes pages of warnings about sketches that outlive the interpreter."""
    for ceiling in _LIVE:
        ceiling._seen = None
