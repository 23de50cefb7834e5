"""Leases and sessions: who holds which blocks, and for what. The store decides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvstore.catalog import LayoutEntry
from kvstore.limits import Bucket, Credit
from kvstore.types import NVME

NO_SESSION = 0
SEVERAL = 0xFFFFFFFF  # in place of a session's number: any of them may be meant


class ReadLease:
    """The right to read blocks, in prefix order. All of `blocks` are pinned.

    `ready` counts the leading blocks whose bytes are where they are to be read: in DRAM, but for
    `direct` ones. Until `answered`, blocks after them
    may still be on their way, and the lease may be cut.
    """

    __slots__ = (
        "answered",
        "asked",
        "blocks",
        "context",
        "devices",
        "direct",
        "enough",
        "entry",
        "held",
        "keys",
        "missed",
        "number",
        "parked",
        "ready",
        "session",
        "slow",
        "stop",
        "tiers",
        "tokens_per_s",
        "why",
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
        self.parked = False  # it was answered by: ask again when there is room
        self.context: Sequence[bytes] = ()  # keys that the blocks continue
        self.devices: Sequence[int] = ()  # where the reader wants each shard, if not in DRAM
        self.direct = False  # blocks on NVMe are read there: `tiers` says which
        self.held: Sequence[int] = ()  # blocks of a direct lease that are not read in DRAM
        self.keys: Sequence[bytes] = ()  # that are asked for
        self.asked = 0
        self.tokens_per_s = 0.0
        self.slow = 0  # blocks that were on NVMe, once answered
        self.missed = 0  # keys that count as missed, once answered
        self.why = ""  # they did, where it is not that they are nowhere

    def beside(self) -> list[int]:
        """Those of the blocks `held` that are read on NVMe."""
        if not self.held:
            return []
        return [block for block, tier in zip(self.blocks, self.tiers, strict=True) if tier == NVME]


class WriteLease:
    """The right to write the slots of new blocks: all their shards, or the one named."""

    __slots__ = ("after", "blocks", "entry", "lends", "number", "session", "shard")

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
        self.lends = False  # its commit lends a slot for the next block


class Session:
    """One connected client."""

    __slots__ = ("bucket", "credit", "leases", "lent", "name", "number", "pids", "ready", "token")

    def __init__(self, number: int, name: str) -> None:
        self.number = number
        self.token = b""  # lets other processes take part; given by whoever has randomness
        self.name = name
        self.pids: set[int] = set()  # of the processes that take part; for people
        self.leases: dict[int, ReadLease | WriteLease] = {}
        self.lent: dict[int, WriteLease] = {}  # of slots for blocks yet to be named
        self.ready: WriteLease | None = None  # such a slot, of which it was not told yet
        self.credit = Credit()
        self.bucket = Bucket()


class Sessions:
    """All sessions and their leases; numbers are never used twice."""

    def __init__(self) -> None:
        self.last_number = NO_SESSION  # of any session, also of an earlier daemon
        self._sessions: dict[int, Session] = {}
        self._lease_number = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    def attach(self, name: str) -> Session:
        """A new session."""
        self.last_number += 1
        session = Session(self.last_number, name)
        self._sessions[session.number] = session
        return session

    def get(self, number: int) -> Session | None:
        """The session of that number, while it lasts."""
        return self._sessions.get(number)

    def detach(self, session: Session) -> list[ReadLease | WriteLease]:
        """End the session; the leases that it held, for the store to end."""
        del self._sessions[session.number]
        return [*session.leases.values(), *session.lent.values()]

    def next_number(self) -> int:
        """A number for a lease. Numbers start at 1: 0 on the wire says that there is none."""
        self._lease_number += 1
        return self._lease_number
