"""The front door: the schema's gRPC service on a Unix socket, for any language.

A session is an Attach stream: its first message tells the token that every other call carries in the
metadata entry `kvstore-session-bin`; the end of the stream, from any cause, is the end of the session.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import structlog

from kvstore.errors import GRPC_STATUS, InternalError, KVStoreError, SessionLost
from kvstore.hatch import FRAME_BYTES_MAX
from kvstore.leases import Session
from kvstore.peers import Peer
from kvstore.protos import kvstore_pb2 as pb
from kvstore.protos import kvstore_pb2_grpc as pb_grpc
from kvstore.service import Service

SESSION_ENTRY = "kvstore-session-bin"
ERROR_ENTRY = "kvstore-error"

log = structlog.get_logger()


class FrontDoor:
    """The gRPC server of one tenant."""

    def __init__(self, service: Service, path: Path, *, gid: int | None) -> None:
        self._service = service
        self._path = path
        self._gid = gid
        self._sessions: dict[bytes, Session] = {}
        self._loop = asyncio.get_running_loop()
        self._server: Any = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", FRAME_BYTES_MAX),
                ("grpc.so_reuseport", 0),
            ],
            maximum_concurrent_rpcs=4_096,
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

    def _servicer(self) -> Any:
        servicer = pb_grpc.KVStoreServicer()
        setattr(servicer, "Attach", self._attach)  # noqa: B010  # the class is generated
        for verb in pb.Verb.values():
            if verb not in (pb.VERB_UNSPECIFIED, pb.ATTACH):
                setattr(servicer, pb.Verb.Name(verb).capitalize(), self._handler(verb))
        return servicer

    async def _attach(self, request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            session, reply = self._service.attach(request)
        except KVStoreError as error:
            await self._abort(context, error)
            return
        peer = Peer(self._loop, request.pid) if request.pid else None
        token = secrets.token_bytes(16)
        self._sessions[token] = session
        log.info("client attached", session=session.number, door="front", pid=request.pid)
        try:
            reply.token = token
            yield reply
            await asyncio.Event().wait()  # until the client, or the server, ends the stream
        finally:
            del self._sessions[token]
            blocks = self._service.detach(session)
            log.info("client gone", session=session.number, door="front")
            if blocks and peer is not None:
                peer.when_gone(lambda: self._service.unquarantine(blocks))
            elif peer is not None:
                peer.close()
            # Without a process to watch, its slots stay quarantined until the daemon restarts.

    def _handler(self, verb: int) -> Any:
        async def handle(request: Any, context: Any) -> Any:
            late: asyncio.Future[Any] = self._loop.create_future()

            def answer(message: Any) -> None:
                if not late.done():
                    late.set_result(message)

            try:
                reply = self._service.handle(self._session(context), verb, request, answer)
                self._loop.call_soon(self._service.settle)
                if reply is None:
                    reply = await late
                if isinstance(reply, KVStoreError):
                    raise reply
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

    def _session(self, context: Any) -> Session:
        for entry, value in context.invocation_metadata():
            if entry == SESSION_ENTRY and value in self._sessions:
                return self._sessions[value]
        raise SessionLost(
            f"the call carries no token of a live session in {SESSION_ENTRY}: call Attach, keep its "
            "stream open, and send the token that it gave"
        )

    @staticmethod
    async def _abort(context: Any, error: KVStoreError) -> None:
        code = getattr(grpc.StatusCode, GRPC_STATUS[type(error)])
        await context.abort(code, str(error), ((ERROR_ENTRY, type(error).__name__),))
