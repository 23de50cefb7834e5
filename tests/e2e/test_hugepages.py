"""An arena in hugetlbfs under a real daemon: it serves, outlives it, and what lacks is said."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore import filesystems
from kvstore.client import Cache
from kvstore.errors import Unavailable
from tests import mounts
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import (
    MIB,
    ROOT,
    Daemon,
    contents,
    hashes,
    layout,
    targets,
    wait_for,
)
from tests.mounts import PAGE_BYTES

SIZE = 64 << 10
KEYS = hashes(100, "huge pages")
ARENA_BYTES = 16 * MIB


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    # An arena, another of the same size, and what this process still maps of earlier tests.
    with mounts.hugetlbfs(3 * ARENA_BYTES // PAGE_BYTES) as folder:
        yield folder


@pytest.fixture
def daemon(make_daemon: MakeDaemon, folder: Path, tmp_path: Path) -> Iterator[Daemon]:
    """Not started; its arena lies in a folder of huge pages of its own."""
    place = folder / tmp_path.name
    daemon = make_daemon(dram={"hugepages": True, "path": str(place)})
    yield daemon
    if daemon.process is not None:
        daemon.stop()
    for path in place.glob("*/*"):
        path.unlink()


def arena_of(daemon: Daemon) -> Path:
    return Path(daemon.config["dram"]["path"]) / "default" / "arena"


def store(daemon: Daemon) -> Cache:
    cache = daemon.client().open(layout("huge pages"))
    assert cache.put(KEYS, contents(KEYS, SIZE)).stored == len(KEYS)
    return cache


def check(cache: Cache, tier: str) -> None:
    """All blocks are served from one tier, byte for byte."""
    into = targets(len(KEYS), SIZE)
    found = cache.get(KEYS, into, deadline_s=5.0)
    assert (found.length, set(found.tiers)) == (len(KEYS), {tier})
    assert into == contents(KEYS, SIZE)


def test_blocks_are_served_and_outlive_the_daemon(daemon: Daemon) -> None:
    daemon.config["nvme"]["size"] = "0"
    before = filesystems.pool(PAGE_BYTES).free
    check(store(daemon.start()), "dram")
    arena = arena_of(daemon)
    status = arena.stat()
    assert (filesystems.kind(arena), status.st_size) == ("hugetlbfs", ARENA_BYTES)
    assert before - filesystems.pool(PAGE_BYTES).free == ARENA_BYTES // PAGE_BYTES
    for end in (daemon.kill, daemon.stop):
        end()
        daemon.start()
        check(daemon.client().open(layout("huge pages")), "dram")
        assert arena.stat().st_ino == status.st_ino
    assert daemon.log().count("DRAM adopted") == 2
    assert sorted(os.listdir(arena.parent)) == ["arena", "lock"]


def test_clients_and_the_daemon_map_huge_pages(daemon: Daemon) -> None:
    client = store(daemon.start()).client
    assert client.arena is not None
    client.arena.wait_populated(10.0)
    assert daemon.process is not None
    for pid in (os.getpid(), daemon.process.pid):
        text = Path(f"/proc/{pid}/smaps").read_text()
        mapped = text.split(str(arena_of(daemon)))[1].split("VmFlags")[0]
        assert "KernelPageSize:     2048 kB" in mapped
        if pid == os.getpid():  # all of them, ahead of use
            pages = re.findall(r"(?:Shared|Private)_Hugetlb: +(\d+) kB", mapped)
            assert sum(map(int, pages)) << 10 == ARENA_BYTES


def test_disks_are_read_into_huge_pages_directly(daemon: Daemon) -> None:
    store(daemon.start())
    assert daemon.settled().tiers.nvme.blocks == len(KEYS)
    daemon.stop()
    arena_of(daemon).unlink()  # as a reboot does
    daemon.start()
    check(daemon.client().open(layout("huge pages")), "nvme")


def test_a_client_that_truncates_the_arena_ends_its_tenant_only(daemon: Daemon) -> None:
    daemon.config["nvme"]["size"] = "0"
    cache = store(daemon.start())
    os.truncate(arena_of(daemon), PAGE_BYTES)
    wait_for(lambda: "arena damaged: tenant out of service" in daemon.log(), "the daemon to see it")
    with pytest.raises(Unavailable):
        cache.lookup(KEYS)
    daemon.stop()
    check(store(daemon.start()), "dram")


def test_a_table_of_an_earlier_arena_is_not_believed(daemon: Daemon) -> None:
    """As after a reboot, when a new arena may have the old one's inode. A start that finds no room
    leaves the table where it is, and the next one takes it away."""
    daemon.config["nvme"]["size"] = "0"
    store(daemon.start())
    daemon.kill()
    arena_of(daemon).unlink()
    tables = daemon.socket().parent
    pages = ARENA_BYTES // PAGE_BYTES
    free = wait_for(lambda: max(0, filesystems.pool(PAGE_BYTES).available - pages + 1), "pages")
    with held(arena_of(daemon), free * PAGE_BYTES):
        assert "no room for an arena" in failure(daemon, 1)
    assert (tables / "slots").exists()
    daemon.start()
    assert daemon.client().open(layout("huge pages")).lookup(KEYS).length == 0


def test_a_pool_that_is_too_small_is_named_with_what_to_do(daemon: Daemon) -> None:
    total = filesystems.pool(PAGE_BYTES).total
    daemon.config["dram"]["size"] = f"{(total + 8) * 2} MiB"
    said = failure(daemon, 2)
    assert f"wanted {total + 8} huge pages of 2048kB" in said
    assert f"echo {total + 8} > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages" in said
    daemon.config["dram"]["size"] = f"{total * 2} MiB"
    with held(arena_of(daemon), ARENA_BYTES):
        said = failure(daemon, 1)
    assert "no room for an arena" in said and f"of {total}, 0 reserved" in said


def test_sizes_are_whole_pages(daemon: Daemon) -> None:
    daemon.config["dram"] |= {"size": "17 MiB", "slab_size": "1 MiB"}
    store(daemon.start())
    assert arena_of(daemon).stat().st_size == ARENA_BYTES


def test_hugetlbfs_and_the_setting_go_together(daemon: Daemon) -> None:
    daemon.config["dram"]["hugepages"] = False
    assert "is on hugetlbfs: set dram.hugepages = true" in failure(daemon, 2)
    daemon.config["dram"] |= {"hugepages": True, "path": str(daemon.arena)}
    said = failure(daemon, 2)
    assert f"dram.path = '{daemon.arena}' is on tmpfs, not on hugetlbfs: mount -t" in said


@contextlib.contextmanager
def held(beside: Path, size_bytes: int) -> Iterator[None]:
    """So much of the pool is in other hands for a while."""
    path = beside.parent.parent.parent / "held"
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.ftruncate(file, size_bytes)
        os.posix_fallocate(file, 0, size_bytes)
        yield
    finally:
        os.close(file)
        path.unlink()


def failure(daemon: Daemon, code: int) -> str:
    """What a daemon says that must end with this status."""
    command = [sys.executable, "-m", "kvstore.daemon", "--config", str(daemon.write_config())]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30, check=False)
    assert ran.returncode == code, ran.stderr
    return ran.stderr
