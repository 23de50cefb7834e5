"""Slots of one tier: nobody shares one, none is lost, and slabs pass from size to size."""

from __future__ import annotations

import random

import pytest

from kvstore.slots import NOBODY, Slots
from kvstore.types import SLOT_ALIGNMENT as PAGE


def test_neighbours_sit_side_by_side() -> None:
    slots = Slots(8 * PAGE, 4 * PAGE)
    assert slots.take(PAGE, [10, 11, 12, 13, 14]) == [0, 1, 2, 3, 4]
    assert [slots.owner(page) for page in range(6)] == [10, 11, 12, 13, 14, NOBODY]
    assert slots.used_bytes == 5 * PAGE
    slots.check()


def test_a_full_tier_gives_what_it_has() -> None:
    slots = Slots(4 * PAGE, 4 * PAGE)
    assert slots.take(PAGE, range(6)) == [0, 1, 2, 3]
    assert slots.take(PAGE, [9]) == []
    slots.give_back([2])
    assert slots.take(PAGE, [9]) == [2]
    slots.check()


def test_an_empty_slab_serves_any_size() -> None:
    slots = Slots(4 * PAGE, 4 * PAGE)
    pages = slots.take(PAGE, [1, 2])
    assert slots.take(2 * PAGE, [3]) == [], "the slab serves another size"
    assert not slots.serve_only(2 * PAGE) and slots.serve_only(PAGE)
    slots.give_back(pages)
    assert slots.take(2 * PAGE, [3]) == [0]
    assert slots.slot_size(0) == 2 * PAGE and slots.residents(0) == [3]
    assert slots.serve_only(2 * PAGE) and not slots.serve_only(PAGE)
    slots.check()


def test_a_slot_given_back_twice_is_our_own_mistake() -> None:
    slots = Slots(4 * PAGE, 4 * PAGE)
    first, _ = slots.take(PAGE, [1, 2])
    slots.give_back([first])
    with pytest.raises(AssertionError, match="given back twice"):
        slots.give_back([first])
    slots = Slots(4 * PAGE, 4 * PAGE)
    (only,) = slots.take(PAGE, [1])
    slots.give_back([only])
    with pytest.raises(AssertionError, match="serves nobody"):
        slots.give_back([only])


def test_several_devices_fill_side_by_side() -> None:
    """Slabs are dealt out to the devices in turn: two devices, slabs 0 and 1 side by side."""
    slots = Slots(16 * PAGE, 4 * PAGE, spread=2)
    assert slots.take(PAGE, range(4)) == [0, 4, 1, 5]
    slots.check()


def test_a_rest_at_the_end_of_a_slab_is_nobodys() -> None:
    """A slab of 8 pages had passed from slots of one page to slots of three. The slot table was to
    be told of page 6, which had been a slot before and now lies in the rest that no slot covers:
    asking for its owner raised IndexError, and the tenant's event loop lost its orders. Now nobody
    owns it."""
    slots = Slots(8 * PAGE, 8 * PAGE)
    pages = slots.take(PAGE, range(8))
    slots.give_back(pages)
    assert slots.take(3 * PAGE, [7, 8]) == [0, 3]
    assert [slots.owner(page) for page in range(8)] == [7, *[NOBODY] * 2, 8, *[NOBODY] * 4]
    assert slots.owner(8) == slots.owner(1 << 31) == NOBODY, "outside of the tier"


def test_a_second_device_gets_no_slab_without_need() -> None:
    """With two devices, the first block of a layout took two slabs; the second stayed empty, but
    assigned. No other size could have it, and the search for a slab to take over ended when it met
    it: a layout that came later never got a place. Now a slab is assigned for the slot it gives."""
    slots = Slots(8 * PAGE, 4 * PAGE, spread=2)
    slots.take(PAGE, [1])
    slots.check()
    assert slots.take(2 * PAGE, [2]) == [4]


