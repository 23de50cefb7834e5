"""Ceiling, curve and forecasts against exact counts."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.accesses import Access, AccessKind
from kvstore.catalog import Catalog
from kvstore.ceiling import Ceiling
from kvstore.curve import Curve
from kvstore.types import MIB, Layout
from kvstore.worth import DAY_S, HALF_LIFE_S, Worth
from tests.forests import Prompts, forest, prompts
from tests.worth import exact
from tests.worth.exact import key

PREFIX = b"f" * 16
SLOT = 1 << 16
ENTRY = Catalog().open(
    Layout(model="m", engine="e", dtype="bfloat16", block_tokens=16, shards=1, shard_bytes=2 * MIB)
)
POINTS = 0.02


def chains_of(paths: Prompts) -> list[list[int]]:
    parents, leaves = forest(paths)
    chains = []
    for leaf in leaves:
        chain = []
        while leaf >= 0:
            chain.append(leaf)
            leaf = parents[leaf]
        chains.append(chain[::-1])
    return chains


def ask(curve: Curve, chain: exact.Chain, now: float = 0.0, slot: int = SLOT) -> None:
    keys = [key(block) for block in chain]
    curve.observe(PREFIX, keys, slot, now, skip=0, asked=len(keys))


# --- the curve -----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(prompts(most=30, deep=8), st.integers(1, 40))
def test_with_all_keys_sampled_the_curve_is_exact(paths: Prompts, slots: int) -> None:
    chains = chains_of(paths)
    curve = Curve(rate_max=1.0)
    for chain in chains:
        ask(curve, chain)
    # Half a block more: the histogram's buckets are 1 % wide.
    found = curve.hit_ratio((slots + 0.5) * SLOT)
    assert found == pytest.approx(exact.lru_hit_ratio(chains, slots))


@pytest.mark.parametrize("seed", range(3))
def test_a_sample_is_within_two_points(seed: int) -> None:
    chains = exact.conversations(seed, 2500)
    unique = len({block for chain in chains for block in chain})
    curve = Curve(sample_max=8192, rate_max=1.0)
    for chain in chains:
        ask(curve, chain)
    assert curve.sampled <= 8192 and curve.rate < 0.8, "the threshold has sunk"
    for share in (0.01, 0.03, 0.1, 0.2, 0.5, 1.0):
        slots = int(unique * share)
        right = exact.lru_hit_ratio(chains, slots)
        assert abs(curve.hit_ratio(slots * SLOT) - right) <= POINTS, (share, right)


def test_runs_are_numbered_anew_without_a_trace() -> None:
    rng = random.Random(5)
    chains = [[rng.randrange(12)] for _ in range(500)]
    curve = Curve(sample_max=16, rate_max=1.0)  # a new numbering every 32 requests
    for chain in chains:
        ask(curve, chain)
    for slots in (1, 4, 8, 12):
        assert curve.hit_ratio((slots + 0.5) * SLOT) == pytest.approx(
            exact.lru_hit_ratio(chains, slots)
        )


def test_blocks_count_by_their_bytes() -> None:
    curve = Curve(rate_max=1.0)
    ask(curve, [1])
    ask(curve, [2], slot=8 * SLOT)
    ask(curve, [1])
    assert curve.hit_ratio(8 * SLOT) == 0.0
    assert curve.hit_ratio(9.5 * SLOT) == pytest.approx(1 / 3)


def test_what_is_context_or_not_answered_is_not_counted() -> None:
    curve = Curve(rate_max=1.0)
    keys = [key(block) for block in range(4)]
    curve.observe(PREFIX, keys, SLOT, 0.0, skip=4, asked=0)  # offered
    curve.observe(PREFIX, keys, SLOT, 0.0, skip=1, asked=2)
    assert curve.hit_ratio(1.5 * SLOT) == 0.0, "the second block needs the first"
    assert curve.hit_ratio(2.5 * SLOT) == pytest.approx(0.5)
    assert curve.hit_ratio(3.5 * SLOT) == pytest.approx(1.0)


def test_two_layouts_do_not_share_blocks() -> None:
    curve = Curve(rate_max=1.0)
    for prefix in (b"a" * 16, b"b" * 16):
        curve.observe(prefix, [key(1)], SLOT, 0.0, skip=0, asked=1)
    assert curve.hit_ratio(1e12) == 0.0


def test_the_past_fades() -> None:
    curve = Curve(rate_max=1.0, half_life_s=10.0)
    for at in range(100):
        ask(curve, [at], 0.0)
    for at in range(200):
        ask(curve, [7], 100.0 + at)
    assert curve.hit_ratio(2 * SLOT) > 0.99
    ask(curve, [7], 1e9)
    assert curve.hit_ratio(2 * SLOT) == pytest.approx(1.0), "after years, nothing overflows"


def test_the_dead_leave_the_sample() -> None:
    """A store that ran for long had seen so many keys that none of the living was sampled."""
    rng = random.Random(3)
    curve = Curve(sample_max=512, rate_max=1.0, horizon_bytes=300 * SLOT, half_life_s=2_000)
    chains = []
    for at in range(20_000):
        chain = [10**6 + at] if rng.random() < 0.5 else [rng.randrange(80)]
        chains.append(chain)
        ask(curve, chain, float(at))
    assert curve.rate > 0.2 and curve.sampled <= 512
    right = exact.lru_hit_ratio(chains[-6000:], 250)
    assert abs(curve.hit_ratio(250 * SLOT) - right) <= POINTS


# --- the ceiling ---------------------------------------------------------------------------------


def test_nothing_is_said_before_the_first_request() -> None:
    ceiling = Ceiling()
    ceiling.stored(PREFIX, [key(1)])
    assert ceiling.hit_ratio is None
    assert Worth(MIB, MIB).what_if() == [] and Worth(MIB, MIB).ceiling_hit_ratio is None


@pytest.mark.parametrize("slots", [100, 5_000])
def test_the_ceiling_is_within_a_point(slots: int) -> None:
    """Whatever the store holds: missed again and again, a key is counted once."""
    ceiling, chains = Ceiling(), exact.conversations(11, 2500)
    cache: exact.Cache = exact.Cache()
    for chain in chains:
        hit = exact.leading(chain, cache)
        ceiling.observe(PREFIX, [key(block) for block in chain[hit:]], hit)
        exact.use(cache, chain, slots)
    assert ceiling.hit_ratio == pytest.approx(exact.infinite_hit_ratio(chains), abs=0.01)


def test_what_was_stored_unasked_is_possible() -> None:
    ceiling = Ceiling()
    keys = [key(block) for block in range(20_000)]
    ceiling.stored(PREFIX, keys[:10_000])
    ceiling.observe(PREFIX, keys, 0)
    assert ceiling.hit_ratio == pytest.approx(0.5, abs=0.01)
    ceiling.observe(b"other layout 16b", keys, 0)
    assert ceiling.hit_ratio == pytest.approx(0.25, abs=0.01)


# --- worth ---------------------------------------------------------------------------------------


def replay(
    worth: Worth, chains: list[list[int]], dram: int, nvme: int, *, speed: float = 0.0
) -> None:
    """As a store of these sizes would answer, one request a second."""
    upper, lower = exact.Cache(), exact.Cache()
    for now, chain in enumerate(chains):
        keys = [key(block) for block in chain]
        granted = exact.leading(chain, upper.keys() | lower.keys())
        slow = sum(block not in upper for block in chain[:granted])
        worth.observe(
            Access(
                AccessKind.ASKED,
                ENTRY,
                keys,
                0,
                float(now),
                granted=granted,
                nvme=slow,
                missed=len(keys) - granted,
                tokens_per_s=speed,
            )
        )
        worth.observe(Access(AccessKind.OFFERED, ENTRY, keys, granted, float(now)))
        exact.use(upper, chain, dram)
        exact.use(lower, chain, nvme)


def test_forecasts_of_two_tiers() -> None:
    chains = exact.conversations(2, 2500)
    dram, nvme = 800, 4_000
    slot = ENTRY.slot_bytes
    worth = Worth(dram * slot, nvme * slot)
    worth.curve = Curve(rate_max=1.0, sample_max=1 << 15, half_life_s=HALF_LIFE_S)
    replay(worth, chains, dram, nvme, speed=4_000.0)
    found = worth.what_if()
    assert [(one.tier, one.factor) for one in found] == [
        (tier, factor) for tier in ("dram", "nvme") for factor in (0.5, 1.0, 2.0, 4.0)
    ]
    for one in found:
        total, fast = exact.two_tier_hit_ratios(
            chains, one.dram_bytes // slot, one.nvme_bytes // slot
        )
        assert abs(one.hit_ratio - total) <= POINTS, one
        assert abs(one.dram_hit_ratio - fast) <= POINTS, one
        assert 0.0 <= one.dram_hit_ratio <= one.hit_ratio <= (worth.ceiling_hit_ratio or 0) + 1e-9
        asked = sum(map(len, chains)) * 16 * DAY_S / len(chains)
        tokens, seconds = one.saved_tokens_per_day, one.saved_prefill_seconds_per_day
        assert tokens == pytest.approx(asked * total, rel=0.05)
        assert tokens is not None and seconds == pytest.approx(tokens / 4_000.0)


def test_what_was_measured_at_the_present_sizes_is_what_is_said_of_them() -> None:
    """The policy is not LRU, or loads are slow: the estimate starts from what is."""
    worth = Worth(400 << 20, 0)
    keys = [key(block) for block in range(10)]
    for now in range(100):
        granted = 6 if now else 0
        worth.observe(
            Access(
                AccessKind.ASKED, ENTRY, keys, 0, float(now), granted=granted, missed=10 - granted
            )
        )
    same = next(one for one in worth.what_if() if one.factor == 1.0)
    assert same.hit_ratio == pytest.approx(0.594, abs=0.001)
    assert {one.tier for one in worth.what_if()} == {"dram"}, "there is no NVMe tier to enlarge"
    assert same.saved_tokens_per_day is not None and same.saved_prefill_seconds_per_day is None


def test_an_empty_minute_tells_nothing_of_a_day() -> None:
    worth = Worth(400 << 20, 0)
    worth.observe(Access(AccessKind.ASKED, ENTRY, [key(1)], 0, 5.0, missed=1))
    assert all(one.saved_tokens_per_day is None for one in worth.what_if())


def test_what_a_limit_cut_off_is_counted_too() -> None:
    """A request longer than a limit is shown by its beginning alone: asked stays hit + miss."""
    worth = Worth(400 << 20, 0)
    worth.observe(Access(AccessKind.ASKED, ENTRY, [key(1), key(2)], 0, 5.0, granted=1, missed=4))
    assert worth.ceiling.asked == 5


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(0, 200))
def test_forecasts_are_ratios_and_grow_with_size(seed: int, dram: int, nvme: int) -> None:
    worth = Worth(dram * ENTRY.slot_bytes, nvme * ENTRY.slot_bytes)
    worth.curve = Curve(rate_max=0.5, sample_max=64)
    chains = exact.conversations(seed, 60)
    replay(worth, chains, dram, nvme)
    assert worth.ceiling.asked == sum(map(len, chains))
    for tier in ("dram", "nvme"):
        mine = [one for one in worth.what_if() if one.tier == tier]
        for one in mine:
            assert 0.0 <= one.dram_hit_ratio <= one.hit_ratio <= 1.0
            assert math.isfinite(one.hit_ratio)
        ratios = [one.hit_ratio for one in mine]
        assert ratios == sorted(ratios)


def test_the_hottest_key_need_not_be_sampled() -> None:
    """The correction of SHARDS-adj: uses that the sample lacks are those of hot keys."""
    for block in range(64):
        curve = Curve(rate_max=0.5)
        for _ in range(100):
            ask(curve, [block])
        assert curve.hit_ratio(2 * SLOT) >= 0.98, "sampled or not"
        if not curve.sampled:
            return
    raise AssertionError("every key was sampled")


def test_a_warm_up_raises_the_ceiling() -> None:
    worth = Worth(400 << 20, 0)
    keys = [key(block) for block in range(100)]
    worth.observe(Access(AccessKind.OFFERED, ENTRY, keys, 0, 0.0))
    worth.observe(Access(AccessKind.ASKED, ENTRY, keys, 0, 1.0, missed=100))
    assert worth.ceiling_hit_ratio == pytest.approx(1.0)
