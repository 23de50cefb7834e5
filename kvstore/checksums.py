"""Checksums of a block's bytes, seeded with whose bytes they are.

A sum that was made for one key, layout or shard never fits the bytes of another, so it proves both
that bytes are whole and that they are the right ones.
"""

from __future__ import annotations

from xxhash import xxh3_64_intdigest

SUM_BYTES = 8


def digest(sums: bytes) -> int:
    """One number for the sums of all shards of a block; 0 stands for none."""
    return xxh3_64_intdigest(sums)


def seed(fingerprint: bytes, hash: bytes, shard: int) -> int:
    """The seed for one shard of the block with this hash under this layout."""
    return xxh3_64_intdigest(fingerprint + hash + shard.to_bytes(4, "little"))


def shard_sums(
    fingerprint: bytes, hash: bytes, view: memoryview, shards: int, shard_bytes: int
) -> bytes:
    """One sum per shard of the block in `view`, 8 bytes little endian each.

    The interpreter lock is released while a large shard is read (xxhash 3 and 4 do so).
    Raises ValueError when the view is shorter than the block.
    """
    if len(view) < shards * shard_bytes:
        raise ValueError(f"{len(view)} bytes hold no block of {shards} x {shard_bytes} bytes")
    return b"".join(
        xxh3_64_intdigest(
            view[shard * shard_bytes : (shard + 1) * shard_bytes], seed(fingerprint, hash, shard)
        ).to_bytes(SUM_BYTES, "little")
        for shard in range(shards)
    )
