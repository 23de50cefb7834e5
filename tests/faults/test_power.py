"""A sample of power cuts; `python -m tests.faults.power` cuts at every step, several times."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kvstore.tiers.base import ALIGNMENT
from kvstore.tiers.faults import SECTOR_BYTES
from tests.faults.medium import Medium
from tests.faults.power import SYNC_INTERVAL_S, Recording, cut_everywhere

SEED = 3


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return Recording(tmp_path_factory.mktemp("power"), SEED, rounds=10)


def test_a_power_cut_costs_nothing_that_was_durable(recording: Recording, tmp_path: Path) -> None:
    marks = cut_everywhere(recording, tmp_path, images=3, seed=SEED, every=6)
    # The images were of all kinds: torn blocks, blocks that only just made it, half-made commits.
    # How many of each depends on when threads ran: these are far below what a busy machine gets.
    assert marks["images"] > 150, marks
    assert min(marks[kind] for kind in ("begin", "sync-end", "page", "commit")) >= 5, marks
    assert marks["unsynced"] > 150 and marks["refused"] > 10 and marks["young"] > 10, marks
    assert marks["due"] > 1_500 and marks["whole tenants"], marks


def test_the_stated_bound_holds(recording: Recording) -> None:
    """A block is durable one sync interval and one commit after its bytes were written. While one
    commit runs the next one cannot begin, so that a block may have to wait for two."""
    lags = recording.lags_s()
    assert len(lags) > 50
    assert max(lags) <= SYNC_INTERVAL_S + 2 * recording.recorder.longest_commit_s + 0.25


def test_an_image_holds_what_was_synced_and_any_part_of_the_rest() -> None:
    old, new, newer = (bytes([one]) * (2 * ALIGNMENT) for one in (1, 2, 3))
    medium = Medium(old)
    first, second = medium.write(0, new), medium.write(ALIGNMENT, newer[:ALIGNMENT])
    dice = random.Random(1)
    images = [medium.image(dice) or b"" for _ in range(300)]
    assert old in images
    assert new[:ALIGNMENT] + newer[:ALIGNMENT] in images
    assert old[:ALIGNMENT] + newer[:ALIGNMENT] in images, "the later write alone"
    seen = {
        (at, image[at : at + SECTOR_BYTES])
        for image in images
        for at in range(0, len(image), SECTOR_BYTES)
    }
    assert len(seen) == 8 * (2 + 3), "each sector in each version that it had"
    medium.sync([second])
    assert all((medium.image(dice) or b"")[ALIGNMENT:] != old[ALIGNMENT:] for _ in range(50))
    medium.sync([first])
    assert medium.pending == 0


def test_a_file_that_was_never_synced_may_not_be_there() -> None:
    medium = Medium(None)
    medium.write(0, b"x" * ALIGNMENT)
    dice = random.Random(1)
    images = [medium.image(dice) for _ in range(100)]
    assert None in images and b"x" * ALIGNMENT in images
    medium.sync()
    assert medium.image(dice) == b"x" * ALIGNMENT
