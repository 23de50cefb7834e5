"""One CUDA device, as the HBM tier needs it. The only module of the daemon that loads CUDA.

Memory is shared by CUDA IPC: a client opens the handle and has the same bytes at an address of its
own. It is allocated directly, not from a pool, because a handle is of a whole allocation.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np


class CudaGpu:
    """See kvstore.tiers.hbm.Gpu. A context is made on this device alone."""

    def __init__(self, number: int) -> None:
        """Raises OSError, saying what to do, where there is no such device or no way to use it."""
        try:
            import cupy
        except ImportError as error:
            raise OSError(
                errno.ENODEV,
                f"cupy cannot be loaded ({error}): install kvstore[gpu] beside the CUDA driver, or "
                "remove [[hbm]]",
            ) from None
        self._cuda: Any = cupy.cuda
        self._runtime: Any = cupy.cuda.runtime
        self.number = number
        try:
            count = self._runtime.getDeviceCount()
        except Exception as error:
            raise OSError(
                errno.ENODEV,
                f"no CUDA device can be used here ({error}): install the NVIDIA driver, or remove "
                "[[hbm]]",
            ) from None
        if number >= count:
            raise OSError(
                errno.ENODEV, f"there are {count} CUDA devices, from 0: choose one of them"
            )
        with self._here():
            self.bus = str(self._runtime.deviceGetPCIBusId(number)).lower()
        self._own = threading.local()

    def allocate(self, size: int) -> int:
        """See Gpu.allocate."""
        with self._here():
            address: int = self._runtime.malloc(size)
            return address

    def free(self, address: int) -> None:
        """See Gpu.free."""
        with self._here():
            self._runtime.free(address)

    def export(self, address: int) -> bytes:
        """See Gpu.export."""
        with self._here():
            return bytes(self._runtime.ipcGetMemHandle(address))

    def write(self, address: int, data: memoryview) -> None:
        """See Gpu.write."""
        self._copy(address, _address(data), len(data), "memcpyHostToDevice")

    def read(self, address: int, into: memoryview) -> None:
        """See Gpu.read."""
        self._copy(_address(into), address, len(into), "memcpyDeviceToHost")

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        with self._here():
            stream = self._stream()
            self._runtime.memcpyAsync(
                target, source, size, getattr(self._runtime, kind), stream.ptr
            )
            stream.synchronize()

    def _stream(self) -> Any:
        """One for each thread, that waits for nobody else's work."""
        found = getattr(self._own, "stream", None)
        if found is None:
            found = self._own.stream = self._cuda.Stream(non_blocking=True)
        return found

    @contextlib.contextmanager
    def _here(self) -> Iterator[None]:
        """On this device; what CUDA says becomes an OSError."""
        try:
            with self._cuda.Device(self.number):
                yield
        except (self._runtime.CUDARuntimeError, self._cuda.driver.CUDADriverError) as error:
            raise OSError(errno.EIO, f"CUDA device {self.number}: {error}") from error


def _address(view: memoryview) -> int:
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address
