"""What SGLang needs of CUDA packages in order to be imported, and to run HiCache, on the CPU.

Imported at the start of every process of the environment, before SGLang. The transfers between the
engine's own pool and its host pool are CUDA kernels, as is the rotation of queries and keys: what
is needed of them is given here in Python. Nothing
of the storage interface is replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

POOL_MODULES = {
    "sglang.srt.mem_cache.pool_host.base",
    "sglang.srt.mem_cache.pool_host.common",
    "sglang.srt.mem_cache.pool_host.mha",
}


def define_vision_operators() -> None:
    """The schemas that torchvision wants to find; its own library needs CUDA."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    globals()["_library"] = library  # it lasts as long as it is referred to


def rotary_embedding(
    positions: Any, query: Any, key: Any, head_size: int, cos_sin_cache: Any, is_neox: bool
) -> None:
    """`vllm._custom_ops.rotary_embedding`, which SGLang takes where it knows no other: rotates
    queries and keys in place."""
    import torch

    cos, sin = cos_sin_cache[positions.flatten()].chunk(2, dim=-1)
    for rows in (query, key):
        heads = rows.view(len(cos), -1, head_size)[..., : 2 * cos.shape[-1]]
        pairs = heads.chunk(2, dim=-1) if is_neox else (heads[..., ::2], heads[..., 1::2])
        first, second = (half.clone() for half in pairs)
        c, s = cos[:, None], sin[:, None]
        turned = (first * c - second * s, second * c + first * s)
        if is_neox:
            heads.copy_(torch.cat(turned, dim=-1))
        else:
            heads.copy_(torch.stack(turned, dim=-1).flatten(-2))


def provide_rotary_embedding() -> None:
    """Under the name that SGLang imports it from, without there being a vllm."""
    module: Any = ModuleType("vllm._custom_ops")
    module.rotary_embedding = rotary_embedding
    sys.modules[module.__name__] = module


def all_layers_to_pages(
    *, src_ptrs: Any, dst_ptrs: Any, src_indices: Any, dst_indices: Any, page_size: int
) -> None:
    """`transfer_kv_all_layer_direct_lf_pf`: pages of all layers of the engine's pool into pages of
    a page_first_direct host pool. `dst_ptrs` are its K and its V."""
    layers = len(src_ptrs) // len(dst_ptrs)
    for half, target in enumerate(dst_ptrs):
        for start in range(0, len(src_indices), page_size):
            page = int(dst_indices[start]) // page_size
            rows = src_indices[start : start + page_size]
            for layer in range(layers):
                source = src_ptrs[half * layers + layer]
                target[page, layer].copy_(source[rows].reshape(target[page, layer].shape))


def one_layer_from_pages(
    *,
    src_ptrs: Any,
    dst_ptrs: Any,
    src_indices: Any,
    dst_indices: Any,
    layer_id: int,
    page_size: int,
) -> None:
    """`transfer_kv_per_layer_direct_pf_lf`: the way back, one layer at a time."""
    for source, target in zip(src_ptrs, dst_ptrs, strict=True):
        for start in range(0, len(src_indices), page_size):
            page = int(src_indices[start]) // page_size
            rows = dst_indices[start : start + page_size]
            target[rows] = source[page, layer_id].reshape(target[rows].shape)


class _Patches(MetaPathFinder, Loader):
    """Loads SGLang's modules as they are, then puts the functions above into them."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in POOL_MODULES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            self.loaders[name] = spec.loader
            spec.loader = self
        return spec

    def __init__(self) -> None:
        self.loaders: dict[str, Any] = {}

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loaders[spec.name].create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self.loaders[module.__name__].exec_module(module)
        names: Any = module
        names.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0  # it leaves 10 GiB of the host free
        names._cuda_host_register = lambda *_, **__: None  # nothing to pin for
        names.transfer_kv_all_layer_direct_lf_pf = all_layers_to_pages
        names.transfer_kv_per_layer_direct_pf_lf = one_layer_from_pages


define_vision_operators()
provide_rotary_embedding()
sys.meta_path.insert(0, _Patches())
