"""Bytes between files and the memory of a CUDA device, in two ways with one interface.

`BouncedFiles` reads with preadv into host memory and has the device copy from there; it needs
nothing more. `CuFiles` leaves it all to kvikio: the drive writes into the device's memory itself
where GPUDirect Storage works, and kvikio bounces as well (its compatibility mode) where it does
not. Which is faster is measured by `kvstore.cufile_choice`. Who owns files and device memory, and
what the bytes mean, is told above.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

from kvstore import filesystems
from kvstore.types import MIB, SLOT_ALIGNMENT, slot_bytes_of

PIECE_BYTES = 4 * MIB  # one bounce buffer, and one request to kvikio
IN_FLIGHT_LIMIT = 128  # with more requests cuFile was seen to hang
NVIDIA_FS = Path("/proc/driver/nvidia-fs")
DIRECT_KINDS = ("ext4", "xfs")  # on others nvidia-fs hands over to the host without a word


class DeviceMemory(Protocol):
    """What the bounced way needs of a device; kvstore.tiers.hbm.Gpu has it. Both raise OSError."""

    def write(self, address: int, data: memoryview) -> None:
        """Copy from the host; done when this returns."""

    def read(self, address: int, into: memoryview) -> None:
        """Copy to the host; done when this returns."""


class DeviceFiles(Protocol):
    """Some files, by their place in the list they were opened with.

    Calls may come from several threads at once. Whatever they return or raise, nothing touches
    file or memory for them any more. They raise OSError naming the path when file or device fails
    (what the range holds is undefined then), ValueError for what cannot be asked, and after close.
    """

    name: str  # "posix" or "gds"
    how: str  # for people
    direct: bool  # the host's memory is not on the way; False in compatibility mode

    def read(self, file: int, position: int, address: int, size: int) -> None:
        """Fill device memory from any position of a file."""

    def write(self, file: int, position: int, address: int, size: int) -> None:
        """Put device memory into a file, at a multiple of SLOT_ALIGNMENT; the rest of the last page
        may become zeros."""

    def close(self) -> None:
        """Close the files; a second call does nothing. No call may be in flight."""


class BouncedFiles:
    """See DeviceFiles. O_DIRECT where the file system takes it; `threads` pieces at once in all."""

    name = "posix"
    how = "preadv and a copy"
    direct = False

    def __init__(
        self,
        paths: Sequence[Path],
        device: DeviceMemory,
        *,
        writable: bool = False,
        threads: int = 8,
    ) -> None:
        """Raises OSError naming the path that cannot be opened."""
        self._paths = tuple(paths)
        self._device = device
        self._writable = writable
        with contextlib.ExitStack() as undo:
            self._files: tuple[int, ...] = ()
            for path in self._paths:
                self._files += (open_direct(path, writable=writable),)
                undo.callback(os.close, self._files[-1])
            undo.pop_all()
        self._bounces: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for _ in range(threads):
            self._bounces.put(memoryview(mmap.mmap(-1, PIECE_BYTES)))
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="bounced")

    def read(self, file: int, position: int, address: int, size: int) -> None:
        """See DeviceFiles.read."""
        _check(self._files, file, position, size)
        self._each(self._read_piece, file, position, address, size)

    def write(self, file: int, position: int, address: int, size: int) -> None:
        """See DeviceFiles.write."""
        _check(self._files, file, position, size)
        _check_write(self._writable, position)
        self._each(self._write_piece, file, position, address, size)

    def close(self) -> None:
        """See DeviceFiles.close."""
        files, self._files = self._files, ()
        for file in files:
            os.close(file)
        self._threads.shutdown()

    def _each(
        self,
        move: Callable[[int, int, int, int], None],
        file: int,
        position: int,
        address: int,
        size: int,
    ) -> None:
        """All pieces; one alone by the caller's own thread, which saves waking another."""
        pieces = list(_pieces(position, address, size, PIECE_BYTES))
        if len(pieces) == 1:
            move(file, *pieces[0])
            return
        moving = [self._threads.submit(move, file, *piece) for piece in pieces]
        wait(moving)
        for one in moving:
            one.result()

    def _read_piece(self, file: int, position: int, address: int, size: int) -> None:
        """From the page in which it begins to the page in which it ends: O_DIRECT wants that."""
        skip = position % SLOT_ALIGNMENT
        with self._bounce() as bounce, self._named(file):
            whole = bounce[: slot_bytes_of(skip + size)]
            read_fully(self._files[file], whole, position - skip, skip + size)
            self._device.write(address, whole[skip : skip + size])

    def _write_piece(self, file: int, position: int, address: int, size: int) -> None:
        with self._bounce() as bounce, self._named(file):
            whole = bounce[: slot_bytes_of(size)]
            self._device.read(address, whole[:size])
            whole[size:] = bytes(len(whole) - size)
            _write_fully(self._files[file], whole, position)

    @contextlib.contextmanager
    def _bounce(self) -> Iterator[memoryview]:
        bounce = self._bounces.get()
        try:
            yield bounce
        finally:
            self._bounces.put(bounce)

    @contextlib.contextmanager
    def _named(self, file: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _named(error, self._paths[file]) from error


class CuFiles:
    """See DeviceFiles. kvikio's threads do the work; callers wait without the interpreter lock.

    Thread count, sizes and direct I/O are settings of kvikio, and so of the whole process. They are
    set here because its own are poor: one thread, and reads through the page cache.

    A request is cut here and not by kvikio: of its own pieces it abandons those that are still on
    their way when one fails, and they would arrive in memory that is somebody else's by then.

    Without nvidia-fs in the kernel kvikio is told to bounce: cuFile, opened on a host without a
    driver, was seen to spin for ever. KVIKIO_COMPAT_MODE in the environment has the last word.
    """

    name = "gds"

    def __init__(
        self,
        paths: Sequence[Path],
        device_number: int,
        *,
        writable: bool = False,
        threads: int = 8,
        task_bytes: int = PIECE_BYTES,
        in_flight_max: int = 64,
    ) -> None:
        """Raises OSError: ENODEV, saying what to do, where kvikio or the driver is missing."""
        if not 0 < threads <= in_flight_max <= IN_FLIGHT_LIMIT or task_bytes % SLOT_ALIGNMENT:
            raise ValueError(
                f"{threads} threads, {in_flight_max} requests of {task_bytes} bytes: give whole "
                f"pages, and no more threads than requests, nor requests than {IN_FLIGHT_LIMIT}"
            )
        kvikio = load()
        _configure(kvikio, threads, task_bytes)
        self._paths = tuple(paths)
        self._device_number = device_number
        self._writable = writable
        self._task_bytes = task_bytes
        self._in_flight_max = in_flight_max
        self._bound = Bound(in_flight_max)
        self._files: tuple[Any, ...] = ()
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for path in self._paths:
                # kvikio does not say what is wrong with a path
                os.close(open_direct(path, writable=writable))
                with self._named(path):
                    self._files += (kvikio.CuFile(path, "r+" if writable else "r"),)
            self.direct = self._is_direct(kvikio)
            undo.pop_all()
        self.how = "GPUDirect Storage" if self.direct else "cuFile in compatibility mode"

    def read(self, file: int, position: int, address: int, size: int) -> None:
        """See DeviceFiles.read."""
        _check(self._files, file, position, size)
        self._each(self._files[file].pread, file, position, address, size)

    def write(self, file: int, position: int, address: int, size: int) -> None:
        """See DeviceFiles.write."""
        _check(self._files, file, position, size)
        _check_write(self._writable, position)
        self._each(self._files[file].pwrite, file, position, address, size)

    def close(self) -> None:
        """See DeviceFiles.close."""
        files, self._files = self._files, ()
        for file in files:
            file.close()

    def _each(
        self, begin: Callable[..., Any], file: int, position: int, address: int, size: int
    ) -> None:
        """All pieces, so many at once as may be in flight, and to their end also when one fails."""
        pieces = _pieces(position, address, size, self._task_bytes)
        while some := list(itertools.islice(pieces, self._in_flight_max)):
            with self._bound.hold(len(some)), self._named(self._paths[file]):
                finish(begin, some, self._task_bytes)

    @contextlib.contextmanager
    def _named(self, path: Path) -> Iterator[None]:
        """Whatever kvikio raises, mostly RuntimeError, as an OSError with the path in it."""
        try:
            yield
        except OSError as error:
            raise _named(error, path) from error
        except Exception as error:
            text = f"kvikio, CUDA device {self._device_number}: {error}"
            raise OSError(errno.EIO, text, os.fspath(path)) from error

    def _is_direct(self, kvikio: Any) -> bool:
        if kvikio.defaults.is_compat_mode_preferred():
            return False
        available: bool = kvikio.cufile_driver.get("is_gds_available")
        return available and all(filesystems.kind(path) in DIRECT_KINDS for path in self._paths)


def finish(
    begin: Callable[..., Any], pieces: Sequence[tuple[int, int, int]], task_bytes: int
) -> None:
    """Begin all pieces and see each of them end; only then raise the first failure."""
    moving: list[tuple[Any, int]] = []
    failure: Exception | None = None
    for position, address, size in pieces:
        try:
            moving.append((begin(DeviceBytes(address, size), size, position, task_bytes), size))
        except Exception as error:
            failure = error
            break
    for future, size in moving:
        try:
            moved = future.get()
        except Exception as error:
            failure = failure or error
            continue
        if moved != size:
            failure = failure or OSError(errno.EIO, f"moved {moved} of {size} bytes")
    if failure is not None:
        raise failure


class Bound:
    """So many requests at once. A caller has all that it needs, or waits and holds none."""

    def __init__(self, most: int) -> None:
        self._free = most
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, count: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= count)
            self._free -= count
        try:
            yield
        finally:
            with self._changed:
                self._free += count
                self._changed.notify_all()


