"""Where the GPU benchmark runs: a real device by torch, or, to rehearse it, a fake one."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kvstore.client.cuda import Copier, Direction, Fragments, default_copier
from kvstore.types import GIB, KIB, MIB
from tests.client.fake_device import ENGINE, FakeBuffer, FakePlatform

ROOM = 0.6  # of what is free in /dev/shm: the most that is used


class Rig(Protocol):
    """A device, memory on it, and its own limit."""

    name: str
    copier: Copier
    blocks: int  # of 2 MiB, or less in a rehearsal, that are copied at once
    block_bytes: int
    layers: int  # arrays that a block has a fragment in
    arena_bytes: int  # of the daemon whose arena is registered in the background
    rounds: int

    def memory(self, count: int, size: int) -> Any:
        """A byte array of shape (count, size) on the device, with random content."""

    def rows(self, memory: Any) -> Sequence[Any]:
        """Its rows as buffers that Cache.put and Cache.get take."""

    def address(self, memory: Any) -> int:
        """Where it begins."""

    def clear(self, memory: Any) -> None:
        """Fill it with zeros, and wait for that."""

    def equal(self, one: Any, other: Any) -> bool:
        """Whether two have the same bytes."""

    def copy(self, memory: Any) -> Any:
        """Another one with the same bytes."""

    def stream(self) -> int:
        """The number of the stream that the caller uses."""

    def link(self, direction: Direction, size: int) -> float:
        """Seconds of one copy of so many bytes between the device and pinned memory."""


class GpuRig:
    """See Rig. Raises ImportError where torch is missing or finds no device."""

    blocks = 256
    block_bytes = 2 * MIB
    layers = 64
    rounds = 9

    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise ImportError("torch finds no CUDA device")
        self.torch: Any = torch
        self.name = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        self.copier = default_copier()
        free = shutil.disk_usage("/dev/shm").free
        self.arena_bytes = min(32 * GIB, int(free * ROOM) // GIB * GIB)
        self._pinned: dict[int, Any] = {}

    def memory(self, count: int, size: int) -> Any:
        """See Rig."""
        return self.torch.randint(0, 256, (count, size), dtype=self.torch.uint8, device="cuda")

    def rows(self, memory: Any) -> Sequence[Any]:
        """See Rig."""
        return list(memory)

    def address(self, memory: Any) -> int:
        """See Rig."""
        return int(memory.data_ptr())

    def clear(self, memory: Any) -> None:
        """See Rig."""
        memory.zero_()
        self.torch.cuda.synchronize()

    def equal(self, one: Any, other: Any) -> bool:
        """See Rig."""
        return bool(self.torch.equal(one, other))

    def copy(self, memory: Any) -> Any:
        """See Rig."""
        return memory.clone()

    def stream(self) -> int:
        """See Rig."""
        return int(self.torch.cuda.current_stream().cuda_stream) or 1

    def link(self, direction: Direction, size: int) -> float:
        """See Rig."""
        if size not in self._pinned:
            host = self.torch.zeros(size, dtype=self.torch.uint8, pin_memory=True)
            self._pinned[size] = host, self.torch.zeros(size, dtype=self.torch.uint8, device="cuda")
        host, device = self._pinned[size]
        target, source = (host, device) if direction is Direction.STORE else (device, host)
        self.torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        self.torch.cuda.synchronize()
        return time.perf_counter() - began


class FakeRig:
    """See Rig. Its figures mean nothing: it shows that the benchmark itself works."""

    name = "a rehearsal: no device, the figures mean nothing"
    blocks = 16
    block_bytes = 64 * KIB
    layers = 8
    arena_bytes = 32 * MIB
    rounds = 2

    def __init__(self) -> None:
        self.copier = Copier(FakePlatform(), piece_bytes=8 * MIB)
        self._random = np.random.default_rng(1)

    def memory(self, count: int, size: int) -> Any:
        """See Rig."""
        return self._random.integers(0, 256, (count, size), dtype=np.uint8)

    def rows(self, memory: Any) -> Sequence[Any]:
        """See Rig."""
        return [FakeBuffer(row) for row in memory]

    def address(self, memory: Any) -> int:
        """See Rig."""
        return int(memory.ctypes.data)

    def clear(self, memory: Any) -> None:
        """See Rig."""
        memory[:] = 0

    def equal(self, one: Any, other: Any) -> bool:
        """See Rig."""
        return bool(np.array_equal(one, other))

    def copy(self, memory: Any) -> Any:
        """See Rig."""
        return memory.copy()

    def stream(self) -> int:
        """See Rig."""
        return ENGINE

    def link(self, direction: Direction, size: int) -> float:
        """See Rig."""
        source, target = np.zeros(size, "u1"), np.empty(size, "u1")
        began = time.perf_counter()
        np.copyto(target, source)
        return time.perf_counter() - began


def scattered(rig: Rig, memory: Any, offsets: Sequence[int], order: Any) -> Fragments:
    """Blocks as an engine has them: block i of the arena is row order[i] of every layer.

    memory  of shape (layers * rows, bytes of a fragment), one layer after the other
    """
    size = rig.block_bytes // rig.layers
    rows = len(order)
    layers = np.arange(rig.layers, dtype=np.int64) * rows * size
    addresses = rig.address(memory) + np.asarray(order, np.int64)[:, None] * size + layers
    return Fragments.of_blocks(0, offsets, addresses, [size] * rig.layers, 0)


def free_bytes(path: Path) -> int:
    """What is free on the drive of a folder."""
    return shutil.disk_usage(path).free
