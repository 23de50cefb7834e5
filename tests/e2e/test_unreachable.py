"""A daemon that is not there, does not answer, or is not the one it was: an answer in time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvstore.client import connect
from kvstore.client.cache import ANSWER_S, DEADLINE_S
from kvstore.errors import (
    ArenaGone,
    DeadlineExceeded,
    KVStoreError,
    SessionLost,
    Unavailable,
)
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import ROOT, Daemon, contents, hashes, layout, targets, wait_for

SIZE = 64 << 10
KEYS = hashes(6, "unreachable")
TIMEOUT_S = 0.4


@contextmanager
def in_time(deadline_s: float) -> Iterator[None]:
    """What happens inside is over at the deadline, give or take the scheduler."""
    started = time.monotonic()
    yield
    took = time.monotonic() - started
    assert took < 1.6 * deadline_s + 0.1, f"{took:.2f} s for a deadline of {deadline_s} s"


def test_no_daemon(tmp_path: Path, door: str) -> None:
    name = {"hatch": "kvstore.sock", "front": "grpc.sock"}[door]
    with in_time(TIMEOUT_S), pytest.raises(Unavailable, match=r"no daemon at .*: start kvstored"):
        connect(tmp_path / name, timeout_s=TIMEOUT_S)
    with (
        in_time(TIMEOUT_S),
        pytest.raises(Unavailable, match=r"no daemon at .*/nobody/"),
    ):
        connect(tenant="nobody", timeout_s=TIMEOUT_S)


def test_a_daemon_that_has_gone(make_daemon: MakeDaemon, door: str) -> None:
    daemon = make_daemon().start()
    cache = daemon.client(door, timeout_s=TIMEOUT_S).open(layout("gone"))
    cache.put(KEYS, contents(KEYS, SIZE))
    grant, reservation = cache.acquire(KEYS), cache.reserve(hashes(2, "new"))
    daemon.stop()
    for call in (
        lambda: cache.lookup(KEYS),
        lambda: cache.put(KEYS, contents(KEYS, SIZE)),
        lambda: cache.get(KEYS, targets(6, SIZE)),
        lambda: cache.acquire(KEYS),
        lambda: cache.client.stats(),
        lambda: cache.client.open(layout("other")),
    ):
        with in_time(TIMEOUT_S), pytest.raises(Unavailable, match="start kvstored"):
            call()
    with in_time(TIMEOUT_S):
        assert grant.release() is False
    with in_time(TIMEOUT_S), pytest.raises(SessionLost):
        reservation.commit()
    started = time.monotonic()
    for _ in range(200):
        with pytest.raises(Unavailable):
            cache.lookup(KEYS)
    assert time.monotonic() - started < 1.0, "each call tries to connect again"


def test_a_daemon_that_does_not_answer(shared: Daemon, door: str) -> None:
    daemon = shared
    client = daemon.client(door, timeout_s=TIMEOUT_S)
    cache = client.open(layout(f"halted {door}"))
    cache.put(KEYS, contents(KEYS, SIZE))
    with daemon.suspended():
        for call in (
            lambda: cache.lookup(KEYS),
            lambda: cache.get(KEYS, targets(6, SIZE), deadline_s=0.1),
            lambda: cache.acquire(KEYS, deadline_s=0.1),
            lambda: cache.put(hashes(2, "late"), contents(hashes(2, "late"), SIZE)),
            lambda: client.stats(),
            lambda: connect(daemon.socket(door), timeout_s=TIMEOUT_S),
        ):
            with in_time(TIMEOUT_S), pytest.raises(Unavailable):
                call()
    wait_for(lambda: _answers(lambda: cache.lookup(KEYS).length == 6), "the daemon to go on")
    into = targets(6, SIZE)
    assert cache.get(KEYS, into).length == 6
    assert [bytes(one) for one in into] == contents(KEYS, SIZE)
    wait_for(lambda: daemon.stats().leases == 0, "what nobody waited for to be undone")


def test_a_call_with_a_deadline_of_its_own_waits_no_longer_than_a_second_more(
    shared: Daemon, door: str
) -> None:
    """Whatever the timeout is."""
    cache = shared.client(door, timeout_s=20.0).open(layout(f"patient {door}"))
    cache.put(KEYS, contents(KEYS, SIZE))
    new = hashes(2, "patient")
    with shared.suspended():
        for call in (
            lambda: cache.acquire(KEYS, deadline_s=0),
            lambda: cache.get(KEYS, targets(6, SIZE), deadline_s=0.1),
            lambda: cache.reserve(new, deadline_s=0.1),
            lambda: cache.put(new, contents(new, SIZE), deadline_s=0.1),
        ):
            with in_time(ANSWER_S + 0.1), pytest.raises(Unavailable):
                call()
        # The daemon is asked to wait for a second of its minute at most: so is it waited for.
        with in_time(DEADLINE_S + ANSWER_S), pytest.raises(Unavailable):
            cache.put(new, contents(new, SIZE), deadline_s=60)
    wait_for(lambda: shared.stats().leases == 0, "what nobody waited for to be undone")


def test_a_daemon_that_halts_while_blocks_are_held(shared: Daemon, door: str) -> None:
    daemon = shared
    cache = daemon.client(door, timeout_s=TIMEOUT_S).open(layout(f"held {door}"))
    cache.put(KEYS, contents(KEYS, SIZE))
    grant, reservation = cache.acquire(KEYS), cache.reserve(hashes(2, "new"))
    with daemon.suspended():
        with in_time(TIMEOUT_S):  # the hatch proves it without an answer: nobody ended the session
            assert grant.release() is (door == "hatch")
        with in_time(TIMEOUT_S), pytest.raises((DeadlineExceeded, SessionLost)):
            reservation.commit()
        with in_time(TIMEOUT_S):
            reservation.abort()
    wait_for(lambda: daemon.stats().leases == 0, "the ends to arrive, or the session to end")


def _answers(call: Callable[[], bool]) -> bool:
    try:
        return call()
    except Unavailable:
        return False


def test_an_arena_that_has_gone(make_daemon: MakeDaemon) -> None:
    """The file that the daemon names was deleted, or replaced, behind its back."""
    daemon = make_daemon().start()
    file = daemon.arena / "default" / "arena"
    size = file.stat().st_size
    file.rename(file.with_name("elsewhere"))
    with pytest.raises(ArenaGone, match=r"arena .* cannot be opened: No such file.*connect again"):
        daemon.client()
    file.write_bytes(b"")
    os.truncate(file, size)
    with pytest.raises(ArenaGone, match=r"is not the arena of this daemon any more: connect again"):
        daemon.client()
    file.unlink()
    file.symlink_to("elsewhere")
    with pytest.raises(ArenaGone, match=r"cannot be opened.*connect again"):
        daemon.client()


def test_an_arena_of_the_same_number_elsewhere(make_daemon: MakeDaemon) -> None:
    """A restarted daemon had its arena on another tmpfs, where the file had the inode number of
    the old one: clients went on with the old mapping, and stored bytes that nobody else saw."""
    daemon = make_daemon(nvme={"size": "0"})
    places = [daemon.folder / name for name in ("one", "two")]
    mounted: list[Path] = []
    try:
        for place in places:
            place.mkdir()
            mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(place)]
            if subprocess.run(mount, capture_output=True, check=False).returncode:
                pytest.skip("mounting a tmpfs needs root")
            mounted.append(place)
        inodes = []
        cache = None
        for place in places:
            daemon.config["dram"]["path"] = str(place / "arenas")
            daemon.start()
            inodes.append((place / "arenas" / "default" / "arena").stat().st_ino)
            cache = cache or daemon.client().open(layout("elsewhere"))
            cache.put(KEYS, contents(KEYS, SIZE))
            with daemon.client() as other:
                into = targets(6, SIZE)
                assert other.open(cache.layout).get(KEYS, into).length == 6
                assert [bytes(one) for one in into] == contents(KEYS, SIZE)
            daemon.stop()
        assert inodes[0] == inodes[1], "the case is not there any more: make the numbers agree"
    finally:
        for place in mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)


FORKED = """
import os, sys
from kvstore.client import connect
from kvstore.client.cache import ANSWER_S, DEADLINE_S
from kvstore.errors import SessionLost
from tests.e2e.harness import hashes, layout
client = connect(sys.argv[1])
cache = client.open(layout("fork"))
grant = cache.acquire(hashes(6, "unreachable"))
child = os.fork()
if child == 0:
    try:
        cache.lookup(hashes(1, "x"))
    except SessionLost as error:
        assert "connect again in the child" in str(error)
    else:
        os._exit(1)
    client.close()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert cache.lookup(hashes(6, "unreachable")).length == 6
