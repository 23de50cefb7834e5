"""What a cache of other sizes, or of another policy, would have made of a trace, in figures.

Everything is set beside what bounds it: least-recently-used at the same sizes, the best that could
be done with the future known, and a cache without bounds. The figures are those of
`kvstore simulate --json`; how they look is told by `kvstore.cli_simulate`.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import Any

import numpy as np

from kvstore.belady import Belady, endless, uses_of
from kvstore.policies import FAMILIES
from kvstore.simulation import Machine, Played, Simulation, placement
from kvstore.traces import ASKED, Sizes, Trace, depths_of

VERSION = 1
LRU, BELADY = "lru", "belady"
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
PROGRESS_S = 0.2

Progress = Callable[[int, int], None]  # steps done, of how many


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One pass over the trace."""

    policy: str  # a name in FAMILIES, or BELADY
    sizes: Sizes


def forecast(
    trace: Trace,
    sizes: Sizes,
    machine: Machine,
    policy: str,
    *,
    sweep: bool = False,
    progress: Progress = lambda done, of: None,
) -> dict[str, Any]:
    """The document of `kvstore simulate --json`."""
    names = list(dict.fromkeys([policy, LRU, BELADY]))
    grid = _grid(sizes) if sweep else {}
    runs = [Run(policy=name, sizes=sizes) for name in names]
    runs += [
        Run(policy=name, sizes=one) for ones in grid.values() for _, one in ones for name in names
    ]
    runs = list(dict.fromkeys(runs))
    found = dict(zip(runs, _carry_out(trace, machine, runs, progress), strict=True))
    config = placement(sizes, trace.shapes)
    answer: dict[str, Any] = {
        "version": VERSION,
        "trace": _about(trace),
        "sizes": {
            "dram_bytes": config.dram_bytes,
            "nvme_bytes": config.nvme_bytes,
            "write_policy": config.write_policy,
            "write_budget": config.write_budget,
        },
        "machine": dataclasses.asdict(machine),
        "policy": policy,
        "results": {name: found[Run(policy=name, sizes=sizes)] for name in names},
        "endless": _ratios(trace, endless(trace)),
        "without_cache": {"ttft_s": _spread(_Prompts(trace).ttft(machine, None))},
    }
    if sweep:
        answer["sweep"] = {
            tier: [
                {
                    "factor": factor,
                    "bytes": getattr(one, f"{tier}_bytes"),
                    **{name: found[Run(policy=name, sizes=one)]["hit_ratio"] for name in names},
                }
                for factor, one in ones
            ]
            for tier, ones in grid.items()
        }
    return answer


def _grid(sizes: Sizes) -> dict[str, list[tuple[float, Sizes]]]:
    """For each tier that is there, its other sizes."""
    grid: dict[str, list[tuple[float, Sizes]]] = {}
    for tier in ("dram", "nvme"):
        present = getattr(sizes, f"{tier}_bytes")
        if present:
            grid[tier] = [
                (factor, _resized(sizes, tier, int(present * factor))) for factor in FACTORS
            ]
    return grid


def _resized(sizes: Sizes, tier: str, size: int) -> Sizes:
    if tier == "dram":
        return dataclasses.replace(sizes, dram_bytes=size)
    return dataclasses.replace(sizes, nvme_bytes=size)


# -- passes over the trace ------------------------------------------------------------------------


def _carry_out(
    trace: Trace, machine: Machine, runs: Sequence[Run], progress: Progress
) -> list[dict[str, Any]]:
    """The result of each run; on several processors at once where there are some."""
    of, count = len(trace.steps) * len(runs), min(len(runs), os.cpu_count() or 1)
    if count == 1 or len(trace.steps) < 2_000:
        job, done = _Job(trace, machine), []
        for at, run in enumerate(runs):
            before = at * len(trace.steps)

            def note(steps: int, before: int = before) -> None:
                progress(before + steps, of)

            done.append(job.run(run, note))
        return done
    context = multiprocessing.get_context("spawn")
    counts = context.Array("q", len(runs), lock=False)
    with ProcessPoolExecutor(
        count, mp_context=context, initializer=_begin, initargs=(trace, machine, counts)
    ) as pool:
        futures: list[Future[dict[str, Any]]] = [
            pool.submit(_run, at, run) for at, run in enumerate(runs)
        ]
        try:
            left: set[Future[dict[str, Any]]] = set(futures)
            while left:
                _, left = wait(left, PROGRESS_S)
                progress(sum(counts), of)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


