"""CUDA buffers in put and get, and fragments, with a fake device: bytes, ways, registration."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvstore.client import Cache, Client
from kvstore.client.cuda import Copier, Direction, Fragments, device_buffers
from kvstore.client.cuda_fragments import Breaks, Way
from kvstore.client.cuda_setup import Abilities
from kvstore.errors import InvalidBlock
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
from tests.e2e.harness import Daemon, content, contents, hashes, layout, targets, wait_for

ROOT = Path(__file__).parents[2]
SLACK_S = 2.5  # of a scheduler with other work: what hangs takes longer than any of this
EVERY = {
    Way.PLAIN: Breaks(0, 0),
    Way.BATCH: Breaks(0, 1 << 40),
    Way.GATHER: Breaks(1 << 40, 1 << 40),
}


def force(copier: Copier, way: Way) -> None:
    """Have every fragment copied in this way."""
    copier._state(0).abilities = Abilities(
        way is Way.BATCH, way is Way.GATHER, dict.fromkeys(Direction, EVERY[way])
    )


# -- bytes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", list(EVERY), ids=lambda way: way.name.lower())
def test_what_comes_from_a_device_is_what_the_host_reads_and_back(
    cache: Cache, copier: Copier, device: FakeDevice, way: Way
) -> None:
    ready(cache, copier)
    force(copier, way)
    keys, before = hashes(24, "blocks"), device.copies[way]
    assert cache.put(keys[:12], on_device(contents(keys[:12], SIZE))).stored == 12
    assert cache.put(keys, contents(keys, SIZE)).present == 12
    into = targets(24, SIZE)
    assert cache.get(keys, into).length == 24
    assert [bytes(one) for one in into] == contents(keys, SIZE)
    there = empty(24)
    result = cache.get(keys, there)
    assert (result.length, result.tiers["dram"]) == (24, 24)
    assert bytes_of(there) == contents(keys, SIZE)
    assert device.copies[way] - before == 36 and device.copies[Way.PAGEABLE] <= 1
    assert copier.counts["loaded_bytes"] == 24 * SIZE


def test_only_new_blocks_are_copied(cache: Cache, copier: Copier) -> None:
    keys = hashes(6, "some")
    cache.put(keys[2:4], contents(keys[2:4], SIZE))
    result = cache.put(keys, on_device(contents(keys, SIZE)))
    assert (result.stored, result.present) == (4, 2)
    into = targets(6, SIZE)
    assert cache.get(keys, into).length == 6
    assert [bytes(one) for one in into] == contents(keys, SIZE)
    assert copier.counts["stored_bytes"] == 4 * SIZE


def test_shards_from_devices(client: Client, copier: Copier) -> None:
    cache = client.open(layout("shards", shard_bytes=SIZE // 4, shards=4))
    cache.copier = copier
    keys = hashes(3, "shards")
    for shard in range(4):
        assert cache.lookup(keys).length == 0
        parts = [one[shard * SIZE // 4 :][: SIZE // 4] for one in contents(keys, SIZE)]
        assert cache.put(keys, on_device(parts), shard=shard).refused == 0
    into = empty(3)
    assert cache.get(keys, into).length == 3
    assert bytes_of(into) == contents(keys, SIZE)
    part = empty(3, SIZE // 4)
    assert cache.get(keys, part, shard=2).length == 3
    assert bytes_of(part) == [one[SIZE // 2 :][: SIZE // 4] for one in contents(keys, SIZE)]


@pytest.mark.parametrize("way", list(EVERY), ids=lambda way: way.name.lower())
def test_blocks_in_fragments(cache: Cache, copier: Copier, device: FakeDevice, way: Way) -> None:
    """As an engine has them: one array for each layer, a block is a row of every one."""
    ready(cache, copier)
    force(copier, way)
    layers, rows, size = 16, 40, SIZE // 16
    random = np.random.default_rng(5)
    memory = [random.integers(0, 256, (rows, size), dtype=np.uint8) for _ in range(layers)]
    want = [one.copy() for one in memory]
    slots = random.permutation(rows)[:10]
    keys = hashes(10, "rows")

    def fragments(offsets: Any) -> Fragments:
        addresses = [[one[row].ctypes.data for one in memory] for row in slots]
        return Fragments.of_blocks(0, offsets, addresses, [size] * layers, 0)

    reservation = cache.reserve(keys)
    offsets = [one.offset for one in reservation.extents]
    deadline = time.monotonic() + 10
    assert copier.store(reservation, fragments(offsets), deadline=deadline)
    into = targets(10, SIZE)
    assert cache.get(keys, into).length == 10
    for row, block in zip(slots, into, strict=True):
        assert bytes(block) == b"".join(one[row].tobytes() for one in want)
    for one in memory:
        one[slots] = 0
    grant = cache.acquire(keys)
    assert copier.load(grant, fragments([one.offset for one in grant.extents]), deadline=deadline)
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(memory, want, strict=True))
    assert device.copies[way] >= 2 * 10 * layers


def test_many_copies_are_given_by_a_thread(
    cache: Cache, copier: Copier, device: FakeDevice
) -> None:
    """A queue that is full makes the next call wait: the engine's thread must not be the one."""
    ready(cache, copier)
    force(copier, Way.PLAIN)
    device.threads.clear()
    reservation = cache.reserve(hashes(1, "many"))
    memory = np.frombuffer(content(b"many", SIZE), "u1").copy()
    order = np.random.default_rng(1).permutation(1024) * 64
    fragments = Fragments(
        0,
        memory.ctypes.data + order,
        reservation.extents[0].offset + order,
        np.full(1024, 64, np.int64),
    )
    assert copier.store(reservation, fragments, deadline=time.monotonic() + 10)
    assert device.threads == {"kvstore-copy"}
    into = targets(1, SIZE)
    assert cache.get(hashes(1, "many"), into).length == 1 and bytes(into[0]) == memory.tobytes()


