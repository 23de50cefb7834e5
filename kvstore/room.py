"""Who leaves when room is short: places, holds and policies of one tenant's tiers.

Who holds a block, and why:

    row of the catalog   while it has a place, a pin or a move
    DRAM slot            from take() to leave() or reap()
    NVMe slot            from a spill, or a restart, to leave() or reap()
    pin                  read leases, and spills; a pinned block keeps its places
    busy                 NVMe slots that a load or a check reads; they keep their slot

Moves are ordered elsewhere (`kvstore.placement`). No I/O, threads, clock or randomness.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from kvstore.catalog import (
    DOOMED,
    FRESH,
    LOADING,
    NOWHERE,
    READY,
    SPILLING,
    STORED,
    WRITING,
    Catalog,
    LayoutEntry,
)
from kvstore.counters import Counters
from kvstore.eviction.base import Policy
from kvstore.orders import Orders
from kvstore.retention import Retention
from kvstore.slots import Slots
from kvstore.types import DRAM, NVME

LOOKED_AT_MAX = 4_096  # blocks passed over while looking for victims in one call
UNSAVED_MAX = 64  # of them, blocks whose copy on NVMe is still due
SLAB_SCAN_S = 1.0  # how often slabs of other sizes are compared with ours
SLABS_LOOKED_AT_MAX = 16
IN_USE = WRITING | LOADING | SPILLING


class Room:
    """Tiers, who sits in them, and who goes first.

    `must_save` tells whether a block's copy on NVMe is due before it may leave DRAM. Blocks that
    were spared for that reason are left in `unsaved`, for the caller to order their spills.
    """

    def __init__(
        self,
        dram: Slots,
        nvme: Slots,
        make_policy: Callable[[], Policy],
        must_save: Callable[[int], bool],
    ) -> None:
        self.catalog = Catalog()
        self.counters = Counters()
        self.retention = Retention()
        self.dram = dram
        self.nvme = nvme
        self.orders = Orders()
        self.unsaved: list[int] = []
        self._must_save = must_save
        self._make_policy = make_policy
        self._policies: dict[tuple[int, int], Policy] = {}
        self._busy: dict[int, int] = {}
        self._slab_scanned = {DRAM: -SLAB_SCAN_S, NVME: -SLAB_SCAN_S}

    def policy(self, tier: int, slot_bytes: int) -> Policy:
        """The policy for one slot size of one tier."""
        found = self._policies.get((tier, slot_bytes))
        if found is None:
            found = self._policies[tier, slot_bytes] = self._make_policy()
        return found

    def policies(self, tier: int) -> list[Policy]:
        """The policies of a tier, one for each slot size."""
        return [policy for (of, _), policy in self._policies.items() if of == tier]

    def resident(self, tier: int) -> int:
        """Blocks that can be had from a tier."""
        return sum(map(len, self.policies(tier)))

    # -- taking --------------------------------------------------------------------------------

    def take(
        self, tier: int, entry: LayoutEntry, blocks: Sequence[int], now: float, *, force: bool
    ) -> int:
        """Give leading blocks a slot each; returns how many got one. Victims leave at once."""
        slots, column = self._tier(tier)
        done = 0
        while done < len(blocks):
            taken = slots.take(entry.slot_bytes, blocks[done:])
            for block, slot in zip(blocks[done:], taken, strict=False):
                column[block] = slot
            if tier == DRAM:
                self.orders.marks.update(taken)
            done += len(taken)
            short = len(blocks) - done
            if short and not self._make_room(tier, entry.slot_bytes, short, now, force):
                break
        return done

    def hold(self, block: int) -> None:
        """The block keeps its NVMe slot until `unhold`."""
        self._busy[block] = self._busy.get(block, 0) + 1

    def unhold(self, block: int) -> None:
        """One hold less."""
        self._busy[block] -= 1
        if not self._busy[block]:
            del self._busy[block]

    def held(self, block: int) -> bool:
        """Whether something reads the block's NVMe slot."""
        return block in self._busy

    # -- leaving -------------------------------------------------------------------------------

    def doom(self, block: int, reason: str) -> None:
        """Nobody finds the block any more; its places are free with its last hold."""
        catalog, slot_bytes = self.catalog, self.catalog.entry(block).slot_bytes
        catalog.hide(block)
        flags = catalog.flags[block]
        if flags & READY:
            self.policy(DRAM, slot_bytes).forget([block])
            self.counters.dram.evicted[reason] += 1
        if flags & STORED:
            self.policy(NVME, slot_bytes).forget([block])
            self.counters.nvme.evicted[reason] += 1
            self.orders.index[catalog.nvme[block]] = None
        catalog.flags[block] = flags & ~(READY | STORED) | DOOMED
        self.retention.forget(block)
        self.reap(block)

    def reap(self, block: int) -> None:
        """Free the places of a doomed block, if nothing holds it any more."""
        catalog = self.catalog
        if not catalog.flags[block] & DOOMED:
            return
        if catalog.pins[block] or block in self._busy or catalog.flags[block] & IN_USE:
            return
        self.free(DRAM, block)
        self.free(NVME, block)
        catalog.drop(block)
        self.orders.room = True

    def leave(self, tier: int, block: int, reason: str) -> None:
        """The block leaves a tier; if it is in no other, it is forgotten."""
        bit = READY | FRESH if tier == DRAM else STORED
        catalog = self.catalog
        assert catalog.flags[block] & bit
        self.policy(tier, catalog.entry(block).slot_bytes).forget([block])
        catalog.flags[block] &= ~bit
        self.counters.tier(tier).evicted[reason] += 1
        if tier == NVME:
            catalog.sums[block] = None
            self.orders.index[catalog.nvme[block]] = None
        self.free(tier, block)
        self.settle(block)

    def free(self, tier: int, block: int) -> None:
        """The block's slot in a tier, if it has one, is free."""
        slots, column = self._tier(tier)
        slot = column[block]
        if slot != NOWHERE:
            slots.give_back([slot])
            column[block] = NOWHERE
            if tier == DRAM:
                self.orders.marks.add(slot)

    def settle(self, block: int) -> None:
        """A block that is nowhere any more is forgotten, at once or with its last hold."""
        if self.catalog.flags[block] & DOOMED:
            self.reap(block)
        elif not self.catalog.flags[block] & (READY | STORED | IN_USE):
            self.doom(block, "nowhere")

    def check(self) -> None:
        """Asserts that every slot has one owner, and that owners and places agree. For tests."""
        catalog = self.catalog
        self.dram.check()
        self.nvme.check()
        for slots, column in ((self.dram, catalog.dram), (self.nvme, catalog.nvme)):
            placed = {column[b]: b for b, key in enumerate(catalog.keys) if column[b] != NOWHERE}
            assert placed == slots.owners()
        for block, key in enumerate(catalog.keys):
            flags = catalog.flags[block]
            if key is None:
                assert not flags and not catalog.pins[block] and block not in self._busy
                continue
            entry = catalog.entry(block)
            assert (entry.index.get(key) == block) == (not flags & DOOMED)
            assert bool(flags & READY) == (block in self.policy(DRAM, entry.slot_bytes))
            assert bool(flags & STORED) == (block in self.policy(NVME, entry.slot_bytes))
            assert not flags & READY or not flags & (WRITING | LOADING)
            assert not flags & (READY | WRITING | LOADING) or catalog.dram[block] != NOWHERE
            assert not flags & (STORED | SPILLING) or catalog.nvme[block] != NOWHERE
            assert flags & (READY | STORED | IN_USE | DOOMED), f"block {block} is nowhere"

    # -- inside --------------------------------------------------------------------------------

    def _tier(self, tier: int) -> tuple[Slots, array[int]]:
        if tier == DRAM:
            return self.dram, self.catalog.dram
        return self.nvme, self.catalog.nvme

    def _make_room(self, tier: int, slot_bytes: int, short: int, now: float, force: bool) -> int:
        """Let blocks leave a tier so that slots of this size become free; returns how many left."""
        if now - self._slab_scanned[tier] >= SLAB_SCAN_S:
            self._slab_scanned[tier] = now
            if left := self._take_over(tier, slot_bytes, now, force=force):
                return left
        taken = self._pick(tier, self.policy(tier, slot_bytes), short, now, force)
        for block in taken:
            self.leave(tier, block, "room")
        if taken or self.unsaved:
            return len(taken)
        return self._take_over(tier, slot_bytes, now, force=force, desperate=True)

    def _pick(self, tier: int, policy: Policy, short: int, now: float, force: bool) -> list[int]:
        """Blocks that may leave a tier now, least valuable first; at most `short`."""
        pins, flags = self.catalog.pins, self.catalog.flags
        taken: list[int] = []
        held: list[int] = []
        unsaved: list[int] = []
        retained: list[int] = []
        for block in policy.victims(now):
            if self.retention.keeps(block, now):
                retained.append(block)
                held.append(block)
            elif pins[block] or block in self._busy:
                if not flags[block] & SPILLING:
                    held.append(block)
            elif tier == DRAM and not force and self._must_save(block):
                unsaved.append(block)
            else:
                taken.append(block)
            if (
                len(taken) == short
                or len(unsaved) == UNSAVED_MAX
                or len(taken) + len(held) + len(unsaved) == LOOKED_AT_MAX
            ):
                break
        # What is held would be met again at every search: it goes to the warm end, once.
        policy.touch(held[::-1], now)
        self.unsaved += unsaved
        if len(taken) < short and retained:
            weakest = self.retention.weakest(retained, short - len(taken))
            taken += [b for b in weakest if self._may_leave(tier, b, force)]
        return taken

    def _may_leave(self, tier: int, block: int, force: bool) -> bool:
        if self.catalog.pins[block] or block in self._busy or self.retention.pins(block):
            return False
        return tier == NVME or force or not self._must_save(block)

    def _take_over(
        self, tier: int, slot_bytes: int, now: float, *, force: bool, desperate: bool = False
    ) -> int:
        """Empty the slab of another slot size that is idle for longest, if that is worth it.

        It is when this size has nothing to give (`desperate`, or no block at all), or when that
        slab was last used before the one in which our own coldest block sits. Blocks whose copy is
        still due are saved first.
        """
        slots, column = self._tier(tier)
        others = [slab for slab, size in slots.slabs() if size != slot_bytes]
        if not others:
            return 0
        coldest = next(iter(self.policy(tier, slot_bytes).victims(now)), None)
        if desperate:
            coldest = None
        ours = now if coldest is None else slots.touched[slots.slab_of(column[coldest])]
        for slab in sorted(others, key=slots.touched.__getitem__)[:SLABS_LOOKED_AT_MAX]:
            if coldest is not None and slots.touched[slab] >= ours:
                return 0
            residents = slots.residents(slab)
            if not all(
                self._may_leave(tier, b, True) and self._is_idle(tier, b) for b in residents
            ):
                continue
            unsaved = [b for b in residents if tier == DRAM and self._must_save(b)]
            if unsaved and not force:
                self.unsaved += unsaved
                continue
            for block in residents:
                self.leave(tier, block, "slab")
            return len(residents)
        return 0

    def _is_idle(self, tier: int, block: int) -> bool:
        flags = self.catalog.flags[block]
        return bool(flags & (READY if tier == DRAM else STORED)) and not flags & (IN_USE | DOOMED)
