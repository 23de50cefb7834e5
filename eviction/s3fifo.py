"""S3-FIFO, leaf first: a small queue on trial, a main queue with second chances, and a ghost.

Yang, Zhang, Qiu, Yue and Rashmi, "FIFO queues are all you need for cache eviction", SOSP 2023. Not
for coding agents: a session's blocks have to return twice within the small queue, and a request
larger than it has pushed them out by then.
"""

from __future__ import annotations

from collections.abc import Sequence

from cachetools import FIFOCache

from kvstore.eviction.base import Victims
from kvstore.eviction.queues import Line, Queues

SMALL_SHARE = 0.1
COUNT_MAX = 3
PROMOTED_FROM = 2  # touches on trial that lead to the main queue


class S3FIFO(Queues):
    """O(1) for each key; for each victim, over time: a second chance was paid for by a touch."""

    def __init__(self, capacity: int = 1) -> None:
        super().__init__(2)
        self._small, self._main = self.queues
        self._small_max = max(1, int(capacity * SMALL_SHARE))
        self._touches: dict[int, int] = {}
        self._ghost: FIFOCache[int, None] = FIFOCache(max(1, capacity - self._small_max))

    def admit(self, keys: Sequence[int], now: float) -> None:
        ghost, touches = self._ghost, self._touches
        for key in reversed(keys):
            assert key not in touches, f"key {key} admitted twice"
            touches[key] = 0
            if key in ghost:
                del ghost[key]
                self.place(key, self._main)
            else:
                self.place(key, self._small)

    def touch(self, keys: Sequence[int], now: float) -> None:
        touches = self._touches
        for key in keys:
            count = touches.get(key, COUNT_MAX)
            if count < COUNT_MAX:
                touches[key] = count + 1

    def forget(self, keys: Sequence[int]) -> None:
        for key in keys:
            home = self.take(key)
            if home is None:
                continue
            del self._touches[key]
            if home is self._small:
                self._ghost[key] = None

    def drop(self, keys: Sequence[int]) -> None:
        for key in keys:
            self._ghost.pop(key, None)

    def victims(self, now: float) -> Victims:
        self._pass_over()
        small = Line(self._small, len(self._small))
        main = Line(self._main, len(self._main))
        left: dict[int, int] = {}  # touches of those that would have moved by now
        while True:
            on_trial = self._from_small(small.count, main.count)
            line = small if on_trial else main
            key = line.head
            if key is None:
                return
            touches = left.get(key, self._touches[key])
            line.pop()
            if on_trial and touches >= PROMOTED_FROM:
                left[key] = 0
                main.push(key)
            elif not on_trial and touches:
                left[key] = touches - 1
                main.push(key)
            else:
                yield key

    def _from_small(self, small: int, main: int) -> bool:
        return bool(small) and (small >= self._small_max or not main)

    def _pass_over(self) -> None:
        """Move those that do not leave out of the way, up to the first that does.

        Done again it does nothing, and the order of victims is the same before and after.
        """
        touches = self._touches
        while touches:
            on_trial = self._from_small(len(self._small), len(self._main))
            key = next(iter(self._small if on_trial else self._main))
            if on_trial and touches[key] >= PROMOTED_FROM:
                touches[key] = 0
            elif not on_trial and touches[key]:
                touches[key] -= 1
            else:
                return
            self.place(key, self._main)
