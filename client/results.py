"""What calls of a cache return."""

from __future__ import annotations

import dataclasses
from collections import Counter


@dataclasses.dataclass(frozen=True)
class Match:
    """`length` leading blocks are resident; `tiers` counts in which tier they are."""

    length: int
    tiers: Counter[str]


@dataclasses.dataclass(frozen=True)
class PutResult:
    """Blocks stored by this call, present already, and refused for want of room."""

    stored: int
    present: int
    refused: int


@dataclasses.dataclass(frozen=True)
class GetResult:
    """The first `length` buffers hold the right bytes; the content of the others is undefined.
    `tiers` counts where the blocks were found."""

    length: int
    tiers: Counter[str]
    seconds: float
