"""Virtual time: one queue of events, and processes that take part in it.

A process is an event loop of asyncio, as far as the daemon uses one. What a stopped
process would do happens when it is resumed; what a dead one would do never happens.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any

START_S = 1_000.0


class Killed(BaseException):
    """The process that is being simulated ends at this very instruction."""


class Event:
    """Something that a process will do; what asyncio calls a timer handle."""

    __slots__ = ("args", "callback", "cancelled", "process")

    def __init__(
        self, process: Process, callback: Callable[..., object], args: tuple[Any, ...]
    ) -> None:
        self.process = process
        self.callback = callback
        self.args = args
        self.cancelled = False

    def cancel(self) -> None:
        """It will not happen."""
        self.cancelled = True


class Clock:
    """What happens when. Events of the same moment happen in the order they were asked for."""

    def __init__(self) -> None:
        self.now = START_S
        self._numbers = itertools.count()
        self._queue: list[tuple[float, int, Event]] = []

    def add(self, when: float, event: Event) -> None:
        """Never before now."""
        heapq.heappush(self._queue, (max(when, self.now), next(self._numbers), event))

    def next(self) -> Event | None:
        """Go to the next event and return it, None when there is none."""
        while self._queue:
            when, _, event = heapq.heappop(self._queue)
            if event.cancelled or not event.process.alive:
                continue
            self.now = when
            if not event.process.stopped:
                return event
            event.process.missed.append(event)
        return None


class Process:
    """One process. Its methods are those of an event loop; the rest of asyncio it has not."""

    def __init__(self, clock: Clock, name: str) -> None:
        self.clock = clock
        self.name = name
        self.alive = True
        self.stopped = False
        self.missed: list[Event] = []

    def time(self) -> float:
        return self.clock.now

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> Any:
        event = Event(self, callback, args)
        self.clock.add(when, event)
        return event

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> Any:
        return self.call_at(self.clock.now + delay, callback, *args)

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> Any:
        return self.call_at(self.clock.now, callback, *args)

    call_soon_threadsafe = call_soon

    def stop_for_now(self) -> None:
        """SIGSTOP."""
        self.stopped = True

    def resume(self) -> None:
        """SIGCONT: what it missed happens now, in the old order."""
        self.stopped = False
        missed, self.missed = self.missed, []
        for event in missed:
            self.clock.add(self.clock.now, event)

    def kill(self) -> None:
        """SIGKILL."""
        self.alive = False
        self.missed.clear()
