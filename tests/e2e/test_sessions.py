"""The end of a session, from any cause: what it held is free, or quarantined until it may be."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvstore.client import Cache, Client
from kvstore.errors import DeadlineExceeded, SessionLost, Unavailable
from kvstore.protos import kvstore_pb2 as pb
from kvstore.types import Stats
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import (
    ROOT,
    Daemon,
    content,
    contents,
    hashes,
    layout,
    targets,
    wait_for,
)
from tests.e2e.raw import RawFront, RawHatch, open_layout, packed

SIZE = 64 << 10
KEYS = hashes(8, "sessions")
NEW = hashes(6, "being written")
SOON_S = 2.0

# A client in a process of its own: it holds a grant and a reservation, says so, and waits.
HOLDER = """
import os, sys
from kvstore.client import connect
from tests.e2e.harness import hashes, layout
client = connect(sys.argv[1])
cache = client.open(layout("sessions"))
grant = cache.acquire(hashes(8, "sessions"))
reservation = cache.reserve(hashes(6, "being written"))
assert (len(grant), len(reservation)) == (8, 6)
if sys.argv[2] == "fork" and os.fork() == 0:
    sys.stdin.read()  # the child keeps the parent's connection open
    os._exit(0)
if sys.argv[2] == "drop":
    client.close()
sys.stdout.write("ready\\n")
sys.stdout.flush()
sys.stdin.read()
"""


class Holder:
    """The process above."""

    def __init__(self, daemon: Daemon, door: str, how: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(daemon.socket(door)), how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def kill(self) -> None:
        """SIGKILL. A child that it forked lives on."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """Make sure that nothing of it is left."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def daemon(shared: Daemon) -> Iterator[Daemon]:
    """A daemon with eight blocks; nothing else is in it, before and after."""
    with shared.client() as client:
        cache = client.open(layout("sessions"))
        cache.put(KEYS, contents(KEYS, SIZE))
        assert shared.settled().tiers.dram.used_bytes == len(KEYS) * SIZE
        yield shared
        client.clear()

    def alone() -> Stats | None:
        stats = shared.settled()
        return stats if stats.sessions == 1 else None

    assert wait_for(alone, "all sessions to end").tiers.dram.used_bytes == 0


@pytest.mark.parametrize("how", ["plain", "fork"])
def test_a_killed_client(daemon: Daemon, door: str, how: str) -> None:
    """A client that had forked was killed: its child held the connection open without knowing, so
    the session, its leases and its slots stayed until the child's end. The session ends with the
    process that made it."""
    if (door, how) == ("front", "fork"):
        pytest.skip("grpcio closes its connections in a forked child")
    before = daemon.stats()
    holder = Holder(daemon, door, how)
    held = daemon.stats()
    assert held.leases == before.leases + 2
    assert held.tiers.dram.used_bytes == before.tiers.dram.used_bytes + 6 * SIZE
    client = daemon.client()
    cache = client.open(layout("sessions"))
    assert cache.forget(KEYS[:2]) == 2, "their slots stay while they are being read"
    assert daemon.stats().tiers.dram.used_bytes == before.tiers.dram.used_bytes + 6 * SIZE
    holder.kill()

    def free() -> bool:
        stats = daemon.stats()
        found = stats.leases, stats.blocks.quarantined, stats.tiers.dram.used_bytes
        return found == (before.leases, 0, before.tiers.dram.used_bytes - 2 * SIZE)

    wait_for(free, "everything that it held to be free", SOON_S)
    assert cache.lookup(NEW).length == 0
    assert cache.put(NEW, contents(NEW, SIZE)).stored == 6
    client.close()
    holder.end()


def test_a_dropped_connection(daemon: Daemon, door: str) -> None:
    """The process may still write: its slots change hands only after its end, although the key can
    be stored anew meanwhile."""
    before = daemon.stats().tiers.dram.used_bytes
    holder = Holder(daemon, door, "drop")
    wait_for(lambda: daemon.stats().blocks.quarantined == 6, "its slots to be quarantined", SOON_S)
    stats = daemon.stats()
    assert stats.leases == 0
    assert stats.tiers.dram.used_bytes == before + 6 * SIZE
    client = daemon.client()
    cache = client.open(layout("sessions"))
    assert cache.put(NEW, contents(NEW, SIZE)).stored == 6
    assert daemon.stats().tiers.dram.used_bytes == before + 12 * SIZE, "the slots were used again"
    assert daemon.stats().blocks.quarantined == 6
    assert "slots quarantined" in daemon.log()
    holder.kill()
    wait_for(lambda: daemon.stats().blocks.quarantined == 0, "the quarantine to end", SOON_S)
    assert daemon.stats().tiers.dram.used_bytes == before + 6 * SIZE
    into = targets(6, SIZE)
    assert cache.get(NEW, into).length == 6
    assert [bytes(one) for one in into] == contents(NEW, SIZE)
    client.close()
    holder.end()


