"""Random bit flips in everything that outlives a daemon: no wrong byte is served, it always starts.

    python -m tests.faults.flips [--flips 100000] [--seed N]

Two states are built once: blocks on NVMe with their index (memory is lost, as in a reboot), and
blocks in an arena with its slot table and notes (the daemon is restarted). Copies of them with bits
flipped are opened by a whole tenant, which is asked for every block and then stores new ones. The
index gets most of its flips one at a time, read by the child's own code without a tenant around it.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kvstore.adoption import ARENA, NOTES, SLOT_TABLE
from kvstore.hands import describe
from kvstore.index import FILE_NAME as INDEX
from kvstore.index import Loaded, _columns
from kvstore.tiers.nvme import FILE_NAME as BLOCKS
from kvstore.tiers.nvme import HEADER_BYTES, NvmeFiles
from tests.faults.host import MIB, TENANT, Host, Settings, content, key, layout, run, say
from tests.faults.sweep import quiet
from tests.index_workload import SLOT, served
from tests.test_index_crash import survey

LAYOUTS = (layout(SLOT), layout(SLOT, shards=2))
KEYS = [key(number) for number in range(200)]  # even ones of the first layout, odd of the second
NEW = [key(number) for number in range(10_000, 10_003)]
SLAB = 64 << 10
Hit = tuple[str, int]  # file, byte


@dataclasses.dataclass(frozen=True)
class Kind:
    """Where flips go, and how many into one image (drawn from these numbers)."""

    name: str
    files: tuple[str, ...]
    per_image: tuple[int, ...]
    share: float  # of all flips


KINDS = (
    Kind("blocks", (BLOCKS,), (40, 600), 0.40),
    Kind("header", (BLOCKS,), (1, 2), 0.0002),
    Kind("index", (INDEX,), (1, 2, 10), 0.002),
    Kind("arena", (ARENA,), (40, 600), 0.30),
    Kind("table", (SLOT_TABLE,), (1, 3, 30, 800), 0.15),
    Kind("notes", (NOTES,), (1, 2), 0.0002),
)
# What is left of all flips goes into the index, one by one.


class State:
    """Files of a stopped daemon that served every key, and copies of them to damage."""

    def __init__(self, folder: Path, *, nvme: bool) -> None:
        self.nvme = nvme
        size = 4 * MIB if nvme else 0
        self.settings = Settings(folder, nvme_bytes=size, slab="64 KiB", sync_interval="1 h")
        self.folder = (self.settings.nvme if nvme else self.settings.arena) / TENANT
        self.hidden: dict[str, Path] = {}  # the same inode under a name that nobody unlinks
        self.base: dict[str, bytes] = {}
        self.where: dict[bytes, int] = {}  # key -> where its bytes lie in the first file
        run(self._fill)
        names = (BLOCKS, INDEX) if nvme else (ARENA, SLOT_TABLE, NOTES)
        for name in names:
            self.hidden[name] = self.folder.parent / f"{name}.kept"
            os.link(self.folder / name, self.hidden[name])
            self.base[name] = self.hidden[name].read_bytes()
        for one in KEYS:
            at = self.base[names[0]].find(content(one, SLOT))
            assert at >= 0, "it is not there"
            self.where[one] = at

    async def _fill(self) -> None:
        host = Host(self.settings)
        for number in (0, 1):
            await host.put(LAYOUTS[number], KEYS[number::2])
        if self.nvme:
            await host.durable()
        catalog = host.store.catalog
        rows = [row for row, key in enumerate(catalog.keys) if key is not None]
        while any(catalog.sums[row] is None for row in rows):  # taken in the background
            await host.pass_time(1.0)
            await host.settled()
        await host.stop()

    def lay(self, hits: list[tuple[str, int, int]]) -> None:
        """Files as they were, but for these bits."""
        if self.nvme:
            self.settings.lose_memory()
        images = {name: bytearray(data) for name, data in self.base.items()}
        for name, at, bit in hits:
            images[name][at] ^= 1 << bit
        for name, image in images.items():
            (self.folder / name).unlink(missing_ok=True)
            with self.hidden[name].open("r+b") as file:
                file.write(image)
                file.truncate()
            os.link(self.hidden[name], self.folder / name)

    def places(self, kind: Kind) -> Callable[[random.Random], Hit]:
        """A drawing of bytes: mostly those that mean something."""
        name = kind.files[0]
        whole = len(self.base[name])
        if kind.name in ("blocks", "arena"):
            held = list(self.where.values())
            return lambda dice: (name, dice.choice(held) + dice.randrange(SLOT))
        if kind.name == "header":
            return lambda dice: (name, dice.randrange(64))
        data = self.base[name]
        used = [at for at in range(whole) if data[at]]
        return lambda dice: (
            name,
            dice.choice(used) if dice.random() < 0.8 else dice.randrange(whole),
        )

    async def ask(self) -> tuple[set[bytes], Host]:
        """What a tenant over the files as they lie serves; it stores new blocks, too."""
        host = Host(self.settings)
        there: set[bytes] = set()
        for number in (0, 1):
            there |= await host.get_each(LAYOUTS[number], KEYS[number::2])
        assert await host.put(LAYOUTS[0], NEW) == len(NEW)
        assert set(await host.get(LAYOUTS[0], NEW)) == set(NEW)
        await host.settled()
        host.store.check()
        assert host.workers_alive and not host.problems, host.problems
        await host.stop()
        return there, host


def flip(state: State, kind: Kind, flips: int, dice: random.Random) -> collections.Counter[str]:
    """So many flips of a kind, over as many images as it takes."""
    marks: collections.Counter[str] = collections.Counter()
    draw = state.places(kind)
    while marks["flips"] < flips:
        count = min(dice.choice(kind.per_image), flips - marks["flips"])
        hits = [(*draw(dice), dice.randrange(8)) for _ in range(count)]
        state.lay(hits)
        there, host = run(state.ask)
        assert not host.wrong, f"a wrong byte is served: {kind.name} {hits}"
        marks.update(images=1, flips=count, served=len(there), missed=len(KEYS) - len(there))
        marks["emptied"] += not there
        if kind.name in ("blocks", "arena"):
            _check_neighbours(state, hits, there)
    return marks


def _check_neighbours(state: State, hits: list[tuple[str, int, int]], there: set[bytes]) -> None:
    """All that was not hit is served, and nothing that was: two flips of one bit are none."""
    odd = [hit for hit, times in collections.Counter(hits).items() if times % 2]
    hurt = {one for one, at in state.where.items() if any(at <= h < at + SLOT for _, h, _ in odd)}
    assert there == set(KEYS) - hurt, f"{len(there ^ (set(KEYS) - hurt))} blocks differ"


def flip_index_singly(
    state: State, flips: int, dice: random.Random, scratch: Path
) -> collections.Counter[str]:
    """One flip in each image of the index, read as the daemon's child does."""
    scratch.mkdir()
    base = state.base[INDEX]
    damages = [
        (len(base), [(dice.randrange(len(base)), 1 << dice.randrange(8))]) for _ in range(flips)
    ]
    marks: collections.Counter[str] = collections.Counter(flips=flips)
    state.lay([])
    files = NvmeFiles.open([state.folder], len(state.base[BLOCKS]) - HEADER_BYTES, SLAB)
    good: set[tuple[object, ...]] = set()
    for outcome in survey(scratch, base, damages):
        if isinstance(outcome, str):
            marks["unreadable"] += 1
            continue
        loaded = _columns(outcome)[0]
        rows = list(_rows(loaded))
        fresh = [at for at, row in enumerate(rows) if row not in good]
        found = served(files, _some(loaded, fresh))
        for (_, digest), data in found.items():
            assert data == content(digest, SLOT), "a wrong byte is served"
        good.update(rows[at] for at in fresh if (rows[at][0], rows[at][2]) in _names(found))
        marks.update(images=1, served=sum(row in good for row in rows))
    files.close()
    return marks


