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
    8 * s  5  bytes of each slot in slab s, 0 while the slab is unassigned
    + 5    3  low bytes of xxh3_64 of those 5, seeded with s

    records, 128 bytes each; record i of slab s is number s * (records per slab) + i, and describes
    the slot at s * slab_bytes + i * (slot bytes of the slab)
    0      4  low half of xxh3_64 of bytes 4..120
    4      1  state: 0 empty, 1 being written, 2 committed
    5      1  bytes of the hash
    6      2  zero
    8      8  offset of the slot in the arena
    16     8  checksum of the content, 0 while none is known
    24     4  number of the session that writes it
    28     4  zero
    32    16  fingerprint of the layout
    48    64  hash, padded with zeros
    112    8  zero
    120    8  sequence: the order of last uses; changed alone, so no part of the sum
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
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

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
_BODY = struct.Struct("<BBxxQQI4x16s64s8x")  # a record between its checksum and its sequence
_SEQUENCE = struct.Struct("<Q")
_SEQUENCE_AT = _SUM.size + _BODY.size
_NAME_AT = 28  # where layout and hash begin in the body
_SLOT_BYTES_MAX = (1 << 40) - 1
_FEW = 16  # so many are faster one by one than all at once
_NO_RECORD = bytes(RECORD_BYTES)
_RECORDS_PER_PAGE = ALIGNMENT // RECORD_BYTES


class SlotRecord(NamedTuple):
    """One slot that is not empty. A tuple, as tens of thousands are made at a start."""

    offset: int
    slot_bytes: int
    state: int
    layout: bytes
    hash: bytes
    sequence: int
    checksum: int
    session: int


