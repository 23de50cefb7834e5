"""Large maps lie on multiples of 2 MiB, however full of gaps the address space is."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.mapping import HUGE_BYTES, address_of_map, map_shared

PAGE = mmap.PAGESIZE


@pytest.fixture
def path() -> Iterator[Path]:
    """Of a file that does not exist, in tmpfs: other file systems align by themselves."""
    with tempfile.TemporaryDirectory(prefix="kvtest-", dir="/dev/shm") as folder:
        yield Path(folder) / "file"


@pytest.fixture
def gaps() -> Iterator[None]:
    """Gaps of all sizes up to 2 MiB, each between two maps."""
    sizes = [PAGE * (1 << at) for at in range(10) for _ in range(3)]
    maps = [mmap.mmap(-1, size) for size in sizes for _ in range(2)]
    for gap in maps[::2]:
        gap.close()
    yield
    for kept in maps[1::2]:
        kept.close()


@pytest.mark.parametrize("size", [HUGE_BYTES, 3 * HUGE_BYTES, 5 * HUGE_BYTES + 7 * PAGE])
def test_a_large_map_is_aligned(path: Path, gaps: None, size: int) -> None:
    path.touch()
    os.truncate(path, size)
    with path.open("r+b") as file:
        others = []
        for _ in range(5):
            mapping = map_shared(file.fileno(), size)
            assert address_of_map(mapping) % HUGE_BYTES == 0
            assert len(mapping) == size
            others.append(mapping)
            others.append(mmap.mmap(-1, 3 * PAGE))
        others[0][:4] = b"word"
        assert others[2][:4] == b"word"
        for mapping in others:
            mapping.close()


def test_what_was_kept_around_it_is_given_back(path: Path) -> None:
    path.touch()
    os.truncate(path, HUGE_BYTES)

    def address_space() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE

    with path.open("r+b") as file:
        map_shared(file.fileno(), HUGE_BYTES).close()
        before = address_space()
        for _ in range(50):
            map_shared(file.fileno(), HUGE_BYTES).close()
        assert address_space() - before < 10 * HUGE_BYTES


def test_a_small_map_may_lie_anywhere(path: Path) -> None:
    path.write_bytes(b"x" * PAGE)
    with path.open("r+b") as file, map_shared(file.fileno(), PAGE) as mapping:
        assert mapping[:1] == b"x"
