"""Least recently used, leaf first: the block idle for longest goes; of a request, its last block.

Not for scans larger than the tier (each block leaves just before it is asked for again) and not for
mixes where few blocks return: there a policy that learns reuse keeps more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from kvstore.eviction.base import Victims


class LRU:
    """O(1) for each key touched and each victim named."""

    def __init__(self, capacity: int = 1) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()  # coldest first

    def admit(self, keys: Sequence[int], now: float) -> None:
        # Last block first: a block is then always colder than the one that it depends on.
        order = self._order
        for key in reversed(keys):
            assert key not in order, f"key {key} admitted twice"
            order[key] = None

    def touch(self, keys: Sequence[int], now: float) -> None:
        self.defer(keys)

    def warm(self, keys: Sequence[int], now: float) -> None:
        self.defer(keys)

    def defer(self, keys: Sequence[int]) -> None:
        order = self._order
        heat = order.move_to_end
        for key in reversed(keys):
            if key in order:
                heat(key)

    def forget(self, keys: Sequence[int]) -> None:
        order = self._order
        for key in keys:
            try:
                del order[key]
            except KeyError:  # not resident; rare, and cheaper than looking first
                continue

    def drop(self, keys: Sequence[int]) -> None:
        pass  # what is not resident is not remembered

    def victims(self, now: float) -> Victims:
        for key in self._order:  # noqa: UP028 - a dict's iterator cannot be sent anything
            yield key

    def residents(self) -> Iterator[int]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, key: int) -> bool:
        return key in self._order