def test_a_process_that_cannot_be_watched(make_daemon: MakeDaemon) -> None:
    """A process id that means nothing to the daemon, as one of another namespace: nobody can tell
    when it ends, and its slots were handed out at once while it might still write. They stay."""
    daemon = make_daemon(nvme={"size": "0"}).start()
    other = RawFront(daemon.socket("front"))
    other.attach(pid=0x7FFFFFFF)
    number = open_layout(other, layout("sessions"))
    other.call(pb.RESERVE, pb.ReserveRequest(keys=packed(number, NEW)))
    other.close()
    wait_for(lambda: daemon.stats().blocks.quarantined == 6, "its slots to be quarantined")
    cache = daemon.client().open(layout("sessions"))
    assert cache.put(NEW, contents(NEW, SIZE)).stored == 6
    assert daemon.stats().tiers.dram.used_bytes == 12 * SIZE
    assert daemon.stats().blocks.quarantined == 6


def test_a_daemon_without_descriptors_frees_nothing_early(make_daemon: MakeDaemon) -> None:
    """A daemon out of descriptors could not watch a client that had connected, and took that for
    the client's end: its slots were freed while it wrote. It looks again, once it can."""
    daemon = make_daemon(nvme={"size": "0"}).start()
    assert daemon.process is not None
    cache = daemon.client().open(layout("sessions"))
    cache.put(KEYS, contents(KEYS, SIZE))
    pid = daemon.process.pid
    used = len(os.listdir(f"/proc/{pid}/fd"))
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 1, hard))
    holder = Holder(daemon, "hatch", "drop")  # a descriptor for the connection, none for its end

    def quarantined() -> int:
        found: int = cache.client.stats().tenants.default.blocks.quarantined
        return found

    wait_for(lambda: quarantined() == 6, "its slots to be quarantined")
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert quarantined() == 6
    holder.kill()
    wait_for(lambda: quarantined() == 0, "the quarantine to end", 2 * SOON_S)
    holder.end()


# -- calls that were given up ------------------------------------------------------------------


def leases(daemon: Daemon) -> int:
    found: int = daemon.stats().leases
    return found


@pytest.mark.parametrize("verb", ["acquire", "reserve"])
@pytest.mark.parametrize("again", [True, False], ids=["goes on", "stays silent"])
def test_a_call_that_was_given_up(daemon: Daemon, door: str, verb: str, again: bool) -> None:
    """A client whose call was late got its lease all the same when the daemon woke up: the answer
    was undone only if the client called again, and never through the front door. The slots stayed
    pinned, or taken, for as long as the client lived."""
    with daemon.client(door, timeout_s=0.4) as client:
        cache = client.open(layout("sessions"))
        cache.lookup(KEYS)
        before = daemon.stats()
        with daemon.suspended(), pytest.raises(DeadlineExceeded, match="took longer than"):
            cache.acquire(KEYS) if verb == "acquire" else cache.reserve(NEW)
        if again:
            wait_for(lambda: _looks_up(client), "the daemon to answer again")
        if door == "hatch":  # the front door drops a request whose deadline is over
            wait_for(lambda: daemon.stats().requests[verb] > before.requests[verb], "the request")
        wait_for(lambda: leases(daemon) == 0, "the lease to be given back", SOON_S)
        after = daemon.stats().tiers.dram.used_bytes
        assert after == before.tiers.dram.used_bytes
        assert daemon.stats().blocks.quarantined == 0
        if door == "hatch":  # the session goes on
            assert daemon.stats().sessions == before.sessions


def _looks_up(client: Client) -> bool:
    try:
        return client.open(layout("sessions")).lookup(KEYS).length == 8
    except Unavailable:
        return False


@pytest.fixture
def full(make_daemon: MakeDaemon) -> Iterator[Daemon]:
    """A daemon whose memory is full of blocks that are due on NVMe, where no write ever ends."""
    daemon = make_daemon(dram={"size": "8 MiB"})
    daemon.gated = True
    daemon.start()
    fill = hashes(128, "fill")
    with daemon.hold("write"):
        with daemon.client() as client:
            assert client.open(layout("sessions")).put(fill, contents(fill, SIZE)).stored == 128
        yield daemon


def _waits(daemon: Daemon, other: RawFront, **options: float) -> Any:
    """A foreign reserve that waits for room."""
    number = open_layout(other, layout("sessions"))
    wanted = pb.ReserveRequest(keys=packed(number, NEW), deadline_s=30)
    before = daemon.stats().requests.reserve
    call = other.stub.Reserve.future(wanted, metadata=other.metadata, **options)
    wait_for(lambda: daemon.stats().requests.reserve == before + 1, "the call to arrive")
    assert not call.done()
    return call


def test_a_foreign_call_that_was_cancelled(full: Daemon) -> None:
    """A gRPC client of any kind gave up a reserve that waited for room: the lease was made when the
    room came, and nobody knew its number. The daemon undoes it."""
    other = RawFront(full.socket("front"))
    other.attach(pid=os.getpid())
    call = _waits(full, other)
    call.cancel()
    assert other.call(pb.STATS, pb.StatsRequest()).json, "the session lives"
    (full.folder / "hold-write").unlink()
    wait_for(lambda: full.stats().blocks.aborted, "the late grant to be undone")
    assert leases(full) == 0
    (full.folder / "hold-write").touch()
    other.close()


