"""How blocks are read: acquire, the wait for loads, release. Part of the brain."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvstore.catalog import FRESH, LOADING, READY, STORED, UNPROVEN, WRITING, LayoutEntry
from kvstore.checksums import SUM_BYTES
from kvstore.errors import TooLarge
from kvstore.holdings import Holdings
from kvstore.leases import ReadLease, Session, Sessions
from kvstore.orders import Move, MoveKind, Outcome
from kvstore.placement import Placement
from kvstore.types import DRAM, HBM, NVME, USED_KEYS_MAX

# Why a grant ends where it does, as on the wire.
END, ABSENT, PENDING, LATE, NO_ROOM, TOO_SLOW, FAILED = range(7)
BESIDE_BYTES_MAX = 1 << 20  # of places and sums in one answer
PROVEN = READY | UNPROVEN  # under this mask, a block that can be read now is READY
STOP_NAMES = ("end", "absent", "pending", "late", "no_room", "too_slow", "failed")


class Reads:
    """Read leases of one tenant. Every answer is noted, for what follows from it later."""

    def __init__(
        self,
        placement: Placement,
        sessions: Sessions,
        holdings: Holdings,
        note: Callable[[ReadLease], None],
    ) -> None:
        self.placement = placement
        self.catalog = placement.catalog
        self.counters = placement.counters
        self.sessions = sessions
        self.holdings = holdings
        self._note = note
        self._waiting: dict[int, list[ReadLease]] = {}  # loading block -> leases that wait for it

    def acquire(
        self,
        session: Session,
        entry: LayoutEntry,
        keys: Sequence[bytes],
        now: float,
        *,
        wait: bool = True,
        enough: int = 0,
        tokens_per_s: float = 0.0,
        context: Sequence[bytes] = (),
        devices: Sequence[int] = (),
        poll: bool = False,
        direct: bool = False,
    ) -> ReadLease:
        """A read lease on the longest prefix that is in DRAM or can be brought there. `context` are
        keys that the list continues; they are not asked for. `devices` name the GPU that each shard
        is wanted on, by its number in the tier. With `poll` the caller, who does not wait, asks
        again for what is on its way. With `direct` nothing is brought anywhere: what is on NVMe
        alone is granted there, at once.

        When `lease.answered` is true the answer is final; else it comes among `orders.answers`, or
        from `cut`. A lease answered without blocks is over already. With `wait`, one that is
        `parked` is over, too: there is no room for its first block, but some will come, so that the
        caller had better ask again.
        """
        if devices:
            self.placement.mirror.check_devices(entry, devices)
        self.holdings.check_leases(session)
        asked = len(keys)
        allowed = self.holdings.allow(session, entry, asked, now, keys)
        if allowed < asked:
            keys = keys[:allowed]
        lease = ReadLease(self.sessions.next_number(), session, entry)
        lease.asked = asked
        lease.keys = keys
        lease.tokens_per_s = tokens_per_s
        lease.context = context
        lease.devices = devices
        lease.direct = direct
        patient = wait and allowed == asked
        self._find(lease, now, wait=wait, poll=poll)
        blocks = lease.blocks
        lease.enough = min(enough or len(blocks), len(blocks))
        session.leases[lease.number] = lease
        if patient and lease.stop == NO_ROOM and not blocks and self.placement.room_will_come:
            lease.answered = lease.parked = True
            del session.leases[lease.number]
        elif lease.ready >= lease.enough:
            self._answer(lease, PENDING if lease.ready < len(blocks) else lease.stop)
        return lease

    def _find(self, lease: ReadLease, now: float, *, wait: bool, poll: bool) -> None:
        """Give a new lease its blocks, pinned, and say in which tiers they are."""
        keys, pins = lease.keys, self.catalog.pins
        blocks, seen = self._resident(lease.entry, keys)
        lease.blocks = blocks
        for block in blocks:
            pins[block] += 1
        lease.ready = len(blocks)
        lease.stop = END if len(keys) == lease.asked else NO_ROOM
        if lease.direct:
            self._reach(lease)
            return
        if lease.ready < len(keys):
            seen |= FRESH
            self._climb(lease, keys, now, tokens_per_s=lease.tokens_per_s)
            if not wait and lease.ready < len(blocks):
                self._shorten(lease, lease.ready, PENDING if poll else LATE)
        lease.tiers = self._tiers(blocks) if seen & FRESH else b"\1" * len(blocks)

    def _resident(self, entry: LayoutEntry, keys: Sequence[bytes]) -> tuple[list[int], int]:
        """The blocks of the longest prefix that is in DRAM, and the flags of any of them."""
        flags, get = self.catalog.flags, entry.index.get
        blocks = list(map(get, keys))
        if None not in blocks:  # the usual case, without a step of the interpreter for each block
            kinds = set(map(flags.__getitem__, blocks))  # type: ignore[arg-type]
            if all(kind & PROVEN == READY for kind in kinds):
                return blocks, FRESH if any(kind & FRESH for kind in kinds) else 0  # type: ignore[return-value]
        seen, prefix = 0, []
        for block in blocks:
            if block is None or flags[block] & PROVEN != READY:
                break
            seen |= flags[block]
            prefix.append(block)
        return prefix, seen

    def cut(self, lease: ReadLease, stop: int) -> None:
        """The wait is over: the lease is answered with what is ready."""
        if not lease.answered:
            self._answer_late(lease, stop if lease.ready < len(lease.blocks) else lease.stop)

    def release(self, session: Session, number: int) -> bool:
        """Whether the lease held until now. It is over."""
        lease = session.leases.get(number)
        if not isinstance(lease, ReadLease) or not lease.answered:
            return False
        del session.leases[number]
        self._let_go(lease)
        return True

    def used(
        self, session: Session, entry: LayoutEntry, keys: Sequence[bytes], tokens_per_s: float
    ) -> None:
        """The session has read these blocks in DRAM again without asking. All count as hits; those
        that have left by now teach nothing more. Raises TooLarge for more than anybody would."""
        if len(keys) > USED_KEYS_MAX:
            raise TooLarge(f"{len(keys)} keys were used: say it of {USED_KEYS_MAX} at most")
        lease = ReadLease(self.sessions.next_number(), session, entry)
        lease.keys, lease.asked, lease.ready = keys, len(keys), len(keys)
        lease.tiers = bytes([DRAM]) * len(keys)
        lease.tokens_per_s = tokens_per_s
        self._count(lease)
        lease.blocks, _ = self._resident(entry, keys)
        lease.ready = lease.asked = len(lease.blocks)
        lease.keys = keys[: lease.ready]
        if lease.blocks:
            self._note(lease)

    def finished(self, move: Move, outcome: Outcome, now: float) -> None:
        """A move has ended: leases that waited for its block go on, or end before it."""
        block = move.block
        waiting = self._waiting.pop(block, ()) if move.kind <= MoveKind.PREFETCH else ()
        if outcome is Outcome.CORRUPT:  # nobody holds its slot for that any more
            self._give_up(waiting, block, "corrupt")
        self.placement.finished(move, outcome, now)
        good = outcome is Outcome.DONE and bool(waiting)  # a probe is of no block
        loaded = good and self.catalog.flags[block] & PROVEN == READY
        if not loaded:
            self._give_up(waiting, block, "")
        for lease in waiting:
            if loaded:
                self._advance(lease)
            if not lease.answered and lease.ready >= lease.enough:
                pending = lease.ready < len(lease.blocks)
                self._answer_late(lease, PENDING if pending else lease.stop)
                self.placement.room.orders.answers.append(lease)
        self.placement.pump(now)

    def _give_up(self, waiting: Sequence[ReadLease], block: int, why: str) -> None:
        """The block has not come: leases that wait for it end before it."""
        for lease in waiting:
            if not lease.answered and block in lease.blocks:
                self._shorten(lease, lease.blocks.index(block), FAILED)
                lease.why = why

    def give_up_loads(self) -> None:
        """The device is fenced: who waits for it is answered with what is there."""
        flags = self.catalog.flags
        for block in [block for block in self._waiting if flags[block] & LOADING]:
            for lease in self._waiting.pop(block, []):
                if lease.answered or block not in lease.blocks:  # it may be named twice
                    continue
                self._shorten(lease, lease.blocks.index(block), FAILED)
                if lease.ready >= lease.enough:
                    self._answer_late(lease, lease.stop)
                    self.placement.room.orders.answers.append(lease)

    def end(self, lease: ReadLease) -> None:
        lease.session.leases.pop(lease.number, None)
        for block in lease.blocks[lease.ready :]:
            waiting = self._waiting.get(block)
            if waiting and lease in waiting:
                waiting.remove(lease)
        lease.answered = True
        self._let_go(lease)

    def _let_go(self, lease: ReadLease) -> None:
        room = self.placement.room
        for block in lease.held:
            room.unhold(block)
        room.unpin(lease.blocks)

    def _climb(
        self,
        lease: ReadLease,
        keys: Sequence[bytes],
        now: float,
        *,
        tokens_per_s: float,
    ) -> None:
        """Lengthen a lease by blocks that are not in DRAM: order or join their loads."""
        flags, get = self.catalog.flags, lease.entry.index.get
        stored = STORED | LOADING if self.placement.health.ok else 0
        chain: list[int] = []
        for key in keys[lease.ready :]:
            block = get(key)
            if block is None or not flags[block] & (READY | stored):
                lease.stop = ABSENT
                break
            if flags[block] & WRITING:
                lease.stop = ABSENT
                break
            chain.append(block)
        worth = self._worth(lease.entry, chain, tokens_per_s)
        if worth < len(chain):
            del chain[worth:]
            lease.stop = TOO_SLOW
        for block in chain:
            self.catalog.pins[block] += 1  # before making room for the next
        held = self.placement.protect(self._context(lease))
        self._load(lease, chain, held, now)
        self.placement.room.unpin(held)
        for block in chain:
            if flags[block] & (LOADING | UNPROVEN):
                self._waiting.setdefault(block, []).append(lease)
        lease.blocks += chain
        self._advance(lease)

    def _reach(self, lease: ReadLease) -> None:
        """Lengthen a direct lease by blocks that are in DRAM or on NVMe, wherever they are."""
        flags, sums, get = self.catalog.flags, self.catalog.sums, lease.entry.index.get
        stored = STORED if self.placement.health.ok else 0
        chain: list[int] = []
        for key in lease.keys[lease.ready :]:
            block = get(key)
            kind = 0 if block is None else flags[block]
            beside = kind & stored and not kind & WRITING
            if block is None or not (
                kind & PROVEN == READY or (beside and sums[block] is not None)
            ):
                lease.stop = PENDING if kind & (UNPROVEN | LOADING) else ABSENT
                break
            chain.append(block)
        worth = self._worth(lease.entry, chain, lease.tokens_per_s)
        if worth < len(chain):
            del chain[worth:]
            lease.stop = TOO_SLOW
        most = max(1, BESIDE_BYTES_MAX // (8 + SUM_BYTES * lease.entry.layout.shards))
        if len(chain) > most:  # whoever asks again for the rest gets it
            del chain[most:]
            lease.stop = NO_ROOM
        for block in chain:
            self.catalog.pins[block] += 1
        lease.blocks += chain
        lease.ready = len(lease.blocks)
        lease.held = [block for block in chain if flags[block] & PROVEN != READY]
        held = set(lease.held)
        lease.tiers = bytes(NVME if block in held else DRAM for block in lease.blocks)
        for block in lease.held:
            self.placement.room.hold(block)

    def _load(self, lease: ReadLease, chain: list[int], held: list[int], now: float) -> None:
        """Order or join the loads of a chain, and cut it where no more fits."""
        flags, at = self.catalog.flags, 0
        while at < len(chain):
            block = chain[at]
            if flags[block] & UNPROVEN:
                self.placement.scrub.demand(block)
            if flags[block] & (READY | LOADING):
                flags[block] |= 0 if flags[block] & READY else FRESH
                at += 1
            elif self.placement.load(block, now, demand=True):
                at += 1
            elif not (
                at == 0
                and not lease.blocks
                and not any(flags[behind] & READY for behind in chain)
                and self.placement.give_up(held)
            ):
                # The head goes before the tail, which the pins have kept in memory until now.
                lease.stop = NO_ROOM
                self._trim(chain, at)

    def _context(self, lease: ReadLease) -> list[int]:
        index = lease.entry.index
        return [index[key] for key in lease.context if key in index]

    def _trim(self, chain: list[int], at: int) -> None:
        """Leave out an eighth of what is behind `at`; all of it, where that gives no slot free."""
        flags, pins = self.catalog.flags, self.catalog.pins
        keep = max(at, len(chain) - max(1, (len(chain) - at) // 8))
        spare = any(flags[block] & READY and pins[block] == 1 for block in chain[keep:])
        while keep > at and not spare:
            keep -= 1
            spare = bool(flags[chain[keep]] & READY) and pins[chain[keep]] == 1
        self.placement.room.unpin(chain[keep:])
        del chain[keep:]

    def _worth(self, entry: LayoutEntry, chain: list[int], tokens_per_s: float) -> int:
        """How many leading blocks of the chain are faster loaded than computed."""
        rate = self.placement.load_bytes_per_s
        if tokens_per_s <= 0 or rate <= 0:
            return len(chain)
        flags, size = self.catalog.flags, entry.layout.block_bytes
        per_load, per_compute = size / rate, entry.layout.block_tokens / tokens_per_s
        gain, best, length = -self.placement.loads * per_load, 0.0, 0
        for at, block in enumerate(chain):
            gain += per_compute - (0 if flags[block] & READY else per_load)
            if gain > best:
                best, length = gain, at + 1
        return length

    def _advance(self, lease: ReadLease) -> None:
        """Count the leading blocks that are ready by now."""
        flags, blocks = self.catalog.flags, lease.blocks
        while lease.ready < len(blocks) and flags[blocks[lease.ready]] & PROVEN == READY:
            lease.ready += 1
        if lease.ready < len(blocks) and not flags[blocks[lease.ready]] & (LOADING | UNPROVEN):
            self._shorten(lease, lease.ready, ABSENT)  # it was forgotten while others were loaded

    def _shorten(self, lease: ReadLease, length: int, stop: int) -> None:
        """The lease ends before this block."""
        gone = lease.blocks[length:]
        del lease.blocks[length:]
        lease.tiers = lease.tiers[:length]
        lease.stop = stop
        lease.enough = min(lease.enough, length)
        for block in gone:
            waiting = self._waiting.get(block)
            if waiting and lease in waiting:
                waiting.remove(lease)
        self.placement.room.unpin(gone)

    def _answer_late(self, lease: ReadLease, stop: int) -> None:
        """As `_answer`, after a wait: what was ready may have been forgotten, or found damaged."""
        flags = self.catalog.flags
        for at, block in enumerate(lease.blocks[: lease.ready]):
            if flags[block] & PROVEN != READY:
                lease.ready, stop = at, ABSENT
                self._shorten(lease, at, stop)
                break
        self._answer(lease, stop)

    def _answer(self, lease: ReadLease, stop: int) -> None:
        """Make the lease final: what is ready is granted, the rest is left."""
        if lease.ready < len(lease.blocks):
            self._shorten(lease, lease.ready, stop)
        lease.stop = stop
        lease.answered = True
        flags, blocks = self.catalog.flags, lease.blocks
        if lease.tiers.count(NVME) and not lease.direct:
            for block in blocks:
                flags[block] &= ~FRESH
        if lease.devices:
            self.placement.mirror.mark(lease)
        self._count(lease)
        self._note(lease)
        if not blocks:
            del lease.session.leases[lease.number]

    def _count(self, lease: ReadLease) -> None:
        """Attribute every key that was answered, once: those that the client has to ask for again
        (still loading, or no room until it releases these) are counted when it does."""
        counters, hit = self.counters, lease.ready
        again = lease.stop == PENDING or (lease.stop == NO_ROOM and hit)
        missed = 0 if again else lease.asked - hit
        counters.asked += hit + missed
        counters.hit += hit
        counters.miss += missed
        lease.missed, lease.why = missed, lease.why or STOP_NAMES[lease.stop]
        lease.slow = slow = lease.tiers.count(NVME)
        on_devices, size = lease.tiers.count(HBM), lease.entry.layout.block_bytes
        counters.nvme.hits += slow
        counters.hbm.hits += on_devices
        counters.hbm.read_bytes += on_devices * size
        counters.dram.hits += hit - slow - on_devices
        beside = slow if lease.direct else 0
        counters.nvme.read_bytes += beside * size
        counters.dram.read_bytes += (hit - on_devices - beside) * size
        tokens = hit * lease.entry.layout.block_tokens
        counters.saved_tokens += tokens
        if lease.tokens_per_s > 0:
            counters.saved_prefill_s += tokens / lease.tokens_per_s

    def _tiers(self, blocks: list[int]) -> bytes:
        """Where each block was found: what was loaded for this very request counts as NVMe."""
        flags = self.catalog.flags
        return bytes(NVME if flags[block] & (FRESH | LOADING) else DRAM for block in blocks)
