"""Bounds of sessions and tenants: what is cut short, what is refused, and that it is given back."""

from __future__ import annotations

import pytest

from kvstore.errors import LimitExceeded
from kvstore.leases import Session
from kvstore.limits import REQUEST_BYTES, Bucket, Limits, cost
from kvstore.reads import ABSENT, END, NO_ROOM
from kvstore.writes import NEW, PRESENT, REFUSED
from tests.brain.desk import PAGE, Desk, keys

HALF = 8 * PAGE
NOW = 10.0


def desk_of(**bounds: int) -> tuple[Desk, Session]:
    """An arena of sixteen blocks of one page, and a second client."""
    desk = Desk(dram=4, limits=Limits(**bounds))
    return desk, desk.store.attach("other")


def fill(desk: Desk, count: int) -> list[bytes]:
    """Blocks that are there for readers, put in by nobody who is still connected."""
    found = keys(*range(count))
    entry = desk.layout()
    for at in range(0, count, 4):
        writer = desk.store.attach("writer")
        reserved = desk.store.reserve(writer, entry, found[at : at + 4], NOW)
        assert reserved.lease is not None
        desk.store.commit(writer, reserved.lease.number, NOW)
        desk.store.detach(writer, NOW)
    return found


def limited(desk: Desk) -> dict[str, int]:
    return dict(desk.counters.limited)


def test_a_reserve_is_cut_at_half_the_arena() -> None:
    desk, other = desk_of(bytes_per_session=HALF)
    entry = desk.layout()
    first = desk.store.reserve(desk.client, entry, keys(*range(12)), NOW)
    assert list(first.status) == [NEW] * 8 + [REFUSED] * 4
    assert len(first.pages) == 8 and not first.waiting
    none = desk.store.reserve(desk.client, entry, keys(20, 0), NOW + 1)
    assert list(none.status) == [REFUSED, PRESENT]
    assert none.lease is None and not none.waiting
    assert limited(desk) == {"bytes_per_session": 2}
    others = desk.store.reserve(other, entry, keys(*range(20, 28)), NOW)
    assert list(others.status) == [NEW] * 8
    assert first.lease is not None
    desk.store.commit(desk.client, first.lease.number, NOW + 2)
    again = desk.store.reserve(desk.client, entry, keys(30), NOW + 2)
    assert list(again.status) == [NEW], "what was let go is not given back"
    desk.store.check()


def test_an_acquire_is_cut_and_says_no_room() -> None:
    desk, other = desk_of(bytes_per_session=HALF)
    found, entry = fill(desk, 16), desk.layout()
    lease = desk.store.acquire(desk.client, entry, found, NOW)
    assert (len(lease.blocks), lease.stop) == (8, NO_ROOM)
    assert desk.counters.asked == desk.counters.hit == 8, "the rest is asked for again"
    rest = desk.store.acquire(desk.client, entry, found[8:], NOW + 1)
    assert (len(rest.blocks), rest.stop, rest.answered) == (0, NO_ROOM, True)
    desk.store.digest(NOW + 1)
    assert desk.counters.misses["no_room"] == 8
    assert len(desk.store.acquire(other, entry, found, NOW).blocks) == 8
    assert desk.store.release(desk.client, lease.number)
    rest = desk.store.acquire(desk.client, entry, found[8:], NOW + 2)
    assert (len(rest.blocks), rest.stop) == (8, END)
    desk.store.check()


def test_a_list_that_ends_before_the_bound_ends_as_it_does() -> None:
    desk, _ = desk_of(bytes_per_session=HALF)
    found, entry = fill(desk, 4), desk.layout()
    lease = desk.store.acquire(desk.client, entry, found + keys(*range(50, 70)), NOW)
    assert (len(lease.blocks), lease.stop) == (4, ABSENT)
    assert limited(desk) == {}


def test_a_block_under_many_leases_counts_once() -> None:
    """Sixty-four requests that share a prefix hold one prefix, not sixty-four."""
    desk, other = desk_of(bytes_per_session=HALF, bytes_per_tenant=10 * PAGE)
    found, entry = fill(desk, 16), desk.layout()
    for step in range(64):
        lease = desk.store.acquire(desk.client, entry, found[:7], NOW + 1 + step)
        assert lease.stop == END
        assert desk.store.acquire(other, entry, found[:7], NOW + 1 + step).stop == END
    assert limited(desk) == {}
    assert len(desk.store.acquire(desk.client, entry, found[7:], NOW + 100).blocks) == 1


def test_a_tenant_keeps_some_of_its_arena_free() -> None:
    desk, other = desk_of(bytes_per_session=HALF, bytes_per_tenant=12 * PAGE)
    found, entry = fill(desk, 16), desk.layout()
    assert len(desk.store.acquire(desk.client, entry, found, NOW).blocks) == 8
    reserved = desk.store.reserve(other, entry, keys(*range(100, 108)), NOW + 1)
    assert list(reserved.status) == [NEW] * 4 + [REFUSED] * 4
    assert limited(desk) == {"bytes_per_session": 1, "bytes_per_tenant": 1}