def test_the_end_of_a_foreign_session_ends_its_calls(full: Daemon) -> None:
    """The Attach stream of a client ended while one of its calls waited: the call was never
    answered, not even with an error. It is told that the session has ended."""
    other = RawFront(full.socket("front"))
    other.attach(pid=os.getpid())
    call = _waits(full, other)
    other.stream.cancel()
    wait_for(call.done, "the call to end", SOON_S)
    assert dict(call.trailing_metadata())["kvstore-error"] == "SessionLost"
    other.close()


@pytest.mark.parametrize("door", ["hatch"])
def test_a_session_that_ends_while_it_waits(full: Daemon, door: str) -> None:
    """What a client waited for when it went is not made for it."""
    with RawHatch(full.socket()) as other:
        other.attach()
        number = open_layout(other, layout("sessions"))
        before = full.stats().requests.reserve
        other.send(pb.RESERVE, pb.ReserveRequest(keys=packed(number, NEW), deadline_s=30))
        wait_for(lambda: full.stats().requests.reserve == before + 1, "the call to arrive")
    wait_for(lambda: full.stats().sessions == 1, "the session to end")
    (full.folder / "hold-write").unlink()
    stats = full.settled()
    assert (stats.blocks.known, stats.blocks.quarantined) == (128, 0)
    (full.folder / "hold-write").touch()


# -- restarts ----------------------------------------------------------------------------------


def test_a_client_reconnects_by_itself(make_daemon: MakeDaemon, door: str) -> None:
    """The first call after a restart failed with SessionLost although a daemon was there: only what
    belongs to a lease may. It is made again through a fresh connection."""
    daemon = make_daemon().start()
    client = daemon.client(door)
    cache = client.open(layout("sessions"))
    cache.put(KEYS, contents(KEYS, SIZE))
    grant, reservation = cache.acquire(KEYS), cache.reserve(NEW)
    reservation.view(0)[:] = b"?" * SIZE
    generation = client.stats().generation
    daemon.stop()
    daemon.start()
    assert client.stats().generation > generation
    into = targets(8, SIZE)
    assert cache.get(KEYS, into).length == 8
    assert [bytes(one) for one in into] == contents(KEYS, SIZE)
    assert grant.release() is False, "what was read under it may be anything"
    with pytest.raises(SessionLost):
        reservation.commit()
    reservation.abort()
    assert cache.lookup(NEW).length == 0
    assert cache.put(NEW, contents(NEW, SIZE)).stored == 6
    with cache.acquire(NEW) as fresh:
        assert bytes(fresh.view(0)) == content(NEW[0], SIZE)


CALLS: list[tuple[str, Callable[[Cache], bool]]] = [
    ("lookup", lambda cache: cache.lookup(KEYS).length == 8),
    ("put", lambda cache: cache.put(KEYS, contents(KEYS, SIZE)).present == 8),
    ("get", lambda cache: cache.get(KEYS, targets(8, SIZE)).length == 8),
    ("reserve", lambda cache: cache.reserve(KEYS).present == 8),
    ("acquire", lambda cache: cache.acquire(KEYS).release()),
    ("prefetch", lambda cache: cache.prefetch(KEYS) >= 0),
    ("retain", lambda cache: cache.retain(KEYS, 1) == 8),
    ("forget", lambda cache: cache.forget(hashes(1, "none")) == 0),
    ("open", lambda cache: cache.client.open(layout("more")).lookup(KEYS).length == 0),
    ("stats", lambda cache: cache.client.stats().tenants.default.sessions > 0),
    ("verify", lambda cache: cache.client.verify()[1] == 0),
]


def test_every_call_survives_a_restart(make_daemon: MakeDaemon, door: str) -> None:
    """Each as the first call of a client after the restart."""
    daemon = make_daemon().start()
    caches = [daemon.client(door).open(layout("sessions")) for _ in CALLS]
    caches[0].put(KEYS, contents(KEYS, SIZE))
    daemon.settled()
    daemon.stop()
    daemon.start()
    for cache, (name, call) in zip(caches, CALLS, strict=True):
        assert call(cache), name


def test_what_a_put_was_doing_when_the_daemon_died(make_daemon: MakeDaemon, door: str) -> None:
    daemon = make_daemon().start()
    cache = daemon.client(door, timeout_s=1.0).open(layout("sessions"))
    daemon.signal(signal.SIGKILL)
    daemon.kill()
    with pytest.raises(Unavailable):
        cache.put(KEYS, contents(KEYS, SIZE))
    daemon.start()
    wait_for(lambda: _looks_up_nothing(cache.client), "the client to connect again")
    assert cache.put(KEYS, contents(KEYS, SIZE)).stored == 8


def _looks_up_nothing(client: Client) -> bool:
    try:
        return client.open(layout("sessions")).lookup(KEYS).length == 0
    except Unavailable:
        return False
