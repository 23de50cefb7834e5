"""The policy protocol: which resident blocks are worth least. It names them, no more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol


class Policy(Protocol):
    """An order of worth over the keys resident in one tier for one slot size.

    Keys are the small integers by which the catalog knows blocks. Lists of keys come in prefix
    order: each block follows the one that it depends on, so in one list the last is worth least.
    """

    def admit(self, keys: Sequence[int], now: float) -> None:
        """The keys have become resident. None of them may be resident already."""

    def touch(self, keys: Sequence[int], now: float) -> None:
        """The keys were asked for again. Those not resident are passed over."""

    def forget(self, keys: Sequence[int]) -> None:
        """The keys have left, for whatever reason. Those not resident are passed over."""

    def victims(self, now: float) -> Iterator[int]:
        """Resident keys, least valuable first. Changes nothing; void after the next change."""

    def __len__(self) -> int:
        """Resident keys."""

    def __contains__(self, key: int) -> bool:
        """Whether the key is resident."""
