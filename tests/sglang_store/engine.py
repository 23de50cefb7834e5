"""One life of a whole SGLang engine on the CPU: start, serve prompts, end; prints a line of JSON.

    python -m tests.sglang_store.engine model FOLDER
    python -m tests.sglang_store.engine serve FOLDER --socket SOCKET --mode buffer_only

`model` makes a tiny Llama of random weights. `serve` serves the prompts, flushes the engine's own
cache and serves them again; without a socket there is no storage. Runs in the environment that has
SGLang.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

PAGE, VOCABULARY, NEW_TOKENS = 16, 512, 8
PROMPTS = (333, 500)  # tokens of each
SETTLE_S = 60.0
POLL_S = 0.02


def make_model(folder: Path) -> None:
    """A Llama whose every weight matters, saved as a checkpoint."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(20_26)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.normal_(0.0, 0.3)
    model.save_pretrained(folder)


def prompts() -> list[list[int]]:
    """Token ids; no two pages agree."""
    import random

    draw = random.Random(7)
    return [[draw.randrange(3, VOCABULARY) for _ in range(count)] for count in PROMPTS]


def make_engine(folder: Path, socket: str | None, mode: str, timeout_s: float) -> Any:
    """The engine, with our storage where a socket is given."""
    import sglang

    options: dict[str, Any] = {}
    if socket is not None:
        extra = {
            "backend_name": "kvstore",
            "module_path": "kvstore.client.sglang",
            "class_name": "KVStoreHiCacheStorage",
            "interface_v1": 1,
            "hicache_storage_pass_prefix_keys": True,
            "prefetch_threshold": PAGE,
            "socket": socket,
            "timeout_s": timeout_s,
        }
        options = {
            "enable_hierarchical_cache": True,
            "hicache_host_memory_mode": mode,
            "hicache_ratio": 2.0,
            "hicache_mem_layout": "page_first_direct",
            "hicache_io_backend": "direct",
            "hicache_storage_backend": "dynamic",
            "hicache_storage_backend_extra_config": json.dumps(extra),
            "hicache_storage_prefetch_policy": "wait_complete",
        }
    return sglang.Engine(
        model_path=str(folder),
        device="cpu",
        dtype="float32",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        grammar_backend="none",
        skip_tokenizer_init=True,
        disable_overlap_schedule=True,
        disable_cuda_graph=True,
        page_size=PAGE,
        max_total_tokens=2048,
        enable_cache_report=True,
        log_level="warning",
        **options,
    )


def serve(engine: Any) -> list[dict[str, Any]]:
    """Every prompt in turn: its new tokens, and where its cached tokens came from."""
    found = []
    for prompt in prompts():
        began = time.perf_counter()
        answer = engine.generate(
            input_ids=prompt,
            sampling_params={"temperature": 0.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        )
        meta = answer["meta_info"]
        found.append(
            {
                "tokens": answer["output_ids"],
                "cached": meta["cached_tokens"],
                "details": meta.get("cached_tokens_details"),
                "seconds": time.perf_counter() - began,
            }
        )
    return found


def blocks_stored(socket: str) -> int:
    """How many blocks the daemon was given since it started; -1 where it does not answer."""
    from kvstore.client import connect
    from kvstore.errors import KVStoreError

    with contextlib.suppress(KVStoreError), connect(socket, timeout_s=2.0) as client:
        stored: int = client.stats().tenants.default.blocks.stored
        return stored
    return -1


def settle(socket: str, before: int, answers: list[dict[str, Any]]) -> int:
    """Wait until every page that was computed has been stored; how many blocks that was."""
    wanted = sum(count // PAGE for count in PROMPTS)
    wanted -= sum(answer["cached"] // PAGE for answer in answers)
    end = time.monotonic() + SETTLE_S
    while (stored := blocks_stored(socket) - before) < wanted and time.monotonic() < end:
        time.sleep(POLL_S)
    return stored


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("model", "serve"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--socket")
    parser.add_argument("--mode", default="buffer_only")
    parser.add_argument("--timeout", type=float, default=5.0)
    parser.add_argument("--dead", action="store_true", help="the daemon is not there: do not wait")
    options = parser.parse_args()
    if options.what == "model":
        make_model(options.folder)
        return
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the engine and its processes print here
    began = time.perf_counter()
    engine = make_engine(options.folder, options.socket, options.mode, options.timeout)
    started = time.perf_counter() - began
    try:
        waits = options.socket is not None and not options.dead
        before = blocks_stored(options.socket) if waits else 0
        first = serve(engine)
        blocks = settle(options.socket, before, first) if waits else 0
        engine.flush_cache()
        second = serve(engine)
    finally:
        engine.shutdown()
    replies.write(
        json.dumps({"start_s": started, "blocks": blocks, "first": first, "second": second}) + "\n"
    )
    replies.close()


if __name__ == "__main__":
    main()
