"""How blocks come in: reserve, commit, abort, also shard by shard. Part of the brain."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kvstore.catalog import DOOMED, LOADING, READY, STORED, WRITING, LayoutEntry
from kvstore.errors import LimitExceeded
from kvstore.leases import Session, Sessions, WriteLease
from kvstore.placement import Placement

NEW, PRESENT, REFUSED = 0, 1, 2  # the answer for each key, as on the wire


@dataclasses.dataclass(slots=True)
class Reserved:
    """The outcome of reserve: for each key a status, and for each new one the page of its slot.

    `present` are the blocks that were there. `waiting` says that nothing was to be had but room
    will come: park the request and try again.
    """

    status: bytes
    pages: list[int]
    present: list[int]
    lease: WriteLease | None
    waiting: bool


class _Parts:
    """Shards of one block that is written shard by shard: claimed by a lease, and done."""

    __slots__ = ("claimed", "done")

    def __init__(self) -> None:
        self.claimed = 0
        self.done = 0


class Writes:
    """Write leases of one tenant."""

    def __init__(self, placement: Placement, sessions: Sessions) -> None:
        self.placement = placement
        self.catalog = placement.catalog
        self.counters = placement.counters
        self.sessions = sessions
        self._parts: dict[int, _Parts] = {}
        self._idle_parts: dict[int, None] = {}  # of them, those that no lease works on

    def reserve(
        self,
        session: Session,
        entry: LayoutEntry,
        keys: Sequence[bytes],
        now: float,
        *,
        shard: int | None = None,
        force: bool = False,
    ) -> Reserved:
        """Slots for those keys that are not here. Each new key is then being written by the caller.

        With `shard`, a block that others are writing shard by shard is joined. With `force`, blocks
        whose copy on NVMe is still due may be lost to make room.
        """
        status = bytearray(len(keys))
        claimed, fresh, present = self._sort_keys(entry, keys, shard, status)
        if (claimed or fresh) and self.sessions.full(session):
            raise LimitExceeded(
                f"this session holds {len(session.leases)} leases, the most that "
                "limits.leases_per_session allows: commit, abort or release some"
            )
        blocks = self._rows(entry, [keys[at] for at in fresh])
        got = self._take(entry, blocks, now, force)
        for at in fresh[got:]:
            status[at] = REFUSED
        flags = self.catalog.flags
        for block in blocks[:got]:
            flags[block] |= WRITING
        self._unrow(blocks[got:])
        waiting = bool(fresh) and not got and not claimed and self.placement.spills > 0
        granted = blocks[:got]
        if shard is not None:
            places = sorted(claimed + fresh[:got])
            granted = self._claim([entry.index[keys[at]] for at in places], shard)
        lease = None
        if granted:
            lease = WriteLease(self.sessions.next_number(), session, entry, granted, shard)
            session.leases[lease.number] = lease
        pages = [self.catalog.dram[block] for block in granted]
        return Reserved(bytes(status), pages, present, lease, waiting)

    def commit(self, session: Session, number: int, now: float) -> int | None:
        """The lease's bytes are complete: blocks all of whose shards are become visible.

        Returns how many keys of the lease were stored, None when there is no such lease.
        """
        lease = session.leases.get(number)
        if not isinstance(lease, WriteLease):
            return None
        del session.leases[number]
        complete = lease.blocks if lease.shard is None else self._shard_done(lease)
        flags = self.catalog.flags
        good = [block for block in complete if not flags[block] & DOOMED]
        if len(good) < len(complete):
            self.placement.unwrite(block for block in complete if flags[block] & DOOMED)
        self.placement.publish(good, now)
        self.placement.store_through(b for b in good if not flags[b] & STORED)
        self.placement.pump(now)
        self.counters.stored += len(good)
        self.counters.dram.written_bytes += len(good) * lease.entry.layout.block_bytes
        return len(lease.blocks) - (len(complete) - len(good))

    def abort(self, session: Session, number: int, now: float) -> bool:
        """The lease's blocks will not be written, and nobody writes them any more."""
        lease = session.leases.get(number)
        if not isinstance(lease, WriteLease):
            return False
        del session.leases[number]
        self.counters.aborted += len(lease.blocks)
        self.placement.unwrite(self.abandon(lease))
        self.placement.room.orders.room = True
        return True

    def abandon(self, lease: WriteLease) -> list[int]:
        """End a write lease; returns the blocks that nobody writes or completes any more."""
        if lease.shard is None:
            return lease.blocks
        left = []
        for block in lease.blocks:
            parts = self._parts[block]
            parts.claimed &= ~(1 << lease.shard)
            if parts.claimed:
                continue
            if parts.done:
                self._idle_parts[block] = None
            else:
                del self._parts[block]
                left.append(block)
        return left

    def _sort_keys(
        self, entry: LayoutEntry, keys: Sequence[bytes], shard: int | None, status: bytearray
    ) -> tuple[list[int], list[int], list[int]]:
        """Places in the list of keys that can be claimed shard-wise, of keys that are new, and the
        blocks of those present, whose status is filled in."""
        get, flags = entry.index.get, self.catalog.flags
        here = READY | WRITING | LOADING | (STORED if self.placement.health.ok else 0)
        claimed: list[int] = []
        fresh: list[int] = []
        present: list[int] = []
        for at, key in enumerate(keys):
            block = get(key)
            if block is None or not flags[block] & here:
                fresh.append(at)
                continue
            parts = self._parts.get(block) if shard is not None else None
            if parts is not None and not (parts.claimed | parts.done) >> (shard or 0) & 1:
                claimed.append(at)
                continue
            status[at] = PRESENT
            present.append(block)
        return claimed, fresh, present

    def _rows(self, entry: LayoutEntry, keys: list[bytes]) -> list[int]:
        """Rows for new keys; a block that is on a fenced device keeps the row that it has."""
        get, add = entry.index.get, self.catalog.add
        return [get(key, -1) if key in entry.index else add(entry, key) for key in keys]

    def _unrow(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if not self.catalog.flags[block]:
                self.catalog.drop(block)

    def _take(self, entry: LayoutEntry, blocks: list[int], now: float, force: bool) -> int:
        got = self.placement.take_dram(blocks, now, force=force)
        while got < len(blocks) and self._idle_parts:
            stale = next(iter(self._idle_parts))  # shards that nobody completed go before refusing
            del self._idle_parts[stale], self._parts[stale]
            self.placement.unwrite([stale])
            got += self.placement.take_dram(blocks[got:], now, force=force)
        return got

    def _claim(self, blocks: list[int], shard: int) -> list[int]:
        """The lease writes this shard of these blocks."""
        for block in blocks:
            self._parts.setdefault(block, _Parts()).claimed |= 1 << shard
            self._idle_parts.pop(block, None)
        return blocks

    def _shard_done(self, lease: WriteLease) -> list[int]:
        """Mark the lease's shard; returns the blocks that are complete now."""
        complete = []
        every = (1 << lease.entry.layout.shards) - 1
        for block in lease.blocks:
            parts = self._parts[block]
            parts.claimed &= ~(1 << (lease.shard or 0))
            parts.done |= 1 << (lease.shard or 0)
            if parts.done == every:
                del self._parts[block]
                complete.append(block)
            elif not parts.claimed:
                self._idle_parts[block] = None
        return complete
