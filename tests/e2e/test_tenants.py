"""Two tenants of one daemon: nothing of one is seen, used or thrown away by the other."""

from __future__ import annotations

import stat
from collections.abc import Iterator

import pytest

from kvstore.errors import Unavailable
from kvstore.protos import kvstore_pb2 as pb
from tests.e2e.harness import KIB, MIB, Daemon, contents, hashes, layout, targets
from tests.e2e.raw import stranger

SIZE = 64 * KIB
KEYS = hashes(6, "tenants")


@pytest.fixture(scope="module")
def running() -> Iterator[Daemon]:
    with Daemon(
        dram={"size": "16 MiB", "slab_size": "1 MiB"},
        tenants__default={"dram_quota": "75%"},
        tenants__guest={"dram_quota": "25%", "nvme_quota": "0"},
    ) as daemon:
        yield daemon.start()


@pytest.fixture
def daemon(running: Daemon) -> Daemon:
    """A daemon of two tenants, both empty."""
    for tenant in ("default", "guest"):
        with running.client(tenant=tenant) as client:
            client.clear()
        running.settled(tenant)
    return running


def test_equal_hashes_are_two_blocks(daemon: Daemon, door: str) -> None:
    caches = {
        tenant: daemon.client(door, tenant=tenant).open(layout("tenants"))
        for tenant in ("default", "guest")
    }
    caches["default"].put(KEYS, contents(KEYS, SIZE))
    assert caches["guest"].lookup(KEYS).length == 0
    assert caches["guest"].acquire(KEYS).length == 0
    assert caches["guest"].put(KEYS, [b"g" * SIZE] * 6).stored == 6
    into = targets(6, SIZE)
    assert caches["default"].get(KEYS, into).length == 6
    assert [bytes(one) for one in into] == contents(KEYS, SIZE)
    assert caches["guest"].get(KEYS, into).length == 6
    assert [bytes(one) for one in into] == [b"g" * SIZE] * 6
    assert caches["guest"].forget(KEYS[:1]) == 1
    assert caches["guest"].client.clear() == 5
    assert caches["default"].lookup(KEYS).length == 6


def test_a_tenant_evicts_its_own(daemon: Daemon, door: str) -> None:
    mine = daemon.client(door).open(layout("tenants"))
    guest = daemon.client(door, tenant="guest").open(layout("tenants"))
    mine.put(KEYS, contents(KEYS, SIZE))
    for number in range(5):
        flood = hashes(40, f"flood {number}")
        assert guest.put(flood, contents(flood, SIZE)).stored == 40
    assert mine.lookup(KEYS).tiers == {"dram": 6}
    stats = daemon.settled("guest")
    assert stats.tiers.dram.capacity_bytes == 4 * MIB
    assert stats.tiers.dram.blocks == 4 * MIB // SIZE
    assert stats.tiers.nvme.capacity_bytes == 0
    assert daemon.stats().tiers.dram.capacity_bytes == 12 * MIB
    assert "room" not in daemon.stats().tiers.dram.evicted


def test_statistics_are_the_tenants_own(daemon: Daemon, door: str) -> None:
    guest = daemon.client(door, tenant="guest")
    assert set(guest.stats().tenants) == {"guest"}
    before = guest.stats().tenants.guest.requests.lookup
    daemon.client(door).open(layout("tenants")).lookup(KEYS)
    assert guest.stats().tenants.guest.requests.lookup == before


def test_a_lease_of_the_other_tenant(daemon: Daemon, door: str) -> None:
    mine = daemon.client(door).open(layout("tenants"))
    mine.put(KEYS, contents(KEYS, SIZE))
    grant = mine.acquire(KEYS)
    other = stranger(daemon, door, tenant="guest")
    other.attach()
    assert not other.call(pb.RELEASE, pb.ReleaseRequest(lease=grant._lease)).held
    other.close()
    assert grant.release() is True


def test_files_are_the_tenants_own(daemon: Daemon) -> None:
    """The kernel decides who may connect and map; nobody but the daemon has the slot table."""
    for tenant in ("default", "guest"):
        for door in ("hatch", "front"):
            assert stat.S_IMODE(daemon.socket(door, tenant).stat().st_mode) == 0o660
        folder = daemon.arena / tenant
        assert stat.S_IMODE(folder.stat().st_mode) == 0o750
        assert stat.S_IMODE((folder / "arena").stat().st_mode) == 0o660
        assert stat.S_IMODE((folder / "slots").stat().st_mode) == 0o600


def test_a_tenant_that_is_not(daemon: Daemon, door: str) -> None:
    with pytest.raises(Unavailable, match=r"no daemon at .*/nobody/"):
        daemon.client(door, tenant="nobody")
