"""Which way bytes go between one tenant's NVMe files and GPUs: by the host, or past it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import structlog

from kvstore import cufile
from kvstore.carrier import Way
from kvstore.cufile_choice import Choice, measure
from kvstore.device_sums import DeviceSums
from kvstore.straight import Straight
from kvstore.tiers.hbm import HbmArena
from kvstore.tiers.nvme import place_of
from kvstore.types import MIB

SAMPLE_BYTES = 2 * MIB
SAMPLES = 1_024  # slabs, all over the files, whose beginnings are read
LANES = 4  # reads at once, while it is measured

log = structlog.get_logger()


@dataclasses.dataclass(frozen=True, kw_only=True)
class WaysConfig:
    """`engine` and `sums` as configured, and the shape of the files."""

    tenant: str
    engine: Literal["auto", "posix", "gds"]
    sums: Literal["device", "host"]
    paths: Sequence[Path]
    size_bytes: int
    slab_bytes: int


class Ways:
    """Chosen once, when the files are open and nothing is on the devices yet.

    engine  what clients are told; `why` a sentence for people, with the speeds measured, in bytes
            per second, in `speeds`
    """

    def __init__(self, config: WaysConfig, arenas: Sequence[HbmArena]) -> None:
        self.engine: Literal["posix", "gds"] = "posix"
        self.why = "the files are not open"
        self.chosen = False
        self.speeds: dict[str, float] = {}
        self._config = config
        self._arenas = arenas
        self._straight: dict[int, Straight] = {}  # by the devices' numbers in the tier

    def choose(self, *, late: bool = False) -> None:
        """Measure, or take what is configured; `late`, when blocks may be on the devices, nothing
        is measured. Raises OSError when "gds" is configured and cannot be had."""
        engine, self.chosen = self._config.engine, True
        if late and engine == "auto":
            self.why = "posix: the files were opened late, nothing was measured"
        elif engine == "posix":
            self.why = "posix is what was asked for"
        elif not self._arenas:
            if engine == "gds":
                cufile.load()
                self.engine = "gds"
            self.why = f"{self.engine}: no [[hbm]] device to measure with is configured"
        else:
            self._choose_for_devices()
        log.info("io engine", tenant=self._config.tenant, engine=self.engine, why=self.why)

    def to(self, device: int) -> Way | None:
        """Into that device's memory past the host; None: by the host."""
        straight = self._straight.get(device)
        if straight is None:
            return None
        config = self._config

        def way(offset: int, address: int, size: int, seed: int, expected: int) -> bool:
            file, position = place_of(offset, len(config.paths), config.slab_bytes)
            return straight.read(file, position, address, size, [seed], [expected])

        return way

    def told(self) -> dict[str, Any]:
        """For the statistics."""
        return {"engine": self.engine, "engine_why": self.why, "engine_bytes_per_s": self.speeds}

    def close(self) -> None:
        """Close the files. No read may be under way."""
        while self._straight:
            self._straight.popitem()[1].close()

    # -- inside --------------------------------------------------------------------------------

    def _choose_for_devices(self) -> None:
        """The first device speaks for all: what differs is how the drive is connected."""
        try:
            self._take(self._measure(self._arenas[0]))
        except OSError as error:
            self.close()
            if self._config.engine == "gds":
                raise
            self.engine, self.why = "posix", f"posix: it could not be measured: {error}"

    def _take(self, choice: Choice) -> None:
        self.engine, self.why, self.speeds = choice.engine, choice.why, choice.read_bytes_per_s
        if choice.engine == "posix":
            choice.files.close()
            return
        self._add(0, self._arenas[0], choice.files)
        for number, arena in enumerate(self._arenas[1:], 1):
            self._add(number, arena, cufile.CuFiles(self._config.paths, arena.gpu.number))

    def _add(self, number: int, arena: HbmArena, files: cufile.DeviceFiles) -> None:
        sums = DeviceSums(arena.gpu.number).sums if self._config.sums == "device" else None
        self._straight[number] = Straight(files, arena.gpu, sums)

    def _measure(self, arena: HbmArena) -> Choice:
        config, gpu = self._config, arena.gpu
        size = min(SAMPLE_BYTES, arena.capacity_bytes, config.slab_bytes)
        starts = range(0, config.size_bytes - config.slab_bytes + 1, config.slab_bytes)
        sample = [
            (*place_of(start, len(config.paths), config.slab_bytes), size)
            for start in starts[:: max(1, len(starts) // SAMPLES)]
        ]
        lanes = min(LANES, arena.capacity_bytes // size)
        return measure(
            config.engine,
            lambda: cufile.BouncedFiles(config.paths, gpu),
            lambda: cufile.CuFiles(config.paths, gpu.number),
            sample=sample,
            into=[arena.address(at * size, size) for at in range(lanes)],
        )
