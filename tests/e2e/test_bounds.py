"""Bounds against a real daemon: what one client may take, and floods that others do not notice.

How little they notice is measured by `python -m tests.soak.hostile`; here it is that they are
served, and rightly.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.client import Cache
from kvstore.errors import LimitExceeded
from kvstore.protos import kvstore_pb2 as pb
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import KIB, Daemon, contents, hashes, layout, targets, wait_for
from tests.e2e.raw import HEADER, RawHatch, open_layout, packed, stranger

SIZE = 64 * KIB
KEYS = hashes(4, "bounds")
MANY = [at.to_bytes(32, "little") for at in range(65_536)]
BLOCKS = 128  # of the arena of 8 MiB
IDLE = 1_000


def _served(cache: Cache) -> None:
    """An honest client gets what it put, every byte of it."""
    into = targets(4, SIZE)
    assert cache.get(KEYS, into).length == 4
    assert [bytes(one) for one in into] == contents(KEYS, SIZE)


# -- what one client may hold ------------------------------------------------------------------


@pytest.fixture(scope="module")
def bounded() -> Iterator[Daemon]:
    """A daemon of which one client may hold a half, and all together seven eighths."""
    parts: dict[str, object] = {"bytes_per_session": "50%", "bytes_per_tenant": "87.5%"}
    with Daemon(dram={"size": "8 MiB"}, nvme={"size": "0"}, limits=parts) as daemon:
        yield daemon.start()


@pytest.fixture
def small(bounded: Daemon) -> Daemon:
    """The same, empty."""
    with bounded.client() as client:
        client.clear()
    bounded.settled()
    return bounded


def test_one_client_cannot_pin_the_arena(small: Daemon, door: str) -> None:
    keys = hashes(BLOCKS, "pinned")
    hog = small.client(door).open(layout("hog"))
    assert hog.put(keys, contents(keys, SIZE)).stored == BLOCKS
    grant = hog.acquire(keys)
    assert (grant.length, grant.stop) == (BLOCKS // 2, "no_room")
    more = hog.acquire(keys[BLOCKS // 2 :])
    assert (more.length, more.stop) == (0, "no_room")
    assert hog.reserve(hashes(4, "more")).refused == 4
    honest = small.client(door).open(layout("honest"))
    assert honest.put(KEYS, contents(KEYS, SIZE)).stored == 4, "nothing could be evicted"
    _served(honest)
    assert grant.release()
    with hog.acquire(keys[: BLOCKS // 2]) as again:
        assert again.length > 0
    limited = small.stats().limited
    assert limited.bytes_per_session >= 3
    for cache in (hog, honest):
        cache.client.close()


def test_all_clients_together_leave_room(small: Daemon, door: str) -> None:
    hogs = [small.client(door).open(layout(f"hog {number}")) for number in range(3)]
    held = [hog.reserve(hashes(BLOCKS, f"hog {at}")) for at, hog in enumerate(hogs)]
    new = [len(one) for one in held]
    assert new == [BLOCKS // 2, BLOCKS * 3 // 8, 0]
    honest = small.client(door).open(layout("honest"))
    assert honest.put(KEYS, contents(KEYS, SIZE)).refused == 4, "the bound is of all clients"
    held[1].abort()
    wait_for(lambda: honest.put(KEYS, contents(KEYS, SIZE)).refused == 0, "room to come back")
    _served(honest)
    held[0].abort()
    for cache in (*hogs, honest):
        cache.client.close()


def test_more_than_a_client_may_hold_goes_through_in_rounds(small: Daemon, door: str) -> None:
    cache = small.client(door).open(layout("rounds"))
    keys = hashes(BLOCKS, "rounds")
    assert cache.put(keys, contents(keys, SIZE)).stored == BLOCKS
    into = targets(BLOCKS, SIZE)
    assert cache.get(keys, into).length == BLOCKS
    assert [bytes(one) for one in into] == contents(keys, SIZE)


def test_bounds_are_reloaded(make_daemon: MakeDaemon, door: str) -> None:
    daemon = make_daemon(
        dram={"size": "8 MiB"}, nvme={"size": "0"}, limits={"leases_per_tenant": 2}
    )
    daemon.start()
    cache = daemon.client(door).open(layout("reload"))
    other = daemon.client(door).open(layout("reload"))
    cache.put(KEYS, contents(KEYS, SIZE))
    held = [cache.acquire(KEYS), other.acquire(KEYS)]
    with pytest.raises(LimitExceeded, match=r"this tenant hold 2 .*limits\.leases_per_tenant"):
        cache.acquire(KEYS)
    daemon.config["limits"] = {"leases_per_tenant": 50, "bytes_per_session": "25%"}
    daemon.write_config()
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: "configuration reloaded" in daemon.log(), "the daemon to reload")
    assert cache.acquire(KEYS).length == 4
    assert len(other.reserve(hashes(BLOCKS, "quarter"))) == BLOCKS // 4 - 4
    del held


# -- how fast a client may ask -----------------------------------------------------------------


def test_who_asks_too_fast_is_read_later(make_daemon: MakeDaemon, door: str) -> None:
    """No request is refused: it is carried out when the bucket allows, or the client gives up."""
    daemon = make_daemon(limits={"requests_per_s": 30})
    daemon.start()
    fast = stranger(daemon, door)
    fast.attach(pid=os.getpid())
    number = open_layout(fast, layout("fast"))
    for _ in range(45):
        fast.call(pb.LOOKUP, pb.LookupRequest(keys=packed(number, KEYS)))
    assert daemon.stats().limited.requests_per_s >= 1
    fast.close()


def test_a_large_request_costs_more(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(limits={"requests_per_s": 1_000})
    daemon.start()
    with RawHatch(daemon.socket()) as raw:
        raw.attach()
        number = open_layout(raw, layout("large"))
        for _ in range(8):  # of 2 MiB: 257 requests each
            raw.call(pb.LOOKUP, pb.LookupRequest(keys=packed(number, MANY)))
    assert daemon.stats().limited.requests_per_s >= 1


def test_a_process_that_ends_while_it_has_to_wait(make_daemon: MakeDaemon) -> None:
    """What it had sent counts, and its session ends at once, however slowly it may ask."""
    daemon = make_daemon(limits={"requests_per_s": 20})
    daemon.start()
    child = os.fork()
    if child == 0:
        with RawHatch(daemon.socket()) as raw:
            raw.attach()
            number = open_layout(raw, layout("ended"))
            frames = b""
            reserved = pb.ReserveRequest(keys=packed(number, KEYS)).SerializeToString()
            frames += HEADER.pack(8 + len(reserved), pb.RESERVE, 0, 0, 1) + reserved
            frames += HEADER.pack(8, pb.STATS, 0, 0, 0) * 400
            raw.socket.sendall(frames)
            raw.receive()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)

    def gone() -> bool:
        stats = daemon.stats()
        blocks = stats.blocks
        return bool(stats.sessions == 1 and blocks.quarantined == 0 and blocks.known == 0)

    wait_for(gone, "everything that it held to be free", deadline_s=5.0)


# -- floods ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> Iterator[Daemon]:
    """A daemon of two tenants: one is hostile."""
    with Daemon(
        tenants__default={"dram_quota": "50%"}, tenants__hostile={"dram_quota": "50%"}
    ) as daemon:
        yield daemon.start()


@pytest.fixture
def honest(pair: Daemon) -> Iterator[Cache]:
    """The other tenant's client, before and after."""
    with pair.client() as client:
        cache = client.open(layout("honest"))
        cache.put(KEYS, contents(KEYS, SIZE))
        yield cache
        _served(cache)
        wait_for(lambda: pair.stats("hostile").sessions == 1, "the hostile sessions to end")


