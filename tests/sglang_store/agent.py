"""A process with SGLang in it that does what a test tells it: one line of JSON each way.

Storages are made by SGLang's factory, from the configuration that an engine would pass; pages are
written and read through the host pool's own accessors: what is compared is SGLang's view of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
)
from sglang.srt.mem_cache.storage import StorageBackendFactory

from tests.sglang_store import pools

FACTORY = {
    "backend_name": "kvstore",
    "module_path": "kvstore.client.sglang",
    "class_name": "KVStoreHiCacheStorage",
}


def content(name: str, rank: int, key: str, size: int) -> torch.Tensor:
    """The bytes that belong on a page."""
    raw = hashlib.shake_128(f"{name}/{rank}/{key}".encode()).digest(size)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


class Rank:
    """One rank of an engine: its storage and its host pools."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.rank: int = options.get("tp_rank", 0)
        self.replicated: bool = options.get("mla", False)
        config = HiCacheStorageConfig(
            tp_rank=self.rank,
            tp_size=options.get("tp_size", 1),
            pp_rank=0,
            pp_size=1,
            attn_cp_rank=0,
            attn_cp_size=1,
            is_mla_model=self.replicated,
            enable_storage_metrics=True,
            is_page_first_layout=options["layout"] == "page_first",
            model_name=options.get("model_name", "tiny"),
            extra_config={**FACTORY, "interface_v1": 1, **options["extra"]},
        )
        self.pools: dict[str, Any] = {
            "kv": pools.make(options["kind"], options["pages"], options["layout"])
        }
        self.storage: Any = StorageBackendFactory.create_backend(
            "dynamic", config, self.pools["kv"]
        )
        self.storage.register_mem_pool_host(self.pools["kv"])
        for name, kind in options.get("sidecars", {}).items():
            self.pools[name] = pools.make(kind, options["pages"], options["layout"])
            self.storage.register_mem_host_pool_v2(self.pools[name], PoolName(name))
        self.storage.on_host_pools_registered()

    # -- pages as SGLang sees them -------------------------------------------------------------

    def _page(self, pool: str, key: str, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What belongs on the page, and what is there."""
        there = torch.cat(
            [one.contiguous().view(torch.uint8).flatten() for one in self._parts(pool, at)]
        )
        rank = 0 if self.replicated and pool != "mamba" else self.rank
        return content(pool, rank, key, there.numel()), there

    def _parts(self, pool: str, at: int) -> list[torch.Tensor]:
        """A page, as the host pool gives it, or as what the pool is made of where it does not."""
        host, start = self.pools[pool], at * self.pools[pool].page_size
        if hasattr(host, "v_head_dim") and host.v_head_dim != host.head_dim:
            return [half[start : start + host.page_size] for half in (host.k_buffer, host.v_buffer)]
        return [host.get_data_page(start, flat=True)]

    def _fill(self, pool: str, at: int, raw: torch.Tensor) -> None:
        """Overwrite a page."""
        host, parts = self.pools[pool], self._parts(pool, at)
        if len(parts) == 1:
            host.set_from_flat_data_page(at * host.page_size, raw.view(parts[0].dtype))
            return
        for part in parts:
            part.copy_(raw[: part.nbytes].view(part.dtype).reshape(part.shape))
            raw = raw[part.nbytes :]

    def write(self, pool: str, keys: Sequence[str], first: int) -> None:
        """Put what belongs there onto pages from `first` on."""
        for at, key in enumerate(keys, first):
            wanted, _ = self._page(pool, key, at)
            self._fill(pool, at, wanted)

    def wipe(self, pool: str, count: int, first: int) -> None:
        """Overwrite pages with what no key has."""
        for at in range(first, first + count):
            _, there = self._page(pool, "", at)
            self._fill(pool, at, torch.full_like(there, 0xEE))

    def right(self, pool: str, keys: Sequence[str], first: int) -> list[bool]:
        """Which pages hold what belongs there."""
        return [torch.equal(*self._page(pool, key, at)) for at, key in enumerate(keys, first)]

    def _indices(self, pool: str, count: int, first: int) -> torch.Tensor:
        size = self.pools[pool].page_size
        return torch.arange(first * size, (first + count) * size, dtype=torch.int64)

    # -- the storage ---------------------------------------------------------------------------

    def exists(self, keys: list[str]) -> int:
        """batch_exists"""
        found: int = self.storage.batch_exists(keys)
        return found

    def set(self, keys: list[str], first: int, prefix: list[str] | None = None) -> list[bool]:
        """batch_set_v1"""
        info = HiCacheStorageExtraInfo(prefix_keys=prefix)
        done: list[bool] = self.storage.batch_set_v1(
            keys, self._indices("kv", len(keys), first), info
        )
        return done

    def get(self, keys: list[str], first: int) -> list[bool]:
        """batch_get_v1"""
        done: list[bool] = self.storage.batch_get_v1(
            keys, self._indices("kv", len(keys), first), HiCacheStorageExtraInfo()
        )
        return done

    def _transfers(self, wanted: list[dict[str, Any]]) -> list[PoolTransfer]:
        return [
            PoolTransfer(
                name=PoolName(one["pool"]),
                keys=one["keys"],
                host_indices=self._indices(one["pool"], len(one["keys"]), one.get("first", 0)),
                hit_policy=PoolHitPolicy(one.get("policy", "all_pages")),
            )
            for one in wanted
        ]

    def exists_v2(self, keys: list[str], transfers: list[dict[str, Any]]) -> dict[str, Any]:
        """batch_exists_v2"""
        found = self.storage.batch_exists_v2(keys, self._transfers(transfers))
        return {
            "pages": found.kv_hit_pages,
            "pools": {
                name.value: found.extra_pool_hit_pages[name]
                for name in PoolName  # as SGLang looks them up: not by the text
                if name in found.extra_pool_hit_pages
            },
            "restorable": found.restorable_prefix_pages,
        }

    def set_v2(self, transfers: list[dict[str, Any]]) -> dict[str, list[bool]]:
        """batch_set_v2"""
        done = self.storage.batch_set_v2(self._transfers(transfers))
        return {one["pool"]: done[PoolName(one["pool"])] for one in transfers}

    def get_v2(self, transfers: list[dict[str, Any]]) -> dict[str, list[bool]]:
        """batch_get_v2"""
        done = self.storage.batch_get_v2(self._transfers(transfers))
        return {one["pool"]: done[PoolName(one["pool"])] for one in transfers}

    def flat_set(self, keys: list[str]) -> bool:
        """batch_set, of tensors beside the pool"""
        size = self.pools["kv"].get_dummy_flat_data_page().nbytes
        done: bool = self.storage.batch_set(keys, [content("kv", 0, key, size) for key in keys])
        return done

    def flat_get(self, keys: list[str], *, given: bool) -> list[bool]:
        """batch_get, into tensors of ours or of the storage's; which came back right"""
        size = self.pools["kv"].get_dummy_flat_data_page().nbytes
        targets = [torch.zeros(size, dtype=torch.uint8) for _ in keys] if given else None
        found = self.storage.batch_get(keys, targets)
        return [
            page is not None and torch.equal(page.view(torch.uint8), content("kv", 0, key, size))
            for page, key in zip(found, keys, strict=True)
        ]

    def odd_calls(self) -> list[Any]:
        """What no engine should do; each must be answered with a miss."""
        storage, page = self.storage, torch.zeros(7, dtype=torch.uint8)
        indices = self._indices("kv", 2, 0)
        keys = ["a" * 64, "b" * 64]
        return [
            storage.batch_get_v1(keys, indices[:-1]),
            storage.batch_set_v1(keys, indices[:16]),
            storage.batch_get_v1(keys, None),
            storage.batch_set_v1(["a" * 64] * 2, indices),
            storage.batch_set(["a" * 64], [page]),
            storage.set("a" * 64, page),
            storage.set("a" * 64),
            storage.get("a" * 64, page) is not None,
            storage.batch_exists([]),
            storage.batch_get_v1([], indices[:0]),
            storage.batch_exists([None]),
            list(storage.batch_get_v2([PoolTransfer(PoolName.SWA, indices, keys=keys)]).values()),
        ]

    def layout(self, pool: str = "kv") -> list[Any]:
        """The layout of a pool's pages, and the sizes of their pieces."""
        known = self.storage._pools[pool]
        layout = known.pages.cache.layout
        return [layout.model, layout.engine, layout.shards, layout.shard_bytes, known.sizes]

    def counts(self) -> dict[str, int]:
        """The health counters."""
        return dict(self.storage.counts)

    def stats(self) -> dict[str, list[float]]:
        """get_stats, as SGLang's collector reads it"""
        found = self.storage.get_stats()
        return {
            "loads": found.prefetch_pgs,
            "rates": found.prefetch_bandwidth,
            "stores": found.backup_pgs,
        }

    def exists_one(self, key: str) -> bool:
        """exists"""
        found: bool = self.storage.exists(key)
        return found

    def clear(self) -> bool:
        """clear"""
        done: bool = self.storage.clear()
        return done

    def close(self) -> None:
        """close"""
        self.storage.close()


def main() -> None:
    """Obey until the end of the input."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    ranks: dict[str, Rank] = {}
    for line in sys.stdin:
        order = json.loads(line)
        began = time.monotonic()
        answer: dict[str, Any] = {}
        try:
            if order["do"] == "open":
                ranks[order["name"]] = Rank(order["arguments"])
            else:
                method = getattr(ranks[order["name"]], order["do"])
                answer["result"] = method(**order["arguments"])
        except Exception as error:
            answer["error"] = repr(error)
        answer["seconds"] = time.monotonic() - began
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
