"""The HBM tier of one tenant: copies of blocks in the memory of GPUs. Part of the brain.

An engine says on which device each shard of its blocks is wanted. Blocks that it is granted again
and again are copied there: from DRAM, or from NVMe where a direct request left them. DRAM or NVMe
keeps every block that has a copy: so a copy may go whenever nobody reads it, an engine that cannot
read one has the block all the same, and with a device nothing is lost. A copy goes when the block
has left both.

A device serves one shard of a layout: the one that was asked of it first.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence

from kvstore.catalog import DOOMED, HIT, NOWHERE, READY, STORED, LayoutEntry
from kvstore.errors import InvalidRequest
from kvstore.eviction.base import Policy
from kvstore.leases import ReadLease
from kvstore.orders import Move, MoveKind, Outcome
from kvstore.room import Room
from kvstore.scrub import Scrub
from kvstore.slots import Slots
from kvstore.types import DRAM, HBM, NO_GPU, NVME, SLOT_ALIGNMENT, slot_bytes_of

CLIMBS_MAX = 64  # copies under way to one device
LOOKED_AT_MAX = 64  # blocks passed over while looking for one that may go
OFFSETS_BYTES_MAX = 2 << 20  # in one answer; of more blocks none count as found in HBM
NO_OFFSET = 0xFFFFFFFFFFFFFFFF


class Seats:
    """What is on one device."""

    def __init__(self, number: int, slots: Slots) -> None:
        self.number = number
        self.slots = slots
        self.page_of: dict[int, int] = {}  # of blocks with a copy, and of those that will have one
        self.climbing: set[int] = set()  # the latter
        self.shard_of: dict[int, int] = {}  # number of a layout -> the shard that is served here
        self.policies: dict[int, Policy] = {}  # by slot size
        self.ok = True

    def has(self, block: int) -> bool:
        """Whether there is a copy that can be read."""
        return block in self.page_of and block not in self.climbing


class Mirror:
    """Copies on the devices of one tenant; `sizes` in bytes, one for each."""

    def __init__(
        self,
        room: Room,
        scrub: Scrub,
        damaged: Callable[[int], None],
        sizes: Sequence[int],
        slab_bytes: int,
    ) -> None:
        self._room = room
        self._scrub = scrub
        self._damaged = damaged  # told of blocks whose bytes on NVMe were others
        self.catalog = room.catalog
        self.devices = [Seats(number, Slots(size, slab_bytes)) for number, size in enumerate(sizes)]
        self._pinned: Counter[int] = Counter()
        if sizes:
            room.left = self._left

    @property
    def capacity_bytes(self) -> int:
        """Of all devices."""
        return sum(seats.slots.capacity_bytes for seats in self.devices)

    @property
    def used_bytes(self) -> int:
        """Bytes of slots that are taken."""
        return sum(seats.slots.used_bytes for seats in self.devices)

    @property
    def blocks(self) -> int:
        """Copies that can be read; a block of several shards has one for each."""
        return sum(len(seats.page_of) - len(seats.climbing) for seats in self.devices)

    @property
    def fenced(self) -> list[int]:
        """Numbers of the devices that are not used any more."""
        return [seats.number for seats in self.devices if not seats.ok]

    def check_devices(self, entry: LayoutEntry, devices: Sequence[int]) -> None:
        """Raises InvalidRequest unless these are devices, one for each shard, or none."""
        if devices and len(devices) != entry.layout.shards:
            raise InvalidRequest(
                f"{len(devices)} devices for a layout with {entry.layout.shards} shards: name one "
                "for each shard, or none"
            )
        for number in devices:
            if len(self.devices) <= number != NO_GPU:
                raise InvalidRequest(
                    f"device {number} of {len(self.devices)}: they count from 0, as Attach told"
                )

    # -- granting ------------------------------------------------------------------------------

    def mark(self, lease: ReadLease) -> None:
        """Of the blocks that were found in DRAM, or left on NVMe, those that are on the lease's
        devices count as found in HBM. They stay there while the lease lasts."""
        wanted = [seats for seats in self._wanted(lease) if seats is not None]
        if wanted and 8 * lease.entry.layout.shards * len(lease.blocks) <= OFFSETS_BYTES_MAX:
            found = (DRAM, NVME) if lease.direct else (DRAM,)
            lease.tiers = bytes(
                HBM if tier in found and all(seats.has(block) for seats in wanted) else tier
                for block, tier in zip(lease.blocks, lease.tiers, strict=True)
            )

    def offsets(self, lease: ReadLease) -> bytes:
        """Where the copies are: for each block and shard 8 bytes, NO_OFFSET where the block counts
        as found elsewhere, or the shard is wanted on no device; nothing when there is no copy."""
        if not lease.tiers.count(HBM):
            return b""
        wanted = self._wanted(lease)
        return array(
            "Q",
            [
                seats.page_of[block] * SLOT_ALIGNMENT if tier == HBM and seats else NO_OFFSET
                for block, tier in zip(lease.blocks, lease.tiers, strict=True)
                for seats in wanted
            ],
        ).tobytes()

    def _wanted(self, lease: ReadLease) -> list[Seats | None]:
        """The lease's devices in the order of its shards; nothing where one does not serve it."""
        wanted = [None if at == NO_GPU else self.devices[at] for at in lease.devices]
        number = lease.entry.number
        served = all(
            one is None or (one.ok and one.shard_of.get(number) == shard)
            for shard, one in enumerate(wanted)
        )
        return wanted if served else []

    # -- climbing ------------------------------------------------------------------------------

    def asked(self, lease: ReadLease, now: float) -> None:
        """Done after answering: what was granted for the second time climbs."""
        flags, entry, devices = self.catalog.flags, lease.entry, lease.devices
        source = READY | STORED if lease.direct else READY
        there = [block for block in lease.blocks if flags[block] & source]
        again = [block for block in there if flags[block] & HIT]
        for block in there:
            flags[block] |= HIT
        for shard, number in enumerate(devices):
            if number == NO_GPU:
                continue
            seats = self.devices[number]
            if not seats.ok or seats.shard_of.setdefault(entry.number, shard) != shard:
                continue
            size = slot_bytes_of(entry.layout.shard_bytes)
            if not seats.slots.fits(size):
                continue
            policy = self._policy(seats, size)
            policy.touch(lease.blocks, now)
            for block in again:
                if len(seats.climbing) >= CLIMBS_MAX:
                    break
                new = block not in seats.page_of and not flags[block] & DOOMED
                if new and not self._climb(seats, entry, block, now):
                    break

    def _climb(self, seats: Seats, entry: LayoutEntry, block: int, now: float) -> bool:
        """Order a copy, from NVMe if it is not in DRAM; False when there is no room for it."""
        catalog, size = self.catalog, slot_bytes_of(entry.layout.shard_bytes)
        taken = seats.slots.take(size, [block])
        if not taken and self._make_room(seats, size, now):
            taken = seats.slots.take(size, [block])
        if not taken:
            return False
        key = catalog.keys[block]
        assert key is not None
        seats.page_of[block] = taken[0]
        seats.climbing.add(block)
        seats.slots.touched[seats.slots.slab_of(taken[0])] = now
        catalog.pins[block] += 1
        self._pinned[block] += 1
        in_dram = catalog.flags[block] & READY
        if not in_dram:
            self._room.hold(block)
        self._room.orders.moves.append(
            Move(
                MoveKind.CLIMB,
                block,
                entry,
                key,
                catalog.dram[block] if in_dram else NOWHERE,
                NOWHERE if in_dram else catalog.nvme[block],
                catalog.sums[block],
                proof=catalog.proofs.get(block, 0),
                hbm=taken[0],
                device=seats.number,
                shard=seats.shard_of[entry.number],
            )
        )
        return True

    def _make_room(self, seats: Seats, size: int, now: float) -> bool:
        """Let the least valuable copy go that nobody reads; or all of a slab of another size."""
        pins, looked_at, gone = self.catalog.pins, 0, None
        victims = self._policy(seats, size).victims(now)
        block = next(victims, None)
        while block is not None and looked_at < LOOKED_AT_MAX:
            looked_at += 1
            if not pins[block]:
                gone = block
                break
            try:
                block = victims.send(True)
            except StopIteration:
                break
        victims.close()
        if gone is not None:
            self._leave(seats, [gone], "room")
            return True
        slots = seats.slots
        others = [slab for slab, one in slots.slabs() if one != size]
        for slab in sorted(others, key=slots.touched.__getitem__)[:LOOKED_AT_MAX]:
            residents = slots.residents(slab)
            if not any(pins[block] for block in residents):
                self._leave(seats, residents, "slab")
                return True
        return False

    def pinned(self) -> Counter[int]:
        """The pins of copies under way, by block."""
        return self._pinned

    def finished(self, move: Move, outcome: Outcome, now: float) -> None:
        """A copy has ended."""
        seats, block = self.devices[move.device], move.block
        counters, flags = self._room.counters.hbm, self.catalog.flags
        self.catalog.pins[block] -= 1
        self._pinned[block] -= 1
        if not self._pinned[block]:
            del self._pinned[block]
        from_nvme = move.dram == NOWHERE
        if from_nvme:
            self._room.unhold(block)
        if seats.ok:
            seats.climbing.discard(block)
            if outcome is Outcome.DONE:
                assert move.entry is not None
                counters.promoted += 1
                counters.written_bytes += move.entry.layout.shard_bytes
                counters.latency.record(move.seconds)
                size = seats.slots.slot_size(seats.slots.slab_of(move.hbm))
                self._policy(seats, size).admit([block], now)
            else:
                seats.slots.give_back([seats.page_of.pop(block)])
        if outcome is Outcome.FAILED and seats.ok:
            counters.failed += 1
            if not from_nvme:  # else it may have been the drive: whoever uses that next will see
                self.fence(move.device)
        if outcome is Outcome.CORRUPT:
            if from_nvme:
                self._damaged(block)
            elif flags[block] & READY:
                self._scrub.spoilt(block)
        if flags[block] & DOOMED:
            self._room.reap([block])
        self._room.orders.room = True

    def fence(self, number: int) -> None:
        """A device has failed: it is not used any more, and its copies are not granted."""
        seats = self.devices[number]
        seats.ok = False
        for policy in seats.policies.values():
            policy.forget(list(policy.residents()))
        self._room.counters.hbm.evicted["failed"] += len(seats.page_of) - len(seats.climbing)
        seats.slots.give_back(list(seats.page_of.values()))
        seats.page_of.clear()
        seats.climbing.clear()

    # -- leaving -------------------------------------------------------------------------------

    def _left(self, blocks: Sequence[int]) -> None:
        """Blocks have left a tier: the copies of those that are in none are no use, and nobody
        holds them."""
        flags = self.catalog.flags
        for seats in self.devices:
            if seats.page_of:
                gone = [
                    block
                    for block in blocks
                    if block in seats.page_of and not flags[block] & (READY | STORED)
                ]
                if gone:
                    self._leave(seats, gone, "below")

    def _leave(self, seats: Seats, blocks: Sequence[int], reason: str) -> None:
        slots = seats.slots
        pages = [seats.page_of.pop(block) for block in blocks]
        # Blocks of one size in DRAM have shards of several, where layouts have more or fewer.
        for block, page in zip(blocks, pages, strict=True):
            self._policy(seats, slots.slot_size(slots.slab_of(page))).forget([block])
        slots.give_back(pages)
        self._room.counters.hbm.evicted[reason] += len(blocks)

    def _policy(self, seats: Seats, size: int) -> Policy:
        found = seats.policies.get(size)
        if found is None:
            capacity = seats.slots.capacity(size)
            found = seats.policies[size] = self._room.family.make(HBM, capacity)
        return found

    def check(self) -> None:
        """Asserts that every slot has one owner, and that copies are of what is there. For
        tests."""
        flags = self.catalog.flags
        for seats in self.devices:
            seats.slots.check()
            assert {page: block for block, page in seats.page_of.items()} == seats.slots.owners()
            assert seats.climbing <= seats.page_of.keys()
            known = {block for policy in seats.policies.values() for block in policy.residents()}
            assert known == seats.page_of.keys() - seats.climbing
            for block in seats.page_of:
                assert flags[block] & (READY | STORED | DOOMED), (
                    f"block {block} has a copy of nothing"
                )
