"""Histories of the whole daemon from seeds; that they repeat, fail well, and went everywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.leases import Session
from kvstore.store import Store
from tests.simulate.runs import MARKS, SEEDS, STEPS, quiet, simulate
from tests.simulate.world import Failure

ROOT = Path(__file__).parent.parent
SEEN = Counter[str]()


@pytest.fixture(autouse=True)
def no_log() -> Iterator[None]:
    with quiet():
        yield


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_history(seed: int) -> None:
    SEEN.update(simulate(seed).marks)


def test_the_histories_went_everywhere() -> None:
    """A daemon that was never killed while it wrote proves nothing about one that is."""
    if not SEEN:  # run alone
        for seed in range(SEEDS):
            SEEN.update(simulate(seed).marks)
    assert not MARKS - {name for name, count in SEEN.items() if count}


def test_a_seed_is_one_history() -> None:
    """In this process and in another one, whose sets and dictionaries are in another order."""
    seed = 5
    traces = {simulate(seed).trace.hexdigest() for _ in range(2)}
    for hash_seed in ("1", "2"):
        told = subprocess.run(
            [sys.executable, "-m", "tests.simulate", "--seed", str(seed), "--steps", str(STEPS)],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        traces.add(told.split("trace ")[1].split()[0])
    assert len(traces) == 1
    assert simulate(seed + 1).trace.hexdigest() not in traces


def test_a_bug_is_found_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots of a vanished writer that are given away at once: some history meets the writer."""
    detach = Store.detach

    def detach_and_free(store: Store, session: Session, now: float) -> list[int]:
        store.unquarantine(detach(store, session, now), now)
        return []

    monkeypatch.setattr(Store, "detach", detach_and_free)
    with pytest.raises(Failure, match=r"python -m tests.simulate --seed \d+ --steps \d+") as told:
        for seed in range(SEEDS):
            simulate(seed)
    assert "the last events" in str(told.value)
