"""What the connector adds to a scheduling step in which 64 requests of 128 blocks wait.

python -m tests.vllm_store.scheduler_cost [--version V]: the connector's manager, called as vLLM
does in each step, and a real daemon; no model. Of the steps until all are answered the longest
counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

REQUESTS, BLOCKS, BLOCK_TOKENS = 64, 128, 16
SHARD_BYTES = 4_096
REPEATS = 15
STEP_S = 0.01
BARS_MS = {"resident": 10.0, "absent": 3.0}


class Request:
    """As much of a request as the connector reads."""

    def __init__(self, name: str, hashes: list[bytes]) -> None:
        self.request_id = name
        self.block_hashes = hashes
        self.num_tokens = self.num_prompt_tokens = len(hashes) * BLOCK_TOKENS + 1
        self.num_computed_tokens = 0
        self.skip_reading_prefix_cache = False
        self.kv_transfer_params = self.kv_hints = None


def steps(manager: Any, waiting: list[tuple[Request, Any, list[bytes]]]) -> tuple[int, float]:
    """Schedule until all are answered: chunks found, and the seconds of the longest step."""
    from vllm.v1.kv_offload.base import ScheduleEndContext

    found, longest = 0, 0.0
    while waiting:
        started, later = time.perf_counter(), []
        for one in waiting:
            request, context, own = one
            if not manager.ready(request, 0):
                later.append(one)
                continue
            for key in own:  # as vLLM does, until the first that is not there
                if manager.lookup(key, context).name != "HIT":
                    break
                found += 1
        manager.on_schedule_end(ScheduleEndContext((), ()))
        longest = max(longest, time.perf_counter() - started)
        waiting = later
        time.sleep(STEP_S)  # the engine computes
    return found, longest


def measure(socket: str) -> dict[str, list[float]]:
    """Milliseconds of each repeat; in the environment of engines."""
    from pathlib import Path

    from vllm.v1.kv_offload.base import (
        ReqContext,
        RequestOffloadingContext,
    )

    from kvstore.client.guard import Guard
    from kvstore.client.vllm_manager import KVStoreManager
    from kvstore.client.vllm_requests import Group
    from kvstore.types import Layout
    from tests.e2e.harness import hashes

    layout = Layout(
        model="cost",
        engine="vllm/kv1 cost",
        dtype="bfloat16",
        block_tokens=BLOCK_TOKENS,
        shard_bytes=SHARD_BYTES,
    )
    group = Group(0, BLOCK_TOKENS, 1, None)
    manager = KVStoreManager(Guard(Path(socket), timeout_s=5.0), [group], workers=1)
    manager.open([layout])
    cache = manager._caches[0]
    chains = {
        kind: [hashes(BLOCKS, f"{kind} {at}") for at in range(REQUESTS)]
        for kind in ("resident", "absent")
    }
    for chain in chains["resident"]:
        keys = group.keys(chain)
        assert cache.put(keys, [bytes(SHARD_BYTES)] * BLOCKS).stored == BLOCKS
    seconds: dict[str, list[float]] = {kind: [] for kind in chains}
    for repeat in range(REPEATS):
        for kind, lists in chains.items():
            requests = [Request(f"{kind} {repeat} {at}", one) for at, one in enumerate(lists)]
            contexts = [ReqContext(one.request_id) for one in requests]
            for request, context in zip(requests, contexts, strict=True):
                assert isinstance(manager.on_new_request(context), RequestOffloadingContext)
                manager.begin(request)
            asked = [group.keys(one) for one in lists]
            found, longest = steps(manager, list(zip(requests, contexts, asked, strict=True)))
            seconds[kind].append(longest * 1e3)
            assert found == (REQUESTS * BLOCKS if kind == "resident" else 0)
            for context in contexts:
                manager.on_request_finished(context)
    manager.shutdown()
    return seconds


def main() -> int:
    """0 when both medians are within their bars."""
    if len(sys.argv) == 3 and sys.argv[1] == "--measure":
        print(json.dumps(measure(sys.argv[2])))  # noqa: T201
        return 0
    from tests.e2e.harness import Daemon
    from tests.vllm_store import environment

    parser = argparse.ArgumentParser(prog="python -m tests.vllm_store.scheduler_cost")
    parser.add_argument("--version", choices=environment.VERSIONS, default=environment.BASE)
    version = parser.parse_args().version
    environment.build(environment.BASE)
    environment.build(version)
    with Daemon(dram={"size": "128 MiB"}, nvme={"size": "0"}).start() as daemon:
        command = [str(environment.PYTHON), "-m", "tests.vllm_store.scheduler_cost", "--measure"]
        done = subprocess.run(
            [*command, str(daemon.socket())],
            cwd=environment.ROOT,
            env={**os.environ, **environment.variables(version)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    held = True
    print(f"vLLM {version}, {REQUESTS} requests of {BLOCKS} blocks, {REPEATS} repeats")  # noqa: T201
    for kind, bar in BARS_MS.items():
        times = found[kind]
        median = statistics.median(times)
        held &= median <= bar
        spread = f"({min(times):.2f} to {max(times):.2f})"
        print(f"{kind}: median {median:.2f} ms {spread}, bar {bar:g} ms")  # noqa: T201
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
