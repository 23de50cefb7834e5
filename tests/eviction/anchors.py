"""Policies on recorded traces, beside figures that others got: `python -m tests.eviction.anchors`.

A trace is an .npz of a forest of prefixes: `parent_delta` (node i's parent is i - parent_delta[i],
-1 is none) and `leaf`, the last block of each request (-1: none). `anchors.json` beside the traces
has, for each trace and size, the capacity in blocks and the figures to stand beside ours.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from kvstore.eviction.arc import ARC
from kvstore.eviction.base import Policy
from kvstore.eviction.fifo import FIFO
from kvstore.eviction.lfu import LFU
from kvstore.eviction.lru import LRU
from kvstore.eviction.mq import MQ
from kvstore.eviction.s3fifo import S3FIFO
from kvstore.eviction.wtinylfu import WTinyLFU
from tests.eviction.exact import belady, hit_ratio
from tests.forests import load_chains

POLICIES: dict[str, Callable[[int], Policy]] = {
    "lru": LRU,
    "fifo": FIFO,
    "lfu": LFU,
    "s3fifo": S3FIFO,
    "arc": ARC,
    "mq": MQ,
    "wtinylfu": WTinyLFU,
}
BELADY = "belady"
ANCHORS = ("lru_leaf", "best_peer_hit", "rel", "opt")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.eviction.anchors")
    parser.add_argument("--traces", type=Path, required=True, help="a folder of .npz files")
    parser.add_argument("--policy", action="append", choices=[*POLICIES, BELADY], default=[])
    parser.add_argument("--trace", help="only this one")
    parser.add_argument("--size-max", type=float, default=1.0, help="share of the unique blocks")
    parser.add_argument("--compete", action="store_true", help="new blocks compete at once")
    options = parser.parse_args()
    names = options.policy or [*POLICIES, BELADY]
    shares: dict[str, list[float]] = {name: [] for name in names}
    sys.stdout.write("  ".join(f"{word:>10}" for word in ("blocks", *ANCHORS, *names)) + "\n")
    anchors = json.loads((options.traces / "anchors.json").read_text())["traces"]
    for trace, sizes in anchors.items():
        if options.trace not in (None, trace):
            continue
        requests = list(load_chains(options.traces / f"{trace}.npz"))
        sys.stdout.write(f"{trace}, {len(requests)} requests\n")
        for size, known in sizes.items():
            if float(size) > options.size_max:
                continue
            capacity = known["capacity_blocks"]
            row = [known[word] for word in ANCHORS]
            for name in names:
                if name == BELADY:
                    ratio = belady(requests, capacity)
                else:
                    made = POLICIES[name](capacity)
                    ratio = hit_ratio(
                        requests, made, capacity, compete=options.compete, warm=name != "fifo"
                    )
                shares[name].append(ratio / known["opt"])
                row.append(ratio)
            sys.stdout.write(f"{capacity:10}  " + "  ".join(f"{one:10.5f}" for one in row) + "\n")
            sys.stdout.flush()
    for name, parts in shares.items():
        if parts:
            sys.stdout.write(f"{name}: mean share of the best possible {fmean(parts):.4f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
