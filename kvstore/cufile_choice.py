"""Which way of moving bytes between files and a device is taken: the one that is faster here.

It only reads. The ways themselves are `kvstore.cufile`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from kvstore.cufile import DeviceFiles

MEASURE_S = 0.4
TURNS = 2  # per engine, so that neither has all of what the drive keeps in its own memory

Engine = Literal["auto", "posix", "gds"]
Place = tuple[int, int, int]  # file, position in it, bytes


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `measure` took. `why` is a sentence; rates are of what was measured, by engine."""

    files: DeviceFiles
    engine: Literal["posix", "gds"]
    why: str
    read_bytes_per_s: dict[str, float]


def measure(
    engine: Engine,
    open_posix: Callable[[], DeviceFiles],
    open_gds: Callable[[], DeviceFiles],
    *,
    sample: Sequence[Place],
    into: Sequence[int],
    seconds: float = MEASURE_S,
    clock: Callable[[], float] = time.monotonic,
) -> Choice:
    """The way to take, open. For "auto" both read in turns, and gds is taken if it is faster.

    sample   what to read, again and again; nothing is written
    into     device addresses with room for the largest of the sample: one thread reads into each
    seconds  for each of the two, and however long its last reads take

    The sample should be spread over many places that were written once: file systems answer reads
    of preallocated and unwritten ones with zeros, without asking the drive. Then what is compared
    is the way of the bytes through the host alone, and nothing is known of the drive; the faster
    way is still the faster one, but the rates are no rates of this drive.

    Raises OSError for "gds" when it cannot be had, and when the files cannot be read at all.
    """
    if engine == "posix":
        return Choice(open_posix(), "posix", "posix is what was asked for", {})
    if engine == "gds":
        files = open_gds()
        return Choice(files, "gds", f"gds is what was asked for: {files.how}", {})
    with contextlib.ExitStack() as undo:
        posix = open_posix()
        undo.callback(posix.close)
        try:
            gds = open_gds()
        except OSError as error:
            undo.pop_all()
            return Choice(posix, "posix", f"posix is taken, gds cannot be had: {_text(error)}", {})
        undo.callback(gds.close)
        choice = _faster(posix, gds, _Trial(sample, into, seconds / TURNS, clock))
        undo.pop_all()
    (posix if choice.engine == "gds" else gds).close()
    return choice


def _faster(posix: DeviceFiles, gds: DeviceFiles, trial: _Trial) -> Choice:
    moved, took = [0, 0], [0.0, 0.0]
    for _ in range(TURNS):
        for at, files in enumerate((posix, gds)):
            try:
                size, lasted = trial.run(files)
            except OSError as error:
                if files is posix:
                    raise
                text = f"posix is taken, gds ({gds.how}) failed: {_text(error)}"
                return Choice(posix, "posix", text, {})
            moved[at] += size
            took[at] += lasted
    slow, fast = (size / lasted for size, lasted in zip(moved, took, strict=True))
    engine: Literal["posix", "gds"] = "gds" if fast > slow else "posix"
    why = (
        f"{engine} is taken: posix ({posix.how}) read {slow / 1e9:.2f} GB/s, "
        f"gds ({gds.how}) {fast / 1e9:.2f} GB/s"
    )
    rates = {"posix": slow, "gds": fast}
    return Choice(gds if engine == "gds" else posix, engine, why, rates)


class _Trial:
    """Reads the sample with a thread for each address; each run goes on where the last one ended,
    so that no engine reads what the other has just read."""

    def __init__(
        self,
        sample: Sequence[Place],
        into: Sequence[int],
        seconds: float,
        clock: Callable[[], float],
    ) -> None:
        if not sample or not into:
            raise ValueError("nothing to read, or nowhere to read it into")
        self._places = itertools.cycle(sample)
        self._into = into
        self._seconds = seconds
        self._clock = clock

    def run(self, files: DeviceFiles) -> tuple[int, float]:
        """Bytes, and the seconds that they took."""
        began = self._clock()

        def read(address: int) -> int:
            moved = 0
            while not moved or self._clock() - began < self._seconds:
                file, position, size = next(self._places)
                files.read(file, position, address, size)
                moved += size
            return moved

        with ThreadPoolExecutor(len(self._into)) as threads:
            moved = sum(threads.map(read, self._into))
        return moved, self._clock() - began


def _text(error: OSError) -> str:
    """What it says, without its number."""
    text = error.strerror or str(error)
    return f"{error.filename}: {text}" if error.filename else text
