"""The daemon's parts of GPU memory, as this process finds them on its own devices."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
from typing import TYPE_CHECKING, Any

from kvstore.client.cuda_fragments import BATCH_COUNT_MAX, BATCH_COUNT_MIN, Step, Way

if TYPE_CHECKING:
    from kvstore.client.client import Session
    from kvstore.client.cuda_device import Device

log = logging.getLogger("kvstore")


@dataclasses.dataclass(frozen=True)
class Part:
    """One of them. `index`: its place in the daemon's list; `address`: where it begins here."""

    index: int
    address: int


@dataclasses.dataclass(frozen=True)
class Near:
    """Copies within a device, or from host memory beside the arena: three int64 arrays of one
    length, addresses and bytes. Many go by one call where `way` is that."""

    targets: Any
    sources: Any
    lengths: Any
    way: Way = Way.BATCH

    def steps(self, arena_address: int, *, batches: bool) -> list[Step]:
        """The same as steps of a transfer from an arena that begins at this address."""
        offsets, count = self.sources - arena_address, len(self.targets)
        many = batches and self.way is Way.BATCH and count >= BATCH_COUNT_MIN
        size = BATCH_COUNT_MAX if many else 1
        way = self.way if many or self.way is not Way.BATCH else Way.PLAIN
        return [
            Step(way, *(part[at : at + size] for part in (self.targets, offsets, self.lengths)))
            for at in range(0, count, size)
        ]


class Parts:
    """Opened once for each session and device, and closed with the arena."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[Session, int], Part | None] = {}

    def find(self, session: Session, device: Device) -> Part | None:
        """The part on this device, by its PCI address; None where there is none, or it cannot be
        opened. What is in it is in DRAM or on NVMe, too."""
        if not session.attached.gpus:
            return None
        key = (session, device.number)
        with self._lock:
            if key not in self._known:
                self._known[key] = self._open(session, device)
            return self._known[key]

    def _open(self, session: Session, device: Device) -> Part | None:
        for index, told in enumerate(session.attached.gpus):
            if told.bus != device.bus:
                continue
            try:
                with device.current():
                    address = device.open(told.handle)
            except Exception as error:
                log.warning("kvstore: GPU memory of the daemon cannot be opened: %s", error)
                return None
            session.arena.on_close(functools.partial(_shut, device, address))
            return Part(index, address)
        return None


def _shut(device: Device, address: int) -> None:
    with contextlib.suppress(Exception), device.current():
        device.shut(address)
