"""Blocks as a client sees them: extents of the arena, and zero-copy views of them."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from kvstore.client.arena import Arena
from kvstore.client.checks import number_of
from kvstore.client.copying import copy_all
from kvstore.errors import InvalidRequest
from kvstore.types import Layout


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """A place of one block: `length` bytes from `offset` of the file `arena`."""

    arena: str
    offset: int
    length: int


class Places:
    """The places of a lease's blocks in one arena. Views are void once the lease has ended."""

    def __init__(self, arena: Arena, layout: Layout, offsets: bytes) -> None:
        self.arena = arena
        self.layout = layout
        self.offsets = array("Q", offsets)

    def extents(self) -> list[Extent]:
        """One extent per block."""
        size = self.layout.block_bytes
        return [Extent(self.arena.path, offset, size) for offset in self.offsets]

    def view(self, at: int, shard: int, *, writable: bool) -> memoryview:
        """The bytes of one shard of one block."""
        layout = self.layout
        offset = self.offsets[number_of(at, len(self.offsets), "block")]
        start = offset + number_of(shard, layout.shards, "shard") * layout.shard_bytes
        view = self.arena.view[start : start + layout.shard_bytes]
        return view if writable else view.toreadonly()

    def numpy(self, at: int, shard: int, dtype: Any, *, writable: bool) -> Any:
        """One shard of one block as a flat numpy array over the same memory."""
        view = self.view(at, shard, writable=writable)
        try:
            return np.frombuffer(view, dtype)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(
                f"a shard of {len(view)} bytes as {dtype!r}: {error}: give another dtype"
            ) from None

    def tensor(self, at: int, shard: int, dtype: Any) -> Any:
        """One shard of one block as a flat CPU tensor over the same memory.

        torch knows no read-only tensors: do not write to one that came from a grant.
        """
        import torch

        kind = dtype if dtype is not None else getattr(torch, self.layout.dtype)
        return torch.frombuffer(self.view(at, shard, writable=True), dtype=kind)

    def copy_in(
        self,
        sources: Sequence[int],
        shard: int | None,
        near_end: Callable[[], None] | None = None,
    ) -> None:
        """Fill the blocks, or one shard of each, from these addresses. See `copy_all`."""
        base, runs = self.arena.address, self._runs(sources, shard)
        copy_all([(base + start, source, size) for start, source, size in runs], near_end)

    def copy_out(self, targets: Sequence[int], shard: int | None) -> None:
        """Copy the blocks, or one shard of each, to these addresses."""
        base = self.arena.address
        runs = self._runs(targets, shard)
        copy_all([(target, base + start, size) for start, target, size in runs])

    def _runs(self, addresses: Sequence[int], shard: int | None) -> Iterable[tuple[int, int, int]]:
        """Copies to be made: neighbours on both sides go as one."""
        layout = self.layout
        size = layout.block_bytes if shard is None else layout.shard_bytes
        skip = 0 if shard is None else shard * layout.shard_bytes
        first = other = length = 0
        for offset, address in zip(self.offsets, addresses, strict=True):
            start = offset + skip
            if length and start == first + length and address == other + length:
                length += size
                continue
            if length:
                yield first, other, length
            first, other, length = start, address, size
        if length:
            yield first, other, length
