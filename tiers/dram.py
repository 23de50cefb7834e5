"""The DRAM tier: one arena file in tmpfs or hugetlbfs, mapped here and by the clients of a tenant.

The file outlives the process, so committed bytes survive its death. Who may open it is decided by
the file's mode and group alone; what lies where is told by the slot table beside it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvstore import filesystems, numa
from kvstore.mapping import HUGE_BYTES, address_of_map, map_shared
from kvstore.tiers.allocation import allocate
from kvstore.tiers.base import ALIGNMENT, check_range, copy, flat, named

ARENA_MODE = 0o660  # the group of the tenant maps it
SAMPLES = 64  # pages that are asked where they lie


class DramArena:
    """A tier whose bytes are also reachable as memory: `view` hands them out without a copy.

    A client that maps the file can also truncate it (its mode lets the group write): then touching
    the lost pages through a view is a SIGBUS for the toucher, while system calls on such a view
    (NVMe reads and writes) fail with EFAULT. `damaged` tells, as long as the pages are missing.
    """

    name = "dram"

    def __init__(self, path: Path, file: int) -> None:
        """Maps an open file and takes it over; use `create` or `open`."""
        self.path = path
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode) or not status.st_size:
                raise OSError(errno.EINVAL, "not an arena: it is empty or no regular file")
            if status.st_size % ALIGNMENT:
                raise OSError(errno.EINVAL, f"not an arena: {status.st_size} bytes are no pages")
            self.inode = status.st_ino
            self.capacity_bytes = status.st_size
            self._map = map_shared(file, status.st_size)
        except OSError as error:
            os.close(file)
            raise named(error, path) from error
        self._file = file
        self._allocated = _holds(status) >= status.st_size
        self._bytes = memoryview(self._map)

    @property
    def address(self) -> int:
        """Where its map begins."""
        return address_of_map(self._map)

    def damaged(self) -> bool:
        """Whether a client has cut it short: its end is missing, or pages that it had."""
        if self._file < 0:
            return True  # closed
        status = os.fstat(self._file)
        lost = self._allocated and _holds(status) < self.capacity_bytes
        return lost or status.st_size < self.capacity_bytes

    def nodes_found(self) -> Counter[int]:
        """On which memory nodes a sample of its pages lies; empty where that cannot be told."""
        found: Counter[int] = Counter()
        if self._allocated:  # asking touches a page, and would make one that is not there
            step = max(1, self.capacity_bytes // SAMPLES)
            with contextlib.suppress(OSError):
                for start in range(0, self.capacity_bytes, step):
                    # Stripes take turns: steps of whole turns would meet the same node only.
                    offset = start + start // step * HUGE_BYTES
                    found[numa.node_at(self.address + offset % self.capacity_bytes)] += 1
        return found

    @classmethod
    def create(
        cls,
        path: Path,
        size_bytes: int,
        *,
        mode: int = ARENA_MODE,
        gid: int | None = None,
        preallocate: bool = True,
        nodes: Sequence[int] = (),
    ) -> DramArena:
        """A new arena of zeros; an old file of that name is unlinked, and lives on in old maps.

        Its pages are spread over the memory `nodes`, as far as those have any; () leaves that to
        the kernel. In hugetlbfs all pages are taken at once, whatever `preallocate` says: nobody
        else could use them. Raises ValueError for an impossible size, OSError (ENOSPC) naming path,
        wanted and available bytes when the filesystem has no room: touching an overcommitted tmpfs
        page is a SIGBUS.
        """
        if size_bytes <= 0 or size_bytes % ALIGNMENT:
            raise ValueError(f"an arena of {size_bytes} bytes: give a multiple of {ALIGNMENT}")
        scratch = path.with_name(path.name + ".new")
        cls.check_room({path: size_bytes})
        for old in (scratch, path):
            old.unlink(missing_ok=True)
        page_bytes = filesystems.page_bytes(path.parent)
        _check_room(path, size_bytes, page_bytes)
        file = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(file, size_bytes)
            if preallocate or page_bytes:
                allocate(file, size_bytes, huge_page_bytes=page_bytes, nodes=nodes)
            if nodes and not page_bytes:  # pages made from now on: in holes, or back from swap
                with map_shared(file, size_bytes) as mapping:
                    numa.spread(address_of_map(mapping), size_bytes, nodes)
            if gid is not None:
                os.fchown(file, -1, gid)
            os.fchmod(file, mode)  # after the owner is right, and whatever the umask says
            os.rename(scratch, path)
        except OSError as error:
            os.close(file)
            scratch.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                _check_room(path, size_bytes, page_bytes)
            raise named(error, path) from error
        return cls(path, file)

    @staticmethod
    def check_room(sizes: Mapping[Path, int]) -> None:
        """Raises OSError as `create` would for these new arenas, all in one filesystem, before an
        old file is lost for nothing. The room of old files counts unless somebody maps them."""
        first = next(iter(sizes))
        page_bytes, old_bytes = filesystems.page_bytes(first.parent), 0
        for path, size in sizes.items():
            if page_bytes and size % page_bytes:
                text = f"size {size} refused: give a multiple of {page_bytes} bytes"
                raise OSError(errno.EINVAL, text, os.fspath(path))
            for old in (path, path.with_name(path.name + ".new")):
                old_bytes += _set_free_with(old)
        _check_room(first, sum(sizes.values()), page_bytes, old_bytes)

    @classmethod
    def open(cls, path: Path) -> DramArena:
        """The arena that an earlier process left; OSError when there is none."""
        return cls(path, os.open(path, os.O_RDWR | os.O_NOFOLLOW))

    def view(self, offset: int, length: int) -> memoryview:
        """The bytes themselves, writable; use it and drop it."""
        if offset < 0 or length < 0 or offset + length > self.capacity_bytes:
            raise ValueError(f"{length} bytes at {offset} are outside of {self.path}")
        return self._bytes[offset : offset + length]

    def read(self, offset: int, into: memoryview) -> None:
        """See Tier.read."""
        into = flat(into)
        check_range(offset, len(into), self.capacity_bytes)
        copy(into, self.view(offset, len(into)))

    def write(self, offset: int, data: memoryview) -> None:
        """See Tier.write; the rest of the last page stays as it was."""
        data = flat(data)
        check_range(offset, len(data), self.capacity_bytes)
        copy(self.view(offset, len(data)), data)

    def sync(self) -> None:
        """Memory is as durable as it gets."""
        self.view(0, 0)  # raises ValueError when closed

    def close(self) -> None:
        """See Tier.close; the map stays for as long as someone holds a view of it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        with contextlib.suppress(BufferError):
            self._bytes.release()
            self._map.close()


