"""Leases and sessions: who holds which blocks, and for what. The store decides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvstore.catalog import LayoutEntry


class ReadLease:
    """The right to read blocks, in prefix order. All of `blocks` are pinned.

    `ready` counts the leading blocks whose bytes are in DRAM. Until `answered`, blocks after them
    may still be on their way, and the lease may be cut.
    """

    __slots__ = (
        "answered",
        "asked",
        "blocks",
        "context",
        "enough",
        "entry",
        "number",
        "ready",
        "session",
        "stop",
        "tiers",
        "tokens_per_s",
    )

    def __init__(self, number: int, session: Session, entry: LayoutEntry) -> None:
        self.number = number
        self.session = session
        self.entry = entry
        self.blocks: list[int] = []
        self.tiers = b""
        self.ready = 0
        self.enough = 0
        self.stop = 0
        self.answered = False
        self.context: Sequence[bytes] = ()  # keys that the blocks continue
        self.asked = 0
        self.tokens_per_s = 0.0


class WriteLease:
    """The right to write the slots of new blocks: all their shards, or the one named."""

    __slots__ = ("after", "blocks", "entry", "number", "session", "shard")

    def __init__(
        self,
        number: int,
        session: Session,
        entry: LayoutEntry,
        blocks: list[int],
        shard: int | None,
    ) -> None:
        self.number = number
        self.session = session
        self.entry = entry
        self.blocks = blocks
        self.shard = shard
        self.after: Sequence[bytes | None] = ()  # keys of the chain before the blocks


class Session:
    """One connected client."""

    __slots__ = ("leases", "name", "number")

    def __init__(self, number: int, name: str) -> None:
        self.number = number
        self.name = name
        self.leases: dict[int, ReadLease | WriteLease] = {}


class Sessions:
    """All sessions and their leases; numbers are never used twice."""

    def __init__(self, leases_max: int) -> None:
        self.leases_max = leases_max
        self._sessions: dict[int, Session] = {}
        self._session_number = 0
        self._lease_number = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    def attach(self, name: str) -> Session:
        """A new session."""
        self._session_number += 1
        session = Session(self._session_number, name)
        self._sessions[session.number] = session
        return session

    def detach(self, session: Session) -> list[ReadLease | WriteLease]:
        """End the session; the leases that it held, for the store to end."""
        del self._sessions[session.number]
        return list(session.leases.values())

    def full(self, session: Session) -> bool:
        """Whether the session may have no further lease."""
        return len(session.leases) >= self.leases_max

    def next_number(self) -> int:
        """A number for a lease. Numbers start at 1: 0 on the wire says that there is none."""
        self._lease_number += 1
        return self._lease_number
