"""ARC, leaf first: blocks asked for once and more often, in shares that their ghosts decide.

Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003. Not where a
touch costs more than a miss, and not better than LRU where nearly all sessions return in time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from kvstore.eviction.base import Victims
from kvstore.eviction.queues import Line, Queues


class ARC(Queues):
    """O(1) for each key touched and each victim named; remembers as many ghosts as have room.

    once, often             resident: asked for once, and more than once (T1, T2 in the paper)
    once_ghost, often_ghost those that left them (B1, B2)
    target                  how many of `once` may stay while `often` has others to give (p)
    """

    def __init__(self, capacity: int = 1) -> None:
        super().__init__(2)
        self._once, self._often = self.queues
        self._once_ghost: OrderedDict[int, None] = OrderedDict()
        self._often_ghost: OrderedDict[int, None] = OrderedDict()
        self._capacity = capacity
        self._target = 0.0

    def admit(self, keys: Sequence[int], now: float) -> None:
        for key in reversed(keys):
            assert key not in self, f"key {key} admitted twice"
            once, often = len(self._once_ghost), len(self._often_ghost)
            if key in self._once_ghost:
                self._target = min(self._capacity, self._target + max(1.0, often / once))
                del self._once_ghost[key]
                self.place(key, self._often)
            elif key in self._often_ghost:
                self._target = max(0.0, self._target - max(1.0, once / often))
                del self._often_ghost[key]
                self.place(key, self._often)
            else:
                self.place(key, self._once)
        self._trim()

    def touch(self, keys: Sequence[int], now: float) -> None:
        for key in reversed(keys):
            if key in self:
                self.place(key, self._often)

    def forget(self, keys: Sequence[int]) -> None:
        for key in keys:
            home = self.take(key)
            if home is self._once:
                self._once_ghost[key] = None
            elif home is self._often:
                self._often_ghost[key] = None
        self._trim()

    def drop(self, keys: Sequence[int]) -> None:
        for key in keys:
            self._once_ghost.pop(key, None)
            self._often_ghost.pop(key, None)

    def victims(self, now: float) -> Victims:
        once = Line(self._once, len(self._once))
        often = Line(self._often, len(self._often))
        while once.count or often.count:
            first = once if once.count > self._target or not often.count else often
            yield first.pop()

    def _trim(self) -> None:
        """Of blocks asked for once, resident or ghost, as many as have room; of all, twice."""
        room = max(0, self._capacity - len(self._once))
        while len(self._once_ghost) > room:
            self._once_ghost.popitem(last=False)
        room = max(0, 2 * self._capacity - len(self) - len(self._once_ghost))
        while len(self._often_ghost) > room:
            self._often_ghost.popitem(last=False)
