"""How blocks come in: reserve, commit, abort, also shard by shard. Part of the brain."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from kvstore.accesses import NO_HINTS, Hints
from kvstore.catalog import DOOMED, LOADING, READY, STORED, WRITING, LayoutEntry
from kvstore.holdings import Holdings
from kvstore.learning import Learning, Offer
from kvstore.leases import SEVERAL, Session, Sessions, WriteLease
from kvstore.lending import Lending
from kvstore.placement import Placement
from kvstore.types import NVME

NEW, PRESENT, REFUSED = 0, 1, 2  # the answer for each key, as on the wire


@dataclasses.dataclass(slots=True)
class Reserved:
    """The outcome of reserve: for each key a status, and for each new one the page of its slot.

    `chain` are the blocks that were there, and those of the context. `waiting` says that nothing
    was to be had but room will come: park the request and try again.
    """

    status: bytes
    pages: list[int]
    chain: list[int]
    lease: WriteLease | None
    waiting: bool


class _Parts:
    """Shards of one block that is written shard by shard: claimed by a lease, and done. `gone`
    counts vanished clients whose processes may still write theirs."""

    __slots__ = ("claimed", "done", "gone")

    def __init__(self) -> None:
        self.claimed = 0
        self.done = 0
        self.gone = 0


class Writes:
    """Write leases of one tenant."""

    def __init__(
        self,
        placement: Placement,
        sessions: Sessions,
        holdings: Holdings,
        learning: Learning,
    ) -> None:
        self.placement = placement
        self._learning = learning
        self.catalog = placement.catalog
        self.counters = placement.counters
        self.sessions = sessions
        self.holdings = holdings
        self.lending = Lending(placement, sessions)
        holdings.lent = self.lending.rows
        self._parts: dict[int, _Parts] = {}
        # Of them, those that nobody works on, idle for longest first.
        self._idle_parts: OrderedDict[int, None] = OrderedDict()
        placement.reclaim = self._reclaim

    def reserve(
        self,
        session: Session,
        entry: LayoutEntry,
        keys: Sequence[bytes],
        now: float,
        *,
        shard: int | None = None,
        force: bool = False,
        context: Sequence[bytes] = (),
        hints: Hints = NO_HINTS,
        lend: bool = False,
        lent: int = 0,
    ) -> Reserved:
        """Slots for those keys that are not here. Each new key is then being written by the caller.

        With `shard`, a block that others are writing shard by shard is joined. With `force`, blocks
        whose copy on NVMe is still due may be lost to make room. `context` are keys that the list
        continues; they are not asked for. The first new block goes to the slot of the lease `lent`,
        if that can be, and the new lease has that number; with `lend` its commit lends another.
        """
        status = bytearray(len(keys))
        claimed, fresh, present = self._sort_keys(entry, keys, shard, status)
        if claimed or fresh:
            claimed, fresh = self._allow(session, entry, claimed, fresh, status, now)
        if shard is not None:  # before making room: what is claimed is not given up
            self._claim([entry.index[keys[at]] for at in claimed], shard)
        elif self._idle_parts:
            self.give_up_idle(entry.index.get(keys[at]) for at in fresh)
        blocks = self._rows(entry, [keys[at] for at in fresh])
        flags, dram, index = self.catalog.flags, self.catalog.dram, entry.index
        offer = Offer.of(entry, context, keys, fresh, hints)
        chain = [index[key] for key in context if key in index] + present
        spare = self.lending.usable(session, entry, lent) if fresh and shard is None else None
        wanted = self._contested(offer, blocks, chain, now, int(spare is not None))
        seated = self.lending.seat(spare, blocks[:wanted])
        got = seated + self._take(blocks[seated:wanted], chain, now, force)
        offer.cut(got)
        for at in fresh[got:]:
            status[at] = REFUSED
        self.holdings.give_back(session, entry, len(fresh) - got)
        writer = session.number if shard is None else SEVERAL
        for block in blocks[:got]:
            flags[block] |= WRITING
            self.catalog.writers[block] = writer
        self._unrow(blocks[got:])
        waiting = bool(wanted) and not got and not claimed and self.placement.room_will_come
        if not waiting or force:
            self._learning.note(offer)
        granted = blocks[:got]
        if shard is not None:
            self._claim(granted, shard)
            granted = [entry.index[keys[at]] for at in sorted(claimed + fresh[:got])]
        lease = None
        if granted:
            number = lent if seated else self.sessions.next_number()
            lease = WriteLease(number, session, entry, granted, shard)
            self._begins(lease, chain, lend)
        return Reserved(bytes(status), [dram[block] for block in granted], chain, lease, waiting)

    def _allow(
        self,
        session: Session,
        entry: LayoutEntry,
        claimed: list[int],
        fresh: list[int],
        status: bytearray,
        now: float,
    ) -> tuple[list[int], list[int]]:
        """Those of the places whose blocks the session may write now; others are refused."""
        self.holdings.check_leases(session)
        count = len(claimed) + len(fresh)
        allowed = self.holdings.allow(session, entry, count, now)
        if allowed < count:
            return _refuse_tail(claimed, fresh, allowed, status)
        return claimed, fresh

    def _begins(self, lease: WriteLease, chain: list[int], lend: bool) -> None:
        lease.after = [self.catalog.keys[block] for block in chain]
        lease.session.leases[lease.number] = lease
        if lend:
            self.lending.later(lease)

    def _take(self, blocks: list[int], chain: list[int], now: float, force: bool) -> int:
        """Slots for leading blocks; how many got one. Those of their own chain go last."""
        if not blocks:
            return 0
        held = self.placement.protect(chain)
        got = self.placement.take_dram(blocks, now, force=force)
        while not got and self.placement.give_up(held, patient=not force):
            got = self.placement.take_dram(blocks, now, force=force)
        self.placement.room.unpin(held)
        return got

    def commit(self, session: Session, number: int, now: float) -> int | None:
        """The lease's bytes are complete: blocks all of whose shards are become visible.

        Returns how many keys of the lease were stored, None when there is no such lease.
        """
        lease = session.leases.get(number)
        if not isinstance(lease, WriteLease):
            return 0 if self.lending.give_back(session, number) else None
        del session.leases[number]
        flags = self.catalog.flags
        doomed = [block for block in lease.blocks if flags[block] & DOOMED]
        good = lease.blocks
        if doomed:
            good = [block for block in lease.blocks if not flags[block] & DOOMED]
            self.placement.unwrite(doomed if lease.shard is None else self._let_go(doomed, lease))
        stored = len(good)
        if lease.shard is not None:
            good = self._shard_done(good, lease)
        # Stored anew while NVMe was fenced: the bytes may differ from those of the old copy. One
        # copy goes: the new one, where somebody reads the old one just now.
        room = self.placement.room
        needless = {block for block in good if flags[block] & STORED and room.held(block)}
        if needless:
            good = [block for block in good if block not in needless]
            self.placement.unwrite(list(needless))
            stored -= len(needless)
        room.leave(NVME, [block for block in good if flags[block] & STORED], "replaced")
        self.placement.publish(good, now)
        index = lease.entry.index
        if before := [index[key] for key in lease.after if key in index]:
            self.placement.warm(before, now)
        self.placement.store_through(good)
        self.placement.pump(now)
        self.counters.stored += len(good)
        self.counters.dram.written_bytes += len(good) * lease.entry.layout.block_bytes
        return stored

    def abort(self, session: Session, number: int, now: float) -> bool:
        """The lease's blocks will not be written, and nobody writes them any more."""
        lease = session.leases.get(number)
        if not isinstance(lease, WriteLease):
            return self.lending.give_back(session, number)
        del session.leases[number]
        self.counters.aborted += len(lease.blocks)
        self.placement.unwrite(
            lease.blocks if lease.shard is None else self._let_go(lease.blocks, lease)
        )
        return True

    def lend(self, session: Session, number: int) -> tuple[int, int]:
        """Just before the commit of a lease: lease and page of the slot that it lends; 0, 0 where
        it lends none."""
        lease = session.leases.get(number)
        if not isinstance(lease, WriteLease) or not lease.lends:
            return 0, 0
        return self.lending.lend(session, lease.entry)

    def quarantine(self, leases: Iterable[WriteLease]) -> list[int]:
        """Who held these leases has gone, but its processes may still write. Nobody joins the
        blocks or gets their slots until `unquarantine`; another client may store the keys anew."""
        found: dict[int, None] = {}
        for lease in leases:
            found.update(dict.fromkeys(lease.blocks))
            if lease.shard is not None:
                for block in lease.blocks:
                    self._parts[block].claimed &= ~(1 << lease.shard)
        for block in found:
            if (parts := self._parts.get(block)) is not None:
                parts.gone += 1
            self.placement.room.doom([block], "quarantined")
        return list(found)

    def unquarantine(self, blocks: Sequence[int]) -> None:
        """Processes of one vanished client cannot write these blocks any more."""
        over = []
        for block in blocks:
            parts = self._parts.get(block)
            if parts is not None:
                parts.gone -= 1
                if parts.gone or parts.claimed:
                    continue
                del self._parts[block]
            over.append(block)
        self.placement.unwrite(over)

    def give_up_idle(self, blocks: Iterable[int | None]) -> None:
        """These blocks were doomed, or somebody has them whole: those of which some shards are
        written and that nobody works on are over at once."""
        idle = [block for block in blocks if block is not None and block in self._idle_parts]
        for block in idle:
            del self._idle_parts[block], self._parts[block]
        if idle:
            self.placement.unwrite(idle)

    def _let_go(self, blocks: Sequence[int], lease: WriteLease) -> list[int]:
        """The lease's shard of these blocks is not written any more, and is not complete; returns
        the blocks that nobody writes or completes."""
        over = []
        for block in blocks:
            parts = self._parts[block]
            parts.claimed &= ~(1 << (lease.shard or 0))
            if parts.claimed or parts.gone:
                continue
            if parts.done and not self.catalog.flags[block] & DOOMED:
                self._idle_parts[block] = None
            else:
                del self._parts[block]
                over.append(block)
        return over

    def _sort_keys(
        self, entry: LayoutEntry, keys: Sequence[bytes], shard: int | None, status: bytearray
    ) -> tuple[list[int], list[int], list[int]]:
        """Places in the list of keys that can be claimed shard-wise, of keys that are new, and the
        blocks of those present, whose status is filled in."""
        get, flags = entry.index.get, self.catalog.flags
        here = READY | WRITING | LOADING | (STORED if self.placement.health.ok else 0)
        whole, idle = shard is None and bool(self._idle_parts), self._idle_parts
        claimed: list[int] = []
        fresh: list[int] = []
        present: list[int] = []
        for at, key in enumerate(keys):
            block = get(key)
            if block is None or not flags[block] & here or (whole and block in idle):
                fresh.append(at)
                continue
            parts = self._parts.get(block) if shard is not None else None
            if parts is not None and not (parts.claimed | parts.done) >> (shard or 0) & 1:
                claimed.append(at)
                continue
            status[at] = PRESENT
            present.append(block)
        return claimed, fresh, present

    def _rows(self, entry: LayoutEntry, keys: list[bytes]) -> list[int]:
        """Rows for new keys; a block that is on a fenced device keeps the row that it has."""
        rows = list(map(entry.index.get, keys))
        new = [key for key, row in zip(keys, rows, strict=True) if row is None]
        added = self.catalog.add_all(entry, new)
        if len(new) == len(keys):
            return added
        ghosts, rest = self.catalog.ghosts, iter(added)
        for row in rows:
            ghosts.pop(row, None)  # type: ignore[arg-type]  # what has none is no ghost
        return [next(rest) if row is None else row for row in rows]

    def _unrow(self, blocks: Sequence[int]) -> None:
        self.placement.room.settle(blocks, "refused")

    def _contested(
        self, offer: Offer, blocks: list[int], chain: list[int], now: float, ready: int
    ) -> int:
        """How many leading ones of new blocks are worth a slot; some have one `ready`. Where NVMe
        takes what DRAM has no room for, all are; and where nothing is known of their request."""
        room = self.placement.room
        if not blocks or self.placement.health.ok or not room.family.contests:
            return len(blocks)
        asked = self._learning.wanted(offer)
        short = len(blocks) - ready - room.dram.free(offer.entry.slot_bytes)
        if asked is None or short <= 0:
            return len(blocks)
        self._learning.born(offer.rows, offer.fresh, asked)
        held = self.placement.protect(chain)
        wanted = room.contest(offer.entry, blocks, short, now)
        room.unpin(held)
        return wanted

    def _reclaim(self, count: int) -> bool:
        """Give up blocks that nobody completes, at most `count`; False when there are none."""
        count = min(count, len(self._idle_parts))
        stale = [self._idle_parts.popitem(last=False)[0] for _ in range(count)]
        for block in stale:
            del self._parts[block]
        self.placement.unwrite(stale)
        return bool(stale)

    def _claim(self, blocks: Sequence[int], shard: int) -> None:
        """Somebody writes this shard of these blocks."""
        for block in blocks:
            self._parts.setdefault(block, _Parts()).claimed |= 1 << shard
            self._idle_parts.pop(block, None)

    def _shard_done(self, blocks: Sequence[int], lease: WriteLease) -> list[int]:
        """The lease's shard of these blocks is done; returns those that are complete now."""
        complete = []
        every = (1 << lease.entry.layout.shards) - 1
        for block in blocks:
            parts = self._parts[block]
            parts.claimed &= ~(1 << (lease.shard or 0))
            parts.done |= 1 << (lease.shard or 0)
            if parts.done == every:
                del self._parts[block]
                complete.append(block)
            elif not parts.claimed:
                self._idle_parts[block] = None
        return complete


def _refuse_tail(
    claimed: list[int], fresh: list[int], allowed: int, status: bytearray
) -> tuple[list[int], list[int]]:
    """Of the places that could be written, the first `allowed`; the others are refused."""
    places = sorted(claimed + fresh)
    for at in places[allowed:]:
        status[at] = REFUSED
    end = places[allowed]
    return [at for at in claimed if at < end], [at for at in fresh if at < end]
