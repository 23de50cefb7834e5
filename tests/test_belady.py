"""Belady's rule against every choice there is, on instances small enough to try them all."""

from __future__ import annotations

import functools
import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.belady import Belady, endless, uses_of
from kvstore.traces import Trace
from tests import forests


def best(trace: Trace, capacity: int) -> int:
    """The most hits that any choice of residents could give: all of them are tried."""
    parents = trace.parents.tolist()
    chains = []
    for leaf in trace.steps["leaf"].tolist():
        chain = []
        while leaf >= 0:
            chain.append(leaf)
            leaf = parents[leaf]
        chains.append(tuple(reversed(chain)))

    def whole(residents: tuple[int, ...]) -> bool:
        return all(parents[node] < 0 or parents[node] in residents for node in residents)

    @functools.cache
    def hits(at: int, residents: frozenset[int]) -> int:
        if at == len(chains):
            return 0
        there = len(list(itertools.takewhile(residents.__contains__, chains[at])))
        offered = residents | set(chains[at])
        size = min(capacity, len(offered))
        return there + max(
            hits(at + 1, frozenset(kept))
            for kept in itertools.combinations(sorted(offered), size)
            if whole(kept)
        )

    return hits(0, frozenset())


@settings(max_examples=300, deadline=None)
@given(paths=forests.prompts(most=6, deep=3, wide=2), capacity=st.integers(1, 5))
def test_no_choice_of_residents_gives_more_hits(paths: forests.Prompts, capacity: int) -> None:
    trace = forests.trace(paths)
    found = Belady(trace, uses_of(trace), capacity).run()
    assert int(found.sum()) == best(trace, capacity)


@given(paths=forests.prompts())
def test_with_room_for_all_it_is_the_cache_without_bounds(paths: forests.Prompts) -> None:
    trace = forests.trace(paths)
    found = Belady(trace, uses_of(trace), trace.block_count).run()
    assert (found == endless(trace)).all()
    seen: set[int] = set()
    for path, hit in zip(paths, found.tolist(), strict=True):
        ends = [hash(path[:end]) for end in range(1, len(path) + 1)]
        assert hit == len(list(itertools.takewhile(seen.__contains__, ends)))
        seen.update(ends)


def test_more_room_never_gives_fewer_hits() -> None:
    random = np.random.default_rng(1)
    paths = [tuple(random.integers(0, 2, random.integers(1, 9)).tolist()) for _ in range(300)]
    trace = forests.trace(paths)
    uses = uses_of(trace)
    totals = [int(Belady(trace, uses, size).run().sum()) for size in (1, 2, 5, 10, 20, 50, 200)]
    assert totals == sorted(totals) and totals[0] < totals[-1]