def test_threads_at_once(cache: Cache, copier: Copier) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            for turn in range(20):
                keys = hashes(4, f"{number}/{turn % 3}")
                cache.put(keys, on_device(contents(keys, SIZE)))
                into = empty(4)
                length = cache.get(keys, into).length
                if bytes_of(into[:length]) != contents(keys[:length], SIZE):
                    wrong.append((number, turn))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert copier.counts["loaded_bytes"] and not copier.late


# -- registration ------------------------------------------------------------------------------


def test_copies_do_not_wait_for_the_registration(
    cache: Cache, copier: Copier, device: FakeDevice
) -> None:
    """Piece by piece, in order; what is not there yet is copied as ordinary memory."""
    device.gate = threading.Semaphore(0)
    arena = cache.client.arena
    assert arena is not None and arena.size_bytes == 4 * PIECE
    keys = hashes(200, "all over")  # more than three pieces
    assert cache.put(keys, on_device(contents(keys, SIZE))).stored == 200
    assert device.copies[Way.PLAIN] == device.copies[Way.BATCH] == 0
    assert copier.counts["pageable_bytes"] == copier.counts["stored_bytes"] == 200 * SIZE
    registration = copier.registration(arena)
    assert registration is not None
    for pieces in range(1, 5):
        device.gate.release()
        wait_for(lambda: registration.ready_bytes == pieces * PIECE, "the next piece")  # noqa: B023
        before = copier.counts["pageable_bytes"]
        into = empty(200)
        assert cache.get(keys, into).length == 200
        assert bytes_of(into) == contents(keys, SIZE)
        slow = copier.counts["pageable_bytes"] - before
        assert slow < 200 * SIZE and (slow == 0) == (pieces == 4)
    assert device.copies[Way.PLAIN] + device.copies[Way.BATCH] + device.copies[Way.GATHER]


def test_a_limit_of_locked_memory_costs_speed_and_one_line(
    cache: Cache, copier: Copier, device: FakeDevice, caplog: pytest.LogCaptureFixture
) -> None:
    device.refuses = "cudaErrorMemoryAllocation"
    keys = hashes(8, "unlocked")
    for _ in range(3):
        assert cache.put(keys, on_device(contents(keys, SIZE))).refused == 0
        into = empty(8)
        assert cache.get(keys, into).length == 8 and bytes_of(into) == contents(keys, SIZE)
        cache.forget(keys)
    assert copier.counts["pageable_bytes"] == 3 * 16 * SIZE
    found = [one for one in caplog.records if "could be registered" in one.getMessage()]
    assert len(found) == 1 and "cudaErrorMemoryAllocation" in found[0].getMessage()


