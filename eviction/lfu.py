"""Least frequently used, leaf first: the block asked for least often goes; of equals, the idlest.

After Shah, Mitra and Matani, "An O(1) algorithm for implementing the LFU cache eviction scheme"
(2010); counts begin again when a block comes back. Not for coding agents, whose sessions are hot
and then over: old counts never fade, so what is new leaves before it is asked for again and hits
collapse.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from kvstore.eviction.base import Victims


class LFU:
    """O(1) for each key and victim, beside a search among the counts that occur."""

    def __init__(self, capacity: int = 1) -> None:
        self._count: dict[int, int] = {}
        self._queues: dict[int, OrderedDict[int, None]] = {}  # by count; coldest first
        self._counts: list[int] = []  # those that occur, ascending

    def admit(self, keys: Sequence[int], now: float) -> None:
        for key in reversed(keys):
            assert key not in self._count, f"key {key} admitted twice"
            self._put(key, 1)

    def touch(self, keys: Sequence[int], now: float) -> None:
        for key in reversed(keys):
            count = self._count.get(key)
            if count is not None:
                self._take(key, count)
                self._put(key, count + 1)

    def warm(self, keys: Sequence[int], now: float) -> None:
        self.defer(keys)

    def defer(self, keys: Sequence[int]) -> None:
        for key in reversed(keys):
            count = self._count.get(key)
            if count is not None:
                self._queues[count].move_to_end(key)

    def forget(self, keys: Sequence[int]) -> None:
        for key in keys:
            count = self._count.pop(key, None)
            if count is not None:
                self._take(key, count)

    def drop(self, keys: Sequence[int]) -> None:
        pass  # what is not resident is not remembered

    def victims(self, now: float) -> Victims:
        for count in self._counts:
            for key in self._queues[count]:  # noqa: UP028 - its iterator cannot be sent anything
                yield key

    def residents(self) -> Iterator[int]:
        for count in self._counts:
            yield from self._queues[count]

    def __len__(self) -> int:
        return len(self._count)

    def __contains__(self, key: int) -> bool:
        return key in self._count

    def _put(self, key: int, count: int) -> None:
        queue = self._queues.get(count)
        if queue is None:
            queue = self._queues[count] = OrderedDict()
            insort(self._counts, count)
        queue[key] = None
        self._count[key] = count

    def _take(self, key: int, count: int) -> None:
        queue = self._queues[count]
        del queue[key]
        if not queue:
            del self._queues[count]
            del self._counts[bisect_left(self._counts, count)]
