"""What once went wrong in the brain: what happened, who lost what, what fixed it."""

from __future__ import annotations

import pytest

from kvstore.health import DeviceHealth
from kvstore.limits import Limits
from kvstore.orders import MoveKind, Outcome
from kvstore.retention import RETAINED_MAX, Retention
from kvstore.writes import NEW, REFUSED
from tests.brain.desk import PAGE, Desk, keys, stored_below

LOAD, SPILL, VERIFY = MoveKind.LOAD, MoveKind.SPILL, MoveKind.VERIFY


# -- wrong bytes, and crashes ------------------------------------------------------------------


def test_a_vanished_rank_keeps_its_shard() -> None:
    """Rank 1 of two died while it wrote its shard, and its process may go on writing. Its claim was
    withdrawn at once: the restarted rank got the same shard of the same slot, and bytes that the
    old process wrote after the commit would have been served. Now the block is doomed with the
    client: the key can be stored anew, elsewhere, and the slot is free when both ranks are done
    with it."""
    desk = Desk(dram=2)
    entry = desk.layout(2, shards=2)
    rank0, rank1 = desk.client, desk.store.attach("rank 1")
    first = desk.reserve(entry, 1, client=rank0, shard=0)
    assert desk.reserve(entry, 1, client=rank1, shard=1).pages == first.pages
    blocks = desk.store.detach(rank1, desk.now)
    restarted = desk.store.attach("rank 1, restarted")
    assert desk.reserve(entry, 1, client=restarted, shard=1).pages != first.pages
    assert first.lease and desk.store.commit(rank0, first.lease.number, desk.now) == 0
    assert desk.store.room.dram.owner(first.pages[0]) == blocks[0], "not before it is told"
    desk.store.unquarantine(blocks, desk.now)
    desk.store.check()
    assert desk.store.room.dram.used_bytes == 2 * PAGE


def test_a_shard_that_a_vanished_rank_may_write_is_not_given_up() -> None:
    """Rank 0 had committed, rank 1 died writing. The block counted as one that nobody works on, and
    the next who needed room got its slot, under the hands of rank 1's process. Now it is
    quarantined like every slot of a vanished writer."""
    desk = Desk()
    entry = desk.layout(2, shards=2)
    rank1 = desk.store.attach("rank 1")
    desk.put(entry, 1, 2, shard=0)
    pages = desk.reserve(entry, 1, 2, client=rank1, shard=1).pages
    blocks = desk.store.detach(rank1, desk.now)
    assert len(blocks) == 2 and desk.reserve(entry, 3).status == bytes([REFUSED])
    desk.store.unquarantine(blocks, desk.now)
    assert desk.reserve(entry, 3, 4).pages == pages


def test_two_ranks_that_vanish_end_one_after_the_other() -> None:
    """The slot that two vanished clients wrote is free when the second cannot write any more."""
    desk = Desk()
    entry = desk.layout(4, shards=2)
    ranks = [desk.store.attach("0"), desk.store.attach("1")]
    for shard, rank in enumerate(ranks):
        desk.reserve(entry, 1, client=rank, shard=shard)
    gone = [desk.store.detach(rank, desk.now) for rank in ranks]
    desk.store.unquarantine(gone[0], desk.now)
    assert desk.put(entry, 2) == 0
    desk.store.unquarantine(gone[1], desk.now)
    assert desk.put(entry, 2) == 1 and desk.counters.quarantined == 0


def test_a_vanished_rank_ends_before_the_other_is_done() -> None:
    """The slot is free when the rank that lives has committed too: until then it writes."""
    desk = Desk()
    entry = desk.layout(4, shards=2)
    alive = desk.reserve(entry, 1, shard=0)
    rank1 = desk.store.attach("1")
    desk.reserve(entry, 1, client=rank1, shard=1)
    desk.store.unquarantine(desk.store.detach(rank1, desk.now), desk.now)
    assert desk.put(entry, 2) == 0
    assert alive.lease and desk.store.commit(desk.client, alive.lease.number, desk.now) == 0
    assert desk.put(entry, 2) == 1


