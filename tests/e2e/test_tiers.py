"""Down to NVMe and up again: more blocks than DRAM holds, restarts, policies, moving slabs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from kvstore.client import Cache
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import KIB, MIB, Daemon, content, contents, hashes, layout, targets, wait_for

SIZE = 64 * KIB
SMALL = {"size": "8 MiB"}  # 128 blocks
IN_DRAM = 128
NONE = {"size": "0"}


def check(cache: Cache, keys: list[bytes]) -> Counter[str]:
    """Get all of them, look at every byte; where they were found."""
    size = cache.layout.block_bytes
    into = targets(len(keys), size)
    got = cache.get(keys, into, deadline_s=20)
    assert got.length == len(keys)
    assert all(bytes(one) == content(key, size) for one, key in zip(into, keys, strict=True))
    assert got.tiers.total() == len(keys)
    return got.tiers


def test_more_blocks_than_memory(make_daemon: MakeDaemon, door: str) -> None:
    daemon = make_daemon(dram=SMALL).start()
    client = daemon.client(door)
    cache = client.open(layout("more"))
    keys = hashes(300, "more")
    put = cache.put(keys, contents(keys, SIZE), deadline_s=20)
    assert (put.stored, put.present, put.refused) == (300, 0, 0)
    stats = daemon.settled()
    assert stats.tiers.nvme.blocks == stats.tiers.nvme.spilled == 300
    assert stats.tiers.dram.blocks <= IN_DRAM
    assert cache.lookup(keys).length == 300
    first = check(cache, keys)
    assert first["nvme"] >= 300 - IN_DRAM
    again = check(cache, keys[:IN_DRAM])
    stats = daemon.settled()
    assert stats.tiers.nvme.hits == first["nvme"] + again["nvme"]
    assert stats.tiers.nvme.hits + stats.tiers.dram.hits == stats.blocks.hit == 300 + IN_DRAM
    assert stats.blocks.asked == stats.blocks.hit + stats.blocks.miss
    assert stats.tiers.nvme.promoted >= stats.tiers.nvme.hits
    assert stats.tiers.nvme.read_bytes == stats.tiers.nvme.promoted * SIZE
    assert stats.tiers.nvme.latency_ms.p99 > 0
    assert client.verify(deadline_s=20) == (300, 0, 0)


def test_one_grant_takes_what_fits(make_daemon: MakeDaemon, door: str) -> None:
    """An acquire of more blocks than memory holds grants the head, says why, and can go on."""
    daemon = make_daemon(dram=SMALL).start()
    cache = daemon.client(door).open(layout("grant"))
    keys = hashes(200, "grant")
    cache.put(keys, contents(keys, SIZE), deadline_s=20)
    done = 0
    while done < len(keys):
        grant = cache.acquire(keys[done:], deadline_s=10)
        assert grant.length and grant.stop in ("end", "no_room", "pending")
        for at in range(grant.length):
            assert bytes(grant.view(at)) == content(keys[done + at], SIZE)
        assert grant.release()
        done += grant.length
    assert done == 200


def test_prefetch_brings_blocks_up(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(dram=SMALL).start()
    cache = daemon.client().open(layout("prefetch"))
    keys = hashes(200, "prefetch")
    cache.put(keys, contents(keys, SIZE), deadline_s=20)
    cold = [at for at in range(200) if cache.lookup(keys[at : at + 1]).tiers["nvme"]]
    first = keys[cold[0] : cold[0] + 10]
    ordered = cache.prefetch(first)
    assert 0 < ordered <= 10
    wait_for(lambda: cache.lookup(first).tiers["dram"] == 10, "the blocks to come up")
    assert cache.prefetch(first) == 0
    assert check(cache, first) == Counter(dram=10), "found in memory, not loaded for this request"


def test_a_restart_serves_what_is_on_nvme(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(dram=SMALL).start()
    odd = layout("odd", shard_bytes=33_333, shards=2)
    keys, others = hashes(150, "restart"), hashes(20, "restart odd", size=64)
    client = daemon.client()
    client.open(layout("restart")).put(keys, contents(keys, SIZE), deadline_s=20)
    client.open(odd).put(others, contents(others, 66_666))
    client.close()
    for _ in range(2):
        daemon.stop()
        daemon.start()
        client = daemon.client()
        assert client.stats().tenants.default.tiers.nvme.blocks == 170
        assert check(client.open(layout("restart")), keys)["nvme"] >= 150 - IN_DRAM
        assert check(client.open(odd), others).total() == 20
        assert client.open(layout("another")).lookup(keys).length == 0
        client.close()


@pytest.mark.parametrize("policy", ["through", "on-evict", "second-touch"])
def test_write_policies(make_daemon: MakeDaemon, policy: str) -> None:
    daemon = make_daemon(dram=SMALL, nvme={"write_policy": policy}).start()
    cache = daemon.client().open(layout(policy))
    keys = hashes(60, policy)
    cache.put(keys, contents(keys, SIZE))
    assert daemon.settled().tiers.nvme.spilled == (60 if policy == "through" else 0)
    check(cache, keys[:10])  # the second touch of these
    wanted = {"through": 60, "on-evict": 0, "second-touch": 10}[policy]
    wait_for(lambda: daemon.settled().tiers.nvme.spilled == wanted, f"{wanted} blocks on NVMe")
    more = hashes(120, f"{policy} more")
    assert cache.put(more, contents(more, SIZE), deadline_s=20).stored == 120
    stats = daemon.settled()
    assert stats.tiers.dram.evicted == {"room": 60 + 120 - IN_DRAM}
    if policy == "second-touch":
        assert stats.tiers.nvme.blocks == 10, "what nobody asked for again is not written"
        assert check(cache, keys[:10]).total() == 10
        assert cache.lookup(keys).length < 60
    else:
        assert stats.tiers.nvme.blocks >= 60 + 120 - IN_DRAM
        # Blocks in memory must be written before others can come up.
        wait_for(lambda: cache.get(keys, targets(60, SIZE)).length == 60, "room")
        assert check(cache, keys).total() == 60
    daemon.stop()
    daemon.lose_memory()
    daemon.start()
    cache = daemon.client().open(layout(policy))
    if policy != "second-touch":
        assert check(cache, keys) == Counter(nvme=60)
        assert check(cache, more).total() == 120
    else:
        assert check(cache, keys[:10]) == Counter(nvme=10)


def test_no_nvme_at_all(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(dram=SMALL, nvme=NONE).start()
    client = daemon.client()
    cache = client.open(layout("none"))
    keys = hashes(200, "none")
    for part in (keys[:100], keys[100:]):
        assert cache.put(part, contents(part, SIZE)).stored == 100
    stats = daemon.settled()
    assert stats.tiers.nvme.capacity_bytes == stats.tiers.nvme.blocks == 0
    assert stats.tiers.nvme.fenced is False
    assert stats.tiers.dram.blocks == IN_DRAM
    assert stats.tiers.dram.evicted == {"room": 200 - IN_DRAM}
    there = [key for key in keys if cache.lookup([key]).length]
    assert len(there) == IN_DRAM
    assert all(check(cache, [key]) == Counter(dram=1) for key in there[:20])
    assert client.verify() == (0, 0, 0)
    assert cache.prefetch(there[:1]) == 0


def test_slabs_change_hands(make_daemon: MakeDaemon) -> None:
    """Layouts of very different block sizes take the same memory in turn."""
    daemon = make_daemon(dram=SMALL).start()
    client = daemon.client()
    sizes = [4 * KIB, 64 * KIB, 100_001, 700_000, 1 * MIB]
    caches = [client.open(layout("slabs", shard_bytes=size)) for size in sizes]
    stored: list[tuple[Cache, list[bytes]]] = []
    for turn in range(3):
        for cache in caches:
            size = cache.layout.block_bytes
            keys = hashes(6 * MIB // size, f"{turn} {size}", size=16)
            assert cache.put(keys, contents(keys, size), deadline_s=20).refused == 0
            stored.append((cache, keys))
    assert daemon.settled().tiers.dram.evicted["slab"] > 0
    for cache, keys in stored[-5:]:
        check(cache, keys)
    stats = daemon.settled()
    assert stats.tiers.dram.used_bytes <= 8 * MIB
    assert stats.tiers.nvme.corrupt == 0


def test_two_devices(make_daemon: MakeDaemon) -> None:
    """Two files hold whole slabs each, five slabs are two on each: blocks were put into the fifth
    all the same, the mover's thread died of it, and the daemon could not stop. The tier is as
    large as its files now."""
    daemon = make_daemon(dram=SMALL)
    folders = [daemon.folder / name for name in ("a", "b")]
    daemon.config["nvme"] = {"size": "5 MiB", "paths": [str(path) for path in folders]}
    daemon.start()
    cache = daemon.client().open(layout("devices"))
    keys = hashes(100, "devices")
    assert cache.put(keys, contents(keys, SIZE)).stored == 100
    stats = daemon.settled()
    assert stats.tiers.nvme.capacity_bytes == 4 * MIB
    assert stats.tiers.nvme.blocks == 64
    assert stats.tiers.nvme.failed == 0
    files = [next(Path(folder).rglob("blocks.kv")) for folder in folders]
    assert [file.stat().st_size for file in files] == [3 * MIB, 3 * MIB]
    daemon.stop()
    daemon.lose_memory()
    daemon.start()
    cache = daemon.client().open(layout("devices"))
    there = [key for key in keys if cache.lookup([key]).length]
    assert len(there) == 64
    for key in there:
        assert check(cache, [key]) == Counter(nvme=1)


def test_retained_blocks_stay(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(dram=SMALL, nvme=NONE).start()
    cache = daemon.client().open(layout("retain"))
    kept, others = hashes(10, "kept"), hashes(300, "others")
    cache.put(kept, contents(kept, SIZE))
    assert cache.retain(kept, 100) == 10
    cache.put(others, contents(others, SIZE))
    assert check(cache, kept) == Counter(dram=10)
    assert cache.retain(kept, 0) == 10
    more = hashes(300, "more")
    cache.put(more, contents(more, SIZE))
    assert cache.lookup(kept).length == 0


def test_damage_is_a_miss(make_daemon: MakeDaemon) -> None:
    """Bytes that changed on the disk are found by verify, and by a read, and never served."""
    daemon: Daemon = make_daemon(dram=SMALL).start()
    cache = daemon.client().open(layout("damage"))
    keys = hashes(40, "damage")
    cache.put(keys, contents(keys, SIZE))
    daemon.settled()
    daemon.stop()
    daemon.lose_memory()
    file = next((daemon.folder / "nvme").rglob("blocks.kv"))
    data = file.read_bytes()
    with file.open("r+b") as disk:
        for key in (keys[30], keys[35]):
            disk.seek(data.index(content(key, SIZE)) + 1_000)
            disk.write(b"?")
    daemon.start()
    client = daemon.client()
    cache = client.open(layout("damage"))
    into = targets(33, SIZE)
    assert cache.get(keys[:33], into, deadline_s=10).length == 30
    assert [bytes(one) for one in into[:30]] == contents(keys[:30], SIZE)
    checked, damaged, skipped = client.verify()
    assert (checked + skipped, damaged) == (39, 1)
    assert [cache.lookup([key]).length for key in (keys[30], keys[35])] == [0, 0]
    assert daemon.stats().tiers.nvme.corrupt == 2
    assert daemon.log().count("damaged block dropped") == 2
    assert keys[35].hex() in daemon.log()
    assert cache.put(keys, contents(keys, SIZE)).stored == 2
    assert check(cache, keys).total() == 40
