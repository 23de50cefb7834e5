"""CUDA copies that are late or fail, or whose daemon dies: what the caller and the slots get."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import numpy as np
import pytest

from kvstore.client import Cache
from kvstore.client.cuda import LATE_MAX, Copier, Direction, Fragments
from kvstore.client.cuda_fragments import Way
from kvstore.client.cuda_setup import Abilities, measure
from kvstore.errors import Unavailable
from tests.client.fake_device import ENGINE, SIZE, FakeDevice, bytes_of, empty, on_device, ready
from tests.e2e.harness import Daemon, content, contents, hashes, layout, targets, wait_for

SLACK_S = 2.5  # of a scheduler with other work: what hangs takes longer than any of this


# -- order and deadlines -----------------------------------------------------------------------


def test_a_store_comes_after_what_the_engine_computes(
    cache: Cache, copier: Copier, device: FakeDevice
) -> None:
    ready(cache, copier)
    keys = hashes(2, "computed")
    blocks = on_device([b"\0" * SIZE] * 2)
    device.hold(ENGINE)
    for key, block in zip(keys, blocks, strict=True):
        device.given(
            ENGINE,
            lambda b=block, k=key: b.array.__setitem__(  # type: ignore[misc]
                slice(None), np.frombuffer(content(k, SIZE), "u1")
            ),
        )
    stored: list[int] = []
    thread = threading.Thread(target=lambda: stored.append(cache.put(keys, blocks).stored))
    thread.start()
    wait_for(lambda: any(s.queue for n, s in device.streams.items() if n >= 100), "the copy")
    assert not stored
    device.release(ENGINE)
    thread.join()
    assert stored == [2]
    into = targets(2, SIZE)
    assert cache.get(keys, into).length == 2
    assert [bytes(one) for one in into] == contents(keys, SIZE)


def test_a_late_load_is_a_miss_and_comes_before_what_the_engine_does_next(
    cache: Cache, copier: Copier, device: FakeDevice, daemon: Daemon
) -> None:
    """Else it would come over what the engine computes after the miss. And the lease lasts until
    the device has read all: the slots are nobody else's before."""
    ready(cache, copier)
    cache.client.timeout_s = 0.3
    keys = hashes(3, "late")
    cache.put(keys, contents(keys, SIZE))
    device.hold_copies()
    into, began = empty(3), time.monotonic()
    assert cache.get(keys, into, deadline_s=0.0).length == 0
    assert 0.25 < time.monotonic() - began < 0.3 + SLACK_S
    assert (copier.counts["late"], copier.late) == (1, 1)
    assert daemon.stats().leases == 1
    computed: list[bytes] = []
    device.given(ENGINE, lambda: computed.append(into[0].array.tobytes()))
    assert not computed
    device.release_copies()
    assert computed == [content(keys[0], SIZE)], "the late copy came first"
    wait_for(lambda: not daemon.stats().leases, "the lease to end")
    wait_for(lambda: not copier.late, "the thread to forget it")
    assert cache.get(keys, into).length == 3 and bytes_of(into) == contents(keys, SIZE)


def test_a_late_store_is_never_committed(
    cache: Cache, copier: Copier, device: FakeDevice, daemon: Daemon
) -> None:
    """The engine may have changed the blocks by then."""
    ready(cache, copier)
    cache.client.timeout_s = 0.3
    keys = hashes(3, "late")
    device.hold_copies()
    result = cache.put(keys, on_device(contents(keys, SIZE)), deadline_s=0.0)
    assert (result.stored, result.present, result.refused) == (0, 0, 3)
    assert daemon.stats().leases == 1 and cache.lookup(keys).length == 0
    device.release_copies()
    wait_for(lambda: not daemon.stats().leases, "the lease to end")
    assert cache.lookup(keys).length == 0
    assert cache.put(keys, on_device(contents(keys, SIZE))).stored == 3


def test_a_call_that_does_not_return_holds_up_a_thread_of_ours(
    cache: Cache, copier: Copier, device: FakeDevice
) -> None:
    """Copies of memory that is not registered may wait inside the call."""
    cache.client.timeout_s = 0.3
    device.refuses = "no"
    device.blocking.clear()
    keys, began = hashes(2, "stuck"), time.monotonic()
    assert cache.put(keys, on_device(contents(keys, SIZE)), deadline_s=0.0).refused == 2
    assert time.monotonic() - began < 0.3 + SLACK_S
    assert device.threads == set() and copier.late == 1
    device.blocking.set()
    wait_for(lambda: not copier.late, "the call to return")
    assert cache.put(keys, on_device(contents(keys, SIZE))).stored == 2


