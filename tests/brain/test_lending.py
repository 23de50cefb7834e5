"""Slots that are lent before it is said what is stored there."""

from __future__ import annotations

import pytest

from kvstore.errors import LimitExceeded
from kvstore.eviction.relevance import Relevance
from kvstore.leases import Session
from kvstore.lending import PART, SLABS_PART
from kvstore.limits import Limits
from kvstore.writes import NEW, PRESENT, REFUSED, Reserved
from tests.brain.desk import Desk, keys


def desk_of(slots: int = 8, **options: object) -> Desk:
    desk = Desk(1, slab_pages=slots, **options)  # type: ignore[arg-type]
    desk.store.lending.part, desk.store.lending.slabs_part = 4, 0  # of eight slots two may be lent
    return desk


def reserve(desk: Desk, *numbers: int, lent: int = 0, client: Session | None = None) -> Reserved:
    """As a client that stores single blocks does it; the answer is out, and notes are digested."""
    who = client or desk.client
    entry = desk.layout()
    done = desk.store.reserve(who, entry, keys(*numbers), desk.now, lend=True, lent=lent)
    desk.store.digest(desk.now)
    desk.look()
    desk.store.check()
    return done


def borrow(desk: Desk, number: int, client: Session | None = None) -> tuple[int, int]:
    """Store a block; lease and page of the slot that was lent then, 0 for none."""
    who = client or desk.client
    done = reserve(desk, number, client=client)
    assert done.lease is not None
    lent: tuple[int, int] = desk.store.lend(who, done.lease.number)
    assert desk.store.commit(who, done.lease.number, desk.now) == 1
    desk.look()
    desk.store.check()
    return lent


def test_the_first_new_block_goes_there() -> None:
    desk = desk_of()
    lease, page = borrow(desk, 1)
    assert lease and page in desk.marks
    done = reserve(desk, 1, 2, 3, lent=lease)
    assert done.status == bytes([PRESENT, NEW, NEW]) and done.pages[0] == page != done.pages[1]
    assert done.lease is not None and done.lease.number == lease
    assert desk.store.commit(desk.client, done.lease.number, desk.now) == 2
    assert desk.tiers(desk.layout(), 1, 2, 3) == [1, 1, 1]


def test_it_is_marked_as_being_written_before_it_is_told_of() -> None:
    """Else a daemon that comes after this one would give the slot to somebody else."""
    desk = desk_of()
    done = reserve(desk, 1)
    assert done.lease is not None and desk.client.ready is not None
    (row,) = desk.client.ready.blocks
    assert desk.store.catalog.dram[row] in desk.marks
    assert desk.store.catalog.writers[row] == desk.client.number


def test_what_is_there_already_leaves_it_with_the_client() -> None:
    desk = desk_of()
    lease, page = borrow(desk, 1)
    assert reserve(desk, 1, lent=lease).status == bytes([PRESENT])
    assert reserve(desk, 2, lent=lease).pages == [page]


def test_it_is_that_clients_alone() -> None:
    desk = desk_of()
    lease, page = borrow(desk, 1)
    other = desk.store.attach("other")
    assert reserve(desk, 2, lent=lease, client=other).pages != [page]
    assert lease in desk.client.lent


def test_it_is_for_one_layout() -> None:
    desk = desk_of()
    lease, _ = borrow(desk, 1)
    large = desk.layout(pages=2, model="large")
    done = desk.store.reserve(desk.client, large, keys(1), desk.now, lent=lease)
    assert done.status == bytes([REFUSED]) and lease in desk.client.lent


def test_a_lease_that_is_not_lent_is_nobodys_slot() -> None:
    desk = desk_of()
    held = desk.reserve(desk.layout(), 1)
    assert held.lease is not None
    desk.store.forget(desk.layout(), keys(1))
    assert reserve(desk, 2, lent=held.lease.number).pages != held.pages


def test_no_more_than_a_part_is_lent() -> None:
    desk = desk_of()
    others = [desk.store.attach("other") for _ in range(3)]
    assert [bool(borrow(desk, n, other)[0]) for n, other in enumerate(others)] == [
        True,
        True,
        False,
    ]
    assert (PART, SLABS_PART) == (256, 8)


def test_most_slabs_have_no_lent_slot() -> None:
    """Else slabs could not change hands: idle clients of one layout would keep another one out."""
    desk = Desk(4, slab_pages=4)
    desk.store.lending.part, desk.store.lending.slabs_part = 1, 2
    others = [desk.store.attach("other") for _ in range(3)]
    assert [bool(borrow(desk, n, other)[0]) for n, other in enumerate(others)] == [
        True,
        True,
        False,
    ]


def test_it_is_free_when_given_back() -> None:
    desk = desk_of()
    used = desk.store.room.dram.used_bytes
    lease, _ = borrow(desk, 1)
    assert desk.store.abort(desk.client, lease, desk.now)
    desk.store.check()
    assert not desk.store.lending.rows and desk.counters.aborted == 0
    assert desk.store.room.dram.used_bytes == used + desk.layout().slot_bytes


def test_who_aborts_is_lent_it_the_next_time() -> None:
    desk = desk_of()
    done = reserve(desk, 1)
    assert done.lease is not None and desk.client.ready is not None
    assert desk.store.lend(desk.client, 77) == (0, 0), "there is no such lease"
    assert desk.store.abort(desk.client, done.lease.number, desk.now)
    desk.store.check()
    assert not desk.client.leases and len(desk.store.lending.rows) == 1
    assert borrow(desk, 2)[0]


