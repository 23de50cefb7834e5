"""How bytes travel between DRAM and NVMe: a bounded queue, worker threads, checksums on every read.

The store orders, workers do, and every outcome goes back through one function that is called from
worker threads (`report`). A load that a client waits for overtakes everything that is queued.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from mmap import mmap
from typing import Protocol

from kvstore.checksums import shard_sums
from kvstore.orders import Move, MoveKind, Outcome
from kvstore.tiers.base import Tier
from kvstore.tiers.dram import DramArena
from kvstore.types import SLOT_ALIGNMENT

NICE = 10

Report = Callable[[Move, Outcome, str], None]


class Device(Tier, Protocol):
    """A tier that can be asked whether it works at all."""

    def probe(self) -> None:
        """Write and read back something that is no block; OSError when that fails."""


class Mover:
    """Worker threads over one arena and one NVMe tier.

    Spills and checks may occupy three quarters of the workers, so that a load never waits for a
    slow write to end. The queue is bounded by whoever orders: the store has a bound on each kind.
    """

    def __init__(
        self, arena: DramArena, nvme: Device, report: Report, *, threads: int, name: str
    ) -> None:
        self._arena = arena
        self._nvme = nvme
        self._report = report
        self._queues: tuple[deque[Move], ...] = tuple(deque() for _ in MoveKind)
        self._wake = threading.Condition()
        self._lazy_running = 0
        self._lazy_most = max(1, threads - max(1, threads // 4))
        self._closing = False
        self._threads = [
            threading.Thread(target=self._work, name=f"mover-{name}-{at}", daemon=True)
            for at in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, moves: Sequence[Move]) -> None:
        """Queue moves. Never waits."""
        started = time.monotonic()
        with self._wake:
            for move in moves:
                move.seconds = started
                self._queues[move.kind].append(move)
            self._wake.notify(len(moves))

    def queued(self) -> int:
        """Moves that no worker has taken up yet."""
        return sum(map(len, self._queues))

    def close(self, timeout_s: float) -> bool:
        """Drop what is queued, let what is running end. False when a worker hangs in the device."""
        deadline = time.monotonic() + timeout_s
        with self._wake:
            self._closing = True
            for queue in self._queues:
                queue.clear()
            self._wake.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _next(self) -> Move | None:
        """The next move to do; waits for one. None when the mover closes."""
        with self._wake:
            while not self._closing:
                for kind, queue in zip(MoveKind, self._queues, strict=True):
                    lazy = kind >= MoveKind.SPILL
                    if queue and not (lazy and self._lazy_running >= self._lazy_most):
                        self._lazy_running += lazy
                        return queue.popleft()
                self._wake.wait()
            return None

    def _work(self) -> None:
        # Where processors are scarce, the event loop and the clients go before the movers.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        scratch: mmap | None = None
        while (move := self._next()) is not None:
            problem = ""
            try:
                if move.kind is MoveKind.VERIFY and move.entry is not None:
                    if scratch is None or len(scratch) < move.entry.slot_bytes:
                        scratch = mmap(-1, move.entry.slot_bytes)
                    outcome = self._read(move, memoryview(scratch))
                else:
                    outcome = self._carry_out(move)
            except OSError as error:
                outcome, problem = Outcome.FAILED, str(error)
            move.seconds = time.monotonic() - move.seconds
            if move.kind >= MoveKind.SPILL:
                with self._wake:
                    self._lazy_running -= 1
                    self._wake.notify()
            self._report(move, outcome, problem)

    def _carry_out(self, move: Move) -> Outcome:
        if move.entry is None:
            self._nvme.probe()
            return Outcome.DONE
        slot = self._arena.view(move.dram * SLOT_ALIGNMENT, move.entry.slot_bytes)
        try:
            if move.kind is MoveKind.SPILL:
                # The checksum is taken first: bytes that change meanwhile will not verify.
                move.sums = self._sums(move, slot)
                self._nvme.write(move.nvme * SLOT_ALIGNMENT, slot)
                return Outcome.DONE
            return self._read(move, slot)
        finally:
            slot.release()

    def _read(self, move: Move, into: memoryview) -> Outcome:
        assert move.entry is not None
        into = into[: move.entry.slot_bytes]
        try:
            self._nvme.read(move.nvme * SLOT_ALIGNMENT, into)
            return Outcome.DONE if self._sums(move, into) == move.sums else Outcome.CORRUPT
        finally:
            into.release()

    @staticmethod
    def _sums(move: Move, slot: memoryview) -> bytes:
        assert move.entry is not None
        layout = move.entry.layout
        return shard_sums(move.entry.fingerprint, move.key, slot, layout.shards, layout.shard_bytes)
