"""The part of the SGLang storage that needs no SGLang: keys, fragments, layouts, identity."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvstore.client import Client
from kvstore.client.cache import Cache
from kvstore.client.sglang_identity import model_identity
from kvstore.client.sglang_pages import (
    Fragments,
    Pages,
    Ranks,
    fragment_sizes,
    fragments,
    key_hash,
    page_layout,
)
from kvstore.client.sglang_settings import Settings
from kvstore.client.weights import sample_weights
from kvstore.errors import InvalidBlock, InvalidRequest
from kvstore.types import Layout
from tests.e2e.conftest import MakeDaemon, make_daemon  # noqa: F401  # a fixture
from tests.e2e.harness import Daemon

SIZES = (300, 5000, 700)
KEYS = [hashlib.sha256(bytes([at])).hexdigest() for at in range(40)]
ALONE = Ranks(1, None, True, "")


class Half(SimpleNamespace):
    """A host pool of two buffers, K and V, as far as pages go."""

    page_size = 4
    layout = "page_first"
    dtype = "torch.bfloat16"

    def get_page_buffer_meta(self, indices: list[int]) -> Any:
        starts = indices[:: self.page_size]
        return [base + 64 * at for at in starts for base in (1000, 9000)], [256] * 2 * len(starts)


# -- keys ------------------------------------------------------------------------------------------


def test_a_page_hash_is_its_bytes() -> None:
    assert key_hash(KEYS[0]) == hashlib.sha256(b"\0").digest()


def test_no_two_keys_share_a_hash() -> None:
    key = KEYS[0]
    odd = [
        key.upper(),
        key[:-1],
        f"{key}_0_1",
        f" {key[1:]}",
        key.replace(key[5], "é"),
        "",
        "g" * 64,
    ]
    found = {key_hash(one) for one in [key, *odd]}
    assert len(found) == len(odd) + 1
    assert {len(one) for one in found} == {32}


# -- fragments and layouts -------------------------------------------------------------------------


def test_fragments_of_pages() -> None:
    sizes = fragment_sizes(Half(), [0] * 4)
    assert sizes == (256, 256)
    found = fragments(Half(), list(range(8, 16)), 2, sizes)
    assert found == [[(1512, 256), (9512, 256)], [(1768, 256), (9768, 256)]]


def test_fragments_that_do_not_fit() -> None:
    for pages, sizes in ((1, (256, 256)), (2, (256, 255)), (3, (256, 256))):
        with pytest.raises(InvalidBlock, match="the host pool names 4 pieces"):
            fragments(Half(), list(range(8)), pages, sizes)


def config(**changes: Any) -> Any:
    """What SGLang tells a storage of its ranks."""
    rank = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
    }
    rank |= changes
    writer = not rank["is_mla_model"] or rank["tp_rank"] == 0
    return SimpleNamespace(**rank, is_storage_writer=writer)


class MHATokenToKVPoolHost(Half):
    """A host pool that is cut by heads, by the name of its class."""


@pytest.mark.parametrize(
    ("told", "pool", "shards", "shard", "writes"),
    [
        (config(), "kv", 1, None, True),
        (config(tp_rank=2, tp_size=4), "kv", 4, 2, True),
        (config(tp_rank=2, tp_size=4, is_mla_model=True), "indexer", 1, None, False),
        (config(tp_rank=0, tp_size=4, is_mla_model=True), "kv", 1, None, True),
        (config(tp_rank=2, tp_size=4, is_mla_model=True), "mamba", 4, 2, True),
        (config(tp_rank=2, tp_size=4, attn_cp_rank=1, attn_cp_size=2), "kv", 1, None, True),
    ],
)
def test_which_part_is_ours(
    told: Any, pool: str, shards: int, shard: int | None, writes: bool
) -> None:
    ranks = Ranks.of(told, pool, Half())
    assert (ranks.shards, ranks.shard, ranks.writes) == (shards, shard, writes)


def test_ranks_on_several_hosts_wait_for_nobody() -> None:
    found = [Ranks.of(config(tp_rank=at, tp_size=2), "kv", Half(), 2) for at in (0, 1)]
    assert [(one.shards, one.shard, one.writes) for one in found] == [(1, None, True)] * 2
    assert found[0].group != found[1].group


def test_heads_are_not_replicated_beside_a_replicated_cache() -> None:
    told = config(tp_rank=1, tp_size=2, is_mla_model=True)
    assert Ranks.of(told, "draft", MHATokenToKVPoolHost()) == Ranks.of(
        config(tp_rank=1, tp_size=2), "draft", Half()
    )


def layout_of(host: Any, told: Any, **changes: Any) -> Layout:
    """The layout of a host pool's pages."""
    given: dict[str, Any] = {
        "model": "m",
        "version": "1",
        "pool": "kv",
        "tokens": 4,
        "sizes": (256, 256),
    }
    return page_layout(host_pool=host, ranks=Ranks.of(told, "kv", host), **given | changes)


