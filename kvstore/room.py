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

import heapq
from array import array
from collections.abc import Callable, Sequence

from kvstore.catalog import (
    DOOMED,
    FRESH,
    HIT,
    LOADING,
    NOWHERE,
    READY,
    SPILLING,
    STORED,
    UNPROVEN,
    WRITING,
    Catalog,
    LayoutEntry,
)
from kvstore.counters import Counters
from kvstore.eviction.base import Family, Policy
from kvstore.orders import Move, MoveKind, Orders
from kvstore.retention import Retention
from kvstore.slots import Slots
from kvstore.types import DRAM, NVME

STAY_S = 86_400.0  # taken for granted until room was made once
STAY_SHARE = 0.05  # of the newest, in the moving average of stays
NVME_AHEAD_MAX, NVME_AHEAD_PART = 16, 256  # slots made free at once; no larger part of the tier
BUSY_MAX = 64  # blocks met that are not idle, until no more are looked for
LOOKED_AT_MAX = 4_096  # blocks passed over while looking for victims in one call
UNSAVED_MIN = 8  # of them, blocks whose copy on NVMe is due, though none can be ordered now
SLAB_SCAN_S = 1.0  # how often slabs of other sizes are compared with ours
SLABS_LOOKED_AT_MAX = 16
SLAB_SAMPLE = 256  # of the blocks in a slab, to tell its worth
IN_USE = WRITING | LOADING | SPILLING


