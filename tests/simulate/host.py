"""A daemon process put together from the real parts, and the connections of clients to it.

It stands for `kvstore.tenant` and the hatch: what those do between sockets and files and the
service is done here between simulated ones, in the same order.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from kvstore.adoption import NOTES, SLOT_TABLE, Estate, Notes
from kvstore.adoption import adopt as adopt_dram
from kvstore.collaborators import ServiceInfo
from kvstore.disk import adopt
from kvstore.errors import KVStoreError
from kvstore.hands import Door, Ended
from kvstore.health import FAILURES_IN_A_ROW
from kvstore.leases import Session
from kvstore.limits import Limits
from kvstore.mover import IN_MEMORY
from kvstore.orders import MoveKind, Outcome
from kvstore.placement import PlacementConfig
from kvstore.policies import FAMILIES
from kvstore.processes import Processes
from kvstore.service import Service
from kvstore.store import Store
from kvstore.tiers.slot_table import SlotTable
from tests.simulate.clock import Process
from tests.simulate.index import IndexFile, SimulatedIndex
from tests.simulate.media import Arena, Drive
from tests.simulate.mortal import Fuse, MortalHands, MortalNotes, Table
from tests.simulate.workers import Workers

if TYPE_CHECKING:
    from tests.simulate.programs import Program
    from tests.simulate.wire import Connection
    from tests.simulate.world import World

TICK_S = 0.5
CLEARED_AT_ONCE = 5


@dataclasses.dataclass
class Machine:
    """What outlives a daemon, and how every daemon here is configured."""

    placement: PlacementConfig
    family: str
    limits: Limits
    workers: int
    sync_interval_s: float
    folder: Path
    arena: Arena
    drive: Drive | None
    index: IndexFile


class Daemon:
    """One life of the daemon."""

    def __init__(self, world: World, machine: Machine, generation: int) -> None:
        self.world = world
        self.machine = machine
        self.generation = generation
        self.process = Process(world.clock, f"daemon {generation}")
        self.fuse = Fuse()
        self.connections: list[Connection] = []
        self.stopping = False
        self.stops = 0  # how often it was stopped: meanwhile no deadline is kept
        self._failed_in_a_row = 0
        self._put_off: set[Callable[[], bool]] = set()
        self.index: SimulatedIndex | None = None
        self.arena = machine.arena
        self.started = False
        self._estate = self._take_over()
        self.table = self._estate.table
        self.store = Store(machine.placement, machine.limits, FAMILIES[machine.family]())
        self.store.lending.part, self.store.lending.slabs_part = 2, 0
        self.hands = MortalHands(self.table, self._estate.notes)
        self.hands.fuse = self.fuse
        info = ServiceInfo(
            "default", "0", generation, "arena", self.arena.capacity_bytes, self.arena.inode
        )
        loop: Any = self.process  # as much of one as is needed
        asyncio._set_running_loop(loop)
        try:
            self.service = Service(self.store, self.hands, info, lambda: b"{}")
            self.service.clearing.at_once = CLEARED_AT_ONCE
        finally:
            asyncio._set_running_loop(None)
        self.workers = self._start_workers()
        self.hands.mover = self.workers  # type: ignore[assignment]
        self.processes = Processes(loop, self._estate.notes, self._unquarantine)

    def start(self) -> None:
        """Adopt what there is, and open the doors."""
        world, estate = self.world, self._estate
        if self.machine.drive is not None:
            self._open_drive()
        if estate.adopted:
            held = adopt_dram(self.store, estate, "default", self.process.time())
            if any(held.values()):
                world.marks["slots in writing adopted"] += 1
            with mock.patch("kvstore.processes.Peer", world.peer):
                self.processes.inherit(held)
            self.service.settle()
        self.service.doors = self
        self.service.later = self._later
        self.started = True
        self.process.call_later(TICK_S, self._tick)

    @property
    def up(self) -> bool:
        """Whether clients can connect."""
        return self.process.alive and self.started and not self.stopping

    def attached(self, session: Session, client: Program) -> None:
        """A process takes part in a session, as the hatch hears of it."""
        self.processes.joined(session, self.world.peer(self.process, client.number))  # type: ignore[arg-type]

    def detach(self, session: Session) -> None:
        """The end of a session, as the hatch carries it out."""
        self.cut(session.number)
        if self.store.sessions.get(session.number) is not session:
            return
        blocks = self.service.detach(session)
        if blocks:
            self.world.marks["quarantined"] += 1
        self.processes.ended(session.number, blocks)

    # What the service asks of the doors.

    def settle(self, caller: Session, numbers: Sequence[int]) -> int:
        settled = self.processes.settle(caller.number, numbers)
        self.world.marks["settled"] += settled
        return settled

    def cut(self, number: int) -> None:
        for connection in [one for one in self.connections if one.session_number == number]:
            connection.daemon_died()

    def end(self, number: int) -> bool:
        found = [one for one in self.connections if one.session_number == number]
        for connection in found:
            connection.end("its session is ended", whole_session=True)
        return bool(found)

    def refuse(self, error: KVStoreError) -> None:
        """What the world hears of refusals."""
        self.world.marks[f"refused {type(error).__name__}"] += 1

    def kill(self) -> None:
        """SIGKILL: the kernel closes its connections and lets its I/O end."""
        self.process.kill()
        self.workers.die()
        for connection in list(self.connections):
            connection.daemon_died()
        self.table.close()

    def stop(self, then: Callable[[], None]) -> None:
        """SIGTERM: no new requests, everything due is written out, for some time at most."""
        self.stopping = True
        for connection in list(self.connections):
            connection.end("the daemon stops")
        self.store.save_all(self.process.time())
        self._drain(self.process.time() + 2.0, then)

    def _drain(self, until: float, then: Callable[[], None]) -> None:
        if self.service.idle():
            self.world.marks["drained"] += 1
        elif self.process.time() < until:
            self.process.call_later(0.01, self._drain, until, then)
            return
        if self.index is not None:
            self.index.close()
            self.world.checks.before_daemon_ends()
        self.kill()
        then()

    def quiet(self) -> bool:
        """Whether nothing is under way or waited for."""
        placement = self.store.placement
        waiting = self.service._reads or self.service._parking or self.service._drains._runs
        return not (
            placement.spills
            or placement.loads
            or waiting
            or self.connections
            or self.store.counters.quarantined
            or self.workers.busy()
            or self._door._ended
            or self.service.clearing.runs
            or (placement.health.present and not placement.health.ok)
        )

    def states(self) -> dict[int, int]:
        """What the slot table says of each slot that is not empty."""
        return {record.offset: record.state for record in self.table.records()}

    def _later(self, work: Callable[[], bool]) -> bool:
        """Sometimes the loop is awake, and has a quiet moment later; sometimes it sleeps."""
        if work in self._put_off:
            return True
        pause_s = self.world.quiet_in_s()
        if pause_s is None:
            return False
        self._put_off.add(work)
        self.process.call_later(pause_s, self._quiet_moment, work)
        return True

    def _quiet_moment(self, work: Callable[[], bool]) -> None:
        self._put_off.discard(work)
        if not self.stopping:
            self.world.marks["put off"] += 1
        if work():
            self._put_off.add(work)
            self.process.call_later(0.0, self._quiet_moment, work)

    def _tick(self) -> None:
        self.process.call_later(TICK_S, self._tick)
        self.service.tick()
        if self.workers.hangs_s() > self.machine.placement.hang_s + 2 * TICK_S:
            self.world.marks["hangs"] += 1
            assert not self.store.placement.health.ok, "the drive hangs, and is not fenced"

    def _unquarantine(self, blocks: list[int]) -> None:
        self.world.marks["quarantine ended"] += 1
        self.service.unquarantine(blocks)

    def _finished(self, ended: list[Ended]) -> None:
        """Moves have ended; a drive that only fails is to be left alone."""
        if any(move.kind not in IN_MEMORY for move, _, _ in ended):
            self.workers.heard()
        for move, outcome, _ in ended:
            failed = outcome is Outcome.FAILED and move.kind is not MoveKind.PROBE
            self._failed_in_a_row = self._failed_in_a_row + 1 if failed else 0
        self.service.finished(ended)
        health = self.store.placement.health
        if self._failed_in_a_row >= FAILURES_IN_A_ROW:
            assert not health.ok, f"{self._failed_in_a_row} failures in a row, and not fenced"
        self.world.marks["fenced"] += not health.ok

    # -- the drive -----------------------------------------------------------------------------

    def _take_over(self) -> Estate:
        """What `kvstore.adoption.take_over` does with files."""
        machine, config = self.machine, self.machine.placement
        path, notes = machine.folder / SLOT_TABLE, machine.folder / NOTES
        MortalNotes.torn = Table.torn = self.world.chance.randrange
        table: SlotTable
        if self.arena.adoptable and path.exists():
            try:
                table = Table.open(path)
                return self._made(table, MortalNotes.open(notes, table.spoil), True)
            except ValueError:
                self.world.marks["arena not adopted"] += 1
                self.arena = machine.arena = self.world.new_arena()
        table = Table.create(path, config.dram_bytes, self.arena.inode, config.slab_bytes)
        self.arena.adoptable = True
        return self._made(table, MortalNotes.create(notes, table.spoil), False)

    def _made(self, table: SlotTable, notes: Notes, adopted: bool) -> Estate:
        assert isinstance(table, Table) and isinstance(notes, MortalNotes)
        table.fuse = notes.fuse = self.fuse
        self.world.marks["arena adopted"] += adopted
        return Estate(self.arena, table, notes, adopted)  # type: ignore[arg-type]

    def _start_workers(self) -> Workers:
        world, drive = self.world, self.machine.drive
        loop: Any = self.process
        self._door = Door(loop, self._finished)
        device = Opening(drive, self._try_to_open) if drive is not None else None
        return Workers(
            self.arena,
            device,
            self.process,
            world.chance,
            world.marks,
            self._door.report,
            self.machine.workers,
        )

    def _open_drive(self) -> None:
        try:
            self._try_to_open()
        except OSError:
            self.world.marks["drive absent at the start"] += 1
            self.store.placement.health.fence(self.process.time())

    def _try_to_open(self) -> None:
        """What the disk does at the start, or at a later probe."""
        drive = self.machine.drive
        assert drive is not None
        if self.index is not None:
            return
        if drive.faults.absent:
            drive.probe()  # raises
        if self.started:
            self.world.checks.opened_late()
        self.index = SimulatedIndex(
            self.machine.index,
            drive,
            self.process,
            self.world.chance,
            self.world.marks,
            self.machine.sync_interval_s,
        )
        loaded = self.index.load()
        if self.generation and loaded.offsets:
            self.world.marks["index adopted"] += 1
        self.hands.use_index(self.index)  # type: ignore[arg-type]
        adopt(self.store, self.index, loaded, "default", self.process.time())  # type: ignore[arg-type]


class Opening:
    """A drive that may have to be opened first; with the interface of `kvstore.disk.Disk`."""

    def __init__(self, drive: Drive, open_it: Callable[[], None]) -> None:
        self._drive = drive
        self._open = open_it

    def probe(self) -> None:
        self._open()
        self._drive.probe()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._drive, name)
