"""The store's promises as small examples: copies down, loads up, devices that fail."""

from __future__ import annotations

import pytest

from kvstore.eviction.relevance import Relevance
from kvstore.orders import MoveKind, Outcome
from kvstore.reads import ABSENT, END, FAILED, LATE, NO_ROOM, PENDING, TOO_SLOW
from kvstore.scrub import IN_FLIGHT_MAX
from kvstore.types import DRAM
from tests.brain.desk import PAGE, Desk, keys, stored_below

LOAD, SPILL, SUM, PROBE = MoveKind.LOAD, MoveKind.SPILL, MoveKind.SUM, MoveKind.PROBE


# -- down and up -------------------------------------------------------------------------------


def test_through_copies_at_once() -> None:
    desk = Desk(nvme=1)
    entry = desk.layout()
    desk.put(entry, 1)
    assert desk.kinds() == [SPILL]
    move = desk.finish()
    put = desk.index[move.nvme]
    assert put and put.key == keys(1)[0] and put.sums == move.sums
    assert desk.counters.nvme.spilled == 1


def test_on_evict_copies_when_it_must_and_at_the_end() -> None:
    desk = Desk(nvme=1, policy="on-evict")
    entry = desk.layout()
    desk.put(entry, 1)
    desk.touch(entry, 1)
    assert desk.moves == []
    desk.store.save_all(desk.now)
    desk.store.tick(desk.now)
    desk.look()
    assert desk.kinds() == [SPILL]


def test_second_touch_copies_what_is_asked_for_again() -> None:
    desk = Desk(nvme=2, policy="second-touch")
    entry = desk.layout()
    desk.put(entry, 1, 2, 3, 4)
    desk.touch(entry, 1, 2)
    assert desk.keys_of(desk.moves) == keys(2, 1)
    desk.finish_all()
    desk.touch(entry, 1, 2)
    assert desk.moves == []
    assert desk.put(entry, 5, 6) == 2, "the others may go without a copy"
    assert desk.tiers(entry, 1, 2, 3, 4) == [1, 1, 0, 0]


def test_the_write_budget_bounds_spills() -> None:
    desk = Desk(dram=4, nvme=4, budget=PAGE / 10)
    entry = desk.layout()
    desk.put(entry, *range(12))
    assert len(desk.moves) == 1, "10 s at a tenth of a page"
    desk.finish_all()
    desk.now += 35
    desk.store.tick(desk.now)
    desk.look()
    assert len(desk.moves) == 3
    desk.finish_all()
    desk.now += 10_000
    desk.store.tick(desk.now)
    desk.look()
    assert len(desk.moves) == 6, "not more than a minute's worth is saved up"


def test_the_queue_of_spills_is_bounded() -> None:
    desk = Desk(dram=4, nvme=4, queue_depth=3)
    entry = desk.layout()
    desk.put(entry, *range(8))
    assert len(desk.moves) == 3
    desk.finish()
    assert len(desk.moves) == 3


def test_a_stored_block_comes_up_on_demand() -> None:
    desk = stored_below()
    entry = desk.layout()
    assert desk.tiers(entry, 0, 1) == [2, 2]
    lease = desk.acquire(entry, 0, 1)
    assert not lease.answered and desk.kinds() == [LOAD, LOAD]
    desk.finish(key=1)
    assert desk.answers == []
    desk.finish(key=0)
    assert desk.answers == [lease] and lease.tiers == b"\2\2" and lease.stop == END
    assert (desk.counters.nvme.hits, desk.counters.dram.hits) == (2, 0)
    desk.release(lease)
    assert desk.acquire(entry, 0, 1).tiers == b"\1\1", "the next finds them in DRAM"


def test_a_load_in_flight_is_joined() -> None:
    desk = stored_below()
    entry = desk.layout()
    first, second = desk.acquire(entry, 0), desk.acquire(entry, 0, 1)
    assert desk.keys_of(desk.moves) == keys(0, 1)
    desk.finish()
    assert desk.answers == [first]
    desk.finish()
    assert desk.answers == [first, second] and len(second.blocks) == 2


