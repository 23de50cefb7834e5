"""Copies by several threads: every byte, nothing after the end, and the call near it."""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.client import copying
from kvstore.client.copying import LONG_BYTES, NEAR_END, PIECE_BYTES, SHARED_BYTES, Piece, copy_all
from tests.e2e.harness import wait_for

LONG_S = 20.0


@pytest.fixture
def helpers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Has copies made by so many threads beside the caller, whatever this host has."""

    def use(count: int) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count + 1)))
        monkeypatch.setattr(copying, "_HELPERS", copying._Helpers())

    yield use
    if (threads := copying._HELPERS._threads) is not None:
        threads.shutdown()


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("size", [0, 1, LONG_BYTES - 1, LONG_BYTES, SHARED_BYTES, 40 << 20])
def test_each_byte_gets_to_its_place(helpers: Callable[[int], None], count: int, size: int) -> None:
    """Parts of odd sizes, in another order at the target, with bytes between that stay."""
    helpers(count)
    draw = random.Random(size)
    source = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    cuts = sorted({0, size, *(draw.randint(0, size) for _ in range(7))})
    parts = list(itertools.pairwise(cuts))
    draw.shuffle(parts)
    target = np.zeros(size + len(parts) + 1, np.uint8)
    expected = np.zeros_like(target)
    copies, at = [], 1
    for start, end in parts:
        copies.append((target.ctypes.data + at, source.ctypes.data + start, end - start))
        expected[at : at + end - start] = source[start:end]
        at += end - start + 1
    copy_all(copies)
    assert np.array_equal(target, expected)


def test_large_copies_go_past_the_caches_where_that_could_be_built() -> None:
    buildable = shutil.which("cc") is not None and platform.machine() == "x86_64"
    assert copying.streams() == buildable


def without_avx2(folder: Path) -> Any:
    """The compiled function as it is on a processor that has no AVX2."""
    if not copying.streams():
        pytest.skip("no compiler, or another processor: copies are memmove here")
    source = Path(copying.__file__).with_name("streaming.c")
    library = folder / "streaming.so"
    options = ["-O2", "-shared", "-fPIC", "-D__builtin_cpu_supports(name)=0"]
    subprocess.run(["cc", *options, "-o", str(library), str(source)], check=True)
    return copying._function(ctypes.CDLL(str(library)), "kvstore_stream")


@pytest.mark.parametrize("how", ["as built", "16 bytes at a time", "memmove"])
def test_copies_at_any_place_and_of_any_length(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    """Nothing before or behind them changes, with the compiled function as without."""
    if how == "memmove":
        monkeypatch.setattr(copying, "_stream", None)
    elif how == "16 bytes at a time":
        monkeypatch.setattr(copying, "_stream", without_avx2(tmp_path))
    monkeypatch.setattr(copying, "STREAM_BYTES", 0)
    draw, rng = random.Random(3), np.random.default_rng(3)
    source = rng.integers(1, 256, 80_000, dtype=np.uint8)
    for _ in range(1_000):
        size, start, at = draw.randint(0, 70_000), draw.randint(0, 5_000), draw.randint(0, 300)
        target = np.zeros(size + 600, np.uint8)
        copying.copy(target.ctypes.data + at, source.ctypes.data + start, size)
        assert np.array_equal(target[at : at + size], source[start : start + size])
        assert not target[:at].any() and not target[at + size :].any()


@pytest.mark.parametrize("size", [LONG_BYTES, SHARED_BYTES + 5])
def test_the_end_is_announced_once_and_before_it(helpers: Callable[[int], None], size: int) -> None:
    helpers(0)
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    copied: list[int] = []
    copy_all(
        [(target.ctypes.data, source.ctypes.data, size)],
        near_end=lambda: copied.append(int(target.sum())),
    )
    assert len(copied) == 1
    assert size - NEAR_END * PIECE_BYTES <= copied[0] < size


def test_what_is_short_ends_unannounced() -> None:
    source, target = np.ones(8, np.uint8), np.zeros(8, np.uint8)
    called: list[bool] = []
    copy_all([(target.ctypes.data, source.ctypes.data, 8)], near_end=lambda: called.append(True))
    assert target.all() and not called


class Held:
    """A copy that stops in a helper until it is let go."""

    def __init__(self) -> None:
        self.go, self.inside = threading.Event(), threading.Event()
        self.returned = threading.Event()
        self.after: list[int] = []
        self._real = copying.copy

    def __call__(self, target: int, source: int, size: int) -> None:
        if threading.current_thread().name.startswith("kvstore-copy"):
            self.inside.set()
            assert self.go.wait(LONG_S)
        else:
            assert self.inside.wait(LONG_S)  # else the caller has done it all
        if self.returned.is_set():
            self.after.append(target)
        self._real(target, source, size)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    """In place of `copy`."""
    copy = Held()
    monkeypatch.setattr(copying, "copy", copy)
    return copy


def _copies(count: int) -> tuple[list[Piece], Any]:
    size = count * PIECE_BYTES
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    return [(target.ctypes.data, source.ctypes.data, size)], (source, target)


@pytest.mark.parametrize("known", [True, False])
def test_it_does_not_return_while_a_helper_writes(
    helpers: Callable[[int], None], held: Held, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Nor while one does of which it does not know: an executor may queue the work, and then fail
    to start a thread; a thread that it has already takes that up."""
    helpers(1)
    copies, (_, target) = _copies(32)
    if not known:
        real = ThreadPoolExecutor.submit

        def submit(self: Any, *work: Any) -> Any:
            real(self, *work)
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    caller = threading.Thread(target=copy_all, args=(copies,))
    caller.start()
    assert held.inside.wait(LONG_S)
    caller.join(0.1)
    assert caller.is_alive()
    held.go.set()
    caller.join(LONG_S)
    assert not caller.is_alive() and target.all()


