"""Turns on the one event loop: a client with much to ask does not keep the others waiting.

Three things hold it back, each only when it matters:

    turn      a connection carries requests out for TURN_S, then its next ones go behind the others
    round     a tenant's connections have ROUND_S, then the loop looks at everybody else's
    debt      single requests that take longer than a turn cannot be cut in two; while other tenants
              are about, a tenant's may use LONG_PART of the time, and further long ones wait

And two buckets, of the session and of the tenant, say how many requests are read a second.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable

from kvstore.limits import Bucket, Limits, cost
from kvstore.protos import kvstore_pb2 as pb

TURN_S = 0.0002
ROUND_S = 0.0004
LONG_PART = 0.25
LONG_S = 0.05  # of long requests at once, before they wait
DEBT_S_MAX = 0.25
CONTENDED_S = 0.05  # other tenants count as being about for so long after a turn of theirs
LONG_TURN_S = 0.002  # a turn of this length was a long one, whatever was in it
LARGE_BYTES = 32_768  # requests of this size, a thousand keys, may take long
LONG_VERBS = (pb.CLEAR, pb.VERIFY)  # they look at every block
PAUSE_S_MAX = 1.0  # then it is looked again, with the limits of that time


def may_be_long(verb: int, request_bytes: int) -> bool:
    """Whether a request may take much longer than others."""
    return request_bytes >= LARGE_BYTES or verb in LONG_VERBS


class Turns:
    """One for each loop: which tenant was served last, and when another one was."""

    def __init__(self) -> None:
        self._last: object = None
        self._last_at = self._other_at = -CONTENDED_S

    def taken(self, who: object, now: float) -> None:
        """A turn has ended."""
        if who is not self._last:
            self._last, self._other_at = who, self._last_at
        self._last_at = now

    def contended(self, who: object, now: float) -> bool:
        """Whether anybody else was served a moment ago."""
        return now - (self._other_at if who is self._last else self._last_at) < CONTENDED_S


class Share:
    """One tenant's part of the loop. `limited` counts who had to wait, by the limit."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        turns: Turns,
        limits: Callable[[], Limits],
        limited: Counter[str],
    ) -> None:
        self.bucket = Bucket()
        self._loop = loop
        self._turns = turns
        self._limits = limits
        self._limited = limited
        self._spent = 0.0  # in this round
        self._debt = 0.0
        self._debt_at = 0.0
        self._queue: deque[Callable[[], None]] = deque()
        self._called = False  # whether the next round is about to begin

    @property
    def full(self) -> bool:
        """Whether who comes now has to go behind others: see `later`."""
        return self._spent > ROUND_S or bool(self._queue)

    def later(self, go: Callable[[], None]) -> None:
        """Call `go` when it is its turn."""
        self._queue.append(go)
        if not self._called:
            self._called = True
            self._loop.call_soon(self._round)

    def _round(self) -> None:
        self._spent, queue = 0.0, self._queue
        try:
            for _ in range(len(queue)):
                queue.popleft()()
                if self._spent > ROUND_S:
                    break
        finally:
            self._called = bool(queue)
            if queue:
                self._loop.call_soon(self._round)

    def took(self, started: float, now: float, *, long: bool = False) -> None:
        """A turn has ended; `long` says that there was a request in it that may take long."""
        used = now - started
        self._spent += used
        self._turns.taken(self, now)
        if used > (TURN_S if long else LONG_TURN_S):
            self._debt = min(DEBT_S_MAX, self._owed(now) + used - TURN_S)

    def paid(self, bucket: Bucket, request_bytes: int) -> None:
        """A request has been read."""
        price = cost(request_bytes)
        bucket.left -= price
        self.bucket.left -= price

    def wait_s(self, bucket: Bucket, *, long: bool) -> float:
        """How long the next request has to wait, at most PAUSE_S_MAX; then ask again."""
        if bucket.left >= 0 and self.bucket.left >= 0 and not long:
            return 0.0
        limits, now = self._limits(), time.monotonic()
        waits = {
            "requests_per_s": bucket.wait_s(limits.requests_per_s, now),
            "requests_per_s_tenant": self.bucket.wait_s(limits.requests_per_s_tenant, now),
            "long_requests": 0.0,
        }
        if long and self._turns.contended(self, now):
            waits["long_requests"] = max(0.0, self._owed(now) - LONG_S) / LONG_PART
        limit = max(waits, key=waits.__getitem__)
        if waits[limit]:
            self._limited[limit] += 1
        return min(PAUSE_S_MAX, waits[limit])

    def _owed(self, now: float) -> float:
        self._debt = max(0.0, self._debt - (now - self._debt_at) * LONG_PART)
        self._debt_at = now
        return self._debt
