"""The slot table: what lies in each slot of a DRAM arena, kept beside it so that it outlives us.

It knows offsets and flat bytes, and decides nothing; a reader of a table that a dead process left
finds each slot either described in full or not at all.

Format (version 1, little endian; the file is sparse and mapped)

    header, one page
    0      8  magic "KVSLOTS\\0"
    8      4  format version
    12     4  crc32 of bytes 0..12 and 16..48
    16     8  bytes of the arena
    24     8  inode of the arena
    32     8  slab_bytes
    40     4  slot alignment (4096)
    44     4  records per slab: slab_bytes / 4096, rounded up to 32 so that they fill whole pages
    48        zeros to 4096

    slabs, from 4096, rounded up to whole pages
    8 * s  8  bytes of each slot in slab s, 0 while the slab is unassigned

    records, 128 bytes each; record i of slab s is number s * (records per slab) + i, and describes
    the slot at s * slab_bytes + i * (slot bytes of the slab)
    0      4  low half of xxh3_64 of bytes 4..128
    4      1  state: 0 empty, 1 being written, 2 committed
    5      1  bytes of the hash
    6      2  zero
    8      8  offset of the slot in the arena
    16     8  sequence: the order of commits
    24     8  checksum of the content, 0 while none is known
    32     4  process id of the writer
    36    12  zero
    48    16  fingerprint of the layout
    64    64  hash, padded with zeros
    A record of zeros is an empty slot.

A slab changes its slot size in the order: size to 0, records erased, new size; so no record is ever
read with another slab's arithmetic. A record is written by one copy; a copy torn by death is caught
by its checksum and is as good as empty.

Assumed of the medium: it is memory (tmpfs) that keeps every store of a killed process, and a store
of eight aligned bytes is whole or absent. It need not survive a power loss. Room for records is
allocated when a slab is assigned, so that a full tmpfs is an OSError there and no SIGBUS later.

Versions: 1, the first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from xxhash import xxh3_64_intdigest as xxh3

from kvstore.tiers.base import ALIGNMENT, named

EMPTY, WRITING, COMMITTED = range(3)
VERSION = 1
RECORD_BYTES = 128
LAYOUT_BYTES = 16
HASH_BYTES_MAX = 64

_MAGIC = b"KVSLOTS\0"
_HEADER = struct.Struct("<8sIIQQQII")
_SUM = struct.Struct("<I")
_SLAB = struct.Struct("<Q")
_BODY = struct.Struct("<BBxxQQQI12x16s64s")  # a record behind its checksum
_NO_RECORD = bytes(RECORD_BYTES)
_RECORDS_PER_PAGE = ALIGNMENT // RECORD_BYTES


@dataclasses.dataclass(frozen=True, slots=True)
class SlotRecord:
    """One slot that is not empty."""

    offset: int
    slot_bytes: int
    state: int
    layout: bytes
    hash: bytes
    sequence: int
    checksum: int
    pid: int


class SlotTable:
    """The mapped table; one process writes it, from one thread.

    damaged      records that the last `records()` skipped because they were torn
    slot_bytes   for each slab the bytes of its slots, 0 for an unassigned one; read only
    """

    def __init__(self, path: Path, file: int) -> None:
        """Maps an open file and takes it over; use `create` or `open`."""
        self.path = path
        self.damaged = 0
        try:
            self._map = mmap.mmap(file, os.fstat(file).st_size)
        finally:
            os.close(file)
        fields: tuple[int, ...] = _HEADER.unpack_from(self._map)[3:]
        self.arena_bytes, self.arena_inode, self.slab_bytes, _, per_slab = fields
        count = -(-self.arena_bytes // self.slab_bytes)
        self._records = _sizes(self.arena_bytes, self.slab_bytes)[0]
        self._region = per_slab * RECORD_BYTES
        self.slot_bytes: list[int] = [
            _SLAB.unpack_from(self._map, ALIGNMENT + slab * _SLAB.size)[0] for slab in range(count)
        ]

    @classmethod
    def create(cls, path: Path, arena_bytes: int, arena_inode: int, slab_bytes: int) -> SlotTable:
        """An empty table for this arena; an old file of that name is replaced.

        Raises ValueError for impossible sizes, OSError naming the path when there is no room.
        """
        if arena_bytes <= 0 or slab_bytes <= 0 or slab_bytes % ALIGNMENT:
            raise ValueError(f"arena of {arena_bytes} bytes in slabs of {slab_bytes}: no table")
        header = _header(arena_bytes, arena_inode, slab_bytes)
        records, size = _sizes(arena_bytes, slab_bytes)
        scratch = path.with_name(path.name + ".new")
        scratch.unlink(missing_ok=True)
        try:
            file = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with contextlib.ExitStack() as undo:
                undo.callback(scratch.unlink, missing_ok=True)
                undo.callback(os.close, file)
                os.ftruncate(file, size)
                os.posix_fallocate(file, 0, records)
                os.pwrite(file, header, 0)
                os.rename(scratch, path)
                undo.pop_all()
        except OSError as error:
            raise named(error, path) from error
        return cls(path, file)

    @classmethod
    def open(cls, path: Path) -> SlotTable:
        """The table that an earlier process left, to be compared with the arena by the caller.

        Raises OSError when it cannot be read and ValueError, saying why, when it cannot be adopted.
        """
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            page = os.pread(file, ALIGNMENT, 0)
            _check_header(path, page, os.fstat(file).st_size)
        except BaseException:
            os.close(file)
            raise
        table = cls(path, file)
        for slab, size in enumerate(table.slot_bytes):
            if size % ALIGNMENT or size > table.slab_bytes:
                table.close()
                raise ValueError(f"{path}: slab {slab} has slots of {size} bytes; not adopted")
        return table

    def assign(self, slab: int, slot_bytes: int) -> None:
        """Give a slab to slots of one size (0: to none); its records are erased.

        Raises ValueError for a size that no slot can have, OSError (ENOSPC) when there is no room
        for its records: then the slab is unassigned.
        """
        if slot_bytes < 0 or slot_bytes % ALIGNMENT or slot_bytes > self.slab_bytes:
            raise ValueError(f"slots of {slot_bytes} bytes in a slab of {self.slab_bytes}")
        if not 0 <= slab < len(self.slot_bytes):
            raise ValueError(f"slab {slab} of {len(self.slot_bytes)}")
        self._set_slab(slab, 0)
        start = self._records + slab * self._region
        self._erase(start)
        if slot_bytes:
            self._reserve(start, self.slab_bytes // slot_bytes * RECORD_BYTES)
            self._set_slab(slab, slot_bytes)

    def write(
        self,
        offset: int,
        state: int,
        *,
        layout: bytes = b"",
        hash: bytes = b"",
        sequence: int = 0,
        checksum: int = 0,
        pid: int = 0,
    ) -> None:
        """Describe the slot at `offset`; ValueError when no slot begins there."""
        if len(hash) > HASH_BYTES_MAX or len(layout) > LAYOUT_BYTES:
            raise ValueError(f"hash of {len(hash)} or layout of {len(layout)} bytes is too long")
        place = self._place(offset)
        body = _BODY.pack(state, len(hash), offset, sequence, checksum, pid, layout, hash)
        self._map[place : place + RECORD_BYTES] = _SUM.pack(xxh3(body) & 0xFFFFFFFF) + body

    def write_writing(self, offsets: Iterable[int]) -> None:
        """Say of many slots at once that something is being written there."""
        table, pack, pack_sum, place = self._map, _BODY.pack, _SUM.pack, self._place
        for offset in offsets:
            body = pack(WRITING, 0, offset, 0, 0, 0, b"", b"")
            start = place(offset)
            table[start : start + RECORD_BYTES] = pack_sum(xxh3(body) & 0xFFFFFFFF) + body

    def clear(self, offset: int) -> None:
        """The slot at `offset` is empty; ValueError when no slot begins there."""
        place = self._place(offset)
        self._map[place : place + RECORD_BYTES] = _NO_RECORD

    def records(self) -> Iterator[SlotRecord]:
        """Every slot that is not empty, by offset; torn records are skipped and counted."""
        self.damaged = 0
        for slab, slot_bytes in enumerate(self.slot_bytes):
            if not slot_bytes:
                continue
            start = self._records + slab * self._region
            size = min(self.slab_bytes, self.arena_bytes - slab * self.slab_bytes)
            chunk = self._map[start : start + size // slot_bytes * RECORD_BYTES]
            rows = np.frombuffer(chunk, np.uint8).reshape(-1, RECORD_BYTES)
            for i in np.flatnonzero(rows.any(axis=1)).tolist():
                record = _parse(chunk, i * RECORD_BYTES, slot_bytes)
                if record is None or record.offset != slab * self.slab_bytes + i * slot_bytes:
                    self.damaged += 1
                elif record.state != EMPTY:
                    yield record

    def close(self) -> None:
        """Unmap the table; a second call does nothing."""
        self._map.close()

    def _place(self, offset: int) -> int:
        """Where the record of the slot at `offset` lies in the file."""
        slab = offset // self.slab_bytes
        slot_bytes = self.slot_bytes[slab] if 0 <= slab < len(self.slot_bytes) else 0
        if slot_bytes:
            inside = offset - slab * self.slab_bytes
            number = inside // slot_bytes
            if number * slot_bytes == inside and inside + slot_bytes <= self.slab_bytes:
                return self._records + slab * self._region + number * RECORD_BYTES
        raise ValueError(f"no slot begins at {offset}: slab {slab} has slots of {slot_bytes} bytes")

    def _set_slab(self, slab: int, slot_bytes: int) -> None:
        place = ALIGNMENT + slab * _SLAB.size
        self._map[place : place + _SLAB.size] = _SLAB.pack(slot_bytes)
        self.slot_bytes[slab] = slot_bytes

    def _erase(self, start: int) -> None:
        try:  # punching a hole gives the memory back, too
            self._map.madvise(mmap.MADV_REMOVE, start, self._region)
        except OSError:
            self._map[start : start + self._region] = bytes(self._region)

    def _reserve(self, start: int, length: int) -> None:
        file = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            os.posix_fallocate(file, start, length)
        except OSError as error:
            raise named(error, self.path) from error
        finally:
            os.close(file)


def _sizes(arena_bytes: int, slab_bytes: int) -> tuple[int, int]:
    """Where the records start, and the bytes of the whole file."""
    slabs = -(-arena_bytes // slab_bytes)
    records = ALIGNMENT + -(-slabs * _SLAB.size // ALIGNMENT) * ALIGNMENT
    return records, records + slabs * _records_per_slab(slab_bytes) * RECORD_BYTES


def _records_per_slab(slab_bytes: int) -> int:
    return -(-slab_bytes // ALIGNMENT // _RECORDS_PER_PAGE) * _RECORDS_PER_PAGE


def _header(arena_bytes: int, arena_inode: int, slab_bytes: int) -> bytes:
    per_slab = _records_per_slab(slab_bytes)
    fields = (arena_bytes, arena_inode, slab_bytes, ALIGNMENT, per_slab)
    crc = _crc(_HEADER.pack(_MAGIC, VERSION, 0, *fields))
    return _HEADER.pack(_MAGIC, VERSION, crc, *fields)


def _crc(header: bytes) -> int:
    return zlib.crc32(header[:12] + header[16:])


def _check_header(path: Path, page: bytes, size: int) -> None:
    """Raises ValueError unless the page is a header of ours that fits a file of this size."""
    header = page[: _HEADER.size]
    if len(page) < ALIGNMENT or not page.startswith(_MAGIC):
        raise ValueError(f"{path} is no slot table; not adopted")
    _, version, crc, arena_bytes, arena_inode, slab_bytes, _, _ = _HEADER.unpack(header)
    if version != VERSION:
        raise ValueError(f"{path} has format {version}, we read {VERSION}; not adopted")
    if (
        crc != _crc(header)
        or header != _header(arena_bytes, arena_inode, slab_bytes)
        or size != _sizes(arena_bytes, slab_bytes)[1]
    ):
        raise ValueError(f"{path} is damaged; not adopted")


def _parse(chunk: bytes, place: int, slot_bytes: int) -> SlotRecord | None:
    """The record at `place`, or None when it is torn."""
    record = chunk[place : place + RECORD_BYTES]
    if xxh3(record[_SUM.size :]) & 0xFFFFFFFF != _SUM.unpack_from(record)[0]:
        return None
    state, length, offset, sequence, checksum, pid, layout, digest = _BODY.unpack_from(
        record, _SUM.size
    )
    if state not in (EMPTY, WRITING, COMMITTED) or length > HASH_BYTES_MAX:
        return None
    return SlotRecord(offset, slot_bytes, state, layout, digest[:length], sequence, checksum, pid)
