"""A grant: resident blocks that may be read until they are released."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from kvstore.client.places import Extent, Places
from kvstore.errors import KVStoreError
from kvstore.protos import kvstore_pb2 as pb
from kvstore.types import TIERS

if TYPE_CHECKING:
    from kvstore.client.client import Client, Session


class Grant:
    """See Cache.acquire. As a context manager it releases at the end.

    length      leading blocks that may be read
    tiers       how many of them were found in which tier
    stop        why it is not longer: "end", "absent", "late", "no_room", "too_slow", "failed",
                "pending"
    estimate_s  for "late": when the next block is expected, in seconds from the answer
    """

    def __init__(self, client: Client, session: Session, places: Places, reply: Any) -> None:
        self._client = client
        self._session = session
        self._places = places
        self._lease: int = reply.lease
        self._held: bool | None = None if reply.lease else True
        self.length: int = reply.length
        self.tiers = count_tiers(reply.tiers)
        self.stop: str = pb.AcquireReply.Stop.Name(reply.stop).lower()
        self.estimate_s: float = reply.estimate_s

    def __enter__(self) -> Grant:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __len__(self) -> int:
        return self.length

    @property
    def extents(self) -> list[Extent]:
        """Places of the blocks."""
        return self._places.extents()

    def view(self, i: int, shard: int = 0) -> memoryview:
        """The bytes of one shard of the i-th block, read-only and not copied."""
        return self._places.view(i, shard, writable=False)

    def numpy(self, i: int, shard: int = 0, dtype: Any = "u1") -> Any:
        """The same as a flat read-only numpy array."""
        return self._places.numpy(i, shard, dtype, writable=False)

    def tensor(self, i: int, shard: int = 0, dtype: Any = None) -> Any:
        """The same as a flat CPU tensor, of the layout's dtype unless another is given; not to be
        written to."""
        return self._places.tensor(i, shard, dtype)

    def release(self) -> bool:
        """End the lease. False: it did not last until now, what was read must be thrown away.

        A second call answers the same. Never raises: a daemon that cannot say that the lease held
        has not said so.
        """
        if self._held is None:
            deadline = time.monotonic() + self._client.timeout_s
            try:
                reply = self._session.transport.call(
                    pb.RELEASE, pb.ReleaseRequest(lease=self._lease), pb.ReleaseReply, deadline
                )
                self._held = bool(reply.held)
            except KVStoreError:
                self._held = False
        return self._held


def count_tiers(packed: bytes) -> Counter[str]:
    """How many blocks each tier has, from one byte per block."""
    return Counter({TIERS[n]: packed.count(n) for n in range(len(TIERS)) if packed.count(n)})
