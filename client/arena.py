"""The tenant's arena, mapped into this process, and where the bytes of a caller's buffers are.

Pages are mapped ahead in the background, so that the first copy through a fresh mapping is not
slowed by a page fault for every 4 KiB.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvstore.client.checks import wrong_size
from kvstore.errors import ArenaGone, InvalidBlock, NotPermitted
from kvstore.mapping import MADV_POPULATE_WRITE, address_of_map, advise, map_shared

POPULATE_BYTES = 64 << 20  # one call: short enough to stop soon when the mapping is closed


class Arena:
    """One mapping of one daemon's arena file."""

    def __init__(self, path: str, size_bytes: int, inode: int) -> None:
        """Map the file. Raises ArenaGone when it is not the one that the daemon told of."""
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except PermissionError:
            raise NotPermitted(
                f"this user may not map {path}: join the group that owns the tenant"
            ) from None
        except OSError as error:
            raise ArenaGone(
                f"the arena {path} cannot be opened: {error.strerror}: connect again"
            ) from None
        try:
            status = os.fstat(file)
            if status.st_ino != inode or status.st_size != size_bytes:
                raise ArenaGone(f"{path} is not the arena of this daemon any more: connect again")
            self._map = map_shared(file, size_bytes)
        finally:
            os.close(file)
        self.path = path
        self.inode = inode
        self._device = status.st_dev
        self.size_bytes = size_bytes
        self.view = memoryview(self._map)
        self.address = address_of_map(self._map)
        self._closing = False
        self._hooks: list[Callable[[], object]] = []
        self._hooking = threading.Lock()
        self._populate = threading.Thread(
            target=self._touch_pages, name="kvstore-populate", daemon=True
        )
        self._populate.start()

    def close(self) -> None:
        """Stop the background work. The mapping itself lives while any view of it does."""
        with self._hooking:
            self._closing = True
            hooks, self._hooks = self._hooks, []
        for hook in hooks:
            hook()
        self._populate.join()

    def on_close(self, hook: Callable[[], object]) -> None:
        """Have `hook` called when the arena is closed; at once if it was."""
        with self._hooking:
            if not self._closing:
                self._hooks.append(hook)
                return
        hook()

    def is_at(self, path: str, size_bytes: int, inode: int) -> bool:
        """Whether this mapping is of the file that a daemon names. The inode alone does not tell:
        another filesystem has files of the same numbers."""
        try:
            status = os.stat(path, follow_symlinks=False)
        except OSError:
            return False
        return inode == self.inode and (self._device, inode, size_bytes) == (
            status.st_dev,
            status.st_ino,
            status.st_size,
        )

    def wait_populated(self, timeout_s: float | None = None) -> None:
        """Wait until all pages are mapped; for benchmarks."""
        self._populate.join(timeout_s)

    def _touch_pages(self) -> None:
        for start in range(0, self.size_bytes, POPULATE_BYTES):
            length = min(POPULATE_BYTES, self.size_bytes - start)
            if self._closing or not advise(self.address + start, length, MADV_POPULATE_WRITE):
                return  # an older kernel: the pages come one by one, as they are used


def addresses_of(buffers: Sequence[Any], size: int, *, writable: bool) -> list[int]:
    """Where the bytes of a caller's buffers are: see `address_of`."""
    found = []
    for at, buffer in enumerate(buffers):
        if type(buffer) is np.ndarray and buffer.nbytes == size and not buffer.dtype.hasobject:
            # The usual case, at a fifth of the cost: it takes what is contiguous and writable only.
            try:
                found.append(ctypes.addressof(ctypes.c_char.from_buffer(buffer)))  # type: ignore[arg-type]
                continue
            except (TypeError, ValueError):
                pass
        found.append(address_of(buffer, size, f"buffer {at}", writable=writable))
    return found


def address_of(buffer: Any, size: int, what: str, *, writable: bool) -> int:
    """Where the bytes of a caller's buffer are.

    Takes CPU torch tensors, and whatever has the buffer protocol. Raises InvalidBlock, naming
    `what`, unless it is contiguous, of this size in bytes, in host memory, and writable if asked.
    """
    if hasattr(buffer, "data_ptr"):
        return _tensor_address(buffer, size, what)
    if hasattr(buffer, "__cuda_array_interface__"):
        raise InvalidBlock(f"{what} is in CUDA memory, the first one is not: give all alike")
    try:
        view = buffer if type(buffer) is memoryview else memoryview(buffer)
    except (TypeError, ValueError, BufferError) as error:
        raise InvalidBlock(
            f"{what} is a {type(buffer).__name__} that gives no buffer ({error}): give bytes, a "
            "numpy array of a plain dtype (array.view('u1')) or a CPU tensor"
        ) from None
    if getattr(getattr(buffer, "dtype", None), "hasobject", False) or view.format == "O":
        raise InvalidBlock(f"{what} holds Python objects, not bytes: give an array of numbers")
    if view.nbytes != size:
        raise wrong_size(what, view.nbytes, size)
    if not view.c_contiguous:
        raise InvalidBlock(f"{what} is not contiguous: give a contiguous copy")
    if writable and view.readonly:
        raise InvalidBlock(f"{what} is read-only: give a writable buffer")
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address


def on_device(buffer: Any) -> bool:
    """Whether a caller's buffer is in the memory of a CUDA device."""
    if type(buffer) is np.ndarray:
        return False
    if hasattr(buffer, "data_ptr"):
        return bool(buffer.device.type == "cuda")
    return hasattr(buffer, "__cuda_array_interface__")


def _tensor_address(tensor: Any, size: int, what: str) -> int:
    if tensor.device.type != "cpu":
        raise InvalidBlock(f"{what} is on {tensor.device}: copy it to the host first")
    if "strided" not in str(tensor.layout):
        raise InvalidBlock(f"{what} is a tensor of layout {tensor.layout}: give tensor.to_dense()")
    if tensor.nbytes != size:
        raise wrong_size(what, tensor.nbytes, size)
    if not tensor.is_contiguous():
        raise InvalidBlock(f"{what} is not contiguous: give tensor.contiguous()")
    address: int = tensor.data_ptr()
    return address