def _backlog(path: Path, frames: bytes) -> RawHatch:
    """A connection with these requests under way."""
    raw = RawHatch(path)
    raw.attach()
    raw.socket.sendall(frames)
    return raw


def test_a_flood_of_small_requests(pair: Daemon, honest: Cache) -> None:
    frames = HEADER.pack(8, pb.STATS, 0, 0, 0) * 200
    floods = [_backlog(pair.socket("hatch", "hostile"), frames) for _ in range(8)]
    for _ in range(20):
        _served(honest)
    for raw in floods:
        raw.close()


def test_a_flood_of_the_largest_requests(pair: Daemon, honest: Cache) -> None:
    with RawHatch(pair.socket("hatch", "hostile")) as raw:
        raw.attach()
        number = open_layout(raw, layout("large"))
        body = pb.LookupRequest(keys=packed(number, MANY)).SerializeToString()
        frame = HEADER.pack(8 + len(body), pb.LOOKUP, 0, 0, 0) + body
        raw.socket.settimeout(10.0)
        for _ in range(8):
            raw.socket.sendall(frame)
            _served(honest)


def test_garbage_again_and_again(pair: Daemon, honest: Cache) -> None:
    path = pair.socket("hatch", "hostile")
    for garbage in (
        b"\xff" * 4_096,
        os.urandom(4_096),
        HEADER.pack(9, pb.LOOKUP, 0, 0, 1) + b"\xff",
    ):
        for attached in (False, True):
            for _ in range(5):
                with RawHatch(path) as raw:
                    if attached:
                        raw.attach()
                    raw.socket.sendall(garbage)
        _served(honest)


def test_a_storm_of_connections(pair: Daemon, honest: Cache, door: str) -> None:
    path = str(pair.socket(door, "hostile"))
    for _ in range(5):
        storm = []
        for _ in range(30):
            plain = socket.socket(socket.AF_UNIX)
            plain.connect(path)
            storm.append(plain)
        _served(honest)
        for plain in storm:
            plain.close()


def test_a_thousand_idle_connections(pair: Daemon, honest: Cache) -> None:
    """They are sessions, as many as may be; they take descriptors, and nobody's time."""
    assert pair.process is not None
    folder = Path(f"/proc/{pair.process.pid}/fd")
    before = len(list(folder.iterdir()))
    with contextlib.ExitStack() as idle:
        for _ in range(IDLE):
            idle.enter_context(RawHatch(pair.socket("hatch", "hostile"))).attach()
        _served(honest)
        assert 2 * IDLE <= len(list(folder.iterdir())) <= before + 2 * IDLE + 8
    wait_for(lambda: len(list(folder.iterdir())) <= before + 4, "the descriptors to be given back")


def test_connections_of_the_front_door_are_bounded(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(limits={"sessions": 2})
    daemon.start()
    idle = []
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
    for _ in range(2 + 64 + 10):
        plain = socket.socket(socket.AF_UNIX)
        plain.settimeout(5.0)
        plain.connect(str(daemon.socket("front")))
        with contextlib.suppress(ConnectionError):
            plain.sendall(preface)
        idle.append(plain)
    answered = sum(_answers(plain) for plain in idle)
    assert answered == 2 + 64
    for plain in idle:
        plain.close()
    wait_for(lambda: _attaches(daemon), "a client to be let in again")


def _answers(plain: socket.socket) -> bool:
    try:
        return bool(plain.recv(64))
    except ConnectionError:
        return False


def _attaches(daemon: Daemon) -> bool:
    try:
        daemon.client("front").close()
    except Exception:  # whatever it is: it is tried again
        return False
    return True
