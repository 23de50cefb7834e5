"""A client of one tenant: the connection, made again when it is lost, and its arena."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from kvstore import paths, types
from kvstore.client import checks
from kvstore.client.ahead import Spare
from kvstore.client.arena import Arena
from kvstore.client.cache import Cache
from kvstore.client.recall import Epochs
from kvstore.client.wire import Wire
from kvstore.errors import InvalidLayout, InvalidRequest, SessionLost, Unavailable
from kvstore.protos import kvstore_pb2 as pb
from kvstore.types import Layout, Stats

if TYPE_CHECKING:
    from kvstore.client.direct import DirectFiles

REFUSED_S = 0.2  # after a failed attempt other calls fail at once for so long
TIMEOUT_S_MAX = 86_400.0
DEFAULT = "default"  # the tenant that there always is
TRACE_S = 30.0  # for what is still to be written

T = TypeVar("T")

log = logging.getLogger("kvstore")


class TraceState(NamedTuple):
    """A recording: what is in its files, and how many requests could not be kept."""

    recording: bool
    path: str
    requests: int
    dropped: int
    bytes: int
    files: int


class Transport(Protocol):
    """A connection through either door."""

    dead: str | None
    pid: int

    def call(self, verb: int, request: Any, reply: Any, deadline: float) -> Any:
        """See Wire.call."""

    def release(self, lease: int, deadline: float) -> bool:
        """See Wire.release."""

    def used(self, request: bytes) -> bool:
        """See Wire.used."""

    def settle(self, sessions: Sequence[int], deadline: float) -> None:
        """See Wire.settle."""

    def wake(self) -> None:
        """See Wire.wake."""

    def whole(self) -> bool:
        """See Wire.whole."""

    def close(self, why: str = "") -> None:
        """See Wire.close."""


def connect(
    path: str | os.PathLike[str] | None = None,
    tenant: str = DEFAULT,
    timeout_s: float = 5.0,
    *,
    join: str | None = None,
) -> Client:
    """A client of the daemon of this host.

    path       the tenant's socket, kvstore.sock or grpc.sock; None: the default place
    tenant     whose socket, when no path is given; with one, it must be that tenant's
    timeout_s  the longest that a call may take. Of one with a deadline of its own: the longest that
               a daemon is waited for that does not answer, and no more than a second beyond it
    join       the `ticket` of another process's client: take part in its session. What that session
               is given to write is then not given to others before this process has ended, too.

    Raises Unavailable when no daemon answers within that time, NotPermitted when the operating
    system refuses, ProtocolMismatch when the daemon speaks another version.
    """
    client = unconnected(path, tenant, timeout_s, join)
    try:
        client.session(time.monotonic() + timeout_s)
    except BaseException:
        client.close()
        raise
    return client


def unconnected(
    path: str | os.PathLike[str] | None, tenant: str, timeout_s: float, join: str | None
) -> Client:
    """As `connect`, without a connection: the first call makes it."""
    if not isinstance(timeout_s, int | float) or not 0 < timeout_s <= TIMEOUT_S_MAX:
        raise InvalidRequest(f"timeout_s is {timeout_s!r}: give seconds, more than 0, up to a day")
    try:
        where = paths.socket_path(tenant) if path is None else Path(os.fsdecode(path))
        os.fsencode(where)
    except (TypeError, UnicodeEncodeError):
        raise InvalidRequest(f"path is {path!r}: give the path of a socket, or None") from None
    return Client(where, timeout_s, join, tenant)


class Session:
    """One connection with its arena. What was leased through it ends with it."""

    def __init__(self, transport: Transport, attached: Any, arena: Arena) -> None:
        self.transport = transport
        self.attached = attached
        self.arena = arena
        self.wire = transport if isinstance(transport, Wire) else None
        self.epochs = Epochs.open(attached) if self.wire is not None else None
        self.layouts: dict[Layout, int] = {}  # as opened through this connection
        self._writes = 0  # reservations that have not ended
        self._spare: Spare | None = None
        self._closed = False
        self._lock = threading.Lock()

    def begin_write(self) -> None:
        """Somebody has been given slots to write."""
        with self._lock:
            self._writes += 1

    def end_write(self) -> None:
        """They are not written any more."""
        with self._lock:
            self._writes -= 1

    def keep_spare(self, layout: Layout, number: int, lease: int, offset: int) -> None:
        """A slot has been lent. One is kept."""
        surplus: Spare | None = Spare(layout, number, lease, offset)
        with self._lock:
            if not self._closed:
                surplus, self._spare = self._spare, surplus
        self._give_back(surplus)

    def take_spare(self, layout: Layout) -> Spare | None:
        """The slot that was lent, for whoever calls; None if there is none for this layout."""
        with self._lock:
            spare, self._spare = self._spare, None
        if spare is None or spare.layout is layout or spare.layout == layout:
            return spare
        self._give_back(spare)
        return None

    def close(self, why: str) -> None:
        """End it."""
        if self.transport.pid == os.getpid():  # in a child, somebody may hold the lock for ever
            with self._lock:
                spare, self._spare, self._closed = self._spare, None, True
            self._give_back(spare)
        self.transport.close(why)

    def __del__(self) -> None:
        """Of a client that was dropped and not closed."""
        with contextlib.suppress(Exception):
            self._give_back(self._spare)

    def _give_back(self, spare: Spare | None) -> None:
        wire = self.wire
        if spare is not None and wire is not None and wire.pid == os.getpid():
            wire.give_back(spare.lease)

    @property
    def writing(self) -> bool:
        """Whether slots that were given through this session may still be written."""
        return self._writes > 0


class Client:
    """See `connect`. Every method may be called from any thread."""

    def __init__(
        self, path: Path, timeout_s: float, join: str | None = None, tenant: str = DEFAULT
    ) -> None:
        """`tenant`, where it is another one than the default: whose socket it must be."""
        self.path = path
        self.front = path.name == paths.FRONT_DOOR  # gRPC, not the hatch
        self._tenant = tenant
        self.timeout_s = timeout_s
        self._join = _ticket(join)
        self._ended: list[Session] = []  # lost; the daemon is told when nobody writes for them
        self._connecting = threading.Lock()
        self._session: Session | None = None
        self._arena: Arena | None = None
        self._refused: tuple[float, Unavailable] | None = None
        self._closed = False
        self._opening = threading.Lock()
        self._direct: tuple[Session, DirectFiles | None] | None = None  # as of that session

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, layout: Layout) -> Cache:
        """The cache of blocks of this layout. Raises InvalidLayout where no slot can hold one."""
        if not isinstance(layout, Layout):
            raise InvalidLayout(f"the layout is a {type(layout).__name__}: give a Layout(...)")
        deadline = self.deadline()
        self.attempt(deadline, lambda session: self.layout_number(layout, session, deadline))
        return Cache(self, layout)

    def stats(self) -> Stats:
        """The daemon's statistics, in the shape of `kvstore stats --json`, of this tenant."""
        reply = self.call(pb.STATS, pb.StatsRequest(), pb.StatsReply)
        stats: Stats = Stats.of(json.loads(reply.json))
        return stats

    def clear(self, deadline_s: float | None = None) -> int:
        """Drop every block of the tenant; returns how many there were. Others are served meanwhile:
        a million blocks take some seconds. None: the client's timeout; what was asked goes on."""
        wait_s = self.timeout_s if deadline_s is None else checks.wait_s(deadline_s, TIMEOUT_S_MAX)
        end = time.monotonic() + wait_s
        forgotten: int = self.call(pb.CLEAR, pb.ClearRequest(), pb.ClearReply, end).forgotten
        return forgotten

    def verify(self, deadline_s: float = 3_600.0) -> tuple[int, int, int]:
        """Have every NVMe block read and checked: (checked, damaged and dropped, skipped)."""
        deadline = time.monotonic() + checks.wait_s(deadline_s, TIMEOUT_S_MAX)
        reply = self.call(pb.VERIFY, pb.VerifyRequest(), pb.VerifyReply, deadline)
        return reply.checked, reply.damaged, reply.skipped

    @property
    def ticket(self) -> str:
        """What `connect(join=...)` of another process takes to take part in this session, for as
        long as it lasts: a lost connection begins a new one. It is a secret within the tenant."""
        attached = self.session(self.deadline()).attached
        return f"{attached.session}:{attached.token.hex()}"

    def drain(self, session: int = 0, deadline_s: float = 3_600.0) -> tuple[bool, int]:
        """End a session by its number, whose leases are void then; or, with 0, have every block
        copied to NVMe whose copy is due, and wait for it.

        Returns whether there was such a session, and how many blocks were copied meanwhile.
        """
        deadline = time.monotonic() + checks.wait_s(deadline_s, TIMEOUT_S_MAX)
        number = checks.number_of(session, 1 << 32, "session")
        reply = self.call(pb.DRAIN, pb.DrainRequest(session=number), pb.DrainReply, deadline)
        return reply.found, reply.written

    def start_trace(self, path: str | os.PathLike[str], max_bytes: int = 0) -> TraceState:
        """Have the daemon record what its clients ask for, in a new file at an absolute path; 0: of
        1 GiB at most. Only for the daemon's user and root."""
        if not isinstance(path, str | os.PathLike):
            raise InvalidRequest(f"path is {path!r}: give the absolute path of a file to be made")
        most = checks.number_of(max_bytes, 1 << 63, "max_bytes")
        return self._trace(pb.TraceRequest.START, os.fspath(path), most)

    def stop_trace(self) -> TraceState:
        """End the recording; what came of it."""
        return self._trace(pb.TraceRequest.STOP)

    def show_trace(self) -> TraceState:
        """Whether the daemon records, and what there is of it so far."""
        return self._trace(pb.TraceRequest.SHOW)

    def _trace(self, action: int, path: str = "", max_bytes: int = 0) -> TraceState:
        request = pb.TraceRequest(action=action, path=path, max_bytes=max_bytes)  # type: ignore[arg-type]
        deadline = self.deadline(TRACE_S)
        session = self.session(deadline)  # once only: who asks again is told that it is done
        reply = session.transport.call(pb.TRACE, request, pb.TraceReply, deadline)
        return TraceState(
            reply.recording, reply.path, reply.requests, reply.dropped, reply.bytes, reply.files
        )

    @property
    def gpus(self) -> list[tuple[str, int, bytes]]:
        """The tenant's parts of GPU memory: PCI address, bytes, and the handle of CUDA IPC."""
        attached = self.session(self.deadline()).attached
        return [(one.bus, one.bytes, one.handle) for one in attached.gpus]

    def direct_files(self) -> DirectFiles | None:
        """The files of the NVMe tier, opened for `Cache.get(direct=True)`; None where this process
        may not read them, or the daemon has none."""
        session = self.session(self.deadline())
        with self._opening:
            if self._closed:
                return None
            known, files = self._direct or (None, None)
            if known is not session:
                paths = session.attached.nvme.paths
                if files is not None and not files.are(paths):
                    files.close()
                    files = None
                self._direct = session, files or _open_direct(paths)
            return self._direct[1] if self._direct is not None else None

    @property
    def arena(self) -> Arena | None:
        """The arena as it is mapped now; None before the first connection."""
        return self._arena

    def close(self) -> None:
        """End the session. What is still reserved or acquired is void."""
        with self._connecting:
            self._closed = True
            session, self._session = self._session, None
            arena, self._arena = self._arena, None
        with self._opening:
            direct, self._direct = self._direct, None
        if direct is not None and direct[1] is not None:
            direct[1].close()
        if session is not None:
            session.close("the client was closed")
        if arena is not None:
            arena.close()

    def deadline(self, more_s: float = 0.0) -> float:
        """The end, on the monotonic clock, of a call that starts now and may wait `more_s`."""
        return time.monotonic() + self.timeout_s + more_s

    def call(self, verb: int, request: Any, reply: Any, deadline: float | None = None) -> Any:
        """One call on the present session; a fresh connection is made if there is none."""
        end = self.deadline() if deadline is None else deadline
        return self.attempt(end, lambda session: session.transport.call(verb, request, reply, end))

    def wake(self) -> None:
        """See `Wire.wake`; without a live session nothing is done."""
        session = self._session
        if session is not None and session.transport.pid == os.getpid():
            session.transport.wake()

    def attempt(self, deadline: float, act: Callable[[Session], T]) -> T:
        """What `act` does on the live session; done once more on a fresh one when the connection
        turns out to be lost. Not for what belongs to a lease: that ends with its session."""
        session = self.session(deadline)
        try:
            return act(session)
        except SessionLost:
            session = self.session(deadline)
        try:
            return act(session)
        except SessionLost as error:
            raise Unavailable(f"{error}: lost twice in a row: try again later") from None

    def session(self, deadline: float) -> Session:
        """The live session, made anew when it was lost.

        Raises Unavailable when that cannot be done in time. After a failed attempt, calls fail at
        once for a moment, so that an engine does not wait at every block while no daemon runs.
        """
        session = self._session
        if session is not None and session.transport.dead is None:
            if session.transport.pid != os.getpid():
                raise SessionLost(
                    "this client was made before a fork: connect again in the child process"
                )
            return session
        if not self._connecting.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise Unavailable(f"another thread still connects to {self.path}: try again later")
        try:
            return self._session_again(deadline)
        finally:
            self._connecting.release()

    def layout_number(self, layout: Layout, session: Session, deadline: float) -> int:
        """The daemon's number for a layout on this session."""
        number = session.layouts.get(layout)
        if number is None:
            sent = pb.LayoutMessage(
                model=layout.model,
                engine=layout.engine,
                dtype=layout.dtype,
                block_tokens=layout.block_tokens,
                shards=layout.shards,
                shard_bytes=layout.shard_bytes,
            )
            reply = session.transport.call(
                pb.OPEN, pb.OpenRequest(layout=sent), pb.OpenReply, deadline
            )
            number = session.layouts[layout] = reply.layout
        return number

    def _session_again(self, deadline: float) -> Session:
        session = self._session
        if session is not None and session.transport.dead is None:
            return session
        if self._closed:
            raise Unavailable("this client was closed: connect again")
        if session is not None:
            session.transport.close()
            self._session = None
            self._ended.append(session)
        if self._refused is not None and time.monotonic() < self._refused[0]:
            raise Unavailable(str(self._refused[1]))
        try:
            self._session = self._attach(deadline)
        except Unavailable as error:
            self._refused = (time.monotonic() + REFUSED_S, error)
            raise
        self._refused = None
        self.settle()
        return self._session

    def end_write(self, session: Session) -> None:
        """Slots that this session was given are not written any more."""
        session.end_write()
        if session.transport.dead is not None:
            self.settle()

    def settle(self) -> None:
        """Tell the daemon of sessions that were lost and that nobody writes for any more: the slots
        that they had are free then. Never raises, never waits."""
        session = self._session
        if not self._ended or session is None or session.transport.dead is not None:
            return
        over = [one for one in self._ended if not one.writing]
        self._ended = [one for one in self._ended if one not in over]
        if over:
            session.transport.settle([one.attached.session for one in over], self.deadline())

    def _attach(self, deadline: float) -> Session:
        left = max(0.001, deadline - time.monotonic())
        transport: Transport
        if self.front:
            from kvstore.client.front import FrontDoorWire

            transport = FrontDoorWire(self.path, left)
        else:
            transport = Wire(self.path, left)
        try:
            request = pb.AttachRequest(
                protocol=types.PROTOCOL_VERSION,
                client="python",
                pid=os.getpid(),
                join=self._join[0],
                token=self._join[1],
            )
            try:
                attached = transport.call(pb.ATTACH, request, pb.AttachReply, deadline)
            except SessionLost as error:
                raise Unavailable(f"{error}: is it starting or stopping?") from None
            if self._tenant not in (DEFAULT, attached.tenant):
                raise InvalidRequest(
                    f"{self.path} is of tenant {attached.tenant}, not of {self._tenant}: give one "
                    "of the two"
                )
            arena = self._arena
            named = attached.arena_path, attached.arena_bytes, attached.arena_inode
            if arena is None or not arena.is_at(*named):
                arena = Arena(*named)
                if self._arena is not None:
                    self._arena.close()
                self._arena = arena
        except BaseException:
            transport.close("attaching failed")
            raise
        return Session(transport, attached, arena)


def _ticket(text: str | None) -> tuple[int, bytes]:
    if text is None:
        return 0, b""
    try:
        number, _, token = text.partition(":")
        return checks.number_of(int(number), 1 << 32, "session"), bytes.fromhex(token)
    except (ValueError, AttributeError, TypeError, InvalidRequest):
        raise InvalidRequest("join is no ticket: give the `ticket` of a connected client") from None


def _open_direct(paths: Sequence[str]) -> DirectFiles | None:
    if not paths:
        return None
    try:
        from kvstore.client.direct import DirectFiles

        return DirectFiles(paths)
    except (ImportError, OSError, RuntimeError) as error:
        log.warning("kvstore: blocks on NVMe are not read from here: %s", error)
        return None
