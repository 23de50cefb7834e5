"""The NVMe tier of one tenant as a device that may be missing: files and index, opened when possible.

At the start, or at a later probe, the files are opened; until then every operation fails, the store
fences the tier, and the daemon serves from DRAM alone.
"""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import structlog

from kvstore.catalog import LayoutEntry
from kvstore.errors import InvalidLayout
from kvstore.hands import describe
from kvstore.index import Index, Loaded
from kvstore.store import Store
from kvstore.tiers.nvme import NvmeFiles
from kvstore.types import Layout

log = structlog.get_logger()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiskConfig:
    """Where a tenant's NVMe files are. `size_bytes` is the sum over all folders."""

    tenant: str
    folders: tuple[Path, ...]
    size_bytes: int
    slab_bytes: int
    sync_interval_s: float


class Disk:
    """A mover's device, and the index that belongs to it."""

    name = "nvme"

    def __init__(self, config: DiskConfig, opened: Callable[[Index, Loaded], None]) -> None:
        self._config = config
        self._opened = opened
        self.files: NvmeFiles | None = None
        self.index: Index | None = None
        self.capacity_bytes = config.size_bytes

    def open(self) -> None:
        """Open files and index, and hand what they hold to `opened`. OSError when that fails."""
        config = self._config
        for folder in config.folders:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        files = NvmeFiles.open(config.folders, config.size_bytes, config.slab_bytes)
        try:
            index = Index(
                config.folders[0],
                file_ids=files.file_ids,
                sync_interval_s=config.sync_interval_s,
                before_commit=files.sync,
                on_state=self._index_state,
            )
        except BaseException:
            files.close()
            raise
        for warning in (*files.warnings, *index.warnings):
            log.warning(warning, tenant=config.tenant)
        self.files, self.index = files, index
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

    def _there(self) -> NvmeFiles:
        if self.files is None:
            raise OSError(errno.ENODEV, "the NVMe files are not open", str(self._config.folders[0]))
        return self.files

    def _index_state(self, problem: str | None) -> None:
        if problem:
            log.error("NVMe index cannot be written", tenant=self._config.tenant, problem=problem)
        else:
            log.warning("NVMe index is written again", tenant=self._config.tenant)


def adopt(store: Store, index: Index, loaded: Loaded, tenant: str, now: float) -> int:
    """Seat the blocks that the index knows; returns how many can be served.

    Blocks that cannot be seated, or whose layout is no layout, are dropped from the index.
    """
    store.placement.sequence = max(store.placement.sequence, loaded.last_sequence)
    by_layout: dict[int, list[int]] = {}
    for at, number in enumerate(loaded.layout_numbers):
        by_layout.setdefault(number, []).append(at)
    served = 0
    for number in sorted(by_layout):
        rows = by_layout[number]
        layout = _layout(loaded.layouts.get(number))
        if layout is None or not store.room.nvme.fits(layout.slot_bytes):
            for at in rows:
                index.delete(loaded.offsets[at])
            log.warning("blocks of an unusable layout dropped", tenant=tenant, blocks=len(rows))
            continue
        entry = store.catalog.open(layout)
        wanted = _new_rows(entry, layout, loaded, rows, index)
        good = store.adopt(
            layout,
            [loaded.hashes[at] for at in wanted],
            [loaded.offsets[at] for at in wanted],
            [loaded.sums[at] for at in wanted],
            now,
        )
        index.put_layout(entry.number, describe(layout))
        if entry.number != number:
            for at in wanted:
                index.put(
                    loaded.offsets[at],
                    entry.number,
                    loaded.sequences[at],
                    loaded.hashes[at],
                    loaded.sums[at],
                )
        served += good
    log.info(
        "NVMe index loaded",
        tenant=tenant,
        blocks=served,
        dropped=len(loaded.offsets) - served,
        damaged=loaded.damaged,
    )
    return served


def _new_rows(
    entry: LayoutEntry, layout: Layout, loaded: Loaded, rows: Sequence[int], index: Index
) -> list[int]:
    """Rows whose block is not here already and whose record has a sum for each shard."""
    wanted = []
    for at in rows:
        if loaded.hashes[at] not in entry.index and len(loaded.sums[at]) == 8 * layout.shards:
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
