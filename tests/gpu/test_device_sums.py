"""Sums that a real device makes of its memory, against xxhash, and how fast it does."""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from kvstore.device_sums import SIZE_MIN, TILE, WORD, DeviceSums
from kvstore.types import KIB, MIB

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what cupy looks for and does not find
    cupy: Any = pytest.importorskip("cupy")
if not cupy.cuda.is_available():
    pytest.skip("cupy finds no CUDA device", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
ROUNDS = 10


@pytest.fixture(scope="module")
def sums() -> DeviceSums:
    return DeviceSums(cupy.cuda.runtime.getDevice())


def content(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def on_device(data: bytes) -> Any:
    return cupy.asarray(np.frombuffer(data, np.uint8))


@pytest.mark.parametrize("size", [SIZE_MIN, 1_024, 1_025, 4_099, TILE * KIB, 2 * MIB, 2 * MIB + 77])
def test_the_sums_are_xxh3(sums: DeviceSums, size: int) -> None:
    starts, seeds = list(range(20)), [*range(19), WORD]
    data = content(size + len(starts))
    there = on_device(data)
    cupy.cuda.runtime.deviceSynchronize()
    found = sums.sums([there.data.ptr + at for at in starts], size, seeds)
    assert found == [
        xxh3_64_intdigest(data[at : at + size], one) for at, one in zip(starts, seeds, strict=True)
    ]


def test_they_wait_for_nobody(sums: DeviceSums) -> None:
    """What the engine computes meanwhile goes on, and is not waited for."""
    there = cupy.zeros(MIB, np.uint8)
    busy = cupy.ones((8_192, 8_192), np.float32)
    cupy.cuda.runtime.deviceSynchronize()
    sums.sums([there.data.ptr], MIB, [0])  # compiled
    for _ in range(50):
        busy = busy @ busy * np.float32(1e-4)
    event = cupy.cuda.Event()
    event.record()
    [found] = sums.sums([there.data.ptr], MIB, [0])
    assert not event.done
    assert found == xxh3_64_intdigest(bytes(MIB), 0)


@pytest.mark.parametrize(
    "count, size", [(1, 2 * MIB), (1, 256 * MIB), (32, 2 * MIB), (512, 2 * MIB)]
)
def test_how_fast(
    sums: DeviceSums, capsys: pytest.CaptureFixture[str], count: int, size: int
) -> None:
    data = content(count * size)
    there = on_device(data)
    cupy.cuda.runtime.deviceSynchronize()
    addresses = [there.data.ptr + at * size for at in range(count)]
    seeds, view = list(range(count)), memoryview(data)
    want = [xxh3_64_intdigest(view[at * size : (at + 1) * size], at) for at in seeds]
    assert sums.sums(addresses, size, seeds) == want
    took = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        assert sums.sums(addresses, size, seeds) == want
        took.append(time.perf_counter() - began)
    with capsys.disabled():
        speed = count * size / min(took) / 1e9
        sys.stdout.write(f"\n{count} ranges of {size / MIB:g} MiB: {speed:.1f} GB/s at best\n")
