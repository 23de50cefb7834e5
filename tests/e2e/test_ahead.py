"""Single blocks are copied to a slot that was lent while the daemon is asked: the right bytes under
each hash, whatever it answers, and nothing stays lent for ever."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

from kvstore.client import Cache, Client, ahead
from kvstore.client import copying as copying_module
from kvstore.errors import DeadlineExceeded, InvalidRequest, Unavailable
from kvstore.protos import kvstore_pb2 as pb
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import (
    MIB,
    Daemon,
    content,
    contents,
    hashes,
    layout,
    targets,
    wait_for,
)
from tests.e2e.raw import Stranger, open_layout, packed, stranger
from tests.soak.children import Child

SIZE = ahead.LEAST_BYTES
KEYS = hashes(8, "ahead")
LAYOUT = layout("ahead", shard_bytes=SIZE)


@pytest.fixture
def daemon(make_daemon: MakeDaemon) -> Daemon:
    """DRAM holds 512 of the blocks: two slots may be lent."""
    return make_daemon(dram={"size": 128 * MIB, "slab_size": 8 * MIB}, nvme={"size": "0"}).start()


@pytest.fixture
def cache(daemon: Daemon) -> Cache:
    return daemon.client().open(LAYOUT)


class Copies:
    """What was copied ahead, and what is to happen before that."""

    def __init__(self) -> None:
        self.count = 0
        self.before: Callable[[], object] = lambda: None

    def copy(self, target: int, source: int, size: int) -> None:
        self.count += 1
        self.before()
        copying_module.copy(target, source, size)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    found = Copies()
    monkeypatch.setattr(ahead, "copy", found.copy)
    return found


def put(cache: Cache, key: bytes) -> tuple[int, int, int]:
    done = cache.put([key], [content(key, SIZE)])
    return done.stored, done.present, done.refused


def assert_there(cache: Cache, keys: list[bytes]) -> None:
    """Read by another client, who asks for them."""
    with Client(cache.client.path, 5.0) as other:
        into = targets(len(keys), SIZE)
        assert other.open(LAYOUT).get(keys, into).length == len(keys)
        assert into == contents(keys, SIZE)


def at_commit(
    cache: Cache,
    monkeypatch: pytest.MonkeyPatch,
    around: Callable[[], AbstractContextManager[None]],
) -> None:
    """Have the next commit sent with something around it."""
    wire = cache.client.session(cache.client.deadline()).wire
    assert wire is not None
    call = wire.call

    def patched(verb: int, *rest: object) -> object:
        if verb != pb.COMMIT:
            return call(verb, *rest)  # type: ignore[arg-type]
        monkeypatch.undo()
        with around():
            return call(verb, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(wire, "call", patched)


def lent(daemon: Daemon) -> int:
    found: int = daemon.stats().blocks.lent
    return found


def test_blocks_one_by_one(daemon: Daemon, cache: Cache, copies: Copies) -> None:
    assert [put(cache, key) for key in KEYS] == [(1, 0, 0)] * len(KEYS)
    assert copies.count == len(KEYS) - 1  # nothing was lent before the first
    assert_there(cache, KEYS)
    stats = daemon.stats()
    assert stats.blocks.stored == stats.tiers.dram.blocks == stats.blocks.known == len(KEYS)
    assert stats.tiers.dram.used_bytes == (len(KEYS) + 1) * SIZE
    assert (stats.blocks.lent, stats.leases, stats.blocks.aborted) == (1, 0, 0)
    into = targets(1, SIZE)  # the writer reads what it wrote without asking
    assert cache.get(KEYS[-1:], into).length == 1 and into == contents(KEYS[-1:], SIZE)
    assert daemon.stats().requests.used == 1


def test_hints_and_parents_are_told(daemon: Daemon, cache: Cache, copies: Copies) -> None:
    put(cache, KEYS[0])
    done = cache.put(
        [KEYS[1]], [content(KEYS[1], SIZE)], parent=KEYS[0], hints={"reuse": "continue"}
    )
    assert done.stored == copies.count == 1
    with pytest.raises(InvalidRequest, match="unknown hint"):
        cache.put([KEYS[2]], [bytes(SIZE)], hints={"use": "never"})
    assert put(cache, KEYS[2]) == (1, 0, 0) and copies.count == 2, "the slot was lost"
    assert lent(daemon) == 1


def test_what_is_there_is_not_copied_again_and_again(
    daemon: Daemon, cache: Cache, copies: Copies
) -> None:
    put(cache, KEYS[0])
    put(cache, KEYS[1])
    before = copies.count
    assert [put(cache, KEYS[0]) for _ in range(4)] == [(0, 1, 0)] * 4
    assert copies.count == before + 1
    assert [put(cache, key) for key in KEYS[2:5]] == [(1, 0, 0)] * 3
    assert copies.count == before + 3
    assert_there(cache, KEYS[:5])
    assert lent(daemon) == 1


def test_somebody_else_stores_it_meanwhile(daemon: Daemon, cache: Cache, copies: Copies) -> None:
    """Its bytes stay as they are, and the slot is for the next one."""
    other = daemon.client().open(LAYOUT)
    put(cache, KEYS[0])
    writing = other.reserve(KEYS[1:2])
    assert put(cache, KEYS[1]) == (0, 1, 0) and copies.count == 1
    writing.view(0)[:] = content(KEYS[1], SIZE)
    assert writing.commit() == 1
    assert put(cache, KEYS[2]) == put(cache, KEYS[3]) == (1, 0, 0)
    assert_there(cache, KEYS[:4])


def test_it_is_forgotten_meanwhile(daemon: Daemon, cache: Cache, copies: Copies) -> None:
    other = daemon.client().open(LAYOUT)
    put(cache, KEYS[0])
    copies.before = lambda: other.client.clear()
    assert put(cache, KEYS[1])[1:] == (0, 0)
    copies.before = lambda: None
    assert put(cache, KEYS[2]) == (1, 0, 0)
    assert_there(cache, KEYS[2:3])


def test_two_layouts(daemon: Daemon, cache: Cache) -> None:
    """What was lent for one is given back for the other."""
    second = cache.client.open(layout("other", shard_bytes=2 * SIZE))
    for at, key in enumerate(KEYS):
        if at % 3:
            assert second.put([key], [content(key, 2 * SIZE)]).stored == 1
        else:
            assert put(cache, key) == (1, 0, 0)
    assert_there(cache, KEYS[::3])
    assert lent(daemon) == 1


def test_small_blocks_and_the_front_door_borrow_nothing(daemon: Daemon, copies: Copies) -> None:
    small = daemon.client().open(layout("small", shard_bytes=SIZE // 2))
    front = daemon.client("front").open(LAYOUT)
    for key in KEYS[:3]:
        assert small.put([key], [content(key, SIZE // 2)]).stored == 1
        assert put(front, key) == (1, 0, 0)
    assert copies.count == 0 == lent(daemon)


def test_many_threads(daemon: Daemon, cache: Cache, copies: Copies) -> None:
    """One of them has the slot at a time."""
    mine = [hashes(12, f"thread {at}") for at in range(4)]
    failed: list[object] = []

    def run(keys: list[bytes]) -> None:
        failed.extend(key for key in keys if put(cache, key) != (1, 0, 0))

    threads = [threading.Thread(target=run, args=(keys,)) for keys in mine]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and copies.count
    for keys in mine:
        assert_there(cache, keys)
    assert lent(daemon) <= 1


def test_who_closes_gives_it_back(daemon: Daemon) -> None:
    for at, key in enumerate(KEYS, 1):
        with daemon.client() as client:
            put(client.open(LAYOUT), key)
        wait_for(lambda: not daemon.stats().blocks.lent, "the slot to be free")
        stats = daemon.stats()
        assert stats.tiers.dram.used_bytes == at * SIZE
        assert stats.blocks.quarantined == stats.blocks.aborted == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_who_is_dropped_gives_it_back(daemon: Daemon) -> None:
    """A client that nobody closed: its slot would be kept aside while the process lives."""
    for at, key in enumerate(KEYS, 1):
        put(Client(daemon.socket(), 5.0).open(LAYOUT), key)
        gc.collect()
        wait_for(lambda: daemon.stats().sessions == 1, "the session to end")
        stats = daemon.stats()
        assert stats.tiers.dram.used_bytes == at * SIZE
        assert (stats.blocks.lent, stats.blocks.quarantined) == (0, 0)


def test_a_closed_session_keeps_nothing(daemon: Daemon, copies: Copies) -> None:
    """As where a client is closed while another thread of it puts."""
    for key in KEYS[1:]:
        client = daemon.client()
        cache = client.open(LAYOUT)
        put(cache, KEYS[0])
        session = client.session(client.deadline())
        session.close("the test closes it")
        assert session.take_spare(LAYOUT) is None
        session.keep_spare(LAYOUT, 0, 1 << 40, 0)
        assert session.take_spare(LAYOUT) is None
        assert put(cache, key) == (1, 0, 0)
        client.close()
    assert_there(daemon.client().open(LAYOUT), KEYS)
    wait_for(lambda: not lent(daemon), "slots to be free")


def test_a_copy_that_takes_longer_than_an_answer_may(daemon: Daemon, copies: Copies) -> None:
    """The daemon is no slower for it."""
    cache = daemon.client(timeout_s=0.3).open(LAYOUT)
    put(cache, KEYS[0])
    slow = threading.Event()
    copies.before = lambda: slow.wait(0.5)
    assert put(cache, KEYS[1]) == (1, 0, 0) and copies.count == 1


def test_large_blocks_are_copied_by_several_threads(
    make_daemon: MakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 16 * MIB
    large = make_daemon(dram={"size": 4096 * MIB, "preallocate": False}, nvme={"size": "0"})
    cache = large.start().client().open(layout("large", shard_bytes=size))
    shared: list[int] = []

    def copy_all(copies: list[tuple[int, int, int]]) -> None:
        shared.append(copies[0][2])
        copying_module.copy_all(copies)

    monkeypatch.setattr(ahead, "copy_all", copy_all)
    for key in KEYS[:2]:
        assert cache.put([key], [content(key, size)]).stored == 1
    into = targets(2, size)
    assert cache.get(KEYS[:2], into).length == 2 and into == contents(KEYS[:2], size)
    assert shared == [size]


def test_who_dies_loses_it(daemon: Daemon) -> None:
    def engine() -> None:
        cache = Client(daemon.socket(), 5.0).open(LAYOUT)
        put(cache, KEYS[0])
        signal.pause()
        assert cache

    child = Child(engine)
    try:
        wait_for(lambda: daemon.stats().blocks.stored, "a block to be stored")
        assert lent(daemon) == 1
    finally:
        child.kill()
    wait_for(lambda: daemon.stats().tiers.dram.used_bytes == SIZE, "the slot to be free")
    assert lent(daemon) == 0


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_restart(daemon: Daemon, cache: Cache, copies: Copies, how: str) -> None:
    """The slot was the old daemon's. The new one keeps it aside until it hears that it is not
    written any more."""
    put(cache, KEYS[0])
    daemon.stop() if how == "stop" else daemon.kill()
    daemon.start()
    assert put(cache, KEYS[1]) == (1, 0, 0) and copies.count == 0
    assert put(cache, KEYS[2]) == (1, 0, 0) and copies.count == 1
    assert_there(cache, KEYS[:3])
    wait_for(lambda: daemon.stats().tiers.dram.used_bytes == 4 * SIZE, "old slots to be free")
    assert daemon.stats().blocks.quarantined == 0


def test_the_daemon_dies_while_it_is_copied(daemon: Daemon, cache: Cache, copies: Copies) -> None:
    """It is stored through the next one. A slot is not free while it is written."""
    put(cache, KEYS[0])

    def die() -> None:
        copies.before = lambda: None
        daemon.kill()
        daemon.start()

    copies.before = die
    assert put(cache, KEYS[1]) == (1, 0, 0)
    assert put(cache, KEYS[2]) == (1, 0, 0)
    assert_there(cache, KEYS[:3])
    wait_for(lambda: daemon.stats().tiers.dram.used_bytes == 4 * SIZE, "old slots to be free")


def test_the_daemon_dies_before_the_commit(
    daemon: Daemon, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(cache, KEYS[0])

    @contextlib.contextmanager
    def killed() -> Iterator[None]:
        daemon.kill()
        yield

    at_commit(cache, monkeypatch, killed)
    with pytest.raises(Unavailable, match="no daemon at"):
        put(cache, KEYS[1])
    daemon.start()
    assert put(cache, KEYS[1]) == (1, 0, 0)
    assert_there(cache, KEYS[:2])


def test_a_daemon_that_is_late(daemon: Daemon, copies: Copies) -> None:
    """It stores the block all the same, which was sent as a whole; and lends nobody a slot."""
    cache = daemon.client(timeout_s=0.4).open(LAYOUT)
    put(cache, KEYS[0])
    with daemon.suspended(), pytest.raises(DeadlineExceeded):
        put(cache, KEYS[1])
    wait_for(lambda: not daemon.stats().blocks.lent, "the slot to be free")
    stats = daemon.stats()
    assert stats.leases == 0 and stats.tiers.dram.used_bytes == 2 * SIZE
    assert put(cache, KEYS[1]) == (0, 1, 0)
    assert put(cache, KEYS[2]) == put(cache, KEYS[3]) == (1, 0, 0)
    assert copies.count == 2
    assert_there(cache, KEYS[:4])


def test_a_daemon_that_is_late_and_has_it_already(daemon: Daemon, copies: Copies) -> None:
    """Then it grants nothing, and the slot is lent still."""
    cache = daemon.client(timeout_s=0.4).open(LAYOUT)
    put(cache, KEYS[0])
    with daemon.suspended(), pytest.raises(DeadlineExceeded):
        put(cache, KEYS[0])
    assert copies.count == 1
    wait_for(lambda: not daemon.stats().blocks.lent, "the slot to be free")
    assert put(cache, KEYS[1]) == (1, 0, 0)


def test_a_commit_that_is_late(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lends a slot to nobody."""
    cache = daemon.client(timeout_s=0.4).open(LAYOUT)
    put(cache, KEYS[0])
    at_commit(cache, monkeypatch, daemon.suspended)
    with pytest.raises(DeadlineExceeded):
        put(cache, KEYS[1])
    wait_for(lambda: not daemon.stats().blocks.lent, "the slot to be free")
    assert_there(cache, KEYS[:2])


