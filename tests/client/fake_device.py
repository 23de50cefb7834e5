"""A device whose memory is the host's: streams do what they are given at once, or when told.

It is as strict as CUDA where that can be checked: no copy across two registrations, no kernel on
memory that is not registered, nothing taken back while it is in use.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import mmap
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kvstore.client import Cache
from kvstore.client.cuda import Copier
from kvstore.client.cuda_fragments import Way
from kvstore.mapping import address_of_map
from kvstore.types import MIB
from tests.e2e.harness import content, hashes, wait_for

PIECE = 4 * MIB  # registered at once, in tests
SIZE = 64 << 10  # of a block, in tests
ENGINE = 7  # the number of the stream that fake buffers are used on


class FakeBuffer:
    """Bytes in the memory of a fake device, as any library of arrays would offer them."""

    def __init__(self, array: Any, stream: int | None = ENGINE, *, readonly: bool = False) -> None:
        self.array = np.ascontiguousarray(array)
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": self.array.shape,
            "typestr": self.array.dtype.str,
            "data": (self.array.ctypes.data, readonly),
            "version": 3,
            "stream": stream,
        }

    @property
    def address(self) -> int:
        """Where it begins."""
        return int(self.array.ctypes.data)


@dataclasses.dataclass(eq=False)
class FakeEvent:
    """See cuda_device.Event."""

    device: FakeDevice
    reached: bool = False

    def done(self) -> bool:
        """See Event."""
        self.device.check()
        return self.reached


class FakeStream:
    """What was given to a stream and is not done yet."""

    def __init__(self) -> None:
        self.held = False
        self.queue: list[Callable[[], bool]] = []  # False: not yet

    def advance(self) -> None:
        """Do what may be done."""
        while self.queue and not self.held and self.queue[0]():
            self.queue.pop(0)


class FakeDevice:
    """See cuda_device.Device. `copies` counts what it was given, by way."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.bus = f"0000:{number:02x}:00.0"
        self.opened: dict[int, mmap.mmap] = {}  # parts of other processes, by address
        self.batches = True
        self.gathers = False
        self.broken = ""  # why every call fails from now on
        self.refuses = ""  # why nothing more can be registered
        self.wrong: Way | None = None  # the way that copies a byte wrongly
        self.blocking = threading.Event()  # cleared: plain copies of ordinary memory do not return
        self.blocking.set()
        self.registered: dict[int, int] = {}
        self.allocated: dict[int, Any] = {}  # memory of the device, by address
        self.gate: threading.Semaphore | None = None  # one for each registration, once there is one
        self.copies: dict[Way, int] = dict.fromkeys(Way, 0)
        self.threads: set[str] = set()  # names of those that gave copies
        self.streams: dict[int, FakeStream] = {ENGINE: FakeStream(), 1: FakeStream()}
        self._numbers = itertools.count(100)
        self._lock = threading.RLock()
        self._in_use = 0
        self._holding = False
        self._local = threading.local()

    # -- for tests -----------------------------------------------------------------------------

    def hold(self, stream: int) -> None:
        """Let a stream do nothing for now."""
        self.streams[stream].held = True

    def release(self, stream: int) -> None:
        """Let it go on."""
        with self._lock:
            self.streams[stream].held = False
            self._advance()

    def hold_copies(self) -> None:
        """Let the streams of copies do nothing for now, those that are made later too."""
        self._holding = True
        for number in self.streams:
            if number >= 100:
                self.hold(number)

    def release_copies(self) -> None:
        """Let them go on."""
        self._holding = False
        for number in list(self.streams):
            if number >= 100:
                self.release(number)

    def given(self, stream: int, act: Callable[[], None]) -> None:
        """The engine's own work."""

        def do() -> bool:
            act()
            return True

        self._enqueue(stream, do)

    def check(self) -> None:
        """Whether this thread may call, and the device answers."""
        assert getattr(self._local, "depth", 0), "the device is not current in this thread"
        if self.broken:
            raise RuntimeError(self.broken)

    # -- Device --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """See Device."""
        self._local.depth = getattr(self._local, "depth", 0) + 1
        try:
            yield
        finally:
            self._local.depth -= 1

    def register(self, address: int, size: int) -> None:
        """See Device."""
        if self.gate is not None:
            self.gate.acquire()
        self.check()
        if self.refuses:
            raise RuntimeError(self.refuses)
        with self._lock:
            self.registered[address] = size

    def unregister(self, address: int) -> None:
        """See Device."""
        self.check()
        with self._lock:
            assert not self._in_use, "registered memory is taken back under a copy"
            del self.registered[address]

    def open(self, handle: bytes) -> int:
        """See Device. The other process has made a file of its memory."""
        self.check()
        with open(handle.decode(), "r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
        address = address_of_map(memory)
        self.opened[address] = memory
        return address

    def shut(self, address: int) -> None:
        """See Device."""
        self.check()
        assert not self._in_use, "memory is given back under a copy"
        del self.opened[address]

    def reaches(self, address: int) -> bool:
        """See Device."""
        return self._piece(address, 1) is not None

    def stream(self) -> int:
        """See Device."""
        self.check()
        number = next(self._numbers)
        self.streams[number] = FakeStream()
        self.streams[number].held = self._holding
        return number

    def record(self, stream: int) -> FakeEvent:
        """See Device."""
        self.check()
        event = FakeEvent(self)

        def reach() -> bool:
            event.reached = True
            return True

        self._enqueue(stream, reach)
        return event

    def order(self, stream: int, event: Any) -> None:
        """See Device."""
        self.check()
        self._enqueue(stream, lambda: event.reached)

    def plain(self, stream: int, target: int, source: int, size: int) -> None:
        """See Device."""
        pieces = self._piece(target, size) or self._piece(source, size)
        way = Way.PLAIN if pieces else Way.PAGEABLE
        if way is Way.PAGEABLE:
            self.blocking.wait()
        self._copy(way, stream, [target], [source], [size])

    def batch(self, stream: int, targets: Any, sources: Any, sizes: Any) -> None:
        """See Device."""
        self._copy(Way.BATCH, stream, targets.tolist(), sources.tolist(), sizes.tolist())

    def gather(self, stream: int, targets: Any, sources: Any, sizes: Any) -> None:
        """See Device."""
        rows = list(zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True))
        for target, source, size in rows:
            assert self._piece(target, size) or self._piece(source, size), "not registered"
        self._copy(Way.GATHER, stream, *(list(part) for part in zip(*rows, strict=True)))

    def prepare(self) -> None:
        """See Device."""
        self.check()
        self.gathers = True

    @contextlib.contextmanager
    def scratch(self, size: int) -> Iterator[tuple[int, int]]:
        """See Device."""
        self.check()
        host, memory = np.zeros(size, "u1"), np.zeros(size, "u1")
        self.registered[host.ctypes.data] = size
        yield host.ctypes.data, memory.ctypes.data
        del self.registered[host.ctypes.data]

    def allocate(self, size: int) -> int:
        """See Device."""
        self.check()
        memory = np.zeros(size, "u1")
        self.allocated[memory.ctypes.data] = memory
        return int(memory.ctypes.data)

    def free(self, address: int) -> None:
        """See Device."""
        self.check()
        del self.allocated[address]

    # -- inside --------------------------------------------------------------------------------

    def _copy(
        self, way: Way, stream: int, targets: list[int], sources: list[int], sizes: list[int]
    ) -> None:
        self.check()
        for target, source, size in zip(targets, sources, sizes, strict=True):
            for address in (target, source):
                self._check_border(address, size)

        def act() -> bool:
            for target, source, size in zip(targets, sources, sizes, strict=True):
                ctypes.memmove(target, source, size)
                if way is self.wrong:
                    ctypes.memset(target + size - 1, 0xEE, 1)
            self._in_use -= 1
            return True

        with self._lock:
            self.threads.add(threading.current_thread().name)
            self.copies[way] += len(targets)
            self._in_use += 1
        self._enqueue(stream, act)

    def _piece(self, address: int, size: int) -> int | None:
        with self._lock:
            for start, length in self.registered.items():
                if start <= address and address + size <= start + length:
                    return start
        return None

    def _check_border(self, address: int, size: int) -> None:
        """CUDA takes no copy of which a part is registered, or two parts are by two calls."""
        with self._lock:
            for start, length in self.registered.items():
                inside = max(address, start) < min(address + size, start + length)
                whole = start <= address and address + size <= start + length
                assert not inside or whole, "a copy across the border of a registration"

    def _enqueue(self, stream: int, act: Callable[[], bool]) -> None:
        with self._lock:
            self.streams[stream].queue.append(act)
            self._advance()

    def _advance(self) -> None:
        """Streams wait for each other, so what one did may let another one go on."""
        while True:
            before = sum(len(one.queue) for one in self.streams.values())
            for one in list(self.streams.values()):
                one.advance()
            if sum(len(one.queue) for one in self.streams.values()) == before:
                return


