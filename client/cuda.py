"""Copies between an engine's CUDA memory and the arena, near the link's speed, in the engine's
process: CUDA buffers of Cache.put and Cache.get, and lists of fragments for connectors.

A lease ends only when the device does not touch its slots any more, however late that is. Needs
cupy, which is imported with the first CUDA buffer.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.client.arena import Arena
from kvstore.client.cuda_buffers import LEGACY_STREAM, DeviceBuffers, device_buffers
from kvstore.client.cuda_device import CupyPlatform, Device, Platform
from kvstore.client.cuda_fragments import Direction, Fragments, Way, plan
from kvstore.client.cuda_parts import Near, Part, Parts
from kvstore.client.cuda_setup import PIECE_BYTES, Abilities, Registration
from kvstore.client.cuda_straight import DeviceRing, straight
from kvstore.client.cuda_transfer import DeviceState, Transfer
from kvstore.client.direct import DirectFiles, HostRing, MakeRing, Ring
from kvstore.errors import InvalidBlock, KVStoreError

if TYPE_CHECKING:
    from kvstore.client.client import Session
    from kvstore.client.grant import Grant
    from kvstore.client.reservation import Reservation

__all__ = [
    "Copier",
    "DeviceBuffers",
    "Direction",
    "Fragments",
    "Transfer",
    "default_copier",
    "device_buffers",
]

INLINE_WEIGHT = 256  # more places of the device's queue than this are not filled by the caller
LATE_MAX = 16  # while so many late copies have not ended, others are not begun
LOOK_S, LOOK_S_MAX = 0.002, 0.05  # between two looks at late copies
QUIET_S = 60.0  # no second line about the same within this time
COUNTED = {Direction.STORE: "stored_bytes", Direction.LOAD: "loaded_bytes"}

log = logging.getLogger("kvstore")


class Copier:
    """Makes copies on all devices of a process. Every method may be called from any thread.

    counts  what happened: `stored_bytes`, `loaded_bytes`, `pageable_bytes` (of them, where the
            arena was not registered yet), `late` and `failed` copies: misses, or not stored
    """

    def __init__(self, platform: Platform, *, piece_bytes: int = PIECE_BYTES) -> None:
        self.platform = platform
        self.counts: Counter[str] = Counter()
        self._piece_bytes = piece_bytes
        self._lock = threading.Lock()
        self._states: dict[int, DeviceState] = {}
        self._registrations: dict[Arena, Registration] = {}
        self._late: list[tuple[Transfer, Callable[[], object]]] = []
        self._reaping = False
        self._parts = Parts()
        self._told: dict[str, float] = {}

    def store(
        self,
        reservation: Reservation,
        fragments: Fragments,
        *,
        deadline: float,
        streams: Sequence[int] = (LEGACY_STREAM,),
        keep: Any = None,
    ) -> bool:
        """Copy from a device into reserved slots and commit. False: nothing was stored.

        fragments  of all blocks of the reservation, see Fragments.of_blocks
        deadline   on the monotonic clock: what is not copied by then is not stored
        streams    the engine's, as numbers: what they were given until now is waited for
        keep       whatever must live as long as the copy

        Raises as Reservation.commit does, and InvalidBlock for fragments outside the arena. In any
        case the reservation ends, as soon as the device does not touch its slots any more.
        """
        arena = reservation._places.arena
        undo = reservation.abort
        if not self._copied(arena, fragments, Direction.STORE, streams, keep, deadline, undo):
            return False
        reservation.commit()
        return True

    def load(
        self,
        grant: Grant,
        fragments: Fragments,
        *,
        deadline: float,
        streams: Sequence[int] = (LEGACY_STREAM,),
        keep: Any = None,
        near: Near | None = None,
    ) -> bool:
        """Copy granted blocks to a device and release the grant. False: throw the copy away.

        Parameters as of `store`; `near` are blocks of the grant that are on the device. After a
        copy that was too late, what the engine gives to these streams waits until the device does
        not write there any more.
        """
        arena, undo = grant.places.arena, grant.release
        if not self._copied(arena, fragments, Direction.LOAD, streams, keep, deadline, undo, near):
            return False
        return grant.release()

    def take(
        self,
        arena: Arena,
        device: int,
        targets: Any,
        sources: Any,
        size: int,
        *,
        ring: Ring,
        deadline: float,
        streams: Sequence[int] = (LEGACY_STREAM,),
        keep: Any = None,
    ) -> bool:
        """Copy pieces of `size` bytes from a ring to a device: int64 arrays of addresses. False:
        throw the copy away. Parameters as of `store`."""
        if isinstance(ring, HostRing):
            self._pin(ring, device)
        nothing, sizes = np.empty(0, np.int64), np.full(len(targets), size, np.int64)
        way = Way.BATCH  # or plain, where they are few
        if isinstance(ring, HostRing):
            way = Way.PLAIN if ring.pins[device] else Way.PAGEABLE
        near = Near(targets, sources, sizes, way)
        return self._copied(
            arena,
            Fragments(device, nothing, nothing, nothing),
            Direction.LOAD,
            streams,
            (keep, ring),
            deadline,
            lambda: None,
            near,
        )

    def rings(self, number: int, files: DirectFiles, sums: str) -> MakeRing | None:
        """Makes memory of a device into which files are read without the host, and checked on the
        "device" or the "host"; None where that cannot be done here, or not yet."""
        device = self._state(number).device
        way = files.way(number, lambda: straight(device, files.paths, sums))
        return functools.partial(DeviceRing, device, way) if way is not None else None

    def part(self, session: Session, device: int) -> Part | None:
        """The daemon's part of this device's memory, if it has one that can be opened."""
        return self._parts.find(session, self._state(device).device)

    def begin(
        self,
        arena: Arena,
        fragments: Fragments,
        direction: Direction,
        *,
        streams: Sequence[int] = (LEGACY_STREAM,),
        keep: Any = None,
        near: Near | None = None,
    ) -> Transfer:
        """Begin a copy and do not wait for it; `finish` must follow.

        Raises InvalidBlock for fragments that are not in the arena, and what the device raises when
        nothing can be given to it. What fails later is in the transfer.
        """
        _check(fragments, arena)
        state = self._state(fragments.device)
        with state.device.current():
            registration = self._registration(arena, state)
            if not registration.enter():
                raise InvalidBlock("the arena was closed: what was leased of it is void")
            try:
                state.stream(direction, slow=False)  # only then is it known what the device can do
                can = state.abilities
                steps = plan(
                    fragments,
                    ready_bytes=registration.ready_bytes,
                    piece_bytes=self._piece_bytes,
                    breaks=can.breaks[direction],
                    batches=can.batches,
                    gathers=can.gathers and state.device.gathers and registration.unified,
                )
                if near is not None:
                    steps += near.steps(arena.address, batches=can.batches)
                transfer = Transfer(state, registration, direction, steps, streams, keep)
            except BaseException:
                registration.leave()
                raise
        if len(self._late) >= LATE_MAX:
            transfer.fail(TimeoutError(f"{LATE_MAX} late copies have not ended"))
        elif transfer.slow or transfer.weight > INLINE_WEIGHT:
            state.submit(transfer)
        else:
            transfer.run()
        return transfer

    def finish(self, transfer: Transfer, deadline: float, then: Callable[[], object]) -> bool:
        """Wait for a copy, until the deadline at most. True: every byte is there, and the transfer
        is closed. Else `then` is called once, as soon as the device touches nothing of it."""
        try:
            good = transfer.wait(deadline)
        except Exception as error:  # the device cannot even be asked
            transfer.error, good = transfer.error or error, False
        except BaseException:
            self._leave(transfer, then)
            raise
        if not good:
            self._failed("late" if transfer.error is None else "failed", transfer)
            self._leave(transfer, then)
            return False
        slow = [int(step.lengths.sum()) for step in transfer.steps if step.way is Way.PAGEABLE]
        with self._lock:
            self.counts[COUNTED[transfer.direction]] += transfer.bytes
            self.counts["pageable_bytes"] += sum(slow)
        transfer.close()
        return True

    @property
    def late(self) -> int:
        """Copies that nobody waits for any more and that have not ended."""
        return len(self._late)

    def registration(self, arena: Arena) -> Registration | None:
        """How far an arena is registered; None before the first copy and after its end."""
        return self._registrations.get(arena)

    def abilities(self, device: int) -> Abilities:
        """What is known of a device by now."""
        return self._state(device).abilities

    # -- inside --------------------------------------------------------------------------------

    def _copied(
        self,
        arena: Arena,
        fragments: Fragments,
        direction: Direction,
        streams: Sequence[int],
        keep: Any,
        deadline: float,
        undo: Callable[[], object],
        near: Near | None = None,
    ) -> bool:
        """Whether the copy was made in time; else `undo` is called as soon as it may be."""
        try:
            transfer = self.begin(
                arena, fragments, direction, streams=streams, keep=keep, near=near
            )
        except Exception as error:  # nothing was given to the device
            undo()
            if isinstance(error, KVStoreError):
                raise
            self._failed("failed", error)
            return False
        return self.finish(transfer, deadline, undo)

    def _state(self, number: int) -> DeviceState:
        with self._lock:
            if number not in self._states:
                self._states[number] = DeviceState(self.platform.device(number))
            return self._states[number]

    def _registration(self, arena: Arena, state: DeviceState) -> Registration:
        with self._lock:
            found = self._registrations.get(arena)
            if found is None:
                found = self._registrations[arena] = Registration(
                    arena, state.device, piece_bytes=self._piece_bytes, first=state.measure
                )
                arena.on_close(lambda: self._registrations.pop(arena, None))
            return found

    def _pin(self, ring: HostRing, number: int) -> None:
        """Let a device reach a ring without a detour, where it can, until the ring is gone."""
        if number in ring.pins:
            return
        device, ring.pins[number] = self._state(number).device, False
        with contextlib.suppress(Exception), device.current():
            device.register(ring.address, ring.slot_bytes * ring.slots)
            weakref.finalize(ring, _unpin, device, ring.address)
            ring.pins[number] = True

    def _leave(self, transfer: Transfer, then: Callable[[], object]) -> None:
        """Leave a copy to itself, and what follows it to a thread."""
        transfer.cancel()
        with self._lock:
            self._late.append((transfer, then))
            if self._reaping:
                return
            self._reaping = True
            try:
                threading.Thread(target=self._reap, name="kvstore-late", daemon=True).start()
            except RuntimeError:  # no more threads: the next one that is late tries it again
                self._reaping = False

    def _reap(self) -> None:
        pause_s = LOOK_S
        while True:
            for transfer, then in list(self._late):
                ended = False
                with contextlib.suppress(Exception):  # a device that answers nothing proves nothing
                    ended = transfer.ended
                if not ended:
                    continue
                pause_s = LOOK_S
                try:
                    then()
                except Exception as error:
                    log.warning("kvstore: a late copy's lease could not be ended: %s", error)
                transfer.close()
                with self._lock:
                    self._late.remove((transfer, then))
            with self._lock:
                if not self._late:
                    self._reaping = False
                    return
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LOOK_S_MAX)

    def _failed(self, kind: str, what: Transfer | Exception) -> None:
        now = time.monotonic()
        with self._lock:
            self.counts[kind] += 1
            if now < self._told.get(kind, -QUIET_S) + QUIET_S:
                return
            self._told[kind] = now
        if isinstance(what, Transfer):
            did = f"failed: {what.error}" if what.error else "was not done in time"
            text = f"a {what.direction.value} of {what.bytes >> 20} MiB {did}"
        else:
            text = f"a copy could not begin: {what}"
        log.warning("kvstore: %s: the engine goes on without it", text)


@functools.cache
def default_copier() -> Copier:
    """The copier of this process. Raises InvalidBlock, saying what to install, where there is no
    cupy or no driver."""
    try:
        return Copier(CupyPlatform())
    except (ImportError, OSError) as error:
        raise InvalidBlock(
            f"buffers in CUDA memory take cupy and a driver ({error}): pip install "
            "'kvstore[gpu]', or copy them to the host first"
        ) from None


def _unpin(device: Device, address: int) -> None:
    with contextlib.suppress(Exception), device.current():
        device.unregister(address)


def _check(fragments: Fragments, arena: Arena) -> None:
    if len(fragments) and (
        fragments.offsets.min() < 0
        or (fragments.offsets + fragments.lengths).max() > arena.size_bytes
        or min(fragments.lengths.min(), fragments.addresses.min()) <= 0
    ):
        raise InvalidBlock("a fragment is not in the arena, or is empty")
