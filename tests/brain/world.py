"""A world around a store: clients, hands and simulated bytes, driven one call at a time.

Each method is one thing that can happen; each checks what it answers. Who decides what happens next
(Hypothesis, or a seeded run) is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvstore.catalog import DOOMED, NOWHERE, LayoutEntry
from kvstore.errors import LimitExceeded
from kvstore.eviction.base import Family, Independent
from kvstore.eviction.lru import LRU
from kvstore.leases import Session
from kvstore.limits import Limits
from kvstore.orders import IndexPut, Move, MoveKind, Outcome
from kvstore.placement import PlacementConfig
from kvstore.reads import LATE, STOP_NAMES
from kvstore.store import Store
from kvstore.types import SLOT_ALIGNMENT, Layout
from kvstore.writes import NEW, PRESENT, REFUSED, Reserved
from tests.brain.books import (
    JUNK,
    READS_DRAM,
    WILL_LOAD,
    Books,
    Bytes,
    Ghosts,
    Name,
    Partial,
    Reader,
    Writer,
    sums_of,
)

PAGE = SLOT_ALIGNMENT
# Shards and pages of each: sizes that divide a slab evenly and such that do not.
SHAPES = ((1, 1), (2, 2), (1, 3), (3, 3), (1, 1))
KEYS = 12


def layout_of(number: int) -> Layout:
    shards, pages = SHAPES[number]
    return Layout(
        model=f"m{number}",
        engine="e",
        dtype="d",
        block_tokens=16,
        shards=shards,
        shard_bytes=pages * PAGE // shards,
    )


def key_of(at: int) -> bytes:
    return b"block%03d" % at


class World(Books):
    """A store, its clients, its hands."""

    def __init__(
        self,
        config: PlacementConfig,
        limits: Limits,
        layouts: int,
        make_family: Callable[[], Family] = lambda: Independent(LRU),
    ) -> None:
        super().__init__(Store(config, limits, make_family()))
        self.now = 100.0
        self.version = 0
        self.sessions: list[Session] = []
        self.kept: set[Name] = set()
        self.store.lending.part, self.store.lending.slabs_part = 2, 0
        self.entries = [self.store.open(layout_of(number)) for number in range(layouts)]

    def after(self) -> None:
        """What follows every call: orders are carried out, writers write, everything is checked."""
        for lease in self.carry_out():
            self._granted(next(reader for reader in self.readers if reader.lease is lease))
        self.scribble()
        self.check()
        self.kept &= self._resident()
        self.step += 1

    def adopt(self, number: int, count: int) -> None:
        """Blocks were found on NVMe, as after a restart."""
        entry, pages = self.entries[number], self.entries[number].slot_bytes // PAGE
        per_slab = self.store.room.nvme.slab_pages // pages
        keys, offsets, sums = [], [], []
        for at in range(min(count, per_slab) if self.store.placement.health.ok else 0):
            name = (number, key_of(at))
            content = self._content(name, entry.layout.shards)
            self.nvme[at * pages] = content
            self.ever.setdefault(name, {})[content] = self.step
            keys.append(name[1])
            offsets.append(at * pages * PAGE)
            sums.append(sums_of(content))
            self.index[at * pages] = IndexPut(entry, 0, name[1], sums[-1])
        assert self.store.adopt(entry.layout, keys, offsets, sums, self.now) == len(keys)
        self.saved += len(keys)

    # -- clients -------------------------------------------------------------------------------

    def attach(self) -> None:
        try:
            self.sessions.append(self.store.attach("client"))
        except LimitExceeded:
            assert len(self.sessions) == self.store.limits.sessions

    def detach(self, session: Session) -> None:
        """The client is gone, its processes may not be."""
        self.sessions.remove(session)
        self.readers = [reader for reader in self.readers if reader.session is not session]
        mine = [writer for writer in self.writers if writer.session is session]
        self.writers = [writer for writer in self.writers if writer.session is not session]
        blocks = self.store.detach(session, self.now)
        pages = {page for writer in mine for page in writer.pages}
        assert {self.store.catalog.dram[block] for block in blocks} == pages
        assert len(blocks) == len(set(blocks)) == len(pages)
        for page in pages:
            part = self.partial.get(page)
            self._kill(page)
            if part is not None or any(page in writer.pages for writer in self.writers):
                self.marks["vanished among shards"] += 1
        if blocks:
            self.marks["quarantined"] += 1
            self.ghosts.append(Ghosts(blocks, mine))

    def unquarantine(self, ghost: Ghosts) -> None:
        self.ghosts.remove(ghost)
        self.store.unquarantine(ghost.blocks, self.now)

    def reserve(
        self,
        session: Session,
        number: int,
        keys: Sequence[bytes],
        *,
        shard: int | None = None,
        force: bool = False,
        context: Sequence[bytes] = (),
        lend: bool = False,
        lent: Writer | None = None,
    ) -> Reserved | None:
        entry, shards = self.entries[number], self.entries[number].layout.shards
        shard = None if shard is None else shard % shards
        before = {key: self.store.lookup(entry, [key]) for key in keys}
        head = [key for key in context if self.store.lookup(entry, [key]) == b"\1"]
        nvme = self.store.counters.nvme.evicted.total()
        kept = {name for name in self._resident() if name in self.kept}
        unsaved = self._unsaved()
        spills = self.store.placement.spills
        try:
            reserved = self.store.reserve(
                session,
                entry,
                keys,
                self.now,
                shard=shard,
                force=force,
                context=context,
                lend=lend,
                lent=lent.lease.number if lent is not None else 0,
            )
        except LimitExceeded:
            assert len(session.leases) == self.store.limits.leases_per_session
            return None
        news = [key for key, status in zip(keys, reserved.status, strict=True) if status == NEW]
        assert len(news) == len(reserved.pages) and (reserved.lease is None) == (not news)
        for key, status in zip(keys, reserved.status, strict=True):
            assert status != NEW or before[key] != b"\1", "a resident block is written again"
            assert status != REFUSED or before[key] != b"\1"
        head += [key for key, one in zip(keys, reserved.status, strict=True) if one == PRESENT
                 and before[key] == b"\1"]  # fmt: skip
        self._check_head(entry, head, nvme)
        if reserved.waiting:
            assert self.store.placement.room_will_come and not news
            self.marks["reserve waits"] += 1
        if REFUSED in reserved.status:
            self.marks["refused"] += 1
        if self.store.placement.spills > spills:
            self.marks["unsaved spared"] += 1
        if force and unsaved - self._resident():
            self.marks["forced loss"] += 1
        if kept - self._resident():
            self.marks["retained weakest evicted"] += 1
        self.took(lent if shard is None else None, reserved, entry)
        if reserved.lease is not None:
            self._writes(session, reserved, [(number, key) for key in news], shard)
        return reserved

    def commit(self, writer: Writer) -> None:
        self.writers.remove(writer)
        entry, dead = writer.lease.entry, 0
        fenced = not self.store.placement.health.ok
        visible: list[bytes] = []
        for name, page in zip(writer.names, writer.pages, strict=True):
            for shard in writer.shards:
                self.dram[page][shard] = (_owner(name), writer.version, shard)
            if page in writer.dead:
                dead += 1
                self.marks["doomed while written"] += 1
                continue
            part = self.partial.get(page)
            if part is not None:
                part.done |= set(writer.shards)
                if len(part.done) < entry.layout.shards:
                    continue
                del self.partial[page]
            if self.is_read_on_nvme(entry, name[1]):
                self.marks["stored again while the old copy is read"] += 1
                dead += 1
                continue
            self.committed(name, tuple(self.dram[page]))
            visible.append(name[1])
            if fenced and any((p.entry.number, p.key) == name for p in self.index.values()):
                self.marks["stored again while fenced"] += 1
        lent, _ = self.store.lend(writer.session, writer.lease.number)
        assert bool(lent) == (lent in writer.session.lent) and lent != writer.lease.number
        stored = self.store.commit(writer.session, writer.lease.number, self.now)
        assert stored == len(writer.names) - dead
        assert self.store.commit(writer.session, writer.lease.number, self.now) is None
        for key in visible:
            assert self.store.lookup(entry, [key]) == b"\1", "committed, and not there"

    def abort(self, writer: Writer) -> None:
        self.writers.remove(writer)
        for page in writer.pages:
            self._end_partial(page)
        assert self.store.abort(writer.session, writer.lease.number, self.now)

    def acquire(
        self,
        session: Session,
        number: int,
        keys: Sequence[bytes],
        *,
        wait: bool = True,
        enough: int = 0,
        tokens_per_s: float = 0.0,
        context: Sequence[bytes] = (),
        devices: Sequence[int] = (),
        poll: bool = False,
        direct: bool = False,
    ) -> Reader | None:
        entry = self.entries[number]
        head = [key for key in context if self.store.lookup(entry, [key]) == b"\1"]
        nvme = self.store.counters.nvme.evicted.total()
        before = self.store.lookup(entry, keys)
        coming = {(m.entry.number, m.key) for m in self.pending if m.entry and m.kind in WILL_LOAD}
        try:
            lease = self.store.acquire(
                session,
                entry,
                keys,
                self.now,
                wait=wait,
                enough=enough,
                tokens_per_s=tokens_per_s,
                context=context,
                devices=devices,
                poll=poll,
                direct=direct,
            )
        except LimitExceeded:
            assert len(session.leases) == self.store.limits.leases_per_session
            return None
        self._check_head(entry, head, nvme)
        names = [(number, key) for key in keys]
        floor = [self.forgotten.get(name, -1) for name in names]
        reader = Reader(session, lease, names, floor)
        assert len(lease.blocks) >= len(before) - len(before.lstrip(b"\1"))
        self.readers.append(reader)
        if lease.answered:
            assert len(lease.blocks) <= len(before)
            self._granted(reader)
        elif coming & set(names[: len(lease.blocks)]):
            self.marks["joined a load in flight"] += 1
        return reader

    def cut(self, reader: Reader) -> None:
        """The deadline of an acquire has come."""
        self.store.cut(reader.lease, LATE)
        self._granted(reader)

    def release(self, reader: Reader) -> None:
        held = self.store.release(reader.session, reader.lease.number)
        assert held == (reader.granted is not None)
        if held:
            self.readers.remove(reader)
            assert not self.store.release(reader.session, reader.lease.number)

    def prefetch(self, number: int, keys: Sequence[bytes]) -> None:
        entry = self.entries[number]
        before = self.store.lookup(entry, keys)
        head = len(before) - len(before.lstrip(b"\1"))
        self.store.prefetch(entry, keys, self.now)
        assert self.store.lookup(entry, keys[:head]) == b"\1" * head, "the tail pushed it out"

    def retain(self, number: int, keys: Sequence[bytes], priority: int, ttl: float | None) -> None:
        until = None if ttl is None else self.now + ttl
        kept = self.store.retain(self.entries[number], keys, priority, until)
        assert kept <= len(keys)
        names = {(number, key) for key in keys if self._block((number, key)) is not None}
        self.kept = self.kept | names if 0 < priority < 100 and ttl is None else self.kept - names

    def forget(self, number: int, keys: Sequence[bytes]) -> None:
        known = [key for key in keys if self._block((number, key)) is not None]
        for key in known:
            self._forget((number, key))
        assert self.store.forget(self.entries[number], keys) == len(known)
        assert all(not self.store.lookup(self.entries[number], [key]) for key in keys)

    def clear(self) -> None:
        known = [
            (entry.number, key)
            for entry in self.entries
            for key in entry.index
            if self._block((entry.number, key)) is not None
        ]
        for name in known:
            self._forget(name)
        assert self.store.clear(range(len(self.store.catalog.keys))) == len(known)
        assert not any(entry.index for entry in self.entries)

    # -- hands ---------------------------------------------------------------------------------

    def finish(self, move: Move, outcome: Outcome) -> None:
        """A move has ended. A mover says DONE of a read only when it found the right bytes."""
        self.pending.remove(move)
        doomed = move.entry is not None and self.store.catalog.flags[move.block] & DOOMED
        known = move.sums is not None or move.proof
        if outcome is Outcome.CORRUPT and (
            move.kind is MoveKind.PROBE or (move.kind in READS_DRAM and not known)
        ):
            outcome = Outcome.FAILED
        if outcome is Outcome.FAILED and move.kind in (MoveKind.SUM, MoveKind.PROVE):
            outcome = Outcome.DONE  # memory does not fail, it only forgets
        done = outcome is Outcome.DONE
        if move.kind is MoveKind.SPILL:
            content = self.latched.pop(id(move))
            assert tuple(self.dram[move.dram]) == content, "the slot changed while it was spilled"
            self.nvme[move.nvme] = content if done else (JUNK,)
            move.sums = sums_of(content)
            self.saved += done and not doomed
        elif move.kind in READS_DRAM:
            content = self.latched.pop(id(move))
            assert move.sums in (None, sums_of(content))
            move.sums = sums_of(content)
            self.marks["unproven corrupt"] += outcome is Outcome.CORRUPT and bool(move.proof)
            if move.kind is MoveKind.CLIMB:
                self.climbed(move, content, outcome)
                self.marks["climbed from NVMe"] += done and move.dram == NOWHERE
        elif move.kind is not MoveKind.PROBE:
            content = self.nvme[move.nvme]
            assert sums_of(content) == move.sums, "the slot changed while it was read"
            if move.kind in WILL_LOAD:
                self.dram[move.dram] = list(content) if done else [JUNK] * len(content)
                self.published += done and not doomed
            self.marks["corrupt"] += outcome is Outcome.CORRUPT
        self.marks[f"doomed while {move.kind.name.lower()}"] += bool(doomed)
        was_ok = self.store.placement.health.ok
        self.store.finished(move, outcome, self.now)
        ok = self.store.placement.health.ok
        self.marks["fenced"] += was_ok and not ok
        self.marks["probed back"] += ok and not was_ok and move.kind is MoveKind.PROBE

    def verify(self, at: int) -> None:
        """Somebody wants a stored block checked."""
        blocks = sorted(self.store.room.nvme.owners().values())
        if blocks:
            self.store.placement.verify(blocks[at % len(blocks)], self.now)

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.store.tick(self.now)

    def end(self) -> None:
        """Everything that was begun is ended: then nothing is held, and clear leaves nothing."""
        while self.pending:
            self.finish(self.pending[0], Outcome.DONE)
            self.after()
        for reader in list(self.readers):
            assert reader.granted is not None, "a lease that nobody answers"
            self.release(reader)
        for session in list(self.sessions):
            self.detach(session)
            self.after()
        for ghost in list(self.ghosts):
            self.unquarantine(ghost)
            self.after()
        store, catalog = self.store, self.store.catalog
        assert not any(catalog.pins) and not len(store.sessions)
        assert not any(flags & DOOMED for flags in catalog.flags)
        assert not any(store.room.held(block) for block in range(len(catalog.keys)))
        while self.pending:
            self.finish(self.pending[0], Outcome.DONE)
            self.after()
        self.clear()
        self.after()
        assert store.room.dram.used_bytes == store.room.nvme.used_bytes == 0
        assert store.placement.mirror.used_bytes == 0
        assert not len(catalog) and not self.table and not self.index and not self.partial

    # -- inside --------------------------------------------------------------------------------

    def _check_head(self, entry: LayoutEntry, head: list[bytes], nvme: int) -> None:
        """What was in DRAM of a request's own chain is not lost for its tail. Only if nothing else
        could leave does it leave DRAM, and its copy may have to give way to another's."""
        gone = sum(not self.store.lookup(entry, [key]) for key in head)
        assert gone <= self.store.counters.nvme.evicted.total() - nvme, "the tail pushed it out"

    def _content(self, name: Name, shards: int) -> Bytes:
        self.version += 1
        return tuple((_owner(name), self.version, shard) for shard in range(shards))

    def _writes(
        self, session: Session, reserved: Reserved, names: list[Name], shard: int | None
    ) -> None:
        """From now on the session may write these pages."""
        assert reserved.lease is not None
        entry = reserved.lease.entry
        shards = tuple(range(entry.layout.shards)) if shard is None else (shard,)
        self.version += 1
        for name, page in zip(names, reserved.pages, strict=True):
            block = entry.index[name[1]]
            part = self.partial.get(page)
            if part is None or part.name != name or part.block != block:
                self.dram[page] = [JUNK] * entry.layout.shards
                self.marks["idle parts given up"] += self.partial.pop(page, None) is not None
                if shard is not None:
                    self.partial[page] = Partial(name, block, set())
            else:
                assert shard not in part.done
        self.writers.append(
            Writer(session, reserved.lease, names, reserved.pages, shards, self.version)
        )

    def _end_partial(self, page: int) -> None:
        """A shard will not be written: the block is over when it was the only one."""
        part = self.partial.get(page)
        if part and not part.done and all(page not in writer.pages for writer in self.writers):
            del self.partial[page]

    def _kill(self, page: int) -> None:
        """The block of this page, which clients write, was forgotten."""
        self.partial.pop(page, None)
        for writer in self.writers:
            if page in writer.pages:
                writer.dead.add(page)

    def _forget(self, name: Name) -> None:
        self.forgotten[name] = self.step
        pages = {page for page, part in self.partial.items() if part.name == name}
        for writer in self.writers:
            both = zip(writer.names, writer.pages, strict=True)
            pages |= {page for one, page in both if one == name}
        for page in pages:
            self._kill(page)
        for reader in self.readers:
            self.marks["doomed while pinned"] += name in reader.names[: len(reader.lease.blocks)]

    def _granted(self, reader: Reader) -> None:
        """A client is told where to read."""
        lease = reader.lease
        assert lease.answered and lease.ready == len(lease.blocks) <= len(reader.names)
        if lease.ready < len(reader.names):
            self.marks[f"stop {STOP_NAMES[lease.stop]}"] += 1
        if not lease.blocks:
            assert lease.number not in reader.session.leases
            self.readers.remove(reader)
            return
        reader.granted = []
        for at, block in enumerate(lease.blocks):
            page: int | None = self.store.catalog.dram[block]
            if block in lease.held:
                content = self.nvme[self.store.catalog.nvme[block]]
                reader.beside.append((self.store.catalog.nvme[block], content))
                assert self.store.catalog.sums[block] == sums_of(content)
                page = None
            else:
                content = tuple(self.dram[self.store.catalog.dram[block]])
            name = reader.names[at]
            assert self.is_true(name, content, reader.floor[at]), "wrong bytes were handed out"
            reader.granted.append((page, content))
        self.marks["read beside DRAM"] += bool(reader.beside)
        self.marks["hit in hbm alone"] += any(
            tier == 0 and block in lease.held
            for tier, block in zip(lease.tiers, lease.blocks, strict=True)
        )
        self.marks["hit on nvme"] += 2 in lease.tiers
        self.granted_copies(reader)


def _owner(name: Name) -> bytes:
    return b"%d/%s" % name
