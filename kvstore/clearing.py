"""Runs of `clear`: every block that there is now is dropped, a few at a time."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

from kvstore.protos import kvstore_pb2 as pb
from kvstore.store import Store

AT_ONCE = 256  # rows: somebody else's request waits for half a millisecond


@dataclasses.dataclass(eq=False)
class _Run:
    """One run: the rows before `end` are left, so many blocks were dropped."""

    end: int
    answer: Callable[[Any], None]
    dropped: int = 0


class Clearing:
    """All runs under way in one store. `settle` is called when something was dropped."""

    def __init__(
        self, store: Store, loop: asyncio.AbstractEventLoop, settle: Callable[[], None]
    ) -> None:
        self._store = store
        self._loop = loop
        self._settle = settle
        self.at_once = AT_ONCE
        self.runs: set[_Run] = set()

    def begin(self, answer: Callable[[Any], None]) -> Any:
        """Drop every block that there is now; of what comes meanwhile some may go, too. Returns the
        reply where they are few; `answer` is called with it later where they are many."""
        run = _Run(len(self._store.catalog.keys), answer)
        if self._drop_some(run):
            return _reply(run)
        self.runs.add(run)
        self._loop.call_soon(self._go_on, run)
        return None

    def close(self) -> None:
        """Nothing more is dropped, and nobody answered."""
        self.runs.clear()

    def _go_on(self, run: _Run) -> None:
        if run not in self.runs:
            return
        done = self._drop_some(run)
        self._settle()
        if done:
            self.runs.remove(run)
            run.answer(_reply(run))
        else:
            self._loop.call_soon(self._go_on, run)

    def _drop_some(self, run: _Run) -> bool:
        """Whether nothing is left. The latest go first: tails before heads."""
        first = max(0, run.end - self.at_once)
        run.dropped += self._store.clear(range(run.end - 1, first - 1, -1))
        run.end = first
        return not first


def _reply(run: _Run) -> Any:
    return pb.ClearReply(forgotten=run.dropped)
