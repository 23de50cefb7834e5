"""Who waits for whom among the moves of a tenant's workers."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvstore.carrier import Carrier
from kvstore.catalog import LayoutEntry
from kvstore.checksums import digest, shard_sums
from kvstore.mover import Mover
from kvstore.orders import Move, MoveKind, Outcome
from kvstore.tiers.base import check_range
from kvstore.types import SLOT_ALIGNMENT, Layout

SIZE = 4 * SLOT_ALIGNMENT
SLOTS = 16
THREADS = 4
WAIT_S = 20.0
ENTRY = LayoutEntry(
    0, Layout(model="m", engine="e", dtype="uint8", block_tokens=16, shard_bytes=SIZE)
)


class Memory:
    """Bytes in memory as a tier, and as an arena; writes wait until they may go on."""

    name = "memory"
    capacity_bytes = SLOTS * SIZE

    def __init__(self) -> None:
        self.bytes = bytearray(self.capacity_bytes)
        self.may_write = threading.Event()
        self.writing = threading.Semaphore(0)  # one for each write that has begun

    def view(self, offset: int, length: int) -> memoryview:
        check_range(offset, length, self.capacity_bytes)
        return memoryview(self.bytes)[offset : offset + length]

    def read(self, offset: int, into: memoryview) -> None:
        into[:] = self.view(offset, len(into))

    def write(self, offset: int, data: memoryview) -> None:
        self.writing.release()
        assert self.may_write.wait(WAIT_S)
        self.view(offset, len(data))[:] = data

    def sync(self) -> None: ...

    def probe(self) -> None: ...

    def close(self) -> None: ...


class Reports:
    """What workers have reported."""

    def __init__(self) -> None:
        self.ended: list[tuple[MoveKind, int, Outcome]] = []
        self._changed = threading.Condition()

    def __call__(self, move: Move, outcome: Outcome, problem: str) -> None:
        with self._changed:
            self.ended.append((move.kind, move.block, outcome))
            self._changed.notify_all()

    def wait(self, count: int) -> list[tuple[MoveKind, int, Outcome]]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.ended) >= count, WAIT_S)
            return list(self.ended)


def key(block: int) -> bytes:
    return block.to_bytes(8, "little")


def sums(block: int, memory: Memory) -> bytes:
    """Those of the slot that has the block's number."""
    view = memory.view(block * SIZE, SIZE)
    return shard_sums(ENTRY.fingerprint, key(block), view, 1, SIZE)


def move(kind: MoveKind, block: int, **more: object) -> Move:
    page = block * SIZE // SLOT_ALIGNMENT
    return Move(kind, block, ENTRY, key(block), page, page, **more)  # type: ignore[arg-type]


@contextlib.contextmanager
def mover(arena: Memory, drive: Memory, reports: Reports) -> Iterator[Mover]:
    made = Mover(arena, drive, reports, threads=THREADS, name="test")
    try:
        yield made
    finally:
        drive.may_write.set()
        assert made.close(WAIT_S)


def test_a_load_does_not_wait_for_spills() -> None:
    """However many are written, and none of them ends."""
    arena, drive, reports = Memory(), Memory(), Reports()
    with mover(arena, drive, reports) as at_work:
        at_work.submit([move(MoveKind.SPILL, block) for block in range(8)])
        for _ in range(THREADS):
            assert drive.writing.acquire(timeout=WAIT_S)
        at_work.submit([move(MoveKind.LOAD, 9, sums=sums(9, drive))])
        assert reports.wait(1) == [(MoveKind.LOAD, 9, Outcome.DONE)]
        assert not drive.writing.acquire(blocking=False), "a spill took the last worker"
        drive.may_write.set()
        ended = reports.wait(9)
    assert sorted(ended)[1:] == [(MoveKind.SPILL, block, Outcome.DONE) for block in range(8)]


class Counted(Memory):
    """Knows how many write at a time, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._counting = threading.Lock()

    def write(self, offset: int, data: memoryview) -> None:
        with self._counting:
            self._now += 1
            self.most = max(self.most, self._now)
        super().write(offset, data)
        with self._counting:
            self._now -= 1


@pytest.mark.parametrize("seed", range(5))
def test_every_move_ends_and_no_more_write_than_may(seed: int) -> None:
    """Moves of all kinds from several threads, more of the lazy ones than workers for them."""
    arena, drive, reports = Memory(), Counted(), Reports()
    dice = random.Random(seed)
    kinds = (MoveKind.SPILL, MoveKind.SPILL, MoveKind.SUM, MoveKind.LOAD, MoveKind.VERIFY)
    orders = [[move(dice.choice(kinds), dice.randrange(SLOTS)) for _ in range(80)] for _ in "123"]
    drive.may_write.set()
    with mover(arena, drive, reports) as at_work, ThreadPoolExecutor(len(orders)) as clients:
        for part in range(0, 80, 8):
            for one in orders:
                clients.submit(at_work.submit, one[part : part + 8])
            reports.wait(dice.randrange(3 * part + 1))
        ended = reports.wait(240)
        assert not at_work.queued()
    assert sorted(kind for kind, _, _ in ended) == sorted(one.kind for o in orders for one in o)
    assert 1 <= drive.most <= THREADS


def test_what_is_in_memory_is_proved_while_the_device_hangs() -> None:
    """All workers wait for the device but one."""
    arena, drive, reports = Memory(), Memory(), Reports()
    reading = threading.Event()
    drive.read = lambda offset, into: reading.wait(WAIT_S)  # type: ignore[method-assign, assignment]
    with mover(arena, drive, reports) as at_work:
        at_work.submit([move(MoveKind.LOAD, block) for block in range(SLOTS)])
        at_work.submit([move(MoveKind.SPILL, block) for block in range(SLOTS)])
        at_work.submit([move(MoveKind.PROVE, 3, proof=digest(sums(3, arena)))])
        assert reports.wait(1) == [(MoveKind.PROVE, 3, Outcome.DONE)]
        reading.set()
        drive.may_write.set()
        reports.wait(2 * SLOTS + 1)


class Turn(contextlib.AbstractContextManager[None]):
    """Counts how often somebody waited for his turn."""

    taken = 0

    def __enter__(self) -> None:
        self.taken += 1

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("kind", [k for k in MoveKind if k not in (MoveKind.PROBE, MoveKind.CLIMB)])
def test_only_checksums_that_nobody_waits_for_are_taken_in_turn(kind: MoveKind) -> None:
    arena, drive, turn = Memory(), Memory(), Turn()
    drive.may_write.set()
    one = move(kind, 3)
    if kind in (MoveKind.LOAD, MoveKind.PREFETCH, MoveKind.VERIFY):
        one.sums = sums(3, drive)
    elif kind is MoveKind.PROVE:
        one.proof = digest(sums(3, arena))
    assert Carrier(arena, drive, summing=turn).carry_out(one) == (Outcome.DONE, "")
    assert turn.taken == (kind in (MoveKind.SPILL, MoveKind.VERIFY))
