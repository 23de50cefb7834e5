"""The counts and the worth of `Hazard`, beside what is obviously right and slow."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest

from kvstore.eviction.hazard import (
    ALIKE_REQUESTS,
    BINS,
    FIRST_BIN_S,
    FIRST_REFRESH,
    PRIOR_REQUESTS,
    Hazard,
    _gittins,
    bin_of,
)

EDGES = [0.0] + [FIRST_BIN_S * 2.0**at for at in range(BINS)]
PARTS = 8  # of each bin, as horizons


def test_the_bins_are_octaves() -> None:
    for at in range(BINS):
        assert bin_of(EDGES[at]) == at
        assert bin_of(math.nextafter(EDGES[at + 1], 0.0)) == at
    assert bin_of(1e300) == BINS - 1


def best_of_all_horizons(hazard: Sequence[float], first: int) -> float:
    """Small steps from the start of a bin; the best ratio so far of returns to time."""
    best, risk, stay = 0.0, 0.0, 0.0
    for at in range(first, BINS):
        step, rate = (EDGES[at + 1] - EDGES[at]) / PARTS, hazard[at]
        for _ in range(PARTS):
            part = step if rate * step < 1e-9 else -math.expm1(-rate * step) / rate
            stay += math.exp(-risk) * part
            risk += rate * step
            best = max(best, -math.expm1(-risk) / stay)
    return best


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-12])  # blocks that hardly ever come back, too
@pytest.mark.parametrize("seed", range(10))
def test_the_index_is_the_best_of_all_horizons(seed: int, scale: float) -> None:
    chance = random.Random(seed)
    table = [
        [chance.choice((0.0, scale * chance.random() / EDGES[at + 1])) for at in range(BINS)]
        for _ in range(4)
    ]
    found = _gittins(np.array(table))
    for row, worths in zip(table, found.tolist(), strict=True):
        expected = [best_of_all_horizons(row, first) for first in range(BINS)]
        assert worths == pytest.approx(expected, rel=1e-6, abs=0.0)


class Recount:
    """Each block for itself: when it came to a class, when it left, whether it was asked for."""

    def __init__(self, kinds: int) -> None:
        self.kinds = kinds
        self.stays: list[tuple[int, float, float | None, bool]] = []
        self.cohorts = [0] * kinds

    def hazard(self, now: float, alike: int) -> list[list[float]]:
        """`alike`: so many bins count as one."""
        returns = [[0.0] * BINS for _ in range(self.kinds)]
        seconds = [[0.0] * BINS for _ in range(self.kinds)]
        blocks = [0] * self.kinds
        for kind, came, left, returned in self.stays:
            age = (now if left is None else left) - came
            blocks[kind] += 1
            for at in range(BINS):
                seconds[kind][at] += max(0.0, min(age, EDGES[at + 1]) - EDGES[at])
            if returned:
                returns[kind][bin_of(age)] += 1
        for row in (*returns, *seconds):
            each = sum(row[:alike]) / EDGES[alike]
            row[:alike] = [each * (EDGES[at + 1] - EDGES[at]) for at in range(alike)]
        overall = sum(blocks) / sum(self.cohorts)
        result = []
        for kind in range(self.kinds):
            group = blocks[kind] / self.cohorts[kind] if self.cohorts[kind] else overall
            row = []
            for at in range(BINS):
                all_seconds = sum(one[at] for one in seconds)
                average = sum(one[at] for one in returns) / all_seconds if all_seconds else 0.0
                prior = PRIOR_REQUESTS * group * (EDGES[at + 1] - EDGES[at])
                row.append((returns[kind][at] + average * prior) / (seconds[kind][at] + prior))
            result.append(row)
        return result


@pytest.mark.parametrize("seed", range(5))
def test_the_counts_are_those_of_each_block_for_itself(seed: int) -> None:
    chance, hazard, recount, now = random.Random(seed), Hazard(5), Recount(5), 0.0
    live: dict[int, tuple[int, float, int]] = {}
    for _ in range(300):
        now += chance.expovariate(1 / chance.choice((0.1, 5.0, 300.0)))
        if not live or chance.random() < 0.5:
            kind, blocks = chance.randrange(4), chance.randint(1, 9)  # nobody is of the last
            live[hazard.begin(kind, 1, blocks, blocks, now)] = (kind, now, blocks)
            recount.cohorts[kind] += 1
            continue
        cohort = chance.choice(list(live))
        kind, came, blocks = live.pop(cohort)
        some, returned = chance.randint(1, blocks), chance.random() < 0.5
        hazard.end(cohort, some, now, returned=returned)
        recount.stays += [(kind, came, now, returned)] * some
        if some < blocks:
            live[cohort] = (kind, came, blocks - some)
    now += 10.0
    for kind, came, blocks in live.values():
        recount.stays += [(kind, came, None, False)] * blocks
    every = np.arange(hazard.kinds)
    found = hazard._hazard(now, every)
    assert found == pytest.approx(np.array(recount.hazard(now, alike=1)), rel=1e-9)
    hazard.seen = int(now * 1_000)  # one each millisecond
    hazard.refresh(now)
    expected = recount.hazard(now, alike=bin_of(ALIKE_REQUESTS / 1_000) + 1)
    for kind, row in enumerate(expected):
        # Also of a class that nobody has seen: it is taken for the average.
        assert hazard.worth(kind, 0.0) == pytest.approx(best_of_all_horizons(row, 0), rel=1e-6)
        chance_of = 1.0 - math.exp(-sum(row[at] * (EDGES[at + 1] - EDGES[at]) for at in range(5)))
        assert hazard.chance(kind, 0.0, EDGES[5]) == pytest.approx(chance_of, rel=1e-6)


def test_until_something_is_known_who_is_idle_for_longest_is_worth_least() -> None:
    hazard = Hazard(3)
    ages = [0.0, 0.2, 0.5, 3.0, 3.1, 1e4]
    for kind in range(3):
        worths = [hazard.worth(kind, age) for age in ages]
        assert worths == sorted(worths, reverse=True) and len(set(worths)) == len(ages)
    for step in range(FIRST_REFRESH):
        assert not hazard.learned
        hazard.note_request(float(step))
    assert hazard.learned


def test_what_happened_long_ago_fades() -> None:
    hazard = Hazard(1)
    for step in range(200):
        hazard.end(hazard.begin(0, 1, 1, 1, step), 1, step + 0.4, returned=True)
    before = hazard._returns.sum()
    for _ in range(20):
        hazard._refresh_in = 10_000
        hazard.refresh(200.0)
    assert hazard._returns.sum() == pytest.approx(before / 2)
