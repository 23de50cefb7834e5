"""What callers give, brought into the form that the rest of the client expects, or refused."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvstore.errors import InvalidBlock, InvalidKeys, InvalidRequest
from kvstore.protos import kvstore_pb2 as pb
from kvstore.types import check_hash_length, check_keys

WAIT_S_MAX = 3_600.0  # longer waits are cut to this, as the daemon does
HINTS = ("reuse", "finish_reason", "tag")


def listed_hashes(hashes: Any) -> Sequence[bytes]:
    """Hashes as something that has a length: whatever gives them one after the other is taken."""
    if type(hashes) is list or type(hashes) is tuple:
        return hashes
    if isinstance(hashes, np.ndarray):
        raise InvalidKeys(
            "hashes are a numpy array, which loses zeros at their ends: give a list of bytes "
            "objects"
        )
    try:
        return list(hashes)
    except TypeError:
        raise InvalidKeys(
            f"hashes are a {type(hashes).__name__}: give a list of bytes objects"
        ) from None


def keys(hashes: Any) -> Sequence[bytes]:
    """Hashes as a list of which everything has been checked: see `check_keys`."""
    found = listed_hashes(hashes)
    check_keys(found)
    return found


def listed_buffers(buffers: Any) -> list[Any]:
    """A list of its own of buffers."""
    try:
        return list(buffers)
    except TypeError:
        raise InvalidBlock(
            f"the buffers are a {type(buffers).__name__}: give a list, one for each hash"
        ) from None


def wrong_size(what: str, found: int, size: int) -> InvalidBlock:
    """The error for a buffer of so many bytes, where a layout takes `size`."""
    return InvalidBlock(f"{what} has {found} bytes, this layout takes {size}: give as many")


def wait_s(deadline_s: Any, most: float = WAIT_S_MAX) -> float:
    """A deadline as a wait that clocks can take."""
    if not isinstance(deadline_s, int | float) or deadline_s != deadline_s:
        raise InvalidRequest(f"deadline_s is {deadline_s!r}: give a number of seconds")
    return min(max(0.0, deadline_s), most)


def speed(tokens_per_s: Any) -> float:
    """A prefill speed; 0 where none is given, or none that can be."""
    if tokens_per_s is None:
        return 0.0
    try:
        found = float(tokens_per_s)
    except (TypeError, ValueError, OverflowError):
        raise InvalidRequest(
            f"prefill_tokens_per_s is {tokens_per_s!r}: give tokens a second, or None"
        ) from None
    return found if 0 < found < math.inf else 0.0


def seconds_to_live(ttl_s: Any) -> float:
    """A time to live; 0 where none is given."""
    if ttl_s is None:
        return 0.0
    try:
        if isinstance(ttl_s, int | float) and ttl_s > 0:
            return float(ttl_s)
    except OverflowError:
        pass
    raise InvalidRequest(f"ttl_s is {ttl_s!r}: give more than 0 seconds, or None for ever")


def gpu_numbers(gpus: Any) -> list[int]:
    """Places in `client.gpus`, one for each shard."""
    try:
        return [number_of(one, 1 << 32, "GPU") for one in gpus]
    except TypeError:
        raise InvalidRequest(
            f"gpus are a {type(gpus).__name__}: give a list of integers, one for each shard"
        ) from None


def parent(hash: Any) -> bytes:
    """The hash before the first; empty where none is given."""
    if hash is None or hash == b"":
        return b""
    if not isinstance(hash, bytes):
        raise InvalidKeys(f"parent is a {type(hash).__name__}: give a bytes object, or None")
    check_hash_length(len(hash), len(hash))
    return hash


def number_of(value: Any, count: int, what: str) -> int:
    """One of `count` things that are counted from 0."""
    try:
        number = operator.index(value)
    except TypeError:
        raise InvalidRequest(f"{what} {value!r}: give an integer") from None
    if not 0 <= number < count:
        raise InvalidRequest(f"{what} {number} of {count}: they count from 0")
    return number


def hints_of(hints: Mapping[str, str]) -> Any:
    """The message of a caller's hints."""
    if not isinstance(hints, Mapping):
        raise InvalidRequest(f"hints are a {type(hints).__name__}: give a dict of {list(HINTS)}")
    for name, value in hints.items():
        if name not in HINTS:
            raise InvalidRequest(f"unknown hint {name!r}: there are {sorted(HINTS)}")
        if not isinstance(value, str):
            raise InvalidRequest(f"hint {name} is {value!r}: give a string")
    reuse = hints.get("reuse", "unknown").upper()
    if reuse not in pb.Hints.Reuse.keys():  # noqa: SIM118  # an enum wrapper, not a dict
        raise InvalidRequest(f"hint reuse is {hints['reuse']!r}: use continue, done or unknown")
    try:
        return pb.Hints(
            reuse=pb.Hints.Reuse.Value(reuse),  # type: ignore[arg-type]  # its number
            finish_reason=hints.get("finish_reason", ""),
            tag=hints.get("tag", ""),
        )
    except ValueError as error:
        raise InvalidRequest(f"a hint is no text: {error}") from None
