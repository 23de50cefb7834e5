"""The blocks of one tier and slot size, and which of them is worth least: see `relevance`.

    resident   it is in this tier
    child      a resident block that depends on it, NONE for a leaf; more than one are in `_more`
    queued     the cohort under which it stands in the heaps, if it is a leaf

In the heaps are leaves, and what was one once: whatever is taken out is looked at again. An entry
is one integer, which takes half the memory of a tuple: when the block was asked for (microseconds,
or what is left of `TIME_END`), how far it is from `DEPTH_END`, and its key, 64, 32 and 32 bits.
"""

from __future__ import annotations

import heapq
from collections.abc import Generator, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from kvstore.eviction.base import Victims
from kvstore.eviction.columns import Columns
from kvstore.eviction.hazard import Hazard

NONE = -1
DEFER_S = 1.0  # for so long what could not leave is not named before others
ENDS_S, ENDS_REQUESTS = 1.0, 32  # for so long the worth of a class's ends is taken for what it was
GAPS_LOOKED_AT = 16
ENTRIES_PER_BLOCK = 4  # in the heaps, before they are made anew

TIME_END, DEPTH_END = 1 << 50, (1 << 31) - 1
KEY_BITS, KEY_MASK = 32, (1 << 32) - 1
TIME_SHIFT = 64
MANY = 64  # leaves that come at once are put into a heap as a whole

Heap = list[int]
Keys = np.ndarray[Any, np.dtype[np.int32]]


