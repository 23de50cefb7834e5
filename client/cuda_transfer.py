"""One copy between a device and the arena on its way: who gives it to the device, and how anybody
knows that it has ended."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from kvstore.client.cuda_device import Device, Event
from kvstore.client.cuda_fragments import Direction, Step, Way
from kvstore.client.cuda_setup import Abilities, Registration, give, measure

QUEUE_WEIGHT = 512  # of the device's thousand places: a full queue makes the next call wait
SPIN_S = 0.002  # a copy is waited for without sleeping for so long
PAUSE_S_MAX = 0.000_5
FENCE_S = 0.000_25  # between two looks at what the engine computes

log = logging.getLogger("kvstore")


class Transfer:
    """One copy of one direction. Made by Copier.begin, to be ended by Copier.finish.

    bytes   of all fragments
    error   what the device, or a call to it, failed with
    slow    a part of the arena is not registered yet: the calls themselves wait for its bytes
    """

    def __init__(
        self,
        state: DeviceState,
        registration: Registration,
        direction: Direction,
        steps: list[Step],
        streams: Sequence[int],
        keep: Any,
    ) -> None:
        self.device = state.device
        self.direction = direction
        self.steps = steps
        self.bytes = sum(int(step.lengths.sum()) for step in steps)
        self.error: Exception | None = None
        self.slow = any(step.way is Way.PAGEABLE for step in steps)
        self.stream = state.stream(direction, self.slow)
        self._registration = registration
        self._streams = streams
        self._keep = [keep]
        self._fences = [self.device.record(stream) for stream in streams]
        self._giving = threading.Lock()  # held while something is given to the device
        self._begun = False  # something was given
        self._whole = False  # everything was given
        self._cancelled = False
        self._gone = False  # the device touches neither side any more
        self._event: Event | None = None  # after all that was given
        self._interrupt: BaseException | None = None  # came while it was given

    @property
    def weight(self) -> int:
        """About how many places of the device's queue it takes."""
        return sum(step.weight for step in self.steps)

    @property
    def ended(self) -> bool:
        """Whether the device touches neither side any more."""
        if not self._gone and self._event is not None:
            with self.device.current():
                self._gone = self._reached(self._event)
        return self._gone

    def wait(self, deadline: float) -> bool:
        """Whether every byte is there, at the latest at `deadline` on the monotonic clock. Raises
        the interrupt that came while the copy was given to the device."""
        if self._interrupt is not None:
            raise self._interrupt
        began = time.monotonic()
        with self.device.current():
            while True:
                if self._gone or (self._event is not None and self._reached(self._event)):
                    self._gone = True
                    return self._whole and self.error is None
                now = time.monotonic()
                if now >= deadline or self.error is not None:
                    return False
                spent = now - began
                time.sleep(0 if spent < SPIN_S else min(PAUSE_S_MAX, spent / 32, deadline - now))

    def cancel(self) -> None:
        """Nothing more is given to the device; what was given ends by itself.

        Of a load, what the engine gives to its streams from now on waits for that end: late bytes
        would come over what it computes. For that this waits for a call under way, which takes as
        long as a few megabytes.
        """
        self._cancelled = True
        if self.direction is Direction.STORE or self._gone:
            return
        with contextlib.suppress(Exception), self.device.current(), self._giving:
            if not self._begun:
                self._gone = True
                return
            event = self._event or self.device.record(self.stream)
            for stream in self._streams:
                self.device.order(stream, event)

    def run(self) -> None:
        """Give everything to the device, after what the engine's streams had been given. Never
        raises."""
        try:
            with self.device.current():
                self._run()
        except Exception as error:
            self.error = self.error or error
            self._gone = self._gone or not self._begun  # the device could not be made current

    def fail(self, error: Exception) -> None:
        """It did not come to anything, and nothing is under way."""
        self.error = self.error or error
        self._gone = True

    def close(self) -> None:
        """Let go of both sides, once it has ended."""
        assert self._gone, "the device may still copy"
        self._registration.leave()
        self._event = None
        self._keep, self._fences = [], []

    def _run(self) -> None:
        try:
            self._give_all()
        except Exception as error:
            self.error = error
        except BaseException as error:  # `wait` raises it, when it is known what was given
            self._interrupt = error
        with self._giving:
            failed = self.error or self._interrupt
            self._whole = not self._cancelled and failed is None
            if not self._begun:
                self._gone = True
                return
            # Without this event nothing ever says that the device is done, and the lease stays.
            self._event = self.device.record(self.stream)

    def _give_all(self) -> None:
        if self.slow:  # else the first call would wait for what the engine computes
            for fence in self._fences:
                self._until(fence)
        queued = 0
        for step in self.steps:
            with self._giving:
                if self._cancelled:
                    return
                self._give(step)
                queued += step.weight
                full = queued >= QUEUE_WEIGHT
                event = self.device.record(self.stream) if full else None
            if event is not None:
                self._until(event)
                queued = 0

    def _give(self, step: Step) -> None:
        if not self._begun:
            self._begun = True
            for fence in self._fences:
                self.device.order(self.stream, fence)
        hosts = step.offsets + self._registration.arena.address
        targets, sources = hosts, step.addresses
        if self.direction is Direction.LOAD:
            targets, sources = sources, targets
        kept = give(self.device, self.stream, step.way, targets, sources, step.lengths)
        if kept is not None:
            self._keep.append(kept)

    def _until(self, event: Event) -> None:
        while not self._cancelled and not event.done():
            time.sleep(FENCE_S)

    def _reached(self, event: Event) -> bool:
        try:
            return event.done()
        except Exception as error:  # a device that has failed copies nothing more
            self.error = self.error or error
            return True


class DeviceState:
    """One device with a stream for each kind of copy, and what it is known to be able to do."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.abilities = Abilities()
        self._lock = threading.Lock()
        self._measured = False
        self._streams: dict[tuple[Direction, bool], int] = {}
        self._queues: dict[int, deque[Transfer]] = {}  # of each stream whose thread runs

    def stream(self, direction: Direction, slow: bool) -> int:
        """The one for copies of that kind: slow ones do not hold up others."""
        with self._lock:
            if (direction, slow) not in self._streams:
                self._streams[direction, slow] = self.device.stream()
            return self._streams[direction, slow]

    def submit(self, transfer: Transfer) -> None:
        """Run a transfer in the thread of its stream."""
        with self._lock:
            queue = self._queues.get(transfer.stream)
            if queue is not None:
                queue.append(transfer)
                return
            queue = self._queues[transfer.stream] = deque([transfer])
            work = threading.Thread(
                target=self._work, args=(transfer.stream, queue), name="kvstore-copy", daemon=True
            )
            try:
                work.start()
            except RuntimeError as error:  # no more threads
                del self._queues[transfer.stream]
                transfer.fail(error)

    def measure(self) -> None:
        """Find out what the device can do, once."""
        with self._lock:
            measured, self._measured = self._measured, True
        if measured:
            return
        try:
            self.abilities = measure(self.device)
        except Exception as error:
            log.warning(
                "kvstore: device %d was not measured, copies to it are plain ones: %s",
                self.device.number,
                error,
            )

    def _work(self, stream: int, queue: deque[Transfer]) -> None:
        while True:
            with self._lock:
                if not queue:
                    del self._queues[stream]
                    return
                transfer = queue.popleft()
            transfer.run()
