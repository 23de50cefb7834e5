"""The store's promises as small examples: putting, getting, room, leases, shards."""

from __future__ import annotations

import pytest

from kvstore.errors import InvalidLayout, LimitExceeded
from kvstore.limits import Limits
from kvstore.orders import MoveKind
from kvstore.reads import ABSENT, END
from kvstore.writes import NEW, PRESENT, REFUSED
from tests.brain.desk import PAGE, Desk, keys

SPILL = MoveKind.SPILL


# -- putting and getting -----------------------------------------------------------------------


def test_a_block_is_visible_when_it_is_committed() -> None:
    desk = Desk()
    entry = desk.layout()
    reserved = desk.reserve(entry, 1, 2)
    assert reserved.lease and reserved.status == bytes([NEW, NEW]) and reserved.pages == [0, 1]
    assert desk.tiers(entry, 1) == [0] and not desk.acquire(entry, 1).blocks
    assert desk.store.commit(desk.client, reserved.lease.number, desk.now) == 2
    assert desk.tiers(entry, 1, 2) == [1, 1]
    assert desk.reserve(entry, 1).status == bytes([PRESENT])


def test_a_get_is_the_longest_prefix() -> None:
    desk = Desk()
    entry = desk.layout()
    desk.put(entry, 1, 2, 4)
    lease = desk.acquire(entry, 1, 2, 3, 4)
    assert lease.answered and len(lease.blocks) == 2 and lease.stop == ABSENT
    assert desk.acquire(entry, 1, 2).stop == END
    counters = desk.counters
    assert (counters.asked, counters.hit, counters.miss) == (6, 4, 2)


def test_layouts_do_not_see_each_other() -> None:
    desk = Desk()
    one, other = desk.layout(model="one"), desk.layout(model="other")
    desk.put(one, 1)
    assert desk.tiers(other, 1) == [0] and desk.layout(model="one") is one


def test_aborted_blocks_never_were() -> None:
    desk = Desk()
    entry = desk.layout()
    lease = desk.reserve(entry, 1).lease
    assert lease and desk.store.abort(desk.client, lease.number, desk.now)
    assert desk.store.room.dram.used_bytes == 0 and desk.tiers(entry, 1) == [0]
    assert not desk.store.abort(desk.client, lease.number, desk.now)
    assert desk.store.commit(desk.client, lease.number, desk.now) is None


def test_a_layout_too_large_for_a_slab_is_refused() -> None:
    with pytest.raises(InvalidLayout, match="raise dram"):
        Desk().layout(pages=5)


def test_bounds_refuse_and_change_nothing() -> None:
    desk = Desk(limits=Limits(leases_per_session=1, sessions=1, layouts=1))
    entry = desk.layout()
    held = desk.reserve(entry, 1)
    with pytest.raises(LimitExceeded, match="leases_per_session"):
        desk.reserve(entry, 2)
    with pytest.raises(LimitExceeded, match="leases_per_session"):
        desk.acquire(entry, 1)
    with pytest.raises(LimitExceeded, match=r"limits\.sessions"):
        desk.store.attach("other")
    with pytest.raises(LimitExceeded, match=r"limits\.layouts"):
        desk.layout(pages=2)
    assert held.lease and desk.store.commit(desk.client, held.lease.number, desk.now) == 1
    desk.store.check()


# -- room --------------------------------------------------------------------------------------


def test_the_coldest_leaf_leaves_first() -> None:
    desk = Desk()
    entry = desk.layout()
    desk.put(entry, 1, 2)
    desk.put(entry, 3, 4)
    desk.touch(entry, 1, 2)
    desk.put(entry, 5)
    assert desk.tiers(entry, 1, 2, 3, 4, 5) == [1, 1, 1, 0, 1]


def test_blocks_read_again_without_asking_count_and_teach() -> None:
    desk = Desk()
    entry = desk.layout()
    desk.put(entry, 1, 2)
    desk.put(entry, 3, 4)
    desk.store.used(desk.client, entry, keys(1, 2), 160.0)
    desk.store.digest(desk.now)
    counters = desk.counters
    assert (counters.asked, counters.hit, counters.miss) == (2, 2, 0)
    assert (counters.dram.hits, counters.dram.read_bytes) == (2, 2 * PAGE)
    assert (counters.saved_tokens, counters.saved_prefill_s) == (32, 0.2)
    assert not desk.client.leases
    desk.put(entry, 5)
    assert desk.tiers(entry, 1, 2, 3, 4, 5) == [1, 1, 1, 0, 1]
    # What has left since it was read was read all the same.
    desk.store.forget(entry, keys(2))
    desk.store.used(desk.client, entry, keys(1, 2), 0.0)
    desk.store.used(desk.client, entry, keys(2), 0.0)
    desk.store.digest(desk.now)
    assert (counters.asked, counters.hit, counters.miss) == (5, 5, 0)
    desk.store.check()


