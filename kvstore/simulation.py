"""A trace through the daemon's own brain, with a clock that runs as fast as it can.

The store, its placement and its policies are the real ones. Simulated are the hands: each direction
of NVMe carries out one move after the other at its bandwidth; and the clients: one asks for a
prompt, waits for loads until its deadline, computes what it was not given, and offers that.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvstore.accesses import REUSES, Hints
from kvstore.catalog import LayoutEntry
from kvstore.counters import Counters
from kvstore.errors import InvalidRequest
from kvstore.eviction.base import Family
from kvstore.leases import ReadLease
from kvstore.limits import Limits
from kvstore.orders import Move, MoveKind, Outcome
from kvstore.parking import PARKED_MAX
from kvstore.placement import PlacementConfig
from kvstore.reads import LATE, NO_ROOM
from kvstore.store import Store
from kvstore.traces import ASKED, Chains, Shape, Sizes, Trace
from kvstore.types import MIB, NVME, Layout
from kvstore.units import format_size
from kvstore.writes import REFUSED

TICK_S = 1.0
TICKS_MAX = 60  # between two steps: a write budget saves up no more than a minute's worth
NEVER_S = 1e12
SUMS = b"\1" * 8
PROGRESS_STEPS = 256
COLUMNS = (
    *("t", "kind", "layout", "leaf", "skip", "length", "put"),
    *("tokens_per_s", "reuse", "tag"),
)
SLABS = 256  # of a tier, where a single one does not do
SLAB_BYTES = 64 * MIB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """How fast things are, a second, and how long a client waits for loads."""

    dram_bytes_per_s: float = 20e9
    nvme_read_bytes_per_s: float = 6e9
    nvme_write_bytes_per_s: float = 3e9
    prefill_tokens_per_s: float = 10_000.0
    deadline_s: float = 10.0


@dataclasses.dataclass(slots=True)
class Played:
    """What came of a trace. By step: blocks granted, those of them found on NVMe, and how many
    seconds after its own time the step was answered."""

    hits: Any
    slow: Any
    wait_s: Any
    counters: Counters
    dram_blocks: int  # the tiers' capacities, where all blocks are of one size
    nvme_blocks: int


@dataclasses.dataclass(slots=True, eq=False)
class _Prompt:
    """A request for blocks under way. keys[:done] need no more asking; what is missing up to `put`
    is offered in the end, with `hints`."""

    number: int
    entry: LayoutEntry
    keys: Sequence[bytes]
    done: int
    put: int
    tokens_per_s: float
    hints: Hints
    deadline: float


@dataclasses.dataclass(slots=True, eq=False)
class _Offer:
    """Blocks keys[done:end] that a client has, behind keys[:done]."""

    entry: LayoutEntry
    keys: Sequence[bytes]
    done: int
    end: int
    hints: Hints
    deadline: float


class Simulation:
    """One run over a trace. Use it once."""

    def __init__(
        self, trace: Trace, sizes: Sizes, machine: Machine, make_family: Callable[[], Family]
    ) -> None:
        self._trace = trace
        self._machine = machine
        self.now = 0.0
        self.store = Store(
            placement(sizes, trace.shapes, blocks_max=trace.block_count),
            Limits(leases_per_session=1 << 30),
            make_family(),
        )
        self.store.observers.clear()  # they measure what is seen here from outside
        self._session = self.store.attach("simulation")
        self._entries = [
            self.store.open(_layout(number, shape)) for number, shape in enumerate(trace.shapes)
        ]
        names = [block.to_bytes(8, "little") for block in range(trace.block_count)]
        self._chains: Chains[bytes] = Chains(
            trace.parents.tolist(), [names[block] for block in trace.keys.tolist()]
        )
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._read_from = 0.0  # when NVMe can begin to read the next block
        self._write_from = 0.0
        self._ticked = 0.0
        self._waiting: dict[ReadLease, _Prompt] = {}
        # Requests that wait for room: each says whether it is over; True: it must be.
        self._parked: deque[Callable[[bool], bool]] = deque()
        self._asking = False  # they are being asked just now
        count = len(trace.steps)
        self._hits = np.zeros(count, np.int32)
        self._slow = np.zeros(count, np.int32)
        self._wait_s = np.zeros(count, np.float64)
        self._times: list[float] = trace.steps["t"].tolist()

    def run(self, progress: Callable[[int], None] = lambda done: None) -> Played:
        """Play the whole trace. `progress` is told now and then how many steps are done."""
        columns = (self._trace.steps[name].tolist() for name in COLUMNS)
        steps = zip(*columns, strict=True)
        wait_s = self._machine.deadline_s
        for number, (t, kind, layout, leaf, skip, length, put, speed, reuse, tag) in enumerate(
            steps
        ):
            self._advance(t)
            keys = self._chains.to(leaf)
            if len(keys) > length:
                keys = keys[:length]
            entry = self._entries[layout]
            hints = Hints(REUSES[reuse], tag=str(tag) if tag else "")
            if kind == ASKED:
                self._ask(_Prompt(number, entry, keys, skip, put, speed, hints, t + wait_s))
            else:
                self._offer(_Offer(entry, keys, skip, length, hints, t + wait_s))
            if number % PROGRESS_STEPS == 0:
                progress(number)
        while self._events and (self._waiting or self._parked):
            self._advance(self._events[0][0])
        slots = self.store.room, self._entries[0].slot_bytes
        return Played(
            self._hits,
            self._slow,
            self._wait_s,
            self.store.counters,
            slots[0].dram.capacity(slots[1]),
            slots[0].nvme.capacity(slots[1]),
        )

    # -- clients -------------------------------------------------------------------------------

    def _ask(self, prompt: _Prompt) -> None:
        if not self._acquire(prompt, last=self.now >= prompt.deadline):
            self._park(lambda last: self._acquire(prompt, last=last), prompt.deadline)

    def _acquire(self, prompt: _Prompt, *, last: bool) -> bool:
        """Ask for the rest of a prompt; False when it is to be tried again."""
        keys, done = prompt.keys, prompt.done
        lease = self.store.acquire(
            self._session,
            prompt.entry,
            keys[done:] if done else keys,
            self.now,
            wait=not last,
            tokens_per_s=prompt.tokens_per_s,
            context=keys[:done] if done else (),
        )
        if lease.parked:
            return False
        if lease.answered:
            self._answered(lease, prompt)
        else:
            self._waiting[lease] = prompt
            self._at(prompt.deadline, lambda: self._late(lease))
            self._carry_out()
        return True

    def _late(self, lease: ReadLease) -> None:
        prompt = self._waiting.pop(lease, None)
        if prompt is not None:
            self.store.cut(lease, LATE)
            self._answered(lease, prompt)

    def _answered(self, lease: ReadLease, prompt: _Prompt) -> None:
        number, hit = prompt.number, lease.ready
        self._hits[number] += hit
        self._slow[number] += lease.tiers.count(NVME)
        self._wait_s[number] = self.now - self._times[number]
        self.store.digest(self.now)
        if hit:
            self.store.release(self._session, lease.number)
        self._carry_out()
        prompt.done += hit
        if hit and lease.stop == NO_ROOM and prompt.done < len(prompt.keys):
            self._ask(prompt)
        elif prompt.done < prompt.put or (prompt.put and prompt.hints):
            deadline = self.now + self._machine.deadline_s
            self._offer(
                _Offer(prompt.entry, prompt.keys, prompt.done, prompt.put, prompt.hints, deadline)
            )

    def _offer(self, offer: _Offer) -> None:
        if not self._reserve(offer, last=False):
            self._park(lambda last: self._reserve(offer, last=last), offer.deadline)

    def _reserve(self, offer: _Offer, *, last: bool) -> bool:
        """Store what is not there yet; False when it is to be tried again."""
        store, now, done = self.store, self.now, offer.done
        reserved = store.reserve(
            self._session,
            offer.entry,
            offer.keys[done : offer.end],
            now,
            force=last,
            context=offer.keys[:done],
            hints=offer.hints,
        )
        if reserved.waiting and not last:
            self._carry_out()
            return False
        store.digest(now)
        if reserved.lease is not None:
            store.commit(self._session, reserved.lease.number, now)
            store.digest(now)
        self._carry_out()
        refused = reserved.status.find(REFUSED)
        if refused >= 0 and reserved.lease is not None and now < offer.deadline:
            offer.done += refused
            self._offer(offer)
        elif refused >= 0:
            store.counters.refused += reserved.status.count(REFUSED)
        return True

    def _park(self, attempt: Callable[[bool], bool], deadline: float) -> None:
        """Try again when there may be room, and for the last time at the deadline: at once, when
        too many wait already."""
        if len(self._parked) >= PARKED_MAX:
            attempt(True)
            return
        self._parked.append(attempt)

        def end() -> None:
            if attempt in self._parked:
                self._parked.remove(attempt)
                attempt(True)

        self._at(deadline, end)

    # -- hands and clock -----------------------------------------------------------------------

    def _at(self, time: float, act: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (max(time, self.now), self._sequence, act))

    def _advance(self, until: float) -> None:
        """Let time pass: moves end, deadlines come, the store ticks."""
        while self._ticked + TICK_S <= until:
            late = until - self._ticked > TICKS_MAX * TICK_S
            self._ticked = until - TICKS_MAX * TICK_S if late else self._ticked + TICK_S
            self._let_pass(self._ticked)
            self.store.tick(self.now)
            self._carry_out()
            if not self._events and not self.store.placement.due():
                self._ticked = math.floor(until)  # nothing happens by itself
        self._let_pass(until)

    def _let_pass(self, until: float) -> None:
        events = self._events
        while events and events[0][0] <= until:
            self.now, _, act = heapq.heappop(events)
            act()
            self._carry_out()
        self.now = max(self.now, until)

    def _carry_out(self) -> None:
        """Carry out the store's orders until there are none. Who waits for room is asked once."""
        asked = self._asking
        while self.store.room.orders:
            orders = self.store.take_orders()
            for move in orders.moves:
                self._order(move)
            for lease in orders.answers:
                self._answered(lease, self._waiting.pop(lease))
            if orders.room and self._parked and not asked:
                asked = self._asking = True
                while self._parked and (attempt := self._parked[0])(False):
                    self._parked.remove(attempt)
                self._asking = False

    def _order(self, move: Move) -> None:
        size = move.entry.slot_bytes if move.entry else 0
        machine, kind = self._machine, move.kind
        if kind is MoveKind.SPILL:
            move.sums = SUMS
            end = max(self._write_from, self.now) + size / machine.nvme_write_bytes_per_s
            self._write_from = end
        elif kind in (MoveKind.LOAD, MoveKind.PREFETCH, MoveKind.VERIFY):
            end = max(self._read_from, self.now) + size / machine.nvme_read_bytes_per_s
            self._read_from = end
        else:  # sums of what is in memory: they cost nothing here
            move.sums = SUMS
            self.store.finished(move, Outcome.DONE, self.now)
            return
        move.seconds = end - self.now
        self._at(end, lambda: self.store.finished(move, Outcome.DONE, self.now))