def test_whatever_changes_the_bytes_changes_the_layout() -> None:
    layouts = [
        layout_of(Half(), config()),
        layout_of(Half(layout="page_head"), config()),
        layout_of(Half(head_dim=7), config()),
        layout_of(Half(dtype="torch.float16"), config()),
        layout_of(Half(storage_format_tag="x"), config()),
        layout_of(MHATokenToKVPoolHost(), config()),
        layout_of(Half(), config(pp_rank=1, pp_size=2)),
        layout_of(Half(), config(tp_size=2)),
        layout_of(Half(), config(attn_cp_size=2)),
        layout_of(Half(), config(is_mla_model=True)),
        layout_of(Half(), config(), model="n"),
        layout_of(Half(), config(), version="2"),
        layout_of(Half(), config(), pool="swa"),
        layout_of(Half(), config(), sizes=(512,)),
        layout_of(Half(), config(), tokens=8),
    ]
    assert len({one.fingerprint for one in layouts}) == len(layouts)
    one, other = (layout_of(Half(), config(tp_rank=at, tp_size=2)) for at in (0, 1))
    assert one == other, "ranks of one block must agree"
    assert one.block_bytes == 2 * 512


# -- identity and settings -------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "a.safetensors").write_bytes(os.urandom(1 << 20))
    (tmp_path / "b.safetensors").write_bytes(b"short")
    return tmp_path


