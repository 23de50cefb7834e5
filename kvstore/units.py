"""Units as people write them: sizes, durations, rates and shares, read and written as text.

A parser raises ValueError("what is wrong: what to write").
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from fractions import Fraction

SECONDS_MAX = 10 * 366 * 86_400  # ten years: longer is a mistake, and timers overflow
_IEC = {f"{letter}iB": 1 << 10 * power for power, letter in enumerate("KMGTP", 1)}
_SI = {f"{letter}B": 1000**power for power, letter in enumerate("KMGTP", 1)}
_BYTES = {name.lower(): Fraction(n) for name, n in (_IEC | _SI | {"B": 1, "": 1}).items()}
_SECONDS = {"s": Fraction(1), "min": Fraction(60), "h": Fraction(3600), "d": Fraction(86_400)}
_DURATION = _SECONDS | {"": Fraction(1), "ms": Fraction(1, 10**3), "us": Fraction(1, 10**6)}
_NUMBER = re.compile(r"(-?[0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]*)")


def _number(value: object, units: Mapping[str, Fraction], wrong: str) -> Fraction:
    match = _NUMBER.fullmatch(value.strip()) if isinstance(value, str) else None
    if match and match[2].lower() in units:
        return Fraction(match[1]) * units[match[2].lower()]
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return Fraction(value)
    raise ValueError(wrong)


def parse_size(value: object) -> int:
    """Bytes from "64 GiB", "1.5 TB", "0" or an integer."""
    hint = 'write it like "64 GiB", "500 GB" or a whole number of bytes'
    count = _number(value, _BYTES, f"is not a size: {hint}")
    if count.denominator != 1 or not 0 <= count < 1 << 63:
        raise ValueError(f"is not a whole number of bytes from 0 to 8 EiB: {hint}")
    return int(count)


def format_size(count: int) -> str:
    """The shortest exact text that `parse_size` reads back as `count`."""
    for name, unit in reversed(_IEC.items()):
        if count and count % unit == 0:
            return f"{count // unit} {name}"
    return f"{count} B" if count else "0"


def parse_duration(value: object) -> float:
    """Seconds from "10 min", "250 ms" or a number of seconds."""
    hint = 'write it like "10 min", "1 s", "250 ms", "2 h", "1 d" or a number of seconds'
    seconds = _number(value, _DURATION, f"is not a duration: {hint}")
    if not 0 <= seconds <= SECONDS_MAX:
        raise ValueError(f"is not between 0 and ten years: {hint}")
    return float(seconds)


def parse_rate(value: object) -> float | None:
    """Bytes per second from "2 TiB/day"; None for "unlimited"."""
    text = value.strip().lower() if isinstance(value, str) else ""
    if text == "unlimited":
        return None
    amount, _, unit = (part.strip() for part in text.partition("/"))
    unit = {"day": "d", "hour": "h", "sec": "s"}.get(unit, unit)
    wrong = 'is not a rate: write it like "2 TiB/day", "500 MB/s" or "unlimited"'
    if unit not in _SECONDS:
        raise ValueError(wrong)
    rate = _number(amount, _BYTES, wrong) / _SECONDS[unit]
    if not 0 < rate < 1 << 63:
        raise ValueError('is no rate of writing: set nvme.size = "0" to have no NVMe tier')
    return float(rate)


def parse_chance(value: object) -> float:
    """A probability, from a number or its text."""
    wrong = "is not a chance: write a number of 0 to 1, such as 0.001"
    chance = _number(value, {"": Fraction(1)}, wrong)
    if not 0 <= chance <= 1:
        raise ValueError(wrong)
    return float(chance)


@dataclasses.dataclass(frozen=True)
class Quota:
    """A tenant's part of a tier: a share of it, or a number of bytes."""

    text: str
    share: Fraction | None
    size: int = 0

    @classmethod
    def parse(cls, value: object) -> Quota | None:
        """From "50%" or a size; None (not set) stays None."""
        if value is None:
            return None
        if isinstance(value, str) and value.strip().endswith("%"):
            wrong = 'is not a percentage of 0 to 100: write it like "50%"'
            share = _number(value.strip()[:-1], {"": Fraction(1, 100)}, wrong)
            if not 0 <= share <= 1:
                raise ValueError(wrong)
            return cls(value.strip(), share)
        _number(value, _BYTES, 'is not a quota: write it like "50%" or "64 GiB"')
        return cls(format_size(parse_size(value)), None, parse_size(value))

    def of(self, total: int) -> int:
        """Bytes of a tier that has `total`."""
        return self.size if self.share is None else int(self.share * total)
