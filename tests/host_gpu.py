"""A GPU of host memory, for machines without one: the same interface, files instead of devices.

Its memory is a file, its handle the path of that: a client maps it as it would map a device's.
"""

from __future__ import annotations

import errno
import mmap
from pathlib import Path


class HostGpu:
    """See kvstore.tiers.hbm.Gpu. It fails while the file `gpu-lost` is in the folder."""

    def __init__(self, folder: Path, number: int) -> None:
        self.number = number
        self.bus = f"0000:{number:02x}:00.0"
        self._folder = folder
        self._made = 0
        self._maps: dict[int, mmap.mmap] = {}  # by made up addresses, far apart

    def allocate(self, size: int) -> int:
        """See Gpu.allocate."""
        self._check()
        self._made += 1
        with self._path(self._made).open("w+b") as file:
            file.truncate(size)
            self._maps[self._made] = mmap.mmap(file.fileno(), size)
        return self._made << 48

    def free(self, address: int) -> None:
        """See Gpu.free."""
        self._maps.pop(address >> 48).close()
        self._path(address >> 48).unlink()

    def export(self, address: int) -> bytes:
        """See Gpu.export."""
        return str(self._path(address >> 48)).encode()

    def write(self, address: int, data: memoryview) -> None:
        """See Gpu.write."""
        self._check()
        at = address & 0xFFFFFFFFFFFF
        self._maps[address >> 48][at : at + len(data)] = data

    def read(self, address: int, into: memoryview) -> None:
        """See Gpu.read."""
        self._check()
        at = address & 0xFFFFFFFFFFFF
        into[:] = self._maps[address >> 48][at : at + len(into)]

    def _check(self) -> None:
        if (self._folder / "gpu-lost").exists():
            raise OSError(errno.EIO, f"GPU {self.number} has fallen off the bus")

    def _path(self, made: int) -> Path:
        return self._folder / f"gpu-{self.number}-{made}"
