"""One life of the engine, as a process: start, serve one prompt, print one line of JSON, end.

    python -m tests.demo.engine prefill|reload --socket PATH --reference FILE ...

`prefill` computes the prompt without the store, writes the reference and offloads the blocks.
`reload` loads what the store has, computes the rest, and compares with the reference.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from kvstore.client.transformers import PrefixStore
from tests.demo.model import Model
from tests.demo.profile import PROFILES

STORE_DEADLINE_S = 30.0
CALL_S = 20.0  # the demonstration would rather wait than compute: that is what it compares
POLL_S = 0.01


def offload(store: PrefixStore, prompt: torch.Tensor, kv: DynamicCache) -> dict[str, Any]:
    """Saves the prompt's blocks, and again where the disk was too far behind."""
    began = time.perf_counter()
    stored = refusals = 0
    while True:
        result = store.save(prompt, kv)
        stored += result.stored
        refusals += result.refused
        if not result.refused or time.perf_counter() - began > STORE_DEADLINE_S:
            return {
                "stored": stored,
                "refusals": refusals,
                "offload_s": time.perf_counter() - began,
            }
        time.sleep(POLL_S)


def prefill(model: Model, store: PrefixStore, reference: Path) -> dict[str, Any]:
    """The first life: nothing is in the store."""
    profile = model.profile
    began = time.perf_counter()
    logits, kv = model.prefill()
    logits.argmax().item()
    ttft_s = time.perf_counter() - began
    counts = offload(store, model.prompt, kv)
    tokens, rows = model.greedy(logits, kv)
    torch.save({"logits": rows, "tokens": tokens}, reference)
    return {
        "ttft_s": ttft_s,
        "computed": profile.prompt_tokens,
        "resident": store.lookup(model.prompt) // profile.block_tokens,
        "tokens": tokens,
        **counts,
    }


def reload(model: Model, store: PrefixStore, reference: Path) -> dict[str, Any]:
    """A later life: the prompt's blocks should be in the store."""
    profile = model.profile
    began = time.perf_counter()
    kv, past = store.load(model.prompt)
    loaded = time.perf_counter()
    logits, kv = model.prefill(kv)
    logits.argmax().item()
    ended = time.perf_counter()
    counts = store.health.counts
    tokens, rows = model.greedy(logits, kv)
    wanted = torch.load(reference, weights_only=True)
    return {
        "ttft_s": ended - began,
        "load_s": loaded - began,
        "compute_s": ended - loaded,
        "length": past // profile.block_tokens,
        "tiers": {tier: counts.get(f"{tier}_blocks", 0) for tier in ("dram", "nvme")},
        "computed": profile.prompt_tokens - past,
        "tokens": tokens,
        "tokens_equal": tokens == wanted["tokens"],
        "bitwise_equal": torch.equal(rows, wanted["logits"]),
        "difference_max": float((rows - wanted["logits"]).abs().max()),
        "damage_noticed": notices_damage(model, store, wanted["logits"][0]),
    }


def notices_damage(model: Model, store: PrefixStore, wanted: torch.Tensor) -> bool:
    """Whether the comparison would have failed had one block lost its values in one layer.

    A comparison that cannot fail proves nothing.
    """
    kv, past = store.load(model.prompt)
    if not past:
        return False
    kv.layers[0].values[:, :, past // 2 : past // 2 + model.profile.block_tokens].zero_()
    logits, _ = model.prefill(kv)
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
    with PrefixStore(
        model.llama,
        block_tokens=model.profile.block_tokens,
        path=options.socket,
        timeout_s=CALL_S,
    ) as store:
        life = prefill if options.life == "prefill" else reload
        figures = life(model, store, options.reference)
    sys.stdout.write(json.dumps({"life": options.life, "start_s": start_s, **figures}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
