"""A disk that hangs: nobody waits longer than his deadline, memory is served, the disk comes back.

An I/O that never ends says nothing, not even that it failed. So the tier is fenced when one takes
longer than `nvme.hang_timeout`, and used again when what hung has ended and a probe has worked.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvstore.client import Cache
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import KIB, Daemon, content, contents, hashes, layout, targets, wait_for

SIZE = 64 * KIB
COUNT = 200  # 128 of them fit into DRAM
HANG_S = 0.4
LATE_S = 0.1  # that a call may take beyond its deadline
PAUSE_S = 1.0  # that this host may hold a test up, once
FENCED_S = 10.0
BACK_S = 40.0  # the longest pause between two probes, and more


class Clock:
    """Looks at how long calls take beyond their deadlines."""

    def __init__(self) -> None:
        self.late_s: list[float] = []

    @contextmanager
    def call(self, deadline_s: float) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.late_s.append(time.monotonic() - started - deadline_s)

    def check(self, calls: int) -> None:
        """No call was late. One may have been if it was the host that stood still."""
        assert len(self.late_s) >= calls
        *others, latest = sorted(self.late_s)
        assert latest < LATE_S + PAUSE_S, f"{latest:.3f} s late"
        assert max(others) < LATE_S, f"{[round(late, 3) for late in others[-5:]]} s late"


def get(cache: Cache, key: bytes, deadline_s: float) -> int:
    """How many blocks were served, the bytes compared."""
    into = targets(1, SIZE)
    got = cache.get([key], into, deadline_s=deadline_s)
    assert got.length == 0 or bytes(into[0]) == content(key, SIZE)
    return got.length


def is_fenced(daemon: Daemon) -> bool:
    return bool(daemon.stats().tiers.nvme.fenced)


@pytest.fixture
def hanging(make_daemon: MakeDaemon) -> Daemon:
    daemon = make_daemon(dram={"size": "8 MiB"}, nvme={"hang_timeout": f"{HANG_S} s"})
    daemon.gated = True
    return daemon.start()


def fill(daemon: Daemon, door: str) -> tuple[Cache, list[bytes], list[bytes]]:
    """A cache, the blocks that are in memory, and those that are on NVMe alone."""
    cache = daemon.client(door).open(layout("hanging"))
    keys = hashes(COUNT, "hanging")
    assert cache.put(keys, contents(keys, SIZE), deadline_s=20).stored == COUNT
    assert daemon.settled().tiers.nvme.blocks == COUNT
    tiers = {key: cache.lookup([key]).tiers for key in keys}
    hot = [key for key in keys if tiers[key]["dram"]]
    cold = [key for key in keys if tiers[key]["nvme"]]
    assert len(hot) > 50 and len(cold) > 50
    return cache, hot, cold


def test_reads_that_hang(hanging: Daemon, door: str) -> None:
    cache, hot, cold = fill(hanging, door)
    clock = Clock()
    with hanging.hold("read"):
        started = time.monotonic()
        for turn, key in enumerate(cold[:10]):
            with clock.call(0.05):
                assert get(cache, key, 0.05) == 0
            with clock.call(0.0):
                assert get(cache, hot[turn], 0.0) == 1, "memory is served as before"
        wait_for(lambda: is_fenced(hanging), "the tier to be fenced", FENCED_S)
        assert time.monotonic() - started > HANG_S, "not before it was due"
        for turn, key in enumerate(cold[10:20]):
            with clock.call(0.0):  # although its deadline is far: there is nothing to wait for
                assert get(cache, key, 5.0) == 0
            assert cache.lookup([key]).length == 0
            with clock.call(0.0):
                assert get(cache, hot[turn], 0.0) == 1
        new = hashes(5, "while it hangs")
        with clock.call(1.0):
            assert cache.put(new, contents(new, SIZE), deadline_s=1.0).stored == 5
        assert get(cache, new[0], 0.0) == 1
        assert is_fenced(hanging), "a probe would hang as well"
    wait_for(lambda: not is_fenced(hanging), "the tier to work again", BACK_S)
    for key in cold[:20]:
        assert get(cache, key, 10.0) == 1
    clock.check(41)
    assert hanging.settled().tiers.nvme.corrupt == 0
    assert "NVMe tier is fenced" in hanging.log() and "NVMe tier works again" in hanging.log()


def test_writes_that_hang(hanging: Daemon) -> None:
    cache = hanging.client().open(layout("hanging"))
    first, others = hashes(20, "first"), hashes(300, "others")
    clock = Clock()
    with hanging.hold("write"):
        with clock.call(0.5):
            assert cache.put(first, contents(first, SIZE), deadline_s=0.5).stored == 20
        wait_for(lambda: is_fenced(hanging), "the tier to be fenced", FENCED_S)
        for at in range(0, len(others), 20):  # more than memory holds: nothing waits for the disk
            some = others[at : at + 20]
            with clock.call(0.5):
                assert cache.put(some, contents(some, SIZE), deadline_s=0.5).stored > 0
        for key in others[-20:]:
            with clock.call(0.0):
                assert get(cache, key, 0.0) == 1
    wait_for(lambda: not is_fenced(hanging), "the tier to work again", BACK_S)
    stats = hanging.settled()
    clock.check(36)
    wait_for(lambda: hanging.stats().moves.due == 0, "what is in memory to be saved", 20)
    assert hanging.stats().tiers.nvme.blocks >= stats.tiers.dram.blocks
    there = [key for key in others if cache.lookup([key]).length]
    assert len(there) > 100
    for key in there:
        assert get(cache, key, 10.0) == 1


def test_a_hang_that_ends_in_time_is_only_slow(hanging: Daemon) -> None:
    cache, _, cold = fill(hanging, "hatch")
    with hanging.hold("read"):
        assert get(cache, cold[0], 0.05) == 0
    assert get(cache, cold[0], 10.0) == 1
    assert hanging.settled().tiers.nvme.fenced is False
    assert "fenced" not in hanging.log()


def test_a_disk_that_fails_at_random(make_daemon: MakeDaemon) -> None:
    """The section of soak runs: whatever befalls the disk, what is served is right."""
    chances = ("read_error", "write_error", "sync_error", "enospc", "short", "torn", "flip", "slow")
    faults: dict[str, object] = dict.fromkeys(chances, 0.04)
    faults |= {"hang": 0.002, "hang_time": "200 ms", "latency": "2 ms", "seed": 11}
    daemon = make_daemon(dram={"size": "8 MiB"}, faults=faults).start()
    assert "[faults] is set" in daemon.log()
    client = daemon.client()
    cache = client.open(layout("random"))
    keys = hashes(300, "random")
    served = 0
    for at in range(0, len(keys), 20):
        some = keys[at : at + 20]
        cache.put(some, contents(some, SIZE), deadline_s=2.0)
        served += sum(get(cache, key, 1.0) for key in keys[: at + 20 : 7])
    client.verify(deadline_s=30)
    stats = daemon.stats()
    assert served > 100
    assert stats.tiers.nvme.corrupt > 0 and stats.tiers.nvme.failed > 0
    wait_for(lambda: not is_fenced(daemon), "the tier to be used again", BACK_S)
    more = hashes(20, "and then")
    assert cache.put(more, contents(more, SIZE), deadline_s=5.0).stored == 20
    assert all(get(cache, key, 1.0) for key in more)
