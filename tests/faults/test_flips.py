"""A sample of flipped bits; `python -m tests.faults.flips` flips 100,000 of them."""

from __future__ import annotations

from pathlib import Path

from tests.faults.flips import KINDS, flip_everything


def test_flipped_bits_serve_nothing_wrong_and_the_tenant_starts(tmp_path: Path) -> None:
    marks = flip_everything(tmp_path, 400, seed=2)
    assert set(marks) == {*(kind.name for kind in KINDS), "index, singly"}
    assert sum(one["flips"] for one in marks.values()) == 400
    for name in ("blocks", "arena"):  # most of them were found, and the others served
        assert marks[name]["missed"] > 50 and marks[name]["served"] > 50, marks
    assert marks["header"]["emptied"] and marks["index, singly"]["served"] > 5_000, marks
