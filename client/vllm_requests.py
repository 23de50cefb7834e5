"""What the scheduler's side of the vLLM connector knows: groups, requests, transfers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from kvstore.client.client import Session
from kvstore.client.grant import Grant
from kvstore.client.reservation import Reservation
from kvstore.client.vllm_waiting import Awaited
from kvstore.types import KEYS_PER_CALL_MAX


@dataclasses.dataclass(frozen=True)
class Group:
    """A KV cache group of the engine.

    number        vLLM's, which stands at the end of each key
    chunk_tokens  tokens of a chunk, the unit that is stored
    chunk_hashes  of the engine's block hashes; the last of them is the chunk's
    window        chunks that a sliding window needs; None: full attention
    """

    number: int
    chunk_tokens: int
    chunk_hashes: int
    window: int | None

    def count(self, hashes: Sequence[bytes]) -> int:
        """Chunks of a request, as many as one call takes."""
        return min(len(hashes) // self.chunk_hashes, KEYS_PER_CALL_MAX)

    def keys(self, hashes: Sequence[bytes]) -> list[bytes]:
        """vLLM's keys of the chunks of a request."""
        end = self.number.to_bytes(4, "big")
        each = self.chunk_hashes
        return [one + end for one in hashes[each - 1 : KEYS_PER_CALL_MAX * each : each]]


class Known:
    """What is known of one request of the engine."""

    def __init__(self) -> None:
        self.request: Any = None  # vLLM's
        self.asked_at: float | None = None
        self.first: list[int] = []  # chunks that were computed when it was asked, of each group
        self.found: dict[bytes, int] = {}  # key -> where its slot starts in the arena
        self.grants: list[Grant] = []
        self.session: Session | None = None
        self.awaited: Awaited | None = None
        self.load_failed = False  # it is not asked for again


@dataclasses.dataclass
class Moving:
    """A transfer that workers are about: what it holds, and how many have not reported yet."""

    owner: Known
    held: list[Grant] | list[Reservation]
    stored: bool
    missing: int
    failed: bool = False
