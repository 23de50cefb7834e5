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
from pathlib import Path
from typing import Any

import structlog

from kvstore.busy_poll import BusyPoll
from kvstore.errors import InternalError, InvalidRequest, KVStoreError
from kvstore.leases import Session
from kvstore.peers import Peer
from kvstore.protos import kvstore_pb2 as pb
from kvstore.service import Service

HEADER = struct.Struct("<IBBHI")
AFTER_LENGTH = HEADER.size - 4
OK, ERROR = 0, 1
NO_ANSWER = 0  # the number of requests whose answer nobody waits for
FRAME_BYTES_MAX = 8 << 20  # 65,536 hashes of 64 bytes, and room
UNSENT_BYTES_MAX = 16 << 20  # a client that does not read its answers is cut off
READ_BYTES = 256 << 10
ATTACH_S = 10.0  # a connection that has not attached by then is closed
UNATTACHED_MAX = 64  # connections beyond the number of sessions that may be
ACCEPT_AGAIN_S = 0.2  # after the system refused to give us a connection

log = structlog.get_logger()


class Hatch:
    """The listening socket of one tenant, and its connections."""

    def __init__(
        self, service: Service, path: Path, *, gid: int | None, busy_poll: BusyPoll
    ) -> None:
        self._service = service
        self.busy_poll = busy_poll
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

    def _listen(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.add_reader(self._socket, self._accept)

    def _accept(self) -> None:
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
        self._received = b""
        self._unsent = bytearray()
        self._attach_timer = loop.call_later(ATTACH_S, self.close, "it did not attach")
        loop.add_reader(accepted, self._readable)
        self._peer.when_gone(self._process_ended)

    def close(self, why: str) -> None:
        """End the session; what it was writing stays quarantined while its process lives."""
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
            return
        log.info("client gone", session=self._session.number, pid=self._peer.pid, why=why)
        blocks = self._service.detach(self._session)
        if blocks:
            log.warning("slots quarantined", pid=self._peer.pid, slots=len(blocks))
            self._peer.when_gone(lambda: self._service.unquarantine(blocks))
        else:
            self._peer.close()

    def _process_ended(self) -> None:
        """A child that it forked may hold the connection open: the session ends all the same."""
        self._readable()  # what it had sent before still counts
        self.close("its process has ended")

    def _readable(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self.close(str(error))
            return
        if not data:
            self.close("it closed the connection")
            return
        if self._received:
            data = self._received + data
        at, end = 0, len(data)
        while end - at >= HEADER.size and self._socket is not None:
            length, verb, _, _, number = HEADER.unpack_from(data, at)
            if not AFTER_LENGTH <= length <= FRAME_BYTES_MAX:
                self.close(f"a frame of {length} bytes")
                return
            if end - at - 4 < length:
                break
            self._request(verb, number, data[at + HEADER.size : at + 4 + length])
            at += 4 + length
        self._received = data[at:]
        self._hatch.busy_poll.served()

    def _request(self, verb: int, number: int, payload: bytes) -> None:
        if self._session is None:
            self._attach(verb, number, payload)
            return
        try:
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
        self._service.settle()

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
