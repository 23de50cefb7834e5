"""Keys in several queues, each key in one: what the policies with more than one queue share.

Which queue a key belongs in, and from which one the next victim comes, is left to them.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

Queue = OrderedDict[int, None]  # coldest first


class Queues:
    """Resident keys in `queues`, roughly the least valuable queue first. Each call is O(1) a key.

    Every list is worked through from its end, so within one queue a block stays colder than the
    one that it depends on.
    """

    def __init__(self, count: int) -> None:
        self.queues: tuple[Queue, ...] = tuple(OrderedDict() for _ in range(count))
        self._home: dict[int, Queue] = {}

    def place(self, key: int, queue: Queue) -> None:
        """The key, resident or not, is now the last of the queue."""
        home = self._home.get(key)
        if home is queue:
            queue.move_to_end(key)
            return
        if home is not None:
            del home[key]
        queue[key] = None
        self._home[key] = queue

    def take(self, key: int) -> Queue | None:
        """The key is in no queue any more; returns the one in which it was."""
        home = self._home.pop(key, None)
        if home is not None:
            del home[key]
        return home

    def home(self, key: int) -> Queue | None:
        """The queue of a resident key."""
        return self._home.get(key)

    def warm(self, keys: Sequence[int], now: float) -> None:
        self.defer(keys)

    def defer(self, keys: Sequence[int]) -> None:
        for key in reversed(keys):
            home = self._home.get(key)
            if home is not None:
                home.move_to_end(key)

    def residents(self) -> Iterator[int]:
        return chain.from_iterable(self.queues)

    def __len__(self) -> int:
        return len(self._home)

    def __contains__(self, key: int) -> bool:
        return key in self._home


class Line:
    """A queue as it would stand after keys had left and come; the queue itself is only read."""

    def __init__(self, queue: Iterable[int], count: int) -> None:
        self._rest = iter(queue)
        self._behind: deque[int] = deque()
        self.head = next(self._rest, None)
        self.count = count

    def pop(self) -> int:
        """Take the head."""
        key = self.head
        assert key is not None, "no head to take"
        self.head = next(self._rest, None)
        if self.head is None and self._behind:
            self.head = self._behind.popleft()
        self.count -= 1
        return key

    def push(self, key: int) -> None:
        """Put a key at the end."""
        if self.head is None:
            self.head = key
        else:
            self._behind.append(key)
        self.count += 1
