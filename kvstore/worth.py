"""What the store is worth, and what other sizes of its tiers would give. Part of the brain.

It observes answered requests and changes nothing. The curve of `kvstore.curve` is that of LRU; the
daemon's policy may do better, and refused blocks and slow loads make it do worse. So what was
measured at the present sizes is compared with what the curve says of them, and the difference is
added to the estimates of other sizes, within 0 and the ceiling.

Tiers are taken as inclusive: what is stored is copied to NVMe, and copied up when it is read there,
so both together hit what the larger of them hits alone. With nvme.write_policy = "on-evict" a block
is on NVMe only once it has left DRAM, so both hold up to the sum: the estimate is low by that much.
"""

from __future__ import annotations

import dataclasses
import math

from kvstore.accesses import Access, AccessKind
from kvstore.ceiling import Ceiling
from kvstore.curve import Curve

HALF_LIFE_S = 86_400.0  # the last days decide
RATE_AFTER_S = 60.0  # what is said of a day needs at least so much of it
FACTORS = (0.5, 1.0, 2.0, 4.0)
DAY_S = 86_400.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What is expected when one tier has another size. Saved are prefills, in all, not in addition;
    None where it is not known yet, or clients do not tell their speed."""

    tier: str
    factor: float
    dram_bytes: int
    nvme_bytes: int
    hit_ratio: float
    dram_hit_ratio: float
    saved_tokens_per_day: float | None
    saved_prefill_seconds_per_day: float | None


@dataclasses.dataclass(slots=True)
class _Recent:
    """Sums of the recent past: each request weighs half as much after a half-life."""

    since: float | None = None
    now: float = 0.0
    asked: float = 0.0
    hit: float = 0.0
    dram_hit: float = 0.0
    tokens: float = 0.0  # asked for
    timed_tokens: float = 0.0  # of those, by clients that tell their speed
    timed_s: float = 0.0  # that computing them takes

    def age(self, now: float) -> None:
        if self.since is None:
            self.since = self.now = now
        if now > self.now:
            keep = math.exp2((self.now - now) / HALF_LIFE_S)
            self.now = now
            self.asked *= keep
            self.hit *= keep
            self.dram_hit *= keep
            self.tokens *= keep
            self.timed_tokens *= keep
            self.timed_s *= keep

    @property
    def tokens_per_day(self) -> float | None:
        elapsed = self.now - self.since if self.since is not None else 0.0
        if elapsed < RATE_AFTER_S:
            return None
        weighed = (1 - math.exp2(-elapsed / HALF_LIFE_S)) * HALF_LIFE_S / math.log(2)
        return self.tokens / weighed * DAY_S


class Worth:
    """Ceiling and forecasts of one tenant."""

    def __init__(self, dram_bytes: int, nvme_bytes: int) -> None:
        self.dram_bytes = dram_bytes
        self.nvme_bytes = nvme_bytes
        horizon = 1.25 * max(FACTORS) * max(dram_bytes, nvme_bytes)
        self.ceiling = Ceiling()
        self.curve = Curve(horizon_bytes=horizon, half_life_s=HALF_LIFE_S)
        self._recent = _Recent()

    def observe(self, access: Access) -> None:
        """A call was answered."""
        entry, keys, skip = access.entry, access.keys, access.skip
        asked = 0
        if access.kind is AccessKind.ASKED:
            asked = access.granted + access.missed
            self._count(access)
            missed = keys[skip + access.granted : skip + asked] if access.missed else ()
            unshown = access.missed - len(missed)  # a limit cut the list: taken as possible
            self.ceiling.observe(entry.fingerprint, missed, access.granted + unshown)
            keys = keys[: skip + asked]
        else:
            self.ceiling.stored(entry.fingerprint, keys[skip:])
        if keys:
            self.curve.observe(
                entry.fingerprint, keys, entry.slot_bytes, access.now, skip=skip, asked=asked
            )

    @property
    def ceiling_hit_ratio(self) -> float | None:
        """What a cache that never forgets would have hit so far; None before the first request."""
        return self.ceiling.hit_ratio

    def what_if(self) -> list[Forecast]:
        """What half, the same, double and four times of each tier would give; empty before the
        first request. A tier that is not there is left out."""
        recent = self._recent
        if recent.asked <= 0.0:
            return []
        chosen: list[tuple[str, float, int, int]] = []
        for factor in FACTORS if self.dram_bytes else ():
            chosen.append(("dram", factor, int(self.dram_bytes * factor), self.nvme_bytes))
        for factor in FACTORS if self.nvme_bytes else ():
            chosen.append(("nvme", factor, self.dram_bytes, int(self.nvme_bytes * factor)))
        sizes = [self.dram_bytes, max(self.dram_bytes, self.nvme_bytes)]
        for _, _, dram, nvme in chosen:
            sizes += dram, max(dram, nvme)
        ratios = self.curve.hit_ratios(sizes)
        measured, fast = recent.hit / recent.asked, recent.dram_hit / recent.asked
        fast_more, more = fast - ratios[0], measured - ratios[1]
        most = max(self.ceiling_hit_ratio or 0.0, measured)
        return [
            self._forecast(
                one,
                min(max(ratios[2 * at + 3] + more, 0.0), most),
                min(max(ratios[2 * at + 2] + fast_more, 0.0), most),
            )
            for at, one in enumerate(chosen)
        ]

    # -- inside --------------------------------------------------------------------------------

    def _count(self, access: Access) -> None:
        recent = self._recent
        recent.age(access.now)
        asked = access.granted + access.missed
        tokens = asked * access.entry.layout.block_tokens
        recent.asked += asked
        recent.hit += access.granted
        recent.dram_hit += access.granted - access.nvme
        recent.tokens += tokens
        if access.tokens_per_s > 0:
            recent.timed_tokens += tokens
            recent.timed_s += tokens / access.tokens_per_s

    def _forecast(self, one: tuple[str, float, int, int], total: float, fast: float) -> Forecast:
        recent = self._recent
        tokens = recent.tokens_per_day
        saved = None if tokens is None else tokens * total
        seconds = None
        if saved is not None and recent.timed_tokens > 0:
            seconds = saved * recent.timed_s / recent.timed_tokens
        return Forecast(
            tier=one[0],
            factor=one[1],
            dram_bytes=one[2],
            nvme_bytes=one[3],
            hit_ratio=total,
            dram_hit_ratio=min(fast, total),
            saved_tokens_per_day=saved,
            saved_prefill_seconds_per_day=seconds,
        )
