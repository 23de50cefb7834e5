"""Many threads of several processes on a few keys, then: is there an order that explains it all?

    python -m tests.soak.linear [--operations N] [--processes P] [--threads T] [--front F]

N operations in each thread. What is read is also checked for being of one piece, at the beginning
and at the end of a lease. DRAM holds all keys, so that nothing is ever evicted. The last F
processes come through the front door. What a history must obey stands in `tests.soak.history`.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvstore.client import Cache, connect
from tests.e2e.harness import Daemon, layout
from tests.soak.children import Child
from tests.soak.figures import Figures
from tests.soak.history import ABSENT, COLUMNS, COMMIT, FORGET, MAYBE, PRESENT, READ, check

KEYS, CHAIN = 24, 3  # keys in all, and the most in one operation
SIZE = 4096
TIMEOUT_S = 30.0
WORDS = SIZE // 8
TORN = -1

_HASHES = [f"key {at:012}".encode() for at in range(KEYS)]


def stamp(version: int) -> np.ndarray:
    """The content of a version: its number, again and again."""
    return np.full(WORDS, version, np.int64)


def version_of(words: np.ndarray) -> int:
    """The version that these bytes are of, TORN when they are of several."""
    first = int(words[0])
    return first if (words == first).all() else TORN


class Worker:
    """One thread. Its rows are (key, kind, version, start, end)."""

    def __init__(self, cache: Cache, number: int, seed: int) -> None:
        self._cache = cache
        self._rng = random.Random(f"{seed}/{number}")
        self._version = (number + 1) << 40
        self._into = [np.zeros(WORDS, np.int64) for _ in range(CHAIN)]
        self.rows: list[tuple[int, int, int, int, int]] = []
        self.counts: Counter[str] = Counter()

    def run(self, operations: int) -> None:
        """So many operations; every one of several calls counts once."""
        steps: list[Callable[[list[int], list[bytes]], None]] = [
            *[self._get] * 30,
            *[self._hold] * 12,
            *[self._look] * 12,
            *[self._put] * 18,
            *[self._write] * 14,
            *[self._forget] * 14,
        ]
        draw = self._rng.random
        for _ in range(operations):
            step = steps[int(draw() * len(steps))]
            first, count = int(draw() * (KEYS - CHAIN)), 1 + int(draw() * CHAIN)
            keys = list(range(first, first + count))
            step(keys, [_HASHES[key] for key in keys])
            self.counts[step.__name__[1:]] += 1

    def _next(self) -> int:
        self._version += 1
        return self._version

    def _saw(self, keys: list[int], versions: list[int], start: int) -> None:
        """The first keys were read, the one behind them was not there."""
        end = time.monotonic_ns()
        for key, version in zip(keys, versions, strict=False):
            if version == TORN:
                self.counts["torn"] += 1
            else:
                self.rows.append((key, READ, version, start, end))
        if len(versions) < len(keys):
            self.rows.append((keys[len(versions)], ABSENT, 0, start, end))

    def _get(self, keys: list[int], hashes: list[bytes]) -> None:
        into = self._into[: len(keys)]
        start = time.monotonic_ns()
        length = self._cache.get(hashes, into).length
        self._saw(keys, [version_of(words) for words in into[:length]], start)

    def _hold(self, keys: list[int], hashes: list[bytes]) -> None:
        start = time.monotonic_ns()
        grant = self._cache.acquire(hashes)
        views = [grant.numpy(at, dtype=np.int64) for at in range(grant.length)]
        end = time.monotonic_ns()
        versions = [version_of(words) for words in views]
        time.sleep(0)
        again = [version_of(words) for words in views]  # others forget and store meanwhile
        if grant.release():
            self.counts["torn"] += versions != again
            self._saw(keys, versions, start)
        self.counts["held_us"] += (time.monotonic_ns() - end) // 1_000

    def _look(self, keys: list[int], hashes: list[bytes]) -> None:
        start = time.monotonic_ns()
        length = self._cache.lookup(hashes).length
        end = time.monotonic_ns()
        self.rows += [(key, PRESENT, 0, start, end) for key in keys[:length]]
        if length < len(keys):
            self.rows.append((keys[length], ABSENT, 0, start, end))

    def _put(self, keys: list[int], hashes: list[bytes]) -> None:
        version = self._next()
        start = time.monotonic_ns()
        if self._cache.put(hashes[:1], [stamp(version)]).stored:
            self.rows.append((keys[0], COMMIT, version, start, time.monotonic_ns()))
        # What was forgotten while it was written counts as stored by the client.

    def _write(self, keys: list[int], hashes: list[bytes]) -> None:
        version = self._next()
        reservation = self._cache.reserve(hashes)
        for at in range(len(reservation)):
            words = reservation.numpy(at, dtype=np.int64)
            words[: WORDS // 2] = version
            words[WORDS // 2 :] = version
        if self._rng.random() < 0.2:
            reservation.abort()
            return
        start = time.monotonic_ns()
        stored = reservation.commit()
        end = time.monotonic_ns()
        kind = COMMIT if stored == len(reservation) else MAYBE
        if stored:
            self.rows += [(keys[at], kind, version, start, end) for at in reservation.indices]

    def _forget(self, keys: list[int], hashes: list[bytes]) -> None:
        start = time.monotonic_ns()
        count = self._cache.forget(hashes)
        end = time.monotonic_ns()
        kind = FORGET if count else ABSENT
        self.rows += [(key, kind, 0, start, end) for key in keys]


def be_client(socket: Path, first: int, threads: int, operations: int, seed: int, to: Path) -> None:
    """One process: its threads share a client. Leaves the rows and a line of counts."""
    failures: list[BaseException] = []
    sys.setswitchinterval(0.0005)  # threads are to meet
    with connect(socket, timeout_s=TIMEOUT_S) as client:
        cache = client.open(layout("linear", shard_bytes=SIZE))
        workers = [Worker(cache, first + at, seed) for at in range(threads)]

        def run(worker: Worker) -> None:
            try:
                worker.run(operations)
            except BaseException as error:
                failures.append(error)

        running = [threading.Thread(target=run, args=(worker,)) for worker in workers]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    if failures:
        raise failures[0]
    rows = [np.array(worker.rows, np.int64).reshape(-1, COLUMNS) for worker in workers]
    counts = sum((worker.counts for worker in workers), Counter[str]())
    np.savez(to, rows=np.concatenate(rows), torn=counts["torn"])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.linear")
    for name, default in (("operations", 100_000), ("processes", 4), ("threads", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--front", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    total = options.processes * options.threads * options.operations
    figures = Figures(f"linearizability: {total:,} operations, seed {options.seed}")
    history: list[np.ndarray] = []
    torn = crashed = 0
    with Daemon(dram={"size": "64 MiB"}) as daemon:
        daemon.start()
        paths = [daemon.folder / f"rows-{at}.npz" for at in range(options.processes)]
        started = time.monotonic()
        children = []
        for at, path in enumerate(paths):
            door = "front" if at >= options.processes - options.front else "hatch"
            parts = at * options.threads, options.threads, options.operations, options.seed
            run = functools.partial(be_client, daemon.socket(door), *parts, path)
            children.append(Child(run))
        crashed = sum(child.wait() != 0 for child in children)
        seconds = time.monotonic() - started
        for path in paths:
            if path.exists():
                with np.load(path) as found:
                    history.append(found["rows"])
                    torn += int(found["torn"])
        stats = daemon.settled()
    figures.add("seconds of operations", f"{seconds:.1f} ({total / seconds:,.0f} a second)")
    if history:
        rows = np.concatenate(history)
        names = ("commits", "reads", "present", "absent", "forgets", "commits in part")
        for kind, name in enumerate(names):
            figures.add(name, int(np.sum(rows[:, 1] == kind)))
        found = check(rows)
        for rule in ("stranger", "stale", "overlap", "miss", "twice", "ghost"):
            figures.zero(rule, found[rule])
    figures.zero("torn", torn)
    figures.zero("processes that crashed", crashed)
    figures.zero("evicted for room", stats.tiers.dram.evicted.get("room", 0))
    figures.zero("leases left", stats.leases)
    figures.end()


if __name__ == "__main__":
    main()
