"""Forked children of a warmed parent, so that a process is born and killed in milliseconds.

The parent must hold no client while it forks: a client belongs to the process that made it.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable


class Child:
    """One forked process. `crashed` tells, once it is over, whether it ended by its own fault."""

    def __init__(self, run: Callable[[], object]) -> None:
        """Fork; the child runs the function and ends."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _be_child(run)

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def wait(self) -> int:
        """Wait for its end; the exit status, negative for a signal."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status is not None

    @property
    def crashed(self) -> bool:
        """Whether it has ended otherwise than by our signal or with success."""
        return self.over and self._status not in (0, -signal.SIGKILL)


def _be_child(run: Callable[[], object]) -> None:
    status = 1
    try:
        run()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
