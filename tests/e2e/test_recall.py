"""Blocks that are read again without asking: the right ones or none, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import gc
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvstore.client import Cache, Client, Layout, connect, recall, wire
from kvstore.client import cache as cache_module
from kvstore.client import copying as copying_module
from kvstore.errors import KVStoreError, Unavailable
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
from tests.soak.children import Child

SIZE = 64 << 10
ONE = hashes(1, "recall")
FEW = hashes(3, "recall few")
LAYOUT = layout("recall", shard_bytes=SIZE)


@pytest.fixture
def daemon(make_daemon: MakeDaemon) -> Daemon:
    """DRAM holds 128 of the blocks; there is nothing else."""
    return make_daemon(dram={"size": 8 * MIB, "slab_size": 1 * MIB}, nvme={"size": "0"}).start()


@pytest.fixture
def cache(daemon: Daemon) -> Cache:
    return daemon.client().open(LAYOUT)


@pytest.fixture
def other(daemon: Daemon) -> Cache:
    """Another client's."""
    return daemon.client().open(LAYOUT)


def put(cache: Cache, keys: Sequence[bytes]) -> None:
    assert cache.put(keys, contents(keys, SIZE)).stored == len(keys)


def get(cache: Cache, keys: Sequence[bytes]) -> int:
    """How many there are, with the right bytes."""
    into = targets(len(keys), SIZE)
    length = cache.get(keys, into).length
    assert into[:length] == contents(keys[:length], SIZE)
    return length


def overwrite(other: Cache, keys: Sequence[bytes]) -> None:
    """Forget them, and write to every slot that there is."""
    assert other.forget(keys) == len(keys)
    more = hashes(128, "recall overwrite")
    assert other.put(more, contents(more, SIZE)).stored


@contextlib.contextmanager
def copying(monkeypatch: pytest.MonkeyPatch, before: Callable[[], None]) -> Iterator[list[bool]]:
    """Call `before` when a copy without a lease has begun, the first time."""
    done: list[bool] = []

    def copy_all(*of: Any) -> None:
        if not done:
            done.append(True)
            before()
        copying_module.copy_all(*of)

    with monkeypatch.context() as patched:
        patched.setattr(cache_module, "copy_all", copy_all)
        yield done


def asked(client: Client) -> tuple[int, int]:
    """Reads without asking, and all reads."""
    requests = client.stats().tenants.default.requests
    return requests.used, requests.acquire


@pytest.mark.parametrize("keys", [ONE, FEW], ids=["one", "few"])
def test_what_was_put_is_read_without_asking(cache: Cache, keys: list[bytes]) -> None:
    put(cache, keys)
    assert get(cache, keys) == get(cache, keys) == len(keys)
    assert asked(cache.client) == (2, 2)
    tenant = cache.client.stats().tenants.default
    assert (tenant.blocks.asked, tenant.blocks.hit, tenant.blocks.miss) == (2 * len(keys),) * 2 + (
        0,
    )
    assert tenant.tiers.dram.hits == 2 * len(keys)
    assert tenant.tiers.dram.read_bytes == 2 * len(keys) * SIZE
    assert tenant.saved.tokens == 2 * len(keys) * LAYOUT.block_tokens
    assert tenant.tiers.dram.latency_ms.p50 > 0


def test_what_was_got_is_read_without_asking(cache: Cache, other: Cache) -> None:
    put(cache, FEW)
    assert [get(other, FEW) for _ in range(3)] == [3, 3, 3]
    assert get(other, FEW[:2]) == 2  # a part of it, and then one that nobody has seen
    assert get(other, [*FEW[:2], *ONE]) == 2
    assert asked(other.client) == (3, 5)


