"""The HBM tier through the real daemon, on GPUs of host memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvstore.client import Cache, Client, Grant
from kvstore.errors import InvalidRequest
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import KIB, ROOT, Daemon, contents, hashes, layout, wait_for

SIZE = 64 * KIB
KEYS = hashes(12, "hbm")


def with_gpus(make_daemon: MakeDaemon, *sizes: str) -> Daemon:
    daemon = make_daemon()
    daemon.gpus = sizes
    daemon.config["dram"]["slab_size"] = "256 KiB"
    return daemon.start()


def asked(cache: Cache, keys: Sequence[bytes], gpus: Sequence[int]) -> Grant:
    with cache.acquire(keys, gpus=gpus) as grant:
        assert grant.length == len(keys)
    return grant


def climbed(daemon: Daemon, cache: Cache, keys: Sequence[bytes], gpus: Sequence[int]) -> None:
    """Ask until all copies are there."""
    wait_for(lambda: asked(cache, keys, gpus).tiers["hbm"] == len(keys), "copies on the GPU")


def copy_of(client: Client, gpu: int, offset: int | None, size: int) -> bytes:
    """What is at a place of a GPU's arena, as a client sees it."""
    assert offset is not None
    with Path(client.gpus[gpu][2].decode()).open("rb") as memory:
        memory.seek(offset)
        return memory.read(size)


def test_what_is_asked_for_again_climbs(make_daemon: MakeDaemon) -> None:
    daemon = with_gpus(make_daemon, "4 MiB")
    client = daemon.client()
    assert [(bus, size) for bus, size, _ in client.gpus] == [("0000:00:00.0", 4 << 20)]
    cache = client.open(layout("hbm"))
    cache.put(KEYS, contents(KEYS, SIZE))
    assert asked(cache, KEYS, (0,)).tiers == {"dram": 12}
    assert daemon.settled().tiers.hbm.blocks == 0, "once is not again"
    climbed(daemon, cache, KEYS, (0,))
    with cache.acquire(KEYS, gpus=(0,)) as grant:
        found = [copy_of(client, 0, offset, SIZE) for offset in grant.copies]
        assert found == contents(KEYS, SIZE)
        assert [bytes(grant.view(at)) for at in range(12)] == found, "they are in DRAM, too"
    with cache.acquire(KEYS) as grant:
        assert grant.tiers == {"dram": 12} and grant.copies == [None] * 12
    stats = daemon.settled()
    hbm = stats.tiers.hbm
    assert (hbm.blocks, hbm.promoted, hbm.written_bytes) == (12, 12, 12 * SIZE)
    assert hbm.hits >= 24 and hbm.used_bytes <= hbm.capacity_bytes == 4 << 20
    assert stats.blocks.hit == sum(tier.hits for tier in stats.tiers.values())
    assert stats.blocks.asked == stats.blocks.hit + stats.blocks.miss


def test_each_shard_is_on_the_device_of_its_rank(make_daemon: MakeDaemon) -> None:
    daemon = with_gpus(make_daemon, "2 MiB", "2 MiB")
    client = daemon.client()
    cache = client.open(layout("shards", shards=2, shard_bytes=SIZE))
    whole = contents(KEYS, 2 * SIZE)
    cache.put(KEYS, whole)
    asked(cache, KEYS, (1, 0))
    climbed(daemon, cache, KEYS, (1, 0))
    with cache.acquire(KEYS, gpus=(1, 0)) as grant:
        for at, block in enumerate(whole):
            first, second = grant.copies[2 * at : 2 * at + 2]
            assert copy_of(client, 1, first, SIZE) == block[:SIZE]
            assert copy_of(client, 0, second, SIZE) == block[SIZE:]
    assert asked(cache, KEYS, (0, 1)).tiers == {"dram": 12}, "the devices serve the other shards"


def test_no_more_than_configured(make_daemon: MakeDaemon) -> None:
    daemon = with_gpus(make_daemon, "1 MiB")
    cache = daemon.client().open(layout("many"))
    many = hashes(64, "many")
    cache.put(many, contents(many, SIZE))
    for at in range(0, 64, 4):
        part = many[at : at + 4]
        asked(cache, many[: at + 4], ())
        asked(cache, part, (0,))
        climbed(daemon, cache, part, (0,))
    hbm = daemon.settled().tiers.hbm
    assert hbm.used_bytes <= hbm.capacity_bytes == 1 << 20
    assert hbm.blocks == 16 and hbm.promoted == 64 and hbm.evicted == {"room": 48}
    assert asked(cache, many[-4:], (0,)).tiers == {"hbm": 4}


def test_a_lost_device_is_fenced_and_nothing_else(make_daemon: MakeDaemon) -> None:
    daemon = with_gpus(make_daemon, "1 MiB", "1 MiB")
    daemon.forgiven = ("copy to a GPU failed", "GPU is fenced")
    cache = daemon.client().open(layout("lost"))
    cache.put(KEYS, contents(KEYS, SIZE))
    asked(cache, KEYS[:4], (0,))
    climbed(daemon, cache, KEYS[:4], (0,))
    (daemon.folder / "gpu-lost").touch()
    asked(cache, KEYS, (0,))
    asked(cache, KEYS, (0,))
    wait_for(lambda: daemon.stats().tiers.hbm.fenced, "the fence")
    with cache.acquire(KEYS, gpus=(0,)) as grant:
        assert grant.tiers == {"dram": 12}
        assert [bytes(grant.view(at)) for at in range(12)] == contents(KEYS, SIZE)
    hbm = daemon.settled().tiers.hbm
    assert hbm.blocks == hbm.used_bytes == 0 and hbm.failed == 1
    assert daemon.log().count("GPU is fenced") == 1 and "fallen off the bus" in daemon.log()


