"""Every block asked for is counted once: asked = hits of each tier + misses of each cause, always.

    python -m tests.soak.attribution [--seconds N] [--workers W] [--seed S]

In the first half nobody dies, and what the workers were told must be what the daemon has counted.
In the second half workers are killed at any moment, and whoever of them is left asks on. Meanwhile
files of the NVMe tier are damaged, blocks are forgotten, become idle, do not fit, and are refused.
All the time somebody looks at the statistics, whose sums must agree at every look.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.client import Cache, connect
from kvstore.errors import InvalidRequest, KVStoreError
from tests.e2e.harness import KIB, Daemon, hashes, layout
from tests.soak.children import Child
from tests.soak.figures import Figures

SIZE = 16 * KIB
CHAINS, LENGTH = 150, 48
LOOK_S = 0.02
KILL_S = 0.3
DAMAGE_S = 0.5


class Worker:
    """Asks for chains and stores what is missing; counts what it was told."""

    def __init__(self, socket: Path, seed: str) -> None:
        self._client = connect(socket, timeout_s=10.0)
        self._cache: Cache = self._client.open(layout("attribution", shard_bytes=SIZE))
        self._rng = random.Random(seed)
        self.counts: Counter[str] = Counter()

    def run(self, until: float, told: Path) -> None:
        """Until that time on the monotonic clock; leaves its counts in a file."""
        chains = [hashes(LENGTH, f"chain {at}") for at in range(CHAINS)]
        block = np.zeros(SIZE, np.uint8)
        while time.monotonic() < until:
            chain = chains[min(int(self._rng.expovariate(0.03)), CHAINS - 1)]
            part = chain[: self._rng.randint(1, LENGTH)]
            if self._rng.random() < 0.02:
                self._cache.forget(part[self._rng.randrange(len(part)) :])
            found = self._ask(part)
            if found < len(part) and self._rng.random() < 0.9:
                with contextlib.suppress(InvalidRequest):
                    self._cache.put(part, [block] * len(part), deadline_s=self._rng.random() / 10)
        told.write_text(json.dumps(self.counts))

    def _ask(self, keys: list[bytes]) -> int:
        speed = self._rng.choice((None, None, 1e3, 1e9))
        wait_s = self._rng.choice((0.0, 0.001, 0.2))
        with self._cache.acquire(keys, deadline_s=wait_s, prefill_tokens_per_s=speed) as grant:
            held = grant.length
            # The rest counts when it is asked for again.
            again = grant.stop == "pending" or (grant.stop == "no_room" and held)
            self.counts["hit"] += held
            self.counts["miss"] += 0 if again else len(keys) - held
            self.counts.update(grant.tiers)
        return held


def wrong_sums(blocks: Any, tiers: Any) -> list[str]:
    """Sums of the statistics that do not agree."""
    found = {
        "hit + miss": (blocks.asked, blocks.hit + blocks.miss),
        "hits of the tiers": (blocks.hit, sum(tier.hits for tier in tiers.values())),
        "misses by cause": (blocks.miss, sum(blocks.miss_causes.values())),
    }
    return [f"{name}: {a:,} and {b:,}" for name, (a, b) in found.items() if a != b]


class Watch:
    """Looks at the statistics again and again, and damages files of the NVMe tier."""

    def __init__(self, daemon: Daemon, rng: random.Random) -> None:
        self._daemon = daemon
        self._rng = rng
        self._damage_at = 0.0
        self.looks = 0
        self.wrong: list[str] = []

    def look(self) -> Any:
        """Once; the tenant's statistics."""
        stats = self._daemon.stats()
        self.looks += 1
        self.wrong += wrong_sums(stats.blocks, stats.tiers)
        if time.monotonic() >= self._damage_at:
            self._damage_at = time.monotonic() + DAMAGE_S
            self._damage()
        return stats

    def _damage(self) -> None:
        files = [path for path in (self._daemon.folder / "nvme").rglob("*") if path.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        with largest.open("r+b", buffering=0) as file:
            for _ in range(8):
                file.seek(self._rng.randrange(largest.stat().st_size))
                file.write(bytes([self._rng.randrange(256)]))


def undisturbed(
    daemon: Daemon, watch: Watch, workers: int, seconds: float, seed: int
) -> Counter[str]:
    """Nobody dies: what all workers together were told."""
    until = time.monotonic() + seconds
    files = [daemon.folder / f"told-{at}" for at in range(workers)]
    socket = daemon.socket()
    children = [
        Child(functools.partial(_work, socket, f"{seed}/{at}", until, path))
        for at, path in enumerate(files)
    ]
    while not all(child.over for child in children):
        watch.look()
        time.sleep(LOOK_S)
    assert not any(child.crashed for child in children), "a worker has failed: see above"
    told: Counter[str] = Counter()
    for path in files:
        told.update(json.loads(path.read_text()))
    return told


def chaos(daemon: Daemon, watch: Watch, workers: int, seconds: float, seed: int) -> int:
    """Workers are killed; how many."""
    rng, end, born = random.Random(seed), time.monotonic() + seconds, 0
    socket, told = daemon.socket(), daemon.folder / "ignored"
    children: list[Child] = []
    kill_at = time.monotonic() + KILL_S
    while time.monotonic() < end:
        while len(children) < workers:
            born += 1
            work = functools.partial(_work, socket, f"{seed}/chaos/{born}", end + 60.0, told)
            children.append(Child(work))
        if time.monotonic() >= kill_at:
            kill_at = time.monotonic() + rng.expovariate(1 / KILL_S)
            children.pop(rng.randrange(len(children))).kill()
        assert not any(child.crashed for child in children), "a worker has failed: see above"
        watch.look()
        time.sleep(LOOK_S)
    for child in children:
        child.kill()
    return born


def _work(socket: Path, seed: str, until: float, told: Path) -> None:
    with contextlib.suppress(KVStoreError) if told.name == "ignored" else contextlib.nullcontext():
        Worker(socket, seed).run(until, told)


def main() -> None:
    """Print the figures; 1 when a sum did not agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    figures = Figures("attribution")
    sections: dict[str, dict[str, object]] = {
        "dram": {"size": "16 MiB", "slab_size": "1 MiB"},
        "nvme": {"size": "64 MiB", "write_policy": "on-evict"},
        "eviction": {"idle_after": "1s"},
        "limits": {"bytes_per_session": "8 MiB"},
    }
    with Daemon(**sections) as daemon:
        daemon.start()
        watch = Watch(daemon, random.Random(given.seed))
        told = undisturbed(daemon, watch, given.workers, given.seconds / 2, given.seed)
        stats = daemon.settled()
        counted = {"hit": stats.blocks.hit, "miss": stats.blocks.miss}
        counted |= {name: stats.tiers[name].hits for name in ("dram", "nvme")}
        differ = {
            name: (told[name], count) for name, count in counted.items() if told[name] != count
        }
        killed = chaos(daemon, watch, given.workers, given.seconds / 2, given.seed)
        blocks = watch.look().blocks
    figures.add("looks at the statistics", watch.looks)
    figures.add("workers killed", killed)
    figures.add("blocks asked for", blocks.asked)
    figures.add("hits", blocks.hit)
    for cause, count in sorted(blocks.miss_causes.items()):
        figures.add(f"misses: {cause}", count)
    for line in watch.wrong[:5]:
        figures.add("sums that do not agree", line)
    figures.zero("looks at sums that do not agree", len(watch.wrong))
    figures.zero(f"counts that differ from what workers were told {differ or ''}", len(differ))
    figures.end()


if __name__ == "__main__":
    main()
