"""One connection through the hatch, shared by the threads of a process.

    frame   u32 length of what follows | u8 verb | u8 status | u16 0 | u32 number | message

A caller sends, then reads frames until its own answer is there; answers of other callers that it
meets on the way are handed over. Of several callers that wait, one reads and the others sleep; who
leaves, for whatever reason, wakes another to read if nobody does. So one thread pays two system
calls and no switch, and many threads share the connection without a reader thread.

A caller that gives up may still be granted a lease. A thread that lives for as long as there are
such calls waits for their answers and gives back what they were granted. What cannot be given back,
because the daemon takes no requests, ends with the connection: it is closed then.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvstore import paths
from kvstore.errors import (
    BY_NAME,
    DeadlineExceeded,
    InternalError,
    KVStoreError,
    NotPermitted,
    SessionLost,
    Unavailable,
)
from kvstore.protos import kvstore_pb2 as pb
from kvstore.spin import Spin

HEADER = struct.Struct("<IBBHI")
AFTER_LENGTH = HEADER.size - 4
READ_BYTES, MORE_BYTES = 64 << 10, 256 << 10  # at once, and of what is known to be large
NO_ANSWER = 0  # the number of requests that the daemon does not answer
SPIN_S = 0.0003
AWAKE_S = 0.0002  # the daemon is, after an answer
TOLD_MAX, TELL_S = 32, 0.001  # reads without asking, until one asks; to tell of one of them
UNDO_S = 5.0  # for the daemon to take back what a caller that gave up was granted
ABANDONED_S = 60.0  # a call that was given up and has no answer by then ends the connection

# How the grant of a call that has given up is undone.
_UNDO: dict[int, tuple[Any, str, int, Any]] = {
    pb.ACQUIRE: (pb.AcquireReply, "lease", pb.RELEASE, pb.ReleaseRequest),
    pb.RESERVE: (pb.ReserveReply, "lease", pb.ABORT, pb.AbortRequest),
    pb.COMMIT: (pb.CommitReply, "lent", pb.ABORT, pb.AbortRequest),
}
_WAKE = HEADER.pack(AFTER_LENGTH, pb.WAKE, 0, 0, NO_ANSWER)
_ENDS_A_LEASE = (pb.COMMIT, pb.ABORT, pb.RELEASE)


class _Call:
    """One caller that waits for the answer of its number."""

    __slots__ = ("answer", "wake")

    def __init__(self) -> None:
        self.answer: tuple[int, bytes] | None = None
        self.wake: threading.Event | None = None


def connect_socket(path: Path, timeout_s: float) -> socket.socket:
    """A connected socket. Raises InvalidConfig, Unavailable or NotPermitted, naming the path."""
    paths.check_socket_path(path)
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connected.settimeout(timeout_s)
        connected.connect(os.fspath(path))
    except PermissionError:
        connected.close()
        raise NotPermitted(
            f"this user may not connect to {path}: join the group that owns the tenant"
        ) from None
    except OSError as error:
        connected.close()
        raise Unavailable(
            f"no daemon at {path}: {error.strerror or error}: start kvstored, or give its socket"
        ) from None
    return connected


class Wire:
    """See the module. After any failure of the connection it is dead for good: make another."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        """Connect; see `connect_socket` for what it raises."""
        self.path = path
        self.pid = os.getpid()
        self._socket = connect_socket(path, timeout_s)
        self._socket.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._spin = Spin(SPIN_S)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # guards the two below, and who reads
        self._calls: dict[int, _Call] = {}  # while there is one, the socket stays open
        self._abandoned: dict[int, tuple[int, _Call]] = {}  # number -> verb, and its call
        self._undoing = False
        self._reading = False
        self._users = 0  # others that need the socket open
        self._sending = threading.Lock()
        self._received = b""
        self._heard = 0.0  # when something came
        self._told = 0  # of blocks used, since then
        self.dead: str | None = None

    def close(self, why: str = "the client closed it") -> None:
        """The daemon sees the end of the session. Callers that wait get SessionLost."""
        if os.getpid() != self.pid:  # after a fork: the session is still the parent's
            self.dead = self.dead or why
            self._socket.close()
            return
        with self._lock:
            if self.dead is None:
                self.dead = why
            for call in self._calls.values():
                if call.wake is not None:
                    call.wake.set()
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._close_unused()

    def call(
        self,
        verb: int,
        request: Any,
        reply: Any,
        deadline: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> Any:
        """Send a request, return the verb's reply. `deadline` is on the monotonic clock;
        `meanwhile` is done before the answer is waited for.

        Raises what the daemon answered, DeadlineExceeded, or SessionLost when the connection ended.
        """
        number = next(self._numbers) % 0xFFFFFFFF + 1
        body = request.SerializeToString()
        call = _Call()
        with self._lock:
            if self.dead is not None:
                raise SessionLost(f"the connection to {self.path} has ended: {self.dead}")
            self._calls[number] = call
        sent = False
        try:
            self._send(HEADER.pack(AFTER_LENGTH + len(body), verb, 0, 0, number) + body, deadline)
            sent = True
            if meanwhile is not None:
                meanwhile()
            self._wait(call, deadline)
        finally:
            if not sent and verb in _ENDS_A_LEASE:
                self.close("the end of a lease could not be sent")
            self._leave(number, call, verb if sent else pb.VERB_UNSPECIFIED)
        assert call.answer is not None
        status, payload = call.answer
        if status:
            refusal = pb.ErrorReply.FromString(payload)
            raise BY_NAME.get(refusal.error, InternalError)(refusal.message)
        return reply.FromString(payload)

    def release(self, lease: int, deadline: float) -> bool:
        """End a read lease; whether it held until now.

        Nobody waits for an answer. The daemon takes a lease back only by ending the session, and
        closes its connections before it gives the slots away: if the connection takes a request
        after the copy was made, the copy is whole.
        """
        return self._tell(pb.RELEASE, pb.ReleaseRequest(lease=lease).SerializeToString(), deadline)

    def used(self, request: bytes) -> bool:
        """Tell the daemon, by an encoded UsedRequest, of blocks that were read again without
        asking; whether the connection is whole, so that there has been no other daemon meanwhile.

        Hardly waits. After so many that the daemon has not answered anything in between it is False
        as well: who asks then goes no faster than the daemon does.
        """
        if self._told >= TOLD_MAX:
            return False
        self._told += 1
        return self._tell(pb.USED, request, time.monotonic() + TELL_S, must=False)

    def settle(self, sessions: Sequence[int], deadline: float) -> None:
        """Say of sessions that have ended that nothing they were given is written any more."""
        body = pb.SettleRequest(sessions=sessions).SerializeToString()
        self._tell(pb.SETTLE, body, deadline)

    def give_back(self, lease: int) -> None:
        """What this write lease is of is not written any more. Hardly waits, never raises."""
        body = pb.AbortRequest(lease=lease).SerializeToString()
        self._tell(pb.ABORT, body, time.monotonic() + TELL_S, must=False)

    def wake(self) -> None:
        """A request follows in a moment: if the daemon may be asleep, it can wake up meanwhile, at
        the price of one system call. Never waits, never raises."""
        if time.monotonic() - self._heard < AWAKE_S:
            return
        with self._lock:
            if self.dead is not None:
                return
            self._users += 1
        free = False
        try:
            free = self._sending.acquire(blocking=False)  # else what is being sent wakes it
            if free and self._socket.send(_WAKE) < len(_WAKE):
                self.close("a request could not be sent as a whole")
        except OSError:
            pass  # the request will tell
        finally:
            if free:
                self._sending.release()
            with self._lock:
                self._users -= 1
                self._close_unused()

    def _tell(self, verb: int, body: bytes, deadline: float, *, must: bool = True) -> bool:
        """Send a request that is not answered; False when the connection has ended by now, as it
        does when the request cannot be sent and `must` be."""
        frame = HEADER.pack(AFTER_LENGTH + len(body), verb, 0, 0, NO_ANSWER) + body
        with self._lock:
            if self.dead is not None:
                return False
            self._users += 1  # the socket stays open
        try:
            self._send(frame, deadline)  # which fails once the other side is closed
            return True
        except KVStoreError:
            if must:
                self.close("the end of a lease could not be sent")
            return False
        finally:
            with self._lock:
                self._users -= 1
                self._close_unused()

    def whole(self) -> bool:
        """Whether the connection has not ended by now: see `release` for what that says of leases,
        also of those that are held by the process whose session this one has joined."""
        with self._lock:
            return self.dead is None and self._whole()

    def _whole(self) -> bool:
        poll = select.poll()  # one for each call: two threads may not use one at once
        poll.register(self._socket, select.POLLRDHUP)
        return not poll.poll(0)

    def _send(self, frame: bytes, deadline: float) -> None:
        if not self._sending.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise self._late("to send")
        sent = 0
        try:
            while sent < len(frame):
                try:
                    sent += self._socket.send(frame[sent:] if sent else frame)
                except BlockingIOError:
                    left = deadline - time.monotonic()
                    ready = select.poll()
                    ready.register(self._socket, select.POLLOUT)
                    if left <= 0 or not ready.poll(left * 1e3 + 1):
                        raise self._late("to take the request") from None
                except OSError as error:
                    raise self._lost(error) from None
        finally:
            self._sending.release()
            if 0 < sent < len(frame):  # half a frame is out: nothing sensible can follow it
                self.close("a request could not be sent as a whole")

    def _wait(self, call: _Call, deadline: float) -> None:
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
            # `_hand_over` writes the answer and then looks for who is to be woken; here it is the
            # other way round, so that an answer is seen here or wakes.
            if call.answer is not None:
                return
            if not wake.wait(max(0.0, deadline - time.monotonic())) and call.answer is None:
                raise self._late("to answer")
        try:
            self._read(deadline)
            while call.answer is None:
                if time.monotonic() >= deadline:  # others' answers may come without end
                    raise self._late("to answer")
                self._read(deadline)
        finally:
            self._reading = False  # whoever saw it true can be woken by `_leave`, which follows

    def _leave(self, number: int, call: _Call, verb: int) -> None:
        """A caller goes, with its answer or without: somebody else must read then, and undo what
        it may still be granted."""
        with self._lock:
            del self._calls[number]
            if call.answer is None and verb in _UNDO and self.dead is None:
                call.wake = None  # nobody sleeps on it: it must not be chosen to read
                self._calls[number] = call
                self._abandoned[number] = verb, call
                if not self._undoing:
                    self._undoing = True
                    threading.Thread(
                        target=self._undo_abandoned, name="kvstore-undo", daemon=True
                    ).start()
            self._wake_a_reader()
            self._close_unused()

    def _wake_a_reader(self) -> None:
        if self._reading:
            return
        for other in self._calls.values():
            if other.wake is not None and other.answer is None:
                other.wake.set()
                return

    def _close_unused(self) -> None:
        """Close the socket when nobody can be using it any more: its number may be somebody else's
        file in the next moment."""
        if self.dead is not None and not self._calls and not self._users:
            self._socket.close()

    def _undo_abandoned(self) -> None:
        """Wait for the answers of calls that were given up, and give back what was granted."""
        while True:
            with self._lock:
                if not self._abandoned:
                    self._undoing = False
                    return
                number, (verb, call) = next(iter(self._abandoned.items()))
            try:
                self._wait(call, time.monotonic() + ABANDONED_S)
                self._undo(verb, call)
            except KVStoreError as error:
                self.close(f"a call that was given up could not be undone: {error}")
            finally:
                with self._lock:
                    del self._abandoned[number]
                self._leave(number, call, pb.VERB_UNSPECIFIED)

    def _undo(self, verb: int, call: _Call) -> None:
        assert call.answer is not None
        status, payload = call.answer
        reply, granted, undo_verb, undo = _UNDO[verb]
        lease = 0 if status else getattr(reply.FromString(payload), granted)
        if lease:
            answer = pb.ReleaseReply if undo_verb == pb.RELEASE else pb.AbortReply
            self.call(undo_verb, undo(lease=lease), answer, time.monotonic() + UNDO_S)

    def _read(self, deadline: float) -> None:
        """Take in what has arrived; wait for something first, if nothing has."""
        if not self._readable(deadline):
            raise self._late("to answer")
        try:
            data = self._socket.recv(MORE_BYTES if self._received else READ_BYTES)
            if not data:
                raise self._lost(None)
            self._take(self._received + data if self._received else data)
        except BlockingIOError:
            return  # woken for nothing
        except OSError as error:
            raise self._lost(error) from None
        except BaseException:  # an interrupt: what has been read may be lost
            self.close("interrupted while reading")
            raise

    def _readable(self, deadline: float) -> bool:
        """Whether something has arrived by the deadline."""
        poll, spin = self._poll.poll, self._spin
        if spin.pays():
            until = time.monotonic() + spin.window_s
            while time.monotonic() < until:
                if poll(0):
                    spin.found()
                    return True
            spin.missed()
        left = deadline - time.monotonic()
        return bool(poll(left * 1e3 + 1 if left > 0 else 0))

    def _take(self, data: bytes) -> None:
        """Hand over the answers that are whole, keep the rest."""
        self._heard = time.monotonic()
        self._told = 0
        at, end = 0, len(data)
        while end - at >= HEADER.size:
            length, _, status, _, number = HEADER.unpack_from(data, at)
            if end - at - 4 < length:
                break
            self._hand_over(number, status, data[at + HEADER.size : at + 4 + length])
            at += 4 + length
        self._received = data[at:]

    def _hand_over(self, number: int, status: int, payload: bytes) -> None:
        """Give an answer to who waits for it, if anybody does."""
        waiting = self._calls.get(number)
        if waiting is not None:
            waiting.answer = (status, payload)
            if waiting.wake is not None:
                waiting.wake.set()

    def _late(self, what: str) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"the daemon at {self.path} took longer than the deadline {what}: go on without it"
        )

    def _lost(self, error: OSError | None) -> SessionLost:
        self.close(str(error) if error else "the daemon closed it")
        return SessionLost(f"the connection to {self.path} has ended: {self.dead}")
