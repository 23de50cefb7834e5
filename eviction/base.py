"""The policy protocol: which resident blocks are worth least. It names them, no more."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple, Protocol

Victims = Generator[int, bool | None, None]


class Policy(Protocol):
    """An order of worth over the keys resident in one tier for one slot size.

    Keys are the small integers by which the catalog knows blocks. Lists of keys come in prefix
    order: each block follows the one that it depends on, so in one list the last is worth least.
    A key keeps its meaning after it was forgotten, and may be admitted again, until it is dropped.
    """

    def admit(self, keys: Sequence[int], now: float) -> None:
        """The keys have become resident. None of them may be resident already."""

    def touch(self, keys: Sequence[int], now: float) -> None:
        """The keys were asked for again. Those not resident are passed over."""

    def warm(self, keys: Sequence[int], now: float) -> None:
        """Blocks that depend on these have come: the keys leave after them. They were not asked
        for. Those not resident are passed over."""

    def defer(self, keys: Sequence[int]) -> None:
        """These were named and cannot leave yet: others are named before them for a while."""

    def forget(self, keys: Sequence[int]) -> None:
        """The keys have left, for whatever reason. Those not resident are passed over."""

    def drop(self, keys: Sequence[int]) -> None:
        """Keys that are not resident mean nothing from now on; they may be given to other blocks.
        Nothing may be remembered of them."""

    def victims(self, now: float) -> Victims:
        """Resident keys, least valuable first. Void after the next change of the policy.

        Whoever looks sends True for a key that has to stay for now, and may then be spared what
        that key depends on. Naming changes nothing that can be seen.
        """

    def residents(self) -> Iterator[int]:
        """Every resident key once, roughly the least valuable first. Cheap, and changes nothing."""

    def __len__(self) -> int:
        """Resident keys."""

    def __contains__(self, key: int) -> bool:
        """Whether the key is resident."""


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """Blocks that were asked for, or offered, together.

    chain   those that are known, resident or not, in prefix order from the prompt's start
    fresh   how many blocks behind the chain were never heard of, or are long forgotten
    now     seconds, of a clock that never goes back
    reuse   "continue", "done" or "unknown": whether its sender expects to come back
    tag     what its sender calls such requests: a class of its own ("" is one, too)
    block_tokens  tokens of each block, as far as known
    """

    chain: Sequence[int]
    fresh: int
    now: float
    reuse: str = "unknown"
    tag: str = ""
    block_tokens: int = 0


class Asked(NamedTuple):
    """What a family made of a request: a class of its own counting, its length, its time; and the
    tokens of its blocks."""

    kind: int
    length: int
    now: float
    block_tokens: int = 0


class Family(Protocol):
    """The policies of one tenant, one for each tier and slot size, and what they learn together.

    `contests`: whether new blocks may be worth less than all that is there.
    """

    contests: bool

    def make(self, tier: int, capacity: int) -> Policy:
        """A policy for a tier (a smaller number is faster) in which that many blocks have room."""

    def asked(self, request: Request) -> Asked:
        """Told once for each request, before its blocks are touched or admitted anywhere."""

    def born(self, parent: int, keys: Sequence[int], asked: Asked) -> None:
        """Keys that are a chain behind `parent` (-1: none), those of them that are not known
        named by that request. To be told before they are admitted."""

    def hinted(self, asked: Asked, chain: Sequence[int], reuse: str, tag: str) -> Asked:
        """Hints about that request have come late; it asked for this chain."""

    def drop(self, keys: Sequence[int]) -> None:
        """As for Policy; told once for all."""

    def reused(self, key: int) -> bool:
        """Whether a known key was asked for more than once, or what is there depends on it, as far
        as can be told."""

    def likely(self, key: int, now: float, horizon_s: float, least: float) -> bool:
        """Whether a known key has at least that chance to be asked for within that time, as far as
        can be told."""

    def idle_s(self, key: int, now: float) -> float:
        """How long ago a known key was asked for; 0 where that is not known."""

    def worth(self, keys: Sequence[int], now: float) -> float | None:
        """What known keys are worth on average, by a measure that holds for all slot sizes; None
        where there is none but how long ago they were used."""


class Independent:
    """A family of policies that share nothing. `make` is given the capacity in blocks."""

    contests = False

    def __init__(self, make: Callable[[int], Policy]) -> None:
        self._make = make
        self._made: list[Policy] = []

    def make(self, tier: int, capacity: int) -> Policy:
        policy = self._make(max(1, capacity))
        self._made.append(policy)
        return policy

    def asked(self, request: Request) -> Asked:
        return Asked(0, len(request.chain) + request.fresh, request.now)

    def born(self, parent: int, keys: Sequence[int], asked: Asked) -> None:
        pass

    def hinted(self, asked: Asked, chain: Sequence[int], reuse: str, tag: str) -> Asked:
        return asked

    def drop(self, keys: Sequence[int]) -> None:
        for policy in self._made:
            policy.drop(keys)

    def reused(self, key: int) -> bool:
        return True

    def likely(self, key: int, now: float, horizon_s: float, least: float) -> bool:
        return True

    def idle_s(self, key: int, now: float) -> float:
        return 0.0

    def worth(self, keys: Sequence[int], now: float) -> float | None:
        return None
