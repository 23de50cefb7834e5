"""Taking over an arena: where it lies, where its tables are, and what the log says of its nodes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from kvstore import adoption, numa
from kvstore.adoption import Estate, check_room, take_over
from kvstore.tiers.dram import DramArena
from kvstore.types import MIB
from tests import mounts

SIZE, SLAB = 8 * MIB, MIB


def taken(folder: Path, **options: Any) -> tuple[Estate, list[Any]]:
    with capture_logs() as said:
        estate = take_over(folder, SIZE, SLAB, gid=None, preallocate=True, **options)
    estate.table.close()
    estate.arena.close()
    return estate, [one["event"] for one in said]


def test_the_tables_may_be_in_another_folder(tmp_path: Path) -> None:
    arena, tables = tmp_path / "arena", tmp_path / "tables"
    arena.mkdir()
    tables.mkdir()
    assert not taken(arena, tables=tables)[0].adopted
    assert os.listdir(arena) == ["arena"] and sorted(os.listdir(tables)) == ["notes", "slots"]
    assert taken(arena, tables=tables)[0].adopted
    assert not taken(arena)[0].adopted, "there are none beside it"


def test_old_tables_are_gone_before_a_new_arena_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a reboot a new arena may have the inode that an old table names: a daemon that died
    between the two would have left zeros that the next one takes for blocks."""
    taken(tmp_path)
    (tmp_path / "arena").unlink()
    seen: list[list[str]] = []

    def create(path: Path, *_: object, **__: object) -> DramArena:
        seen.append(os.listdir(path.parent))
        raise OSError(errno.ENOSPC, "no room", os.fspath(path))

    monkeypatch.setattr(DramArena, "create", create)
    with pytest.raises(OSError, match="no room"):
        taken(tmp_path)
    assert seen == [[]]


def test_a_size_that_there_is_no_room_for_costs_nothing(tmp_path: Path) -> None:
    """The old arena is there for whoever corrects the configuration."""
    taken(tmp_path)
    room = os.statvfs(tmp_path)
    much = (room.f_bavail * room.f_frsize // SLAB + 2) * SLAB + SIZE
    with pytest.raises(OSError, match=r"no room .*lower dram\.size"):
        take_over(tmp_path, much, SLAB, gid=None, preallocate=True)
    assert taken(tmp_path)[0].adopted


def test_what_an_old_arena_takes_counts_as_room(tmp_path: Path) -> None:
    with mounts.tmpfs(SIZE + 2 * MIB) as small:
        taken(small)
        bigger = SIZE + MIB
        estate = take_over(small, bigger, SLAB, gid=None, preallocate=True)
        assert not estate.adopted and estate.arena.capacity_bytes == bigger
        estate.table.close()
        estate.arena.close()


def test_what_a_client_maps_does_not(tmp_path: Path) -> None:
    """Engines outlive the daemon: what they map is not free when its file is removed."""
    with mounts.tmpfs(SIZE + 2 * MIB) as small:
        taken(small)
        code = (
            "import mmap, os, sys\n"
            "file = os.open(sys.argv[1], os.O_RDWR)\n"
            "held = mmap.mmap(file, 0)\n"
            "os.close(file)\n"
            "print('mapped', flush=True)\n"
            "sys.stdin.read()\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code, small / "arena"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as client:
            assert client.stdout is not None and client.stdout.readline() == b"mapped\n"
            with pytest.raises(OSError, match="no room"):
                take_over(small, SIZE + MIB, SLAB, gid=None, preallocate=True)
            assert taken(small)[0].adopted
            assert client.stdin is not None
            client.stdin.close()


def test_the_tenants_together_are_looked_at_before_one_loses_anything() -> None:
    with mounts.tmpfs(2 * SIZE + 4 * MIB) as small:
        folders = [small / "a", small / "b"]
        for folder in folders:
            folder.mkdir()
            taken(folder)
        check_room(dict.fromkeys(folders, SIZE + MIB))
        with pytest.raises(OSError, match="no room"):
            check_room(dict.fromkeys(folders, SIZE + 3 * MIB))
        check_room({folders[0]: SIZE, small / "c": SIZE})


def test_a_system_that_forbids_policies_has_an_arena_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(numbers: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(numa, "check", refuse)
    estate, said = taken(tmp_path, nodes=(numa.nodes()[0].number,))
    assert said == ["memory nodes are left to the kernel"]
    assert not estate.adopted and estate.arena.capacity_bytes == SIZE
    assert taken(tmp_path, nodes=(0,))[1] == [], "what is adopted is not asked for"


def test_pages_on_other_nodes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DramArena, "nodes_found", lambda arena: Counter({0: 40, 3: 24}))
    monkeypatch.setattr(adoption, "_takes", lambda nodes: ())
    assert taken(tmp_path, nodes=(0, 3))[1] == []
    assert taken(tmp_path, nodes=(0,))[1] == ["arena lies on other memory nodes than wanted"]
    assert taken(tmp_path)[1] == [], "nobody wanted any"
