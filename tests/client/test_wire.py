"""One connection and its callers, against a daemon that the test plays itself, frame by frame."""

from __future__ import annotations

import contextlib
import itertools
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.client import wire
from kvstore.client.wire import AFTER_LENGTH, HEADER, Wire
from kvstore.errors import DeadlineExceeded, KVStoreError, SessionLost
from kvstore.protos import kvstore_pb2 as pb
from tests.e2e.harness import wait_for

SHORT_S, LONG_S = 0.15, 20.0


class Played:
    """The daemon's end of a connection."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory(prefix="kvwire-", dir="/tmp") as folder:
            path = Path(folder) / "kvstore.sock"
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(str(path))
                listening.listen()
                self.wire = Wire(path, LONG_S)
                self.end, _ = listening.accept()
        self.end.settimeout(LONG_S)

    def request(self) -> tuple[int, int, bytes]:
        """Verb, number and message of the next request."""
        length, verb, _, _, number = HEADER.unpack(self._exactly(HEADER.size))
        return verb, number, self._exactly(length - AFTER_LENGTH)

    def answer(self, number: int, message: Any) -> None:
        """Answer a request."""
        self.end.sendall(frame(number, message))

    def _exactly(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            more = self.end.recv(count - len(found))
            assert more, "the client has gone"
            found += more
        return found


def frame(number: int, message: Any) -> bytes:
    """An answer as it travels."""
    body: bytes = message.SerializeToString()
    return HEADER.pack(AFTER_LENGTH + len(body), 0, 0, 0, number) + body


class Caller(threading.Thread):
    """A thread that makes one call, here a LOOKUP whose answer has a length of its own."""

    def __init__(self, wire: Wire, deadline_s: float = LONG_S) -> None:
        super().__init__(daemon=True)
        self.wire = wire
        self.deadline_s = deadline_s
        self.length: int | None = None
        self.error: KVStoreError | None = None
        self.took_s = 0.0
        self.start()

    def run(self) -> None:
        started = time.monotonic()
        try:
            deadline = started + self.deadline_s
            reply = self.wire.call(pb.LOOKUP, pb.LookupRequest(), pb.LookupReply, deadline)
            self.length = reply.length
        except KVStoreError as error:
            self.error = error
        self.took_s = time.monotonic() - started

    def done(self) -> Caller:
        self.join(LONG_S)
        assert not self.is_alive(), "the caller hangs"
        return self


@pytest.fixture
def played() -> Iterator[Played]:
    daemon = Played()
    yield daemon
    daemon.wire.close()
    daemon.end.close()


def test_answers_in_any_order_and_any_pieces(played: Played) -> None:
    callers = [Caller(played.wire) for _ in range(6)]
    numbers = [played.request()[1] for _ in callers]
    stream = b"".join(frame(number, pb.LookupReply(length=number)) for number in numbers[::-1])
    for at in range(0, len(stream), 5):
        played.end.sendall(stream[at : at + 5])
    assert sorted(caller.done().length or 0 for caller in callers) == sorted(numbers)


def test_half_an_answer_at_the_deadline(played: Played) -> None:
    """The rest of an answer that nobody waits for any more comes before the next one."""
    late = Caller(played.wire, SHORT_S)
    first = frame(played.request()[1], pb.LookupReply(length=77))
    played.end.sendall(first[:7])
    assert isinstance(late.done().error, DeadlineExceeded)
    second = Caller(played.wire)
    number = played.request()[1]
    played.end.sendall(first[7:] + frame(number, pb.LookupReply(length=5)))
    assert second.done().length == 5


def test_the_end_in_the_middle_of_an_answer(played: Played) -> None:
    callers = [Caller(played.wire) for _ in range(3)]
    number, *_ = [played.request()[1] for _ in callers]
    played.end.sendall(frame(number, pb.LookupReply(length=5))[:9])
    played.end.close()
    assert all(isinstance(caller.done().error, SessionLost) for caller in callers)
    assert isinstance(Caller(played.wire).done().error, SessionLost)


FLOOD = """
import socket
end, frames = socket.socket(fileno=0), bytes.fromhex("080000000000000063000000") * 20_000
end.setblocking(True)
while True:
    end.send(frames)
