"""Pages of an SGLang host pool as blocks of the store: keys, fragments, layouts. Needs no SGLang.

A page lies in a host pool in one or several pieces, its fragments: K and V, or K and V of each
layer. A block holds them one after the other, in the order in which the pool names them. They are
copied straight between the pool and the arena.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from typing import Any

from kvstore.client.arena import address_of
from kvstore.client.cache import Cache
from kvstore.client.copying import Piece, copy_all
from kvstore.client.grant import Grant
from kvstore.client.reservation import Reservation
from kvstore.client.sglang_identity import digest
from kvstore.errors import InvalidBlock
from kvstore.types import Layout

FORMAT = 1  # of what is said here; another one is another layout
KEY_CHARACTERS = 64
SCAN_KEYS = 64  # in one lookup while looking for gaps
KV, MAMBA = "kv", "mamba"  # SGLang's names of pools

# What a host pool says about the bytes of its pages.
POOL_FIELDS = (
    "layout",
    "dtype",
    "page_size",
    "layer_num",
    "target_layer_num",
    "start_layer",
    "end_layer",
    "head_num",
    "head_dim",
    "v_head_dim",
    "head_group_num",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "kv_cache_dim",
    "item_bytes",
    "state_page_bytes",
    "indexer_dtype",
    "temporal_dtype",
    "temporal_state_shape",
    "conv_dtype",
    "conv_state_shapes",
    "num_mamba_layers",
    "storage_format_tag",
    "dcp_size",
    "dcp_rank",
)

Fragments = list[tuple[int, int]]  # address and bytes of each piece of one page


def key_hash(key: str) -> bytes:
    """The 32 bytes of a page's SHA-256 in hexadecimal digits; those of any other text, hashed."""
    if len(key) == KEY_CHARACTERS:
        try:
            raw = bytes.fromhex(key)
        except ValueError:
            pass
        else:
            if raw.hex() == key:  # fromhex also takes capitals and blanks
                return raw
    return hashlib.sha256(b"kvstore-sglang\0" + key.encode("utf-8", "surrogatepass")).digest()


def fragment_sizes(host_pool: Any, indices: Any) -> tuple[int, ...]:
    """Bytes of each piece of the page at `indices`; none for a pool that holds no bytes itself.

    Raises what the pool raises when it cannot name the places of its pages.
    """
    meta = host_pool.get_page_buffer_meta(indices)
    if meta is None:
        return ()
    addresses, sizes = meta
    return tuple([sizes] * len(addresses) if isinstance(sizes, int) else map(int, sizes))


def fragments(host_pool: Any, indices: Any, pages: int, sizes: tuple[int, ...]) -> list[Fragments]:
    """Where the pieces of each page are. Raises InvalidBlock unless they are of these sizes."""
    if not sizes:
        return [[] for _ in range(pages)]
    addresses, found = host_pool.get_page_buffer_meta(indices)
    count = len(sizes)
    if len(addresses) != pages * count or not (
        found == sizes[0] if isinstance(found, int) else list(found) == list(sizes) * pages
    ):
        raise InvalidBlock(
            f"the host pool names {len(addresses)} pieces for {pages} pages of {count}, or of "
            "other sizes than at first: attach the storage again"
        )
    pieces = list(zip(addresses, sizes * pages, strict=True))
    return [pieces[at : at + count] for at in range(0, len(pieces), count)]


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Which part of a page this process holds, from SGLang's HiCacheStorageConfig.

    shards, shard  parts that make up a block, and which is ours; of one part: 1, None
    writes         whether this process stores its part; else another rank stores the same bytes
    group          what else tells our pages from those of ranks that hold other parts
    """

    shards: int
    shard: int | None
    writes: bool
    group: str

    @classmethod
    def of(cls, config: Any, pool: str, host_pool: Any, hosts: int = 1) -> Ranks:
        """Ranks of one tensor-parallel group write shards of one block. Stages of a pipeline hold
        different layers, so each has blocks of its own; so has each rank of a context-parallel
        group, or of an engine on several hosts, each of which has a daemon of its own. SGLang takes
        the shortest prefix among all of them."""
        group = f"pp{config.pp_rank}/{config.pp_size}"
        if config.attn_cp_size > 1:
            group += f" cp{config.attn_cp_rank}/{config.attn_cp_size}"
        if config.is_mla_model and not rank_sharded(pool, host_pool):
            return cls(1, None, config.is_storage_writer, f"{group} replicated")
        if config.attn_cp_size > 1 or hosts > 1:
            return cls(1, None, True, f"{group} tp{config.tp_rank}/{config.tp_size}")
        if config.tp_size == 1:
            return cls(1, None, True, group)
        return cls(config.tp_size, config.tp_rank, True, group)


def rank_sharded(pool: str, host_pool: Any) -> bool:
    """Whether ranks hold different bytes in this pool even where the model's KV is replicated:
    states of Mamba, and whatever is cut by heads."""
    kinds = [kind.__name__ for kind in type(host_pool).__mro__]
    return pool == MAMBA or any(kind.startswith("MHA") for kind in kinds)


def page_layout(
    *,
    model: str,
    version: str,
    pool: str,
    tokens: int,
    host_pool: Any,
    sizes: tuple[int, ...],
    ranks: Ranks,
) -> Layout:
    """The layout of one pool's pages. Whatever may change their bytes changes it."""
    fields = {name: str(getattr(host_pool, name, None)) for name in POOL_FIELDS}
    fields |= {
        "format": str(FORMAT),
        "class": type(host_pool).__name__,
        "sizes": str(sizes),
        "group": ranks.group,
    }
    kind = str(getattr(host_pool, "layout", "none"))
    return Layout(
        model=model,
        engine=f"sglang-{version}/{pool}/{kind}/{digest(fields)}",
        dtype=str(getattr(host_pool, "dtype", "uint8")).removeprefix("torch."),
        block_tokens=tokens,
        shards=ranks.shards,
        shard_bytes=max(1, sum(sizes)),
    )


