"""One client, many threads: every answer reaches its caller, and who waits keeps nobody waiting."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvstore.client import Cache
from kvstore.errors import KVStoreError, Unavailable
from tests.e2e.harness import Daemon, content, contents, hashes, layout, targets, wait_for

SIZE = 16 << 10
THREADS = 16
CHAINS = 8  # of blocks that are to be found on NVMe: one for each test of them


def together(count: int, work: Callable[[int], None]) -> None:
    """Run `work` in threads at once; the first exception of any is raised."""
    failures: list[BaseException] = []
    start = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            start.wait(10)
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a caller hangs"
    if failures:
        raise failures[0]


def test_sixteen_threads_of_one_client(shared: Daemon, door: str) -> None:
    with shared.client(door) as client:
        cache = client.open(layout(f"threads {door}", shard_bytes=SIZE))

        def work(number: int) -> None:
            rng = random.Random(number)
            mine = hashes(8, f"{door} {number}")
            assert cache.put(mine, contents(mine, SIZE)).stored == 8
            for _ in range(20):
                count = rng.randint(1, 8)
                into = targets(count, SIZE)
                assert cache.lookup(mine[:count] + hashes(1, "absent")).length == count
                assert cache.get(mine[:count], into).length == count
                assert [bytes(one) for one in into] == contents(mine[:count], SIZE)
                with cache.acquire(mine[-count:]) as grant:
                    assert bytes(grant.view(count - 1)) == content(mine[-1], SIZE)
                    assert grant.release()
            assert cache.forget(mine) == 8

        together(THREADS, work)
        assert client.stats().tenants.default.leases == 0
    assert shared.settled().blocks.known == 0


def test_one_block_for_all(shared: Daemon, door: str) -> None:
    """Sixteen threads store the same blocks at once: each is stored by one of them."""
    with shared.client(door) as client:
        cache = client.open(layout(f"same {door}", shard_bytes=SIZE))
        keys = hashes(32, f"same {door}")
        stored: list[int] = []

        def work(number: int) -> None:
            order = random.Random(number).sample(keys, len(keys))
            stored.append(cache.put(order, contents(order, SIZE)).stored)

        together(THREADS, work)
        assert sum(stored) == 32
        into = targets(32, SIZE)
        assert cache.get(keys, into).length == 32
        assert [bytes(one) for one in into] == contents(keys, SIZE)
        assert cache.forget(keys) == 32


@pytest.fixture(scope="module")
def gated() -> Iterator[Daemon]:
    """A daemon that was started again, so that its chains are on NVMe alone, where reads can be
    held up."""
    with Daemon() as daemon:
        daemon.gated = True
        daemon.start()
        with daemon.client() as client:
            for chain in range(CHAINS):
                keys = hashes(20, f"cold {chain}")
                client.open(layout("cold", shard_bytes=SIZE)).put(keys, contents(keys, SIZE))
        daemon.stop()
        daemon.lose_memory()
        yield daemon.start()


@pytest.fixture(scope="module")
def chains() -> Iterator[int]:
    return iter(range(CHAINS))


@pytest.fixture
def cold(gated: Daemon, chains: Iterator[int]) -> tuple[Daemon, list[bytes]]:
    """That daemon, and a chain of 20 blocks that nobody has asked for yet."""
    if gated.process is None:  # the test before killed it
        gated.start()
    return gated, hashes(20, f"cold {next(chains)}")


def waiting(cache: Cache, keys: list[bytes]) -> tuple[threading.Thread, list[object]]:
    """A thread that waits in an acquire, and where its outcome will be."""
    outcome: list[object] = []

    def acquire() -> None:
        try:
            outcome.append(cache.acquire(keys, deadline_s=30))
        except KVStoreError as error:
            outcome.append(error)

    thread = threading.Thread(target=acquire, daemon=True)
    thread.start()
    return thread, outcome


def test_who_waits_keeps_nobody_waiting(cold: tuple[Daemon, list[bytes]], door: str) -> None:
    daemon, keys = cold
    cache = daemon.client(door).open(layout("cold", shard_bytes=SIZE))
    warm = hashes(5, "warm")
    cache.put(warm, contents(warm, SIZE))
    with daemon.hold("read"):
        thread, outcome = waiting(cache, keys)
        wait_for(lambda: daemon.stats().moves.loads == 20, "the loads to be ordered")
        times = []
        for _ in range(100):
            started = time.monotonic()
            assert cache.lookup(warm).length == 5
            times.append(time.monotonic() - started)
        into = targets(5, SIZE)
        assert cache.get(warm, into).length == 5
        assert sorted(times)[50] < 0.05, "lookups wait for somebody else's load"
        assert thread.is_alive() and not outcome
    thread.join(10)
    grant = outcome[0]
    assert not isinstance(grant, Exception)
    assert (grant.length, dict(grant.tiers)) == (20, {"nvme": 20})  # type: ignore[attr-defined]
    assert [bytes(grant.view(at)) for at in range(20)] == contents(keys, SIZE)  # type: ignore[attr-defined]
    assert grant.release()  # type: ignore[attr-defined]


def test_a_deadline_that_comes_before_the_load(cold: tuple[Daemon, list[bytes]], door: str) -> None:
    """Loading goes on without the caller, who asks again later and finds the blocks in memory."""
    daemon, keys = cold
    cache = daemon.client(door).open(layout("cold", shard_bytes=SIZE))
    with daemon.hold("read"):
        started = time.monotonic()
        with cache.acquire(keys, deadline_s=0.1) as grant:
            assert (grant.length, grant.stop) == (0, "late")
        assert 0.098 <= time.monotonic() - started < 1.0  # the loop counts in milliseconds
        assert cache.acquire(keys, deadline_s=0).stop == "late"
        assert cache.get(keys, targets(20, SIZE), deadline_s=0.05).length == 0
        assert daemon.stats().moves.loads == 20, "ordered once, not four times"
        assert daemon.stats().leases == 0
    wait_for(lambda: cache.lookup(keys).tiers["dram"] == 20, "the blocks to come up")
    into = targets(20, SIZE)
    assert cache.get(keys, into).length == 20
    assert [bytes(one) for one in into] == contents(keys, SIZE)


def test_closing_wakes_who_waits(cold: tuple[Daemon, list[bytes]], door: str) -> None:
    daemon, keys = cold
    client = daemon.client(door)
    cache = client.open(layout("cold", shard_bytes=SIZE))
    before = daemon.stats().requests.acquire
    with daemon.hold("read"):
        waiters = [waiting(cache, keys) for _ in range(4)]
        wait_for(lambda: daemon.stats().requests.acquire == before + 4, "all to wait")
        started = time.monotonic()
        client.close()
        for thread, outcome in waiters:
            thread.join(5)
            assert isinstance(outcome[0], Unavailable), outcome
        assert time.monotonic() - started < 2
        wait_for(lambda: daemon.stats().leases == 0, "their leases to end")


def test_a_dying_daemon_wakes_who_waits(cold: tuple[Daemon, list[bytes]], door: str) -> None:
    daemon, keys = cold
    cache = daemon.client(door).open(layout("cold", shard_bytes=SIZE))
    before = daemon.stats().requests.acquire
    with daemon.hold("read"):
        waiters = [waiting(cache, keys) for _ in range(4)]
        wait_for(lambda: daemon.stats().requests.acquire == before + 4, "all to wait")
        daemon.kill()
        for thread, outcome in waiters:
            thread.join(5)
            assert isinstance(outcome[0], Unavailable), outcome
