"""The simulation against a model of a few lines, and what a forecast says beside it."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.belady import Belady, uses_of
from kvstore.errors import InvalidRequest
from kvstore.forecast import forecast
from kvstore.placement import PlacementConfig
from kvstore.policies import FAMILIES
from kvstore.simulation import Machine, Played, Simulation, placement
from kvstore.traces import Chains, Shape, Sizes, Trace, load
from tests import forests

BLOCK = 4096


def sizes(dram: int, nvme: int = 0, **more: object) -> Sizes:
    return Sizes(dram_bytes=dram * BLOCK, nvme_bytes=nvme * BLOCK, slab_bytes=0, **more)  # type: ignore[arg-type]


def play(trace: Trace, tiers: Sizes, machine: Machine | None = None) -> tuple[Simulation, Played]:
    simulation = Simulation(trace, tiers, machine or Machine(), FAMILIES["lru"])
    played = simulation.run()
    simulation.store.check()
    return simulation, played


def least_recently_used(trace: Trace, capacity: int) -> list[int]:
    """Hits of each request in a cache whose coldest block goes, of one request the last first, and
    which gives up nothing of a prompt for its own tail."""
    chains = Chains(trace.parents.tolist(), list(range(len(trace.parents))))
    cache: OrderedDict[int, None] = OrderedDict()  # coldest first
    hits = []
    for leaf in trace.steps["leaf"].tolist():
        chain = chains.to(leaf)
        there = 0
        while there < len(chain) and chain[there] in cache:
            there += 1
        hits.append(there)
        room = capacity - sum(1 for node in chain if node in cache)
        new = chain[there:][: max(0, room)]
        while len(cache) + len(new) > capacity:
            del cache[next(node for node in cache if node not in chain)]
        for node in reversed(chain[:there] + new):
            cache[node] = None
            cache.move_to_end(node)
    return hits


@settings(max_examples=200, deadline=None)
@given(paths=forests.prompts(most=30, deep=6), capacity=st.integers(6, 14))
def test_with_memory_alone_it_agrees_with_an_exact_model(
    paths: forests.Prompts, capacity: int
) -> None:
    trace = forests.trace(paths)
    _, played = play(trace, sizes(capacity))
    assert played.hits.tolist() == least_recently_used(trace, capacity)
    assert played.counters.asked == sum(map(len, paths))
    assert played.counters.hit == int(played.hits.sum())


@settings(max_examples=100, deadline=None)
@given(
    paths=forests.prompts(most=30, deep=6),
    dram=st.integers(6, 10),
    nvme=st.integers(1, 40),
    gap_s=st.sampled_from([0.0, 1e-6, 1.0]),
)
def test_every_block_asked_for_is_a_hit_or_a_miss_and_nothing_stays_under_way(
    paths: forests.Prompts, dram: int, nvme: int, gap_s: float
) -> None:
    trace = forests.trace(paths, gap_s=gap_s)
    simulation, played = play(trace, sizes(dram, nvme))
    counters = played.counters
    assert counters.asked == sum(map(len, paths)) == counters.hit + counters.miss
    assert counters.hit == int(played.hits.sum()) == counters.dram.hits + counters.nvme.hits
    assert not simulation._session.leases
    assert (played.wait_s >= 0).all()


def test_a_large_nvme_tier_gives_back_what_memory_has_lost() -> None:
    paths = [(n, 0, 0) for n in range(8)] * 2
    trace = forests.trace(paths)
    _, played = play(trace, sizes(6, 64))
    assert played.hits.tolist() == [0] * 8 + [3] * 8
    assert played.counters.nvme.hits > 0 and played.counters.nvme.spilled == 24


def test_who_waits_for_loads_longer_than_its_deadline_computes_instead() -> None:
    trace = forests.trace([(n, 0, 0) for n in range(8)] * 2)
    slow = Machine(nvme_read_bytes_per_s=100.0, deadline_s=0.5)
    _, played = play(trace, sizes(6, 64), slow)
    assert played.counters.misses["late"] > 0
    assert played.wait_s.max() == pytest.approx(0.5)


def test_a_write_budget_bounds_what_is_written() -> None:
    trace = forests.trace([(n, 0, 0) for n in range(60)])
    _, free = play(trace, sizes(6, 600))
    _, bound = play(trace, sizes(6, 600, write_budget=BLOCK / 10))
    assert free.counters.nvme.spilled > 170  # the last few are still under way
    assert 0 < bound.counters.nvme.spilled <= 60 / 10 + 2


def test_one_run_is_like_the_other() -> None:
    random = np.random.default_rng(3)
    paths = [tuple(random.integers(0, 2, random.integers(1, 9)).tolist()) for _ in range(500)]
    trace = forests.trace(paths, gap_s=0.01)
    first, second = (play(trace, sizes(20, 60))[1] for _ in range(2))
    assert first.counters.misses == second.counters.misses
    assert first.counters.nvme.spilled == second.counters.nvme.spilled > 0
    assert (first.hits == second.hits).all() and (first.wait_s == second.wait_s).all()


def test_a_forecast_stands_between_its_bounds() -> None:
    random = np.random.default_rng(5)
    paths = [tuple(random.integers(0, 2, random.integers(1, 9)).tolist()) for _ in range(400)]
    trace = forests.trace(paths)
    told = forecast(trace, sizes(40, 80), Machine(), "lru", sweep=True)
    lru, belady = told["results"]["lru"], told["results"]["belady"]
    assert lru["tiers"]["dram"]["hits"] + lru["tiers"]["nvme"]["hits"] == lru["blocks"]["hit"]
    assert lru["hit_ratio"] <= belady["hit_ratio"] <= told["endless"]["hit_ratio"]
    assert lru["ttft_s"]["mean"] < told["without_cache"]["ttft_s"]["mean"]
    assert [point["factor"] for point in told["sweep"]["dram"]] == [0.25, 0.5, 1, 2, 4, 8]
    present = told["sweep"]["nvme"][2]
    assert present["lru"] == lru["hit_ratio"] and present["bytes"] == told["sizes"]["nvme_bytes"]
    exact = Belady(trace, uses_of(trace), 120).run()
    assert belady["hit_ratio"] == int(exact.sum()) / trace.reference_count


def test_several_processes_find_what_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(7)
    paths = [tuple(random.integers(0, 2, random.integers(1, 9)).tolist()) for _ in range(2_100)]
    trace = forests.trace(paths)
    told = []
    for processors in (1, 2):
        monkeypatch.setattr("os.cpu_count", lambda count=processors: count)
        one = forecast(trace, sizes(30), Machine(), "lru")
        for result in one["results"].values():
            del result["seconds"]
        told.append(one)
    assert told[0] == told[1]


def test_time_to_first_token_is_loads_and_copies_and_what_is_left_to_compute() -> None:
    trace = forests.trace([(0, 0), (0, 0, 0)])
    machine = Machine(dram_bytes_per_s=BLOCK * 4, prefill_tokens_per_s=16)
    told = forecast(trace, sizes(8), machine, "lru")
    # 2 blocks of a second each; then 2 copied in a quarter each and 1 computed.
    assert told["results"]["lru"]["ttft_s"]["mean"] == pytest.approx((2 + 1.5) / 2)
    assert told["without_cache"]["ttft_s"]["mean"] == pytest.approx((2 + 3) / 2)


# -- compact prefix forests -----------------------------------------------------------------------


@given(paths=forests.prompts())
def test_a_forest_is_read_as_it_was_written(
    paths: forests.Prompts, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = forests.save(tmp_path_factory.mktemp("forest") / "trace.npz", paths)
    found, built = load(path, block_bytes=BLOCK), forests.trace(paths)
    assert (found.parents == built.parents).all()
    for name in ("t", "leaf", "skip", "length", "put"):
        assert (found.steps[name] == built.steps[name]).all(), name
    assert found.reference_count == sum(map(len, paths)) and found.request_count == len(paths)


@pytest.mark.parametrize("content", [b"", b"no trace", b"PK\3\4 no archive", b"kvtrace\1 half"])
def test_what_is_no_trace_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=r": (give|make|record)"):
        load(path)


def test_a_forest_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    path = forests.save(tmp_path / "trace.npz", [(0, 1), (0,)])
    with np.load(path) as good:
        arrays = {name: good[name] for name in good.files}
    wrong: list[tuple[str, Any]] = [
        *(("leaf", values) for values in ([7, 0], [-2, 0], [0], [[0, 1]], [0.0, np.nan])),
        *(("t_ms", values) for values in ([5, 1], [0, np.nan], [0, np.inf], ["a", "b"], 3)),
        *(("block_tokens", values) for values in ([16, 16], np.nan, 0, 1 << 40)),
        ("in_tokens", [1, 2, 3]),
        ("parent_delta", [1, 0]),
    ]
    for name, values in wrong:
        np.savez(path, **(arrays | {name: np.array(values)}))
        with pytest.raises(InvalidRequest, match=r"trace\.npz: .*make it anew"):
            load(path)
    np.savez(path, **{name: value for name, value in arrays.items() if name != "leaf"})
    with pytest.raises(InvalidRequest, match="no array 'leaf'"):
        load(path)


def test_too_little_memory_for_a_block_is_said() -> None:
    with pytest.raises(InvalidRequest, match="hold no block"):
        play(forests.trace([(0,)]), Sizes(dram_bytes=100, nvme_bytes=0, slab_bytes=0))


@settings(max_examples=300, deadline=None)
@given(
    dram=st.integers(1, 5_000),
    nvme=st.integers(0, 50_000),
    blocks=st.integers(1, 9_000),
    slab=st.sampled_from([0, 4, 64]),
)
def test_tiers_that_are_cut_to_what_is_used_still_hold_it(
    dram: int, nvme: int, blocks: int, slab: int
) -> None:
    """In whole slabs, as the store takes them."""
    size = 4096

    def slots(config: PlacementConfig) -> tuple[int, int]:
        each = config.slab_bytes // size
        return (
            config.dram_bytes // config.slab_bytes * each,
            config.nvme_bytes // config.slab_bytes * each,
        )

    sizes = Sizes(dram_bytes=max(dram, slab) * size, nvme_bytes=nvme * size, slab_bytes=slab * size)
    whole = slots(placement(sizes, [Shape(16, size)]))
    cut = slots(placement(sizes, [Shape(16, size)], blocks_max=blocks))
    for before, after in zip(whole, cut, strict=True):
        assert after == before or (blocks <= after < before)
