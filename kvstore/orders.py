"""What the store wants done, and how it is told the outcome: the way between brain and hands."""

from __future__ import annotations

import dataclasses
import enum

from kvstore.catalog import LayoutEntry
from kvstore.leases import ReadLease


class MoveKind(enum.IntEnum):
    """What a mover does; the smaller number goes first when several wait."""

    LOAD = 0  # NVMe slot -> DRAM slot, some client waits for it
    PROVE = 1  # check a DRAM slot against its checksum, some client waits for it
    PREFETCH = 2  # as LOAD, nobody waits
    SPILL = 3  # DRAM slot -> NVMe slot
    SUM = 4  # take the checksum of a DRAM slot, and compare it where one is known
    VERIFY = 5  # read an NVMe slot and check it
    PROBE = 6  # see whether a fenced device works again
    CLIMB = 7  # DRAM slot, or NVMe slot where `dram` is nowhere -> slot of a GPU


LAZY = (MoveKind.SPILL, MoveKind.VERIFY)  # nobody waits for them, and they take long


class Outcome(enum.Enum):
    """How a move ended."""

    DONE = "done"
    CORRUPT = "corrupt"  # the bytes are not those that were stored
    FAILED = "failed"  # the device answered with an error


@dataclasses.dataclass(slots=True, eq=False)
class Move:
    """An order to move one block. Places are pages of the tiers; `sums` what its bytes must have,
    `proof` the digest of the same where that is all that is known (0: not even that).

    `sums` and `seconds` are filled in by whoever carried it out.
    """

    kind: MoveKind
    block: int
    entry: LayoutEntry | None
    key: bytes
    dram: int
    nvme: int
    sums: bytes | None = None
    seconds: float = 0.0
    proof: int = 0
    hbm: int = 0  # of CLIMB: the slot's page, the device's number, which shard
    device: int = 0
    shard: int = 0


@dataclasses.dataclass(slots=True)
class IndexPut:
    """An NVMe slot now holds this block."""

    entry: LayoutEntry
    sequence: int
    key: bytes
    sums: bytes


@dataclasses.dataclass(slots=True)
class Orders:
    """What has come up since the last look: carried out by the service, in any order.

    moves    for the mover
    marks    pages of DRAM slots whose record in the slot table is out of date
    touched  pages of DRAM slots that were used, the last one last
    index    NVMe page -> its new record, or None when the slot is free
    answers  read leases whose wait is over
    room     whether DRAM slots became free or may be freed now: parked requests may be tried again
    """

    moves: list[Move] = dataclasses.field(default_factory=list)
    marks: set[int] = dataclasses.field(default_factory=set)
    touched: list[int] = dataclasses.field(default_factory=list)
    index: dict[int, IndexPut | None] = dataclasses.field(default_factory=dict)
    answers: list[ReadLease] = dataclasses.field(default_factory=list)
    room: bool = False

    def __bool__(self) -> bool:
        return bool(
            self.moves or self.marks or self.touched or self.index or self.answers or self.room
        )
