"""The DRAM arena beyond the contract: files, modes, views and the refusal to overcommit."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore import filesystems, numa
from kvstore.tiers.base import ALIGNMENT
from kvstore.tiers.dram import DramArena
from kvstore.types import MIB
from tests import mounts

SIZE = 64 * ALIGNMENT


def test_bytes_outlive_the_arena_object(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    first = DramArena.create(path, SIZE)
    first.write(0, memoryview(b"still here"))
    first.close()
    second = DramArena.open(path)
    assert (second.path, second.inode, second.capacity_bytes) == (path, first.inode, SIZE)
    assert bytes(second.view(0, 10)) == b"still here"
    second.close()


def test_view_is_the_memory_itself(tmp_path: Path) -> None:
    arena = DramArena.create(tmp_path / "arena", SIZE)
    view = arena.view(ALIGNMENT, 4)
    view[:] = b"abcd"
    into = bytearray(4)
    arena.read(ALIGNMENT, memoryview(into))
    assert into == b"abcd"
    for offset, length in ((-1, 4), (0, -1), (SIZE - 3, 4)):
        with pytest.raises(ValueError, match="outside"):
            arena.view(offset, length)
    arena.close()


def test_close_is_safe_while_views_are_out(tmp_path: Path) -> None:
    arena = DramArena.create(tmp_path / "arena", SIZE)
    view = arena.view(0, 8)
    arena.close()
    arena.close()
    view[:] = b"harmless"
    assert bytes(view) == b"harmless"
    with pytest.raises(ValueError, match="released"):
        arena.view(0, 8)


def test_mode_is_exact_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        DramArena.create(tmp_path / "arena", SIZE, mode=0o660, gid=os.getegid()).close()
    finally:
        os.umask(old)
    status = (tmp_path / "arena").stat()
    assert stat.S_IMODE(status.st_mode) == 0o660
    assert status.st_gid == os.getegid()


@pytest.mark.parametrize("preallocate", [True, False])
def test_preallocation_takes_the_room_at_once(tmp_path: Path, preallocate: bool) -> None:
    DramArena.create(tmp_path / "arena", SIZE, preallocate=preallocate).close()
    allocated = (tmp_path / "arena").stat().st_blocks * 512
    assert (allocated >= SIZE) is preallocate


def test_a_new_arena_leaves_the_old_one_to_those_who_map_it(tmp_path: Path) -> None:
    old = DramArena.create(tmp_path / "arena", SIZE)
    old.write(0, memoryview(b"old"))
    new = DramArena.create(tmp_path / "arena", SIZE)
    assert new.inode != old.inode
    assert bytes(new.view(0, 3)) == bytes(3)
    assert bytes(old.view(0, 3)) == b"old"
    assert os.listdir(tmp_path) == ["arena"]
    old.close()
    new.close()


def test_no_room_is_said_before_anything_is_touched(tmp_path: Path) -> None:
    room = os.statvfs(tmp_path)
    wanted = (room.f_bavail * room.f_frsize // ALIGNMENT + (1 << 20)) * ALIGNMENT
    with pytest.raises(OSError, match=rf"wanted {wanted} bytes, available \d+ bytes") as caught:
        DramArena.create(tmp_path / "arena", wanted)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == os.fspath(tmp_path / "arena")
    assert os.listdir(tmp_path) == []
    DramArena.create(tmp_path / "arena", SIZE).close()
    with pytest.raises(OSError, match="no room"):
        DramArena.create(tmp_path / "arena", wanted)
    DramArena.open(tmp_path / "arena").close()


OPENED_MEANWHILE = """
import os, subprocess, sys
from pathlib import Path
from kvstore.tiers import dram

path, holds = Path(sys.argv[1]), dram._holds
opener = (
    "import os, sys\\n"
    "try: os.open(sys.argv[1], os.O_RDWR | os.O_NONBLOCK)\\n"
    "except BlockingIOError: print('met a lease')\\n"
)

def held_while_opened(status):
    subprocess.run([sys.executable, "-c", opener, path], check=True)
    return holds(status)

