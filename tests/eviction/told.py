"""A ranking of `Relevance` as if it stood alone: whoever calls it tells the family first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvstore.eviction.base import Asked, Policy, Request, Victims
from kvstore.eviction.ranking import NONE
from kvstore.eviction.relevance import Relevance
from kvstore.types import DRAM


class Told:
    """The only tier of a family. Lists are requests, in the order that `kvstore.learning` keeps."""

    def __init__(self, capacity: int = 1) -> None:
        self.family = Relevance()
        self.ranking = self.family.make(DRAM, capacity)

    def ask(
        self,
        chain: Sequence[int],
        fresh: Sequence[int],
        now: float,
        *,
        reuse: str = "unknown",
        tag: str = "",
    ) -> Asked:
        """One request: `fresh` blocks come behind a chain of known ones."""
        asked = self.family.asked(Request(chain, len(fresh), now, reuse, tag))
        self.family.born(chain[-1] if chain else NONE, fresh, asked)
        return asked

    def known(self, chain: Sequence[int]) -> int:
        """How many leading ones the family has heard of: here or gone, as long as not dropped."""
        blocks = self.family.blocks
        blocks.reserve(max(chain, default=0) + 1)
        cohort = blocks.cohort
        return next((at for at, key in enumerate(chain) if cohort[key] == NONE), len(chain))

    def admit(self, keys: Sequence[int], now: float) -> None:
        self.ask([], keys, now)
        self.ranking.admit(keys, now)

    def touch(self, keys: Sequence[int], now: float) -> None:
        known = [key for key in keys if key in self.ranking]
        self.ask(known, [], now)
        self.ranking.touch(known, now)

    def warm(self, keys: Sequence[int], now: float) -> None:
        self.ranking.warm(keys, now)

    def defer(self, keys: Sequence[int]) -> None:
        self.ranking.defer(keys)

    def forget(self, keys: Sequence[int]) -> None:
        self.ranking.forget(keys)

    def drop(self, keys: Sequence[int]) -> None:
        self.family.drop(keys)

    def victims(self, now: float) -> Victims:
        return self.ranking.victims(now)

    def residents(self) -> Iterator[int]:
        return self.ranking.residents()

    def __len__(self) -> int:
        return len(self.ranking)

    def __contains__(self, key: int) -> bool:
        return key in self.ranking


def come(policy: Policy, chain: Sequence[int], fresh: Sequence[int], now: float) -> None:
    """A request for a chain that is there and blocks that are not, which come then."""
    if isinstance(policy, Told):
        policy.ask(chain, fresh, now)
        policy.ranking.admit(fresh, now)
        return
    policy.touch(chain, now)
    policy.admit(fresh, now)
    policy.warm(chain, now)
