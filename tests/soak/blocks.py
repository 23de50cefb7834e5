"""Chains of blocks whose content follows from their keys, and the ledgers that tell of them.

A ledger is an appended file of one writer: what it did and was told outlives its death.

    record   u32 kind | u32 chain | i64 a number | f64 time.monotonic()
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tests.e2e.harness import layout

LENGTH = 16  # blocks of a chain
LIVE = 20  # chains that a writer keeps; older ones it forgets
LAYOUTS = (layout("soak", shard_bytes=64 << 10), layout("soak", shard_bytes=40_001))
TRIED, COMMITTED, FORGET, READ, WRONG, HUNG = range(6)

_RECORD = struct.Struct("<IIqd")
_KEY = struct.Struct("<4sIII")


def keys_of(writer: int, chain: int) -> list[bytes]:
    """The hashes of a chain; no two chains share any."""
    return [_KEY.pack(b"soak", writer, chain, at) for at in range(LENGTH)]


def content(key: bytes, size: int) -> np.ndarray:
    """The bytes that belong under a hash; no two places of them agree for long."""
    generator = np.random.Generator(np.random.SFC64(int.from_bytes(key, "little")))
    return np.frombuffer(generator.bytes(size), np.uint8)


def wrong(keys: Sequence[bytes], buffers: Sequence[np.ndarray]) -> int:
    """How many of these buffers hold something else than what belongs under their hashes."""
    return sum(
        not np.array_equal(buffer, content(key, len(buffer)))
        for key, buffer in zip(keys, buffers, strict=True)
    )


class Ledger:
    """Appends to, or follows, one writer's file."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o600)
        self._at = 0

    def note(self, kind: int, chain: int = 0, number: int = 0) -> None:
        """It stands there for all, from now on and whatever happens to this process."""
        os.write(self._file, _RECORD.pack(kind, chain, number, time.monotonic()))

    def follow(self) -> Iterator[tuple[int, int, int, float]]:
        """What has been added since the last time."""
        while data := os.pread(self._file, _RECORD.size << 10, self._at):
            whole = len(data) // _RECORD.size * _RECORD.size
            if not whole:
                return
            self._at += whole
            yield from _RECORD.iter_unpack(data[:whole])
