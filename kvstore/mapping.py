"""Shared mappings of large files, so placed and advised that the kernel can use pages of 2 MiB.

With small pages a copy of many megabytes spends a tenth of its time on address translation, and
mapping a large arena takes seconds. All of this is advice: where it cannot be had, small pages do.
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

HUGE_BYTES = 2 << 20
ATTEMPTS = 4
MADV_POPULATE_WRITE = 23
MADV_COLLAPSE = 25

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def address_of_map(mapping: mmap.mmap) -> int:
    """Where a writable mapping begins."""
    address: int = np.frombuffer(mapping, np.uint8).__array_interface__["data"][0]
    return address


def map_shared(file: int, size_bytes: int) -> mmap.mmap:
    """The file, mapped for reading and writing, where possible from a multiple of 2 MiB on.

    The kernel places a mapping right below the last one: a spacer of the surplus moves the next one
    to the boundary. Another thread that maps something meanwhile spoils it, so it is tried again.
    """
    mapping = mmap.mmap(file, size_bytes)
    for _ in range(ATTEMPTS):
        surplus = address_of_map(mapping) % HUGE_BYTES
        if not surplus or size_bytes < HUGE_BYTES:
            break
        mapping.close()
        with mmap.mmap(-1, surplus):
            mapping = mmap.mmap(file, size_bytes)
    return mapping


def advise(address: int, size_bytes: int, advice: int) -> bool:
    """Whether the kernel took an advice on a range; the interpreter lock is not held meanwhile."""
    return not _libc.madvise(address, size_bytes, advice)
