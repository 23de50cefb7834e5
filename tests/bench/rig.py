"""A rehearsal of the GPU benchmark: a fake device, daemons with GPUs of host memory, in small."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator

from kvstore.bench_rig import Rig, Sizes
from kvstore.types import KIB, MIB
from tests.client.fake_device import FakePlatform

SMALL = Sizes(
    blocks=16,
    block_bytes=64 * KIB,
    layers=8,
    arena_bytes=32 * MIB,
    slab_bytes=1 * MIB,
    piece_bytes=8 * MIB,
    rounds=2,
    starts=1,
)


@contextlib.contextmanager
def rehearsal() -> Iterator[Rig]:
    """See Rig. Its figures mean nothing: it shows that the benchmark itself works."""
    with tempfile.TemporaryDirectory(prefix="kv-gpus-") as folder:
        yield Rig(
            FakePlatform(),
            0,
            "a rehearsal: no device, the figures mean nothing",
            SMALL,
            module=("tests.e2e.gpus", folder),
        )
