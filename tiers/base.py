"""The contract that every tier keeps, and the loops that move bytes without copying them twice.

A tier is one linear space of bytes. It knows neither keys nor layouts, and reports trouble of the
world as OSError (naming the path) and trouble of ours as ValueError.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Protocol

import numpy as np

ALIGNMENT = 4096  # the unit of O_DIRECT: offsets in a tier are multiples of it


class Tier(Protocol):
    """A place for bytes, addressed by offset.

    Calls on distinct ranges may come from several threads at once; calls on overlapping ranges are
    the caller's to order. After `close`, every call but `close` raises ValueError.
    """

    @property
    def name(self) -> str:
        """The tier's word in statistics: "dram", "nvme"."""

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the linear space; fixed for life."""

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` from `offset` on.

        Raises ValueError for a place outside the tier, OSError when the medium gives less; what
        `into` holds is undefined then.
        """

    def write(self, offset: int, data: memoryview) -> None:
        """Put `data` at `offset`; when its length is no multiple of ALIGNMENT, the rest of the last
        page may become zeros.

        Raises ValueError for a place outside the tier, OSError when the medium refuses; what the
        range holds is undefined then. Durable only after `sync`, where the medium is durable.
        """

    def sync(self) -> None:
        """Everything written before is on the medium when this returns; OSError when it is not."""

    def close(self) -> None:
        """Give back files and maps; a second call does nothing. No call may be in flight."""


def check_range(offset: int, length: int, capacity: int) -> None:
    """Raises ValueError unless [offset, offset + length) lies in the tier and starts on a page."""
    if offset < 0 or offset % ALIGNMENT or length < 0 or offset + length > capacity:
        raise ValueError(
            f"range of {length} bytes at {offset} is not within {capacity} bytes "
            f"on multiples of {ALIGNMENT}"
        )


def flat(view: memoryview) -> memoryview:
    """The same bytes as a one-dimensional view of bytes; TypeError when not contiguous."""
    return view if view.format == "B" and view.ndim == 1 and view.c_contiguous else view.cast("B")


def copy(into: memoryview, data: memoryview) -> None:
    """Copy bytes between buffers of one length without holding the interpreter lock."""
    np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(data, np.uint8))


def is_aligned(view: memoryview) -> bool:
    """Whether O_DIRECT takes this buffer: its address and its length are multiples of ALIGNMENT."""
    if len(view) % ALIGNMENT:
        return False
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return not address % ALIGNMENT


def read_fully(file: int, into: memoryview, position: int, path: Path) -> None:
    """Fill `into` from the file, through short reads; OSError (EIO) when the file ends before."""
    done, wanted = 0, len(into)
    try:
        while done < wanted:
            count = os.preadv(file, [into[done:] if done else into], position + done)
            if count == 0:
                raise OSError(
                    errno.EIO,
                    f"short read: {done} of {wanted} bytes at {position}; was the file truncated?",
                )
            done += count
    except OSError as error:
        raise named(error, path) from error


def write_fully(file: int, data: memoryview, position: int, path: Path) -> None:
    """Write all of `data` to the file, through short writes; OSError (EIO) when it stops taking."""
    done, wanted = 0, len(data)
    try:
        while done < wanted:
            count = os.pwritev(file, [data[done:] if done else data], position + done)
            if count == 0:
                raise OSError(errno.EIO, f"short write: {done} of {wanted} bytes at {position}")
            done += count
    except OSError as error:
        raise named(error, path) from error


def named(error: OSError, path: Path) -> OSError:
    """The same error with the path in it, whatever raised it."""
    number = error.errno or errno.EIO
    return OSError(number, error.strerror or os.strerror(number), os.fspath(path))
