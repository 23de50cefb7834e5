"""Blocks in shards: written by several ranks, visible only when all of them are in."""

from __future__ import annotations

import pytest

from kvstore.client import Cache, Client
from kvstore.errors import InvalidBlock, InvalidRequest
from tests.e2e.harness import Daemon, content, contents, hashes, layout, targets, wait_for

SHARDS, SHARD = 4, 24 << 10
SIZE = SHARDS * SHARD


@pytest.fixture
def sharded(client: Client, request: pytest.FixtureRequest) -> Cache:
    return client.open(layout(request.node.nodeid, shard_bytes=SHARD, shards=SHARDS))


def part(keys: list[bytes], shard: int) -> list[bytes]:
    return [one[shard * SHARD : (shard + 1) * SHARD] for one in contents(keys, SIZE)]


def test_visible_only_when_all_shards_are_in(sharded: Cache, client: Client) -> None:
    keys = hashes(6, "shards")
    before = client.stats().tenants.default.blocks.stored
    for shard in (2, 0, 3):
        assert sharded.put(keys, part(keys, shard), shard=shard).stored == 6
        assert sharded.lookup(keys).length == 0
        assert sharded.acquire(keys, deadline_s=0).length == 0
    assert client.stats().tenants.default.blocks.stored == before
    again = sharded.put(keys, part(keys, 0), shard=0)
    assert (again.stored, again.present) == (0, 6), "a rank that comes twice changes nothing"
    assert sharded.put(keys, part(keys, 1), shard=1).stored == 6
    assert sharded.lookup(keys).length == 6
    assert client.stats().tenants.default.blocks.stored == before + 6
    into = targets(6, SIZE)
    assert sharded.get(keys, into).length == 6
    assert [bytes(one) for one in into] == contents(keys, SIZE)


def test_get_one_shard(sharded: Cache) -> None:
    keys = hashes(5, "one")
    sharded.put(keys, contents(keys, SIZE))
    for shard in range(SHARDS):
        into = targets(5, SHARD)
        assert sharded.get(keys, into, shard=shard).length == 5
        assert [bytes(one) for one in into] == part(keys, shard)
    with sharded.acquire(keys) as grant:
        for shard in range(SHARDS):
            assert bytes(grant.view(4, shard)) == part(keys, shard)[4]


def test_ranks_of_several_clients(shared: Daemon, door: str, sharded: Cache) -> None:
    keys = hashes(4, "ranks")
    ranks = [shared.client(door).open(sharded.layout) for _ in range(SHARDS)]
    held = [cache.reserve(keys, shard=shard) for shard, cache in enumerate(ranks)]
    assert [len(one) for one in held] == [4] * SHARDS
    for shard, reservation in enumerate(held):
        for at in range(4):
            reservation.view(at)[:] = part(keys, shard)[at]
    for reservation in held:
        assert sharded.lookup(keys).length == 0
        assert reservation.commit() == 4
    into = targets(4, SIZE)
    assert sharded.get(keys, into).length == 4
    assert [bytes(one) for one in into] == contents(keys, SIZE)


def test_a_rank_that_aborts_can_come_again(sharded: Cache) -> None:
    keys = hashes(3, "abort")
    for shard in (0, 1, 2):
        sharded.put(keys, part(keys, shard), shard=shard)
    sharded.reserve(keys, shard=3).abort()
    assert sharded.lookup(keys).length == 0
    assert sharded.put(keys, part(keys, 3), shard=3).stored == 3
    assert sharded.lookup(keys).length == 3


def test_a_rank_that_dies_is_no_block(shared: Daemon, door: str, sharded: Cache) -> None:
    keys = hashes(3, "dead rank")
    for shard in (0, 1):
        sharded.put(keys, part(keys, shard), shard=shard)
    rank = shared.client(door)
    rank.open(sharded.layout).reserve(keys, shard=2)
    rank.close()
    sharded.put(keys, part(keys, 3), shard=3)
    assert sharded.lookup(keys).length == 0
    assert sharded.forget(keys) in (0, 3)
    wait_for(lambda: shared.settled().leases == 0, "its leases to end")


def test_wrong_shards(sharded: Cache) -> None:
    keys = hashes(2, "wrong")
    for shard in (-1, SHARDS):
        with pytest.raises(InvalidRequest, match=f"shard {shard} of {SHARDS}: they count from 0"):
            sharded.put(keys, part(keys, 0), shard=shard)
        with pytest.raises(InvalidRequest, match=f"shard {shard} of {SHARDS}: they count from 0"):
            sharded.reserve(keys, shard=shard)
        with pytest.raises(InvalidRequest, match=f"shard {shard} of {SHARDS}: they count from 0"):
            sharded.get(keys, targets(2, SHARD), shard=shard)
    with pytest.raises(InvalidBlock, match=f"buffer 0 has {SHARD} bytes, this layout takes {SIZE}"):
        sharded.put(keys, part(keys, 0))
    with pytest.raises(InvalidBlock, match=f"buffer 0 has {SIZE} bytes, this layout takes {SHARD}"):
        sharded.put(keys, [content(key, SIZE) for key in keys], shard=0)
    assert sharded.lookup(keys).length == 0
