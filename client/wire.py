"""One connection through the hatch, shared by the threads of a process.

    frame   u32 length of what follows | u8 verb | u8 status | u16 0 | u32 number | message

A caller sends, then reads frames until its own answer is there; answers of other callers that it meets
on the way are handed over. Of several callers that wait, one reads and the others sleep; who leaves
with its answer wakes another to read. So one thread pays two system calls and no switch, and many
threads share the connection without a reader thread.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any

from kvstore import paths
from kvstore.errors import (
    BY_NAME,
    DeadlineExceeded,
    InternalError,
    NotPermitted,
    SessionLost,
    Unavailable,
)
from kvstore.protos import kvstore_pb2 as pb

HEADER = struct.Struct("<IBBHI")
AFTER_LENGTH = HEADER.size - 4
READ_BYTES = 256 << 10
UNDO_S = 0.1

# How the grant of a call that has given up is undone.
_UNDO: dict[int, tuple[Any, int, Any]] = {
    pb.ACQUIRE: (pb.AcquireReply, pb.RELEASE, pb.ReleaseRequest),
    pb.RESERVE: (pb.ReserveReply, pb.ABORT, pb.AbortRequest),
}


class _Call:
    """One caller that waits for the answer of its number."""

    __slots__ = ("answer", "wake")

    def __init__(self) -> None:
        self.answer: tuple[int, bytes] | None = None
        self.wake: threading.Event | None = None


class Wire:
    """See the module. After any failure of the connection it is dead for good: make another."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        """Connect. Raises Unavailable or NotPermitted, naming the path."""
        paths.check_socket_path(path)
        self.path = path
        self.pid = os.getpid()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(os.fspath(path))
        except PermissionError:
            self._socket.close()
            raise NotPermitted(
                f"this user may not connect to {path}: join the group that owns the tenant"
            ) from None
        except OSError as error:
            self._socket.close()
            raise Unavailable(
                f"no daemon at {path}: {error.strerror or error}: start kvstored, or give its socket"
            ) from None
        self._socket.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # guards the two below, and who reads
        self._calls: dict[int, _Call] = {}
        self._reading = False
        self._sending = threading.Lock()
        self._received = b""
        self._abandoned: dict[int, int] = {}  # calls given up that may still be granted a lease
        self.dead: str | None = None

    def close(self, why: str = "the client closed it") -> None:
        """The daemon sees the end of the session. Callers that wait get SessionLost."""
        with self._lock:
            if self.dead is None:
                self.dead = why
            for call in self._calls.values():
                if call.wake is not None:
                    call.wake.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def call(self, verb: int, request: Any, reply: Any, deadline: float) -> Any:
        """Send a request, return the verb's reply. `deadline` is on the monotonic clock.

        Raises what the daemon answered, DeadlineExceeded, or SessionLost when the connection ended.
        """
        number = next(self._numbers) & 0xFFFFFFFF
        body = request.SerializeToString()
        call = _Call()
        with self._lock:
            if self.dead is not None:
                raise SessionLost(f"the connection to {self.path} has ended: {self.dead}")
            self._calls[number] = call
        try:
            self._send(HEADER.pack(AFTER_LENGTH + len(body), verb, 0, 0, number) + body, deadline)
            self._wait(call, number, deadline)
        finally:
            with self._lock:
                self._calls.pop(number, None)
                if call.answer is None and verb in _UNDO:
                    self._abandoned[number] = verb
        assert call.answer is not None
        status, payload = call.answer
        if status:
            refusal = pb.ErrorReply.FromString(payload)
            raise BY_NAME.get(refusal.error, InternalError)(refusal.message)
        return reply.FromString(payload)

    def _send(self, frame: bytes, deadline: float) -> None:
        if not self._sending.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise self._late("to send")
        try:
            sent = 0
            while sent < len(frame):
                try:
                    sent += self._socket.send(frame[sent:] if sent else frame)
                except BlockingIOError:
                    left = deadline - time.monotonic()
                    ready = select.poll()
                    ready.register(self._socket, select.POLLOUT)
                    if left <= 0 or not ready.poll(left * 1e3 + 1):
                        if sent:  # half a frame is out: nothing sensible can follow it
                            self.close("a request could not be sent in time")
                        raise self._late("to take the request") from None
                except OSError as error:
                    raise self._lost(error) from None
        finally:
            self._sending.release()

    def _wait(self, call: _Call, number: int, deadline: float) -> None:
        """Read frames until the call's answer is there, or have another caller do so."""
        while True:
            with self._lock:
                if call.answer is not None:
                    return
                if self.dead is not None:
                    raise SessionLost(f"the connection to {self.path} has ended: {self.dead}")
                if not self._reading:
                    self._reading = True
                    call.wake = None
                    break
                wake = call.wake = call.wake or threading.Event()
                wake.clear()
            if not wake.wait(max(0.0, deadline - time.monotonic())) and call.answer is None:
                raise self._late("to answer")
        try:
            while call.answer is None:
                self._read(deadline)
        finally:
            with self._lock:
                self._reading = False
                for other in self._calls.values():
                    if other.wake is not None and other.answer is None:
                        other.wake.set()
                        break

    def _read(self, deadline: float) -> None:
        """Take in what has arrived; wait for something first, if nothing has."""
        try:
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            left = deadline - time.monotonic()
            if left <= 0 or not self._poll.poll(left * 1e3 + 1):
                raise self._late("to answer") from None
            return
        except OSError as error:
            raise self._lost(error) from None
        if not data:
            raise self._lost(None)
        if self._received:
            data = self._received + data
        at, end = 0, len(data)
        while end - at >= HEADER.size:
            length, _, status, _, number = HEADER.unpack_from(data, at)
            if end - at - 4 < length:
                break
            self._hand_over(number, status, data[at + HEADER.size : at + 4 + length])
            at += 4 + length
        self._received = data[at:]

    def _hand_over(self, number: int, status: int, payload: bytes) -> None:
        """Give an answer to who waits for it. What was granted to a call that gave up is undone."""
        waiting = self._calls.get(number)
        if waiting is not None:
            waiting.answer = (status, payload)
            if waiting.wake is not None:
                waiting.wake.set()
            return
        verb = self._abandoned.pop(number, None)
        if verb is None or status:
            return
        reply, undo_verb, undo = _UNDO[verb]
        if lease := reply.FromString(payload).lease:
            body = undo(lease=lease).SerializeToString()
            frame = HEADER.pack(AFTER_LENGTH + len(body), undo_verb, 0, 0, 0) + body
            self._send(frame, time.monotonic() + UNDO_S)

    def _late(self, what: str) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"the daemon at {self.path} took longer than the deadline {what}: go on without it"
        )

    def _lost(self, error: OSError | None) -> SessionLost:
        self.close(str(error) if error else "the daemon closed it")
        return SessionLost(
            f"the connection to {self.path} has ended"
            + (f": {error}" if error else ": the daemon closed it")
        )
