"""A workload that freezes the NVMe device after every write, and what serves from an image."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

from kvstore.checksums import shard_sums
from kvstore.index import FILE_NAME as INDEX_NAME
from kvstore.index import Index, Loaded
from kvstore.tiers.base import ALIGNMENT
from kvstore.tiers.nvme import FILE_NAME as BLOCKS_NAME
from kvstore.tiers.nvme import HEADER_BYTES, NvmeFiles
from kvstore.types import Layout

SLOT = 2 * ALIGNMENT
SLOTS = 40
SLAB = SLOTS * SLOT
FAR_S = 3600.0
LAYOUTS = {
    number: Layout(
        model=f"model {number}",
        engine="engine/1",
        dtype="bfloat16",
        block_tokens=16,
        shards=number,
        shard_bytes=SLOT // number,
    )
    for number in (1, 2)
}

Key = tuple[bytes, bytes]  # fingerprint, hash


def content(key: Key) -> bytes:
    """What is stored under a key, ever."""
    return random.Random(b"".join(key)).randbytes(SLOT)


def buffer() -> memoryview:
    return memoryview(bytearray(SLOT))


def sums_of(layout: Layout, digest: bytes, view: memoryview) -> bytes:
    return shard_sums(layout.fingerprint, digest, view, layout.shards, layout.shard_bytes)


def served(files: NvmeFiles, loaded: Loaded) -> dict[Key, bytes]:
    """Every block that the next life would hand out."""
    found: dict[Key, bytes] = {}
    view = buffer()
    for offset, number, digest, sums in zip(
        loaded.offsets, loaded.layout_numbers, loaded.hashes, loaded.sums, strict=True
    ):
        try:
            layout = Layout(**json.loads(loaded.layouts[number]))
            files.read(offset, view)
            right = sums_of(layout, digest, view) == sums
        except (KeyError, TypeError, ValueError, OSError):
            continue  # no such layout, no such place, no such bytes: a miss
        if right:
            assert (layout.fingerprint, digest) not in found, "one block served from two slots"
            found[layout.fingerprint, digest] = bytes(view)
    return found


@dataclasses.dataclass(frozen=True)
class Image:
    """What lay on the device at one moment, and the keys that no crash may lose then."""

    note: str
    slabs: bytes
    index: bytes | None
    safe: frozenset[Key]


class Workload:
    """Stores, moves and drops blocks, and freezes the device after every write."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.images: list[Image] = []
        self.slots: dict[int, Key | None] = {}  # as the writer knows them
        self.durable: dict[int, Key] = {}  # as the last commit left them
        self.touched: set[int] = set()  # slots written or dropped since
        self.sequence = 0
        self.files = NvmeFiles.open([folder], SLAB, SLAB)
        self.header = (folder / BLOCKS_NAME).read_bytes()[:HEADER_BYTES]
        self.index = self.open_index()

    def open_index(self) -> Index:
        index = Index(
            self.folder,
            file_ids=self.files.file_ids,
            sync_interval_s=FAR_S,
            before_commit=self.files.sync,
            on_state=lambda state: pytest.fail(f"commit failed: {state}"),
        )
        assert not index.warnings
        return index

    def freeze(self, note: str, index: bytes | None = None) -> None:
        safe = frozenset(key for offset, key in self.durable.items() if offset not in self.touched)
        slabs = (self.folder / BLOCKS_NAME).read_bytes()[HEADER_BYTES:]
        self.images.append(Image(note, slabs, index or self.index_bytes(), safe))

    def index_bytes(self) -> bytes | None:
        path = self.folder / INDEX_NAME
        return path.read_bytes() if path.exists() else None

    def index_inode(self) -> int:
        path = self.folder / INDEX_NAME
        return path.stat().st_ino if path.exists() else 0

    def store(self) -> None:
        """One block into a free or a reused slot, one page at a time."""
        offset = self.random.randrange(SLOTS) * SLOT
        number = self.random.choice(list(LAYOUTS))
        layout = LAYOUTS[number]
        # Few hashes, so that they meet under both layouts and come back after they were dropped.
        digest = self.random.randrange(30).to_bytes(8, "big") * self.random.choice([1, 4])
        key = (layout.fingerprint, digest)
        if key in self.slots.values():
            return
        data = memoryview(content(key))
        self.touched.add(offset)
        for page in self.random.sample([0, 1], 2):
            place = page * ALIGNMENT
            self.files.write(offset + place, data[place : place + ALIGNMENT])
            self.freeze(f"page {page} of slot {offset}")
        self.sequence += 1
        self.index.put(offset, number, self.sequence, digest, sums_of(layout, digest, data))
        self.slots[offset] = key

    def drop(self) -> None:
        held = [offset for offset, key in self.slots.items() if key]
        if held:
            offset = self.random.choice(held)
            self.touched.add(offset)
            self.index.delete(offset)
            self.slots[offset] = None

    def commit(self) -> None:
        """A commit, and the images of its way: LMDB writes pages by number, then a meta page."""
        before, inode = self.index_bytes(), self.index_inode()
        assert self.index.flush(FAR_S)
        after = self.index_bytes()
        assert after is not None
        if before is not None and inode == self.index_inode():  # else it was renamed in one step
            pages = range(0, len(after), ALIGNMENT)
            changed = [
                at for at in pages if before[at : at + ALIGNMENT] != after[at : at + ALIGNMENT]
            ]
            growing = bytearray(before.ljust(len(after), b"\0"))
            for at in [at for at in changed if at >= 2 * ALIGNMENT]:
                growing[at : at + ALIGNMENT] = after[at : at + ALIGNMENT]
                self.freeze(f"index page {at // ALIGNMENT}", bytes(growing))
        self.durable = {offset: key for offset, key in self.slots.items() if key}
        self.touched.clear()
        self.freeze("committed")

    def restart(self) -> None:
        """A clean end and a second life, which rewrites the index before its first commit."""
        assert self.index.close(FAR_S)
        self.index = self.open_index()
        assert set(self.index.load().offsets) == set(self.durable)

    def run(self, rounds: int) -> None:
        for number, layout in LAYOUTS.items():
            self.index.put_layout(number, json.dumps(dataclasses.asdict(layout)))
        self.freeze("nothing yet")
        for turn in range(rounds):
            for _ in range(self.random.randrange(1, 5)):
                self.store() if self.random.random() < 0.8 else self.drop()
            self.commit()
            if turn == rounds // 2:
                self.restart()
        assert self.index.close(FAR_S)
        self.files.close()


class Device:
    """A place to lay images out and to open them."""

    def __init__(self, folder: Path, header: bytes) -> None:
        self.folder = folder
        self.header = header

    def lay(self, slabs: bytes, index: bytes | None) -> None:
        (self.folder / BLOCKS_NAME).write_bytes(self.header + slabs)
        path = self.folder / INDEX_NAME
        path.unlink(missing_ok=True)
        if index is not None:
            path.write_bytes(index)

    def open(self) -> tuple[NvmeFiles, Index]:
        files = NvmeFiles.open([self.folder], SLAB, SLAB)
        index = Index(
            self.folder,
            file_ids=files.file_ids,
            sync_interval_s=FAR_S,
            before_commit=files.sync,
            on_state=lambda state: None,
        )
        return files, index

    def served(self) -> tuple[dict[Key, bytes], int, list[str]]:
        """What a next life serves, how many records did not verify, and what it warns of."""
        files, index = self.open()
        loaded = index.load()
        found = served(files, loaded)
        index.close(FAR_S)
        files.close()
        return found, len(loaded.offsets) - len(found), files.warnings + index.warnings
