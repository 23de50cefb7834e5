"""A store at hand for examples: one client, layouts by slot size, moves that end when told to."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.catalog import LayoutEntry
from kvstore.eviction.base import Family, Independent
from kvstore.eviction.lru import LRU
from kvstore.leases import ReadLease, Session
from kvstore.limits import Limits
from kvstore.orders import IndexPut, Move, MoveKind, Outcome
from kvstore.placement import PlacementConfig
from kvstore.store import Store
from kvstore.types import SLOT_ALIGNMENT, Layout
from kvstore.writes import NEW, Reserved

PAGE = SLOT_ALIGNMENT


def keys(*numbers: int) -> list[bytes]:
    return [b"key%05d" % number for number in numbers]


class Desk:
    """`dram` and `nvme` are slabs of `slab_pages` pages; nothing ends or is digested by itself."""

    def __init__(
        self,
        dram: int = 1,
        nvme: int = 0,
        *,
        slab_pages: int = 4,
        policy: str = "through",
        budget: float | None = None,
        queue_depth: int = 32,
        spread: int = 1,
        limits: Limits | None = None,
        idle_s: float = 0.0,
        family: Family | None = None,
        hbm: Sequence[int] = (),
    ) -> None:
        config = PlacementConfig(
            dram_bytes=dram * slab_pages * PAGE,
            nvme_bytes=nvme * slab_pages * PAGE,
            slab_bytes=slab_pages * PAGE,
            write_policy=policy,
            write_budget=budget,
            spread=spread,
            queue_depth=queue_depth,
            idle_s=idle_s,
            hbm_bytes=tuple(slabs * slab_pages * PAGE for slabs in hbm),
        )
        self.store = Store(config, limits or Limits(), family or Independent(LRU))
        self.counters = self.store.counters
        self.now = 10.0
        self.client = self.store.attach("client")
        self.moves: list[Move] = []
        self.marks: set[int] = set()
        self.index: dict[int, IndexPut | None] = {}
        self.answers: list[ReadLease] = []

    def layout(self, pages: int = 1, shards: int = 1, model: str = "m") -> LayoutEntry:
        return self.store.open(
            Layout(
                model=model,
                engine="e",
                dtype="d",
                block_tokens=16,
                shards=shards,
                shard_bytes=pages * PAGE // shards,
            )
        )

    def reserve(
        self,
        entry: LayoutEntry,
        *numbers: int,
        client: Session | None = None,
        shard: int | None = None,
        force: bool = False,
    ) -> Reserved:
        who = client or self.client
        done = self.store.reserve(who, entry, keys(*numbers), self.now, shard=shard, force=force)
        self.look()
        return done

    def put(
        self,
        entry: LayoutEntry,
        *numbers: int,
        client: Session | None = None,
        shard: int | None = None,
    ) -> int:
        """Store blocks; how many were new and are taken."""
        reserved = self.reserve(entry, *numbers, client=client, shard=shard)
        if reserved.lease:
            self.store.commit(client or self.client, reserved.lease.number, self.now)
        self.look()
        return reserved.status.count(NEW)

    def acquire(
        self,
        entry: LayoutEntry,
        *numbers: int,
        wait: bool = True,
        enough: int = 0,
        tokens_per_s: float = 0.0,
        poll: bool = False,
        devices: Sequence[int] = (),
        direct: bool = False,
    ) -> ReadLease:
        lease = self.store.acquire(
            self.client,
            entry,
            keys(*numbers),
            self.now,
            wait=wait,
            enough=enough,
            tokens_per_s=tokens_per_s,
            poll=poll,
            devices=devices,
            direct=direct,
        )
        self.look()
        return lease

    def touch(self, entry: LayoutEntry, *numbers: int) -> None:
        """Ask for blocks and be done with them."""
        self.store.release(self.client, self.acquire(entry, *numbers).number)
        self.store.digest(self.now)
        self.look()

    def release(self, lease: ReadLease) -> bool:
        return self.store.release(lease.session, lease.number)

    def tiers(self, entry: LayoutEntry, *numbers: int) -> list[int]:
        """For each block alone the tier that it is in; 0 for none."""
        return [next(iter(self.store.lookup(entry, [key])), 0) for key in keys(*numbers)]

    def look(self) -> None:
        """Take the orders; they pile up here."""
        orders = self.store.take_orders()
        self.moves += orders.moves
        self.marks |= orders.marks
        self.index |= orders.index
        self.answers += orders.answers

    def finish(
        self, kind: MoveKind | None = None, outcome: Outcome = Outcome.DONE, key: int | None = None
    ) -> Move:
        """The oldest move, or the oldest of a kind or block, ends."""
        wanted = None if key is None else keys(key)[0]
        move = next(m for m in self.moves if kind in (None, m.kind) and wanted in (None, m.key))
        self.moves.remove(move)
        if move.kind in (MoveKind.SPILL, MoveKind.SUM, MoveKind.PROVE):
            move.sums = b"sums of %s" % move.key
        self.store.finished(move, outcome, self.now)
        self.look()
        return move

    def finish_all(self) -> None:
        while self.moves:
            self.finish()
        self.store.check()

    def kinds(self) -> list[MoveKind]:
        return [move.kind for move in self.moves]

    def keys_of(self, moves: Sequence[Move]) -> list[bytes]:
        return [move.key for move in moves]


def stored_below(*, dram: int = 1, nvme: int = 4, blocks: int = 4) -> Desk:
    """Blocks 0.. of layout 0 are on NVMe alone."""
    desk = Desk(dram, nvme)
    entry = desk.layout()
    offsets = [at * PAGE for at in range(blocks)]
    sums = [b"sum%d" % at for at in range(blocks)]
    desk.store.adopt(entry.layout, keys(*range(blocks)), offsets, sums, desk.now)
    return desk
