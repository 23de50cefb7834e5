"""Who is at the other end of a socket, and when that process has ended, as the kernel tells it."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable

_UCRED = struct.Struct("3i")
LOOK_AGAIN_S = 1.0


class Peer:
    """A client process, held by a descriptor that no later process of that number can take over.

    Where there is no descriptor (the daemon has none left, or the number means nothing here, as for
    a process of another pid namespace) the process counts as alive: its slots stay as they are.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pid: int,
        *,
        claimed: bool = False,
        start: int | None = None,
        uid: int | None = None,
    ) -> None:
        """`claimed`: the number comes from the client, not from the kernel, so that no process of
        that number proves nothing. `start`: which process of that number is meant, as an earlier
        `Peer.start` told it; 0 when it could not."""
        self.pid = pid
        self.uid = uid  # as the kernel tells it; None: nobody has
        self._loop = loop
        self._claimed = claimed
        self._file: int | None = None
        self._gone = False
        self._then: Callable[[], None] | None = None
        self._open()
        self.start = _start(pid)
        if start and self.start and start != self.start:
            self.close()  # that process has ended, and another one has its number
            self._gone = True

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop, connection: socket.socket) -> Peer:
        """The process that connected this Unix socket."""
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, _ = _UCRED.unpack(raw)
        return cls(loop, pid, uid=uid)

    @property
    def gone(self) -> bool:
        """Whether the process is known to have ended."""
        return self._gone

    def when_gone(self, then: Callable[[], None]) -> None:
        """Call `then` once, when the process has ended; at once if it has. It replaces an earlier
        one that has not been called yet."""
        self._then = then
        self._watch()

    def close(self) -> None:
        """Nobody asks about the process any more."""
        self._then = None
        if self._file is not None:
            self._loop.remove_reader(self._file)
            os.close(self._file)
            self._file = None

    def _open(self) -> None:
        try:
            self._file = os.pidfd_open(self.pid)
        except ProcessLookupError:
            self._gone = not self._claimed
        except (OSError, OverflowError):
            return  # not to be had now: looked for again

    def _watch(self) -> None:
        if self._then is None:
            return
        if self._file is None and not self._gone and self.pid > 0:
            self._open()
        if self._file is not None:
            self._loop.add_reader(self._file, self._ended)
        elif self._gone:
            then, self._then = self._then, None
            then()
        else:
            self._loop.call_later(LOOK_AGAIN_S, self._watch)

    def _ended(self) -> None:
        then = self._then
        self.close()
        self._gone = True
        if then is not None:
            then()


def _start(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 when the system does not say."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0
