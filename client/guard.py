"""What stands between an engine and the store: no error and no long wait gets through it.

A connector does everything that needs the daemon through its guard. Where the daemon does not
answer, the connector's own answer is given instead ("I have nothing"), at once from then on, until
a thread of the guard has seen the daemon answer again: an engine waits for a dead daemon once.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from kvstore.client.client import unconnected
from kvstore.errors import InvalidRequest, KVStoreError, LimitExceeded, SessionLost
from kvstore.protos import kvstore_pb2 as pb

TIMEOUT_S = 1.0  # of a call, unless the connector is given another
PROBE_S, PROBE_S_MAX = 0.05, 2.0  # between two looks for the daemon
STEADY_S = 10.0  # a daemon that fails sooner after it answered is looked for less often
QUIET_S = 60.0  # no second line about the same within this time

T = TypeVar("T")

log = logging.getLogger("kvstore")


class Guard:
    """A client that never raises and never waits longer than its timeout.

    path, tenant  as in `connect`; nothing is connected before the first call
    timeout_s     the longest that a call may take, and what an engine waits for a daemon that has
                  stopped answering: once. What `act` does in several calls takes several
    join          as in `connect`

    counts        what happened, for the engine's own metrics: `failed` calls, `skipped` ones (the
                  daemon was known not to answer), `defects` (errors of ours), and whatever the
                  connector counts, by `count`

    Raises InvalidRequest for a timeout or a ticket that cannot be.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        tenant: str = "default",
        *,
        timeout_s: float = TIMEOUT_S,
        join: str | None = None,
    ) -> None:
        self.client = unconnected(path, tenant, timeout_s, join)
        self.counts: Counter[str] = Counter(failed=0, skipped=0, defects=0)
        self._why = ""  # no daemon answers; empty while one does
        self._told: dict[str, float] = {}  # kind of line -> when it was last written
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._probe: threading.Thread | None = None
        self._pause_s = PROBE_S  # before the next look
        self._up_at = -STEADY_S  # when the daemon was last seen to answer again

    @property
    def down(self) -> str:
        """Why no daemon is asked at present; empty while one is."""
        return self._why

    def count(self, what: str, by: int = 1) -> None:
        """Add to one of `counts`, from any thread."""
        with self._lock:
            self.counts[what] += by

    def ask(self, act: Callable[[], T], otherwise: T) -> T:
        """What `act` returns; `otherwise` when the store cannot be asked or could not answer."""
        if self._why:
            self.count("skipped")
            return otherwise
        try:
            return act()
        except SessionLost as error:  # what was held is void; the next call connects again
            self._fail("lost", f"a call found the session at its end: {error}")
        except LimitExceeded as error:
            if self._connected():  # this call asked for too much; others need not
                self._fail("limit", f"a call was refused: {error}")
            else:
                self._fall(error)
        except InvalidRequest as error:
            self._defect(error)
        except KVStoreError as error:
            self._fall(error)
        except Exception as error:
            self._defect(error)
        return otherwise

    def close(self) -> None:
        """End the session and the thread. Every call after this is skipped.

        Takes as long as a call where the thread waits for a daemon that does not answer.
        """
        with self._lock:
            self._why = self._why or "it was closed"
            self._closed.set()
        if self._probe is not None:
            self._probe.join()
        self.client.close()

    # -- inside --------------------------------------------------------------------------------

    def _connected(self) -> bool:
        session = self.client._session
        return session is not None and session.transport.dead is None

    def _fail(self, kind: str, text: str) -> None:
        self.count("failed")
        self._tell(logging.WARNING, kind, text)

    def _fall(self, error: KVStoreError) -> None:
        self.count("failed")
        now = time.monotonic()
        with self._lock:
            if self._why:
                return
            # A daemon that answers the probe and nothing else must not be waited for again and
            # again, so the pause grows from one fall to the next.
            steady = now - self._up_at >= STEADY_S
            self._pause_s = PROBE_S if steady else min(2 * self._pause_s, PROBE_S_MAX)
            probe = threading.Thread(target=self._look, name="kvstore-probe", daemon=True)
            self._why = str(error) or type(error).__name__
            try:
                probe.start()
            except RuntimeError:  # no more threads: the next call asks, and waits, itself
                self._why = ""
            else:
                self._probe = probe
        self._tell(logging.WARNING, "down", f"the engine computes without the store: {error}")

    def _defect(self, error: Exception) -> None:
        """An error of ours, or of how the connector was set up: that call is a miss."""
        self.count("defects")
        known = isinstance(error, KVStoreError)
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        place = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else ""
        self._tell(  # by place: texts differ from call to call, and would be logged without end
            logging.ERROR,
            f"{type(error).__name__} {place}",
            f"a call to the store failed, the engine goes on without it: {error!r}",
            None if known else error,
        )

    def _look(self) -> None:
        """Until the daemon answers."""
        while not self._closed.wait(self._pause_s):
            try:
                deadline = self.client.deadline()
                session = self.client.session(deadline)
                session.transport.call(pb.SETTLE, pb.SettleRequest(), pb.SettleReply, deadline)
            except Exception as error:
                if not isinstance(error, KVStoreError):
                    self._defect(error)
                self._pause_s = min(2 * self._pause_s, PROBE_S_MAX)
                continue
            with self._lock:
                if self._closed.is_set():
                    return
                self._up_at = time.monotonic()
                self._why = ""
            self._tell(logging.INFO, "up", "the store answers again")
            return

    def _tell(self, level: int, kind: str, text: str, error: Exception | None = None) -> None:
        now = time.monotonic()
        with self._lock:
            if now < self._told.get(kind, -QUIET_S) + QUIET_S:
                return
            self._told[kind] = now
        log.log(level, "kvstore: %s", text, exc_info=error)
