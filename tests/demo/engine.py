"""One life of the engine, as a process: start, serve one prompt, print one line of JSON, end.

    python -m tests.demo.engine prefill|reload --socket PATH --reference FILE ...

`prefill` computes the prompt without the store, writes the reference and offloads the blocks.
`reload` loads what the store has, computes the rest, and compares with the reference.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvstore.client import connect
from tests.demo.model import Model
from tests.demo.profile import PROFILES

STORE_DEADLINE_S = 30.0
POLL_S = 0.01


def offload(cache: Any, hashes: Sequence[bytes], blocks: Sequence[Any]) -> dict[str, Any]:
    """Puts the whole prompt's blocks in one call, and again where the disk was too far behind."""
    began = time.perf_counter()
    counts: collections.Counter[str] = collections.Counter()
    while True:
        result = cache.put(hashes, blocks)
        counts["stored"] += result.stored
        counts["refusals"] += result.refused
        if not result.refused or time.perf_counter() - began > STORE_DEADLINE_S:
            return {**counts, "offload_s": time.perf_counter() - began}
        time.sleep(POLL_S)


def fetch(cache: Any, hashes: Sequence[bytes], into: Sequence[Any]) -> dict[str, Any]:
    """Gets the longest prefix; asks on from where an answer ended while there is more to come."""
    began = time.perf_counter()
    length, calls, tiers = 0, 0, collections.Counter[str]()
    while length < len(hashes) and time.perf_counter() - began < STORE_DEADLINE_S:
        result = cache.get(hashes[length:], into[length:])
        calls += 1
        length += result.length
        tiers.update(result.tiers)
        if not result.length:
            if not cache.lookup(hashes[length:]).length:
                break
            time.sleep(POLL_S)
    return {
        "length": length,
        "calls": calls,
        "tiers": dict(tiers),
        "get_s": time.perf_counter() - began,
    }


def prefill(model: Model, cache: Any, reference: Path) -> dict[str, Any]:
    """The first life: nothing is in the store."""
    profile, pool = model.profile, model.pool()
    began = time.perf_counter()
    logits, kv = model.prefill()
    logits.argmax().item()
    ttft_s = time.perf_counter() - began
    hashes = model.hashes()
    model.fill(pool, kv)  # before the cache grows further
    tokens, rows = model.greedy(logits, kv)
    torch.save({"logits": rows, "tokens": tokens}, reference)
    counts = offload(cache, hashes, pool.unbind())
    return {
        "ttft_s": ttft_s,
        "computed": profile.prompt_tokens,
        "resident": cache.lookup(hashes).length,
        "tokens": tokens,
        **counts,
    }


def reload(model: Model, cache: Any, reference: Path) -> dict[str, Any]:
    """A later life: the prompt's blocks should be in the store."""
    pool = model.pool()
    began = time.perf_counter()
    loaded = fetch(cache, model.hashes(), pool.unbind())
    fetched = time.perf_counter()
    kv = model.cache_of(pool, loaded["length"])
    rebuilt = time.perf_counter()
    past = kv.get_seq_length()
    logits, kv = model.prefill(kv)
    logits.argmax().item()
    ended = time.perf_counter()
    tokens, rows = model.greedy(logits, kv)
    wanted = torch.load(reference, weights_only=True)
    return {
        "ttft_s": ended - began,
        "rebuild_s": rebuilt - fetched,
        "compute_s": ended - rebuilt,
        "computed": model.profile.prompt_tokens - past,
        "tokens": tokens,
        "tokens_equal": tokens == wanted["tokens"],
        "bitwise_equal": torch.equal(rows, wanted["logits"]),
        "difference_max": float((rows - wanted["logits"]).abs().max()),
        "damage_noticed": notices_damage(model, pool, loaded["length"], wanted["logits"][0]),
        **loaded,
    }


def notices_damage(model: Model, pool: torch.Tensor, length: int, wanted: torch.Tensor) -> bool:
    """Whether the comparison would have failed had one block lost its values in one layer.

    A comparison that cannot fail proves nothing.
    """
    if not length:
        return False
    pool[length // 2, 0, 1].zero_()
    logits, _ = model.prefill(model.cache_of(pool, length))
    return not torch.equal(logits, wanted)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one life and prints its figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.demo.engine", description=__doc__)
    parser.add_argument("life", choices=("prefill", "reload"))
    parser.add_argument("--socket", required=True, help="the daemon's socket")
    parser.add_argument("--reference", required=True, type=Path, help="logits of the first life")
    parser.add_argument("--profile", choices=sorted(PROFILES), default="full")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    began = time.perf_counter()
    model = Model(PROFILES[options.profile], threads=options.threads)
    start_s = time.perf_counter() - began
    with contextlib.closing(connect(path=options.socket)) as client:
        life = prefill if options.life == "prefill" else reload
        figures = life(model, client.open(model.profile.layout), options.reference)
    sys.stdout.write(json.dumps({"life": options.life, "start_s": start_s, **figures}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
