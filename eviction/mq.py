"""Multi-Queue, leaf first: a queue for each power of two of accesses, left downwards when idle.

Zhou, Philbin and Li, "The multi-queue replacement algorithm for second level buffer caches", USENIX
ATC 2001. A block stays in its queue for a lifetime: the running median distance, in accesses,
between two accesses of a block. Not for coding agents in very little room nor for small blocks:
there LRU keeps more.
"""

from __future__ import annotations

from collections.abc import Sequence

from cachetools import FIFOCache

from kvstore.eviction.base import Victims
from kvstore.eviction.queues import Queue, Queues

QUEUES = 8
GHOSTS = 4  # for each block that has room
MEDIAN_STEP = 1.01  # the median follows each distance by this factor


class Seen:
    """Of a resident: how often it was asked for, when last, and until when its queue is its own."""

    __slots__ = ("count", "last", "until")

    def __init__(self, count: int, last: int, until: float) -> None:
        self.count = count
        self.last = last
        self.until = until


class MQ(Queues):
    """O(1) for each key touched, over time, and for each victim named."""

    def __init__(self, capacity: int = 1) -> None:
        super().__init__(QUEUES)
        self._seen: dict[int, Seen] = {}
        self._ghost: FIFOCache[int, tuple[int, int]] = FIFOCache(GHOSTS * capacity)
        self._accesses = 0
        self._lifetime = float(capacity)

    def admit(self, keys: Sequence[int], now: float) -> None:
        self._accesses += len(keys)
        for key in reversed(keys):
            assert key not in self._seen, f"key {key} admitted twice"
            count = 1
            if key in self._ghost:
                count, last = self._ghost.pop(key)
                self._learn(self._accesses - last)
                count += 1
            self._seen[key] = Seen(count, self._accesses, self._accesses + self._lifetime)
            self.place(key, self._queue(count))
        self._demote()

    def touch(self, keys: Sequence[int], now: float) -> None:
        self._accesses += len(keys)
        accesses = self._accesses
        for key in reversed(keys):
            seen = self._seen.get(key)
            if seen is None:
                continue
            self._learn(accesses - seen.last)
            seen.count += 1
            seen.last = accesses
            seen.until = accesses + self._lifetime
            self.place(key, self._queue(seen.count))
        self._demote()

    def forget(self, keys: Sequence[int]) -> None:
        for key in keys:
            if self.take(key) is not None:
                seen = self._seen.pop(key)
                self._ghost[key] = (seen.count, seen.last)

    def drop(self, keys: Sequence[int]) -> None:
        for key in keys:
            self._ghost.pop(key, None)

    def victims(self, now: float) -> Victims:
        for queue in self.queues:
            for key in queue:  # noqa: UP028 - a dict's iterator cannot be sent anything
                yield key

    def _queue(self, count: int) -> Queue:
        return self.queues[min(count.bit_length(), QUEUES) - 1]

    def _learn(self, distance: int) -> None:
        """Half of all distances push the lifetime up, half down: then it is their median."""
        if distance > self._lifetime:
            self._lifetime *= MEDIAN_STEP
        elif self._lifetime > 1.0:
            self._lifetime /= MEDIAN_STEP

    def _demote(self) -> None:
        """Blocks that have not been asked for within their time go one queue down."""
        accesses = self._accesses
        for level in range(1, QUEUES):
            queue, below = self.queues[level], self.queues[level - 1]
            while queue:
                key = next(iter(queue))
                seen = self._seen[key]
                if seen.until >= accesses:
                    break
                seen.until = accesses + self._lifetime
                self.place(key, below)