def test_joining_a_block_does_not_give_it_up() -> None:
    """Rank 1 reserved blocks of which rank 0 had written its shard, and a new one. To make room for
    the new one the store gave up the oldest that nobody worked on: one of those being joined. The
    request ended in a KeyError, and the new block stayed reserved by nobody. Now blocks are claimed
    before room is made."""
    desk = Desk()
    entry = desk.layout(2, shards=2)
    desk.put(entry, 1, 2, shard=0)
    reserved = desk.reserve(entry, 1, 2, 3, shard=1)
    assert reserved.status == bytes([NEW, NEW, REFUSED])
    desk.store.check()


@pytest.mark.parametrize("outcome", [Outcome.CORRUPT, Outcome.DONE])
def test_a_forgotten_block_may_turn_out_damaged(outcome: Outcome) -> None:
    """A block was forgotten while `verify` read it, and the read found damage. The store let a copy
    go that was gone already: an assertion ended the tenant. Now it only frees the slot."""
    desk = stored_below()
    entry = desk.layout()
    desk.store.placement.verify(entry.index[keys(0)[0]], desk.now)
    desk.look()
    desk.store.forget(entry, keys(0))
    desk.finish(outcome=outcome)
    desk.store.check()
    assert desk.store.room.nvme.used_bytes == 3 * PAGE


@pytest.mark.parametrize("first", [LOAD, VERIFY])
def test_two_reads_may_find_the_same_damage(first: MoveKind) -> None:
    """A load and a check of one slot were under way, and both found damage. With the first the slot
    was freed, while the second still read it; with the second the copy was let go again, and an
    assertion ended the tenant. Now the slot is free when the last read has ended."""
    desk = stored_below()
    entry = desk.layout()
    desk.store.placement.verify(entry.index[keys(0)[0]], desk.now)
    desk.look()
    desk.acquire(entry, 0)
    desk.finish(first, Outcome.CORRUPT)
    assert desk.store.room.nvme.used_bytes == 4 * PAGE
    desk.finish(None, Outcome.CORRUPT)
    desk.store.check()
    assert desk.store.room.nvme.used_bytes == 3 * PAGE and desk.tiers(entry, 0) == [0]
    assert desk.counters.nvme.corrupt == 2 and desk.counters.nvme.evicted == {"corrupt": 1}


def test_what_is_forgotten_under_a_lease_does_not_come_back_after_a_restart() -> None:
    """A block was forgotten while a client read it, and the daemon was killed. The slot table still
    said "committed", so the next daemon would have served it. Now its record is rewritten."""
    desk = Desk()
    entry = desk.layout()
    desk.put(entry, 1)
    lease = desk.acquire(entry, 1)
    page = desk.store.catalog.dram[lease.blocks[0]]
    desk.marks.clear()
    desk.store.forget(entry, keys(1))
    desk.look()
    assert desk.marks == {page}


def test_what_is_stored_again_while_fenced_replaces_the_old_copy() -> None:
    """With NVMe fenced a block that it holds is a miss, so the engine stored it again: bytes of its
    own, as two computations rarely agree to the bit. The block kept the checksums of the old copy,
    and the slot table took them over: after a restart the new bytes did not verify. Now the old
    copy is dropped, and the new one is copied when the device works again."""
    desk = stored_below()
    entry = desk.layout()
    desk.store.placement.health.fence(desk.now)
    assert desk.put(entry, 0) == 1
    assert desk.store.catalog.sums[entry.index[keys(0)[0]]] is None
    assert desk.counters.nvme.evicted == {"replaced": 1} and desk.index[0] is None
    desk.now += 2
    desk.store.tick(desk.now)
    desk.look()
    desk.finish(MoveKind.PROBE)
    assert desk.finish(MoveKind.SUM).key == keys(0)[0]
    assert desk.keys_of(desk.moves) == keys(0) and desk.kinds() == [SPILL]


# -- waits without an end ----------------------------------------------------------------------


def test_a_wait_ends_where_the_prefix_was_forgotten() -> None:
    """A client waited for block 0 to come up; block 1 was in DRAM. Block 1 was forgotten, then
    block 0 arrived: the lease went on waiting, for a block that no move would bring, until its
    deadline. Now it is answered with block 0."""
    desk = stored_below()
    entry = desk.layout()
    desk.store.prefetch(entry, keys(1), desk.now)
    desk.look()
    desk.finish_all()
    lease = desk.acquire(entry, 0, 1)
    desk.store.forget(entry, keys(1))
    desk.finish(LOAD)
    assert desk.answers == [lease] and len(lease.blocks) == 1
    desk.store.check()


