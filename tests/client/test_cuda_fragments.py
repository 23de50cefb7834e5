"""How fragments are merged, cut, and in which way each is copied."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.client import cuda_fragments
from kvstore.client.cuda_fragments import (
    FAR,
    Breaks,
    Fragments,
    Step,
    Way,
    breaks_of,
    choose,
    plan,
)
from kvstore.errors import InvalidBlock

PIECE = 64
Pairs = list[tuple[int, int]]


def array(values: Any) -> Any:
    return np.array(values, np.int64)


def pairs(addresses: Any, offsets: Any, lengths: Any) -> Pairs:
    """Which byte of the device belongs to which of the arena."""
    rows = zip(addresses.tolist(), offsets.tolist(), lengths.tolist(), strict=True)
    return sorted((a + at, o + at) for a, o, size in rows for at in range(size))


def planned(
    fragments: Fragments, ready: int = 10 * PIECE, breaks: Breaks | None = None
) -> list[Step]:
    return plan(
        fragments,
        ready_bytes=ready,
        piece_bytes=PIECE,
        breaks=breaks or Breaks(20, 60),
        batches=True,
        gathers=True,
    )


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(1, 2_000), st.integers(0, 500), st.integers(1, 140)), max_size=12
    ),
    chained=st.booleans(),
    pieces=st.integers(0, 10),
    longest=st.sampled_from((7, 50, 1_000)),
    ways=st.tuples(st.booleans(), st.booleans()),
)
def test_every_byte_once_and_no_copy_across_a_border(
    rows: list[tuple[int, int, int]],
    chained: bool,
    pieces: int,
    longest: int,
    ways: tuple[bool, bool],
) -> None:
    if chained:  # neighbours on both sides
        rows = [(5 + sum(r[2] for r in rows[:at]),) * 2 + (r[2],) for at, r in enumerate(rows)]
        rows = [row for row in rows if row[1] + row[2] <= 10 * PIECE]
    columns = [array([row[at] for row in rows]) for at in range(3)]
    ready = pieces * PIECE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_fragments, "PLAIN_BYTES_MAX", longest)
        patch.setattr(cuda_fragments, "PAGEABLE_BYTES_MAX", 7)
        steps = plan(
            Fragments(0, *columns),
            ready_bytes=ready,
            piece_bytes=PIECE,
            breaks=Breaks(20, 60),
            batches=ways[0],
            gathers=ways[1],
        )
    found = [pairs(step.addresses, step.offsets, step.lengths) for step in steps]
    assert sorted(itertools.chain.from_iterable(found)) == pairs(*columns)
    for step in steps:
        assert step.way is not Way.BATCH or ways[0]
        assert step.way is not Way.GATHER or ways[1]
        for offset, length in zip(step.offsets.tolist(), step.lengths.tolist(), strict=True):
            assert length > 0
            if step.way is Way.PAGEABLE:
                assert offset >= ready and length <= 7
            else:
                assert offset + length <= ready
                assert offset // PIECE == (offset + length - 1) // PIECE
                assert step.way is not Way.PLAIN or length <= longest


def test_neighbours_on_both_sides_are_one() -> None:
    sizes = array([8] * 4)
    both = Fragments(0, array([100, 108, 116, 124]), array([0, 8, 16, 24]), sizes)
    (step,) = planned(both)
    assert (step.way, step.lengths.tolist()) == (Way.PLAIN, [32])
    backwards = Fragments(0, array([124, 116, 108, 100]), array([0, 8, 16, 24]), sizes)
    (step,) = planned(backwards)
    assert (step.way, len(step.lengths)) == (Way.GATHER, 4)


def test_the_way_follows_from_the_size() -> None:
    sizes = array([4] * 5 + [19] * 5 + [20] * 5 + [59] * 5 + [60, 900])
    ways = choose(sizes, Breaks(20, 60), batches=True, gathers=True).tolist()
    assert ways == [Way.GATHER] * 10 + [Way.BATCH] * 10 + [Way.PLAIN] * 2
    assert set(choose(sizes, Breaks(20, 60), batches=True, gathers=False)) == {Way.BATCH, Way.PLAIN}
    assert set(choose(sizes, Breaks(20, 60), batches=False, gathers=False)) == {Way.PLAIN}


def test_a_few_are_plain_whatever_their_size() -> None:
    sizes = array([4] * 3 + [30] * 3)
    assert set(choose(sizes, Breaks(20, 60), batches=True, gathers=True)) == {Way.PLAIN}


def test_steps_are_bounded() -> None:
    count = 10_000
    apart = array(range(count)) * 32
    for breaks, way, most in (
        (Breaks(FAR, FAR), Way.GATHER, 2_048),
        (Breaks(0, FAR), Way.BATCH, 4_096),
        (Breaks(0, 0), Way.PLAIN, 64),
    ):
        steps = plan(
            Fragments(0, apart + 7, apart, np.full(count, 16, np.int64)),
            ready_bytes=1 << 30,
            piece_bytes=1 << 30,
            breaks=breaks,
            batches=True,
            gathers=True,
        )
        assert {step.way for step in steps} == {way}
        assert max(len(step.lengths) for step in steps) == most
        assert sum(len(step.lengths) for step in steps) == count
        assert max(step.weight for step in steps) <= 64


def times(plain: list[float], batch: list[float], gather: list[float]) -> dict[Way, Any]:
    sizes = (4, 32, 256, 2_048)
    columns = {Way.PLAIN: plain, Way.BATCH: batch, Way.GATHER: gather}
    return {way: dict(zip(sizes, one, strict=True)) for way, one in columns.items() if one}


def test_breaks_follow_from_times() -> None:
    usual = times([40, 9, 5, 4], [12, 6, 4.5, 4], [4, 4, 4.4, 5])
    assert breaks_of(usual) == Breaks(33, 2_048)
    assert breaks_of(times([40, 9, 5, 4], [12, 6, 4.9, 4], [4, 5.9, 4, 4])) == Breaks(5, 256)
    assert breaks_of(times([4, 4, 4, 4], [9, 9, 9, 9], [9, 9, 9, 9])) == Breaks(0, 4)
    assert breaks_of(times([9, 9, 9, 9], [4, 4, 4, 4], [])) == Breaks(0, FAR)
    assert breaks_of(times([9, 9, 9, 9], [], [])) == Breaks(0, 4)
    assert breaks_of(times([9, 9, 9, 9], [], [1, 1, 1, 1])) == Breaks(2_049, 2_049)


def test_blocks_of_fragments_lie_in_the_arena_one_after_the_other() -> None:
    found = Fragments.of_blocks(3, [1_000, 5_000], [[1, 20, 300], [4, 50, 600]], [8, 16, 32], 100)
    assert found.device == 3 and found.total_bytes == 112
    assert found.addresses.tolist() == [1, 20, 300, 4, 50, 600]
    assert found.offsets.tolist() == [1_100, 1_108, 1_124, 5_100, 5_108, 5_124]
    assert found.lengths.tolist() == [8, 16, 32] * 2


def test_columns_of_different_lengths() -> None:
    with pytest.raises(InvalidBlock, match="one offset and one length"):
        Fragments(0, array([1, 2]), array([1]), array([1]))
