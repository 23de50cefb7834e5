"""Reads straight into a device's memory: checked there or on the host, never believed before."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from kvstore.cufile import BouncedFiles
from kvstore.straight import Straight

SIZE = 64 << 10


class HostMemory:
    """Device memory that is the host's: addresses are real."""

    def write(self, address: int, data: memoryview) -> None:
        ctypes.memmove(address, np.frombuffer(data, np.uint8).ctypes.data, len(data))

    def read(self, address: int, into: memoryview) -> None:
        ctypes.memmove(np.frombuffer(into, np.uint8).ctypes.data, address, len(into))


def host_sums(addresses: Sequence[int], size: int, seeds: Sequence[int]) -> list[int]:
    return [
        xxh3_64_intdigest(ctypes.string_at(address, size), seed)
        for address, seed in zip(addresses, seeds, strict=True)
    ]


class Failing:
    """Sums of a device that fails."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: object) -> list[int]:
        self.calls += 1
        raise OSError("the trial found other sums")


@pytest.fixture
def content() -> bytes:
    return np.random.default_rng(5).integers(0, 256, 3 * SIZE, np.uint8).tobytes()


@pytest.fixture
def files(tmp_path: Path, content: bytes) -> BouncedFiles:
    path = tmp_path / "blocks"
    path.write_bytes(bytes(4096) + content)
    return BouncedFiles([path], HostMemory(), threads=2)


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("size", [SIZE, 1000, 100])
def test_what_is_right_is_there(
    files: BouncedFiles, content: bytes, on_device: bool, size: int
) -> None:
    straight = Straight(files, HostMemory(), host_sums if on_device else None)
    assert straight.on_device == on_device
    target = np.zeros(2 * size, np.uint8)
    seeds = [7, 1 << 63]
    sums = [xxh3_64_intdigest(content[at * size : (at + 1) * size], seeds[at]) for at in range(2)]
    assert straight.read(0, 4096, target.ctypes.data, size, seeds, sums)
    assert target.tobytes() == content[: 2 * size]
    for wrong in ([sums[1], sums[0]], [sums[0], sums[1] ^ 1]):
        assert not straight.read(0, 4096, target.ctypes.data, size, seeds, wrong)
    straight.close()
    with pytest.raises(ValueError, match="closed"):
        straight.read(0, 4096, target.ctypes.data, size, seeds, sums)


def test_a_device_that_cannot_sum_is_asked_once(
    files: BouncedFiles, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    failing, target = Failing(), np.zeros(SIZE, np.uint8)
    straight = Straight(files, HostMemory(), failing)
    right = xxh3_64_intdigest(content[:SIZE], 7)
    with caplog.at_level(logging.WARNING, "kvstore"):
        for expected in (right, right, right + 1):
            found = straight.read(0, 4096, target.ctypes.data, SIZE, [7], [expected])
            assert found == (expected == right)
    assert failing.calls == 1
    assert len(caplog.records) == 1
    assert not straight.on_device


def test_a_file_that_ends(files: BouncedFiles) -> None:
    target = np.zeros(SIZE, np.uint8)
    with pytest.raises(OSError, match="blocks"):
        Straight(files, HostMemory(), None).read(0, 1 << 30, target.ctypes.data, SIZE, [1], [1])
