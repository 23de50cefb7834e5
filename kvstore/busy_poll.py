"""Keeps the event loop awake for a moment after each request: the next one finds it so.

Work that nobody waits for is put off to such a moment, so that requests that follow each other
closely are answered first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from kvstore.spin import Spin

REST_S = 0.0002  # without a request, before work that was put off is done

Work = Callable[[], bool]


class BusyPoll:
    """One for each loop. While it spins, the loop looks for events without sleeping, and serves
    them all in turn; nothing else is held up."""

    def __init__(self, loop: asyncio.AbstractEventLoop, window_s: float) -> None:
        self._loop = loop
        self._spin = Spin(window_s)
        self._until = 0.0
        self._rest_s = min(REST_S, window_s / 2)
        self._spinning = False
        self._work: dict[Work, None] = {}

    def later(self, work: Work) -> bool:
        """Do a piece of `work` between looks for events, when nothing was asked for a moment, and
        again for as long as it returns True. False when the loop is not awake: do it yourself."""
        if self._spinning:
            self._work[work] = None
        return self._spinning

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
        try:
            self._do_some()
        finally:
            self._go_on()

    def _do_some(self) -> None:
        now = time.monotonic()
        if self._work and self._until - now < self._spin.window_s - self._rest_s:
            work = next(iter(self._work))
            del self._work[work]
            if work():
                self._work[work] = None

    def _go_on(self) -> None:
        if time.monotonic() < self._until or self._work:
            self._loop.call_soon(self._again)
        else:
            self._spinning = False
            self._spin.missed()