class Ranking:
    """Residents, leaves by class, and what is of no use because what it depends on has gone."""

    def __init__(
        self,
        blocks: Columns,
        hazard: Hazard,
        others: list[Ranking],
        stranger: Any,
        *,
        weighted: bool = False,
    ) -> None:
        self._weighted = weighted
        self._blocks = blocks
        self._hazard = hazard
        self._others = others  # of the same family, this one too
        self._stranger = stranger  # called with keys that nobody has told of
        self.columns = Columns(resident="B", child=("i", NONE), queued=("i", NONE))
        self._count = 0
        self._more: dict[int, dict[int, None]] = {}
        self._old: dict[int, Heap] = {}  # for each class, idle for longest first
        self._young: dict[int, Heap] = {}
        self._entries = 0
        self._ends: list[tuple[float, int, bool]] = []  # see `_look`
        self._known: dict[int, float] = {}  # by twice the class, and one more for the young
        self._stale = True  # whether these have to be made anew
        self._changed: set[int] = set()  # ends that other leaves are at since they were looked at
        self._ends_at, self._ends_seen = 0.0, 0  # when, and after how many requests, it was made
        self._gone: dict[int, None] = {}  # named, and not forgotten yet
        self._aside: dict[int, None] = {}  # named, and stayed
        self._deferred: list[int] = []
        self._deferred_at = 0.0  # when the first of them was named
        self._named_at = 0.0
        self._gaps: dict[int, None] = {}  # not here, but resident blocks depend on it

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: int) -> bool:
        return key < self.columns.size and bool(self.columns.resident[key])

    def residents(self) -> Iterator[int]:
        keys = np.flatnonzero(self.columns.array("resident"))
        cohorts = self._blocks.array("cohort")[keys]
        times = self._hazard.cohorts.array("time")[cohorts]
        return iter(keys[np.lexsort((-self._blocks.array("depth")[keys], times))].tolist())

    # -- what happens --------------------------------------------------------------------------

    def admit(self, keys: Sequence[int], now: float) -> None:
        self._settle()
        self._stranger(keys)
        self.columns.reserve(self._blocks.size)
        if len(keys) > MANY and not self._gaps:
            self._admit_many(np.asarray(keys, np.int32))
            return
        resident, child = self.columns.resident, self.columns.child
        parent, depth = self._blocks.parent, self._blocks.depth
        for key in keys:
            assert not resident[key], f"key {key} admitted twice"
            resident[key] = 1
            above = parent[key]
            if above == NONE:
                continue
            if child[above] == NONE and depth[above] + 1 == depth[key]:
                child[above] = key  # as `_link`, which would be called for each block
            else:
                self._link(key)
        if self._gaps:
            for ranking in self._others:
                ranking.filled(keys)
        self._count += len(keys)
        self._push_all([key for key in keys if child[key] == NONE])
        self._trim()

    def _admit_many(self, row: Keys) -> None:
        """As `admit`, in arrays: after a restart it may be millions."""
        columns, in_order = self.columns, np.sort(row)  # np.unique takes ten times as long
        assert (in_order[1:] != in_order[:-1]).all(), "a key admitted twice"
        assert not columns.array("resident")[row].any(), "a key admitted twice"
        columns.array("resident")[row] = 1
        for key in row[self._blocks.array("parent")[row] != NONE].tolist():
            self._link(key)
        self._count += len(row)
        self._push_all(row[columns.array("child")[row] == NONE].tolist())
        self._trim()

    def touch(self, keys: Sequence[int], now: float) -> None:
        pass  # the family was told of the request

    def warm(self, keys: Sequence[int], now: float) -> None:
        pass  # nothing leaves before what depends on it

    def defer(self, keys: Sequence[int]) -> None:
        for key in keys:
            self._aside.pop(key, None)
        if not self._deferred:
            self._deferred_at = self._named_at
        self._deferred += keys

    def forget(self, keys: Sequence[int]) -> None:
        columns = self.columns
        resident = columns.resident
        for key in keys:
            if key >= columns.size or not resident[key]:
                continue
            resident[key] = 0
            columns.queued[key] = NONE
            self._count -= 1
            if self._gone.pop(key, key) is not None:
                self._unlink(key)
        for ranking in self._others:
            ranking.missing(keys)

    def drop(self, keys: Sequence[int]) -> None:
        pass  # the family is told

    # -- what the family tells -----------------------------------------------------------------

    def moved(self, chain: Keys | list[int]) -> None:
        """These blocks are of other cohorts now."""
        columns = self.columns
        columns.reserve(self._blocks.size)
        if len(chain) <= MANY:
            resident, child = columns.resident, columns.child
            for key in chain if isinstance(chain, list) else chain.tolist():
                if child[key] == NONE and resident[key]:
                    self._push(key)
            self._trim()
            return
        here = columns.array("resident")[chain] != 0
        for key in chain[here & (columns.array("child")[chain] == NONE)].tolist():
            self._push(key)
        self._trim()

    def hang(self, keys: Sequence[int]) -> None:
        """What these depend on is known now."""
        self.columns.reserve(self._blocks.size)
        resident = self.columns.resident
        for key in keys:
            if resident[key] and key not in self._gone:
                self._link(key)

    def missing(self, keys: Sequence[int]) -> None:
        """Blocks have left one of the tiers, or were never in this one."""
        child, size = self.columns.child, self.columns.size
        for key in keys:
            if NONE < key < size and child[key] != NONE:
                self._gaps[key] = None

    def supports(self, key: int) -> bool:
        """Whether a block that is here depends on this one."""
        return key < self.columns.size and self.columns.child[key] != NONE

    def filled(self, keys: Sequence[int]) -> None:
        """Blocks have come to one of the tiers."""
        for key in keys:
            self._gaps.pop(key, None)

    def cut(self, keys: Sequence[int]) -> list[int]:
        """Blocks that are not resident are not known any more; what hangs on them here."""
        self._settle()
        child, size = self.columns.child, self.columns.size
        orphans: list[int] = []
        for key in [key for key in keys if key < size and child[key] != NONE]:
            orphans += (child[key], *self._more.pop(key, ()))
            child[key] = NONE
        if self._gaps:
            self.filled(keys)
        return orphans

    # -- naming --------------------------------------------------------------------------------

    def victims(self, now: float) -> Victims:
        self._settle()
        now = max(now, self._hazard.now)
        self._named_at = now
        if now - self._deferred_at >= DEFER_S:
            self._take_back()
        if self._gaps:
            yield from self._useless()
        yield from self._leaves(now)
        if self._deferred:  # nobody else is left
            self._take_back()
            yield from self._leaves(now)

    def _take_back(self) -> None:
        deferred, self._deferred = self._deferred, []
        named = self._gone.keys() | self._aside.keys() if self._gone or self._aside else ()
        self._requeue([key for key in deferred if key not in named])

    def _leaves(self, now: float) -> Victims:
        """Leaves of all classes, least worthy first. What an end of a class was worth when it was
        looked at last says which is looked at again."""
        cohort, parents = self._blocks.cohort, self._blocks.parent
        queued, child, resident = self.columns.queued, self.columns.child, self.columns.resident
        gone, aside, more = self._gone, self._aside, self._more
        known = self._known
        ends = self._look(now)
        while ends:
            worth, kind, young = heapq.heappop(ends)
            end = 2 * kind + young
            if known.get(end) != worth:
                continue  # it was looked at since
            heap = (self._young if young else self._old)[kind]
            first = self._worth(kind, heap, young, now)
            if not heap:
                del known[end]
                continue
            known[end] = first
            heapq.heappush(ends, (first, kind, young))
            if first > worth and first > ends[0][0]:
                continue
            key = heapq.heappop(heap) & KEY_MASK
            self._entries -= 1
            while True:
                of = cohort[key]
                queued[key] = NONE  # as `_name`, which would be called for each block
                aside[key] = None
                if (yield key):
                    key = NONE
                    break
                del aside[key]
                gone[key] = None
                parent = parents[key]
                if parent == NONE:
                    key = NONE
                elif child[parent] == key and parent not in more:  # as `_take_off`, likewise
                    child[parent] = NONE
                    key = parent if resident[parent] else NONE
                else:
                    key = self._take_off(key)
                if key == NONE or cohort[key] != of:
                    break  # else: the tail of a request leaves as one
            if key != NONE:
                self._push(key)
                self._look(now)

    def _look(self, now: float) -> list[tuple[float, int, bool]]:
        """For each class, and each end of it, what the first leaf is worth, or was a moment ago: a
        heap. In it are also earlier values, which are not those that are `known`."""
        ends, known, seen = self._ends, self._known, self._hazard.seen
        if now - self._ends_at >= ENDS_S or seen - self._ends_seen >= ENDS_REQUESTS or self._stale:
            ends.clear()
            known.clear()
            self._stale = False
            self._ends_at, self._ends_seen = now, seen
            self._changed.update(2 * kind for kind in self._old)
            self._changed.update(2 * kind + 1 for kind in self._young)
        for end in self._changed:
            kind, young = end >> 1, bool(end & 1)
            if heap := (self._young if young else self._old)[kind]:
                worth = self._worth(kind, heap, young, now)
                if heap and known.get(end) != worth:
                    known[end] = worth
                    heapq.heappush(ends, (worth, kind, young))
        self._changed.clear()
        return ends

    def _name(self, key: int) -> Generator[int, bool | None, int]:
        """Name a leaf. When it leaves, and what it depended on is a leaf then: that, else NONE."""
        self.columns.queued[key] = NONE
        self._aside[key] = None
        if (yield key):
            return NONE
        del self._aside[key]
        self._gone[key] = None
        return self._take_off(key)

    def _useless(self) -> Victims:
        """Leaves that depend, by whatever way, on blocks that are in no tier."""
        for gap in list(islice(self._gaps, GAPS_LOOKED_AT)):
            if self.columns.child[gap] == NONE or any(gap in one for one in self._others):
                del self._gaps[gap]
                continue
            path = [gap]
            stuck = False
            while path and not stuck:
                child = self.columns.child[path[-1]]
                if child != NONE:
                    path.append(child)
                    continue
                key = path.pop()
                if path:
                    yield from self._name(key)
                    stuck = key in self._aside
            if stuck:  # others first, the next time
                del self._gaps[gap]
                self._gaps[gap] = None

    def _worth(self, kind: int, heap: Heap, young: bool, now: float) -> float:
        """What the first leaf is worth, after whatever is not one any more was taken away."""
        cohorts, cohort = self._hazard.cohorts, self._blocks.cohort
        queued, times, kinds = self.columns.queued, cohorts.time, cohorts.kind
        while heap:
            key, when = heap[0] & KEY_MASK, heap[0] >> TIME_SHIFT
            if young:
                when = TIME_END - when
            of = queued[key]
            if of != NONE and of == cohort[key] and kinds[of] == kind:
                time = times[of]
                if int(time * 1e6) == when:
                    if self.columns.child[key] == NONE:
                        worth = self._hazard.worth(kind, max(0.0, now - time))
                        return worth * self._blocks.weight[key] if self._weighted else worth
                    queued[key] = NONE
            heapq.heappop(heap)
            self._entries -= 1
        return 0.0

    def _push(self, key: int) -> None:
        """A leaf takes part, under the cohort that it has now; no older entry of it counts."""
        cohorts = self._hazard.cohorts
        self.columns.queued[key] = of = self._blocks.cohort[key]
        kind, when = cohorts.kind[of], int(cohorts.time[of] * 1e6)
        rest = DEPTH_END - self._blocks.depth[key] << KEY_BITS | key
        entry = when << TIME_SHIFT | rest
        heapq.heappush(heap := self._old.setdefault(kind, []), entry)
        if heap[0] is entry:
            self._changed.add(2 * kind)
        entry = TIME_END - when << TIME_SHIFT | rest
        heapq.heappush(heap := self._young.setdefault(kind, []), entry)
        if heap[0] is entry:
            self._changed.add(2 * kind + 1)
        self._entries += 2

    def _push_all(self, keys: Sequence[int]) -> None:
        """As `_push`, cheaper where they are many. Of one cohort, as after a restart, the youngest
        are the oldest, and stand in one heap only."""
        row = np.asarray(keys, np.int32) if len(keys) >= MANY else None
        if row is None or np.ptp(self._blocks.array("cohort")[row]):
            for key in keys:
                self._push(key)
            return
        of, columns = self._blocks.cohort[keys[0]], self._hazard.cohorts
        depths = self._blocks.array("depth")[row]
        self.columns.array("queued")[row] = of
        when = int(columns.time[of] * 1e6) << TIME_SHIFT
        rests = (DEPTH_END - depths.astype(np.int64) << KEY_BITS | row).tolist()
        self._changed.add(2 * columns.kind[of])
        heap = self._old.setdefault(columns.kind[of], [])
        heap += [when | rest for rest in rests]
        heapq.heapify(heap)
        self._entries += len(rests)

    def _requeue(self, keys: Sequence[int]) -> None:
        resident, child = self.columns.resident, self.columns.child
        self._push_all([key for key in keys if resident[key] and child[key] == NONE])

    def _trim(self) -> None:
        """Many entries are of what is no leaf any more, or was asked for again."""
        if self._entries <= ENTRIES_PER_BLOCK * self._count + 1_024:
            return
        self._old.clear()
        self._young.clear()
        self._changed.clear()
        self._stale = True
        self._entries = 0
        columns = self.columns
        here = columns.array("resident") != 0
        waiting = set(self._deferred) | set(self._aside)
        leaves = np.flatnonzero(here & (columns.array("child") == NONE)).tolist()
        self._requeue([key for key in leaves if key not in waiting])

    def _settle(self) -> None:
        """What was named, and has not been forgotten, is as it was."""
        if self._gone:
            back, self._gone = list(self._gone), {}
            for key in back:
                self._link(key)
                self.missing((self._blocks.parent[key],))
            self._requeue(back)
        if self._aside:
            aside, self._aside = list(self._aside), {}
            self._requeue(aside)

    # -- who depends on whom -------------------------------------------------------------------

    def _link(self, key: int) -> None:
        blocks = self._blocks
        parent = blocks.parent[key]
        if parent == NONE:
            return
        if blocks.depth[parent] + 1 != blocks.depth[key]:
            blocks.parent[key] = NONE  # what it continued was dropped while it was away
            return
        child = self.columns.child
        if child[parent] == NONE:
            child[parent] = key
        elif child[parent] != key:
            self._more.setdefault(parent, {})[key] = None

    def _unlink(self, key: int) -> None:
        parent = self._take_off(key)
        if parent != NONE:
            self._push(parent)

    def _take_off(self, key: int) -> int:
        """Take a block off its parent: the parent, when it is a resident leaf then, else NONE."""
        parent, child = self._blocks.parent[key], self.columns.child
        if parent == NONE:
            return NONE
        more = self._more.get(parent)
        if child[parent] == key:
            child[parent] = NONE if more is None else more.popitem()[0]
        elif more is not None:
            more.pop(key, None)
        if more is not None and not more:
            del self._more[parent]
        if child[parent] != NONE or not self.columns.resident[parent]:
            return NONE
        return int(parent)
