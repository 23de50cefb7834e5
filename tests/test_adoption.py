"""The notes beside the slot table: what a dead daemon has written is read as it was, or refused."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from kvstore.adoption import LINES_SPARE, Notes
from kvstore.types import Layout


def layout(number: int) -> Layout:
    return Layout(
        model=f"m{number}", engine="e", dtype="d", block_tokens=16, shards=2, shard_bytes=4096
    )


class Spoilt(Exception):
    pass


def spoil() -> None:
    raise Spoilt


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "notes"


def test_what_was_noted_is_found(path: Path) -> None:
    notes = Notes.create(path, spoil)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    notes.add_layout(layout(1))
    notes.add_layout(layout(2))
    notes.add_layout(layout(1))
    notes.add_process(7, (100, 5))
    notes.add_process(7, (101, 6))
    notes.add_process(8, (102, 0))
    notes.over(8)
    for _ in range(2):  # reading changes nothing
        found = Notes.open(path, spoil)
        assert set(found.layouts.values()) == {layout(1), layout(2)}
        assert found.layouts[layout(2).fingerprint] == layout(2)
        assert found.processes == {7: [(100, 5), (101, 6)]}


def test_they_do_not_grow_with_every_client(path: Path) -> None:
    notes = Notes.create(path, spoil)
    notes.add_layout(layout(1))
    notes.add_process(1, (99, 9))
    for number in range(2, 5_000):
        notes.add_process(number, (number, 1))
        notes.over(number)
    assert len(path.read_text().splitlines()) <= LINES_SPARE + 10
    assert Notes.open(path, spoil).processes == {1: [(99, 9)]}


def test_death_within_a_line(path: Path) -> None:
    """Wherever the last write was cut off, what was there before is read."""
    notes = Notes.create(path, spoil)
    notes.add_process(1, (99, 9))
    before = path.read_bytes()
    notes.add_process(2, (100, 9))
    whole = path.read_bytes()
    for cut in range(len(before), len(whole)):
        path.write_bytes(whole[:cut])
        assert Notes.open(path, spoil).processes == {1: [(99, 9)]}


def test_damage_is_refused(path: Path) -> None:
    """A process that is not known of could write into a slot that was given away."""
    notes = Notes.create(path, spoil)
    notes.add_layout(layout(1))
    notes.add_process(1, (99, 9))
    good = path.read_bytes()
    for at in range(len(good) - 1):
        for bit in range(8):
            bad = bytearray(good)
            bad[at] ^= 1 << bit
            path.write_bytes(bad)
            try:
                found = Notes.open(path, spoil)
            except ValueError:
                continue
            assert (set(found.layouts), found.processes) == (
                {layout(1).fingerprint},
                {1: [(99, 9)]},
            )


def test_what_cannot_be_noted_spoils_the_table(path: Path) -> None:
    notes = Notes.create(path, spoil)
    os.rename(path, path.with_name("elsewhere"))
    path.mkdir()
    with pytest.raises(Spoilt):
        notes.add_process(1, (99, 9))
