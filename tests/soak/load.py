"""Writers and readers of `tests.soak.kill`, which go on whatever happens to the daemon."""

from __future__ import annotations

import mmap
import random
import time
from collections import deque
from pathlib import Path

import numpy as np

from kvstore.client import Cache, Client, connect
from kvstore.errors import SessionLost, Unavailable
from tests.soak.blocks import (
    COMMITTED,
    FORGET,
    HUNG,
    LAYOUTS,
    LENGTH,
    LIVE,
    READ,
    TRIED,
    WRONG,
    Ledger,
    content,
    keys_of,
    wrong,
)
from tests.soak.figures import Overdue

TIMEOUT_S = 2.0
WAIT_S = 1.0  # what calls may wait for room or for loads; shorter than the timeout
AGAIN_S = 0.005  # after an attempt that found no daemon
GONE = (Unavailable, SessionLost)


class Page:
    """Shared by controller and writers: the number of the present pause, 0 for none, and the last
    pause that each writer has come to."""

    def __init__(self, writers: int) -> None:
        self._bytes = mmap.mmap(-1, max(mmap.PAGESIZE, writers + 1))
        self._last = 0

    def pause(self) -> None:
        """Writers are to stop after what they are doing now."""
        self._last = self._last % 255 + 1
        self._bytes[0] = self._last

    def resume(self) -> None:
        """Writers are to go on."""
        self._bytes[0] = 0

    def paused(self, writer: int) -> bool:
        """Whether this writer has come to the present pause."""
        return self._bytes[1 + writer] == self._last

    def stop_here(self, writer: int) -> bool:
        """Called by a writer between two steps: whether it is to pause."""
        now = self._bytes[0]
        if now:
            self._bytes[1 + writer] = now
        return bool(now)


def patient(socket: Path) -> Client:
    """A client, as soon as there is a daemon."""
    while True:
        try:
            return connect(socket, timeout_s=TIMEOUT_S)
        except GONE:
            time.sleep(AGAIN_S)


class Writer:
    """Stores chains, tells its ledger what it was told, and forgets the oldest. A new process goes
    on where the ledger of the one before it ends; no chain is used twice."""

    def __init__(self, socket: Path, number: int, path: Path, page: Page, pace_s: float) -> None:
        self._socket, self._number, self._page = socket, number, page
        self._pace_s = pace_s  # a rest after each step, for chains that are to grow old
        self._ledger = Ledger(path)
        self._overdue = Overdue()
        self._next = 1
        self._live: deque[int] = deque()
        begun = 0
        for kind, chain, _, _ in self._ledger.follow():
            if kind == TRIED:
                self._next = chain + 1
                self._live.append(chain)
            elif kind == FORGET and chain in self._live:
                self._live.remove(chain)
                begun = chain
        if begun:  # death may have come before the daemon heard of it
            self._live.appendleft(begun)

    def run(self) -> None:
        """For ever."""
        client = patient(self._socket)
        while True:
            if self._page.stop_here(self._number):
                time.sleep(0.002)
                continue
            try:
                with self._overdue.watch(TIMEOUT_S):
                    caches = [client.open(layout) for layout in LAYOUTS]
                if len(self._live) >= LIVE:
                    self._forget(caches)
                else:
                    self._store(caches)
                time.sleep(self._pace_s)
            except GONE:
                time.sleep(AGAIN_S)
            if self._overdue.count:
                self._ledger.note(HUNG, 0, int(self._overdue.longest_s * 1e3))
                self._overdue = Overdue()

    def _forget(self, caches: list[Cache]) -> None:
        chain = self._live[0]
        self._ledger.note(FORGET, chain)  # before: from here on it may be gone
        with self._overdue.watch(TIMEOUT_S):
            caches[chain % 2].forget(keys_of(self._number, chain))
        self._live.popleft()

    def _store(self, caches: list[Cache]) -> None:
        chain, self._next = self._next, self._next + 1
        self._ledger.note(TRIED, chain)
        self._live.append(chain)
        cache, keys = caches[chain % 2], keys_of(self._number, chain)
        blocks = [content(key, cache.layout.block_bytes) for key in keys]
        if chain // 2 % 2:
            with self._overdue.watch(TIMEOUT_S):
                stored = cache.put(keys, blocks, deadline_s=WAIT_S).stored
            with self._overdue.watch(TIMEOUT_S):
                there = cache.lookup(keys).length  # its answer proves that the commit was read
        else:
            with self._overdue.watch(TIMEOUT_S):
                reservation = cache.reserve(keys, deadline_s=WAIT_S)
            for at, index in enumerate(reservation.indices):
                reservation.numpy(at)[:] = blocks[index]
            with self._overdue.watch(TIMEOUT_S):
                stored = there = reservation.commit()
        if stored == there == LENGTH:
            self._ledger.note(COMMITTED, chain, LENGTH)


class Reader:
    """Reads what the ledgers of the writers tell of, and checks every byte."""

    def __init__(self, socket: Path, path: Path, ledgers: list[Path], seed: str) -> None:
        self._socket = socket
        self._ledger = Ledger(path)
        self._followed = [(Ledger(path), deque[int](maxlen=LIVE)) for path in ledgers]
        self._rng = random.Random(seed)
        self._overdue = Overdue()
        self._buffers = [
            [np.zeros(layout.block_bytes, np.uint8) for _ in range(LENGTH)] for layout in LAYOUTS
        ]

    def run(self) -> None:
        """For ever."""
        client = patient(self._socket)
        while True:
            try:
                with self._overdue.watch(TIMEOUT_S):
                    caches = [client.open(layout) for layout in LAYOUTS]
                self._read(caches)
            except GONE:
                time.sleep(AGAIN_S)
            if self._overdue.count:
                self._ledger.note(HUNG, 0, int(self._overdue.longest_s * 1e3))
                self._overdue = Overdue()

    def _read(self, caches: list[Cache]) -> None:
        writer = self._rng.randrange(len(self._followed))
        ledger, recent = self._followed[writer]
        recent.extend(chain for kind, chain, _, _ in ledger.follow() if kind == COMMITTED)
        if not recent:
            time.sleep(AGAIN_S)
            return
        chain = self._rng.choice(recent)
        cache, keys = caches[chain % 2], keys_of(writer, chain)[: self._rng.randint(1, LENGTH)]
        if self._rng.random() < 0.6:
            buffers = self._buffers[chain % 2][: len(keys)]
            with self._overdue.watch(TIMEOUT_S):
                length = cache.get(keys, buffers, deadline_s=WAIT_S).length
            bad = wrong(keys[:length], buffers[:length])
        else:
            with self._overdue.watch(TIMEOUT_S):
                grant = cache.acquire(keys, deadline_s=WAIT_S)
            length = grant.length
            time.sleep(self._rng.uniform(0, 0.005))  # to be killed while it holds a lease
            bad = wrong(keys[:length], [grant.numpy(at) for at in range(length)])
            if not grant.release():
                length = bad = 0  # to be thrown away
        self._ledger.note(READ, chain, length)
        if bad:
            self._ledger.note(WRONG, chain, bad)
