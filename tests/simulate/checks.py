"""What must hold after every step of a world, after a restart, and at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.catalog import DOOMED, LOADING, READY, SPILLING, STORED
from kvstore.checksums import shard_sums
from kvstore.tiers.slot_table import COMMITTED
from kvstore.types import SLOT_ALIGNMENT, Layout
from tests.brain.rankings import check_family
from tests.simulate.ledger import Name
from tests.simulate.workers import FILLS

if TYPE_CHECKING:
    from tests.simulate.world import World

LOOK_CLOSELY_EVERY = 8
END_S = 300.0


class Checks:
    """All checks of one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._expected: list[Name] = []  # on NVMe
        self._expected_dram: set[Name] = set()
        self._may_return: set[Name] = set()  # although they were forgotten
        self._step_began = 0
        self._fingerprints = {layout.fingerprint: n for n, layout in enumerate(world.layouts)}

    def before_step(self) -> None:
        """What happens from now on happens in this step."""
        self._step_began = self.world.moment()

    def after_step(self) -> None:
        """Cheap ones each time, thorough ones now and then."""
        world, daemon = self.world, self.world.daemon
        if not daemon.up:
            return
        daemon.store.check()
        self._check_sessions()
        for connection in daemon.connections:
            connection.check_deadlines()
        if not world.step % LOOK_CLOSELY_EVERY:
            check_family(daemon.store.room.family)
            self._check_table()
            self._check_drive()
            self._check_moves()

    def layout_of(self, fingerprint: bytes) -> Layout:
        """The layout that a slot table names."""
        return self.world.layouts[self._fingerprints[fingerprint]]

    # -- between steps -------------------------------------------------------------------------

    def _check_sessions(self) -> None:
        """No session without a connection, nothing held or waited for without a session."""
        daemon = self.world.daemon
        there = {id(one.session) for one in daemon.connections if one.session is not None}
        assert there == {id(session) for session in daemon.store.sessions}
        for lease in daemon.service._reads:
            assert id(lease.session) in there, "a dead session waits for a load"
        for parked in daemon.service._parking._parked:
            assert id(parked.session) in there, "a dead session waits for room"

    def _check_table(self) -> None:
        """The slot table says committed of just those blocks that can be read, and rightly."""
        daemon = self.world.daemon
        catalog = daemon.store.catalog
        wanted = {
            catalog.dram[block] * SLOT_ALIGNMENT: (catalog.entry(block).fingerprint, key)
            for block, key in enumerate(catalog.keys)
            if key is not None and catalog.flags[block] & READY
        }
        found = {
            record.offset: (record.layout, record.hash)
            for record in daemon.table.records()
            if record.state == COMMITTED
        }
        assert found == wanted, "the slot table is out of date"
        self._judge_table(0)

    def _judge_table(self, asked: int) -> None:
        daemon = self.world.daemon
        for record in daemon.table.records():
            if record.state != COMMITTED or record.offset in daemon.arena.spoilt:
                continue
            name = (self._fingerprints[record.layout], record.hash)
            data = bytes(daemon.arena.view(record.offset, record.slot_bytes))
            size = self.world.layouts[name[0]].block_bytes
            self.world.ledger.judge(name, data[:size], asked, "slot table")

    def _check_drive(self) -> None:
        """Bytes on the drive that fit their checksums are those that were committed."""
        world, daemon = self.world, self.world.daemon
        drive = world.machine.drive
        if drive is None:
            return
        catalog = daemon.store.catalog
        for block, key in enumerate(catalog.keys):
            if key is None or not catalog.flags[block] & STORED:
                continue
            entry = catalog.entry(block)
            layout, offset = entry.layout, catalog.nvme[block] * SLOT_ALIGNMENT
            data = drive.look(offset, layout.block_bytes)
            sums = shard_sums(
                entry.fingerprint, key, memoryview(data), layout.shards, layout.shard_bytes
            )
            if sums == catalog.sums[block]:
                name = (self._fingerprints[entry.fingerprint], key)
                world.ledger.judge(name, data, 0, "on NVMe")

    def _check_moves(self) -> None:
        """What is being filled by a move, nobody else has."""
        world, daemon = self.world, self.world.daemon
        for move in daemon.workers.under_way:
            if move.entry is not None and move.kind in FILLS:
                world.holders.check_free(
                    daemon.arena, move.dram * SLOT_ALIGNMENT, move.entry.slot_bytes, "a load"
                )

    # -- deaths --------------------------------------------------------------------------------

    def before_daemon_dies(self) -> None:
        """What the slot table says at this very moment is true; it is to be served afterwards."""
        self._judge_table(0)
        found = {
            (self._fingerprints[record.layout], record.hash)
            for record in self.world.daemon.table.records()
            if record.state == COMMITTED
        }
        # What is forgotten in the very moment of death may be so in one place, and not in another.
        self._may_return |= found
        moment, names = self.world.ledger.last_forgotten
        if moment > self._step_began:
            self._may_return |= set(names)
        if self.world.daemon.started:
            self._expected_dram = found
            self._note_durable()

    def forget_arena(self) -> None:
        """What was in memory is gone."""
        self._expected_dram.clear()

    def before_power_cut(self) -> None:
        """What the index has made durable is to be served afterwards."""
        self._note_durable()

    def before_daemon_ends(self) -> None:
        """It was asked to, and has closed its index: also where the drive did not let it commit."""
        self._note_durable()

    def _note_durable(self) -> None:
        """Blocks whose record in the index is durable and true."""
        daemon, drive = self.world.daemon, self.world.machine.drive
        self._expected = []
        file, index = self.world.machine.index, daemon.index
        there = file.names(file.records) if index is None else index.dangling()
        self._may_return |= {(self._fingerprints[of], key) for of, key in there}
        if drive is None or index is None:
            return
        catalog = daemon.store.catalog
        for block, key in enumerate(catalog.keys):
            if key is None or catalog.flags[block] & (STORED | DOOMED) != STORED:
                continue
            offset = catalog.nvme[block] * SLOT_ALIGNMENT
            entry = catalog.entry(block)
            if index.says(offset, key, catalog.sums[block]):
                self._expected.append((self._fingerprints[entry.fingerprint], key))

    def after_restart(self) -> None:
        """What was durable is there again."""
        world, daemon = self.world, self.world.daemon
        world.ledger.revived(self._may_return)
        self._may_return = set()
        self._check_adopted()
        if daemon.index is None:
            return
        names = {
            (self._fingerprints[entry.fingerprint], key)
            for entry in daemon.store.catalog.layouts
            for key in entry.index
        }
        lost = [name for name in self._expected if name not in names]
        assert not lost, f"blocks that were durable are lost: {lost}"
        if self._expected:
            world.marks["durable blocks found again"] += len(self._expected)
        self._expected = []

    def _check_adopted(self) -> None:
        """Every block that the slot table said was committed can be had from DRAM."""
        daemon = self.world.daemon
        catalog = daemon.store.catalog
        names = {
            (self._fingerprints[entry.fingerprint], key)
            for entry in catalog.layouts
            for key, block in entry.index.items()
            if catalog.flags[block] & READY
        }
        lost = sorted(self._expected_dram - names)
        assert not lost, f"committed blocks are lost with the daemon: {lost}"
        self.world.marks["blocks adopted"] += len(self._expected_dram)
        self._expected_dram = set()

    def opened_late(self) -> None:
        """The drive was absent: of what was forgotten meanwhile it does not know."""
        file = self.world.machine.index
        there = file.names(file.records)
        self.world.ledger.revived((self._fingerprints[of], key) for of, key in there)

    # -- the end -------------------------------------------------------------------------------

    def end(self) -> None:
        """Nothing goes wrong any more: then everything that was begun ends, and nothing is held."""
        world = self.world
        world.mend()
        world.advance_until(lambda: world.daemon.up and not world.daemon.stopping, END_S, "restart")
        world.mend()
        world.ending = True
        for client in world.clients:
            client.finishing = True
        world.advance_until(
            lambda: all(client.dying or not client.threads for client in world.clients),
            END_S,
            "some call of a client",
        )
        for program in list(world.programs):
            if not program.dying:
                program.kill(0.0)
        world.advance_until(lambda: not world.programs, END_S, "the end of clients")
        world.advance_until(lambda: world.daemon.quiet(), END_S, "moves and quarantines")
        self._nothing_is_held()

    def _nothing_is_held(self) -> None:
        daemon = self.world.daemon
        store, catalog = daemon.store, daemon.store.catalog
        store.check()
        self._check_table()
        assert not len(store.sessions) and not daemon.connections
        for block, flags in enumerate(catalog.flags):
            assert not catalog.pins[block] and not store.room.held(block), "held for nobody"
            assert not flags & (LOADING | SPILLING | DOOMED), f"block {block} is not at rest"
        store.clear(range(len(catalog.keys)))
        daemon.service.settle()
        store.check()
        assert store.room.dram.used_bytes == store.room.nvme.used_bytes == 0, "slots leaked"
        assert not list(daemon.table.records()), "records of slots that nobody has"
