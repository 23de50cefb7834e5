"""Blocks that the daemon has on the engine's own GPU are copied within it; both are fake here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.client import Cache
from kvstore.client.cuda import Copier
from kvstore.client.cuda_fragments import Way
from tests.client.fake_device import (
    PIECE,
    SIZE,
    FakeBuffer,
    FakeDevice,
    FakePlatform,
    bytes_of,
    empty,
    on_device,
    ready,
)
from tests.e2e.harness import Daemon, contents, hashes, layout, wait_for

KEYS = hashes(12, "near")


@pytest.fixture
def hbm() -> Iterator[Daemon]:
    with Daemon(nvme={"size": "0"}, dram={"slab_size": "256 KiB"}) as daemon:
        daemon.gpus = ("2 MiB", "2 MiB")
        yield daemon.start()


def climbed(cache: Cache, count: int = len(KEYS)) -> list[FakeBuffer]:
    """Ask until all blocks come from the GPU; what was read then."""

    def read() -> list[FakeBuffer] | None:
        there = empty(count)
        result = cache.get(KEYS[:count], there)
        assert result.length == count and bytes_of(there) == contents(KEYS[:count], SIZE)
        return there if result.tiers["hbm"] == count else None

    return wait_for(read, "copies on the GPU")


def make_cache(daemon: Daemon, copier: Copier) -> Cache:
    cache = daemon.client().open(layout("near"))
    cache.copier = copier
    ready(cache, copier)
    cache.put(KEYS, on_device(contents(KEYS, SIZE)))
    return cache


def memory_of(daemon: Daemon, gpu: int = 0) -> Path:
    """The file that stands for a GPU's memory."""
    return Path(daemon.client().gpus[gpu][2].decode())


def test_copies_within_the_device(hbm: Daemon, device: FakeDevice, copier: Copier) -> None:
    cache = make_cache(hbm, copier)
    climbed(cache)
    # A byte that only that memory has shows where the bytes come from.
    with memory_of(hbm).open("r+b") as memory, cache.acquire(KEYS, gpus=[0]) as grant:
        assert grant.copies[3] is not None
        memory.seek(grant.copies[3])
        memory.write(b"\x77")
    there = empty(len(KEYS))
    assert cache.get(KEYS, there).tiers["hbm"] == len(KEYS)
    assert bytes_of(there)[3][0] == 0x77 and bytes_of(there)[4:] == contents(KEYS[4:], SIZE)
    assert len(device.opened) == 1, "opened once"
    cache.client.close()
    assert not device.opened


def test_some_near_and_some_far(hbm: Daemon, copier: Copier) -> None:
    cache = make_cache(hbm, copier)
    climbed(cache, 5)
    there = empty(len(KEYS))
    result = cache.get(KEYS, there)
    assert bytes_of(there) == contents(KEYS, SIZE)
    assert result.tiers == {"hbm": 5, "dram": 7}


def test_a_rank_has_its_shard_on_its_device(hbm: Daemon) -> None:
    platform = FakePlatform()
    copier = Copier(platform, piece_bytes=PIECE)
    cache = hbm.client().open(layout("ranks", shards=2, shard_bytes=SIZE))
    cache.copier = copier
    whole = contents(KEYS, 2 * SIZE)
    for rank in (0, 1):
        parts = on_device([block[rank * SIZE : (rank + 1) * SIZE] for block in whole])
        cache.put(KEYS, parts, shard=rank)

    def read() -> bool:
        there = empty(len(KEYS))
        for buffer in there:
            platform.owners[buffer.address] = 1
        result = cache.get(KEYS, there, shard=1)
        assert bytes_of(there) == [block[SIZE:] for block in whole]
        return result.tiers["hbm"] == len(KEYS)

    wait_for(read, "the second rank's shards on its GPU")
    assert hbm.settled().tiers.hbm.written_bytes == len(KEYS) * SIZE, "that shard alone"


def test_memory_that_cannot_be_opened_costs_nothing_else(
    hbm: Daemon, device: FakeDevice, copier: Copier, caplog: pytest.LogCaptureFixture
) -> None:
    memory_of(hbm).unlink()
    cache = make_cache(hbm, copier)
    with caplog.at_level(logging.WARNING, "kvstore"):
        for _ in range(3):
            there = empty(len(KEYS))
            assert cache.get(KEYS, there).tiers == {"dram": len(KEYS)}
            assert bytes_of(there) == contents(KEYS, SIZE)
    assert caplog.text.count("GPU memory of the daemon cannot be opened") == 1
    assert device.copies[Way.PLAIN] + device.copies[Way.BATCH] + device.copies[Way.GATHER] > 0
    memory_of(hbm).touch()  # for the daemon to take away


def test_a_daemon_that_dies_with_its_memory(hbm: Daemon, copier: Copier) -> None:
    cache = make_cache(hbm, copier)
    climbed(cache)
    hbm.kill()
    hbm.start()
    assert bytes_of(climbed(cache)) == contents(KEYS, SIZE)