def test_a_prefetch_is_joined_and_counts_as_a_hit_on_nvme() -> None:
    desk = stored_below()
    entry = desk.layout()
    assert desk.store.prefetch(entry, keys(0, 1, 9), desk.now) == 2
    desk.look()
    assert desk.kinds() == [MoveKind.PREFETCH] * 2
    lease = desk.acquire(entry, 0, 1)
    desk.finish_all()
    assert lease.answered and lease.tiers == b"\2\2" and desk.counters.nvme.promoted == 2


def test_what_is_polled_for_is_counted_once() -> None:
    """Two answers to one request for blocks that come up: a miss first, and then hits."""
    desk = stored_below()
    entry = desk.layout()
    lease = desk.acquire(entry, 0, 1, wait=False, poll=True)
    assert (lease.stop, lease.ready) == (PENDING, 0) and desk.kinds() == [LOAD, LOAD]
    assert (desk.counters.asked, desk.counters.miss) == (0, 0)
    desk.finish_all()
    assert desk.acquire(entry, 0, 1).ready == 2
    assert (desk.counters.asked, desk.counters.hit, desk.counters.miss) == (2, 2, 0)


def test_who_does_not_wait_gets_what_is_there() -> None:
    desk = stored_below()
    entry = desk.layout()
    lease = desk.acquire(entry, 0, 1, wait=False)
    assert lease.answered and not lease.blocks and lease.stop == LATE
    assert desk.kinds() == [LOAD, LOAD], "they come up all the same"
    desk.finish_all()
    assert len(desk.acquire(entry, 0, 1, wait=False).blocks) == 2


def test_enough_is_answered_early() -> None:
    desk = stored_below()
    entry = desk.layout()
    lease = desk.acquire(entry, 0, 1, 2, enough=1)
    desk.finish(key=0)
    assert desk.answers == [lease] and len(lease.blocks) == 1 and lease.stop == PENDING
    assert desk.counters.asked == 1, "the others are counted when they are asked for again"


def test_a_late_answer_is_what_is_ready() -> None:
    desk = stored_below()
    entry = desk.layout()
    lease = desk.acquire(entry, 0, 1, 2)
    desk.finish(key=0)
    desk.finish(key=2)
    desk.store.cut(lease, LATE)
    desk.store.digest(desk.now)
    assert len(lease.blocks) == 1 and lease.stop == LATE and desk.counters.misses == {"late": 2}
    desk.finish_all()
    desk.store.check()


@pytest.mark.parametrize("outcome", [Outcome.CORRUPT, Outcome.FAILED])
def test_a_load_that_fails_ends_the_prefix(outcome: Outcome) -> None:
    desk = stored_below()
    entry = desk.layout()
    lease = desk.acquire(entry, 0, 1, 2)
    desk.finish(key=1, outcome=outcome)
    desk.finish(key=0)
    assert lease.answered and len(lease.blocks) == 1 and lease.stop == FAILED
    desk.release(lease)
    desk.finish_all()
    assert desk.tiers(entry, 1) == [0 if outcome is Outcome.CORRUPT else 2]


def test_the_tail_gives_way_to_the_head() -> None:
    """Blocks 2 and 3 of a prompt are in DRAM, 0 and 1 below, and other leases hold the rest: to
    bring the head up the tail goes, because a tail without its head is worth nothing."""
    desk = stored_below()
    entry = desk.layout()
    desk.put(entry, 9, 8)
    held = desk.acquire(entry, 9, 8)
    desk.store.prefetch(entry, keys(2, 3), desk.now)
    desk.look()
    desk.finish_all()
    assert desk.tiers(entry, 0, 1, 2, 3) == [2, 2, 1, 1]
    lease = desk.acquire(entry, 0, 1, 2, 3)
    desk.finish_all()
    assert lease.answered and len(lease.blocks) == 2 and lease.stop == NO_ROOM
    assert desk.tiers(entry, 2, 3) == [2, 2] and desk.release(held)


