"""What a policy costs in the brain: `python -m tests.eviction.cost [--blocks 1000000]`.

A store without NVMe is filled with chains. Then, in turns, chains that are there are asked for,
released, and learned from; and new chains are stored, for which as many blocks leave. Times are
microseconds of processor time per block; `alone` is the same of the policy without the store around
it, which the bars are for. Ends with 1 where one of them takes longer.
Memory is the most that the process had above what it had before, with keys of 32 bytes.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import itertools
import multiprocessing
import pstats
import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from kvstore.catalog import READY
from kvstore.eviction.base import Family, Request
from kvstore.limits import Limits
from kvstore.placement import PlacementConfig
from kvstore.policies import FAMILIES
from kvstore.store import Store
from kvstore.types import DRAM, KIB, MIB, Layout

SEED = 11
SLAB_BYTES = 64 * MIB
BARS_US = {"lru": 2.0, "relevance": 10.0}
CHAINS = (16, 64, 256)
TURNS = 64_000  # blocks asked for in one repetition
BATCH = 50  # chains between two looks at the clock
REQUEST_S = 0.05  # between two requests
KEY_BYTES = 32


@dataclasses.dataclass(frozen=True)
class Cost:
    """Medians, in microseconds per block: asked for, stored while another leaves; in bytes."""

    access: float
    eviction: float
    memory: float = 0.0

    @property
    def both(self) -> float:
        """One block asked for and one evicted."""
        return self.access + self.eviction


class Brain:
    """A whole store, filled."""

    def __init__(self, policy: str, blocks: int, length: int) -> None:
        size = 4 * KIB
        slab = min(SLAB_BYTES, blocks * size)
        config = PlacementConfig(dram_bytes=blocks * size, nvme_bytes=0, slab_bytes=slab)
        self.store = Store(config, Limits(), FAMILIES[policy]())
        self._session = self.store.attach("cost")
        self._entry = self.store.open(
            Layout(model="cost", engine="cost", dtype="uint8", block_tokens=16, shard_bytes=size)
        )
        self._numbers = itertools.count()
        self._length = length
        self.now = 0.0
        self.capacity = self.store.room.dram.capacity(size)

    def chain(self) -> list[bytes]:
        """A new one."""
        numbers = itertools.islice(self._numbers, self._length)
        return [number.to_bytes(KEY_BYTES, "little") for number in numbers]

    def add(self, chain: list[bytes]) -> None:
        """Store a chain."""
        store, now = self.store, self.now
        lease = store.reserve(self._session, self._entry, chain, now).lease
        assert lease is not None
        store.digest(now)
        store.commit(self._session, lease.number, now)
        store.digest(now)
        store.take_orders()

    def there(self, chain: list[bytes]) -> bool:
        """Whether all of a chain is there."""
        get, flags = self._entry.index.get, self.store.catalog.flags
        return all((block := get(key)) is not None and flags[block] & READY for key in chain)

    def ask(self, chain: list[bytes]) -> None:
        """Ask for a chain that is there."""
        store, now = self.store, self.now
        lease = store.acquire(self._session, self._entry, chain, now)
        assert lease.ready == len(chain)
        store.release(self._session, lease.number)
        store.digest(now)
        store.take_orders()


class Bare:
    """A family and its policy for one tier, without a store."""

    def __init__(self, policy: str, blocks: int, length: int) -> None:
        self._family: Family = FAMILIES[policy]()
        self._policy = self._family.make(DRAM, blocks)
        self._free = list(range(blocks + BATCH * length))
        self._length = length
        self.now = 0.0
        self.capacity = blocks

    def chain(self) -> list[int]:
        """A new one."""
        chain = self._free[: -self._length - 1 : -1]
        del self._free[-self._length :]
        return chain

    def add(self, chain: list[int]) -> None:
        """Admit a chain; where there is no room, others leave."""
        family, policy, now = self._family, self._policy, self.now
        short = len(policy) + len(chain) - self.capacity
        if short > 0:
            gone, victims = [next(found := policy.victims(now))], found
            while len(gone) < short:
                gone.append(victims.send(False))
            victims.close()
            policy.forget(gone)
            family.drop(gone)
            self._free += gone
        asked = family.asked(Request((), len(chain), now))
        family.born(-1, chain, asked)
        policy.admit(chain, now)

    def there(self, chain: list[int]) -> bool:
        """Whether all of a chain is there."""
        return all(key in self._policy for key in chain)

    def ask(self, chain: list[int]) -> None:
        """Ask for a chain that is there."""
        self._family.asked(Request(chain, 0, self.now))
        self._policy.touch(chain, self.now)


def cost(
    make: type[Brain] | type[Bare],
    policy: str,
    blocks: int,
    length: int,
    *,
    turns: int = TURNS,
    repetitions: int = 5,
) -> Cost:
    """What blocks cost that are asked for, and that are stored, in a store full of chains."""
    chance = random.Random(SEED)
    before = resident_bytes("VmRSS")
    subject: Any = make(policy, blocks, length)
    chains: list[Any] = []
    for _ in range(subject.capacity // length):
        chains.append(subject.chain())
        subject.add(chains[-1])
        subject.now += chance.expovariate(1 / REQUEST_S)
    access, eviction = [], []
    for _ in range(repetitions):
        rounds = max(1, turns // length // BATCH)
        taken = [turn(subject, chains, chance) for _ in range(rounds)]
        asked, stored = zip(*taken, strict=True)
        access.append(sum(asked) / len(asked) / length * 1e6)
        eviction.append(sum(stored) / len(stored) / length * 1e6)
    memory = (resident_bytes("VmHWM") - before) / blocks
    return Cost(median(access), median(eviction), memory)


def turn(subject: Brain | Bare, chains: list[Any], chance: random.Random) -> tuple[float, float]:
    """Some chains are asked for, and as many stored: the seconds of processor time of each chain.
    Reading that clock costs as much as a chain, so it is read once for many."""
    there: list[Any] = []
    while len(there) < BATCH:
        at = chance.randrange(len(chains))
        if subject.there(chains[at]):
            there.append(chains[at])
        else:  # something of it has left
            chains[at] = chains[-1]
            chains.pop()
    started = time.thread_time()
    for chain in there:
        subject.ask(chain)
    asked = time.thread_time() - started
    new: list[Any] = [subject.chain() for _ in range(BATCH)]
    started = time.thread_time()
    for chain in new:
        subject.now += chance.expovariate(1 / REQUEST_S)
        subject.add(chain)
    stored = time.thread_time() - started
    chains += new
    return asked / BATCH, stored / BATCH


def resident_bytes(name: str) -> int:
    """Of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def measured(make: type[Brain] | type[Bare], policy: str, blocks: int, length: int) -> Cost:
    """In a fresh process, whose memory is then all its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(cost, (make, policy, blocks, length))


def profile(policy: str, blocks: int, length: int) -> None:
    """Where the time goes once the store is full."""
    chance, subject, chains = random.Random(SEED), Brain(policy, blocks, length), []
    for _ in range(subject.capacity // length):
        chains.append(subject.chain())
        subject.add(chains[-1])
        subject.now += chance.expovariate(1 / REQUEST_S)
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(TURNS // length // BATCH):
        turn(subject, chains, chance)
    profiler.disable()
    pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(25)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.eviction.cost")
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--policy", action="append", choices=[*FAMILIES], default=[])
    parser.add_argument("--profile", action="store_true", help="where the time goes instead")
    options = parser.parse_args()
    policies, missed = options.policy or [*BARS_US], False
    if options.profile:
        profile(policies[0], options.blocks, CHAINS[0])
        return 0
    headings = ("policy", "chain", "access", "eviction", "both", "alone", "bytes/block")
    sys.stdout.write("  ".join(f"{word:>11}" for word in headings) + "\n")
    for policy, length in itertools.product(policies, CHAINS):
        whole, bare = (measured(make, policy, options.blocks, length) for make in (Brain, Bare))
        cells = (whole.access, whole.eviction, whole.both, bare.both, whole.memory)
        bar = BARS_US.get(policy)
        missed |= bar is not None and bare.both > bar
        sys.stdout.write(
            f"{policy:>11}  {length:11}  "
            + "  ".join(f"{one:11.2f}" for one in cells)
            + (
                ""
                if bar is None
                else f"  alone {'OVER' if bare.both > bar else 'within'} {bar:g} us"
            )
            + "\n"
        )
        sys.stdout.flush()
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
