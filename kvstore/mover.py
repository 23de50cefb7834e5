"""When bytes travel between the tiers: a bounded queue and worker threads.

The store orders, workers do (see `kvstore.carrier`), and every outcome goes back through one
function that is called from worker threads (`report`). What a client waits for overtakes everything
that is queued.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from kvstore.carrier import Arena, Carrier, Device, Gpu, WayTo
from kvstore.orders import LAZY, Move, MoveKind, Outcome

NICE = 10
IN_MEMORY = (MoveKind.PROVE, MoveKind.SUM)  # need no device
HERE = tuple(kind for kind in MoveKind if kind is not MoveKind.CLIMB)

Report = Callable[[Move, Outcome, str], None]


def workers(threads: int) -> int:
    """How many carry out moves of any kind where `threads` may write at a time."""
    return threads + max(1, threads // 4)


class Mover:
    """Worker threads over one arena and one NVMe tier, or over the arena alone.

    So many spills and checks as there are `threads` may be under way, and a quarter more workers
    are there for loads, which so never wait for a slow write to end. Checksums of spills occupy
    half of the processors, so that neither the loop nor clients wait for one. One worker more does
    only what needs no device: while the device hangs, what is in DRAM can still be proved. Copies
    to GPUs have a worker for themselves, which the others know nothing of. The queue is bounded by
    whoever orders: the store has a bound on each kind.
    """

    def __init__(
        self,
        arena: Arena,
        nvme: Device | None,
        report: Report,
        *,
        threads: int,
        name: str,
        hbm: Sequence[Gpu] = (),
        straight: WayTo = lambda device: None,
    ) -> None:
        at_once = max(1, len(os.sched_getaffinity(0)) // 2)
        self._carrier = Carrier(arena, nvme, hbm, straight, threading.Semaphore(at_once))
        self._report = report
        self._queues: tuple[deque[Move], ...] = tuple(deque() for _ in MoveKind)
        self._wake = threading.Condition()
        self._lazy_running = 0
        self._lazy_most = threads
        self._closing = False
        self._threads = [
            threading.Thread(
                target=self._work, args=(kinds,), name=f"mover-{name}-{at}", daemon=True
            )
            for at, kinds in enumerate([IN_MEMORY] + [HERE] * (workers(threads) if nvme else 0))
        ]
        self._climbs: queue.SimpleQueue[Move | None] = queue.SimpleQueue()
        if hbm:
            self._threads.append(
                threading.Thread(target=self._climb, name=f"mover-{name}-hbm", daemon=True)
            )
        for thread in self._threads:
            thread.start()

    def submit(self, moves: Sequence[Move]) -> None:
        """Queue moves. Never waits."""
        started = time.monotonic()
        with self._wake:
            for move in moves:
                move.seconds = started
                if move.kind is MoveKind.CLIMB:
                    self._climbs.put(move)
                else:
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
        self._climbs.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _next(self, kinds: Sequence[MoveKind]) -> Move | None:
        """The next move of these kinds to do; waits for one. None when the mover closes."""
        with self._wake:
            while not self._closing:
                for kind in kinds:
                    queue, lazy = self._queues[kind], kind in LAZY
                    if queue and not (lazy and self._lazy_running >= self._lazy_most):
                        self._lazy_running += lazy
                        return queue.popleft()
                if len(kinds) < len(HERE):
                    self._wake.notify()  # what woke us may be for somebody who does every kind
                self._wake.wait()
            return None

    def _work(self, kinds: Sequence[MoveKind]) -> None:
        # Where processors are scarce, the event loop and the clients go before the movers.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while (move := self._next(kinds)) is not None:
            outcome, problem = self._carry_out(move)
            if move.kind in LAZY:
                with self._wake:
                    self._lazy_running -= 1
                    self._wake.notify()
            self._report(move, outcome, problem)

    def _climb(self) -> None:
        while (move := self._climbs.get()) is not None and not self._closing:
            self._report(move, *self._carry_out(move))

    def _carry_out(self, move: Move) -> tuple[Outcome, str]:
        ended = self._carrier.carry_out(move)
        move.seconds = time.monotonic() - move.seconds
        return ended
