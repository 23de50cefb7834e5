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
LONGER = 4  # windows: it stays awake for so long while requests come that far apart
BARRED = 32  # requests after which it does so again, once somebody else needed the processor

Work = Callable[[], bool]


class BusyPoll:
    """One for each loop. While it spins, the loop looks for events without sleeping, and serves
    them all in turn; nothing else is held up.

    A client that copies one block between two requests may be away for longer than a window. So
    after a request that came a few windows after the one before, it stays awake for those; until
    one comes later than that, or it is not let run for a window: then it takes the processor from
    others, perhaps from that client.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, window_s: float) -> None:
        self._loop = loop
        self._spin = Spin(window_s)
        self._window_s = window_s
        self._served_at = self._until = 0.0
        self._longer = False  # whether it stays awake for more than a window
        self._barred = 0  # requests for which it does not
        self._looked_at = 0.0  # for events, last
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
        now, window_s = time.monotonic(), self._window_s
        away_s, self._served_at, self._looked_at = now - self._served_at, now, now
        if away_s > window_s:
            self._longer = away_s <= window_s * LONGER
        if self._barred:
            self._barred -= 1
        elif self._longer:
            window_s *= LONGER
        self._until = now + window_s
        if self._spinning:
            self._spin.found()
        elif self._spin.pays():
            self._spinning = True
            self._loop.call_soon(self._again)

    def _again(self) -> None:
        if time.monotonic() - self._looked_at > self._window_s:
            self._barred = BARRED
            self._until = 0.0
        try:
            self._do_some()
        finally:
            self._go_on()

    def _do_some(self) -> None:
        now = time.monotonic()
        if self._work and now - self._served_at > self._rest_s:
            work = next(iter(self._work))
            del self._work[work]
            if work():
                self._work[work] = None

    def _go_on(self) -> None:
        self._looked_at = now = time.monotonic()
        if now < self._until or self._work:
            self._loop.call_soon(self._again)
        else:
            self._spinning = False
            self._spin.missed()
