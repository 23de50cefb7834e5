"""The store's promises as small examples: what stays, what is written, why a block is missed."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.accesses import Access, AccessKind, Hints
from kvstore.eviction.relevance import Relevance
from kvstore.orders import MoveKind
from tests.brain.desk import PAGE, Desk, keys

SPILL = MoveKind.SPILL


def digested(desk: Desk) -> dict[str, int]:
    """Causes of misses until now."""
    desk.store.digest(desk.now)
    desk.look()
    return dict(desk.counters.misses)


def put(desk: Desk, *numbers: int) -> int:
    """What an engine does: it asks, computes what is missing, and stores that."""
    entry = desk.layout()
    lease = desk.acquire(entry, *numbers)
    while not lease.answered:
        desk.finish_all()
    desk.release(lease)
    desk.store.digest(desk.now)
    found = len(lease.blocks)
    reserved = desk.store.reserve(
        desk.client, entry, keys(*numbers[found:]), desk.now, context=keys(*numbers[:found])
    )
    desk.store.digest(desk.now)
    if reserved.lease:
        desk.store.commit(desk.client, reserved.lease.number, desk.now)
    desk.look()
    return len(reserved.pages)


def learned(desk: Desk, rounds: int = 120) -> None:
    """Prompt 1 is asked for every second; others are never asked for again."""
    for number in range(rounds):
        desk.now += 1.0
        put(desk, 1, 2)
        if number % 3 == 0:
            put(desk, *range(1_000 + 40 * number, 1_000 + 40 * number + 2))


# -- why a block is missed -----------------------------------------------------------------------


def test_each_missed_block_has_one_cause() -> None:
    desk = Desk(dram=1, slab_pages=4)
    entry = desk.layout()
    desk.put(entry, 1, 2, 3, 4)
    desk.store.digest(desk.now)
    desk.put(entry, 5, 6)  # 3 and 4 leave
    desk.touch(entry, 1, 2, 3, 4, 9)
    assert digested(desk) == {"room": 2, "never_seen": 1}
    desk.store.forget(entry, keys(1))
    desk.touch(entry, 1, 2)
    assert digested(desk) == {"room": 2, "never_seen": 2, "behind": 1}
    assert sum(desk.counters.misses.values()) == desk.counters.miss


def test_a_refused_block_is_missed_as_refused() -> None:
    desk = Desk(dram=1, slab_pages=4)
    entry = desk.layout()
    held = desk.reserve(entry, 1, 2, 3, 4)
    assert held.lease and desk.reserve(entry, 5).status == b"\2"
    desk.touch(entry, 5)
    assert digested(desk) == {"refused": 1}


def test_a_block_being_written_is_missed_as_such() -> None:
    desk = Desk(dram=1, slab_pages=4)
    entry = desk.layout()
    assert desk.reserve(entry, 1).lease
    desk.touch(entry, 1)
    assert digested(desk) == {"being_written": 1}


def test_what_comes_back_is_no_ghost() -> None:
    desk = Desk(dram=1, slab_pages=2)
    entry = desk.layout()
    desk.put(entry, 1, 2)
    desk.put(entry, 3)
    desk.put(entry, 2)
    desk.store.digest(desk.now)
    desk.touch(entry, 2)
    assert digested(desk) == {} and len(desk.store.catalog) == 2
    desk.store.check()


def test_ghosts_are_bounded() -> None:
    desk = Desk(dram=1, slab_pages=4)
    entry = desk.layout()
    for number in range(3_000):
        desk.put(entry, number)
        desk.store.digest(desk.now)
    assert len(desk.store.catalog.ghosts) <= 1_024
    assert len(desk.store.catalog.keys) < 1_200
    desk.store.check()


def test_clear_forgets_the_ghosts() -> None:
    desk = Desk(dram=1, slab_pages=2)
    entry = desk.layout()
    desk.put(entry, 1, 2)
    desk.put(entry, 3)
    assert desk.store.clear(range(len(desk.store.catalog.keys))) == 2 and not entry.index


# -- one request in several calls ----------------------------------------------------------------


class Counting(Relevance):
    """Counts the requests that it is told of."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[tuple[int, int]] = []
        self.late: list[str] = []

    def asked(self, request):  # type: ignore[no-untyped-def]
        self.requests.append((len(request.chain), request.fresh))
        return super().asked(request)

    def hinted(self, asked, chain, reuse, tag):  # type: ignore[no-untyped-def]
        self.late.append(reuse)
        return super().hinted(asked, chain, reuse, tag)


