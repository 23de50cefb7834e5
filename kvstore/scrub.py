"""Checksums of blocks in DRAM: taken in the background, and proved of blocks that were adopted.

A block that was committed by its client is right by definition; its checksum is wanted so that a
daemon started after this one has died can prove the same bytes. A block that such a daemon finds is
UNPROVEN until its checksum has been compared: on demand, or here, whichever comes first.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping

from kvstore.catalog import DOOMED, READY, SPILLING, STORED, UNPROVEN
from kvstore.orders import Move, MoveKind, Outcome
from kvstore.room import Room
from kvstore.types import DRAM

IN_FLIGHT_MAX = 4
TICK_BYTES = 128 << 20  # taken per tick of blocks that are merely not summed yet


class Scrub:
    """Which blocks of one tenant are to be read for their checksum."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self._in_flight: Counter[int] = Counter()  # moves of each block
        self._lazy = 0  # of them, those that nobody waits for
        self._unproven: deque[int] = deque()
        self._unsummed: deque[int] = deque()
        self._demanded: set[int] = set()

    def adopted(self, blocks: Iterable[int]) -> None:
        """Prove these UNPROVEN blocks, in this order, without delay."""
        self._unproven.extend(blocks)

    def later(self, blocks: Iterable[int]) -> None:
        """Take the checksums of these blocks when there is time."""
        self._unsummed.extend(blocks)

    def demand(self, block: int) -> None:
        """Somebody waits for the proof of an UNPROVEN block."""
        if block not in self._demanded:
            self._demanded.add(block)
            self._order(MoveKind.PROVE, block)

    def go_on(self) -> None:
        """Order checks of adopted blocks, a few at a time."""
        flags = self.room.catalog.flags
        while self._unproven and self._lazy < IN_FLIGHT_MAX:
            block = self._unproven.popleft()
            if flags[block] & UNPROVEN and block not in self._demanded:
                self._order(MoveKind.SUM, block)

    def tick(self) -> None:
        """Time has passed: take the checksums of some blocks that have none."""
        catalog, left = self.room.catalog, TICK_BYTES
        while self._unsummed and left > 0 and not self._unproven:
            block = self._unsummed.popleft()
            flags = catalog.flags[block]
            wanted = flags & (READY | STORED | SPILLING | UNPROVEN) == READY
            if wanted and catalog.sums[block] is None and not self.count(block):
                left -= catalog.entry(block).slot_bytes
                self._order(MoveKind.SUM, block)
        if len(self._unsummed) > 2 * self.room.resident(DRAM) + 1_024:
            self._unsummed = deque(dict.fromkeys(b for b in self._unsummed if catalog.keys[b]))

    def finished(self, move: Move, outcome: Outcome) -> None:
        """A check has ended."""
        catalog, block = self.room.catalog, move.block
        self._in_flight[block] -= 1
        if not self._in_flight[block]:
            del self._in_flight[block]
        if move.kind is MoveKind.SUM:
            self._lazy -= 1
        else:
            self._demanded.discard(block)
        if outcome is Outcome.CORRUPT and not catalog.flags[block] & DOOMED:
            self.spoilt(block)
        elif outcome is Outcome.DONE and catalog.flags[block] & READY:
            self.proved(block)
            if catalog.sums[block] is None and move.sums is not None:
                catalog.sums[block] = move.sums
                self.room.orders.marks.add(catalog.dram[block])
        self.room.unpin([block])
        self.go_on()

    def proved(self, block: int) -> None:
        """The bytes in DRAM are those that were committed."""
        self.room.catalog.flags[block] &= ~UNPROVEN
        self.room.catalog.proofs.pop(block, None)

    def spoilt(self, block: int) -> None:
        """The bytes in DRAM are not those that were committed: nobody gets them."""
        self.room.counters.dram.corrupt += 1
        self.room.doom([block], "corrupt")

    def count(self, block: int) -> int:
        """Checks of a block that are under way."""
        return self._in_flight.get(block, 0)

    def pinned(self) -> Mapping[int, int]:
        """The pins of moves that are under way, by block."""
        return self._in_flight

    def _order(self, kind: MoveKind, block: int) -> None:
        self._in_flight[block] += 1
        self._lazy += kind is MoveKind.SUM
        self.room.catalog.pins[block] += 1
        self.room.order(kind, block)
