"""What the sessions of one tenant hold of its arena, and how much more they may. Part of the brain.

Blocks under read leases keep their places, and slots under write leases are nobody else's: a client
that never let go would take the whole arena out of use. Counted are bytes of slots, once for each
block, however many leases of the session (or sessions of the tenant) are on it.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from kvstore.catalog import SPILLING, WRITING, Catalog, LayoutEntry
from kvstore.errors import LimitExceeded
from kvstore.leases import Session, Sessions
from kvstore.limits import Credit, Limits

PLACES_MAX = 1 << 20  # in all lists of leased blocks of a session, at 8 bytes each
# Who holds as much as it may is counted anew again and again, for a tenth of the time at most.
PAUSE_S_PER_PLACE = 5e-7
PAUSE_S_PER_ROW = 2e-8


class Holdings:
    """Asked before a lease is made. What was cut short is counted in `limited` by the limit."""

    def __init__(
        self, limits: Limits, sessions: Sessions, catalog: Catalog, limited: Counter[str]
    ) -> None:
        self.limits = limits
        self._sessions = sessions
        self._catalog = catalog
        self._limited = limited
        self._tenant = Credit()
        self._leases_left = 0

    def set_limits(self, limits: Limits) -> None:
        """From now on; what is held beyond them stays until it is let go."""
        self.limits = limits
        self._leases_left = 0
        for credit in (self._tenant, *(session.credit for session in self._sessions)):
            credit.bytes, credit.count_from = 0, 0.0

    def check_leases(self, session: Session) -> None:
        """Raises LimitExceeded when the session may have no further lease."""
        if len(session.leases) >= self.limits.leases_per_session:
            self._limited["leases_per_session"] += 1
            raise LimitExceeded(
                f"this session holds {len(session.leases)} leases, the most that "
                "limits.leases_per_session allows: release, commit or abort some"
            )
        if not self._leases_left:
            held = sum(len(session.leases) for session in self._sessions)
            self._leases_left = max(0, self.limits.leases_per_tenant - held)
            if not self._leases_left:
                self._limited["leases_per_tenant"] += 1
                raise LimitExceeded(
                    f"the clients of this tenant hold {held} leases, the most that "
                    "limits.leases_per_tenant allows: release, commit or abort some"
                )
        self._leases_left -= 1

    def allow(self, session: Session, entry: LayoutEntry, count: int, now: float) -> int:
        """How many of `count` further blocks the session may lease now."""
        mine, ours, size = session.credit, self._tenant, count * entry.slot_bytes
        if size > mine.bytes or count > mine.places or size > ours.bytes:
            count = self._counted(session, entry, count, now)
            size = count * entry.slot_bytes
        mine.places -= count
        mine.bytes -= size
        ours.bytes -= size
        return count

    def _counted(self, session: Session, entry: LayoutEntry, count: int, now: float) -> int:
        mine, ours, slot_bytes = session.credit, self._tenant, entry.slot_bytes
        size = count * slot_bytes
        if (size > mine.bytes or count > mine.places) and now >= mine.count_from:
            self._count_session(session, now)
        if size > ours.bytes and now >= ours.count_from:
            self._count_tenant(now)
        allowed = min(count, mine.places, mine.bytes // slot_bytes)
        if allowed > ours.bytes // slot_bytes:
            allowed = ours.bytes // slot_bytes
            self._limited["bytes_per_tenant"] += 1
        elif allowed < count:
            self._limited["bytes_per_session"] += 1
        return allowed

    def _count_session(self, session: Session, now: float) -> None:
        by_layout: dict[int, list[list[int]]] = {}
        for lease in session.leases.values():
            by_layout.setdefault(lease.entry.slot_bytes, []).append(lease.blocks)
        held = sum(size * len(set().union(*blocks)) for size, blocks in by_layout.items())
        places = sum(len(blocks) for lists in by_layout.values() for blocks in lists)
        credit = session.credit
        credit.bytes = max(0, self.limits.bytes_per_session - held)
        credit.places = max(0, PLACES_MAX - places)
        credit.count_from = now + places * PAUSE_S_PER_PLACE

    def _count_tenant(self, now: float) -> None:
        """Leased are rows that somebody writes, also who has vanished, and those that are pinned,
        but not by a spill alone: that ends by itself."""
        catalog, held = self._catalog, 0
        rows = len(catalog.flags)
        if rows:
            flags = np.frombuffer(catalog.flags, np.uint16)
            pins = np.frombuffer(catalog.pins, np.uint32)
            leased = (pins > (flags & SPILLING != 0)) | (flags & WRITING != 0)
            counts = np.bincount(np.frombuffer(catalog.layout, np.uint16)[leased])
            held = sum(
                int(count) * entry.slot_bytes
                for count, entry in zip(counts, catalog.layouts, strict=False)
            )
        self._tenant.bytes = max(0, self.limits.bytes_per_tenant - held)
        self._tenant.count_from = now + rows * PAUSE_S_PER_ROW
