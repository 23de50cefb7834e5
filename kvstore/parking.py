"""Requests that wait for room: tried again, in order, whenever some may have come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from kvstore.errors import KVStoreError
from kvstore.leases import Session

PARKED_MAX = 4_096  # more are answered at once
WAIT_S_MAX = 3_600.0
LATER = object()  # the outcome of a try that will be answered by somebody else

Attempt = Callable[[bool], Any]  # told whether it is the last one; None: there is no room yet


class _Parked:
    __slots__ = ("answer", "attempt", "session", "timer")

    def __init__(self, session: Session, attempt: Attempt, answer: Callable[[Any], None]) -> None:
        self.session = session
        self.attempt = attempt
        self.answer = answer
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

    def __len__(self) -> int:
        return len(self._parked)

    @property
    def full(self) -> bool:
        """Whether no further request may wait."""
        return len(self._parked) >= PARKED_MAX

    def park(
        self, session: Session, wait_s: float, attempt: Attempt, answer: Callable[[Any], None]
    ) -> None:
        """Try again whenever room may have come, for the last time in `wait_s` seconds."""
        parked = _Parked(session, attempt, answer)
        parked.timer = self._loop.call_later(wait_s, self._late, parked)
        self._parked.append(parked)

    def leave(self, session: Session) -> None:
        """The session has ended: nobody waits for its requests."""
        for parked in [parked for parked in self._parked if parked.session is session]:
            self._remove(parked)

    def retry(self) -> None:
        """Room may have come: those that wait longest first."""
        while self._parked and self._try(self._parked[0], last=False):
            self._remove(self._parked[0])

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