class DeviceBytes:
    """A range of device memory, as kvikio takes it from anybody."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "data": (address, False),
            "shape": (size,),
            "typestr": "|u1",
            "strides": None,
        }


def load() -> Any:
    """The module. It would be imported without a driver too, and fail with the first read."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        text = f"no CUDA driver here ({error}): install the NVIDIA driver, or use posix"
        raise OSError(errno.ENODEV, text) from None
    os.environ.setdefault("CUFILE_LOGFILE_PATH", os.devnull)  # else into the working directory
    try:
        import kvikio
        import kvikio.cufile_driver
        import kvikio.defaults
    except (ImportError, OSError, RuntimeError) as error:
        text = f"kvikio cannot be loaded ({error}): install kvstore[gds], or use posix"
        raise OSError(errno.ENODEV, text) from None
    return kvikio


def _configure(kvikio: Any, threads: int, task_bytes: int) -> None:
    if "KVIKIO_COMPAT_MODE" not in os.environ and not NVIDIA_FS.exists():
        kvikio.defaults.set("compat_mode", kvikio.CompatMode.ON)
    settings = {
        "num_threads": threads,
        "task_size": task_bytes,
        "bounce_buffer_size": task_bytes,
        "auto_direct_io_read": True,
        "auto_direct_io_write": True,
    }
    for name, value in settings.items():
        kvikio.defaults.set(name, value)


