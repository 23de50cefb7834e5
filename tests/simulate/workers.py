"""The mover in the simulation: the real steps of each move, at virtual times.

A worker takes a move up, and from then on the place that it fills holds anything; at some moment
after that the real code runs; at a later one the daemon hears of it.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from kvstore.carrier import Carrier
from kvstore.mover import IN_MEMORY, workers
from kvstore.orders import LAZY, Move, MoveKind, Outcome
from kvstore.types import SLOT_ALIGNMENT
from tests.simulate.clock import Process
from tests.simulate.media import Arena

Report = Callable[[Move, Outcome, str], None]
FILLS = (MoveKind.LOAD, MoveKind.PREFETCH)
JUNK = b"\xa5"


class Workers:
    """With the interface of a mover, as the hands use it."""

    def __init__(
        self,
        arena: Arena,
        drive: Any,
        process: Process,
        chance: random.Random,
        marks: Counter[str],
        report: Report,
        threads: int,
    ) -> None:
        self.under_way: list[Move] = []  # taken up, not carried out yet
        self._done: list[Move] = []  # carried out, not reported yet
        self._ended_at = 0.0
        self.seconds = 0.002  # that a move takes, about
        self._arena = arena
        self._drive = drive
        self._process = process
        self._chance = chance
        self._marks = marks
        self._report = report
        self._workers = workers(threads) + 1 if drive is not None else 1
        self._idle = list(range(self._workers))  # 0 does only what needs no device
        self._lazy_most = threads
        self._lazy_running = 0
        self._queues: tuple[deque[Move], ...] = tuple(deque() for _ in MoveKind)
        self._carrier = Carrier(arena, drive)

    def submit(self, moves: Sequence[Move]) -> None:
        """See Mover.submit."""
        if not self._device_works():
            self._ended_at = self._process.time()
        for move in moves:
            move.seconds = self._process.time()
            self._queues[move.kind].append(move)
        self._take_up()

    def queued(self) -> int:
        """See Mover.queued."""
        return sum(map(len, self._queues))

    def busy(self) -> bool:
        """Whether any move has not been reported yet."""
        return len(self._idle) < self._workers or self.queued() > 0

    def heard(self) -> None:
        """The daemon has heard of an end: later than it was, if it was stopped in between."""
        self._ended_at = self._process.time()

    def hangs_s(self) -> float:
        """For how long the device has ended nothing, though something is to be done there."""
        return self._process.time() - self._ended_at if self._device_works() else 0.0

    def _device_works(self) -> bool:
        waiting = (move for queue in self._queues for move in queue)
        kinds = {move.kind for move in (*waiting, *self.under_way, *self._done)}
        return bool(kinds - {*IN_MEMORY, MoveKind.PROBE})

    def die(self) -> None:
        """The process was killed: what the device has begun, it may still end."""
        for move in self.under_way:
            if self._chance.random() < 0.5:
                self._marks["move ended after its daemon"] += 1
                self._carry_out(move)
        self.under_way.clear()

    def _next(self) -> tuple[Move, int] | None:
        """What an idle worker takes up, and which worker that is."""
        for worker in self._idle:
            for kind in MoveKind if worker else IN_MEMORY:
                queue, lazy = self._queues[kind], kind in LAZY
                if queue and not (lazy and self._lazy_running >= self._lazy_most):
                    self._lazy_running += lazy
                    self._idle.remove(worker)
                    return queue.popleft(), worker
        return None

    def _take_up(self) -> None:
        while (taken := self._next()) is not None:
            move, worker = taken
            self.under_way.append(move)
            self._spoil(move)
            seconds = self._chance.expovariate(1 / self.seconds)
            if move.kind not in IN_MEMORY and self._chance.random() < self._drive.faults.hang:
                self._marks["move hangs"] += 1
                seconds += self._chance.uniform(1.0, 60.0)
            self._process.call_later(seconds, self._end, move, worker)

    def _spoil(self, move: Move) -> None:
        """What the move fills is neither old nor new from now on."""
        if move.entry is None:
            return
        slot = (
            self._arena.view(move.dram * SLOT_ALIGNMENT, move.entry.slot_bytes)
            if (move.kind in FILLS or move.kind is MoveKind.SPILL)
            else None
        )
        if slot is None:
            return
        if move.kind is MoveKind.SPILL:
            self._drive.scribble(move.nvme * SLOT_ALIGNMENT, slot)
        else:
            self._arena.spoilt.discard(move.dram * SLOT_ALIGNMENT)
            half = len(slot) // 2
            slot[:half] = JUNK * half

    def _end(self, move: Move, worker: int) -> None:
        self.under_way.remove(move)
        self._done.append(move)
        outcome, problem = self._carry_out(move)
        move.seconds = self._process.time() - move.seconds
        seconds = self._chance.uniform(0.0, 0.0005)
        self._process.call_later(seconds, self._tell, move, worker, outcome, problem)

    def _tell(self, move: Move, worker: int, outcome: Outcome, problem: str) -> None:
        self._idle.append(worker)
        self._lazy_running -= move.kind in LAZY
        self._done.remove(move)
        if move.kind not in IN_MEMORY:
            self._ended_at = self._process.time()
        self._report(move, outcome, problem)
        self._take_up()

    def _carry_out(self, move: Move) -> tuple[Outcome, str]:
        outcome, problem = self._carrier.carry_out(move)
        if outcome is Outcome.CORRUPT:
            self._marks[f"corrupt {move.kind.name.lower()}"] += 1
        return outcome, problem
