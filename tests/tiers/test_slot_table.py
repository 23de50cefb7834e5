"""The slot table: what a dead writer leaves is described in full or not at all."""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.tiers import slot_table
from kvstore.tiers.base import ALIGNMENT
from kvstore.tiers.slot_table import (
    COMMITTED,
    EMPTY,
    RECORD_BYTES,
    WRITING,
    SlotRecord,
    SlotTable,
)

SLAB = 32 * ALIGNMENT
SLABS = 5
ARENA = SLABS * SLAB
LAYOUT = b"layout-of-16-byt"
SEQUENCE_AT = RECORD_BYTES - 8  # its last field, outside of the checksum


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "slots"


@pytest.fixture
def table(path: Path) -> Iterator[SlotTable]:
    table = SlotTable.create(path, ARENA, 77, SLAB)
    yield table
    table.close()


def reopened(path: Path) -> tuple[list[SlotRecord], int]:
    """What another process would find."""
    table = SlotTable.open(path)
    records = list(table.records())
    table.close()
    return records, len(table.damaged)


def test_a_record_comes_back_whole(table: SlotTable, path: Path) -> None:
    table.assign(1, 2 * ALIGNMENT)
    digest = bytes(range(64))
    offset = SLAB + 6 * ALIGNMENT
    table.write(
        offset,
        COMMITTED,
        layout=LAYOUT,
        hash=digest,
        sequence=1 << 63,
        checksum=(1 << 64) - 1,
        session=(1 << 32) - 1,
    )
    table.write(SLAB, WRITING, hash=b"h" * 8 + b"\0", session=5)
    assert reopened(path) == (
        [
            SlotRecord(SLAB, 2 * ALIGNMENT, WRITING, bytes(16), b"h" * 8 + b"\0", 0, 0, 5),
            SlotRecord(
                offset,
                2 * ALIGNMENT,
                COMMITTED,
                LAYOUT,
                digest,
                1 << 63,
                (1 << 64) - 1,
                (1 << 32) - 1,
            ),
        ],
        0,
    )
    table.clear(SLAB)
    table.write(offset, EMPTY)
    assert reopened(path) == ([], 0)


def test_the_header_says_which_arena(table: SlotTable, path: Path) -> None:
    again = SlotTable.open(path)
    assert (again.arena_bytes, again.arena_inode, again.slab_bytes) == (ARENA, 77, SLAB)
    assert again.slot_bytes == [0] * SLABS
    again.close()
    again.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["slots"]


