"""A trace in memory: who asked for which blocks when, from whichever file it was read.

Prompts form a forest: a node is a block behind one chain of blocks, so that a node and its
ancestors are a prompt's beginning. A step is one thing that clients did, at one node:

    chain     0 ............... skip ............... length
              context, not asked    asked, or offered
    ASKED     a request for blocks; what of chain[skip:put] is missing is then offered
    OFFERED   blocks offered by themselves: chain[skip:length]

How a file is laid out is told by those who read it: `kvstore.trace_file`, and `load` below for
compact prefix forests.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import InvalidRequest
from kvstore.types import SLOT_ALIGNMENT

T = TypeVar("T")
ASKED, OFFERED = 0, 1
CHAINS_KEPT_MAX = 4_096
FOREST_NAMES = ("parent_delta", "t_ms", "leaf", "block_tokens")

STEP = np.dtype(
    [
        ("t", np.float64),  # seconds since the first
        ("kind", np.uint8),
        ("again", np.bool_),  # the client asked for the rest by a later step
        ("layout", np.uint16),
        ("leaf", np.int32),  # node of the chain's last block; -1: no block at all
        ("skip", np.int32),
        ("length", np.int32),
        ("put", np.int32),
        ("tokens", np.int64),  # of the whole prompt; 0: as many as the chain has
        ("tokens_per_s", np.float32),  # prefill speed that the client told; 0: none
        ("reuse", np.uint8),  # place in accesses.REUSES
        ("tag", np.uint16),
        ("hit", np.int32),  # as it was when it was recorded; -1: nobody looked
        ("slow", np.int32),  # of them, those on NVMe
    ]
)


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """What one layout's blocks are like."""

    block_tokens: int
    block_bytes: int

    @property
    def slot_bytes(self) -> int:
        """What one takes in a tier."""
        return -(-self.block_bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """The tiers of the daemon that was recorded."""

    dram_bytes: int
    nvme_bytes: int
    slab_bytes: int
    write_policy: str = "through"
    write_budget: float | None = None


@dataclasses.dataclass(kw_only=True)
class Trace:
    """Steps over a forest. `keys[node]` is the block of a node: the same one where a client has
    sent a hash behind other chains, too."""

    parents: NDArray[np.int32]
    keys: NDArray[np.int32]
    steps: NDArray[Any]  # of STEP
    shapes: list[Shape]
    sizes: Sizes | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)
    dropped: int = 0  # requests that the recorder could not keep

    @property
    def block_count(self) -> int:
        """Distinct blocks."""
        return int(self.keys.max()) + 1 if len(self.keys) else 0

    @property
    def request_count(self) -> int:
        """Requests for blocks, those that went on with an earlier one not counted."""
        asked = self.steps["kind"] == ASKED
        return int(asked.sum()) - int((asked & self.steps["again"]).sum())

    @property
    def reference_count(self) -> int:
        """Blocks asked for."""
        steps = self.steps[self.steps["kind"] == ASKED]
        return int((steps["length"] - steps["skip"]).sum())

    @property
    def half(self) -> int:
        """The step at which the second half of the requests begins."""
        asked = np.flatnonzero(self.steps["kind"] == ASKED)
        return int(asked[len(asked) // 2]) if len(asked) else 0


class Chains(Generic[T]):
    """What belongs to the blocks of a prompt, from its start to a leaf. Some are kept."""

    def __init__(self, parents: Sequence[int], of: Sequence[T]) -> None:
        self._parents = parents
        self._of = of
        self._kept: OrderedDict[int, list[T]] = OrderedDict()

    def to(self, leaf: int) -> list[T]:
        """One for each block. Not to be changed: it may be kept."""
        kept = self._kept
        found = kept.get(leaf)
        if found is not None:
            kept.move_to_end(leaf)
            return found
        parents, of, behind, node = self._parents, self._of, [], leaf
        while node >= 0 and node not in kept:
            behind.append(of[node])
            node = parents[node]
        behind.reverse()
        chain = kept[node] + behind if node >= 0 else behind
        kept[leaf] = chain
        if len(kept) > CHAINS_KEPT_MAX:
            kept.popitem(last=False)
        return chain


def load(path: Path, *, block_bytes: int | None = None, bytes_per_token: int = 1) -> Trace:
    """The trace in a file: one that the daemon recorded, or a compact prefix forest (.npz).

    A forest does not say how large a block is: `block_bytes`, or `bytes_per_token` times its
    tokens. Raises InvalidRequest for what is no trace, OSError for what cannot be read.
    """
    from kvstore import trace_file  # it builds what is defined here

    with path.open("rb") as file:
        start = file.read(8)
    if start == trace_file.MAGIC:
        return trace_file.read(path)
    if start[:4] == b"PK\3\4":
        return _forest(path, block_bytes, bytes_per_token)
    raise InvalidRequest(
        f"{path} is no trace: give a file of `kvstore trace start`, or a prefix forest (.npz)"
    )


def _forest(path: Path, block_bytes: int | None, bytes_per_token: int) -> Trace:
    try:
        with path.open("rb") as file, np.load(file) as found:
            missing = [name for name in FOREST_NAMES if name not in found.files]
            arrays = {name: found[name] for name in found.files if name != "meta"}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}: make it anew") from None
    if missing:
        raise InvalidRequest(
            f"{path} has no array {missing[0]!r}: a prefix forest has {', '.join(FOREST_NAMES)}"
        )
    for name, array in arrays.items():
        if name in (*FOREST_NAMES, "in_tokens"):
            _check_numbers(path, name, array)
    delta = arrays["parent_delta"].astype(np.int64)
    count, tokens = len(delta), int(arrays["block_tokens"].flat[0])
    parents = np.arange(count, dtype=np.int64) - delta
    leaves, times = arrays["leaf"].astype(np.int64), arrays["t_ms"].astype(np.float64) / 1e3
    if (delta < 1).any() or (parents < -1).any() or not 1 <= tokens < 1 << 31:
        raise InvalidRequest(f"{path}: a node's parent must come before it: make it anew")
    if (leaves < -1).any() or (leaves >= count).any() or (np.diff(times) < 0).any():
        raise InvalidRequest(f"{path}: leaves must be nodes, and times sorted: make it anew")
    if not len(leaves) == len(times) == len(arrays.get("in_tokens", leaves)):
        raise InvalidRequest(f"{path}: each request must have a leaf and a time: make it anew")
    steps = np.zeros(len(leaves), STEP)
    steps["t"] = times - (times[0] if len(times) else 0.0)
    steps["leaf"] = leaves
    depths = depths_of(parents)
    steps["length"] = steps["put"] = np.where(leaves < 0, 0, depths[leaves]) if count else 0
    steps["tokens"] = arrays.get("in_tokens", 0)
    steps["hit"] = -1
    return Trace(
        parents=parents.astype(np.int32),
        keys=np.arange(count, dtype=np.int32),
        steps=steps,
        shapes=[Shape(tokens, block_bytes or tokens * bytes_per_token)],
    )


def _check_numbers(path: Path, name: str, array: NDArray[Any]) -> None:
    one = name == "block_tokens"
    numbers = array.dtype.kind in "iu" or (array.dtype.kind == "f" and np.isfinite(array).all())
    if not numbers or (array.size != 1 if one else array.ndim != 1):
        raise InvalidRequest(
            f"{path}: {name!r} must be {'one number' if one else 'a row of numbers'}, not "
            f"{array.dtype} of shape {array.shape}, nor infinite: make it anew"
        )


def depths_of(parents: NDArray[Any]) -> NDArray[np.int32]:
    """How many blocks end with each node: 1 for a root. Parents come before their children."""
    depths = [0] * (len(parents) + 1)  # the last is that of -1
    for node, parent in enumerate(parents.tolist()):
        depths[node] = depths[parent] + 1
    return np.array(depths[:-1], np.int32)