def test_a_slow_load_waits_outside_the_call_for_what_the_engine_computes(
    cache: Cache, copier: Copier, device: FakeDevice
) -> None:
    """Nothing has been given to the device by then, and nothing is afterwards."""
    cache.client.timeout_s = 0.3
    device.refuses = "no"
    keys = hashes(2, "not begun")
    cache.put(keys, contents(keys, SIZE))
    device.hold(ENGINE)
    into = empty(2)
    assert cache.get(keys, into, deadline_s=0.0).length == 0
    wait_for(lambda: not copier.late, "the lease to end, with nothing to wait for")
    device.release(ENGINE)
    assert bytes_of(into) == [b"\xee" * SIZE] * 2
    assert cache.get(keys, into).length == 2 and bytes_of(into) == contents(keys, SIZE)


@pytest.mark.parametrize("direction", list(Direction), ids=lambda one: one.value)
def test_what_was_not_begun_is_void_and_nobody_waits_for_it(
    cache: Cache, copier: Copier, device: FakeDevice, direction: Direction
) -> None:
    """A cancelled copy counts as none; and what the engine does next waits for no other copy."""
    device.refuses = "no"  # so each is given by a thread, once the engine has come so far
    device.hold_copies()
    arena, blocks = cache.client.arena, empty(2)
    assert arena is not None
    first, second = (
        Fragments.of_blocks(0, [at * SIZE], [blocks[at].address], [SIZE], 0) for at in range(2)
    )
    under_way = copier.begin(arena, first, Direction.LOAD, streams=[ENGINE])
    wait_for(lambda: device.copies[Way.PAGEABLE], "the first one to be given")
    device.hold(ENGINE)
    waiting = copier.begin(arena, second, direction, streams=[ENGINE])
    waiting.cancel()
    device.release(ENGINE)
    assert not copier.finish(waiting, time.monotonic() + 10, lambda: None)
    computed: list[int] = []
    device.given(ENGINE, lambda: computed.append(1))
    assert computed and not under_way.ended
    device.release_copies()
    assert copier.finish(under_way, time.monotonic() + 10, lambda: None)
    assert device.copies[Way.PAGEABLE] == 1
    wait_for(lambda: not copier.late, "the thread to forget it")


def test_a_device_that_does_nothing_gets_no_more(
    cache: Cache, copier: Copier, device: FakeDevice, daemon: Daemon
) -> None:
    ready(cache, copier)
    keys = hashes(1, "stopped")
    cache.put(keys, contents(keys, SIZE))
    device.hold_copies()
    grants = [cache.acquire(keys) for _ in range(LATE_MAX + 3)]
    for grant in grants:
        into = empty(1)
        fragments = Fragments.of_blocks(0, grant.places.offsets, [into[0].address], [SIZE], 0)
        assert not copier.load(grant, fragments, deadline=time.monotonic(), keep=into)
    wait_for(lambda: copier.late == LATE_MAX, "those that were not begun to end")
    assert (copier.counts["late"], copier.counts["failed"]) == (LATE_MAX, 3)
    device.release_copies()
    wait_for(lambda: not copier.late and not daemon.stats().leases, "all to end")


def test_an_interrupt_leaves_the_lease_to_the_copy(
    cache: Cache, copier: Copier, device: FakeDevice, daemon: Daemon, monkeypatch: Any
) -> None:
    ready(cache, copier)
    device.hold_copies()
    reservation = cache.reserve(hashes(1, "interrupted"))
    block = empty(1)
    fragments = Fragments.of_blocks(
        0, [reservation.extents[0].offset], [block[0].address], [SIZE], 0
    )

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kvstore.client.cuda_transfer.time.sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            copier.store(reservation, fragments, deadline=time.monotonic() + 10, keep=block)
    assert daemon.stats().leases == 1
    device.release_copies()
    wait_for(lambda: not daemon.stats().leases, "the lease to end")


