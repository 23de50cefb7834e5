"""How one move is carried out: which bytes go where, and what their checksums must be.

It runs in a worker thread of `kvstore.mover`, or in step with a simulated clock: it has no thread
and no queue of its own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from mmap import mmap
from typing import Any, Protocol

from kvstore.catalog import NOWHERE
from kvstore.checksums import SUM_BYTES, digest, seed, shard_sums
from kvstore.orders import LAZY, Move, MoveKind, Outcome
from kvstore.tiers.base import Tier
from kvstore.types import SLOT_ALIGNMENT

UNBOUNDED = contextlib.nullcontext()


class Arena(Protocol):
    """DRAM whose bytes can be looked at in place."""

    def view(self, offset: int, length: int) -> memoryview:
        """The bytes themselves, writable; used and dropped."""


class Device(Tier, Protocol):
    """A tier that can be asked whether it works at all."""

    def probe(self) -> None:
        """Write and read back something that is no block; OSError when that fails."""


class Gpu(Tier, Protocol):
    """A tier in a device's memory."""

    def address(self, offset: int, length: int) -> int:
        """Where a range is there."""


# Fills device memory from an offset of the NVMe tier: address, bytes, seed, and the sum that they
# must have; whether they do. Raises OSError.
Way = Callable[[int, int, int, int, int], bool]
WayTo = Callable[[int], Way | None]  # by a device's number; None: by the host


class Carrier:
    """Moves over one arena and one NVMe tier; several threads may carry out moves at a time.

    summing  held while a checksum is taken for a move that nobody waits for
    """

    def __init__(
        self,
        arena: Arena,
        nvme: Device | None,
        hbm: Sequence[Gpu] = (),
        straight: WayTo = lambda device: None,
        summing: contextlib.AbstractContextManager[Any] = UNBOUNDED,
    ) -> None:
        self._arena = arena
        self._nvme = nvme
        self._hbm = hbm  # by the devices' numbers
        self._straight = straight
        self._summing = summing
        self._own = threading.local()  # a buffer for each thread that checks

    def carry_out(self, move: Move) -> tuple[Outcome, str]:
        """Do it; how it ended, and what the device said if it failed. Fills in `move.sums`."""
        try:
            return self._carry_out(move), ""
        except OSError as error:
            return Outcome.FAILED, str(error)

    def _carry_out(self, move: Move) -> Outcome:
        if move.entry is None:
            self._there().probe()
            return Outcome.DONE
        if move.kind is MoveKind.VERIFY:
            return self._read(move, memoryview(self._scratch(move.entry.slot_bytes)))
        if move.kind is MoveKind.CLIMB and move.dram == NOWHERE:
            return self._climb_from_nvme(move)
        slot = self._arena.view(move.dram * SLOT_ALIGNMENT, move.entry.slot_bytes)
        try:
            if move.kind in (MoveKind.LOAD, MoveKind.PREFETCH):
                return self._read(move, slot)
            # Before a copy, too, the checksum is taken first: bytes that change meanwhile will
            # not verify, and bytes that have changed since they were committed go nowhere.
            found = self._sums(move, slot)
            if found != move.sums if move.sums else move.proof and digest(found) != move.proof:
                return Outcome.CORRUPT
            move.sums = found
            if move.kind is MoveKind.CLIMB:
                size = move.entry.layout.shard_bytes
                shard = slot[move.shard * size : (move.shard + 1) * size]
                self._hbm[move.device].write(move.hbm * SLOT_ALIGNMENT, shard)
                shard.release()
            if move.kind is MoveKind.SPILL:
                self._there().write(move.nvme * SLOT_ALIGNMENT, slot)
            return Outcome.DONE
        finally:
            slot.release()

    def _climb_from_nvme(self, move: Move) -> Outcome:
        """One shard, past the host where that is the faster way."""
        assert move.entry is not None
        assert move.sums is not None, "what is on NVMe has its sums"
        layout, hbm, shard = move.entry.layout, self._hbm[move.device], move.shard
        size, place = layout.shard_bytes, move.hbm * SLOT_ALIGNMENT
        way = self._straight(move.device)
        if way is None:
            view = memoryview(self._scratch(move.entry.slot_bytes))
            if (outcome := self._read(move, view)) is Outcome.DONE:
                hbm.write(place, view[shard * size : (shard + 1) * size])
            return outcome
        right = way(
            move.nvme * SLOT_ALIGNMENT + shard * size,
            hbm.address(place, size),
            size,
            seed(move.entry.fingerprint, move.key, shard),
            int.from_bytes(move.sums[shard * SUM_BYTES : (shard + 1) * SUM_BYTES], "little"),
        )
        return Outcome.DONE if right else Outcome.CORRUPT

    def _read(self, move: Move, into: memoryview) -> Outcome:
        assert move.entry is not None
        into = into[: move.entry.slot_bytes]
        try:
            self._there().read(move.nvme * SLOT_ALIGNMENT, into)
            return Outcome.DONE if self._sums(move, into) == move.sums else Outcome.CORRUPT
        finally:
            into.release()

    def _there(self) -> Device:
        assert self._nvme is not None, "a move was ordered without an NVMe tier"
        return self._nvme

    def _scratch(self, size: int) -> mmap:
        found: mmap | None = getattr(self._own, "scratch", None)
        if found is None or len(found) < size:
            found = self._own.scratch = mmap(-1, size)
        return found

    def _sums(self, move: Move, slot: memoryview) -> bytes:
        assert move.entry is not None
        entry, layout = move.entry, move.entry.layout
        with self._summing if move.kind in LAZY else UNBOUNDED:
            return shard_sums(entry.fingerprint, move.key, slot, layout.shards, layout.shard_bytes)
