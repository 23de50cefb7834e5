"""The daemon starts whatever the NVMe index says: a record with a flipped bit costs its block."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from kvstore.errors import InvalidConfig
from kvstore.tenant import _make_folder
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


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a link to another user")
def test_a_link_of_another_user_is_not_followed(tmp_path: Path) -> None:
    """He could make it lead elsewhere, and what it leads to was given our modes."""
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to("real")
    _make_folder(link / "mine", 0o750, None)
    os.lchown(link, 12_345, 12_345)
    with pytest.raises(InvalidConfig, match="belongs to another user"):
        _make_folder(link / "other", 0o750, None)
    assert not (tmp_path / "real" / "other").exists()
