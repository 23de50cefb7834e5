"""Histories by seed: how long they are, and what all of them together must have met."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import structlog

from tests.simulate.world import World

SEEDS = 260
STEPS = 500
# Rare branches: all histories together must have been in each of them.
MARKS = {
    "arena adopted",
    "bit flipped",
    "bit flipped in the arena",
    "blocks adopted",
    "call given up",
    "copy void",
    "corrupt load",
    "corrupt prove",
    "cleared in pieces",
    "corrupt spill",
    "corrupt sum",
    "corrupt verify",
    "cut_power",
    "daemon killed at work",
    "drained",
    "drive absent at the start",
    "durable blocks found again",
    "fenced",
    "grant given back",
    "hangs",
    "helped",
    "hit in dram",
    "hit on nvme",
    "index adopted",
    "index commit failed",
    "kill_client",
    "joined",
    "kill_daemon",
    "lent slot not taken",
    "lent slot taken",
    "move ended after its daemon",
    "move hangs",
    "no room",
    "no such device",
    "put off",
    "quarantine ended",
    "quarantined",
    "read error",
    "reconnected",
    "restart_daemon",
    "settled",
    "slots in writing adopted",
    "stop_client",
    "stop_daemon",
    "stop absent",
    "stop end",
    "stop failed",
    "stop late",
    "stop no_room",
    "stop pending",
    "stop too_slow",
    "sync error",
    "torn write",
    "verified",
    "verify found damage",
    "write error",
    "write lost with the power",
    "write torn with the power",
    "written after death",
    "written out",
}


def simulate(seed: int, steps: int = STEPS) -> World:
    """One history; raises Failure."""
    return World(seed, steps).run()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the daemon's log: it tells of every fault that is made on purpose."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.configure(**before)
