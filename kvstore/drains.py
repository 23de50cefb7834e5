"""Runs of `drain`: everything that is due is copied to NVMe, and somebody waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from kvstore.protos import kvstore_pb2 as pb
from kvstore.store import Store


class Drains:
    """All runs under way in one store."""

    def __init__(self, store: Store, loop: asyncio.AbstractEventLoop) -> None:
        self._store = store
        self._loop = loop
        self._runs: list[tuple[Callable[[Any], None], int]] = []

    def begin(self, answer: Callable[[Any], None], now: float) -> None:
        """Queue every copy that is due; `answer` is called, later, when none is left, or
        none of those left finds a slot."""
        self._store.save_all(now)
        self._runs.append((answer, self._store.counters.nvme.spilled))
        self.go_on(now)

    def go_on(self, now: float) -> None:
        """Moves have ended, or time has passed."""
        if self._runs and self._store.placement.drained(now):
            runs, self._runs = self._runs, []
            spilled = self._store.counters.nvme.spilled
            for answer, before in runs:
                reply = pb.DrainReply(found=True, written=spilled - before)
                self._loop.call_soon(answer, reply)
