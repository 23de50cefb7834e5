"""NVMe files beyond the contract: layout over devices, re-creation, full disks, damage, probes."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvstore.tiers.base import ALIGNMENT
from kvstore.tiers.nvme import FILE_NAME, HEADER_BYTES, PROBE_OFFSET, NvmeFiles

SLAB = 8 * ALIGNMENT
SIZE = 6 * SLAB


def folders(tmp_path: Path, count: int) -> list[Path]:
    made = [tmp_path / f"device{number}" for number in range(count)]
    for folder in made:
        folder.mkdir(exist_ok=True)
    return made


def fill(files: NvmeFiles) -> None:
    for slab in range(files.capacity_bytes // SLAB):
        files.write(slab * SLAB, memoryview(bytes([slab + 1]) * SLAB))
    files.sync()


def holds_what_was_filled(files: NvmeFiles) -> bool:
    into = memoryview(bytearray(SLAB))
    for slab in range(files.capacity_bytes // SLAB):
        files.read(slab * SLAB, into)
        if into != bytes([slab + 1]) * SLAB:
            return False
    return True


def test_slabs_go_round_the_devices(tmp_path: Path) -> None:
    where = folders(tmp_path, 3)
    files = NvmeFiles.open(where, SIZE, SLAB)
    fill(files)
    files.close()
    for slab in range(6):
        content = (where[slab % 3] / FILE_NAME).read_bytes()
        place = HEADER_BYTES + slab // 3 * SLAB
        assert content[place : place + SLAB] == bytes([slab + 1]) * SLAB
        assert len(content) == HEADER_BYTES + 2 * SLAB


@pytest.mark.parametrize("count", [1, 3])
def test_files_are_found_again(tmp_path: Path, count: int) -> None:
    where = folders(tmp_path, count)
    first = NvmeFiles.open(where, SIZE, SLAB)
    fill(first)
    first.close()
    second = NvmeFiles.open(where, SIZE, SLAB)
    assert second.warnings == first.warnings
    assert second.file_ids == first.file_ids
    assert len(second.file_ids) == 16 * count
    assert holds_what_was_filled(second)
    second.close()
    for folder in where:
        status = (folder / FILE_NAME).stat()
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert status.st_blocks * 512 >= status.st_size, "not preallocated"


def damage_header(where: list[Path]) -> list[Path]:
    with open(where[0] / FILE_NAME, "r+b") as file:
        file.seek(20)
        file.write(b"\xff")
    return where


def cut_the_end(where: list[Path]) -> list[Path]:
    path = where[0] / FILE_NAME
    os.truncate(path, path.stat().st_size - ALIGNMENT)
    return where


def swap_devices(where: list[Path]) -> list[Path]:
    return where[::-1]


def lose_one(where: list[Path]) -> list[Path]:
    (where[1] / FILE_NAME).unlink()
    return where


def drop_one(where: list[Path]) -> list[Path]:
    return where[:1]


@pytest.mark.parametrize("harm", [damage_header, cut_the_end, swap_devices, lose_one, drop_one])
def test_what_does_not_fit_is_made_anew_under_a_new_id(tmp_path: Path, harm: object) -> None:
    first = NvmeFiles.open(folders(tmp_path, 2), SIZE, SLAB)
    fill(first)
    first.close()
    assert callable(harm)
    second = NvmeFiles.open(harm(folders(tmp_path, 2)), SIZE, SLAB)
    assert second.file_ids != first.file_ids
    assert not holds_what_was_filled(second)
    assert bool(second.warnings) is (harm is not lose_one)
    second.close()


@pytest.mark.parametrize(("size", "slab"), [(2 * SIZE, SLAB), (SIZE // 2, SLAB), (SIZE, 2 * SLAB)])
def test_another_shape_is_made_anew(tmp_path: Path, size: int, slab: int) -> None:
    first = NvmeFiles.open([tmp_path], SIZE, SLAB)
    first.close()
    second = NvmeFiles.open([tmp_path], size, slab)
    assert second.file_ids != first.file_ids
    assert second.capacity_bytes == size
    assert "made anew" in second.warnings[0]
    assert os.fspath(tmp_path) in second.warnings[0]
    second.close()


def test_size_is_rounded_down_to_whole_slabs_on_each_device(tmp_path: Path) -> None:
    files = NvmeFiles.open(folders(tmp_path, 2), 5 * SLAB + 17, SLAB)
    assert files.capacity_bytes == 4 * SLAB
    files.close()
    for size, slab in ((SLAB, SLAB), (SIZE, SLAB + 1), (SIZE, 0)):
        with pytest.raises(ValueError, match=r"slab"):
            NvmeFiles.open(folders(tmp_path, 2), size, slab)


def test_no_call_crosses_a_slab(tmp_path: Path) -> None:
    files = NvmeFiles.open([tmp_path], SIZE, SLAB)
    buffer = memoryview(bytearray(2 * ALIGNMENT))
    for call in (files.read, files.write):
        with pytest.raises(ValueError, match="cross"):
            call(SLAB - ALIGNMENT, buffer)
    files.close()


def test_a_file_cut_under_us_is_an_error_naming_it(tmp_path: Path) -> None:
    where = folders(tmp_path, 2)
    files = NvmeFiles.open(where, SIZE, SLAB)
    fill(files)
    os.truncate(where[1] / FILE_NAME, HEADER_BYTES + SLAB // 2)
    into = memoryview(bytearray(SLAB))
    for slab in (1, 3):
        with pytest.raises(OSError, match="truncated") as caught:
            files.read(slab * SLAB, into)
        assert caught.value.errno == errno.EIO
        assert caught.value.filename == os.fspath(where[1] / FILE_NAME)
    files.read(2 * SLAB, into)
    assert into == bytes([3]) * SLAB, "the other device is not touched by it"
    files.close()


def test_no_room_leaves_an_empty_file_and_says_how_much(tmp_path: Path) -> None:
    room = os.statvfs(tmp_path)
    wanted = (room.f_blocks * room.f_frsize // SLAB + 1) * SLAB
    with pytest.raises(OSError, match=rf"wanted {wanted + HEADER_BYTES} bytes") as caught:
        NvmeFiles.open([tmp_path], wanted, SLAB)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == os.fspath(tmp_path / FILE_NAME)
    assert (tmp_path / FILE_NAME).stat().st_size == 0
    files = NvmeFiles.open([tmp_path], SIZE, SLAB)
    assert files.warnings == []
    files.close()


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """The kernel lets no file of this process grow beyond: a full disk without a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_during_creation_gives_the_room_back(tmp_path: Path) -> None:
    with (
        file_size_limit(HEADER_BYTES + SLAB),
        pytest.raises(OSError, match="too large") as caught,
    ):
        NvmeFiles.open([tmp_path], SIZE, SLAB)
    assert caught.value.filename == os.fspath(tmp_path / FILE_NAME)
    assert (tmp_path / FILE_NAME).stat().st_size == 0