"""


def test_answers_of_others_without_end(played: Played) -> None:
    """A caller whose turn it was to read read for as long as anything came, past its deadline."""
    caller = Caller(played.wire, SHORT_S)
    played.request()
    flood = subprocess.Popen(
        [sys.executable, "-c", FLOOD], stdin=played.end.fileno(), stderr=subprocess.DEVNULL
    )
    caller.join(LONG_S / 4)
    flood.kill()
    flood.wait()
    assert isinstance(caller.done().error, DeadlineExceeded)
    assert caller.took_s < LONG_S / 4


def with_events(patch: pytest.MonkeyPatch, make: Callable[[], threading.Event]) -> None:
    """Have the connection's callers sleep on events of ours: they hold a thread up just where it
    would otherwise be held up once in a million times."""
    ours = types.SimpleNamespace(Event=make, Lock=threading.Lock, Thread=threading.Thread)
    patch.setattr(wire, "threading", ours)


def test_nobody_sleeps_through_an_answer(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that was handed over just when its caller went to sleep did not wake it: the caller
    slept until its deadline, with the answer there, and then returned it."""
    about_to_sleep = threading.Event()

    def make() -> threading.Event:
        about_to_sleep.set()
        call = list(played.wire._calls.values())[1]
        wait_for(lambda: call.answer is not None, "the answer to be handed over")
        return threading.Event()

    reader = Caller(played.wire)
    first = played.request()[1]
    with_events(monkeypatch, make)
    sleeper = Caller(played.wire, 3.0)
    second = played.request()[1]
    assert about_to_sleep.wait(LONG_S)
    played.answer(second, pb.LookupReply(length=2))
    assert sleeper.done().length == 2
    assert sleeper.took_s < 2.0
    played.answer(first, pb.LookupReply(length=1))
    assert reader.done().length == 1


