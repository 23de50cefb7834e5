"""From files straight into a device's memory, and checked there before anybody believes it."""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Callable, Sequence

from xxhash import xxh3_64_intdigest

from kvstore.cufile import DeviceFiles, DeviceMemory
from kvstore.device_sums import SIZE_MIN

log = logging.getLogger("kvstore")

Sums = Callable[[Sequence[int], int, Sequence[int]], list[int]]  # addresses, bytes of each, seeds


class Straight:
    """Reads through one way of moving bytes between files and one device; from any thread.

    The sums are made on the device by `sums`; without it, and for what is too small, the bytes are
    read back and summed on the host. A device that fails to sum is not asked again.
    """

    def __init__(self, files: DeviceFiles, device: DeviceMemory, sums: Sums | None) -> None:
        self.files = files
        self._device = device
        self._sums = sums
        self._own = threading.local()  # what is read back, for each thread

    @property
    def on_device(self) -> bool:
        """Whether sums are made on the device."""
        return self._sums is not None

    def read(
        self,
        file: int,
        position: int,
        address: int,
        size: int,
        seeds: Sequence[int],
        sums: Sequence[int],
    ) -> bool:
        """Fill `size` bytes of device memory for each seed, one after the other, and see whether
        their sums are these. OSError when file or device fails."""
        self.files.read(file, position, address, size * len(seeds))
        addresses = [address + at * size for at in range(len(seeds))]
        return self._found(addresses, size, seeds) == list(sums)

    def close(self) -> None:
        """Close the files. No read may be under way."""
        self.files.close()

    def _found(self, addresses: Sequence[int], size: int, seeds: Sequence[int]) -> list[int]:
        if self._sums is not None and size >= SIZE_MIN:
            try:
                return self._sums(addresses, size, seeds)
            except OSError as error:
                self._sums = None
                log.warning("kvstore: sums are not made on the device any more: %s", error)
        return [self._on_host(at, size, seed) for at, seed in zip(addresses, seeds, strict=True)]

    def _on_host(self, address: int, size: int, seed: int) -> int:
        found: mmap.mmap | None = getattr(self._own, "memory", None)
        if found is None or len(found) < size:
            found = self._own.memory = mmap.mmap(-1, size)
        with memoryview(found) as whole, whole[:size] as view:
            self._device.read(address, view)
            return xxh3_64_intdigest(view, seed)
