"""The front door: the schema's gRPC service on a Unix socket, for any language.

A session is an Attach stream: its first message tells the token that every other call carries in
the metadata entry `kvstore-session-bin`; the end of the stream, from any cause, ends the session.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import structlog

from kvstore.errors import (
    GRPC_STATUS,
    InternalError,
    InvalidRequest,
    KVStoreError,
    NotPermitted,
    SessionLost,
)
from kvstore.hatch import FRAME_BYTES_MAX, UNATTACHED_MAX
from kvstore.leases import Session
from kvstore.peers import Peer
from kvstore.processes import Processes
from kvstore.protos import kvstore_pb2 as pb
from kvstore.protos import kvstore_pb2_grpc as pb_grpc
from kvstore.service import Service
from kvstore.turns import Share, may_be_long

SESSION_ENTRY = "kvstore-session-bin"
ERROR_ENTRY = "kvstore-error"
METADATA_BYTES_MAX = 16 << 10
CALLS_PER_CONNECTION_MAX = 128  # a stream of a session among them; more wait at the client's end
CALLS_MAX = 4_096  # of all connections, beside the streams of sessions; more are refused

# How the grant of a call whose caller has gone is undone.
_UNDO: dict[int, tuple[int, Any]] = {
    pb.ACQUIRE: (pb.RELEASE, pb.ReleaseRequest),
    pb.RESERVE: (pb.ABORT, pb.AbortRequest),
}

log = structlog.get_logger()


@dataclasses.dataclass(eq=False)
class _Attached:
    """A session, and the calls of it that wait for their answers."""

    session: Session
    over: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    waiting: set[asyncio.Future[Any]] = dataclasses.field(default_factory=set)
    ended: bool = False


class FrontDoor:
    """The gRPC server of one tenant."""

    def __init__(
        self,
        service: Service,
        processes: Processes,
        path: Path,
        *,
        gid: int | None,
        share: Share,
    ) -> None:
        self._service = service
        self._processes = processes
        self._path = path
        self._gid = gid
        self._share = share
        self._sessions: dict[bytes, _Attached] = {}
        self._loop = asyncio.get_running_loop()
        sessions = service.store.limits.sessions
        self._server: Any = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", FRAME_BYTES_MAX),
                ("grpc.max_metadata_size", METADATA_BYTES_MAX),
                ("grpc.max_concurrent_streams", CALLS_PER_CONNECTION_MAX),
                ("grpc.max_allowed_incoming_connections", sessions + UNATTACHED_MAX),
                ("grpc.so_reuseport", 0),
            ],
            maximum_concurrent_rpcs=sessions + CALLS_MAX,
        )
        pb_grpc.add_KVStoreServicer_to_server(self._servicer(), self._server)

    async def start(self) -> None:
        """Listen. The socket is created with mode 0660 and the tenant's group."""
        self._path.unlink(missing_ok=True)
        before = os.umask(0o117)
        try:
            self._server.add_insecure_port(f"unix:{self._path}")
            await self._server.start()
        finally:
            os.umask(before)
        if self._gid is not None:
            os.chown(self._path, -1, self._gid)

    async def close(self) -> None:
        """Cut off every call."""
        await self._server.stop(grace=0)
        self._path.unlink(missing_ok=True)

    def end(self, number: int) -> bool:
        """End a session; False when none is of that number."""
        found = [one for one in self._sessions.values() if one.session.number == number]
        for attached in found:
            attached.over.set()
        return bool(found)

    def _servicer(self) -> Any:
        servicer = pb_grpc.KVStoreServicer()
        setattr(servicer, "Attach", self._attach)  # noqa: B010  # the class is generated
        for verb in pb.Verb.values():
            if verb not in (pb.VERB_UNSPECIFIED, pb.ATTACH):
                setattr(servicer, pb.Verb.Name(verb).capitalize(), self._handler(verb))
        return servicer

    async def _attach(self, request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            if request.join:
                raise InvalidRequest("a session is joined through the hatch: kvstore.sock")
            session, reply = self._service.attach(request)
        except KVStoreError as error:
            await self._abort(context, error)
            return
        self._processes.joined(session, Peer(self._loop, request.pid, claimed=True))
        token = session.token
        attached = self._sessions[token] = _Attached(session)
        log.info("client attached", session=session.number, door="front", pid=request.pid)
        try:
            yield reply
            await attached.over.wait()  # or until the client, or the server, ends the stream
        finally:
            del self._sessions[token]
            attached.ended = True
            for late in attached.waiting:
                if not late.done():
                    late.set_result(SessionLost("the session has ended: call Attach again"))
            if self._service.doors is not None:
                self._service.doors.cut(session.number)  # who has joined it
            # Without a process to watch, what it was writing stays as it is until it says so.
            if self._service.store.sessions.get(session.number) is session:
                self._processes.ended(session.number, self._service.detach(session))
            log.info("client gone", session=session.number, door="front")

    def _handler(self, verb: int) -> Any:
        async def handle(request: Any, context: Any) -> Any:
            late: asyncio.Future[Any] = self._loop.create_future()
            try:
                attached = self._attached(context)
                if verb == pb.TRACE:
                    raise NotPermitted(
                        "gRPC does not say whose call it is: record a trace through kvstore.sock"
                    )

                def answer(message: Any) -> None:
                    if late.done():
                        self._undo(attached, verb, message)
                    else:
                        late.set_result(message)

                size = request.ByteSize()
                await self._turn(attached, verb, size)
                started = time.monotonic()
                reply = self._service.handle(attached.session, verb, request, answer)
                long = may_be_long(verb, size)
                self._share.took(started, time.monotonic(), long=long)
                self._loop.call_soon(self._service.settle)
                if reply is None:
                    reply = await self._late(attached, verb, late)
                if isinstance(reply, KVStoreError):
                    raise reply
                if (context.time_remaining() or 1.0) <= 0:  # None: the caller waits for ever
                    self._undo(attached, verb, reply)
                return reply
            except KVStoreError as error:
                self._service.store.counters.errors[type(error).__name__] += 1
                await self._abort(context, error)
            except asyncio.CancelledError:
                raise
            except Exception:
                log.exception("defect in a request", verb=verb, door="front")
                await self._abort(
                    context, InternalError("the request met a defect of the daemon: see its log")
                )

        return handle

    async def _late(self, attached: _Attached, verb: int, late: asyncio.Future[Any]) -> Any:
        """The answer that comes later. When the caller goes before, what it is granted is undone,
        here or when it comes."""
        attached.waiting.add(late)
        try:
            return await late
        except asyncio.CancelledError:
            if late.done() and not late.cancelled():
                self._undo(attached, verb, late.result())
            raise
        finally:
            attached.waiting.discard(late)

    async def _turn(self, attached: _Attached, verb: int, request_bytes: int) -> None:
        """Wait until the request may be carried out."""
        long, bucket = may_be_long(verb, request_bytes), attached.session.bucket
        while pause_s := self._share.wait_s(bucket, long=long):
            await asyncio.sleep(pause_s)  # nobody tells: it is time that is due
            if attached.ended:
                raise SessionLost("the session has ended: call Attach again")
        self._share.paid(bucket, request_bytes)

    def _undo(self, attached: _Attached, verb: int, reply: Any) -> None:
        """Nobody will hear of this answer: what it grants goes back."""
        lease = getattr(reply, "lease", 0)
        if verb in _UNDO and lease and not attached.ended:
            end, request = _UNDO[verb]
            self._service.handle(attached.session, end, request(lease=lease), lambda _: None)
            self._loop.call_soon(self._service.settle)

    def _attached(self, context: Any) -> _Attached:
        for entry, value in context.invocation_metadata():
            if entry == SESSION_ENTRY and value in self._sessions:
                return self._sessions[value]
        raise SessionLost(
            f"the call carries no token of a live session in {SESSION_ENTRY}: call Attach, keep "
            "its stream open, and send the token that it gave"
        )

    @staticmethod
    async def _abort(context: Any, error: KVStoreError) -> None:
        code = getattr(grpc.StatusCode, GRPC_STATUS[type(error)])
        await context.abort(code, str(error), ((ERROR_ENTRY, type(error).__name__),))
