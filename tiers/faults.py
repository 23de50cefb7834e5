"""A tier that fails on purpose: any tier, behind a plan of what goes wrong, and when.

For tests, and for soak runs of a daemon. What goes wrong depends on the plan and on the number of
the operation alone, so a plan that found something finds it again. It knows nothing of what the
bytes mean.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import errno
import os
import random
import threading
import time

from kvstore.tiers.base import ALIGNMENT, Tier, flat

SECTOR_BYTES = 512  # what a drive writes whole or not at all
VERBS = ("read", "write", "sync", "probe")
TRANSFERS = ("read", "write")


class Fault(enum.Enum):
    """What can go wrong with one operation."""

    EIO = "eio"  # nothing is done, and said
    ENOSPC = "enospc"  # the same, for another reason
    SHORT = "short"  # the first part is done, and said
    TORN = "torn"  # some sectors are done, and success is reported
    FLIP = "flip"  # one bit is another, and success is reported
    SLOW = "slow"  # late
    HANG = "hang"  # no end until `release`, or until the plan's time for it is over


# Which operations can suffer it; sync and probe move no bytes that could be cut or changed.
SUFFERED_BY = {
    Fault.EIO: VERBS,
    Fault.ENOSPC: ("write", "sync", "probe"),
    Fault.SHORT: TRANSFERS,
    Fault.TORN: TRANSFERS,
    Fault.FLIP: TRANSFERS,
    Fault.SLOW: VERBS,
    Fault.HANG: VERBS,
}


@dataclasses.dataclass(frozen=True)
class At:
    """This fault befalls operations `number`, counted from 1, and `count - 1` that follow.

    `verb` "" counts operations of all kinds, another one those of that kind.
    """

    fault: Fault
    number: int
    verb: str = ""
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Rate:
    """This fault befalls operations of a kind (or all that can suffer it) with this chance."""

    fault: Fault
    chance: float
    verb: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultPlan:
    """What goes wrong. `hang_s` None is for ever."""

    at: tuple[At, ...] = ()
    rates: tuple[Rate, ...] = ()
    seed: int = 0
    slow_s: float = 0.05
    hang_s: float | None = None

    def fault(self, verb: str, number: int, number_of_verb: int) -> Fault | None:
        """What befalls this operation. Depends on nothing else."""
        for one in self.at:
            counted = number_of_verb if one.verb else number
            here = one.verb in ("", verb) and one.number <= counted < one.number + one.count
            if here and verb in SUFFERED_BY[one.fault]:
                return one.fault
        if not self.rates:
            return None
        dice = self.dice(verb, number_of_verb)
        for rate in self.rates:
            befalls = rate.verb in ("", verb) and verb in SUFFERED_BY[rate.fault]
            if befalls and dice.random() < rate.chance:
                return rate.fault
        return None

    def dice(self, *what: object) -> random.Random:
        """Chances that are the same each time for the same `what`."""
        return random.Random(f"{self.seed} {what}")


class FaultyTier:
    """A tier with the contract of the one inside, as long as no fault is planned.

    operations   how many of each kind have begun
    injected     how many faults of each kind have befallen them
    """

    def __init__(self, inside: Tier, plan: FaultPlan) -> None:
        self._inside = inside
        self._lock = threading.Condition()
        self._released = 0  # times that `release` was called
        self.name = inside.name
        self.capacity_bytes = inside.capacity_bytes
        self.plan = plan
        self.hung = 0  # operations that hang now
        self.operations: collections.Counter[str] = collections.Counter()
        self.injected: collections.Counter[Fault] = collections.Counter()

    def read(self, offset: int, into: memoryview) -> None:
        """See Tier.read."""
        fault, dice = self._begin("read")
        if fault not in (Fault.SHORT, Fault.TORN, Fault.FLIP):
            self._inside.read(offset, into)
            return
        into = flat(into)
        if fault is Fault.FLIP:
            self._inside.read(offset, into)
            _flip(into, dice)
            return
        found = memoryview(bytearray(len(into)))
        self._inside.read(offset, found)
        for start, end in _part(len(into), dice, prefix=fault is Fault.SHORT):
            into[start:end] = found[start:end]
        if fault is Fault.SHORT:
            raise _error(errno.EIO, f"short read of {len(into)} bytes at {offset}")

    def write(self, offset: int, data: memoryview) -> None:
        """See Tier.write; `data` itself is never changed."""
        fault, dice = self._begin("write")
        if fault not in (Fault.SHORT, Fault.TORN, Fault.FLIP):
            self._inside.write(offset, data)
            return
        data = flat(data)
        if fault is Fault.FLIP:
            changed = memoryview(bytearray(data))
            _flip(changed, dice)
        else:
            changed = memoryview(bytearray(len(data)))
            self._inside.read(offset, changed)  # what lay there stays where the write did not come
            for start, end in _part(len(data), dice, prefix=fault is Fault.SHORT):
                changed[start:end] = data[start:end]
        self._inside.write(offset, changed)
        if fault is Fault.SHORT:
            raise _error(errno.EIO, f"short write of {len(data)} bytes at {offset}")

    def sync(self) -> None:
        """See Tier.sync."""
        self._begin("sync")
        self._inside.sync()

    def probe(self) -> None:
        """As the tier inside does; one that has no probe of its own always works."""
        self._begin("probe")
        getattr(self._inside, "probe", lambda: None)()

    def close(self) -> None:
        """See Tier.close."""
        self._inside.close()

    def release(self) -> None:
        """End what hangs now; what comes later may hang again."""
        with self._lock:
            self._released += 1
            self._lock.notify_all()

    def _begin(self, verb: str) -> tuple[Fault | None, random.Random]:
        """Count an operation, and let happen what happens before it is carried out."""
        with self._lock:
            self.operations[verb] += 1
            number = self.operations[verb]
            fault = self.plan.fault(verb, self.operations.total(), number)
            if fault is not None:
                self.injected[fault] += 1
            if fault is Fault.HANG:
                self._hang()
        if fault is Fault.SLOW:
            time.sleep(self.plan.slow_s)
        elif fault in (Fault.EIO, Fault.ENOSPC):
            code = errno.EIO if fault is Fault.EIO else errno.ENOSPC
            raise _error(code, f"{os.strerror(code)}: {verb} {number}")
        return fault, self.plan.dice("how", verb, number)

    def _hang(self) -> None:
        """Wait, holding the lock: a condition's wait lets go of it."""
        released = self._released
        self.hung += 1
        self._lock.wait_for(lambda: self._released != released, self.plan.hang_s)
        self.hung -= 1


def _error(code: int, text: str) -> OSError:
    return OSError(code, f"injected fault: {text}")


def _flip(view: memoryview, dice: random.Random) -> None:
    """Turn one bit, if there is any."""
    if len(view):
        at = dice.randrange(len(view))
        view[at] ^= 1 << dice.randrange(8)


def _part(length: int, dice: random.Random, *, prefix: bool) -> list[tuple[int, int]]:
    """The ranges of a transfer that are carried out: never all of it, sometimes nothing.

    A prefix, or else any pages or sectors; of less than a sector nothing.
    """
    unit = ALIGNMENT if length > ALIGNMENT and dice.random() < 0.5 else SECTOR_BYTES
    units = [(at, min(at + unit, length)) for at in range(0, length, unit)]
    if prefix or dice.random() < 0.5:
        return units[: dice.randrange(max(1, len(units)))]
    missing = dice.randrange(max(1, len(units)))
    return [one for at, one in enumerate(units) if at != missing and dice.random() < 0.5]
