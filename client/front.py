"""A connection through the front door: gRPC in place of the hatch, same calls. Needs grpcio."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from kvstore.client.wire import connect_socket
from kvstore.errors import BY_NAME, DeadlineExceeded, InternalError, KVStoreError, SessionLost
from kvstore.protos import kvstore_pb2 as pb
from kvstore.protos import kvstore_pb2_grpc as pb_grpc

SESSION_ENTRY = "kvstore-session-bin"
AT_ONCE_BYTES = 64 << 10  # what a socket takes even when nobody reads
ERROR_ENTRY = "kvstore-error"

# After the deadline nobody can tell what these did; with the session all its leases end.
_LEASE_VERBS = (pb.ACQUIRE, pb.RESERVE, pb.RELEASE, pb.COMMIT, pb.ABORT)


class FrontDoorWire:
    """The same interface as Wire; grpcio takes care of threads."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        # grpcio tries again and again where nobody listens, and does not say why: ask first.
        connect_socket(path, timeout_s).close()
        self.path = path
        self.pid = os.getpid()
        self.dead: str | None = None
        self._stuck = False  # a request is half written, and closing would wait for it
        self._channel: Any = grpc.insecure_channel(
            f"unix:{path}", options=[("grpc.max_receive_message_length", 64 << 20)]
        )
        self._stub: Any = pb_grpc.KVStoreStub(self._channel)
        self._stream: Any = None
        self._metadata: tuple[tuple[str, bytes], ...] = ()

    def close(self, why: str = "the client closed it") -> None:
        """The end of the Attach stream is the end of the session."""
        if self.dead is None:
            self.dead = why
        if self._stream is not None:
            self._stream.cancel()
        if not self._stuck:
            self._channel.close()

    def call(self, verb: int, request: Any, reply: Any, deadline: float) -> Any:
        """See Wire.call."""
        if self.dead is not None:
            raise SessionLost(f"the connection to {self.path} has ended: {self.dead}")
        try:
            if verb == pb.ATTACH:
                return self._attach(request, deadline)
            method = getattr(self._stub, pb.Verb.Name(verb).capitalize())
            left = max(0.001, deadline - time.monotonic())
            if request.ByteSize() <= AT_ONCE_BYTES:
                return method(request, timeout=left, metadata=self._metadata)
            return self._call_large(method, request, left)
        except grpc.RpcError as error:
            raise self._translate(verb, error) from None
        except ValueError:
            raise SessionLost(f"the connection to {self.path} has ended: {self.dead}") from None

    def _call_large(self, method: Any, request: Any, left: float) -> Any:
        """While a stopped daemon leaves a message half written, grpcio does not look at the
        deadline: somebody else must."""
        answer = method.future(request, timeout=left, metadata=self._metadata)
        try:
            return answer.result(timeout=left)
        except grpc.FutureTimeoutError:
            # Closing waits for the write as well.
            self._stuck = True
            self.close("a large request could not be sent in time")
            threading.Thread(target=self._channel.close, daemon=True).start()
            raise DeadlineExceeded(
                f"the daemon at {self.path} took longer than the deadline to take a request: go on "
                "without it"
            ) from None

    def release(self, lease: int, deadline: float) -> bool:
        """See Wire.release; here the daemon says whether it held."""
        try:
            request = pb.ReleaseRequest(lease=lease)
            return bool(self.call(pb.RELEASE, request, pb.ReleaseReply, deadline).held)
        except KVStoreError:
            return False

    def used(self, request: bytes) -> bool:
        """See Wire.used; this door takes no such message."""
        return False

    def whole(self) -> bool:
        """See Wire.whole; here it is known once the stream has ended."""
        return self.dead is None

    def settle(self, sessions: Sequence[int], deadline: float) -> None:
        """See Wire.settle."""
        with contextlib.suppress(KVStoreError):
            self.call(pb.SETTLE, pb.SettleRequest(sessions=sessions), pb.SettleReply, deadline)

    def wake(self) -> None:
        """See Wire.wake; gRPC's own threads are no faster for it."""

    def _attach(self, request: Any, deadline: float) -> Any:
        self._stream = self._stub.Attach(request)
        # The stream lives as long as the session, so only its first message can have a deadline.
        timer = threading.Timer(max(0.001, deadline - time.monotonic()), self._stream.cancel)
        timer.daemon = True
        timer.start()
        try:
            first = next(self._stream)
        finally:
            timer.cancel()
        self._metadata = ((SESSION_ENTRY, first.token),)
        if not self._stream.add_callback(self._ended):
            self._ended()
        return first

    def _ended(self) -> None:
        if self.dead is None:
            self.dead = "the daemon closed it"

    def _translate(self, verb: int, error: Any) -> Exception:
        with contextlib.suppress(AttributeError, TypeError):
            for entry, value in error.trailing_metadata() or ():
                if entry == ERROR_ENTRY:
                    kind = BY_NAME.get(value, InternalError)
                    if kind is SessionLost:
                        self.close(error.details())
                    return kind(error.details())
        code = error.code()
        late = code is grpc.StatusCode.DEADLINE_EXCEEDED
        if late or (verb == pb.ATTACH and code is grpc.StatusCode.CANCELLED):
            if verb in _LEASE_VERBS:
                self.close("a lease was granted, or ended, too late to be heard of")
            return DeadlineExceeded(
                f"the daemon at {self.path} took longer than the deadline: go on without it"
            )
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            self.close(str(error.details()))
            return SessionLost(f"the connection to {self.path} has ended: {self.dead}")
        return InternalError(f"{code}: {error.details()}")
