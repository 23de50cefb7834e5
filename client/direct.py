"""Blocks on NVMe that a client reads there itself: those that a direct grant left where they were.

Bytes come to memory of this module, are checked there against the sums that the daemon told, and
only then go to the caller's. So a read that is too late, or finds other bytes, has touched nothing
of the caller's, and what a device does late harms nobody.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import queue
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kvstore.mapping import address_of_map
from kvstore.types import NVME, SLOT_ALIGNMENT, Layout, slot_bytes_of

if TYPE_CHECKING:
    from kvstore.client.grant import Grant

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
        OSError when it cannot be read."""


MakeRing = Callable[[int, int], Ring]  # bytes of a slot, slots; may raise OSError


class HostRing:
    """See Ring: whole pages are read, and checked by the processor."""

    def __init__(self, files: Sequence[tuple[int, Path]], slot_bytes: int, slots: int) -> None:
        from xxhash import xxh3_64_intdigest

        self.device: int | None = None
        self.slot_bytes = slot_bytes
        self.slots = slots
        self.busy = 0
        self.registered: set[int] = set()  # numbers of devices that reach it without a detour
        self._files = files
        self._sum = xxh3_64_intdigest
        self._memory = mmap.mmap(-1, slot_bytes * slots)
        self.address = address_of_map(self._memory)

    def fetch(self, what: Wanted, slot: int) -> int | None:
        """See Ring."""
        skip = what.position % SLOT_ALIGNMENT
        start, whole = what.position - skip, slot_bytes_of(skip + what.size)
        base = slot * self.slot_bytes
        file, path = self._files[what.file]
        done, view = 0, memoryview(self._memory)[base : base + whole]
        while done < whole:
            count = os.preadv(file, [view[done:]], start + done)
            if not count:
                raise OSError(f"{path} ends at {start + done}")
            done += count
        size = what.size // len(what.sums)
        for at, (first, expected) in enumerate(zip(what.seeds, what.sums, strict=True)):
            shard = view[skip + at * size : skip + (at + 1) * size]
            if self._sum(shard, first) != expected:
                return None
        return self.address + base + skip


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
        """Raises OSError when one cannot be read by this user, ImportError without xxhash."""
        import xxhash  # noqa: F401

        self.paths = tuple(map(Path, paths))
        self._files: list[tuple[int, Path]] = []
        self._spare: list[Ring] = []
        self._lock = threading.Lock()
        self._reads: queue.SimpleQueue[tuple[_Read, Ring] | None] = queue.SimpleQueue()
        try:
            for path in self.paths:
                self._files.append((_open(path), path))
        except OSError:
            self._close_files()
            raise
        self._threads = [
            threading.Thread(target=self._work, name=f"kvstore-direct-{at}", daemon=True)
            for at in range(THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Files are closed when the last read has ended, however late that is."""
        for _ in self._threads:
            self._reads.put(None)
        threading.Thread(target=self._end, name="kvstore-direct-end", daemon=True).start()

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
        if not blocks:
            return
        with self._lock:
            if sum(ring.busy > 0 for ring in self._spare) >= LATE_RINGS:
                return
        size = max(what.size for what in blocks)
        ring = self._ring(slot_bytes_of(size) + SLOT_ALIGNMENT, device, make)
        most = max(1, min(most, ring.slots // 2))
        reads: list[_Read] = []

        def ahead(until: int) -> None:
            for at in range(len(reads), min(until, len(blocks))):
                reads.append(_Read(blocks[at], at % ring.slots))
                with self._lock:
                    ring.busy += 1
                self._reads.put((reads[-1], ring))

        try:
            ahead(ring.slots)
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
                ahead(first + most + ring.slots)
        finally:
            self._give_back(ring)

    # -- inside --------------------------------------------------------------------------------

    def _ring(self, slot_bytes: int, device: int | None, make: MakeRing | None) -> Ring:
        with self._lock:
            for ring in self._spare:
                if (ring.slot_bytes, ring.device) == (slot_bytes, device) and not ring.busy:
                    self._spare.remove(ring)
                    return ring
        slots = max(2, RING_BYTES // slot_bytes)
        if make is not None:
            with contextlib.suppress(OSError):
                return make(slot_bytes, slots)
        return HostRing(self._files, slot_bytes, slots)

    def _give_back(self, ring: Ring) -> None:
        """For the next call, once no late read goes there any more."""
        with self._lock:
            self._spare.append(ring)
            idle = [one for one in self._spare if not one.busy]
            for old in idle[:-SPARE_RINGS]:
                self._spare.remove(old)

    def _work(self) -> None:
        while (given := self._reads.get()) is not None:
            read, ring = given
            try:
                with contextlib.suppress(OSError):  # the daemon reads it next, and says what it is
                    read.address = ring.fetch(read.what, read.slot)
            finally:
                with self._lock:
                    ring.busy -= 1
                read.done.set()

    def _end(self) -> None:
        for thread in self._threads:
            thread.join()
        self._close_files()

    def _close_files(self) -> None:
        files, self._files = self._files, []
        for file, _ in files:
            os.close(file)


def _open(path: Path) -> int:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError as error:
        if not isinstance(error, PermissionError | FileNotFoundError):
            return os.open(path, flags)  # its filesystem does not take O_DIRECT
        raise