def test_a_helper_that_fails_is_heard_of(
    helpers: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its piece is not copied: the slot must not be committed."""
    helpers(1)
    failed, real = threading.Event(), copying.copy

    def copy(target: int, source: int, size: int) -> None:
        if threading.current_thread().name.startswith("kvstore-copy"):
            failed.set()
            raise MemoryError
        assert failed.wait(LONG_S)
        real(target, source, size)

    monkeypatch.setattr(copying, "copy", copy)
    copies, _buffers = _copies(32)
    with pytest.raises(MemoryError):
        copy_all(copies)


def test_an_interrupt_in_the_copy_waits_for_who_still_writes(
    helpers: Callable[[int], None], held: Held
) -> None:
    """The slots may be somebody else's afterwards."""
    helpers(2)
    copies, _buffers = _copies(32)

    def stop() -> None:
        threading.Thread(target=let_go_when_returned, args=(held,)).start()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_all(copies, near_end=stop)
    _nothing_more(held)


def test_an_interrupt_in_the_wait_waits_on(helpers: Callable[[int], None], held: Held) -> None:
    """A real signal, when all pieces have been taken and one is still being written."""
    helpers(1)
    copies, (_, target) = _copies(32)

    def interrupt(signum: int, frame: object) -> None:
        threading.Thread(target=let_go_when_returned, args=(held,)).start()
        raise KeyboardInterrupt

    def when_waiting() -> None:
        last = target[-PIECE_BYTES:]
        assert held.inside.wait(LONG_S)
        wait_for(last.all, "the caller to have nothing more to do")
        signal.raise_signal(signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        waiting = threading.Thread(target=when_waiting)
        waiting.start()
        with pytest.raises(KeyboardInterrupt):
            copy_all(copies)
        _nothing_more(held)
        waiting.join(LONG_S)
    finally:
        signal.signal(signal.SIGUSR1, before)


def let_go_when_returned(held: Held) -> None:
    """Let the helper write on, after copy_all would have returned if it did not wait."""
    held.returned.wait(0.2)
    held.go.set()


def _nothing_more(held: Held) -> None:
    held.returned.set()
    threads = copying._HELPERS._threads
    assert threads is not None
    threads.shutdown()  # whatever they still had to do
    assert held.after == []


def test_an_interrupt_in_the_first_copy_does_not_break_the_next(
    helpers: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    helpers(1)
    copies, (_, target) = _copies(32)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as at_first:
        at_first.setattr(copying, "ThreadPoolExecutor", interrupted)
        with pytest.raises(KeyboardInterrupt):
            copy_all(copies)
    copy_all(copies)
    assert target.all()


def test_a_forked_child_copies_with_threads_of_its_own() -> None:
    program = """
import os, numpy as np
from kvstore.client import copying
from kvstore.client.copying import copy_all
os.sched_getaffinity = lambda _: {0, 1, 2}
source, target = np.ones(32 << 20, np.uint8), np.zeros(32 << 20, np.uint8)
copies = [(target.ctypes.data, source.ctypes.data, 32 << 20)]
copy_all(copies)
before = copying._HELPERS
child = os.fork()
if not child:
    target[:] = 0
    copy_all(copies)
    os._exit(0 if target.all() and copying._HELPERS is not before else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=LONG_S * 3)
