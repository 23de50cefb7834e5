"""What the doctor's checks share: a finding, and the host as the kernel shows it."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Literal

from kvstore.filesystems import text_of
from kvstore.types import MIB
from kvstore.units import format_size

Status = Literal["ok", "warn", "fail"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check found. `remedy` is empty when there is nothing to do."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Host:
    """Where the kernel shows itself; tests put trees of their own here."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    dev: Path = Path("/dev")


def mount_of(host: Host, path: Path) -> tuple[str, str, list[str]]:
    """The type, place and options of the mount that holds a path."""
    real = os.path.realpath(path)
    best: tuple[str, str, list[str]] = ("unknown file system", "/", [])
    for line in text_of(host.proc / "self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, kinds = left.split(), right.split()
        if len(fields) < 5 or not kinds:
            continue
        place = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        inside = real == place or real.startswith(place.rstrip("/") + "/")
        if inside and len(place) >= len(best[1]):  # a later mount covers an earlier one
            best = (kinds[0], place, kinds[-1].split(","))
    return best


def in_mib(count: int) -> str:
    """Bytes for people: exact in MiB where that is whole, else rounded down."""
    return format_size(count) if count % MIB == 0 or count < MIB else f"{count // MIB} MiB"
