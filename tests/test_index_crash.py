"""Crash images of the NVMe tier: whatever a crash or decay leaves, nothing wrong is ever served.

A workload runs on real block files and a real index, and the bytes of both are frozen after every
write: after each page of a block, and after each page of each LMDB commit. Then every image is
opened as the next life would. A record is *served* when its block's bytes fit its checksums. Served
bytes must be those stored under that key; everything else is a miss; the process always starts.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore import index_reader
from kvstore.index import FILE_NAME as INDEX_NAME
from kvstore.index import _columns
from kvstore.tiers.base import ALIGNMENT
from kvstore.tiers.nvme import FILE_NAME as BLOCKS_NAME
from kvstore.tiers.nvme import HEADER_BYTES, LOCK_NAME, NvmeFiles
from tests.index_workload import (
    FAR_S,
    LAYOUTS,
    SLAB,
    SLOT,
    Device,
    Image,
    Key,
    Workload,
    content,
    served,
    sums_of,
)


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workload]:
    folder = tmp_path_factory.mktemp("workload")
    workload = Workload(folder, seed=20)
    workload.run(rounds=18)
    yield workload
    shutil.rmtree(folder)


@pytest.fixture
def device(tmp_path: Path, workload: Workload) -> Device:
    return Device(tmp_path, workload.header)


def assert_right(found: dict[Key, bytes]) -> None:
    for key, data in found.items():
        assert data == content(key), f"wrong bytes for {key}"


# --- Crashes


def test_every_crash_serves_what_was_durable_and_nothing_wrong(
    workload: Workload, device: Device
) -> None:
    marks: collections.Counter[str] = collections.Counter()
    for image in workload.images:
        device.lay(image.slabs, image.index)
        found, refused, warnings = device.served()
        assert not warnings, image.note
        assert_right(found)
        assert image.safe <= set(found), f"lost after {image.note}"
        marks[image.note.split()[0]] += 1
        marks["served"] += len(found)
        marks["refused"] += refused
        marks["young"] += len(set(found) - image.safe)
    # The images did show what they are for: torn blocks behind an older record, and all kinds.
    assert min(marks[kind] for kind in ("page", "index", "committed")) > 10, marks
    assert marks["refused"] > 10, marks
    assert marks["served"] > 1000, marks


def test_a_disk_that_lies_about_its_order_serves_nothing_wrong(
    workload: Workload, device: Device
) -> None:
    """The index got ahead of the blocks, or its meta page ahead of its tree."""
    chance = random.Random(4)
    images = [image for image in workload.images if image.index]
    for _ in range(60):
        early, late = sorted(chance.sample(range(len(images)), 2))
        old, new = images[early].index, images[late].index
        assert old is not None
        assert new is not None
        mixed = bytearray(new)
        for at in range(0, min(len(old), len(new)), ALIGNMENT):
            if chance.random() < 0.2:
                mixed[at : at + ALIGNMENT] = old[at : at + ALIGNMENT]
        device.lay(images[early].slabs, bytes(mixed))
        assert_right(device.served()[0])


def test_death_during_the_rewrite_leaves_the_old_index(workload: Workload, device: Device) -> None:
    last = workload.images[-1]
    for leftover in (b"", b"half of a file" * 999, last.index or b""):
        device.lay(last.slabs, last.index)
        (device.folder / (INDEX_NAME + ".new")).write_bytes(leftover)
        assert set(device.served()[0]) == last.safe
        files, index = device.open()
        index.put(0, 1, 1 << 40, b"12345678", b"a sum...")
        assert index.flush(FAR_S)
        index.close(FAR_S)
        files.close()
        assert sorted(os.listdir(device.folder)) == [BLOCKS_NAME, LOCK_NAME, INDEX_NAME]


# --- Decay

# Scans damaged files one after another, and dies of some: much faster than a process for each.
SURVEYOR = """
import io, json, sys, lmdb
from kvstore import index_reader
base = open(sys.argv[1], "rb").read()
for line in sys.stdin:
    length, edits = json.loads(line)
    image = bytearray(base[:length])
    for at, value in edits:
        image[at] ^= value
    open(sys.argv[2], "wb").write(image)
    out, error = io.BytesIO(), ""
    try:
        index_reader._scan(sys.argv[2], out)
    except (lmdb.Error, OSError, index_reader._Damaged) as caught:
        error, out = repr(caught), io.BytesIO()
    sys.stdout.buffer.write(json.dumps([error, out.tell()]).encode() + b"\\n" + out.getvalue())
    sys.stdout.buffer.flush()