def open_direct(path: Path, *, writable: bool = False) -> int:
    """Open a file with O_DIRECT, or without where its file system does not take that."""
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, flags)


def _check(files: Sequence[object], file: int, position: int, size: int) -> None:
    if not files:
        raise ValueError("the files are closed")
    if not 0 <= file < len(files) or position < 0 or size <= 0:
        raise ValueError(f"{size} bytes at {position} of file {file} of {len(files)}")


def _check_write(writable: bool, position: int) -> None:
    if not writable or position % SLOT_ALIGNMENT:
        raise ValueError(f"a write at {position}: open the files to write them, at whole pages")


def _pieces(
    position: int, address: int, size: int, piece_bytes: int
) -> Iterator[tuple[int, int, int]]:
    """Position, address and size of each piece; all but the first begin on a page of the file."""
    done = 0
    while done < size:
        count = min(size - done, piece_bytes - (position + done) % SLOT_ALIGNMENT)
        yield position + done, address + done, count
        done += count


def read_fully(file: int, into: memoryview, position: int, wanted: int) -> None:
    """At least `wanted` bytes, through short reads; OSError (EIO) when the file ends before."""
    done = 0
    while done < wanted:
        got = done + os.preadv(file, [into[done:]], position + done)
        whole = got - got % SLOT_ALIGNMENT  # O_DIRECT cannot go on within a page
        if got < wanted and whole == done:
            text = f"short read: {got} of {wanted} bytes at {position}; was the file truncated?"
            raise OSError(errno.EIO, text)
        done = got if got >= wanted else whole


def _write_fully(file: int, data: memoryview, position: int) -> None:
    """Whole pages, through short writes; OSError (EIO) when the file takes no more."""
    done = 0
    while done < len(data):
        put = done + os.pwritev(file, [data[done:]], position + done)
        whole = put - put % SLOT_ALIGNMENT
        if whole == done:
            raise OSError(errno.EIO, f"short write: {put} of {len(data)} bytes at {position}")
        done = whole


def _named(error: OSError, path: Path) -> OSError:
    """The same error with the path in it."""
    number = error.errno or errno.EIO
    return OSError(number, error.strerror or os.strerror(number), os.fspath(path))