def _holds(status: os.stat_result) -> int:
    """Bytes of memory that a file takes."""
    return status.st_blocks * 512


def _set_free_with(path: Path) -> int:
    """Bytes of memory that are free once this file is removed: none while another process has it
    open or mapped, which is when the kernel gives no lease on it."""
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return 0
    try:
        # Who opens it meanwhile is told on by a signal: by this one, as it ends nobody.
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except BlockingIOError:
        return 0
    except OSError:
        pass  # this filesystem knows no leases: taken for free, as it is most often
    finally:
        held = _holds(os.fstat(file))
        os.close(file)  # and the lease with it
    return held


def _check_room(path: Path, size_bytes: int, page_bytes: int, old_bytes: int = 0) -> None:
    """Raises OSError when the filesystem of `path` cannot hold so many bytes, after `old_bytes` of
    it have become free."""
    room = os.statvfs(filesystems.nearest_folder(path.parent))
    available = room.f_bavail * room.f_frsize + old_bytes
    if (room.f_blocks or not page_bytes) and available < size_bytes:
        text = (
            f"no room for an arena: wanted {size_bytes} bytes, available {available} bytes: lower "
            "dram.size, or free memory there"
        )
        raise OSError(errno.ENOSPC, text, os.fspath(path))
    if page_bytes:
        pool = filesystems.pool(page_bytes)
        if pool.available * page_bytes + old_bytes < size_bytes:
            text = f"no room for an arena: {pool.lack(size_bytes, pool.available)}"
            raise OSError(errno.ENOSPC, text, os.fspath(path))
