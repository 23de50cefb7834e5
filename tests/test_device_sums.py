"""Sums of device memory: the model and the kernel itself, run by the host, against xxhash."""

from __future__ import annotations

import ctypes
import mmap
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from kvstore import device_sums
from kvstore.checksums import seed, shard_sums
from kvstore.device_sums import (
    BLOCKS,
    RANGES_MAX,
    SECRET,
    SIZE_MIN,
    SOURCE,
    TILE,
    WORD,
    DeviceSums,
    host_sums,
    seeded_secret,
)
from kvstore.types import KIB, MIB
from tests.cuda_on_host import HostCupy, Kernel

ROOT = Path(__file__).parent.parent
SEEDS = st.integers(0, WORD)
SIZES = (
    *range(SIZE_MIN, 301),
    *(1_023, 1_024, 1_025, 1_088, 1_089, 2_048, 4_095, 4_096, 4_097, 64 * KIB),
    *(tiles * TILE * KIB + more for tiles in (1, 2) for more in (-1, 0, 1, 64, 65, 1_025)),
    MIB + 7,
)


def content(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def address_of(buffer: bytearray | mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    return Kernel(SOURCE, "kvstore_sums", tmp_path_factory.mktemp("sums"))


@pytest.fixture
def cupy(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> HostCupy:
    """The host as the device; what runs is the kernel's own source."""
    found = HostCupy(kernel)
    kernel.seed, kernel.launches = 1, []
    monkeypatch.setitem(sys.modules, "cupy", found)
    return found


# -- the model ---------------------------------------------------------------------------------


def test_a_seed_is_added_to_the_secret() -> None:
    assert seeded_secret(0) == SECRET and len(SECRET) == 192
    for one in (1, WORD, 0x0123456789ABCDEF):
        secret = seeded_secret(one)
        for at in range(0, 192, 8):
            found, plain = (int.from_bytes(of[at : at + 8], "little") for of in (secret, SECRET))
            assert found == (plain + (one if at % 16 == 0 else -one)) & WORD


@pytest.mark.parametrize("size", SIZES)
def test_the_model_is_xxh3(size: int) -> None:
    parts, seeds = [content(size), content(size + 1)[1:]], [size, WORD - size]
    assert host_sums(parts, seeds) == [
        xxh3_64_intdigest(part, one) for part, one in zip(parts, seeds, strict=True)
    ]


@given(st.binary(min_size=SIZE_MIN, max_size=5_000), SEEDS)
def test_the_model_is_xxh3_for_whatever_bytes(data: bytes, one: int) -> None:
    assert host_sums([data], [one]) == [xxh3_64_intdigest(data, one)]


def test_few_bytes_are_refused() -> None:
    for size in range(SIZE_MIN):
        with pytest.raises(ValueError, match=f"ranges of {size} bytes"):
            host_sums([bytes(size)], [0])
        with pytest.raises(ValueError, match=f"ranges of {size} bytes"):
            DeviceSums(0).sums([0], size, [0])


# -- the kernel, run by the host -----------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_the_kernel_is_xxh3(cupy: HostCupy, size: int) -> None:
    cupy.kernel.seed = size
    data = bytearray(content(size + 64))
    starts = [0, 1, 8, 16, 32 + 15]
    seeds = [0, 1, WORD, size, WORD - size]
    base = address_of(data)
    assert DeviceSums(0).sums([base + at for at in starts], size, seeds) == [
        xxh3_64_intdigest(bytes(data[at : at + size]), one)
        for at, one in zip(starts, seeds, strict=True)
    ]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_kernel_is_xxh3_for_whatever_ranges(kernel: Kernel, data: st.DataObject) -> None:
    size = data.draw(st.integers(SIZE_MIN, 3 * TILE * KIB), label="size")
    memory = bytearray(content(4 * TILE * KIB))
    starts = data.draw(st.lists(st.integers(0, len(memory) - size), min_size=1, max_size=4))
    seeds = data.draw(st.lists(SEEDS, min_size=len(starts), max_size=len(starts)))
    kernel.seed = data.draw(st.integers(0, 1 << 31), label="order of threads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", HostCupy(kernel))
        found = DeviceSums(0).sums([address_of(memory) + at for at in starts], size, seeds)
    assert found == [
        xxh3_64_intdigest(bytes(memory[at : at + size]), one)
        for at, one in zip(starts, seeds, strict=True)
    ]


def test_the_sums_are_those_of_blocks(cupy: HostCupy) -> None:
    shards, shard_bytes, fingerprint, hash = 4, 48 * KIB, b"f" * 16, b"h" * 32
    block = bytearray(content(shards * shard_bytes))
    found = DeviceSums(0).sums(
        [address_of(block) + shard * shard_bytes for shard in range(shards)],
        shard_bytes,
        [seed(fingerprint, hash, shard) for shard in range(shards)],
    )
    assert b"".join(one.to_bytes(8, "little") for one in found) == shard_sums(
        fingerprint, hash, memoryview(block), shards, shard_bytes
    )


@pytest.mark.parametrize("size", [SIZE_MIN, 1_024, 4_099, TILE * KIB + 77])
def test_one_bit_a_seed_or_a_byte_less_make_another_sum(cupy: HostCupy, size: int) -> None:
    sums, data = DeviceSums(0), bytearray(content(size))
    base = address_of(data)
    [before] = sums.sums([base], size, [5])
    for bit in {0, 1, 8 * size - 1, *range(3, 8 * size, 8 * size // 37)}:
        data[bit // 8] ^= 1 << bit % 8
        assert sums.sums([base], size, [5]) != [before], f"bit {bit}"
        data[bit // 8] ^= 1 << bit % 8
    assert sums.sums([base], size, [5]) == [before]
    assert sums.sums([base], size, [4]) != [before]
    if size > SIZE_MIN:
        assert sums.sums([base], size - 1, [5]) != [before]


BARRIERS = len(re.findall("__syncthreads", SOURCE))


@pytest.mark.parametrize("which", range(BARRIERS))
def test_no_barrier_can_be_left_out(which: int, tmp_path: Path) -> None:
    """Else the host would not show that one is missing."""
    parts = SOURCE.split("__syncthreads();")
    source = "__syncthreads();".join(parts[: which + 1]) + "__syncthreads();".join(
        parts[which + 1 :]
    )
    kernel, data = Kernel(source, "kvstore_sums", tmp_path), bytearray(content(3 * TILE * KIB))
    table = np.zeros(3 * 3, np.uint64)
    table[:3], table[3:6] = address_of(data), (1, 2, 3)
    values = ctypes.c_uint64(table.ctypes.data), ctypes.c_int(3), ctypes.c_uint64(len(data))
    given = (ctypes.c_void_p * 3)(*(ctypes.addressof(one) for one in values))
    want = [xxh3_64_intdigest(bytes(data), one) for one in (1, 2, 3)]
    right = 0
    for kernel.seed in range(8):
        kernel.launch(1, device_sums.THREADS, ctypes.addressof(given))
        right += table[6:].tolist() == want
    assert right < 8


def test_nothing_beside_a_range_is_read(tmp_path: Path) -> None:
    """In a process of its own, which ends at a read of what lies beside, or of a line of 16 bytes
    that is not aligned."""
    done = subprocess.run(
        [sys.executable, "-c", "from tests.test_device_sums import guarded; guarded()", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "guarded\n"), done.stderr


def guarded() -> None:
    """Sums of ranges of every alignment that end, and that begin, at memory nobody may read."""
    kernel = Kernel(
        SOURCE, "kvstore_sums", Path(sys.argv[1]), "-fsanitize=alignment",
        "-fsanitize-undefined-trap-on-error",
    )  # fmt: skip
    sys.modules["cupy"] = HostCupy(kernel)  # type: ignore[assignment]
    page, middle = mmap.PAGESIZE, 32 * mmap.PAGESIZE
    memory = mmap.mmap(-1, middle + 2 * page)
    base = address_of(memory)
    memory[page : page + middle] = content(middle)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for at in (base, base + page + middle):
        assert protect(at, page, 0) == 0
    sums = DeviceSums(0)
    for size in (*range(SIZE_MIN, SIZE_MIN + 17), 1_024, 1_025, 4_099, TILE * KIB + 1, middle):
        for start in (0, middle - size):
            found = sums.sums([base + page + start], size, [size])
            assert found == [xxh3_64_intdigest(content(middle)[start : start + size], size)]
    sys.stdout.write("guarded\n")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc here")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_kernel_compiles_for_devices(architecture: str, tmp_path: Path) -> None:
    source = tmp_path / "sums.cu"
    source.write_text(SOURCE)
    command = [
        "nvcc",
        "-cubin",
        f"-arch={architecture}",
        "-Xptxas",
        "-v",
        "-Werror",
        "all-warnings",
    ]
    done = subprocess.run(
        [*command, source, "-o", tmp_path / "sums.cubin"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr


# -- the device --------------------------------------------------------------------------------


def test_many_ranges_take_several_launches_of_few_blocks(cupy: HostCupy) -> None:
    sums, size = DeviceSums(3), 300
    data = bytearray(content(RANGES_MAX + 500))
    starts = list(range(RANGES_MAX + 70))
    assert sums.sums([], size, []) == []
    cupy.kernel.launches.clear()
    found = sums.sums([address_of(data) + at for at in starts], size, starts)
    assert found == [xxh3_64_intdigest(bytes(data[at : at + size]), at) for at in starts]
    assert cupy.kernel.launches == [BLOCKS, BLOCKS]
    assert set(cupy.streams) == {77} and set(cupy.devices) == {3} and cupy.compiled == 1
    with pytest.raises(ValueError, match="2 addresses and 1 seeds"):
        sums.sums([1, 2], size, [1])


def test_a_device_that_computes_wrongly_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever asks then reads back and sums on the host."""
    wrong = SOURCE.replace("lane >> 47", "lane >> 46")
    found = HostCupy(Kernel(wrong, "kvstore_sums", tmp_path))
    monkeypatch.setitem(sys.modules, "cupy", found)
    sums = DeviceSums(0)
    for _ in range(2):
        with pytest.raises(OSError, match=r"CUDA device 0 makes no sums: .*wrongly"):
            sums.sums([address_of(bytearray(300))], 300, [0])
    assert found.compiled == 1


def test_without_cupy_there_are_no_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(OSError, match="CUDA device 0 makes no sums"):
        DeviceSums(0).sums([0], 300, [0])


def test_a_device_that_is_lost_is_an_os_error(cupy: HostCupy) -> None:
    sums, data = DeviceSums(0), bytearray(300)
    sums.sums([address_of(data)], 300, [0])
    cupy.lost = True
    with pytest.raises(OSError, match="IllegalAddress"):
        sums.sums([address_of(data)], 300, [0])
