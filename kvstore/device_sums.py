"""Checksums of a device's memory, made by the device itself: the sums of `checksums.py`, no copy.

XXH3-64 of more than 240 bytes has eight lanes of 64 bits and reads stripes of 64 bytes. Sixteen
stripes are a block; after each whole block the lanes are scrambled. What a block adds to the lanes
does not depend on them, so there are two phases:

1. The terms of every block, by any number of threads in any order.
2. Add the terms of a block, scramble, and so on: a thread per lane, one step per KiB, in order.

One launch does both: a thread block takes a range, and in it phase 2 follows a tile behind phase 1,
through shared memory. With a launch for each, phase 1 of a single range would have the whole device
for itself; but phase 2 would still take its step per KiB, and the terms 64 bytes per KiB of a
device whose memory the engine has taken. Mostly there are many ranges, and they run side by side.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

SIZE_MIN = 241  # XXH3 has other functions for fewer bytes, and no shard of an engine is so small
RANGES_MAX = 2_048  # of one launch
BLOCKS = 64  # that a launch takes at most, of the hundred and more processors of a device
TILE = 64  # blocks of 1 KiB that are between the phases
THREADS = 32 + 4 * TILE  # a warp for phase 2, and four threads for each block of a tile
WORD = (1 << 64) - 1

PRIMES = (
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)
SCRAMBLE = 0x9E3779B1
AVALANCHE = 0x165667919E3779F9
START = (0xC2B2AE3D, *PRIMES[:4], 0x85EBCA77, PRIMES[4], SCRAMBLE)  # of the lanes
SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
# Where in the seeded secret the keys begin: of the scramble, of the last stripe, of the end.
SCRAMBLE_KEYS, LAST_KEYS, END_KEYS = 128, 121, 11


def _list(words: Sequence[int]) -> str:
    return ", ".join(f"{word:#x}ull" for word in words)


SOURCE = f"""
#define TILE {TILE}
#define THREADS {THREADS}
#define PRIME_1 {PRIMES[0]:#x}ull
#define SCRAMBLE {SCRAMBLE:#x}ull
#define AVALANCHE {AVALANCHE:#x}ull
#define SCRAMBLE_KEYS {SCRAMBLE_KEYS}
#define LAST_KEYS {LAST_KEYS}
#define END_KEYS {END_KEYS}
__constant__ unsigned long long SECRET[24] = {{{_list(np.frombuffer(SECRET, "<u8").tolist())}}};
__constant__ unsigned long long START[8] = {{{_list(START)}}};
"""
# Four threads make the terms of a block, each of two lanes: every word is a factor in its own lane
# and a summand in the one beside it. A warp reads eight blocks, 64 bytes of each at a time. Without
# launch bounds the compiler saves registers, and a thread has two or three loads in flight, not
# eight.
SOURCE += r"""
typedef unsigned long long word;

static __device__ word load(const unsigned char* from) {
  word found = 0;
  for (int i = 7; i >= 0; i--) found = found << 8 | from[i];
  return found;
}

static __device__ word key_at(const word* secret, int at) {
  const int shift = at % 8 * 8;
  if (shift == 0) return secret[at / 8];
  return secret[at / 8] >> shift | secret[at / 8 + 1] << (64 - shift);
}

static __device__ word product(word factors) {
  return (word)(unsigned)factors * (unsigned)(factors >> 32);
}

static __device__ word folded(word a, word b) { return a * b ^ __umul64hi(a, b); }

static __device__ void add_terms(word* terms, const unsigned char* from, int stripes,
                                 const word* keys) {
  word even = 0, odd = 0;
  if (((word)from & 15) == 0) {
#pragma unroll 8
    for (int stripe = 0; stripe < stripes; stripe++) {
      const ulonglong2 pair = *(const ulonglong2*)(from + stripe * 64);
      even += product(pair.x ^ keys[stripe]) + pair.y;
      odd += product(pair.y ^ keys[stripe + 1]) + pair.x;
    }
  } else {
    for (int stripe = 0; stripe < stripes; stripe++) {
      const word x = load(from + stripe * 64), y = load(from + stripe * 64 + 8);
      even += product(x ^ keys[stripe]) + y;
      odd += product(y ^ keys[stripe + 1]) + x;
    }
  }
  terms[0] = even;
  terms[1] = odd;
}

static __device__ word end(const word* lanes, const word* secret, word size) {
  word sum = size * PRIME_1;
  for (int i = 0; i < 8; i += 2)
    sum += folded(lanes[i] ^ key_at(secret, END_KEYS + 8 * i),
                  lanes[i + 1] ^ key_at(secret, END_KEYS + 8 * i + 8));
  sum = (sum ^ sum >> 37) * AVALANCHE;
  return sum ^ sum >> 32;
}

