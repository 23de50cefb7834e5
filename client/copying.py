"""Copies between addresses of this process, never holding the interpreter lock.

Large ones go past the caches (`streaming.c`) where that was built; the rest is memmove. One core
moves a part of what the memory can: large copies are cut into pieces that a few threads take one by
one. The caller copies as well, so a helper that is late costs nothing; and it stays until the last
piece is done, also when it is interrupted: nobody writes to a slot afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import operator
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Piece = tuple[int, int, int]  # target, source, bytes

PIECE_BYTES = 1 << 20
LONG_BYTES = 4 << 20  # this takes long enough for a daemon to fall asleep
NEAR_END = 3  # pieces: some 200 us
SHARED_BYTES = 16 << 20  # from here on a helper is worth waking
THREADS_MAX = 4  # the caller among them: they are the engine's cores
STREAM_BYTES = 128 << 10  # a piece that is smaller may be in a cache when it is used next


def _function(library: ctypes.CDLL, name: str) -> Any:
    found = library[name]
    found.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    found.restype = None
    return found


def _streaming() -> Any:
    """`kvstore_stream`; None where it was not built: no compiler, or a processor without it."""
    try:
        library = ctypes.CDLL(str(Path(__file__).with_name("streaming.abi3.so")))
    except OSError:
        return None
    return _function(library, "kvstore_stream")


memmove = _function(ctypes.CDLL(None), "memmove")
_stream = _streaming()


def streams() -> bool:
    """Whether large copies go past the caches here."""
    return _stream is not None


def copy(target: int, source: int, size: int) -> None:
    """Copy bytes between addresses."""
    if size >= STREAM_BYTES and _stream is not None:
        _stream(target, source, size)
    else:
        memmove(target, source, size)


def copy_all(copies: Sequence[Piece], near_end: Callable[[], None] | None = None) -> None:
    """Copy, for each of these, so many bytes to a target from a source; shortly before the end of
    what takes a while, call `near_end`, which must be quick and may not raise."""
    size = sum([size for _, _, size in copies])
    if size < LONG_BYTES:
        _take(iter(copies))
        return
    pieces = iter([piece for one in copies for piece in _cut(*one)])
    if size < SHARED_BYTES:
        _take(pieces, near_end)
    else:
        _HELPERS.share(pieces, near_end)


class _Helpers:
    """Threads that take pieces beside the callers; begun when there is something to share."""

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._count: int | None = None
        self._threads: ThreadPoolExecutor | None = None

    def share(self, pieces: Iterator[Piece], near_end: Callable[[], None] | None) -> None:
        """Copy the pieces: when this returns all are done, when it raises none is under way."""
        shared = _Shared(pieces)
        interrupt: BaseException | None = None
        try:
            with contextlib.suppress(RuntimeError):  # no thread is to be had, as at exit
                self._begin(shared)
            _take(pieces, near_end)
        finally:
            while True:  # here and not in a function: to enter one can be interrupted
                try:
                    for _ in pieces:
                        pass
                    for busy in shared.crew:  # who is not in it by now finds nothing to take
                        with busy:
                            pass
                    break
                except BaseException as error:
                    interrupt = error
        if interrupt is not None:
            raise interrupt
        if shared.failed:
            raise shared.failed[0]

    def _begin(self, shared: _Shared) -> None:
        with self._starting:
            if self._count is None:
                count = min(THREADS_MAX, len(os.sched_getaffinity(0))) - 1
                if count:
                    self._threads = ThreadPoolExecutor(count, "kvstore-copy")
                self._count = count
        for _ in range(self._count):
            assert self._threads is not None
            self._threads.submit(shared.help)


class _Shared:
    """Pieces of one caller. Who helps is in the crew, with a lock that it holds, before it takes
    the first: a caller who sees no piece left and every lock free knows that nobody copies, and
    need not know who was ever asked to."""

    def __init__(self, pieces: Iterator[Piece]) -> None:
        self.pieces = pieces
        self.crew: list[threading.Lock] = []
        self.failed: list[BaseException] = []

    def help(self) -> None:
        """Take pieces until there are none; by a thread of the pool."""
        busy = threading.Lock()
        with busy:
            self.crew.append(busy)
            try:
                _take(self.pieces)
            except BaseException as error:
                self.failed.append(error)


def _take(pieces: Iterator[Piece], near_end: Callable[[], None] | None = None) -> None:
    for target, source, size in pieces:
        if near_end is not None and operator.length_hint(pieces) < NEAR_END:
            near_end()
            near_end = None
        copy(target, source, size)


def _cut(target: int, source: int, size: int) -> Iterator[Piece]:
    for at in range(0, size, PIECE_BYTES):
        yield target + at, source + at, min(PIECE_BYTES, size - at)


_HELPERS = _Helpers()


def _after_fork() -> None:
    """The child has none of the threads."""
    global _HELPERS
    _HELPERS = _Helpers()


os.register_at_fork(after_in_child=_after_fork)
