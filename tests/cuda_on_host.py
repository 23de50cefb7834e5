"""A CUDA device that is the host: kernels compiled by g++, and as much of cupy as launches them.

It shows what a kernel computes and where it reads, not what a device makes of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HEADER = Path(__file__).with_name("cuda_on_host.h")
# How the kernel is called with what a launch is given.
CALLS = {
    "kvstore_sums": "kvstore_sums(*(word**)given[0], *(int*)given[1], *(word*)given[2]);",
}


class Kernel:
    """One compiled kernel. `seed` decides in which order its threads run."""

    def __init__(self, source: str, name: str, folder: Path, *options: str) -> None:
        text = folder / f"{name}.cpp"
        text.write_text(
            f'#include "{HEADER}"\n{source}\nstatic void kernel(void** given) {{ {CALLS[name]} }}\n'
        )
        library = text.with_suffix(".so")
        command = ["g++", "-std=c++17", "-O2", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
        subprocess.run(
            [*command, *options, text, "-o", library],
            check=True,
            timeout=120,
        )
        self._library = ctypes.CDLL(str(library))
        self._library.launch.restype = ctypes.c_bool
        self._library.launch.argtypes = (*3 * (ctypes.c_uint,), ctypes.c_void_p)
        self.seed = 0
        self.launches: list[int] = []  # the thread blocks of each

    def launch(self, blocks: int, threads: int, given: int) -> None:
        """Run it, with an array of the addresses of its parameters."""
        self.launches.append(blocks)
        together = self._library.launch(blocks, threads, self.seed, given)
        assert together, "threads of a block wait at different barriers"


class HostCupy:
    """Stands in for the module cupy, for one kernel."""

    class CUDARuntimeError(RuntimeError):
        """What the runtime raises."""

    class CUDADriverError(RuntimeError):
        """What the driver raises."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.compiled = 0
        self.streams: list[int] = []  # that something was launched on
        self.devices: list[int] = []  # that were made the current one
        self.lost = False
        self.cuda = SimpleNamespace(
            Device=self._device,
            alloc_pinned_memory=bytearray,
            driver=SimpleNamespace(launchKernel=self._launch, CUDADriverError=self.CUDADriverError),
            Stream=self._stream,
            runtime=SimpleNamespace(CUDARuntimeError=self.CUDARuntimeError),
        )

    def RawKernel(self, source: str, name: str) -> Any:
        """A kernel that the device runs."""
        assert name in source
        return SimpleNamespace(compile=self._compile, kernel=SimpleNamespace(ptr=1))

    def _compile(self) -> None:
        self.compiled += 1

    @contextlib.contextmanager
    def _device(self, number: int) -> Iterator[None]:
        self.devices.append(number)
        yield

    def _launch(self, kernel: int, *shape_and_more: int) -> None:
        blocks, *ones, threads, y, z, shared, stream, given, extra = shape_and_more
        assert (kernel, ones, y, z, shared, extra) == (1, [1, 1], 1, 1, 0, 0)
        self.streams.append(stream)
        self.kernel.launch(blocks, threads, given)

    def _stream(self, *, non_blocking: bool) -> Any:
        assert non_blocking, "it would wait for the engine's work, and the engine for it"
        return SimpleNamespace(ptr=77, synchronize=self._wait)

    def _wait(self) -> None:
        if self.lost:
            raise self.CUDARuntimeError("cudaErrorIllegalAddress")
