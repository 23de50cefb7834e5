"""What follows from a request once it was answered: policies learn, misses get a cause, and those
who observe are told. Part of the brain.

An engine asks for a prompt, and then offers what it had to compute, perhaps in several calls: all
that is one request. It is known by the block behind which the next call will go on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from kvstore.accesses import Access, AccessKind, Hints, Observer
from kvstore.catalog import READY, WRITING, LayoutEntry
from kvstore.eviction.base import Asked, Request
from kvstore.leases import ReadLease
from kvstore.placement import Placement
from kvstore.reads import ABSENT
from kvstore.types import DRAM, NVME

GOING_ON_MAX = 4_096  # requests of which more may come
ROOT = -1
NOTES_MAX, NOTED_BLOCKS_MAX = 32, 8_192  # a block takes about 1.5 us
GHOSTS_MIN, GHOSTS_MAX = 1_024, 500_000


@dataclasses.dataclass(slots=True)
class Offer:
    """A reserve. `rows` are the blocks of its context and keys, None where there is none; `at` is
    the place in it of the first that is new, `fresh` the places of those that got a slot, `end` of
    the first that did not."""

    entry: LayoutEntry
    keys: Sequence[bytes]
    skip: int
    rows: list[int | None]
    at: int
    end: int
    fresh: list[int]
    hints: Hints

    @classmethod
    def of(
        cls,
        entry: LayoutEntry,
        context: Sequence[bytes],
        keys: Sequence[bytes],
        fresh: Sequence[int],
        hints: Hints,
    ) -> Offer:
        """`fresh` are places in `keys`. All new blocks have their rows."""
        everything = [*context, *keys] if context else keys
        skip = len(context)
        rows = list(map(entry.index.get, everything))
        places = [skip + at for at in fresh]
        at = places[0] if places else len(rows)
        return cls(entry, everything, skip, rows, at, len(rows), places, hints)

    def cut(self, got: int) -> None:
        """Only so many leading ones of the new blocks got a slot."""
        if got < len(self.fresh):
            self.end = self.fresh[got]
            del self.fresh[got:]


class _GoingOn(NamedTuple):
    """A request of which more may come: whether blocks of its were stored at that place, and
    whether it has asked for them before."""

    asked: Asked
    stored: bool
    heard: bool


class Learning:
    """Notes of what was asked, until they are digested."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.catalog = placement.catalog
        self.notes: list[ReadLease | Offer] = []
        self.blocks = 0  # that these are about
        self.observers: list[Observer] = []
        self._family = placement.room.family
        # By the place where they go on.
        self._going_on: dict[int | bytes, _GoingOn] = {}

    def note(self, note: ReadLease | Offer) -> None:
        """Something was answered."""
        self.notes.append(note)
        self.blocks += len(note.keys)

    @property
    def behind(self) -> bool:
        """Whether there are more notes than should wait: what cannot be done before all of them
        are digested waits for some milliseconds then."""
        return len(self.notes) > NOTES_MAX or self.blocks > NOTED_BLOCKS_MAX

    def digest(self, now: float, most: int | None = None) -> bool:
        """Done after answering, never before; `most` notes, the oldest ones. Whether there was
        anything."""
        notes, self.notes = self.notes[:most], [] if most is None else self.notes[most:]
        for note in notes:
            self.blocks -= len(note.keys)
            if isinstance(note, ReadLease):
                self._asked(note, now)
            else:
                self._offered(note, now)
        if self.notes:  # they name rows, which must not be somebody else's before
            return True
        room = self.placement.room
        if len(self.catalog.ghosts) > GHOSTS_MIN:
            self.catalog.forget_ghosts(self._ghosts_max())
        if dropped := self.catalog.recycle():
            room.family.drop(dropped)
        return bool(notes)

    def wanted(self, offer: Offer) -> Asked | None:
        """The request that goes on with what is new in this offer, if it has asked for it. Of one
        that only stores, in however many calls, nothing is known."""
        found = self._found(offer)
        return found.asked if found is not None and found.heard else None

    def _found(self, offer: Offer) -> _GoingOn | None:
        """What goes on with what is new in this offer. A list that names again what was stored
        already is a new request."""
        found = self._going_on.get(_place(offer.rows, offer.keys, offer.at))
        if found is not None and found.stored and offer.at > offer.skip:
            return None
        return found

    # -- inside --------------------------------------------------------------------------------

    def _ghosts_max(self) -> int:
        """As many as the memory tier has blocks, four times, but for those that are on NVMe; less
        where nothing is learned from their return."""
        room = self.placement.room
        dram, nvme = room.resident(DRAM), room.resident(NVME)
        most = max(GHOSTS_MIN, (dram + nvme) // 4)
        if self._family.contests:
            most = max(most, 4 * dram - nvme)
        return min(GHOSTS_MAX, most)

    def _remember(self, place: int | bytes, going: _GoingOn) -> None:
        going_on = self._going_on
        going_on.pop(place, None)
        going_on[place] = going
        if len(going_on) > 2 * GOING_ON_MAX:
            for old in list(going_on)[:GOING_ON_MAX]:
                del going_on[old]

    def _asked(self, lease: ReadLease, now: float) -> None:
        entry, keys, catalog = lease.entry, lease.keys, self.catalog
        granted = lease.ready
        context = _known(entry, lease.context) if lease.context else []
        complete = len(context) == len(lease.context)
        chain = context
        if complete:
            chain = context + lease.blocks + _known(entry, keys[granted:])
        chain = [block for block in chain if catalog.keys[block] is not None]
        earlier = self._going_on.get(context[-1]) if context and complete else None
        if earlier is None:
            total = len(lease.context) + lease.asked
            tokens = entry.layout.block_tokens
            request = Request(chain, total - len(chain), now, block_tokens=tokens)
            asked = self._family.asked(request)
            if chain:
                self.placement.touch(chain, now)
        else:
            asked = earlier.asked
        there = len(context) + granted
        if keys and there <= len(chain):
            place = chain[there - 1] if there else keys[0]
            self._remember(place, _GoingOn(asked, stored=False, heard=True))
        self._used(chain[:there])
        if lease.devices:
            self.placement.mirror.asked(lease, now)
        self._count(lease)
        if self.observers:
            skip = len(lease.context)
            self._tell(
                Access(
                    AccessKind.ASKED,
                    entry,
                    [*lease.context, *keys] if skip else keys,
                    skip,
                    now,
                    granted=granted,
                    nvme=lease.slow,
                    missed=lease.missed,
                    stop=lease.stop,
                    tokens_per_s=lease.tokens_per_s,
                )
            )

    def _used(self, chain: list[int]) -> None:
        """The slot table is to know in which order blocks were used; the leaf is the coldest."""
        flags, dram = self.catalog.flags, self.catalog.dram
        used = [dram[block] for block in reversed(chain) if flags[block] & READY]
        self.placement.room.orders.touched += used

    def _count(self, lease: ReadLease) -> None:
        """Each missed block has one cause."""
        if not lease.missed:
            return
        misses, catalog = self.placement.counters.misses, self.catalog
        if lease.stop != ABSENT:
            misses[lease.why] += lease.missed
            return
        get, flags, ghosts = lease.entry.index.get, catalog.flags, catalog.ghosts
        counted = 0
        for key in lease.keys[lease.ready :]:
            block = get(key)
            if block is None:
                misses["never_seen"] += 1
            elif block in ghosts:
                misses[ghosts[block]] += 1
            elif flags[block] & WRITING:
                misses["being_written"] += 1
            else:
                misses["behind"] += 1
            counted += 1
        if lease.missed > counted:  # keys that were cut off unread
            misses["never_seen"] += lease.missed - counted

    def _offered(self, offer: Offer, now: float) -> None:
        rows, fresh, family = offer.rows, offer.fresh, self._family
        if not rows:
            return
        chain: list[int] = []
        for block in rows[: offer.at]:
            if block is None or self.catalog.keys[block] is None:
                break
            chain.append(block)
        found, hints = self._found(offer), offer.hints
        if found is not None:
            asked = found.asked
            if hints:
                asked = family.hinted(asked, chain, hints.reuse, hints.name)
        else:
            unknown, tokens = len(rows) - len(chain), offer.entry.layout.block_tokens
            asked = family.asked(Request(chain, unknown, now, hints.reuse, hints.name, tokens))
            if chain:
                self.placement.touch(chain, now)
                self._used(chain)
        self.born(rows, fresh, asked)
        heard = found is not None and found.heard
        place = _place(rows, offer.keys, offer.end)
        self._remember(place, _GoingOn(asked, stored=True, heard=heard))
        if self.observers:
            self._tell(
                Access(
                    AccessKind.OFFERED,
                    offer.entry,
                    offer.keys,
                    offer.skip,
                    now,
                    reuse=hints.reuse,
                    tag=hints.name,
                )
            )

    def born(self, rows: Sequence[int | None], fresh: Sequence[int], asked: Asked) -> None:
        """Tell what the new blocks at these places continue, run by run."""
        keys, run = self.catalog.keys, list[int]()
        for at, following in zip(fresh, [*fresh[1:], ROOT], strict=False):
            block = rows[at]
            if block is not None and keys[block] is not None:
                run.append(block)
            if following == at + 1 or not run:
                continue
            parent = rows[at - len(run)] if at >= len(run) else None
            self._family.born(ROOT if parent is None else parent, run, asked)
            run = []

    def _tell(self, access: Access) -> None:
        for observe in self.observers:
            observe(access)


def _known(entry: LayoutEntry, keys: Sequence[bytes]) -> list[int]:
    """The blocks of the longest prefix that is known."""
    known: list[int] = []
    for block in map(entry.index.get, keys):
        if block is None:
            break
        known.append(block)
    return known


def _place(rows: Sequence[int | None], keys: Sequence[bytes], at: int) -> int | bytes:
    """What names the place in a chain where the block comes that is at this place in the list."""
    before = rows[at - 1] if at else None
    if before is not None:
        return before
    return keys[at] if at < len(keys) else b""
