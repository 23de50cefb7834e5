"""What the daemon does to the outside, made mortal: it may die at any instruction of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvstore.adoption import Notes
from kvstore.catalog import LayoutEntry
from kvstore.hands import Hands
from kvstore.orders import IndexPut, Move
from kvstore.tiers.slot_table import RECORD_BYTES, SlotTable
from tests.simulate.clock import Killed


class Fuse:
    """Burns with everything that the daemon does to the outside; set, it kills it at some point."""

    def __init__(self) -> None:
        self.left: int | None = None

    def burn(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed


class Table(SlotTable):
    """The slot table, written by a process that may die at any instruction."""

    fuse: Fuse
    torn: Callable[[int], int]

    def write(self, offset: int, state: int, **fields: Any) -> None:
        self._tear(offset, lambda: super(Table, self).write(offset, state, **fields))

    def write_writing(self, slots: Iterable[tuple[int, int, bytes]]) -> None:
        for slot in slots:
            one = [slot]
            self._tear(slot[0], lambda one=one: super(Table, self).write_writing(one))  # type: ignore[misc]

    def touch(self, offsets: Sequence[int], sequence: int) -> None:
        self.fuse.burn()
        super().touch(offsets, sequence)

    def clear(self, offset: int) -> None:
        self._tear(offset, lambda: super(Table, self).clear(offset))

    def assign(self, slab: int, slot_bytes: int) -> None:
        self.fuse.burn()
        super().assign(slab, slot_bytes)

    def _tear(self, offset: int, write: Callable[[], None]) -> None:
        """Write one record. Whoever dies meanwhile has written some of its first bytes."""
        place = self._place(offset)
        old = self._map[place : place + RECORD_BYTES]
        write()
        try:
            self.fuse.burn()
        except Killed:
            done = self.torn(RECORD_BYTES // 8 + 1) * 8
            self._map[place + done : place + RECORD_BYTES] = old[done:]
            raise


class MortalHands(Hands):
    """The hands of a daemon that may die before each thing that they do."""

    fuse: Fuse

    def move(self, moves: list[Move]) -> None:
        self.fuse.burn()
        super().move(moves)

    def index(self, changes: dict[int, IndexPut | None]) -> None:
        self.fuse.burn()
        super().index(changes)

    def layout(self, entry: LayoutEntry) -> None:
        self.fuse.burn()
        super().layout(entry)


class MortalNotes(Notes):
    """The notes, whose last line may be torn by the death of who writes it."""

    fuse: Fuse | None = None  # none while they are opened
    torn: Callable[[int], int]

    def _write(self, file: int, lines: list[list[Any]]) -> None:
        if self.fuse is not None:
            try:
                self.fuse.burn()
            except Killed:
                os.write(file, self._torn_text(lines))
                raise
        super()._write(file, lines)

    def _torn_text(self, lines: list[list[Any]]) -> bytes:
        """Some of the first bytes of what would have been written."""
        with open(os.memfd_create("notes"), "r+b") as whole:
            super()._write(whole.fileno(), lines)
            whole.seek(0)
            text = whole.read()
        return text[: self.torn(len(text))]
