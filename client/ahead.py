"""Storing a single block: it is copied while the daemon is asked where to.

The commit of such a block lends the slot for the next one. What is stored next is copied there at
once, and committed under the lease of that slot. Only then the answer to the reserve is looked at:
if it does not say that the slot was the block's, nothing was committed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kvstore.client import checks
from kvstore.client.copying import SHARED_BYTES, copy, copy_all
from kvstore.client.reservation import PRESENT
from kvstore.client.results import PutResult
from kvstore.errors import SessionLost
from kvstore.protos import kvstore_pb2 as pb
from kvstore.types import Layout

if TYPE_CHECKING:
    from kvstore.client.cache import Cache
    from kvstore.client.client import Session
    from kvstore.client.wire import Wire

LEAST_BYTES = 256 << 10  # of a block; smaller ones are copied sooner than the daemon is asked


class Spare(NamedTuple):
    """A slot that was lent: for blocks of which layout (and its number), its lease, where it is."""

    layout: Layout
    number: int
    lease: int
    offset: int


class Ahead:
    """Of one cache. `pays`: what was stored last was new, so the next may be as well."""

    def __init__(self, cache: Cache) -> None:
        self.pays = True
        self._client = cache.client
        self._layout = cache.layout
        self._recall = cache.recall

    def suits(self, sources: Any) -> bool:
        """Whether a slot for the next one is worth borrowing: it is one block, in host memory."""
        return (
            not self._client.front
            and type(sources) is list
            and len(sources) == 1
            and self._layout.block_bytes >= LEAST_BYTES
        )

    def put(
        self,
        hashes: Sequence[bytes],
        sources: Any,
        parent: bytes | None,
        hints: Mapping[str, str] | None,
        wait_s: float,
        answer_s: float,
    ) -> PutResult | None:
        """See `Cache.put`; `answer_s` is how long the daemon may take to answer. None when it must
        be done in the usual way: nothing has happened then."""
        client, layout = self._client, self._layout
        request = pb.ReserveRequest(
            parent=checks.parent(parent), deadline_s=wait_s, again=True, lend=True
        )
        if hints:
            request.hints.CopyFrom(checks.hints_of(hints))
        session = client.session(time.monotonic() + answer_s)
        wire, spare = session.wire, None
        if wire is None:
            return None
        session.begin_write()
        try:
            if wire.dead is None:  # else it was perhaps not seen that we write
                spare = session.take_spare(layout)
            if spare is None:
                return None
            keys, request.lent = request.keys, spare.lease
            keys.layout, keys.hash_bytes = spare.number, len(hashes[0])
            keys.hashes = hashes[0]
            return self._put(session, wire, spare, request, hashes, sources[0], answer_s)
        except SessionLost:
            return None
        except BaseException:  # nobody could store this block while the lease lives
            if spare is not None:
                wire.give_back(spare.lease)
            raise
        finally:
            client.end_write(session)

    def _put(
        self,
        session: Session,
        wire: Wire,
        spare: Spare,
        request: Any,
        hashes: Sequence[bytes],
        source: int,
        answer_s: float,
    ) -> PutResult | None:
        epochs, place = session.epochs, (spare.offset,)
        target, size = session.arena.address + spare.offset, self._layout.block_bytes
        commit = pb.CommitRequest(lease=spare.lease)
        then: Sequence[int] = ()
        end: Any = None

        def fill() -> None:
            """If the slot is the block's by now, it is so under the same lease."""
            nonlocal then, end
            if size < SHARED_BYTES:
                copy(target, source, size)
            else:
                copy_all([(target, source, size)])
            then = epochs.after(place) if epochs is not None else ()
            end = wire.call(pb.COMMIT, commit, pb.CommitReply, time.monotonic() + answer_s)
            if end.lent:
                session.keep_spare(self._layout, spare.number, end.lent, end.lent_offset)

        deadline = time.monotonic() + answer_s
        reply = wire.call(pb.RESERVE, request, pb.ReserveReply, deadline, fill)
        if reply.lease == spare.lease and end.held:
            if end.stored and epochs is not None:
                self._recall.learn(epochs, hashes, place, then)
            return PutResult(1, 0, 0)
        if reply.lease:  # that slot was not lent any more
            wire.give_back(reply.lease)
            return None
        self.pays = False
        present = int(reply.status[0] == PRESENT)
        return PutResult(0, present, 1 - present)