def test_weights_are_known_by_what_is_in_them(folder: Path, tmp_path_factory: Any) -> None:
    before = sample_weights(folder)
    (folder / "tokenizer.json").write_text("changed")
    copy = tmp_path_factory.mktemp("copy") / "other"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert sample_weights(folder) == sample_weights(copy) == before
    with (copy / "a.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert sample_weights(copy) != before
    for name, text in (("b.safetensors", "other"), ("config.json", "[]"), ("modeling.py", "x")):
        known = sample_weights(folder)
        (folder / name).write_text(text)
        assert sample_weights(folder) != known


def test_a_folder_without_weights(tmp_path: Path) -> None:
    assert sample_weights(tmp_path) == ""


def test_the_model_of_a_layout(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = SimpleNamespace(model_path=str(folder), dtype="auto", context_length=None)
    found = [
        model_identity("served", "", args),
        model_identity("served", "", SimpleNamespace(**vars(args) | {"dtype": "float16"})),
        model_identity("served", "", SimpleNamespace(**vars(args) | {"quantization": "fp8"})),
        model_identity("served", "mine", args),
        model_identity("served", "", None),
        model_identity("other", "", None),
    ]
    assert len(set(found)) == len(found)
    assert model_identity("renamed", "", args) == found[0], "what it is called does not matter"
    assert model_identity(None, "", None)
    assert all(len(one.encode()) <= 512 for one in found)
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        model_identity("served", "mine", args)
        assert not caplog.records
        model_identity("x" * 3000, "", None)
    assert "is known by its name alone" in caplog.text


def test_settings() -> None:
    factory = {"backend_name": "kvstore", "module_path": "m", "class_name": "C"}
    assert Settings.of(factory) == Settings()
    given = Settings.of({**factory, "socket": "/s", "timeout_s": 2, "interface_v1": 1})
    assert (given.socket, given.timeout_s, given.interface_v1) == ("/s", 2, True)


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"sokcet": "/s"}, "unknown key 'sokcet'"),
        ({"timeout_s": "1"}, "timeout_s is '1'"),
        ({"timeout_s": True}, "timeout_s is True"),
        ({"load_deadline_s": 0}, "load_deadline_s is 0"),
        ({"load_deadline_s": float("nan")}, "load_deadline_s is nan"),
        ({"model_id": 7}, "model_id is 7"),
    ],
)
def test_wrong_settings(extra: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        Settings.of(extra)


# -- copies ----------------------------------------------------------------------------------------


@pytest.fixture
def pages(make_daemon: MakeDaemon) -> Iterator[tuple[Daemon, Client, Pages]]:  # noqa: F811
    """Pages of three fragments, in a daemon of their own."""
    daemon = make_daemon().start()
    client = daemon.client(timeout_s=1.0)
    layout = Layout(model="m", engine="e", dtype="uint8", block_tokens=4, shard_bytes=sum(SIZES))
    yield daemon, client, Pages(Cache(client, layout), ALONE)


class Buffers:
    """Fragments scattered over one buffer, with gaps that nothing may touch."""

    GAP = 24

    def __init__(self, count: int, fill: int | None = None) -> None:
        room = sum(SIZES) + self.GAP * (len(SIZES) + 1)
        draw = np.random.default_rng(count)
        self.raw = draw.integers(0, 256, (count, room), dtype=np.uint8)
        if fill is not None:
            self.raw[:] = fill
        base = self.raw.__array_interface__["data"][0]
        self.pages: list[Fragments] = []
        for at in range(count):
            place, page = base + at * room + self.GAP, []
            for size in reversed(SIZES):  # not in the order in which they are stored
                page.append((place, size))
                place += size + self.GAP
            self.pages.append(page[::-1])

    def bytes_of(self, at: int) -> bytes:
        """A page's fragments, one after the other."""
        base = self.raw.__array_interface__["data"][0]
        flat = self.raw.reshape(-1)
        return b"".join(
            flat[place - base : place - base + size].tobytes() for place, size in self.pages[at]
        )

    def gaps(self) -> set[int]:
        """What lies between the fragments."""
        mask = np.ones(self.raw.size, dtype=bool)
        base = self.raw.__array_interface__["data"][0]
        for page in self.pages:
            for place, size in page:
                mask[place - base : place - base + size] = False
        return set(self.raw.reshape(-1)[mask].tolist())


def test_fragments_there_and_back(pages: tuple[Daemon, Client, Pages]) -> None:
    _, _, store = pages
    source, target = Buffers(40), Buffers(40, fill=0xEE)
    assert store.store(KEYS[:30], source.pages[:30], None, 1.0) == [True] * 30
    assert store.store(KEYS, source.pages, None, 1.0) == [True] * 40
    assert store.count(KEYS) == 40
    assert store.load(KEYS, target.pages, 1.0) == 40
    assert [target.bytes_of(at) for at in range(40)] == [source.bytes_of(at) for at in range(40)]
    assert target.gaps() == {0xEE}


def test_gaps_are_found(pages: tuple[Daemon, Client, Pages]) -> None:
    _, _, store = pages
    source = Buffers(40)
    there = [3, 4, 17, 39]
    for at in there:
        store.store([KEYS[at]], [source.pages[at]], KEYS[at - 1], 1.0)
    assert [at for at, page in enumerate(store.present(KEYS, 5.0)) if page] == there
    assert store.present(KEYS, 0.0) == [False] * 40, "what is not looked up in time is not there"


def test_a_copy_under_a_lost_lease_is_no_hit(pages: tuple[Daemon, Client, Pages]) -> None:
    """The daemon dies while pages are being copied: nobody says any more that they were not given
    to others meanwhile."""
    daemon, _, store = pages
    source, target = Buffers(5), Buffers(5, fill=0xEE)
    store.store(KEYS[:5], source.pages, None, 1.0)

    class Killing(list[tuple[int, int]]):
        def __iter__(self) -> Iterator[tuple[int, int]]:
            daemon.kill()
            return super().__iter__()

    into = [*target.pages[:4], Killing(target.pages[4])]
    assert store.load(KEYS[:5], into, 1.0) == 0


def test_a_failing_copy_stores_nothing(pages: tuple[Daemon, Client, Pages]) -> None:
    _, _, store = pages

    class Failing(list[tuple[int, int]]):
        def __iter__(self) -> Iterator[tuple[int, int]]:
            raise ValueError("no such place")

    source = Buffers(3)
    with pytest.raises(ValueError, match="no such place"):
        store.store(KEYS[:3], [*source.pages[:2], Failing()], None, 1.0)
    assert store.count(KEYS[:3]) == 0
    assert store.store(KEYS[:3], source.pages, None, 1.0) == [True] * 3


def test_pages_without_bytes(pages: tuple[Daemon, Client, Pages]) -> None:
    _, _, store = pages
    nothing: list[Fragments] = [[], []]
    assert store.load(KEYS[:2], nothing, 0.1) == 0
    assert store.store(KEYS[:2], nothing, None, 1.0) == [True] * 2
    assert store.load(KEYS[:2], nothing, 0.1) == 2