def test_an_interrupt_while_copies_are_given(
    cache: Cache, copier: Copier, device: FakeDevice, daemon: Daemon, monkeypatch: Any
) -> None:
    """A part is under way by then: the lease must not end before it."""
    ready(cache, copier)
    device.hold_copies()
    keys = hashes(8, "given")
    given: list[tuple[int, ...]] = []
    plain = device.plain

    def interrupted(*arguments: int) -> None:
        if len(given) == 3:
            raise KeyboardInterrupt
        given.append(arguments)
        plain(*arguments)

    monkeypatch.setattr(device, "plain", interrupted)
    copier._state(0).abilities = Abilities()
    with pytest.raises(KeyboardInterrupt):
        cache.put(keys, on_device([bytes([at]) * SIZE for at in range(8)]))
    assert len(given) == 3 and daemon.stats().leases == 1
    device.release_copies()
    wait_for(lambda: not daemon.stats().leases, "the lease to end")
    assert cache.lookup(keys).length == 0


# -- failures ----------------------------------------------------------------------------------


def test_a_device_that_fails_is_a_miss_and_one_line(
    cache: Cache, copier: Copier, device: FakeDevice, caplog: pytest.LogCaptureFixture
) -> None:
    ready(cache, copier)
    keys = hashes(3, "broken")
    cache.put(keys, contents(keys, SIZE))
    device.broken = "an illegal address"
    for turn in range(5):
        assert cache.get(keys, empty(3)).length == 0
        assert cache.put(hashes(1, f"{turn}"), empty(1)).refused == 1
    assert copier.counts["failed"] == 10 and not copier.counts["loaded_bytes"]
    found = [one for one in caplog.records if "an illegal address" in one.getMessage()]
    assert len(found) == 1 and found[0].levelno == logging.WARNING
    into = targets(3, SIZE)
    assert cache.get(keys, into).length == 3, "the host's copies go on"


def test_a_device_that_fails_under_way(
    cache: Cache, copier: Copier, device: FakeDevice, daemon: Daemon
) -> None:
    ready(cache, copier)
    keys = hashes(2, "under way")
    device.hold_copies()
    results: list[int] = []
    blocks = on_device(contents(keys, SIZE))
    thread = threading.Thread(target=lambda: results.append(cache.put(keys, blocks).refused))
    thread.start()
    wait_for(lambda: any(s.queue for n, s in device.streams.items() if n >= 100), "the copy")
    device.broken = "fallen off the bus"
    thread.join()
    assert results == [2] and cache.lookup(keys).length == 0
    wait_for(lambda: not daemon.stats().leases, "the lease to end")


def test_ways_that_copy_wrongly_are_not_used(caplog: pytest.LogCaptureFixture) -> None:
    for wrong in (Way.BATCH, Way.GATHER):
        device = FakeDevice()
        device.wrong = wrong
        with device.current():
            found = measure(device)
        assert (found.batches, found.gathers) == (wrong is Way.GATHER, wrong is Way.BATCH)
    assert len([one for one in caplog.records if "are wrong" in one.getMessage()]) == 2


def test_a_daemon_that_dies_under_a_copy(copier: Copier, device: FakeDevice) -> None:
    with Daemon(nvme={"size": "0"}) as daemon:
        client = daemon.start().client(timeout_s=2.0)
        cache = client.open(layout("death"))
        cache.copier = copier
        ready(cache, copier)
        keys = hashes(2, "death")
        cache.put(keys, contents(keys, SIZE))
        for act in (
            lambda: cache.get(keys, empty(2)).length,
            lambda: cache.put(hashes(2, "more"), empty(2)).stored,
        ):
            device.hold_copies()
            found: list[object] = []

            def work(act: Any = act, found: list[object] = found) -> None:
                try:
                    found.append(act())
                except Unavailable as error:
                    found.append(error)

            thread = threading.Thread(target=work)
            thread.start()
            wait_for(
                lambda: any(s.queue for n, s in device.streams.items() if n >= 100), "the copy"
            )
            daemon.kill()
            device.release_copies()
            thread.join()
            assert found == [0] or isinstance(found[0], Unavailable)
            daemon.start()
        assert not copier.late
        into = empty(2)
        assert cache.get(keys, into).length == 2 and bytes_of(into) == contents(keys, SIZE)
