"""Shared mappings of large files, so placed and advised that the kernel can use pages of 2 MiB.

With small pages a copy of many megabytes spends a tenth of its time on address translation, and
mapping a large arena takes seconds. All of this is advice: where it cannot be had, small pages do.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator

import numpy as np

HUGE_BYTES = 2 << 20
ATTEMPTS = 64  # each fills one gap that misleads
MADV_POPULATE_WRITE = 23
MADV_COLLAPSE = 25
RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
PROT_NONE = 0
MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def address_of_map(mapping: mmap.mmap) -> int:
    """Where a writable mapping begins."""
    address: int = np.frombuffer(mapping, np.uint8).__array_interface__["data"][0]
    return address


def map_shared(file: int, size_bytes: int) -> mmap.mmap:
    """The file, mapped for reading and writing, where possible from a multiple of 2 MiB on.

    The kernel takes the highest gap that is large enough and gives no say in it here. So a larger
    gap is taken, and all of it but an aligned part is kept until the file lies there. Another
    thread that maps something meanwhile, or another gap of just that size, spoils it: that gap is
    filled, and it is tried again.
    """
    with contextlib.ExitStack() as spoilt:
        for _ in range(ATTEMPTS if size_bytes >= HUGE_BYTES else 0):
            with _gap(size_bytes):
                mapping = mmap.mmap(file, size_bytes)
            if not address_of_map(mapping) % HUGE_BYTES:
                return mapping
            spoilt.callback(mapping.close)
    return mmap.mmap(file, size_bytes)


@contextlib.contextmanager
def _gap(size_bytes: int) -> Iterator[None]:
    """Keep what lies around an aligned gap of this size taken."""
    whole = size_bytes + HUGE_BYTES
    start = _libc.mmap(None, whole, PROT_NONE, RESERVED, -1, 0)
    if start == MAP_FAILED:
        yield
        return
    first = -(-start // HUGE_BYTES) * HUGE_BYTES
    last, end = first + size_bytes, start + whole
    _libc.munmap(first, size_bytes)
    try:
        yield
    finally:
        for low, high in ((start, first), (last, end)):
            if high > low:
                _libc.munmap(low, high - low)


def advise(address: int, size_bytes: int, advice: int) -> bool:
    """Whether the kernel took an advice on a range; the interpreter lock is not held meanwhile."""
    return not _libc.madvise(address, size_bytes, advice)