assert grant.release() is True
"""


def test_a_forked_child_leaves_the_parent_alone(make_daemon: MakeDaemon) -> None:
    """A child process closed the client that it had inherited: that shut the parent's connection
    down, and the parent lost its leases."""
    daemon = make_daemon().start()
    with daemon.client() as client:
        client.open(layout("fork")).put(KEYS, contents(KEYS, SIZE))
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(daemon.socket())],
        cwd=ROOT,
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert daemon.log().count("client attached") == 3  # the start, the filler, the parent


AS_NOBODY = """
import os, sys
import kvstore.client.front  # while the interpreter's files may be read
from kvstore.client import connect
from kvstore.client.cache import ANSWER_S, DEADLINE_S
from kvstore.errors import KVStoreError
os.setgid(65534); os.setuid(65534)
try:
    connect(sys.argv[1], timeout_s=2.0)
except KVStoreError as error:
    sys.stdout.write(f"{type(error).__name__}: {error}")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_user_of_another_group(shared: Daemon, door: str) -> None:
    """Through the front door this looked like no daemon, and only after the whole timeout."""
    daemon = shared
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, str(daemon.socket(door))],
        cwd=ROOT,
        capture_output=True,
        timeout=30,
        check=False,
    )
    said = done.stdout.decode()
    assert said.startswith("NotPermitted: this user may not connect to"), (said, done.stderr)
    assert said.endswith("join the group that owns the tenant")


def test_memory_full_of_leased_blocks(make_daemon: MakeDaemon, door: str) -> None:
    """Nothing can leave: the refusal comes at once, whatever the deadline."""
    daemon = make_daemon(dram={"size": "8 MiB"}).start()
    cache = daemon.client(door, timeout_s=10).open(layout("leased"))
    keys, more = hashes(128, "leased"), hashes(4, "more")
    assert cache.put(keys, contents(keys, SIZE)).stored == 128
    daemon.settled()
    grant = cache.acquire(keys)
    assert grant.length == 128
    started = time.monotonic()
    put = cache.put(more, contents(more, SIZE), deadline_s=8)
    assert (put.stored, put.refused) == (0, 4)
    reservation = cache.reserve(more, deadline_s=8)
    assert (len(reservation), reservation.refused) == (0, 4)
    assert time.monotonic() - started < 2, "it waited for what cannot come"
    assert daemon.stats().blocks.refused == 8
    assert grant.release()
    assert cache.put(more, contents(more, SIZE)).stored == 4


def test_errors_are_of_one_family() -> None:
    for kind in (ArenaGone, DeadlineExceeded):
        assert issubclass(kind, Unavailable)
    assert issubclass(Unavailable, KVStoreError)