def test_dram_full_of_leases_refuses_at_once() -> None:
    desk = Desk(nvme=4)
    entry = desk.layout()
    desk.put(entry, 1, 2, 3, 4)
    desk.finish_all()
    lease = desk.acquire(entry, 1, 2, 3, 4)
    refused = desk.reserve(entry, 5)
    assert refused.status == bytes([REFUSED]) and not refused.waiting and refused.lease is None
    assert desk.reserve(entry, 5, force=True).status == bytes([REFUSED])
    assert desk.release(lease) and desk.put(entry, 5) == 1


def test_a_block_whose_copy_is_due_is_spared() -> None:
    desk = Desk(nvme=4, policy="on-evict")
    entry = desk.layout()
    desk.put(entry, 1, 2, 3, 4)
    assert desk.moves == []
    answer = desk.reserve(entry, 5, 6)
    assert answer.waiting and answer.status == bytes([REFUSED, REFUSED])
    assert desk.kinds() == [SPILL] * 4
    desk.finish_all()
    assert desk.put(entry, 5, 6) == 2
    assert desk.tiers(entry, 1, 2, 3, 4) == [1, 1, 2, 2], "the tail left, its copy did not"


def test_with_force_it_is_lost() -> None:
    desk = Desk(nvme=4, policy="on-evict")
    entry = desk.layout()
    desk.put(entry, 1, 2, 3, 4)
    assert desk.reserve(entry, 5, force=True).lease
    assert desk.tiers(entry, 1, 2, 3, 4) == [1, 1, 1, 0] and desk.moves == []


def test_a_full_nvme_forgets_its_coldest() -> None:
    desk = Desk(dram=2, nvme=1)
    entry = desk.layout()
    desk.put(entry, 1, 2, 3, 4)
    desk.finish_all()
    desk.touch(entry, 1, 2, 3, 4)
    desk.put(entry, 5)
    desk.finish_all()
    assert desk.counters.nvme.evicted == {"room": 1}
    stored = [put.key for put in desk.index.values() if put]
    assert sorted(stored) == keys(1, 2, 3, 5)


def test_slabs_change_hands_the_least_valuable_first() -> None:
    desk = Desk(dram=3)
    small, large = desk.layout(1), desk.layout(2)
    for slab, at in enumerate((10.0, 30.0, 15.0)):
        desk.now = at
        desk.put(small, *range(4 * slab, 4 * slab + 4))
    desk.now = 16.0
    assert desk.put(large, 1) == 1
    assert desk.tiers(small, 0, 4, 8) == [0, 1, 1], "that of 10 s"
    desk.now = 40.0
    assert desk.put(large, 2, 3) == 2
    assert desk.tiers(small, 4, 8) == [1, 0], "that of 15 s"
    assert desk.counters.dram.evicted == {"slab": 8}


def test_a_slab_in_use_does_not_change_hands() -> None:
    desk = Desk(dram=1)
    small, large = desk.layout(1), desk.layout(2)
    desk.put(small, 1)
    lease = desk.acquire(small, 1)
    assert desk.put(large, 1) == 0
    desk.release(lease)
    assert desk.put(large, 1) == 1


def test_a_slab_is_saved_before_it_changes_hands() -> None:
    desk = Desk(dram=1, nvme=4, policy="on-evict")
    small, large = desk.layout(1), desk.layout(2)
    desk.put(small, 1, 2)
    assert desk.reserve(large, 1).waiting
    desk.finish_all()
    assert desk.put(large, 1) == 1 and desk.tiers(small, 1, 2) == [2, 2]


def test_retained_blocks_leave_last_and_pinned_ones_never() -> None:
    desk = Desk()
    entry = desk.layout()
    desk.put(entry, 1, 2, 3, 4)
    for number, priority in ((4, 100), (3, 50), (2, 10)):
        desk.store.retain(entry, keys(number), priority, None)
    left = []
    for number in range(5, 9):
        before = desk.tiers(entry, *range(1, number))
        desk.put(entry, number)
        desk.store.retain(entry, keys(number), 100, None)
        after = desk.tiers(entry, *range(1, number))
        left += [at + 1 for at in range(number - 1) if before[at] and not after[at]]
    assert left == [1, 2, 3], "the weakest first; then only pinned ones are left"
    assert desk.tiers(entry, 8) == [0], "and the last was refused"


def test_retention_ends_with_its_time() -> None:
    desk = Desk()
    entry = desk.layout()
    desk.put(entry, 1, 2, 3, 4)
    desk.store.retain(entry, keys(1, 2, 3, 4), 100, desk.now + 5)
    assert desk.put(entry, 5) == 0
    desk.now += 5
    assert desk.put(entry, 5) == 1


# -- leases ------------------------------------------------------------------------------------


