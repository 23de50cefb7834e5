"""Power cuts at every write and sync of the NVMe tier: what was durable is served, all right.

    python -m tests.faults.power [--images K] [--seed N]

A workload runs through a whole tenant on a small device, so that slots are reused, and everything
that reaches block files and index is recorded. For each step of the record some images are drawn of
what the drive may hold after a power cut there, and each is opened by the real code.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from kvstore.index import Index, Loaded
from kvstore.tiers.nvme import FILE_NAME, HEADER_BYTES, NvmeFiles
from tests.faults.host import KIB, TENANT, Host, Settings, content, key, layout, run, say
from tests.faults.medium import Drive, Recorder, lay
from tests.faults.sweep import quiet
from tests.index_workload import FAR_S, SLOT, served

SLAB, NVME = 64 * KIB, 512 * KIB  # 64 slots
SYNC_INTERVAL_S = 0.03
LAYOUTS = (layout(SLOT), layout(SLOT, shards=2))
IN_FULL_EVERY = 40  # images that a whole tenant opens; the others, files and index alone


class Recording:
    """What a workload did to its device, and how long it took to be safe there."""

    def __init__(self, folder: Path, seed: int, rounds: int) -> None:
        self.settings = Settings(
            folder, nvme_bytes=NVME, slab="64 KiB", sync_interval=f"{SYNC_INTERVAL_S:g} s"
        )
        self.recorder = Recorder()
        self._dice = random.Random(seed)
        self._rounds = rounds
        with self.recorder.watching():
            for _ in range(2):  # two lives: the second rewrites the index before it commits
                self.settings.lose_memory()
                run(self._life)
        self.events = self.recorder.events
        blocks = (self.settings.nvme / TENANT / FILE_NAME).read_bytes()
        self.fresh = blocks[:HEADER_BYTES].ljust(len(blocks), b"\0")

    async def _life(self) -> None:
        host = Host(self.settings, self.recorder.wrap)
        dice = self._dice
        for _ in range(self._rounds):
            some = LAYOUTS[dice.randrange(2)]
            keys = [key(dice.randrange(150)) for _ in range(dice.randrange(1, 9))]
            keys = list(dict.fromkeys(keys))
            await host.put(some, keys)
            if dice.random() < 0.2:
                await host.forget(some, keys[:2])
            if dice.random() < 0.5:
                await host.settled()
            if dice.random() < 0.2:
                await host.durable()
        await host.settled()
        await host.stop()
        assert not host.wrong and not host.problems, host.problems

    def lags_s(self) -> list[float]:
        """From the end of each block's write to its record being durable, where it came so far."""
        ended: dict[int, float] = {}
        running: dict[int, int] = {}
        lags = []
        for event in self.events:
            if event.kind == "begin":
                running[event.number] = event.place
                ended.pop(event.place, None)
            elif event.kind == "end":
                ended[running.pop(event.number)] = event.at
            elif event.kind == "commit":
                for place, record in event.records.items():
                    if record is not None and place in ended:
                        lags.append(event.at - ended.pop(place))
        return lags


class Opener:
    """Opens images as the next life does. What an index file says is read once for each file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / TENANT
        self.marks: collections.Counter[str] = collections.Counter()
        self._known: dict[bytes, Loaded] = {}
        self._settings = Settings(
            folder, nvme_bytes=NVME, slab="64 KiB", sync_interval=f"{FAR_S:g} s"
        )
        self._settings.tree["nvme"]["paths"] = [str(folder)]  # type: ignore[index]

    def check(self, blocks: bytes, index: bytes | None, must: set[bytes]) -> None:
        """Asserts that the image opens, serves nothing wrong, and all of `must`."""
        lay(self.folder, blocks, index, FILE_NAME)
        files = NvmeFiles.open([self.folder], NVME, SLAB)
        assert not files.warnings, files.warnings
        loaded = self._loaded(files, index)
        found = served(files, loaded)
        files.close()
        for (_, digest), data in found.items():
            assert data == content(digest, SLOT), "a wrong byte is served"
        there = {digest for _, digest in found}
        assert must <= there, f"{len(must - there)} blocks lost that were durable"
        self.marks.update(
            images=1,
            served=len(found),
            due=len(must),
            young=len(there - must),
            refused=len(loaded.offsets) - len(found),
        )
        if not self.marks["images"] % IN_FULL_EVERY:
            lay(self.folder, blocks, index, FILE_NAME)
            run(lambda: self._whole(must))

    def _loaded(self, files: NvmeFiles, index: bytes | None) -> Loaded:
        digest = hashlib.blake2b(index or b"").digest()
        if digest not in self._known:
            opened = Index(
                self.folder,
                file_ids=files.file_ids,
                sync_interval_s=FAR_S,
                before_commit=files.sync,
                on_state=lambda state: None,
            )
            self._known[digest] = opened.load()
            opened.close(FAR_S)
            self.marks.update(indexes=1, dropped=bool(opened.warnings))
        return self._known[digest]

    async def _whole(self, must: set[bytes]) -> None:
        """A tenant over this image serves what it must, and stores again."""
        self._settings.lose_memory()
        host = Host(self._settings)
        there: set[bytes] = set()
        for one in LAYOUTS:
            there |= await host.get_each(one, [key(number) for number in range(150)])
        assert not host.wrong, "a wrong byte is served"
        assert must <= there, f"{len(must - there)} blocks lost that were durable"
        new = [key(number) for number in range(1_000, 1_004)]
        assert await host.put(LAYOUTS[0], new) == len(new)
        await host.durable()
        assert set(await host.get(LAYOUTS[0], new)) == set(new)
        await host.stop()
        self.marks["whole tenants"] += 1


def cut_everywhere(
    recording: Recording, folder: Path, *, images: int, seed: int, every: int = 1
) -> collections.Counter[str]:
    """Draw images at each `every`th step of the record and check them; what was seen on the way."""
    dice = random.Random(seed)
    opener = Opener(folder)
    drive = Drive(recording.fresh, HEADER_BYTES)
    for at, event in enumerate(recording.events):
        drive.play(event)
        opener.marks[event.kind] += 1
        if (at + seed) % every:
            continue
        for _ in range(images):
            opener.marks["unsynced"] += drive.blocks.pending + drive.index.pending
            blocks = drive.blocks.image(dice) or b""  # there from the start
            opener.check(blocks, drive.index.image(dice), set(drive.must.values()))
    return opener.marks


def main() -> int:
    """Print the figures; a block lost or wrong ends it with an assertion."""
    parser = argparse.ArgumentParser(description="Cut the power at every write and sync.")
    parser.add_argument("--images", type=int, default=8, metavar="K", help="drawn at each step")
    parser.add_argument("--rounds", type=int, default=60, help="of the workload, in each life")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="each Kth step only")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="kvpower-"))
    try:
        with quiet():
            recording = Recording(folder / "workload", options.seed, options.rounds)
            marks = cut_everywhere(
                recording,
                folder / "images",
                images=options.images,
                seed=options.seed,
                every=options.every,
            )
    finally:
        shutil.rmtree(folder)
    lags = recording.lags_s()
    say(
        f"seed {options.seed}: {len(recording.events)} steps; "
        + ", ".join(f"{name} {count}" for name, count in sorted(marks.items()))
        + f"\n{len(lags)} blocks durable, the latest {1e3 * max(lags):.0f} ms after its write "
        f"(interval {1e3 * SYNC_INTERVAL_S:.0f} ms, longest commit "
        f"{1e3 * recording.recorder.longest_commit_s:.0f} ms)\n"
        f"0 wrong, 0 lost, all opened; {time.monotonic() - started:.0f} s\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