def test_all_is_unregistered_once_nothing_uses_it(
    cache: Cache, copier: Copier, device: FakeDevice
) -> None:
    ready(cache, copier)
    arena = cache.client.arena
    assert arena is not None
    registration = copier.registration(arena)
    assert registration is not None and len(device.registered) == 4
    device.hold_copies()
    assert cache.put(hashes(2, "held"), on_device([b"a" * SIZE] * 2), deadline_s=0).refused == 2
    began = time.monotonic()
    cache.client.close()
    assert time.monotonic() - began < SLACK_S
    assert copier.registration(arena) is None
    assert not registration.ended.wait(0.1) and len(device.registered) == 4
    device.release_copies()
    assert registration.ended.wait(10) and not device.registered
    assert not copier.late


# -- what callers may give ---------------------------------------------------------------------


def test_buffers_that_cannot_be_taken(cache: Cache, copier: Copier) -> None:
    keys, (good,) = hashes(2, "wrong"), empty(1)
    odd = FakeBuffer(np.zeros((SIZE // 2, 4), "u1"))
    odd.__cuda_array_interface__ |= {"shape": (SIZE // 2, 2), "strides": (4, 1)}
    far = FakeBuffer(np.zeros(SIZE, "u1"))
    platform = copier.platform
    assert isinstance(platform, FakePlatform)
    platform.owners[far.address] = 1
    nobody = FakeBuffer(np.zeros(SIZE, "u1"))
    platform.owners[nobody.address] = -1
    for other, text in (
        (FakeBuffer(np.zeros(5, "u2")), "buffer 1 has 10 bytes, this layout takes 65536"),
        (odd, "buffer 1 is not contiguous"),
        (FakeBuffer(np.zeros(SIZE, "u1"), readonly=True), "buffer 1 is read-only"),
        (np.zeros(SIZE, "u1"), "buffer 1 is not in CUDA memory"),
        (nobody, "buffer 1 is on no device that can be told: no such memory"),
        (far, "buffers on devices \\[0, 1\\]"),
    ):
        with pytest.raises(InvalidBlock, match=text):
            cache.get(keys, [good, other])
    with pytest.raises(InvalidBlock, match="buffer 1 is in CUDA memory, the first one is not"):
        cache.get(keys, [bytearray(SIZE), good])
    rows = FakeBuffer(np.zeros((4, SIZE // 4), "u1"))
    rows.__cuda_array_interface__["strides"] = (SIZE // 4, 1)
    assert cache.put(keys, [rows, FakeBuffer(np.zeros(SIZE // 2, "u2"), None)]).stored == 2


def test_tensors_that_cannot_be_taken() -> None:
    """What is asked of torch tensors before any device is."""
    good = torch.zeros(SIZE, dtype=torch.uint8)
    for other, text in (
        (torch.zeros(SIZE, dtype=torch.uint8, device="meta"), "buffer 1 is on meta, the first"),
        (torch.zeros(SIZE, dtype=torch.bfloat16), f"buffer 1 has {2 * SIZE} bytes"),
        (torch.zeros(SIZE * 2, dtype=torch.uint8)[::2], "buffer 1 is not contiguous"),
    ):
        with pytest.raises(InvalidBlock, match=text):
            device_buffers(FakePlatform(), [good, other], SIZE, writable=True)


def test_fragments_outside_the_arena(cache: Cache, copier: Copier, daemon: Daemon) -> None:
    arena = cache.client.arena
    assert arena is not None
    for offset, length in ((-1, 8), (arena.size_bytes - 8, 16), (0, 0)):
        reservation = cache.reserve(hashes(1, "outside"))
        fragments = Fragments(0, *(np.array([one]) for one in (4096, offset, length)))
        with pytest.raises(InvalidBlock, match="not in the arena"):
            copier.store(reservation, fragments, deadline=time.monotonic() + 1)
        assert not daemon.stats().leases


def test_without_cupy_it_says_what_to_install(cache: Cache) -> None:
    """In a process of its own that finds neither, wherever this runs."""
    program = (
        "import sys\n"
        "sys.modules['cupy'] = None\n"
        "from kvstore.client.arena import on_device\n"
        "assert not [name for name in sys.modules if 'cuda' in name]\n"
        "from kvstore.client.cuda import default_copier\n"
        "from kvstore.errors import InvalidBlock\n"
        "try:\n"
        "    default_copier()\n"
        "except InvalidBlock as error:\n"
        "    sys.stdout.write(str(error))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert "pip install 'kvstore[gpu]'" in done.stdout
    assert "copy them to the host first" in done.stdout