def test_every_slot_of_every_size_has_its_own_record(table: SlotTable, path: Path) -> None:
    sizes = [ALIGNMENT, 3 * ALIGNMENT, SLAB // 2, SLAB, 0]
    wanted = []
    for slab, size in enumerate(sizes):
        table.assign(slab, size)
        for number in range(SLAB // size if size else 0):
            offset = slab * SLAB + number * size
            table.write(offset, COMMITTED, hash=offset.to_bytes(8, "big"), sequence=offset)
            wanted.append((offset, size, offset.to_bytes(8, "big")))
    found, damaged = reopened(path)
    assert [(one.offset, one.slot_bytes, one.hash) for one in found] == wanted
    assert not damaged


@pytest.mark.parametrize(
    "offset", [-ALIGNMENT, 1, ALIGNMENT, SLAB, ARENA, 30 * ALIGNMENT, 3 * ALIGNMENT + 1]
)
def test_a_place_where_no_slot_begins_is_our_own_error(table: SlotTable, offset: int) -> None:
    table.assign(0, 3 * ALIGNMENT)  # ten slots, two pages are left over
    with pytest.raises(ValueError, match="no slot begins"):
        table.write(offset, COMMITTED)
    with pytest.raises(ValueError, match="no slot begins"):
        table.clear(offset)


def test_what_no_record_can_hold_is_our_own_error(table: SlotTable) -> None:
    table.assign(0, ALIGNMENT)
    with pytest.raises(ValueError, match="too long"):
        table.write(0, COMMITTED, hash=bytes(65))
    with pytest.raises(ValueError, match="too long"):
        table.write(0, COMMITTED, layout=bytes(17))
    for slab, size in ((0, 1), (0, -ALIGNMENT), (0, SLAB + ALIGNMENT), (SLABS, 0), (-1, 0)):
        with pytest.raises(ValueError, match="slab"):
            table.assign(slab, size)


def test_a_slab_that_is_assigned_again_is_empty(table: SlotTable, path: Path) -> None:
    table.assign(2, ALIGNMENT)
    for offset in range(2 * SLAB, 3 * SLAB, ALIGNMENT):
        table.write(offset, COMMITTED, hash=b"12345678")
    table.assign(2, 2 * ALIGNMENT)
    assert reopened(path) == ([], 0)
    table.assign(2, ALIGNMENT)
    assert reopened(path) == ([], 0)


def test_the_last_slab_may_be_short(path: Path) -> None:
    table = SlotTable.create(path, SLAB + 5 * ALIGNMENT, 1, SLAB)
    table.assign(1, 2 * ALIGNMENT)
    table.write(SLAB + 2 * ALIGNMENT, COMMITTED, hash=b"12345678")
    assert [one.offset for one in reopened(path)[0]] == [SLAB + 2 * ALIGNMENT]
    table.close()


def test_the_file_takes_memory_only_for_what_is_assigned(tmp_path: Path) -> None:
    path = tmp_path / "slots"
    table = SlotTable.create(path, 1 << 40, 1, 64 << 20)
    assert path.stat().st_size > 1 << 34
    assert path.stat().st_blocks * 512 < 1 << 20
    table.assign(9000, 2 << 20)
    table.write(9000 * (64 << 20), COMMITTED, hash=b"12345678")
    assert path.stat().st_blocks * 512 < 1 << 20
    table.close()


# --- Death at any instruction


@dataclasses.dataclass(frozen=True)
class Contents:
    state: int
    layout: bytes
    hash: bytes
    sequence: int
    checksum: int
    session: int


contents = st.builds(
    Contents,
    state=st.sampled_from([EMPTY, WRITING, COMMITTED]),
    layout=st.binary(min_size=16, max_size=16),
    hash=st.binary(min_size=8, max_size=64),
    sequence=st.integers(0, (1 << 64) - 1),
    checksum=st.integers(0, (1 << 64) - 1),
    session=st.integers(0, (1 << 32) - 1),
)


def image(table: SlotTable, file: int, place: int, what: Contents | None) -> bytes:
    """The bytes of the record of slot 0 after it was written so (None: cleared)."""
    if what is None:
        table.clear(0)
    else:
        table.write(0, **dataclasses.asdict(what))
    return os.pread(file, RECORD_BYTES, place)


@settings(max_examples=60, deadline=None)
@given(old=st.none() | contents, new=st.none() | contents)
def test_a_record_torn_anywhere_is_the_old_or_the_new_or_none(
    old: Contents | None, new: Contents | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slots"
        table = SlotTable.create(path, SLAB, 1, SLAB)
        table.assign(0, SLAB)
        place = 2 * ALIGNMENT
        file = os.open(path, os.O_RDWR)
        before, after = image(table, file, place, old), image(table, file, place, new)
        whole = {
            one[:SEQUENCE_AT]: [] if what is None or what.state == EMPTY else [what]
            for one, what in ((before, old), (after, new))
        }
        whole[bytes(SEQUENCE_AT)] = []
        for cut in range(RECORD_BYTES + 1):
            for torn in (after[:cut] + before[cut:], before[:cut] + after[cut:]):
                os.pwrite(file, torn, place)
                sequence = int.from_bytes(torn[SEQUENCE_AT:], "little")  # may be torn: of no weight
                found = [
                    Contents(one.state, one.layout, one.hash, sequence, one.checksum, one.session)
                    for one in table.records()
                ]
                if (body := torn[:SEQUENCE_AT]) in whole:
                    expected = [dataclasses.replace(one, sequence=sequence) for one in whole[body]]
                    assert (found, table.damaged) == (expected, [])
                else:
                    assert (found, table.damaged) == ([], [(0, SLAB)])
        os.close(file)
        table.close()


def test_a_bit_flipped_in_a_record_is_noticed(table: SlotTable, path: Path) -> None:
    table.assign(0, SLAB)
    table.write(0, COMMITTED, layout=LAYOUT, hash=b"12345678", sequence=3)
    file = os.open(path, os.O_RDWR)
    good = os.pread(file, RECORD_BYTES, 2 * ALIGNMENT)
    for bit in range(8 * SEQUENCE_AT):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        os.pwrite(file, bad, 2 * ALIGNMENT)
        assert reopened(path) == ([], 1), bit
    os.close(file)


def test_a_record_in_the_wrong_place_is_noticed(table: SlotTable, path: Path) -> None:
    table.assign(0, ALIGNMENT)
    table.write(0, COMMITTED, hash=b"12345678")
    file = os.open(path, os.O_RDWR)
    os.pwrite(file, os.pread(file, RECORD_BYTES, 2 * ALIGNMENT), 2 * ALIGNMENT + RECORD_BYTES)
    os.close(file)
    found, damaged = reopened(path)
    assert ([one.offset for one in found], damaged) == ([0], 1)


class Died(Exception):
    pass


@pytest.mark.parametrize("step", ["_set_slab", "_erase", "_reserve", "_set_slab again"])
def test_death_while_a_slab_changes_hands_misreads_nothing(
    table: SlotTable, path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The old records must never be read with the arithmetic of the new slot size."""
    table.assign(0, ALIGNMENT)
    for offset in range(0, SLAB, ALIGNMENT):
        table.write(offset, COMMITTED, hash=b"12345678", sequence=offset)
    before = reopened(path)[0]
    name, _, again = step.partition(" ")
    original, calls = getattr(SlotTable, name), [0]

    def die(self: SlotTable, *arguments: int) -> None:
        calls[0] += 1
        if calls[0] == (2 if again else 1):
            raise Died
        original(self, *arguments)

    monkeypatch.setattr(SlotTable, name, die)
    with pytest.raises(Died):
        table.assign(0, 2 * ALIGNMENT)
    found, damaged = reopened(path)
    assert found == (before if step == "_set_slab" else [])
    assert not damaged


def test_no_room_for_records_is_an_error_and_no_sigbus(
    table: SlotTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that a full tmpfs cannot give kills its writer, so it is asked for before."""
    table.assign(0, SLAB)

    def full(file: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="slots") as caught:
        table.assign(0, ALIGNMENT)
    assert caught.value.errno == errno.ENOSPC
    assert table.slot_bytes[0] == 0
    with pytest.raises(ValueError, match="no slot begins"):
        table.write(0, COMMITTED)


WRITER = """
import sys, pathlib
from kvstore.tiers.slot_table import SlotTable, COMMITTED, WRITING
table = SlotTable.open(pathlib.Path(sys.argv[1]))
number = 0
while True:
    for slot in range(8):
        number += 1
        text = number.to_bytes(8, "big") * 8
        table.write(slot * 4096, COMMITTED, layout=text[:16], hash=text, sequence=number,
                    checksum=number, session=number & 0xFFFFFFFF)
    if number == 8000:
        print("running", flush=True)
"""


def test_a_killed_writer_leaves_no_mixed_record(table: SlotTable, path: Path) -> None:
    table.assign(0, ALIGNMENT)
    for _ in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, os.fspath(path)], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"running\n"
            writer.kill()
        found, damaged = reopened(path)
        assert len(found) + damaged == 8
        assert damaged <= 1
        for one in found:
            text = one.checksum.to_bytes(8, "big") * 8
            assert (one.layout, one.hash) == (text[:16], text)


# --- What is not adopted


def test_what_is_no_table_is_not_adopted(table: SlotTable, path: Path) -> None:
    good = path.read_bytes()
    with pytest.raises(FileNotFoundError):
        SlotTable.open(path.with_name("absent"))
    for bad in (
        b"",
        good[:100],
        b"x" * len(good),
        good[:-ALIGNMENT],
        good + bytes(ALIGNMENT),
        good[:8] + b"\2" + good[9:],
        *(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(8, 48)),
    ):
        path.with_name("bad").write_bytes(bad)
        with pytest.raises(ValueError, match="not adopted"):
            SlotTable.open(path.with_name("bad"))


@pytest.mark.parametrize("size", [1, ALIGNMENT + 8, SLAB + ALIGNMENT, 1 << 63])
def test_an_impossible_slot_size_is_not_adopted(table: SlotTable, path: Path, size: int) -> None:
    file = os.open(path, os.O_RDWR)
    os.pwrite(file, size.to_bytes(8, "little"), ALIGNMENT + 8)
    os.close(file)
    with pytest.raises(ValueError, match="slab 1"):
        SlotTable.open(path)


def test_a_bit_flipped_in_the_size_of_a_slab_is_noticed(table: SlotTable, path: Path) -> None:
    """With another size the records would be read with the wrong arithmetic."""
    table.assign(1, 2 * ALIGNMENT)
    file = os.open(path, os.O_RDWR)
    good = os.pread(file, 8, ALIGNMENT + 8)
    for bit in range(64):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        os.pwrite(file, bad, ALIGNMENT + 8)
        with pytest.raises(ValueError, match="slab 1"):
            SlotTable.open(path)
    os.close(file)


def test_a_spoilt_table_is_not_adopted(table: SlotTable, path: Path) -> None:
    SlotTable.open(path).close()
    table.spoil()
    with pytest.raises(ValueError, match="not adopted"):
        SlotTable.open(path)


# --- The order of last uses


@pytest.mark.parametrize("few", [0, 16])
def test_touched_slots_are_the_youngest(
    table: SlotTable, path: Path, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    monkeypatch.setattr(slot_table, "_FEW", few)
    table.assign(0, ALIGNMENT)
    table.assign(3, 4 * ALIGNMENT)
    places = [0, ALIGNMENT, 2 * ALIGNMENT, 3 * SLAB, 3 * SLAB + 4 * ALIGNMENT]
    for number, offset in enumerate(places):
        table.write(offset, COMMITTED, hash=b"12345678", sequence=number)
    table.touch([places[3], places[0], 4 * SLAB], 10)  # the last lies in an unassigned slab
    found, damaged = reopened(path)
    assert not damaged
    order = sorted(found, key=lambda one: one.sequence)
    assert [one.offset for one in order] == [places[at] for at in (1, 2, 4, 3, 0)]


def test_a_checksum_that_follows_leaves_the_order_alone(table: SlotTable, path: Path) -> None:
    """It comes in the order in which the background takes it, which tells nothing of use."""
    table.assign(0, ALIGNMENT)
    table.write(0, COMMITTED, layout=LAYOUT, hash=b"12345678", sequence=5)
    table.write(0, COMMITTED, layout=LAYOUT, hash=b"12345678", sequence=9, checksum=1)
    table.write(ALIGNMENT, COMMITTED, layout=LAYOUT, hash=b"12345678", sequence=6)
    table.write(ALIGNMENT, COMMITTED, layout=LAYOUT, hash=b"12345679", sequence=7)
    table.write(2 * ALIGNMENT, WRITING, layout=LAYOUT, hash=b"12345678", sequence=1)
    table.write(2 * ALIGNMENT, COMMITTED, layout=LAYOUT, hash=b"12345678", sequence=8)
    found, _ = reopened(path)
    assert [(one.sequence, one.checksum) for one in found] == [(5, 1), (7, 0), (8, 0)]
