"""Slots that a client may write to before it says what it stores there. Part of the brain.

Who stores a single block waits for two answers: where to write it, and that it is stored. With a
slot at hand it need not wait for the first: it asks, copies meanwhile, and finds the answer there.
A lent slot is a write lease of one row that nobody finds. It is made ready after a reserve has been
answered, lent by the commit that follows, and taken by the next reserve.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvstore.catalog import DOOMED, NOWHERE, WRITING, LayoutEntry
from kvstore.leases import ReadLease, Session, Sessions, WriteLease
from kvstore.limits import Limits
from kvstore.placement import Placement
from kvstore.types import DRAM

NAME = b"lent"  # no client's key is as short
PART = 256  # lent slots are no larger part of DRAM


class Lending:
    """Of one tenant. `rows` are lent, or ready to be."""

    def __init__(self, placement: Placement, sessions: Sessions) -> None:
        self.rows: set[int] = set()
        self.part = PART
        self._placement = placement
        self._sessions = sessions
        self._due: list[WriteLease] = []

    def later(self, lease: WriteLease) -> None:
        """The commit of this lease is to lend a slot, if one can be had by then."""
        self._due.append(lease)

    def go_on(self, limits: Limits, now: float) -> None:
        """Have slots ready; done after answering."""
        if not self._due:
            return
        due, self._due = self._due, []
        for lease in due:
            session = self._sessions.get(lease.session.number)
            if session is not None and session.leases.get(lease.number) is lease:
                lease.spare = self._lend(session, lease.entry, limits, now)

    def usable(self, session: Session, entry: LayoutEntry, number: int) -> WriteLease | None:
        """The lease of a lent slot, if it is this session's and of this layout."""
        lease = session.leases.get(number)
        if isinstance(lease, WriteLease) and lease.entry is entry and self.is_lent(lease):
            return lease
        return None

    def is_lent(self, lease: ReadLease | WriteLease) -> bool:
        """Whether this is a lease of a lent slot."""
        return bool(self.rows) and not self.rows.isdisjoint(lease.blocks)

    def seat(self, lease: WriteLease, block: int) -> None:
        """A new block has the lent slot from now on; the lease is over."""
        catalog, (row,) = self._placement.catalog, lease.blocks
        page = catalog.dram[row]  # the slot table says already that it is being written
        self._placement.room.dram.reseat(page, block)
        catalog.dram[block], catalog.dram[row] = page, NOWHERE
        del lease.session.leases[lease.number], catalog.writers[row]
        self.rows.remove(row)
        catalog.drop([row])

    def over(self, blocks: Iterable[int]) -> None:
        """Nobody writes these any more."""
        if self.rows:
            self.rows.difference_update(blocks)

    def _lend(
        self, session: Session, entry: LayoutEntry, limits: Limits, now: float
    ) -> WriteLease | None:
        """Nothing is given up for it that a new block might not be worth, or that would be lost."""
        placement, catalog, slot_bytes = self._placement, self._placement.catalog, entry.slot_bytes
        room = placement.room
        if (
            (len(self.rows) + 1) * self.part > room.dram.capacity(slot_bytes)
            or len(session.leases) * 2 > limits.leases_per_session
            or session.credit.bytes < slot_bytes
            or not (room.dram.free(slot_bytes) or placement.health.ok)
        ):
            return None
        row = catalog.add(entry, NAME)
        catalog.hide([row])
        catalog.flags[row] = WRITING | DOOMED
        got = room.take(DRAM, entry, [row], now, force=False)
        unsaved, room.unsaved = room.unsaved, []
        placement.save(unsaved, now)
        if not got:
            catalog.drop([row])
            return None
        catalog.writers[row] = session.number
        session.credit.bytes -= slot_bytes
        self.rows.add(row)
        lease = WriteLease(self._sessions.next_number(), session, entry, [row], None)
        session.leases[lease.number] = lease
        return lease
