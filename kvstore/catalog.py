"""What is known of each block: its key, its places, its holds. One row per block, kept in columns.

A million blocks must fit in a few hundred megabytes, so a block is a row number (its id) in typed
arrays, not an object. Rows of forgotten blocks are used again. Deciding is the store's.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np

from kvstore.types import SLOT_ALIGNMENT, Layout

NOWHERE = 0xFFFFFFFF

# What is true of a block, as bits of two bytes.
READY = 1  # its bytes in DRAM are complete: may be read
STORED = 2  # its bytes on NVMe are complete
WRITING = 4  # a client writes its DRAM slot
LOADING = 8  # a move fills its DRAM slot from NVMe
SPILLING = 16  # a move writes its NVMe slot from DRAM
DOOMED = 32  # forgotten, but its slots are still in use: freed with the last hold
FRESH = 64  # loaded for an acquire that has not been answered yet
TWICE = 128  # asked for again since it was stored
UNPROVEN = 256  # READY, but found after a restart: checked against its checksum before it is read
HIT = 512  # granted to an engine that wants it on a device, since it came where it was read


class LayoutEntry:
    """A layout that some client opened, and the blocks stored under it."""

    __slots__ = ("fingerprint", "index", "layout", "number", "slot_bytes")

    def __init__(self, number: int, layout: Layout) -> None:
        self.number = number
        self.layout = layout
        self.fingerprint = layout.fingerprint
        self.slot_bytes = layout.slot_bytes
        self.index: dict[bytes, int] = {}  # block hash -> id


class Sums:
    """The checksums of each block's shards, by row; None while they are not known.

    A block of one shard, the usual case, costs eight bytes here and not an object of its own.
    """

    def __init__(self) -> None:
        self._single = array("Q")  # 0: none, or among the others
        self._others: dict[int, bytes] = {}

    def __getitem__(self, row: int) -> bytes | None:
        single = self._single[row]
        return single.to_bytes(8, "little") if single else self._others.get(row)

    def __setitem__(self, row: int, sums: bytes | None) -> None:
        self._others.pop(row, None)
        self._single[row] = 0
        if sums is not None and len(sums) == 8 and any(sums):
            self._single[row] = int.from_bytes(sums, "little")
        elif sums is not None:
            self._others[row] = sums

    def clear(self, rows: Iterable[int]) -> None:
        """The checksums of these are not known any more."""
        single, others = self._single, self._others
        for row in rows:
            single[row] = 0
            if others:
                others.pop(row, None)

    def extend(self, sums: Sequence[bytes | None]) -> None:
        """Rows at the end."""
        first = len(self._single)
        self._single.extend(array("Q", bytes(8 * len(sums))))
        if not any(sums):
            return
        if all(sums) and set(map(len, sums)) == {8}:  # type: ignore[arg-type]  # none is None
            packed = array("Q", b"".join(sums))  # type: ignore[arg-type]
            if sys.byteorder == "big":
                packed.byteswap()
            self._single[first:] = packed
            return
        for row, one in enumerate(sums, first):
            self[row] = one


class Catalog:
    """Rows of blocks. `keys[id]` is None for an unused row."""

    def __init__(self) -> None:
        self.layouts: list[LayoutEntry] = []
        self.keys: list[bytes | None] = []
        self.layout = array("H")
        self.flags = array("H")
        self.dram = array("I")  # page of its DRAM slot
        self.nvme = array("I")  # page of its NVMe slot
        self.pins = array("I")  # read leases, and moves out of its DRAM slot
        self.sums = Sums()
        self.proofs: dict[int, int] = {}  # UNPROVEN block -> what `checksums.digest` must give
        # Blocks that are nowhere but may be asked for again, and why they left; the oldest first.
        self.ghosts: dict[int, str] = {}
        self.writers: dict[int, int] = {}  # WRITING block -> number of the session that writes it
        self._unused: list[int] = []
        self._dropped: list[int] = []  # unused rows that somebody may still remember

    def __len__(self) -> int:
        """Blocks that are somewhere."""
        return len(self.keys) - len(self._unused) - len(self._dropped) - len(self.ghosts)

    def open(self, layout: Layout) -> LayoutEntry:
        """The entry of a layout, made when it is new."""
        for entry in self.layouts:
            if entry.layout == layout:
                return entry
        entry = LayoutEntry(len(self.layouts), layout)
        self.layouts.append(entry)
        return entry

    def entry(self, block: int) -> LayoutEntry:
        """The layout entry of a block."""
        return self.layouts[self.layout[block]]

    def add(self, entry: LayoutEntry, key: bytes) -> int:
        """A row for a key that has none."""
        return self.add_all(entry, [key])[0]

    def add_all(self, entry: LayoutEntry, added: Sequence[bytes]) -> list[int]:
        """A row for each of these keys that have none."""
        keys, layout, unused = self.keys, self.layout, self._unused
        rows = unused[: -len(added) - 1 : -1]
        del unused[len(unused) - len(rows) :]
        for block, key in zip(rows, added, strict=False):
            keys[block] = key
            layout[block] = entry.number
        if more := len(added) - len(rows):
            self.nvme.extend(array("I", [NOWHERE]) * more)
            self.sums.extend([None] * more)
            rows += self._extend(entry, added[len(rows) :], 0)
        index, before = entry.index, len(entry.index)
        index.update(zip(added, rows, strict=True))
        assert len(index) == before + len(added), "one of the keys had a row"
        return rows

    def _extend(self, entry: LayoutEntry, keys: Sequence[bytes], flag: int) -> range:
        """New rows at the end, in every column but those of NVMe and the checksums."""
        first, count = len(self.keys), len(keys)
        self.keys.extend(keys)
        self.layout.extend(array("H", [entry.number]) * count)
        self.flags.extend(array("H", [flag]) * count)
        self.dram.extend(array("I", [NOWHERE]) * count)
        self.pins.extend(array("I", [0]) * count)
        return range(first, first + count)

    def hide(self, blocks: Sequence[int]) -> None:
        """No lookup finds the blocks any more; their rows stay."""
        keys, layouts, layout = self.keys, self.layouts, self.layout
        for block in blocks:
            key, index = keys[block], layouts[layout[block]].index
            assert key is not None
            found = index.pop(key, block)
            if found != block:  # hidden before, and the key was stored anew
                index[key] = found

    def drop(self, blocks: Sequence[int]) -> None:
        """The rows are unused from now on. The blocks are hidden, and have no place, no hold and
        no checksums."""
        keys, flags = self.keys, self.flags
        dram, nvme, pins = self.dram, self.nvme, self.pins
        for block in blocks:
            assert dram[block] == nvme[block] == NOWHERE and not pins[block]
            keys[block] = None
            flags[block] = 0
        self._dropped += blocks

    def recycle(self) -> list[int]:
        """Nobody remembers the dropped rows any more: other blocks may have them. Returns them."""
        dropped, self._dropped = self._dropped, []
        self._unused += dropped
        return dropped

    def forget_ghosts(self, most: int) -> None:
        """Of the blocks that are nowhere keep no more than that many, the latest."""
        surplus = len(self.ghosts) - most
        if surplus <= 0:
            return
        # Some more at once: finding the first of a dict costs what was taken out before it.
        self.forget_ghosts_among(
            list(islice(self.ghosts, min(len(self.ghosts), surplus + most // 16)))
        )

    def forget_ghosts_among(self, blocks: Iterable[int]) -> None:
        """Those of these blocks that are nowhere are not remembered any more."""
        gone = [block for block in blocks if self.ghosts.pop(block, None) is not None]
        self.hide(gone)
        self.drop(gone)

    def load(
        self, entry: LayoutEntry, keys: list[bytes], offsets: list[int], sums: list[bytes]
    ) -> list[int]:
        """Rows for many blocks stored on NVMe, at once: a restart's way in. Keys must be new.

        Offsets and sums are used up: the lists are empty afterwards, and with a million blocks
        their memory serves what is built next.
        """
        pages = np.asarray(offsets, np.uint64) // SLOT_ALIGNMENT
        pages = np.minimum(pages, NOWHERE)  # a damaged record's is not to point at another's
        self.nvme.extend(array("I", pages.astype(np.uint32).tobytes()))
        offsets.clear()
        self.sums.extend(sums)
        sums.clear()
        rows = list(self._extend(entry, keys, STORED))  # the same objects for all who remember them
        entry.index.update(zip(keys, rows, strict=True))
        return rows