def test_what_is_faster_computed_is_not_loaded() -> None:
    desk = stored_below(dram=2, blocks=8)
    entry = desk.layout()
    lease = desk.acquire(entry, 0, 1, 2)
    for _ in range(3):
        desk.now += 1.0
        desk.finish()
    assert desk.store.placement.load_bytes_per_s == PAGE, "a page a second"
    desk.release(lease)
    slow = desk.acquire(entry, 3, 4, tokens_per_s=17.0)
    assert slow.answered and slow.stop == TOO_SLOW and not slow.blocks
    assert not desk.acquire(entry, 3, 4, tokens_per_s=15.0).answered


# -- devices -----------------------------------------------------------------------------------


def test_a_failing_device_is_fenced_and_probed_back() -> None:
    desk = stored_below()
    entry = desk.layout()
    lease = desk.acquire(entry, 0, 1, 2)
    for _ in range(3):
        desk.finish(outcome=Outcome.FAILED)
    assert lease.answered and not lease.blocks
    assert not desk.store.placement.health.ok and desk.tiers(entry, 0) == [0]
    assert desk.acquire(entry, 0).stop == ABSENT and desk.moves == []
    assert desk.put(entry, 5) == 1, "DRAM alone goes on"
    assert desk.moves == []
    for seconds, outcome in ((1.0, Outcome.FAILED), (2.0, Outcome.DONE)):
        desk.now += seconds
        desk.store.tick(desk.now)
        desk.look()
        assert PROBE in desk.kinds()
        desk.finish(PROBE, outcome)
        if SUM in desk.kinds():
            desk.finish(SUM)
    assert desk.store.placement.health.ok and desk.tiers(entry, 0) == [2]
    assert desk.keys_of(desk.moves) == keys(5), "what was put meanwhile is copied now"


def test_verify_drops_what_is_damaged() -> None:
    desk = stored_below()
    entry = desk.layout()
    for number in (0, 1):
        assert desk.store.placement.verify(entry.index[keys(number)[0]], desk.now)
    assert not desk.store.placement.verify(entry.index[keys(1)[0]], desk.now), "one check at a time"
    desk.look()
    desk.finish(key=0)
    desk.finish(key=1, outcome=Outcome.CORRUPT)
    assert desk.tiers(entry, 0, 1, 2) == [2, 0, 2]
    assert desk.counters.nvme.corrupt == 1 and desk.counters.nvme.evicted == {"corrupt": 1}
    desk.store.check()


def test_a_copy_that_failed_is_tried_again_elsewhere() -> None:
    """It was forgotten: the block was in memory alone for as long as it lived. The slot that could
    not be written is not the next one to be tried."""
    desk = Desk(dram=1, nvme=1)
    entry = desk.layout()
    desk.put(entry, 1, 2)
    desk.finish(SPILL, key=2)
    bad = desk.finish(SPILL, Outcome.FAILED, key=1).nvme
    assert SPILL not in desk.kinds(), "not at once: the device may be about to fail"
    desk.store.tick(desk.now)
    desk.look()
    assert desk.finish(SPILL).nvme != bad
    assert desk.store.placement.due() == 0 and desk.counters.nvme.spilled == 2
    desk.store.check()


def test_who_waits_for_a_device_is_answered_when_it_is_fenced() -> None:
    """It hangs: nothing ends. Who waits then, or asks later, gets a miss and does not wait."""
    desk = stored_below()
    entry = desk.layout()
    lease = desk.acquire(entry, 0, 1)
    assert not lease.answered
    desk.now += 1.0
    desk.store.tick(desk.now)
    assert not lease.answered
    desk.now += 60.0
    desk.store.tick(desk.now)
    desk.look()
    assert lease.answered and (lease.ready, lease.stop) == (0, FAILED)
    assert desk.answers == [lease] and not desk.store.placement.health.ok
    again = desk.acquire(entry, 0, 1)
    assert again.answered and again.stop == ABSENT
    desk.finish(LOAD)
    assert desk.store.placement.health.ok, "what hung has ended"
    desk.finish_all()
    assert desk.acquire(entry, 0).ready == 1


