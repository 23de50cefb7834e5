"""Small traces for tests: prompts over a forest of blocks, in memory and as files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from kvstore.traces import STEP, Shape, Trace, depths_of

Prompts = list[tuple[int, ...]]  # each a path of child numbers from the root


def prompts(*, most: int = 24, deep: int = 6, wide: int = 3) -> st.SearchStrategy[Prompts]:
    """Prompts that share beginnings."""
    path = st.lists(st.integers(0, wide - 1), min_size=1, max_size=deep).map(tuple)
    return st.lists(path, min_size=1, max_size=most)


def forest(paths: Sequence[tuple[int, ...]]) -> tuple[list[int], list[int]]:
    """Parents of the nodes in the order of their first appearance, and each prompt's leaf."""
    known: dict[tuple[int, ...], int] = {}
    parents: list[int] = []
    for path in paths:
        for end in range(1, len(path) + 1):
            if path[:end] not in known:
                known[path[:end]] = len(parents)
                parents.append(known.get(path[: end - 1], -1))
    return parents, [known[path] for path in paths]


def trace(
    paths: Sequence[tuple[int, ...]], *, gap_s: float = 1.0, block_bytes: int = 4096
) -> Trace:
    """One request each, so many seconds apart."""
    parents, leaves = forest(paths)
    steps = np.zeros(len(paths), STEP)
    steps["t"] = np.arange(len(paths)) * gap_s
    steps["leaf"] = leaves
    steps["length"] = steps["put"] = depths_of(np.array(parents))[leaves]
    steps["hit"] = -1
    return Trace(
        parents=np.array(parents, np.int32),
        keys=np.arange(len(parents), dtype=np.int32),
        steps=steps,
        shapes=[Shape(16, block_bytes)],
    )


def save(path: Path, paths: Sequence[tuple[int, ...]], *, block_tokens: int = 16) -> Path:
    """The same as a compact prefix forest."""
    parents, leaves = forest(paths)
    np.savez(
        path,
        parent_delta=(np.arange(len(parents)) - np.array(parents)).astype(np.int32),
        t_ms=np.arange(len(paths), dtype=np.int64) * 1000,
        leaf=np.array(leaves, np.int32),
        in_tokens=np.array([len(one) * block_tokens for one in paths], np.int32),
        block_tokens=np.int32(block_tokens),
        meta="small",
    )
    return path


def load_chains(path: Path) -> Iterator[list[int]]:
    """The prompts of a compact prefix forest."""
    with np.load(path) as found:
        parents = np.arange(len(found["parent_delta"])) - found["parent_delta"]
        leaves = found["leaf"].tolist()
    above = parents.tolist()
    for leaf in leaves:
        chain = []
        while leaf >= 0:
            chain.append(leaf)
            leaf = above[leaf]
        yield chain[::-1]
