"""Clients die by the thousand, at every point of their work: is what they held free, does it leak?

    python -m tests.soak.deaths [--deaths N] [--seed S]

After every few deaths nothing may be held within two seconds of the last. Every tenth of the way
all blocks are dropped, every slot must be free then, and the daemon's memory and descriptors are
read: they must not have grown since the first tenth.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from kvstore.client import Cache, connect
from kvstore.client.wire import HEADER
from kvstore.protos import kvstore_pb2 as pb
from kvstore.types import Stats
from tests.e2e.harness import Daemon, contents, hashes, layout, wait_for
from tests.soak.children import Child
from tests.soak.figures import Figures, say

SIZE = 32 << 10
LENGTH = 8  # blocks that each client works on
BATCH = 25  # deaths before it is checked that nothing is held
FREE_S = 2.0
RANDOM_S = 0.03  # a client that dies at a random instant lives for so long at most
LOOK_S = 0.2
GROWN_BYTES_MAX = 2 << 20
RESIDENT = hashes(LENGTH, "resident")
KINDS = ("reserve not answered", "mid-copy", "before commit", "commit sent", "reading", "random")


def die() -> NoReturn:
    """As from outside: nothing of ours runs any more."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("it lives")


class Doomed:
    """A client that dies at a given point."""

    def __init__(self, socket: Path, kind: str, tag: str) -> None:
        self._socket, self._kind, self._tag = socket, kind, tag

    def run(self) -> None:
        """Until it is dead."""
        client = connect(self._socket, timeout_s=10.0)
        cache = client.open(layout("deaths", shard_bytes=SIZE))
        keys = hashes(LENGTH, self._tag)
        if self._kind == "random":
            self._work(cache)
        if self._kind == "reading":
            assert cache.acquire(RESIDENT).length == LENGTH
            die()
        if self._kind == "reserve not answered":
            wire: Any = client.session(time.monotonic() + 10.0)
            number = wire.layouts[cache.layout]
            packed = pb.Keys(layout=number, hash_bytes=len(keys[0]), hashes=b"".join(keys))
            body = pb.ReserveRequest(keys=packed, deadline_s=1.0).SerializeToString()
            frame = HEADER.pack(HEADER.size - 4 + len(body), pb.RESERVE, 0, 0, 999_999) + body
            wire.transport._send(frame, time.monotonic() + 10.0)
            die()
        if self._kind == "commit sent":
            cache.put(keys, contents(keys, SIZE))
            die()
        reservation = cache.reserve(keys)
        assert len(reservation) == LENGTH
        if self._kind == "mid-copy":
            reservation.numpy(0)[: SIZE // 2] = 1
            die()
        for at in range(LENGTH):
            reservation.numpy(at)[:] = 1
        die()

    def _work(self, cache: Cache) -> NoReturn:
        """Something of everything, until somebody kills it."""
        rng, into = random.Random(self._tag), [np.zeros(SIZE, np.uint8) for _ in range(LENGTH)]
        number = 0
        while True:
            keys = hashes(LENGTH, f"{self._tag}/{number}")
            number += 1
            what = rng.random()
            if what < 0.4:
                cache.put(keys, contents(keys, SIZE))
            elif what < 0.6:
                cache.get(RESIDENT, into)
            elif what < 0.8:
                cache.acquire(RESIDENT)
            else:
                cache.reserve(keys)


class Point:
    """What the daemon takes at one moment."""

    def __init__(self, deaths: int, pid: int) -> None:
        self.deaths = deaths
        rollup = _kibibytes(Path(f"/proc/{pid}/smaps_rollup"))
        status = _kibibytes(Path(f"/proc/{pid}/status"))
        self.rss, self.pss = rollup["Rss"], rollup["Pss"]
        self.own = status["RssAnon"]  # without the arena and other files
        self.descriptors = _descriptors(pid)

    def __str__(self) -> str:
        sizes = ((name, getattr(self, name) / 2**20) for name in ("rss", "pss", "own"))
        text = ", ".join(f"{name} {size:.1f} MiB" for name, size in sizes)
        return f"{text}, {self.descriptors} descriptors"


def _descriptors(pid: int) -> int:
    """The fewest of some moments: our own last connection may not have been closed yet."""
    fewest, end = 1 << 30, time.monotonic() + LOOK_S
    while time.monotonic() < end:
        fewest = min(fewest, len(os.listdir(f"/proc/{pid}/fd")))
        time.sleep(0.01)
    return fewest


def _kibibytes(path: Path) -> dict[str, int]:
    """Fields of a file of the kernel that are given in kB, in bytes."""
    fields = {}
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        if rest.endswith(" kB"):
            fields[name] = int(rest.split()[0]) << 10
    return fields


class Soak:
    """One run."""

    def __init__(self, daemon: Daemon, seed: int) -> None:
        self._daemon = daemon
        self._seed = seed
        self._rng = random.Random(seed)
        self.deaths: Counter[str] = Counter()
        self.crashed = 0
        self.slowest_free_s = 0.0
        self.not_free = 0
        self.points: list[Point] = []

    def run(self, deaths: int) -> None:
        """All of them."""
        self._touch_all()
        self._store_resident()
        tenth = max(BATCH, deaths // 10)
        for number in range(1, deaths + 1):
            self._one(number)
            if number % BATCH == 0:
                self._wait_until_free()
            if number % tenth == 0:
                self._measure(number)

    def _touch_all(self) -> None:
        """Fill the arena once: its pages count as the daemon's from when it first reads them."""
        count = self._daemon.stats().tiers.dram.capacity_bytes // SIZE
        with connect(self._daemon.socket()) as client:
            keys = hashes(count, "everywhere")
            cache = client.open(layout("deaths", shard_bytes=SIZE))
            assert cache.put(keys, contents(keys, SIZE)).stored == count
            self._daemon_written()
            client.clear()

    def _daemon_written(self) -> None:
        def written() -> bool:
            moves = self._daemon.stats().moves
            return not (moves.spills or moves.due)

        wait_for(written, "every block to be read and written", 30.0)

    def _store_resident(self) -> None:
        with connect(self._daemon.socket()) as client:
            cache = client.open(layout("deaths", shard_bytes=SIZE))
            cache.put(RESIDENT, contents(RESIDENT, SIZE))
            assert cache.lookup(RESIDENT).length == LENGTH
            cache.retain(RESIDENT, 100)

    def _one(self, number: int) -> None:
        kind = KINDS[number % len(KINDS)]
        child = Child(Doomed(self._daemon.socket(), kind, f"{self._seed}/{number}").run)
        if kind == "random":
            time.sleep(self._rng.uniform(0, RANDOM_S))
            child.kill()
        else:
            child.wait()
        self.crashed += child.crashed
        self.deaths[kind] += 1

    def _wait_until_free(self) -> None:
        died = time.monotonic()

        def free() -> bool:
            found: Stats = self._daemon.stats()
            held = found.leases or found.sessions > 1 or found.blocks.quarantined
            return not held

        wait_for(free, "everything to be free", 30.0)
        took = time.monotonic() - died
        self.slowest_free_s = max(self.slowest_free_s, took)

    def _measure(self, number: int) -> None:
        self._wait_until_free()
        with connect(self._daemon.socket()) as client:
            client.clear()
        stats = self._daemon.settled()
        self.not_free += stats.tiers.dram.used_bytes + stats.blocks.known
        assert self._daemon.process is not None
        self.points.append(Point(number, self._daemon.process.pid))
        say(f"{number:,} deaths: {self.points[-1]}")
        self._store_resident()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.deaths")
    parser.add_argument("--deaths", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    figures = Figures(f"deaths: {options.deaths:,} clients, seed {options.seed}")
    # Soon committed, so that the index has been opened when the first tenth is over.
    with Daemon(dram={"size": "16 MiB"}, nvme={"sync_interval": "50 ms"}) as daemon:
        daemon.start()
        soak = Soak(daemon, options.seed)
        soak.run(options.deaths)
    for kind, count in soak.deaths.items():
        figures.add(kind, count)
    first, last = soak.points[0], soak.points[-1]
    figures.add("after the first tenth", first)
    figures.add("at the end", last)
    # PSS is printed only: it changes with every other process that maps the same libraries.
    for name in ("rss", "own"):
        grown = getattr(last, name) - getattr(first, name)
        bar = f"<= {GROWN_BYTES_MAX >> 20} MiB"
        figures.hold(f"{name} has grown by", f"{grown:,} bytes", bar, grown <= GROWN_BYTES_MAX)
    more = last.descriptors - first.descriptors
    figures.hold("more descriptors", more, "<= 0", more <= 0)
    slowest = soak.slowest_free_s
    figures.hold("free after", f"{slowest:.3f} s at most", f"<= {FREE_S:g} s", slowest <= FREE_S)
    figures.zero("bytes and blocks left after clear", soak.not_free)
    figures.zero("clients that ended otherwise", soak.crashed)
    figures.end()


if __name__ == "__main__":
    main()
