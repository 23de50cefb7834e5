"""Blocks on NVMe that the client reads from the files itself: right bytes, checked, in time, and
DRAM left as it is."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.client import Cache
from kvstore.client import direct as direct_module
from kvstore.client.direct import HostRing, Wanted
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import MIB, Daemon, contents, hashes, layout, targets, wait_for

SIZE = 64 << 10
OLD, NEW = hashes(48, "direct old"), hashes(200, "direct new")


@pytest.fixture
def daemon(make_daemon: MakeDaemon) -> Daemon:
    """DRAM holds 128 of the blocks, NVMe all."""
    return make_daemon(
        dram={"size": 8 * MIB, "slab_size": 1 * MIB},
        nvme={"size": 64 * MIB},
        eviction={"policy": "lru"},
    ).start()


def on_nvme(daemon: Daemon, cache: Cache, shards: int = 1) -> None:
    """Put OLD, and so much after it that OLD is on NVMe alone."""
    size = SIZE * shards
    cache.put(OLD, contents(OLD, size), deadline_s=30)
    cache.put(NEW, contents(NEW, size), deadline_s=30)
    wait_for(lambda: "dram" not in cache.lookup(OLD).tiers or None, "OLD is on NVMe alone")
    daemon.settled()


@pytest.fixture
def cache(daemon: Daemon) -> Iterator[Cache]:
    with daemon.client() as client:
        cache = client.open(layout("direct", shard_bytes=SIZE))
        on_nvme(daemon, cache)
        yield cache


def test_dram_stays_as_it_is(daemon: Daemon, cache: Cache) -> None:
    before = daemon.stats()["tiers"]
    into = targets(len(OLD), SIZE)
    got = cache.get(OLD, into, direct=True, deadline_s=30)
    assert (got.length, got.tiers) == (len(OLD), {"nvme": len(OLD)})
    assert into == contents(OLD, SIZE)
    after = daemon.stats()["tiers"]
    assert cache.lookup(OLD).tiers == {"nvme": len(OLD)}
    assert after["dram"]["blocks"] == before["dram"]["blocks"]
    assert after["nvme"]["promoted"] == before["nvme"]["promoted"]
    assert after["nvme"]["hits"] == before["nvme"]["hits"] + len(OLD)
    assert after["nvme"]["read_bytes"] == before["nvme"]["read_bytes"] + len(OLD) * SIZE
    into = targets(len(OLD), SIZE)
    assert cache.get(OLD, into, deadline_s=30).length == len(OLD)
    assert into == contents(OLD, SIZE)
    assert daemon.stats()["tiers"]["nvme"]["promoted"] > 0


def test_some_in_dram_and_some_on_nvme(daemon: Daemon, cache: Cache) -> None:
    assert cache.get(OLD[:7], targets(7, SIZE), deadline_s=30).length == 7
    into = targets(len(OLD), SIZE)
    got = cache.get([*OLD, *hashes(1, "nowhere")], [*into, bytearray(SIZE)], direct=True)
    assert (got.length, got.tiers) == (len(OLD), {"dram": 7, "nvme": len(OLD) - 7})
    assert into == contents(OLD, SIZE)


@pytest.mark.parametrize("size", [SIZE + 1, 4096, 100])
@pytest.mark.parametrize("shard", [None, 0, 1, 2])
def test_one_shard_of_any_size(make_daemon: MakeDaemon, shard: int | None, size: int) -> None:
    daemon = make_daemon(
        dram={"size": 16 * MIB, "slab_size": 1 * MIB}, nvme={"size": 64 * MIB}
    ).start()
    with daemon.client() as client:
        cache = client.open(layout("direct", shard_bytes=size, shards=3))
        blocks = contents(OLD, 3 * size)
        cache.put(OLD, blocks, deadline_s=30)
        daemon.settled()
        daemon.stop()
        daemon.lose_memory()
        daemon.start()
        assert cache.lookup(OLD).tiers == {"nvme": len(OLD)}
        part = slice(0, 3 * size) if shard is None else slice(shard * size, (shard + 1) * size)
        into = targets(len(OLD), part.stop - part.start)
        got = cache.get(OLD, into, shard=shard, direct=True, deadline_s=30)
        assert got.tiers == {"nvme": len(OLD)}
        assert into == [block[part] for block in blocks]
        assert cache.lookup(OLD).tiers == {"nvme": len(OLD)}


def files_of(daemon: Daemon) -> list[Path]:
    return [Path(path) / "default" / "blocks.kv" for path in daemon.config["nvme"]["paths"]]


def test_damage_is_found_and_told(daemon: Daemon, cache: Cache) -> None:
    """The client's check fails; the daemon, asked for the rest, finds the damage itself."""
    block = contents(OLD, SIZE)[20]
    path = files_of(daemon)[0]
    where = path.read_bytes().find(block)
    assert where > 0
    with path.open("r+b") as file:
        file.seek(where + 1000)
        file.write(bytes([block[1000] ^ 1]))
        os.fsync(file.fileno())
    into = targets(len(OLD), SIZE)
    got = cache.get(OLD, into, direct=True, deadline_s=30)
    assert got.length == 20
    assert into[:20] == contents(OLD, SIZE)[:20]
    assert daemon.stats()["tiers"]["nvme"]["corrupt"] == 1
    assert cache.get(OLD[20:21], targets(1, SIZE), direct=True).length == 0


