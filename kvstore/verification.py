"""Runs of `verify`: every block on NVMe is read and checked, a few at a time."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import numpy as np

from kvstore.catalog import STORED
from kvstore.orders import Outcome
from kvstore.protos import kvstore_pb2 as pb
from kvstore.store import Store

IN_FLIGHT_MAX = 8


class _Run:
    """One run, and how far it has come."""

    def __init__(self, blocks: array[int], answer: Callable[[Any], None]) -> None:
        self.blocks = blocks
        self.answer = answer
        self.in_flight: set[int] = set()
        self.reply = pb.VerifyReply()


class Verification:
    """All runs under way in one store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._runs: list[_Run] = []

    def start(self, answer: Callable[[Any], None], now: float) -> None:
        """Check every block that is on NVMe now; `answer` is called with the counts at the end."""
        stored = np.frombuffer(self._store.catalog.flags, np.uint16) & STORED
        run = _Run(array("I", np.flatnonzero(stored).astype(np.uint32).tobytes()), answer)
        self._runs.append(run)
        self._go_on(run, now)

    def checked(self, block: int, outcome: Outcome, now: float) -> None:
        """A check that was ordered has ended."""
        for run in [run for run in self._runs if block in run.in_flight]:
            run.in_flight.remove(block)
            run.reply.checked += outcome is not Outcome.FAILED
            run.reply.skipped += outcome is Outcome.FAILED
            run.reply.damaged += outcome is Outcome.CORRUPT
            self._go_on(run, now)

    def _go_on(self, run: _Run, now: float) -> None:
        while run.blocks and len(run.in_flight) < IN_FLIGHT_MAX:
            block = run.blocks.pop()
            if self._store.placement.verify(block, now):
                run.in_flight.add(block)
            else:
                run.reply.skipped += 1
        if not run.in_flight:
            self._runs.remove(run)
            run.answer(run.reply)
