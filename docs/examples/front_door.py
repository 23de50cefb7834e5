"""A client in plain gRPC, without kvstore's own: store a block, read it back by the front door.

    python docs/examples/front_door.py /run/kvstore/default/grpc.sock

Needs grpcio and the code that protoc generates from protos/kvstore.proto; in another language it is
the same dozen calls.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import sys

import grpc

from kvstore.protos import kvstore_pb2 as pb
from kvstore.protos import kvstore_pb2_grpc as pb_grpc


def main(socket: str) -> None:
    """Put one block, get it back, compare."""
    with grpc.insecure_channel(f"unix:{os.path.abspath(socket)}") as channel:
        stub = pb_grpc.KVStoreStub(channel)
        session = stub.Attach(pb.AttachRequest(protocol=1, client="example", pid=os.getpid()))
        attached = next(session)
        token = (("kvstore-session-bin", attached.token),)
        with open(attached.arena_path, "r+b") as file:
            assert os.fstat(file.fileno()).st_ino == attached.arena_inode
            arena = mmap.mmap(file.fileno(), attached.arena_bytes)

        block = os.urandom(64 << 10)
        layout = pb.LayoutMessage(
            model="example",
            engine="none/1",
            dtype="uint8",
            block_tokens=16,
            shards=1,
            shard_bytes=len(block),
        )
        number = stub.Open(pb.OpenRequest(layout=layout), metadata=token).layout
        name = hashlib.sha256(block).digest()
        keys = pb.Keys(layout=number, hash_bytes=len(name), hashes=name)

        reserved = stub.Reserve(pb.ReserveRequest(keys=keys, deadline_s=1), metadata=token)
        (offset,) = struct.unpack("<Q", reserved.offsets)
        arena[offset : offset + len(block)] = block
        print("stored:", stub.Commit(pb.CommitRequest(lease=reserved.lease), metadata=token).stored)  # noqa: T201

        granted = stub.Acquire(pb.AcquireRequest(keys=keys, deadline_s=1), metadata=token)
        (offset,) = struct.unpack("<Q", granted.offsets)
        copy = arena[offset : offset + len(block)]
        held = stub.Release(pb.ReleaseRequest(lease=granted.lease), metadata=token).held
        print("read back:", held and copy == block)  # noqa: T201
        session.cancel()


if __name__ == "__main__":
    main(sys.argv[1])
