"""The hatch: frames of the schema's messages on a Unix stream socket; a connection is a session.

    request    u32 length of what follows | u8 verb   | u8 0      | u16 0 | u32 number | message
    answer     u32 length of what follows | u8 verb   | u8 status | u16 0 | u32 number | message

All little-endian. Status 0 carries the verb's reply, status 1 an ErrorReply. The number is the
caller's; answers come in any order. The first request must be ATTACH. A frame that is too long, or
no ATTACH at first, ends the connection: there is no telling where the next one would start.

A plain non-blocking socket on the loop's reader and writer, not a transport: an answer leaves in
the system call that follows the request, before anything else that can wait.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

import structlog

from kvstore.busy_poll import BusyPoll
from kvstore.errors import InternalError, InvalidRequest, KVStoreError, NotPermitted
from kvstore.leases import Session
from kvstore.limits import Bucket
from kvstore.peers import Peer
from kvstore.processes import Processes
from kvstore.protos import kvstore_pb2 as pb
from kvstore.service import Service
from kvstore.turns import TURN_S, Share, may_be_long

HEADER = struct.Struct("<IBBHI")
AFTER_LENGTH = HEADER.size - 4
OK, ERROR = 0, 1
NO_ANSWER = 0  # the number of requests whose answer nobody waits for
FRAME_BYTES_MAX = 8 << 20  # 65,536 hashes of 64 bytes, and room
UNSENT_BYTES_MAX = 4 << 20  # a client that does not read its answers is cut off
READ_BYTES, MORE_BYTES = 64 << 10, 256 << 10  # at once, and of what is known to be large
ATTACH_S = 10.0  # a connection that has not attached by then is closed
UNATTACHED_MAX = 64  # connections beyond the number of sessions that may be
ENDING_S = 0.5  # for what a process had sent before it ended
ACCEPT_AGAIN_S = 0.2  # after the system refused to give us a connection

log = structlog.get_logger()


class Hatch:
    """The listening socket of one tenant, and its connections."""

    def __init__(
        self,
        service: Service,
        processes: Processes,
        path: Path,
        *,
        gid: int | None,
        busy_poll: BusyPoll,
        share: Share,
    ) -> None:
        self._service = service
        self.processes = processes
        self.busy_poll = busy_poll
        self.share = share
        self._accepting = False
        self._loop = asyncio.get_running_loop()
        self.path = path
        self.connections: set[Connection] = set()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        path.unlink(missing_ok=True)
        before = os.umask(0o117)  # 0660 from the first moment on
        try:
            self._socket.bind(os.fspath(path))
        finally:
            os.umask(before)
        if gid is not None:
            os.chown(path, -1, gid)
        self._socket.listen(1_024)
        self._listen()

    def close(self) -> None:
        """No new clients; the connected ones are cut off."""
        self._loop.remove_reader(self._socket)
        self._socket.close()
        self.path.unlink(missing_ok=True)
        for connection in list(self.connections):
            connection.close("the daemon stops")

    def end(self, number: int, why: str) -> bool:
        """End a session and all its connections; False when none is of that number."""
        found = self.cut(number, why)
        if found:
            found[0].detach()
        return bool(found)

    def cut(self, number: int, why: str) -> list[Connection]:
        """Close all connections of a session, before anything that it held is given away: who finds
        his own whole after a copy believes that his leases held. Returns them."""
        found = [one for one in self.connections if one.session_number == number]
        for connection in found:
            connection.cut(why)
        return found

    def _listen(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        """Accept one client, when it is its turn."""
        if not self._accepting:
            self._accepting = True
            self.share.later(self._accept_now)

    def _accept_now(self) -> None:
        self._accepting = False
        if self._socket.fileno() < 0:
            return
        started = time.monotonic()
        self._accept_one()
        self.share.took(started, time.monotonic())

    def _accept_one(self) -> None:
        try:
            accepted, _ = self._socket.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:
            log.error(
                "cannot accept a client", tenant=self._service.info.tenant, problem=str(error)
            )
            # It stays readable: without a pause the loop would do nothing but come back here.
            self._loop.remove_reader(self._socket)
            self._loop.call_later(ACCEPT_AGAIN_S, self._listen)
            return
        if len(self.connections) >= self._service.store.limits.sessions + UNATTACHED_MAX:
            accepted.close()
            return
        self.connections.add(Connection(self, self._service, self._loop, accepted))


class Connection:
    """One client."""

    def __init__(
        self,
        hatch: Hatch,
        service: Service,
        loop: asyncio.AbstractEventLoop,
        accepted: socket.socket,
    ) -> None:
        accepted.setblocking(False)
        self._hatch = hatch
        self._service = service
        self._loop = loop
        self._socket: socket.socket | None = accepted
        self._peer = Peer.of(loop, accepted)
        self._session: Session | None = None
        self._joined = False  # the session is another connection's, and goes on without this one
        self._share = hatch.share
        self._bucket = Bucket()  # of the session, once there is one
        self._received: bytes | bytearray = b""
        self._more = False  # whether it holds requests that wait for their turn
        self._waiting = False  # for its turn; until then it is not read from
        self._muted = False  # the loop does not tell that it is readable
        self._long = False  # whether a request of this turn may have taken long
        self._ending = False  # its process has ended
        self._unsent = bytearray()
        self._attach_timer = loop.call_later(ATTACH_S, self.close, "it did not attach")
        loop.add_reader(accepted, self._readable)
        self._peer.when_gone(self._process_ended)

    @property
    def session_number(self) -> int:
        """Of its session; 0 before it has one."""
        return self._session.number if self._session else 0

    def close(self, why: str) -> None:
        """End the session, unless this connection has only joined it; what it was writing stays
        quarantined while its processes live."""
        if self._socket is None:
            return
        self.cut(why)
        if self._session is not None and not self._joined:
            self._hatch.cut(self._session.number, "its session has ended")
            self.detach()

    def cut(self, why: str) -> None:
        """Close the connection and nothing else."""
        if self._socket is None:
            return
        self._attach_timer.cancel()
        self._loop.remove_reader(self._socket)
        if self._unsent:
            self._loop.remove_writer(self._socket)
        self._socket.close()
        self._socket = None
        self._hatch.connections.discard(self)
        if self._session is None:
            self._peer.close()
        else:
            log.info("client gone", session=self._session.number, pid=self._peer.pid, why=why)

    def detach(self) -> None:
        """End the session, all of whose connections are closed."""
        session = self._session
        if session is not None and self._service.store.sessions.get(session.number) is session:
            self._hatch.processes.ended(session.number, self._service.detach(session))

    def _process_ended(self) -> None:
        """A child that it forked may hold the connection open: the session ends all the same."""
        if self._socket is None:
            return
        self._ending = True  # what it had sent before still counts
        self._loop.call_later(ENDING_S, self.close, "its process has ended")
        self._later()

    def _readable(self) -> None:
        assert self._socket is not None
        if self._waiting:
            if not self._muted:
                self._muted = True
                self._loop.remove_reader(self._socket)
        elif self._share.full:
            self._later()
        else:
            self._turn()

    def _later(self) -> None:
        self._waiting = True
        self._share.later(self._resume)

    def _resume(self) -> None:
        if not self._waiting or self._socket is None:
            return
        self._waiting = False
        self._turn()
        if self._socket is None or self._waiting:
            return
        if self._ending:
            self._later()
        elif self._muted:
            self._muted = False
            self._loop.add_reader(self._socket, self._readable)

    def _turn(self) -> None:
        """Read, and carry out what there is: for TURN_S, and at least one request."""
        started, self._long = time.monotonic(), False
        if self._more or self._receive():
            self._carry_out(started)
            self._hatch.busy_poll.served()
        self._share.took(started, time.monotonic(), long=self._long)

    def _receive(self) -> bool:
        """Whether something came."""
        assert self._socket is not None
        try:
            data = self._socket.recv(MORE_BYTES if self._received else READ_BYTES)
        except BlockingIOError:
            if self._ending:
                self.close("its process has ended")
            return False
        except OSError as error:
            self.close(str(error))
            return False
        if not data:
            self.close("it closed the connection")
            return False
        if not self._received:
            self._received = data
        elif isinstance(self._received, bytearray):
            self._received += data
        else:
            self._received = bytearray(self._received) + data
        return True

    def _carry_out(self, started: float) -> None:
        data = self._received
        at, end, self._more = 0, len(data), False
        while end - at >= HEADER.size and self._socket is not None:
            length, verb, _, _, number = HEADER.unpack_from(data, at)
            if not AFTER_LENGTH <= length <= FRAME_BYTES_MAX:
                self.close(f"a frame of {length} bytes")
                return
            if end - at - 4 < length:
                break
            if self._must_wait(verb, length, started if at else None):
                self._more = True
                break
            self._request(verb, number, bytes(data[at + HEADER.size : at + 4 + length]))
            self._share.paid(self._bucket, length)
            at += 4 + length
        self._received = data[at:]

    def _must_wait(self, verb: int, length: int, started: float | None) -> bool:
        """Whether the next request has to wait. It is arranged that its turn comes."""
        long = may_be_long(verb, length)
        pause_s = 0.0 if self._ending else self._share.wait_s(self._bucket, long=long)
        if pause_s:
            self._waiting = True
            self._loop.call_later(pause_s, self._share.later, self._resume)
            return True
        if started is not None and time.monotonic() - started > TURN_S:
            self._later()
            return True
        self._long = self._long or long
        return False

    def _request(self, verb: int, number: int, payload: bytes) -> None:
        if self._session is None:
            self._attach(verb, number, payload)
            return
        if verb == pb.WAKE:
            return
        try:
            if verb == pb.TRACE and self._peer.uid not in (0, os.geteuid()):
                raise NotPermitted(
                    f"user {self._peer.uid} may not have the daemon write files: record a trace as "
                    "root or as the daemon's user"
                )
            reply = self._service.handle_bytes(
                self._session, verb, payload, lambda late: self._answer(verb, number, late)
            )
        except KVStoreError as error:
            reply = error
        except Exception:
            log.exception("defect in a request", verb=verb, session=self._session.number)
            reply = InternalError("the request met a defect of the daemon: see its log")
        if reply is not None:
            self._answer(verb, number, reply)
        self._service.settle_later(verb)

    def _attach(self, verb: int, number: int, payload: bytes) -> None:
        try:
            if verb != pb.ATTACH:
                raise InvalidRequest("the first request of a connection must be ATTACH")
            try:
                request = pb.AttachRequest.FromString(payload)
            except Exception as error:
                raise InvalidRequest(f"the attach request cannot be decoded: {error}") from None
            self._session, reply = self._service.attach(request)
        except KVStoreError as error:
            self._answer(verb, number, error)
            self.close(str(error))
            return
        self._attach_timer.cancel()
        self._bucket = self._session.bucket
        self._joined = bool(request.join)
        self._hatch.processes.joined(self._session, self._peer)
        log.info("client attached", session=self._session.number, pid=self._peer.pid)
        self._answer(verb, number, reply)

    def _answer(self, verb: int, number: int, reply: Any) -> None:
        if self._socket is None or number == NO_ANSWER:
            return
        status = OK
        if isinstance(reply, KVStoreError):
            self._service.store.counters.errors[type(reply).__name__] += 1
            reply, status = pb.ErrorReply(error=type(reply).__name__, message=str(reply)), ERROR
        body = reply.SerializeToString()
        frame = HEADER.pack(AFTER_LENGTH + len(body), verb, status, 0, number) + body
        if self._unsent:
            self._unsent += frame
        else:
            try:
                sent = self._socket.send(frame)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._loop.call_soon(self.close, "it does not take answers any more")
                return
            if sent == len(frame):
                return
            self._unsent += frame[sent:]
            self._loop.add_writer(self._socket, self._writable)
        if len(self._unsent) > UNSENT_BYTES_MAX:
            self._loop.call_soon(self.close, "it does not read its answers")

    def _writable(self) -> None:
        assert self._socket is not None
        try:
            sent = self._socket.send(self._unsent)
        except BlockingIOError:
            return
        except OSError as error:
            self.close(str(error))
            return
        del self._unsent[:sent]
        if not self._unsent:
            self._loop.remove_writer(self._socket)
