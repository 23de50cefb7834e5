"""kvstored whose brain lives faster than the clock: a trace of hours is replayed in minutes.

    python -m tests.e2e.fast TIMES --config FILE

The time that the store is told passes so many times as fast. Nothing else differs from
`python -m kvstore.daemon`; deadlines of callers, ticks and disks are as slow as ever.
"""

from __future__ import annotations

import sys
import time

from kvstore import daemon
from kvstore.service import Service

TIMES = float(sys.argv[1])
_START = time.monotonic()


def _now(_: Service) -> float:
    return _START + (time.monotonic() - _START) * TIMES


if __name__ == "__main__":
    setattr(Service, "_now", _now)  # noqa: B010  # in place of a method
    daemon.main(sys.argv[2:])