def test_a_restart_begins_with_an_empty_device(make_daemon: MakeDaemon) -> None:
    daemon = with_gpus(make_daemon, "2 MiB")
    client = daemon.client()
    cache = client.open(layout("again"))
    cache.put(KEYS, contents(KEYS, SIZE))
    asked(cache, KEYS, (0,))
    climbed(daemon, cache, KEYS, (0,))
    daemon.kill()
    daemon.start()
    assert asked(cache, KEYS, (0,)).tiers == {"dram": 12}
    climbed(daemon, cache, KEYS, (0,))
    daemon.stop()


def test_senseless_gpus_are_refused(make_daemon: MakeDaemon) -> None:
    cache = with_gpus(make_daemon, "2 MiB").client().open(layout("senseless"))
    for gpus, wrong in (((1,), "device 1 of 1"), ((0, 0), "2 devices for a layout with 1 shards")):
        with pytest.raises(InvalidRequest, match=wrong):
            cache.acquire(KEYS, gpus=gpus)


def test_without_a_gpu_the_daemon_says_so_once(make_daemon: MakeDaemon) -> None:
    """On a machine with a GPU and cupy there is no device 99 either."""
    daemon = make_daemon()
    path = daemon.write_config()
    path.write_text(path.read_text() + '[[hbm]]\ndevice = 99\nsize = "8 MiB"\n')
    ended = subprocess.run(
        [sys.executable, "-m", "kvstore.daemon", "--config", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if "[[hbm]] device 99" in line]
    assert len(lines) == 1 and "Traceback" not in ended.stderr


def on_nvme(make_daemon: MakeDaemon, name: str, *sizes: str) -> tuple[Daemon, Cache]:
    """A daemon that has the blocks on NVMe alone."""
    daemon = with_gpus(make_daemon, *sizes)
    cache = daemon.client().open(layout(name, shards=len(sizes), shard_bytes=SIZE // len(sizes)))
    cache.put(KEYS, contents(KEYS, SIZE))
    daemon.settled()
    daemon.stop()
    daemon.lose_memory()
    daemon.start()
    cache = daemon.client().open(cache.layout)
    assert cache.lookup(KEYS).tiers == {"nvme": len(KEYS)}
    return daemon, cache


def direct(cache: Cache, gpus: Sequence[int]) -> Grant:
    with cache._acquire(KEYS, 1.0, None, 0, gpus=gpus, direct=True) as grant:
        return grant


@pytest.mark.parametrize("sizes", [("4 MiB",), ("4 MiB", "4 MiB")])
def test_blocks_climb_from_nvme_and_leave_dram_alone(
    make_daemon: MakeDaemon, sizes: tuple[str, ...]
) -> None:
    daemon, cache = on_nvme(make_daemon, "hbm beside", *sizes)
    gpus = list(range(len(sizes)))
    assert direct(cache, gpus).tiers == {"nvme": len(KEYS)}
    wait_for(lambda: direct(cache, gpus).tiers["hbm"] == len(KEYS), "copies on the GPUs")
    with cache._acquire(KEYS, 1.0, None, 0, gpus=gpus, direct=True) as grant:
        part = SIZE // len(sizes)
        found = [
            copy_of(cache.client, at % len(sizes), offset, part)
            for at, offset in enumerate(grant.copies)
        ]
        assert b"".join(found) == b"".join(contents(KEYS, SIZE))
    stats = daemon.settled()
    assert (stats.tiers.dram.blocks, stats.tiers.hbm.blocks) == (0, len(KEYS) * len(sizes))
    assert cache.lookup(KEYS).tiers == {"nvme": len(KEYS)}
    with cache.acquire(KEYS, gpus=gpus, deadline_s=10) as plain:
        assert plain.tiers == {"nvme": len(KEYS)}, "who wants them in DRAM gets them there"
        assert [bytes(plain.view(at, 0)) for at in range(12)] == [
            block[:part] for block in contents(KEYS, SIZE)
        ]
    assert daemon.settled().tiers.dram.blocks == len(KEYS)
    assert asked(cache, KEYS, gpus).tiers == {"hbm": len(KEYS)}


def test_damage_on_nvme_does_not_climb(make_daemon: MakeDaemon) -> None:
    daemon, cache = on_nvme(make_daemon, "hbm damaged", "4 MiB")
    (folder,) = daemon.config["nvme"]["paths"]
    path, block = Path(folder) / "default" / "blocks.kv", contents(KEYS, SIZE)[4]
    where = path.read_bytes().find(block)
    with path.open("r+b") as file:
        file.seek(where + 100)
        file.write(bytes([block[100] ^ 1]))
    direct(cache, [0])
    wait_for(lambda: len(direct(cache, [0])) == 4 or None, "the damage to be found")
    wait_for(lambda: direct(cache, [0]).tiers["hbm"] == 4, "copies of the others")
    assert daemon.settled().tiers.nvme.corrupt in (1, 2)  # a load and a climb may both find it
