"""Strangers at the doors: frames and gRPC calls as the client library would never send them."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import grpc

from kvstore.errors import BY_NAME, KVStoreError
from kvstore.protos import kvstore_pb2 as pb
from kvstore.protos import kvstore_pb2_grpc as pb_grpc
from kvstore.types import PROTOCOL_VERSION, Layout
from tests.e2e.harness import Daemon

HEADER = struct.Struct("<IBBHI")
TIMEOUT_S = 5.0


class Stranger(Protocol):
    """One connection through either door, without any checks of its own."""

    def attach(self, protocol: int = PROTOCOL_VERSION, pid: int = 0) -> Any:
        """Open the session; the daemon's answer."""

    def call(self, verb: int, request: Any) -> Any:
        """The daemon's answer; raises what it refuses with."""

    def close(self) -> None:
        """Go away."""


def _answer_class(verb: int) -> Any:
    return getattr(pb, pb.Verb.Name(verb).capitalize() + "Reply")


class RawHatch:
    """A plain socket at the hatch."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(TIMEOUT_S)
        self.socket.connect(str(path))
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def attach(self, protocol: int = PROTOCOL_VERSION, pid: int = 0) -> Any:
        return self.call(pb.ATTACH, pb.AttachRequest(protocol=protocol, client="raw", pid=pid))

    def call(self, verb: int, request: Any) -> Any:
        number = self.send(verb, request)
        status, answered, payload = self.receive()
        assert answered == number
        if status:
            refusal = pb.ErrorReply.FromString(payload)
            raise BY_NAME[refusal.error](refusal.message)
        return _answer_class(verb).FromString(payload)

    def send(self, verb: int, request: Any) -> int:
        """Send a message, or bytes in its place; the number of the call."""
        body = request if isinstance(request, bytes) else request.SerializeToString()
        self._number += 1
        self.socket.sendall(HEADER.pack(8 + len(body), verb, 0, 0, self._number) + body)
        return self._number

    def receive(self) -> tuple[int, int, bytes]:
        """Status, number and message of the next answer. EOFError when there will be none."""
        length, _, status, _, number = HEADER.unpack(self._exactly(HEADER.size))
        return status, number, self._exactly(length - 8)

    def is_cut_off(self) -> bool:
        """Whether the daemon ends the connection, whatever it says before."""
        try:
            while True:
                self.receive()
        except (EOFError, ConnectionError):
            return True
        except TimeoutError:
            return False

    def close(self) -> None:
        self.socket.close()

    def _exactly(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            more = self.socket.recv(count - len(found))
            if not more:
                raise EOFError
            found += more
        return found


class RawFront:
    """A plain gRPC channel at the front door."""

    def __init__(self, path: Path) -> None:
        self.channel: Any = grpc.insecure_channel(f"unix:{path}")
        self.stub: Any = pb_grpc.KVStoreStub(self.channel)
        self.stream: Any = None
        self.metadata: tuple[tuple[str, bytes], ...] = ()

    def attach(self, protocol: int = PROTOCOL_VERSION, pid: int = 0) -> Any:
        self.stream = self.stub.Attach(pb.AttachRequest(protocol=protocol, pid=pid), timeout=60)
        try:
            first = next(self.stream)
        except grpc.RpcError as error:
            raise self._typed(error) from None
        self.metadata = (("kvstore-session-bin", first.token),)
        return first

    def call(self, verb: int, request: Any, timeout_s: float = TIMEOUT_S) -> Any:
        method = getattr(self.stub, pb.Verb.Name(verb).capitalize())
        try:
            return method(request, timeout=timeout_s, metadata=self.metadata)
        except grpc.RpcError as error:
            raise self._typed(error) from None

    def close(self) -> None:
        if self.stream is not None:
            self.stream.cancel()
        self.channel.close()

    @staticmethod
    def _typed(error: Any) -> Exception:
        for entry, value in error.trailing_metadata() or ():
            if entry == "kvstore-error":
                return BY_NAME[value](error.details())
        return KVStoreError(f"{error.code()}: {error.details()}")


def stranger(daemon: Daemon, door: str, *, tenant: str = "default") -> Stranger:
    """A connection that has not attached yet."""
    path = daemon.socket(door, tenant)
    return RawHatch(path) if door == "hatch" else RawFront(path)


def open_layout(at: Stranger, layout: Layout) -> int:
    """The daemon's number for a layout."""
    sent = pb.LayoutMessage(
        model=layout.model,
        engine=layout.engine,
        dtype=layout.dtype,
        block_tokens=layout.block_tokens,
        shards=layout.shards,
        shard_bytes=layout.shard_bytes,
    )
    number: int = at.call(pb.OPEN, pb.OpenRequest(layout=sent)).layout
    return number


def packed(layout: int, keys: list[bytes]) -> Any:
    """Keys as they travel."""
    return pb.Keys(layout=layout, hash_bytes=len(keys[0]) if keys else 0, hashes=b"".join(keys))
