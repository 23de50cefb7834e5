"""One CUDA device, as little of it as copies need, by cupy and a few calls of the driver itself.

Nothing is imported before a device is asked for. A context is never made on a device that nobody
named: every call is made with that of the device current, and what was current before comes back.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

POINTER_DEVICE = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
BATCH_SINCE = 12_080  # the driver version whose form of cuMemcpyBatchAsync is called here
STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
NOT_READY = 600  # cudaErrorNotReady
TABLE_ROWS = 2_048  # fragments of one launch
SPARE_EVENTS = 64  # made with each stream
THREADS = 512
BLOCKS = 64  # that the kernel takes at most, of the hundred and more processors of a device

# Each block copies whole fragments: by lines of 16 bytes where both sides allow it, four of them in
# flight per thread, since each crosses the link; then what is left by bytes.
KERNEL = r"""
extern "C" __global__ void kvstore_gather(const unsigned long long* table, int count) {
  for (int at = blockIdx.x; at < count; at += gridDim.x) {
    char* target = (char*)table[at];
    const char* source = (const char*)table[count + at];
    const unsigned long long size = table[2 * count + at];
    const bool aligned = (((unsigned long long)target | (unsigned long long)source) & 15) == 0;
    const unsigned long long lines = aligned ? size / 16 : 0;
    const unsigned long long step = blockDim.x;
    uint4* to = (uint4*)target;
    const uint4* from = (const uint4*)source;
    unsigned long long i = threadIdx.x;
    for (; i + 3 * step < lines; i += 4 * step) {
      const uint4 a = from[i], b = from[i + step], c = from[i + 2 * step], d = from[i + 3 * step];
      to[i] = a;
      to[i + step] = b;
      to[i + 2 * step] = c;
      to[i + 3 * step] = d;
    }
    for (; i < lines; i += step) to[i] = from[i];
    for (i = lines * 16 + threadIdx.x; i < size; i += step) target[i] = source[i];
  }
}
"""


class Event(Protocol):
    """A point in what a stream was given."""

    def done(self) -> bool:
        """Whether the device has come there. Raises when the device has failed."""


class Device(Protocol):
    """What copies need of a device. Addresses and streams are numbers; every method but those of
    the first group is called between `current` and its end, and raises when the device fails."""

    number: int
    bus: str  # its PCI address
    batches: bool  # whether `batch` can be called
    gathers: bool  # whether `gather` can be; `prepare` finds out

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """Makes the device the one of this thread, and undoes that at the end."""

    def register(self, address: int, size: int) -> None:
        """Lock host memory and let the device reach it."""

    def unregister(self, address: int) -> None:
        """The end of what was registered at that address."""

    def open(self, handle: bytes) -> int:
        """Where memory of this device begins here that another process shares."""

    def shut(self, address: int) -> None:
        """The end of what was opened at that address."""

    def reaches(self, address: int) -> bool:
        """Whether kernels find registered host memory at the host's own address."""

    def stream(self) -> int:
        """A new stream, which waits for no other by itself."""

    def record(self, stream: int) -> Event:
        """An event after what the stream was given until now."""

    def order(self, stream: int, event: Event) -> None:
        """What the stream is given from now on begins after the event."""

    def plain(self, stream: int, target: int, source: int, size: int) -> None:
        """One copy. The call may wait where the host memory is not registered."""

    def batch(self, stream: int, targets: Any, sources: Any, sizes: Any) -> None:
        """Many copies by one call; three int64 arrays, which may be changed afterwards."""

    def gather(self, stream: int, targets: Any, sources: Any, sizes: Any) -> Any:
        """The same by a kernel, between registered host memory and the device. Returns what must
        live until it has ended."""

    def prepare(self) -> None:
        """Whatever takes long and makes `gather` possible."""

    def scratch(self, size: int) -> contextlib.AbstractContextManager[tuple[int, int]]:
        """Registered host memory and memory of the device for a while: their addresses."""

    def allocate(self, size: int) -> int:
        """Memory of the device."""

    def free(self, address: int) -> None:
        """The end of what `allocate` gave."""


