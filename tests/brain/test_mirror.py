"""Copies in GPU memory beside the blocks below: what once went wrong between them."""

from __future__ import annotations

from kvstore.catalog import READY, STORED
from kvstore.types import DRAM, NO_GPU
from tests.brain.desk import Desk, keys, stored_below


def test_blocks_of_one_size_whose_shards_are_of_two() -> None:
    """Blocks of two layouts, with one shard and with two, had slots of one size in memory, and of
    two sizes on the device. When they left memory in one go, one ranking heard of both, and the
    other would have named a copy that was gone."""
    desk = Desk(dram=2, hbm=(4, 4))
    whole, halves = desk.layout(2), desk.layout(2, shards=2)
    for entry, devices in ((whole, (0,)), (halves, (0, NO_GPU))):
        desk.put(entry, 1)
        for _ in range(3):
            lease = desk.acquire(entry, 1, devices=devices)
            desk.release(lease)
            desk.store.digest(desk.now)
            desk.look()
        desk.finish_all()
    rows = [entry.index[keys(1)[0]] for entry in (whole, halves)]
    assert desk.store.placement.mirror.blocks == 2
    desk.store.room.leave(DRAM, rows, "room")
    desk.store.check()
    assert desk.store.placement.mirror.blocks == 0


def test_a_copy_that_is_read_on_nvme_is_not_replaced() -> None:
    """With NVMe fenced a block was stored anew while a client read the old copy from the file, the
    slot of which could not be given up. It then had new bytes in memory beside the sums of the old
    ones: a check called it damaged, and a GPU got either copy. Now the new bytes go."""
    desk = stored_below()
    entry = desk.layout()
    row, old = entry.index[keys(0)[0]], b"sum0"
    lease = desk.acquire(entry, 0, direct=True)
    assert lease.held == [row]
    desk.store.placement.health.fence(desk.now)
    assert desk.put(entry, 0, 9) == 2
    catalog = desk.store.catalog
    assert catalog.flags[row] & (READY | STORED) == STORED and catalog.sums[row] == old
    assert desk.tiers(entry, 9) == [1], "the other one is stored"
    desk.store.check()
    assert desk.release(lease)
    assert desk.put(entry, 0) == 1
    assert catalog.flags[row] & (READY | STORED) == READY and catalog.sums[row] is None
    desk.store.check()
