"""Who is at the other end of a socket, and when that process has ended: told by the kernel alone."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable

_UCRED = struct.Struct("3i")


class Peer:
    """A client process, held by a descriptor that no later process of that number can take over."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pid: int) -> None:
        self.pid = pid
        self._loop = loop
        self._file: int | None
        try:
            self._file = os.pidfd_open(pid)
        except OSError:
            self._file = None  # gone already, or not ours to see

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop, connection: socket.socket) -> Peer:
        """The process that connected this Unix socket."""
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        return cls(loop, _UCRED.unpack(raw)[0])

    def when_gone(self, then: Callable[[], None]) -> None:
        """Call `then` once, when the process has ended; at once if it has."""
        if self._file is None:
            then()
            return
        file, self._file = self._file, None

        def ended() -> None:
            self._loop.remove_reader(file)
            os.close(file)
            then()

        self._loop.add_reader(file, ended)

    def close(self) -> None:
        """Nobody asks about the process any more."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
