"""Copies by several threads: every byte, nothing after the end, and the call near it."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import numpy as np
import pytest

from kvstore.client import copying
from kvstore.client.copying import LONG_BYTES, NEAR_END, PIECE_BYTES, SHARED_BYTES, Piece, copy_all

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
    """A memmove that stops in a helper until it is let go."""

    def __init__(self) -> None:
        self.go, self.inside = threading.Event(), threading.Event()
        self.after: list[int] = []
        self.returned = False
        self._real = copying._memmove

    def __call__(self, target: int, source: int, size: int) -> None:
        if threading.current_thread().name.startswith("kvstore-copy"):
            self.inside.set()
            assert self.go.wait(LONG_S)
        else:
            assert self.inside.wait(LONG_S)  # else the caller has done it all
        if self.returned:
            self.after.append(target)
        self._real(target, source, size)


def _copies(count: int) -> tuple[list[Piece], Any]:
    size = count * PIECE_BYTES
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    return [(target.ctypes.data, source.ctypes.data, size)], (source, target)


def test_it_does_not_return_while_a_helper_writes(
    helpers: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    helpers(1)
    held = Held()
    monkeypatch.setattr(copying, "_memmove", held)
    copies, (_, target) = _copies(32)
    caller = threading.Thread(target=copy_all, args=(copies,))
    caller.start()
    assert held.inside.wait(LONG_S)
    caller.join(0.1)
    assert caller.is_alive()
    held.go.set()
    caller.join(LONG_S)
    assert not caller.is_alive() and target.all()


@pytest.mark.parametrize("where", ["copying", "waiting"])
def test_an_interrupt_waits_for_who_still_writes(
    helpers: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The slots may be somebody else's afterwards."""
    helpers(2)
    held = Held()
    monkeypatch.setattr(copying, "_memmove", held)
    copies, _buffers = _copies(32)
    waits: list[bool] = []
    real_wait = futures.wait

    def wait(pending: Any) -> Any:
        waits.append(True)
        if where == "waiting" and len(waits) == 1:
            raise KeyboardInterrupt
        held.go.set()
        return real_wait(pending)

    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(copying, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        copy_all(copies, near_end=stop if where == "copying" else None)
    held.returned = True
    threads = copying._HELPERS._threads
    assert threads is not None
    threads.shutdown()  # whatever they still had to do
    assert held.after == []
    assert len(waits) == (2 if where == "waiting" else 1)


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
