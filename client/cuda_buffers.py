"""Buffers of a caller in the memory of a CUDA device: torch tensors, and whatever else tells its
place by `__cuda_array_interface__`."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvstore.client.checks import wrong_size
from kvstore.client.cuda_device import Platform
from kvstore.client.cuda_fragments import Fragments
from kvstore.client.cuda_parts import Near, Part
from kvstore.client.places import Places
from kvstore.errors import InvalidBlock

LEGACY_STREAM = 1  # cudaStreamLegacy: of buffers that name no stream


@dataclasses.dataclass(frozen=True)
class DeviceBuffers:
    """Buffers of a caller in the memory of one device, with the streams that they are used on."""

    device: int
    addresses: Any
    streams: tuple[int, ...]
    buffers: Sequence[Any]

    def fragments(self, places: Places, shard: int | None, which: Any) -> Fragments:
        """The buffers `which`, an index of arrays, with the blocks of a lease, or one shard."""
        layout = places.layout
        size = layout.block_bytes if shard is None else layout.shard_bytes
        skip = 0 if shard is None else shard * layout.shard_bytes
        return Fragments.of_blocks(self.device, places.offsets, self.addresses[which], [size], skip)

    def split(
        self, fragments: Fragments, copies: Sequence[int | None], part: Part | None
    ) -> tuple[Fragments, Near | None]:
        """The fragments that come from the arena, and those that have a copy on the device."""
        found = [at for at, offset in enumerate(copies) if offset is not None]
        if part is None or not found:
            return fragments, None
        sources = np.array([copies[at] for at in found], np.int64) + part.address
        near = Near(fragments.addresses[found], sources, fragments.lengths[found])
        far = np.ones(len(fragments), bool)
        far[found] = False
        rest = fragments.addresses[far], fragments.offsets[far], fragments.lengths[far]
        return Fragments(self.device, *rest), near


def device_buffers(
    platform: Platform, buffers: Sequence[Any], size: int, *, writable: bool
) -> DeviceBuffers:
    """Where the caller's CUDA tensors, or objects with `__cuda_array_interface__`, are.

    Raises InvalidBlock unless all are on one device, contiguous, of this size in bytes, and
    writable if asked.
    """
    if all(hasattr(one, "data_ptr") for one in buffers):
        return _tensors(buffers, size)
    found = [
        _interface(platform, one, size, f"buffer {at}", writable) for at, one in enumerate(buffers)
    ]
    devices = {device for _, device, _ in found}
    if len(devices) != 1:
        raise InvalidBlock(f"buffers on devices {sorted(devices)}: give those of one device")
    streams = tuple(dict.fromkeys(stream for _, _, stream in found))
    addresses = np.array([address for address, _, _ in found], np.int64)
    return DeviceBuffers(devices.pop(), addresses, streams, buffers)


def _tensors(tensors: Sequence[Any], size: int) -> DeviceBuffers:
    """The same of torch tensors alone. They may be many, so little is done for each."""
    device = tensors[0].device
    for at, tensor in enumerate(tensors):
        if tensor.device != device:
            raise InvalidBlock(f"buffer {at} is on {tensor.device}, the first one on {device}")
        if tensor.nbytes != size:
            raise wrong_size(f"buffer {at}", tensor.nbytes, size)
        if not tensor.is_contiguous():
            raise InvalidBlock(f"buffer {at} is not contiguous: give tensor.contiguous()")
    addresses = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
    stream = sys.modules["torch"].cuda.current_stream(device).cuda_stream
    return DeviceBuffers(device.index, addresses, (stream or LEGACY_STREAM,), tensors)


def _interface(
    platform: Platform, buffer: Any, size: int, what: str, writable: bool
) -> tuple[int, int, int]:
    """Address, device and stream of any other object on a CUDA device."""
    told = getattr(buffer, "__cuda_array_interface__", None)
    if told is None:
        raise InvalidBlock(f"{what} is not in CUDA memory, the first one is: give all alike")
    shape, item = told["shape"], _item_bytes(told["typestr"])
    length = item * math.prod(shape)
    if length != size:
        raise wrong_size(what, length, size)
    strides = told.get("strides")
    if strides is not None:
        packed = [item * math.prod(shape[at + 1 :]) for at in range(len(shape))]
        if any(n > 1 and s != p for n, s, p in zip(shape, strides, packed, strict=True)):
            raise InvalidBlock(f"{what} is not contiguous: give a contiguous copy")
    address, readonly = told["data"]
    if writable and readonly:
        raise InvalidBlock(f"{what} is read-only: give a writable buffer")
    try:
        owner = platform.owner(address)
    except Exception as error:  # memory that no device has
        raise InvalidBlock(f"{what} is on no device that can be told: {error}") from None
    return address, owner, told.get("stream") or LEGACY_STREAM


@functools.cache
def _item_bytes(kind: str) -> int:
    return np.dtype(kind).itemsize
