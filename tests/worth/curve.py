"""How far the online estimates are from exact ones on a recorded trace, and what they cost.

python -m tests.worth.curve --trace FILE.npz      (a compact prefix forest, see kvstore.traces)
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kvstore.ceiling import Ceiling
from kvstore.curve import SAMPLE_MAX, Curve
from tests.forests import load_chains
from tests.worth import exact

SLOT_BYTES = 2 << 20
PREFIX = b"f" * 16
SHARES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
POINTS_MAX = 2.0


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


def online(chains: Sequence[exact.Chain], sample_max: int) -> tuple[Curve, float]:
    """The curve of the chains, and seconds that it took for each key."""
    curve = Curve(sample_max=sample_max)
    spent = 0.0
    for at, chain in enumerate(chains):
        keys = [exact.key(block) for block in chain]
        begin = time.perf_counter()
        curve.observe(PREFIX, keys, SLOT_BYTES, float(at), skip=0, asked=len(keys))
        spent += time.perf_counter() - begin
    return curve, spent / sum(map(len, chains))


def ceiling_of(chains: Sequence[exact.Chain]) -> float:
    """The estimate of a cache that forgets nothing, where a tiny cache hits only root blocks."""
    ceiling = Ceiling()
    for chain in chains:
        ceiling.observe(PREFIX, [exact.key(block) for block in chain], 0)
    return ceiling.hit_ratio or 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--sample", type=int, default=SAMPLE_MAX)
    chosen = parser.parse_args()
    chains = list(load_chains(chosen.trace))
    unique = len({block for chain in chains for block in chain})
    curve, per_key_s = online(chains, chosen.sample)
    say(f"{chosen.trace.name}: {len(chains):,} requests, {unique:,} blocks")
    say("size, blocks   exact  online  points")
    worst = 0.0
    for share in SHARES:
        slots = int(unique * share)
        right = exact.lru_hit_ratio(chains, slots)
        found = curve.hit_ratio(slots * SLOT_BYTES)
        points = (found - right) * 100
        worst = max(worst, abs(points))
        say(f"{slots:>12,}  {right:.4f}  {found:.4f}  {points:+.2f}")
    infinite, estimate = exact.infinite_hit_ratio(chains), ceiling_of(chains)
    say(f"    ceiling   {infinite:.4f}  {estimate:.4f}  {(estimate - infinite) * 100:+.2f}")
    say(
        f"largest difference {worst:.2f} points; sample of {curve.sampled:,} blocks, rate "
        f"{curve.rate:.4f}; {per_key_s * 1e6:.3f} us per key"
    )
    return int(worst > POINTS_MAX or abs(estimate - infinite) > 0.01)


if __name__ == "__main__":
    sys.exit(main())
