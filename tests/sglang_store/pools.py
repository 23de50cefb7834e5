"""SGLang's own host pools, small ones on the CPU. Runs in the environment that has SGLang."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.device_pool_info import (
    KVBufferLayout,
    KVBuffers,
    MambaStateBufferInfo,
    MHABufferInfo,
    MLABufferInfo,
)
from sglang.srt.mem_cache.memory_pool_host import DeepSeekV4PagedHostPool, LogicalHostPool
from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost
from sglang.srt.mem_cache.pool_host.mha import (
    AsymmetricMHATokenToKVPoolHost,
    MHATokenToKVPoolHost,
)
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

PAGE, LAYERS, HEADS, WIDTH = 16, 3, 2, 8
CPU = torch.device("cpu")


def _mha(kind: Any, pages: int, layout: str, v_width: int) -> Any:
    def buffers(width: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(PAGE, HEADS, width, dtype=torch.bfloat16) for _ in range(LAYERS))

    def pointers(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.tensor([one.data_ptr() for one in tensors], dtype=torch.uint64)

    k, v = buffers(WIDTH), buffers(v_width)
    info = MHABufferInfo(
        buffers=KVBuffers(
            k=k, v=v, k_data_ptrs=pointers(k), v_data_ptrs=pointers(v), layout=KVBufferLayout.NHD
        ),
        page_size=PAGE,
        head_num=HEADS,
        head_dim=WIDTH,
        v_head_dim=v_width,
        dtype=torch.bfloat16,
        device=CPU,
    )
    return kind(
        info,
        1.0,
        0,
        PAGE,
        layout,
        pin_memory=False,
        device_capacity_tokens=PAGE,
        start_layer=0,
        end_layer=LAYERS,
        host_token_capacity=pages * PAGE,
    )


def _mla(pages: int, layout: str) -> Any:
    rank, rope = 12, 4
    rows = tuple(torch.zeros(PAGE, 1, rank + rope, dtype=torch.bfloat16) for _ in range(LAYERS))
    info = MLABufferInfo(
        buffers=rows,
        data_ptrs=torch.tensor([one.data_ptr() for one in rows], dtype=torch.uint64),
        layer_indices=tuple(range(LAYERS)),
        device_layer_num=LAYERS,
        page_size=PAGE,
        kv_lora_rank=rank,
        qk_rope_head_dim=rope,
        kv_cache_dim=rank + rope,
        dtype=torch.bfloat16,
        device=CPU,
        packed_fp8=False,
    )
    return MLATokenToKVPoolHost(
        info,
        1.0,
        0,
        PAGE,
        layout,
        pin_memory=False,
        device_capacity_tokens=PAGE,
        start_layer=0,
        end_layer=LAYERS,
        target_layer_num=LAYERS,
        host_token_capacity=pages * PAGE,
    )


def _mamba(pages: int, layout: str, *, side_state: bool) -> Any:
    extra = (torch.zeros(4, 5, dtype=torch.int32),) if side_state else ()
    info = MambaStateBufferInfo(
        temporal=torch.zeros(2, 4, 3, 5, dtype=torch.float32),
        conv=(
            torch.zeros(2, 4, 7, dtype=torch.bfloat16),
            torch.zeros(2, 4, 9, dtype=torch.bfloat16),
        ),
        extra_checkpoint_buffers=extra,
    )
    return MambaPoolHost(info, float(pages), 0, device_capacity=1, pin_memory=False, layout=layout)


def make(kind: str, pages: int, layout: str) -> Any:
    """A host pool with room for so many pages, of one of SGLang's classes."""
    if kind == "mha":
        return _mha(MHATokenToKVPoolHost, pages, layout, WIDTH)
    if kind == "asymmetric":
        return _mha(AsymmetricMHATokenToKVPoolHost, pages, layout, WIDTH // 2)
    if kind == "mla":
        return _mla(pages, layout)
    if kind == "mamba":
        return _mamba(pages, layout, side_state=False)
    if kind == "mamba-side-state":
        return _mamba(pages, layout, side_state=True)
    if kind == "paged":
        rows = [torch.zeros(2, 40, dtype=torch.uint8) for _ in range(LAYERS)]
        return DeepSeekV4PagedHostPool("c4", rows, 40, pages, PAGE, layout, pin_memory=False)
    assert kind == "logical", kind
    return LogicalHostPool(pages * PAGE, PAGE, layout)
