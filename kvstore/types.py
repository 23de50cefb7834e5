"""The nouns that every room shares: layout, tiers, limits. Values only, no behaviour of a store."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from kvstore.errors import InvalidKeys, InvalidLayout, TooLarge

PROTOCOL_VERSION = 1
HASH_BYTES_MIN = 8
HASH_BYTES_MAX = 64
KEYS_PER_CALL_MAX = 65_536
USED_KEYS_MAX = 64  # that are said to have been read without asking
SHARDS_MAX = 1_024
TEXT_BYTES_MAX = 512
SLOT_ALIGNMENT = 4_096  # the unit of O_DIRECT; slots start and end on it
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# A tier's number on the wire is its place in this tuple.
TIERS = ("hbm", "dram", "nvme")
HBM, DRAM, NVME = range(3)
NO_GPU = 0xFFFFFFFF  # in a list of GPUs by shard: this shard is wanted on none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """What makes two blocks interchangeable.

    model         identity of the model and its weights, for example "llama-3-8b@sha256:..."
    engine        engine and version of its KV layout, for example "vllm-0.33/kv1"
    dtype         element type, for example "bfloat16"
    block_tokens  tokens per block
    shards        tensor-parallel ranks that each hold a part of every block
    shard_bytes   bytes of one shard; a block is `shards * shard_bytes` bytes

    Raises InvalidLayout when a field is empty, not positive or out of range.
    """

    model: str
    engine: str
    dtype: str
    block_tokens: int
    shards: int = 1
    shard_bytes: int

    def __post_init__(self) -> None:
        for name in ("model", "engine", "dtype"):
            value = getattr(self, name)
            if not 0 < _utf8_bytes(value) <= TEXT_BYTES_MAX:
                raise InvalidLayout(
                    f"layout.{name} is {value!r}: give a text of 1 to {TEXT_BYTES_MAX} bytes"
                )
        for name, most in (
            ("block_tokens", 1 << 24),
            ("shards", SHARDS_MAX),
            ("shard_bytes", 1 << 40),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
                raise InvalidLayout(f"layout.{name} is {value!r}: give an integer of 1 to {most}")

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all shards together."""
        return self.shards * self.shard_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes that one block takes in a tier: its own, rounded up to the alignment."""
        return slot_bytes_of(self.block_bytes)

    @functools.cached_property
    def fingerprint(self) -> bytes:
        """16 bytes that differ when any field differs; part of every key."""
        fields = json.dumps(dataclasses.asdict(self), sort_keys=True).encode()
        return hashlib.blake2b(fields, digest_size=16, person=b"kvstore-layout").digest()


def _utf8_bytes(value: object) -> int:
    """0 for what is no text, as half of a surrogate pair."""
    try:
        return len(value.encode()) if isinstance(value, str) else 0
    except UnicodeEncodeError:
        return 0


def slot_bytes_of(size: int) -> int:
    """So many bytes, rounded up to the alignment."""
    return -(-size // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


def check_keys(hashes: Sequence[bytes]) -> int:
    """The common length of the hashes in bytes (0 for an empty list).

    Raises TooLarge, or InvalidKeys when a hash is not bytes, has a wrong or another length, or
    comes twice.
    """
    count = len(hashes)
    if count == 1 and type(hashes[0]) is bytes:  # the usual case, at a third of the cost
        check_hash_length(len(hashes[0]), len(hashes[0]))
        return len(hashes[0])
    if count > KEYS_PER_CALL_MAX:
        raise TooLarge(
            f"{count} keys in one call: at most {KEYS_PER_CALL_MAX} are taken; split the list"
        )
    if not count:
        return 0
    kinds = set(map(type, hashes))
    if not all(issubclass(kind, bytes) for kind in kinds):
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise InvalidKeys(f"hashes must be bytes, not {names}: give a list of bytes objects")
    lengths = set(map(len, hashes))
    check_hash_length(min(lengths), max(lengths))
    if len(set(hashes)) != count:
        seen: set[bytes] = set()
        twice = next(one for one in hashes if one in seen or seen.add(one))  # type: ignore[func-returns-value]
        raise InvalidKeys(
            f"hash {twice.hex()} comes twice in one list of {count}: give each block once"
        )
    return lengths.pop()


def check_hash_length(shortest: int, longest: int) -> None:
    """Raises InvalidKeys unless both are the same length within the bounds."""
    if shortest != longest:
        raise InvalidKeys(
            f"hashes of {shortest} and of {longest} bytes in one list: use one length per call"
        )
    if not HASH_BYTES_MIN <= shortest <= HASH_BYTES_MAX:
        raise InvalidKeys(
            f"a hash of {shortest} bytes: engine block hashes have "
            f"{HASH_BYTES_MIN} to {HASH_BYTES_MAX} bytes"
        )


class Stats(dict[str, Any]):
    """The statistics of a daemon: a plain tree of dicts and numbers, also readable by attribute.

    The shape is that of `kvstore stats --json`: `stats["tenants"]["default"]["blocks"]["hit"]` and
    `stats.tenants.default.blocks.hit` are the same number.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no field {name!r} here; there are {sorted(self)}") from None

    @classmethod
    def of(cls, tree: Any) -> Any:
        """The same tree with every dict turned into a Stats."""
        if isinstance(tree, dict):
            return cls({key: cls.of(value) for key, value in tree.items()})
        return tree
