"""Blocks on NVMe that a client reads there itself: those that a direct grant left where they were.

Bytes come to memory of this module, are checked there against the sums that the daemon told, and
only then go to the caller's. So a read that is too late, or finds other bytes, has touched nothing
of the caller's, and what a device does late harms nobody.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import mmap
import os
import queue
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kvstore.cufile import open_direct, read_fully
from kvstore.mapping import address_of_map
from kvstore.types import NVME, SLOT_ALIGNMENT, Layout, slot_bytes_of

if TYPE_CHECKING:
    from kvstore.client.grant import Grant
    from kvstore.straight import Straight

THREADS = 8
RING_BYTES = 32 << 20  # read ahead of what the caller has got
SPARE_RINGS = 2  # kept for the next calls
LATE_RINGS = 4  # while reads of so many calls hang, no others are begun


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """Bytes of one block: `size` of them from `position` of a file. `sums` are those of its shards,
    which are of one size, and `seeds` what these begin with."""

    file: int
    position: int
    size: int
    seeds: tuple[int, ...]
    sums: tuple[int, ...]


def wanted(
    grant: Grant, layout: Layout, hashes: Sequence[bytes], shard: int | None
) -> dict[int, Wanted]:
    """What of a grant is to be read on NVMe, by its place in the grant. `hashes` begin where the
    grant does."""
    from kvstore.checksums import seed

    told, packed, fingerprint = grant.session.attached.nvme, grant.beside, layout.fingerprint
    shards = range(layout.shards) if shard is None else range(shard, shard + 1)
    skip, size = shards[0] * layout.shard_bytes, len(shards) * layout.shard_bytes
    record = struct.Struct(f"<{1 + layout.shards}Q")
    found: dict[int, Wanted] = {}
    places = (at for at, tier in enumerate(grant.in_tiers) if tier == NVME)
    for at, (offset, *sums) in zip(places, record.iter_unpack(packed), strict=True):
        slab, inside = divmod(offset, told.slab_bytes)
        row, file = divmod(slab, len(told.paths))
        found[at] = Wanted(
            file,
            told.header_bytes + row * told.slab_bytes + inside + skip,
            size,
            tuple(seed(fingerprint, hashes[at], one) for one in shards),
            tuple(sums[one] for one in shards),
        )
    return found


class Ring(Protocol):
    """Slots for reads that are under way."""

    device: int | None  # the number of that whose memory it is; None: the host's
    slot_bytes: int
    slots: int
    busy: int  # reads that have not ended

    def fetch(self, what: Wanted, slot: int) -> int | None:
        """Read into a slot; the address of the first byte, None when it is not what was stored.
        Raises when it cannot be read."""

    def drop(self) -> None:
        """Give the memory back. Nobody uses it any more."""


MakeRing = Callable[[int, int], Ring]  # bytes of a slot, slots; may raise OSError


class HostRing:
    """See Ring: whole pages are read, and checked by the processor."""

    def __init__(self, files: Sequence[int], slot_bytes: int, slots: int) -> None:
        from xxhash import xxh3_64_intdigest

        self.device: int | None = None
        self.slot_bytes = slot_bytes
        self.slots = slots
        self.busy = 0
        self.pins: dict[int, bool] = {}  # by device: whether that reaches it without a detour
        self._files = files
        self._sum = xxh3_64_intdigest
        self._memory = mmap.mmap(-1, slot_bytes * slots)
        self.address = address_of_map(self._memory)

    def fetch(self, what: Wanted, slot: int) -> int | None:
        """See Ring."""
        skip = what.position % SLOT_ALIGNMENT
        start, whole = what.position - skip, slot_bytes_of(skip + what.size)
        base = slot * self.slot_bytes
        view = memoryview(self._memory)[base : base + whole]
        read_fully(self._files[what.file], view, start, whole)
        size = what.size // len(what.sums)
        for at, (first, expected) in enumerate(zip(what.seeds, what.sums, strict=True)):
            shard = view[skip + at * size : skip + (at + 1) * size]
            if self._sum(shard, first) != expected:
                return None
        return self.address + base + skip

    def drop(self) -> None:
        """See Ring: the memory goes with the last who knows it."""


class _Read:
    """One block on its way to a slot."""

    __slots__ = ("address", "done", "slot", "what")

    def __init__(self, what: Wanted, slot: int) -> None:
        self.what = what
        self.slot = slot
        self.address: int | None = None  # of its first byte, once it is there
        self.done = threading.Event()


class DirectFiles:
    """The files of one tenant, open for reading. Every method may be called from any thread."""

    def __init__(self, paths: Sequence[str]) -> None:
        """Raises OSError when one cannot be read by this user, ImportError without xxhash, and
        RuntimeError when there can be no more threads."""
        import xxhash  # noqa: F401

        self.paths = tuple(map(Path, paths))
        self._files: list[int] = []
        self._spare: list[Ring] = []
        self._ways: dict[int, Straight | None] = {}  # by device; None: not yet, or not to be had
        self._lock = threading.Lock()
        self._closed = False
        self._workers = 0
        self._work_to_do: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        try:
            for path in self.paths:
                self._files.append(open_direct(path))
            self._inodes = [_inode(os.fstat(file)) for file in self._files]
            for at in range(THREADS):
                thread = threading.Thread(
                    target=self._work, name=f"kvstore-direct-{at}", daemon=True
                )
                thread.start()
                self._workers += 1
        except BaseException:
            self.close()
            raise

    def are(self, paths: Sequence[str]) -> bool:
        """Whether these paths still lead to these files."""
        try:
            return self.paths == tuple(map(Path, paths)) and self._inodes == [
                _inode(path.stat()) for path in self.paths
            ]
        except OSError:
            return False

    def close(self) -> None:
        """Nothing more is read. The files are closed when the last read has ended, however late
        that is."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for _ in range(THREADS):
                self._work_to_do.put(None)
            workers = self._workers
        if not workers:
            self._end()

    def way(self, device: int, find: Callable[[], Straight | None]) -> Straight | None:
        """What `find` gives for a device, once a thread of its own has found it: that may take
        long, and until then there is none."""
        with self._lock:
            if device in self._ways or self._closed:
                return self._ways.get(device)
            self._ways[device] = None
        thread = threading.Thread(
            target=self._find, args=(device, find), name="kvstore-direct-way", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # no more threads: the next one tries it again
            with self._lock:
                del self._ways[device]
        return None

    def groups(
        self,
        blocks: Sequence[Wanted],
        most: int,
        deadline: float,
        *,
        device: int | None = None,
        make: MakeRing | None = None,
    ) -> Iterator[tuple[list[int], Ring]]:
        """Addresses of the blocks' bytes, checked, some leading ones after the other and at most
        `most` at once, good until the next are asked for. It ends before the first that is not
        there by the deadline (monotonic), cannot be read, or is not what was stored. They are in
        host memory, or where `make` takes it on the `device`, as far as that has room."""
        with self._lock:
            if not blocks or sum(ring.busy > 0 for ring in self._spare) >= LATE_RINGS:
                return
        size = max(what.size for what in blocks)
        try:
            ring = self._ring(slot_bytes_of(size) + SLOT_ALIGNMENT, device, make)
        except (OSError, MemoryError):
            return
        most = max(1, min(most, ring.slots // 2))
        reads: list[_Read] = []
        try:
            self._ahead(reads, blocks, ring, ring.slots)
            for first in range(0, len(blocks), most):
                good: list[int] = []
                for read in reads[first : first + most]:
                    left_s = max(0.0, deadline - time.monotonic())
                    if not read.done.wait(left_s) or read.address is None:
                        break
                    good.append(read.address)
                if good:
                    yield good, ring
                if len(good) < min(most, len(blocks) - first):
                    return
                self._ahead(reads, blocks, ring, first + most + ring.slots)
        finally:
            self._give_back(ring)

    # -- inside --------------------------------------------------------------------------------

    def _ahead(self, reads: list[_Read], blocks: Sequence[Wanted], ring: Ring, until: int) -> None:
        """Have blocks read up to that one."""
        for at in range(len(reads), min(until, len(blocks))):
            read = _Read(blocks[at], at % ring.slots)
            reads.append(read)
            with self._lock:
                if self._closed:
                    read.done.set()
                    continue
                ring.busy += 1
                self._work_to_do.put(functools.partial(self._read, read, ring))

    def _ring(self, slot_bytes: int, device: int | None, make: MakeRing | None) -> Ring:
        slots = max(2, RING_BYTES // slot_bytes)
        if slots * slot_bytes > RING_BYTES:  # so much of its memory an engine has not to spare
            device, make = None, None
        with self._lock:
            for ring in self._spare:
                if (ring.slot_bytes, ring.device) == (slot_bytes, device) and not ring.busy:
                    self._spare.remove(ring)
                    return ring
        if make is not None:
            with contextlib.suppress(OSError):
                return make(slot_bytes, slots)
        return HostRing(self._files, slot_bytes, slots)

    def _give_back(self, ring: Ring) -> None:
        """For the next call, once no late read goes there any more. Some are kept; the memory of
        others is given back by a worker, since a device may take its time for that."""
        with self._lock:
            self._spare.append(ring)
            idle = [one for one in self._spare if not one.busy]
            for old in [] if self._closed else idle[:-SPARE_RINGS]:
                self._spare.remove(old)
                self._work_to_do.put(old.drop)

    def _work(self) -> None:
        while (work := self._work_to_do.get()) is not None:
            with contextlib.suppress(Exception):  # the daemon reads it next, and says what it is
                work()
        with self._lock:
            self._workers -= 1
            last = not self._workers
        if last:
            self._end()

    def _read(self, read: _Read, ring: Ring) -> None:
        try:
            read.address = ring.fetch(read.what, read.slot)
        finally:
            with self._lock:
                ring.busy -= 1
            read.done.set()

    def _find(self, device: int, find: Callable[[], Straight | None]) -> None:
        found = find()
        with self._lock:
            if not self._closed:
                self._ways[device] = found
                return
        if found is not None:
            found.close()

    def _end(self) -> None:
        """The last read has ended."""
        with self._lock:
            files, self._files = self._files, []
            rings, self._spare = self._spare, []
            ways, self._ways = self._ways, {}
        for ring in rings:
            with contextlib.suppress(Exception):
                ring.drop()
        for way in ways.values():
            if way is not None:
                way.close()
        for file in files:
            os.close(file)


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
