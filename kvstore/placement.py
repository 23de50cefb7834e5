"""What moves between the tiers, and when: spills down, loads up, checks.

No I/O, threads, clock or randomness: orders go out, outcomes come back through `finished`.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from kvstore.admission import Admission
from kvstore.catalog import (
    DOOMED,
    FRESH,
    LOADING,
    READY,
    SPILLING,
    STORED,
    TWICE,
    WRITING,
)
from kvstore.eviction.base import Family
from kvstore.health import DeviceHealth
from kvstore.mirror import Mirror
from kvstore.orders import IndexPut, Move, MoveKind, Outcome
from kvstore.room import IN_USE, Room
from kvstore.scrub import Scrub
from kvstore.slots import Slots
from kvstore.types import DRAM, NVME

BACKLOG_MIN = 1_024  # no shorter one is looked through
DRAIN_TRIES = 16
SCARCE, ENOUGH = 1 / 16, 1 / 8  # shares of DRAM that are free: idle blocks leave between them
DEMOTED_MAX = 1_024  # in one go


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """Sizes and rules of one tenant's tiers.

    nvme_bytes 0 means that there is no NVMe tier, hbm_bytes has the size of each GPU's part, by the
    numbers that clients use. `write_budget` is in bytes per second, None for
    no bound. `spread` is the number of NVMe devices. `queue_depth` bounds spills under way. A
    device that has ended no move for `hang_s`, though some are under way, counts as failed. Blocks
    that were not asked for in `idle_s` make room before it is needed, 0: none do.
    """

    dram_bytes: int
    nvme_bytes: int
    slab_bytes: int
    write_policy: str = "through"
    write_budget: float | None = None
    spread: int = 1
    queue_depth: int = 32
    loads_max: int = 4_096
    hang_s: float = 10.0
    idle_s: float = 0.0
    hbm_bytes: tuple[int, ...] = ()


class Placement:
    """The blocks of one tenant over its tiers."""

    def __init__(self, config: PlacementConfig, family: Family) -> None:
        self.config = config
        self.write_policy = config.write_policy
        dram = Slots(config.dram_bytes, config.slab_bytes)
        nvme = Slots(config.nvme_bytes, config.slab_bytes, spread=config.spread)
        self.room = Room(dram, nvme, family, self._must_save)
        self.catalog = self.room.catalog
        self.counters = self.room.counters
        self.health = DeviceHealth(present=nvme.slab_count > 0)
        self.sequence = 0
        self.spills = 0  # moves under way
        self.loads = 0
        self.load_bytes_per_s = 0.0  # as seen while loads queue; 0 before the first
        # Gives up that many blocks that nobody completes, if there are; told by who knows them.
        self.reclaim: Callable[[int], bool] = lambda count: False
        self._last_load_end: float | None = None
        self._loaded_bytes = 0  # by loads that ended in the same moment as the last
        self._backlog: deque[int] = deque()
        self._slotless = 0  # tries in a row that found no slot on NVMe
        self._unaffordable = False  # whether the write budget holds back what is due
        self._again: list[int] = []  # could not be written; tried again at the next tick
        self.scrub = Scrub(self.room)
        self.mirror = Mirror(
            self.room, self.scrub, self._damaged, config.hbm_bytes, config.slab_bytes
        )
        self._admission = Admission(family)
        self.room.worth_saving = self._worth_saving
        self.room.savable = lambda: self.config.queue_depth - self.spills
        self._checks = 0  # moves that read NVMe slots in order to check them
        self._moved_at = 0.0  # when a move last ended, or the first of those under way began
        self._budget_at = 0.0
        self._budget = 0.0

    # -- DRAM ----------------------------------------------------------------------------------

    def take_dram(self, blocks: Sequence[int], now: float, *, force: bool = False) -> int:
        """Give leading blocks of one layout a DRAM slot each; returns how many got one.

        A block whose copy on NVMe is still due is spared, and its spill ordered, unless `force`:
        then it is lost. It is lost too when no copy is under way nor can be ordered, for want of
        write budget or of room on NVMe: waiting would bring nothing.
        """
        if not blocks:
            return 0
        entry = self.catalog.entry(blocks[0])
        got = self.room.take(DRAM, entry, blocks, now, force=force)
        unsaved, self.room.unsaved = self.room.unsaved, []
        self._save(unsaved, now)
        wanted = len(blocks) - got
        while got < len(blocks) and (force or not self.spills) and self.reclaim(wanted):
            got += self.room.take(DRAM, entry, blocks[got:], now, force=force)
            wanted *= 2  # those may have been of another slot size
        self.room.unsaved.clear()
        if got < len(blocks) and unsaved and not self.spills:
            got += self.room.take(DRAM, entry, blocks[got:], now, force=True)
        return got

    def protect(self, blocks: Iterable[int]) -> list[int]:
        """Pin those of a chain's blocks that are in DRAM: room for its tail is not made at the cost
        of its head. They are to be unpinned by the caller."""
        flags, pins = self.catalog.flags, self.catalog.pins
        held = [block for block in dict.fromkeys(blocks) if flags[block] & READY]
        for block in held:
            pins[block] += 1
        return held

    def give_up(self, held: list[int], *, patient: bool = False) -> bool:
        """Unpin the last quarter of protected blocks, of those that stay on NVMe; False when there
        is none: a head is not lost for its tail. `patient` is to wait, rather than take from
        further ahead, while the last quarter itself is still being saved."""
        flags = self.catalog.flags
        if patient and self.spills:
            tail = held[-max(1, len(held) // 4) :]
            if not all(flags[block] & STORED for block in tail):
                return False
        spare = [block for block in held if flags[block] & STORED] if self.health.ok else []
        if not spare:
            return False
        gone = spare[-max(1, len(spare) // 4) :]
        self.room.unpin(gone)
        kept = set(held).difference(gone)
        held[:] = [block for block in held if block in kept]
        return True

    def publish(self, blocks: Sequence[int], now: float) -> None:
        """The bytes of these blocks in DRAM are complete: they can be read from now on."""
        catalog = self.catalog
        writers = catalog.writers
        for block in blocks:
            catalog.flags[block] = catalog.flags[block] & ~(WRITING | LOADING) | READY
            self.room.orders.marks.add(catalog.dram[block])
            if writers:
                writers.pop(block, None)
        if blocks:
            slot_bytes = catalog.entry(blocks[0]).slot_bytes
            self.room.tell_later("admit", DRAM, slot_bytes, blocks, now)
            for slab in {self.room.dram.slab_of(catalog.dram[block]) for block in blocks}:
                self.room.dram.touched[slab] = now

    def store_through(self, blocks: Sequence[int]) -> None:
        """Queue the copies to NVMe that the write policy asks for when blocks are committed."""
        if self.write_policy == "through" and self.health.ok:
            self._backlog.extend(reversed(blocks))  # what is stored last is the last to leave
        else:
            self.scrub.later(blocks)

    def save_all(self, now: float) -> None:
        """Queue the copies of all that is in DRAM, coldest first."""
        self._slotless = 0
        if self.health.ok:
            for policy in self.room.policies(DRAM):
                self._backlog.extend(policy.residents())

    def touch(self, blocks: Sequence[int], now: float) -> None:
        """Blocks of one layout, in prefix order, were asked for."""
        catalog, entry = self.catalog, self.catalog.entry(blocks[0])
        self.room.policy(DRAM, entry.slot_bytes).touch(blocks, now)
        if self.room.nvme.slab_count:
            self.room.policy(NVME, entry.slot_bytes).touch(blocks, now)
        for slots, column in ((self.room.dram, catalog.dram), (self.room.nvme, catalog.nvme)):
            if slots.slab_count:
                for slab in {column[block] // slots.slab_pages for block in blocks}:
                    if slab < slots.slab_count:  # it has a place there
                        slots.touched[slab] = now
        if self.write_policy == "second-touch":
            flags = catalog.flags
            for block in reversed(blocks):
                if flags[block] & (READY | STORED) and not flags[block] & TWICE:
                    flags[block] |= TWICE
                    if flags[block] & (READY | STORED) == READY and self.health.ok:
                        self._backlog.append(block)

    def warm(self, blocks: Sequence[int], now: float) -> None:
        """Blocks that depend on these have come: those leave first."""
        slot_bytes = self.catalog.entry(blocks[0]).slot_bytes
        self.room.tell_later("warm", DRAM, slot_bytes, blocks, now)
        if self.room.nvme.slab_count:
            self.room.tell_later("warm", NVME, slot_bytes, blocks, now)

    def unwrite(self, blocks: Sequence[int]) -> None:
        """Blocks that were being written never will be: their slots are free."""
        for block in blocks:
            self.catalog.flags[block] &= ~WRITING
            self.catalog.writers.pop(block, None)
        self.room.free(DRAM, blocks)
        self.room.settle(blocks)
        self.room.orders.room = True

    # -- moves ---------------------------------------------------------------------------------

    def pump(self, now: float) -> None:
        """Order spills from the backlog, as far as queue and write budget allow; checks of blocks
        that were found after a restart."""
        self.scrub.go_on()
        flags, self._unaffordable = self.catalog.flags, False
        scarce = self.config.write_budget is not None
        while self._backlog and self.spills < self.config.queue_depth and self.health.ok:
            block = self._backlog[0]
            if not self._may_spill(block) or (scarce and not self._worth_saving(block, now)):
                self._backlog.popleft()
                continue
            if not self._afford(block, now):
                self._unaffordable = True
                return
            if not self._spill(block, now):
                self._backlog.rotate(-1)  # no slot for it now; each try looks at many blocks
                self._slotless += 1
                return
            self._slotless = 0
            self._backlog.popleft()
        due = len(self._backlog)
        if due > BACKLOG_MIN and due > 2 * self.room.resident(DRAM) + BACKLOG_MIN:
            once = dict.fromkeys(self._backlog)
            self._backlog = deque(b for b in once if flags[b] & (READY | STORED) == READY)

    @property
    def room_will_come(self) -> bool:
        """Whether moves are under way that keep blocks in DRAM until they end."""
        return self.spills > 0 or self.scrub.lazy > 0

    def drained(self, now: float) -> bool:
        """Whether nothing more will be written soon: nothing is due, or there is no write budget
        for it, or none of it got a slot on NVMe when it was tried last. Tries some of it."""
        for _ in range(DRAIN_TRIES):
            self.pump(now)
            over = self._unaffordable or self._slotless >= len(self._backlog)
            if self.spills or over:
                break
        return over and not self.spills

    def due(self) -> int:
        """Spills under way or waiting, at most: some may turn out to be needless."""
        return self.spills + len(self._backlog)

    def load(self, block: int, now: float, *, demand: bool) -> bool:
        """Order a stored block up into DRAM. False when there is no room for it."""
        catalog = self.catalog
        assert catalog.flags[block] & (READY | STORED | IN_USE) == STORED
        if self.loads >= self.config.loads_max:
            return False
        self.room.hold(block)  # making room must not evict what is to be loaded
        if not self.take_dram([block], now):
            self.room.unhold(block)
            return False
        catalog.flags[block] |= LOADING | (FRESH if demand else 0)
        self._begins(now)
        self.loads += 1
        self.room.order(MoveKind.LOAD if demand else MoveKind.PREFETCH, block)
        return True

    def verify(self, block: int, now: float) -> bool:
        """Order a check of a stored block's bytes on NVMe. False when it is gone or in use."""
        if self.room.held(block) or self.catalog.flags[block] & (STORED | DOOMED) != STORED:
            return False
        self._begins(now)
        self._checks += 1
        self.room.hold(block)
        self.room.order(MoveKind.VERIFY, block)
        return True

    def tick(self, now: float) -> None:
        """Time has passed: see whether the device hangs, go on with what a budget held back."""
        under_way = self.spills + self.loads + self._checks
        if under_way and self.health.ok and now - self._moved_at > self.config.hang_s:
            self.counters.nvme.failed += 1
            self.health.fence(now)
            self._backlog.clear()
        if self.health.ok:
            self._backlog.extend(self._again)
        self._again.clear()
        self._demote_idle(now)
        self.pump(now)
        self.scrub.tick()

    def finished(self, move: Move, outcome: Outcome, now: float) -> None:
        """A move has ended."""
        if move.kind in (MoveKind.PROVE, MoveKind.SUM):
            self.scrub.finished(move, outcome)
            self.room.orders.room = True
            return
        if move.kind is MoveKind.CLIMB:
            self.mirror.finished(move, outcome, now)
            return
        self._moved_at = now
        self._note_health(move, outcome, now)
        if move.kind is MoveKind.SPILL:
            self._spilled(move, outcome, now)
        elif move.kind in (MoveKind.LOAD, MoveKind.PREFETCH):
            self._loaded(move, outcome, now)
        elif move.kind is MoveKind.VERIFY:
            self._checks -= 1
            self.room.unhold(move.block)
            if outcome is Outcome.CORRUPT:
                self._damaged(move.block)
            self.room.reap([move.block])
        self.room.orders.room = True

    # -- inside --------------------------------------------------------------------------------

    def _begins(self, now: float) -> None:
        """A move is about to be ordered."""
        if not self.spills + self.loads + self._checks:
            self._moved_at = now

    def _save(self, blocks: Sequence[int], now: float) -> None:
        """Order spills of blocks that stand in the way, as far as queue and budget allow."""
        for block in blocks:
            if self.spills >= self.config.queue_depth:
                return
            if self._may_spill(block) and not (
                self._afford(block, now) and self._spill(block, now)
            ):
                return

    def _worth_saving(self, block: int, now: float) -> bool:
        """Whether a block that leaves DRAM is worth its write. Through, everything is, as far as
        the budget goes."""
        rate = self.config.write_budget
        if rate is None and self.write_policy != "on-evict":
            return True
        full = None
        if rate is not None:
            self._refill(now)
            full = self._budget / self._budget_most(rate)
        return self._admission.admits(block, now, self.room.nvme_stay_s, full)

    def _demote_idle(self, now: float) -> None:
        """Idle blocks leave DRAM while there still are free slots, so that there always are."""
        if not self.config.idle_s or not self.health.ok:
            return
        dram = self.room.dram
        for slot_bytes in self.room.slot_sizes(DRAM):
            capacity = dram.capacity(slot_bytes)
            if dram.free(slot_bytes) > capacity * SCARCE:
                continue
            count = min(DEMOTED_MAX, int(capacity * ENOUGH) - dram.free(slot_bytes))
            if count > 0:
                self.room.demote(slot_bytes, count, now, self.config.idle_s)
                unsaved, self.room.unsaved = self.room.unsaved, []
                self._save(unsaved, now)

    def _may_spill(self, block: int) -> bool:
        """Whether there is something to copy; blocks in a queue may have changed since."""
        flags = self.catalog.flags[block]
        mask, due = self._must_save()
        return flags & (READY | STORED | SPILLING | DOOMED) == READY and flags & mask == due

    def _afford(self, block: int, now: float) -> bool:
        """Whether the write budget has the block's bytes. They are taken when it is spilled."""
        rate = self.config.write_budget
        if rate is None:
            return True
        self._refill(now)
        return self._budget >= self.catalog.entry(block).slot_bytes

    def _budget_most(self, rate: float) -> float:
        """A minute's worth may be saved up, and any one block can be paid for."""
        return max(rate * 60.0, float(self.config.slab_bytes))

    def _refill(self, now: float) -> None:
        rate = self.config.write_budget or 0.0
        fresh = self._budget + (now - self._budget_at) * rate
        self._budget = min(self._budget_most(rate), fresh)
        self._budget_at = now

    def _must_save(self) -> tuple[int, int]:
        """Which blocks in DRAM are to be copied to NVMe before they may leave: a mask of flags,
        and what they are under it."""
        if not self.health.ok:
            return 0, 1  # none
        return (STORED | TWICE, TWICE) if self.write_policy == "second-touch" else (STORED, 0)

    def _spill(self, block: int, now: float) -> bool:
        catalog, entry = self.catalog, self.catalog.entry(block)
        if not self.room.take(NVME, entry, [block], now, force=True):
            return False
        if self.config.write_budget is not None:
            self._budget -= entry.slot_bytes
        catalog.flags[block] |= SPILLING
        catalog.pins[block] += 1
        self._begins(now)
        self.spills += 1
        # Whatever the index says of this slot is over.
        self.room.orders.index[catalog.nvme[block]] = None
        self.room.order(MoveKind.SPILL, block)
        return True

    def _spilled(self, move: Move, outcome: Outcome, now: float) -> None:
        catalog, block = self.catalog, move.block
        entry = catalog.entry(block)
        self.spills -= 1
        catalog.flags[block] &= ~SPILLING
        catalog.pins[block] -= 1
        counters = self.counters.nvme
        if outcome is Outcome.DONE:
            counters.spilled += 1
            counters.written_bytes += entry.layout.block_bytes
        if catalog.flags[block] & DOOMED:
            self.room.reap([block])
            return
        if outcome is not Outcome.DONE:
            self.room.free(NVME, [block], shunned=outcome is Outcome.FAILED)
            if outcome is Outcome.FAILED:
                self._again.append(block)
            else:  # what was to be written is not what was committed
                self.scrub.spoilt(block)
            return
        assert move.sums is not None
        self.scrub.proved(block)
        catalog.flags[block] |= STORED
        catalog.sums[block] = move.sums
        self.room.policy(NVME, entry.slot_bytes).admit([block], now)
        self.room.nvme.touched[self.room.nvme.slab_of(catalog.nvme[block])] = now
        self.sequence += 1
        self.room.orders.index[catalog.nvme[block]] = IndexPut(
            entry, self.sequence, move.key, move.sums
        )
        self.room.orders.marks.add(catalog.dram[block])

    def _loaded(self, move: Move, outcome: Outcome, now: float) -> None:
        catalog, block = self.catalog, move.block
        entry = catalog.entry(block)
        self.loads -= 1
        self.room.unhold(block)
        catalog.flags[block] &= ~LOADING
        if outcome is Outcome.DONE:
            self.counters.nvme.read_bytes += entry.layout.block_bytes
            self.counters.nvme.promoted += 1
            self.counters.nvme.latency.record(move.seconds)
            self._note_load_rate(entry.layout.block_bytes, now)
        if catalog.flags[block] & DOOMED:
            self.room.reap([block])
            return
        if outcome is Outcome.DONE:
            self.publish([block], now)
            return
        catalog.flags[block] &= ~FRESH
        self.room.free(DRAM, [block])
        if outcome is Outcome.CORRUPT:
            self._damaged(block)

    def _damaged(self, block: int) -> None:
        """A read of the block's NVMe slot found other bytes. While a second one is under way the
        slot stays: what that one finds decides."""
        self.counters.nvme.corrupt += 1
        if self.catalog.flags[block] & STORED and not self.room.held(block):
            self.room.leave(NVME, [block], "corrupt")

    def _note_load_rate(self, size: int, now: float) -> None:
        """Bytes per second between loads that end one after the other without a pause. Of loads
        that are reported in the same moment, all but one count towards the next interval."""
        if self._last_load_end is not None:
            self._loaded_bytes += size
            if now > self._last_load_end:
                rate = self._loaded_bytes / (now - self._last_load_end)
                old = self.load_bytes_per_s
                self.load_bytes_per_s = rate if not old else old + 0.05 * (rate - old)
                self._loaded_bytes = 0
        if not self.loads:
            self._loaded_bytes = 0
        self._last_load_end = now if self.loads else None

    def _note_health(self, move: Move, outcome: Outcome, now: float) -> None:
        was_ok = self.health.ok
        if outcome is Outcome.FAILED:
            self.counters.nvme.failed += 1
            self.health.failed(now, probe=move.kind is MoveKind.PROBE)
            if not self.health.ok:
                self._backlog.clear()
        elif not (move.kind is MoveKind.SPILL and outcome is Outcome.CORRUPT):
            self.health.worked()
        if self.health.ok and not was_ok and self.write_policy == "through":
            self.save_all(now)
