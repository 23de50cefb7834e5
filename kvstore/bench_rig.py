"""One CUDA device as the benchmark of copies uses it: memory of it, its own limits, and daemons.

The device is reached as the client reaches it, so a fake one rehearses every step.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.bench_daemon import PrivateDaemon, private_daemon
from kvstore.client import Layout
from kvstore.client.cuda import Copier, Direction
from kvstore.client.cuda_device import CupyPlatform, Device, Platform
from kvstore.client.cuda_setup import PIECE_BYTES
from kvstore.errors import DeadlineExceeded, KVStoreError
from kvstore.types import GIB, MIB

SEED = 20_260_101
SHM_SHARE = 0.6  # of what is free in /dev/shm: the most that is used
COPY_S_MAX = 60.0
POLL_S = 0.005
LEGACY_STREAM = 1


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured, and how often."""

    blocks: int = 256
    block_bytes: int = 2 * MIB
    layers: int = 64  # that a block has a fragment in
    arena_bytes: int = 32 * GIB  # that is registered beside the copies
    slab_bytes: int = 64 * MIB
    piece_bytes: int = PIECE_BYTES
    rounds: int = 9
    starts: int = 5  # rounds of what takes seconds

    @property
    def total(self) -> int:
        """Bytes of all blocks."""
        return self.blocks * self.block_bytes


QUICK = Sizes(blocks=64, arena_bytes=2 * GIB, rounds=5, starts=2)


class DeviceArray:
    """Bytes of a device that belong to somebody else."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "stream": LEGACY_STREAM,
        }


class Memory:
    """Memory of a device, and as much locked memory of the host to fill and to look at it with."""

    def __init__(self, device: Device, host: int, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self._device = device
        self._stream = device.stream()
        self._host = host
        self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(host))

    def link_s(self, direction: Direction) -> float:
        """Seconds of one copy between the host and the device."""
        if direction is Direction.STORE:
            return self._copy_s(self._host, self.address)
        return self._copy_s(self.address, self._host)

    def within_s(self, source: Memory) -> float:
        """Seconds of one copy of as much from another place of the device."""
        return self._copy_s(self.address, source.address)

    def fill(self, content: Any) -> None:
        """Give it this content, or this byte everywhere."""
        self._bytes[:] = content
        self.link_s(Direction.LOAD)

    def holds(self, content: Any) -> bool:
        """Whether this is its content."""
        self._bytes[:] = 0
        self.link_s(Direction.STORE)
        return bool(np.array_equal(self._bytes, content))

    def _copy_s(self, target: int, source: int) -> float:
        began = time.perf_counter()
        self._device.plain(self._stream, target, source, self.size)
        event = self._device.record(self._stream)
        while not event.done():
            if time.perf_counter() - began > COPY_S_MAX:
                raise DeadlineExceeded(
                    f"device {self._device.number} has not copied {self.size >> 20} MiB in "
                    f"{COPY_S_MAX:g} s: see what else uses it"
                )
        return time.perf_counter() - began


class Rig:
    """A device, and daemons beside it.

    module  what a daemon is run with, as of `python -m`, and what comes before its own arguments
    engine  makes of arrays what an engine would have
    """

    def __init__(
        self,
        platform: Platform,
        number: int,
        name: str,
        sizes: Sizes,
        *,
        module: Sequence[str] = ("kvstore.daemon",),
        engine: Callable[[list[Any]], list[Any]] = list,
    ) -> None:
        self.name = name
        self.number = number
        self.sizes = sizes
        self.copier = Copier(platform, piece_bytes=sizes.piece_bytes)
        self._device = platform.device(number)
        self._module = module
        self._engine = engine

    @contextlib.contextmanager
    def memory(self, size: int) -> Iterator[Memory]:
        """Memory for a while, in which the device is the one of this thread."""
        with self._device.current(), self._device.scratch(size) as (host, address):
            yield Memory(self._device, host, address, size)

    def rows(self, memory: Memory) -> list[Any]:
        """Buffers of a block each, one after the other, as Cache.put and Cache.get take them."""
        size = self.sizes.block_bytes
        places = range(memory.address, memory.address + memory.size, size)
        return self._engine([DeviceArray(address, size) for address in places])

    def content(self, tag: int) -> Any:
        """As many bytes as all blocks have, the same in every run."""
        return np.random.default_rng((SEED, tag)).integers(0, 256, self.sizes.total, np.uint8)

    def order(self, tag: int) -> Any:
        """The blocks in an order in which none follows its neighbour, except by chance."""
        return np.random.default_rng((SEED, tag)).permutation(self.sizes.blocks)

    def layout(self, name: str) -> Layout:
        """That of all blocks."""
        return Layout(
            model=f"bench-{name}",
            engine="bench",
            dtype="uint8",
            block_tokens=16,
            shard_bytes=self.sizes.block_bytes,
        )

    def daemon(
        self, folder: Path, *, dram_bytes: int, nvme_bytes: int = 0, hbm_bytes: int = 0
    ) -> contextlib.AbstractContextManager[PrivateDaemon]:
        """One whose tiers have these sizes at least. The arena is registered in two pieces or more:
        when the second one is there, the device has been measured."""
        slab = self.sizes.slab_bytes
        dram_bytes, nvme_bytes, hbm_bytes = (
            -(-size // slab) * slab
            for size in (max(dram_bytes, 2 * self.sizes.piece_bytes), nvme_bytes, hbm_bytes)
        )
        return private_daemon(
            folder,
            dram_bytes=dram_bytes,
            nvme_bytes=nvme_bytes,
            slab_bytes=slab,
            hbm={self.number: hbm_bytes} if hbm_bytes else None,
            module=self._module,
        )


def find(number: int, *, quick: bool = False) -> Rig:
    """A device of this host. Raises KVStoreError, saying what to do, where it cannot be used."""
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()  # starts the driver, too
        if number < count:
            name = cupy.cuda.runtime.getDeviceProperties(number)["name"].decode()
            sizes, torch = _fitting(QUICK if quick else Sizes()), _torch()
            if torch is None:
                return Rig(CupyPlatform(), number, f"{name}, without torch", sizes)
            return Rig(
                CupyPlatform(),
                number,
                f"{name}, torch {torch.__version__}",
                sizes,
                engine=lambda arrays: [torch.as_tensor(a, device=f"cuda:{number}") for a in arrays],
            )
    except ImportError as error:
        raise KVStoreError(
            f"copies of a GPU cannot be measured here, as cupy cannot be loaded ({error}): install "
            "kvstore[gpu], or leave --device out"
        ) from None
    except (OSError, RuntimeError) as error:
        raise KVStoreError(
            f"copies of a GPU cannot be measured here, as no CUDA device can be used ({error}): "
            "install the NVIDIA driver, or leave --device out"
        ) from None
    raise KVStoreError(f"there is no CUDA device {number}: there are {count}, from 0, name one")


def wait_for(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Until it is true. Raises DeadlineExceeded when that takes longer."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise DeadlineExceeded(
                f"{what} took longer than {seconds:g} s: see what else this machine does"
            )
        time.sleep(POLL_S)


def _fitting(sizes: Sizes) -> Sizes:
    room = int(shutil.disk_usage("/dev/shm").free * SHM_SHARE) // GIB * GIB
    return dataclasses.replace(sizes, arena_bytes=min(sizes.arena_bytes, room))


def _torch() -> Any:
    """The library, where it is and finds a device: an engine has its tensors, which the client
    finds faster than other arrays. Else None."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None
