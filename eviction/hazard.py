"""How reuse falls with idle time, for each class of block: counted online, turned into worth.

For a class, at an age (seconds since a block was last asked for) in one of 40 octaves:

    hazard  blocks asked for again at that age / block-seconds seen at that age
    worth   the best, over all horizons, of P(asked for before it) / E[stay until then or it]

Counts are made for cohorts: blocks of one class that were asked for together. What happened to the
members of a cohort is added when it happens, what has not happened yet when the worth is computed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kvstore.eviction.columns import Columns

Floats = np.ndarray[Any, np.dtype[np.float64]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]

BINS = 40
FIRST_BIN_S = 2.0**-11
COARSE_S, ALIKE_REQUESTS = 0.5, 16  # ages below both are not told apart
_EDGES = np.concatenate(([0.0], FIRST_BIN_S * 2.0 ** np.arange(BINS)))
_START, _WIDTH = _EDGES[:-1], np.diff(_EDGES)
_STARTS, _WIDTHS = _START.tolist(), _WIDTH.tolist()

PRIOR_REQUESTS = 3.0  # a class is taken for the average of all until it has seen about as many
HALF_LIFE_REQUESTS = 200_000  # what happened so long ago counts half
FIRST_REFRESH, REFRESH_REQUESTS = 50, 500  # how often the worth is computed anew
COHORTS_PER_REFRESHED_REQUEST = 64  # with many cohorts it is computed more rarely


def bin_of(age: float) -> int:
    """The bin of an age in seconds."""
    if age < FIRST_BIN_S:
        return 0
    at = math.frexp(age / FIRST_BIN_S)[1]
    return at if at < BINS else BINS - 1


class Hazard:
    """Cohorts, counts of their classes (numbers below `kinds`), and what follows from them."""

    def __init__(self, kinds: int) -> None:
        self.kinds = kinds
        self.cohorts = Columns(time="d", alive="i", kind="i", touches="i", length="i")
        self._free: list[int] = []
        self._used = 0
        self._returns = np.zeros((kinds, BINS))
        self._ends = np.zeros((kinds, BINS))  # blocks whose stay in a cohort ended at this age
        self._partial = np.zeros((kinds, BINS))  # their seconds in that last bin
        self._blocks = np.zeros(kinds)  # that entered the class, and in how many cohorts
        self._groups = np.zeros(kinds)
        # The same, flat, for one element at a time: quicker than through numpy.
        self._return, self._end, self._part = map(_view, (self._returns, self._ends, self._partial))
        self._entered, self._begun = map(_view, (self._blocks, self._groups))
        self.seen = 0  # requests
        self.now = 0.0  # when the last of them came
        self._refreshed = 0, 0.0  # how many had been seen, and when it was
        self._coarse = 1  # so many bins count as one: little is known of each
        self._refresh_in = FIRST_REFRESH
        self.learned = False  # until then the worth of all classes falls with idle time, as in LRU
        # For each class its worth, and its hazard summed up to, at the start of each bin.
        self._worth: list[list[float]] = [[2.0**-at for at in range(BINS)]] * kinds
        self._risk: list[list[float]] = [[0.0] * BINS] * kinds

    def begin(self, kind: int, touches: int, length: int, blocks: int, now: float) -> int:
        """A new cohort of that many blocks; its number."""
        cohorts = self.cohorts
        if self._free:
            number = self._free.pop()
        else:
            number = self._used
            self._used += 1
            cohorts.reserve(self._used)
        cohorts.time[number] = now
        cohorts.kind[number] = kind
        cohorts.touches[number] = touches
        cohorts.length[number] = length
        cohorts.alive[number] = blocks
        self._entered[kind] += blocks
        self._begun[kind] += 1
        return number

    def end(self, cohort: int, blocks: int, now: float, *, returned: bool) -> None:
        """Blocks leave their cohort: asked for again, or not to be heard of any more."""
        cohorts = self.cohorts
        kind, age = cohorts.kind[cohort], now - cohorts.time[cohort]
        at = bin_of(age)
        place = kind * BINS + at
        if returned:
            self._return[place] += blocks
        self._end[place] += blocks
        self._part[place] += blocks * (age - _STARTS[at])
        left = cohorts.alive[cohort] - blocks
        assert left >= 0, f"cohort {cohort} has {left} blocks"
        cohorts.alive[cohort] = left
        if not left:
            self._free.append(cohort)

    def worth(self, kind: int, age: float) -> float:
        """Returns to be had per block-second from keeping a block of that class and age."""
        row, at = self._worth[kind], bin_of(age)
        first = row[at]
        if at == BINS - 1:
            return first
        part: float = (age - _STARTS[at]) / _WIDTHS[at]
        return first + part * (row[at + 1] - first)

    def chance(self, kind: int, age: float, horizon_s: float) -> float:
        """The chance that such a block is asked for within that time."""
        return -math.expm1(self._risk_to(kind, age) - self._risk_to(kind, age + horizon_s))

    def _risk_to(self, kind: int, age: float) -> float:
        row, at = self._risk[kind], bin_of(age)
        if at == BINS - 1:
            return row[at]
        return float(row[at] + (age - _STARTS[at]) / _WIDTHS[at] * (row[at + 1] - row[at]))

    # -- learning ------------------------------------------------------------------------------

    def note_request(self, now: float) -> None:
        """A request was seen: now and then, the worth is computed anew."""
        self.now = now
        self.seen += 1
        self._refresh_in -= 1
        if self._refresh_in <= 0:
            # At first often, as much as is new; later as often as it costs little.
            most = max(REFRESH_REQUESTS, self._used // COHORTS_PER_REFRESHED_REQUEST)
            self._refresh_in = min(most, max(FIRST_REFRESH, self.seen // 8))
            self.refresh(now)

    def refresh(self, now: float) -> None:
        """Compute the worth of all classes anew."""
        seen_then, then = self._refreshed
        apart = (now - then) / max(1, self.seen - seen_then)
        self._coarse = 1 + bin_of(min(COARSE_S, ALIKE_REQUESTS * apart) * 0.999)
        self._refreshed = self.seen, now
        seen, unseen = np.flatnonzero(self._groups), np.flatnonzero(self._groups == 0)
        rows = np.concatenate((seen, unseen[:1]))  # those that were not seen are all the same
        hazard = self._hazard(now, rows)
        risk = np.cumsum(hazard * _WIDTH, axis=1)
        risk = np.concatenate((np.zeros((len(rows), 1)), risk[:, :-1]), axis=1)
        worths, risks = _gittins(hazard).tolist(), risk.tolist()
        for at, kind in enumerate([*rows.tolist(), *unseen[1:].tolist()]):
            same = min(at, len(rows) - 1)
            self._worth[kind], self._risk[kind] = worths[same], risks[same]
        self.learned = True
        fade = 0.5 ** (self._refresh_in / HALF_LIFE_REQUESTS)
        for counts in (self._returns, self._ends, self._partial, self._blocks, self._groups):
            counts *= fade

    def _hazard(self, now: float, rows: Numbers) -> Floats:
        """Returns per block-second, for each of these classes and each bin; near the average where
        little is known. All classes that were ever seen must be among them."""
        cohorts, used = self.cohorts, self._used
        alive = cohorts.array("alive")[:used].astype(np.float64)
        age = np.maximum(now - cohorts.array("time")[:used], 0.0)
        bins = np.where(age < FIRST_BIN_S, 0, np.frexp(age / FIRST_BIN_S)[1])
        bins = np.minimum(bins, BINS - 1)
        row_of = np.zeros(self.kinds, np.int64)
        row_of[rows] = np.arange(len(rows))
        place = row_of[cohorts.array("kind")[:used]] * BINS + bins
        shape, places = (len(rows), BINS), len(rows) * BINS
        returns, blocks, groups = self._returns[rows], self._blocks[rows], self._groups[rows]
        ends = self._ends[rows] + np.bincount(place, alive, places).reshape(shape)
        inside = np.bincount(place, alive * (age - _START[bins]), places).reshape(shape)
        beyond = np.cumsum(ends[:, ::-1], axis=1)[:, ::-1] - ends
        exposure = self._partial[rows] + inside + beyond * _WIDTH
        share = _WIDTH[: self._coarse] / _EDGES[self._coarse]
        for counts in (returns, exposure):
            together = counts[:, : self._coarse].sum(axis=1, keepdims=True)
            counts[:, : self._coarse] = together * share
        everything = exposure.sum(axis=0)
        average = np.divide(
            returns.sum(axis=0),
            everything,
            out=np.zeros(BINS),
            where=everything > 0,
        )
        overall = blocks.sum() / max(1.0, groups.sum())
        group = np.where(groups > 0.5, blocks / np.maximum(groups, 0.5), overall)
        prior = PRIOR_REQUESTS * np.outer(np.maximum(group, 1e-9), _WIDTH)
        hazard: Floats = (returns + average * prior) / (exposure + prior)
        return hazard


def _view(counts: Floats) -> Any:
    return memoryview(counts.reshape(-1).data)


def _gittins(hazard: Floats) -> Floats:
    """For each class and age at the start of a bin: max over horizons of P(return) / E[stay]."""
    risk = hazard * _WIDTH
    small = risk < 1e-9
    stay = np.where(small, _WIDTH, -np.expm1(-risk) / np.where(small, 1.0, hazard))
    worth = np.empty_like(hazard)
    for first in range(BINS):
        until = np.cumsum(risk[:, first:], axis=1)
        before = np.exp(-np.concatenate((np.zeros((len(hazard), 1)), until[:, :-1]), axis=1))
        staying = np.cumsum(before * stay[:, first:], axis=1)
        worth[:, first] = np.max(-np.expm1(-until) / staying, axis=1)
    return worth