def test_an_interrupt_while_it_is_copied(daemon: Daemon, cache: Cache, copies: Copies) -> None:
    put(cache, KEYS[0])

    def interrupt() -> None:
        copies.before = lambda: None
        raise KeyboardInterrupt

    copies.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        put(cache, KEYS[1])
    wait_for(lambda: daemon.stats().leases == 0, "the grant to be undone")
    assert lent(daemon) == 1 and daemon.stats().tiers.dram.used_bytes == 2 * SIZE
    assert not cache.client.session(cache.client.deadline()).writing
    assert put(cache, KEYS[1]) == (1, 0, 0)
    assert_there(cache, KEYS[:2])


def test_a_slot_that_is_not_lent_any_more(daemon: Daemon, cache: Cache, copies: Copies) -> None:
    """Nothing is committed that was copied there; the block goes where the daemon says."""
    put(cache, KEYS[0])
    session = cache.client.session(cache.client.deadline())
    spare = session.take_spare(LAYOUT)
    assert spare is not None and session.wire is not None
    session.wire.give_back(spare.lease)
    wait_for(lambda: not daemon.stats().blocks.lent, "the slot to be free")
    taken = daemon.client().open(LAYOUT).reserve(KEYS[4:5])
    session.keep_spare(*spare)
    assert taken.extents[0].offset == spare.offset
    # The copy would go to a slot that is another client's now: only a client at fault does that.
    session.take_spare(LAYOUT)
    session.keep_spare(LAYOUT, spare.number, spare.lease, spare.offset + 99 * SIZE)
    assert put(cache, KEYS[1]) == (1, 0, 0) and copies.count == 1
    stats = daemon.stats()
    assert stats.tiers.dram.used_bytes == 4 * SIZE, "two blocks, one that is written, one lent"
    assert (stats.blocks.stored, stats.leases, stats.blocks.lent) == (2, 1, 1)
    taken.abort()
    assert_there(cache, KEYS[:2])