def test_forgotten_shards_do_not_wait_for_a_shortage() -> None:
    """Blocks of which one shard was written were cleared. They kept their slots until somebody else
    ran out of room, though no lookup could find them. Now they are free at once."""
    desk = Desk()
    entry = desk.layout(2, shards=2)
    desk.put(entry, 1, shard=0)
    half = desk.reserve(entry, 2, shard=0)
    desk.store.clear(range(len(desk.store.catalog.keys)))
    assert desk.store.room.dram.used_bytes == 2 * PAGE
    assert half.lease and desk.store.commit(desk.client, half.lease.number, desk.now) == 0
    assert desk.store.room.dram.used_bytes == 0 and not len(desk.store.catalog)


def test_a_load_gets_the_room_of_shards_that_nobody_completes() -> None:
    """DRAM was full of blocks that one rank had written and the other never would. A reserve could
    have their room, a load could not: every hit on NVMe was a miss. Now both can."""
    desk = stored_below()
    entry, sharded = desk.layout(), desk.layout(2, shards=2)
    desk.put(sharded, 1, 2, shard=0)
    lease = desk.acquire(entry, 0)
    assert not lease.answered and desk.kinds() == [LOAD]


def test_an_exhausted_write_budget_does_not_freeze_dram() -> None:
    """The write budget was spent and DRAM full of blocks that had no copy yet. They were spared, no
    spill was under way that could end, so every put was refused and every hit on NVMe was a miss,
    until the budget had grown. Now the coldest go without a copy."""
    desk = Desk(nvme=4, budget=0.001)
    entry = desk.layout()
    assert desk.put(entry, 1, 2, 3, 4) == 4 and desk.moves == []
    assert desk.put(entry, 5, 6) == 2
    assert desk.tiers(entry, 1, 2, 3, 4) == [1, 1, 0, 0]


def test_retained_blocks_are_saved_when_room_is_short() -> None:
    """DRAM was full of retained blocks without a copy. Retained they were passed over, unsaved they
    could not leave, and nobody ordered their copies: all puts were refused. Now they are saved."""
    desk = Desk(nvme=4, policy="on-evict")
    entry = desk.layout()
    desk.put(entry, 1, 2, 3, 4)
    desk.store.retain(entry, keys(1, 2, 3, 4), 50, None)
    assert desk.reserve(entry, 5).waiting and desk.kinds() == [SPILL]
    desk.finish_all()
    assert desk.put(entry, 5) == 1


def test_the_weakest_that_may_leave_leaves() -> None:
    """The weakest retained block was under a read lease. Room was sought in it alone, and the put
    was refused although the second weakest was free to leave."""
    desk = Desk()
    entry = desk.layout()
    desk.put(entry, 1, 2, 3, 4)
    desk.store.retain(entry, keys(2, 3, 4), 90, None)
    desk.store.retain(entry, keys(1), 10, None)
    desk.acquire(entry, 1)
    assert desk.put(entry, 5) == 1 and desk.tiers(entry, 1) == [1]


# -- who leaves --------------------------------------------------------------------------------


def test_a_put_does_not_push_out_its_own_head() -> None:
    """A client stored a long prompt whose head was there, long untouched: so the head was the first
    to leave for the tail, and the answer called it present. Now it stays, and the tail is refused
    where there is no other room."""
    desk = Desk()
    entry = desk.layout()
    desk.put(entry, 1, 2)
    desk.put(entry, 8, 9)
    assert desk.put(entry, 1, 2, 3, 4) == 2
    assert desk.tiers(entry, 1, 2, 3, 4, 8, 9) == [1, 1, 1, 1, 0, 0]
    assert desk.put(entry, 1, 2, 3, 4, 5) == 0


