"""The hands of one tenant: slot table, mover and index behind the one interface of the service."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import structlog

from kvstore.adoption import Notes
from kvstore.catalog import READY, LayoutEntry
from kvstore.checksums import digest
from kvstore.index import Index
from kvstore.leases import NO_SESSION
from kvstore.mover import Mover
from kvstore.orders import IndexPut, Move, Outcome
from kvstore.slots import NOBODY
from kvstore.store import Store
from kvstore.tiers.epochs import Epochs
from kvstore.tiers.slot_table import COMMITTED, SlotTable
from kvstore.types import SLOT_ALIGNMENT, Layout

log = structlog.get_logger()

AT_ONCE = 2  # outcomes: each takes the loop some 100 us

Ended = tuple[Move, Outcome, str]


class Hands:
    """Carries out orders. Without an NVMe tier there is no index, and nothing to put in it; so it
    is while the tier cannot be opened."""

    def __init__(self, table: SlotTable, notes: Notes, epochs: Epochs | None = None) -> None:
        self.mover: Mover | None = None
        self._table = table
        self._epochs = epochs
        self._notes = notes
        self._problem = ""
        self._index: Index | None = None
        self._described: set[int] = set()

    def use_index(self, index: Index) -> None:
        """The index can be written from now on."""
        self._index = index
        self._described.clear()

    def move(self, moves: list[Move]) -> None:
        """Queue moves with the mover."""
        assert self.mover is not None, "a move was ordered before the mover was there"
        self.mover.submit(moves)

    def mark(self, store: Store, pages: Iterable[int]) -> None:
        """Write the slot table's records of these DRAM pages as the catalog has them now; epochs
        end where no block can be read any more."""
        table, slots, catalog = self._table, store.room.dram, store.catalog
        writing: list[tuple[int, int, bytes]] = []
        for page in pages:
            block = slots.owner(page)
            if self._epochs is not None:
                there = block != NOBODY and catalog.flags[block] & READY
                (self._epochs.begin if there else self._epochs.end)(page)
            slab = slots.slab_of(page)
            size = slots.slot_size(slab)
            if size and table.slot_bytes[slab] != size and not self._assign(slab, size):
                continue
            offset = page * SLOT_ALIGNMENT
            if block == NOBODY:
                # The slab may have slots of another size by now, and what is left at its end none.
                size, inside = table.slot_bytes[slab], offset % table.slab_bytes
                if size and not inside % size and inside + size <= table.slab_bytes:
                    table.clear(offset)
                continue
            if not catalog.flags[block] & READY:
                # What will be there is told when it is there.
                writer = catalog.writers.get(block, NO_SESSION)
                writing.append((offset, writer, catalog.entry(block).fingerprint))
                continue
            sums, proof = catalog.sums[block], catalog.proofs.get(block, 0)
            store.placement.sequence += 1
            table.write(
                offset,
                COMMITTED,
                layout=catalog.entry(block).fingerprint,
                hash=catalog.keys[block] or b"",
                sequence=store.placement.sequence,
                checksum=digest(sums) if sums else proof,
            )
        table.write_writing(writing)

    def _assign(self, slab: int, slot_bytes: int) -> bool:
        """Have the table describe a slab anew. Where the system gives no room for that (a full
        tmpfs, no descriptor left) its blocks are served all the same, but after a crash nothing is:
        a slot that is being written would look free."""
        problem = ""
        try:
            self._table.assign(slab, slot_bytes)
        except OSError as error:
            problem = str(error)
        if problem != self._problem:
            self._problem = problem
            if problem:
                log.error("slot table cannot be written", problem=problem)
                self._table.spoil()
            else:
                log.warning("slot table is written again")
        return not problem

    def touch(self, store: Store, pages: Sequence[int]) -> None:
        """Note in the slot table that these DRAM pages were used, the last one last."""
        first = store.placement.sequence + 1
        store.placement.sequence += len(pages)
        self._table.touch([page * SLOT_ALIGNMENT for page in pages], first)

    def layout(self, entry: LayoutEntry) -> None:
        """Note the layout's description beside the slot table, and queue it for the NVMe index."""
        self._notes.add_layout(entry.layout)
        if self._index is not None and entry.number not in self._described:
            self._described.add(entry.number)
            self._index.put_layout(entry.number, describe(entry.layout))

    def index(self, changes: dict[int, IndexPut | None]) -> None:
        """Queue changes of the NVMe index."""
        if self._index is None:
            return
        for page, put in changes.items():
            offset = page * SLOT_ALIGNMENT
            if put is None:
                self._index.delete(offset)
            else:
                self.layout(put.entry)
                self._index.put(offset, put.entry.number, put.sequence, put.key, put.sums)


def describe(layout: Layout) -> str:
    """A layout as text, for the index; `Layout(**json.loads(text))` is the way back."""
    return json.dumps(dataclasses.asdict(layout), sort_keys=True)


class Door:
    """Outcomes from worker threads to the event loop, many at a time.

    Workers append (a deque's append is atomic) and wake the loop unless a wake is on its way: the
    flag is cleared before anything is taken, so an outcome is either taken or wakes again.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, take: Callable[[list[Ended]], None]
    ) -> None:
        self._loop = loop
        self._take = take
        self._ended: deque[Ended] = deque()
        self._woken = False

    def report(self, move: Move, outcome: Outcome, problem: str) -> None:
        """Called by worker threads."""
        self._ended.append((move, outcome, problem))
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._drain)
            except RuntimeError:
                return  # the loop has closed: nobody waits for outcomes any more

    def _drain(self) -> None:
        self._woken = False
        ended: list[Ended] = []
        while self._ended and len(ended) < AT_ONCE:
            ended.append(self._ended.popleft())
        try:
            if ended:
                self._take(ended)
        finally:
            if self._ended and not self._woken:  # in the next round, behind who asks meanwhile
                self._woken = True
                self._loop.call_soon(self._drain)