def test_a_lease_keeps_what_it_reads(daemon: Daemon, cache: Cache) -> None:
    """Forgotten meanwhile, the blocks' slots are given to nobody before the grant has ended."""
    grant = cache._acquire(OLD, 1.0, None, 0, direct=True)
    assert grant.length == len(OLD)
    assert cache.forget(OLD) == len(OLD)
    for at in range(5):
        others = hashes(200, f"others {at}")
        assert cache.put(others, contents(others, SIZE), deadline_s=30).stored == 200
    files, by = cache.client.direct_files(), time.monotonic() + 60
    assert files is not None
    found = direct_module.wanted(grant, cache.layout, OLD, None)
    good = sum(len(group) for group, _ in files.groups(list(found.values()), 8, by))
    assert good == len(OLD)
    assert grant.release()


def test_who_may_not_read_the_files(
    daemon: Daemon, cache: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is as without `direct`, and told once."""

    def refused(path: Path) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(direct_module, "open_direct", refused)
    for _ in range(2):
        into = targets(len(OLD), SIZE)
        assert cache.get(OLD, into, direct=True, deadline_s=30).length == len(OLD)
        assert into == contents(OLD, SIZE)
    assert len([one for one in caplog.records if "not read from here" in one.message]) == 1
    assert daemon.stats()["tiers"]["nvme"]["promoted"] >= len(OLD)


def test_a_device_that_hangs(daemon: Daemon, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call ends at its deadline; what is read late touches nothing of the caller's, and a
    client that is closed meanwhile does not wait."""
    go_on, begun = threading.Event(), threading.Event()
    real = HostRing.fetch

    def hang(self: HostRing, what: Wanted, slot: int) -> int | None:
        begun.set()
        go_on.wait(60)
        return real(self, what, slot)

    monkeypatch.setattr(HostRing, "fetch", hang)
    into = targets(len(OLD), SIZE)
    assert cache.get(OLD, into, direct=True, deadline_s=0.1).length == 0
    assert begun.is_set()
    assert into == targets(len(OLD), SIZE)
    files = cache.client.direct_files()
    assert files is not None
    ring = files._spare[0]
    assert ring.busy
    go_on.set()
    wait_for(lambda: not ring.busy or None, "the late reads have ended")
    assert into == targets(len(OLD), SIZE)
    assert cache.get(OLD, into, direct=True, deadline_s=30).length == len(OLD)
    assert into == contents(OLD, SIZE)


def test_while_many_calls_hang_no_more_is_begun(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    files, by = cache.client.direct_files(), time.monotonic() + 60
    assert files is not None
    with cache._acquire(OLD, 1.0, None, 0, direct=True) as grant:
        wanted = list(direct_module.wanted(grant, cache.layout, OLD, None).values())
        with monkeypatch.context() as patched:
            patched.setattr(HostRing, "fetch", lambda *_: go_on.wait(60) and None)
            for _ in range(direct_module.LATE_RINGS + 3):
                assert not list(files.groups(wanted, 8, 0.0))
            assert len(files._spare) == direct_module.LATE_RINGS
            go_on.set()
            wait_for(lambda: not any(ring.busy for ring in files._spare) or None, "reads to end")
        assert sum(len(good) for good, _ in files.groups(wanted, 8, by)) == len(OLD)
    assert len(files._spare) <= direct_module.SPARE_RINGS


def test_a_client_that_is_closed_does_not_wait(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads that nobody will make end with the files; so do threads and descriptors."""
    go_on, begun = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        begun.set()
        go_on.wait(60)

    files = cache.client.direct_files()
    assert files is not None
    with cache._acquire(OLD, 1.0, None, 0, direct=True) as grant:
        wanted = list(direct_module.wanted(grant, cache.layout, OLD, None).values())
    monkeypatch.setattr(direct_module, "RING_BYTES", 4 * SIZE)
    monkeypatch.setattr(HostRing, "fetch", hang)
    found: list[int] = []
    waiting = threading.Thread(
        target=lambda: found.append(len(list(files.groups(wanted, 1, time.monotonic() + 60))))
    )
    waiting.start()
    assert begun.wait(10)
    cache.client.close()
    assert not list(files.groups(wanted, 1, time.monotonic() + 60))
    go_on.set()
    waiting.join(10)
    assert found == [0]
    wait_for(lambda: not files._files or None, "the files to be closed")
    wait_for(
        lambda: not any("kvstore-direct" in one.name for one in threading.enumerate()) or None,
        "the threads to end",
    )


def test_files_that_were_made_anew_are_noticed(daemon: Daemon, cache: Cache) -> None:
    """Else the old ones would be read for ever, and keep their place on the drive."""
    first = cache.client.direct_files()
    assert first is not None
    daemon.stop()
    for path in files_of(daemon):
        path.unlink()
    daemon.start()
    on_nvme(daemon, cache)
    into = targets(len(OLD), SIZE)
    assert cache.get(OLD, into, direct=True, deadline_s=30).length == len(OLD)
    assert into == contents(OLD, SIZE)
    assert cache.client.direct_files() is not first
    assert cache.lookup(OLD).tiers == {"nvme": len(OLD)}, "they were read from the new ones"


def test_a_client_cannot_keep_the_daemon_from_its_files(daemon: Daemon, cache: Cache) -> None:
    (path,) = files_of(daemon)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        daemon.stop()
        daemon.start()
    assert daemon.client().open(cache.layout).lookup(OLD).length == len(OLD)


def test_an_answer_is_never_too_long(make_daemon: MakeDaemon) -> None:
    """However many shards, and however often a block is named: the rest is asked for again."""
    daemon = make_daemon(dram={"size": 64 * MIB, "slab_size": 4 * MIB}, nvme={"size": 64 * MIB})
    daemon.start()
    with daemon.client() as client:
        cache = client.open(layout("wide", shard_bytes=16, shards=1024))
        size = cache.layout.block_bytes
        keys = hashes(300, "wide")
        cache.put(keys, contents(keys, size), deadline_s=30)
        daemon.settled()
    daemon.stop()
    daemon.lose_memory()
    daemon.start()
    with daemon.client() as client:
        cache = client.open(cache.layout)
        grant = cache._acquire(keys, 1.0, None, 0, direct=True)
        assert 0 < grant.length < len(keys)
        assert grant.stop == "no_room"
        assert len(grant.beside) <= 1 << 20
        grant.release()
        many = cache._acquire([keys[0]] * 5_000, 1.0, None, 0, direct=True)
        assert len(many.beside) <= 1 << 20
        many.release()
        into = targets(len(keys), size)
        got = cache.get(keys, into, direct=True, deadline_s=30)
        assert got.tiers == {"nvme": len(keys)}
        assert into == contents(keys, size)
        assert cache.lookup(keys).tiers == {"nvme": len(keys)}


def test_no_thread_to_be_had(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is as without `direct`, and nothing stays open."""
    started: list[object] = []
    real = threading.Thread.start

    def start(self: threading.Thread) -> None:
        if self.name.startswith("kvstore-direct"):
            started.append(self)
            if len(started) == 3:
                raise RuntimeError("can't start new thread")
        real(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    into = targets(len(OLD), SIZE)
    assert cache.get(OLD, into, direct=True, deadline_s=30).length == len(OLD)
    assert into == contents(OLD, SIZE)
    wait_for(
        lambda: not any("kvstore-direct" in one.name for one in threading.enumerate()) or None,
        "the threads to end",
    )


def test_the_group_may_read(make_daemon: MakeDaemon) -> None:
    """Where a tenant has a group, its clients may read the files, and nobody may write them."""
    import grp

    group = grp.getgrgid(os.getegid()).gr_name
    daemon = make_daemon(nvme={"size": 64 * MIB}, tenants__default={"group": group}).start()
    (path,) = files_of(daemon)
    assert path.stat().st_mode & 0o777 == 0o640
    assert path.parent.stat().st_mode & 0o777 == 0o710
    assert path.stat().st_gid == path.parent.stat().st_gid == os.getegid()


def test_without_a_group_nobody_else_may(daemon: Daemon) -> None:
    (path,) = files_of(daemon)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
