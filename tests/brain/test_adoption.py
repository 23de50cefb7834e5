"""Blocks found in DRAM after a restart: served when proved, in the old order, and never twice."""

from __future__ import annotations

import pytest

from kvstore.catalog import UNPROVEN
from kvstore.checksums import digest
from kvstore.leases import SEVERAL
from kvstore.orders import MoveKind, Outcome
from kvstore.reads import ABSENT, FAILED, LATE
from tests.brain.desk import PAGE, Desk, keys

SUM, PROVE, SPILL, LOAD = MoveKind.SUM, MoveKind.PROVE, MoveKind.SPILL, MoveKind.LOAD
PROOF = 77


def found(desk: Desk, *numbers: int, proof: int = PROOF) -> int:
    """Those blocks were found, each in the slot of its number; the rest of the desk is new."""
    entry = desk.layout()
    seated = desk.store.adopt_dram(
        entry, keys(*numbers), list(numbers), [proof] * len(numbers), desk.now
    )
    desk.store.check()
    desk.look()
    return seated


def test_they_are_proved_before_they_are_read() -> None:
    desk = Desk(nvme=0)
    assert found(desk, 0, 1, 2) == 3
    entry = desk.layout()
    assert desk.tiers(entry, 0, 1, 2) == [1, 1, 1]
    lease = desk.acquire(entry, 0, 1, 2)
    assert not lease.answered and desk.kinds().count(PROVE) == 3
    for number in (2, 1, 0):
        assert not lease.answered
        assert desk.finish(PROVE, key=number).proof == PROOF
    assert lease.answered and lease.ready == 3 and lease.tiers == b"\1\1\1"
    again = desk.acquire(entry, 0, 1, 2)
    assert again.answered, "once is enough"


def test_who_does_not_wait_gets_what_is_proved() -> None:
    desk = Desk(nvme=0)
    found(desk, 0, 1)
    entry = desk.layout()
    lease = desk.acquire(entry, 0, 1, wait=False)
    assert (lease.answered, lease.ready, lease.stop) == (True, 0, LATE)
    while PROVE in desk.kinds():
        desk.finish(PROVE)
    assert desk.acquire(entry, 0, 1, wait=False).ready == 2


def test_nobody_has_to_ask() -> None:
    """The background proves all of them, a few at a time, the youngest first."""
    desk = Desk(nvme=0, dram=4)
    found(desk, *range(12))
    desk.store.tick(desk.now)
    desk.look()
    assert desk.keys_of(desk.moves) == keys(11, 10, 9, 8)
    assert set(desk.kinds()) == {SUM}
    done = 0
    while desk.moves:
        desk.finish()
        done += 1
    assert done == 12
    assert not desk.store.catalog.proofs
    desk.store.check()


@pytest.mark.parametrize("kind", [PROVE, SUM])
def test_a_damaged_one_is_a_miss(kind: MoveKind) -> None:
    desk = Desk(nvme=0)
    found(desk, 0, 1, 2)
    entry = desk.layout()
    lease = None
    if kind is PROVE:
        lease = desk.acquire(entry, 0, 1, 2)
    else:
        desk.store.tick(desk.now)
        desk.look()
    desk.finish(kind, Outcome.CORRUPT, key=1)
    assert desk.counters.dram.corrupt == 1 and desk.counters.dram.evicted["corrupt"] == 1
    desk.finish_all()
    if lease is not None:
        assert (lease.answered, lease.ready, lease.stop) == (True, 1, FAILED)
        desk.release(lease)
    after = desk.acquire(entry, 0, 1, 2)
    assert (after.ready, after.stop) == (1, ABSENT)
    assert desk.put(entry, 1) == 1, "it can be stored again"


def test_a_copy_on_nvme_that_is_the_same_is_kept() -> None:
    desk = Desk(nvme=1)
    entry = desk.layout()
    sums = [b"sum 0   ", b"sum 1   "]
    proof = digest(sums[0])
    desk.store.adopt(entry.layout, keys(0, 1), [0, PAGE], list(sums), desk.now)
    assert found(desk, 0, 1, proof=proof) == 2
    nvme = desk.counters.nvme
    assert nvme.evicted == {"replaced": 1}, "the copy of block 1 has other sums"
    desk.store.tick(desk.now)
    desk.look()
    assert [move.key for move in desk.moves if move.kind is SPILL] == keys(1)
    desk.finish_all()
    assert desk.tiers(entry, 0, 1) == [1, 1] and nvme.spilled == 1