def _rows(loaded: Loaded) -> Iterator[tuple[object, ...]]:
    for number, *row in zip(
        loaded.layout_numbers, loaded.offsets, loaded.hashes, loaded.sums, strict=True
    ):
        yield loaded.layouts.get(number), row[0], row[1], row[2]


def _names(found: dict[tuple[bytes, bytes], bytes]) -> set[tuple[str, bytes]]:
    texts = {one.fingerprint: describe(one) for one in LAYOUTS}
    return {(texts[fingerprint], digest) for fingerprint, digest in found}


def _some(loaded: Loaded, rows: list[int]) -> Loaded:
    return Loaded(
        loaded.layouts,
        [loaded.offsets[at] for at in rows],
        [loaded.layout_numbers[at] for at in rows],
        [loaded.sequences[at] for at in rows],
        [loaded.hashes[at] for at in rows],
        [loaded.sums[at] for at in rows],
        loaded.damaged,
    )


def flip_everything(
    folder: Path, flips: int, seed: int, tell: Callable[[str], object] = lambda line: None
) -> dict[str, collections.Counter[str]]:
    """All kinds in their shares; what came of each."""
    dice = random.Random(seed)
    on_nvme, in_memory = State(folder / "nvme", nvme=True), State(folder / "memory", nvme=False)
    marks: dict[str, collections.Counter[str]] = {}
    for kind in KINDS:
        state = on_nvme if kind.files[0] in on_nvme.base else in_memory
        marks[kind.name] = flip(state, kind, max(2, round(flips * kind.share)), dice)
        tell(f"{kind.name}: {dict(marks[kind.name])}\n")
    left = flips - sum(one["flips"] for one in marks.values())
    marks["index, singly"] = flip_index_singly(on_nvme, max(2, left), dice, folder / "scratch")
    tell(f"index, singly: {dict(marks['index, singly'])}\n")
    return marks


def main() -> int:
    """Print the figures; a wrong byte, or a tenant that does not start, ends it."""
    parser = argparse.ArgumentParser(description="Flip bits in all that outlives a daemon.")
    parser.add_argument("--flips", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="kvflips-"))
    try:
        with quiet():
            marks = flip_everything(folder, options.flips, options.seed, say)
    finally:
        shutil.rmtree(folder)
    every = sum(marks.values(), collections.Counter())
    say(
        f"seed {options.seed}: {every['flips']} flips in {every['images']} images, "
        f"{every['served']} blocks served, 0 wrong; every one started; "
        f"{time.monotonic() - started:.0f} s\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
