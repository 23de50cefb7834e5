"""The brain of one tenant: it decides and does nothing else.

No I/O, threads, clock or randomness: what happened comes in as calls (`now`, in seconds, is an
argument), what is to be done goes out as `Orders`. One thread calls it. Bytes are never touched.

    reserve -> commit | abort       new blocks: a write lease on free slots, then visible, or gone
    acquire -> release              resident blocks: a read lease on the longest prefix to be had
    finished                        a move has ended
    tick                            time has passed
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvstore.catalog import (
    DOOMED,
    LOADING,
    NOWHERE,
    READY,
    SPILLING,
    STORED,
    UNPROVEN,
    WRITING,
    LayoutEntry,
)
from kvstore.checksums import digest
from kvstore.errors import InvalidLayout, LimitExceeded
from kvstore.eviction.base import Family
from kvstore.holdings import Holdings
from kvstore.learning import Learning
from kvstore.leases import ReadLease, Session, Sessions, WriteLease
from kvstore.limits import Limits
from kvstore.orders import Move, MoveKind, Orders, Outcome
from kvstore.placement import Placement, PlacementConfig
from kvstore.reads import Reads
from kvstore.slots import NOBODY
from kvstore.types import DRAM, NVME, Layout
from kvstore.worth import Worth
from kvstore.writes import Writes


class Store:
    """One tenant's blocks, sessions and leases."""

    def __init__(self, config: PlacementConfig, limits: Limits, family: Family) -> None:
        self.placement = Placement(config, family)
        self.room = self.placement.room
        self.catalog = self.placement.catalog
        self.counters = self.placement.counters
        self.sessions = Sessions()
        self.holdings = Holdings(limits, self.sessions, self.placement, self.counters.limited)
        self._learning = Learning(self.placement)
        self.observers = self._learning.observers
        self.worth = Worth(self.room.dram.capacity_bytes, self.room.nvme.capacity_bytes)
        self.observers.append(self.worth.observe)
        note = self._learning.note
        self._reads = Reads(self.placement, self.sessions, self.holdings, note)
        self._writes = Writes(self.placement, self.sessions, self.holdings, self._learning)
        self.lending = self._writes.lending
        self.commit = self._writes.commit
        self.reserve = self._writes.reserve
        self.abort = self._writes.abort
        self.lend = self._writes.lend
        self.acquire = self._reads.acquire
        self.release = self._reads.release
        self.used = self._reads.used
        self.cut = self._reads.cut

    @property
    def limits(self) -> Limits:
        """Bounds of the tenant and its sessions."""
        return self.holdings.limits

    # -- sessions and layouts ------------------------------------------------------------------

    def attach(self, name: str) -> Session:
        """A client has connected."""
        if len(self.sessions) >= self.limits.sessions:
            raise LimitExceeded(
                f"{len(self.sessions)} clients are connected, the most that limits.sessions "
                "allows: close some, or raise it"
            )
        return self.sessions.attach(name)

    def detach(self, session: Session, now: float) -> list[int]:
        """A client has gone. Its read leases end; returns the blocks that it was writing, whose
        slots stay as they are until `unquarantine`: its processes may still write."""
        leases = self.sessions.detach(session)
        self.lending.gone(session)
        for lease in leases:
            if isinstance(lease, ReadLease):
                self._reads.end(lease)
        quarantined = self._writes.quarantine(
            lease for lease in leases if isinstance(lease, WriteLease)
        )
        self.counters.quarantined += len(quarantined)
        return quarantined

    def unquarantine(self, blocks: Sequence[int], now: float) -> None:
        """Nobody can write these blocks, as one `detach` returned them, any more."""
        self.counters.quarantined -= len(blocks)
        self._writes.unquarantine(blocks)

    def open(self, layout: Layout) -> LayoutEntry:
        """The entry of a layout. Raises InvalidLayout or LimitExceeded where it cannot be had."""
        dram = self.room.dram
        if not dram.fits(layout.slot_bytes):
            raise InvalidLayout(
                f"a block of layout {layout.model!r} takes {layout.slot_bytes} bytes, a slab of "
                f"this daemon holds {dram.slab_bytes if dram.slab_count else 0}: raise "
                "dram.slab_size (and dram.size), or use fewer tokens per block"
            )
        known = len(self.catalog.layouts)
        if known >= self.limits.layouts and all(e.layout != layout for e in self.catalog.layouts):
            raise LimitExceeded(
                f"{known} layouts are open, the most that limits.layouts allows: use those, or "
                "raise it"
            )
        return self.catalog.open(layout)

    # -- asking --------------------------------------------------------------------------------

    def lookup(self, entry: LayoutEntry, keys: Sequence[bytes]) -> bytes:
        """The tier of each block of the longest resident prefix. Changes nothing."""
        flags, get = self.catalog.flags, entry.index.get
        stored = STORED if self.placement.health.ok else 0
        tiers = bytearray()
        for key in keys:
            block = get(key)
            if block is None or not flags[block] & (READY | stored) or flags[block] & WRITING:
                break  # while a client writes it anew, its copy on NVMe cannot be loaded
            tiers.append(DRAM if flags[block] & READY else NVME)
        return bytes(tiers)

    def prefetch(self, entry: LayoutEntry, keys: Sequence[bytes], now: float) -> int:
        """Order the stored blocks of the longest resident prefix up; returns how many."""
        flags, pins, ordered = self.catalog.flags, self.catalog.pins, 0
        prefix: list[int] = []
        for key in keys:
            block = entry.index.get(key)
            if block is None or not flags[block] & (READY | STORED):
                break
            pins[block] += 1  # the tail must not push the head out
            prefix.append(block)
            if flags[block] & (READY | LOADING | WRITING):
                continue
            if not self.placement.health.ok or not self.placement.load(block, now, demand=False):
                break
            ordered += 1
        self.room.unpin(prefix)
        return ordered

    # -- keeping and dropping ------------------------------------------------------------------

    def retain(
        self, entry: LayoutEntry, keys: Sequence[bytes], priority: int, until: float | None
    ) -> int:
        """Keep resident blocks from eviction; returns how many are kept."""
        found = self._somewhere(map(entry.index.get, keys))
        return sum(self.room.retention.retain(block, priority, until) for block in found)

    def forget(self, entry: LayoutEntry, keys: Sequence[bytes]) -> int:
        """Drop blocks from all tiers; returns how many were there."""
        found = self._somewhere(map(entry.index.get, keys))
        self._drop(found, "forgotten")
        return len(found)

    def clear(self, rows: range) -> int:
        """Drop the blocks in these rows of the catalog, and remember nothing of what was there;
        returns how many there were."""
        flags, layout = self.catalog.flags, self.catalog.layout
        found: dict[int, list[int]] = {}
        for row in rows:
            if flags[row] and not flags[row] & DOOMED:
                found.setdefault(layout[row], []).append(row)
        self.catalog.forget_ghosts_among(rows)
        for blocks in found.values():
            self._drop(blocks, "cleared")
        return sum(map(len, found.values()))

    def _somewhere(self, rows: Iterable[int | None]) -> list[int]:
        flags = self.catalog.flags
        return [block for block in rows if block is not None and flags[block]]

    def _drop(self, blocks: list[int], reason: str) -> None:
        self.room.doom(blocks, reason)
        self._writes.give_up_idle(blocks)

    # -- what happened -------------------------------------------------------------------------

    def finished(self, move: Move, outcome: Outcome, now: float) -> None:
        """A move has ended, `move.seconds` after it was ordered."""
        was_ok = self.placement.health.ok
        self._reads.finished(move, outcome, now)
        if was_ok and not self.placement.health.ok:
            self._reads.give_up_loads()

    def digest(self, now: float, most: int | None = None) -> int:
        """Tell the policies of accesses since the last time, of `most` at once; done after
        answering, never before. Returns of how many they have not been told."""
        self.room.tell()
        if self._learning.digest(now, most):
            self.placement.pump(now)
        self.lending.go_on(now)
        return self.undigested

    @property
    def undigested(self) -> int:
        """Accesses of which the policies have not been told."""
        return len(self._learning.notes)

    @property
    def behind(self) -> bool:
        """Whether those are so many that some had better be told now."""
        return self._learning.behind

    def tick(self, now: float) -> None:
        """Time has passed: probe what is fenced, go on with what a budget held back."""
        if self.placement.health.take_probe(now):
            self.room.orders.moves.append(Move(MoveKind.PROBE, 0, None, b"", 0, 0))
        self.room.retention.expire(now)
        was_ok = self.placement.health.ok
        self.placement.tick(now)
        if was_ok and not self.placement.health.ok:
            self._reads.give_up_loads()

    def save_all(self, now: float) -> None:
        """The daemon is about to stop: queue every copy that is due."""
        if self.placement.write_policy != "second-touch":
            self.placement.save_all(now)

    def take_orders(self) -> Orders:
        """What is to be done since the last call."""
        orders = self.room.orders
        self.room.orders = Orders()
        return orders

    def adopt(
        self, layout: Layout, keys: list[bytes], offsets: list[int], sums: list[bytes], now: float
    ) -> int:
        """Blocks found on NVMe after a restart, oldest first; returns how many could be seated."""
        entry = self.catalog.open(layout)
        slots = self.room.nvme
        rows = self.catalog.load(entry, keys, offsets, sums)
        pages = self.catalog.nvme[len(self.catalog.nvme) - len(rows) :]
        seated = slots.adopt(pages, entry.slot_bytes, rows)
        good = [row for row, ok in zip(rows, seated, strict=True) if ok]
        # Admitted in prefix order the last is coldest; here the first, the oldest, is to be.
        self.room.policy(NVME, entry.slot_bytes).admit(good[::-1], now)
        if len(good) < len(rows):
            bad = [row for row, ok in zip(rows, seated, strict=True) if not ok]
            for row in bad:
                page = self.catalog.nvme[row]
                if slots.owner(page) == NOBODY:  # else the record is that of who sits there
                    self.room.orders.index[page] = None
                self.catalog.nvme[row], self.catalog.sums[row] = NOWHERE, None
            self.catalog.hide(bad)
            self.catalog.drop(bad)
        return len(good)

    def adopt_dram(
        self,
        entry: LayoutEntry,
        keys: Sequence[bytes],
        pages: Sequence[int],
        proofs: Sequence[int],
        now: float,
    ) -> int:
        """Committed blocks found in DRAM after a restart, coldest first; returns how many could be
        seated. Those with a proof (see `checksums.digest`) are checked before they are read."""
        catalog, flags = self.catalog, self.catalog.flags
        found = dict(zip(keys, zip(pages, proofs, strict=True), strict=True))
        rows = [
            catalog.add(entry, key) if (row := entry.index.get(key)) is None else row
            for key in found
        ]
        places = [page for page, _ in found.values()]
        seated = self.room.dram.adopt(places, entry.slot_bytes, rows)
        good: list[int] = []
        wrong = set(pages)  # their records: nobody is seated there
        for row, (page, proof), ok in zip(rows, found.values(), seated, strict=True):
            assert catalog.dram[row] == NOWHERE and not flags[row] & READY
            if ok:
                catalog.dram[row] = page
                self._found(row, proof)
                good.append(row)
                wrong.remove(page)
            elif not flags[row]:
                catalog.hide([row])
                catalog.drop([row])
        self.room.orders.marks |= wrong
        good.reverse()
        self.room.policy(DRAM, entry.slot_bytes).admit(good, now)
        self.placement.scrub.adopted(row for row in good if flags[row] & UNPROVEN)
        self.placement.store_through([row for row in reversed(good) if not flags[row] & STORED])
        return len(good)

    def _found(self, block: int, proof: int) -> None:
        """The bytes of a block have been found in DRAM. Its copy on NVMe, where there is one, is
        kept when it is known to be the same."""
        catalog = self.catalog
        stored = catalog.flags[block] & STORED
        catalog.flags[block] |= READY
        if stored and not (proof and digest(catalog.sums[block] or b"") == proof):
            self.room.leave(NVME, [block], "replaced")
        if proof:
            catalog.flags[block] |= UNPROVEN
            catalog.proofs[block] = proof

    def adopt_writing(self, entry: LayoutEntry, page: int, writer: int) -> int | None:
        """A slot that was being written when an earlier daemon died: nobody gets it before
        `unquarantine` of the block that is returned. None when it cannot be seated."""
        catalog = self.catalog
        block = catalog.add(entry, page.to_bytes(4, "little"))  # no client's key is as short
        catalog.hide([block])
        if not self.room.dram.adopt([page], entry.slot_bytes, [block])[0]:
            catalog.drop([block])
            return None
        catalog.dram[block] = page
        catalog.flags[block] = WRITING | DOOMED
        catalog.writers[block] = writer
        self.counters.quarantined += 1
        return block

    def check(self) -> None:
        """Asserts what must hold between calls. For tests: it looks at everything."""
        self.room.check()
        self.placement.mirror.check()
        self.lending.check()
        pins = [0] * len(self.catalog.keys)
        writing: set[int] = set()
        for session in self.sessions:
            for lease in session.leases.values():
                if isinstance(lease, ReadLease):
                    for block in lease.blocks:
                        pins[block] += 1
                else:
                    for block in lease.blocks:
                        assert self.catalog.flags[block] & WRITING
                        assert lease.shard is not None or block not in writing
                        writing.add(block)
        for block, flags in enumerate(self.catalog.flags):
            moves = (1 if flags & SPILLING else 0) + self.placement.scrub.count(block)
            moves += self.placement.mirror.pinned()[block]
            assert self.catalog.pins[block] == pins[block] + moves, f"pins of block {block}"
        assert self.counters.asked == self.counters.hit + self.counters.miss