@pytest.mark.parametrize("kind", [PROVE, SUM])
def test_a_damaged_one_is_still_had_from_nvme(kind: MoveKind) -> None:
    """Once whoever waited for the proof has been told that there is none."""
    desk = Desk(nvme=1)
    entry, sums = desk.layout(), [b"sum 0   "]
    desk.store.adopt(entry.layout, keys(0), [0], list(sums), desk.now)
    assert found(desk, 0, proof=digest(sums[0])) == 1
    lease = None
    if kind is PROVE:
        lease = desk.acquire(entry, 0)
    else:
        desk.store.tick(desk.now)
        desk.look()
    desk.finish(kind, Outcome.CORRUPT)
    assert lease is None or (lease.answered, lease.ready, lease.stop) == (True, 0, FAILED)
    assert desk.counters.dram.corrupt == 1 and not desk.counters.nvme.evicted
    assert desk.tiers(entry, 0) == [2]
    again = desk.acquire(entry, 0)
    desk.finish_all()
    assert (again.answered, again.ready) == (True, 1)
    desk.store.check()


@pytest.mark.parametrize("first", [PROVE, SUM])
def test_of_two_checks_at_once_the_last_one_decides(first: MoveKind) -> None:
    """Nobody reads the block before: who waits for its proof holds its slot until then."""
    desk = Desk(nvme=1)
    entry, sums = desk.layout(), [b"sum 0   "]
    desk.store.adopt(entry.layout, keys(0), [0], list(sums), desk.now)
    found(desk, 0, proof=digest(sums[0]))
    desk.store.tick(desk.now)
    desk.look()
    lease = desk.acquire(entry, 0)
    assert sorted(desk.kinds()) == [PROVE, SUM]
    desk.finish(first, Outcome.CORRUPT)
    desk.finish(SUM if first is PROVE else PROVE, Outcome.CORRUPT)
    assert (lease.answered, lease.ready, lease.stop) == (True, 0, FAILED)
    assert desk.tiers(entry, 0) == [2] and desk.counters.dram.corrupt == 1
    desk.store.check()


def test_what_was_not_saved_is_saved_now_and_proved_by_it() -> None:
    desk = Desk(nvme=1)
    found(desk, 0)
    desk.store.tick(desk.now)
    desk.look()
    entry = desk.layout()
    lease = desk.acquire(entry, 0)
    assert desk.finish(SPILL).proof == PROOF
    assert not desk.store.catalog.flags[entry.index[keys(0)[0]]] & UNPROVEN
    desk.finish_all()
    assert lease.answered and lease.ready == 1
    assert desk.acquire(entry, 0).answered


def test_what_is_not_what_was_committed_is_not_saved() -> None:
    desk = Desk(nvme=1)
    found(desk, 0)
    desk.store.tick(desk.now)
    desk.look()
    desk.finish(SPILL, Outcome.CORRUPT)
    desk.finish_all()
    assert desk.tiers(desk.layout(), 0) == [0] and desk.counters.dram.corrupt == 1
    assert desk.store.placement.health.ok, "the device has done nothing wrong"


def test_the_oldest_leaves_first() -> None:
    desk = Desk(dram=1, nvme=0)
    entry = desk.layout()
    slots = desk.store.room.dram.slab_pages
    found(desk, *range(slots), proof=0)
    assert desk.put(entry, 100) == 1
    assert desk.tiers(entry, 0, 1) == [0, 1]


def test_a_block_that_is_proved_keeps_its_slot() -> None:
    """Forgotten, and its slot wanted, while the background reads it: the slot is free later."""
    desk = Desk(dram=1, nvme=0)
    entry = desk.layout()
    slots = desk.store.room.dram.slab_pages
    found(desk, *range(slots))
    desk.store.tick(desk.now)
    desk.look()
    moves = list(desk.moves)
    assert desk.store.forget(entry, keys(*range(slots))) == slots
    assert desk.reserve(entry, *range(100, 100 + slots)).status.count(0) == slots - len(moves)
    desk.finish_all()
    assert desk.put(entry, 200) == 1


def test_a_slot_that_was_being_written_is_nobodys_until_its_writer_is_gone() -> None:
    desk = Desk(dram=1, nvme=0)
    entry = desk.layout()
    slots = desk.store.room.dram.slab_pages
    block = desk.store.adopt_writing(entry, 3, 9)
    other = desk.store.adopt_writing(entry, 2, SEVERAL)
    assert block is not None and other is not None
    assert desk.counters.quarantined == 2
    assert desk.store.adopt_writing(entry, 3, 9) is None, "somebody sits there"
    reserved = desk.reserve(entry, *range(slots))
    assert reserved.status.count(0) == slots - 2 and not {3, 2} & set(reserved.pages)
    desk.store.unquarantine([block], desk.now)
    assert desk.reserve(entry, *range(100, 100 + slots)).pages == [3]
    desk.store.check()


def test_of_two_under_one_key_the_younger_is_served() -> None:
    desk = Desk(nvme=0)
    entry = desk.layout()
    twice = keys(1, 2, 1)
    assert desk.store.adopt_dram(entry, twice, [1, 2, 3], [0, 0, 0], desk.now) == 2
    desk.look()
    assert desk.marks == {1}, "the record of the other is cleared"
    catalog = desk.store.catalog
    assert catalog.dram[entry.index[keys(1)[0]]] == 3
    desk.store.check()
