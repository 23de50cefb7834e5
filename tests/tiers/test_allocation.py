"""Taking the memory of an arena: all of it, by several threads, in stripes of the nodes wanted."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore import numa
from kvstore.mapping import HUGE_BYTES, MADV_COLLAPSE
from kvstore.tiers import allocation
from kvstore.tiers.allocation import PIECE_BYTES, allocate
from kvstore.types import KIB, MIB
from tests import mounts

ODD = 2 * PIECE_BYTES + 3 * MIB + 4 * KIB  # no whole pieces, nor huge pages


@pytest.fixture
def file() -> Iterator[int]:
    """An empty file in memory."""
    with tempfile.TemporaryFile(dir="/dev/shm") as made:
        yield made.fileno()


def held(file: int) -> int:
    return os.fstat(file).st_blocks * 512


@pytest.mark.parametrize("threads", [1, 4, None])
@pytest.mark.parametrize("size", [4 * KIB, HUGE_BYTES, ODD])
def test_all_pages_are_there_and_zero(file: int, size: int, threads: int | None) -> None:
    os.ftruncate(file, size)
    allocate(file, size, threads=threads)
    assert held(file) == size
    for start in range(0, size, PIECE_BYTES):
        assert not any(os.pread(file, 64 * KIB, start))


def test_pages_that_are_there_are_kept(file: int) -> None:
    os.pwrite(file, b"here", HUGE_BYTES + 5)
    os.ftruncate(file, ODD)
    allocate(file, ODD)
    assert os.pread(file, 4, HUGE_BYTES + 5) == b"here"


def test_a_kernel_without_the_advice_has_pages_all_the_same(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocation, "advise", lambda *_: False)
    os.ftruncate(file, ODD)
    allocate(file, ODD)
    assert held(file) == ODD


def test_a_kernel_that_only_says_so_is_found_out(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocation, "advise", lambda *_: True)
    os.ftruncate(file, ODD)
    allocate(file, ODD)
    assert held(file) == ODD


def test_huge_pages_that_are_not_to_be_had_are_asked_for_once(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def refuse(address: int, size: int, advice: int) -> bool:
        asked.append(advice)
        return False

    monkeypatch.setattr(allocation, "advise", refuse)
    os.ftruncate(file, 4 * PIECE_BYTES)
    allocate(file, 4 * PIECE_BYTES, threads=1)
    assert asked.count(MADV_COLLAPSE) == 1


def test_stripes_come_from_the_nodes_in_turn(file: int) -> None:
    """Which node each stripe had when its first page was made, and when the rest was."""
    asked: list[tuple[int, int]] = []
    size = 5 * HUGE_BYTES + 4 * KIB
    os.ftruncate(file, size)
    allocate(
        file, size, nodes=(0, 3), threads=1, prefer=lambda node: asked.append((node, held(file)))
    )
    nodes = [node for node, _ in asked]
    assert nodes == [0, 3, 0, 3, 0, 3] * 2
    before = [bytes_held for _, bytes_held in asked]
    small = [at * 4 * KIB for at in range(6)]  # one small page for each huge one to be
    assert before[:6] == [*small[:5], small[5]]
    assert before[6] >= small[5] and held(file) == size


def test_one_node_is_asked_for_by_every_thread(file: int) -> None:
    asked: dict[int, set[int]] = {}

    def prefer(node: int) -> None:
        asked.setdefault(threading.get_ident(), set()).add(node)

    os.ftruncate(file, ODD)
    allocate(file, ODD, nodes=(2,), threads=3, prefer=prefer)
    assert asked and all(nodes == {2} for nodes in asked.values())
    assert threading.get_ident() not in asked, "a preference stays with its thread"


def test_a_preference_that_is_refused_is_an_error(file: int) -> None:
    absent = max(one.number for one in numa.nodes()) + 1
    os.ftruncate(file, ODD)
    with pytest.raises(OSError, match=r"Invalid argument|Operation not permitted"):
        allocate(file, ODD, nodes=(absent,))
    assert held(file) < ODD


@pytest.mark.parametrize("threads", [1, 4])
def test_no_room_is_an_error_and_no_signal(threads: int) -> None:
    with mounts.tmpfs(PIECE_BYTES) as folder, (folder / "file").open("w+b") as file:
        os.ftruncate(file.fileno(), ODD)
        with pytest.raises(OSError, match="No space left") as caught:
            allocate(file.fileno(), ODD, threads=threads)
        assert caught.value.errno == errno.ENOSPC


def test_huge_pages_of_a_pool_are_all_taken() -> None:
    size = PIECE_BYTES + 3 * HUGE_BYTES
    with mounts.hugetlbfs(size // HUGE_BYTES) as folder, (folder / "file").open("w+b") as file:
        os.ftruncate(file.fileno(), size)
        node = numa.nodes()[0].number
        asked: list[int] = []
        allocate(
            file.fileno(), size, huge_page_bytes=HUGE_BYTES, nodes=(node, 9), prefer=asked.append
        )
        assert held(file.fileno()) == size
        assert asked.count(node) - asked.count(9) == 1 and len(asked) == size // HUGE_BYTES


def test_threads_are_as_many_as_may_run() -> None:
    assert 1 <= allocation.thread_count() <= min(16, os.cpu_count() or 1)


def test_files_of_no_memory_are_allocated_too(tmp_path: Path) -> None:
    """An arena may lie on a disk, as in tests: slower, and never refused."""
    with (tmp_path / "file").open("w+b") as file:
        os.ftruncate(file.fileno(), 3 * MIB)
        allocate(file.fileno(), 3 * MIB)
        assert held(file.fileno()) >= 3 * MIB