class Room:
    """Tiers, who sits in them, and who goes first.

    `must_save` tells which blocks may not leave DRAM before their copy is on NVMe: those whose
    flags under a mask have a value. Blocks that were spared for that reason are left in `unsaved`,
    for the caller to order their spills.
    """

    def __init__(
        self,
        dram: Slots,
        nvme: Slots,
        family: Family,
        must_save: Callable[[], tuple[int, int]],
    ) -> None:
        self.catalog = Catalog()
        self.counters = Counters()
        self.retention = Retention()
        self.dram = dram
        self.nvme = nvme
        self.orders = Orders()
        self.unsaved: list[int] = []
        self._being_saved = False  # whether some of those looked at last leave when they are saved
        self.savable: Callable[[], int] = lambda: UNSAVED_MIN  # copies that can be ordered now
        self.reasons = {DRAM: "room", NVME: "room"}  # as which it counts that blocks made room
        self.nvme_stay_s = STAY_S  # how long blocks that leave NVMe were not asked for, of late
        # Whether a block that leaves DRAM is worth its write to NVMe.
        self.worth_saving: Callable[[int, float], bool] = lambda block, now: True
        # Told of blocks that have left a tier, or all, before their slots are free.
        self.left: Callable[[Sequence[int]], None] = lambda blocks: None
        self._must_save = must_save
        self.family = family
        self._policies: dict[tuple[int, int], Policy] = {}
        self._due: list[tuple[str, int, int, Sequence[int], float]] = []  # see `tell_later`
        self._busy: dict[int, int] = {}
        self._slab_scanned = {DRAM: -SLAB_SCAN_S, NVME: -SLAB_SCAN_S}

    def policy(self, tier: int, slot_bytes: int) -> Policy:
        """The policy for one slot size of one tier."""
        if self._due:
            self.tell()
        found = self._policies.get((tier, slot_bytes))
        if found is None:
            found = self._policies[tier, slot_bytes] = self._new_policy(tier, slot_bytes)
        return found

    def tell_later(self, act: str, tier: int, size: int, blocks: Sequence[int], now: float) -> None:
        """Have the policy of a tier and slot size told ("admit" or "warm") before it is asked."""
        self._due.append((act, tier, size, blocks, now))

    def tell(self) -> None:
        """Tell the policies what is due."""
        due, self._due = self._due, []
        for act, tier, size, blocks, now in due:
            getattr(self.policy(tier, size), act)(blocks, now)

    def _new_policy(self, tier: int, slot_bytes: int) -> Policy:
        return self.family.make(tier, self._tier(tier)[0].capacity(slot_bytes))

    def policies(self, tier: int) -> list[Policy]:
        """The policies of a tier, one for each slot size."""
        self.tell()
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
            if short and tier == NVME:  # some for the next spills, too: they come one by one
                capacity = slots.capacity(entry.slot_bytes)
                short = max(short, min(NVME_AHEAD_MAX, capacity // NVME_AHEAD_PART))
            if short and not self._make_room(tier, entry.slot_bytes, short, now, force):
                break
        return done

    def unpin(self, blocks: Sequence[int]) -> None:
        """One pin less on each of the blocks."""
        pins, flags, seen = self.catalog.pins, self.catalog.flags, 0
        for block in blocks:
            pins[block] -= 1
            seen |= flags[block]
        if seen & DOOMED:
            self.reap(blocks)

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

    def order(self, kind: MoveKind, block: int) -> None:
        """Order a move of a block, from and to the slots that it has now."""
        catalog = self.catalog
        key = catalog.keys[block]
        assert key is not None
        self.orders.moves.append(
            Move(
                kind,
                block,
                catalog.entry(block),
                key,
                catalog.dram[block],
                catalog.nvme[block],
                catalog.sums[block],
                proof=catalog.proofs.get(block, 0),
            )
        )

    # -- leaving -------------------------------------------------------------------------------

    def doom(self, blocks: Sequence[int], reason: str) -> None:
        """Nobody finds these blocks of one layout any more; their places are free with their last
        hold."""
        if not blocks:
            return
        catalog, flags, slot_bytes = self.catalog, self.catalog.flags, self._slot_bytes(blocks)
        catalog.hide(blocks)
        ready = [block for block in blocks if flags[block] & READY]
        if ready:
            self.policy(DRAM, slot_bytes).forget(ready)
            self.counters.dram.evicted[reason] += len(ready)
            # A block that is still held keeps its slot, but its record must not say committed.
            self.orders.marks.update([catalog.dram[block] for block in ready])
        stored = [block for block in blocks if flags[block] & STORED]
        if stored:
            self.policy(NVME, slot_bytes).forget(stored)
            self.counters.nvme.evicted[reason] += len(stored)
            self.orders.index.update(dict.fromkeys([catalog.nvme[block] for block in stored]))
        catalog.sums.clear(blocks)
        for block in blocks:
            flags[block] = flags[block] & ~(READY | STORED | UNPROVEN) | DOOMED
        self._unprove(blocks)
        self.retention.forget(blocks)
        self.reap(blocks)

    def reap(self, blocks: Sequence[int]) -> None:
        """Free the places of those blocks that are doomed and that nothing holds any more."""
        flags, pins, busy = self.catalog.flags, self.catalog.pins, self._busy
        gone = [
            block
            for block in blocks
            if flags[block] & (DOOMED | IN_USE) == DOOMED and not pins[block] and block not in busy
        ]
        if gone:
            gone = list(dict.fromkeys(gone))  # a lease may name a block twice
            self.left(gone)
            self.free(DRAM, gone)
            self.free(NVME, gone)
            self.catalog.drop(gone)
            self.orders.room = True

    def leave(self, tier: int, blocks: Sequence[int], reason: str) -> None:
        """The blocks, all of one slot size, leave a tier; those in no other are forgotten."""
        if not blocks:
            return
        bit, gone = (READY, READY | FRESH | UNPROVEN | HIT) if tier == DRAM else (STORED, STORED)
        catalog, flags = self.catalog, self.catalog.flags
        for block in blocks:
            assert flags[block] & bit, f"block {block} is not there to leave"
            flags[block] &= ~gone
        self.policy(tier, self._slot_bytes(blocks)).forget(blocks)
        self.counters.tier(tier).evicted[reason] += len(blocks)
        if tier == NVME:
            catalog.sums.clear(blocks)
            self.orders.index.update(dict.fromkeys([catalog.nvme[block] for block in blocks]))
        else:
            catalog.sums.clear(block for block in blocks if not flags[block] & STORED)
            self._unprove(blocks)
        self.left(blocks)
        self.free(tier, blocks)
        self.settle(blocks, reason)

    def _unprove(self, blocks: Sequence[int]) -> None:
        """Nothing is to be proved of these blocks any more."""
        proofs = self.catalog.proofs
        if proofs:
            for block in blocks:
                proofs.pop(block, None)

    def free(self, tier: int, blocks: Sequence[int], *, shunned: bool = False) -> None:
        """The slots of the blocks in a tier, where they have one, are free; see Slots.give_back."""
        slots, column = self._tier(tier)
        pages = [column[block] for block in blocks if column[block] != NOWHERE]
        if not pages:
            return
        slots.give_back(pages, shunned=shunned)
        for block in blocks:
            column[block] = NOWHERE
        if tier == DRAM:
            self.orders.marks.update(pages)

    def settle(self, blocks: Sequence[int], cause: str = "") -> None:
        """Blocks that are nowhere any more are forgotten, at once or with their last hold; where
        there is a cause, that they were here, and why they are not, is known for a while."""
        catalog, flags, pins = self.catalog, self.catalog.flags, self.catalog.pins
        there = READY | STORED | IN_USE | DOOMED
        nowhere = [block for block in blocks if not flags[block] & there]
        if nowhere:
            self.retention.forget(nowhere)
            held = [block for block in nowhere if pins[block]]
            for block in held:
                flags[block] |= DOOMED
            free = [block for block in nowhere if not pins[block]] if held else nowhere
            if cause:
                catalog.hide(held)
                catalog.ghosts.update(dict.fromkeys(free, cause))
                for block in free:
                    flags[block] = 0
            else:
                catalog.hide(nowhere)
                catalog.drop(free)
            self.orders.room = True
        if len(nowhere) < len(blocks):
            self.reap(blocks)

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
            assert catalog.sums[block] is None or flags & (STORED | READY)
            assert bool(flags & UNPROVEN) == (block in catalog.proofs)
            assert not flags & UNPROVEN or flags & READY
            assert (block in catalog.writers) == bool(flags & WRITING)
            if key is None or block in catalog.ghosts:
                assert not flags and not catalog.pins[block] and block not in self._busy
                assert key is None or catalog.entry(block).index[key] == block
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

    def _slot_bytes(self, blocks: Sequence[int]) -> int:
        return self.catalog.entry(blocks[0]).slot_bytes

    def _make_room(self, tier: int, slot_bytes: int, short: int, now: float, force: bool) -> int:
        """Let blocks leave a tier so that slots of this size become free; returns how many left."""
        if now - self._slab_scanned[tier] >= SLAB_SCAN_S:
            self._slab_scanned[tier] = now
            if left := self._take_over(tier, slot_bytes, now, force=force):
                return left
        taken = self._pick(tier, self.policy(tier, slot_bytes), short, now, force)
        if taken and tier == NVME:
            self._note_stay(self.family.idle_s(taken[0], now))
        self.leave(tier, taken, self.reasons[tier])
        saving = self._being_saved and self._must_save()[0]  # not to a device that is fenced
        if taken or self.unsaved or saving:
            return len(taken)
        return self._take_over(tier, slot_bytes, now, force=force, desperate=True)

    def _note_stay(self, stay_s: float) -> None:
        known = self.nvme_stay_s
        self.nvme_stay_s = stay_s if known == STAY_S else known + STAY_SHARE * (stay_s - known)

    def demote(self, slot_bytes: int, count: int, now: float, idle_s: float) -> int:
        """Let blocks that nobody asked for in so long leave DRAM for NVMe before there is need;
        returns how many left. The copies of others that would leave are `unsaved`."""
        policy = self.policy(DRAM, slot_bytes)
        taken = self._pick(DRAM, policy, count, now, force=False, idle_s=idle_s)
        self.leave(DRAM, taken, "idle")
        return len(taken)

    def leave_stored(self, slot_bytes: int, now: float) -> bool:
        """Let the block that is worth least leave DRAM, if that is one which stays on NVMe."""
        taken = self._pick(DRAM, self.policy(DRAM, slot_bytes), 1, now, force=False)
        self.unsaved.clear()
        stays = [block for block in taken if self.catalog.flags[block] & STORED]
        if len(self.retention):
            stays = [block for block in stays if not self.retention.keeps(block, now)]
        self.leave(DRAM, stays, self.reasons[DRAM])
        return bool(stays)

    def slot_sizes(self, tier: int) -> list[int]:
        """The slot sizes of which there were blocks in a tier."""
        return [size for of, size in self._policies if of == tier]

    def _pick(
        self,
        tier: int,
        policy: Policy,
        short: int,
        now: float,
        force: bool,
        idle_s: float = 0.0,
    ) -> list[int]:
        """Blocks that may leave a tier now, least valuable first; at most `short`. With `idle_s`,
        only those that were not asked for in so long."""
        pins, flags, busy = self.catalog.pins, self.catalog.flags, self._busy
        keeps = self.retention.keeps if len(self.retention) else None
        mask, due = (0, 1) if force or tier == NVME else self._must_save()
        self._being_saved = False
        taken, held, unsaved, retained = list[int](), list[int](), list[int](), list[int]()
        victims, looked_at, worth = policy.victims(now), 0, self.worth_saving
        busy_left, unsaved_max = BUSY_MAX, max(UNSAVED_MIN, self.savable())
        block = next(victims, None)
        while block is not None:
            stays = True
            if keeps is not None and keeps(block, now):
                retained.append(block)
                held.append(block)
            elif pins[block] or block in busy:
                if flags[block] & SPILLING:
                    self._being_saved = True
                else:
                    held.append(block)
            elif idle_s and self.family.idle_s(block, now) < idle_s:
                busy_left -= 1
                if not busy_left:
                    break
            elif flags[block] & mask == due and worth(block, now):
                stays = False  # it leaves as soon as it is saved
                unsaved.append(block)
                if len(unsaved) == unsaved_max:
                    break
            else:
                stays = False
                taken.append(block)
                if len(taken) == short:
                    break
            looked_at += 1
            if looked_at == LOOKED_AT_MAX:
                break
            try:
                block = victims.send(stays)
            except StopIteration:
                break
        victims.close()
        if held:  # they would be met again at every search
            policy.defer(held[::-1])
        if len(taken) < short and retained and not idle_s:
            loose = [block for block in retained if self._may_leave(block, now)]
            for block in self.retention.weakest(loose, short - len(taken)):
                due_now = flags[block] & mask == due and worth(block, now)
                (unsaved if due_now else taken).append(block)
        self.unsaved += unsaved
        return taken

    def contest(self, entry: LayoutEntry, blocks: Sequence[int], short: int, now: float) -> int:
        """How many leading ones of these new blocks, for `short` of which there is no slot in DRAM,
        are worth more than what would have to leave for them; that has left then."""
        policy = self.policy(DRAM, entry.slot_bytes)
        policy.admit(blocks, now)  # as if they were there
        taken = self._pick(DRAM, policy, short, now, force=False)
        policy.forget(blocks)
        new = set(blocks)
        gone = [block for block in taken if block not in new]
        self.leave(DRAM, gone, self.reasons[DRAM])
        return len(blocks) - (len(taken) - len(gone))

    def _may_leave(self, block: int, now: float) -> bool:
        """Whether nothing stands against it but that the block may be kept, or not be saved yet."""
        held = self.catalog.pins[block] or block in self._busy
        return not held and not self.retention.pins(block, now)

    def _take_over(
        self, tier: int, slot_bytes: int, now: float, *, force: bool, desperate: bool = False
    ) -> int:
        """Empty the slab of another slot size that is idle for longest, if that is worth it.

        It is when this size has nothing to give (`desperate`, or no block at all), or when what is
        in that slab is worth less than our own coldest block, or as little and was last used before
        it; where worth cannot be compared, when that slab was last used before the one in which our
        coldest block sits. Blocks whose copy is still due are saved first; those that are kept
        stay, unless this size is desperate.
        """
        slots, column = self._tier(tier)
        if slots.serve_only(slot_bytes):
            return 0
        mask, due = (0, 1) if force or tier == NVME else self._must_save()
        coldest = None
        if not desperate:
            coldest = next(iter(self.policy(tier, slot_bytes).victims(now)), None)
        ours, worth = now, None
        if coldest is not None:
            worth = self.family.worth([coldest], now)
            ours = slots.touched[slots.slab_of(column[coldest])]
            if worth is not None:
                ours = now - self.family.idle_s(coldest, now)
        others = (slab for slab, size in slots.slabs() if size != slot_bytes)
        for slab in heapq.nsmallest(SLABS_LOOKED_AT_MAX, others, key=slots.touched.__getitem__):
            if coldest is not None and worth is None and slots.touched[slab] >= ours:
                return 0
            residents = slots.residents(slab)
            if worth is not None:
                some = residents[:: 1 + len(residents) // SLAB_SAMPLE]
                theirs = self.family.worth(some, now) or 0.0
                if theirs > worth or (theirs == worth and slots.touched[slab] >= ours):
                    continue
            if not all(self._is_idle(tier, b) and self._may_leave(b, now) for b in residents):
                continue
            if not desperate and any(self.retention.keeps(b, now) for b in residents):
                continue
            unsaved = [
                b
                for b in residents
                if self.catalog.flags[b] & mask == due and self.worth_saving(b, now)
            ]
            if unsaved:
                self.unsaved += unsaved
                continue
            self.leave(tier, residents, "slab")
            return len(residents)
        return 0

    def _is_idle(self, tier: int, block: int) -> bool:
        flags = self.catalog.flags[block]
        return bool(flags & (READY if tier == DRAM else STORED)) and not flags & (IN_USE | DOOMED)
