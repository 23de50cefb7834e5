"""The daemon starts whatever the NVMe index says: a record with a flipped bit costs its block."""

from __future__ import annotations

import struct

import pytest

from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import contents, hashes, layout, targets

SIZE, COUNT, AT = 65_536, 8, 3


@pytest.mark.parametrize(("byte", "bit"), [(0, 7), (0, 6), (0, 0), (1, 3), (3, 0), (4, 7)])
def test_a_place_that_cannot_be(make_daemon: MakeDaemon, byte: int, bit: int) -> None:
    """Its slab was taken for one of that many: no start, or one that needed terabytes."""
    daemon = make_daemon()
    keys = hashes(COUNT, "flipped")
    daemon.start()
    with daemon.client() as client:
        client.open(layout("flipped", shard_bytes=SIZE)).put(keys, contents(keys, SIZE))
        client.drain()
    daemon.stop()
    daemon.lose_memory()
    index = daemon.folder / "nvme" / "default" / "index.mdb"
    image = bytearray(index.read_bytes())
    key = struct.pack(">Q", SIZE * AT)
    assert key in image
    damaged = bytearray(key)
    damaged[byte] ^= 1 << bit
    index.write_bytes(image.replace(key, damaged))
    daemon.start()
    with daemon.client() as client:
        cache = client.open(layout("flipped", shard_bytes=SIZE))
        there = [cache.lookup([key]).length for key in keys]
        assert sum(there) == COUNT - 1
        for key, want, found in zip(keys, contents(keys, SIZE), there, strict=True):
            into = targets(1, SIZE)
            assert cache.get([key], into).length == found
            assert not found or into[0] == want
        again = [key for key, found in zip(keys, there, strict=True) if not found]
        assert cache.put(again, contents(again, SIZE)).stored == 1