def test_a_write_that_the_medium_refuses_is_an_error_naming_it(tmp_path: Path) -> None:
    files = NvmeFiles.open([tmp_path], SIZE, SLAB)
    with file_size_limit(HEADER_BYTES + SLAB), pytest.raises(OSError, match="too large") as caught:
        files.write(3 * SLAB, memoryview(bytes(SLAB)))
    assert caught.value.filename == os.fspath(tmp_path / FILE_NAME)
    files.close()


def test_the_second_device_failing_closes_the_first(tmp_path: Path) -> None:
    where = [*folders(tmp_path, 1), tmp_path / "absent"]
    with pytest.raises(FileNotFoundError) as caught:
        NvmeFiles.open(where, SIZE, SLAB)
    assert "absent" in str(caught.value)
    NvmeFiles.open(where[:1], SIZE, SLAB).close()  # would be busy if it were still open


def test_two_daemons_cannot_share_a_file(tmp_path: Path) -> None:
    files = NvmeFiles.open([tmp_path], SIZE, SLAB)
    fill(files)
    with pytest.raises(OSError, match="another process") as caught:
        NvmeFiles.open([tmp_path], 2 * SIZE, SLAB)  # would make it anew
    assert caught.value.errno == errno.EBUSY
    assert holds_what_was_filled(files)
    files.close()


def test_a_killed_daemon_leaves_no_lock(tmp_path: Path) -> None:
    code = f"""
import os, pathlib, signal
from kvstore.tiers.nvme import NvmeFiles
files = NvmeFiles.open([pathlib.Path({os.fspath(tmp_path)!r})], {SIZE}, {SLAB})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code])
    assert done.returncode == -9
    NvmeFiles.open([tmp_path], SIZE, SLAB).close()


def test_refused_direct_io_is_said_and_works(tmp_path: Path) -> None:
    def refuse(file: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    files = NvmeFiles.open([tmp_path], SIZE, SLAB, direct_io=refuse)
    assert not files.direct
    (warning,) = files.warnings
    assert os.fspath(tmp_path) in warning
    assert "O_DIRECT" in warning
    assert "nvme.paths" in warning
    fill(files)
    assert holds_what_was_filled(files)
    files.close()


def test_other_trouble_with_direct_io_is_not_hidden(tmp_path: Path) -> None:
    def fail(file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(OSError, match=FILE_NAME) as caught:
        NvmeFiles.open([tmp_path], SIZE, SLAB, direct_io=fail)
    assert caught.value.errno == errno.EIO


def test_probe_touches_no_slab_and_no_header(tmp_path: Path) -> None:
    files = NvmeFiles.open(folders(tmp_path, 2), SIZE, SLAB)
    fill(files)
    before = (tmp_path / "device0" / FILE_NAME).read_bytes()
    files.probe()
    after = (tmp_path / "device0" / FILE_NAME).read_bytes()
    end = PROBE_OFFSET + ALIGNMENT
    assert before[:PROBE_OFFSET] == after[:PROBE_OFFSET]
    assert before[PROBE_OFFSET:end] != after[PROBE_OFFSET:end]
    assert before[end:] == after[end:]
    files.close()


def test_probe_tells_a_device_that_does_not_take_writes(tmp_path: Path) -> None:
    files = NvmeFiles.open([tmp_path], SIZE, SLAB)
    with file_size_limit(0), pytest.raises(OSError, match=FILE_NAME):
        files.probe()
    files.probe()
    files.close()
