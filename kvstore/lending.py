"""Slots that a client may write to before it says what it stores there. Part of the brain.

Who stores a single block waits for two answers: where to write it, and that it is stored. With a
slot at hand it need not wait for the first: it asks, copies meanwhile, and finds the answer there.

A lent slot is that of a row which nobody finds, under a write lease that is kept apart from those
of blocks. One is made ready for a session after a reserve has been answered, lent by the commit
that follows, and taken by the next reserve.
"""

from __future__ import annotations

from kvstore.catalog import DOOMED, NOWHERE, WRITING, LayoutEntry
from kvstore.leases import Session, Sessions, WriteLease
from kvstore.placement import Placement
from kvstore.types import DRAM

NAME = b"lent"  # no client's key is as short
PART, SLABS_PART = 256, 8  # of the slots, and the slabs, one in so many may be lent, or have such


class Lending:
    """Of one tenant. `rows` are lent to living sessions, or ready to be; one for each at most."""

    def __init__(self, placement: Placement, sessions: Sessions) -> None:
        self.rows: set[int] = set()
        self.part, self.slabs_part = PART, SLABS_PART
        self._placement = placement
        self._sessions = sessions
        self._due: list[WriteLease] = []

    def later(self, lease: WriteLease) -> None:
        """The commit of this lease is to lend a slot, if one can be had by then."""
        lease.lends = True
        self._due.append(lease)

    def go_on(self, now: float) -> None:
        """Have slots ready; done after answering."""
        if not self._due:
            return
        due, self._due = self._due, []
        for lease in due:
            session = self._sessions.get(lease.session.number)
            if session is not None and session.leases.get(lease.number) is lease:
                self._prepare(session, lease.entry, now)

    def lend(self, session: Session, entry: LayoutEntry) -> tuple[int, int]:
        """Lease and page of a slot for this session; 0, 0 when none is ready."""
        lease = session.ready
        if lease is None or lease.entry is not entry:
            return 0, 0
        session.ready = None
        session.lent[lease.number] = lease
        return lease.number, self._placement.catalog.dram[lease.blocks[0]]

    def usable(self, session: Session, entry: LayoutEntry, number: int) -> WriteLease | None:
        """The lease of a slot that was lent to this session for blocks of this layout."""
        lease = session.lent.get(number)
        return lease if lease is not None and lease.entry is entry else None

    def seat(self, lease: WriteLease | None, blocks: list[int]) -> int:
        """The first of new blocks gets the lent slot, if there are both; then the lease is over.
        How many got one."""
        if lease is None or not blocks:
            return 0
        catalog, block, (row,) = self._placement.catalog, blocks[0], lease.blocks
        page = catalog.dram[row]  # the slot table says already that it is being written
        self._placement.room.dram.reseat(page, block)
        catalog.dram[block], catalog.dram[row] = page, NOWHERE
        del lease.session.lent[lease.number], catalog.writers[row]
        self.rows.remove(row)
        catalog.drop([row])
        return 1

    def give_back(self, session: Session, number: int) -> bool:
        """Nobody writes a lent slot any more; False when there is none of that number."""
        lease = session.lent.pop(number, None)
        if lease is not None:
            self._free(lease)
        return lease is not None

    def gone(self, session: Session) -> None:
        """A session has ended. What it was lent its processes may still write."""
        for lease in session.lent.values():
            self.rows.difference_update(lease.blocks)
        if session.ready is not None:
            self._free(session.ready)
            session.ready = None

    def check(self) -> None:
        """Asserts that each row is one session's. For tests."""
        lent = [lease for session in self._sessions for lease in session.lent.values()]
        ready = [session.ready for session in self._sessions if session.ready is not None]
        assert self.rows == {block for lease in lent + ready for block in lease.blocks}
        assert len(self.rows) == len(lent) + len(ready)
        flags = self._placement.catalog.flags
        assert all(flags[row] == WRITING | DOOMED for row in self.rows)

    # -- inside --------------------------------------------------------------------------------

    def _free(self, lease: WriteLease) -> None:
        self.rows.difference_update(lease.blocks)
        self._placement.unwrite(lease.blocks)

    def _prepare(self, session: Session, entry: LayoutEntry, now: float) -> None:
        """Have a slot ready for this session, if it has none."""
        ready = session.ready
        if session.lent or (ready is not None and ready.entry is entry):
            return
        if ready is not None:
            session.ready = None
            self._free(ready)
        room, catalog, more = self._placement.room, self._placement.catalog, len(self.rows) + 1
        if (
            more * self.part > room.dram.capacity(entry.slot_bytes)
            or more * self.slabs_part > room.dram.slab_count
            or not (room.dram.free(entry.slot_bytes) or self._make_free(entry, now))
        ):
            return
        row = catalog.add(entry, NAME)
        catalog.hide([row])
        catalog.flags[row] = WRITING | DOOMED
        catalog.writers[row] = session.number
        taken = room.take(DRAM, entry, [row], now, force=False)
        assert taken == 1, "a slot was free"
        self.rows.add(row)
        number = self._sessions.next_number()
        session.ready = WriteLease(number, session, entry, [row], None)

    def _make_free(self, entry: LayoutEntry, now: float) -> bool:
        """For a block that is only perhaps to come nothing leaves but what is worth least, and that
        only if it stays on NVMe."""
        return self._placement.health.ok and self._placement.room.leave_stored(
            entry.slot_bytes, now
        )
