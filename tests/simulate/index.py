"""The NVMe index in the simulation: group commits at virtual times, what was not synced is lost.

It keeps the promises of `kvstore.index` and no other: the drive is synced before each commit, and a
commit holds only what was enqueued before that sync began. What is loaded after a restart is sorted
out by the real code.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable

from kvstore.index import BACKOFF_S_MAX, BACKOFF_S_MIN, Loaded, _columns
from kvstore.index_reader import KEY, VALUE, Scan
from kvstore.types import Layout
from tests.simulate.clock import Process
from tests.simulate.media import Drive


class IndexFile:
    """What survives of an index: its records and layouts."""

    def __init__(self) -> None:
        self.records: dict[int, bytes] = {}
        self.layouts: dict[int, str] = {}

    def names(self, offsets: Iterable[int]) -> set[tuple[bytes, bytes]]:
        """Layout and hash of the blocks in these slots, as far as there are records of them."""
        found = set()
        for offset in offsets:
            if (value := self.records.get(offset)) is not None:
                number, _, length = VALUE.unpack_from(value)
                layout = Layout(**json.loads(self.layouts[number]))
                found.add((layout.fingerprint, value[VALUE.size : VALUE.size + length]))
        return found

    def scan(self) -> Scan:
        """As the reader of a real file hands it out."""
        lengths = sorted({len(value) for value in self.records.values()})
        chunks = []
        for length in lengths:
            some = sorted((k, v) for k, v in self.records.items() if len(v) == length)
            keys = b"".join(KEY.pack(offset) for offset, _ in some)
            values = b"".join(value for _, value in some)
            chunks.append((length, memoryview(keys), memoryview(values)))
        return Scan({}, dict(self.layouts), 0, len(lengths) <= 1, chunks)


class SimulatedIndex:
    """With the interface of `kvstore.index.Index`, as far as hands and restarts use it."""

    def __init__(
        self,
        file: IndexFile,
        drive: Drive,
        process: Process,
        chance: random.Random,
        marks: Counter[str],
        sync_interval_s: float,
    ) -> None:
        self.file = file
        self._drive = drive
        self._process = process
        self._chance = chance
        self._marks = marks
        self._sync_interval_s = sync_interval_s
        self._pending: dict[int, bytes | None] = {}
        self._pending_layouts: dict[int, str] = {}
        self._taken: dict[int, bytes | None] = {}
        self._taken_layouts: dict[int, str] = {}
        self._busy = False  # a commit is under way or planned
        self._retry_s = 0.0

    def load(self) -> Loaded:
        """See Index.load."""
        loaded, losers = _columns(self.file.scan())
        for offset in losers:
            self._marks["two slots with one block"] += 1
            self.delete(offset)
        return loaded

    def put_layout(self, number: int, text: str) -> None:
        """See Index.put_layout."""
        self._pending_layouts[number] = text
        self._note()

    def put(self, offset: int, layout_number: int, sequence: int, hash: bytes, sums: bytes) -> None:
        """See Index.put."""
        self._pending[offset] = VALUE.pack(layout_number, sequence, len(hash)) + hash + sums
        self._note()

    def delete(self, offset: int) -> None:
        """See Index.delete."""
        self._pending[offset] = None
        self._note()

    def waiting(self) -> int:
        """See Index.waiting."""
        return len(self._pending) + len(self._taken)

    def close(self) -> bool:
        """See Index.close: commit what waits, at once; tried once."""
        self._taken |= self._pending
        self._taken_layouts |= self._pending_layouts
        self._pending, self._pending_layouts = {}, {}
        self._busy = True
        self._write(self._drive.cached())
        return not self.waiting()

    def says(self, offset: int, hash: bytes, sums: bytes | None) -> bool:
        """Whether what is durable of this slot is this, and nothing else is on its way."""
        value = self.file.records.get(offset, b"")
        waits = offset in self._pending or offset in self._taken
        return not waits and sums is not None and value[VALUE.size :] == hash + sums

    def dangling(self) -> set[tuple[bytes, bytes]]:
        """Layout and hash of blocks whose record is durable, and on its way to be another."""
        return self.file.names(self._pending.keys() | self._taken.keys())

    def _note(self) -> None:
        if not self._busy:
            self._busy = True
            self._process.call_later(self._sync_interval_s, self._begin)

    def _begin(self) -> None:
        """A commit is due: its content is fixed before the drive is synced."""
        if not self._taken and not self._taken_layouts:
            self._taken, self._pending = self._pending, {}
            self._taken_layouts, self._pending_layouts = self._pending_layouts, {}
        delay = self._chance.uniform(0.0005, 0.02)
        self._process.call_later(delay, self._write, self._drive.cached())

    def _write(self, cached: int) -> None:
        """The sync has ended: what was taken is committed."""
        try:
            self._drive.sync(cached)
        except OSError:
            self._marks["index commit failed"] += 1
            self._retry_s = min(2 * self._retry_s or BACKOFF_S_MIN, BACKOFF_S_MAX)
            self._process.call_later(self._retry_s, self._begin)
            return
        self._retry_s = 0.0
        self.file.layouts.update(self._taken_layouts)
        for offset, value in self._taken.items():
            if value is None:
                self.file.records.pop(offset, None)
            else:
                self.file.records[offset] = value
        self._taken, self._taken_layouts = {}, {}
        self._busy = False
        if self._pending or self._pending_layouts:
            self._note()
