"""Bytes between files and device memory: the contract of both ways, their failures, the choice.

No device is needed: its memory is the host's, see tests/device_files.py.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvstore.cufile import BouncedFiles, Bound, CuFiles, finish
from kvstore.cufile_choice import Choice, measure
from kvstore.types import KIB, MIB
from tests.device_files import Contract, HostDevice, Memory, Open, build_driver, written

ROOT = Path(__file__).parent.parent


@pytest.fixture
def open_files() -> Open:
    def open_files(paths: Sequence[Path], *, writable: bool = False) -> BouncedFiles:
        return BouncedFiles(paths, HostDevice(), writable=writable, threads=4)

    return open_files


class TestBouncedFiles(Contract):
    """See Contract."""


def test_kvikio_s_own_code_on_host_memory_under_a_made_up_driver(tmp_path: Path) -> None:
    """The contract for CuFiles, see cufile_on_host.py. No CUDA, no cuFile: it proves our use of
    kvikio and kvikio's compatibility mode, nothing about GPUDirect Storage."""
    build_driver(tmp_path)
    env = {name: value for name, value in os.environ.items() if not name.startswith("KVIKIO_")}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cufile_on_host.py"],
        cwd=ROOT,
        env={**env, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "passed" in ran.stdout and "skipped" not in ran.stdout


# --- the bounced way -----------------------------------------------------------------------------


def test_the_page_cache_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    try:
        os.close(os.open(tmp_path / "a", os.O_RDONLY | os.O_DIRECT))
        wanted = os.O_DIRECT
    except OSError:
        wanted = 0
    files = BouncedFiles([tmp_path / "a"], HostDevice())
    assert fcntl.fcntl(files._files[0], fcntl.F_GETFL) & os.O_DIRECT == wanted
    files.close()


@pytest.mark.parametrize("most", [5_000, 70_000])
def test_short_reads_and_writes(
    open_files: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    read, write = os.preadv, os.pwritev
    content, memory = written(tmp_path / "a", MIB), Memory(300_000)
    (tmp_path / "b").write_bytes(bytes(MIB))
    # The device gives whole pages; the rest of what was asked for is said to be missing.
    monkeypatch.setattr(os, "preadv", lambda *call: min(most, read(*call)))
    monkeypatch.setattr(os, "pwritev", lambda *call: min(most, write(*call)))
    files = open_files([tmp_path / "a", tmp_path / "b"], writable=True)
    files.read(0, 4_097, memory.address, 300_000)
    files.write(1, 4 * KIB, memory.address, 300_000)
    files.close()
    assert bytes(memory) == content[4_097:304_097]
    assert (tmp_path / "b").read_bytes()[4 * KIB :][:300_000] == bytes(memory)


def test_a_file_that_takes_nothing_more(
    open_files: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(bytes(8 * KIB))
    monkeypatch.setattr(os, "pwritev", lambda *call: 0)
    files = open_files([tmp_path / "a"], writable=True)
    with pytest.raises(OSError, match="short write"):
        files.write(0, 0, Memory(4 * KIB).address, 4 * KIB)
    files.close()


def test_a_lost_device(tmp_path: Path) -> None:
    """All its bounce buffers are there again after more failures than there are buffers."""

    class Lost(HostDevice):
        lost = True

        def write(self, address: int, data: memoryview) -> None:
            if self.lost:
                raise OSError(errno.EIO, "it has fallen off the bus")
            super().write(address, data)

    content, memory, device = written(tmp_path / "a", 9 * MIB), Memory(9 * MIB), Lost()
    files = BouncedFiles([tmp_path / "a"], device, threads=2)
    for _ in range(3):
        with pytest.raises(OSError, match="fallen off"):
            files.read(0, 0, memory.address, 9 * MIB)
    device.lost = False
    files.read(0, 0, memory.address, 9 * MIB)
    files.close()
    assert bytes(memory) == content


# --- cuFile's way --------------------------------------------------------------------------------


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(OSError, match="install the NVIDIA driver") as caught:
        CuFiles([], 0)
    assert caught.value.errno == errno.ENODEV


def test_without_kvikio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: ctypes.pythonapi)
    monkeypatch.setitem(sys.modules, "kvikio", None)
    with pytest.raises(OSError, match=r"install kvstore\[gds\]") as caught:
        CuFiles([], 0)
    assert caught.value.errno == errno.ENODEV


class Future:
    """Of a piece that moves so many bytes, or fails."""

    def __init__(self, moved: int | Exception, ended: list[Future]) -> None:
        self._moved = moved
        self._ended = ended

    def get(self) -> int:
        self._ended.append(self)
        if isinstance(self._moved, Exception):
            raise self._moved
        return self._moved


@pytest.mark.parametrize(
    ("outcomes", "begun", "failure"),
    [
        ([8, 8, 8], 3, None),
        ([8, RuntimeError("gone"), 8], 3, "gone"),
        ([8, 7, RuntimeError("gone")], 3, "moved 7 of 8"),
        ([8, 8, "refused"], 2, "refused"),
    ],
)
def test_every_piece_has_ended_when_one_fails(
    outcomes: list[Any], begun: int, failure: str | None
) -> None:
    """Else it would arrive in memory that is used for something else by then."""
    left, ended = list(outcomes), list[Future]()

    def begin(memory: Any, size: int, position: int, task_bytes: int) -> Future:
        assert memory.__cuda_array_interface__["data"] == (1_000 + position, False)
        assert memory.__cuda_array_interface__["shape"] == (size,)
        if (outcome := left.pop(0)) == "refused":
            raise RuntimeError(outcome)
        return Future(outcome, ended)

    pieces = [(at, 1_000 + at, 8) for at in (0, 8, 16)]
    if failure is None:
        finish(begin, pieces, 8)
    else:
        with pytest.raises((OSError, RuntimeError), match=failure):
            finish(begin, pieces, 8)
    assert len(ended) == begun


def test_the_bound_holds() -> None:
    bound, lock, use, page = Bound(5), threading.Lock(), [0, 0], bytes(64 * KIB)

    def hold(count: int) -> None:
        for _ in range(200):
            with bound.hold(count):
                with lock:
                    use[0] += count
                    use[1] = max(use)
                hashlib.sha256(page)  # without the interpreter lock: others come in if they can
                with lock:
                    use[0] -= count

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(hold, (1, 2, 3, 4, 5, 5)))
    assert use[0] == 0 and use[1] == 5


# --- the choice ----------------------------------------------------------------------------------


class Clock:
    """Time that passes by reading."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Fake:
    """See DeviceFiles: it reads at a set speed, and fails where that is None."""

    direct = False

    def __init__(self, name: str, clock: Clock, speed: float | None, how: str = "made up") -> None:
        self.name = name
        self.how = how
        self.closed = False
        self.seconds = 0.0
        self.places: list[tuple[int, int, int]] = []
        self._clock = clock
        self._speed = speed

    def read(self, file: int, position: int, address: int, size: int) -> None:
        assert not self.closed and address == 4_096
        if self._speed is None:
            raise OSError(errno.EIO, f"{self.name} is broken", "/blocks")
        self.places.append((file, position, size))
        self.seconds += size / self._speed
        self._clock.now += size / self._speed

    def write(self, file: int, position: int, address: int, size: int) -> None:
        raise AssertionError("stored blocks must not be touched")

    def close(self) -> None:
        assert not self.closed
        self.closed = True


SAMPLE = [(number % 2, number * MIB, MIB) for number in range(100_000)]


def choose(posix: Fake, gds: Fake | OSError, clock: Clock) -> Choice:
    def open_gds() -> Fake:
        if isinstance(gds, OSError):
            raise gds
        return gds

    return measure("auto", lambda: posix, open_gds, sample=SAMPLE, into=[4_096], clock=clock)


@pytest.mark.parametrize(
    ("posix_speed", "gds_speed", "engine"),
    [(2e9, 3e9, "gds"), (3e9, 2e9, "posix"), (MIB * 1024.0, MIB * 1024.0, "posix")],
)
def test_the_faster_is_taken(posix_speed: float, gds_speed: float, engine: str) -> None:
    clock = Clock()
    posix = Fake("posix", clock, posix_speed, "preadv and a copy")
    gds = Fake("gds", clock, gds_speed, "cuFile in compatibility mode")
    choice = choose(posix, gds, clock)
    assert choice.engine == choice.files.name == engine
    assert (posix.closed, gds.closed) == (engine != "posix", engine != "gds")
    assert choice.read_bytes_per_s == pytest.approx({"posix": posix_speed, "gds": gds_speed})
    assert choice.why == (
        f"{engine} is taken: posix (preadv and a copy) read {posix_speed / 1e9:.2f} GB/s, "
        f"gds (cuFile in compatibility mode) {gds_speed / 1e9:.2f} GB/s"
    )
    assert 0.4 <= posix.seconds < 0.41 and 0.4 <= gds.seconds < 0.41, "a second is the most"
    assert not set(posix.places) & set(gds.places), "one would find what the other left in caches"


def test_gds_cannot_be_had() -> None:
    clock = Clock()
    posix = Fake("posix", clock, 1e9)
    choice = choose(posix, OSError(errno.ENODEV, "kvikio cannot be loaded: install it"), clock)
    assert (choice.files, choice.engine, choice.read_bytes_per_s) == (posix, "posix", {})
    assert choice.why == ("posix is taken, gds cannot be had: kvikio cannot be loaded: install it")
    assert not posix.places, "there is nothing to compare"


def test_gds_is_there_and_broken() -> None:
    clock = Clock()
    posix, gds = Fake("posix", clock, 1e9), Fake("gds", clock, None)
    choice = choose(posix, gds, clock)
    assert (choice.files, choice.engine, gds.closed, posix.closed) == (posix, "posix", True, False)
    assert choice.why == "posix is taken, gds (made up) failed: /blocks: gds is broken"


def test_the_files_cannot_be_read() -> None:
    clock = Clock()
    posix, gds = Fake("posix", clock, None), Fake("gds", clock, 1e9)
    with pytest.raises(OSError, match="posix is broken"):
        choose(posix, gds, clock)
    assert posix.closed and gds.closed


def test_what_is_asked_for_is_not_measured() -> None:
    clock = Clock()
    posix, gds = Fake("posix", clock, 1e9), Fake("gds", clock, 2e9, "GPUDirect Storage")

    def refuse() -> Fake:
        raise OSError(errno.ENODEV, "no kvikio")

    none: dict[str, Any] = {"sample": (), "into": ()}
    assert measure("posix", lambda: posix, refuse, **none).files is posix
    choice = measure("gds", refuse, lambda: gds, **none)
    assert choice.files is gds and choice.why.endswith("asked for: GPUDirect Storage")
    with pytest.raises(OSError, match="no kvikio"):
        measure("gds", lambda: posix, refuse, **none)
    assert not posix.places and not gds.places


def test_nothing_to_read_is_an_error_that_leaves_nothing_open() -> None:
    clock = Clock()
    posix, gds = Fake("posix", clock, 1e9), Fake("gds", clock, 1e9)
    with pytest.raises(ValueError, match="nothing to read"):
        measure("auto", lambda: posix, lambda: gds, sample=(), into=(1,), clock=clock)
    assert posix.closed and gds.closed


def test_real_files_with_several_threads(tmp_path: Path) -> None:
    written(tmp_path / "a", 16 * MIB)
    memory = Memory(4 * MIB)

    def files() -> BouncedFiles:
        return BouncedFiles([tmp_path / "a"], HostDevice())

    choice = measure(
        "auto",
        files,
        files,
        sample=[(0, at * MIB, MIB) for at in range(16)],
        into=[memory.address + at * MIB for at in range(4)],
        seconds=0.05,
    )
    choice.files.close()
    assert all(speed > 0 for speed in choice.read_bytes_per_s.values())