class SlotTable:
    """The mapped table; one process writes it, from one thread.

    damaged      offset and slot bytes of the records that the last `records()` skipped, being torn
    slot_bytes   for each slab the bytes of its slots, 0 for an unassigned one; read only
    """

    def __init__(self, path: Path, file: int) -> None:
        """Maps an open file and takes it over; use `create` or `open`."""
        self.path = path
        self.damaged: list[tuple[int, int]] = []
        try:
            self._map = mmap.mmap(file, os.fstat(file).st_size)
        finally:
            os.close(file)
        fields: tuple[int, ...] = _HEADER.unpack_from(self._map)[3:]
        self.arena_bytes, self.arena_inode, self.slab_bytes, _, per_slab = fields
        count = -(-self.arena_bytes // self.slab_bytes)
        self._records = _sizes(self.arena_bytes, self.slab_bytes)[0]
        self._region = per_slab * RECORD_BYTES
        self._words = np.frombuffer(self._map, np.uint64)
        words = [
            _SLAB.unpack_from(self._map, ALIGNMENT + slab * _SLAB.size)[0] for slab in range(count)
        ]
        self.slot_bytes: list[int] = [word & _SLOT_BYTES_MAX for word in words]
        self._torn = [slab for slab, word in enumerate(words) if word != _slab_word(slab, word)]

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
            if slab in table._torn or size % ALIGNMENT or size > table.slab_bytes:
                table.close()
                raise ValueError(f"{path}: slab {slab} is damaged; not adopted")
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
        session: int = 0,
    ) -> None:
        """Describe the slot at `offset`; ValueError when no slot begins there.

        Of a block that is said to be committed there already, the sequence stays as it is.
        """
        if len(hash) > HASH_BYTES_MAX or len(layout) > LAYOUT_BYTES:
            raise ValueError(f"hash of {len(hash)} or layout of {len(layout)} bytes is too long")
        place = self._place(offset)
        body = _BODY.pack(state, len(hash), offset, checksum, session, layout, hash)
        sum = _SUM.pack(xxh3(body) & 0xFFFFFFFF)
        start = place + _SUM.size
        if state == COMMITTED and self._map[start : start + 2] == body[:2]:
            named = slice(start + _NAME_AT, place + _SEQUENCE_AT)
            if self._map[named] == body[_NAME_AT:]:
                self._map[place : place + _SEQUENCE_AT] = sum + body
                return
        self._map[place : place + RECORD_BYTES] = sum + body + _SEQUENCE.pack(sequence)

    def write_writing(self, slots: Iterable[tuple[int, int, bytes]]) -> None:
        """Say of many slots at once what is being written there: offset, session, layout."""
        table, pack, pack_sum, place = self._map, _BODY.pack, _SUM.pack, self._place
        for offset, session, layout in slots:
            body = pack(WRITING, 0, offset, 0, session, layout, b"")
            start = place(offset)
            record = pack_sum(xxh3(body) & 0xFFFFFFFF) + body
            table[start : start + _SEQUENCE_AT] = record

    def touch(self, offsets: Sequence[int], sequence: int) -> None:
        """The committed slots at these offsets have just been used, the last of them last."""
        if len(offsets) <= _FEW:
            for number, offset in enumerate(offsets, sequence):
                if self.slot_bytes[offset // self.slab_bytes]:
                    _SEQUENCE.pack_into(self._map, self._place(offset) + _SEQUENCE_AT, number)
            return
        at = np.asarray(offsets, np.int64)
        slabs, inside = np.divmod(at, self.slab_bytes)
        sizes = np.asarray(self.slot_bytes, np.int64)[slabs]
        known = sizes > 0
        slabs, inside, sizes = slabs[known], inside[known], sizes[known]
        places = self._records + slabs * self._region + inside // sizes * RECORD_BYTES
        words = (places + _SEQUENCE_AT) // _SEQUENCE.size
        self._words[words] = np.arange(sequence, sequence + len(words), dtype=np.uint64)

    def spoil(self) -> None:
        """What this table says is not all that is true: nobody is to adopt it."""
        self._map[: len(_MAGIC)] = bytes(len(_MAGIC))

    def clear(self, offset: int) -> None:
        """The slot at `offset` is empty; ValueError when no slot begins there."""
        place = self._place(offset)
        self._map[place : place + RECORD_BYTES] = _NO_RECORD

    def records(self) -> Iterator[SlotRecord]:
        """Every slot that is not empty, by offset; torn records are skipped and counted."""
        self.damaged.clear()
        for slab, slot_bytes in enumerate(self.slot_bytes):
            if not slot_bytes:
                continue
            start = self._records + slab * self._region
            size = min(self.slab_bytes, self.arena_bytes - slab * self.slab_bytes)
            chunk = self._map[start : start + size // slot_bytes * RECORD_BYTES]
            rows = np.frombuffer(chunk, np.uint8).reshape(-1, RECORD_BYTES)
            for i in np.flatnonzero(rows[:, :_SEQUENCE_AT].any(axis=1)).tolist():
                offset = slab * self.slab_bytes + i * slot_bytes
                record = _parse(chunk, i * RECORD_BYTES, slot_bytes)
                if record is None or record.offset != offset:
                    self.damaged.append((offset, slot_bytes))
                elif record.state != EMPTY:
                    yield record

    def close(self) -> None:
        """Unmap the table; a second call does nothing."""
        self._words = np.empty(0, np.uint64)
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
        self._map[place : place + _SLAB.size] = _SLAB.pack(_slab_word(slab, slot_bytes))
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


def _slab_word(slab: int, slot_bytes: int) -> int:
    """A slot size with its checksum, in the eight bytes that are written at once. Zero, as in a new
    file, is a slab without slots."""
    size = slot_bytes & _SLOT_BYTES_MAX
    if not size:
        return 0
    return size | (xxh3(size.to_bytes(5, "little"), slab) & 0xFFFFFF) << 40


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
    if xxh3(record[_SUM.size : _SEQUENCE_AT]) & 0xFFFFFFFF != _SUM.unpack_from(record)[0]:
        return None
    state, length, offset, checksum, session, layout, digest = _BODY.unpack_from(record, _SUM.size)
    sequence: int = _SEQUENCE.unpack_from(record, _SEQUENCE_AT)[0]
    if state not in (EMPTY, WRITING, COMMITTED) or length > HASH_BYTES_MAX:
        return None
    hash = digest[:length]
    return SlotRecord(offset, slot_bytes, state, layout, hash, sequence, checksum, session)