class Pages:
    """Pages of one pool, in the store. Methods raise KVStoreError, see Cache."""

    def __init__(self, cache: Cache, ranks: Ranks) -> None:
        self.cache = cache
        self.ranks = ranks

    @property
    def page_bytes(self) -> int:
        """Bytes of this process's part of a page."""
        return self.cache.layout.shard_bytes

    def count(self, keys: Sequence[str]) -> int:
        """How many leading pages are there."""
        return self.cache.lookup([key_hash(key) for key in keys]).length

    def present(self, keys: Sequence[str], wait_s: float) -> list[bool]:
        """Which pages are there; those that are not looked up in time are said not to be."""
        hashes = [key_hash(key) for key in keys]
        found = [False] * len(hashes)
        end = time.monotonic() + wait_s
        at = 0
        while at < len(hashes) and time.monotonic() < end:
            asked = hashes[at : at + SCAN_KEYS]
            run = self.cache.lookup(asked).length
            found[at : at + run] = [True] * run
            at += run if run == len(asked) else run + 1
        return found

    def load(self, keys: Sequence[str], into: Sequence[Fragments], wait_s: float) -> int:
        """Copy leading pages out of the store; how many of them are right.

        What lies in the places of the others is undefined. Waits `wait_s` at most for pages that
        must come up from NVMe.
        """
        hashes = [key_hash(key) for key in keys]
        end = time.monotonic() + wait_s
        done = 0
        while done < len(hashes):
            wait_s = self._slice_s(end)
            began = time.monotonic()
            with self.cache.acquire(hashes[done:], deadline_s=wait_s) as grant:
                self._copy_out(grant, into[done : done + grant.length])
            if not grant.release():
                break
            done += grant.length
            now = time.monotonic()
            more = grant.stop in ("late", "pending", "no_room")
            if now >= end or not more or not (grant.length or now - began >= wait_s):
                break  # nothing more is to come, or not in time
        return done

    def store(
        self, keys: Sequence[str], pages: Sequence[Fragments], parent: str | None, wait_s: float
    ) -> list[bool]:
        """Copy pages into the store that are not there yet; which of them are there now.

        parent  key of the page before the first one, when the prompt does not start there
        wait_s  how long to go on when room must be made. Where it is not enough, only pages that
                this call has written are said to be there.
        """
        hashes = [key_hash(key) for key in keys]
        stored = [False] * len(hashes)
        end = time.monotonic() + wait_s
        while True:
            wait_s = self._slice_s(end)
            began = time.monotonic()
            reservation = self.cache.reserve(
                hashes,
                parent=key_hash(parent) if parent else None,
                deadline_s=wait_s,
                shard=self.ranks.shard,
            )
            with reservation:
                self._copy_in(reservation, pages)
            if not reservation.refused:
                return [True] * len(hashes)
            for at in reservation.indices:
                stored[at] = True
            now = time.monotonic()
            if now >= end or not (reservation.indices or now - began >= wait_s):
                return stored  # time is over, or no room will come

    def _slice_s(self, end: float) -> float:
        """How long one call may wait: the daemon answers at the end of it, and that answer must
        not be taken for the silence of a daemon that has gone."""
        return max(0.0, min(end - time.monotonic(), self.cache.client.timeout_s / 2))

    def _copy_in(self, reservation: Reservation, pages: Sequence[Fragments]) -> None:
        copies: list[Piece] = []
        for i, at in enumerate(reservation.indices):
            place = address_of(reservation.view(i), self.page_bytes, "a slot", writable=True)
            for address, size in pages[at]:
                copies.append((place, address, size))
                place += size
        copy_all(copies)

    def _copy_out(self, grant: Grant, into: Sequence[Fragments]) -> None:
        shard = self.ranks.shard or 0
        copies: list[Piece] = []
        for i, page in enumerate(into):
            place = address_of(grant.view(i, shard), self.page_bytes, "a slot", writable=False)
            for address, size in page:
                copies.append((address, place, size))
                place += size
        copy_all(copies)
