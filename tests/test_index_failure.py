"""The index of NVMe slots when the disk fails, and what it does not believe when it starts."""

from __future__ import annotations

import errno
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from kvstore import index as index_module
from kvstore import index_reader
from kvstore.index_reader import KEY, META, SLOTS, VALUE
from tests.index_tools import SOON_S, SUM, Opener, hash_of


@pytest.fixture
def opener(tmp_path: Path) -> Iterator[Opener]:
    opener = Opener(tmp_path / "index")
    yield opener
    for index in opener.opened:
        index.close(SOON_S)


# --- Failure and recovery


def test_a_failed_sync_keeps_the_records_and_tells(opener: Opener) -> None:
    broken = [OSError(errno.EIO, "the drive is gone")]

    def before_commit() -> None:
        if broken:
            raise broken[0]

    index = opener(before_commit=before_commit)
    index.put(0, 1, 1, hash_of(1), SUM)
    assert not index.flush(0.01)
    (state,) = opener.states.wait_for(1)
    assert state is not None
    assert "the drive is gone" in state
    assert os.fspath(index.path) in state
    index.put(0, 1, 2, hash_of(2), SUM)
    index.put(4096, 1, 3, hash_of(3), SUM)
    assert not index.flush(0.01)
    assert opener.states.told == [state], "said once"
    broken.clear()
    assert index.flush(SOON_S)
    assert opener.states.told == [state, None]
    assert opener.reloaded().hashes == [hash_of(2), hash_of(3)]


def test_retries_come_by_themselves(opener: Opener) -> None:
    failures = [OSError(errno.EIO, "once"), OSError(errno.EIO, "twice")]

    def before_commit() -> None:
        if failures:
            raise failures.pop(0)

    index = opener(sync_interval_s=0.01, before_commit=before_commit)
    index.put(0, 1, 1, hash_of(1), SUM)
    told = opener.states.wait_for(3)
    assert ["once" in (told[0] or ""), "twice" in (told[1] or ""), told[2]] == [True, True, None]


def test_a_defect_in_the_callback_does_not_end_the_thread(opener: Opener) -> None:
    failures: list[Exception] = [ZeroDivisionError()]

    def before_commit() -> None:
        if failures:
            raise failures.pop()

    index = opener(before_commit=before_commit)
    index.put(0, 1, 1, hash_of(1), SUM)
    index.flush(0.01)
    assert "ZeroDivisionError" in (opener.states.wait_for(1)[0] or "")
    assert index.flush(SOON_S)


