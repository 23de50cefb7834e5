"""What strangers send: refused with the right error, harmless to everybody else, nothing left."""

from __future__ import annotations

import json
import os
import resource
import socket
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from kvstore.errors import (
    InvalidKeys,
    InvalidLayout,
    InvalidRequest,
    KVStoreError,
    LimitExceeded,
    ProtocolMismatch,
    SessionLost,
    TooLarge,
)
from kvstore.protos import kvstore_pb2 as pb
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import Daemon, content, contents, hashes, layout, wait_for
from tests.e2e.raw import HEADER, RawFront, RawHatch, Stranger, open_layout, packed, stranger

SIZE = 64 << 10
KEYS = hashes(4, "hostile")


@pytest.fixture
def visitor(shared: Daemon, door: str) -> Iterator[Stranger]:
    """An attached stranger, and afterwards a daemon that serves an honest client as before."""
    with shared.client() as honest:
        cache = honest.open(layout("honest"))
        cache.put(KEYS, contents(KEYS, SIZE))
        before = shared.settled()
        raw = stranger(shared, door)
        raw.attach(pid=os.getpid())
        yield raw
        raw.close()
        with cache.acquire(KEYS) as grant:
            assert [bytes(grant.view(at)) for at in range(4)] == contents(KEYS, SIZE)
        after = wait_for(
            lambda: (s := shared.settled()).sessions == before.sessions and s, "its session to end"
        )
        assert after.blocks.known == before.blocks.known, "the stranger left something"
        assert after.tiers.dram.used_bytes == before.tiers.dram.used_bytes


MANY = [at.to_bytes(8, "little") for at in range(100_000)]
Refusal = tuple[str, int, Callable[[int], Any], type[KVStoreError], str]
REFUSALS: list[Refusal] = [
    (
        "a key twice in a reserve",
        pb.RESERVE,
        lambda n: pb.ReserveRequest(keys=packed(n, [*KEYS, KEYS[0]])),
        InvalidKeys,
        "twice in one list: give each block once",
    ),
    (
        "a key twice in a forget",
        pb.FORGET,
        lambda n: pb.ForgetRequest(keys=packed(n, [KEYS[0], KEYS[0]])),
        InvalidKeys,
        "twice in one list: give each block once",
    ),
    (
        "100,000 keys to look up",
        pb.LOOKUP,
        lambda n: pb.LookupRequest(keys=packed(n, MANY)),
        TooLarge,
        "100000 keys in one call: at most 65536 are taken; split the list",
    ),
    (
        "100,000 keys to reserve",
        pb.RESERVE,
        lambda n: pb.ReserveRequest(keys=packed(n, MANY)),
        TooLarge,
        "100000 keys in one call: at most 65536 are taken; split the list",
    ),
    (
        "a hash of 7 bytes",
        pb.ACQUIRE,
        lambda n: pb.AcquireRequest(keys=packed(n, [b"1234567"])),
        InvalidKeys,
        "a hash of 7 bytes: engine block hashes have 8 to 64 bytes",
    ),
    (
        "a hash of 65 bytes",
        pb.PREFETCH,
        lambda n: pb.PrefetchRequest(keys=packed(n, [b"x" * 65])),
        InvalidKeys,
        "a hash of 65 bytes: engine block hashes have 8 to 64 bytes",
    ),
    (
        "hashes that are cut off",
        pb.LOOKUP,
        lambda n: pb.LookupRequest(keys=pb.Keys(layout=n, hash_bytes=32, hashes=b"x" * 33)),
        InvalidKeys,
        "33 bytes of hashes are no multiple of 32",
    ),
    (
        "hashes of no length",
        pb.LOOKUP,
        lambda n: pb.LookupRequest(keys=pb.Keys(layout=n, hashes=b"x" * 32)),
        InvalidKeys,
        "a hash of 0 bytes",
    ),
    (
        "a layout that nobody opened",
        pb.LOOKUP,
        lambda n: pb.LookupRequest(keys=packed(4_000_000_000, KEYS)),
        InvalidRequest,
        "layout 4000000000 is not open here, .* open it again",
    ),
    (
        "a shard too far",
        pb.RESERVE,
        lambda n: pb.ReserveRequest(keys=packed(n, KEYS), shard=1),
        InvalidRequest,
        "shard 1 of a layout with 1 shards: they count from 0",
    ),
    (
        "a priority too high",
        pb.RETAIN,
        lambda n: pb.RetainRequest(keys=packed(n, KEYS), priority=101),
        InvalidRequest,
        "priority is 101: give 0 to 100",
    ),
    (
        "a time to live that is no number",
        pb.RETAIN,
        lambda n: pb.RetainRequest(keys=packed(n, KEYS), priority=1, ttl_s=float("nan")),
        InvalidRequest,
        "ttl_s is nan: give seconds",
    ),
    (
        "a time to live before now",
        pb.RETAIN,
        lambda n: pb.RetainRequest(keys=packed(n, KEYS), priority=1, ttl_s=-1),
        InvalidRequest,
        "ttl_s is -1.0: give seconds",
    ),
    (
        "a layout without a model",
        pb.OPEN,
        lambda n: pb.OpenRequest(layout=pb.LayoutMessage(engine="e", dtype="d", block_tokens=1)),
        InvalidLayout,
        "layout.model is '': give a text",
    ),
    (
        "a layout without shards",
        pb.OPEN,
        lambda n: pb.OpenRequest(
            layout=pb.LayoutMessage(model="m", engine="e", dtype="d", block_tokens=1)
        ),
        InvalidLayout,
        "layout.shards is 0: give an integer of 1",
    ),
    (
        "a layout of endless blocks",
        pb.OPEN,
        lambda n: pb.OpenRequest(
            layout=pb.LayoutMessage(
                model="m", engine="e", dtype="d", block_tokens=1, shards=1024, shard_bytes=1 << 40
            )
        ),
        InvalidLayout,
        "takes 1125899906842624 bytes, a slab of this daemon holds 2097152: raise dram.slab_size",
    ),
]


