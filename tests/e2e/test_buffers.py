"""What may be put and got into, and that views of grants and reservations are the arena itself."""

from __future__ import annotations

import array
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from kvstore.client import Cache, Extent
from kvstore.errors import InvalidBlock
from tests.e2e.harness import content, contents, hashes, targets

SIZE = 64 << 10


def mapped(data: bytes) -> mmap.mmap:
    found = mmap.mmap(-1, len(data))
    found[:] = data
    return found


def tensor(data: bytes, dtype: Any, *shape: int) -> Any:
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def frozen(data: bytes) -> Any:
    found = np.frombuffer(data, "f4").reshape(4, -1)
    assert not found.flags.writeable
    return found


MAKERS: list[tuple[str, Callable[[bytes], Any]]] = [
    ("bytes", bytes),
    ("bytearray", bytearray),
    ("memoryview", lambda data: memoryview(bytearray(data))),
    ("memoryview of words", lambda data: memoryview(bytearray(data)).cast("Q")),
    ("array", lambda data: array.array("d", data)),
    ("mmap", mapped),
    ("numpy u1", lambda data: np.frombuffer(bytearray(data), "u1")),
    ("numpy f2 3d", lambda data: np.frombuffer(bytearray(data), "f2").reshape(2, 16, -1)),
    ("numpy big endian", lambda data: np.frombuffer(bytearray(data), ">i4")),
    ("numpy complex", lambda data: np.frombuffer(bytearray(data), "c16")),
    ("numpy record", lambda data: np.frombuffer(bytearray(data), [("a", "i4"), ("b", "f4")])),
    ("numpy read-only", frozen),
    ("torch uint8", lambda data: tensor(data, torch.uint8, -1)),
    ("torch float16", lambda data: tensor(data, torch.float16, 2, -1)),
    ("torch bfloat16", lambda data: tensor(data, torch.bfloat16, 4, 8, -1)),
]
READ_ONLY = ("bytes", "numpy read-only")


def bytes_of(buffer: Any) -> bytes:
    """A buffer's content, by a way that is not the client's."""
    if isinstance(buffer, torch.Tensor):
        return bytes(buffer.flatten().view(torch.uint8).numpy().tobytes())
    return buffer.tobytes() if hasattr(buffer, "tobytes") else bytes(buffer)


@pytest.mark.parametrize(("kind", "make"), MAKERS, ids=[kind for kind, _ in MAKERS])
def test_kinds_of_buffers(cache: Cache, kind: str, make: Callable[[bytes], Any]) -> None:
    keys = hashes(3, kind)
    assert cache.put(keys, [make(one) for one in contents(keys, SIZE)]).stored == 3
    with cache.acquire(keys) as grant:
        assert [bytes(grant.view(at)) for at in range(3)] == contents(keys, SIZE)
    into = [make(b"\xee" * SIZE) for _ in keys]
    if kind in READ_ONLY:
        with pytest.raises(InvalidBlock, match="buffer 0 is read-only: give a writable buffer"):
            cache.get(keys, into)
        assert all(bytes_of(one) == b"\xee" * SIZE for one in into)
    else:
        assert cache.get(keys, into).length == 3
        assert [bytes_of(one) for one in into] == contents(keys, SIZE)


@pytest.mark.parametrize("order", [1, -1], ids=["in order", "backwards"])
def test_rows_of_one_array(cache: Cache, order: int) -> None:
    """Neighbours in memory are copied as one run; rows that run backwards are not neighbours."""
    keys = hashes(16, f"rows {order}")
    rows: Any = np.frombuffer(b"".join(contents(keys, SIZE)), "u1").reshape(16, SIZE)
    assert cache.put(keys[::order], rows[::order]).stored == 16
    into = torch.zeros((16, SIZE), dtype=torch.uint8)
    assert cache.get(keys, into).length == 16
    assert into.numpy().tobytes() == rows.tobytes()


class Lazy(Sequence[bytes]):
    """A sequence that makes each block when it is asked for, and keeps none."""

    def __init__(self, keys: list[bytes]) -> None:
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, at: Any) -> Any:
        return content(self.keys[at], SIZE)


def test_blocks_that_are_made_on_the_way(cache: Cache) -> None:
    """`put` kept addresses of buffers and not the buffers: those of a sequence that makes them on
    the way were freed, and what lay there later was stored. It keeps them until it has copied."""
    keys = hashes(40, "lazy")
    assert cache.put(keys, Lazy(keys)).stored == 40
    with cache.acquire(keys) as grant:
        assert [bytes(grant.view(at)) for at in range(40)] == contents(keys, SIZE)


def at_extent(extent: Extent) -> tuple[mmap.mmap, int]:
    """The arena, mapped once more."""
    file = os.open(extent.arena, os.O_RDWR)
    try:
        return mmap.mmap(file, os.fstat(file).st_size), extent.offset
    finally:
        os.close(file)


def test_views_of_a_reservation_are_the_arena(cache: Cache) -> None:
    keys = hashes(1, "views")
    reservation = cache.reserve(keys)
    arena, offset = at_extent(reservation.extents[0])
    assert reservation.extents[0].length == SIZE
    reservation.view(0)[:4] = b"view"
    assert arena[offset : offset + 4] == b"view"
    reservation.numpy(0)[4:8] = list(b"nump")
    assert arena[offset + 4 : offset + 8] == b"nump"
    reservation.tensor(0)[4:6] = torch.tensor([1.0, -2.0], dtype=torch.bfloat16)
    assert arena[offset + 8 : offset + 12] == bytes.fromhex("803f00c0")
    assert reservation.numpy(0, dtype="f4").shape == (SIZE // 4,)
    reservation.commit()
    into = targets(1, SIZE)
    cache.get(keys, into)
    assert into[0][:12] == b"viewnump" + bytes.fromhex("803f00c0")


def test_views_of_a_grant_are_the_arena_and_read_only(cache: Cache) -> None:
    keys = hashes(2, "grant")
    cache.put(keys, contents(keys, SIZE))
    with cache.acquire(keys) as grant:
        view, flat, halves = grant.view(1), grant.numpy(1), grant.tensor(1)
        assert halves.dtype == torch.bfloat16
        assert view.readonly
        with pytest.raises(TypeError):
            view[0] = 0
        with pytest.raises(ValueError, match="read-only"):
            flat[0] = 0
        assert bytes(view) == flat.tobytes() == bytes_of(halves) == content(keys[1], SIZE)
        arena, offset = at_extent(grant.extents[1])
        arena[offset : offset + 2] = b"\x80\x3f"
        assert (bytes(view[:2]), flat[1], halves[0].item()) == (b"\x80\x3f", 0x3F, 1.0)


def test_views_outlive_the_client(cache: Cache) -> None:
    """What an engine still holds when its client closes is stale, and no crash."""
    keys = hashes(1, "stale")
    cache.put(keys, contents(keys, SIZE))
    grant = cache.acquire(keys)
    view, flat = grant.view(0), grant.numpy(0)
    cache.client.close()
    assert bytes(view) == flat.tobytes() == content(keys[0], SIZE)
    assert grant.release() is False