def test_memory_full_of_leases(daemon: Daemon, cache: Cache) -> None:
    put(cache, KEYS[0])
    rest = hashes(600, "rest")
    held = daemon.client().open(LAYOUT).reserve(rest, deadline_s=0)
    assert held.refused
    assert put(cache, KEYS[1]) == (1, 0, 0), "it has its slot"
    held.abort()
    assert put(cache, KEYS[2]) == put(cache, KEYS[3]) == (1, 0, 0)
    assert_there(cache, KEYS[3:4])  # others may have had to leave


@pytest.mark.parametrize("door", ["hatch", "front"])
def test_a_client_of_any_kind_can_borrow(daemon: Daemon, door: str) -> None:
    """As the protocol says, through either door; nobody uses another's slot, or one twice."""
    other = stranger(daemon, door)
    other.attach(pid=os.getpid())
    number = open_layout(other, LAYOUT)
    thief = stranger(daemon, door)
    thief.attach(pid=os.getpid())
    assert open_layout(thief, LAYOUT) == number

    def reserve(who: Stranger, at: int, lent: int = 0) -> Any:
        keys = packed(number, KEYS[at : at + 1])
        return who.call(pb.RESERVE, pb.ReserveRequest(keys=keys, lend=True, lent=lent))

    def commit(lease: int) -> Any:
        return other.call(pb.COMMIT, pb.CommitRequest(lease=lease))

    first = reserve(other, 0)
    done = commit(first.lease)
    assert done.held and done.lent and done.lent_offset % SIZE == 0
    stolen = reserve(thief, 1, done.lent)
    assert stolen.lease and int.from_bytes(stolen.offsets, "little") != done.lent_offset
    second = reserve(other, 2, done.lent)
    assert second.lease == done.lent
    assert int.from_bytes(second.offsets, "little") == done.lent_offset
    again = reserve(other, 3, done.lent)  # it is a block's by now
    assert again.lease not in (0, done.lent)
    done = commit(second.lease)
    assert done.stored == 1 and done.lent not in (0, second.lease)
    assert reserve(other, 2, done.lent).lease == 0
    given_back = commit(done.lent)
    assert given_back.held and (given_back.stored, given_back.lent) == (0, 0)
    assert not commit(done.lent).held
    for one in (other, thief):
        one.close()
    wait_for(lambda: daemon.stats().sessions == 1, "the sessions to end")


def test_a_child_after_a_fork_gives_nothing_back(daemon: Daemon, cache: Cache) -> None:
    put(cache, KEYS[0])
    child = os.fork()
    if not child:
        cache.client.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert lent(daemon) == 1
    assert put(cache, KEYS[1]) == (1, 0, 0)
    assert_there(cache, KEYS[:2])
