"""The NVMe tier: one preallocated file per device, read and written with O_DIRECT.

The files present one linear space, cut in slabs of `slab_bytes`: slab n lies on device n % devices
at HEADER_BYTES + (n // devices) * slab_bytes. No call crosses a slab. What lies where, and whether
it is right, is told by the index and by checksums above; this file only knows bytes.

Format of each `blocks.kv` (version 1, little endian)

    0      8  magic "KVBLOCKS"
    8      4  format version
    12     4  crc32 of this page with these four bytes zero
    16     4  number of this device, from 0
    20     4  count of devices
    24     8  slab_bytes
    32     8  bytes of the file
    40    16  file id, drawn when the file is created
    56        zeros to 4096
    4096 4096 the page of `probe`: anything
    8192      unused to HEADER_BYTES: 1 MiB, so that slots keep the alignment of stripes
    1 MiB     slabs

Assumed of the medium: nothing about the slabs (every record is checked when read). The header is
written once, after the file has all its room, and never again; when it does not fit the
configuration or its crc, the file is made anew with a new id, and no index believes in it any more.

Versions: 1, the first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from kvstore.tiers.base import (
    ALIGNMENT,
    check_range,
    copy,
    flat,
    is_aligned,
    named,
    read_fully,
    write_fully,
)

FILE_NAME, LOCK_NAME = "blocks.kv", "blocks.lock"
HEADER_BYTES = 1 << 20
PROBE_OFFSET = ALIGNMENT
VERSION = 1
FALLOCATE_BYTES = 64 << 30  # per call: a signal restarts one call, not the whole file
_MAGIC = b"KVBLOCKS"
_HEADER = struct.Struct("<8sIIIIQQ16s")

DirectIO = Callable[[int], None]  # switches an open file to O_DIRECT, or raises OSError


def use_direct_io(file: int) -> None:
    """Let I/O on this file go past the page cache; OSError (EINVAL) when its filesystem cannot."""
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_DIRECT)


@dataclasses.dataclass(frozen=True)
class _Device:
    path: Path
    lock: int  # the file beside it: others cannot open that, and could lock what they may read
    file: int
    file_id: bytes
    direct: bool


class NvmeFiles:
    """A tier on one or more files; see `open`.

    file_ids   the ids of all files, in order: an index made for other ids does not belong to these
    direct     whether every file takes O_DIRECT
    warnings   what an operator should know, in sentences
    """

    name = "nvme"

    def __init__(self, devices: Sequence[_Device], slab_bytes: int, warnings: list[str]) -> None:
        self._devices: tuple[_Device, ...] = tuple(devices)
        self.slab_bytes = slab_bytes
        slabs = (os.fstat(devices[0].file).st_size - HEADER_BYTES) // slab_bytes
        self.capacity_bytes = slabs * slab_bytes * len(devices)
        self.file_ids = b"".join(device.file_id for device in devices)
        self.direct = all(device.direct for device in devices)
        self.warnings = warnings

    @classmethod
    def open(
        cls,
        folders: Sequence[Path],
        size_bytes: int,
        slab_bytes: int,
        *,
        gid: int | None = None,
        direct_io: DirectIO = use_direct_io,
    ) -> Self:
        """Open the files, or create them where they are missing, damaged or of another shape.

        A group that is named may read them: its clients map the arena as well.
        `size_bytes` is the sum over all devices, rounded down to whole slabs on each.
        Raises ValueError when that is no slab at all, OSError naming the path when a folder is
        missing or full, the device fails, or another process has the files open.
        """
        if slab_bytes <= 0 or slab_bytes % ALIGNMENT:
            raise ValueError(f"slabs of {slab_bytes} bytes: give a multiple of {ALIGNMENT}")
        if not folders or size_bytes < slab_bytes * len(folders):
            raise ValueError(f"{size_bytes} bytes hold no slab on each of {len(folders)} devices")
        slabs = size_bytes // (slab_bytes * len(folders))
        warnings: list[str] = []
        devices: list[_Device] = []
        try:
            for number, folder in enumerate(folders):
                shape = _Shape(number, len(folders), slab_bytes, HEADER_BYTES + slabs * slab_bytes)
                devices.append(_open_device(folder / FILE_NAME, shape, direct_io, warnings))
                _share(devices[-1], gid, warnings)
        except BaseException:
            for device in devices:
                os.close(device.file)
                os.close(device.lock)
            raise
        return cls(devices, slab_bytes, warnings)

    def read(self, offset: int, into: memoryview) -> None:
        """See Tier.read; ValueError also for a range that crosses a slab."""
        into = flat(into)
        device, position = self._place(offset, len(into))
        if not device.direct or is_aligned(into):
            read_fully(device.file, into, position, device.path)
            return
        bounce = _bounce(len(into))
        read_fully(device.file, bounce, position, device.path)
        copy(into, bounce[: len(into)])

    def write(self, offset: int, data: memoryview) -> None:
        """See Tier.write; ValueError also for a range that crosses a slab."""
        data = flat(data)
        device, position = self._place(offset, len(data))
        if not device.direct or is_aligned(data):
            write_fully(device.file, data, position, device.path)
            return
        bounce = _bounce(len(data))
        copy(bounce[: len(data)], data)
        write_fully(device.file, bounce, position, device.path)

    def sync(self) -> None:
        """See Tier.sync: fdatasync of every file; all are tried, the first failure is raised."""
        failure: OSError | None = None
        for device in self._open_devices():
            try:
                os.fdatasync(device.file)
            except OSError as error:
                failure = failure or named(error, device.path)
        if failure:
            raise failure

    def probe(self) -> None:
        """Write and read back a reserved page of every file: does the device work?

        Raises OSError naming the path when it does not. One at a time; the slabs are not touched.
        """
        for device in self._open_devices():
            _probe(device.file, device.path)

    def close(self) -> None:
        """See Tier.close."""
        devices, self._devices = self._devices, ()
        for device in devices:
            os.close(device.file)
            os.close(device.lock)

    def _open_devices(self) -> tuple[_Device, ...]:
        if not self._devices:
            raise ValueError("the files are closed")
        return self._devices

    def _place(self, offset: int, length: int) -> tuple[_Device, int]:
        devices = self._open_devices()
        check_range(offset, length, self.capacity_bytes)
        if offset % self.slab_bytes + length > self.slab_bytes:
            raise ValueError(f"{length} bytes at {offset} cross a slab of {self.slab_bytes} bytes")
        number, position = place_of(offset, len(devices), self.slab_bytes)
        return devices[number], position


def place_of(offset: int, devices: int, slab_bytes: int) -> tuple[int, int]:
    """The device's number, and the position in its file, of a place in the linear space."""
    slab, inside = divmod(offset, slab_bytes)
    row, number = divmod(slab, devices)
    return number, HEADER_BYTES + row * slab_bytes + inside


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What the header of a file must say to be used as it is."""

    number: int
    count: int
    slab_bytes: int
    file_bytes: int

    def page(self, file_id: bytes) -> bytes:
        def pack(crc: int) -> bytes:
            return _HEADER.pack(
                _MAGIC,
                VERSION,
                crc,
                self.number,
                self.count,
                self.slab_bytes,
                self.file_bytes,
                file_id,
            ).ljust(ALIGNMENT, b"\0")

        return pack(zlib.crc32(pack(0)))


def _open_device(path: Path, shape: _Shape, direct_io: DirectIO, warnings: list[str]) -> _Device:
    """The file at `path`, locked for this process, made anew when it does not fit."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    try:
        with contextlib.ExitStack() as undo:
            lock = os.open(path.with_name(LOCK_NAME), flags, 0o600)
            undo.callback(os.close, lock)
            _lock(lock)
            file = os.open(path, flags, 0o600)
            undo.callback(os.close, file)
            device = _prepare(file, lock, path, shape, direct_io, warnings)
            undo.pop_all()
            return device
    except OSError as error:
        raise named(error, path) from error


