"""How large the demonstration is: the model, its prompt, and tiers that are too small for it."""

from __future__ import annotations

import dataclasses

from kvstore.types import KIB, MIB

FLOAT32_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """One size of the demonstration. The model is a Llama of random weights drawn from `seed`."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    block_tokens: int
    block_count: int  # whole blocks of the prompt: what is offloaded
    tail_tokens: int  # the rest of the prompt: always computed, so a first token can be had
    chunk_tokens: int  # of a prefill; results depend on the split in their last bits
    greedy_steps: int = 8
    seed: int = 20_26
    dram_bytes: int  # less than the blocks need, so that a part must come from NVMe
    nvme_bytes: int
    speed_up_min: float  # cold over reloaded; 0: not asked

    def __post_init__(self) -> None:
        assert self.tail_tokens % self.block_tokens, "the prompt must not be whole blocks"
        assert self.chunk_tokens % self.block_tokens == 0, "a chunk is whole blocks"
        assert 2 * self.dram_bytes <= self.kv_bytes <= 3 * self.dram_bytes, "DRAM must be short"
        assert self.kv_bytes <= self.nvme_bytes, "NVMe must hold them all"

    @property
    def prefix_tokens(self) -> int:
        """Tokens of the whole blocks."""
        return self.block_count * self.block_tokens

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self.prefix_tokens + self.tail_tokens

    @property
    def block_bytes(self) -> int:
        """Bytes of a block: keys and values of all layers."""
        token_bytes = self.layers * 2 * self.kv_heads * self.head_dim * FLOAT32_BYTES
        return token_bytes * self.block_tokens

    @property
    def kv_bytes(self) -> int:
        """Bytes of all blocks of the prompt."""
        return self.block_count * self.block_bytes


# About 150 million parameters; 48 blocks of 2 MiB. A cold prefill is seconds on two cores.
FULL = Profile(
    name="full",
    hidden=1024,
    intermediate=4096,
    layers=8,
    heads=16,
    kv_heads=8,
    head_dim=64,
    vocab=8192,
    block_tokens=64,
    block_count=48,
    tail_tokens=19,
    chunk_tokens=512,
    dram_bytes=40 * MIB,
    nvme_bytes=256 * MIB,
    speed_up_min=3.0,
)

# 24 blocks of 1 MiB, for a test run: the same checks, less the speed-up.
SMALL = Profile(
    name="small",
    hidden=256,
    intermediate=512,
    layers=8,
    heads=8,
    kv_heads=4,
    head_dim=64,
    vocab=2048,
    block_tokens=64,
    block_count=24,
    tail_tokens=19,
    chunk_tokens=256,
    dram_bytes=10 * MIB,
    nvme_bytes=64 * MIB,
    speed_up_min=0.0,
)

PROFILES = {one.name: one for one in (FULL, SMALL)}


def size_text(count: int) -> str:
    """A size as the configuration reads it."""
    return f"{count // MIB} MiB" if count % MIB == 0 else f"{count // KIB} KiB"
