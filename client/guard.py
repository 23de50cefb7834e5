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
from pathlib import Path
from typing import TypeVar

from kvstore import paths
from kvstore.client.client import Client
from kvstore.errors import InvalidRequest, KVStoreError, SessionLost
from kvstore.protos import kvstore_pb2 as pb

TIMEOUT_S = 1.0  # of a call, unless the connector is given another
PROBE_S, PROBE_S_MAX = 0.05, 2.0  # between two looks for the daemon
QUIET_S = 60.0  # no second line about the same within this time

T = TypeVar("T")

log = logging.getLogger("kvstore")


class Guard:
    """A client that never raises and never waits longer than its timeout.

    path, tenant  as in `connect`; nothing is connected before the first call
    timeout_s     the longest that a call may take, and what an engine waits for a daemon that has
                  stopped answering: once
    join          as in `connect`

    counts        what happened, for the engine's own metrics: `failed` calls, `skipped` ones (the
                  daemon was known not to answer), `defects` (errors of ours), and whatever the
                  connector counts
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        tenant: str = "default",
        *,
        timeout_s: float = TIMEOUT_S,
        join: str | None = None,
    ) -> None:
        where = Path(path) if path is not None else paths.socket_path(tenant)
        self.client = Client(where, timeout_s, join)
        self.counts: Counter[str] = Counter(failed=0, skipped=0, defects=0)
        self._why = ""  # no daemon answers; empty while one does
        self._told: dict[str, float] = {}  # kind of line -> when it was last written
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._probe: threading.Thread | None = None

    @property
    def down(self) -> str:
        """Why no daemon is asked at present; empty while one is."""
        return self._why

    def ask(self, act: Callable[[], T], otherwise: T) -> T:
        """What `act` returns; `otherwise` when the store cannot be asked or could not answer."""
        if self._why:
            self.counts["skipped"] += 1
            return otherwise
        try:
            return act()
        except SessionLost:
            self.counts["failed"] += 1  # what was held is void; the next call connects again
        except InvalidRequest as error:
            self._defect(error)
        except KVStoreError as error:
            self._fall(error)
        except Exception as error:
            self._defect(error)
        return otherwise

    def close(self) -> None:
        """End the session and the thread. Every call after this is skipped."""
        with self._lock:
            self._why = self._why or "it was closed"
            self._closed.set()
        if self._probe is not None:
            self._probe.join()
        self.client.close()

    # -- inside --------------------------------------------------------------------------------

    def _fall(self, error: KVStoreError) -> None:
        self.counts["failed"] += 1
        with self._lock:
            if self._why:
                return
            self._why = str(error) or type(error).__name__
            self._probe = threading.Thread(target=self._look, name="kvstore-probe", daemon=True)
            self._probe.start()
        self._tell(logging.WARNING, "down", f"the engine computes without the store: {error}")

    def _defect(self, error: Exception) -> None:
        """An error of ours, or of how the connector was set up: that call is a miss."""
        self.counts["defects"] += 1
        known = isinstance(error, KVStoreError)
        self._tell(
            logging.ERROR,
            f"{type(error).__name__}: {error}",
            f"a call to the store failed, the engine goes on without it: {error!r}",
            None if known else error,
        )

    def _look(self) -> None:
        """Until the daemon answers."""
        pause_s = PROBE_S
        while not self._closed.wait(pause_s):
            try:
                deadline = self.client.deadline()
                session = self.client.session(deadline)
                session.transport.call(pb.SETTLE, pb.SettleRequest(), pb.SettleReply, deadline)
            except Exception as error:
                if not isinstance(error, KVStoreError):
                    self._defect(error)
                pause_s = min(2 * pause_s, PROBE_S_MAX)
                continue
            with self._lock:
                if not self._closed.is_set():
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