def test_asking_and_storing_is_one_request() -> None:
    family = Counting()
    desk = Desk(dram=4, family=family)
    put(desk, 1, 2, 3)
    assert family.requests == [(0, 3)]
    put(desk, 1, 2, 3, 4, 5)
    assert family.requests == [(0, 3), (3, 2)]


def test_storing_in_pieces_is_one_request() -> None:
    family = Counting()
    desk = Desk(dram=4, family=family)
    entry = desk.layout()
    for done in (0, 2, 4):
        reserved = desk.store.reserve(
            desk.client, entry, keys(done, done + 1), desk.now, context=keys(*range(done))
        )
        assert reserved.lease
        desk.store.digest(desk.now)
        desk.store.commit(desk.client, reserved.lease.number, desk.now)
    assert family.requests == [(0, 2)]
    parents = [family.blocks.parent[entry.index[key]] for key in keys(0, 1, 2, 3, 4, 5)]
    assert parents == [-1, *(entry.index[key] for key in keys(0, 1, 2, 3, 4))]


def test_storing_alone_is_a_request() -> None:
    family = Counting()
    desk = Desk(dram=4, family=family)
    entry = desk.layout()
    desk.put(entry, 1, 2)
    desk.store.digest(desk.now)
    desk.put(entry, 1, 2, 3)
    desk.store.digest(desk.now)
    assert family.requests == [(0, 2), (2, 1)]


def test_hints_of_a_reserve_reach_the_request_that_asked() -> None:
    family = Counting()
    desk = Desk(dram=4, family=family)
    entry = desk.layout()
    desk.touch(entry, 1, 2)
    desk.store.reserve(desk.client, entry, keys(1, 2), desk.now, hints=Hints("done"))
    desk.store.digest(desk.now)
    assert family.requests == [(0, 2)] and family.late == ["done"]


def test_observers_are_told_of_every_request() -> None:
    desk = Desk(dram=1, slab_pages=4)
    seen: list[tuple[AccessKind, Sequence[bytes], int, int, int]] = []

    def observe(access: Access) -> None:
        told = (access.kind, list(access.keys), access.skip, access.granted, access.missed)
        seen.append(told)

    desk.store.observers.append(observe)
    put(desk, 1, 2)
    desk.touch(desk.layout(), 1, 2, 3)
    assert seen == [
        (AccessKind.ASKED, keys(1, 2), 0, 0, 2),
        (AccessKind.OFFERED, keys(1, 2), 0, 0, 0),
        (AccessKind.ASKED, keys(1, 2, 3), 0, 2, 1),
    ]


# -- what is worth a slot, and a write -----------------------------------------------------------


def test_a_new_block_may_be_worth_less_than_all_that_is_there() -> None:
    """A prompt that is asked for every second fills the tier; those that never return do not
    displace it, and are refused rather than written for nothing."""
    desk = Desk(dram=1, slab_pages=2, family=Relevance())
    learned(desk)
    refused = desk.counters.misses["refused"], len(desk.store.catalog.ghosts)
    assert desk.tiers(desk.layout(), 1, 2) == [1, 1]
    assert put(desk, 7_000, 7_001) == 0, "all that is there is worth more"
    assert desk.tiers(desk.layout(), 1, 2) == [1, 1], refused
    desk.store.check()


def test_with_nvme_below_nothing_is_refused() -> None:
    desk = Desk(dram=1, nvme=4, slab_pages=2, family=Relevance())
    for _ in range(3):
        learned(desk, 20)
        desk.finish_all()
    desk.finish_all()
    assert put(desk, 7_000) == 1


def test_on_evict_writes_what_may_return() -> None:
    """Of two kinds of prompts, only those that come back are worth a write."""
    desk = Desk(dram=2, nvme=8, slab_pages=4, policy="on-evict", family=Relevance())
    for number in range(400):
        desk.now += 1.0
        put(desk, *range(10 * (number % 5), 10 * (number % 5) + 2))
        put(desk, 5_000 + number)
        desk.finish_all()
    spilled = desk.counters.nvme.spilled
    returning = [key for at in range(5) for key in (10 * at, 10 * at + 1)]
    assert all(tier for tier in desk.tiers(desk.layout(), *returning))
    assert spilled < 100, f"{spilled} of 410 blocks were written"


