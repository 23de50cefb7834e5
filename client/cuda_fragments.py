"""Pieces of blocks that lie apart in device memory: how they are merged, cut, and in which way each
is copied. Decides only; nothing here touches a device."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvstore.errors import InvalidBlock

PLAIN_BYTES_MAX = 64 << 20  # one plain copy; a longer one is cut, so that others get in between
PAGEABLE_BYTES_MAX = 4 << 20  # the same where the call itself waits for the bytes
BATCH_COUNT_MAX = 4_096  # fragments of one batched call
GATHER_COUNT_MAX = 2_048  # of one launch of the kernel: its table is 48 KiB
BATCH_COUNT_MIN = 4  # fewer are as well copied one by one
GATHER_GAIN = 1.2  # the kernel takes processors from the engine: it must be so much faster
PLAIN_LOSS = 1.03  # plain copies are preferred where they are about as fast
FAR = 1 << 62


class Direction(enum.Enum):
    """STORE: from the device into the arena. LOAD: from the arena into the device."""

    STORE = "store"
    LOAD = "load"


class Way(enum.IntEnum):
    """How a fragment is copied."""

    PLAIN = 0  # one asynchronous copy each
    BATCH = 1  # one call for many copies
    GATHER = 2  # a kernel that reads or writes the registered host memory itself
    PAGEABLE = 3  # a plain copy of host memory that is not registered: the call itself may wait


# Fragments of one step.
COUNT_MAX = {
    Way.PLAIN: 64,
    Way.BATCH: BATCH_COUNT_MAX,
    Way.GATHER: GATHER_COUNT_MAX,
    Way.PAGEABLE: 1,
}


@dataclasses.dataclass(frozen=True)
class Breaks:
    """From which fragment size on which way is taken: the kernel below `gather_bytes`, plain copies
    from `plain_bytes` on, batched ones between. The defaults stand until a device is measured."""

    gather_bytes: int = 16 << 10
    plain_bytes: int = 1 << 20


@dataclasses.dataclass(frozen=True)
class Fragments:
    """Memory of one device and its places in the arena: three int64 arrays of one length.

    device     number of the device
    addresses  in its memory
    offsets    in the arena, bytes
    lengths    in bytes
    """

    device: int
    addresses: Any
    offsets: Any
    lengths: Any

    def __post_init__(self) -> None:
        count = len(self.addresses)
        if not count == len(self.offsets) == len(self.lengths):
            raise InvalidBlock("fragments need one offset and one length for each address")

    def __len__(self) -> int:
        return len(self.addresses)

    @property
    def total_bytes(self) -> int:
        """Bytes of all fragments."""
        return int(self.lengths.sum()) if len(self) else 0

    @classmethod
    def of_blocks(
        cls, device: int, offsets: Sequence[int], addresses: Any, lengths: Sequence[int], skip: int
    ) -> Fragments:
        """Fragments of blocks that are all cut in the same way.

        offsets    where each block starts in the arena
        addresses  int64 array of shape (blocks, fragments per block), in device memory
        lengths    bytes of each fragment of a block; in the arena they follow each other
        skip       bytes of a block before its first fragment: a shard's place
        """
        table = np.asarray(addresses, np.int64).reshape(len(offsets), len(lengths))
        sizes = np.asarray(lengths, np.int64)
        starts = np.cumsum(sizes) - sizes + skip
        places = np.asarray(offsets, np.int64)[:, None] + starts
        return cls(
            device, table.ravel(), places.ravel(), np.broadcast_to(sizes, table.shape).ravel()
        )


@dataclasses.dataclass(frozen=True)
class Step:
    """Copies that go to the device in one way. Offsets are those in the arena."""

    way: Way
    addresses: Any
    offsets: Any
    lengths: Any

    @property
    def weight(self) -> int:
        """About how many places of the device's queue it takes."""
        count = len(self.addresses)
        return 1 + count // 256 if self.way in (Way.BATCH, Way.GATHER) else count


