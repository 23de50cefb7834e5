"""The soak programs at small sizes, and the checker of histories against histories made up for it.

The sizes that count, and their bars, stand in docs/benchmarks.md. Here times are forgiven: other
tests may be running.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from tests.e2e.harness import ROOT
from tests.soak.history import ABSENT, COMMIT, FORGET, MAYBE, PRESENT, READ, check

SMALL = {
    "kill": "--rounds 2",
    "kill, reboot": "--rounds 1 --reboot",
    "linear": "--operations 150 --front 1",
    "restart": "--size 32MiB --times 1 --bar 20",
    "deaths": "--deaths 50",
    "deadlines": "--seconds 1 --timeout 0.1 --grace 2 --many 8000",
    "attribution": "--seconds 4",
}


@pytest.mark.parametrize("name", SMALL)
def test_a_small_soak(name: str) -> None:
    program = f"tests.soak.{name.split(',')[0]}"
    done = subprocess.run(
        [sys.executable, "-m", program, *SMALL[name].split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bar" in done.stdout and "MISSED" not in done.stdout


Row = tuple[int, int, int, int, int]
A, B = 1, 2  # versions


def found(*rows: Row) -> dict[str, int]:
    """Violations in a history; rows are (key, kind, version, start, end)."""
    return dict(check(np.array(rows, np.int64)))


def test_a_life_in_order() -> None:
    rows = [
        (0, ABSENT, 0, 0, 1),
        (0, COMMIT, A, 2, 3),
        (0, READ, A, 4, 5),
        (0, PRESENT, 0, 6, 7),
        (0, FORGET, 0, 8, 9),
        (0, ABSENT, 0, 10, 11),
        (0, COMMIT, B, 12, 13),
        (0, READ, B, 14, 15),
        (1, ABSENT, 0, 14, 15),
    ]
    assert found(*rows) == {}


def test_what_overlaps_may_be_either_way() -> None:
    assert found((0, COMMIT, A, 0, 9), (0, READ, A, 1, 2), (0, FORGET, 0, 1, 9)) == {}
    assert found((0, COMMIT, A, 0, 5), (0, ABSENT, 0, 4, 6), (0, READ, A, 4, 6)) == {}
    assert found((0, COMMIT, A, 0, 1), (0, FORGET, 0, 2, 9), (0, READ, A, 8, 10)) == {}
    assert found((0, MAYBE, A, 0, 1), (0, ABSENT, 0, 2, 3), (0, COMMIT, B, 4, 5)) == {}


@pytest.mark.parametrize(
    ("rule", "rows"),
    [
        ("stranger", [(0, COMMIT, A, 0, 1), (0, READ, B, 2, 3)]),
        ("stranger", [(0, READ, A, 0, 1), (0, COMMIT, A, 2, 3)]),
        ("stranger", [(1, COMMIT, A, 0, 1), (0, READ, A, 2, 3)]),
        ("stale", [(0, COMMIT, A, 0, 1), (0, FORGET, 0, 2, 3), (0, READ, A, 4, 5)]),
        ("miss", [(0, COMMIT, A, 0, 1), (0, ABSENT, 0, 2, 3)]),
        ("miss", [(0, FORGET, 0, -2, -1), (0, COMMIT, A, 0, 1), (0, ABSENT, 0, 2, 3)]),
        ("twice", [(0, COMMIT, A, 0, 1), (0, COMMIT, B, 2, 3)]),
        ("ghost", [(0, COMMIT, A, 0, 1), (0, FORGET, 0, 2, 3), (0, PRESENT, 0, 4, 5)]),
        ("ghost", [(0, PRESENT, 0, 0, 1), (0, COMMIT, A, 2, 3)]),
        (
            "overlap",  # A, then B, then A again
            [
                *[(0, COMMIT, A, 0, 9), (0, COMMIT, B, 0, 9), (0, FORGET, 0, 0, 9)],
                *[(0, READ, A, 1, 2), (0, READ, B, 3, 4), (0, READ, A, 5, 6)],
            ],
        ),
        (
            "overlap",  # A and B by turns
            [
                *[(0, COMMIT, A, 0, 1), (0, COMMIT, B, 2, 3), (0, FORGET, 0, 0, 9)],
                *[(0, READ, A, 4, 5), (0, READ, B, 6, 7)],
            ],
        ),
    ],
)
def test_a_violation_is_found(rule: str, rows: list[Row]) -> None:
    assert found(*rows).get(rule, 0) > 0, found(*rows)


@pytest.mark.parametrize("seed", range(5))
def test_any_true_history_passes(seed: int) -> None:
    """Operations take effect one by one; each is said to have begun before and ended after."""
    rng = np.random.default_rng(seed)
    there: dict[int, int] = {}
    rows: list[Row] = []
    for instant in range(0, 40_000, 10):
        key, kind = int(rng.integers(4)), int(rng.choice([COMMIT, READ, PRESENT, FORGET]))
        version = there.get(key, 0)
        if kind == COMMIT:
            if version:
                continue
            version = there[key] = instant + 1
        elif kind == FORGET:
            there.pop(key, None)
            version = 0
        elif not version:
            kind = ABSENT
        start, end = (int(x) for x in instant + rng.integers(0, 60, 2) * (-1, 1))
        rows.append((key, kind, version if kind in (COMMIT, READ) else 0, start, end))
    assert found(*rows) == {}