@pytest.mark.parametrize("inherited", [False, True])
def test_a_full_disk_keeps_the_records_until_there_is_room(opener: Opener, inherited: bool) -> None:
    index = opener()
    index.put(0, 1, 1, hash_of(0), SUM)
    assert index.flush(SOON_S)
    if inherited:  # then the file is to be rewritten first, by a child that inherits the limit
        opener.close()
        index = opener()
        assert index.load().offsets == [0]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (index.path.stat().st_size, hard))
    try:
        for number in range(1, 2000):
            index.put(number * 4096, 1, number + 1, hash_of(number), SUM)
        assert not index.flush(0.01)
        (state,) = opener.states.wait_for(1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert state is not None
    assert os.fspath(index.path) in state
    assert index.flush(SOON_S)
    assert opener.states.told == [state, None]
    assert opener.reloaded().sequences == list(range(1, 2001))


def test_a_full_map_grows(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MAP_BYTES", 64 << 10)
    index = opener()
    for number in range(5000):
        index.put(number * 4096, 1, number, hash_of(number), SUM)
    assert index.flush(SOON_S)
    assert opener.states.told == []
    assert opener.reloaded().sequences == list(range(5000))


def test_a_file_destroyed_while_we_run_starts_anew(opener: Opener) -> None:
    """What waits is kept; what was only in the file is lost to the next life, and that is said."""
    destroy: list[bool] = []

    def before_commit() -> None:
        if destroy.pop() if destroy else False:
            index.path.write_bytes(b"not an index" * 1000)
            raise OSError(errno.EIO, "so that the file is opened again")

    index = opener(before_commit=before_commit)
    index.put(0, 1, 1, hash_of(1), SUM)
    assert index.flush(SOON_S)
    index.put(4096, 1, 2, hash_of(2), SUM)
    destroy.append(True)
    index.flush(0.01)
    opener.states.wait_for(1)
    assert index.flush(SOON_S)
    told = opener.states.wait_for(3)
    assert any("starts empty" in (state or "") for state in told)
    assert told[-1] is None
    assert opener.reloaded().offsets == [4096]


def test_closing_over_a_failure_says_what_is_lost(opener: Opener) -> None:
    def before_commit() -> None:
        raise OSError(errno.EIO, "broken for good")

    index = opener(before_commit=before_commit)
    index.put(0, 1, 1, hash_of(1), SUM)
    assert not index.close(SOON_S)
    opener.opened.clear()
    assert opener.reloaded().offsets == []


# --- What is not believed


def write_raw(path: Path, database: bytes, pairs: dict[bytes, bytes]) -> None:
    with lmdb.open(os.fspath(path), subdir=False, lock=False, max_dbs=3) as env:
        db = env.open_db(database)
        with env.begin(write=True, db=db) as txn:
            for key, value in pairs.items():
                txn.put(key, value)


def one_record(opener: Opener) -> Path:
    index = opener()
    index.put_layout(1, "{}")
    index.put(0, 1, 1, hash_of(1), SUM)
    opener.close()
    return index.path


def test_an_index_of_other_files_is_dropped(opener: Opener) -> None:
    one_record(opener)
    index = opener(file_ids=b"other files")
    assert "belongs to other block files" in index.warnings[0]
    assert index.load().offsets == []
    assert not index.path.exists()


def test_an_index_of_another_format_is_dropped(opener: Opener) -> None:
    write_raw(one_record(opener), META, {b"format": b"0"})
    index = opener()
    assert "another format" in index.warnings[0]
    assert index.load().offsets == []


@pytest.mark.parametrize("content", [b"", b"x", b"x" * 100_000, bytes(65536)])
def test_a_file_that_is_no_index_is_dropped(opener: Opener, content: bytes) -> None:
    path = one_record(opener)
    path.write_bytes(content)
    index = opener()
    assert "cannot be read" in index.warnings[0]
    assert os.fspath(path) in index.warnings[0]
    assert index.load().offsets == []
    index.put(0, 1, 1, hash_of(1), SUM)
    assert opener.reloaded().offsets == [0]


def test_records_that_make_no_sense_are_skipped_and_leave(opener: Opener) -> None:
    path = one_record(opener)
    good = VALUE.pack(1, 2, 32) + hash_of(2) + SUM
    bad = {
        b"short": good,
        KEY.pack(1 << 20) + b"more": good,
        KEY.pack(2 << 20): b"",
        KEY.pack(3 << 20): good[:12],
        KEY.pack(4 << 20): good[:13],
        KEY.pack(5 << 20): good[:-1],
        KEY.pack(6 << 20): good[:-8],
        KEY.pack(7 << 20): VALUE.pack(1, 2, 255) + bytes(300),
        KEY.pack(8 << 20): VALUE.pack(1, 2, 7) + bytes(15),
        KEY.pack(9 << 20): bytes(range(250)) * 8,
    }
    write_raw(path, SLOTS, {KEY.pack(4096): good} | bad)
    write_raw(path, b"layouts", {b"odd": b"{}", KEY.pack(3): b"{}", b"\0\0\0\2": b"\xff{"})
    write_raw(path, b"layouts", {b"\0\0\0\3": b"{not json"})
    index = opener()
    loaded = index.load()
    assert index.warnings == []
    assert loaded.offsets == [0, 4096]
    assert loaded.layouts == {1: "{}"}
    assert loaded.damaged >= len(bad) + 4 - 1  # nine random bytes may look like a record
    index.put(8192, 1, 3, hash_of(3), SUM)
    opener.close()
    assert opener.reloaded().offsets[:3] == [0, 4096, 8192]


@pytest.mark.parametrize("executable", ["/nowhere/python", "/bin/false"])
def test_what_the_file_is_not_to_blame_for_does_not_cost_it(
    opener: Opener, monkeypatch: pytest.MonkeyPatch, executable: str
) -> None:
    """No process, no memory: whoever opens the index may try again, and finds everything."""
    one_record(opener)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", executable)
        with pytest.raises(OSError, match=executable if "nowhere" in executable else "reader"):
            opener()
    assert opener.reloaded().offsets == [0]


def script(opener: Opener, text: str) -> str:
    path = opener.folder / "script"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return os.fspath(path)


def test_a_reader_that_hangs_is_ended(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    one_record(opener)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", script(opener, "exec tail -f /dev/null"))
        patch.setattr(index_reader, "READ_S_MIN", 0.05)
        index = opener()
    assert "took more than" in index.warnings[0]


@pytest.mark.parametrize("end", ["kill -TERM $$", "kill -KILL $$", "exit 1", "exec sleep 60"])
def test_a_rewrite_that_is_ended_from_outside_is_tried_again(
    opener: Opener, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """A stopping service manager ends every process of a daemon, and that must cost no index."""
    one_record(opener)
    index = opener()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", script(opener, end))
        patch.setattr(index_reader, "READ_S_MIN", 0.05)
        index.put(4096, 1, 2, hash_of(2), SUM)
        assert not index.flush(0.01)
        opener.states.wait_for(1)
    assert index.flush(SOON_S)
    assert opener.states.told[-1] is None
    assert index.warnings == []
    assert opener.reloaded().offsets == [0, 4096]


def test_a_reader_that_says_nothing_is_not_believed(
    opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_record(opener)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/bin/true")
        index = opener()
    assert "cannot be read" in index.warnings[0]


def test_a_folder_that_cannot_be_made_is_the_callers_trouble(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        Opener(tmp_path / "file")()
