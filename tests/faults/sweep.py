"""The Nth operation of the NVMe tier fails, for every N and in every way, under a whole workload.

    python -m tests.faults.sweep [--only FAULT] [--every K]

Stores, evictions, loads, checks, index commits, a stop and a second life run once for each case; of
every block that is served every byte is compared. A single fault may cost the block that it befell
and no other; a device that is gone is fenced, probed, and used again when it is back.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import structlog

from kvstore.tiers.faults import SUFFERED_BY, At, Fault, FaultPlan, FaultyTier
from kvstore.tiers.nvme import NvmeFiles
from tests.faults.host import KIB, NEVER_S, Host, Hung, Settings, key, layout, run, say

BLOCK = 512 * KIB
LAYOUT = layout(BLOCK)
KEYS = [key(number) for number in range(24)]  # DRAM holds 16 of them
PATIENT_S, HASTY_S = 5.0, 0.05  # deadlines: the latter where something hangs
HANG_S = 0.3
PROBE_LATEST_S = 31.0
NEVER = 1 << 40  # the number of an operation that never comes
GONE = "gone"  # every operation from the Nth on fails, until the device comes back


@dataclasses.dataclass(frozen=True)
class Case:
    """What goes wrong: the Nth operation of a kind, or all from the Nth of any kind on."""

    fault: str
    verb: str
    number: int

    def plan(self) -> FaultPlan:
        if self.fault == GONE:
            return FaultPlan(at=(At(Fault.EIO, self.number, count=NEVER),))
        at = At(Fault(self.fault), self.number, self.verb)
        return FaultPlan(seed=self.number, at=(at,), slow_s=0.02, hang_s=HANG_S)


@dataclasses.dataclass
class Result:
    """What came of a case."""

    served: int = 0
    wrong: int = 0
    lost: int = 0
    fenced: int = 0
    late_ms: int = 0  # the longest that an answer came after its deadline
    injected: int = 0
    operations: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    before_healing: int = 0  # operations until the device is back
    problem: str = ""


class Workload:
    """One run on folders of its own. Operations are counted on over both lives."""

    def __init__(self, folder: Path, case: Case | None) -> None:
        self.settings = Settings(folder, sync_interval="1 h")
        self.plan = case.plan() if case else FaultPlan()
        self.single = case is not None and case.fault != GONE
        self.deadline_s = HASTY_S if case and case.fault == Fault.HANG.value else PATIENT_S
        self.result = Result()
        self.tier: FaultyTier | None = None

    def wrap(self, files: NvmeFiles) -> FaultyTier:
        tier = FaultyTier(files, self.plan)
        if self.tier is not None:
            tier.operations, tier.injected = self.tier.operations, self.tier.injected
        self.tier = tier
        return tier

    async def run(self) -> None:
        """Both lives; Hung or AssertionError when something that must hold does not."""
        await self._life(self._first)
        self.settings.lose_memory()
        await self._life(self._second)
        assert self.tier is not None
        self.result.injected = self.tier.injected.total()
        self.result.operations = self.tier.operations

    async def _life(self, act: object) -> None:
        host = Host(self.settings, self.wrap)
        assert callable(act) and self.tier is not None
        try:
            await act(host)
            assert host.workers_alive, "a worker has died"
            assert not host.problems, host.problems
            host.store.check()
            self.result.fenced += host.store.placement.health.fenced
        finally:
            await host.stop()
            self.result.served += host.served
            self.result.wrong += host.wrong
            self.result.late_ms = max(self.result.late_ms, round(1e3 * host.late_s))

    async def _first(self, host: Host) -> None:
        assert self.tier is not None
        wait_s = self.deadline_s
        for at in range(0, len(KEYS), 4):
            await host.put(LAYOUT, KEYS[at : at + 4], wait_s)
            if wait_s == PATIENT_S:  # so that each run reads and writes the same, up to the fault
                await host.settled()
        await host.get_each(LAYOUT, KEYS, wait_s)
        for at in range(0, len(KEYS), 6):
            await host.get(LAYOUT, KEYS[at : at + 6], wait_s)
        await asyncio.to_thread(host.index.flush, 0.3)
        await host.settled()
        await self._heal(host)
        await host.verify()
        await self._store_again(host)
        await self._flushed(host)
        if self.single:
            before = self.tier.injected.total()
            there = await host.get_each(LAYOUT, KEYS)
            self.result.lost = len(KEYS) - len(there)
            assert self.result.lost <= before or self.tier.injected.total() > before
        await host.settled()

    async def _heal(self, host: Host) -> None:
        """The device is back: what was fenced is found to work again."""
        assert self.tier is not None
        health, failed = host.store.placement.health, host.store.counters.nvme.failed
        self.result.before_healing = self.tier.operations.total()
        if not self.single and failed >= 3:
            assert health.fenced, f"{failed} failures in a row, and it is used"
        if not self.single:
            self.plan = self.tier.plan = FaultPlan()
        if not health.ok:
            await host.pass_time(PROBE_LATEST_S)
            await host.until(lambda: health.ok, "a probe")

    async def _store_again(self, host: Host) -> None:
        for at in range(0, len(KEYS), 4):
            await host.settled()  # else some are refused: what is in memory is not saved yet
            await host.put(LAYOUT, KEYS[at : at + 4])
        await host.settled()

    async def _flushed(self, host: Host) -> None:
        """The index is durable, perhaps at the second try."""
        if not await asyncio.to_thread(host.index.flush, NEVER_S):
            raise Hung("the index is not written")

    async def _second(self, host: Host) -> None:
        there = await host.get_each(LAYOUT, KEYS)  # patiently: what is late is not lost
        await asyncio.to_thread(host.index.flush, 0.3)
        if self.single:
            assert len(KEYS) - len(there) <= 1, f"{len(there)} blocks left of {len(KEYS)}"
        else:
            assert len(there) == len(KEYS), f"{len(there)} blocks left of {len(KEYS)}"


def try_case(case: Case | None) -> Result:
    """Run one case in folders that go with it."""
    folder = Path(tempfile.mkdtemp(prefix="kvsweep-"))
    try:
        workload = Workload(folder, case)
        try:
            run(workload.run)
        except AssertionError as error:
            workload.result.problem = f"{type(error).__name__}: {error}"
        if workload.tier is not None:
            workload.result.injected = workload.tier.injected.total()
        return workload.result
    finally:
        shutil.rmtree(folder)


def cases() -> Iterator[Case]:
    """Each fault at each operation that can suffer it, then a device that is gone from there on."""
    sound = try_case(None)
    hasty = try_case(Case(Fault.HANG.value, "read", NEVER))
    for fault in Fault:
        counts = (hasty if fault is Fault.HANG else sound).operations
        for verb in SUFFERED_BY[fault]:
            for number in range(1, counts[verb] + 1):
                yield Case(fault.value, verb, number)
    for number in range(1, sound.before_healing + 1):
        yield Case(GONE, "", number)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the daemon's log lines: thousands of faults are told there."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.reset_defaults()


def main() -> int:
    """Print the figures; exit status 0 when nothing was wrong."""
    parser = argparse.ArgumentParser(description="Fail the Nth operation, for all N.")
    parser.add_argument("--only", choices=[*(fault.value for fault in Fault), GONE])
    parser.add_argument("--every", type=int, default=1, metavar="K", help="each Kth case only")
    options = parser.parse_args()
    started = time.monotonic()
    with quiet():
        some = [case for case in cases() if options.only in (None, case.fault)]
        some = some[:: options.every]
        say(f"{len(some)} cases\n")
        late_ms = 0
        totals: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for case in some:
            result = try_case(case)
            total, late_ms = totals[case.fault], max(late_ms, result.late_ms)
            total.update(cases=1, served=result.served, wrong=result.wrong, fenced=result.fenced)
            total.update(reached=bool(result.injected), lost=result.lost)
            if result.wrong or result.problem:
                total["failed"] += 1
                say(f"FAILED {case}: {result}\n")
    for fault, total in totals.items():
        say(f"{fault:7}" + "".join(_figures(total)) + "\n")
    every = sum(totals.values(), collections.Counter())
    say(f"{'all':7}" + "".join(_figures(every)) + "\n")
    say(f"latest answer {late_ms} ms after its deadline; ")
    say(f"{time.monotonic() - started:.0f} s\n")
    return 1 if every["failed"] or every["wrong"] else 0


def _figures(total: collections.Counter[str]) -> Iterator[str]:
    for name in ("cases", "reached", "served", "lost", "fenced", "wrong", "failed"):
        yield f" {name} {total[name]:>6}"


if __name__ == "__main__":
    sys.exit(main())
