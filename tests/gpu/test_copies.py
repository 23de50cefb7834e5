"""Copies between a real device and the arena: bytes in all ways, order, deadlines, registration."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvstore.client import Cache, Client
from kvstore.client.cuda import Copier, Direction, Fragments, default_copier
from kvstore.client.cuda_device import CupyPlatform
from kvstore.client.cuda_fragments import Breaks, Way
from kvstore.client.cuda_setup import Abilities, measure
from kvstore.types import MIB
from tests.e2e.harness import Daemon, contents, hashes, layout, targets, wait_for

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what cupy looks for and does not find
    pytest.importorskip("cupy")
torch: Any = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("torch finds no CUDA device", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
SIZE = 256 << 10
PIECE = 8 * MIB
LONG = 6_000_000_000  # cycles of a device: some seconds
EVERY = {
    Way.PLAIN: Breaks(0, 0),
    Way.BATCH: Breaks(0, 1 << 40),
    Way.GATHER: Breaks(1 << 40, 1 << 40),
}


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon(dram={"size": "64 MiB"}, nvme={"size": "0"}) as daemon:
        yield daemon.start()


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.client(timeout_s=5.0) as client:
        yield client
    with daemon.client() as other:
        other.clear()


@pytest.fixture
def copier() -> Copier:
    return Copier(CupyPlatform(), piece_bytes=PIECE)


@pytest.fixture
def cache(client: Client, copier: Copier, request: pytest.FixtureRequest) -> Cache:
    cache = client.open(layout(request.node.nodeid, shard_bytes=SIZE))
    cache.copier = copier
    return cache


def on_device(blocks: list[bytes]) -> list[Any]:
    return [torch.frombuffer(bytearray(one), dtype=torch.bfloat16).cuda() for one in blocks]


def empty(count: int) -> list[Any]:
    return [torch.full((SIZE,), 0xEE, dtype=torch.uint8, device="cuda") for _ in range(count)]


def bytes_of(buffers: list[Any]) -> list[bytes]:
    return [one.view(torch.uint8).cpu().numpy().tobytes() for one in buffers]


def ready(cache: Cache, copier: Copier) -> Any:
    """Wait until the arena is registered and the device measured."""
    cache.get(hashes(1, "first"), empty(1))
    cache.put(hashes(1, "first"), empty(1))
    cache.forget(hashes(1, "first"))
    arena = cache.client.arena
    assert arena is not None
    registration = copier.registration(arena)
    assert registration is not None
    wait_for(
        lambda: registration.failed or registration.ready_bytes == arena.size_bytes,
        "the arena to be registered",
        60.0,
    )
    assert not registration.failed
    return registration


def test_the_device_has_every_way_and_is_measured_soon() -> None:
    device = CupyPlatform().device(torch.cuda.current_device())
    with device.current():
        began = time.monotonic()
        found = measure(device)
        assert time.monotonic() - began < 10, "with the kernel's first compilation"
        assert found.batches and found.gathers
        began = time.monotonic()
        measure(device)
        assert time.monotonic() - began < 1.0


@pytest.mark.parametrize("way", list(EVERY), ids=lambda way: way.name.lower())
def test_bytes_in_every_way(cache: Cache, copier: Copier, way: Way) -> None:
    ready(cache, copier)
    number = torch.cuda.current_device()
    copier._state(number).abilities = Abilities(
        way is Way.BATCH, way is Way.GATHER, dict.fromkeys(Direction, EVERY[way])
    )
    keys = hashes(40, "blocks")
    assert cache.put(keys, on_device(contents(keys, SIZE))).stored == 40
    into = targets(40, SIZE)
    assert cache.get(keys, into).length == 40
    assert [bytes(one) for one in into] == contents(keys, SIZE)
    there = empty(40)
    assert cache.get(keys, there).length == 40
    assert bytes_of(there) == contents(keys, SIZE)


@pytest.mark.parametrize("way", list(EVERY), ids=lambda way: way.name.lower())
@pytest.mark.parametrize("lengths", [[32 << 10] * 8, [1, 4_099, 15, 16, 17, SIZE - 4_148]])
def test_fragments_in_every_way(cache: Cache, copier: Copier, way: Way, lengths: list[int]) -> None:
    """Also those that begin and end at no line of 16 bytes."""
    ready(cache, copier)
    number = torch.cuda.current_device()
    copier._state(number).abilities = Abilities(
        way is Way.BATCH, way is Way.GATHER, dict.fromkeys(Direction, EVERY[way])
    )
    rows = 30
    memory = [
        torch.randint(0, 256, (rows, one), dtype=torch.uint8, device="cuda") for one in lengths
    ]
    want = [one.cpu().numpy() for one in memory]
    slots = np.random.default_rng(1).permutation(rows)[:20].tolist()
    keys = hashes(20, "rows")

    def fragments(offsets: list[int]) -> Fragments:
        addresses = [[one.data_ptr() + row * one.shape[1] for one in memory] for row in slots]
        return Fragments.of_blocks(number, offsets, addresses, lengths, 0)

    stream = torch.cuda.current_stream().cuda_stream or 1
    reservation = cache.reserve(keys)
    places = fragments([one.offset for one in reservation.extents])
    assert copier.store(reservation, places, deadline=time.monotonic() + 10, streams=[stream])
    into = targets(20, SIZE)
    assert cache.get(keys, into).length == 20
    for row, block in zip(slots, into, strict=True):
        assert bytes(block) == b"".join(one[row].tobytes() for one in want)
    for one in memory:
        one[slots] = 0
    grant = cache.acquire(keys)
    places = fragments(list(grant.places.offsets))
    assert copier.load(grant, places, deadline=time.monotonic() + 10, streams=[stream])
    for mine, theirs in zip(memory, want, strict=True):
        assert np.array_equal(mine.cpu().numpy(), theirs)


def test_arrays_of_cupy_on_a_stream_of_their_own(cache: Cache) -> None:
    import cupy

    keys = hashes(4, "cupy")
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        blocks = [cupy.asarray(np.frombuffer(one, "u1")) for one in contents(keys, SIZE)]
        assert cache.put(keys, blocks).stored == 4
        into = [cupy.zeros(SIZE, "u1") for _ in keys]
        assert cache.get(keys, into).length == 4
        assert [one.get().tobytes() for one in into] == contents(keys, SIZE)


def test_pieces_are_registered_and_given_back(cache: Cache, copier: Copier) -> None:
    registration = ready(cache, copier)
    assert registration.unified and registration.ready_bytes == 8 * PIECE
    before = copier.counts["pageable_bytes"]
    keys = hashes(200, "over all")  # of 256 KiB: more than six pieces
    assert cache.put(keys, on_device(contents(keys, SIZE))).stored == 200
    into = empty(200)
    assert cache.get(keys, into).length == 200 and bytes_of(into) == contents(keys, SIZE)
    assert copier.counts["pageable_bytes"] == before
    cache.client.close()
    assert registration.ended.wait(30)


def test_a_first_copy_that_is_not_registered_is_right(cache: Cache, copier: Copier) -> None:
    keys = hashes(100, "at once")
    assert cache.put(keys, on_device(contents(keys, SIZE))).stored == 100
    into = empty(100)
    assert cache.get(keys, into).length == 100 and bytes_of(into) == contents(keys, SIZE)


def test_a_store_comes_after_what_was_computed(cache: Cache, copier: Copier) -> None:
    ready(cache, copier)
    keys = hashes(4, "computed")
    blocks = empty(4)
    values = [
        torch.frombuffer(bytearray(one), dtype=torch.uint8).cuda() for one in contents(keys, SIZE)
    ]
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG // 10)
    for block, value in zip(blocks, values, strict=True):
        block.copy_(value)
    assert cache.put(keys, blocks).stored == 4
    into = targets(4, SIZE)
    assert cache.get(keys, into).length == 4
    assert [bytes(one) for one in into] == contents(keys, SIZE)


def test_a_late_load_does_not_come_over_what_is_computed_next(
    cache: Cache, copier: Copier, daemon: Daemon
) -> None:
    ready(cache, copier)
    keys = hashes(4, "late")
    cache.put(keys, contents(keys, SIZE))
    into = empty(4)
    torch.cuda.synchronize()
    cache.client.timeout_s = 0.2
    torch.cuda._sleep(LONG)
    began = time.monotonic()
    assert cache.get(keys, into, deadline_s=0.0).length == 0
    assert time.monotonic() - began < 1.5
    for one in into:
        one.fill_(7)
    torch.cuda.synchronize()
    assert all(bool((one == 7).all()) for one in into)
    cache.client.timeout_s = 5.0
    wait_for(lambda: not daemon.stats().leases, "the lease to end")
    assert cache.get(keys, into).length == 4 and bytes_of(into) == contents(keys, SIZE)


def test_a_late_store_is_never_committed(cache: Cache, copier: Copier, daemon: Daemon) -> None:
    ready(cache, copier)
    keys, blocks = hashes(4, "late"), empty(4)
    torch.cuda.synchronize()
    cache.client.timeout_s = 0.2
    torch.cuda._sleep(LONG)
    began = time.monotonic()
    assert cache.put(keys, blocks, deadline_s=0.0).refused == 4
    assert time.monotonic() - began < 1.5
    cache.client.timeout_s = 5.0
    wait_for(lambda: not daemon.stats().leases, "the lease to end")
    assert cache.lookup(keys).length == 0


def test_the_copier_of_the_process(client: Client) -> None:
    """Nothing is to be set up: a CUDA tensor is enough."""
    cache = client.open(layout("plain", shard_bytes=SIZE))
    keys = hashes(2, "plain")
    assert cache.put(keys, on_device(contents(keys, SIZE))).stored == 2
    into = empty(2)
    assert cache.get(keys, into).length == 2 and bytes_of(into) == contents(keys, SIZE)
    assert cache.copier is default_copier()


def test_no_context_on_another_device(cache: Cache, copier: Copier) -> None:
    """A context takes half a gigabyte of a device's memory from whoever works there."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one device only")
    import ctypes

    other = (torch.cuda.current_device() + 1) % torch.cuda.device_count()
    ready(cache, copier)
    flags, active = ctypes.c_uint(), ctypes.c_int()
    state = ctypes.CDLL("libcuda.so.1").cuDevicePrimaryCtxGetState
    assert not state(other, ctypes.byref(flags), ctypes.byref(active))
    assert not active.value
