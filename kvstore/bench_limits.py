"""This host's own limits, measured beside ours in one run: memcpy, O_DIRECT I/O, empty gRPC, and a
daemon that does nothing."""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from kvstore.client.copying import memmove

CACHE_BYTES = 64 << 20  # more than the last-level cache of most processors
ECHO_BYTES = 64  # about as long as a request for one block
EMPTY_METHOD = "/kvstore.bench.Empty/Call"


class Buffers:
    """Two host buffers of `count` blocks, filled, with their pages in place."""

    def __init__(self, count: int, block_bytes: int, seed: int) -> None:
        self.count = count
        self.block_bytes = block_bytes
        random = np.random.default_rng(seed)
        self.source = random.integers(0, 256, (count, block_bytes), dtype=np.uint8)
        self.target = np.ones_like(self.source)
        self.sources = list(self.source)
        self.targets = list(self.target)
        self._other = np.zeros(CACHE_BYTES, dtype=np.uint8)

    @property
    def size_bytes(self) -> int:
        """Bytes of each of the two."""
        return self.count * self.block_bytes

    def flush(self) -> None:
        """Put other bytes into the processor's caches, so that what comes next starts as cold as
        what it is compared with."""
        self._other += 1

    def memcpy(self, at: int | None = None) -> float:
        """Seconds of one plain memcpy from the one to the other: of all blocks, or of one."""
        size = self.size_bytes if at is None else self.block_bytes
        skip = 0 if at is None else at * size
        to, source = self.target.ctypes.data + skip, self.source.ctypes.data + skip
        started = time.perf_counter()
        memmove(to, source, size)
        return time.perf_counter() - started


class RawDisk:
    """A preallocated file under O_DIRECT, read and written by as many threads as the daemon has."""

    def __init__(self, path: Path, count: int, block_bytes: int, threads: int) -> None:
        self.path = path
        self.count = count
        self.block_bytes = block_bytes
        self.direct = True
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            self._file = os.open(path, flags | os.O_DIRECT, 0o600)
        except OSError:
            self._file, self.direct = os.open(path, flags, 0o600), False
        os.posix_fallocate(self._file, 0, count * block_bytes)
        self._memory = mmap.mmap(-1, count * block_bytes)
        self._memory.write(os.urandom(block_bytes) * count)
        self._view = memoryview(self._memory)
        self._threads = ThreadPoolExecutor(threads)

    def write(self) -> float:
        """Seconds to write all blocks, and to have them on the device's side of O_DIRECT."""
        return self._timed(lambda at, part: os.pwritev(self._file, [part], at))

    def read(self) -> float:
        """Seconds to read all blocks."""
        return self._timed(lambda at, part: os.preadv(self._file, [part], at))

    def close(self) -> None:
        """Remove the file."""
        self._threads.shutdown()
        os.close(self._file)
        self.path.unlink()

    def _timed(self, transfer: Any) -> float:
        size = self.block_bytes
        started = time.perf_counter()
        starts = range(0, self.count * size, size)
        for done in self._threads.map(lambda at: transfer(at, self._view[at : at + size]), starts):
            if done != size:
                raise OSError(f"{self.path}: {done} of {size} bytes")
        return time.perf_counter() - started


class Echo:
    """Another process that sends back what it gets through a Unix stream, and does nothing else:
    both ends look for it without ever sleeping. No daemon that is asked over a socket, in Python,
    can be faster; and this one takes a whole processor."""

    def __init__(self) -> None:
        self._socket, other = socket.socketpair()
        command = [sys.executable, "-m", "kvstore.bench_limits", "--echo", str(other.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[other.fileno()])
        other.close()
        self._socket.setblocking(True)
        self._socket.send(b"!")
        self._socket.recv(1)  # it is there
        self._socket.setblocking(False)

    def __enter__(self) -> Echo:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.wait()

    def call(self) -> None:
        """Ask, and get the answer."""
        self._socket.send(bytes(ECHO_BYTES))
        while True:
            with contextlib.suppress(BlockingIOError):
                self._socket.recv(ECHO_BYTES)
                return


def _echo(file: int) -> None:
    """The other side of `Echo`."""
    with socket.socket(fileno=file) as there:
        there.setblocking(False)
        while True:
            with contextlib.suppress(BlockingIOError):
                data = there.recv(ECHO_BYTES)
                if not data:
                    return
                there.send(data)


@contextlib.contextmanager
def empty_grpc(path: Path) -> Iterator[Any]:
    """A function that makes one empty gRPC call to another process on this host."""
    server = subprocess.Popen([sys.executable, "-m", "kvstore.bench_limits", "--empty", str(path)])
    channel = grpc.insecure_channel(f"unix:{path}")
    try:
        grpc.channel_ready_future(channel).result(20)
        call = channel.unary_unary(EMPTY_METHOD)
        yield lambda: call(b"", timeout=10)
    finally:
        channel.close()
        server.terminate()
        server.wait()


async def _serve_empty(path: str) -> None:
    """The other side of `empty_grpc`: the same kind of server as the front door, doing nothing."""

    async def answer(_request: bytes, _context: Any) -> bytes:
        return b""

    service, method = EMPTY_METHOD.strip("/").split("/")
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {method: handler}),)
    )
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    await server.wait_for_termination()


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve empty calls on a socket until terminated, or an echo on a descriptor until its end."""
    import uvloop

    parser = argparse.ArgumentParser()
    parser.add_argument("--empty")
    parser.add_argument("--echo", type=int)
    given = parser.parse_args(arguments)
    if given.echo is not None:
        _echo(given.echo)
    else:
        uvloop.run(_serve_empty(given.empty))


if __name__ == "__main__":
    main()