def test_a_prefetch_does_not_push_out_its_own_head() -> None:
    """As above, for blocks that come up from NVMe."""
    desk = stored_below(blocks=6)
    entry = desk.layout()
    for number in (0, 1, 2, 3):
        desk.store.prefetch(entry, keys(number), desk.now)
    desk.look()
    desk.finish_all()
    assert desk.store.prefetch(entry, keys(*range(6)), desk.now) == 0
    assert desk.tiers(entry, *range(6)) == [1, 1, 1, 1, 2, 2]


def test_the_tail_of_a_put_is_the_first_to_leave_nvme() -> None:
    """Copies to NVMe were made head first, so of blocks never asked for again the head was coldest:
    it left first, and the tail that stayed was of no use to anyone. Now the head is copied last."""
    desk = Desk(dram=2, nvme=1)
    entry = desk.layout()
    desk.put(entry, 1, 2, 3, 4)
    desk.finish_all()
    desk.put(entry, 5)
    desk.finish_all()
    stored = sorted(put.key for put in desk.index.values() if put)
    assert stored == keys(1, 2, 3, 5)


def test_expired_retentions_make_place_for_new_ones() -> None:
    """The places for retained blocks were used up by blocks whose time was over: a retain was
    refused for as long as they stayed in memory."""
    kept = Retention()
    assert all(kept.retain(block, 1, 5.0) for block in range(RETAINED_MAX))
    assert not kept.retain(-1, 1, None)
    kept.expire(4.0)
    assert not kept.retain(-1, 1, None)
    kept.expire(5.0)
    assert kept.retain(-1, 1, None) and len(kept) == 1


# -- accounting --------------------------------------------------------------------------------


def test_the_write_budget_is_taken_for_writes_alone() -> None:
    """NVMe had no slot to give, and each attempt to spill took the block's bytes from the write
    budget all the same: when there was room again, the budget was gone for writes that never were.
    Now they are taken when a spill is ordered."""
    desk = Desk(dram=2, nvme=1, policy="on-evict", budget=PAGE / 10)
    entry = desk.layout()
    desk.now = 1_000.0
    desk.put(entry, 1, 2, 3, 4)
    save_all(desk)
    desk.finish_all()
    desk.store.retain(entry, keys(1, 2, 3, 4), 100, None)
    desk.put(entry, 5, 6, 7, 8)
    desk.now = 2_000.0
    desk.reserve(entry, 9)
    assert SPILL not in desk.kinds()
    desk.store.forget(entry, keys(1, 2, 3, 4))
    save_all(desk)
    assert desk.kinds().count(SPILL) >= 3


def save_all(desk: Desk) -> None:
    desk.store.save_all(desk.now)
    desk.store.tick(desk.now)
    desk.look()


def test_loads_that_are_reported_together_all_count() -> None:
    """Four loads ended within a second and were reported in one go: one of them was counted for the
    second, so NVMe seemed four times slower than it was, and hits on it were left to be
    computed."""
    desk = stored_below(dram=3, blocks=12)
    entry = desk.layout()
    desk.acquire(entry, *range(12))
    for _ in range(3):
        for _ in range(4):
            desk.finish()
        desk.now += 1.0
    seen = desk.store.placement.load_bytes_per_s
    assert seen == pytest.approx(4 * PAGE, rel=0.1)


def test_what_was_under_way_does_not_put_off_the_probe() -> None:
    """A device failed with 32 operations under way. Each failure doubled the wait for the first
    probe: a device that was back after a second was left out for thirty."""
    health = DeviceHealth(present=True)
    for _ in range(32):
        health.failed(10.0)
    assert not health.ok and health.fenced == 1
    assert not health.take_probe(10.9) and health.take_probe(11.0)
    health.failed(11.0)
    assert not health.take_probe(100.0), "one probe at a time"
    health.failed(11.0, probe=True)
    assert not health.take_probe(12.9) and health.take_probe(13.0)


def test_lookup_and_acquire_agree_on_a_block_that_is_written_again() -> None:
    """With NVMe fenced a stored block was being written anew when the device came back. Lookup
    promised it, acquire did not find it."""
    desk = stored_below()
    entry = desk.layout()
    desk.store.placement.health.fence(desk.now)
    desk.reserve(entry, 0)
    desk.store.placement.health.worked()
    assert desk.tiers(entry, 0) == [0] and desk.acquire(entry, 0).blocks == []