def placement(
    sizes: Sizes, shapes: Sequence[Shape], *, blocks_max: int | None = None
) -> PlacementConfig:
    """The tiers of a simulated store. With blocks of one size it has exactly as many slots as the
    sizes give (or the slabs of a recorded daemon); beside NVMe some slots fewer than one in SLABS.
    No tier is larger than for `blocks_max` blocks: one that holds all serves like a larger one.

    Raises InvalidRequest when not even one block fits into DRAM."""
    largest = max(shape.slot_bytes for shape in shapes)
    slab, dram, nvme = sizes.slab_bytes, sizes.dram_bytes, sizes.nvme_bytes
    if dram < max(largest, slab):
        raise InvalidRequest(
            f"{format_size(dram)} of DRAM hold no block of {format_size(largest)}: give a larger "
            "--dram"
        )
    if len(shapes) == 1:
        per_slab = slab // largest
        dram, nvme = (size // slab * per_slab if slab else size // largest for size in (dram, nvme))
        whole = dram if not nvme or nvme % dram == 0 else max(1, min(dram, nvme) // SLABS)
        if blocks_max is not None:
            whole = min(whole, blocks_max + 1)
            most = (blocks_max // whole + 1) * whole
            dram, nvme = min(dram, most), min(nvme, most)
        return _config(sizes, dram * largest, nvme * largest, whole * largest)
    slab = slab or max(SLAB_BYTES, largest)
    if blocks_max is not None and slab >= largest:
        most = (blocks_max // (slab // largest) + 1 + len(shapes)) * slab
        dram, nvme = min(dram, most), min(nvme, most)
    return _config(sizes, dram, nvme, slab)


def _config(sizes: Sizes, dram: int, nvme: int, slab: int) -> PlacementConfig:
    return PlacementConfig(
        dram_bytes=dram,
        nvme_bytes=nvme,
        slab_bytes=slab,
        write_policy=sizes.write_policy,
        write_budget=sizes.write_budget,
        hang_s=NEVER_S,
    )


def _layout(number: int, shape: Shape) -> Layout:
    return Layout(
        model=f"layout {number}",
        engine="simulation",
        dtype="any",
        block_tokens=shape.block_tokens,
        shard_bytes=shape.block_bytes,
    )