def test_forgotten_under_a_lease_the_bytes_stay() -> None:
    desk = Desk()
    entry = desk.layout()
    desk.put(entry, 1, 2, 3, 4)
    lease = desk.acquire(entry, 1, 2)
    pages = [desk.store.catalog.dram[block] for block in lease.blocks]
    assert desk.store.forget(entry, keys(1, 2)) == 2
    assert desk.tiers(entry, 1, 2) == [0, 0]
    assert desk.put(entry, 5, 6, 7, 8) == 2, "what was not leased"
    assert not set(desk.reserve(entry, 1, 2).pages) & set(pages)
    assert desk.release(lease), "it held to the end"
    assert set(desk.reserve(entry, 3, 4).pages) == set(pages)


def test_a_vanished_reader_holds_nothing() -> None:
    desk = Desk()
    entry = desk.layout()
    desk.put(entry, 1, 2, 3, 4)
    desk.acquire(entry, 1, 2, 3, 4)
    assert desk.store.detach(desk.client, desk.now) == []
    desk.client = desk.store.attach("next")
    assert desk.put(entry, 5, 6, 7, 8) == 4


def test_a_vanished_writers_slots_are_quarantined() -> None:
    desk = Desk()
    entry = desk.layout()
    pages = set(desk.reserve(entry, 1, 2, 3).pages)
    blocks = desk.store.detach(desk.client, desk.now)
    desk.client = desk.store.attach("next")
    assert len(blocks) == 3 and desk.counters.quarantined == 3
    again = desk.reserve(entry, 1, 2)
    assert again.status == bytes([NEW, REFUSED]), "the key is free, the slots are not"
    assert not set(again.pages) & pages
    desk.store.unquarantine(blocks, desk.now)
    assert desk.counters.quarantined == 0 and desk.put(entry, 2, 3, 4) == 3


def test_clear_leaves_what_is_held_until_it_is_let_go() -> None:
    desk = Desk(dram=2, nvme=2)
    entry = desk.layout()
    desk.put(entry, 1, 2)
    writing = desk.reserve(entry, 3)
    lease = desk.acquire(entry, 1)
    assert desk.store.clear(range(len(desk.store.catalog.keys))) == 3 and desk.tiers(
        entry, 1, 2
    ) == [0, 0]
    desk.look()
    desk.finish_all()
    assert writing.lease and desk.store.commit(desk.client, writing.lease.number, desk.now) == 0
    assert desk.release(lease)
    assert not desk.store.room.dram.used_bytes and not desk.store.room.nvme.used_bytes
    assert not len(desk.store.catalog)


# -- shards ------------------------------------------------------------------------------------


def test_a_block_is_visible_when_all_its_shards_are() -> None:
    desk = Desk()
    entry, other = desk.layout(2, shards=2), desk.store.attach("rank 1")
    first, second = (
        desk.reserve(entry, 1, client=who, shard=shard)
        for shard, who in enumerate((desk.client, other))
    )
    assert first.pages == second.pages and first.lease and second.lease
    assert desk.reserve(entry, 1, client=other, shard=1).status == bytes([PRESENT])
    desk.store.commit(other, second.lease.number, desk.now)
    assert desk.tiers(entry, 1) == [0], "one rank alone never hits"
    desk.store.commit(desk.client, first.lease.number, desk.now)
    assert desk.tiers(entry, 1) == [1] and desk.counters.stored == 1


def test_an_aborted_shard_can_be_written_by_another() -> None:
    desk = Desk()
    entry = desk.layout(2, shards=2)
    desk.put(entry, 1, shard=0)
    lease = desk.reserve(entry, 1, shard=1).lease
    assert lease and desk.store.abort(desk.client, lease.number, desk.now)
    assert desk.put(entry, 1, shard=0) == 0 and desk.put(entry, 1, shard=1) == 1
    assert desk.tiers(entry, 1) == [1]


def test_who_has_a_block_whole_does_not_wait_for_its_shards() -> None:
    """Nobody may ever write the others; while somebody does, it is his."""
    desk = Desk()
    entry = desk.layout(2, shards=2)
    desk.put(entry, 1, 2, shard=0)
    writing = desk.reserve(entry, 2, shard=1).lease
    assert writing is not None
    assert desk.reserve(entry, 1, 2).status == bytes([NEW, PRESENT])
    desk.store.check()
    assert desk.store.commit(desk.client, writing.number, desk.now) == 1
    assert desk.tiers(entry, 2) == [1]


def test_who_may_hold_no_more_takes_no_shards_away() -> None:
    desk = Desk(limits=Limits(bytes_per_session=2 * PAGE))
    entry, greedy = desk.layout(2, shards=2), desk.store.attach("greedy")
    desk.put(entry, 1, shard=0)
    desk.reserve(entry, 7, client=greedy)
    assert desk.reserve(entry, 1, client=greedy).status == bytes([REFUSED])
    desk.put(entry, 1, shard=1)
    assert desk.tiers(entry, 1) == [1], "the other rank completes it"


def test_shards_that_nobody_completes_go_before_anyone_is_refused() -> None:
    desk = Desk()
    entry = desk.layout(2, shards=2)
    desk.put(entry, 1, 2, shard=0)
    assert desk.put(entry, 3) == 1
    assert desk.put(entry, 1, shard=1) == 0 or desk.tiers(entry, 1) == [0]
