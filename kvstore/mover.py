"""When bytes travel between the tiers: a bounded queue and worker threads.

The store orders, workers do (see `kvstore.carrier`), and every outcome goes back through one
function that is called from worker threads (`report`). What a client waits for overtakes everything
that is queued.

Each time a worker wakes it takes the interpreter from the event loop. So all that they wait for is
a `SimpleQueue`: it wakes one that has something to do, and the loop takes no lock to fill it.
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
Tokens = queue.SimpleQueue[None]


def workers(threads: int) -> int:
    """How many carry out moves of any kind where `threads` may write at a time."""
    return threads + max(1, threads // 4)


class Permits(contextlib.AbstractContextManager[None]):
    """So many at a time."""

    def __init__(self, count: int) -> None:
        self._free: Tokens = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(None)

    def __enter__(self) -> None:
        self._free.get()

    def __exit__(self, *_: object) -> None:
        self._free.put(None)


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
        self._carrier = Carrier(arena, nvme, hbm, straight, Permits(at_once))
        self._report = report
        self._queues: tuple[deque[Move], ...] = tuple(deque() for _ in MoveKind)
        # For each queued move there is a token, or a worker that ends a lazy move looks for it.
        self._tokens: dict[Sequence[MoveKind], Tokens] = {IN_MEMORY: queue.SimpleQueue()}
        if nvme:
            self._tokens[HERE] = queue.SimpleQueue()
        self._taking = threading.Lock()  # guards the next two, and what is taken from the queues
        self._lazy_running = 0
        self._held = 0  # tokens of lazy moves that have to wait for others to end
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
        for move in moves:
            move.seconds = started
            if move.kind is MoveKind.CLIMB:
                self._climbs.put(move)
                continue
            self._queues[move.kind].append(move)
            for kinds, tokens in self._tokens.items():
                if move.kind in kinds:
                    tokens.put(None)

    def queued(self) -> int:
        """Moves that no worker has taken up yet."""
        return sum(map(len, self._queues))

    def close(self, timeout_s: float) -> bool:
        """Drop what is queued, let what is running end. False when a worker hangs in the device."""
        deadline = time.monotonic() + timeout_s
        self._closing = True
        with self._taking:
            for moves in self._queues:
                moves.clear()
        for tokens in self._tokens.values():
            for _ in self._threads:
                tokens.put(None)
        self._climbs.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _next(self, kinds: Sequence[MoveKind], ended: Move | None) -> Move | None:
        """The next move of these kinds to do, after one has ended; waits for it. None when the
        mover closes."""
        tokens, free = self._tokens[kinds], False
        if ended is not None and ended.kind in LAZY:
            with self._taking:
                self._lazy_running -= 1
                free = self._held > 0
                self._held -= free
        while True:
            if not free:
                tokens.get()
            if self._closing:
                return None
            with self._taking:
                if (move := self._take(kinds)) is not None:
                    return move
            free = False

    def _take(self, kinds: Sequence[MoveKind]) -> Move | None:
        full, waits = self._lazy_running >= self._lazy_most, False
        for kind in kinds:
            moves, lazy = self._queues[kind], kind in LAZY
            if moves and lazy and full:
                waits = True
            elif moves:
                self._lazy_running += lazy
                return moves.popleft()
        self._held += waits
        return None

    def _work(self, kinds: Sequence[MoveKind]) -> None:
        # Where processors are scarce, the event loop and the clients go before the movers.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        move: Move | None = None
        while (move := self._next(kinds, move)) is not None:
            self._report(move, *self._carry_out(move))

    def _climb(self) -> None:
        while (move := self._climbs.get()) is not None and not self._closing:
            self._report(move, *self._carry_out(move))

    def _carry_out(self, move: Move) -> tuple[Outcome, str]:
        ended = self._carrier.carry_out(move)
        move.seconds = time.monotonic() - move.seconds
        return ended
