"""From the start of a killed daemon's successor to the first hit, with a full arena.

    python -m tests.soak.restart [--size 8GiB] [--block 256KiB] [--times N]

The clock runs from before the new process is made until the bytes of a block are in the caller's
buffer and compared. So it counts the interpreter, the imports, the slot table, the index of the
NVMe tier (which holds the same blocks), mapping the arena, connecting and the copy.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import random
import statistics
import struct
import time
from pathlib import Path

import numpy as np

from kvstore.client import connect
from kvstore.errors import Unavailable
from kvstore.units import parse_size
from tests.e2e.harness import START_S, Daemon, layout, wait_for
from tests.soak.blocks import content, wrong
from tests.soak.figures import Figures, say

BAR_S = 1.0
BATCH = 64
SAMPLE = 2_000
FILL_S = 600.0
TIMEOUT_S = 5.0
EVENTS = ("NVMe index loaded", "DRAM adopted", "client attached", "ready")


def key_of(number: int) -> bytes:
    """The hash of a block."""
    return struct.pack("<8sQ", b"restart ", number)


def fill(daemon: Daemon, count: int, size: int) -> None:
    """Store blocks and wait until all are on NVMe, too."""
    with connect(daemon.socket(), timeout_s=60.0) as client:
        cache = client.open(layout("restart", shard_bytes=size))
        for first in range(0, count, BATCH):
            keys = [key_of(at) for at in range(first, min(count, first + BATCH))]
            put = cache.put(keys, [content(key, size) for key in keys])
            assert put.stored == len(keys), put
    stats = wait_for(
        lambda: (s := daemon.stats()).moves.spills + s.moves.due == 0 and s, "spills", FILL_S
    )
    assert not stats.tiers.dram.evicted.get("room"), "the arena is too small for this"
    say(f"filled: {stats.tiers.dram.blocks:,} blocks in DRAM, {stats.tiers.nvme.blocks:,} on NVMe")


def processor_s(pid: int) -> float:
    """What a process and its children that have ended have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def first_hit(daemon: Daemon, number: int, size: int) -> dict[str, float]:
    """Start the daemon and get one block; seconds from the start to the end of each phase."""
    key, into = key_of(number), np.zeros(size, np.uint8)
    right = content(key, size)
    begun = len(daemon.log())
    started, wall = time.monotonic(), time.time()
    process = daemon.spawn()
    phases = {}
    while True:
        with contextlib.suppress(Unavailable):
            client = connect(daemon.socket(), timeout_s=TIMEOUT_S)
            break
        assert process.poll() is None, daemon.log()
        assert time.monotonic() < started + START_S, daemon.log()
        time.sleep(0.001)
    phases["connected"] = time.monotonic() - started
    with client:
        cache = client.open(layout("restart", shard_bytes=size))
        got = cache.get([key], [into])
        phases["first hit"] = time.monotonic() - started
        phases["processor time of the daemon until then"] = processor_s(process.pid)
        assert got.length == 1 and got.tiers["dram"] == 1, got
        assert np.array_equal(into, right), "wrong bytes"
    wait_for(lambda: '"ready"' in daemon.log()[begun:], "the daemon to be ready")
    for line in daemon.log()[begun:].splitlines():
        with contextlib.suppress(ValueError, KeyError):
            said = json.loads(line)
            if said["event"] in EVENTS:
                when = datetime.datetime.fromisoformat(said["timestamp"]).timestamp()
                phases.setdefault(f"log: {said['event']}", when - wall)
    return phases


def count_served(daemon: Daemon, numbers: list[int], size: int) -> tuple[int, int]:
    """How many of these blocks DRAM serves, and how many are wrong."""
    into, served, bad = [np.zeros(size, np.uint8)], 0, 0
    with connect(daemon.socket(), timeout_s=TIMEOUT_S) as client:
        cache = client.open(layout("restart", shard_bytes=size))
        for number in numbers:
            key = key_of(number)
            got = cache.get([key], into)
            served += got.tiers["dram"]
            bad += wrong([key][: got.length], into[: got.length])
    return served, bad


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.restart")
    parser.add_argument("--size", default="8GiB", help="of the arena")
    parser.add_argument("--block", default="256KiB")
    parser.add_argument("--times", type=int, default=7)
    parser.add_argument("--bar", type=float, default=BAR_S, help="seconds")
    options = parser.parse_args()
    arena, size = parse_size(options.size), parse_size(options.block)
    bar: float = options.bar
    count, rng = arena // size, random.Random(1)
    figures = Figures(f"restart: arena of {options.size}, {count:,} blocks of {options.block}")
    phases: list[dict[str, float]] = []
    # Room for a slab more than the blocks take, so that the last of them are not evicted.
    sizes = {"dram": {"size": arena + (64 << 20)}, "nvme": {"size": arena * 5 // 4 + (256 << 20)}}
    with Daemon(**sizes) as daemon:  # type: ignore[arg-type]
        daemon.spawn()
        wait_for(lambda: '"ready"' in daemon.log(), "the arena to be allocated", FILL_S)
        fill(daemon, count, size)
        for _ in range(options.times):
            daemon.kill()
            phases.append(first_hit(daemon, rng.randrange(count), size))
        sample = [rng.randrange(count) for _ in range(min(SAMPLE, count))]
        served, bad = count_served(daemon, sample, size)
    names = dict.fromkeys(name for phase in phases for name in phase)
    for name in names:
        found = sorted(phase[name] for phase in phases if name in phase)
        text = f"{statistics.median(found):.3f} s (best {found[0]:.3f}, worst {found[-1]:.3f})"
        if name == "first hit":
            figures.hold(name, text, f"<= {bar:g} s", statistics.median(found) <= bar)
        else:
            figures.add(name, text)
    figures.share("a sample served from DRAM", served, len(sample), 0.99)
    figures.zero("wrong", bad)
    figures.end()


if __name__ == "__main__":
    main()
