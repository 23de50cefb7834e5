"""Sessions from outside: stopped clients, an operator, workers that join, waiting for room."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest

from kvstore.client import Cache, connect
from kvstore.errors import InvalidRequest, SessionLost, Unavailable
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import ROOT, Daemon, content, contents, hashes, layout, targets, wait_for

SIZE = 64 << 10
LAYOUT = layout("control")
KEYS = hashes(20, "control")

HOLDER = """
import sys
from kvstore.client import connect
from kvstore.errors import KVStoreError
from tests.e2e.harness import hashes, layout
cache = connect(sys.argv[1]).open(layout("control"))
grant = cache.acquire(hashes(20, "control"))
reservation = cache.reserve(hashes(5, "new"))
print(grant.length, len(reservation), flush=True)
sys.stdin.readline()
print(grant.release())
try:
    print(reservation.commit())
except KVStoreError as error:
    print(type(error).__name__)
"""

WORKER = """
import sys
from kvstore.client import connect
client = connect(sys.argv[1], join=sys.argv[2])
print(client.session(client.deadline()).attached.session, flush=True)
sys.stdin.readline()
"""


def process(daemon: Daemon, code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(daemon.socket()), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def said(of: subprocess.Popen[str]) -> str:
    assert of.stdout is not None
    return of.stdout.readline().strip()


def kvstore(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvstore.cli", *arguments, "--socket", str(daemon.socket())],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )


@pytest.fixture
def daemon(make_daemon: MakeDaemon) -> Daemon:
    daemon = make_daemon(nvme={"size": "0"}, dram={"size": "8 MiB"}).start()
    daemon.client().open(LAYOUT).put(KEYS, contents(KEYS, SIZE))
    return daemon


def the_session_of(daemon: Daemon, pid: int) -> dict[str, Any]:
    (found,) = [one for one in daemon.stats().clients if pid in one["pids"]]
    assert isinstance(found, dict)
    return found


def test_a_stopped_client_is_drained(daemon: Daemon) -> None:
    """Its read leases are revoked, and it hears that its copy is void; what it was writing waits
    for its process."""
    with process(daemon, HOLDER) as holder:
        assert said(holder) == "20 5"
        os.kill(holder.pid, signal.SIGSTOP)
        cache = daemon.client().open(LAYOUT)
        fill = hashes(200, "fill")
        assert cache.put(fill, contents(fill, SIZE)).stored <= 128 - 25
        assert cache.lookup(KEYS).length == 20, "they are held"
        listed = json.loads(kvstore(daemon, "sessions", "--json").stdout)
        (mine,) = [one for one in listed if holder.pid in one["pids"]]
        assert (mine["leases"], mine["leased_bytes"]) == (2, 25 * SIZE)
        table = kvstore(daemon, "sessions").stdout
        assert str(holder.pid) in table
        done = kvstore(daemon, "drain", "--session", str(mine["session"]))
        assert (done.returncode, done.stdout) == (0, f"session {mine['session']} ended\n")
        stats = daemon.stats()
        assert (stats.leases, stats.blocks.quarantined) == (0, 5)
        more = hashes(123, "more")
        assert cache.put(more, contents(more, SIZE)).stored == 123
        assert cache.lookup(KEYS).length == 0
        os.kill(holder.pid, signal.SIGCONT)
        holder.communicate("\n", timeout=20)
        assert holder.returncode == 0
    wait_for(lambda: daemon.stats().blocks.quarantined == 0, "its slots", 2.0)


def test_the_void_copy_is_told(daemon: Daemon) -> None:
    with process(daemon, HOLDER) as holder:
        assert said(holder) == "20 5"
        number = the_session_of(daemon, holder.pid)["session"]
        with daemon.client() as operator:
            assert operator.drain(number) == (True, 0)
            assert operator.drain(number) == (False, 0)
        out, _ = holder.communicate("\n", timeout=20)
        assert out.split() == ["False", "SessionLost"]


def test_a_drained_client_goes_on(daemon: Daemon, door: str) -> None:
    """It connects again, and tells that it writes nothing any more."""
    client = daemon.client(door)
    cache = client.open(LAYOUT)
    grant = cache.acquire(KEYS)
    reservation = cache.reserve(hashes(5, "new"))
    number = client.session(client.deadline()).attached.session
    with daemon.client() as operator:
        assert operator.drain(number) == (True, 0)
    wait_for(lambda: _gone(daemon, number), "the session to end")
    assert not grant.release()
    with pytest.raises(SessionLost):
        reservation.commit()
    wait_for(lambda: _lookup(cache) == 20, "the client to be back")
    wait_for(lambda: daemon.stats().blocks.quarantined == 0, "its slots")
    assert cache.get(KEYS, targets(20, SIZE)).length == 20


def _gone(daemon: Daemon, number: int) -> bool:
    return all(one["session"] != number for one in daemon.stats().clients)


def _lookup(cache: Cache) -> int:
    try:
        return cache.lookup(KEYS).length
    except Unavailable:
        return 0


def test_unknown_sessions_and_flushing(daemon: Daemon, make_daemon: MakeDaemon) -> None:
    done = kvstore(daemon, "drain", "--session", "99999")
    assert done.returncode == 1 and "kvstore sessions" in done.stderr
    other = make_daemon(nvme={"write_policy": "on-evict"}).start()
    cache = other.client().open(LAYOUT)
    cache.put(KEYS, contents(KEYS, SIZE))
    assert other.stats().tiers.nvme.blocks == 0
    done = kvstore(other, "drain")
    assert (done.returncode, done.stdout) == (0, "20 blocks written, nothing is due any more\n")
    assert other.stats().tiers.nvme.blocks == 20
    assert kvstore(other, "drain").stdout == "0 blocks written, nothing is due any more\n"


def test_a_worker_that_outlives_its_scheduler_keeps_the_slots(daemon: Daemon) -> None:
    """The scheduler reserves, a worker process copies. When the scheduler is killed the worker may
    still write: the slots wait for it, also through a restart of the daemon."""
    with process(daemon, HOLDER) as scheduler:
        assert said(scheduler) == "20 5"
        with connect(daemon.socket()) as client, pytest.raises(Unavailable):
            connect(daemon.socket(), join=f"{client.ticket[:-2]}00")
        number = the_session_of(daemon, scheduler.pid)["session"]
        scheduler.kill()
        wait_for(lambda: daemon.stats().blocks.quarantined == 0, "alone its end is enough", 2.0)
    with daemon.client() as mine:
        ticket = mine.ticket
        held = mine.open(LAYOUT).reserve(hashes(5, "joined"))
        assert len(held) == 5
        with process(daemon, WORKER, ticket) as worker:
            joined = int(said(worker))
            assert joined == mine.session(mine.deadline()).attached.session != number
            assert the_session_of(daemon, worker.pid)["session"] == joined
            daemon.kill()
            daemon.start()
            assert daemon.stats().blocks.quarantined == 5
            worker.kill()
        assert daemon.stats().blocks.quarantined == 5, "the other process lives"
        held.abort()
        mine.open(LAYOUT)
        wait_for(lambda: daemon.stats().blocks.quarantined == 0, "its word")


def test_a_worker_that_leaves_ends_nothing(daemon: Daemon) -> None:
    with daemon.client() as mine:
        cache = mine.open(LAYOUT)
        grant = cache.acquire(KEYS)
        with connect(daemon.socket(), join=mine.ticket) as worker:
            assert worker.open(LAYOUT).lookup(KEYS).length == 20
        assert bytes(grant.view(3)) == content(KEYS[3], SIZE) and grant.release()
        with connect(daemon.socket(), join=mine.ticket) as worker:
            mine.close()
            with pytest.raises(Unavailable):
                worker.open(LAYOUT)
    with pytest.raises(InvalidRequest, match="ticket"):
        connect(daemon.socket(), join="nonsense")


def test_an_acquire_waits_for_room(make_daemon: MakeDaemon, door: str) -> None:
    """Memory is full of blocks whose copy is still due. What is asked for cannot be loaded now, but
    soon can: it was answered with nothing at once, and is waited for now."""
    daemon = make_daemon(dram={"size": "8 MiB"})
    daemon.gated = True
    daemon.start()
    client = daemon.client(door)
    cache = client.open(LAYOUT)
    cache.put(KEYS, contents(KEYS, SIZE))
    daemon.settled()
    fill = hashes(256, "fill")
    for at in (0, 128):  # KEYS leave memory
        cache.put(fill[at : at + 128], contents(fill[at : at + 128], SIZE), deadline_s=20)
        daemon.settled()
    assert cache.lookup(KEYS).tiers["nvme"] == 20
    got: list[Any] = []
    with daemon.hold("write"):
        dirty = hashes(128, "dirty")
        assert cache.put(dirty, contents(dirty, SIZE), deadline_s=20).stored == 128
        into = targets(20, SIZE)
        thread = threading.Thread(target=lambda: got.append(cache.get(KEYS, into, deadline_s=20)))
        before = daemon.stats()
        thread.start()
        wait_for(lambda: daemon.stats().requests.acquire > before.requests.acquire, "the call")
        assert not got
        assert daemon.stats().blocks.asked == before.blocks.asked, "it has not been answered"
        assert cache.get(KEYS, targets(20, SIZE), deadline_s=0.05).length == 0
    thread.join(20)
    assert got and got[0].length == 20
    assert all(one == content(key, SIZE) for one, key in zip(into, KEYS, strict=True))


def test_the_log_names_who_was_quarantined(daemon: Daemon) -> None:
    with process(daemon, HOLDER) as holder:
        assert said(holder) == "20 5"
        holder.kill()
    wait_for(lambda: "slots quarantined" in daemon.log(), "the line")
    assert str(holder.pid) in daemon.log()
