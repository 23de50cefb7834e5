"""Checksums of blocks in DRAM: taken in the background, and proved of blocks that were adopted.

A block that was committed by its client is right by definition; its checksum is wanted so that a
daemon started after this one has died can prove the same bytes. A block that such a daemon finds is
UNPROVEN until its checksum has been compared: on demand, or here, whichever comes first.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping

from kvstore.catalog import READY, SPILLING, STORED, UNPROVEN
from kvstore.orders import Move, MoveKind, Outcome
from kvstore.room import IN_USE, Room
from kvstore.types import DRAM

IN_FLIGHT_MAX = 4
TICK_BYTES = 128 << 20  # taken per tick of blocks that are merely not summed yet


class Scrub:
    """Which blocks of one tenant are to be read for their checksum."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self._in_flight: Counter[int] = Counter()  # moves of each block
        self.lazy = 0  # of them, those that nobody waits for
        self._left = 0  # bytes of blocks without a checksum that may be read before the next tick
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
        """Order checks, a few at a time: what is read cannot leave meanwhile."""
        catalog, flags = self.room.catalog, self.room.catalog.flags
        while self._unproven and self.lazy < IN_FLIGHT_MAX:
            block = self._unproven.popleft()
            if flags[block] & UNPROVEN and block not in self._demanded:
                self._order(MoveKind.SUM, block)
        while self._unsummed and self._left > 0 and self.lazy < IN_FLIGHT_MAX:
            block = self._unsummed.popleft()
            if self._unsummed_yet(block) and not self.count(block):
                self._left -= catalog.entry(block).slot_bytes
                self._order(MoveKind.SUM, block)

    def tick(self) -> None:
        """Time has passed: so many bytes more may be read."""
        self._left = TICK_BYTES
        self.go_on()
        if len(self._unsummed) > 2 * self.room.resident(DRAM) + 1_024:
            due = filter(self._unsummed_yet, self._unsummed)
            self._unsummed = deque(dict.fromkeys(due))

    def finished(self, move: Move, outcome: Outcome) -> None:
        """A check has ended."""
        catalog, block = self.room.catalog, move.block
        self._in_flight[block] -= 1
        if not self._in_flight[block]:
            del self._in_flight[block]
        if move.kind is MoveKind.SUM:
            self.lazy -= 1
        else:
            self._demanded.discard(block)
        if outcome is Outcome.DONE and catalog.flags[block] & READY:
            self.proved(block)
            if catalog.sums[block] is None and move.sums is not None:
                catalog.sums[block] = move.sums
                self.room.orders.marks.add(catalog.dram[block])
        there = catalog.flags[block] & READY
        self.room.unpin([block])
        # Nobody reads an unproven block: where another check of it is under way, that one decides.
        decided = not (catalog.flags[block] & UNPROVEN and self.count(block))
        if outcome is Outcome.CORRUPT and there and decided:
            self.spoilt(block)
        self.go_on()

    def proved(self, block: int) -> None:
        """The bytes in DRAM are those that were committed."""
        self.room.catalog.flags[block] &= ~UNPROVEN
        self.room.catalog.proofs.pop(block, None)

    def spoilt(self, block: int) -> None:
        """The bytes in DRAM are not those that were committed: nobody gets them. A copy on NVMe is
        checked when it is read, and stays, unless the slot in DRAM is still in somebody's hands."""
        catalog = self.room.catalog
        self.room.counters.dram.corrupt += 1
        if catalog.flags[block] & (STORED | IN_USE) == STORED and not catalog.pins[block]:
            self.room.leave(DRAM, [block], "corrupt")
        else:
            self.room.doom([block], "corrupt")

    def count(self, block: int) -> int:
        """Checks of a block that are under way."""
        return self._in_flight.get(block, 0)

    def pinned(self) -> Mapping[int, int]:
        """The pins of moves that are under way, by block."""
        return self._in_flight

    def _unsummed_yet(self, block: int) -> bool:
        """Whether a checksum of it is wanted that is not known; it may have left meanwhile."""
        flags = self.room.catalog.flags[block] & (READY | STORED | SPILLING | UNPROVEN)
        return flags == READY and self.room.catalog.sums[block] is None

    def _order(self, kind: MoveKind, block: int) -> None:
        self._in_flight[block] += 1
        self.lazy += kind is MoveKind.SUM
        self.room.catalog.pins[block] += 1
        self.room.order(kind, block)
