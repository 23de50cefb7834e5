"""A trace played by a client against a real daemon, and by `kvstore simulate`: the same hits?

    python -m tests.e2e.replay --trace FILE [--requests N] [--dram SHARE] [--nvme SHARE] [--times K]

Blocks are of 4 KiB where that fills a daemon's least memory. With --times the brain of the daemon
lives so many times as fast as the clock, and the client keeps the trace's pauses, as much shorter.
Without it they are left out; only a policy that does not go by time sees the same trace then. With
an NVMe tier the client waits after each request until nothing is under way, as it would have waited
in the pauses.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import numpy as np

from kvstore import cli_simulate
from kvstore.client import Client, Layout
from kvstore.forecast import forecast
from kvstore.simulation import Machine
from kvstore.traces import Chains, Sizes, Trace, load
from tests.e2e.harness import Daemon, wait_for

BLOCK_BYTES = 4096
SLAB_BLOCKS = 16
DRAM_LEAST = 8 << 20
BAR = 0.01


def main() -> int:
    """Print both hit ratios; 1 when they differ by more than a point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=1_000)
    parser.add_argument("--dram", type=float, default=0.05, help="share of the distinct blocks")
    parser.add_argument("--nvme", type=float, default=0.0, help="share of the distinct blocks")
    parser.add_argument("--policy", default="")
    parser.add_argument("--times", type=float, default=0.0)
    given = parser.parse_args()
    trace = shortened(load(given.trace, block_bytes=BLOCK_BYTES), given.requests)
    sizes = tiers(trace, given.dram, given.nvme)
    started = time.perf_counter()
    real = replay(trace, sizes, given.policy, given.times)
    print_line(f"daemon    {real:.4%} in {time.perf_counter() - started:.1f} s")
    started = time.perf_counter()
    simulated = simulate(trace, sizes, given.policy)
    print_line(f"simulated {simulated:.4%} in {time.perf_counter() - started:.1f} s")
    print_line(f"difference {abs(real - simulated):.4%} of {len(trace.steps)} requests")
    return 0 if abs(real - simulated) <= BAR else 1


def print_line(text: str) -> None:
    """To stdout."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def shortened(trace: Trace, requests: int) -> Trace:
    """Its first requests, with the blocks of these alone."""
    steps = trace.steps[:requests]
    count = int(steps["leaf"].max()) + 1  # nodes are numbered as they first appear
    return dataclasses.replace(
        trace, steps=steps, parents=trace.parents[:count], keys=trace.keys[:count]
    )


def tiers(trace: Trace, dram: float, nvme: float) -> Sizes:
    """Shares of the trace's distinct blocks, in whole slabs. Sets the size of its blocks: 4 KiB, or
    more where a daemon would find the memory too small."""
    block_bytes = BLOCK_BYTES
    while dram * trace.block_count * block_bytes < DRAM_LEAST:
        block_bytes *= 2
    slab_bytes = SLAB_BLOCKS * block_bytes
    trace.shapes = [dataclasses.replace(trace.shapes[0], block_bytes=block_bytes)]

    def size(share: float) -> int:
        return -int(-share * trace.block_count // SLAB_BLOCKS) * slab_bytes

    return Sizes(dram_bytes=size(dram), nvme_bytes=size(nvme), slab_bytes=slab_bytes)


def replay(trace: Trace, sizes: Sizes, policy: str = "", times: float = 0.0) -> float:
    """The hit ratio that a daemon counts."""
    with daemon_of(sizes, policy) as daemon:
        daemon.times = times or 1.0
        daemon.config["nvme"]["hang_timeout"] = "1 h"  # of the faster clock
        with daemon.start().client(timeout_s=30.0) as client:
            play(trace, client, settle=sizes.nvme_bytes > 0, times=times)
        blocks = daemon.settled().blocks
        ratio: float = blocks.hit / blocks.asked
        return ratio


def daemon_of(sizes: Sizes, policy: str = "") -> Daemon:
    """A daemon of these sizes, not started yet."""
    daemon = Daemon(
        dram={"size": f"{sizes.dram_bytes} B", "slab_size": f"{sizes.slab_bytes} B"},
        nvme={"size": f"{sizes.nvme_bytes} B"},
    )
    if policy:
        daemon.config["eviction"] = {"policy": policy}
    return daemon


def play(trace: Trace, client: Client, *, settle: bool = False, times: float = 0.0) -> None:
    """Ask for each prompt, and store what of it is missing; so many times as fast as the trace was
    recorded, or 0: as fast as can be."""
    size = trace.shapes[0].block_bytes
    layout = Layout(model="replay", engine="test/1", dtype="any", block_tokens=16, shard_bytes=size)
    cache = client.open(layout)
    keys = [block.to_bytes(8, "little") * 4 for block in range(trace.block_count)]
    chains: Chains[bytes] = Chains(
        trace.parents.tolist(), [keys[block] for block in trace.keys.tolist()]
    )
    ours, its = (np.zeros(size, np.uint8) for _ in range(2))

    def quiet() -> bool:
        moves = client.stats().tenants.default.moves
        return not moves.spills and not moves.loads

    started, pace = time.monotonic(), 1 / times if times else 0.0
    for at, leaf in zip(trace.steps["t"].tolist(), trace.steps["leaf"].tolist(), strict=True):
        hashes = chains.to(leaf)
        time.sleep(max(0.0, started + at * pace - time.monotonic()))
        if cache.get(hashes, [its] * len(hashes)).length < len(hashes):
            cache.put(hashes, [ours] * len(hashes), deadline_s=10.0)
        if settle:
            wait_for(quiet, "moves to end")


def simulate(trace: Trace, sizes: Sizes, policy: str = "") -> float:
    """The hit ratio that `kvstore simulate` tells."""
    told = forecast(trace, sizes, Machine(), policy or cli_simulate.default_policy())
    ratio: float = told["results"][told["policy"]]["hit_ratio"]
    return ratio


if __name__ == "__main__":
    sys.exit(main())
