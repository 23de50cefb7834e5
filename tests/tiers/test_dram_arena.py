"""The DRAM arena beyond the contract: files, modes, views and the refusal to overcommit."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from kvstore.tiers.base import ALIGNMENT
from kvstore.tiers.dram import DramArena

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
