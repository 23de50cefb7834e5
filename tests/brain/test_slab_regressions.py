"""What once went wrong when slabs changed hands: whose blocks were lost to whom, and why."""

from __future__ import annotations

import pytest

from kvstore.eviction.relevance import Relevance
from kvstore.writes import REFUSED
from tests.brain.desk import Desk, keys


def test_a_slab_whose_blocks_are_hit_on_nvme_stays() -> None:
    """The use of a slab of NVMe was noted when a block was written to it, never when one was hit:
    the slab of a layout whose blocks were read all day went to another layout as the idlest."""
    desk = Desk(dram=8, nvme=3)
    hot, cold, third = desk.layout(1), desk.layout(2), desk.layout(4)
    for now, entry in ((10.0, hot), (20.0, cold)):
        desk.now = now
        desk.put(entry, 1)
        desk.finish_all()
    desk.now = 30.0
    desk.touch(hot, 1)
    desk.put(third, 1)
    desk.finish_all()
    desk.put(third, 2)
    desk.finish_all()
    stored = {(put.entry.number, put.key) for put in desk.index.values() if put}
    assert (hot.number, keys(1)[0]) in stored and (cold.number, keys(1)[0]) not in stored


@pytest.mark.parametrize("force", [False, True])
def test_hot_blocks_do_not_go_while_copies_are_under_way(force: bool) -> None:
    """A burst of large blocks was still on its way to NVMe, so none of them could leave: for want
    of victims of that size the slab of a small layout was taken, though its blocks were asked
    for all the time. An engine then waited 300 ms for what it had just used."""
    desk = Desk(dram=2, nvme=4)
    small, large = desk.layout(1), desk.layout(2)
    desk.put(small, 1)
    desk.finish_all()
    desk.now = 20.0
    desk.put(large, 1, 2)
    desk.touch(small, 1)
    assert {move.key for move in desk.moves} == set(keys(1, 2)), "they are being copied"
    refused = desk.reserve(large, 3, force=force)
    assert refused.status[0] == REFUSED and refused.waiting
    assert desk.tiers(small, 1) == [1]
    desk.finish_all()
    assert desk.put(large, 3) == 1
    assert desk.tiers(small, 1) == [1]


def test_a_slab_that_is_worth_more_than_what_is_new_stays() -> None:
    """Slabs were compared by when they were last used. A burst of large blocks replaced all others
    of their size in a moment, so the slab of another layout was the oldest: its blocks, asked for
    every second, went for some that nobody ever asked for."""
    desk = Desk(dram=3, family=Relevance())
    small, large = desk.layout(1), desk.layout(2)
    desk.put(small, 1)
    for second in range(200):
        desk.touch(small, 1)
        for number in range(5):  # there is room for four
            desk.now += 0.05
            assert desk.put(large, 5 * second + number) == 1
            desk.store.digest(desk.now)
        desk.now += 1.0
        assert desk.tiers(small, 1) == [1], f"gone in second {second}"
    desk.now += 3_600.0  # and then nobody comes back to it
    for number in range(1_000, 1_060):
        desk.touch(large, number - 1)
        desk.put(large, number)
        desk.store.digest(desk.now)
        desk.now += 1.2
    assert desk.tiers(small, 1) == [0]


@pytest.mark.parametrize("nvme", [0, 400])
def test_slabs_change_hands_where_nothing_is_worth_anything(nvme: int) -> None:
    """Nobody ever asked for a block again, so all were worth exactly nothing, and no slab was worth
    less than another: a model that came later kept one of forty slabs for good."""
    desk = Desk(dram=40, nvme=nvme, family=Relevance())
    old, new = desk.layout(1), desk.layout(2)
    for entry, blocks in ((old, 160), (new, 200)):
        for number in range(blocks):
            desk.now += 1.5
            desk.put(entry, number)
            desk.store.digest(desk.now)
            desk.finish_all()
        desk.now += 3_600.0
    sizes = [size for _, size in desk.store.room.dram.slabs()]
    assert sizes.count(new.slot_bytes) > 20


def test_a_layout_whose_copies_hang_gets_room_when_the_device_is_fenced() -> None:
    """All its blocks were on their way to a device that had stopped. It was waited for them for as
    long as they hung, though nothing was to be saved any more and other slabs were idle."""
    desk = Desk(dram=2, nvme=4, family=Relevance())
    old, new = desk.layout(1), desk.layout(2)
    desk.put(old, 1)
    desk.finish_all()
    for _ in range(100):  # it is asked for again and again, and then never
        desk.now += 1.0
        desk.touch(old, 1)
    assert desk.put(new, 1, 2) == 2
    for second in range(40):
        desk.now += 1.0
        desk.store.tick(desk.now)
        if not desk.store.placement.health.ok:
            break
        assert desk.put(new, 100 + second) == 0
        desk.store.digest(desk.now)
    assert not desk.store.placement.health.ok
    assert desk.put(new, 3) == 1


def test_retained_blocks_do_not_go_with_their_slab() -> None:
    """A layout that could have evicted a block of its own took over a colder slab, with retained
    blocks of another layout in it. Now such a slab goes only to who has nothing else to give."""
    desk = Desk(dram=2)
    small, large = desk.layout(1), desk.layout(2)
    desk.put(small, 1)
    desk.store.retain(small, keys(1), 50, None)
    desk.now = 20.0
    desk.put(large, 1, 2)
    desk.now = 30.0
    assert desk.put(large, 3) == 1
    assert desk.tiers(small, 1) == [1] and desk.counters.dram.evicted == {"room": 1}


def test_an_expired_pin_does_not_hold_a_slab() -> None:
    """A block pinned for five seconds held its slab against every other layout for ever: whether
    the pin was over was asked only when its own layout was short of room."""
    desk = Desk()
    small, large = desk.layout(1), desk.layout(2)
    desk.put(small, 1)
    desk.store.retain(small, keys(1), 100, desk.now + 5)
    assert desk.put(large, 1) == 0
    desk.now += 5
    assert desk.put(large, 1) == 1