def test_adopted_owners_sit_where_they_sat() -> None:
    slots = Slots(8 * PAGE, 4 * PAGE)
    assert slots.adopt([4, 6], 2 * PAGE, [20, 21]) == [True, True]
    assert slots.owners() == {4: 20, 6: 21} and slots.used_bytes == 4 * PAGE
    slots.check()
    assert slots.take(PAGE, range(5)) == [0, 1, 2, 3], "slab 1 is taken"
    slots.give_back([6])
    assert slots.take(2 * PAGE, [22]) == [6]
    slots.check()


@pytest.mark.parametrize(
    ("page", "pages"),
    [(1, 2), (2, 3), (3, 3), (6, 3), (8, 1), (1 << 40, 1), (0, 5)],
    ids=["inside a slot", "off the grid", "rest", "rest of slab 1", "outside", "far", "too large"],
)
def test_what_cannot_be_adopted_changes_nothing(page: int, pages: int) -> None:
    """A damaged index may name any place. A record that pointed to the rest of a slab, which no
    slot covers, was not seated, but the slab was assigned to its size for good."""
    slots = Slots(8 * PAGE, 4 * PAGE)
    assert slots.adopt([page], pages * PAGE, [1]) == [False]
    slots.check()
    assert not slots.used_bytes and not list(slots.slabs())


def test_a_place_is_adopted_once() -> None:
    slots = Slots(4 * PAGE, 4 * PAGE)
    assert slots.adopt([0, 0, 1], PAGE, [1, 2, 3]) == [True, False, True]
    assert slots.adopt([2], 2 * PAGE, [4]) == [False], "the slab serves another size"
    assert slots.owners() == {0: 1, 1: 3}
    slots.check()


def test_a_damaged_record_does_not_cost_its_neighbour_the_place() -> None:
    """A record that pointed into the middle of a slot was taken for the first owner of that slot:
    it was not seated, and the true owner, who came after it, was not either."""
    slots = Slots(4 * PAGE, 4 * PAGE)
    assert slots.adopt([1, 0, 2], 2 * PAGE, [1, 2, 3]) == [False, True, True]
    assert slots.owners() == {0: 2, 2: 3}
    slots.check()


@pytest.mark.parametrize("seed", range(5))
def test_adoption_beside_a_loop(seed: int) -> None:
    chance = random.Random(seed)
    slots, model = Slots(8 * 7 * PAGE, 7 * PAGE), dict[int, int]()
    sizes: dict[int, int] = {}
    for size in (2, 1, 3, 2):
        pages = [chance.randrange(8 * 7 + 4) for _ in range(60)]
        expected = []
        for owner, page in enumerate(pages):
            slab, inside = divmod(page, 7)
            good = slab < 8 and not inside % size and inside + size <= 7
            good = good and sizes.get(slab, size) == size and page not in model
            if good:
                sizes[slab], model[page] = size, owner
            expected.append(good)
        assert slots.adopt(pages, size * PAGE, range(60)) == expected
        slots.check()
        assert slots.owners() == model


@pytest.mark.parametrize("spread", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_slots_beside_a_dict(seed: int, spread: int) -> None:
    chance = random.Random(seed)
    slots = Slots(12 * 7 * PAGE, 7 * PAGE, spread=spread)
    model: dict[int, tuple[int, int]] = {}  # page -> owner, slot bytes
    for step in range(600):
        if chance.random() < 0.55 or not model:
            size = chance.choice((1, 2, 3, 7)) * PAGE
            owners = range(step * 10, step * 10 + chance.randint(1, 6))
            taken = slots.take(size, owners)
            for page, owner in zip(taken, owners, strict=False):
                spans = [range(p, p + s // PAGE) for p, (_, s) in model.items()]
                assert not any(page in span or page + size // PAGE - 1 in span for span in spans)
                model[page] = (owner, size)
        else:
            gone = chance.sample(sorted(model), min(len(model), chance.randint(1, 8)))
            slots.give_back(gone)
            for page in gone:
                del model[page]
        slots.check()
        assert slots.owners() == {page: owner for page, (owner, _) in model.items()}
        assert slots.used_bytes == sum(size for _, size in model.values())
