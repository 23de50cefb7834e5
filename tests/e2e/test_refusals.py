"""Bad input at the client's surface: a typed error that says what, which and what to do; nothing
lost, nothing changed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from kvstore.client import Cache, Client, Layout, connect, places, recall
from kvstore.client import cache as cache_module
from kvstore.errors import (
    InvalidBlock,
    InvalidConfig,
    InvalidKeys,
    InvalidLayout,
    InvalidRequest,
    KVStoreError,
    TooLarge,
)
from tests.e2e.harness import Daemon, content, contents, hashes, layout, targets

SIZE = 64 << 10
KEYS = hashes(4, "refusals")
MANY = [at.to_bytes(8, "little") for at in range(100_000)]


@pytest.fixture
def filled(cache: Cache, shared: Daemon) -> Iterator[Cache]:
    """A cache with four blocks, which are there afterwards as they were, and nothing else."""
    cache.put(KEYS, contents(KEYS, SIZE))
    before = shared.settled()
    yield cache
    after = shared.settled()
    for name in ("known", "stored", "refused", "aborted", "quarantined"):
        assert after.blocks[name] == before.blocks[name], name
    assert after.tiers.dram.used_bytes == before.tiers.dram.used_bytes
    with cache.acquire(KEYS) as grant:
        assert [bytes(grant.view(at)) for at in range(grant.length)] == contents(KEYS, SIZE)


Refusal = tuple[str, Callable[[Cache], Any], type[KVStoreError], str]
NEW = hashes(2, "new")
BLOCKS = contents(NEW, SIZE)
BAD_KEYS: list[tuple[str, Any, type[KVStoreError], str]] = [
    ("7 bytes", [b"1234567"], InvalidKeys, "a hash of 7 bytes: engine block hashes have 8 to 64"),
    ("65 bytes", [b"x" * 65], InvalidKeys, "a hash of 65 bytes: engine block hashes have 8 to 64"),
    ("empty", [b""], InvalidKeys, "a hash of 0 bytes"),
    ("mixed", [b"x" * 8, b"y" * 9], InvalidKeys, "hashes of 8 and of 9 bytes in one list: use one"),
    (
        "twice",
        [KEYS[0], KEYS[1], KEYS[0]],
        InvalidKeys,
        f"hash {KEYS[0].hex()} comes twice",
    ),
    ("text", ["12345678"], InvalidKeys, "hashes must be bytes, not str"),
    ("numbers", [12345678], InvalidKeys, "hashes must be .*a list of bytes"),
    ("bytearray", [bytearray(8)], InvalidKeys, "hashes must be .*a list of bytes"),
    (
        "too many",
        MANY,
        TooLarge,
        "100000 keys in one call: at most 65536 are taken; split",
    ),
]
WAYS: list[tuple[str, Callable[[Cache, Any], Any]]] = [
    ("lookup", lambda cache, keys: cache.lookup(keys)),
    ("put", lambda cache, keys: cache.put(keys, [b""] * len(keys))),
    ("get", lambda cache, keys: cache.get(keys, [b""] * len(keys))),
    ("reserve", lambda cache, keys: cache.reserve(keys)),
    ("acquire", lambda cache, keys: cache.acquire(keys)),
    ("prefetch", lambda cache, keys: cache.prefetch(keys)),
    ("retain", lambda cache, keys: cache.retain(keys, 1)),
    ("forget", lambda cache, keys: cache.forget(keys)),
]


@pytest.mark.parametrize("way", [way for _, way in WAYS], ids=[name for name, _ in WAYS])
def test_bad_keys(filled: Cache, way: Callable[[Cache, Any], Any]) -> None:
    for _, keys, error, says in BAD_KEYS:
        with pytest.raises(error, match=says) as refused:
            way(filled, keys)
        assert type(refused.value) is error


def objects(kind: str) -> Any:
    return np.zeros(SIZE // np.dtype(kind).itemsize, kind)


def strided() -> Any:
    return np.zeros(2 * SIZE, "u1")[::2]


def viewed(cache: Cache, which: Any, dtype: str = "u1") -> Any:
    with cache.acquire(KEYS) as grant:
        return grant.numpy(which, dtype=dtype)


BAD_CALLS: list[Refusal] = [
    (
        "a block too small",
        lambda cache: cache.put(NEW, [BLOCKS[0], BLOCKS[1][:-1]]),
        InvalidBlock,
        "buffer 1 has 65535 bytes, this layout takes 65536",
    ),
    (
        "a block too large",
        lambda cache: cache.put(NEW, [BLOCKS[0], BLOCKS[1] + b"x"]),
        InvalidBlock,
        "buffer 1 has 65537 bytes, this layout takes 65536",
    ),
    (
        "a tensor too small",
        lambda cache: cache.put(NEW, [BLOCKS[0], torch.zeros(100)]),
        InvalidBlock,
        "buffer 1 has 400 bytes, this layout takes 65536",
    ),
    (
        "too few blocks",
        lambda cache: cache.put(NEW, BLOCKS[:1]),
        InvalidBlock,
        "1 buffers for 2 hashes: give one for each",
    ),
    (
        "too many buffers",
        lambda cache: cache.get(KEYS[:1], targets(2, SIZE)),
        InvalidBlock,
        "2 buffers for 1 hashes: give one for each",
    ),
    (
        "numpy with gaps",
        lambda cache: cache.put(NEW, [BLOCKS[0], strided()]),
        InvalidBlock,
        "buffer 1 is not contiguous: give a contiguous copy",
    ),
    (
        "torch with gaps",
        lambda cache: cache.put(NEW, [BLOCKS[0], torch.from_numpy(strided())]),
        InvalidBlock,
        r"buffer 1 is not contiguous: give tensor\.contiguous\(\)",
    ),
    (
        "into bytes",
        lambda cache: cache.get(KEYS, [bytes(SIZE)] * 4),
        InvalidBlock,
        "buffer 0 is read-only: give a writable buffer",
    ),
    (
        "text for a block",
        lambda cache: cache.put(NEW, ["x" * SIZE] * 2),
        InvalidBlock,
        "buffer 0 is a str .*: give bytes, a numpy array .* or a CPU tensor",
    ),
    (
        "a list for a block",
        lambda cache: cache.put(NEW, [[0] * SIZE] * 2),
        InvalidBlock,
        "buffer 0 is a list .*: give bytes, a numpy array",
    ),
    (
        "objects for a block",
        lambda cache: cache.put(NEW, [objects("O")] * 2),
        InvalidBlock,
        "buffer 0 holds Python objects, not bytes: give an array of numbers",
    ),
    (
        "into objects",
        lambda cache: cache.get(KEYS, [memoryview(objects("O")) for _ in KEYS]),
        InvalidBlock,
        "buffer 0 holds Python objects, not bytes: give an array of numbers",
    ),
    (
        "into records of objects",
        lambda cache: cache.get(KEYS, [objects("O,i8") for _ in KEYS]),
        InvalidBlock,
        "buffer 0 holds Python objects, not bytes: give an array of numbers",
    ),
    (
        "read-only dates for a block",
        lambda cache: cache.put(NEW, [np.frombuffer(BLOCKS[0], "M8[s]")] * 2),
        InvalidBlock,
        r"buffer 0 is a ndarray .*array\.view\('u1'\)",
    ),
    (
        "a tensor of no device",
        lambda cache: cache.put(NEW, [torch.zeros(SIZE, dtype=torch.uint8, device="meta")] * 2),
        InvalidBlock,
        "buffer 0 is on meta: copy it to the host first",
    ),
    (
        "a priority too high",
        lambda cache: cache.retain(KEYS, 101),
        InvalidRequest,
        "priority is 101: give an integer of 0 to 100",
    ),
    (
        "a priority in words",
        lambda cache: cache.retain(KEYS, "high"),  # type: ignore[arg-type]
        InvalidRequest,
        "priority is 'high': give an integer of 0 to 100",
    ),
    (
        "a time to live before now",
        lambda cache: cache.retain(KEYS, 1, ttl_s=-1.0),
        InvalidRequest,
        r"ttl_s is -1\.0: give more than 0 seconds, or None for ever",
    ),
    (
        "a deadline that is no number",
        lambda cache: cache.acquire(KEYS, deadline_s=math.nan),
        InvalidRequest,
        "deadline_s is nan: give a number of seconds",
    ),
    (
        "a deadline in words",
        lambda cache: cache.get(KEYS, targets(4, SIZE), deadline_s="1 s"),  # type: ignore[arg-type]
        InvalidRequest,
        "deadline_s is '1 s': give a number of seconds",
    ),
    (
        "a put that never is due",
        lambda cache: cache.put(NEW, BLOCKS, deadline_s=math.nan),
        InvalidRequest,
        "deadline_s is nan: give a number of seconds",
    ),
    (
        "no hashes at all",
        lambda cache: cache.lookup(None),  # type: ignore[arg-type]
        InvalidKeys,
        "hashes are a NoneType: give a list of bytes objects",
    ),
    (
        "no buffers at all",
        lambda cache: cache.put(NEW, None),  # type: ignore[arg-type]
        InvalidBlock,
        "the buffers are a NoneType: give a list, one for each hash",
    ),
    (
        "a sparse tensor",
        lambda cache: cache.put(NEW, [torch.zeros(SIZE, dtype=torch.uint8).to_sparse()] * 2),
        InvalidBlock,
        r"buffer 0 is a tensor of layout torch\.sparse_coo: give tensor\.to_dense\(\)",
    ),
    (
        "a parent in words",
        lambda cache: cache.put(NEW, BLOCKS, parent="x" * 32),  # type: ignore[arg-type]
        InvalidKeys,
        "parent is a str: give a bytes object, or None",
    ),
    (
        "a parent too short",
        lambda cache: cache.reserve(NEW, parent=b"x"),
        InvalidKeys,
        "a hash of 1 bytes: engine block hashes have 8 to 64 bytes",
    ),
    (
        "a hint that is a number",
        lambda cache: cache.reserve(NEW, hints={"tag": 5}),  # type: ignore[dict-item]
        InvalidRequest,
        "hint tag is 5: give a string",
    ),
    (
        "hints in words",
        lambda cache: cache.reserve(NEW, hints="done"),  # type: ignore[arg-type]
        InvalidRequest,
        "hints are a str: give a dict of",
    ),
    (
        "a speed in words",
        lambda cache: cache.acquire(KEYS, prefill_tokens_per_s="fast"),  # type: ignore[arg-type]
        InvalidRequest,
        "prefill_tokens_per_s is 'fast': give tokens a second, or None",
    ),
    (
        "a time to live in words",
        lambda cache: cache.retain(KEYS, 1, ttl_s="1"),  # type: ignore[arg-type]
        InvalidRequest,
        "ttl_s is '1': give more than 0 seconds, or None for ever",
    ),
    (
        "a shard that is no integer",
        lambda cache: cache.get(KEYS, targets(4, SIZE), shard=0.5),  # type: ignore[arg-type]
        InvalidRequest,
        r"shard 0\.5: give an integer",
    ),
    (
        "a speed beyond all numbers",
        lambda cache: cache.acquire(KEYS, prefill_tokens_per_s=10**400),
        InvalidRequest,
        "give tokens a second, or None",
    ),
    (
        "a time to live beyond all numbers",
        lambda cache: cache.retain(KEYS, 1, ttl_s=10**400),
        InvalidRequest,
        "give more than 0 seconds, or None for ever",
    ),
    (
        "GPUs in words",
        lambda cache: cache.acquire(KEYS, gpus="ab"),  # type: ignore[arg-type]
        InvalidRequest,
        "GPU 'a': give an integer",
    ),
    (
        "hashes that have lost their zeros",
        lambda cache: cache.lookup(np.array(KEYS)),  # type: ignore[arg-type]
        InvalidKeys,
        "hashes are a numpy array, which loses zeros at their ends: give a list of bytes objects",
    ),
    (
        "a view of no type",
        lambda cache: viewed(cache, 0, "nope"),
        InvalidRequest,
        "a shard of 65536 bytes as 'nope': .*: give another dtype",
    ),
    (
        "a view of no number",
        lambda cache: viewed(cache, "a"),
        InvalidRequest,
        "block 'a': give an integer",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "says"), [row[1:] for row in BAD_CALLS], ids=[row[0] for row in BAD_CALLS]
)
def test_bad_calls(
    filled: Cache, call: Callable[[Cache], Any], error: type[KVStoreError], says: str
) -> None:
    with pytest.raises(error, match=says) as refused:
        call(filled)
    assert type(refused.value) is error


def test_whatever_gives_hashes_and_blocks_one_after_the_other(cache: Cache) -> None:
    keys = hashes(3, "iterators")
    given: Any = iter(keys), map(bytes, contents(keys, SIZE))
    assert cache.put(*given).stored == 3
    assert cache.lookup(key for key in keys).length == 3  # type: ignore[arg-type]
    into = targets(3, SIZE)
    assert cache.get(dict.fromkeys(keys), iter(into)).length == 3  # type: ignore[arg-type]
    assert [bytes(one) for one in into] == contents(keys, SIZE)


def test_views_are_refused_once_the_lease_has_ended(cache: Cache) -> None:
    """What is there then belongs to others."""
    cache.put(KEYS, contents(KEYS, SIZE))
    grant = cache.acquire(KEYS)
    assert bytes(grant.view(0)) == contents(KEYS, SIZE)[0]
    assert grant.release()
    for look in (grant.view, grant.numpy, grant.tensor):
        with pytest.raises(InvalidRequest, match=r"the grant was released.*: acquire again"):
            look(0)
    for end in ("commit", "abort"):
        reservation = cache.reserve(hashes(1, f"ended by {end}"))
        reservation.view(0)[:] = bytes(SIZE)
        getattr(reservation, end)()
        for use in (reservation.view, reservation.numpy, reservation.tensor):
            with pytest.raises(InvalidRequest, match=r"the reservation has ended.*: reserve again"):
                use(0)


def test_numbers_of_numpy_and_none_at_all_are_taken(cache: Cache) -> None:
    keys = hashes(2, "numpy numbers")
    given: dict[str, Any] = {"parent": b""}
    assert cache.put(keys, contents(keys, SIZE), **given).stored == 2
    for speed in (np.float32(8_000), np.int64(5), -1, 0, None):
        given = {"prefill_tokens_per_s": speed}
        with cache.acquire(keys, **given) as grant:
            assert grant.length == 2


@pytest.mark.parametrize("ticket", [5, "-1:00", "x", f"{1 << 70}:00"])
def test_a_ticket_that_is_none(shared: Daemon, ticket: Any) -> None:
    with pytest.raises(InvalidRequest, match="join is no ticket: give the `ticket` of a connected"):
        connect(shared.socket(), join=ticket)


def test_numbers_that_operators_mistype(client: Client) -> None:
    calls: list[Callable[[Any], object]] = [client.drain, client.verify, client.start_trace]
    for call, wrong in itertools.product(calls[:2], ("x", None)):
        with pytest.raises(InvalidRequest, match="give a"):
            call(wrong)
    with pytest.raises(InvalidRequest, match="session -1 of"):
        client.drain(-1)
    with pytest.raises(InvalidRequest, match="path is 5: give the absolute path of a file"):
        client.start_trace(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", [5, 1.5, ["x"], "/tmp/\ud800"])
def test_a_path_that_is_none(path: Any) -> None:
    with pytest.raises(InvalidRequest, match="give the path of a socket, or None"):
        connect(path)


@pytest.mark.parametrize("tenant", ["../x", "", 5, "A"])
def test_a_tenant_that_cannot_be(tenant: Any) -> None:
    with pytest.raises(InvalidConfig, match="is no tenant's name: use a letter or digit"):
        connect(tenant=tenant)


def test_the_socket_of_another_tenant(shared: Daemon, door: str) -> None:
    with pytest.raises(InvalidRequest, match="is of tenant default, not of other"):
        connect(shared.socket(door), "other")


def test_a_layout_that_is_none(client: Client) -> None:
    with pytest.raises(InvalidLayout, match=r"the layout is a dict: give a Layout"):
        client.open({"model": "m"})  # type: ignore[arg-type]


@pytest.mark.parametrize("deadline_s", [math.inf, -math.inf, -1, 1e300, 0])
def test_deadlines_beyond_every_clock(filled: Cache, deadline_s: float) -> None:
    """An infinite deadline ended in OverflowError, from somewhere below a lock."""
    with filled.acquire(KEYS, deadline_s=deadline_s) as grant:
        assert grant.length == 4
    into = targets(4, SIZE)
    assert filled.get(KEYS, into, deadline_s=deadline_s).length == 4
    assert bytes(into[3]) == content(KEYS[3], SIZE)
    filled.reserve(KEYS, deadline_s=deadline_s).commit()
    assert filled.put(KEYS, contents(KEYS, SIZE), deadline_s=deadline_s).present == 4


@pytest.mark.parametrize("timeout_s", [0, -1, math.nan, math.inf, 1e9])
def test_timeouts_that_are_none(shared: Daemon, door: str, timeout_s: float) -> None:
    with pytest.raises(
        InvalidRequest, match=r"timeout_s is .*: give seconds, more than 0, up to a"
    ):
        connect(shared.socket(door), timeout_s=timeout_s)


def test_a_layout_that_no_slab_holds(client: Client) -> None:
    large = layout("large", shard_bytes=(2 << 20) + 1)
    says = r"takes 2101248 bytes, a slab of this daemon holds 2097152: raise dram\.slab_size"
    with pytest.raises(InvalidLayout, match=says):
        client.open(large)
    client.open(layout("large", shard_bytes=2 << 20)).lookup(KEYS)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("model", "", "layout.model is '': give a text of 1 to 512 bytes"),
        ("engine", "x" * 513, "layout.engine is 'x.*: give a text of 1 to 512 bytes"),
        ("dtype", None, "layout.dtype is None: give a text"),
        ("model", "a\ud800", "layout.model is 'a.*: give a text"),
        ("block_tokens", 0, "layout.block_tokens is 0: give an integer of 1 to"),
        ("shards", 1025, "layout.shards is 1025: give an integer of 1 to 1024"),
        ("shard_bytes", -1, "layout.shard_bytes is -1: give an integer of 1 to"),
        ("shard_bytes", 1.5, "layout.shard_bytes is 1.5: give an integer of 1 to"),
        ("shards", True, "layout.shards is True: give an integer of 1 to"),
    ],
)
def test_layouts_that_contradict_themselves(field: str, value: Any, says: str) -> None:
    fields: dict[str, Any] = {
        "model": "m",
        "engine": "e",
        "dtype": "d",
        "block_tokens": 16,
        "shards": 1,
        "shard_bytes": SIZE,
    }
    with pytest.raises(InvalidLayout, match=says):
        Layout(**fields | {field: value})


def test_an_exception_while_copying_leaves_nothing(cache: Cache, monkeypatch: Any) -> None:
    """A put that was interrupted between reserve and commit kept its lease: for as long as the
    client lived nobody could store those blocks, nor see them. It aborts now; a get releases."""
    cache.put(KEYS, contents(KEYS, SIZE))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        for module in (places, cache_module):  # under a lease, and without one
            patch.setattr(module, "copy_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.put(NEW, BLOCKS)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                cache.get(KEYS, targets(4, SIZE))
            cache.recall = recall.Recall()
    assert cache.client.stats().tenants.default.leases == 0
    assert cache.put(NEW, BLOCKS).stored == 2
    assert cache.forget(NEW) == 2
