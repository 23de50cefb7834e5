"""Whether the books of `Relevance` are in order: looks at everything, and behind its back."""

from __future__ import annotations

import numpy as np

from kvstore.eviction.base import Family
from kvstore.eviction.ranking import KEY_MASK, NONE, Ranking
from kvstore.eviction.relevance import Relevance


def check_family(family: Family) -> None:
    """Asserts what must hold between calls."""
    if not isinstance(family, Relevance):
        return
    cohort, hazard = family.blocks.array("cohort"), family.hazard
    known = cohort[cohort != NONE]
    alive = np.bincount(known, minlength=hazard.cohorts.size)
    assert (alive == hazard.cohorts.array("alive")).all(), "cohorts and their blocks disagree"
    for ranking in family._rankings:
        _check_ranking(family, ranking)


def _check_ranking(family: Relevance, ranking: Ranking) -> None:
    columns, parent = ranking.columns, family.blocks.parent
    residents = np.flatnonzero(columns.array("resident")).tolist()
    assert len(ranking) == len(residents)
    children: dict[int, set[int]] = {}
    for key in residents:
        assert family.blocks.cohort[key] != NONE, f"{key} is resident and has no cohort"
        if parent[key] != NONE and key not in ranking._gone:
            children.setdefault(parent[key], set()).add(key)
    for key in range(columns.size):
        linked = set(ranking._more.get(key, ()))
        if columns.child[key] != NONE:
            linked.add(columns.child[key])
        else:
            assert not linked
        assert linked == children.get(key, set()), f"children of {key}"
    waiting = {*ranking._gone, *ranking._aside, *ranking._deferred}
    entries = {entry & KEY_MASK for heap in ranking._old.values() for entry in heap}
    for key in residents:
        if columns.child[key] == NONE and key not in waiting:
            assert columns.queued[key] == family.blocks.cohort[key], f"leaf {key} is not queued"
            assert key in entries, f"leaf {key} is in no heap"
    if ranking._stale:
        return
    for young, heaps in ((False, ranking._old), (True, ranking._young)):
        for kind, heap in heaps.items():
            end = 2 * kind + young
            seen = end in ranking._known and (ranking._known[end], kind, young) in ranking._ends
            assert seen or not heap or end in ranking._changed, f"class {kind} is not looked at"
