"""What is remembered of a request for blocks until it was answered: then others learn from it."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any

from kvstore.catalog import LayoutEntry


class AccessKind(enum.Enum):
    """What the client did with the keys."""

    ASKED = "asked"  # acquire
    OFFERED = "offered"  # reserve


REUSES = ("unknown", "continue", "done")  # by their numbers on the wire


@dataclasses.dataclass(frozen=True, slots=True)
class Hints:
    """What a client may say about a request: whether it will come back, why it ended, and its own
    name for such requests."""

    reuse: str = "unknown"
    finish_reason: str = ""
    tag: str = ""

    @classmethod
    def of(cls, message: Any) -> Hints:
        """The hints of a message of the wire; a number that is not known says nothing."""
        reuse = REUSES[message.reuse] if 0 <= message.reuse < len(REUSES) else REUSES[0]
        return cls(reuse, message.finish_reason, message.tag)

    def __bool__(self) -> bool:
        return self != NO_HINTS

    @property
    def name(self) -> str:
        """What tells classes of requests apart beside `reuse`."""
        return f"{self.finish_reason}/{self.tag}" if self.finish_reason or self.tag else ""


NO_HINTS = Hints()


@dataclasses.dataclass(slots=True)
class Access:
    """One call of a client that named blocks.

    keys      hashes in prefix order, from the prompt's start where the client said so
    skip      how many leading ones are context: the others continue them, but they are not asked
              for, or were answered by an earlier call of the same request
    granted   ASKED: how many of keys[skip:] were granted, from the front
    nvme      ASKED: how many of those were found on NVMe, the others in DRAM
    missed    ASKED: how many of keys[skip:] count as missed (0 when the client will ask again)
    stop      ASKED: why not more were granted, as `reads.STOP_NAMES` counts
    now       seconds of the store's clock
    tokens_per_s  the engine's prefill speed; 0 when it did not say
    reuse, tag    hints: "continue", "done" or "unknown", and the client's own name for a class
    """

    kind: AccessKind
    entry: LayoutEntry
    keys: Sequence[bytes]
    skip: int
    now: float
    granted: int = 0
    nvme: int = 0
    missed: int = 0
    stop: int = 0
    tokens_per_s: float = 0.0
    reuse: str = "unknown"
    tag: str = ""


Observer = Callable[[Access], None]  # must not keep the lists that it is shown
