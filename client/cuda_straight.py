"""Reads from NVMe files straight into a device's memory, in the engine's process."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore.client.arena import address_of
from kvstore.client.cuda_device import Device

if TYPE_CHECKING:
    from kvstore.client.direct import Wanted
    from kvstore.straight import Straight

LOOK_S = 0.00005  # between two looks at a copy

log = logging.getLogger("kvstore")


class DeviceRing:
    """See kvstore.client.direct.Ring: slots in a device's memory, checked there."""

    def __init__(self, device: Device, straight: Straight, slot_bytes: int, slots: int) -> None:
        """Raises OSError when the device has no room."""
        self.device: int | None = device.number
        self.slot_bytes = slot_bytes
        self.slots = slots
        self.busy = 0
        self._straight = straight
        self._owner = device
        try:
            with device.current():
                self._address = device.allocate(slot_bytes * slots)
        except Exception as error:
            raise OSError(f"no {slot_bytes * slots} bytes on device {device.number}") from error

    def fetch(self, what: Wanted, slot: int) -> int | None:
        """See Ring."""
        address, size = self._address + slot * self.slot_bytes, what.size // len(what.sums)
        good = self._straight.read(what.file, what.position, address, size, what.seeds, what.sums)
        return address if good else None

    def drop(self) -> None:
        """See Ring."""
        with self._owner.current():
            self._owner.free(self._address)


class CopiedMemory:
    """A device's memory as `kvstore.cufile.DeviceMemory`, on a stream for each thread."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._own = threading.local()

    def write(self, address: int, data: memoryview) -> None:
        """Copy from the host; done when this returns."""
        self._copy(address, address_of(data, len(data), "data", writable=False), len(data))

    def read(self, address: int, into: memoryview) -> None:
        """Copy to the host; done when this returns."""
        self._copy(address_of(into, len(into), "buffer", writable=True), address, len(into))

    def _copy(self, target: int, source: int, size: int) -> None:
        device = self._device
        try:
            with device.current():
                stream = getattr(self._own, "stream", None)
                if stream is None:
                    stream = self._own.stream = device.stream()
                device.plain(stream, target, source, size)
                event = device.record(stream)
                while not event.done():
                    time.sleep(LOOK_S)
        except Exception as error:
            raise OSError(f"device {device.number}: {error}") from error


def straight(device: Device, paths: Sequence[Path], sums: str) -> Straight | None:
    """The way into this device's memory, with bytes checked on the "device" or the "host"; None,
    and told once, where it cannot be had."""
    from kvstore.straight import Straight

    try:
        from kvstore.cufile import CuFiles
        from kvstore.device_sums import DeviceSums

        files = CuFiles(paths, device.number)
    except Exception as error:  # whatever kvikio raises: the engine goes on without it
        log.warning("kvstore: blocks on NVMe come by the host's memory: %s", error)
        return None
    made = DeviceSums(device.number).sums if sums == "device" else None
    return Straight(files, CopiedMemory(device), made)
