"""The machine on which all of it happens: one seed, one history.

After every step everything is checked (`tests.simulate.checks`). Between steps, now and then,
something goes wrong: a party dies, stops or is cut off, the drive fails, the power is cut.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvstore.adoption import SLOT_TABLE
from kvstore.limits import Limits
from kvstore.placement import PlacementConfig
from kvstore.protos import kvstore_pb2 as pb
from kvstore.tiers.slot_table import COMMITTED, SlotTable
from kvstore.types import SLOT_ALIGNMENT, Layout
from tests.brain.world import SHAPES, layout_of
from tests.simulate.checks import Checks
from tests.simulate.clients import Client
from tests.simulate.clock import Clock, Event, Killed, Process
from tests.simulate.holders import Holders
from tests.simulate.host import Daemon, Machine
from tests.simulate.index import IndexFile
from tests.simulate.ledger import Ledger
from tests.simulate.media import Arena, Drive, Faults
from tests.simulate.programs import Helper, Peer, Program
from tests.simulate.wire import Connection

EVENTS_KEPT = 40
END_STEPS = 20_000

OPERATIONS = {
    "put": 10.0,
    "get": 14.0,
    "lookup": 1.0,
    "prefetch": 2.0,
    "retain": 0.7,
    "forget": 1.0,
    "clear": 0.1,
    "verify": 0.4,
    "drain": 0.2,
}
TROUBLES = {
    "kill_client": 3.0,
    "stop_client": 2.0,
    "close_connection": 1.0,
    "drain_session": 1.5,
    "kill_daemon": 1.5,
    "kill_daemon_at_work": 3.0,
    "stop_daemon": 1.0,
    "restart_daemon": 0.7,
    "cut_power": 1.0,
    "break_drive": 4.0,
    "mend_drive": 3.0,
    "flip_bit": 1.0,
}
# Histories that keep to one matter meet its rare turns more often.
FOCUSES: tuple[tuple[dict[str, float], dict[str, float]], ...] = (
    ({}, {}),
    ({"put": 20.0}, {"kill_client": 10.0, "drain_session": 4.0, "cut_power": 0.2}),  # shards
    ({"get": 30.0, "prefetch": 6.0}, {"kill_daemon": 0.3, "cut_power": 0.3}),  # loads
    (
        {"verify": 2.0, "get": 20.0},
        {"break_drive": 8.0, "flip_bit": 4.0, "mend_drive": 6.0},
    ),  # faults
    ({"put": 16.0}, {"kill_daemon_at_work": 12.0, "kill_daemon": 5.0}),  # restarts
    ({}, {"cut_power": 12.0, "restart_daemon": 5.0}),  # power
)
SHARDS, FAULTS = 1, 3  # places above


class Failure(AssertionError):
    """A history went wrong; the text says how to see it again."""


class World:
    """Everything that there is."""

    def __init__(self, seed: int, steps: int) -> None:
        self.seed = seed
        self.steps = steps
        self.step = 0
        self.chance = chance = random.Random(seed)
        self.marks: Counter[str] = Counter()
        self.clock = Clock()
        self.fate = Process(self.clock, "fate")
        self.trace = hashlib.blake2b(digest_size=8)
        self.last: deque[str] = deque(maxlen=EVENTS_KEPT)
        self.ending = False
        self.focus = chance.randrange(len(FOCUSES))
        self._operations = OPERATIONS | FOCUSES[self.focus][0]
        self._troubles = TROUBLES | FOCUSES[self.focus][1]
        self._trouble_share = chance.choice((0.0, 0.003, 0.01, 0.03))
        if self.focus == FAULTS:
            self._trouble_share = max(self._trouble_share, 0.01)
        self._pace_s = chance.choice((0.0003, 0.002, 0.03))
        self.layouts: list[Layout] = [layout_of(n) for n in range(chance.randint(1, len(SHAPES)))]
        self.ledger = Ledger(self.layouts)
        self.holders = Holders()
        self._moment = 0
        self._inode = 0
        self.folder = Path(tempfile.mkdtemp(prefix="kvstore-simulate-", dir=_memory()))
        self.machine = self._make_machine()
        self.daemon = Daemon(self, self.machine, 0)
        self.daemon.start()
        self.checks = Checks(self)
        self.programs: list[Program] = []  # those that have not ended
        self._programs_made: dict[int, Program] = {}
        self._helper_share = chance.choice((0.0, 0.5))
        self._clients_wanted = chance.randint(2, 4)
        self._employ()

    @property
    def clients(self) -> list[Client]:
        """Those of the processes that are no helpers."""
        return [program for program in self.programs if isinstance(program, Client)]

    # -- chances that others ask for -----------------------------------------------------------

    def moment(self) -> int:
        """A number higher than all before."""
        self._moment += 1
        return self._moment

    def wire_s(self) -> float:
        """How long a message is under way."""
        return self.chance.uniform(5e-6, 2e-4)

    def think_s(self) -> float:
        """What an engine does between two calls."""
        return self.chance.expovariate(1 / self._pace_s)

    def quiet_in_s(self) -> float | None:
        """When the daemon's loop has a quiet moment; None: it sleeps."""
        if self.chance.random() < 0.5:
            return None
        return self.chance.expovariate(1 / self.chance.choice((0.0001, 0.003)))

    def copy_s(self) -> float:
        """A part of a copy."""
        return self.chance.expovariate(1 / self.chance.choice((0.0002, 0.005)))

    def wait_s(self) -> float:
        """A deadline of a call."""
        return self.chance.choice((0.0, 0.002, 0.05, 1.0))

    def by_shards(self) -> bool:
        return self.chance.random() < (0.7 if self.focus == SHARDS else 0.15)

    def next_operation(self) -> str:
        names = list(self._operations)
        return self.chance.choices(names, list(self._operations.values()))[0]

    def next_layout(self) -> int:
        if self.focus == SHARDS and len(self.layouts) > 1 and self.chance.random() < 0.7:
            return 1
        return self.chance.choice((0, self.chance.randrange(len(self.layouts))))

    def open_request(self, at: int) -> Any:
        layout = self.layouts[at]
        return pb.OpenRequest(
            layout=pb.LayoutMessage(
                model=layout.model,
                engine=layout.engine,
                dtype=layout.dtype,
                block_tokens=layout.block_tokens,
                shards=layout.shards,
                shard_bytes=layout.shard_bytes,
            )
        )

    # -- running -------------------------------------------------------------------------------

    def run(self) -> World:
        """So many steps, then everything ends. Raises Failure with all that is needed to see it
        again."""
        try:
            while self.step < self.steps:
                if self.clients and self.chance.random() < self._trouble_share:
                    self._mortal(self._trouble)
                self._advance()
            self.checks.end()
        except BaseException as error:
            raise Failure(self._report(error)) from error
        finally:
            self.daemon.table.close()
            shutil.rmtree(self.folder)
        return self

    def _advance(self) -> None:
        event = self.clock.next()
        assert event is not None, "nothing will ever happen again"
        self._note(event)
        self.checks.before_step()
        self._mortal(event.callback, *event.args)
        self.checks.after_step()
        self.step += 1

    def _mortal(self, call: Callable[..., object], *args: Any) -> None:
        """Do something that the daemon may not survive."""
        try:
            call(*args)
        except Killed:
            self.marks["daemon killed at work"] += 1
            self.daemon_dies("killed at work")

    def advance_until(self, done: Callable[[], bool], seconds: float, what: str) -> None:
        """Let things happen until something holds; asserts that it does within the time."""
        until, steps = self.clock.now + seconds, self.step + END_STEPS
        while not done():
            assert self.clock.now < until and self.step < steps, f"it never ends: {what}"
            self._advance()

    def say(self, what: str) -> None:
        """Note what happens, for the trace."""
        line = f"{self.step:6} {self.clock.now:12.6f} {what}"
        self.trace.update(line.encode())
        self.last.append(line)

    def _note(self, event: Event) -> None:
        callback = event.callback
        name = getattr(callback, "__qualname__", type(callback).__qualname__)
        told = [repr(arg) for arg in event.args if isinstance(arg, int | float | str | bytes)]
        if event.args[:1] == (pb.ATTACH,):
            told.clear()  # a token is no part of the history
        self.say(f"{event.process.name}: {name}({', '.join(told)})"[:200])

    def _report(self, error: BaseException) -> str:
        events = "\n".join(self.last)
        return (
            f"{type(error).__name__}: {error}\n"
            f"seed {self.seed}, step {self.step} of {self.steps}; the last events:\n{events}\n"
            f"replay: python -m tests.simulate --seed {self.seed} --steps {self.steps}"
        )

    # -- what goes wrong -----------------------------------------------------------------------

    def _trouble(self) -> None:
        names = list(self._troubles)
        name = self.chance.choices(names, list(self._troubles.values()))[0]
        self.say(f"trouble: {name}")
        self.marks[name] += 1
        getattr(self, f"_{name}")()

    def _kill_client(self) -> None:
        program = self.chance.choice(self.programs)
        if not program.dying:
            program.kill(self.chance.choice((0.0, 0.001, 0.02, 0.5)))
            if isinstance(program, Client):
                self.fate.call_later(self.think_s(), self._employ)
                helper = program.helper  # it notices, some time
                if helper is not None and not helper.dying:
                    self.fate.call_later(self.chance.choice((0.0, 0.05, 1.0)), helper.kill, 0.0)

    def _stop_client(self) -> None:
        program = self.chance.choice(self.programs)
        if not program.dying and not program.process.stopped:
            program.process.stop_for_now()
            self.fate.call_later(self.chance.choice((0.001, 0.05, 8.0)), program.process.resume)

    def _close_connection(self) -> None:
        connection = self.chance.choice(self.clients).connection
        if connection is not None:
            connection.close()

    def _drain_session(self) -> None:
        if self.daemon.connections and not self.daemon.process.stopped:
            self.daemon.end(self.chance.choice(self.daemon.connections).session_number)

    def _kill_daemon(self) -> None:
        if self.daemon.up:
            self.daemon_dies("killed")

    def _kill_daemon_at_work(self) -> None:
        self.daemon.fuse.left = self.chance.choice((0, 0, 1, 3, 10))

    def _stop_daemon(self) -> None:
        daemon = self.daemon
        if daemon.up and not daemon.process.stopped:
            daemon.stops += 1
            daemon.process.stop_for_now()
            self.fate.call_later(self.chance.choice((0.001, 0.1, 7.0)), self._resume_daemon, daemon)

    def _resume_daemon(self, daemon: Daemon) -> None:
        daemon.stops += 1
        daemon.process.resume()

    def _restart_daemon(self) -> None:
        daemon = self.daemon
        if daemon.up and not daemon.process.stopped and not daemon.stopping:
            daemon.stop(lambda: self._restart_later(0.1))

    def _cut_power(self) -> None:
        """Everything in memory is lost."""
        if not self.daemon.up:
            return
        for program in list(self.programs):
            program.kill(0.0)
            program.end()
        self.checks.before_power_cut()
        self.daemon.kill()
        if self.machine.drive is not None:
            self.machine.drive.cut_power()
        self.machine.arena = self.new_arena()
        self.checks.forget_arena()
        self._restart_later(0.5)
        for _ in range(self._clients_wanted):
            self.fate.call_later(0.5 + self.think_s(), self._employ)

    def _break_drive(self) -> None:
        drive, chance = self.machine.drive, self.chance
        if drive is not None:
            kind = chance.choice(
                (
                    "errors",
                    "errors",
                    "silent",
                    "silent",
                    "hang",
                    "hang",
                    "full",
                    "sync",
                    "sync",
                    "absent",
                )
            )
            drive.faults = Faults(
                error=chance.choice((0.1, 0.5, 1.0)) * (kind == "errors"),
                torn=0.3 * (kind == "silent"),
                flipped=0.3 * (kind == "silent"),
                hang=0.3 * (kind == "hang"),
                full=0.5 * (kind == "full"),
                sync_error=0.7 * (kind == "sync"),
                absent=kind == "absent",
            )

    def _mend_drive(self) -> None:
        if self.machine.drive is not None:
            self.machine.drive.faults = Faults()

    def _flip_bit(self) -> None:
        if self.machine.drive is not None:
            self.machine.drive.flip(0, self.machine.drive.capacity_bytes)

    def mend(self) -> None:
        """Nothing goes wrong any more."""
        self._mend_drive()
        self.daemon.fuse.left = None
        for process in (self.daemon.process, *(program.process for program in self.programs)):
            if process.stopped:
                process.resume()

    # -- lives ---------------------------------------------------------------------------------

    def daemon_dies(self, why: str) -> None:
        """The kernel ends the process and closes what it had open."""
        self.say(f"daemon dies: {why}")
        self.checks.before_daemon_dies()
        self.daemon.kill()
        self._restart_later(self.chance.choice((0.0005, 0.02, 0.4)))

    def _restart_later(self, seconds: float) -> None:
        self.fate.call_later(seconds, self._start_daemon, self.daemon.generation + 1)

    def _start_daemon(self, generation: int) -> None:
        if generation != self.daemon.generation + 1:
            return
        if self.chance.random() < 0.4:
            self._spoil_arena()
        self.daemon = Daemon(self, self.machine, generation)
        if not self.ending and self.chance.random() < 0.1:
            self.daemon.fuse.left = self.chance.choice((0, 1, 3, 10))
        self.daemon.start()
        self.checks.after_restart()

    def _spoil_arena(self) -> None:
        """A bit turns in a block whose checksum is known, while nobody looks after it."""
        arena = self.machine.arena
        if not arena.adoptable:
            return
        table = SlotTable.open(self.folder / SLOT_TABLE)
        known = [one for one in table.records() if one.state == COMMITTED and one.checksum]
        table.close()
        if known:
            record = self.chance.choice(known)
            size = self.checks.layout_of(record.layout).block_bytes
            arena.bytes[record.offset + self.chance.randrange(size)] ^= 4
            arena.spoilt.add(record.offset)
            self.marks["bit flipped in the arena"] += 1

    def peer(self, daemon: Process, pid: int, *, start: int | None = None) -> Peer:
        """A process, as the daemon that asks will know it."""
        return Peer(daemon, self._programs_made.get(pid), pid, self.wire_s())

    def _employ(self) -> None:
        if self.ending:
            return
        while sum(not client.dying for client in self.clients) < self._clients_wanted:
            self._made(Client(self, len(self._programs_made) + 1))

    def wants_helper(self, client: Client) -> bool:
        """Whether a client that has just connected starts a worker process."""
        there = client.helper is not None and not client.helper.gone
        return not there and not self.ending and self.chance.random() < self._helper_share

    def employ_helper(self, connection: Connection, ticket: Any) -> Helper:
        """A worker process, which joins the session of that connection."""
        helper = Helper(self, len(self._programs_made) + 1, connection, ticket)
        self._made(helper)
        return helper

    def _made(self, program: Program) -> None:
        self.programs.append(program)
        self._programs_made[program.number] = program

    def new_arena(self) -> Arena:
        """Memory of which nobody knows anything."""
        self._inode += 1
        return Arena(self.machine.placement.dram_bytes, self._inode)

    def _make_machine(self) -> Machine:
        chance = self.chance
        slab_bytes = chance.choice((6, 8)) * SLOT_ALIGNMENT
        nvme_bytes = chance.choice((0, 1, 2, 4, 6, 8)) * slab_bytes
        dram_bytes = chance.choice((1, 1, 2, 3, 4)) * slab_bytes
        config = PlacementConfig(
            dram_bytes=dram_bytes,
            nvme_bytes=nvme_bytes,
            slab_bytes=slab_bytes,
            write_policy=chance.choice(("through", "through", "on-evict", "second-touch")),
            write_budget=chance.choice((None, None, None, 50.0 * SLOT_ALIGNMENT)),
            spread=chance.randint(1, 2),
            queue_depth=chance.randint(1, 4),
            loads_max=chance.choice((1, 4, 64)),
            hang_s=chance.choice((1.0, 10.0)),
        )
        return Machine(
            config,
            chance.choice(("lru", "relevance")),
            Limits(leases_per_session=chance.choice((3, 30)), sessions=chance.choice((4, 8))),
            workers=chance.randint(1, 4),
            sync_interval_s=chance.choice((0.003, 0.02, 0.2)),
            folder=self.folder,
            arena=Arena(dram_bytes, 0),
            drive=Drive(nvme_bytes, chance, self.marks) if nvme_bytes else None,
            index=IndexFile(),
        )


def _memory() -> str | None:
    """Where files are memory, if there is such a place."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