def test_who_comes_back_does_not_start_anew() -> None:
    """A client reserved all it could, and went; its process lived. It came back and did so again,
    until all slots were quarantined. They count for the tenant until the process has ended."""
    desk, other = desk_of(bytes_per_session=HALF, bytes_per_tenant=12 * PAGE)
    entry = desk.layout()
    desk.store.reserve(desk.client, entry, keys(*range(8)), NOW)
    held = desk.store.detach(desk.client, NOW)
    back = desk.store.attach("back")
    reserved = desk.store.reserve(back, entry, keys(*range(20, 28)), NOW + 1)
    assert list(reserved.status) == [NEW] * 4 + [REFUSED] * 4
    desk.store.unquarantine(held, NOW + 2)
    assert desk.store.reserve(other, entry, keys(*range(40, 48)), NOW + 3).status == bytes(8)


def test_shards_of_one_block_are_cut_in_the_order_of_the_list() -> None:
    desk, other = desk_of(bytes_per_session=4 * PAGE)
    entry = desk.layout(shards=2)
    first = desk.store.reserve(other, entry, keys(1, 3, 5), NOW, shard=0)
    assert list(first.status) == [NEW] * 3
    mine = desk.store.reserve(desk.client, entry, keys(*range(1, 7)), NOW, shard=1)
    assert list(mine.status) == [NEW] * 4 + [REFUSED] * 2
    desk.store.check()


def test_leases_of_all_sessions_are_bounded() -> None:
    desk, other = desk_of(leases_per_session=3, leases_per_tenant=4)
    found, entry = fill(desk, 4), desk.layout()
    mine = [desk.store.acquire(desk.client, entry, found, NOW) for _ in range(3)]
    with pytest.raises(LimitExceeded, match=r"this session holds 3 .*limits\.leases_per_session"):
        desk.store.acquire(desk.client, entry, found, NOW)
    desk.store.acquire(other, entry, found, NOW)
    with pytest.raises(LimitExceeded, match=r"tenant hold 4 .*limits\.leases_per_tenant"):
        desk.store.acquire(other, entry, found, NOW)
    with pytest.raises(LimitExceeded, match=r"limits\.leases_per_tenant"):
        desk.store.reserve(other, entry, keys(99), NOW)
    assert limited(desk) == {"leases_per_session": 1, "leases_per_tenant": 2}
    desk.store.release(desk.client, mine[0].number)
    assert desk.store.acquire(other, entry, found, NOW).stop == END
    desk.store.check()


def test_new_limits_hold_at_once() -> None:
    desk, _ = desk_of(bytes_per_session=HALF)
    found, entry = fill(desk, 16), desk.layout()
    assert len(desk.store.acquire(desk.client, entry, found, NOW).blocks) == 8
    desk.store.holdings.set_limits(Limits(bytes_per_session=10 * PAGE, leases_per_session=2))
    assert len(desk.store.acquire(desk.client, entry, found[8:], NOW).blocks) == 2
    desk.store.holdings.set_limits(Limits(bytes_per_session=4 * PAGE))
    assert desk.store.acquire(desk.client, entry, found[10:], NOW).blocks == []
    assert desk.store.limits.bytes_per_session == 4 * PAGE


def test_a_client_at_its_bound_does_not_make_the_daemon_count_all_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk, _ = desk_of(bytes_per_session=HALF)
    found, entry = fill(desk, 16), desk.layout()
    holdings, count = desk.store.holdings, desk.store.holdings._count_session
    counted: list[float] = []

    def counting(session: Session, now: float) -> set[int]:
        counted.append(now)
        return count(session, now)

    monkeypatch.setattr(holdings, "_count_session", counting)
    for _ in range(8):
        desk.store.acquire(desk.client, entry, found[:8], NOW)
    before = len(counted)
    for _ in range(100):
        desk.store.acquire(desk.client, entry, found, NOW)
    assert len(counted) <= before + 1
    desk.store.acquire(desk.client, entry, found, NOW + 1)
    assert len(counted) > before


def test_a_bucket_holds_a_second_and_refills() -> None:
    bucket = Bucket()
    assert bucket.wait_s(100, NOW) == 0.0
    bucket.left -= 100 * cost(0)
    assert bucket.wait_s(100, NOW) == 0.0, "what it holds may be read at once"
    bucket.left -= cost(REQUEST_BYTES)
    assert bucket.wait_s(100, NOW) == pytest.approx(0.02)
    assert bucket.wait_s(100, NOW + 0.01) == pytest.approx(0.01)
    assert bucket.wait_s(100, NOW + 0.02) == pytest.approx(0.0)
    assert bucket.wait_s(100, NOW + 500) == 0.0
    assert bucket.left == 100.0
    assert bucket.wait_s(5, NOW + 500) == 0.0
    assert bucket.left == 5.0, "a lower rate holds at once"