@pytest.mark.parametrize(
    ("verb", "make", "error", "says"),
    [row[1:] for row in REFUSALS],
    ids=[row[0] for row in REFUSALS],
)
def test_refused(
    visitor: Stranger, verb: int, make: Callable[[int], Any], error: type[KVStoreError], says: str
) -> None:
    number = open_layout(visitor, layout("honest"))
    with pytest.raises(error, match=says) as refused:
        visitor.call(verb, make(number))
    assert type(refused.value) is error
    found = visitor.call(pb.LOOKUP, pb.LookupRequest(keys=packed(number, KEYS)))
    assert found.length == 4, "the session does not go on"


@pytest.mark.parametrize("deadline_s", [float("nan"), float("inf"), -float("inf"), -1.0, 1e300])
def test_deadlines_that_are_none(visitor: Stranger, deadline_s: float) -> None:
    number = open_layout(visitor, layout("honest"))
    got = visitor.call(
        pb.ACQUIRE, pb.AcquireRequest(keys=packed(number, KEYS), deadline_s=deadline_s)
    )
    assert got.length == 4
    assert visitor.call(pb.RELEASE, pb.ReleaseRequest(lease=got.lease)).held
    fresh = packed(number, hashes(2, "fresh"))
    reserved = visitor.call(pb.RESERVE, pb.ReserveRequest(keys=fresh, deadline_s=deadline_s))
    assert reserved.status == b"\0\0"
    assert visitor.call(pb.ABORT, pb.AbortRequest(lease=reserved.lease)).held


def test_leases_of_others(visitor: Stranger, shared: Daemon) -> None:
    fresh = hashes(2, "mine")
    with shared.client() as owner:
        cache = owner.open(layout("honest"))
        grant, reservation = cache.acquire(KEYS), cache.reserve(fresh)
        for lease in (grant._lease, reservation._lease, 0, 1 << 63):
            assert not visitor.call(pb.COMMIT, pb.CommitRequest(lease=lease)).held
            assert not visitor.call(pb.ABORT, pb.AbortRequest(lease=lease)).held
            assert not visitor.call(pb.RELEASE, pb.ReleaseRequest(lease=lease)).held
        assert cache.lookup(fresh).length == 0, "somebody else's commit counted"
        assert grant.release() is True
        assert reservation.commit() == 2
        assert cache.forget(fresh) == 2


