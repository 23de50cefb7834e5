"""Blocks on NVMe into CUDA buffers without DRAM: by this process's memory, or straight into the
device's. The device is fake, the files are real."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from kvstore.client import Cache
from kvstore.client import cuda as cuda_module
from kvstore.client.cuda import Copier
from kvstore.client.cuda_device import Device
from kvstore.client.cuda_straight import CopiedMemory
from kvstore.cufile import BouncedFiles
from kvstore.straight import Straight
from tests.client.fake_device import SIZE as SIZE
from tests.client.fake_device import FakeDevice, bytes_of, empty, on_device, ready
from tests.e2e.harness import Daemon, contents, hashes, layout, wait_for

KEYS = hashes(24, "direct")


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with Daemon(nvme={"size": "64 MiB"}, dram={"slab_size": "1 MiB"}) as daemon:
        yield daemon.start()


@pytest.fixture
def cache(daemon: Daemon, copier: Copier) -> Cache:
    """Its blocks are on NVMe alone."""
    first = daemon.client().open(layout("direct", shard_bytes=SIZE))
    first.put(KEYS, contents(KEYS, SIZE), deadline_s=30)
    daemon.settled()
    daemon.stop()
    daemon.lose_memory()
    daemon.start()
    cache = daemon.client().open(first.layout)
    cache.copier = copier
    assert cache.lookup(KEYS).tiers == {"nvme": len(KEYS)}
    return cache


class Ways:
    """What stands for cuFile: reads by the host into the fake device's memory."""

    def __init__(self) -> None:
        self.made = 0
        self.sums = 0

    def straight(self, device: Device, paths: Sequence[Path], sums: str) -> Straight | None:
        assert sums == "device"
        self.made += 1
        memory = CopiedMemory(device)
        return Straight(BouncedFiles(paths, memory), memory, self._sums)

    def _sums(self, addresses: Sequence[int], size: int, seeds: Sequence[int]) -> list[int]:
        self.sums += len(addresses)
        return [
            xxh3_64_intdigest(ctypes.string_at(address, size), seed)
            for address, seed in zip(addresses, seeds, strict=True)
        ]


@pytest.fixture
def ways(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> Ways:
    """The daemon has found that cuFile is the faster way."""
    ways = Ways()
    monkeypatch.setattr(cuda_module, "straight", ways.straight)
    cache.client.session(1e9).attached.nvme.engine = "gds"
    files, copier = cache.client.direct_files(), cache.copier
    assert files is not None and copier is not None
    assert copier.rings(0, files, "device") is None, "nobody waits for it"
    wait_for(lambda: copier.rings(0, files, "device"), "the way to be open")
    return ways


def spoil(daemon: Daemon, at: int) -> None:
    (folder,) = daemon.config["nvme"]["paths"]
    path, block = Path(folder) / "default" / "blocks.kv", contents(KEYS, SIZE)[at]
    where = path.read_bytes().find(block)
    with path.open("r+b") as file:
        file.seek(where + 5)
        file.write(bytes([block[5] ^ 4]))


def got_twice(daemon: Daemon, cache: Cache) -> None:
    for _ in range(2):
        there = empty(len(KEYS))
        got = cache.get(KEYS, there, direct=True, deadline_s=30)
        assert got.tiers == {"nvme": len(KEYS)}
        assert bytes_of(there) == contents(KEYS, SIZE)
    assert daemon.stats().tiers.dram.blocks == 0


def test_by_the_host(daemon: Daemon, cache: Cache, device: FakeDevice) -> None:
    got_twice(daemon, cache)
    files = cache.client.direct_files()
    assert files is not None
    (ring,) = files._spare
    assert ring.address in device.registered  # type: ignore[attr-defined]


def test_straight(daemon: Daemon, cache: Cache, ways: Ways) -> None:
    got_twice(daemon, cache)
    assert (ways.made, ways.sums) == (1, 2 * len(KEYS))


@pytest.mark.parametrize("by", ["cache", "ways"])
def test_damage_is_not_served(
    daemon: Daemon, cache: Cache, by: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(by)
    spoil(daemon, 9)
    there = empty(len(KEYS))
    assert cache.get(KEYS, there, direct=True, deadline_s=30).length == 9
    assert bytes_of(there)[:9] == contents(KEYS[:9], SIZE)
    assert daemon.stats().tiers.nvme.corrupt == 1


def test_some_from_dram(cache: Cache, copier: Copier, ways: Ways) -> None:
    ready(cache, copier)
    more = hashes(5, "in dram")
    cache.put(more, on_device(contents(more, SIZE)))
    keys = [*more[:2], *KEYS, *more[2:]]
    there = empty(len(keys))
    got = cache.get(keys, there, direct=True, deadline_s=30)
    assert got.tiers == {"dram": 5, "nvme": len(KEYS)}
    assert bytes_of(there) == contents(keys, SIZE)


def test_no_room_on_the_device(
    cache: Cache, ways: Ways, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it goes by the host."""

    asked = []

    def full(size: int) -> None:
        asked.append(size)
        raise MemoryError(size)

    monkeypatch.setattr(device, "allocate", full)
    there = empty(len(KEYS))
    assert cache.get(KEYS, there, direct=True, deadline_s=30).tiers == {"nvme": len(KEYS)}
    assert bytes_of(there) == contents(KEYS, SIZE)
    assert len(asked) == 1 and not ways.sums


def test_memory_of_the_device_is_given_back(cache: Cache, ways: Ways, device: FakeDevice) -> None:
    assert cache.get(KEYS, empty(len(KEYS)), direct=True).length == len(KEYS)
    assert len(device.allocated) == 1
    cache.client.close()
    wait_for(lambda: not device.allocated or None, "the ring to go")


def test_without_cufile(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The daemon says gds, this process cannot: by the host, and told once."""
    cache.client.session(1e9).attached.nvme.engine = "gds"

    def missing(*_: object) -> None:
        raise OSError("no CUDA driver here")

    monkeypatch.setattr("kvstore.cufile.CuFiles", missing)
    with caplog.at_level(logging.WARNING, "kvstore"):
        for _ in range(2):
            there = empty(len(KEYS))
            assert cache.get(KEYS, there, direct=True, deadline_s=30).length == len(KEYS)
            assert bytes_of(there) == contents(KEYS, SIZE)
        wait_for(lambda: "by the host" in caplog.text or None, "a line about it")
    assert len([one for one in caplog.records if "by the host" in one.message]) == 1


def test_bytes_of_a_device(device: FakeDevice) -> None:
    there, memory = empty(1)[0], CopiedMemory(device)
    data = np.arange(SIZE, dtype=np.uint32).tobytes()[:SIZE]
    address = there.__cuda_array_interface__["data"][0]
    memory.write(address, memoryview(data))
    back = bytearray(SIZE)
    memory.read(address, memoryview(back))
    assert back == data == bytes_of([there])[0]
    device.broken = "it has fallen off the bus"
    with pytest.raises(OSError, match="fallen off"):
        memory.read(address, memoryview(back))
