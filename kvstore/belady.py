"""The best that any policy could have done, by one that knows the future; and an endless cache.

Belady's rule for prompts: a block is of use only with all blocks before it, so only the last block
of a chain may leave, and of these the one whose next use is farthest away. A new block that is used
again later than all others is not kept. O(log n) for each block that comes or goes, and a few
numpy operations for each step.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable
from typing import Any

import numpy as np

from kvstore.traces import ASKED, Chains, Trace, depths_of

NEVER = (1 << 31) - 1
PROGRESS_STEPS = 256


@dataclasses.dataclass(slots=True)
class Uses:
    """The chains of all steps in one row, and for each place the next step that asks for its node.
    Made once for a trace, it serves every size."""

    starts: list[int]
    nodes: Any
    next_use: Any


def uses_of(trace: Trace) -> Uses:
    """Look into the future of a trace."""
    steps = trace.steps
    chains = Chains(trace.parents.tolist(), list(range(len(trace.parents))))
    lengths = steps["length"].astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    nodes = np.empty(starts[-1], np.int32)
    leaves = zip(steps["leaf"].tolist(), lengths.tolist(), strict=True)
    for number, (leaf, length) in enumerate(leaves):
        nodes[starts[number] : starts[number + 1]] = chains.to(leaf)[:length]
    owner = np.repeat(np.arange(len(steps), dtype=np.int32), lengths)
    asked = np.repeat(steps["kind"] == ASKED, lengths)
    # Places sorted by node, then by step: the next use of a place is the nearest asking one behind.
    order = np.argsort(nodes, kind="stable")
    use = np.where(asked[order], owner[order], NEVER)
    behind = np.append(use[1:], NEVER)
    last = np.append(nodes[order][1:] != nodes[order][:-1], True)
    behind[last] = NEVER
    next_use = np.empty(len(nodes), np.int32)
    next_use[order] = _nearest(behind, last)
    return Uses(starts.tolist(), nodes, next_use)


def _nearest(behind: Any, last: Any) -> Any:
    """At each place the first value that is not NEVER, from there to the end of its group."""
    places = np.where((behind != NEVER) | last, np.arange(len(behind)), len(behind))
    nearest = np.minimum.accumulate(places[::-1])[::-1]
    return behind[nearest] if len(behind) else behind


class Belady:
    """A cache of so many blocks that knows the future. Use it once."""

    def __init__(self, trace: Trace, uses: Uses, capacity: int) -> None:
        count = len(trace.parents)
        self._trace = trace
        self._uses = uses
        self._free = capacity
        self._parents: list[int] = trace.parents.tolist()
        self._resident = bytearray(count)
        self._children = [0] * count  # that are resident
        self._next_use = np.full(count, NEVER, np.int32)
        self._leaves: list[tuple[int, int]] = []  # -next use, node; those that have changed stay

    def run(self, progress: Callable[[int], None] = lambda done: None) -> Any:
        """Blocks granted at each step."""
        columns = ("kind", "skip", "length", "put")
        steps = zip(*(self._trace.steps[name].tolist() for name in columns), strict=True)
        starts, nodes, next_use = self._uses.starts, self._uses.nodes, self._uses.next_use
        hits = np.zeros(len(starts) - 1, np.int32)
        for number, (kind, skip, length, put) in enumerate(steps):
            start, end = starts[number], starts[number + 1]
            chain = nodes[start:end]
            self._next_use[chain] = next_use[start:end]
            there = self._prefix(chain, length)
            if there:
                self._note(int(chain[there - 1]))
            if kind == ASKED:
                hits[number] = max(0, there - skip)
            if there < put:
                self._insert(chain[there:put].tolist())
            if number % PROGRESS_STEPS == 0:
                progress(number)
        return hits

    def _prefix(self, chain: Any, length: int) -> int:
        """How many leading nodes are resident: none is behind one that is not."""
        resident, low = self._resident, 0
        while low < length:
            middle = (low + length) // 2
            if resident[chain[middle]]:
                low = middle + 1
            else:
                length = middle
        return low

    def _note(self, node: int) -> None:
        """A resident node may be a leaf, or have another next use than before."""
        if not self._children[node]:
            heapq.heappush(self._leaves, (-int(self._next_use[node]), node))

    def _insert(self, nodes: list[int]) -> None:
        """New nodes, each the child of the one before."""
        resident, children, parents = self._resident, self._children, self._parents
        last = parents[nodes[0]]
        for node in nodes:
            parent = last
            if not self._free and not self._evict(int(self._next_use[node]), parent):
                break
            self._free -= 1
            resident[node] = 1
            if parent >= 0:
                children[parent] += 1
            last = node
        if last >= 0:
            self._note(last)

    def _evict(self, before: int, spared: int) -> bool:
        """Let the leaf go whose next use is farthest; False when it is not after `before`."""
        leaves, resident, children = self._leaves, self._resident, self._children
        while leaves:
            use, node = leaves[0]
            if not resident[node] or children[node] or self._next_use[node] != -use:
                heapq.heappop(leaves)
                continue
            if -use <= before or node == spared:
                return False
            heapq.heappop(leaves)
            resident[node] = 0
            self._free += 1
            parent = self._parents[node]
            if parent >= 0:
                children[parent] -= 1
                self._note(parent)
            return True
        return False


def endless(trace: Trace) -> Any:
    """Blocks that a cache without bounds would have granted at each step."""
    steps = trace.steps
    depth = np.append(depths_of(trace.parents), 0)
    seen, parents = bytearray(len(trace.parents)), trace.parents.tolist()
    hits = np.zeros(len(steps), np.int32)
    columns = ("kind", "leaf", "skip", "length", "put")
    rows = zip(*(steps[name].tolist() for name in columns), strict=True)
    for number, (kind, leaf, skip, length, put) in enumerate(rows):
        node, at = leaf, int(depth[leaf])
        while at > length:
            node, at = parents[node], at - 1
        behind = []
        while node >= 0 and not seen[node]:
            behind.append(node)
            node = parents[node]
        there = length - len(behind)
        if kind == ASKED:
            hits[number] = max(0, there - skip)
        for new in behind[::-1][: max(0, put - there)]:
            seen[new] = 1
    return hits
