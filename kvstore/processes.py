"""The processes behind each session: who may still write what the session was given.

session lives    its processes are noted, so that a successor of this daemon knows them
session ended    what it was writing is held until its processes have ended, or one of them
                 says that nothing of it is written any more (settle)
daemon died      the same, for the sessions that its successor finds in the notes
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable

import structlog

from kvstore.adoption import Notes
from kvstore.leases import SEVERAL, Session
from kvstore.peers import Peer

log = structlog.get_logger()


class _Session:
    """Processes of one session, and the blocks held for it; `over` once the session has ended."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self.pids: set[int] = set()
        self.blocks: list[int] = []
        self.over = False


class Processes:
    """All sessions of one tenant, by number. `free` gets blocks that nobody can be writing."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, notes: Notes, free: Callable[[list[int]], None]
    ) -> None:
        self._loop = loop
        self._notes = notes
        self._free = free
        self._sessions: dict[int, _Session] = {}
        self._inherited: set[int] = set()  # sessions of an earlier daemon
        self._anybodys: list[int] = []  # blocks that any of those may be writing

    def inherit(self, held: dict[int, list[int]]) -> None:
        """Blocks that sessions of an earlier daemon were writing when it died."""
        self._anybodys = held.pop(SEVERAL, [])
        for number, processes in list(self._notes.processes.items()):
            session = self._sessions[number] = _Session()
            session.blocks = held.pop(number, [])
            session.over = True
            session.peers = [Peer(self._loop, pid, start=start) for pid, start in processes]
            session.pids = {pid for pid, _ in processes}
            self._inherited.add(number)
        # Of a session without a note nothing is known; that it ends with all others is a guess,
        # and a note that is missing has spoilt the table before.
        self._anybodys += [block for blocks in held.values() for block in blocks]
        for number in list(self._inherited):
            self._watch(number)
        self._settle_anybodys()

    def joined(self, joined: Session, peer: Peer) -> None:
        """A process takes part in a session. The peer is this object's when the session ends."""
        number = joined.number
        joined.pids.add(peer.pid)
        session = self._sessions.setdefault(number, _Session())
        session.peers = [one for one in session.peers if not one.gone]
        session.peers.append(peer)
        if peer.pid not in session.pids:
            session.pids.add(peer.pid)
            self._notes.add_process(number, (peer.pid, peer.start))

    def ended(self, number: int, blocks: list[int]) -> None:
        """A session has ended; its processes may still write these blocks."""
        session = self._sessions[number]
        session.over = True
        session.blocks = blocks
        if blocks:
            log.warning("slots quarantined", session=number, pids=session.pids, slots=len(blocks))
        self._watch(number)

    def settle(self, caller: int, numbers: Iterable[int]) -> int:
        """A session says that nothing these others were given is written any more; how many of them
        it could say that of: those that one of its processes took part in, and that have ended."""
        count = 0
        for number in numbers:
            session = self._sessions.get(number)
            known = session is not None and session.pids & self._sessions[caller].pids
            if session is not None and session.over and known:
                self._finish(number)
                count += 1
        return count

    def _watch(self, number: int) -> None:
        session = self._sessions[number]
        if not session.blocks and number not in self._inherited:
            self._finish(number)
            return
        peers = list(session.peers)
        if not peers:
            self._finish(number)
        for peer in peers:  # of the last to be gone, `_gone` ends it, perhaps at once
            peer.when_gone(functools.partial(self._gone, number, peer))

    def _gone(self, number: int, peer: Peer) -> None:
        session = self._sessions.get(number)
        if session is not None and peer in session.peers:
            session.peers.remove(peer)
            if not session.peers:
                self._finish(number)

    def _finish(self, number: int) -> None:
        session = self._sessions.pop(number)
        for peer in session.peers:
            peer.close()
        self._notes.over(number)
        if session.blocks:
            self._free(session.blocks)
        self._inherited.discard(number)
        self._settle_anybodys()

    def _settle_anybodys(self) -> None:
        if self._anybodys and not self._inherited:
            blocks, self._anybodys = self._anybodys, []
            self._free(blocks)
