"""From a grant to a caller's buffers: blocks in DRAM, on the caller's GPU, or left on NVMe."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvstore.client.copying import copy_all
from kvstore.client.grant import Grant
from kvstore.client.places import Places

if TYPE_CHECKING:
    from kvstore.client.cuda import Copier, DeviceBuffers
    from kvstore.client.direct import DirectFiles, Ring, Wanted
    from kvstore.types import Layout


@dataclasses.dataclass(slots=True)
class CopyOut:
    """Of one get: where to, which shard, and by when (monotonic) a device must have done it."""

    layout: Layout
    targets: list[int] | DeviceBuffers
    shard: int | None
    copied_by: float
    copier: Copier | None

    def all(self, grant: Grant, first: int) -> bool:
        """Copy a grant to the targets from `first` on, and release it. False: throw it away."""
        if isinstance(self.targets, list):
            with grant:
                grant.places.copy_out(self.targets[first : first + grant.length], self.shard)
            return grant.release()
        return self._load(grant, grant.places, range(grant.length), first)

    def direct(
        self, grant: Grant, hashes: Sequence[bytes], first: int, files: DirectFiles, by: float
    ) -> int:
        """The same of a grant some blocks of which are read on NVMe, by a time; returns how many
        leading blocks are good."""
        from kvstore.client.direct import wanted

        with grant:
            beside = wanted(grant, self.layout, hashes[first : first + grant.length], self.shard)
            good = self._from_files(grant, first, beside, files, by)
            there = [at for at in range(good) if at not in beside]
            if there and not self._from_arena(grant, there, first):
                return min(there)
            return good if grant.release() else 0

    # -- inside --------------------------------------------------------------------------------

    def _from_files(
        self, grant: Grant, first: int, beside: dict[int, Wanted], files: DirectFiles, by: float
    ) -> int:
        """Before which block it ended."""
        order = sorted(beside)
        blocks, done = [beside[at] for at in order], 0
        for addresses, ring in self._groups(grant, blocks, files, by):
            group = order[done : done + len(addresses)]
            if not self._take(grant, [first + at for at in group], addresses, ring):
                break
            done += len(addresses)
        return order[done] if done < len(order) else grant.length

    def _groups(
        self, grant: Grant, blocks: Sequence[Wanted], files: DirectFiles, by: float
    ) -> Iterator[tuple[list[int], Ring]]:
        """See DirectFiles.groups: by the host, or into the device's memory where that is faster."""
        targets = self.targets
        if isinstance(targets, list):
            return files.groups(blocks, 1, by)
        assert self.copier is not None, "found with the buffers"
        make, told = None, grant.session.attached.nvme
        if told.engine == "gds":
            make = self.copier.rings(targets.device, files, told.sums)
        device = targets.device if make is not None else None
        return files.groups(blocks, len(blocks), by, device=device, make=make)

    def _take(self, grant: Grant, to: Sequence[int], addresses: Sequence[int], ring: Ring) -> bool:
        targets = self.targets
        size = self.layout.block_bytes if self.shard is None else self.layout.shard_bytes
        if isinstance(targets, list):
            copy_all(
                [(targets[at], address, size) for at, address in zip(to, addresses, strict=True)]
            )
            return True
        assert self.copier is not None, "found with the buffers"
        return self.copier.take(
            grant.session.arena,
            targets.device,
            targets.addresses[list(to)],
            np.asarray(addresses, np.int64),
            size,
            ring=ring,
            deadline=self.copied_by,
            streams=targets.streams,
            keep=targets.buffers,
        )

    def _from_arena(self, grant: Grant, there: list[int], first: int) -> bool:
        offsets = array("Q", [grant.places.offsets[at] for at in there])
        places = Places(grant.session.arena, self.layout, offsets.tobytes())
        targets = self.targets
        if isinstance(targets, list):
            places.copy_out([targets[first + at] for at in there], self.shard)
            return True
        return self._load(grant, places, there, first)

    def _load(self, grant: Grant, places: Places, which: Sequence[int], first: int) -> bool:
        """Copy these blocks of a grant, which are at `places`, to the device, and release it."""
        targets = self.targets
        assert self.copier is not None and not isinstance(targets, list)
        copies = grant.copies[self.shard or 0 :: self.layout.shards]
        far, near = targets.split(
            targets.fragments(places, self.shard, [first + at for at in which]),
            [copies[at] for at in which],
            self.copier.part(grant.session, targets.device),
        )
        return self.copier.load(
            grant,
            far,
            deadline=self.copied_by,
            streams=targets.streams,
            keep=targets.buffers,
            near=near,
        )
