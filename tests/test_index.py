"""The index of NVMe slots: what comes back, when it is committed, and in which order."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore import index_reader
from kvstore.index import FILE_NAME, PENDING_MAX, Loaded
from tests.index_tools import SOON_S, SUM, Opener, durable, hash_of


@pytest.fixture
def opener(tmp_path: Path) -> Iterator[Opener]:
    opener = Opener(tmp_path / "index")
    yield opener
    for index in opener.opened:
        index.close(SOON_S)


# --- Reload


def test_a_fresh_index_is_empty(opener: Opener) -> None:
    index = opener()
    assert index.warnings == []
    loaded = index.load()
    assert loaded == Loaded({}, [], [], [], [], [], 0)
    assert loaded.last_sequence == 0
    assert index.flush(SOON_S)


def test_records_come_back_oldest_first(opener: Opener) -> None:
    index = opener()
    index.put_layout(7, '{"model": "m"}')
    index.put_layout(9, '{"model": "n"}')
    index.put(8192, 9, 30, hash_of(1, 8), SUM)
    index.put(0, 7, 10, hash_of(2, 64), SUM * 3)
    index.put(4096, 7, 20, hash_of(3, 33), SUM * 2)
    assert opener.reloaded() == Loaded(
        layouts={7: '{"model": "m"}', 9: '{"model": "n"}'},
        offsets=[0, 4096, 8192],
        layout_numbers=[7, 7, 9],
        sequences=[10, 20, 30],
        hashes=[hash_of(2, 64), hash_of(3, 33), hash_of(1, 8)],
        sums=[SUM * 3, SUM * 2, SUM],
        damaged=0,
    )


def test_records_of_one_length_but_other_shapes_are_told_apart(opener: Opener) -> None:
    index = opener()
    index.put(0, 1, 2, hash_of(1, 16), SUM)
    index.put(4096, 1, 1, hash_of(2, 8), SUM * 2)
    loaded = opener.reloaded()
    assert loaded.hashes == [hash_of(2, 8), hash_of(1, 16)]
    assert loaded.sums == [SUM * 2, SUM]


def test_the_last_word_on_a_slot_wins(opener: Opener) -> None:
    index = opener()
    index.put(0, 1, 1, hash_of(1), SUM)
    index.put(4096, 1, 2, hash_of(2), SUM)
    assert index.flush(SOON_S)
    index.put(0, 1, 3, hash_of(3), SUM)
    index.delete(4096)
    index.delete(8192)
    index.put(4096, 1, 4, hash_of(4), SUM)
    index.put(12288, 1, 5, hash_of(5), SUM)
    index.delete(12288)
    loaded = opener.reloaded()
    assert loaded.offsets == [0, 4096]
    assert loaded.hashes == [hash_of(3), hash_of(4)]
    assert loaded.last_sequence == 4


@pytest.mark.parametrize("layouts", [(1, 1), (1, 2)])
def test_of_a_block_in_two_slots_the_younger_is_kept_for_good(
    opener: Opener, layouts: tuple[int, int]
) -> None:
    index = opener()
    index.put(0, layouts[0], 5, hash_of(1), SUM)
    index.put(4096, layouts[0], 9, hash_of(1), SUM)
    index.put(8192, layouts[0], 7, hash_of(1), SUM)
    index.put(12288, layouts[1], 1, hash_of(2), SUM)
    opener.close()
    index = opener()
    assert index.load().offsets == [12288, 4096]
    assert index.flush(SOON_S)
    assert sorted(durable(index)) == [4096, 12288]


def test_the_same_hash_under_two_layouts_is_two_blocks(opener: Opener) -> None:
    index = opener()
    index.put(0, 1, 1, hash_of(1), SUM)
    index.put(4096, 2, 2, hash_of(1), SUM)
    assert opener.reloaded().offsets == [0, 4096]


def test_a_large_index_comes_back_exactly(opener: Opener) -> None:
    index = opener()
    count = 3 * index_reader.CHUNK_RECORDS + 17
    for number in range(count):
        hashed = hash_of(number, 32 if number % 5 else 16)
        index.put((number * 7919 % count) * 4096, number % 3, number, hashed, SUM)
    loaded = opener.reloaded()
    assert loaded.sequences == list(range(count))
    assert loaded.offsets == [(number * 7919 % count) * 4096 for number in range(count)]
    assert loaded.layout_numbers == [number % 3 for number in range(count)]
    assert loaded.hashes == [hash_of(number, 32 if number % 5 else 16) for number in range(count)]


def test_a_second_life_adds_to_the_first(opener: Opener) -> None:
    for life in range(4):
        index = opener()
        assert index.load().last_sequence == life
        index.put_layout(life, "{}")
        index.put(life * 4096, life, life + 1, hash_of(life), SUM)
        opener.close()
    loaded = opener.reloaded()
    assert loaded.layout_numbers == [0, 1, 2, 3]
    assert loaded.layouts == dict.fromkeys(range(4), "{}")
    assert os.listdir(opener.folder) == [FILE_NAME]


# --- Group commit


def test_changes_wait_for_the_interval_and_go_together(opener: Opener) -> None:
    syncs: list[int] = []
    index = opener(before_commit=lambda: syncs.append(1))
    for number in range(PENDING_MAX - 1):
        index.put(number * 4096, 1, number, hash_of(number), SUM)
    assert index.waiting() == PENDING_MAX - 1
    assert syncs == []
    assert index.flush(SOON_S)
    assert (len(syncs), index.waiting()) == (1, 0)


def test_many_changes_do_not_wait(opener: Opener) -> None:
    begun = threading.Event()
    index = opener(before_commit=begun.set)
    for number in range(PENDING_MAX):
        index.put(number * 4096, 1, number, hash_of(number), SUM)
    assert begun.wait(SOON_S)


def test_the_interval_passes(opener: Opener) -> None:
    begun = threading.Event()
    index = opener(sync_interval_s=0.01, before_commit=begun.set)
    index.put(0, 1, 1, hash_of(1), SUM)
    assert begun.wait(SOON_S)


def test_block_files_are_synced_before_the_records_and_cover_them(opener: Opener) -> None:
    """A record must not be durable before its bytes; one that came late waits for the next sync."""
    seen: list[list[int]] = []

    def before_commit() -> None:
        seen.append(sorted(durable(index)) if index.path.exists() else [])
        if len(seen) == 1:
            index.put(4096, 1, 2, hash_of(2), SUM)

    index = opener(before_commit=before_commit)
    index.put(0, 1, 1, hash_of(1), SUM)
    assert index.flush(SOON_S)
    assert sorted(durable(index)) == [0]
    assert index.flush(SOON_S)
    assert sorted(durable(index)) == [0, 4096]
    assert seen == [[], [0]]


def test_flush_with_nothing_to_do_does_nothing(opener: Opener) -> None:
    syncs: list[int] = []
    index = opener(before_commit=lambda: syncs.append(1))
    assert index.flush(SOON_S)
    assert syncs == []
    assert not index.path.exists()


def test_a_hanging_disk_delays_nobody(opener: Opener) -> None:
    begun, freed = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        assert freed.wait(SOON_S)

    index = opener(before_commit=hang)
    index.put(0, 1, 1, hash_of(1), SUM)
    assert not index.flush(0.01)
    assert begun.wait(SOON_S)
    index.put(4096, 1, 2, hash_of(2), SUM)
    assert index.waiting() == 2
    assert not index.close(0.01)
    freed.set()
    assert index.close(SOON_S)
    assert opener.reloaded().offsets == [0, 4096]


def test_a_record_that_no_index_could_hold_is_our_own_error(opener: Opener) -> None:
    index = opener()
    calls: list[tuple[Any, ...]] = [
        (-4096, 1, 1, hash_of(1), SUM),
        (0, 1, 1, b"short", SUM),
        (0, 1, 1, bytes(65), SUM),
        (0, 1, 1, hash_of(1), b""),
        (0, 1, 1, hash_of(1), SUM + b"x"),
    ]
    for arguments in calls:
        with pytest.raises(AssertionError):
            index.put(*arguments)
    assert index.waiting() == 0
