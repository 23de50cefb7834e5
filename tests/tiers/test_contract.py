"""The contract of `Tier`, which every tier passes; a new tier is one more line in FACTORIES."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.tiers.base import ALIGNMENT, Tier
from kvstore.tiers.dram import DramArena
from kvstore.tiers.faults import FaultPlan, FaultyTier
from kvstore.tiers.hbm import HbmArena
from kvstore.tiers.nvme import NvmeFiles
from tests.host_gpu import HostGpu

SLAB = 16 * ALIGNMENT
SIZE = 12 * SLAB


def refuse_direct_io(file: int) -> None:
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def make_dram(folder: Path) -> Tier:
    return DramArena.create(folder / "arena", SIZE)


def make_nvme(folder: Path) -> Tier:
    return NvmeFiles.open([folder], SIZE, SLAB)


def make_nvme_on_three(folder: Path) -> Tier:
    folders = [folder / name for name in "abc"]
    for one in folders:
        one.mkdir()
    return NvmeFiles.open(folders, SIZE, SLAB)


def make_nvme_buffered(folder: Path) -> Tier:
    return NvmeFiles.open([folder], SIZE, SLAB, direct_io=refuse_direct_io)


def make_faulty(folder: Path) -> Tier:
    return FaultyTier(make_nvme(folder), FaultPlan())


def make_hbm(folder: Path) -> Tier:
    return HbmArena(HostGpu(folder, 0), SIZE)


FACTORIES: list[Callable[[Path], Tier]] = [
    make_dram,
    make_hbm,
    make_nvme,
    make_nvme_on_three,
    make_nvme_buffered,
    make_faulty,
]


@pytest.fixture(params=FACTORIES, ids=lambda make: make.__name__)
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tier]:
    tier: Tier = request.param(tmp_path)
    yield tier
    tier.close()


def pattern(number: int, length: int) -> bytes:
    return number.to_bytes(4, "little") * (length // 4) + b"z" * (length % 4)


def read(tier: Tier, offset: int, length: int) -> bytes:
    into = bytearray(length)
    tier.read(offset, memoryview(into))
    return bytes(into)


def test_tier_says_its_name_and_size(tier: Tier) -> None:
    assert tier.name in ("hbm", "dram", "nvme")
    assert tier.capacity_bytes == SIZE


def test_tier_starts_with_zeros(tier: Tier) -> None:
    for offset in range(0, SIZE, SLAB):
        assert read(tier, offset, SLAB) == bytes(SLAB)


def test_every_page_keeps_its_own_bytes(tier: Tier) -> None:
    for number in range(SIZE // ALIGNMENT):
        tier.write(number * ALIGNMENT, memoryview(pattern(number, ALIGNMENT)))
    tier.sync()
    for number in range(SIZE // ALIGNMENT):
        assert read(tier, number * ALIGNMENT, ALIGNMENT) == pattern(number, ALIGNMENT)


@pytest.mark.parametrize("length", [0, 1, 511, 512, ALIGNMENT - 1, ALIGNMENT + 1, SLAB - 3, SLAB])
@pytest.mark.parametrize("shift", [0, 1, 64, 512])
def test_any_buffer_will_do(tier: Tier, length: int, shift: int) -> None:
    """Any length and any address, read-only or not, of any item size."""
    data = os.urandom(length)
    source = memoryview(bytes(shift) + data)[shift:]
    tier.write(SLAB, source)
    into = bytearray(shift + length + 8)
    tier.read(SLAB, memoryview(into)[shift : shift + length])
    assert bytes(into[shift : shift + length]) == data
    assert not any(into[shift + length :]), "wrote behind the buffer"
    assert not any(into[:shift]), "wrote before the buffer"
    if length and not length % 8:
        wide = memoryview(bytearray(length)).cast("Q")
        tier.read(SLAB, wide)
        assert wide.tobytes() == data


def test_a_write_leaves_its_neighbours_alone(tier: Tier) -> None:
    everything = {offset: os.urandom(SLAB) for offset in range(0, SIZE, SLAB)}
    for offset, data in everything.items():
        tier.write(offset, memoryview(data))
    tier.write(SLAB + ALIGNMENT, memoryview(b"x" * 5))  # the rest of its own page may be anything
    found = read(tier, SLAB, SLAB)
    assert found[: ALIGNMENT + 5] == everything[SLAB][:ALIGNMENT] + b"x" * 5
    assert found[2 * ALIGNMENT :] == everything[SLAB][2 * ALIGNMENT :]
    for offset in set(everything) - {SLAB}:
        assert read(tier, offset, SLAB) == everything[offset]


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (-ALIGNMENT, ALIGNMENT),
        (1, ALIGNMENT),
        (ALIGNMENT // 2, 8),
        (SIZE, 1),
        (SIZE - ALIGNMENT, ALIGNMENT + 1),
        (1 << 62, ALIGNMENT),
        (0, SIZE + 1),
    ],
)
def test_a_place_outside_is_our_own_error(tier: Tier, offset: int, length: int) -> None:
    buffer = memoryview(bytearray(length))
    with pytest.raises(ValueError, match=str(length)):
        tier.read(offset, buffer)
    with pytest.raises(ValueError, match=str(length)):
        tier.write(offset, buffer)


def test_after_close_every_call_is_our_own_error(tier: Tier) -> None:
    tier.close()
    tier.close()
    buffer = memoryview(bytearray(ALIGNMENT))
    with pytest.raises(ValueError, match=r"closed|released"):
        tier.read(0, buffer)
    with pytest.raises(ValueError, match=r"closed|released"):
        tier.write(0, buffer)
    with pytest.raises(ValueError, match=r"closed|released"):
        tier.sync()


def test_threads_on_distinct_ranges_do_not_disturb_each_other(tier: Tier) -> None:
    wrong: list[str] = []

    def work(worker: int) -> None:
        into = memoryview(bytearray(SLAB))
        for turn in range(20):
            data = pattern(worker << 8 | turn, SLAB)
            tier.write(worker * SLAB, memoryview(data))
            tier.read(worker * SLAB, into)
            if into != data:
                wrong.append(f"worker {worker}, turn {turn}")

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(SIZE // SLAB)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
