"""Blocks on NVMe that a client reads there itself: those that a direct grant left where they were.

Bytes come to memory of this module, are checked there against the sums that the daemon told, and
only then go to the caller's. So a read that is too late, or finds other bytes, has touched nothing
of the caller's, and what a device does late harms nobody.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import queue
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore.mapping import address_of_map
from kvstore.types import NVME, SLOT_ALIGNMENT, Layout

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


class Ring:
    """Slots in host memory, for reads that are under way."""

    def __init__(self, slot_bytes: int, slots: int) -> None:
        self.slot_bytes = slot_bytes
        self.slots = slots
        self.memory = mmap.mmap(-1, slot_bytes * slots)
        self.address = address_of_map(self.memory)
        self.registered: set[int] = set()  # numbers of devices that reach it without a detour
        self.busy = 0  # reads that have not ended


class _Read:
    """One block on its way to a slot."""

    __slots__ = ("address", "done", "good", "slot", "what")

    def __init__(self, what: Wanted, slot: int) -> None:
        self.what = what
        self.slot = slot
        self.address = 0  # of its first byte, once it is there
        self.good = False
        self.done = threading.Event()


class DirectFiles:
    """The files of one tenant, open for reading. Every method may be called from any thread."""

    def __init__(self, paths: Sequence[str]) -> None:
        """Raises OSError when one cannot be read by this user."""
        from xxhash import xxh3_64_intdigest

        self._sum: Callable[..., int] = xxh3_64_intdigest
        self._files: list[tuple[int, Path]] = []
        self._spare: list[Ring] = []
        self._lock = threading.Lock()
        self._reads: queue.SimpleQueue[tuple[_Read, Ring] | None] = queue.SimpleQueue()
        try:
            for path in map(Path, paths):
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
        self, blocks: Sequence[Wanted], most: int, deadline: float
    ) -> Iterator[tuple[list[int], Ring]]:
        """Addresses of the blocks' bytes, checked, some leading ones after the other and at most
        `most` at once, good until the next are asked for. It ends before the first that is not
        there by the deadline (monotonic), cannot be read, or is not what was stored."""
        if not blocks:
            return
        with self._lock:
            if sum(ring.busy > 0 for ring in self._spare) >= LATE_RINGS:
                return
        size = max(what.size for what in blocks)
        ring = self._ring(-(-size // SLOT_ALIGNMENT) * SLOT_ALIGNMENT + SLOT_ALIGNMENT)
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
                    if not read.done.wait(max(0.0, deadline - time.monotonic())) or not read.good:
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

    def _ring(self, slot_bytes: int) -> Ring:
        with self._lock:
            for ring in self._spare:
                if ring.slot_bytes == slot_bytes and not ring.busy:
                    self._spare.remove(ring)
                    return ring
        return Ring(slot_bytes, max(2, RING_BYTES // slot_bytes))

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
                read.address = self._read(read.what, ring, read.slot)
                read.good = self._right(read.what, ring, read.address)
            except OSError:
                read.good = False  # the daemon reads it itself next, and says what is wrong
            finally:
                with self._lock:
                    ring.busy -= 1
                read.done.set()

    def _read(self, what: Wanted, ring: Ring, slot: int) -> int:
        """Whole pages around the bytes; the address of the first byte."""
        start = what.position // SLOT_ALIGNMENT * SLOT_ALIGNMENT
        end = -(-(what.position + what.size) // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
        base = slot * ring.slot_bytes
        file, path = self._files[what.file]
        done, view = 0, memoryview(ring.memory)
        while done < end - start:
            into = view[base + done : base + end - start]
            count = os.preadv(file, [into], start + done)
            if not count:
                raise OSError(f"{path} ends at {start + done}")
            done += count
        return ring.address + base + what.position - start

    def _right(self, what: Wanted, ring: Ring, address: int) -> bool:
        size = what.size // len(what.sums)
        start = address - ring.address
        view = memoryview(ring.memory)
        return all(
            self._sum(view[start + at * size : start + (at + 1) * size], first) == expected
            for at, (first, expected) in enumerate(zip(what.seeds, what.sums, strict=True))
        )

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