def test_an_empty_budget_raises_the_bar() -> None:
    family = Relevance()
    desk = Desk(dram=2, nvme=8, policy="on-evict", budget=PAGE / 1e6, family=family)
    for number in range(200):
        desk.now += 1.0
        put(desk, *range(10 * (number % 5), 10 * (number % 5) + 2))
        put(desk, 5_000 + number)
        desk.finish_all()
    assert desk.counters.nvme.spilled == 0


# -- room before it is needed --------------------------------------------------------------------


def filled(family: Relevance, idle_s: float) -> Desk:
    desk = Desk(dram=1, nvme=4, slab_pages=32, family=family, idle_s=idle_s)
    for number in range(32):
        put(desk, 10 * number)
        desk.finish_all()
    return desk


def test_idle_blocks_leave_memory_before_room_is_short() -> None:
    desk = filled(Relevance(), idle_s=60.0)
    desk.now += 50.0
    put(desk, 10)  # this one is in use
    desk.now += 20.0
    desk.store.tick(desk.now)
    desk.look()
    assert desk.counters.dram.evicted == {"idle": 4}, "an eighth of the tier is free"
    numbers = [10 * number for number in range(32)]
    tiers = desk.tiers(desk.layout(), *numbers)
    assert tiers.count(2) == 4 and tiers[1] == 1
    assert desk.put(desk.layout(), 7_001, 7_002) == 2
    assert desk.counters.dram.evicted == {"idle": 4}, "nothing had to leave for it"
    desk.store.check()


def test_what_is_kept_does_not_leave_for_idleness() -> None:
    """Kept blocks left although they were in use, where those that were not kept were in use, too;
    they may leave when nothing else can, and here nothing has to."""
    desk = filled(Relevance(), idle_s=60.0)
    numbers = [10 * number for number in range(32)]
    assert desk.store.retain(desk.layout(), keys(*numbers), 50, None) > 28
    for _ in range(3):
        desk.now += 100.0
        desk.store.tick(desk.now)
        desk.look()
        desk.finish_all()
    assert desk.counters.dram.evicted == {}


def test_what_is_in_use_stays_though_room_is_short() -> None:
    desk = filled(Relevance(), idle_s=60.0)
    desk.now += 59.0
    desk.store.tick(desk.now)
    assert desk.counters.dram.evicted == {}


def test_without_a_tier_below_nothing_leaves_for_idleness() -> None:
    desk = Desk(dram=1, slab_pages=4, family=Relevance(), idle_s=60.0)
    desk.put(desk.layout(), 1, 2, 3, 4)
    desk.now += 1_000.0
    desk.store.tick(desk.now)
    assert desk.counters.dram.evicted == {} and len(desk.store.catalog) == 4


def test_a_block_without_its_copy_is_saved_before_it_leaves_for_idleness() -> None:
    desk = Desk(dram=1, nvme=4, slab_pages=32, policy="on-evict", family=Relevance(), idle_s=60.0)
    for _ in range(2):  # asked for twice: worth a write
        for number in range(32):
            put(desk, 10 * number)
    assert desk.moves == []
    desk.now += 100.0
    desk.store.tick(desk.now)
    desk.look()
    assert desk.kinds() and set(desk.kinds()) == {SPILL}
    assert desk.counters.dram.evicted == {}
    desk.finish_all()
    desk.store.tick(desk.now + 1)
    assert desk.counters.dram.evicted["idle"] == 4


def test_an_offer_that_is_refused_as_a_whole_is_no_request_of_its_own() -> None:
    """Its blocks were counted as asked for once more, in the same moment: then all new blocks
    looked as if they were about to return, and displaced those that did."""
    family = Counting()
    desk = Desk(dram=1, slab_pages=2, family=family)
    learned(desk)
    before = len(family.requests)
    assert put(desk, 7_000, 7_001) == 0
    assert family.requests[before:] == [(0, 2)]


def test_what_is_offered_again_after_a_refusal_is_the_same_request() -> None:
    """A put goes on with what was refused beside what was granted, in a call of its own."""
    family = Counting()
    desk = Desk(dram=1, slab_pages=2, family=family)
    entry = desk.layout()
    first = desk.store.reserve(desk.client, entry, keys(1, 2, 3), desk.now)
    assert first.status == b"\0\0\2"
    desk.store.digest(desk.now)
    for _ in range(2):
        desk.store.reserve(desk.client, entry, keys(3), desk.now, context=keys(1, 2))
        desk.store.digest(desk.now)
    assert family.requests == [(0, 3)]