// The table has the addresses of the ranges, their seeds and room for their sums.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
kvstore_sums(word* table, int count, word size) {
  __shared__ word secret[24];
  __shared__ word terms[2][TILE * 8];
  __shared__ word lanes[8];
  const int thread = threadIdx.x, worker = thread - 32;
  const word blocks = (size - 1) / 1024;          // whole ones, each followed by a scramble
  const int rest = (int)((size - 1) % 1024 / 64);  // stripes after them, before the last 64 bytes
  const word tiles = blocks / TILE + 1;
  for (int at = blockIdx.x; at < count; at += gridDim.x) {
    const unsigned char* data = (const unsigned char*)table[at];
    const word seed = table[count + at];
    if (thread < 24) secret[thread] = SECRET[thread] + (thread % 2 ? 0 - seed : seed);
    __syncthreads();
    word lane = START[thread % 8];
    for (word tile = 0; tile <= tiles; tile++) {
      if (worker >= 0) {
        const word block = tile * TILE + worker / 4;
        if (block <= blocks)
          add_terms(terms[tile % 2] + worker * 2, data + block * 1024 + worker % 4 * 16,
                    block < blocks ? 16 : rest, secret + worker % 4 * 2);
      } else if (thread < 8 && tile > 0) {
        const word* term = terms[(tile - 1) % 2] + thread;
        const word key = secret[SCRAMBLE_KEYS / 8 + thread];
        const int whole = tile < tiles ? TILE : (int)(blocks % TILE);
#pragma unroll 8
        for (int block = 0; block < whole; block++) {
          lane += term[block * 8];
          lane = (lane ^ lane >> 47 ^ key) * SCRAMBLE;
        }
        if (tile == tiles) lane += term[whole * 8];
      }
      __syncthreads();
    }
    if (thread < 8) {
      const unsigned char* last = data + size - 64;
      lane += product(load(last + 8 * thread) ^ key_at(secret, LAST_KEYS + 8 * thread));
      lanes[thread] = lane + load(last + 8 * (thread ^ 1));
    }
    __syncthreads();
    if (thread == 0) table[2 * count + at] = end(lanes, secret, size);
    __syncthreads();
  }
}
"""
# What a device must get right before it is believed: offset and size of a range, its seed. They end
# in a block, a stripe and a tile, and with them; one is nowhere aligned.
TRIALS = (
    (0, 241, 0),
    (16, 1_024, 1),
    (48, 1_025, WORD),
    (3, 4_099, 0x0123456789ABCDEF),
    (64, 2 * TILE * 1_024, PRIMES[0]),
    (128, 2 * TILE * 1_024 + 705, PRIMES[1]),
)


def seeded_secret(seed: int) -> bytes:
    """The 192 bytes that all keys are taken from."""
    words = np.frombuffer(SECRET, "<u8").copy()
    words[0::2] += np.uint64(seed)
    words[1::2] -= np.uint64(seed)
    return words.tobytes()


def host_sums(parts: Sequence[bytes | memoryview], seeds: Sequence[int]) -> list[int]:
    """What the kernel computes, phase by phase, for equally long parts; slow.

    Raises ValueError for fewer bytes than SIZE_MIN.
    """
    if not parts:
        return []
    size = len(parts[0])
    _check(size)
    data = np.array([np.frombuffer(part, np.uint8) for part in parts])
    secrets = np.array([np.frombuffer(seeded_secret(seed), np.uint8) for seed in seeds])
    blocks, rest = (size - 1) // 1_024, (size - 1) % 1_024 // 64
    stripes = np.lib.stride_tricks.sliding_window_view(secrets.view("<u8"), 8, axis=1)[:, :16]
    whole = data[:, : blocks * 1_024].copy().view("<u8").reshape(len(parts), blocks, 16, 8)
    terms = _terms(whole, stripes[:, None])
    left = data[:, blocks * 1_024 :][:, : rest * 64].copy().view("<u8").reshape(len(parts), rest, 8)
    lanes = np.tile(np.array(START, "<u8"), (len(parts), 1))
    for block in range(blocks):
        lanes += terms[:, block]
        lanes ^= lanes >> 47
        lanes = (lanes ^ _keys(secrets, SCRAMBLE_KEYS)) * np.uint64(SCRAMBLE)
    lanes += _terms(left, stripes[:, :rest])
    last = data[:, -64:].copy().view("<u8")
    lanes += _terms(last[:, None], _keys(secrets, LAST_KEYS)[:, None])
    factors = lanes ^ _keys(secrets, END_KEYS)
    return [_end(row, size) for row in factors.tolist()]


def _terms(words: NDArray[Any], keys: NDArray[Any]) -> NDArray[Any]:
    """What stripes, the last axis but one, add to the lanes, the last."""
    factors = words ^ keys
    products = (factors & np.uint64(0xFFFFFFFF)) * (factors >> np.uint64(32))
    beside = words[..., [1, 0, 3, 2, 5, 4, 7, 6]]
    total: NDArray[Any] = (products + beside).sum(axis=-2, dtype=np.uint64)
    return total


def _keys(secrets: NDArray[Any], at: int) -> NDArray[Any]:
    return secrets[:, at : at + 64].copy().view("<u8")


def _end(factors: Sequence[int], size: int) -> int:
    total = size * PRIMES[0]
    for a, b in zip(factors[0::2], factors[1::2], strict=True):
        total += (a * b ^ a * b >> 64) & WORD
    total &= WORD
    total = (total ^ total >> 37) * AVALANCHE & WORD
    return total ^ total >> 32


def _check(size: int) -> None:
    if size < SIZE_MIN:
        raise ValueError(f"ranges of {size} bytes: at least {SIZE_MIN} are summed here")


class DeviceSums:
    """Sums of ranges in the memory of one device. Any thread may ask; they take turns."""

    def __init__(self, device: int) -> None:
        """Loads nothing: that comes with the first sums."""
        self.device = device
        self._turn = threading.Lock()
        self._kernel: _Kernel | None = None
        self._refusal = ""  # why this device is not asked any more

    def sums(self, addresses: Sequence[int], size: int, seeds: Sequence[int]) -> list[int]:
        """The sums of the `size` bytes at each address, of what is there now: on a stream of its
        own, which waits for nobody's work and lets nobody wait. Needs no memory of the device.

        Raises ValueError for fewer bytes than SIZE_MIN, OSError where the device cannot do it or
        did it wrongly at its trial: whoever asks reads the bytes back and sums them on the host.
        """
        _check(size)
        if len(addresses) != len(seeds):
            raise ValueError(
                f"{len(addresses)} addresses and {len(seeds)} seeds: give one for each"
            )
        with self._turn:
            kernel = self._tried()
            found: list[int] = []
            for at in range(0, len(addresses), RANGES_MAX):
                some = slice(at, at + RANGES_MAX)
                found += kernel.sums(addresses[some], size, seeds[some])
            return found

    def _tried(self) -> _Kernel:
        """The kernel, once it has passed its trial. What failed is not tried again: to compile
        takes long, and a device that computes wrongly gets no second chance."""
        if self._refusal:
            raise OSError(errno.ENODEV, self._refusal)
        if self._kernel is None:
            try:
                kernel = _Kernel(self.device)
                kernel.check()
            except Exception as error:
                self._refusal = f"CUDA device {self.device} makes no sums: {error}"
                raise OSError(errno.ENODEV, self._refusal) from error
            self._kernel = kernel
        return self._kernel


class _Kernel:
    """The compiled kernel and its table, in host memory that the device reads and writes itself."""

    def __init__(self, device: int) -> None:
        """Compiles, unless an earlier process has left the kernel in cupy's cache."""
        import cupy

        self._device = device
        self._cuda: Any = cupy.cuda
        self._runtime: Any = cupy.cuda.runtime
        with self._here():
            self._kernel: Any = cupy.RawKernel(SOURCE, "kvstore_sums")
            self._kernel.compile()
            self._stream: Any = self._cuda.Stream(non_blocking=True)
            self._table = self._pinned(3 * RANGES_MAX * 8).view(np.uint64)

    def check(self) -> None:
        """Raises OSError when sums differ from the host's."""
        content = np.random.default_rng(0).bytes(max(at + size for at, size, _ in TRIALS))
        with self._here():
            memory = self._pinned(len(content))
        memory[:] = np.frombuffer(content, np.uint8)
        for at, size, seed in TRIALS:
            [found] = self.sums([memory.ctypes.data + at], size, [seed])
            if found != xxh3_64_intdigest(content[at : at + size], seed):
                raise OSError(errno.EIO, f"it sums {size} bytes wrongly")

    def sums(self, addresses: Sequence[int], size: int, seeds: Sequence[int]) -> list[int]:
        """See DeviceSums.sums; at most RANGES_MAX ranges."""
        count = len(addresses)
        self._table[:count] = addresses
        self._table[count : 2 * count] = seeds
        values = (
            ctypes.c_uint64(self._table.ctypes.data),
            ctypes.c_int(count),
            ctypes.c_uint64(size),
        )
        given = (ctypes.c_void_p * 3)(*(ctypes.addressof(one) for one in values))
        with self._here():
            self._cuda.driver.launchKernel(
                self._kernel.kernel.ptr,
                min(count, BLOCKS),
                1,
                1,
                THREADS,
                1,
                1,
                0,
                self._stream.ptr,
                ctypes.addressof(given),
                0,
            )
            self._stream.synchronize()
        found: list[int] = self._table[2 * count : 3 * count].tolist()
        return found

    def _pinned(self, size: int) -> NDArray[np.uint8]:
        """Host memory that the device finds at the host's own address."""
        return np.frombuffer(self._cuda.alloc_pinned_memory(size), np.uint8, size)

    @contextlib.contextmanager
    def _here(self) -> Iterator[None]:
        """On this device; what CUDA says becomes an OSError."""
        try:
            with self._cuda.Device(self._device):
                yield
        except (self._runtime.CUDARuntimeError, self._cuda.driver.CUDADriverError) as error:
            raise OSError(errno.EIO, f"CUDA device {self._device}: {error}") from error
