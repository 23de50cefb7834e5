"""What makes copies fast and is done beside them: the arena is registered with a device, piece by
piece, and it is measured, and tested, which way of copying suits which size of fragment."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kvstore.client.arena import Arena
from kvstore.client.cuda_device import Device
from kvstore.client.cuda_fragments import (
    BATCH_COUNT_MAX,
    GATHER_COUNT_MAX,
    Breaks,
    Direction,
    Way,
    breaks_of,
)

# Registered by one call. The driver takes 64 GiB at once, but it keeps the engine's own calls
# waiting meanwhile; and what is registered early is fast early.
PIECE_BYTES = 1 << 30
SCRATCH_BYTES = 8 << 20
SIZES = (4 << 10, 16 << 10, 32 << 10, 64 << 10, 256 << 10, 1 << 20)  # of fragments
COUNT_MAX = 256  # fragments of one measurement
TIMES = 3  # of which the best counts
MEASURE_S = 0.5  # then what has not been measured stays as it is by default
PAUSE_S = 0.000_05

log = logging.getLogger("kvstore")


class Registration:
    """One arena, registered with a device in the background, in order, for as long as it is open.

    ready_bytes  so much from the arena's start is registered
    seconds      how long the calls took so far
    failed       why the rest cannot be; copies of it are slower
    """

    def __init__(
        self,
        arena: Arena,
        device: Device,
        *,
        piece_bytes: int = PIECE_BYTES,
        first: Callable[[], None] = lambda: None,
    ) -> None:
        """`first` is called in the thread when the first piece is there."""
        self.arena = arena
        self.piece_bytes = piece_bytes
        self.ready_bytes = 0
        self.seconds = 0.0
        self.failed = ""
        self.unified = True  # kernels find the arena at the host's own addresses
        self.ended = threading.Event()  # all is undone
        self._view = arena.view  # keeps the mapping in place while it is registered
        self._device = device
        self._first = first
        self._users = 0
        self._closed = False
        self._changed = threading.Condition()
        arena.on_close(self.close)
        thread = threading.Thread(target=self._run, name="kvstore-register", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads: nothing is registered
            self.failed = str(error)
            self.ended.set()

    def enter(self) -> bool:
        """Begin to use the arena; `leave` must follow. False: it was closed."""
        with self._changed:
            if self._closed:
                return False
            self._users += 1
            return True

    def leave(self) -> None:
        """The device does not touch the arena any more, as far as this user goes."""
        with self._changed:
            self._users -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Have everything undone, once nobody uses it. Does not wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # -- in the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        pieces: list[int] = []
        try:
            with self._device.current():
                self._register(pieces)
                with self._changed:
                    self._changed.wait_for(lambda: self._closed and not self._users)
                for address in reversed(pieces):
                    self._device.unregister(address)
        except Exception as error:  # of a device that has failed: nothing is left to be undone
            log.warning("kvstore: a registered arena could not be given back: %s", error)
        finally:
            self.ended.set()

    def _register(self, pieces: list[int]) -> None:
        arena = self.arena
        for start in range(0, arena.size_bytes, self.piece_bytes):
            if self._closed:
                return
            size = min(self.piece_bytes, arena.size_bytes - start)
            began = time.monotonic()
            try:
                self._device.register(arena.address + start, size)
                pieces.append(arena.address + start)
                self.unified = self.unified and self._device.reaches(arena.address + start)
            except Exception as error:
                self.failed = str(error) or type(error).__name__
                log.warning(
                    "kvstore: only %d of %d MiB of the arena could be registered with device %d, "
                    "copies of the rest are slower: %s: is the limit of locked memory too low "
                    "(ulimit -l)?",
                    start >> 20,
                    arena.size_bytes >> 20,
                    self._device.number,
                    error,
                )
                return
            self.seconds += time.monotonic() - began
            self.ready_bytes = start + size
            if not start:
                self._first()


@dataclasses.dataclass
class Abilities:
    """What a device has shown to be able to do. Until it is measured: plain copies."""

    batches: bool = False
    gathers: bool = False
    breaks: dict[Direction, Breaks] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(Direction, Breaks())
    )


def measure(device: Device) -> Abilities:
    """Test the ways of copying on scratch memory, and time them, for well under a second.

    A way that fails, or that copies a byte wrongly, is not used; nothing is raised for it. Raises
    what the device raises when there is no scratch memory.
    """
    try:
        device.prepare()
    except Exception as error:  # no compiler, for example
        log.info("kvstore: no copy kernel on device %d: %s", device.number, error)
    with device.scratch(SCRATCH_BYTES) as (host, memory):
        bench = _Bench(device, host, memory)
        batches = device.batches and bench.is_right(Way.BATCH)
        gathers = device.gathers and bench.is_right(Way.GATHER)
        ways = [Way.PLAIN, *([Way.BATCH] * batches), *([Way.GATHER] * gathers)]
        return Abilities(
            batches, gathers, {one: bench.breaks(ways, one) for one in Direction if ways}
        )


class _Bench:
    """Copies between scratch memory of the host and of the device."""

    def __init__(self, device: Device, host: int, memory: int) -> None:
        self._device = device
        self._host = host
        self._memory = memory
        self._stream = device.stream()
        self._end = time.monotonic() + MEASURE_S

    def is_right(self, way: Way) -> bool:
        """Whether bytes that go to the device and back come back, and to the right places."""
        size, count = 4_112, 64  # lines of 16 bytes, which do not begin at larger powers of two
        data = np.random.default_rng(size).bytes(size * count)
        ctypes.memmove(self._host, data, len(data))
        places = np.arange(count, dtype=np.int64) * size
        sizes = np.full(count, size, np.int64)
        sizes[1::2] -= 3  # and some that are no lines
        try:
            self._copy(way, self._memory + places[::-1], self._host + places, sizes)
            ctypes.memset(self._host, 0, len(data))
            self._copy(way, self._host + places, self._memory + places[::-1], sizes)
        except Exception as error:
            log.warning("kvstore: %s copies do not work: %s", way.name.lower(), error)
            return False
        got = ctypes.string_at(self._host, len(data))
        for start, length in zip(places.tolist(), sizes.tolist(), strict=True):
            if got[start : start + length] != data[start : start + length]:
                log.error("kvstore: %s copies are wrong and are not used", way.name.lower())
                return False
        return True

    def breaks(self, ways: list[Way], direction: Direction) -> Breaks:
        """Measure one direction; the defaults when the time does not suffice."""
        seconds: dict[Way, dict[int, float]] = {way: {} for way in ways}
        for size in SIZES:
            count = min(COUNT_MAX, SCRATCH_BYTES // size)
            places = np.arange(count, dtype=np.int64) * size
            # Backwards on one side, as blocks of an engine do not follow each other either.
            targets, sources = self._memory + places[::-1], self._host + places
            if direction is Direction.STORE:
                targets, sources = sources, targets
            sizes = np.full(count, size, np.int64)
            for way in ways:
                if time.monotonic() > self._end:
                    return Breaks()
                seconds[way][size] = min(
                    self._copy(way, targets, sources, sizes) for _ in range(TIMES)
                )
        return breaks_of(seconds)

    def _copy(self, way: Way, targets: Any, sources: Any, sizes: Any) -> float:
        """Seconds until all is copied. Raises TimeoutError when that takes far too long."""
        began = time.perf_counter()
        kept = give(self._device, self._stream, way, targets, sources, sizes)
        event = self._device.record(self._stream)
        while not event.done():
            if time.perf_counter() - began > 10 * MEASURE_S:
                raise TimeoutError("the device is busy")
            time.sleep(PAUSE_S if time.perf_counter() - began > 0.01 else 0)
        del kept
        return time.perf_counter() - began


def give(device: Device, stream: int, way: Way, targets: Any, sources: Any, sizes: Any) -> Any:
    """Give copies to a device in one way; int64 arrays of addresses and bytes. Returns what must
    live until they have ended."""
    if way is Way.BATCH:
        assert len(targets) <= BATCH_COUNT_MAX
        device.batch(stream, targets, sources, sizes)
    elif way is Way.GATHER:
        assert len(targets) <= GATHER_COUNT_MAX
        return device.gather(stream, targets, sources, sizes)
    else:
        for target, source, size in zip(
            targets.tolist(), sources.tolist(), sizes.tolist(), strict=True
        ):
            device.plain(stream, target, source, size)
    return None
