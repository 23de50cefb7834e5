"""What holds bytes in the simulation: an arena of DRAM, and a drive that can be pulled or fail.

A drive has a volatile cache. What was written but not synced is there for as long as the power is;
when it is cut, each of those writes is there as a whole, in part, or not at all.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import random
from collections import Counter

from kvstore.tiers.base import check_range

SECTOR = 512
PATH = "blocks.kv"


class Arena:
    """Memory that daemon and clients share; with the interface of the DRAM tier."""

    name = "dram"

    def __init__(self, capacity_bytes: int, inode: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.inode = inode
        self.adoptable = False  # a daemon has made a slot table for it
        self.spoilt: set[int] = set()  # slots in which a bit has turned while no daemon ran
        self.bytes = bytearray(capacity_bytes)

    def view(self, offset: int, length: int) -> memoryview:
        assert 0 <= offset <= offset + length <= self.capacity_bytes
        return memoryview(self.bytes)[offset : offset + length]

    def read(self, offset: int, into: memoryview) -> None:
        check_range(offset, len(into), self.capacity_bytes)
        into[:] = self.view(offset, len(into))

    def write(self, offset: int, data: memoryview) -> None:
        check_range(offset, len(data), self.capacity_bytes)
        self.view(offset, len(data))[:] = data

    def sync(self) -> None:
        """Memory is as durable as it gets."""

    def close(self) -> None:
        """Nothing to give back."""


@dataclasses.dataclass
class Faults:
    """How often an operation of a drive goes wrong, and how; shares of one."""

    error: float = 0.0  # EIO
    full: float = 0.0  # ENOSPC, of writes
    torn: float = 0.0  # a write that says it worked, and was cut off
    flipped: float = 0.0  # a bit of the medium turns
    hang: float = 0.0  # it takes very long
    sync_error: float = 0.0
    absent: bool = False  # it cannot even be opened


class Drive:
    """An NVMe device as a tier, with the power to be cut."""

    name = "nvme"

    def __init__(self, capacity_bytes: int, chance: random.Random, marks: Counter[str]) -> None:
        self.capacity_bytes = capacity_bytes
        self.faults = Faults()
        self.flipped: set[int] = set()  # pages of which a bit has turned
        self._chance = chance
        self._marks = marks
        self._bytes = bytearray(capacity_bytes)  # as reads see them
        self._durable = bytearray(capacity_bytes)
        self._cached: list[tuple[int, bytes]] = []

    # -- the tier ------------------------------------------------------------------------------

    def read(self, offset: int, into: memoryview) -> None:
        check_range(offset, len(into), self.capacity_bytes)
        self._fail(self.faults.error, errno.EIO, "read error")
        if self._happens(self.faults.flipped):
            self.flip(offset, len(into))
        into[:] = memoryview(self._bytes)[offset : offset + len(into)]

    def write(self, offset: int, data: memoryview) -> None:
        check_range(offset, len(data), self.capacity_bytes)
        if self._happens(self.faults.error):
            self.scribble(offset, data)
            self._fail(1.0, errno.EIO, "write error")
        self._fail(self.faults.full, errno.ENOSPC, "no room")
        if self._happens(self.faults.torn):
            self._marks["torn write"] += 1
            data = data[: self._chance.randrange(len(data) // SECTOR) * SECTOR]
        self._put(offset, bytes(data))

    def cached(self) -> int:
        """How many writes a sync that begins now is to make durable."""
        return len(self._cached)

    def sync(self, count: int | None = None) -> None:
        """The oldest `count` of the writes that are not durable yet become it. The time that it
        takes is the caller's matter."""
        self._fail(self.faults.sync_error, errno.EIO, "sync error")
        for offset, data in self._cached[:count]:
            self._durable[offset : offset + len(data)] = data
        del self._cached[:count]

    def probe(self) -> None:
        self._fail(float(self.faults.absent), errno.ENODEV, "no such device")
        self._fail(self.faults.error, errno.EIO, "probe failed")

    def close(self) -> None:
        """Nothing to give back."""

    # -- what happens to it --------------------------------------------------------------------

    def scribble(self, offset: int, data: memoryview) -> None:
        """A write has begun: some of its bytes are there."""
        part = self._chance.randrange(len(data) // SECTOR + 1) * SECTOR
        self._put(offset, bytes(data[:part]))

    def flip(self, offset: int, length: int) -> None:
        """A bit of the medium turns."""
        at = offset + self._chance.randrange(length)
        bit = 1 << self._chance.randrange(8)
        for medium in (self._bytes, self._durable):
            medium[at] ^= bit
        self.flipped.add(at // 4_096)
        self._marks["bit flipped"] += 1

    def cut_power(self) -> None:
        """What was not synced is there, or not, or in part."""
        for offset, data in self._cached:
            fate = self._chance.random()
            if fate < 0.35:
                self._marks["write lost with the power"] += 1
                continue
            start, end = 0, len(data)
            if fate > 0.65:
                sectors = len(data) // SECTOR
                cuts = self._chance.randrange(sectors + 1), self._chance.randrange(sectors + 1)
                start, end = (cut * SECTOR for cut in sorted(cuts))
                self._marks["write torn with the power"] += 1
            self._durable[offset + start : offset + end] = data[start:end]
        self._cached.clear()
        self._bytes[:] = self._durable

    def look(self, offset: int, length: int) -> bytes:
        """The bytes as a read would find them, past all faults."""
        return bytes(memoryview(self._bytes)[offset : offset + length])

    def _put(self, offset: int, data: bytes) -> None:
        self._bytes[offset : offset + len(data)] = data
        self._cached.append((offset, data))
        pages = range(offset // 4_096, -(-(offset + len(data)) // 4_096))
        self.flipped.difference_update(pages)

    def _happens(self, share: float) -> bool:
        return share > 0 and self._chance.random() < share

    def _fail(self, share: float, number: int, mark: str) -> None:
        if self._happens(share):
            self._marks[mark] += 1
            raise OSError(number, os.strerror(number), PATH)
