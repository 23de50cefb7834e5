"""The verbs of the public surface, through both doors of one running daemon."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from kvstore.client import Cache, Client, GetResult, Match, PutResult
from kvstore.errors import InvalidRequest, KVStoreError
from tests.e2e.harness import KIB, Daemon, content, contents, hashes, layout, targets

SIZE = 64 * KIB


def fetch(cache: Cache, keys: list[bytes]) -> list[bytes]:
    """The blocks of the longest prefix."""
    into = targets(len(keys), cache.layout.block_bytes)
    length = cache.get(keys, into).length
    return [bytes(one) for one in into[:length]]


def test_put_lookup_get(cache: Cache) -> None:
    keys = hashes(8, "put")
    assert cache.lookup(keys) == Match(0, Counter())
    assert cache.put(keys, contents(keys, SIZE)) == PutResult(stored=8, present=0, refused=0)
    assert cache.put(keys, contents(keys, SIZE)) == PutResult(stored=0, present=8, refused=0)
    more = keys + hashes(2, "put", start=8)
    assert cache.lookup(more) == Match(8, Counter(dram=8))
    into = targets(10, SIZE)
    got = cache.get(more, into)
    assert (got.length, got.tiers) == (8, Counter(dram=8))
    assert [bytes(one) for one in into[:8]] == contents(keys, SIZE)
    assert 0 <= got.seconds < 5


def test_only_the_leading_blocks_count(cache: Cache) -> None:
    keys = hashes(8, "hole")
    there = keys[:3] + keys[4:]
    cache.put(there, contents(there, SIZE))
    assert cache.lookup(keys).length == 3
    assert fetch(cache, keys) == contents(keys[:3], SIZE)
    assert fetch(cache, keys[4:]) == contents(keys[4:], SIZE)


def test_put_keeps_what_is_there(cache: Cache) -> None:
    keys = hashes(4, "twice")
    cache.put(keys[:2], contents(keys[:2], SIZE))
    assert cache.put(keys, [b"x" * SIZE] * 4) == PutResult(stored=2, present=2, refused=0)
    assert fetch(cache, keys) == [*contents(keys[:2], SIZE), b"x" * SIZE, b"x" * SIZE]


def test_lookup_changes_nothing(cache: Cache, client: Client) -> None:
    keys = hashes(4, "look")
    cache.put(keys, contents(keys, SIZE))
    before = client.stats().tenants.default
    for _ in range(5):
        cache.lookup(keys)
    after = client.stats().tenants.default
    assert after.blocks == before.blocks
    assert after.requests.lookup == before.requests.lookup + 5
    assert after.leases == before.leases


def test_reserve_commit(cache: Cache, client: Client) -> None:
    keys = hashes(4, "reserve")
    cache.put(keys[1:2], contents(keys[1:2], SIZE))
    reservation = cache.reserve(keys, deadline_s=0.5)
    assert len(reservation) == len(reservation.extents) == 3
    assert (reservation.present, reservation.refused) == (1, 0)
    assert reservation.indices == [0, 2, 3]
    assert cache.lookup(keys).length == 0
    assert cache.reserve(keys).present == 4, "others see that they are being written"
    for at, index in enumerate(reservation.indices):
        reservation.view(at)[:] = content(keys[index], SIZE)
    assert cache.lookup(keys).length == 0, "visible before the commit"
    assert reservation.commit() == 3
    assert reservation.commit() == 0, "a second commit does nothing"
    assert fetch(cache, keys) == contents(keys, SIZE)


def test_abort_gives_the_room_back(cache: Cache, client: Client) -> None:
    before = client.stats().tenants.default.tiers.dram.used_bytes
    reservation = cache.reserve(hashes(4, "abort"))
    assert client.stats().tenants.default.tiers.dram.used_bytes == before + 4 * SIZE
    reservation.abort()
    reservation.abort()
    assert client.stats().tenants.default.tiers.dram.used_bytes == before
    assert cache.lookup(hashes(4, "abort")).length == 0
    again = cache.reserve(hashes(4, "abort"))
    assert len(again) == 4
    again.abort()


def test_a_reservation_as_context(cache: Cache) -> None:
    keys = hashes(4, "context")
    with cache.reserve(keys[:2]) as reservation:
        for at, key in enumerate(keys[:2]):
            reservation.view(at)[:] = content(key, SIZE)
    with pytest.raises(ZeroDivisionError), cache.reserve(keys[2:]):
        raise ZeroDivisionError
    assert fetch(cache, keys) == contents(keys[:2], SIZE)


def test_acquire_release(cache: Cache, client: Client) -> None:
    keys = hashes(6, "acquire")
    cache.put(keys[:4], contents(keys[:4], SIZE))
    before = client.stats().tenants.default
    with cache.acquire(keys, deadline_s=0.2) as grant:
        assert len(grant) == grant.length == 4
        assert grant.tiers == Counter(dram=4)
        assert grant.stop == "absent"
        assert [bytes(grant.view(at)) for at in range(4)] == contents(keys[:4], SIZE)
        assert client.stats().tenants.default.leases == before.leases + 1
    assert grant.release() is True, "a second release answers the same"
    after = client.stats().tenants.default
    assert after.leases == before.leases
    assert after.blocks.hit == before.blocks.hit + 4
    assert after.blocks.miss == before.blocks.miss + 2
    assert after.blocks.asked == after.blocks.hit + after.blocks.miss


def test_a_miss_is_no_error_and_no_lease(cache: Cache, client: Client) -> None:
    before = client.stats().tenants.default.leases
    grant = cache.acquire(hashes(3, "nothing"))
    assert (grant.length, grant.stop, grant.tiers) == (0, "absent", Counter())
    assert client.stats().tenants.default.leases == before
    assert grant.release() is True, "nothing was read, nothing must be thrown away"


def test_what_is_granted_outlives_forget(cache: Cache, client: Client) -> None:
    keys = hashes(3, "outlive")
    cache.put(keys, contents(keys, SIZE))
    grant = cache.acquire(keys)
    assert cache.forget(keys) == 3
    assert cache.forget(keys) == 0
    assert cache.lookup(keys).length == 0
    assert cache.put(keys, [b"new" * SIZE] * 0 + [b"n" * SIZE] * 3).stored == 3
    assert [bytes(grant.view(at)) for at in range(3)] == contents(keys, SIZE)
    assert grant.release() is True
    assert fetch(cache, keys) == [b"n" * SIZE] * 3


def test_retain_counts_what_is_there(cache: Cache) -> None:
    keys = hashes(4, "retain")
    cache.put(keys[:3], contents(keys[:3], SIZE))
    assert cache.retain(keys, 100) == 3
    assert cache.retain(keys, 0) == 3
    assert cache.retain(keys[:1], 5, ttl_s=0.001) == 1


def test_prefetch_of_what_is_in_memory_orders_nothing(cache: Cache) -> None:
    keys = hashes(3, "prefetch")
    cache.put(keys, contents(keys, SIZE))
    assert cache.prefetch(keys) == 0
    assert cache.prefetch(hashes(2, "absent")) == 0


def test_hints_and_parent(cache: Cache) -> None:
    keys = hashes(4, "hints")
    hints = {"reuse": "continue", "finish_reason": "stop", "tag": "chat"}
    put = cache.put(keys[:2], contents(keys[:2], SIZE), hints=hints)
    put = cache.put(keys[2:], contents(keys[2:], SIZE), parent=keys[1], hints={"reuse": "done"})
    assert put.stored == 2
    with pytest.raises(InvalidRequest, match=r"hint.*colour"):
        cache.put(hashes(1, "wrong"), [bytes(SIZE)], hints={"colour": "blue"})
    with pytest.raises(InvalidRequest, match="use continue, done or unknown"):
        cache.reserve(hashes(1, "wrong"), hints={"reuse": "perhaps"})
    assert cache.lookup(hashes(1, "wrong")).length == 0


def test_empty_lists(cache: Cache) -> None:
    assert cache.lookup([]) == Match(0, Counter())
    assert cache.put([], []) == PutResult(0, 0, 0)
    got = cache.get([], [])
    assert got == GetResult(0, Counter(), got.seconds)
    assert cache.acquire([]).length == 0
    assert cache.reserve([]).commit() == 0
    assert cache.prefetch([]) == cache.forget([]) == cache.retain([], 1) == 0


@pytest.mark.parametrize("size", [8, 9, 20, 63, 64])
def test_hashes_of_every_length(cache: Cache, size: int) -> None:
    keys = hashes(3, "length", size=size)
    cache.put(keys, contents(keys, SIZE))
    assert fetch(cache, keys) == contents(keys, SIZE)
    assert cache.lookup([key + b"\0" for key in keys[:1] if size < 64]).length == 0


@pytest.mark.parametrize("shard_bytes", [1, 100, 4095, 4097, 12_345, 100_001])
def test_blocks_of_odd_sizes(client: Client, door: str, shard_bytes: int) -> None:
    cache = client.open(layout(f"odd {door}", shard_bytes=shard_bytes, shards=3))
    keys = hashes(7, f"odd {shard_bytes}")
    assert cache.put(keys, contents(keys, 3 * shard_bytes)).stored == 7
    assert fetch(cache, keys) == contents(keys, 3 * shard_bytes)
    grant = cache.acquire(keys)
    whole = b"".join(bytes(grant.view(6, shard)) for shard in range(3))
    assert whole == content(keys[6], 3 * shard_bytes)
    assert grant.release()


def test_a_layout_is_part_of_every_key(client: Client, door: str) -> None:
    keys = hashes(2, "same")
    caches = [client.open(layout(f"{door} {n}", shard_bytes=SIZE)) for n in range(3)]
    for number, cache in enumerate(caches[:2]):
        assert cache.put(keys, [bytes([number]) * SIZE] * 2).stored == 2
    assert fetch(caches[0], keys) == [b"\0" * SIZE] * 2
    assert fetch(caches[1], keys) == [b"\1" * SIZE] * 2
    assert caches[2].lookup(keys).length == 0


def test_views_out_of_range(cache: Cache) -> None:
    keys = hashes(2, "range")
    cache.put(keys, contents(keys, SIZE))
    wrong: list[Callable[[Any], Any]] = [
        lambda held: held.view(2),
        lambda held: held.view(-1),
        lambda held: held.view(0, 1),
        lambda held: held.numpy(0, -1),
    ]
    with cache.acquire(keys) as grant:
        for look in wrong:
            with pytest.raises(InvalidRequest, match="count from 0"):
                look(grant)


def test_verify_finds_nothing_wrong(cache: Cache, client: Client, shared: Daemon) -> None:
    keys = hashes(6, "verify")
    cache.put(keys, contents(keys, SIZE))
    stored = shared.settled().tiers.nvme.blocks
    assert stored >= 6
    assert client.verify(deadline_s=10) == (stored, 0, 0)


def test_clear_drops_everything(cache: Cache, client: Client, shared: Daemon) -> None:
    keys = hashes(5, "clear")
    cache.put(keys, contents(keys, SIZE))
    assert client.clear() >= 5
    assert cache.lookup(keys).length == 0
    stats = shared.settled()
    assert stats.tiers.dram.used_bytes == stats.tiers.nvme.used_bytes == stats.blocks.known == 0
    assert client.clear() == 0


def test_stats_have_every_key_of_the_contract(cache: Cache, client: Client) -> None:
    keys = hashes(2, "stats")
    cache.put(keys, contents(keys, SIZE))
    fetch(cache, keys)
    stats = client.stats()
    assert stats.version == 1
    assert stats.uptime_s > 0
    assert stats.generation > 0
    tenant = stats.tenants.default
    assert set(tenant.requests) >= {"lookup", "acquire", "reserve", "commit", "release"}
    assert set(tenant.blocks) >= {"asked", "hit", "miss", "stored", "refused"}
    assert tenant.blocks.asked == tenant.blocks.hit + tenant.blocks.miss > 0
    assert set(tenant.tiers) == {"hbm", "dram", "nvme"}
    tier_keys = {"capacity_bytes", "used_bytes", "blocks", "hits", "hit_ratio", "promoted"}
    tier_keys |= {"spilled", "evicted", "corrupt", "read_bytes", "written_bytes", "latency_ms"}
    for tier in tenant.tiers.values():
        assert set(tier) >= tier_keys
        assert set(tier.latency_ms) >= {"p50", "p99"}
    assert set(tenant.saved) >= {"tokens", "prefill_seconds"}
    assert "ceiling_hit_ratio" in tenant
    hits = sum(tier.hits for tier in tenant.tiers.values())
    assert hits == tenant.blocks.hit
    with pytest.raises(AttributeError, match="no field 'colour'"):
        _ = tenant.colour


def test_saved_tokens_are_counted(cache: Cache, client: Client) -> None:
    keys = hashes(4, "saved")
    cache.put(keys, contents(keys, SIZE))
    before = client.stats().tenants.default.saved
    cache.acquire(keys, prefill_tokens_per_s=64.0).release()
    after = client.stats().tenants.default.saved
    assert after.tokens - before.tokens == 4 * 16
    assert after.prefill_seconds - before.prefill_seconds == pytest.approx(1.0)


def test_the_client_closes(shared: Daemon, door: str) -> None:
    sessions = shared.stats().sessions
    client = shared.client(door)
    cache = client.open(layout("closing"))
    assert shared.stats().sessions == sessions + 1
    client.close()
    client.close()
    with pytest.raises(KVStoreError, match="closed"):
        cache.lookup(hashes(1, "closed"))
