"""Blocks of a transformers cache: their hashes, their bytes, and copies into and out of places.

A prompt is cut into blocks of `block_tokens` tokens. The hash of a block is the sha256 of the hash
before it and its tokens (little-endian, 4 bytes each), so it stands for everything up to its end;
before the first stands the sha256 of "kvstore" and the salt. The bytes of a block are, in C order
and in the dtype of the cache:

    [0 keys, 1 values][layer][kv head][token of the block][head dim]

Versions: 1.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from kvstore.client.places import Places
from kvstore.errors import InvalidRequest

FORMAT = 1  # of the bytes and of the hashes, as above

Halves = tuple[torch.Tensor, torch.Tensor]  # keys and values


@dataclasses.dataclass(frozen=True)
class Form:
    """The shape of a block. `key` and `value` are kv heads and head dim."""

    layers: int
    key: tuple[int, int]
    value: tuple[int, int]
    tokens: int
    dtype: torch.dtype

    @property
    def elements(self) -> tuple[int, int]:
        """Of the keys and of the values of a block."""
        key, value = (heads * dim for heads, dim in (self.key, self.value))
        return key * self.layers * self.tokens, value * self.layers * self.tokens

    @property
    def block_bytes(self) -> int:
        """Of a block."""
        return sum(self.elements) * int(self.dtype.itemsize)

    def read(self, places: Places) -> Halves:
        """A copy of blocks: keys and values of shape [layer, kv head, block, token, head dim]."""
        count = len(places.offsets)
        halves = tuple(
            torch.empty(self.layers, heads, count, self.tokens, dim, dtype=self.dtype)
            for heads, dim in (self.key, self.value)
        )
        for first, length in _runs(places, range(count)):
            views = self._views(places, first, length)
            for half, view in zip(halves, views, strict=True):
                half[:, :, first : first + length].copy_(view.permute(1, 2, 0, 3, 4))
        return halves[0], halves[1]

    def write(self, places: Places, blocks: Sequence[int], layers: Sequence[Halves]) -> None:
        """Fill the places with these blocks of a cache, whose layers have [kv head, token, dim]."""
        with torch.no_grad():
            for first, length in _runs(places, blocks):
                start = blocks[first] * self.tokens
                views = self._views(places, first, length)
                for number, layer in enumerate(layers):
                    for view, states in zip(views, layer, strict=True):
                        part = states[:, start : start + length * self.tokens]
                        part = part.unflatten(1, (length, self.tokens))
                        view[:, number].copy_(part.transpose(0, 1))

    def _views(self, places: Places, first: int, length: int) -> list[torch.Tensor]:
        """Keys and values of places in a row, over the memory itself, of shape [block, layer, kv
        head, token, head dim]."""
        arena = torch.frombuffer(places.arena.view, dtype=self.dtype)
        step = places.layout.slot_bytes // self.dtype.itemsize
        start = places.offsets[first] // self.dtype.itemsize
        found = []
        for (heads, dim), elements in zip((self.key, self.value), self.elements, strict=True):
            inner = (elements // self.layers, self.tokens * dim, dim, 1)
            shape = (length, self.layers, heads, self.tokens, dim)
            found.append(arena.as_strided(shape, (step, *inner), start))
            start += elements
        return found


def _runs(places: Places, blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where, and how long, places are next to each other whose blocks follow each other: a copy of
    each takes fewer calls than there are blocks."""
    offsets, step = places.offsets, places.layout.slot_bytes
    first = 0
    for at in range(1, len(offsets) + 1):
        if (
            at == len(offsets)
            or offsets[at] != offsets[at - 1] + step
            or blocks[at] != blocks[at - 1] + 1
        ):
            yield first, at - first
            first = at


def join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Along the tokens."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=2)


def prompt_tokens(token_ids: Any) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The tokens of one prompt. Raises InvalidRequest for anything else."""
    if isinstance(token_ids, torch.Tensor):
        token_ids = token_ids.detach().cpu()
    found = np.asarray(token_ids)
    if found.ndim == 2 and found.shape[0] == 1:
        found = found[0]
    if not found.size:
        return np.empty(0, "<i4")
    if found.ndim != 1 or found.dtype.kind not in "iu" or found.min() < 0 or found.max() >> 31:
        raise InvalidRequest(
            f"token_ids have the shape {found.shape} and the type {found.dtype}: give the tokens "
            "of one prompt, [tokens] or [1, tokens]"
        )
    return found.astype("<i4")


def chain(
    tokens: np.ndarray[Any, np.dtype[np.int32]], block_tokens: int, salt: bytes
) -> list[bytes]:
    """The hash of each whole block, chained over all before it."""
    before = hashlib.sha256(b"kvstore" + salt).digest()
    found = []
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        block = tokens[start : start + block_tokens]
        before = hashlib.sha256(before + block.tobytes()).digest()
        found.append(before)
    return found