def test_a_lease_ends_only_as_what_it_is(visitor: Stranger) -> None:
    number = open_layout(visitor, layout("honest"))
    fresh = packed(number, hashes(2, "kinds"))
    write = visitor.call(pb.RESERVE, pb.ReserveRequest(keys=fresh)).lease
    read = visitor.call(pb.ACQUIRE, pb.AcquireRequest(keys=packed(number, KEYS))).lease
    assert not visitor.call(pb.RELEASE, pb.ReleaseRequest(lease=write)).held
    assert not visitor.call(pb.COMMIT, pb.CommitRequest(lease=read)).held
    assert not visitor.call(pb.ABORT, pb.AbortRequest(lease=read)).held
    assert visitor.call(pb.ABORT, pb.AbortRequest(lease=write)).held
    assert not visitor.call(pb.ABORT, pb.AbortRequest(lease=write)).held
    assert visitor.call(pb.RELEASE, pb.ReleaseRequest(lease=read)).held
    assert not visitor.call(pb.RELEASE, pb.ReleaseRequest(lease=read)).held


@pytest.mark.parametrize("protocol", [0, 2, 99])
def test_another_protocol_version(
    visitor: Stranger, shared: Daemon, door: str, protocol: int
) -> None:
    other = stranger(shared, door)
    with pytest.raises(
        ProtocolMismatch, match=f"protocol {protocol}, this daemon 1: install the same"
    ):
        other.attach(protocol=protocol)
    if isinstance(other, RawHatch):
        assert other.is_cut_off()
    other.close()


# -- frames ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\xff" * 64,
        HEADER.pack(0, pb.STATS, 0, 0, 1),
        HEADER.pack(7, pb.STATS, 0, 0, 1),
        HEADER.pack((8 << 20) + 1, pb.STATS, 0, 0, 1),
    ],
    ids=["http", "ones", "length 0", "length 7", "length 8 MiB"],
)
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("door", ["hatch"])
def test_a_frame_of_no_length_ends_the_connection(
    visitor: Stranger, shared: Daemon, frame: bytes, attached: bool
) -> None:
    with RawHatch(shared.socket()) as other:
        if attached:
            other.attach()
        other.socket.sendall(frame)
        assert other.is_cut_off()


@pytest.mark.parametrize("door", ["hatch"])
def test_a_request_that_cannot_be_understood_is_refused(visitor: Stranger) -> None:
    assert isinstance(visitor, RawHatch)
    for verb in (0, pb.ATTACH, max(pb.Verb.values()) + 1, 255):
        visitor.send(verb, b"")
        status, _, payload = visitor.receive()
        refusal = pb.ErrorReply.FromString(payload)
        assert (status, refusal.error) == (1, "InvalidRequest")
        assert f"there is no verb {verb}" in refusal.message
    for verb in (pb.LOOKUP, pb.RESERVE, pb.COMMIT):
        visitor.send(verb, b"\xff\xff\xff")
        status, _, payload = visitor.receive()
        refusal = pb.ErrorReply.FromString(payload)
        assert (status, refusal.error) == (1, "InvalidRequest")
        assert "request of 3 bytes cannot be decoded" in refusal.message
    assert visitor.call(pb.STATS, pb.StatsRequest()).json


@pytest.mark.parametrize("door", ["hatch"])
def test_waking_the_daemon_is_no_request(visitor: Stranger) -> None:
    assert isinstance(visitor, RawHatch)

    def counted() -> tuple[int, dict[str, int]]:
        document = json.loads(visitor.call(pb.STATS, pb.StatsRequest()).json)
        (stats,) = document["tenants"].values()
        return sum(stats["requests"].values()), stats["errors"]

    before, errors = counted()
    for _ in range(3):
        visitor.socket.sendall(HEADER.pack(HEADER.size - 4, pb.WAKE, 0, 0, 0))
    assert counted() == (before + 1, errors)


