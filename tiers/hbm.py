"""The HBM tier: a piece of one GPU's memory that the daemon owns and clients on that GPU map.

What is allocated once is cut into slots by the store. The device itself stands behind the smallest
interface, `Gpu`: the real one is `kvstore.tiers.cuda`.
"""

from __future__ import annotations

from typing import Protocol

from kvstore.tiers.base import ALIGNMENT, check_range, flat


class Gpu(Protocol):
    """One device. Every method may be called from any thread, and raises OSError when the device
    refuses, is lost, or has no memory left."""

    number: int
    bus: str  # its PCI address: the same in every process, whatever devices that sees

    def allocate(self, size: int) -> int:
        """An address of so many bytes, at least; aligned to 256."""

    def free(self, address: int) -> None:
        """Give back what `allocate` gave."""

    def export(self, address: int) -> bytes:
        """What another process opens it with."""

    def write(self, address: int, data: memoryview) -> None:
        """Copy from the host; done when this returns."""

    def read(self, address: int, into: memoryview) -> None:
        """Copy to the host; done when this returns."""


class HbmArena:
    """A tier in one device's memory; see Tier. It does not outlive the process."""

    name = "hbm"

    def __init__(self, gpu: Gpu, size_bytes: int) -> None:
        """Allocates. Raises ValueError for an impossible size, OSError when it cannot be had."""
        if size_bytes <= 0 or size_bytes % ALIGNMENT:
            raise ValueError(f"an arena of {size_bytes} bytes: give a multiple of {ALIGNMENT}")
        self.gpu = gpu
        self.capacity_bytes = size_bytes
        self._address: int | None = gpu.allocate(size_bytes)
        try:
            self.handle = gpu.export(self._address)
        except OSError:
            self.close()
            raise

    def read(self, offset: int, into: memoryview) -> None:
        """See Tier.read."""
        into = flat(into)
        check_range(offset, len(into), self.capacity_bytes)
        self.gpu.read(self._at(offset), into)

    def write(self, offset: int, data: memoryview) -> None:
        """See Tier.write; the rest of the last page stays as it was."""
        data = flat(data)
        check_range(offset, len(data), self.capacity_bytes)
        self.gpu.write(self._at(offset), data)

    def address(self, offset: int, length: int) -> int:
        """Where a range is in the device's memory, for who moves bytes there without the host."""
        check_range(offset, length, self.capacity_bytes)
        return self._at(offset)

    def sync(self) -> None:
        """Memory is as durable as it gets."""
        self._at(0)

    def close(self) -> None:
        """See Tier.close."""
        address, self._address = self._address, None
        if address is not None:
            self.gpu.free(address)

    def _at(self, offset: int) -> int:
        if self._address is None:
            raise ValueError("this arena is closed")
        return self._address + offset
