"""The daemon's own brain on recorded traces, beside what is asked of it, and with hints.

    python -m tests.eviction.bars --traces DIR [--policy NAME] [--hints]
    python -m tests.eviction.bars --traces DIR --two-tiers

Files are those of `tests.eviction.anchors`, read by `kvstore.traces` and played by
`kvstore.simulation`: a store with exactly as many DRAM slots as the anchors have blocks. Ratios are
over the last half of the requests. For hints a trace needs `session` (-1: not known) and `kind`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean

import numpy as np

from kvstore.accesses import REUSES
from kvstore.policies import FAMILIES
from kvstore.simulation import Machine, Simulation
from kvstore.traces import Sizes, Trace, load
from tests.eviction.anchors import ANCHORS

BELOW = {"rel": 0.005, "lru_leaf": 0.003}  # so much may be missing
HINTS = ("none", "tag", "reuse 80 %", "reuse 100 %")
ANCHORS_HINTED = {"reuse 80 %": "rel_hint80", "reuse 100 %": "rel_hint100"}
SEED = 7

# DRAM in shares of the unique blocks; NVMe has four times as many.
TWO_TIERS = (("mooncake_conversation_dev", 0.02), ("cc_dev_512", 0.01))
NVME_FACTOR = 4
WRITES = (
    *(("lru", "through"), ("lru", "on-evict"), ("lru", "second-touch")),
    *(("relevance", "through"), ("relevance", "on-evict")),
)
TOTAL_MORE, WRITES_SHARE = 0.01, 0.75  # beside LRU that writes everything through


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One run over a trace."""

    traces: Path
    trace: str
    policy: str
    dram_blocks: int
    nvme_blocks: int = 0
    write_policy: str = "through"
    hints: str = HINTS[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """`hits` of the blocks asked for; blocks written to NVMe, and per block served."""

    hits: float
    dram_hits: float
    written: int
    written_per_served: float


def play(job: Job) -> Result:
    """Run one job."""
    path = job.traces / f"{job.trace}.npz"
    trace = load(path, bytes_per_token=1)  # loads are fast: bandwidth is not the question
    hint(trace, path, job.hints)
    return run(trace, job)


def run(trace: Trace, job: Job) -> Result:
    """Run one job over a trace that is there."""
    slot = trace.shapes[0].slot_bytes
    sizes = Sizes(
        dram_bytes=job.dram_blocks * slot,
        nvme_bytes=job.nvme_blocks * slot,
        slab_bytes=0,
        write_policy=job.write_policy,
    )
    played = Simulation(trace, sizes, Machine(), FAMILIES[job.policy]).run()
    assert (played.dram_blocks, played.nvme_blocks) == (job.dram_blocks, job.nvme_blocks)
    half = trace.half
    asked = int(trace.steps["length"][half:].sum())
    served, slow = int(played.hits[half:].sum()), int(played.slow[half:].sum())
    written = played.counters.nvme.spilled
    return Result(
        hits=served / asked,
        dram_hits=(served - slow) / asked,
        written=written,
        written_per_served=written / max(1, played.counters.hit),
    )


def hint(trace: Trace, path: Path, hints: str) -> None:
    """Put hints into the trace: its own `kind` as tag, or whether the client will come back."""
    if hints == "none":
        return
    with np.load(path) as columns:
        session, kind = columns["session"], columns["kind"]
    if hints == "tag":
        trace.steps["tag"] = kind + 1
        return
    chance, right = random.Random(SEED), 0.8 if hints == "reuse 80 %" else 1.0
    codes = {again: REUSES.index("continue" if again else "done") for again in (True, False)}
    again = comes_again(trace, session.tolist())
    trace.steps["reuse"] = [codes[one == (chance.random() < right)] for one in again]


def comes_again(trace: Trace, session: Sequence[int]) -> list[bool]:
    """For each request whether its session has a later one. Where it is not known, whether the
    block before the last, which may not have been full, is asked for again."""
    parents, later, asked = trace.parents.tolist(), set[int](), set[int]()
    again: list[bool] = []
    leaves = trace.steps["leaf"].tolist()
    for leaf, of in zip(reversed(leaves), reversed(session), strict=True):
        before = parents[leaf] if leaf >= 0 and parents[leaf] >= 0 else leaf
        again.append(of in later if of >= 0 else before in asked)
        later.add(of)
        while leaf >= 0 and leaf not in asked:  # else those before it are in there, too
            asked.add(leaf)
            leaf = parents[leaf]
    return again[::-1]


# -- tables ---------------------------------------------------------------------------------------


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def below(ratio: float, known: Mapping[str, float]) -> str:
    """Which anchors a ratio falls short of by more than may be."""
    missed = [name for name, by in BELOW.items() if ratio < known[name] - by]
    return "  below " + ", ".join(missed) if missed else ""


def one_tier(options: argparse.Namespace) -> list[str]:
    """The table of all traces and sizes; returns what misses."""
    anchors = json.loads((options.traces / "anchors.json").read_text())["traces"]
    wanted = HINTS if options.hints else HINTS[:1]
    points = [
        (trace, known)
        for trace, sizes in anchors.items()
        for size, known in sizes.items()
        if options.trace in (None, trace) and float(size) <= options.size_max
    ]
    jobs = [
        Job(
            traces=options.traces,
            trace=trace,
            policy=options.policy,
            dram_blocks=known["capacity_blocks"],
            hints=hints,
        )
        for trace, known in points
        for hints in wanted
    ]
    results = carry_out(jobs)
    say("  ".join(f"{word:>13}" for word in ("blocks", *ANCHORS, options.policy)))
    missed, shares, before = [], [(0.0, 0.0)] * 0, ""
    gains: dict[str, list[float]] = {hints: [] for hints in wanted[1:]}
    for trace, known in points:
        if trace != before:
            say(trace)
            before = trace
        found = {hints: next(results).hits for hints in wanted}
        ratio = found.pop("none")
        cells = (*(known[name] for name in ANCHORS), ratio)
        note = below(ratio, known)
        say(f"{known['capacity_blocks']:13}  " + "  ".join(f"{one:13.5f}" for one in cells) + note)
        if note:
            missed.append(f"{trace}, {known['capacity_blocks']} blocks:{note}")
        shares.append((ratio / known["opt"], known["rel"] / known["opt"]))
        for hints, hinted in found.items():
            gains[hints].append(hinted - ratio)
            beside = known.get(ANCHORS_HINTED.get(hints, ""))
            tail = "" if beside is None else f"; reference {beside:.5f}"
            say(f"{'':15}with {hints:12} {hinted:.5f}, {hinted - ratio:+.5f}{tail}")
    ours, rel = (fmean(column) for column in zip(*shares, strict=True))
    say(f"mean share of the best possible: {options.policy} {ours:.4f}, rel {rel:.4f}")
    for hints, gained in gains.items():
        say(f"{hints}: adds {fmean(gained):+.5f} on average, {min(gained):+.5f} at worst")
    return missed


def two_tiers(options: argparse.Namespace) -> list[str]:
    """The table of write policies; returns what misses."""
    points = [point for point in TWO_TIERS if options.trace in (None, point[0])]
    jobs = []
    for trace, share in points:
        blocks = load(options.traces / f"{trace}.npz").block_count
        for policy, write_policy in WRITES:
            dram = round(share * blocks)
            jobs.append(
                Job(
                    traces=options.traces,
                    trace=trace,
                    policy=policy,
                    dram_blocks=dram,
                    nvme_blocks=NVME_FACTOR * dram,
                    write_policy=write_policy,
                )
            )
    results, missed = carry_out(jobs), list[str]()
    for at, job in enumerate(jobs):
        result = next(results)
        if at % len(WRITES) == 0:
            say(f"{job.trace}: DRAM {job.dram_blocks}, NVMe {job.nvme_blocks} blocks")
            say(f"{'':24}{'hits':>9}{'of DRAM':>9}{'written':>10}{'per served':>12}")
            base = result
        name = f"{job.policy} {job.write_policy}"
        verdict = judge(result, base) if job.policy != "lru" else ""
        say(
            f"{name:24}{result.hits:9.5f}{result.dram_hits:9.5f}{result.written:10}"
            f"{result.written_per_served:12.4f}  {verdict}"
        )
        if verdict.startswith("MISSED"):
            missed.append(f"{job.trace}, {name}: {verdict}")
    return missed


def judge(result: Result, base: Result) -> str:
    """How a result stands to the bar: more hits, with fewer writes."""
    more = result.hits - base.hits
    share = result.written_per_served / max(1e-12, base.written_per_served)
    ok = more >= TOTAL_MORE and share <= WRITES_SHARE
    told = f"hits {more:+.5f} (>= {TOTAL_MORE:+.2f}), writes x {share:.3f} (<= {WRITES_SHARE})"
    return f"{'ok' if ok else 'MISSED'}: {told}"


def carry_out(jobs: Iterable[Job]) -> Iterator[Result]:
    """Results in the order of the jobs, as they come; a process on each processor."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        yield from pool.map(play, jobs)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.eviction.bars")
    parser.add_argument("--traces", type=Path, required=True, help="a folder of .npz files")
    parser.add_argument("--policy", choices=[*FAMILIES], default="relevance")
    parser.add_argument("--hints", action="store_true", help="also with tags and reuse hints")
    parser.add_argument("--two-tiers", action="store_true", help="with NVMe, by write policy")
    parser.add_argument("--trace", help="only this one")
    parser.add_argument("--size-max", type=float, default=1.0, help="share of the unique blocks")
    options = parser.parse_args()
    missed = two_tiers(options) if options.two_tiers else one_tier(options)
    for line in missed:
        say(f"missed: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