dram._holds = held_while_opened
dram.DramArena.check_room({path: 4096})
"""


def test_a_client_that_opens_the_old_arena_meanwhile_does_not_end_the_daemon(
    tmp_path: Path,
) -> None:
    """The kernel signals who has a lease on a file that is opened: as SIGIO, that kills."""
    DramArena.create(tmp_path / "arena", SIZE).close()
    command = [sys.executable, "-c", OPENED_MEANWHILE, str(tmp_path / "arena")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "met a lease\n"), done.stderr


@pytest.mark.parametrize("size", [0, -ALIGNMENT, ALIGNMENT + 1])
def test_an_impossible_size_is_our_own_error(tmp_path: Path, size: int) -> None:
    with pytest.raises(ValueError, match="multiple"):
        DramArena.create(tmp_path / "arena", size)


def test_what_is_no_arena_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    with pytest.raises(FileNotFoundError):
        DramArena.open(path)
    for content in (b"", b"x" * (ALIGNMENT + 1)):
        path.write_bytes(content)
        with pytest.raises(OSError, match="not an arena"):
            DramArena.open(path)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError, match="symbolic link"):
        DramArena.open(tmp_path / "link")


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        DramArena.create(tmp_path / "absent" / "arena", SIZE)
    assert "absent" in str(caught.value)


# --- huge pages of a pool ------------------------------------------------------------------------


PAGE = mounts.PAGE_BYTES


@pytest.fixture(scope="module")
def huge() -> Iterator[Path]:
    """A folder on hugetlbfs with eight pages."""
    with mounts.hugetlbfs(8) as folder:
        yield folder


def test_an_arena_of_huge_pages_outlives_its_object(huge: Path) -> None:
    path, before = huge / "arena", filesystems.pool(PAGE).available
    first = DramArena.create(path, 4 * PAGE, preallocate=False, gid=os.getegid())
    assert before - filesystems.pool(PAGE).available == 4, "taken at once, whatever is asked"
    first.write(PAGE, memoryview(b"still here"))
    assert not first.damaged()
    first.close()
    second = DramArena.open(path)
    assert bytes(second.view(PAGE, 10)) == b"still here"
    os.truncate(path, PAGE)
    assert second.damaged()
    os.truncate(path, 4 * PAGE)
    assert second.damaged(), "grown again, but its pages are gone"
    second.close()
    path.unlink()
    assert filesystems.pool(PAGE).available == before


def test_huge_pages_are_whole(huge: Path) -> None:
    with pytest.raises(OSError, match=f"size {3 * MIB} refused: give a multiple of {PAGE} bytes"):
        DramArena.create(huge / "arena", 3 * MIB)
    assert os.listdir(huge) == []


def test_a_pool_that_is_too_small_says_what_it_has(huge: Path) -> None:
    pool = filesystems.pool(PAGE)
    size = (pool.available + 3) * PAGE
    with pytest.raises(OSError, match="no room for an arena") as caught:
        DramArena.create(huge / "arena", size)
    assert caught.value.errno == errno.ENOSPC
    assert f"wanted {pool.available + 3} huge pages of 2048kB, available {pool.available} (" in str(
        caught.value
    )
    assert f"echo {pool.total + 3} > /sys/kernel/mm/hugepages/" in str(caught.value)
    assert os.listdir(huge) == []


# --- memory nodes --------------------------------------------------------------------------------


@pytest.fixture
def node() -> int:
    """A node of this host, where policies are allowed: some containers forbid them."""
    number = numa.nodes()[0].number
    try:
        numa.check([number])
    except PermissionError as error:
        pytest.skip(f"memory policies are forbidden here: {error}")
    return number


def policy_of(arena: DramArena) -> str:
    """The policy for pages of its map that are still to be made."""
    lines = Path("/proc/self/numa_maps").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{arena.address:x} "))


@pytest.mark.parametrize("preallocate", [True, False])
def test_pages_come_from_the_nodes_wanted_whoever_makes_them(node: int, preallocate: bool) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "arena"
        DramArena.create(path, 4 * MIB, preallocate=preallocate, nodes=(node,)).close()
        arena = DramArena.open(path)  # the policy is the file's, not the first map's
        assert policy_of(arena) == f"prefer:{node}"
        assert set(arena.nodes_found()) == ({node} if preallocate else set())
        arena.close()
        arena = DramArena.create(path, 4 * MIB, preallocate=preallocate)
        assert policy_of(arena) == "default"
        arena.close()


@pytest.mark.usefixtures("node")
def test_a_node_that_is_not_there_leaves_no_file(tmp_path: Path) -> None:
    absent = max(one.number for one in numa.nodes()) + 1
    with pytest.raises(OSError, match="Invalid argument"):
        DramArena.create(tmp_path / "arena", SIZE, nodes=(absent,))
    assert os.listdir(tmp_path) == []


def test_huge_pages_of_a_node(huge: Path, node: int) -> None:
    arena = DramArena.create(huge / "arena", 4 * PAGE, nodes=(node,))
    found = arena.nodes_found()
    assert set(found) == {node} and found.total() >= 4
    arena.close()
    arena.path.unlink()
