"""What a drive may hold after a power cut: everything that was synced, and any part of the rest.

`Recorder` writes down each write and sync of block files and index while a workload runs; `Medium`
plays the record back to any point and draws what could lie on the drive then.

Assumed of the drive: it keeps what a sync has returned for, and writes 512 bytes whole or not at
all. Nothing is assumed of anything else: what was written since may be there, be lost, be there in
part, and in any order. Of LMDB (3.0, seen with strace): a commit writes pages, syncs them, then
writes one meta page, synchronously; so what a commit did follows from the file before and after.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvstore.index import FILE_NAME as INDEX_NAME
from kvstore.index import Index
from kvstore.index_reader import VALUE
from kvstore.tiers.base import ALIGNMENT, Tier
from kvstore.tiers.faults import SECTOR_BYTES
from kvstore.tiers.nvme import NvmeFiles

WATCHED = ("put", "delete", "_open", "_write", "_commit")  # methods of an index
META_PAGES = 2  # at the start of an LMDB file


class Medium:
    """One file. `data` None: no such file yet."""

    def __init__(self, data: bytes | None) -> None:
        self._durable = data
        self._pending: dict[int, tuple[int, bytes]] = {}  # by number of the write: place, bytes
        self._count = 0

    def write(self, place: int, data: bytes) -> int:
        """Bytes are on their way; the number is for `sync`."""
        self._count += 1
        self._pending[self._count] = (place, data)
        return self._count

    def sync(self, numbers: list[int] | None = None) -> None:
        """These writes, or all, are on the medium for good."""
        for number in sorted(self._pending) if numbers is None else sorted(numbers):
            place, data = self._pending.pop(number)
            whole = bytearray(self._durable or b"")
            _put(whole, place, data)
            self._durable = bytes(whole)

    def replace(self, data: bytes) -> None:
        """Another file has this name now, durably."""
        self._durable, self._pending = data, {}

    @property
    def pending(self) -> int:
        return len(self._pending)

    def image(self, dice: random.Random) -> bytes | None:
        """The file as a power cut may leave it now. Each sector holds what was synced, or any of
        the versions written since; drawn so that nothing and all of it come often."""
        if not self._pending:
            return self._durable
        kept = dice.choice((0.0, 1.0, 0.1, 0.5, 0.9))
        if self._durable is None and not kept:
            return None
        unit = dice.choice((SECTOR_BYTES, ALIGNMENT))
        data = bytearray(self._durable or b"")
        for number in sorted(self._pending):
            place, written = self._pending[number]
            for start in range(0, len(written), unit):
                if kept == 1.0 or dice.random() < kept:
                    _put(data, place + start, written[start : start + unit])
        return bytes(data)


def _put(data: bytearray, place: int, written: bytes) -> None:
    data.extend(bytes(max(0, place - len(data))))
    data[place : place + len(written)] = written


@dataclasses.dataclass(frozen=True)
class Event:
    """One step of the record.

    kind    begin, end: a write of `data` at `place` of the tier; `number` says which
            sync-begin, sync-end: of the block files; `number` says which
            put: a record for slot `place` was handed to the index; `number` is its sequence
            delete: the index was told that slot `place` holds nothing now
            file: the index has been made or rewritten; `data` is all of it
            page: a part of a commit to the index; `data` at `place` of its file
            synced: the parts before are durable
            commit: `records` (slot -> sequence and hash, or None) are in the index, durably
    """

    kind: str
    at: float
    number: int = 0
    place: int = 0
    data: bytes = b""
    records: dict[int, tuple[int, bytes] | None] = dataclasses.field(default_factory=dict)


class Recorder:
    """A tier that records what passes through, and the index's commits while `watching`."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.index_path: Path | None = None
        self.longest_commit_s = 0.0
        self._lock = threading.Lock()
        self._numbers = 0
        self._inside: Any = None

    def wrap(self, files: NvmeFiles) -> Tier:
        """The recorder itself, in front of these files."""
        self._inside = files
        self.name, self.capacity_bytes = files.name, files.capacity_bytes
        return self

    def read(self, offset: int, into: memoryview) -> None:
        self._inside.read(offset, into)

    def write(self, offset: int, data: memoryview) -> None:
        number = self._note("begin", place=offset, data=bytes(data))
        self._inside.write(offset, data)
        self._note("end", number=number)

    def sync(self) -> None:
        number = self._note("sync-begin")
        self._inside.sync()
        self._note("sync-end", number=number)

    def probe(self) -> None:
        self._inside.probe()

    def close(self) -> None:
        self._inside.close()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record what any index does meanwhile."""
        real = {name: getattr(Index, name) for name in WATCHED}
        put, delete, opened, written, commit = real.values()

        def noting_put(index: Index, offset: int, number: int, sequence: int, *rest: Any) -> None:
            self._note("put", place=offset, number=sequence)
            put(index, offset, number, sequence, *rest)

        def noting_delete(index: Index, offset: int) -> None:
            self._note("delete", place=offset)
            delete(index, offset)

        def noting_open(index: Index) -> None:
            fresh = not index.path.exists()
            opened(index)
            data = index.path.read_bytes()
            if fresh:
                self._commit(b"", data)
            else:  # it was rewritten beside the old one, synced, and renamed
                self._note("file", data=data)

        def noting_write(index: Index, batch: Any) -> None:
            before = index.path.read_bytes()
            written(index, batch)
            self._commit(before, index.path.read_bytes())
            records = {place: value and _record(value) for place, value in batch}
            self._note("commit", records=records)

        def timed_commit(index: Index) -> None:
            started = time.monotonic()
            commit(index)
            self.longest_commit_s = max(self.longest_commit_s, time.monotonic() - started)

        ours = (noting_put, noting_delete, noting_open, noting_write, timed_commit)
        for name, function in zip(WATCHED, ours, strict=True):
            setattr(Index, name, function)
        try:
            yield
        finally:
            for name, function in real.items():
                setattr(Index, name, function)

    def _commit(self, before: bytes, after: bytes) -> None:
        """The steps of a commit: its pages, a sync, its meta page, a sync. Of a new file the meta
        pages are not written apart from the others."""
        places = [
            at
            for at in range(0, len(after), ALIGNMENT)
            if before[at : at + ALIGNMENT] != after[at : at + ALIGNMENT]
        ]
        late = [at for at in places if at < META_PAGES * ALIGNMENT and before]
        for some in ([at for at in places if at not in late], late):
            for at in some:
                self._note("page", place=at, data=after[at : at + ALIGNMENT])
            self._note("synced")

    def _note(self, kind: str, *, number: int = 0, **fields: Any) -> int:
        with self._lock:
            if not number:
                self._numbers += 1
                number = self._numbers
            self.events.append(Event(kind, time.monotonic(), number, **fields))
        return number


def _record(value: bytes) -> tuple[int, bytes]:
    _, sequence, length = VALUE.unpack_from(value)
    return sequence, value[VALUE.size : VALUE.size + length]


class Drive:
    """Both files of a device, played forward event by event, and what must be served by then.

    must   slot -> hash of what a power cut now may not lose: its record is durable, and since that
           was made nobody has dropped the block or written to its slot
    """

    def __init__(self, blocks: bytes, first: int) -> None:
        self.blocks = Medium(blocks)
        self.index = Medium(None)
        self.must: dict[int, bytes] = {}
        self._first = first  # where the tier begins in the file
        self._running: dict[int, int] = {}  # write -> its number on the medium
        self._ended: list[int] = []  # writes that ended, not synced yet
        self._syncs: dict[int, list[int]] = {}  # sync -> the writes that it covers
        self._puts: dict[tuple[int, int], int] = {}  # slot, sequence -> event
        self._changed: dict[int, int] = {}  # slot -> event of its last write or drop
        self._now = 0

    def play(self, event: Event) -> None:
        self._now += 1
        kind = event.kind
        if kind == "begin":
            place = self._first + event.place
            self._running[event.number] = self.blocks.write(place, event.data)
            self._changed[event.place] = self._now
            self.must.pop(event.place, None)
        elif kind == "end":
            self._ended.append(self._running.pop(event.number))
        elif kind == "sync-begin":
            self._syncs[event.number] = list(self._ended)
        elif kind == "sync-end":
            done = [one for one in self._syncs.pop(event.number) if one in self._ended]
            self.blocks.sync(done)
            self._ended = [one for one in self._ended if one not in done]
        elif kind == "put":
            self._puts[event.place, event.number] = self._now
        elif kind == "delete":
            self._changed[event.place] = self._now
            self.must.pop(event.place, None)
        elif kind == "file":
            self.index.replace(event.data)
        elif kind == "page":
            self.index.write(event.place, event.data)
        elif kind == "synced":
            self.index.sync()
        elif kind == "commit":
            self._committed(event)

    def _committed(self, event: Event) -> None:
        for place, record in event.records.items():
            self.must.pop(place, None)
            if record is not None:
                sequence, digest = record
                if self._changed.get(place, 0) < self._puts[place, sequence]:
                    self.must[place] = digest


def lay(folder: Path, blocks: bytes, index: bytes | None, name: str) -> None:
    """Put both files where a daemon finds them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(blocks)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(folder / INDEX_NAME)
    if index is not None:
        (folder / INDEX_NAME).write_bytes(index)