class FakePlatform:
    """Fake devices; all memory is that of the first one unless `owners` says otherwise."""

    def __init__(self, device: FakeDevice | None = None) -> None:
        self.devices = {0: device or FakeDevice()}
        self.owners: dict[int, int] = {}

    def device(self, number: int) -> FakeDevice:
        """See Platform."""
        return self.devices.setdefault(number, FakeDevice(number))

    def owner(self, address: int) -> int:
        """See Platform."""
        found = self.owners.get(address, 0)
        if found < 0:
            raise RuntimeError("no such memory")
        return found


def on_device(blocks: list[bytes]) -> list[FakeBuffer]:
    """Buffers with this content."""
    return [FakeBuffer(np.frombuffer(one, "u1").copy()) for one in blocks]


def empty(count: int, size: int = SIZE) -> list[FakeBuffer]:
    """Buffers filled with what no test stores."""
    return [FakeBuffer(np.full(size, 0xEE, "u1")) for _ in range(count)]


def bytes_of(buffers: list[FakeBuffer]) -> list[bytes]:
    """What is in them."""
    return [one.array.tobytes() for one in buffers]


def ready(cache: Cache, copier: Copier) -> None:
    """Wait until the arena is registered and the device measured."""
    cache.put(hashes(1, "first"), on_device([content(b"first", SIZE)]))
    cache.forget(hashes(1, "first"))
    arena = cache.client.arena
    assert arena is not None
    wait_for(
        lambda: (found := copier.registration(arena)) and found.ready_bytes == arena.size_bytes,
        "the arena to be registered",
    )
