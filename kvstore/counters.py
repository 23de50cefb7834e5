"""Counts and latencies of one tenant, in one struct: every number that stats and metrics show."""

from __future__ import annotations

import dataclasses
from collections import Counter

SUBBUCKETS = 8  # per doubling: percentiles are right within 9 %


class Latency:
    """A histogram of durations in logarithmic buckets from 1 us."""

    __slots__ = ("_buckets", "count")

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()
        self.count = 0

    def record(self, seconds: float, times: int = 1) -> None:
        """Count a duration."""
        scaled = max(int(seconds * 1e6 * SUBBUCKETS), SUBBUCKETS)
        shift = scaled.bit_length() - SUBBUCKETS.bit_length()
        self._buckets[shift * SUBBUCKETS + (scaled >> shift) - SUBBUCKETS] += times
        self.count += times

    def percentile_ms(self, share: float) -> float | None:
        """The duration that this share of all did not exceed, in ms; None before the first."""
        if not self.count:
            return None
        rank, seen = share * self.count, 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= rank:
                break
        shift, step = divmod(bucket, SUBBUCKETS)
        return (((SUBBUCKETS + step + 1) << shift) / SUBBUCKETS) / 1e3


@dataclasses.dataclass(slots=True)
class TierCounters:
    """What happened in one tier. Blocks, unless the name says bytes."""

    hits: int = 0
    promoted: int = 0
    spilled: int = 0
    evicted: Counter[str] = dataclasses.field(default_factory=Counter)
    corrupt: int = 0
    failed: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    latency: Latency = dataclasses.field(default_factory=Latency)


@dataclasses.dataclass(slots=True)
class Counters:
    """Everything that is counted for one tenant. asked = hit + miss, always."""

    requests: Counter[str] = dataclasses.field(default_factory=Counter)
    errors: Counter[str] = dataclasses.field(default_factory=Counter)
    limited: Counter[str] = dataclasses.field(default_factory=Counter)  # by the limit that was met
    asked: int = 0
    hit: int = 0
    miss: int = 0
    stored: int = 0
    refused: int = 0
    aborted: int = 0
    quarantined: int = 0
    saved_tokens: int = 0
    saved_prefill_s: float = 0.0
    misses: Counter[str] = dataclasses.field(default_factory=Counter)
    hbm: TierCounters = dataclasses.field(default_factory=TierCounters)
    dram: TierCounters = dataclasses.field(default_factory=TierCounters)
    nvme: TierCounters = dataclasses.field(default_factory=TierCounters)

    def tier(self, number: int) -> TierCounters:
        """The counters of a tier by its wire number."""
        return (self.hbm, self.dram, self.nvme)[number]
