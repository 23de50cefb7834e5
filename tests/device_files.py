"""The contract of DeviceFiles, over devices whose memory is the host's: addresses are the host's.

`HostDevice` is one for the bounced way. For kvikio `build_driver` compiles a libcuda.so.1 in which
all memory is said to be a device's, and is copied with memcpy: what runs is kvikio's own code for
devices, in its compatibility mode, and nothing of CUDA, cuFile or nvidia-fs.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kvstore.cufile import DeviceFiles
from kvstore.types import KIB, MIB

Open = Callable[..., DeviceFiles]

# What kvikio looks up in the driver and may take for granted that it works.
NOTHING = """cuInit cuMemHostRegister_v2 cuMemHostUnregister cuCtxCreate_v4 cuCtxDestroy_v2
cuCtxPushCurrent_v2 cuCtxGetDevice cuMemGetAddressRange_v2 cuDeviceGet cuDeviceGetCount
cuDeviceGetAttribute cuDevicePrimaryCtxRetain cuDevicePrimaryCtxRelease_v2 cuStreamSynchronize
cuStreamDestroy_v2 cuEventSynchronize cuEventCreate cuEventDestroy_v2 cuEventRecord cuEventQuery
cuLaunchHostFunc"""
DRIVER = r"""
#include <stdlib.h>
#include <string.h>
typedef unsigned long long P;
static char thing;  /* every context and stream */
int cuDriverGetVersion(int *v) { *v = 12000; return 0; }
int cuMemHostAlloc(void **p, size_t n, unsigned f) { return posix_memalign(p, 4096, n) ? 2 : 0; }
int cuMemFreeHost(void *p) { free(p); return 0; }
static int copy(void *to, const void *from, size_t n) { memcpy(to, from, n); return 0; }
int cuMemcpyAsync(P to, P from, size_t n, void *s) { return copy((void *)to, (void *)from, n); }
int cuMemcpyHtoDAsync_v2(P to, void *from, size_t n, void *s) { return copy((void *)to, from, n); }
int cuMemcpyDtoHAsync_v2(void *to, P from, size_t n, void *s) { return copy(to, (void *)from, n); }
int cuPointerGetAttributes(unsigned n, int *asked, void **into, P p) {
  while (n--) *(int *)into[n] = 2;  /* asked for its type: a device's */
  return 0;
}
int cuPointerGetAttribute(void *into, int asked, P p) {
  if (asked == 1) *(void **)into = &thing; else *(int *)into = 0;
  return 0;
}
int cuCtxPopCurrent_v2(void **c) { *c = &thing; return 0; }
int cuCtxGetCurrent(void **c) { *c = &thing; return 0; }
int cuStreamCreate(void **s, unsigned f) { *s = &thing; return 0; }
int cuGetErrorName(int e, const char **t) { *t = "made up"; return 0; }
int cuGetErrorString(int e, const char **t) { *t = "made up"; return 0; }
"""


def build_driver(folder: Path) -> None:
    """Compile libcuda.so.1 into a folder."""
    source = folder / "driver.c"
    rest = "".join(f"int {name}(void) {{ return 0; }}\n" for name in NOTHING.split())
    source.write_text(DRIVER + rest)
    command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o"]
    subprocess.run([*command, folder / "libcuda.so.1", source], check=True)


class HostDevice:
    """See DeviceMemory."""

    def write(self, address: int, data: memoryview) -> None:
        """See DeviceMemory.write."""
        ctypes.memmove(address, _address(data), len(data))

    def read(self, address: int, into: memoryview) -> None:
        """See DeviceMemory.read."""
        ctypes.memmove(_address(into), address, len(into))


def _address(view: memoryview) -> int:
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address


class Memory:
    """So many bytes of such a device, of one value at first."""

    def __init__(self, size: int, value: int = 0xEE) -> None:
        self.array = np.full(size, value, np.uint8)
        self.address: int = self.array.ctypes.data

    def __bytes__(self) -> bytes:
        return self.array.tobytes()


def written(path: Path, size: int, seed: int = 1) -> bytes:
    """Put such a file there."""
    content = np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()
    path.write_bytes(content)
    return content


class Contract:
    """What every way keeps. The fixture `open_files` opens paths as the ways do."""

    @pytest.mark.parametrize(
        ("position", "size"),
        [(0, 4 * KIB), (4 * KIB, 1), (13, 999), (5_000, 11 * MIB + 7), (8 * KIB, 8 * MIB)],
    )
    def test_reads(self, open_files: Open, tmp_path: Path, position: int, size: int) -> None:
        content, memory = written(tmp_path / "a", 12 * MIB), Memory(size + 2 * KIB)
        files = open_files([tmp_path / "a"])
        files.read(0, position, memory.address + KIB, size)
        files.close()
        around = b"\xee" * KIB
        assert bytes(memory) == around + content[position : position + size] + around

    def test_a_file_may_end_within_a_page(self, open_files: Open, tmp_path: Path) -> None:
        content, memory = written(tmp_path / "a", 10_000), Memory(10_000)
        files = open_files([tmp_path / "a"])
        files.read(0, 0, memory.address, 10_000)
        files.close()
        assert bytes(memory) == content

    @pytest.mark.parametrize("size", [1, 4 * KIB, 9 * MIB + 5])
    def test_writes(self, open_files: Open, tmp_path: Path, size: int) -> None:
        before, memory, other = written(tmp_path / "a", 12 * MIB), Memory(size), Memory(12 * MIB)
        files = open_files([tmp_path / "a"], writable=True)
        for _ in range(2):
            files.read(0, 0, other.address, 12 * MIB)  # no bounce buffer holds zeros any more
        files.write(0, 8 * KIB, memory.address, size)
        files.close()
        after = (tmp_path / "a").read_bytes()
        end = 8 * KIB + size
        page = -(-end // (4 * KIB)) * 4 * KIB
        assert after[: 8 * KIB] == before[: 8 * KIB]
        assert after[8 * KIB : end] == bytes(memory)
        assert after[end:page] in (before[end:page], bytes(page - end))
        assert after[page:] == before[page:]

    def test_files_are_told_by_place(self, open_files: Open, tmp_path: Path) -> None:
        paths = [tmp_path / str(at) for at in range(3)]
        contents = [written(path, 8 * KIB, at) for at, path in enumerate(paths)]
        files, memory = open_files(paths), Memory(8 * KIB)
        for at in (2, 0, 1):
            files.read(at, 0, memory.address, 8 * KIB)
            assert bytes(memory) == contents[at]
        files.close()

    def test_from_many_threads(self, open_files: Open, tmp_path: Path) -> None:
        """Twice as many as there are threads behind, with parts of several pieces."""
        content, size = written(tmp_path / "a", 48 * MIB), 6 * MIB
        files, memory = open_files([tmp_path / "a"]), Memory(48 * MIB)

        def read(at: int) -> None:
            for start in range(at * size, (at + 1) * size, 2 * MIB):
                files.read(0, start, memory.address + start, 2 * MIB)
            files.read(0, at * size, memory.address + at * size, size)

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(read, range(8)))
        files.close()
        assert bytes(memory) == content

    @pytest.mark.parametrize("position", [0, 8 * KIB, 12 * MIB])
    def test_a_truncated_file(self, open_files: Open, tmp_path: Path, position: int) -> None:
        written(tmp_path / "a", 12 * MIB)
        files, memory = open_files([tmp_path / "a"]), Memory(12 * MIB)
        os.truncate(tmp_path / "a", 5 * MIB)
        with pytest.raises(OSError) as caught:
            files.read(0, position, memory.address, 12 * MIB)
        assert caught.value.filename == str(tmp_path / "a")
        assert caught.value.errno and caught.value.strerror
        files.read(0, MIB, memory.address, 4 * MIB)
        files.close()
        assert bytes(memory)[: 4 * MIB] == (tmp_path / "a").read_bytes()[MIB:]

    def test_a_device_that_takes_nothing(self, open_files: Open) -> None:
        files, memory = open_files([Path("/dev/full")], writable=True), Memory(4 * KIB)
        with pytest.raises(OSError, match="No space left") as caught:
            files.write(0, 0, memory.address, 4 * KIB)
        files.close()
        assert caught.value.filename == "/dev/full"

    def test_a_path_that_is_not_there(self, open_files: Open, tmp_path: Path) -> None:
        (tmp_path / "a").touch()
        opened = len(os.listdir("/proc/self/fd"))
        with pytest.raises(FileNotFoundError) as caught:
            open_files([tmp_path / "a", tmp_path / "b"])
        assert caught.value.filename == str(tmp_path / "b")
        assert len(os.listdir("/proc/self/fd")) == opened

    def test_what_cannot_be_asked(self, open_files: Open, tmp_path: Path) -> None:
        content, memory = written(tmp_path / "a", 8 * KIB), Memory(8 * KIB)
        files = open_files([tmp_path / "a"])
        for file, position, size in ((1, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 0, 0), (0, 0, -1)):
            with pytest.raises(ValueError):
                files.read(file, position, memory.address, size)
        with pytest.raises(ValueError):
            files.write(0, 0, memory.address, 4 * KIB)
        files.close()
        files.close()
        with pytest.raises(ValueError):
            files.read(0, 0, memory.address, 1)
        files = open_files([tmp_path / "a"], writable=True)
        with pytest.raises(ValueError):
            files.write(0, 512, memory.address, 4 * KIB)
        files.close()
        assert (tmp_path / "a").read_bytes() == content
