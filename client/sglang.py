"""The storage backend of SGLang's hierarchical cache: pages of its host pools, kept by the daemon.

SGLang loads the class by name (`--hicache-storage-backend dynamic`). With `interface_v1: 1` pages
are copied straight between its host pool and the arena, else through flat tensors. Pools beside the
KV (Mamba, sliding window, indexer, draft) come through the calls that end in v2. No call raises,
none outlasts its deadline: what cannot be had is a miss, which SGLang computes.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    PoolHitPolicy,
    PoolName,
    PoolTransferResult,
)
from sglang.version import __version__ as sglang_version

from kvstore.client.arena import address_of
from kvstore.client.cache import Cache
from kvstore.client.guard import Guard
from kvstore.client.sglang_identity import model_identity
from kvstore.client.sglang_pages import (
    KV,
    Fragments,
    Pages,
    Ranks,
    fragment_sizes,
    fragments,
    page_layout,
)
from kvstore.client.sglang_settings import Settings
from kvstore.errors import InvalidRequest
from kvstore.types import KEYS_PER_CALL_MAX

SAMPLES_MAX = 4_096  # of pages and bandwidths, kept until SGLang asks for them

log = logging.getLogger("kvstore")


class _Pool:
    """A host pool of SGLang's and its pages in the store.

    sizes  of a page's fragments; None: the pool cannot name them, pages are copied as flat tensors
    """

    def __init__(self, host: Any, sizes: tuple[int, ...] | None, pages: Pages) -> None:
        self.host = host
        self.sizes = sizes
        self.pages = pages

    def flat_page(self, tensor: Any, what: str, *, writable: bool) -> Fragments:
        """A flat tensor of one page. Raises InvalidBlock when it is of another size."""
        size = self.pages.page_bytes
        return [(address_of(tensor, size, what, writable=writable), size)]


class KVStoreHiCacheStorage(HiCacheStorage):  # type: ignore[misc]
    """See the module. Methods are SGLang's: there is what they must do.

    counts  of this process: calls that `failed`, that were `skipped` while no daemon answered, and
            `defects`; pages that were `asked` for, found by `hit`, `loaded`, `unloaded` (said to be
            there, but not there in time), `stored`, `refused`
    """

    def __init__(self, storage_config: Any, _options: Any = None) -> None:
        settings = Settings.of(storage_config.extra_config or {})
        self.settings = settings
        self.config = storage_config
        self._guard = Guard(settings.socket, settings.tenant, timeout_s=settings.timeout_s)
        self.counts: Counter[str] = self._guard.counts
        self.counts.update(asked=0, hit=0, loaded=0, unloaded=0, stored=0, refused=0)
        args = _server_args()
        self._model = model_identity(storage_config.model_name, settings.model_id, args)
        self._hosts = int(getattr(args, "nnodes", 1))
        self._pools: dict[str, _Pool] = {}
        self._flat: _Pool | None = None  # pages of the KV pool as flat tensors
        self._loads: list[tuple[int, float]] = []  # pages and GB/s, for SGLang's metrics
        self._stores: list[int] = []  # pages

    # -- host pools ----------------------------------------------------------------------------

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """The pool of the KV itself."""
        super().register_mem_pool_host(mem_pool_host)
        self._flat = None
        if pool := self._add(KV, mem_pool_host, flat=not self.settings.interface_v1):
            self._pools[KV] = pool

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """A pool beside it, or the same under its name."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        name = str(host_pool_name)
        known = self._pools.get(name)
        if known is None or known.host is not host_pool:
            if pool := self._add(name, host_pool):
                self._pools[name] = pool
            else:
                self._pools.pop(name, None)

    def _add(self, name: str, host: Any, *, flat: bool = False) -> _Pool | None:
        """None for a pool whose pages cannot be stored."""
        sizes: tuple[int, ...] | None = None
        if not flat:
            try:
                sizes = fragment_sizes(host, torch.zeros(host.page_size, dtype=torch.int64))
            except Exception as error:
                log.info("kvstore: pages of pool %s are copied as flat tensors: %s", name, error)
        try:
            whole = sizes
            if whole is None:
                whole = (host.get_dummy_flat_data_page().nbytes,)
            ranks = Ranks.of(self.config, name, host, self._hosts)
            layout = page_layout(
                model=self._model,
                version=sglang_version,
                pool=name if sizes is not None else f"{name}-flat",
                tokens=host.page_size if name == KV else 1,  # a token counts once
                host_pool=host,
                sizes=whole,
                ranks=ranks,
            )
        except Exception:
            self._guard.count("defects", 1)
            log.exception("kvstore: pages of pool %s cannot be stored", name)
            return None
        return _Pool(host, sizes, Pages(Cache(self._guard.client, layout), ranks))

    # -- the KV --------------------------------------------------------------------------------

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """How many leading pages are there, in one call."""
        hit = self._count(KV, keys)
        self._guard.count("asked", len(keys))
        self._guard.count("hit", hit)
        return hit

    def batch_get_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        """Which pages lie in the host pool now; the content of the others is undefined."""
        return self._get(KV, keys, host_indices)

    def batch_set_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        """Which pages are in the store now."""
        return self._set(KV, keys, host_indices, extra_info)

    # -- flat tensors --------------------------------------------------------------------------

    def _flat_pool(self) -> _Pool | None:
        """Pages of the KV pool as flat tensors; made when they are first asked for, because not
        every pool knows them."""
        known = self._pools.get(KV)
        if known is not None and known.sizes is None:
            return known
        if self._flat is None and (host := getattr(self, "mem_pool_host", None)) is not None:
            self._flat = self._add(KV, host, flat=True)
        return self._flat

    def exists(self, key: str) -> bool:
        """Whether a page is there that was `set`, or may be got by `get`."""
        pool = self._flat_pool()
        if pool is None:
            return False
        return self._guard.ask(lambda: pool.pages.count([key]), 0) == 1

    def get(
        self, key: str, target_location: Any = None, target_sizes: Any = None
    ) -> torch.Tensor | None:
        """The page in `target_location`, or in a new tensor; None: not there."""
        targets = None if target_location is None else [target_location]
        return self.batch_get([key], targets)[0]

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """The same of leading pages; None from the first one on that is not there."""
        pool = self._flat_pool()
        if pool is None or not keys:
            return [None] * len(keys)

        def act() -> list[torch.Tensor | None]:
            pages = target_locations
            if pages is None:
                pages = [pool.host.get_dummy_flat_data_page() for _ in keys]
            into = [pool.flat_page(page, "a target", writable=True) for page in pages]
            loaded = self._copy_out(pool, keys, into)
            return [*pages[:loaded], *[None] * (len(keys) - loaded)]

        got = self._guard.ask(act, [None] * len(keys))
        self._note_loaded(len(keys), len(keys) - got.count(None))
        return got

    def set(
        self,
        key: str,
        value: Any = None,
        target_location: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Whether the page is in the store now."""
        page = value if value is not None else target_location
        return self.batch_set([key], None if page is None else [page])

    def batch_set(
        self,
        keys: list[str],
        values: Any = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Whether all pages are in the store now."""
        pool = self._flat_pool()
        pages = values if values is not None else target_locations
        if pool is None or pages is None or len(pages) != len(keys):
            return False
        if not pool.pages.ranks.writes or not keys:
            return True

        def act() -> list[bool]:
            whole = [page.contiguous() for page in pages]
            sources = [pool.flat_page(page, "a page", writable=False) for page in whole]
            return pool.pages.store(keys, sources, None, self.settings.timeout_s)

        return all(self._note_stored(self._guard.ask(act, [False] * len(keys))))

    # -- several pools -------------------------------------------------------------------------

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: Any = None, extra_info: Any = None
    ) -> PoolTransferResult:
        """Which prefixes can be restored from all pools together, see PoolHitPolicy.

        BLOCK_GROUPS is given no verdict, which SGLang allows for: no pool of its own asks for it.
        """
        kv_pages = self.batch_exists(keys)
        hits = {PoolName.KV: kv_pages} if kv_pages else {}
        restorable = set(range(1, kv_pages + 1))
        for transfer in pool_transfers or ():
            if not restorable or transfer.hit_policy == PoolHitPolicy.BLOCK_GROUPS:
                continue
            if transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
                window = max(1, len(transfer.keys or ()))
                lengths = self._windows(str(transfer.name), keys[:kv_pages], window)
            else:
                boundary = self._count(str(transfer.name), keys[:kv_pages])
                lengths = frozenset(range(1, boundary + 1))
            if lengths:
                hits[transfer.name] = max(lengths)
            restorable &= lengths
        return PoolTransferResult(max(restorable, default=0), hits, sorted(restorable))

    def batch_get_v2(
        self, transfers: Sequence[Any], extra_info: Any = None
    ) -> dict[Any, list[bool]]:
        """Which pages of each pool lie in it now."""
        return {
            one.name: self._get(str(one.name), one.keys or [], one.host_indices)
            for one in transfers
        }

    def batch_set_v2(
        self, transfers: Sequence[Any], extra_info: Any = None
    ) -> dict[Any, list[bool]]:
        """Which pages of each pool are in the store now."""
        return {
            one.name: self._set(str(one.name), one.keys or [], one.host_indices, extra_info)
            for one in transfers
        }

    def _windows(self, name: str, keys: list[str], window: int) -> frozenset[int]:
        """Lengths of prefixes whose last `window` pages are all there."""
        pool = self._pools.get(name)
        if pool is None or not keys:
            return frozenset()
        nothing: list[bool] = []
        there = self._guard.ask(lambda: pool.pages.present(keys, self.settings.timeout_s), nothing)
        run, found = 0, []
        for length, page in enumerate(there, 1):
            run = run + 1 if page else 0
            if run >= min(window, length):
                found.append(length)
        return frozenset(found)

    # -- the rest ------------------------------------------------------------------------------

    def clear(self) -> bool:
        """Drop every block of the tenant, whoever stored it."""
        return self._guard.ask(lambda: self._guard.client.clear() >= 0, False)

    def get_stats(self) -> Any:
        """Pages that were loaded and stored since the last time, and how fast in GB/s, as SGLang's
        metrics want them; None where it has none."""
        try:
            from sglang.srt.observability.metrics_collector import StorageMetrics
        except ImportError:
            return None
        loads, self._loads = self._loads, []
        stores, self._stores = self._stores, []
        stats = StorageMetrics()
        stats.prefetch_pgs.extend(pages for pages, _ in loads)
        stats.prefetch_bandwidth.extend(rate for _, rate in loads)
        stats.backup_pgs.extend(stores)  # no rate: pages that were there already are among them
        return stats

    def close(self) -> None:
        """End the session; every later call is a miss."""
        self._guard.close()

    # -- inside --------------------------------------------------------------------------------

    def _count(self, name: str, keys: Sequence[str]) -> int:
        pool = self._pools.get(name)
        if pool is None or not keys:
            return 0
        return self._guard.ask(lambda: pool.pages.count(keys[:KEYS_PER_CALL_MAX]), 0)

    def _get(self, name: str, keys: list[str], indices: Any) -> list[bool]:
        pool = self._pools.get(name)
        loaded = 0
        if pool is not None and keys and indices is not None:
            loaded = self._guard.ask(lambda: self._load(pool, keys, indices), 0)
        self._note_loaded(len(keys), loaded)
        return [True] * loaded + [False] * (len(keys) - loaded)

    def _set(self, name: str, keys: list[str], indices: Any, extra_info: Any) -> list[bool]:
        pool = self._pools.get(name)
        stored = [False] * len(keys)
        if pool is not None and not pool.pages.ranks.writes:
            return [True] * len(keys)  # another rank stores the same bytes
        if pool is not None and keys and indices is not None:
            before = getattr(extra_info, "prefix_keys", None)
            parent = before[-1] if before else None
            stored = self._guard.ask(lambda: self._store(pool, keys, indices, parent), stored)
        return self._note_stored(stored)

    def _load(self, pool: _Pool, keys: list[str], indices: Any) -> int:
        if pool.sizes is not None:
            return self._copy_out(pool, keys, fragments(pool.host, indices, len(keys), pool.sizes))
        pages = [pool.host.get_dummy_flat_data_page() for _ in keys]
        into = [pool.flat_page(page, "a page", writable=True) for page in pages]
        loaded = self._copy_out(pool, keys, into)
        for start, page in zip(_starts(indices, len(keys)), pages[:loaded], strict=False):
            pool.host.set_from_flat_data_page(start, page)
        return loaded

    def _store(self, pool: _Pool, keys: list[str], indices: Any, parent: str | None) -> list[bool]:
        if pool.sizes is not None:
            sources = fragments(pool.host, indices, len(keys), pool.sizes)
        else:
            pages = [
                pool.host.get_data_page(start, flat=True).contiguous()
                for start in _starts(indices, len(keys))
            ]
            sources = [pool.flat_page(page, "a page", writable=False) for page in pages]
        return pool.pages.store(keys, sources, parent, self.settings.timeout_s)

    def _copy_out(self, pool: _Pool, keys: list[str], into: Sequence[Fragments]) -> int:
        began = time.perf_counter()
        loaded = pool.pages.load(keys, into, self.settings.load_deadline_s)
        if self.config.enable_storage_metrics and len(self._loads) < SAMPLES_MAX:
            moved = loaded * pool.pages.page_bytes / 1e9
            self._loads.append((loaded, moved / (time.perf_counter() - began)))
        return loaded

    def _note_loaded(self, wanted: int, loaded: int) -> None:
        self._guard.count("loaded", loaded)
        self._guard.count("unloaded", wanted - loaded)

    def _note_stored(self, stored: list[bool]) -> list[bool]:
        if self.config.enable_storage_metrics and len(self._stores) < SAMPLES_MAX:
            self._stores.append(sum(stored))
        self._guard.count("stored", sum(stored))
        self._guard.count("refused", len(stored) - sum(stored))
        return stored


def _starts(indices: Any, pages: int) -> list[int]:
    """The first place of each page. Raises InvalidRequest when they do not come out even."""
    places = indices.tolist()
    if not places or len(places) % pages:
        raise InvalidRequest(f"{len(places)} host indices for {pages} pages")
    return places[:: len(places) // pages]  # type: ignore[no-any-return]


def _server_args() -> Any:
    """The options that the engine runs with; None outside of one."""
    try:
        from sglang.srt.runtime_context import get_server_args

        return get_server_args()
    except Exception:
        return None
