"""Processes of engines: how they begin and end, how a daemon knows them, and helpers.

A helper is a worker process of a client: it has joined the client's session and copies a part of
what is put. It may outlive the client, and die before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvstore.errors import KVStoreError
from kvstore.protos import kvstore_pb2 as pb
from kvstore.types import PROTOCOL_VERSION
from tests.simulate.clock import Process
from tests.simulate.holders import Writing
from tests.simulate.wire import Connection

if TYPE_CHECKING:
    from tests.simulate.world import World

Piece = tuple[int, bytes]  # where in the arena, and what


class Peer:
    """A process as a daemon knows it; with the interface of `kvstore.peers.Peer`."""

    def __init__(self, daemon: Process, program: Program | None, pid: int, wire_s: float) -> None:
        self.pid = pid
        self.start = pid
        self.gone = program is None or program.gone
        self._daemon = daemon
        self._wire_s = wire_s
        self._then: Callable[[], None] | None = None
        if program is not None and not self.gone:
            program.peers.append(self)

    def when_gone(self, then: Callable[[], None]) -> None:
        self._then = then
        if self.gone:
            self._tell()

    def close(self) -> None:
        self._then = None

    def ends(self) -> None:
        """The kernel tells the daemon, which hears of it in its turn."""
        self._daemon.call_later(self._wire_s, self._ended)

    def _ended(self) -> None:
        self.gone = True
        self._tell()

    def _tell(self) -> None:
        then, self._then = self._then, None
        if then is not None:
            then()


class Program:
    """One process of an engine. `dying`: it sends nothing more, but what it copies goes on until
    it is `gone`."""

    def __init__(self, world: World, number: int, kind: str) -> None:
        self.world = world
        self.chance = world.chance
        self.number = number
        self.name = f"{kind} {number}"
        self.process = Process(world.clock, self.name)
        self.connections: list[Connection] = []  # all that it ever made
        self.peers: list[Peer] = []  # who waits for its end
        self.dying = False
        self.gone = False

    def kill(self, ends_after_s: float) -> None:
        """SIGKILL."""
        self.dying = True
        if self.process.stopped:
            self.process.resume()
        for connection in self.connections:
            connection.close()
        self.world.fate.call_later(ends_after_s, self.end)

    def end(self) -> None:
        """The process is gone, with all its threads."""
        if self.gone:
            return
        self.process.kill()
        self.dying = self.gone = True
        self.world.holders.end_of(self)
        self.world.programs.remove(self)
        for connection in self.connections:
            connection.process_ended()
        for peer in self.peers:
            peer.ends()

    def copy(self, writing: Writing, pieces: Sequence[Piece]) -> None:
        """Put bytes where this process was told that it may."""
        assert self in writing.programs
        for start, data in pieces:
            writing.arena.bytes[start : start + len(data)] = data
        if self.dying:
            self.world.marks["written after death"] += 1


class Helper(Program):
    """See the module."""

    def __init__(self, world: World, number: int, connection: Connection, ticket: Any) -> None:
        super().__init__(world, number, "helper")
        self.session = ticket.session
        self.joined = False
        self._tasks: list[Callable[[bool], None]] = []
        self._connection = Connection(self, connection.daemon)
        self.connections.append(self._connection)
        request = pb.AttachRequest(
            protocol=PROTOCOL_VERSION, client=self.name, join=ticket.session, token=ticket.token
        )
        self._connection.send(pb.ATTACH, request, [], self._attached)

    def can_help(self) -> bool:
        """Whether it can be asked to copy something."""
        return self.joined and not self.dying and not self._connection.ended

    def help(self, writing: Writing, pieces: Sequence[Piece], done: Callable[[bool], None]) -> None:
        """Copy these pieces some time; `done` is told whether they were copied."""
        writing.programs.append(self)
        self._tasks.append(done)
        self.process.call_later(self.world.copy_s(), self._do, writing, pieces, done)

    def end(self) -> None:
        super().end()
        tasks, self._tasks = self._tasks, []
        for done in tasks:
            done(False)

    def _attached(self, reply: Any) -> None:
        if reply is None or isinstance(reply, KVStoreError):
            self.world.marks["not joined"] += 1
            self.kill(0.0)
            return
        self.world.marks["joined"] += 1
        self.joined = True

    def _do(self, writing: Writing, pieces: Sequence[Piece], done: Callable[[bool], None]) -> None:
        half = len(pieces) // 2
        self.copy(writing, pieces[:half])
        self.process.call_later(self.world.copy_s(), self._rest, writing, pieces[half:], done)

    def _rest(
        self, writing: Writing, pieces: Sequence[Piece], done: Callable[[bool], None]
    ) -> None:
        self.copy(writing, pieces)
        if done in self._tasks:
            self._tasks.remove(done)
            self.world.marks["helped"] += 1
            done(True)
