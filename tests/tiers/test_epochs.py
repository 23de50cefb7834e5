"""Epochs: even while a block is there, never one twice, and written by the daemon alone."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.tiers.base import ALIGNMENT
from kvstore.tiers.epochs import EPOCH_BYTES, Epochs

PAGES = 1_500


@pytest.fixture
def epochs(tmp_path: Path) -> Iterator[Epochs]:
    made = Epochs.create(tmp_path / "epochs", PAGES * ALIGNMENT)
    yield made
    made.close()


@pytest.fixture
def seen(epochs: Epochs) -> Iterator[Callable[[int], int]]:
    """The epoch of a page as another process sees it."""
    file = os.open(epochs.path, os.O_RDONLY)
    mapped = mmap.mmap(file, PAGES * EPOCH_BYTES, prot=mmap.PROT_READ)
    os.close(file)
    yield lambda page: int.from_bytes(mapped[page * EPOCH_BYTES :][:EPOCH_BYTES], "little")
    mapped.close()


def test_a_slot_is_even_while_a_block_is_there(epochs: Epochs, seen: Callable[[int], int]) -> None:
    assert seen(7) == 0
    epochs.end(7)
    assert seen(7) == 1
    epochs.end(7)
    assert seen(7) == 3
    epochs.begin(7)
    assert seen(7) == 4
    epochs.begin(7)  # of a block that is there already only its record has changed
    assert seen(7) == 4
    assert seen(6) == seen(8) == seen(0) == seen(PAGES - 1) == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), max_size=60))
def test_no_epoch_comes_twice(tmp_path_factory: pytest.TempPathFactory, ends: list[bool]) -> None:
    epochs = Epochs.create(tmp_path_factory.mktemp("epochs") / "epochs", ALIGNMENT)
    before, there = 0, True
    for end in ends:
        (epochs.end if end else epochs.begin)(0)
        now = epochs._words[0]
        assert now % 2 == end
        assert now > before if end or not there else now == before
        before, there = now, not end
    epochs.close()


def test_it_wraps_round(epochs: Epochs, seen: Callable[[int], int]) -> None:
    epochs._words[3] = 0xFFFFFFFD
    epochs.end(3)
    assert seen(3) == 0xFFFFFFFF
    epochs.end(3)
    assert seen(3) == 1
    epochs._words[3] = 0xFFFFFFFF
    epochs.begin(3)
    assert seen(3) == 0


def test_all_end_at_once(epochs: Epochs, seen: Callable[[int], int]) -> None:
    epochs._words[3], epochs._words[4] = 0xFFFFFFFF, 7
    epochs.end_all()
    assert [seen(page) for page in (0, 3, 4, PAGES - 1)] == [1, 1, 9, 1]


def test_nobody_else_may_write(epochs: Epochs) -> None:
    status = epochs.path.stat()
    assert stat.S_IMODE(status.st_mode) == 0o640
    assert status.st_ino == epochs.inode
    assert status.st_size == PAGES * EPOCH_BYTES
    assert status.st_blocks * 512 >= status.st_size  # a full filesystem cannot fail a store


def test_all_end_when_another_daemon_begins(epochs: Epochs, seen: Callable[[int], int]) -> None:
    epochs.end(5)
    again = Epochs.create(epochs.path, PAGES * ALIGNMENT)
    assert again.inode != epochs.inode
    again.end(6)
    assert (seen(0), seen(5), seen(6), seen(PAGES - 1)) == (1, 3, 1, 1)
    assert again._words[5] == 0
    assert [name.name for name in epochs.path.parent.iterdir()] == ["epochs"]
    again.close()


def test_no_room_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="epochs") as raised:
        Epochs.create(tmp_path / "epochs", ALIGNMENT)
    assert raised.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())