class _Job:
    """What runs have in common."""

    def __init__(self, trace: Trace, machine: Machine) -> None:
        self.trace = trace
        self.machine = machine
        self.prompts = _Prompts(trace)
        self._uses: Any = None

    def run(self, run: Run, progress: Callable[[int], None]) -> dict[str, Any]:
        started, config = time.perf_counter(), placement(run.sizes, self.trace.shapes)
        if run.policy == BELADY:
            if self._uses is None:
                self._uses = uses_of(self.trace)
            slot_bytes = float(np.mean([shape.slot_bytes for shape in self.trace.shapes]))
            answer: dict[str, Any] = {}
            for tiers, size in (
                ("", config.dram_bytes + config.nvme_bytes),
                ("dram_", config.dram_bytes),
            ):
                hits = Belady(self.trace, self._uses, int(size / slot_bytes)).run(progress)
                ratios = _ratios(self.trace, hits)
                answer |= {f"{tiers}{name}": ratio for name, ratio in ratios.items()}
                if not config.nvme_bytes:
                    break
        else:
            simulation = Simulation(self.trace, run.sizes, self.machine, FAMILIES[run.policy])
            answer = self._told(simulation.run(progress), config.dram_bytes, config.nvme_bytes)
        progress(len(self.trace.steps))
        return answer | {"seconds": round(time.perf_counter() - started, 3)}

    def _told(self, played: Played, dram_bytes: int, nvme_bytes: int) -> dict[str, Any]:
        counters, slow = played.counters, played.slow
        hits = counters.hit or 1
        tiers = {
            "dram": {
                "capacity_bytes": dram_bytes,
                "hits": counters.dram.hits,
                "hit_ratio": _share(counters.dram.hits, counters.asked),
                "evicted": dict(counters.dram.evicted),
            },
            "nvme": {
                "capacity_bytes": nvme_bytes,
                "hits": counters.nvme.hits,
                "hit_ratio": _share(counters.nvme.hits, counters.asked),
                "evicted": dict(counters.nvme.evicted),
                "written_blocks": counters.nvme.spilled,
                "written_bytes": counters.nvme.written_bytes,
                "written_per_hit": counters.nvme.spilled / hits,
            },
        }
        half = self.trace.half
        return {
            **_ratios(self.trace, played.hits),
            "nvme_hit_ratio_last_half": _share(slow[half:].sum(), _asked(self.trace)[half:].sum()),
            "blocks": {
                "asked": counters.asked,
                "hit": counters.hit,
                "miss": counters.miss,
                "stored": counters.stored,
                "refused": counters.refused,
            },
            "misses": dict(counters.misses),
            "tiers": tiers,
            "ttft_s": _spread(self.prompts.ttft(self.machine, played)),
        }


_job: _Job
_counts: Any


def _begin(trace: Trace, machine: Machine, counts: Any) -> None:
    """In each process of the pool."""
    global _job, _counts
    _job, _counts = _Job(trace, machine), counts


def _run(at: int, run: Run) -> dict[str, Any]:
    def note(steps: int) -> None:
        _counts[at] = steps

    return _job.run(run, note)


# -- figures --------------------------------------------------------------------------------------


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def _asked(trace: Trace) -> Any:
    steps = trace.steps
    return np.where(steps["kind"] == ASKED, steps["length"] - steps["skip"], 0)


def _ratios(trace: Trace, hits: Any) -> dict[str, float]:
    """Blocks granted of those asked for: over all, and over the second half of the requests, when
    the cache is no longer empty."""
    asked, half = _asked(trace), trace.half
    return {
        "hit_ratio": _share(hits.sum(), asked.sum()),
        "hit_ratio_last_half": _share(hits[half:].sum(), asked[half:].sum()),
    }


def _about(trace: Trace) -> dict[str, Any]:
    steps = trace.steps
    return {
        "requests": trace.request_count,
        "block_references": trace.reference_count,
        "unique_blocks": trace.block_count,
        "layouts": [dataclasses.asdict(shape) for shape in trace.shapes],
        "span_s": float(steps["t"][-1]) if len(steps) else 0.0,
        "dropped_requests": trace.dropped,
        "warnings": trace.warnings,
    }


def _spread(seconds: Any) -> dict[str, float | None]:
    if not len(seconds):
        return dict.fromkeys(("mean", "p50", "p99"))
    p50, p99 = np.percentile(seconds, (50, 99))
    return {"mean": float(seconds.mean()), "p50": float(p50), "p99": float(p99)}


class _Prompts:
    """Which steps belong to one prompt: a client may ask for the rest of one by later steps."""

    def __init__(self, trace: Trace) -> None:
        steps = trace.steps
        self._asked = np.flatnonzero(steps["kind"] == ASKED)
        asked = steps[self._asked]
        going: dict[tuple[int, int], int] = {}
        prompt_of, count = np.zeros(len(asked), np.int64), 0
        columns = (asked[name].tolist() for name in ("layout", "leaf", "skip", "again"))
        for at, (layout, leaf, skip, again) in enumerate(zip(*columns, strict=True)):
            prompt = going.pop((layout, leaf), -1) if skip else -1
            if prompt < 0:
                prompt, count = count, count + 1
            prompt_of[at] = prompt
            if again:
                going[layout, leaf] = prompt
        self._prompt_of, self._count = prompt_of, count
        first = np.unique(prompt_of, return_index=True)[1]
        tokens = np.array([shape.block_tokens for shape in trace.shapes])
        sizes = np.array([shape.block_bytes for shape in trace.shapes], np.float64)
        self._block_tokens = tokens[asked["layout"][first]]
        self._block_bytes = sizes[asked["layout"][first]]
        self._skip = asked["skip"][first]
        depth = np.append(depths_of(trace.parents), 0)[asked["leaf"][first]]
        given = asked["tokens"][first]
        self._tokens = np.where(given > 0, given, depth * self._block_tokens)
        self._speed = asked["tokens_per_s"][first]

    def ttft(self, machine: Machine, played: Played | None) -> Any:
        """Seconds until the first token of each prompt, as estimated: waiting for loads, copying
        what was granted, computing the rest. None: computing all of it."""
        hits: Any = np.zeros(self._count)
        waited: Any = hits
        if played is not None:
            hits = np.bincount(self._prompt_of, played.hits[self._asked], self._count)
            waited = np.bincount(self._prompt_of, played.wait_s[self._asked], self._count)
        skip = self._skip if played is not None else 0
        left = np.maximum(0, self._tokens - (hits + skip) * self._block_tokens)
        speed = np.where(self._speed > 0, self._speed, machine.prefill_tokens_per_s)
        return waited + hits * self._block_bytes / machine.dram_bytes_per_s + left / speed
