"""Places of one tier: slabs that each serve one slot size, and who sits in each slot.

    capacity  |  slab 0  |  slab 1  |  slab 2  | ...      all of slab_bytes
                 2 MiB      2 MiB      96 KiB             slot size of each, 0 while unassigned

A slot is named by the page (4 KiB) that it starts on, counted from the start of the tier. A slab
whose last slot becomes free is unassigned again, and any slot size may take it. Which blocks must
leave is not decided here.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

import numpy as np

from kvstore.types import SLOT_ALIGNMENT

NOBODY = 0xFFFFFFFF


class Slots:
    """The slots of a tier. The owner of a slot is a block id of the catalog.

    `spread` slabs of each size are filled side by side: with several devices, and slabs dealt out
    to them in turn, consecutive blocks then go to different devices.
    """

    def __init__(self, capacity_bytes: int, slab_bytes: int, *, spread: int = 1) -> None:
        assert slab_bytes % SLOT_ALIGNMENT == 0, slab_bytes
        self.slab_bytes = slab_bytes
        self.slab_pages = slab_bytes // SLOT_ALIGNMENT
        self.slab_count = capacity_bytes // slab_bytes
        self.capacity_bytes = self.slab_count * slab_bytes
        self.used_bytes = 0
        self.touched = array("d", bytes(8 * self.slab_count))  # last use of any block of the slab
        self._spread = spread
        self._size = array("Q", bytes(8 * self.slab_count))
        self._free: list[list[int]] = [[] for _ in range(self.slab_count)]
        self._owners: list[array[int]] = [array("I") for _ in range(self.slab_count)]
        # slot bytes -> slabs with a free slot, in order
        self._open: dict[int, dict[int, None]] = {}
        self._slabs_of: dict[int, int] = {}  # slot bytes -> slabs that serve it
        self._unassigned = list(range(self.slab_count - 1, -1, -1))

    def fits(self, slot_bytes: int) -> bool:
        """Whether a slab can hold a slot of this size at all."""
        return self.slab_count > 0 and slot_bytes <= self.slab_bytes

    def capacity(self, slot_bytes: int) -> int:
        """Slots of this size that the whole tier could hold."""
        return self.slab_count * (self.slab_bytes // slot_bytes) if self.fits(slot_bytes) else 0

    def free(self, slot_bytes: int) -> int:
        """Slots of this size that can be taken at once."""
        each = self.slab_bytes // slot_bytes if self.fits(slot_bytes) else 0
        opened = self._open.get(slot_bytes, {})
        return len(self._unassigned) * each + sum(len(self._free[slab]) for slab in opened)

    def take(self, slot_bytes: int, owners: Sequence[int]) -> list[int]:
        """A slot for each owner in turn, neighbours where possible; fewer when room is short."""
        taken: list[int] = []
        opened = self._open.setdefault(slot_bytes, {})
        pages = slot_bytes // SLOT_ALIGNMENT
        while len(taken) < len(owners):
            if self._unassigned and len(opened) < self._spread:
                slab = self._unassigned.pop()  # used at once: no slab is held without need
                self._assign(slab, slot_bytes)
            elif opened:
                slab = next(iter(opened))
            else:
                break
            free, seats = self._free[slab], self._owners[slab]
            count = min(len(owners) - len(taken), len(free))
            if self._spread > 1:
                count = min(count, 1)
                opened[slab] = opened.pop(slab)
            first = slab * self.slab_pages
            for place in reversed(free[-count:]):
                seats[place] = owners[len(taken)]
                taken.append(first + place * pages)
            del free[-count:]
            if not free:
                del opened[slab]
        self.used_bytes += len(taken) * slot_bytes
        return taken

    def give_back(self, slots: Sequence[int], *, shunned: bool = False) -> None:
        """The slots are free again. Those that are `shunned` are taken after the others of their
        slab: something is wrong with them."""
        sizes, owners, frees, slab_pages = self._size, self._owners, self._free, self.slab_pages
        freed = 0
        for slot in slots:
            slab = slot // slab_pages
            size, seats, free = sizes[slab], owners[slab], frees[slab]
            assert size, f"slot {slot} given back, its slab serves nobody"
            place = slot % slab_pages * SLOT_ALIGNMENT // size
            assert seats[place] != NOBODY, f"slot {slot} given back twice"
            seats[place] = NOBODY
            freed += size
            if not free:
                self._open[size][slab] = None
            free.insert(0 if shunned else len(free), place)
            if len(free) == len(seats):
                self._unassign(slab)
        self.used_bytes -= freed

    def reseat(self, slot: int, owner: int) -> None:
        """Somebody else has this slot, which is taken, from now on."""
        slab, page = divmod(slot, self.slab_pages)
        place = page * SLOT_ALIGNMENT // self._size[slab]
        assert self._owners[slab][place] != NOBODY, f"slot {slot} is nobody's"
        self._owners[slab][place] = owner

    def adopt(self, slots: Sequence[int], slot_bytes: int, owners: Sequence[int]) -> list[bool]:
        """Seat owners in given slots, as found after a restart. False where that cannot be: the
        slot lies outside, crosses a slab of another size, or is taken."""
        count = self.slab_bytes // slot_bytes
        slabs, pages = np.divmod(np.asarray(slots, np.int64), self.slab_pages)
        places, off = np.divmod(pages, slot_bytes // SLOT_ALIGNMENT)
        good = (slabs < self.slab_count) & (off == 0) & (places < count)
        sizes = np.asarray(self._size)[np.minimum(slabs, self.slab_count - 1)]
        good &= (sizes == 0) | (sizes == slot_bytes)
        # By slab, in one pass; of several owners of one slot the first is seated.
        there = np.flatnonzero(good)
        there = there[np.unique((slabs * count + places)[there], return_index=True)[1]]
        good[:] = False
        good[there] = True
        everyone = np.asarray(owners, np.uint32)
        cuts = np.flatnonzero(np.diff(slabs[there])) + 1
        for mine in np.split(there, cuts) if len(there) else ():
            slab = int(slabs[mine[0]])
            if not self._size[slab]:
                self._assign(slab, slot_bytes)
            seats = np.asarray(self._owners[slab])
            taken = seats[places[mine]] != NOBODY
            good[mine[taken]] = False
            mine = mine[~taken]
            seats = seats.copy()
            seats[places[mine]] = everyone[mine]
            self._owners[slab] = array("I", seats.tobytes())
            self.used_bytes += len(mine) * slot_bytes
            self._free[slab] = np.flatnonzero(seats == NOBODY)[::-1].tolist()
            if not self._free[slab]:
                self._open[slot_bytes].pop(slab, None)
        self._unassigned = [s for s in range(self.slab_count - 1, -1, -1) if not self._size[s]]
        seated: list[bool] = good.tolist()
        return seated

    def slab_of(self, slot: int) -> int:
        """The slab that a slot lies in."""
        return slot // self.slab_pages

    def slot_size(self, slab: int) -> int:
        """The slot size that a slab serves; 0 while it is unassigned."""
        return self._size[slab]

    def owner(self, slot: int) -> int:
        """Who sits in the slot that starts on this page; NOBODY where none starts or it is free."""
        slab, page = divmod(slot, self.slab_pages)
        size = self._size[slab] if slab < self.slab_count else 0
        if not size or page * SLOT_ALIGNMENT % size:
            return NOBODY
        seats, place = self._owners[slab], page * SLOT_ALIGNMENT // size
        return seats[place] if place < len(seats) else NOBODY  # a slab may have a rest at its end

    def residents(self, slab: int) -> list[int]:
        """The owners seated in a slab."""
        return [owner for owner in self._owners[slab] if owner != NOBODY]

    def slabs(self) -> Iterator[tuple[int, int]]:
        """Every assigned slab with its slot size."""
        return ((slab, size) for slab, size in enumerate(self._size) if size)

    def serve_only(self, slot_bytes: int) -> bool:
        """Whether no slab serves another size."""
        return len(self._slabs_of) == (slot_bytes in self._slabs_of)

    def owners(self) -> dict[int, int]:
        """Every taken slot with its owner; for checks, it looks at all of them."""
        found = {}
        for slab, size in self.slabs():
            pages = size // SLOT_ALIGNMENT
            for place, owner in enumerate(self._owners[slab]):
                if owner != NOBODY:
                    found[slab * self.slab_pages + place * pages] = owner
        return found

    def check(self) -> None:
        """Asserts that every slot of every slab is counted once."""
        used = 0
        for slab, size in enumerate(self._size):
            free, seats = self._free[slab], self._owners[slab]
            if not size:
                assert slab in self._unassigned and not seats
                continue
            assert len(seats) == self.slab_bytes // size
            assert len(set(free)) == len(free)
            assert all(seats[place] == NOBODY for place in free)
            taken = len(self.residents(slab))
            assert taken + len(free) == len(seats) and taken
            assert (slab in self._open[size]) == bool(free)
            used += taken * size
        assert used == self.used_bytes
        sizes = [size for _, size in self.slabs()]
        assert self._slabs_of == {size: sizes.count(size) for size in sizes}

    def _assign(self, slab: int, slot_bytes: int) -> None:
        count = self.slab_bytes // slot_bytes
        self._size[slab] = slot_bytes
        self._slabs_of[slot_bytes] = self._slabs_of.get(slot_bytes, 0) + 1
        self._owners[slab] = array("I", [NOBODY]) * count
        self._free[slab] = list(range(count - 1, -1, -1))
        self._open.setdefault(slot_bytes, {})[slab] = None

    def _unassign(self, slab: int) -> None:
        size = self._size[slab]
        self._open[size].pop(slab, None)
        self._slabs_of[size] -= 1
        if not self._slabs_of[size]:
            del self._slabs_of[size]
        self._size[slab] = 0
        self._free[slab] = []
        self._owners[slab] = array("I")
        self._unassigned.append(slab)