"""

Damage = tuple[int, list[tuple[int, int]]]  # length to cut to, then (place, bits to flip)
Outcome = index_reader.Scan | str


def survey(folder: Path, base: bytes, damages: list[Damage]) -> list[Outcome]:
    """For each damage what can be scanned, or why nothing can: an error, or how the reader died."""
    (folder / "base").write_bytes(base)
    outcomes: list[Outcome] = []
    while len(outcomes) < len(damages):
        (folder / "todo").write_text(
            "".join(json.dumps(damage) + "\n" for damage in damages[len(outcomes) :])
        )
        with (
            open(folder / "todo") as todo,
            subprocess.Popen(
                [sys.executable, "-c", SURVEYOR, str(folder / "base"), str(folder / "image")],
                stdin=todo,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            ) as child,
        ):
            assert child.stdout is not None
            while line := child.stdout.readline():
                error, length = json.loads(line)
                data = child.stdout.read(length)
                outcomes.append(error or index_reader.parse(memoryview(data)))
            if child.wait():
                assert child.returncode < 0, "the surveyor has a defect"
                outcomes.append(f"died of {-child.returncode}")
    return outcomes


def damaged(base: bytes, damage: Damage) -> bytes:
    length, edits = damage
    image = bytearray(base[:length])
    for at, value in edits:
        image[at] ^= value
    return bytes(image)


def flips(base: bytes, chance: random.Random) -> list[Damage]:
    """One bit anywhere; each byte of each page's head and of both meta pages; sectors of noise."""
    size = len(base)
    anywhere = [(size, [(chance.randrange(size), 1 << chance.randrange(8))]) for _ in range(600)]
    heads = [
        (size, [(page + at, chance.randrange(1, 256))])
        for page in range(0, size, ALIGNMENT)
        for at in range(24 if page >= 2 * ALIGNMENT else 160)
    ]
    noise = [
        (size, [(at, chance.randrange(256)) for at in range(start, start + 512)])
        for start in (chance.randrange(size // 512) * 512 for _ in range(60))
    ]
    return anywhere + heads + noise


def cuts(base: bytes, chance: random.Random) -> list[Damage]:
    """Every page and sector boundary, and odd lengths."""
    lengths = {*range(0, len(base), 512), *(chance.randrange(len(base)) for _ in range(40))}
    return [(length, []) for length in sorted(lengths)]


@pytest.mark.parametrize("kind", [flips, cuts], ids=lambda kind: kind.__name__)
def test_a_decayed_index_serves_nothing_wrong_and_always_starts(
    workload: Workload, device: Device, kind: object
) -> None:
    last = workload.images[-1]
    assert last.index is not None
    assert callable(kind)
    damages = kind(last.index, random.Random(7))
    outcomes = survey(device.folder, last.index, damages)
    marks: collections.Counter[str] = collections.Counter()
    by_outcome: dict[str, list[Damage]] = collections.defaultdict(list)
    device.lay(last.slabs, last.index)
    files = NvmeFiles.open([device.folder], SLAB, SLAB)
    for damage, outcome in zip(damages, outcomes, strict=True):
        if isinstance(outcome, str):
            marks[outcome.split("(")[0]] += 1
            by_outcome[outcome.split("(")[0]].append(damage)
        else:
            marks["scanned"] += 1
            assert_right(served(files, _columns(outcome)[0]))
            by_outcome["scanned"].append(damage)
    files.close()
    for some in by_outcome.values():
        for damage in some[:: max(1, len(some) // 2)]:
            check_life(device, last, damaged(last.index, damage))
    if kind is cuts:  # what the children are for
        assert marks[f"died of {signal.SIGBUS:d}"] > 20, marks


def check_life(device: Device, image: Image, index_bytes: bytes) -> None:
    """The next life starts with this index, writes to it, and is found by the life after."""
    device.lay(image.slabs, index_bytes)
    found, _, warnings = device.served()
    assert_right(found)
    assert found or warnings, "all is lost and nobody says so"
    files, index = device.open()
    loaded = index.load()
    layout = LAYOUTS[1]
    digest, offset = b"new in this life", 3 * SLOT
    key = (layout.fingerprint, digest)
    files.write(offset, memoryview(content(key)))
    index.put_layout(1, json.dumps(dataclasses.asdict(layout)))
    sums = sums_of(layout, digest, memoryview(content(key)))
    index.put(offset, 1, loaded.last_sequence + 1, digest, sums)
    assert index.flush(FAR_S)
    assert index.close(FAR_S)
    files.close()
    again, _, warnings = device.served()
    assert_right(again)
    assert not warnings
    lost = {name for name in found if name not in again}
    assert len(lost) <= 1, "only the block whose slot was reused may be gone"
    assert key in again


def test_a_decayed_block_is_a_miss_and_its_neighbours_are_not(
    workload: Workload, device: Device
) -> None:
    last = workload.images[-1]
    chance = random.Random(3)
    offsets = sorted(workload.durable)
    for _ in range(25):
        slabs = bytearray(last.slabs)
        hit = chance.sample(offsets, 3)
        for offset in hit:
            slabs[offset + chance.randrange(SLOT)] ^= 1 << chance.randrange(8)
        device.lay(bytes(slabs), last.index)
        found, refused, _ = device.served()
        assert_right(found)
        assert refused == 3
        assert set(found) == last.safe - {workload.durable[offset] for offset in hit}


@pytest.mark.parametrize("length", [0, 1, ALIGNMENT, HEADER_BYTES, HEADER_BYTES + SLOT, -1])
def test_a_cut_block_file_is_made_anew_and_the_index_with_it(
    workload: Workload, device: Device, length: int
) -> None:
    last = workload.images[-1]
    device.lay(last.slabs, last.index)
    path = device.folder / BLOCKS_NAME
    os.truncate(path, length if length >= 0 else path.stat().st_size - 1)
    found, _, warnings = device.served()
    assert found == {}
    assert any("other block files" in warning for warning in warnings)


def test_a_block_file_cut_while_it_is_open_gives_misses(workload: Workload, device: Device) -> None:
    last = workload.images[-1]
    device.lay(last.slabs, last.index)
    files, index = device.open()
    loaded = index.load()
    os.truncate(device.folder / BLOCKS_NAME, HEADER_BYTES + SLAB // 2)
    found = served(files, loaded)
    assert_right(found)
    half = {key for offset, key in workload.durable.items() if offset + SLOT <= SLAB // 2}
    assert set(found) == half
    index.close(FAR_S)
    files.close()


def test_a_block_under_a_record_of_another_key_is_a_miss(device: Device) -> None:
    """The slot was reused, and the index had not caught up: same size, same place, other key."""
    layout, other = LAYOUTS[1], LAYOUTS[2]
    view = memoryview(content((layout.fingerprint, b"one hash")))
    sums = sums_of(layout, b"one hash", view)
    assert sums_of(layout, b"1the hash", view) != sums
    assert sums_of(other, b"one hash", view)[:8] != sums
    assert sums_of(other, b"one hash", view)[8:] != sums
