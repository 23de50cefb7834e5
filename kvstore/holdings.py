"""What the sessions of one tenant hold of its arena, and how much more they may. Part of the brain.

Blocks under read leases keep their places, and slots under write leases are nobody else's: a client
that never let go would take the whole arena out of use. Counted are bytes of slots, once for each
block, however many leases of the session (or sessions of the tenant) are on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

import numpy as np

from kvstore.catalog import SPILLING, WRITING, LayoutEntry
from kvstore.errors import LimitExceeded
from kvstore.leases import Session, Sessions
from kvstore.limits import Credit, Limits
from kvstore.placement import Placement

PLACES_MAX = 1 << 20  # in all lists of leased blocks of a session, at 8 bytes each
# Who holds as much as it may is counted anew again and again, for a fifth of the time at most.
PAUSE_S_PER_PLACE = 2e-7
PAUSE_S_PER_ROW = 2e-8


class Holdings:
    """Asked before a lease is made. What was cut short is counted in `limited` by the limit."""

    def __init__(
        self, limits: Limits, sessions: Sessions, placement: Placement, limited: Counter[str]
    ) -> None:
        self.limits = limits
        self._sessions = sessions
        self._catalog = placement.catalog
        self._scrub = placement.scrub
        self._mirror = placement.mirror
        self._limited = limited
        self.lent: Collection[int] = ()  # rows that are lent: they have a bound of their own
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

    def allow(
        self,
        session: Session,
        entry: LayoutEntry,
        count: int,
        now: float,
        keys: Sequence[bytes] = (),
    ) -> int:
        """How many of `count` further blocks the session may lease now. `keys` name them where they
        may be under leases already: those take nothing more."""
        mine, ours, size = session.credit, self._tenant, count * entry.slot_bytes
        if size > mine.bytes or count > mine.places or size > ours.bytes:
            count = self._counted(session, entry, count, now, keys)
            size = count * entry.slot_bytes
        mine.places -= count
        mine.bytes = max(0, mine.bytes - size)
        ours.bytes = max(0, ours.bytes - size)
        return count

    def give_back(self, session: Session, entry: LayoutEntry, count: int) -> None:
        """So many of the blocks that were just allowed are not leased after all."""
        size = count * entry.slot_bytes
        session.credit.places += count
        session.credit.bytes += size
        self._tenant.bytes += size

    def _counted(
        self, session: Session, entry: LayoutEntry, count: int, now: float, keys: Sequence[bytes]
    ) -> int:
        mine, ours, size = session.credit, self._tenant, count * entry.slot_bytes
        held: set[int] = set()
        if (size > mine.bytes or count > mine.places) and now >= mine.count_from:
            held = self._count_session(session, now)
        if size > ours.bytes and now >= ours.count_from:
            self._count_tenant(now)
        allowed = min(mine.places, _fitting(entry, count, keys, mine.bytes, held.__contains__))
        if allowed < count:
            self._limited["bytes_per_session"] += 1
        allowed_to_all = _fitting(entry, allowed, keys, ours.bytes, self._leased)
        if allowed_to_all < allowed:
            self._limited["bytes_per_tenant"] += 1
        return allowed_to_all

    def _leased(self, block: int) -> bool:
        return self._catalog.pins[block] > 0 or bool(self._catalog.flags[block] & WRITING)

    def _count_session(self, session: Session, now: float) -> set[int]:
        """Sets the session's credit; the blocks under its leases."""
        by_size: dict[int, list[list[int]]] = {}
        for lease in session.leases.values():
            by_size.setdefault(lease.entry.slot_bytes, []).append(lease.blocks)
        places = sum(len(blocks) for lists in by_size.values() for blocks in lists)
        blocks = {size: set().union(*lists) for size, lists in by_size.items()}
        held = sum(size * len(some) for size, some in blocks.items())
        credit = session.credit
        credit.bytes = max(0, self.limits.bytes_per_session - held)
        credit.places = max(0, PLACES_MAX - places)
        credit.count_from = now + places * PAUSE_S_PER_PLACE
        return set().union(*blocks.values())

    def _count_tenant(self, now: float) -> None:
        """Leased are rows that somebody writes, also who has vanished, and those that are pinned
        by more than moves: those end by themselves."""
        catalog, held = self._catalog, 0
        rows = len(catalog.flags)
        if rows:
            flags = np.frombuffer(catalog.flags, np.uint16)
            moves = (flags & SPILLING != 0).astype(np.uint32)
            for pinned in (self._scrub.pinned(), self._mirror.pinned()):
                for block, count in pinned.items():
                    moves[block] += count
            leased = (np.frombuffer(catalog.pins, np.uint32) > moves) | (flags & WRITING != 0)
            leased[list(self.lent)] = False
            counts = np.bincount(np.frombuffer(catalog.layout, np.uint16)[leased])
            held = sum(
                int(count) * entry.slot_bytes
                for count, entry in zip(counts, catalog.layouts, strict=False)
            )
        self._tenant.bytes = max(0, self.limits.bytes_per_tenant - held)
        self._tenant.count_from = now + rows * PAUSE_S_PER_ROW


def _fitting(
    entry: LayoutEntry,
    count: int,
    keys: Sequence[bytes],
    room_bytes: int,
    is_held: Callable[[int], bool],
) -> int:
    """How many leading blocks of `count` fit into so many bytes, beside those that are held."""
    room = room_bytes // entry.slot_bytes
    if not keys or room >= count:
        return min(count, room)
    get = entry.index.get
    for at in range(count):
        block = get(keys[at])
        if block is None:
            return count  # nothing behind it will be leased
        if not is_held(block):
            room -= 1
            if room < 0:
                return at
    return count
