"""W-TinyLFU, leaf first: a small window, then a main part for which a sketch of counts decides.

Einziger, Friedman and Manes, "TinyLFU: a highly efficient cache admission policy", ACM Transactions
on Storage, 2017. Not beyond a few percent of a day's blocks: from there it keeps less than LRU, as
a session's new blocks lose against those that were asked for often and are over.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.eviction.base import Victims
from kvstore.eviction.queues import Line, Queues

WINDOW_SHARE = 0.01
PROTECTED_SHARE = 0.8  # of the main part
COUNT_MAX = 15
AGED_AFTER = 10  # accesses for each block that has room: then all counts are halved
HALF = bytes(count >> 1 for count in range(256))
ODD = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)
WORD = (1 << 64) - 1


class Sketch:
    """About how often each key was seen of late; never too little, but for what was halved."""

    def __init__(self, capacity: int) -> None:
        bits = max(4, (2 * capacity - 1).bit_length())
        self._shift = 64 - bits
        self._rows = [bytearray(1 << bits) for _ in ODD]
        self._aged_after = AGED_AFTER * capacity
        self._seen = 0

    def add(self, key: int) -> None:
        """One more access."""
        shift = self._shift
        for row, odd in zip(self._rows, ODD, strict=True):
            at = (key * odd & WORD) >> shift
            if row[at] < COUNT_MAX:
                row[at] += 1
        self._seen += 1
        if self._seen >= self._aged_after:
            self._seen //= 2
            self._rows = [row.translate(HALF) for row in self._rows]

    def count(self, key: int) -> int:
        """Accesses of a key."""
        shift = self._shift
        return min(
            row[(key * odd & WORD) >> shift] for row, odd in zip(self._rows, ODD, strict=True)
        )

    def erase(self, key: int) -> None:
        """The key was never seen. Keys that share all that it wrote lose as much."""
        count = self.count(key)
        for row, odd in zip(self._rows, ODD, strict=True):
            row[(key * odd & WORD) >> self._shift] -= count


class WTinyLFU(Queues):
    """O(1) for each key touched, over time, and for each victim named.

    Room is made before blocks are admitted, so the winner of a comparison moves to the main part
    with the next admission, and is named later until then. A tie goes to the candidate: a block's
    count is never below that of blocks which depend on it, so these leave first.
    """

    def __init__(self, capacity: int = 1) -> None:
        super().__init__(3)
        self._probation, self._window, self._protected = self.queues
        self._window_max = max(1, int(capacity * WINDOW_SHARE))
        self._main_max = capacity - self._window_max
        self._protected_max = int(self._main_max * PROTECTED_SHARE)
        self._sketch = Sketch(capacity)

    def admit(self, keys: Sequence[int], now: float) -> None:
        for key in reversed(keys):
            assert key not in self, f"key {key} admitted twice"
            self._sketch.add(key)
            self.place(key, self._window)
        window = self._window
        while len(window) > self._window_max and len(self) - len(window) < self._main_max:
            self.place(next(iter(window)), self._probation)

    def touch(self, keys: Sequence[int], now: float) -> None:
        in_main = False  # then what it depends on belongs there, too
        for key in reversed(keys):
            home = self.home(key)
            if home is None:
                continue
            self._sketch.add(key)
            in_main = in_main or home is not self._window
            self.place(key, self._protected if in_main else self._window)
        while len(self._protected) > self._protected_max:
            self.place(next(iter(self._protected)), self._probation)

    def forget(self, keys: Sequence[int]) -> None:
        for key in keys:
            self.take(key)

    def drop(self, keys: Sequence[int]) -> None:
        for key in keys:
            self._sketch.erase(key)

    def victims(self, now: float) -> Victims:
        window, probation, protected = (
            Line(queue, len(queue)) for queue in (self._window, self._probation, self._protected)
        )
        while True:
            main = probation if probation.count else protected
            if main.head is None:
                if window.head is None:
                    return
                yield window.pop()
            elif window.head is None or window.count < self._window_max:
                yield main.pop()
            elif self._sketch.count(window.head) >= self._sketch.count(main.head):
                leaves = main.pop()
                probation.push(window.pop())
                yield leaves
            else:
                yield window.pop()
