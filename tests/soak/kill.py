"""kill -9 of daemon, writers and readers at random instants, under load, every byte checked.

    python -m tests.soak.kill [--rounds N] [--seed S] [--reboot]

After each kill of the daemon every block that was committed before is asked for. The working set
fits into memory, so none of them has left it. With --reboot the arena is removed as well: what was
on NVMe for longer than the sync interval is asked for then.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import shutil
import time
from collections import Counter

import numpy as np

from kvstore.client import Cache, connect
from kvstore.errors import Unavailable
from kvstore.types import Stats
from tests.e2e.harness import START_S, Daemon, wait_for
from tests.soak.blocks import (
    COMMITTED,
    FORGET,
    HUNG,
    LAYOUTS,
    LENGTH,
    READ,
    WRONG,
    Ledger,
    keys_of,
    wrong,
)
from tests.soak.children import Child
from tests.soak.figures import Figures, Overdue, say
from tests.soak.load import TIMEOUT_S, WAIT_S, Page, Reader, Writer

WRITERS, READERS = 2, 2
SYNC_S = 0.2  # nvme.sync_interval: the longer, the longer is a round of --reboot
PACE_S = 0.02  # of a writer with --reboot: or it would forget all before it is old enough
FORGET_ROUNDS = 4  # for so long what was forgotten is forgotten again: that may be lost as well
LOAD_S = (0.02, 0.25)
DRAM_SERVED, NVME_SERVED = 0.99, 0.999
TELL_EVERY_S = 30.0

Chain = tuple[int, int]  # its writer and its number


class Soak:
    """One run."""

    def __init__(self, seed: int, *, reboot: bool) -> None:
        self._rng = random.Random(seed)
        self._seed, self._reboot = seed, reboot
        self._daemon = Daemon(
            dram={"size": "96 MiB"}, nvme={"size": "192 MiB", "sync_interval": f"{SYNC_S} s"}
        )
        self._page = Page(WRITERS)
        self._paths = [self._daemon.folder / f"writer-{at}" for at in range(WRITERS)]
        self._reader_paths = [self._daemon.folder / f"reader-{at}" for at in range(READERS)]
        self._ledgers = [Ledger(path) for path in self._paths + self._reader_paths]
        self._children: list[Child] = []
        self._committed: dict[Chain, float] = {}  # and not forgotten: when it was told
        self._forgotten: dict[Chain, int] = {}  # and in which round
        self._lost: set[tuple[Chain, int]] = set()  # missed once: not asked for again
        self._overdue = Overdue()
        self._load_until = 0.0
        self._buffers = [
            [np.zeros(layout.block_bytes, np.uint8) for _ in range(LENGTH)] for layout in LAYOUTS
        ]
        self.counts: Counter[str] = Counter()
        self.worst = 1.0  # share of the blocks asked for that was served, of any round
        self.starts_s: list[float] = []

    def run(self, rounds: int) -> None:
        """All rounds; the daemon's log must tell of no defect at the end."""
        with self._daemon:
            self._daemon.start()
            try:
                self._children = [self._fork(at) for at in range(WRITERS + READERS)]
                told = time.monotonic()
                for number in range(rounds):
                    self._round()
                    if time.monotonic() - told > TELL_EVERY_S:
                        told = time.monotonic()
                        say(f"round {number + 1}: {dict(self.counts)}, worst {self.worst:.4f}")
                self._read_ledgers()
            finally:
                for child in self._children:
                    child.kill()
                self._leave_nothing_behind()

    def _leave_nothing_behind(self) -> None:
        """A last life, ended in order."""
        if self._daemon.process is None or self._daemon.process.poll() is not None:
            return
        stats = self._daemon.settled()
        self.counts["leases left"] += stats.leases
        self.counts["slots left in quarantine"] += stats.blocks.quarantined

    def _fork(self, number: int) -> Child:
        socket = self._daemon.socket()
        if number < WRITERS:
            pace = PACE_S if self._reboot else 0.0
            make = functools.partial(Writer, socket, number, self._paths[number], self._page, pace)
            return Child(lambda: make().run())
        path = self._reader_paths[number - WRITERS]
        seed = f"{self._seed}/{self._rng.random()}"
        return Child(lambda: Reader(socket, path, self._paths, seed).run())

    # -- one round -----------------------------------------------------------------------------

    def _round(self) -> None:
        settled_at = 0.0
        if self._reboot:
            self._load()
            settled_at = self._settle()
        self._load()
        self._count_evictions()
        self._daemon.kill()
        self.counts["kills of the daemon"] += 1
        if self._rng.random() < 0.3:
            self._kill_one()
        if self._reboot:
            shutil.rmtree(self._daemon.arena / "default")
        self._page.pause()
        started = time.monotonic()
        self._daemon.spawn()
        self._wait_for_writers()
        self._read_ledgers()
        expected = dict(self._committed)
        if self._reboot:
            expected = {chain: t for chain, t in expected.items() if t < settled_at}
            self._committed = dict(expected)  # younger ones may have gone: never asked for
        if self._rng.random() < 0.1:  # death while it starts
            time.sleep(self._rng.uniform(0, 1.0))
            self._daemon.kill()
            self.counts["kills of a starting daemon"] += 1
            started = time.monotonic()
            self._daemon.spawn()
        self._ask(expected, started)
        self._page.resume()

    def _settle(self) -> float:
        """A moment before which everything committed has been written to NVMe."""
        self._page.pause()
        self._wait_for_writers()
        now = time.monotonic()
        wait_for(lambda: self._is_written(self._daemon.stats()), "all blocks to be on NVMe")
        self._page.resume()
        written = time.monotonic()
        self._load_until = written + SYNC_S
        return now

    def _wait_for_writers(self) -> None:
        """Until none of them does anything."""

        def stopped() -> bool:
            return all(self._page.paused(at) or self._children[at].over for at in range(WRITERS))

        wait_for(stopped, "the writers to stop")

    @staticmethod
    def _is_written(stats: Stats) -> bool:
        return not (stats.moves.spills or stats.moves.due)

    def _load(self) -> None:
        """Let them work, and kill some of them meanwhile."""
        end = time.monotonic() + self._rng.uniform(*LOAD_S)
        if self._reboot:
            end = max(end, self._load_until + self._rng.uniform(*LOAD_S))
        for _ in range(self._rng.choice((0, 1, 1, 2))):
            time.sleep(self._rng.uniform(0, max(0.0, end - time.monotonic())))
            self._kill_one()
        time.sleep(max(0.0, end - time.monotonic()))

    def _kill_one(self) -> None:
        at = self._rng.randrange(len(self._children))
        self._children[at].kill()
        self.counts["workers that crashed"] += self._children[at].crashed
        self.counts["kills of writers" if at < WRITERS else "kills of readers"] += 1
        self._children[at] = self._fork(at)

    def _count_evictions(self) -> None:
        """The working set is to fit: this proves that it did."""
        with contextlib.suppress(Unavailable):
            evicted = self._daemon.stats().tiers.dram.evicted
            self.counts["evicted for room"] += evicted.get("room", 0)

    def _read_ledgers(self) -> None:
        for at, ledger in enumerate(self._ledgers):
            for kind, chain, number, when in ledger.follow():
                if kind == COMMITTED:
                    self._committed[at, chain] = when
                elif kind == FORGET:
                    self._committed.pop((at, chain), None)
                    self._forgotten[at, chain] = self.counts["kills of the daemon"]
                elif kind == READ:
                    self.counts["read by readers"] += number
                elif kind == WRONG:
                    self.counts["wrong"] += number
                elif kind == HUNG:
                    self.counts["hung"] += 1
                    say(f"a worker's call took {number} ms")

    # -- asking for what was committed ---------------------------------------------------------

    def _ask(self, expected: dict[Chain, float], started: float) -> None:
        def answers() -> bool:
            assert self._daemon.process is not None
            assert self._daemon.process.poll() is None, f"it ended: {self._daemon.log()[-2000:]}"
            with contextlib.suppress(Unavailable):
                connect(self._daemon.socket(), timeout_s=TIMEOUT_S).close()
                return True
            return False

        wait_for(answers, "the daemon to answer", START_S)
        self.starts_s.append(time.monotonic() - started)
        asked, served = self.counts["asked"], self.counts["served"]
        with connect(self._daemon.socket(), timeout_s=TIMEOUT_S) as client:
            with self._overdue.watch(TIMEOUT_S):
                caches = [client.open(layout) for layout in LAYOUTS]
            for chain in expected:
                self._ask_chain(caches[chain[1] % 2], chain)
            # The index of NVMe hears of a forget as late as of a commit. What came back would fill
            # the memory up, round after round.
            for chain in self._forgotten:
                self.counts["forgotten, and back"] += caches[chain[1] % 2].forget(keys_of(*chain))
            late = self.counts["kills of the daemon"] - FORGET_ROUNDS
            self._forgotten = {c: number for c, number in self._forgotten.items() if number > late}
        if asked != self.counts["asked"]:
            share = (self.counts["served"] - served) / (self.counts["asked"] - asked)
            self.worst = min(self.worst, share)
        self.counts["hung"] += self._overdue.count
        self._overdue.count = 0

    def _ask_chain(self, cache: Cache, chain: Chain) -> None:
        """Every block of a chain that has not been missed before."""
        keys, buffers = keys_of(*chain), self._buffers[chain[1] % 2]
        at = 0
        while at < LENGTH:
            if (chain, at) in self._lost:
                at += 1
                continue
            try:
                with self._overdue.watch(TIMEOUT_S):
                    got = cache.get(keys[at:], buffers[at:], deadline_s=WAIT_S)
                length, tiers = got.length, got.tiers
            except Unavailable:
                length, tiers = 0, Counter[str]()
            end = at + length
            bad = wrong(keys[at:end], buffers[at:end])
            self.counts["wrong"] += bad
            self.counts["asked"] += length
            # Without the arena DRAM can have what a reader brought up before we asked.
            good = length - bad
            self.counts["served"] += good if self._reboot else min(good, tiers["dram"])
            self.counts["from DRAM"] += tiers["dram"]
            self.counts["from NVMe"] += tiers["nvme"]
            if end < LENGTH and (chain, end) not in self._lost:
                self.counts["asked"] += 1
                self.counts["missed"] += 1
                self._lost.add((chain, end))
                end += 1
            at = end

    @property
    def longest_ms(self) -> float:
        """Of the calls that asked for what was committed."""
        return round(self._overdue.longest_s * 1e3, 1)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.kill")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--reboot", action="store_true", help="remove the arena at each kill")
    options = parser.parse_args()
    what = "kill -9 and the arena removed" if options.reboot else "kill -9"
    figures = Figures(f"{what}: {options.rounds} rounds, seed {options.seed}")
    soak = Soak(options.seed, reboot=options.reboot)
    soak.run(options.rounds)
    counts = soak.counts
    for name in ("kills of the daemon", "kills of a starting daemon", "kills of writers"):
        figures.add(name, counts[name])
    for name in ("kills of readers", "read by readers", "asked", "from DRAM", "from NVMe"):
        figures.add(name, counts[name])
    figures.add("missed", counts["missed"])
    figures.add("forgotten before a kill, and back after it", counts["forgotten, and back"])
    if options.reboot:
        figures.share("served after the kills", counts["served"], counts["asked"], NVME_SERVED)
        figures.add("the same, worst round", f"{soak.worst:.4%}")
    else:
        figures.share("served from DRAM", counts["served"], counts["asked"], DRAM_SERVED)
        met = soak.worst >= DRAM_SERVED
        figures.hold("the same, worst round", f"{soak.worst:.4%}", f">= {DRAM_SERVED:.1%}", met)
    starts = sorted(soak.starts_s)
    figures.add("start to first answer, median", f"{starts[len(starts) // 2]:.2f} s")
    figures.add("the longest call asking", f"{soak.longest_ms} ms")
    for name in ("wrong", "hung", "workers that crashed", "evicted for room", "leases left"):
        figures.zero(name, counts[name])
    figures.zero("slots left in quarantine", counts["slots left in quarantine"])
    figures.hold("blocks asked for", counts["asked"], "> 0", counts["asked"] > 0)
    figures.end()


if __name__ == "__main__":
    main()