def test_many_or_large_ones_are_asked_for(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    many = hashes(recall.FEW + 1, "recall many")
    put(cache, many)
    assert get(cache, many) == len(many)
    monkeypatch.setattr(cache_module, "FEW_BYTES", 2 * SIZE)
    put(cache, FEW)
    assert get(cache, FEW) == 3
    assert asked(cache.client) == (0, 2)


def test_what_is_told_is_the_message(cache: Cache) -> None:
    """The part that is made once, and the hashes, of any number and length."""
    session = cache.client.session(cache.client.deadline())
    for size in (8, 32, 64):
        for count in range(1, recall.FEW + 1):
            for tag, speed in (("first", None), ("again", 0.0), ("timed", 160.0)):
                keys = hashes(count, f"told {tag}", size=size)
                body = cache._told(keys, session, speed, cache.client.deadline())
                told = pb.UsedRequest.FromString(body)
                assert told.keys.hashes == b"".join(keys)
                assert (told.keys.hash_bytes, told.prefill_tokens_per_s) == (size, speed or 0.0)
                assert told.keys.layout == cache._layout_number(session, 0.0)


def test_seconds_of_prefill_are_counted(cache: Cache) -> None:
    put(cache, ONE)
    into = targets(1, SIZE)
    assert cache.get(ONE, into, prefill_tokens_per_s=1_600).length == 1
    assert asked(cache.client) == (1, 1)
    saved = cache.client.stats().tenants.default.saved
    assert saved.prefill_seconds == pytest.approx(LAYOUT.block_tokens / 1_600)


def test_one_shard(daemon: Daemon) -> None:
    cache = daemon.client().open(layout("shards", shard_bytes=SIZE // 2, shards=2))
    put(cache, ONE)
    for shard in (1, 0):
        into = targets(1, SIZE // 2)
        assert cache.get(ONE, into, shard=shard).length == 1
        assert into[0] == content(ONE[0], SIZE)[shard * SIZE // 2 :][: SIZE // 2]
    assert asked(cache.client) == (2, 2)


def test_what_was_forgotten_is_gone(cache: Cache, other: Cache) -> None:
    put(cache, FEW)
    assert get(cache, FEW) == 3
    assert other.forget(FEW[1:2]) == 1
    assert get(cache, FEW) == 1
    assert get(cache, FEW[1:]) == 0
    other.client.clear()
    assert get(cache, FEW[:1]) == 0


def test_what_was_evicted_is_gone_and_others_are_there(cache: Cache, other: Cache) -> None:
    put(cache, FEW)
    assert get(cache, FEW) == 3
    crowd = hashes(256, "recall crowd")
    for at in range(0, len(crowd), 32):
        other.put(crowd[at : at + 32], contents(crowd[at : at + 32], SIZE))
    assert get(cache, FEW) == cache.lookup(FEW).length < 3


def test_stored_anew_elsewhere(cache: Cache, other: Cache) -> None:
    put(cache, ONE)
    overwrite(other, ONE)
    other.client.clear()
    put(other, FEW)
    put(other, ONE)
    assert get(cache, ONE) == get(cache, ONE) == 1
    assert asked(cache.client) == (1, 2)


def test_other_bytes_under_the_same_hash(cache: Cache, other: Cache) -> None:
    put(cache, ONE)
    other.forget(ONE)
    assert other.put(ONE, [b"\x01" * SIZE]).stored == 1  # most likely in the same slot
    into = targets(1, SIZE)
    assert cache.get(ONE, into).length == 1
    assert into[0] == b"\x01" * SIZE


def test_overwritten_while_it_is_copied(
    cache: Cache, other: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(cache, ONE)
    with copying(monkeypatch, lambda: overwrite(other, ONE)) as copied:
        assert get(cache, ONE) == 0
        assert copied
    assert asked(cache.client) == (0, 1)


def test_a_block_that_was_forgotten_under_the_lease_is_not_read_again(
    other: Cache, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(other, ONE)
    cache, look = daemon.client(timeout_s=0.2).open(LAYOUT), Cache._epochs
    with contextlib.ExitStack() as halted:

        def late(self: Cache, *of: Any) -> list[int] | None:
            other.forget(ONE)
            halted.enter_context(daemon.suspended())  # it does not hear of the release
            return look(self, *of)

        with monkeypatch.context() as patched:
            patched.setattr(Cache, "_epochs", late)
            assert get(cache, ONE) == 1  # it was there when it was asked for
        with pytest.raises(Unavailable):
            get(cache, ONE)  # now it has to be asked for again, and nobody answers
    assert get(cache, ONE) == 0


def test_a_daemon_that_dies_meanwhile(
    cache: Cache, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(cache, ONE)
    with copying(monkeypatch, daemon.kill) as copied:
        with pytest.raises(Unavailable):
            get(cache, ONE)
        assert copied
    with pytest.raises(Unavailable):
        get(cache, ONE)


def test_after_a_restart_it_is_asked_for_once(cache: Cache, daemon: Daemon) -> None:
    put(cache, ONE)
    daemon.kill()
    daemon.start()
    assert get(cache, ONE) == get(cache, ONE) == 1
    assert asked(cache.client) == (1, 2)


def test_who_is_not_answered_asks(daemon: Daemon) -> None:
    """Reads that the daemon hears nothing of for now are bounded: a get does not take longer than
    it may, and the session is none the worse for it."""
    cache = daemon.client(timeout_s=0.5).open(LAYOUT)
    put(cache, ONE)
    put(cache, FEW)
    session, took = cache.client.session(cache.client.deadline()), list[float]()
    with cache.acquire(FEW) as grant, daemon.suspended():
        with pytest.raises(Unavailable):
            while True:
                took.append(time.monotonic())
                assert get(cache, ONE) == 1
        assert time.monotonic() - took[-1] < 1.4  # one wait of 1 s, and not another before it
    assert len(took) == wire.TOLD_MAX + 1
    assert get(cache, ONE) == 1
    assert cache.client.session(cache.client.deadline()) is session and grant.release()
    assert asked(cache.client)[0] >= wire.TOLD_MAX


def test_a_reader_survives_an_arena_that_was_truncated(daemon: Daemon) -> None:
    """To read what has been cut off ends a process."""

    def engine() -> None:
        with connect(daemon.socket()) as client:
            cache = client.open(LAYOUT)
            put(cache, ONE)
            assert get(cache, ONE) == 1
            os.truncate(daemon.arena / "default" / "arena", 0)
            wait_for(lambda: "tenant out of service" in daemon.log(), "the daemon to notice")
            with pytest.raises(KVStoreError):
                get(cache, ONE)

    assert Child(engine).wait() == 0


def test_a_cache_keeps_nothing_of_what_is_over(daemon: Daemon) -> None:
    """Caches that nobody uses any more held on to the arena of the daemon before."""
    client = daemon.client()
    caches = [client.open(LAYOUT) for _ in range(4)]
    put(caches[0], ONE)
    for cache in caches:
        assert get(cache, ONE) == get(cache, ONE) == 1
    before = weakref.ref(client.session(client.deadline()))
    daemon.kill()
    daemon.start()
    assert get(caches[0], ONE) == 1
    client.settle()
    gc.collect()
    assert before() is None


def test_epochs_of_another_life_mean_nothing(cache: Cache, daemon: Daemon) -> None:
    put(cache, ONE)
    daemon.kill()
    daemon.lose_memory()
    daemon.start()
    put(daemon.client().open(LAYOUT), FEW[:1])  # into the first slot, at the same epoch as before
    assert get(cache, ONE) == 0


def test_another_daemon_in_the_same_place_is_not_mistaken_for_the_first(
    cache: Cache, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(cache, ONE)

    def change() -> None:
        daemon.kill()
        daemon.start()
        overwrite(daemon.client().open(LAYOUT), ONE)

    with copying(monkeypatch, change) as copied:
        assert get(cache, ONE) == 0
        assert copied


def test_caches_of_other_layouts_have_seen_other_blocks(cache: Cache) -> None:
    put(cache, ONE)
    twin = cache.client.open(Layout(**{**vars(LAYOUT), "model": "twin"}))
    assert get(twin, ONE) == 0
    put(twin, ONE)
    assert get(twin, ONE) == get(cache, ONE) == 1


def test_the_front_door_asks(daemon: Daemon) -> None:
    cache = daemon.client("front").open(LAYOUT)
    put(cache, ONE)
    assert get(cache, ONE) == 1
    assert asked(cache.client) == (0, 1)


def test_without_epochs_clients_ask(daemon: Daemon, cache: Cache) -> None:
    path = Path(cache.client.session(cache.client.deadline()).attached.epochs_path)
    assert path.is_relative_to(daemon.arena)
    put(cache, ONE)
    path.rename(path.with_name("elsewhere"))
    lost = daemon.client().open(LAYOUT)
    assert get(lost, ONE) == get(lost, ONE) == 1
    path.write_bytes(bytes(8 * MIB // 4096 * 4))  # of the right size, and somebody else's
    strange = daemon.client().open(LAYOUT)
    assert get(strange, ONE) == get(strange, ONE) == 1
    assert asked(cache.client) == (0, 4)
    path.unlink()


def test_where_the_order_of_loads_is_not_kept_clients_ask(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recall, "ORDERED", False)
    cache = daemon.client().open(LAYOUT)
    put(cache, ONE)
    assert get(cache, ONE) == 1
    assert asked(cache.client) == (0, 1)


def test_what_is_known_is_bounded(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "KNOWN_MAX", 8)
    for key in hashes(30, "recall bound"):
        put(cache, [key])
        assert get(cache, [key]) == 1
    assert len(cache.recall._seen[1]) <= 10


def test_reading_again_keeps_a_block(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(
        dram={"size": 8 * MIB, "slab_size": 1 * MIB},
        nvme={"size": "0"},
        eviction={"policy": "lru"},
    ).start()
    cache = daemon.client().open(LAYOUT)
    put(cache, ONE)
    for key in hashes(250, "recall lru"):
        put(cache, [key])
        assert get(cache, ONE) == 1
    assert asked(cache.client) == (250, 250)
    assert daemon.stats()["tiers"]["dram"]["evicted"]["room"] > 100
