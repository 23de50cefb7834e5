"""A reservation: slots of new blocks that this client writes, to be committed or aborted."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from kvstore.client.places import Extent, Places
from kvstore.errors import InvalidRequest, SessionLost, Unavailable
from kvstore.protos import kvstore_pb2 as pb

if TYPE_CHECKING:
    from kvstore.client.client import Client, Session

NEW, PRESENT, REFUSED = 0, 1, 2


class Reservation:
    """See Cache.reserve. As a context manager it commits at the end, or aborts on an exception.

    extents   places of the new blocks, in the order of their hashes
    indices   where those stand in the list of hashes
    present   how many blocks are stored already, or being written by somebody
    refused   how many got no slot, for want of room
    """

    def __init__(
        self,
        client: Client,
        session: Session,
        places: Places,
        lease: int,
        status: bytes,
        shard: int | None,
    ) -> None:
        self._client = client
        self._session = session
        self._places = places
        self._lease = lease
        self._shard = shard
        self.indices = [at for at, answer in enumerate(status) if answer == NEW]
        self.present = status.count(PRESENT)
        self.refused = status.count(REFUSED)
        if lease:
            session.begin_write()

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def extents(self) -> list[Extent]:
        """Places of the new blocks."""
        return self._places.extents()

    def view(self, i: int, shard: int | None = None) -> memoryview:
        """The writable bytes of one shard of the i-th extent. Not to be used any more once the
        reservation has ended: they belong to others then."""
        self._check()
        return self._places.view(i, self._which(shard), writable=True)

    def numpy(self, i: int, shard: int | None = None, dtype: Any = "u1") -> Any:
        """The same as a flat numpy array."""
        self._check()
        return self._places.numpy(i, self._which(shard), dtype, writable=True)

    def tensor(self, i: int, shard: int | None = None, dtype: Any = None) -> Any:
        """The same as a flat CPU tensor, of the layout's dtype unless another is given."""
        self._check()
        return self._places.tensor(i, self._which(shard), dtype)

    def commit(self) -> int:
        """The bytes are complete: make the blocks visible. Returns how many were stored.

        Raises SessionLost when the connection was lost meanwhile: nothing was stored then.
        """
        if not self._lease:
            return 0
        reply = self._end(pb.COMMIT, pb.CommitRequest, pb.CommitReply)
        if not reply.held:
            raise SessionLost("the reservation is void, nothing was stored: reserve again")
        if reply.lent:
            session, layout = self._session, self._places.layout
            session.keep_spare(layout, session.layouts[layout], reply.lent, reply.lent_offset)
        stored: int = reply.stored
        return stored

    def abort(self) -> None:
        """Give the slots back unwritten. Does nothing when the reservation has ended, and never
        raises for a daemon that does not answer: what it does not hear of ends with the session."""
        if self._lease:
            with contextlib.suppress(SessionLost, Unavailable):
                self._end(pb.ABORT, pb.AbortRequest, pb.AbortReply)

    def _end(self, verb: int, request: Any, reply: Any) -> Any:
        lease, self._lease = self._lease, 0
        deadline = time.monotonic() + self._client.timeout_s
        self._client.end_write(self._session)
        return self._session.transport.call(verb, request(lease=lease), reply, deadline)

    def _check(self) -> None:
        if self.indices and not self._lease:
            raise InvalidRequest(
                "the reservation has ended, its slots may be somebody else's: reserve again"
            )

    def _which(self, shard: int | None) -> int:
        return shard if shard is not None else self._shard or 0