def test_who_leaves_late_hands_the_reading_on(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader left and woke a caller that was just leaving too: nobody read any more, and the
    others slept until their deadlines although their answers had arrived."""
    reader = Caller(played.wire, 2 * SHORT_S)
    played.request()

    class Leaving(threading.Event):
        """Its sleeper has missed its deadline, and goes only after the reader has gone."""

        def wait(self, timeout: float | None = None) -> bool:
            found = super().wait(timeout)
            reader.join(LONG_S)
            return found

    events = iter([Leaving(), threading.Event()])
    with_events(monkeypatch, lambda: next(events))
    leaving = Caller(played.wire, SHORT_S)
    call = played.wire._calls[played.request()[1]]
    wait_for(lambda: call.wake is not None, "the second to sleep")
    staying = Caller(played.wire, 3.0)
    number = played.request()[1]
    other = played.wire._calls[number]
    wait_for(lambda: other.wake is not None, "the third to sleep")
    for caller in (reader, leaving):
        assert isinstance(caller.done().error, DeadlineExceeded)
    played.answer(number, pb.LookupReply(length=3))
    assert staying.done().length == 3
    assert staying.took_s < 2.0


def test_many_callers_at_once(played: Played) -> None:
    count = itertools.count(1)

    def serve() -> None:
        with contextlib.suppress(AssertionError, OSError):
            while True:
                played.answer(played.request()[1], pb.LookupReply(length=next(count)))

    server = threading.Thread(target=serve, daemon=True)
    server.start()
    callers = [Caller(played.wire) for _ in range(200)]
    assert sorted(caller.done().length or 0 for caller in callers) == list(range(1, 201))
    assert max(caller.took_s for caller in callers) < LONG_S / 4
    played.wire.close()
    server.join(LONG_S)


def test_a_late_grant_is_given_back(played: Played) -> None:
    """And the threads that wait for something else are not disturbed."""
    for verb, reply, undo, request in (
        (pb.ACQUIRE, pb.AcquireReply(lease=7), pb.RELEASE, pb.AcquireRequest()),
        (pb.RESERVE, pb.ReserveReply(lease=8), pb.ABORT, pb.ReserveRequest()),
    ):
        deadline = time.monotonic() + SHORT_S
        with pytest.raises(DeadlineExceeded):
            played.wire.call(verb, request, type(reply), deadline)
        number = played.request()[1]
        other = Caller(played.wire)
        others = played.request()[1]
        played.answer(number, reply)
        end_verb, end_number, body = played.request()
        assert (end_verb, pb.ReleaseRequest.FromString(body).lease) == (undo, reply.lease)
        played.answer(others, pb.LookupReply(length=4))
        assert other.done().length == 4
        played.answer(end_number, pb.ReleaseReply(held=True))
    assert played.wire.dead is None


def test_many_late_grants(played: Played) -> None:
    for _ in range(5):
        with pytest.raises(DeadlineExceeded):
            deadline = time.monotonic() + 0.01
            played.wire.call(pb.ACQUIRE, pb.AcquireRequest(), pb.AcquireReply, deadline)
    numbers = [played.request()[1] for _ in range(5)]
    for number in numbers[::-1]:
        played.answer(number, pb.AcquireReply(lease=100 + number))
    released = set()
    for _ in range(5):
        _, number, body = played.request()
        released.add(pb.ReleaseRequest.FromString(body).lease - 100)
        played.answer(number, pb.ReleaseReply(held=True))
    assert released == set(numbers)


def test_an_interrupted_call(played: Played) -> None:
    """Ctrl-C while an acquire waits: its lease is given back, and the connection goes on."""

    class Interrupted(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, SHORT_S)
        with pytest.raises(Interrupted):
            deadline = time.monotonic() + LONG_S
            played.wire.call(pb.ACQUIRE, pb.AcquireRequest(), pb.AcquireReply, deadline)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    played.answer(played.request()[1], pb.AcquireReply(lease=9))
    verb, number, body = played.request()
    assert (verb, pb.ReleaseRequest.FromString(body).lease) == (pb.RELEASE, 9)
    played.answer(number, pb.ReleaseReply(held=True))


def clog(wire: Wire) -> None:
    """Send until nothing more goes out; the daemon does not read."""
    request = pb.LookupRequest(keys=pb.Keys(hashes=bytes(1_000)))
    sent = 0
    with contextlib.suppress(DeadlineExceeded):
        while True:
            before = len(wire._calls)
            wire._send(_request_frame(request), time.monotonic() + SHORT_S)
            sent += 1
            assert before == 0 and sent < 10_000


def _request_frame(request: Any) -> bytes:
    body: bytes = request.SerializeToString()
    return HEADER.pack(AFTER_LENGTH + len(body), pb.LOOKUP, 0, 0, 0) + body


def _bounded(call: Callable[[], object]) -> float:
    started = time.monotonic()
    with pytest.raises((DeadlineExceeded, SessionLost)):
        call()
    return time.monotonic() - started


def test_half_a_request_out_ends_the_connection(played: Played) -> None:
    """Nothing sensible can follow it. A request of which nothing went out harms nobody."""
    large = pb.LookupRequest(keys=pb.Keys(hashes=bytes(4 << 20)))
    took = _bounded(
        lambda: played.wire.call(pb.LOOKUP, large, pb.LookupReply, time.monotonic() + SHORT_S)
    )
    assert SHORT_S <= took < 10 * SHORT_S
    assert played.wire.dead == "a request could not be sent as a whole"
    assert isinstance(Caller(played.wire).done().error, SessionLost)


def test_releases_by_many_threads(played: Played) -> None:
    """They share the connection without waiting: two that looked for its end at the same time, with
    one poll object, got RuntimeError. After the end none of them has held."""

    def release(leases: range, held: list[bool]) -> None:
        held += [played.wire.release(lease, time.monotonic() + LONG_S) for lease in leases]

    def all_of_them() -> list[bool]:
        held: list[bool] = []
        threads = [
            threading.Thread(target=release, args=(range(at, 4_000, 8), held)) for at in range(8)
        ]
        for thread in threads:
            thread.start()
        if played.wire.dead is None and not ended:
            found = {played.request() for _ in range(4_000)}
            leases = {pb.ReleaseRequest.FromString(body).lease for _, _, body in found}
            assert leases == set(range(4_000))
            assert {(verb, number) for verb, number, _ in found} == {(pb.RELEASE, 0)}
        for thread in threads:
            thread.join(LONG_S)
        return held

    ended = False
    assert all_of_them() == [True] * 4_000
    played.end.close()
    ended = True
    assert all_of_them() == [False] * 4_000


@pytest.mark.parametrize(
    ("verb", "request_class", "ends"),
    [
        (pb.COMMIT, pb.CommitRequest, True),
        (pb.ABORT, pb.AbortRequest, True),
        (pb.RELEASE, pb.ReleaseRequest, True),
        (pb.STATS, pb.StatsRequest, False),
    ],
)
def test_the_end_of_a_lease_that_cannot_be_sent(
    played: Played, verb: int, request_class: Any, ends: bool
) -> None:
    """The daemon took no requests, and a release never went out: the lease lived for as long as the
    client. It ends with the connection."""
    clog(played.wire)
    if played.wire.dead is not None:
        pytest.skip("half a request went out: the connection has ended already")
    _bounded(
        lambda: played.wire.call(verb, request_class(), pb.StatsReply, time.monotonic() + SHORT_S)
    )
    assert (played.wire.dead is not None) == ends


def test_closing_while_others_wait(played: Played) -> None:
    """The socket was closed under its readers: the number of its descriptor might belong to the
    next connection before they noticed. It stays open until the last has left."""
    callers = [Caller(played.wire) for _ in range(4)]
    for _ in callers:
        played.request()
    played.wire.close("the test closes it")
    for caller in callers:
        error = caller.done().error
        assert isinstance(error, SessionLost) and "the test closes it" in str(error)
        assert caller.took_s < LONG_S / 4
    assert played.wire._socket.fileno() == -1
    assert played.end.recv(1) == b""


def test_a_daemon_that_may_be_asleep_is_woken_and_one_that_just_answered_is_not(
    played: Played,
) -> None:
    played.wire.wake()
    assert played.request() == (pb.WAKE, wire.NO_ANSWER, b"")
    played.wire._heard = time.monotonic() + LONG_S  # an answer came
    played.wire.wake()
    played.wire._heard = 0.0
    played.wire.release(7, time.monotonic() + LONG_S)
    assert played.request()[0] == pb.RELEASE, "nothing between"


def test_waking_neither_waits_nor_fails(played: Played) -> None:
    wire_ = played.wire
    with wire_._sending:  # another thread sends: its request wakes as well
        wire_.wake()
    played.end.close()
    wire_.wake()
    wire_.close()
    wire_.wake()
    assert wire_._users == 0
    assert wire_._socket.fileno() == -1
