"""What is checked after every step of a world: bytes, slots, replayed tables, counters.

Everything here is derived from what the hands and the clients see; the store's own columns are only
looked at to be compared with it.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import Counter

from kvstore.catalog import DOOMED, LOADING, NOWHERE, READY, STORED, LayoutEntry
from kvstore.leases import ReadLease, Session, WriteLease
from kvstore.lending import NAME
from kvstore.mirror import NO_OFFSET
from kvstore.orders import IndexPut, Move, MoveKind, Outcome
from kvstore.slots import NOBODY
from kvstore.store import Store
from kvstore.types import NO_GPU, SLOT_ALIGNMENT
from kvstore.writes import Reserved
from tests.brain.rankings import check_family

Token = tuple[bytes, int, int]  # key with layout, version, shard
Name = tuple[int, bytes]  # layout number, key
Bytes = tuple[Token, ...]
JUNK: Token = (b"junk", 0, 0)
WILL_LOAD = (MoveKind.LOAD, MoveKind.PREFETCH)
READS_DRAM = (MoveKind.SPILL, MoveKind.SUM, MoveKind.PROVE, MoveKind.CLIMB)
USES_NVME = (*WILL_LOAD, MoveKind.SPILL, MoveKind.VERIFY)


def sums_of(content: Bytes) -> bytes:
    """A checksum that tells any two contents apart."""
    return repr(content).encode()


@dataclasses.dataclass(eq=False)
class Writer:
    """A client, alive or vanished, that may write some shards of some pages at any time."""

    session: Session
    lease: WriteLease
    names: list[Name]
    pages: list[int]
    shards: tuple[int, ...]
    version: int
    dead: set[int] = dataclasses.field(default_factory=set)  # pages whose block was forgotten

    def places(self) -> list[tuple[int, int]]:
        return [(page, shard) for page in self.pages for shard in self.shards]


@dataclasses.dataclass(eq=False)
class Ghosts:
    """What a vanished client may still write, until it is told that it cannot."""

    blocks: list[int]
    writers: list[Writer]


@dataclasses.dataclass(eq=False)
class Reader:
    """A read lease, with what was true when it was asked for."""

    session: Session
    lease: ReadLease
    names: list[Name]
    floor: list[int]  # for each key, when it was last forgotten
    granted: list[tuple[int | None, Bytes]] | None = None  # page in DRAM
    beside: list[tuple[int, Bytes]] = dataclasses.field(default_factory=list)  # page on NVMe
    copies: list[tuple[int, int, Token]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class Partial:
    """A page some shards of which are done."""

    name: Name
    block: int
    done: set[int]


class Books:
    """The model: simulated bytes, and who may touch which of them."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.entries: list[LayoutEntry] = []
        self.step = 0
        self.dram: dict[int, list[Token]] = {}
        self.nvme: dict[int, Bytes] = {}
        self.hbm: dict[tuple[int, int], Token] = {}  # by device and page
        self.table: dict[int, tuple[str, Name]] = {}  # the slot table, as the marks made it
        self.index: dict[int, IndexPut] = {}  # the NVMe index, as the orders made it
        self.ever: dict[Name, dict[Bytes, int]] = {}  # contents committed, and when
        self.forgotten: dict[Name, int] = {}
        self.writers: list[Writer] = []
        self.ghosts: list[Ghosts] = []
        self.readers: list[Reader] = []
        self.partial: dict[int, Partial] = {}
        self.pending: list[Move] = []
        self.latched: dict[int, Bytes] = {}  # id of a move -> the bytes that it started from
        self.published = 0
        self.saved = 0
        self.marks: Counter[str] = Counter()

    # -- bytes ---------------------------------------------------------------------------------

    def committed(self, name: Name, content: Bytes) -> None:
        """A client was told that these bytes are stored under the name. They replace what is there,
        but for a copy on NVMe that is being checked or read; what was forgotten some may still wait
        for."""
        known, floor = self.ever.setdefault(name, {}), self.forgotten.get(name, -1)
        read = any(name in reader.names and reader.beside for reader in self.readers)
        if not read and not any(
            (m.block, m.key) == (self._block(name), name[1]) for m in self.pending
        ):
            for old in [old for old, step in known.items() if step > floor]:
                del known[old]
        known[content] = self.step
        self.published += 1

    def _block(self, name: Name) -> int | None:
        catalog = self.store.catalog
        block = catalog.layouts[name[0]].index.get(name[1])
        return None if block in catalog.ghosts else block

    def _resident(self) -> set[Name]:
        """Blocks that are in some tier, whether or not it can be used."""
        catalog = self.store.catalog
        return {
            (catalog.layout[block], key)
            for block, key in enumerate(catalog.keys)
            if key is not None and catalog.flags[block] & (READY | STORED)
        }

    def _unsaved(self) -> set[Name]:
        """Blocks in DRAM that have no copy on a device that works."""
        if not self.store.placement.health.ok:
            return set()
        stored = {(put.entry.number, put.key) for put in self.index.values()}
        return {name for state, name in self.table.values() if state == "committed"} - stored

    def is_true(self, name: Name, content: Bytes, floor: int) -> bool:
        """Whether these bytes were committed under the name, and after that step."""
        return self.ever.get(name, {}).get(content, -1) > floor

    def scribble(self) -> None:
        """All that may write, writes."""
        for writer in self.writers:
            self._scribble(writer)
        for ghost in self.ghosts:
            for writer in ghost.writers:
                self._scribble(writer)
        for move in self.pending:
            if move.kind in WILL_LOAD:
                assert move.entry is not None
                self.dram[move.dram] = [JUNK] * move.entry.layout.shards
            elif move.kind is MoveKind.SPILL:
                self.nvme[move.nvme] = (JUNK,)
            elif (
                move.kind is MoveKind.CLIMB and self.store.placement.mirror.devices[move.device].ok
            ):
                self.hbm[move.device, move.hbm] = JUNK

    def _scribble(self, writer: Writer) -> None:
        for page, shard in writer.places():
            self.dram[page][shard] = JUNK

    def granted_copies(self, reader: Reader) -> None:
        """A client is told where to read on its devices."""
        lease, packed = reader.lease, self.store.placement.mirror.offsets(reader.lease)
        assert bool(packed) == (0 in lease.tiers) and len(lease.tiers) == len(lease.blocks)
        offsets, shards = iter(array("Q", packed)), range(lease.entry.layout.shards)
        assert reader.granted is not None
        for tier, (_, content) in zip(lease.tiers if packed else b"", reader.granted, strict=False):
            for shard in shards:
                offset = next(offsets)
                named = lease.devices[shard] != NO_GPU
                assert (offset == NO_OFFSET) == (tier != 0 or not named)
                if tier == 0 and named:
                    place = lease.devices[shard], offset // SLOT_ALIGNMENT
                    assert self.hbm[place] == content[shard], "wrong bytes were handed out in HBM"
                    reader.copies.append((*place, content[shard]))
        self.marks["hit in hbm"] += 0 in lease.tiers

    def climbed(self, move: Move, content: Bytes, outcome: Outcome) -> None:
        """A copy has ended. The model's device keeps what was written, whatever is told of it."""
        if self.store.placement.mirror.devices[move.device].ok:
            done = outcome is Outcome.DONE
            self.hbm[move.device, move.hbm] = content[move.shard] if done else JUNK
            self.marks["climbed"] += done

    # -- checks --------------------------------------------------------------------------------

    def is_read_on_nvme(self, entry: LayoutEntry, key: bytes) -> bool:
        """Whether a lease or a move needs the copy that is there."""
        block = entry.index[key]
        return bool(self.store.catalog.flags[block] & STORED) and self.store.room.held(block)

    def check(self) -> None:
        """Asserts all that must hold between calls."""
        self.store.check()
        check_family(self.store.room.family)
        self._check_bytes()
        self._check_moves()
        self._check_dram()
        self._check_nvme()
        self._check_waiting()
        self._check_lookup()
        self._check_counters()

    def _check_bytes(self) -> None:
        for reader in self.readers:
            for page, content in reader.beside:
                assert self.nvme[page] == content, "bytes on NVMe changed under a read lease"
            for there, content in reader.granted or ():
                assert there is None or tuple(self.dram[there]) == content, (
                    "bytes changed under a read lease"
                )
            for device, page, copy in reader.copies:
                if self.store.placement.mirror.devices[device].ok:
                    assert self.hbm[device, page] == copy, "a copy changed under a read lease"
        for page, (state, name) in self.table.items():
            if state == "committed":
                content, floor = tuple(self.dram[page]), self.forgotten.get(name, -1)
                assert self.is_true(name, content, floor), "a restart would serve wrong bytes"
        for page, put in self.index.items():
            name, content = (put.entry.number, put.key), self.nvme[page]
            assert put.sums == sums_of(content), "the index tells of other bytes"
            assert self.is_true(name, content, self.forgotten.get(name, -1))

    def _check_moves(self) -> None:
        for move in self.pending:
            if move.kind in (*WILL_LOAD, MoveKind.VERIFY):
                assert sums_of(self.nvme[move.nvme]) == move.sums, "a slot changed while it is read"
            elif move.kind in READS_DRAM and move.dram == NOWHERE:
                assert self.nvme[move.nvme] == self.latched[id(move)], "a slot changed while read"
            elif move.kind in READS_DRAM:
                assert tuple(self.dram[move.dram]) == self.latched[id(move)]
        filled = [move.dram for move in self.pending if move.kind in WILL_LOAD]
        written = [move.nvme for move in self.pending if move.kind is MoveKind.SPILL]
        assert len(set(filled)) == len(filled) and len(set(written)) == len(written)
        placement = self.store.placement
        assert placement.loads == len(filled) and placement.spills == len(written)

    def _check_dram(self) -> None:
        """Every slot of DRAM has exactly the holders that the model knows."""
        store, catalog = self.store, self.store.catalog
        places = [place for writer in self._all_writers() for place in writer.places()]
        assert len(set(places)) == len(places), "two writers of one place"
        writing = {page for page, _ in places} | set(self.partial)
        loading = {move.dram for move in self.pending if move.kind in WILL_LOAD}
        granted = {page for reader in self.readers for page, _ in reader.granted or ()}
        leased = {page for page in granted if page is not None}
        committed = {page for page, (state, _) in self.table.items() if state == "committed"}
        for one, other in ((writing, loading), (writing, leased), (loading, leased)):
            assert not one & other, "a slot has two holders"
        assert not committed & (writing | loading)
        for reader in self.readers:
            pages = (catalog.dram[block] for block in reader.lease.blocks)
            leased |= {page for page in pages if page != NOWHERE}
        spilling = {move.dram for move in self.pending if move.kind in READS_DRAM} - {NOWHERE}
        for move in self.pending:  # a forgotten block keeps both its places while one is read
            if move.kind in (MoveKind.VERIFY, MoveKind.CLIMB) and (
                catalog.flags[move.block] & DOOMED
            ):
                spilling |= {catalog.dram[move.block]} - {NOWHERE}
        owners = store.room.dram.owners()
        ready = [session.ready.blocks[0] for session in store.sessions if session.ready]
        writing |= {catalog.dram[block] for block in ready}
        assert owners.keys() == writing | loading | leased | committed | spilling
        assert store.room.dram.used_bytes == self._size(owners)
        expected = {page: self._record(block) for page, block in owners.items()}
        assert self.table == expected, "the slot table is out of date"

    def _record(self, block: int) -> tuple[str, Name]:
        """Of a slot that is being written it is not said for what."""
        catalog = self.store.catalog
        key = catalog.keys[block]
        assert key is not None
        if catalog.flags[block] & READY:
            return "committed", (catalog.layout[block], key)
        return "writing", (catalog.layout[block], b"")

    def _check_nvme(self) -> None:
        store, catalog = self.store, self.store.catalog
        owners = store.room.nvme.owners()
        held = {
            move.nvme
            for move in self.pending
            if move.kind in USES_NVME or (move.kind is MoveKind.CLIMB and move.dram == NOWHERE)
        }
        stored = {
            catalog.nvme[b]: (catalog.layout[b], catalog.keys[b])
            for b, flags in enumerate(catalog.flags)
            if flags & STORED
        }
        indexed = {page: (put.entry.number, put.key) for page, put in self.index.items()}
        assert indexed == stored, "the index is out of date"
        assert held <= owners.keys() and self.index.keys() <= owners.keys()
        for page in owners.keys() - held - self.index.keys():
            assert catalog.flags[owners[page]] & DOOMED, "an NVMe slot that nobody needs"
        assert store.room.nvme.used_bytes == self._size(owners)

    def _check_waiting(self) -> None:
        awaited = (*WILL_LOAD, MoveKind.PROVE)
        loading = {move.block for move in self.pending if move.kind in awaited}
        for reader in self.readers:
            lease = reader.lease
            if not lease.answered:
                assert lease.blocks[lease.ready] in loading, "a lease waits for nothing"
            else:
                assert lease.ready == len(lease.blocks) == len(lease.tiers)

    def _check_lookup(self) -> None:
        """What lookup says is what slot table and index say, key by key."""
        ok = self.store.placement.health.ok
        ready = {name for state, name in self.table.values() if state == "committed"}
        stored = {(put.entry.number, put.key) for put in self.index.values()}
        written = {n for w in self.writers for n, p in zip(w.names, w.pages, strict=True)
                   if p not in w.dead}  # fmt: skip
        written |= {part.name for part in self.partial.values()}
        for entry in self.entries:
            names = {name for name in ready | stored if name[0] == entry.number}
            for key in {key for _, key in names} | set(entry.index):
                name = (entry.number, key)
                tier = b"\1" if name in ready else b""
                if not tier and name in stored and ok and name not in written:
                    tier = b"\2"
                assert self.store.lookup(entry, [key]) == tier

    def _check_counters(self) -> None:
        counters = self.store.counters
        ready = sum(state == "committed" for state, _ in self.table.values())
        assert self.published - counters.dram.evicted.total() == ready
        assert self.saved - counters.nvme.evicted.total() == len(self.index)
        assert counters.hit == counters.dram.hits + counters.nvme.hits + counters.hbm.hits
        left = counters.hbm.promoted - counters.hbm.evicted.total()
        assert left == self.store.placement.mirror.blocks, "copies come and go uncounted"
        assert counters.quarantined == sum(len(ghost.blocks) for ghost in self.ghosts)

    def _all_writers(self) -> list[Writer]:
        return self.writers + [writer for ghost in self.ghosts for writer in ghost.writers]

    def _size(self, owners: dict[int, int]) -> int:
        return sum(self.store.catalog.entry(block).slot_bytes for block in owners.values())

    # -- lent slots ----------------------------------------------------------------------------

    def lent(self, session: Session) -> list[Writer]:
        """What was lent to a session; it writes there when it likes."""
        return [w for w in self.writers if w.session is session and w.names[0][1] == NAME]

    def _note_lent(self) -> None:
        known = {writer.lease for writer in self.writers}
        for session in self.store.sessions:
            for lease in session.lent.values():
                if lease not in known:
                    page = self.store.catalog.dram[lease.blocks[0]]
                    shards = tuple(range(lease.entry.layout.shards))
                    assert page not in self.partial
                    self.dram[page] = [JUNK] * len(shards)
                    self.writers.append(
                        Writer(
                            session, lease, [(lease.entry.number, NAME)], [page], shards, 0, {page}
                        )
                    )
                    self.marks["lent"] += 1

    def took(self, lent: Writer | None, reserved: Reserved, entry: LayoutEntry) -> None:
        """A session that had been lent a slot of its own has reserved whole blocks."""
        if lent is not None and lent.lease.entry is entry and reserved.pages:
            assert reserved.pages[0] == lent.pages[0], "it was lent for nothing"
            self.marks["lent slot taken"] += 1
        if lent is not None and lent.lease.number not in lent.session.lent:
            assert reserved.pages and reserved.pages[0] == lent.pages[0]
            assert reserved.lease is not None and reserved.lease.number == lent.lease.number
            self.writers.remove(lent)

    # -- orders --------------------------------------------------------------------------------

    def carry_out(self) -> list[ReadLease]:
        """Do what the store wants done, as the hands do; the leases that it answered."""
        self._note_lent()
        orders, catalog = self.store.take_orders(), self.store.catalog
        for page in orders.marks:
            block = self.store.room.dram.owner(page)
            if block == NOBODY:
                self.table.pop(page, None)
                continue
            self.table[page] = self._record(block)
        for page, put in orders.index.items():
            if put is None:
                self.index.pop(page, None)
            else:
                self.index[page] = put
        for move in orders.moves:
            if move.kind in READS_DRAM:
                beside = move.dram == NOWHERE
                self.latched[id(move)] = (
                    self.nvme[move.nvme] if beside else tuple(self.dram[move.dram])
                )
            elif move.kind in WILL_LOAD:
                assert catalog.flags[move.block] & LOADING
        self.pending += orders.moves
        for page, part in list(self.partial.items()):
            if self.store.room.dram.owner(page) != part.block:
                self.marks["idle parts given up"] += 1
                assert all(page not in writer.pages for writer in self._all_writers())
                del self.partial[page]
        return orders.answers
