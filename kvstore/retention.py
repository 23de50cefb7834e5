"""Blocks that clients asked to keep: how strongly, and until when."""

from __future__ import annotations

import math
from collections.abc import Iterable

PRIORITY_PINNED = 100
RETAINED_MAX = 65_536


class Retention:
    """Retained blocks are passed over by eviction while any other can leave; those of priority 100
    always. A bound on their number keeps a client from retaining everything."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[int, float]] = {}  # block -> priority, until

    def __len__(self) -> int:
        return len(self._kept)

    def retain(self, block: int, priority: int, until: float | None) -> bool:
        """Keep a block; priority 0 ends it. False when too many are kept already."""
        if not priority:
            self.forget([block])
            return True
        if block not in self._kept and len(self._kept) >= RETAINED_MAX:
            return False
        self._kept[block] = (priority, math.inf if until is None else until)
        return True

    def forget(self, blocks: Iterable[int]) -> None:
        """The blocks are kept no longer."""
        if self._kept:
            for block in blocks:
                self._kept.pop(block, None)

    def keeps(self, block: int, now: float) -> bool:
        """Whether a block is kept now."""
        if not self._kept or block not in self._kept:
            return False
        if self._kept[block][1] <= now:
            del self._kept[block]
            return False
        return True

    def pins(self, block: int, now: float) -> bool:
        """Whether a block is kept against everything."""
        return self.keeps(block, now) and self._kept[block][0] >= PRIORITY_PINNED

    def expire(self, now: float) -> None:
        """When there is no place left, give those back whose time is over."""
        if len(self._kept) >= RETAINED_MAX:
            self._kept = {block: kept for block, kept in self._kept.items() if kept[1] > now}

    def weakest(self, blocks: Iterable[int], count: int) -> list[int]:
        """Of these kept blocks, those that go first when nothing else can; pinned ones never."""
        loose = [block for block in blocks if self._kept[block][0] < PRIORITY_PINNED]
        return sorted(loose, key=self._kept.__getitem__)[:count]