class Platform(Protocol):
    """The devices of this host."""

    def device(self, number: int) -> Device:
        """A device that the engine already uses."""

    def owner(self, address: int) -> int:
        """The number of the device that has this memory."""


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = (
        ("access", ctypes.c_int),
        ("source_hint", ctypes.c_int * 2),
        ("target_hint", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


class Driver:
    """The calls of libcuda that cupy has no names for. Raises OSError where there is no driver."""

    def __init__(self) -> None:
        self._library = library = ctypes.CDLL("libcuda.so.1")
        pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
        for name, arguments in (
            ("cuDevicePrimaryCtxRetain", (pointer, number)),
            ("cuCtxGetCurrent", (pointer,)),
            ("cuCtxPushCurrent_v2", (pointer,)),
            ("cuCtxPopCurrent_v2", (pointer,)),
            ("cuPointerGetAttribute", (pointer, number, ctypes.c_uint64)),
            ("cuMemHostGetDevicePointer_v2", (pointer, pointer, ctypes.c_uint)),
        ):
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, number
        find = getattr(library, "cuGetProcAddress_v2", None)
        self.batch: Any = None
        if find is not None:
            find.argtypes = (ctypes.c_char_p, pointer, number, ctypes.c_uint64, pointer)
            found, status = pointer(), number()
            failed = find(
                b"cuMemcpyBatchAsync",
                ctypes.byref(found),
                BATCH_SINCE,
                0,
                ctypes.byref(status),
            )
            if not failed and found.value:
                kind = ctypes.CFUNCTYPE(
                    number, *3 * (pointer,), size, pointer, pointer, size, pointer, pointer
                )
                self.batch = kind(found.value)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function; raises RuntimeError with the number that it answers."""
        if status := getattr(self._library, name)(*arguments):
            raise RuntimeError(f"{name} answers {status}")

    def context(self, device: int) -> int:
        """The context that the CUDA runtime, and so the engine, uses on a device."""
        found = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(found), device)
        return found.value or 0

    def current(self) -> int:
        """The context of this thread; 0: it has none."""
        found = ctypes.c_void_p()
        self.call("cuCtxGetCurrent", ctypes.byref(found))
        return found.value or 0

    def owner(self, address: int) -> int:
        """The device of an address."""
        found = ctypes.c_int()
        self.call("cuPointerGetAttribute", ctypes.byref(found), POINTER_DEVICE, address)
        return found.value

    def reached(self, address: int) -> int:
        """Where kernels find registered host memory."""
        found = ctypes.c_uint64()
        self.call("cuMemHostGetDevicePointer_v2", ctypes.byref(found), address, 0)
        return found.value


class CupyPlatform:
    """The devices that cupy and the driver find. Raises ImportError without cupy, OSError without a
    driver."""

    def __init__(self) -> None:
        self._driver = Driver()
        import cupy

        self._cupy: Any = cupy
        self._devices: dict[int, CupyDevice] = {}

    def device(self, number: int) -> Device:
        """See Platform."""
        if number not in self._devices:
            self._devices[number] = CupyDevice(self._cupy, self._driver, number)
        return self._devices[number]

    def owner(self, address: int) -> int:
        """See Platform."""
        return self._driver.owner(address)


class CupyEvent:
    """See Event. The handle is used again afterwards, not destroyed: that would be a call from
    whatever thread drops the event last, with whatever device that thread has."""

    def __init__(self, runtime: Any, spare: deque[int], handle: int) -> None:
        self._runtime = runtime
        self._spare = spare
        self.handle = handle

    def __del__(self) -> None:
        self._spare.append(self.handle)

    def done(self) -> bool:
        """See Event."""
        status = int(self._runtime.eventQuery(self.handle))
        if status not in (0, NOT_READY):
            raise RuntimeError(f"the device has failed: CUDA error {status}")
        return status == 0


class CupyDevice:
    """See Device."""

    def __init__(self, cupy: Any, driver: Driver, number: int) -> None:
        self.number = number
        self.batches = driver.batch is not None
        self.gathers = False
        self._cupy = cupy
        self._runtime = cupy.cuda.runtime
        self._driver = driver
        self._context = driver.context(number)
        self.bus = str(self._runtime.deviceGetPCIBusId(number)).lower()
        self._kernel: Any = None
        self._events: deque[int] = deque()  # handles that nobody uses
        self._tables: dict[int, Any] = {}  # of each stream, in memory of the device
        self._launching = threading.Lock()  # nothing comes between a table and its launch

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """See Device."""
        if self._driver.current() == self._context:
            yield
            return
        self._driver.call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._driver.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def register(self, address: int, size: int) -> None:
        """See Device."""
        self._runtime.hostRegister(address, size, 1 | 2)  # for all contexts; mapped

    def unregister(self, address: int) -> None:
        """See Device."""
        self._runtime.hostUnregister(address)

    def open(self, handle: bytes) -> int:
        """See Device."""
        return int(self._runtime.ipcOpenMemHandle(handle, 1))  # peers are enabled when needed

    def shut(self, address: int) -> None:
        """See Device."""
        self._runtime.ipcCloseMemHandle(address)

    def reaches(self, address: int) -> bool:
        """See Device."""
        return self._driver.reached(address) == address

    def stream(self) -> int:
        """See Device."""
        stream = int(self._runtime.streamCreateWithFlags(self._runtime.streamNonBlocking))
        # Events are what tells of an end: they must not be wanting later.
        for _ in range(SPARE_EVENTS):
            self._events.append(self._event())
        try:
            self._tables[stream] = self._runtime.malloc(3 * 8 * TABLE_ROWS)
        except (MemoryError, RuntimeError):  # the engine has taken all: the other ways need none
            self.gathers = False
        return stream

    def record(self, stream: int) -> Event:
        """See Device."""
        try:
            handle = self._events.pop()
        except IndexError:
            handle = self._event()
        event = CupyEvent(self._runtime, self._events, handle)
        self._runtime.eventRecord(handle, stream)
        return event

    def order(self, stream: int, event: Any) -> None:
        """See Device."""
        self._runtime.streamWaitEvent(stream, event.handle)

    def plain(self, stream: int, target: int, source: int, size: int) -> None:
        """See Device."""
        self._runtime.memcpyAsync(target, source, size, self._runtime.memcpyDefault, stream)

    def batch(self, stream: int, targets: Any, sources: Any, sizes: Any) -> None:
        """See Device."""
        arrays = [np.ascontiguousarray(part, np.int64) for part in (targets, sources, sizes)]
        attributes, first = _Attributes(access=STREAM_ORDER), ctypes.c_size_t(0)
        failed = ctypes.c_size_t()
        status = self._driver.batch(
            *(part.ctypes.data for part in arrays),
            len(arrays[0]),
            ctypes.addressof(attributes),
            ctypes.addressof(first),
            1,
            ctypes.addressof(failed),
            stream,
        )
        if status:
            raise RuntimeError(f"cuMemcpyBatchAsync answers {status}")

    def gather(self, stream: int, targets: Any, sources: Any, sizes: Any) -> Any:
        """See Device."""
        count = len(targets)
        if stream not in self._tables or count > TABLE_ROWS:
            raise RuntimeError("this stream has no memory for a table of so many fragments")
        rows = np.concatenate([targets, sources, sizes]).astype(np.int64, copy=False)
        table = self._tables[stream]
        with self._launching:
            # So few bytes are usually taken over before the call returns, whatever the stream still
            # has to do; but not where a device reads ordinary memory itself.
            self._runtime.memcpyAsync(
                table, rows.ctypes.data, rows.nbytes, self._runtime.memcpyHostToDevice, stream
            )
            values = ctypes.c_uint64(table), ctypes.c_int(count)
            given = (ctypes.c_void_p * 2)(*(ctypes.addressof(one) for one in values))
            self._cupy.cuda.driver.launchKernel(
                self._kernel.kernel.ptr,
                min(count, BLOCKS),
                1,
                1,
                THREADS,
                1,
                1,
                0,
                stream,
                ctypes.addressof(given),
                0,
            )
        return rows

    def prepare(self) -> None:
        """See Device. Compiles the kernel, unless an earlier process has left it in cupy's cache;
        raises where there is no compiler."""
        self._kernel = self._cupy.RawKernel(KERNEL, "kvstore_gather")
        self._kernel.compile()
        self.gathers = True

    def _event(self) -> int:
        return int(self._runtime.eventCreateWithFlags(self._runtime.eventDisableTiming))

    def allocate(self, size: int) -> int:
        """See Device."""
        return int(self._runtime.malloc(size))

    def free(self, address: int) -> None:
        """See Device."""
        self._runtime.free(address)

    @contextlib.contextmanager
    def scratch(self, size: int) -> Iterator[tuple[int, int]]:
        """See Device."""
        host = self._runtime.hostAlloc(size, self._runtime.hostAllocPortable)
        try:
            memory = self._runtime.malloc(size)
            try:
                yield host, memory
            finally:
                self._runtime.free(memory)
        finally:
            self._runtime.freeHost(host)
