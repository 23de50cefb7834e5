"""Who may be copying to or from which page of an arena: no page has a writer and anybody else."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from kvstore.types import SLOT_ALIGNMENT, Layout
from tests.simulate.ledger import Name, show
from tests.simulate.media import Arena

if TYPE_CHECKING:
    from tests.simulate.programs import Program


@dataclasses.dataclass(eq=False)
class Holder:
    """Processes, alive or not quite dead, and the places that one of them was given."""

    programs: list[Program]
    arena: Arena
    names: list[Name]
    offsets: list[int]
    layout: Layout


@dataclasses.dataclass(eq=False)
class Writing(Holder):
    """It may write there: all shards or one."""

    shard: int | None
    version: int
    born: int


@dataclasses.dataclass(eq=False)
class Reading(Holder):
    """It may read there."""

    asked: int


class Holders:
    """All of them, by the slots of each arena that was ever there."""

    def __init__(self) -> None:
        self._at: dict[tuple[int, int], list[Holder]] = {}  # inode and page

    def begin(self, holder: Holder) -> None:
        """Somebody was given these places. Asserts that nobody else has them."""
        if holder.programs[0].gone:
            return  # it was not there any more to be told
        for name, offset in zip(holder.names, holder.offsets, strict=True):
            for page in self._pages(holder, offset):
                there = self._at.setdefault(page, [])
                for other in there:
                    assert _together(holder, other, name), (
                        f"{_say(holder)} {show(name)} at {offset}, where {other.programs[0].name} "
                        f"{_say(other)} {[show(one) for one in other.names]}"
                    )
                there.append(holder)

    def end(self, holder: Holder) -> None:
        """It does not touch them any more, or what it copies is void."""
        for offset in holder.offsets:
            for page in self._pages(holder, offset):
                there = self._at.get(page, [])
                if holder in there:
                    there.remove(holder)

    def all(self) -> list[Holder]:
        """Everybody, once."""
        return list({id(one): one for there in self._at.values() for one in there}.values())

    def check_free(self, arena: Arena, offset: int, length: int, what: str) -> None:
        """Asserts that nobody has any of these bytes."""
        for page in range(offset // SLOT_ALIGNMENT, -(-(offset + length) // SLOT_ALIGNMENT)):
            there = self._at.get((arena.inode, page), [])
            assert not there, (
                f"{what} at {offset}, where {there[0].programs[0].name} {_say(there[0])}"
            )

    def end_of(self, program: Program) -> None:
        """A process has ended: what it alone had, nobody has."""
        for holder in self.all():
            if program in holder.programs:
                holder.programs.remove(program)
                if not holder.programs:
                    self.end(holder)

    @staticmethod
    def _pages(holder: Holder, offset: int) -> list[tuple[int, int]]:
        first, count = offset // SLOT_ALIGNMENT, holder.layout.slot_bytes // SLOT_ALIGNMENT
        return [(holder.arena.inode, page) for page in range(first, first + count)]


def _together(one: Holder, other: Holder, name: Name) -> bool:
    """Whether two may have the same place."""
    if isinstance(one, Reading) and isinstance(other, Reading):
        return True
    return (
        isinstance(one, Writing)
        and isinstance(other, Writing)
        and name in other.names
        and None not in (one.shard, other.shard)
        and one.shard != other.shard
    )


def _say(holder: Holder) -> str:
    return "writes" if isinstance(holder, Writing) else "reads"
