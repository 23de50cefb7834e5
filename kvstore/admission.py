"""Whether a block is worth its write to NVMe. Part of the brain.

A block that leaves memory is written down when it was asked for more than once, or when the chance
that it is asked for while it would stay there is at least `LEAST`. A write budget that runs short
raises the bar: with an empty one, nothing but what is as good as certain is written.
"""

from __future__ import annotations

from kvstore.eviction.base import Family

LEAST = 0.1
EASY = 0.5  # the share of the saved-up budget below which the bar rises


class Admission:
    """The bar, and who is above it."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def admits(self, block: int, now: float, stay_s: float, budget: float | None) -> bool:
        """`stay_s` is how long blocks stay on NVMe without being asked for, `budget` how full the
        write budget is, 0 to 1, None for no bound."""
        family, least = self._family, LEAST
        if budget is None or budget >= EASY:
            if family.reused(block):
                return True
        else:
            least = 1.0 - (1.0 - LEAST) * budget / EASY
        return family.likely(block, now, stay_s, least)
