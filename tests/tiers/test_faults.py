"""The wrapper that makes a tier fail: each fault does what it says, where it says, and no more."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.tiers.base import ALIGNMENT
from kvstore.tiers.faults import (
    SECTOR_BYTES,
    SUFFERED_BY,
    VERBS,
    At,
    Fault,
    FaultPlan,
    FaultyTier,
    Rate,
)
from kvstore.tiers.nvme import NvmeFiles

SLAB = 16 * ALIGNMENT
SIZE = 4 * SLAB
SOON_S = 10.0
OLD, NEW = random.Random(1).randbytes(SLAB), random.Random(2).randbytes(SLAB)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[NvmeFiles]:
    files = NvmeFiles.open([tmp_path], SIZE, SLAB)
    files.write(0, memoryview(OLD))
    yield files
    files.close()


def held(files: NvmeFiles, length: int = SLAB) -> bytes:
    into = bytearray(length)
    files.read(0, memoryview(into))
    return bytes(into)


def bits_that_differ(one: bytes, other: bytes) -> int:
    return sum((a ^ b).bit_count() for a, b in zip(one, other, strict=True))


def sectors(data: bytes) -> list[bytes]:
    return [data[at : at + SECTOR_BYTES] for at in range(0, len(data), SECTOR_BYTES)]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("fault", [Fault.EIO, Fault.ENOSPC])
def test_the_nth_operation_fails_and_no_other(files: NvmeFiles, fault: Fault, verb: str) -> None:
    tier = FaultyTier(files, FaultPlan(at=(At(fault, 2, verb),)))
    into = memoryview(bytearray(SLAB))

    def do() -> None:
        if verb == "read":
            tier.read(0, into)
        elif verb == "write":
            tier.write(0, memoryview(NEW))
        else:
            getattr(tier, verb)()

    do()
    if verb not in SUFFERED_BY[fault]:
        do()
        assert not tier.injected
        return
    files.write(0, memoryview(OLD))
    into[:] = bytes(SLAB)
    with pytest.raises(OSError, match="injected fault") as caught:
        do()
    assert caught.value.errno == {Fault.EIO: errno.EIO, Fault.ENOSPC: errno.ENOSPC}[fault]
    assert held(files) == OLD, "nothing is written"
    assert bytes(into) == bytes(SLAB), "nothing is read"
    do()
    assert tier.operations == {verb: 3}
    assert tier.injected == {fault: 1}


def test_operations_are_counted_over_all_kinds(files: NvmeFiles) -> None:
    tier = FaultyTier(files, FaultPlan(at=(At(Fault.EIO, 3, count=2),)))
    into = memoryview(bytearray(SLAB))
    tier.write(0, memoryview(NEW))
    tier.sync()
    with pytest.raises(OSError):
        tier.read(0, into)
    with pytest.raises(OSError):
        tier.probe()
    tier.read(0, into)
    assert tier.operations.total() == 5


@pytest.mark.parametrize("length", [SLAB, ALIGNMENT, 3 * ALIGNMENT + 700, 5])
@pytest.mark.parametrize("seed", range(8))
def test_a_short_write_writes_a_part_and_says_so(files: NvmeFiles, seed: int, length: int) -> None:
    tier = FaultyTier(files, FaultPlan(seed=seed, at=(At(Fault.SHORT, 1),)))
    with pytest.raises(OSError, match="short write"):
        tier.write(0, memoryview(NEW)[:length])
    found = held(files, length)
    kept = next(at for at in range(length) if found[at] != NEW[at])
    assert found == NEW[:kept] + OLD[kept:length]


@pytest.mark.parametrize("length", [SLAB, ALIGNMENT, 3 * ALIGNMENT + 700, 5])
def test_a_torn_write_writes_some_sectors_and_tells_nobody(files: NvmeFiles, length: int) -> None:
    lost = set()
    for seed in range(30):
        files.write(0, memoryview(OLD))
        tier = FaultyTier(files, FaultPlan(seed=seed, at=(At(Fault.TORN, 1),)))
        tier.write(0, memoryview(NEW)[:length])
        found = sectors(held(files, length))
        old, new = sectors(OLD[:length]), sectors(NEW[:length])
        assert all(one in pair for one, *pair in zip(found, old, new, strict=True))
        assert found != new
        lost.add(tuple(one == was for one, was in zip(found, old, strict=True)))
    assert len(lost) > (10 if length == SLAB else 5 if length > 512 else 0), "torn in many ways"


@pytest.mark.parametrize("fault", [Fault.SHORT, Fault.TORN])
def test_a_read_that_stops_leaves_what_was_in_the_buffer(files: NvmeFiles, fault: Fault) -> None:
    tier = FaultyTier(files, FaultPlan(at=(At(fault, 1),)))
    into = bytearray(NEW)
    if fault is Fault.SHORT:
        with pytest.raises(OSError, match="short read"):
            tier.read(0, memoryview(into))
    else:
        tier.read(0, memoryview(into))
    pairs = zip(sectors(bytes(into)), sectors(OLD), sectors(NEW), strict=True)
    assert all(one in pair for one, *pair in pairs)
    assert bytes(into) != OLD


def test_a_flip_is_one_bit(files: NvmeFiles) -> None:
    tier = FaultyTier(files, FaultPlan(at=(At(Fault.FLIP, 1), At(Fault.FLIP, 3))))
    data = bytearray(NEW)
    tier.write(0, memoryview(data))
    assert data == NEW, "what the caller holds is not touched"
    assert bits_that_differ(held(files), NEW) == 1
    files.write(0, memoryview(NEW))
    into = bytearray(SLAB)
    tier.read(0, memoryview(into))
    assert into == NEW
    tier.read(0, memoryview(into))
    assert bits_that_differ(bytes(into), NEW) == 1
    assert held(files) == NEW


def test_a_slow_operation_is_late_and_right(files: NvmeFiles) -> None:
    tier = FaultyTier(files, FaultPlan(at=(At(Fault.SLOW, 1),), slow_s=0.03))
    started = time.monotonic()
    into = bytearray(SLAB)
    tier.read(0, memoryview(into))
    assert time.monotonic() - started >= 0.03
    assert into == OLD


def test_a_hang_ends_when_it_is_released_and_holds_nobody_else_up(files: NvmeFiles) -> None:
    tier = FaultyTier(files, FaultPlan(at=(At(Fault.HANG, 1), At(Fault.HANG, 3))))
    for turn in (1, 2):
        into = bytearray(SLAB)
        reader = threading.Thread(target=tier.read, args=(0, memoryview(into)), daemon=True)
        reader.start()
        end = time.monotonic() + SOON_S
        while not tier.hung:
            assert time.monotonic() < end
        other = bytearray(SLAB)
        if turn == 1:
            tier.read(0, memoryview(other))
            assert other == OLD
        assert reader.is_alive() and not any(into)
        tier.release()
        reader.join(SOON_S)
        assert not reader.is_alive()
        assert into == OLD
    assert tier.hung == 0


def test_a_hang_may_end_by_itself(files: NvmeFiles) -> None:
    tier = FaultyTier(files, FaultPlan(at=(At(Fault.HANG, 1),), hang_s=0.02))
    started = time.monotonic()
    tier.sync()
    assert time.monotonic() - started >= 0.02


def test_rates_are_kept_and_come_out_the_same_each_time(files: NvmeFiles) -> None:
    rates = (Rate(Fault.EIO, 0.2, "read"), Rate(Fault.ENOSPC, 0.1), Rate(Fault.FLIP, 0.0))
    plan = FaultPlan(seed=5, rates=rates)

    def drawn(plan: FaultPlan, verb: str) -> list[Fault | None]:
        return [plan.fault(verb, number, number) for number in range(2000)]

    assert drawn(plan, "read") == drawn(plan, "read")
    assert drawn(plan, "read") != drawn(FaultPlan(seed=6, rates=rates), "read")
    assert drawn(plan, "read").count(Fault.EIO) == pytest.approx(400, abs=80)
    assert set(drawn(plan, "read")) == {None, Fault.EIO}, "a read does not fill a disk"
    assert drawn(plan, "write").count(Fault.ENOSPC) == pytest.approx(200, abs=60)
    assert set(drawn(plan, "write")) == {None, Fault.ENOSPC}
    assert drawn(plan, "probe").count(Fault.ENOSPC) == pytest.approx(200, abs=60)