@pytest.mark.parametrize("door", ["hatch"])
def test_the_first_request_is_attach(visitor: Stranger, shared: Daemon) -> None:
    for verb, body, says in (
        (pb.STATS, b"", "the first request of a connection must be ATTACH"),
        (pb.ATTACH, b"\xff\xff", "the attach request cannot be decoded"),
    ):
        with RawHatch(shared.socket()) as other:
            other.send(verb, body)
            status, number, payload = other.receive()
            refusal = pb.ErrorReply.FromString(payload)
            assert (status, number, refusal.error) == (1, 1, "InvalidRequest")
            assert says in refusal.message
            assert other.is_cut_off()


@pytest.mark.parametrize("door", ["hatch"])
def test_frames_in_any_pieces(visitor: Stranger) -> None:
    assert isinstance(visitor, RawHatch)
    number = open_layout(visitor, layout("honest"))
    body = pb.LookupRequest(keys=packed(number, KEYS)).SerializeToString()
    frames = b"".join(
        HEADER.pack(8 + len(body), pb.LOOKUP, 0, 0, number) + body for number in range(100, 140)
    )
    visitor.socket.sendall(frames)  # forty at once
    assert [visitor.receive()[1] for _ in range(40)] == list(range(100, 140))
    for at in range(0, len(frames) // 40):  # one, byte by byte
        visitor.socket.sendall(frames[at : at + 1])
    status, number, payload = visitor.receive()
    assert (status, number) == (0, 100)
    assert pb.LookupReply.FromString(payload).length == 4


@pytest.mark.parametrize("door", ["hatch"])
def test_half_a_frame_and_gone(visitor: Stranger, shared: Daemon) -> None:
    with RawHatch(shared.socket()) as other:
        other.attach()
        other.socket.sendall(HEADER.pack(5_000, pb.LOOKUP, 0, 0, 1) + b"x" * 100)


@pytest.mark.parametrize("door", ["hatch"])
def test_who_does_not_read_answers_is_cut_off(visitor: Stranger, shared: Daemon) -> None:
    with RawHatch(shared.socket()) as other:
        other.attach()
        requests = HEADER.pack(8, pb.STATS, 0, 0, 1) * 500
        with pytest.raises((BrokenPipeError, ConnectionError)):
            for _ in range(200):
                other.socket.sendall(requests)
    wait_for(lambda: "it does not read its answers" in shared.log(), "the daemon to say why")


# -- the front door alone ----------------------------------------------------------------------


@pytest.mark.parametrize("door", ["front"])
@pytest.mark.parametrize("token", [None, b"", b"x" * 16])
def test_calls_without_a_session(visitor: Stranger, shared: Daemon, token: bytes | None) -> None:
    other = RawFront(shared.socket("front"))
    if token is not None:
        other.metadata = (("kvstore-session-bin", token),)
    with pytest.raises(SessionLost, match=r"no token of a live session .*: call Attach"):
        other.call(pb.STATS, pb.StatsRequest())
    other.close()


@pytest.mark.parametrize("door", ["front"])
def test_junk_at_the_front_door(visitor: Stranger, shared: Daemon) -> None:
    assert isinstance(visitor, RawFront)
    junk = visitor.channel.unary_unary("/kvstore.v1.KVStore/Lookup")
    with pytest.raises(grpc.RpcError):
        junk(b"\xff\xff\xff", timeout=5, metadata=visitor.metadata)
    with socket.socket(socket.AF_UNIX) as plain:
        plain.connect(str(shared.socket("front")))
        plain.sendall(b"\xff" * 1_000)


@pytest.mark.parametrize("door", ["front"])
@pytest.mark.parametrize("pid", [0xFFFFFFFF, 0x7FFFFFFF, 0])
def test_a_process_id_of_no_process(visitor: Stranger, shared: Daemon, pid: int) -> None:
    """A client claimed process 4294967295: looking for it raised OverflowError after the session
    had been made, so the stream failed and the session stayed for ever. It is made after looking,
    and a number that means nothing is a process that cannot be watched."""
    sessions = shared.stats().sessions
    other = RawFront(shared.socket("front"))
    other.attach(pid=pid)
    assert other.call(pb.STATS, pb.StatsRequest()).json
    assert shared.stats().sessions == sessions + 1
    other.close()
    wait_for(lambda: shared.stats().sessions == sessions, "its session to end")


# -- bounds ------------------------------------------------------------------------------------


def test_limits_of_sessions_and_leases(make_daemon: MakeDaemon, door: str) -> None:
    daemon = make_daemon(limits={"sessions": 3, "leases_per_session": 5, "layouts": 2})
    daemon.start()
    cache = daemon.client(door).open(layout("bound"))
    cache.put(KEYS, contents(KEYS, SIZE))
    grants = [cache.acquire(KEYS) for _ in range(5)]
    for call in (lambda: cache.acquire(KEYS), lambda: cache.reserve(hashes(1, "more"))):
        with pytest.raises(LimitExceeded, match=r"holds 5 leases.*limits\.leases_per_session"):
            call()
    assert all(grant.release() for grant in grants)
    assert bytes(cache.acquire(KEYS).view(3)) == content(KEYS[3], SIZE)

    others = [daemon.client("hatch"), daemon.client("front")]
    with pytest.raises(
        LimitExceeded, match=r"3 clients are connected.*limits\.sessions.*close some"
    ):
        daemon.client(door)
    others[0].open(layout("second"))
    others[1].open(layout("bound"))
    with pytest.raises(LimitExceeded, match=r"2 layouts are open.*limits\.layouts"):
        others[0].open(layout("third"))
    others.pop().close()
    wait_for(lambda: _connects(daemon, door), "a session to be free again")


def _connects(daemon: Daemon, door: str) -> bool:
    try:
        daemon.client(door)
    except LimitExceeded:
        return False
    return True


def test_no_descriptors_left(make_daemon: MakeDaemon) -> None:
    """Strangers opened connections until the daemon had no descriptor left: its listening socket
    stayed readable, so the loop did nothing but fail to accept and log it, and nobody was served.
    Accepting pauses now, connections that do not attach are bounded in number and in time."""
    daemon = make_daemon()
    daemon.start()
    cache = daemon.client().open(layout("descriptors"))
    cache.put(KEYS, contents(KEYS, SIZE))
    assert daemon.process is not None
    pid = daemon.process.pid
    used = len(os.listdir(f"/proc/{pid}/fd"))
    hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 20, hard))
    strangers = [RawHatch(daemon.socket()) for _ in range(40)]
    wait_for(lambda: "cannot accept a client" in daemon.log(), "the daemon to run out")
    for _ in range(200):
        assert cache.lookup(KEYS).length == 4
    # A slab of another size needs a descriptor for the slot table: that was a defect in a request,
    # and the slots that it had taken stayed taken.
    other = cache.client.open(layout("other", shard_bytes=30_000))
    assert other.put(KEYS, contents(KEYS, 30_000)).stored == 4
    with other.acquire(KEYS) as grant:
        assert bytes(grant.view(3)) == content(KEYS[3], 30_000)
    assert "slot table cannot be written" in daemon.log()
    complaints = daemon.log().count("cannot accept a client")
    assert complaints < 20, f"{complaints} lines: accepting does not pause"
    for one in strangers:
        one.close()
    wait_for(lambda: daemon.stats().sessions, "a new client to be served")


def test_connections_that_do_not_attach_are_bounded(make_daemon: MakeDaemon) -> None:
    """See above: every connection takes two descriptors, and only sessions were counted."""
    daemon = make_daemon(limits={"sessions": 2})
    daemon.start()
    honest = daemon.client()
    strangers = [RawHatch(daemon.socket()) for _ in range(80)]
    assert strangers[-1].is_cut_off()
    assert honest.stats().tenants.default.sessions == 1
    for one in strangers:
        one.close()
    wait_for(lambda: daemon.stats().sessions == 2, "a new client to be served")
