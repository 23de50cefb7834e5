"""A connection between a client and a daemon: messages in order, each some time under way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from struct import unpack
from typing import TYPE_CHECKING, Any

from kvstore.errors import KVStoreError
from kvstore.leases import Session
from kvstore.protos import kvstore_pb2 as pb
from kvstore.tiers.slot_table import COMMITTED, WRITING
from kvstore.writes import NEW
from tests.simulate.holders import Reading, Writing
from tests.simulate.ledger import Version

if TYPE_CHECKING:
    from tests.simulate.host import Daemon
    from tests.simulate.programs import Program

LATE_S = 1e-6


@dataclasses.dataclass(eq=False)
class Asked:
    """A request that the daemon has read and not answered."""

    verb: int
    request: Any
    names: list[tuple[int, bytes]]
    take: Callable[[Any], None] | None  # who wants the answer at the other end
    moment: int
    until: float  # the answer is due
    stops: int
    written: Writing | None = None  # what a commit is about
    cleared: list[Version] = dataclasses.field(default_factory=list)  # what a clear is about


class Connection:
    """Both ends. `ended`: the daemon has closed it, or is dead; the client can see that at once."""

    def __init__(self, client: Program, daemon: Daemon) -> None:
        self.client = client
        self.daemon = daemon
        self.world = daemon.world
        self.arena = daemon.arena
        self.session: Session | None = None
        self.ended = False
        self.closed = False  # by the client
        self.joined = False  # the session is another connection's
        self.number = 0  # of the session, as the client was told
        self.filling = 0  # leases under which the client is copying
        self.asked: list[Asked] = []
        self.writes: dict[int, Writing] = {}  # leases as the client was told of them
        self.lent: dict[int, Writing] = {}  # slots, by their leases, for what is stored next
        self.spares: list[int] = []  # those of them that no thread of the client uses
        self.reads: dict[int, Reading] = {}
        self._waiting: list[Callable[[Any], None]] = []
        self._there_at = self._back_at = 0.0
        daemon.connections.append(self)

    # -- the client's end ----------------------------------------------------------------------

    def send(
        self,
        verb: int,
        request: Any,
        names: list[tuple[int, bytes]],
        take: Callable[[Any], None] | None,
    ) -> bool:
        """Send a request; False when the connection has ended. `take` gets the answer, or None at
        the end of the connection."""
        if self.ended or self.closed:
            return False
        if take is not None:
            self._waiting.append(take)
        self._to_daemon(self._request, verb, request.SerializeToString(), names, take)
        return True

    def close(self) -> None:
        """The client closes it, or is killed; what it has sent is still read."""
        if not self.closed:
            self.closed = True
            self._give_up_reads()
            self._to_daemon(self.end, "it closed the connection")

    def _to_daemon(self, call: Callable[..., None], *args: Any) -> None:
        self._there_at = max(self._there_at, self.world.clock.now + self.world.wire_s())
        self.daemon.process.call_at(self._there_at, call, *args)

    def _to_client(self, call: Callable[..., None], *args: Any) -> None:
        self._back_at = max(self._back_at, self.world.clock.now + self.world.wire_s())
        self.client.process.call_at(self._back_at, call, *args)

    def _arrived(self, take: Callable[[Any], None], reply: Any) -> None:
        if take in self._waiting:
            self._waiting.remove(take)
            take(reply)

    def _lost(self) -> None:
        waiting, self._waiting = self._waiting, []
        for take in waiting:
            take(None)

    # -- the daemon's end ----------------------------------------------------------------------

    def end(self, why: str, *, whole_session: bool = False) -> None:
        """The daemon ends the session; what it was writing stays quarantined while its process
        lives."""
        if self.ended:
            return
        self._cut()
        if self.session is not None and (whole_session or not self.joined):
            self.daemon.detach(self.session)

    def daemon_died(self) -> None:
        """The kernel has closed it."""
        if not self.ended:
            self._cut()

    def process_ended(self) -> None:
        """The client's process is gone; what it had sent is read before the daemon acts on it."""
        self.closed = True
        if not self.ended:
            self._to_daemon(self.end, "its process has ended")

    @property
    def session_number(self) -> int:
        """Of its session; 0 before it has one."""
        return self.session.number if self.session is not None else 0

    def check_deadlines(self) -> None:
        """Asserts that no answer is overdue."""
        now = self.world.clock.now
        for asked in self.asked:
            late = now > asked.until + LATE_S and asked.stops == self.daemon.stops
            assert not late, f"no answer to {pb.Verb.Name(asked.verb)} by its deadline"

    def _cut(self) -> None:
        self.ended = True
        self._give_up_reads()
        self.asked.clear()
        self.daemon.connections.remove(self)
        self._to_client(self._lost)

    def _give_up_reads(self) -> None:
        """What is copied from now on is void, and the client will see that it is."""
        for reading in self.reads.values():
            self.world.holders.end(reading)
        self.reads.clear()

    def _request(
        self,
        verb: int,
        payload: bytes,
        names: list[tuple[int, bytes]],
        take: Callable[[Any], None] | None,
    ) -> None:
        if self.ended:
            return
        world, daemon = self.world, self.daemon
        if self.session is None:
            self._attach(payload, take)
            return
        request = daemon.service._verbs[verb][1].FromString(payload)
        wait_s = getattr(request, "deadline_s", 0.0)
        if verb in (pb.CLEAR, pb.VERIFY, pb.DRAIN):
            wait_s = float("inf")
        asked = Asked(
            verb, request, names, take, world.moment(), world.clock.now + wait_s, daemon.stops
        )
        if verb == pb.COMMIT and not daemon.service._parking:
            asked.written = self.writes.get(request.lease)
        if verb == pb.CLEAR:
            asked.cleared = world.ledger.living()
        self._note(verb, request, names)
        self.asked.append(asked)
        try:
            reply = daemon.service.handle_bytes(
                self.session, verb, payload, lambda late: self._answer(asked, late)
            )
        except KVStoreError as error:
            reply = error
        if reply is not None:
            self._answer(asked, reply)
        elif verb == pb.CLEAR:
            world.marks["cleared in pieces"] += 1
        daemon.fuse.burn()
        daemon.service.settle_later(verb)

    def _note(self, verb: int, request: Any, names: list[tuple[int, bytes]]) -> None:
        """The books, before the daemon acts on it."""
        ledger, moment = self.world.ledger, self.world.moment()
        if verb == pb.COMMIT and (writing := self.writes.pop(request.lease, None)):
            self.world.holders.end(writing)
            for name in writing.names:
                version = Version(writing.version, writing.shard, writing.born)
                ledger.committed(name, version)
        elif verb == pb.COMMIT and (lent := self.lent.pop(request.lease, None)):
            self.world.marks["lent slot not taken"] += 1
            self.world.holders.end(lent)
        elif verb == pb.ABORT:
            # A lent slot may be given back before it is known whether it was taken.
            for there in (self.writes, self.lent):
                if (writing := there.pop(request.lease, None)) is not None:
                    self.world.holders.end(writing)
        elif verb == pb.FORGET:
            ledger.forgotten(names, moment)

    def _attach(self, payload: bytes, take: Callable[[Any], None] | None) -> None:
        reply: Any
        try:
            request = pb.AttachRequest.FromString(payload)
            self.session, reply = self.daemon.service.attach(request)
            self.joined = bool(request.join)
            self.daemon.attached(self.session, self.client)
        except KVStoreError as error:
            reply = error
            self.daemon.refuse(error)
        if take is not None:
            self._to_client(self._arrived, take, reply)
        if self.session is None:
            self.end("it may not attach")

    def _answer(self, asked: Asked, reply: Any) -> None:
        """The daemon sends an answer: from now on the client may act on it."""
        if self.ended:
            return
        self.check_deadlines()
        self.asked.remove(asked)
        if isinstance(reply, KVStoreError):
            self.daemon.refuse(reply)
        elif asked.verb == pb.RESERVE and reply.lease:
            self._granted_write(asked, reply)
        elif asked.verb == pb.COMMIT:
            if asked.written is not None:
                self._check_committed(asked.written, reply)
            if reply.lent:
                self._lends(reply)
        elif asked.verb == pb.ACQUIRE:
            self._granted_read(asked, reply)
        elif asked.verb == pb.CLEAR:
            self.world.ledger.cleared(asked.cleared, self.world.moment())
        if asked.take is not None:
            self._to_client(self._arrived, asked.take, reply)

    def _granted_write(self, asked: Asked, reply: Any) -> None:
        world = self.world
        statuses = zip(asked.names[asked.request.skip :], reply.status, strict=True)
        names = [name for name, status in statuses if status == NEW]
        offsets = list(unpack(f"<{len(reply.offsets) // 8}Q", reply.offsets))
        lent = self.lent.get(asked.request.lent)
        if lent is not None and lent.offsets == offsets[:1]:
            world.marks["lent slot taken"] += 1
            world.holders.end(self.lent.pop(asked.request.lent))
        else:
            lent = None
        writing = Writing(
            [self.client],
            self.arena,
            names,
            offsets,
            world.layouts[names[0][0]],
            shard=asked.request.shard if asked.request.HasField("shard") else None,
            version=lent.version if lent is not None else world.ledger.new_version(),
            born=world.moment(),
        )
        world.holders.begin(writing)
        self.arena.spoilt.difference_update(writing.offsets)
        states = self.daemon.states()
        for offset in writing.offsets:
            assert states.get(offset) == WRITING, "granted, and the slot table does not say so"
        self.writes[reply.lease] = writing

    def _lends(self, reply: Any) -> None:
        world, session = self.world, self.session
        assert session is not None
        layout = session.lent[reply.lent].entry.layout
        lent = Writing(
            [self.client],
            self.arena,
            [(world.layouts.index(layout), b"lent")],
            [reply.lent_offset],
            layout,
            shard=None,
            version=world.ledger.new_version(),
            born=world.moment(),
        )
        world.holders.begin(lent)
        self.arena.spoilt.difference_update(lent.offsets)
        states = self.daemon.states()
        assert states.get(reply.lent_offset) == WRITING, "lent, and the slot table does not say so"
        self.lent[reply.lent] = lent

    def _check_committed(self, written: Writing, reply: Any) -> None:
        """What the client hears is in the slot table."""
        states = self.daemon.states()
        committed = [states.get(offset) == COMMITTED for offset in written.offsets]
        if written.shard is None and reply.held:
            assert sum(committed) == reply.stored, "stored, and the slot table does not say so"

    def _granted_read(self, asked: Asked, reply: Any) -> None:
        world = self.world
        world.marks[f"stop {pb.AcquireReply.Stop.Name(reply.stop).lower()}"] += 1
        world.marks["hit on nvme"] += 2 in reply.tiers
        world.marks["hit in dram"] += 1 in reply.tiers
        if not reply.lease:
            return
        names = asked.names[asked.request.skip :][: reply.length]
        reading = Reading(
            [self.client],
            self.arena,
            names,
            list(unpack(f"<{len(reply.offsets) // 8}Q", reply.offsets)),
            world.layouts[names[0][0]],
            asked=asked.moment,
        )
        for name, offset in zip(names, reading.offsets, strict=True):
            data = bytes(self.arena.view(offset, reading.layout.block_bytes))
            world.ledger.judge(name, data, asked.moment, "granted")
        if self.closed:
            return
        world.holders.begin(reading)
        self.reads[reply.lease] = reading