def test_what_is_dropped_while_others_are_waited_for_is_not_granted() -> None:
    """The first block had been loaded, and counted as ready, while the second was still on its way.
    It was forgotten then, or found damaged, and granted all the same when the second had come."""
    desk = stored_below()
    entry = desk.layout()
    lease = desk.acquire(entry, 0, 1, 2)
    desk.finish(LOAD, key=0)
    desk.finish(LOAD, key=1)
    assert not lease.answered
    desk.store.forget(entry, keys(1))
    desk.finish(LOAD, key=2)
    assert lease.answered and (lease.ready, lease.stop, len(lease.blocks)) == (1, ABSENT, 1)
    assert desk.release(lease)
    desk.store.digest(desk.now)
    desk.store.check()
    assert (desk.counters.hit, desk.counters.miss) == (1, 2)


def test_who_named_a_block_twice_is_answered_when_the_device_is_fenced() -> None:
    """The block that was named twice was given up before the one ahead of it, for which the request
    still waited. The second time it was not found any more, and the tick ended with an error."""
    desk = stored_below()
    entry = desk.layout()
    leases = [desk.acquire(entry, 1), desk.acquire(entry, 0, 1, 1)]
    desk.now += 1.0
    desk.store.tick(desk.now)
    desk.now += 60.0
    desk.store.tick(desk.now)
    desk.look()
    assert [(one.answered, one.ready, one.stop) for one in leases] == [(True, 0, FAILED)] * 2
    desk.store.check()


def test_a_drain_does_not_wait_for_write_budget() -> None:
    """It waited for days' worth of it."""
    desk = Desk(dram=4, nvme=4, budget=PAGE / 10)
    desk.put(desk.layout(), *range(12))
    desk.store.save_all(desk.now)
    assert not desk.store.placement.drained(desk.now), "one is being written"
    desk.finish_all()
    assert desk.store.placement.drained(desk.now) and desk.store.placement.due() > 0
    desk.now += 20
    assert not desk.store.placement.drained(desk.now), "there is budget for more"
    desk.finish_all()


def test_a_drain_ends_when_no_slot_is_to_be_had() -> None:
    """Every slab of NVMe was full of retained blocks of another size: the drain waited for copies
    that could never be made, and its caller with it."""
    desk = Desk(dram=2, nvme=1)
    small, large = desk.layout(), desk.layout(pages=2)
    desk.put(small, 1, 2, 3, 4)
    desk.finish_all()
    desk.store.retain(small, keys(1, 2, 3, 4), 100, None)
    desk.put(large, 5)
    desk.store.save_all(desk.now)
    assert desk.store.placement.drained(desk.now)
    assert desk.store.placement.due() and desk.tiers(large, 5) == [1]
    desk.store.forget(small, keys(1, 2, 3, 4))
    desk.store.save_all(desk.now)
    assert not desk.store.placement.drained(desk.now), "now it is copied"
    desk.look()
    desk.finish_all()
    assert desk.store.placement.drained(desk.now) and desk.store.placement.due() == 0


def test_blocks_that_left_unsummed_are_not_looked_at_at_every_tick() -> None:
    """Where blocks come faster than their checksums are taken, and ghosts keep their rows."""
    desk = Desk(dram=256, family=Relevance())
    entry = desk.layout()
    for first in range(0, 8_192, 64):
        desk.put(entry, *range(first, first + 64))
        desk.store.tick(desk.now)
        desk.look()
    assert desk.kinds().count(SUM) == IN_FLIGHT_MAX, "none of them has ended"
    room, scrub = desk.store.room, desk.store.placement.scrub
    assert len(desk.store.catalog.ghosts) > 4_096, "else there is nothing to tell apart"
    assert len(scrub._unsummed) <= 2 * room.resident(DRAM) + 1_024
