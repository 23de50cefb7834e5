"""What the vLLM connector leaves to threads of its own, so that the engine waits for none of it."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from kvstore.client.grant import Grant

log = logging.getLogger("kvstore")


class Awaited:
    """An acquire that waits for blocks, in the thread that does so; and what is to be done then."""

    def __init__(
        self,
        ask: Callable[[float], Grant | None],
        until: float,
        keys: list[bytes],
        then: Callable[[], None],
    ) -> None:
        self.ask = ask
        self.until = until
        self.keys = keys
        self.then = then
        self.done = False
        self.grant: Grant | None = None
        self._unwanted = False
        self._lock = threading.Lock()

    def run(self) -> None:
        """In the thread."""
        grant = None if self._unwanted else self.ask(max(0.0, self.until - time.monotonic()))
        with self._lock:
            self.grant, self.done = grant, True
            unwanted = self._unwanted
        if unwanted and grant is not None:
            grant.release()

    def drop(self) -> Grant | None:
        """Nobody waits any more; what was granted already is for the caller to release."""
        with self._lock:
            self._unwanted = True
            return self.grant


class Thread:
    """A thread that does one thing after the other; it is started with the first."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._things: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def do(self, thing: Callable[[], Any]) -> None:
        """Have it done soon."""
        self._things.put(thing)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Wait until everything is done, for so long at most."""
        self._things.put(None)
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while (thing := self._things.get()) is not None:
            try:
                thing()
            except Exception as error:
                log.error("kvstore: a defect, the engine goes on: %r", error, exc_info=error)
