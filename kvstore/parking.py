"""Requests that wait for room: tried again, in order, whenever some may have come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from kvstore.errors import KVStoreError
from kvstore.leases import Session

PARKED_MAX = 4_096  # more are answered at once
WAIT_S_MAX = 3_600.0
# A try takes longer the more keys there are. Of many it is made rarely: then it gets what has come
# meanwhile, and others have the loop.
FEW_KEYS = 1_024
PAUSE_S_PER_KEY, PAUSE_S_MAX = 10e-6, 0.1
LATER = object()  # the outcome of a try that will be answered by somebody else

Attempt = Callable[[bool], Any]  # told whether it is the last one; None: there is no room yet


class _Parked:
    __slots__ = ("answer", "attempt", "not_before", "pause_s", "session", "timer")

    def __init__(
        self, session: Session, attempt: Attempt, answer: Callable[[Any], None], pause_s: float
    ) -> None:
        self.session = session
        self.attempt = attempt
        self.answer = answer
        self.pause_s = pause_s
        self.not_before = 0.0  # the next try
        self.timer: asyncio.TimerHandle | None = None


class Parking:
    """The requests of one tenant that wait. `before_answer` is called between a try and its answer,
    `after_late` after a deadline has come."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        before_answer: Callable[[], object],
        after_late: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._before_answer = before_answer
        self._after_late = after_late
        self._parked: list[_Parked] = []
        self._pausing: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._parked)

    @property
    def full(self) -> bool:
        """Whether no further request may wait."""
        return len(self._parked) >= PARKED_MAX

    def park(
        self,
        session: Session,
        wait_s: float,
        attempt: Attempt,
        answer: Callable[[Any], None],
        keys: int = 0,
    ) -> None:
        """Try again whenever room may have come, for the last time in `wait_s` seconds. `keys`:
        how many the request has."""
        pause_s = min(PAUSE_S_MAX, keys * PAUSE_S_PER_KEY) if keys > FEW_KEYS else 0.0
        parked = _Parked(session, attempt, answer, pause_s)
        parked.not_before = self._loop.time() + pause_s
        parked.timer = self._loop.call_later(wait_s, self._late, parked)
        self._parked.append(parked)

    def leave(self, session: Session) -> None:
        """The session has ended: nobody waits for its requests."""
        for parked in [parked for parked in self._parked if parked.session is session]:
            self._remove(parked)

    def retry(self) -> None:
        """Room may have come: those that wait longest first."""
        while self._parked:
            first, now = self._parked[0], self._loop.time()
            if now < first.not_before:
                if self._pausing is None:
                    self._pausing = self._loop.call_at(first.not_before, self._go_on)
                return
            if not self._try(first, last=False):
                first.not_before = now + first.pause_s
                return
            self._remove(first)

    def _go_on(self) -> None:
        """There may have been room before."""
        self._pausing = None
        self.retry()
        self._after_late()

    def _late(self, parked: _Parked) -> None:
        self._remove(parked)
        self._try(parked, last=True)
        self._after_late()

    def _try(self, parked: _Parked, *, last: bool) -> bool:
        """Whether it needs to wait no longer."""
        try:
            reply = parked.attempt(last)
        except KVStoreError as error:
            reply = error
        if reply is None:
            return False
        if reply is not LATER:
            self._before_answer()  # the slot table must say so before the client hears of it
            parked.answer(reply)
        return True

    def _remove(self, parked: _Parked) -> None:
        self._parked.remove(parked)
        if parked.timer is not None:
            parked.timer.cancel()


def bounded(deadline_s: float) -> float:
    """A deadline from the wire as a wait that the loop can take: NaN and infinity come from
    strangers, and who gives none, or one that is over, does not wait."""
    return min(deadline_s, WAIT_S_MAX) if deadline_s > 0 else 0.0