def test_what_it_was_not_told_of_it_cannot_use() -> None:
    desk = desk_of()
    done = reserve(desk, 1)
    assert done.lease is not None and desk.client.ready is not None
    number, (row,) = desk.client.ready.number, desk.client.ready.blocks
    page = desk.store.catalog.dram[row]
    assert reserve(desk, 2, lent=number).pages != [page]
    assert not desk.store.abort(desk.client, number, desk.now)
    assert desk.store.commit(desk.client, number, desk.now) is None
    assert desk.store.lend(desk.client, done.lease.number) == (number, page)


def test_a_session_is_lent_one() -> None:
    desk = desk_of(32)
    assert borrow(desk, 1)[0] and not borrow(desk, 2)[0] and not borrow(desk, 3)[0]
    assert len(desk.store.lending.rows) == 1


def test_the_next_layout_gets_it_instead() -> None:
    desk = Desk(2, slab_pages=8)
    desk.store.lending.part, desk.store.lending.slabs_part = 4, 0
    large = desk.layout(pages=2, model="large")
    reserve(desk, 1)
    desk.store.reserve(desk.client, large, keys(1), desk.now, lend=True)
    desk.store.digest(desk.now)
    desk.store.check()
    assert desk.client.ready is not None and desk.client.ready.entry is large
    assert len(desk.store.lending.rows) == 1


def test_to_commit_it_stores_nothing() -> None:
    desk = desk_of()
    lease, _ = borrow(desk, 1)
    assert desk.store.commit(desk.client, lease, desk.now) == 0
    desk.store.check()
    assert desk.store.room.resident(1) == 1 and not desk.store.lending.rows


def test_a_client_that_has_gone_is_lent_nothing() -> None:
    desk = desk_of()
    done = desk.store.reserve(desk.client, desk.layout(), keys(1), desk.now, lend=True)
    assert done.lease is not None
    blocks = desk.store.detach(desk.client, desk.now)
    desk.store.digest(desk.now)
    desk.store.check()
    assert len(blocks) == 1 and not desk.store.lending.rows


def test_a_vanished_clients_is_kept_aside() -> None:
    """And does not count any more: others may borrow."""
    desk = desk_of()
    borrow(desk, 1)
    blocks = desk.store.detach(desk.client, desk.now)
    desk.store.check()
    assert len(blocks) == 1 and not desk.store.lending.rows
    desk.store.unquarantine(blocks, desk.now)
    desk.store.check()
    assert desk.store.room.dram.used_bytes == desk.layout().slot_bytes


def test_what_was_ready_is_free_at_once() -> None:
    desk = desk_of()
    done = reserve(desk, 1)
    assert done.lease is not None and desk.client.ready is not None
    assert len(desk.store.detach(desk.client, desk.now)) == 1, "the block that is written"
    desk.store.check()
    assert desk.store.room.dram.used_bytes == desk.layout().slot_bytes


@pytest.mark.parametrize("limit", ["session", "tenant"])
def test_it_counts_against_no_limit(limit: str) -> None:
    slot = Desk().layout().slot_bytes
    limits: dict[str, int] = {f"leases_per_{limit}": 2, f"bytes_per_{limit}": 2 * slot}
    desk = desk_of(limits=Limits(**limits))
    assert borrow(desk, 1)[0]
    assert desk.reserve(desk.layout(), 2).lease and desk.reserve(desk.layout(), 3).lease
    with pytest.raises(LimitExceeded, match="leases_per"):
        desk.reserve(desk.layout(), 4)


def test_it_is_no_way_around_a_limit() -> None:
    slot = Desk().layout().slot_bytes
    desk = desk_of(limits=Limits(bytes_per_tenant=2 * slot))
    lease, _ = borrow(desk, 1)
    assert desk.reserve(desk.layout(), 2, 3).status == bytes([NEW, NEW])
    desk.now += 1
    assert reserve(desk, 4, lent=lease).status == bytes([REFUSED])
    assert lease in desk.client.lent and desk.counters.limited["bytes_per_tenant"]


def test_nothing_is_lost_for_it() -> None:
    """Memory is full, and there is nothing below it: a block that is only perhaps to come is not
    worth one that is there."""
    desk = desk_of(family=Relevance())
    desk.put(desk.layout(), *range(8))
    desk.store.digest(desk.now)
    assert desk.store.room.resident(1) == 8
    assert not borrow(desk, 8)[0]
    assert desk.store.room.resident(1) == 8


@pytest.mark.parametrize("why", ["", "unsaved", "retained", "read"])
def test_room_is_made_for_it_where_blocks_stay_below(why: str) -> None:
    """What is worth least leaves, if nothing is lost by it."""
    desk = Desk(1, nvme=2, slab_pages=8)
    desk.store.lending.part, desk.store.lending.slabs_part = 4, 0
    entry = desk.layout()
    desk.put(entry, *range(7))
    if why != "unsaved":
        desk.finish_all()
    if why == "retained":
        desk.store.retain(entry, keys(*range(7)), 50, None)
    if why == "read":
        desk.acquire(entry, *range(7))
    desk.store.digest(desk.now)
    done = reserve(desk, 8)
    assert desk.store.room.resident(1) == 7 - (not why) and bool(desk.client.ready) == (not why)
    assert done.lease is not None and desk.tiers(entry, *range(7)).count(0) == 0


def test_it_counts_as_room_for_a_block_that_is_worth_little() -> None:
    """A new block that would not be let in where others had to leave takes a slot that is lent."""
    desk = desk_of(family=Relevance())
    lease, page = borrow(desk, 0)
    desk.put(desk.layout(), *range(1, 7))
    for _ in range(3):
        desk.now += 1
        desk.touch(desk.layout(), *range(7))
    desk.touch(desk.layout(), 50)  # a prompt of which nothing is known but that it was asked for
    done = reserve(desk, 50, lent=lease)
    assert done.status == bytes([NEW]) and done.pages == [page]
