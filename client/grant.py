"""A grant: resident blocks that may be read until they are released."""

from __future__ import annotations

import functools
import time
from array import array
from collections import Counter
from typing import TYPE_CHECKING, Any

from kvstore.client.places import Extent, Places
from kvstore.errors import InvalidRequest
from kvstore.protos import kvstore_pb2 as pb
from kvstore.types import TIERS, Layout

if TYPE_CHECKING:
    from kvstore.client.client import Client, Session

NO_COPY = 0xFFFFFFFFFFFFFFFF


class Grant:
    """See Cache.acquire. As a context manager it releases at the end.

    length      leading blocks that may be read
    tiers       how many of them were found in which tier
    stop        why it is not longer: "end", "absent", "late", "no_room", "too_slow", "failed",
                "pending"
    estimate_s  for "late": when the next block is expected, in seconds from the answer
    """

    def __init__(self, client: Client, session: Session, layout: Layout, reply: Any) -> None:
        self._client = client
        self.session = session
        self._layout = layout
        self._reply = reply
        self._lease: int = reply.lease
        self._held: bool | None = None if self._lease else True
        self._places: Places | None = None
        self.length: int = reply.length

    @functools.cached_property
    def tiers(self) -> Counter[str]:
        """How many blocks were found in which tier."""
        return count_tiers(self._reply.tiers)

    @property
    def in_tiers(self) -> bytes:
        """The tier of each block, as a number: see `types.TIERS`."""
        tiers: bytes = self._reply.tiers
        return tiers

    @property
    def beside(self) -> bytes:
        """Of a direct request, where the blocks in tier "nvme" are there, and their sums."""
        packed: bytes = self._reply.beside
        return packed

    @functools.cached_property
    def stop(self) -> str:
        """Why the grant is not longer."""
        return pb.AcquireReply.Stop.Name(self._reply.stop).lower()

    @property
    def estimate_s(self) -> float:
        """For "late": when the next block is expected, in seconds from the answer."""
        estimate: float = self._reply.estimate_s
        return estimate

    @functools.cached_property
    def copies(self) -> list[int | None]:
        """For each block and shard where its copy starts in the arena of the GPU that was asked
        for, None where there is none. But for a direct request it is at its place in DRAM, too."""
        found = array("Q", self._reply.copies)
        if not found:
            return [None] * (self.length * self._layout.shards)
        return [None if offset == NO_COPY else offset for offset in found]

    @property
    def places(self) -> Places:
        """Where the blocks are."""
        if self._places is None:
            self._places = Places(self.session.arena, self._layout, self._reply.offsets)
        return self._places

    def __enter__(self) -> Grant:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __len__(self) -> int:
        return self.length

    @property
    def extents(self) -> list[Extent]:
        """Places of the blocks."""
        return self.places.extents()

    def view(self, i: int, shard: int = 0) -> memoryview:
        """The bytes of one shard of the i-th block, read-only and not copied. What was read there
        counts if `release` says so, and nothing is to be read there after it."""
        return self._open_places().view(i, shard, writable=False)

    def numpy(self, i: int, shard: int = 0, dtype: Any = "u1") -> Any:
        """The same as a flat read-only numpy array."""
        return self._open_places().numpy(i, shard, dtype, writable=False)

    def tensor(self, i: int, shard: int = 0, dtype: Any = None) -> Any:
        """The same as a flat CPU tensor, of the layout's dtype unless another is given; not to be
        written to."""
        return self._open_places().tensor(i, shard, dtype)

    def _open_places(self) -> Places:
        if self._lease and self._held is not None:
            raise InvalidRequest(
                "the grant was released, its slots may hold other blocks: acquire again"
            )
        return self.places

    def release(self) -> bool:
        """End the lease. False: it did not last until now, what was read must be thrown away.

        A second call answers the same. Never raises: a daemon that cannot say that the lease held
        has not said so.
        """
        if self._held is None:
            deadline = time.monotonic() + self._client.timeout_s
            self._held = self.session.transport.release(self._lease, deadline)
        return self._held


def count_tiers(packed: bytes) -> Counter[str]:
    """How many blocks each tier has, from one byte per block."""
    counts: Counter[str] = Counter()
    for number in set(packed):
        counts[TIERS[number]] = packed.count(number)
    return counts