def test_a_row_is_not_used_again_while_it_is_remembered() -> None:
    """A block was asked for and forgotten, and its row went to a new block before the policies were
    told of the access: they took the new block for one that had been asked for again, and with
    "second-touch" it was written to NVMe."""
    desk = Desk(nvme=1, policy="second-touch")
    entry = desk.layout()
    desk.put(entry, 1)
    desk.release(desk.acquire(entry, 1))
    desk.store.forget(entry, keys(1))
    desk.put(entry, 2)
    desk.store.digest(desk.now)
    desk.look()
    assert desk.moves == []
    desk.store.forget(entry, keys(2))
    desk.store.digest(desk.now)
    desk.put(entry, 3)
    assert len(desk.store.catalog.keys) == 2, "after that it is"


def test_a_record_of_somebody_else_is_not_deleted() -> None:
    """Blocks found on NVMe late, when others had been written already: a place that is taken by now
    has a record that is right, and keeps it."""
    desk = Desk(nvme=1)
    entry = desk.layout()
    desk.put(entry, 1)
    page = desk.finish().nvme
    desk.index.clear()
    found = desk.store.adopt(
        entry.layout, keys(2, 3), [page * PAGE, 99 * PAGE], [b"2", b"3"], desk.now
    )
    desk.look()
    assert found == 0 and desk.index == {99: None} and desk.tiers(entry, 1, 2, 3) == [1, 0, 0]
    desk.store.adopt(entry.layout, keys(4), [((1 << 32) + 1) * PAGE], [b"4"], desk.now)
    assert desk.tiers(entry, 4) == [0], "a damaged offset is not taken modulo the largest"
    desk.store.check()


# -- work without a bound ----------------------------------------------------------------------


def test_a_full_device_is_tried_once() -> None:
    """NVMe was full of pinned blocks. Every block of a put looked for room there in turn, each time
    through thousands of blocks: a put of 65,536 blocks held the event loop for minutes."""
    desk = Desk(dram=8, nvme=1, limits=Limits())
    entry = desk.layout()
    desk.put(entry, 1, 2, 3, 4)
    desk.finish_all()
    desk.store.retain(entry, keys(1, 2, 3, 4), 100, None)
    tried = _count(desk.store.room, "_pick")
    desk.put(entry, *range(10, 30))
    assert tried == [1] and desk.moves == []
    desk.store.forget(entry, keys(1, 2))
    desk.store.tick(desk.now)
    desk.look()
    assert len(desk.moves) == 2, "and later it is tried again"


def test_a_prefix_that_finds_no_room_is_not_tried_at_every_length() -> None:
    """DRAM was full of leases and a client asked for a long prefix on NVMe. It was shortened by an
    eighth and tried again, ninety times, each time through thousands of blocks. Leaving out blocks
    that are not in DRAM frees nothing, so now they are left out at once."""
    desk = stored_below(nvme=300, blocks=800)
    entry = desk.layout()
    desk.put(entry, 900, 901, 902, 903)
    desk.acquire(entry, 900, 901, 902, 903)
    tried = _count(desk.store.room, "_pick")
    lease = desk.acquire(entry, *range(800))
    assert lease.answered and not lease.blocks and tried == [1]


def test_a_context_that_names_a_block_twice_is_let_go() -> None:
    """A client repeated a key in the part of a list that it had already. To make room the store let
    one of the two holds on that block go and forgot the other: the block could never leave again.
    Now a block of a chain is held once."""
    desk = stored_below()
    entry = desk.layout()
    desk.store.prefetch(entry, keys(0, 1, 2, 3), desk.now)
    desk.look()
    desk.finish_all()
    desk.store.adopt(entry.layout, keys(9), [8 * PAGE], [b"9"], desk.now)
    desk.store.acquire(desk.client, entry, keys(9), desk.now, context=keys(0, 1, 2, 3, 3))
    desk.look()
    desk.finish_all()
    desk.store.check()


def _count(thing: object, name: str) -> list[int]:
    """Counts the calls of a method from now on."""
    calls, method = [0], getattr(thing, name)

    def counted(*args: object, **named: object) -> object:
        calls[0] += 1
        return method(*args, **named)

    setattr(thing, name, counted)
    return calls
