"""The NVMe tier of one tenant as a device that may be missing: files and index, opened if possible.

At the start, or at a later probe, the files are opened; until then every operation fails, the store
fences the tier, and the daemon serves from DRAM alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from kvstore.catalog import LayoutEntry
from kvstore.errors import InvalidLayout
from kvstore.hands import describe
from kvstore.index import Index, Loaded
from kvstore.store import Store
from kvstore.tiers.faults import FaultPlan, FaultyTier
from kvstore.tiers.nvme import FILE_NAME, NvmeFiles
from kvstore.types import Layout

log = structlog.get_logger()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiskConfig:
    """Where a tenant's NVMe files are. `size_bytes` is the sum over all folders, `gid` the group
    that may read them, `faults` what goes wrong on purpose."""

    tenant: str
    folders: tuple[Path, ...]
    size_bytes: int
    slab_bytes: int
    sync_interval_s: float
    gid: int | None = None
    faults: FaultPlan | None = None


class Disk:
    """A mover's device, and the index that belongs to it."""

    name = "nvme"

    def __init__(self, config: DiskConfig, opened: Callable[[Index, Loaded], None]) -> None:
        self._config = config
        self._opened = opened
        self.files: NvmeFiles | FaultyTier | None = None
        self.index: Index | None = None
        self.capacity_bytes = config.size_bytes

    @property
    def paths(self) -> list[Path]:
        """Of the files, in order."""
        return [folder / FILE_NAME for folder in self._config.folders]

    def open(self) -> None:
        """Open files and index, and hand what they hold to `opened`. OSError when that fails."""
        config = self._config
        for folder in config.folders:
            _make_durably(folder)
            with contextlib.suppress(OSError):  # the files then tell that nobody else reads them
                if config.gid is not None:
                    os.chown(folder, -1, config.gid)
                folder.chmod(0o700 if config.gid is None else 0o710)
        files = NvmeFiles.open(config.folders, config.size_bytes, config.slab_bytes, gid=config.gid)
        tier = files if config.faults is None else FaultyTier(files, config.faults)
        try:
            index = Index(
                config.folders[0],
                file_ids=files.file_ids,
                sync_interval_s=config.sync_interval_s,
                before_commit=tier.sync,
                on_state=self._index_state,
            )
        except BaseException:
            files.close()
            raise
        for warning in (*files.warnings, *index.warnings):
            log.warning(warning, tenant=config.tenant)
        self.files, self.index = tier, index
        self._opened(index, index.load())

    def read(self, offset: int, into: memoryview) -> None:
        """See Tier.read."""
        self._there().read(offset, into)

    def write(self, offset: int, data: memoryview) -> None:
        """See Tier.write."""
        self._there().write(offset, data)

    def sync(self) -> None:
        """See Tier.sync."""
        self._there().sync()

    def probe(self) -> None:
        """Open what could not be opened; write and read back a page that is no block."""
        if self.files is None:
            self.open()
        self._there().probe()

    def close(self) -> None:
        """Close the files; the index is closed before, by who stops the tenant."""
        if self.files is not None:
            self.files.close()

    def _there(self) -> NvmeFiles | FaultyTier:
        if self.files is None:
            raise OSError(errno.ENODEV, "the NVMe files are not open", str(self._config.folders[0]))
        return self.files

    def _index_state(self, problem: str | None) -> None:
        if problem:
            log.error("NVMe index cannot be written", tenant=self._config.tenant, problem=problem)
        else:
            log.warning("NVMe index is written again", tenant=self._config.tenant)


def _make_durably(folder: Path) -> None:
    """Make a folder that a power cut cannot take back, with all that was synced inside."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for one in missing:
        parent = os.open(one.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


def adopt(store: Store, index: Index, loaded: Loaded, tenant: str, now: float) -> int:
    """Seat the blocks that the index knows; returns how many can be served.

    Blocks that cannot be seated, or whose layout is no layout, are dropped from the index. What was
    loaded is used up: with a million blocks its memory is wanted back before more is built.
    """
    store.placement.sequence = max(store.placement.sequence, loaded.last_sequence)
    served, total = 0, len(loaded.offsets)
    numbers = np.asarray(loaded.layout_numbers, np.int64)
    layouts = {n: _layout(loaded.layouts.get(n)) for n in np.unique(numbers).tolist()}
    fits = _slab_fits(store, numbers, np.asarray(loaded.offsets, np.uint64), layouts)
    for number, layout in layouts.items():
        mine = np.flatnonzero(numbers == number)
        bad = mine[~fits[mine]].tolist()
        rows: Sequence[int] = mine[fits[mine]].tolist()
        for at in bad:
            index.delete(loaded.offsets[at])
        if layout is None:
            log.warning("blocks of an unusable layout dropped", tenant=tenant, blocks=len(bad))
            continue
        entry = store.catalog.open(layout)
        rows = _new_rows(entry, layout, loaded, rows, index)
        index.put_layout(entry.number, describe(layout))
        if entry.number != number:
            for at in rows:
                index.put(
                    loaded.offsets[at],
                    entry.number,
                    loaded.sequences[at],
                    loaded.hashes[at],
                    loaded.sums[at],
                )
        if len(rows) == total:
            loaded.layout_numbers.clear()
            loaded.sequences.clear()
            served += store.adopt(layout, loaded.hashes, loaded.offsets, loaded.sums, now)
            break
        keys, offsets = [loaded.hashes[at] for at in rows], [loaded.offsets[at] for at in rows]
        served += store.adopt(layout, keys, offsets, [loaded.sums[at] for at in rows], now)
    log.info(
        "NVMe index loaded",
        tenant=tenant,
        blocks=served,
        dropped=total - served,
        damaged=loaded.damaged,
    )
    return served


def _slab_fits(store: Store, numbers: Any, offsets: Any, layouts: dict[int, Layout | None]) -> Any:
    """For each record whether its slot has the size that its slab serves: that of the youngest
    record in the slab, which is the last here. Records of an earlier size were overwritten; one of
    a place beyond the tier is damaged."""
    slots = store.room.nvme
    inside = offsets < np.uint64(slots.slab_count * slots.slab_bytes)
    usable = {n: layout.slot_bytes for n, layout in layouts.items() if layout is not None}
    sizes = np.zeros(len(numbers), np.int64)
    for number, slot_bytes in usable.items():
        if slots.fits(slot_bytes):
            sizes[numbers == number] = slot_bytes
    slabs = np.where(inside, offsets, 0).astype(np.int64) // slots.slab_bytes
    served = np.zeros(int(slabs.max(initial=0)) + 1, np.int64)
    known = (sizes > 0) & inside
    served[slabs[known]] = sizes[known]
    return known & (served[slabs] == sizes)


def _new_rows(
    entry: LayoutEntry, layout: Layout, loaded: Loaded, rows: Sequence[int], index: Index
) -> Sequence[int]:
    """Rows whose block is not here already and whose record has a sum for each shard."""
    sum_bytes = 8 * layout.shards
    if not entry.index and set(map(len, loaded.sums)) <= {sum_bytes}:
        return rows
    wanted = []
    for at in rows:
        if loaded.hashes[at] not in entry.index and len(loaded.sums[at]) == sum_bytes:
            wanted.append(at)
        else:
            index.delete(loaded.offsets[at])
    return wanted


def _layout(text: str | None) -> Layout | None:
    try:
        fields: dict[str, Any] = json.loads(text or "")
        return Layout(**fields)
    except (ValueError, TypeError, InvalidLayout):
        return None