def plan(
    fragments: Fragments,
    *,
    ready_bytes: int,
    piece_bytes: int,
    breaks: Breaks,
    batches: bool,
    gathers: bool,
) -> list[Step]:
    """What to give to the device, in order.

    ready_bytes  the arena is registered up to here, in pieces of `piece_bytes`: no copy may touch
                 two of them, nor registered and other memory
    batches      whether the device has the batched copy; `gathers`: whether it has the kernel
    """
    parts = fragments.addresses, fragments.offsets, fragments.lengths
    if len(fragments) == 1:  # of one block, where all of this would take as long as the copy
        start, length = int(parts[1][0]), int(parts[2][0])
        end = min(ready_bytes, (start // piece_bytes + 1) * piece_bytes)
        if start + length <= end and length <= PLAIN_BYTES_MAX:
            return [Step(Way.PLAIN, *parts)]
    parts = _merged(*parts)
    ends = parts[1] + parts[2]
    if len(ends) and int(ends.max()) > min(piece_bytes, ready_bytes):
        parts = _cut_at(parts, piece_bytes, ready_bytes)
    ways = choose(parts[2], breaks, batches=batches, gathers=gathers)
    ways[parts[1] >= ready_bytes] = Way.PAGEABLE
    steps: list[Step] = []
    for way in Way:
        chosen = ways == way
        if not chosen.any():
            continue
        mine = tuple(part[chosen] for part in parts)
        if way is Way.PAGEABLE:
            mine = _cut(mine, PAGEABLE_BYTES_MAX)
        elif way is Way.PLAIN:
            mine = _cut(mine, PLAIN_BYTES_MAX)
        size = COUNT_MAX[way]
        steps += [
            Step(way, *(part[at : at + size] for part in mine))
            for at in range(0, len(mine[0]), size)
        ]
    return steps


def choose(lengths: Any, breaks: Breaks, *, batches: bool, gathers: bool) -> Any:
    """The way of each fragment, from its length: an array of `Way`."""
    ways = np.full(len(lengths), Way.PLAIN, np.int64)
    if batches:
        ways[lengths < breaks.plain_bytes] = Way.BATCH
    if gathers:
        ways[lengths < breaks.gather_bytes] = Way.GATHER
    for way in (Way.GATHER, Way.BATCH):
        chosen = ways == way
        if 0 < int(chosen.sum()) < BATCH_COUNT_MIN:
            ways[chosen] = Way.PLAIN
    return ways


def breaks_of(seconds: Mapping[Way, Mapping[int, float]]) -> Breaks:
    """Where the ways change places, from what was measured.

    seconds  for each way that the device has, how long equal bytes took in fragments of each size
    """
    plain = seconds[Way.PLAIN]
    batch = seconds.get(Way.BATCH, plain)
    gather = seconds.get(Way.GATHER, {})
    gather_bytes, plain_bytes = 0, FAR
    for size in sorted(gather):
        if gather[size] * GATHER_GAIN > min(plain[size], batch[size]):
            break
        gather_bytes = size + 1
    for size in sorted(plain, reverse=True):
        if plain[size] > batch[size] * PLAIN_LOSS:
            break
        plain_bytes = size
    return Breaks(gather_bytes, max(plain_bytes, gather_bytes))


def _merged(addresses: Any, offsets: Any, lengths: Any) -> tuple[Any, Any, Any]:
    """The same bytes with neighbours on both sides as one."""
    if len(addresses) < 2:
        return addresses, offsets, lengths
    follows = addresses[1:] == addresses[:-1] + lengths[:-1]
    follows &= offsets[1:] == offsets[:-1] + lengths[:-1]
    if not follows.any():
        return addresses, offsets, lengths
    firsts = np.flatnonzero(np.concatenate([[True], ~follows]))
    return addresses[firsts], offsets[firsts], np.add.reduceat(lengths, firsts)


def _cut_at(parts: Sequence[Any], piece_bytes: int, ready_bytes: int) -> tuple[Any, Any, Any]:
    """The same bytes, no fragment across the border of two pieces or of what is registered, which
    is a border of pieces itself, or the arena's end."""
    _, offsets, lengths = parts
    first = offsets // piece_bytes
    cuts = np.minimum(offsets + lengths - 1, ready_bytes) // piece_bytes - first
    return _split(parts, np.maximum(0, cuts), (first + 1) * piece_bytes - offsets, piece_bytes)


def _cut(parts: Sequence[Any], size_max: int) -> tuple[Any, Any, Any]:
    """The same bytes in fragments of at most this size."""
    cuts = np.maximum(0, -(-parts[2] // size_max) - 1)
    return _split(parts, cuts, np.full(len(cuts), size_max, np.int64), size_max)


def _split(parts: Sequence[Any], cuts: Any, first: Any, step: int) -> tuple[Any, Any, Any]:
    """Cut fragment i at `cuts[i]` places: `first[i]` bytes from its start, then every `step`."""
    addresses, offsets, lengths = parts
    if not cuts.any():
        return addresses, offsets, lengths
    counts = cuts + 1
    owner = np.repeat(np.arange(len(lengths)), counts)
    place = np.arange(len(owner)) - np.repeat(
        np.cumsum(counts) - counts, counts
    )  # within its owner
    start = np.where(place > 0, first[owner] + (place - 1) * step, 0)
    end = np.where(place < cuts[owner], first[owner] + place * step, lengths[owner])
    return addresses[owner] + start, offsets[owner] + start, end - start
