"""Keeps the event loop awake for a moment after each request: the next one finds it so."""

from __future__ import annotations

import asyncio
import time

from kvstore.spin import Spin


class BusyPoll:
    """One for each loop. While it spins, the loop looks for events without sleeping, and serves
    them all in turn; nothing else is held up."""

    def __init__(self, loop: asyncio.AbstractEventLoop, window_s: float) -> None:
        self._loop = loop
        self._spin = Spin(window_s)
        self._until = 0.0
        self._spinning = False

    def served(self) -> None:
        """A request has been served; another may follow soon."""
        if self._spinning:
            self._spin.found()
            self._until = time.monotonic() + self._spin.window_s
        elif self._spin.pays():
            self._spinning = True
            self._until = time.monotonic() + self._spin.window_s
            self._loop.call_soon(self._again)

    def _again(self) -> None:
        if time.monotonic() < self._until:
            self._loop.call_soon(self._again)
        else:
            self._spinning = False
            self._spin.missed()