def _prepare(
    file: int, lock: int, path: Path, shape: _Shape, direct_io: DirectIO, warnings: list[str]
) -> _Device:
    file_id = _read_id(file, shape)
    if file_id is None:
        if os.fstat(file).st_size:
            warnings.append(
                f"{path} was made for another size, slab size or set of devices, or is "
                "damaged: it is made anew and its blocks are gone"
            )
        file_id = _format(file, path, shape)
    direct = _try_direct(file, path, direct_io)
    if not direct:
        warnings.append(
            f"{path} lies on a filesystem that refuses O_DIRECT: its I/O goes through the page "
            "cache and competes for memory; put nvme.paths on ext4 or xfs"
        )
    return _Device(path, lock, file, file_id, direct)


def _share(device: _Device, gid: int | None, warnings: list[str]) -> None:
    """Let a group read the file, or nobody."""
    try:
        if gid is not None:
            os.fchown(device.file, -1, gid)
        os.fchmod(device.file, 0o600 if gid is None else 0o640)
    except OSError as error:
        warnings.append(f"{device.path} cannot be read by its clients: {error.strerror}")


def _lock(file: int) -> None:
    """Lock the file for as long as it is open; OSError when another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(errno.EBUSY, "another process uses it; stop that one first") from None


def _read_id(file: int, shape: _Shape) -> bytes | None:
    """The id in the header, or None when the file is not exactly of this shape."""
    page = os.pread(file, ALIGNMENT, 0)
    if len(page) < ALIGNMENT or os.fstat(file).st_size != shape.file_bytes:
        return None
    file_id: bytes = _HEADER.unpack_from(page)[-1]
    return file_id if page == shape.page(file_id) else None


def _format(file: int, path: Path, shape: _Shape) -> bytes:
    """Give the file all its room and then its header; a crash between leaves a file that fits none.

    Raises OSError (ENOSPC) naming wanted and available bytes, and leaves the file empty then.
    """
    os.ftruncate(file, 0)  # the header goes first, and the old room is given back
    room = os.fstatvfs(file)
    available = room.f_bavail * room.f_frsize
    try:
        if available < shape.file_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for start in range(0, shape.file_bytes, FALLOCATE_BYTES):
            os.posix_fallocate(file, start, min(FALLOCATE_BYTES, shape.file_bytes - start))
    except OSError as error:
        os.ftruncate(file, 0)
        if error.errno != errno.ENOSPC:
            raise
        text = f"no room: wanted {shape.file_bytes} bytes, available {available} bytes"
        raise OSError(errno.ENOSPC, text) from error
    file_id = os.urandom(16)
    os.fsync(file)
    write_fully(file, memoryview(shape.page(file_id)), 0, path)
    os.fsync(file)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return file_id


def _try_direct(file: int, path: Path, direct_io: DirectIO) -> bool:
    """Switch the file to O_DIRECT; False when the filesystem refuses, now or at the first I/O."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    try:
        direct_io(file)
        _probe(file, path)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fcntl.fcntl(file, fcntl.F_SETFL, flags)
        return False
    return True


def _probe(file: int, path: Path) -> None:
    wanted, found = _bounce(ALIGNMENT), _bounce(ALIGNMENT)
    copy(wanted, memoryview(os.urandom(16) * (ALIGNMENT // 16)))
    write_fully(file, wanted, PROBE_OFFSET, path)
    read_fully(file, found, PROBE_OFFSET, path)
    if found != wanted:
        raise OSError(errno.EIO, "a probe read back other bytes than it wrote", os.fspath(path))


def _bounce(length: int) -> memoryview:
    """A page-aligned buffer of zeros, of `length` bytes rounded up to whole pages."""
    return memoryview(mmap.mmap(-1, max(1, -(-length // ALIGNMENT)) * ALIGNMENT))
