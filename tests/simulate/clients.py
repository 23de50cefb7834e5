"""Engines in the simulation: processes with a few threads that put, get and do everything else.

A thread is a generator. It yields seconds to sleep, or a `Waiter` for an answer. A killed client
sends nothing more, but what it was copying goes on until the end of its process is told.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

from kvstore.errors import KVStoreError
from kvstore.protos import kvstore_pb2 as pb
from kvstore.types import PROTOCOL_VERSION
from tests.brain.world import KEYS, key_of
from tests.simulate.holders import Writing
from tests.simulate.ledger import Name, content
from tests.simulate.programs import Helper, Piece, Program
from tests.simulate.wire import Connection

if TYPE_CHECKING:
    from tests.simulate.world import World

GRACE_S = 0.05
RETRY_S = 0.01  # until a client looks for a daemon again
GIVE_UP_S = 5.0  # what a call takes at most, beside its own wait
Script = Generator[Any, Any, None]


class Waiter:
    """A call under way."""

    def __init__(self) -> None:
        self.resume: Callable[[Any], None] | None = None
        self.late: Callable[[Any], None] | None = None  # what to do with an answer after all
        self.reply: Any = None

    def take(self, reply: Any) -> None:
        """The answer, or None."""
        self.reply = reply
        resume, self.resume = self.resume, None
        if resume is not None:
            resume(reply)
        elif self.late is not None and reply is not None:
            self.late(reply)


class Client(Program):
    """One process, with its threads."""

    def __init__(self, world: World, number: int) -> None:
        super().__init__(world, number, "client")
        self.connection: Connection | None = None
        self.numbers: dict[int, int] = {}  # of the layouts, as the daemon counts them
        self.finishing = False
        self.helper: Helper | None = None
        self._connecting = False
        self._lost: list[Connection] = []  # for which this process may still be writing
        self.threads = world.chance.choice((1, 1, 2, 3))
        for _ in range(self.threads):
            self._step(self._live(), None)

    # -- its life ------------------------------------------------------------------------------

    def _step(self, script: Script, value: Any) -> None:
        try:
            wanted = script.send(value)
        except StopIteration:
            self.threads -= 1
            return
        if isinstance(wanted, Waiter):
            wanted.resume = lambda reply: self._step(script, reply)
        else:
            self.process.call_later(wanted, self._step, script, None)

    def _live(self) -> Script:
        while not self.finishing:
            yield self.world.think_s()
            connection = self.connection
            if connection is None or connection.ended or connection.closed:
                yield from self._connect()
                continue
            name = self.world.next_operation()
            yield from getattr(self, f"_{name}")(connection)

    def _connect(self) -> Script:
        daemon = self.world.daemon
        if self._connecting or self.dying or not daemon.up:
            yield RETRY_S
            return
        self._connecting = True
        connection = Connection(self, daemon)
        self.connections.append(connection)
        request = pb.AttachRequest(protocol=PROTOCOL_VERSION, client=self.name)
        reply = yield from self._call(connection, pb.ATTACH, request)
        numbers: dict[int, int] = {}
        if reply is not None:
            for at in range(len(self.world.layouts)):
                opened = yield from self._call(connection, pb.OPEN, self.world.open_request(at))
                if opened is None:
                    break
                numbers[at] = opened.layout
        if len(numbers) == len(self.world.layouts):
            if self.connection is not None:
                self.world.marks["reconnected"] += 1
                self._lost.append(self.connection)
            connection.number = reply.session
            self.connection, self.numbers = connection, numbers
            self._settle()
            if self.world.wants_helper(self):
                self.helper = self.world.employ_helper(connection, reply)
        else:
            connection.close()
        self._connecting = False

    def _settle(self) -> None:
        """Tell the daemon of sessions that were lost, and that nobody writes for any more."""
        over = [one for one in self._lost if not one.filling]
        self._lost = [one for one in self._lost if one.filling]
        for one in over:
            for lease in list(one.lent):
                self._give_back(one, lease)
        if over and self.connection is not None:
            numbers = [one.number for one in over]
            self._tell(self.connection, pb.SETTLE, pb.SettleRequest(sessions=numbers))

    # -- calls ---------------------------------------------------------------------------------

    def _call(
        self,
        connection: Connection,
        verb: int,
        request: Any,
        names: Sequence[Name] = (),
        wait_s: float = 0.0,
        meanwhile: Script | None = None,
    ) -> Generator[Any, Any, Any]:
        """The reply; None where there is none: refused, too late, or the connection has ended."""
        waiter = Waiter()
        if self.dying:
            yield waiter  # for ever
        if not connection.send(verb, request, list(names), waiter.take):
            return None
        if meanwhile is not None:
            yield from meanwhile
            if self.dying:
                yield Waiter()
            if waiter.reply is not None or connection.ended:
                reply = waiter.reply
                return None if isinstance(reply, KVStoreError) else reply
        until = max(GIVE_UP_S, wait_s + GRACE_S)
        timer = self.process.call_later(until, self._give_up, waiter, connection, verb)
        reply = yield waiter
        timer.cancel()
        return None if isinstance(reply, KVStoreError) else reply

    def _give_up(self, waiter: Waiter, connection: Connection, verb: int) -> None:
        """No answer came in time: what may still be granted is given back."""
        self.world.marks["call given up"] += 1
        if verb == pb.RESERVE:
            waiter.late = lambda reply: self._undo_reserve(connection, reply)
        elif verb == pb.ACQUIRE:
            waiter.late = lambda reply: self._undo_acquire(connection, reply)
        elif verb == pb.COMMIT:
            waiter.late = lambda reply: self._undo_commit(connection, reply)
        resume, waiter.resume = waiter.resume, None
        assert resume is not None
        resume(None)

    def _undo_reserve(self, connection: Connection, reply: Any) -> None:
        if not isinstance(reply, KVStoreError) and reply.lease:
            self.world.marks["grant given back"] += 1
            self._stop_writing(connection, reply.lease)
            self._tell(connection, pb.ABORT, pb.AbortRequest(lease=reply.lease))

    def _undo_acquire(self, connection: Connection, reply: Any) -> None:
        if not isinstance(reply, KVStoreError) and reply.lease:
            self.world.marks["grant given back"] += 1
            self._release(connection, reply.lease)

    def _undo_commit(self, connection: Connection, reply: Any) -> None:
        if not isinstance(reply, KVStoreError) and reply.lent:
            self.world.marks["lent slot given back"] += 1
            self._give_back(connection, reply.lent)

    def _give_back(self, connection: Connection, lease: int) -> None:
        """A slot that was lent is not written any more, also if it is a block's by now."""
        self._stop_writing(connection, lease)
        lent = connection.lent.pop(lease, None)
        if lent is not None:
            self.world.holders.end(lent)
        self._tell(connection, pb.ABORT, pb.AbortRequest(lease=lease))

    def _tell(self, connection: Connection, verb: int, request: Any) -> bool:
        """Send a request that is not answered."""
        return not self.dying and connection.send(verb, request, [], None)

    def _release(self, connection: Connection, lease: int) -> bool:
        """End a read lease; whether it held until now."""
        reading = connection.reads.pop(lease, None)
        if reading is not None:
            self.world.holders.end(reading)
        return self._tell(connection, pb.RELEASE, pb.ReleaseRequest(lease=lease))

    def _stop_writing(self, connection: Connection, lease: int) -> None:
        writing = connection.writes.get(lease)
        if writing is not None:
            self.world.holders.end(writing)

    # -- operations ----------------------------------------------------------------------------

    def _put(self, connection: Connection) -> Script:
        layout, names, skip = self._names()
        shards = self.world.layouts[layout].shards
        shard = self.chance.randrange(shards) if self.world.by_shards() else None
        wait_s = self.world.wait_s()
        request = pb.ReserveRequest(
            keys=self._keys(layout, names),
            shard=shard,
            deadline_s=wait_s,
            again=self.chance.random() < 0.2,
            skip=skip,
        )
        alone = shard is None and len(names) - skip == 1 and self.chance.random() < 0.9
        request.lend = alone
        if alone and (spare := self._spare(connection, layout)) is not None:
            yield from self._put_ahead(connection, request, names, wait_s, spare)
            return
        reply = yield from self._call(connection, pb.RESERVE, request, names, wait_s)
        if reply is None or not reply.lease or reply.lease not in connection.writes:
            return
        writing = connection.writes[reply.lease]
        connection.filling += 1
        complete = yield from self._fill(writing, connection)
        if self.dying:
            yield Waiter()
        self.world.holders.end(writing)
        connection.filling -= 1
        if connection.ended:
            self._settle()
        if not complete or self.chance.random() < 0.1:
            yield from self._call(connection, pb.ABORT, pb.AbortRequest(lease=reply.lease))
            return
        commit = pb.CommitRequest(lease=reply.lease)
        if not alone and self.chance.random() < 0.5:
            self._tell(connection, pb.COMMIT, commit)
            return
        done = yield from self._call(connection, pb.COMMIT, commit)
        if done is not None:
            assert done.held, "a lease ended before its session"
            if done.lent:
                connection.spares.append(done.lent)

    def _spare(self, connection: Connection, layout: int) -> int | None:
        """The lease of a slot that was lent for blocks of a layout."""
        for lease in connection.spares:
            if lease in connection.lent and connection.lent[lease].names[0][0] == layout:
                connection.spares.remove(lease)
                return lease
        return None

    def _put_ahead(
        self,
        connection: Connection,
        request: Any,
        names: list[Name],
        wait_s: float,
        spare: int,
    ) -> Script:
        """One block, copied and committed before it is looked whether it has the lent slot."""
        request.lent = spare
        done: list[Any] = []
        ahead = self._ahead(connection, spare, names[-1], done)
        connection.filling += 1
        reply = yield from self._call(connection, pb.RESERVE, request, names, wait_s, ahead)
        connection.filling -= 1
        if connection.ended:
            self._settle()
        if reply is None or not done or done[0] is None:
            self._give_back(connection, spare)
            return
        if done[0].lent:
            connection.spares.append(done[0].lent)
        if reply.lease == spare:
            assert done[0].held, "a lease ended before its session"
        elif reply.lease:
            self._undo_reserve(connection, reply)

    def _ahead(self, connection: Connection, spare: int, name: Name, done: list[Any]) -> Script:
        lent = connection.lent[spare]
        for shard in range(lent.layout.shards):
            yield self.world.copy_s()
            data = content(name, shard, lent.version, lent.layout.shard_bytes)
            self.copy(lent, [(lent.offsets[0] + shard * lent.layout.shard_bytes, data)])
        commit = pb.CommitRequest(lease=spare)
        done.append((yield from self._call(connection, pb.COMMIT, commit)))

    def _fill(self, writing: Writing, connection: Connection) -> Generator[Any, Any, bool]:
        """Copy into the slots, in pieces and in any order; whether all of them were copied."""
        pieces: list[Piece] = []
        layout = writing.layout
        shards = range(layout.shards) if writing.shard is None else (writing.shard,)
        for name, offset in zip(writing.names, writing.offsets, strict=True):
            for shard in shards:
                data = content(name, shard, writing.version, layout.shard_bytes)
                start = offset + shard * layout.shard_bytes
                cut = self.chance.randrange(len(data))
                pieces += [(start, data[:cut]), (start + cut, data[cut:])]
        self.chance.shuffle(pieces)
        helper, helped = self.helper, Waiter()
        if helper is None or not helper.can_help() or helper.session != connection.number:
            helper = None
        else:
            helper.help(writing, pieces[::2], helped.take)
            pieces = pieces[1::2]
        steps = self.chance.choice((1, 2, 2, 4))
        for step in range(steps):
            yield self.world.copy_s()
            self.copy(writing, pieces[step::steps])
        if helper is None:
            return True
        if helped.reply is None:
            yield helped
        return bool(helped.reply)

    def _get(self, connection: Connection) -> Script:
        layout, names, skip = self._names()
        wait_s = self.world.wait_s()
        request = pb.AcquireRequest(
            keys=self._keys(layout, names),
            deadline_s=wait_s,
            prefill_tokens_per_s=self.chance.choice((0.0, 0.0, 1.0, 1e12)),
            enough=self.chance.choice((0, 0, 0, 1, 2)),
            skip=skip,
        )
        reply = yield from self._call(connection, pb.ACQUIRE, request, names, wait_s)
        reading = connection.reads.get(reply.lease) if reply is not None else None
        if reading is None:
            return
        copies: list[bytes] = []
        for offset in reading.offsets:
            data = b""
            for start, length in self._cuts(reading.layout.block_bytes):
                data += reading.arena.bytes[offset + start : offset + start + length]
                if self.chance.random() < 0.3:
                    yield self.world.copy_s()
            copies.append(data)
        if self.chance.random() < 0.1:
            yield 20 * self.world.think_s()  # a lease that lasts
        if self.dying:
            yield Waiter()
        if not self._release(connection, reply.lease):
            self.world.marks["copy void"] += 1
            return
        for name, data in zip(reading.names, copies, strict=True):
            self.world.ledger.judge(name, data, reading.asked, "served")
            self.world.marks["served"] += 1

    def _cuts(self, length: int) -> list[tuple[int, int]]:
        cut = self.chance.randrange(length)
        return [(0, cut), (cut, length - cut)]

    def _lookup(self, connection: Connection) -> Script:
        layout, names, _ = self._names()
        request = pb.LookupRequest(keys=self._keys(layout, names))
        reply = yield from self._call(connection, pb.LOOKUP, request, names)
        assert reply is None or len(reply.tiers) == reply.length <= len(names)

    def _prefetch(self, connection: Connection) -> Script:
        layout, names, _ = self._names()
        request = pb.PrefetchRequest(keys=self._keys(layout, names))
        yield from self._call(connection, pb.PREFETCH, request, names)

    def _retain(self, connection: Connection) -> Script:
        layout, names, _ = self._names()
        request = pb.RetainRequest(
            keys=self._keys(layout, names),
            priority=self.chance.choice((0, 10, 50, 100)),
            ttl_s=self.chance.choice((0.0, 0.5)),
        )
        yield from self._call(connection, pb.RETAIN, request, names)

    def _forget(self, connection: Connection) -> Script:
        layout, names, _ = self._names()
        request = pb.ForgetRequest(keys=self._keys(layout, names))
        yield from self._call(connection, pb.FORGET, request, names)

    def _clear(self, connection: Connection) -> Script:
        yield from self._call(connection, pb.CLEAR, pb.ClearRequest())

    def _verify(self, connection: Connection) -> Script:
        reply = yield from self._call(connection, pb.VERIFY, pb.VerifyRequest(), (), 60.0)
        if reply is not None:
            self.world.marks["verified"] += 1
            self.world.marks["verify found damage"] += reply.damaged > 0

    def _drain(self, connection: Connection) -> Script:
        reply = yield from self._call(connection, pb.DRAIN, pb.DrainRequest(), (), 60.0)
        if reply is not None:
            self.world.marks["written out"] += reply.written

    def _names(self) -> tuple[int, list[Name], int]:
        """A layout, names in prefix order, and how many of them are context."""
        layout = self.world.next_layout()
        start = self.chance.choice((0, 0, 0, self.chance.randrange(KEYS)))
        length = self.chance.choice((1, 2, 4, self.chance.randint(1, KEYS)))
        names = [(layout, key_of(at % KEYS)) for at in range(start, start + length)]
        skip = self.chance.choice((0, 0, 0, 1, 3))
        return layout, names, min(skip, length - 1)

    def _keys(self, layout: int, names: list[Name]) -> Any:
        hashes = b"".join(key for _, key in names)
        return pb.Keys(layout=self.numbers[layout], hash_bytes=len(names[0][1]), hashes=hashes)
